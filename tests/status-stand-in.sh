#!/usr/bin/env bash
# What the host's status script reads of alerts, and how: no dispatcher code, only jq over the state file and
# over the last line of the telemetry file.
#
#   status-stand-in.sh --repo R --loop L
set -euo pipefail

repo="" loop=""
while (($#)); do
  case "$1" in
    --repo) repo="$2" ;;
    --loop) loop="$2" ;;
    *) echo "status-stand-in: unknown option $1" >&2 && exit 2 ;;
  esac
  shift 2
done

folder="$repo/.superloop/ops-manager/$loop"
state=null delivery=null
[[ -f "$folder/alert-dispatch-state.json" ]] && state="$(<"$folder/alert-dispatch-state.json")"
if [[ -s "$folder/telemetry/alerts.jsonl" ]]; then
  delivery="$(tail -n 1 "$folder/telemetry/alerts.jsonl")"
fi

# --slurpfile and not --argjson: a row may be longer than an argument can be.
jq -cn --slurpfile state <(printf '%s' "$state") --slurpfile delivery <(printf '%s' "$delivery") '
  {alerts: {
    dispatch: ($state[0] | if . == null then null else {
      status, updatedAt, processedCount, dispatchedCount, skippedCount, failedCount, failureReasonCodes,
      escalationsLineOffset, escalationsLineCount, lastTraceId: .traceId
    } end),
    lastDelivery: ($delivery[0] | if . == null then null else {
      timestamp, status, reasonCode, escalationCategory, eventSeverity, sinkCount, dispatchedSinkCount,
      failedSinkCount, traceId, escalationTraceId
    } end)
  }}'
