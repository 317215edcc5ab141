#!/usr/bin/env bash
# The end of a reconcile pass, as the host does it: runs the dispatcher once, keeps what it said, and never
# lets it decide how the pass ends.
#
#   reconcile-stand-in.sh --repo R --loop L [--trace-id T] [--alert-config-file C]
#
# Prints one JSON object: {loopId, traceId, dispatchExitCode, dispatch}, where dispatch is what the dispatcher
# printed, or null where it failed.
set -uo pipefail

die() {
  echo "reconcile-stand-in: $1" >&2
  exit 2
}

repo="" loop="" trace_id="reconcile-$$-$(date +%s)" config_args=()
while (($#)); do
  (($# > 1)) || die "$1 needs a value"
  case "$1" in
    --repo) repo="$2" ;;
    --loop) loop="$2" ;;
    --trace-id) trace_id="$2" ;;
    --alert-config-file) config_args=(--alert-config-file "$2") ;;
    *) die "unknown option $1" ;;
  esac
  shift 2
done
[[ -n "$repo" && -n "$loop" ]] || die "--repo and --loop are required"
script="${OPS_MANAGER_ALERT_DISPATCH_SCRIPT:-}"
[[ -n "$script" ]] || die "OPS_MANAGER_ALERT_DISPATCH_SCRIPT is not set"

folder="$repo/.superloop/ops-manager/$loop"
escalations_file="$folder/escalations.jsonl"
state_file="$folder/alert-dispatch-state.json"
telemetry_file="$folder/telemetry/alerts.jsonl"
mkdir -p "$folder/telemetry"

exit_code=0
# One stream: a word on stderr of a run that went well would spoil the JSON, as it does in the host.
output="$("$script" \
  --repo "$repo" --loop "$loop" --trace-id "$trace_id" \
  --escalations-file "$escalations_file" --dispatch-state-file "$state_file" \
  --dispatch-telemetry-file "$telemetry_file" \
  ${config_args[@]+"${config_args[@]}"} 2>&1)" || exit_code=$?

about=(--arg loop "$loop" --arg trace "$trace_id")
if ((exit_code == 0)); then
  jq -ces "${about[@]}" '
    if length == 1 and (.[0] | type) == "object"
    then {loopId: $loop, traceId: $trace, dispatchExitCode: 0, dispatch: .[0]}
    else empty end' <<<"$output" 2>/dev/null && exit 0
  exit_code=-1
fi
jq -cn "${about[@]}" --arg timestamp "$(date -u +%Y-%m-%dT%H:%M:%SZ)" --rawfile message <(tail -n 40 <<<"$output") \
  '{timestamp: $timestamp, loopId: $loop, traceId: $trace, category: "alert_dispatch",
    status: "failed_command", reasonCode: "alert_dispatch_failed", message: ($message | rtrimstr("\n"))}' \
  >>"$telemetry_file"
jq -cn "${about[@]}" --argjson code "$exit_code" \
  '{loopId: $loop, traceId: $trace, dispatchExitCode: $code, dispatch: null}'
exit 0
