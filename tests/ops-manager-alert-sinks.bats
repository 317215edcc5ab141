#!/usr/bin/env bats
# The dispatcher as the host meets it: called by the end of a reconcile pass, read back by jq.
#
#   bats tests/ops-manager-alert-sinks.bats
#
# It runs with the interpreter in PYTHON, else the checkout's .venv, else python3. A command in DISPATCHER runs
# the program in its stead, but for the tests of how it is installed.

# jq's variables are not the shell's; each test is a subshell; `run` sets stderr.
# shellcheck disable=SC2016,SC2030,SC2031,SC2154

bats_require_minimum_version 1.5.0

LOOP="checkout-loop"
CATEGORIES=(health_degraded health_critical divergence_detected ordering_drift_detected profile_drift_detected)

setup() {
  TESTS="$BATS_TEST_DIRNAME"
  ROOT="$(dirname "$TESTS")"
  if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ ! -x "$ROOT/.venv/bin/python" ]] || PYTHON="$ROOT/.venv/bin/python"
  fi
  # A blank in the path, since a host may have one.
  WORK="$BATS_TEST_TMPDIR/a host"
  REPO="$WORK/repo"
  FOLDER="$REPO/.superloop/ops-manager/$LOOP"
  ESCALATIONS="$FOLDER/escalations.jsonl"
  STATE="$FOLDER/alert-dispatch-state.json"
  TELEMETRY="$FOLDER/telemetry/alerts.jsonl"
  CONFIG="$REPO/config/ops-manager-alert-sinks.v1.json"
  ABOUT_STATE=(--arg loop "$LOOP" --arg source "$ESCALATIONS" --arg telemetry "$TELEMETRY")
  # An hour ago: an old record might be given up.
  START=$(($(date +%s) - 3600))
  SINK_PIDS=()
  mkdir -p "$REPO/config" "$FOLDER"
  cd "$WORK" || return

  # Only what a test sets: nothing of the machine's proxies or of a real host's settings.
  local name
  for name in $(compgen -e | grep -iE '^(OPS_MANAGER_.*|(https?|all|no)_proxy)$'); do
    unset "$name"
  done
  # As a module: Python keeps the bytecode of one, and not of a file that it is given to run.
  printf '#!/bin/sh\nPYTHONPATH="%s" exec %s "$@"\n' "$ROOT" "${DISPATCHER:-"\"$PYTHON\" -m ops_alert_dispatch"}" \
    >dispatcher
  chmod +x dispatcher
  export OPS_MANAGER_ALERT_DISPATCH_SCRIPT="$WORK/dispatcher"
  export HOOK_TOKEN="tok-5b1f0c9d7e" PAGER_KEY="R0UT1NGKEY4c8e21"
}

teardown() {
  local pid
  for pid in "${SINK_PIDS[@]}"; do
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
}

# --- the sinks ---------------------------------------------------------------------------------------------

# start_sinks NAME [option of loopback.py]...: NAME.jsonl is the log, PORT the port.
start_sinks() {
  local name="$1" waited
  shift
  # Not fd 3: bats would wait for whoever holds it.
  "$PYTHON" "$TESTS/loopback.py" --port-file "$name.port" --log "$name.jsonl" "$@" >"$name.out" 2>&1 3>&- &
  SINK_PIDS+=("$!")
  for ((waited = 0; waited < 200; waited++)); do
    [[ ! -s "$name.port" ]] || break
    sleep 0.05
  done
  PORT="$(<"$name.port")"
}

# All three sinks at that port. The paths are secrets, as a webhook's URL is.
use_port() {
  export HOOK_URL="http://127.0.0.1:$1/hook/path-2f7a" CHAT_URL="http://127.0.0.1:$1/chat/path-91bd"
  export PAGER_URL="http://127.0.0.1:$1/pager"
}

# check_counts LOG COUNTS: how many requests arrived at each path, as a JSON object.
check_counts() {
  [[ -f "$1.jsonl" ]] || : >"$1.jsonl"
  check "$1.jsonl" '(group_by(.path) | map({(.[0].path | split("/")[1]): length}) | add // {}) == $counts' \
    --slurp --argjson counts "$2"
}

# --- the host's files --------------------------------------------------------------------------------------

# write_config [jq filter]: what the host might use, changed by the filter.
write_config() {
  jq "${1:-.}" >"$CONFIG" <<'JSON'
{
  "schemaVersion": "v1",
  "defaultMinSeverity": "warning",
  "sinks": {
    "hook": {"enabled": true, "type": "webhook", "urlEnv": "HOOK_URL", "authTokenEnv": "HOOK_TOKEN",
      "headers": {"X-Team": "checkout"}, "timeoutSeconds": 10},
    "chat": {"enabled": true, "type": "slack", "webhookUrlEnv": "CHAT_URL", "channel": "#checkout-ops",
      "username": "checkout ops", "iconEmoji": ":fire:", "timeoutSeconds": 10},
    "pager": {"enabled": true, "type": "pagerduty_events", "routingKeyEnv": "PAGER_KEY", "urlEnv": "PAGER_URL",
      "timeoutSeconds": 10},
    "spare": {"enabled": false, "type": "webhook", "urlEnv": "SPARE_URL"}
  },
  "routing": {
    "defaultSinks": ["hook"],
    "categorySeverity": {"health_critical": "critical", "health_degraded": "warning", "ordering_drift_detected": "info"},
    "routes": [
      {"category": "health_critical", "sinks": ["pager", "chat"], "minSeverity": "critical"},
      {"category": "health_degraded", "sinks": ["chat", "spare"]},
      {"category": "divergence_detected", "sinks": ["pager"], "enabled": false},
      {"category": "divergence_detected", "sinks": ["chat", "hook"]},
      {"category": "ordering_drift_detected", "sinks": [], "minSeverity": "info"}
    ]
  }
}
JSON
}

# Where the config above sends each category, in the order of its routes.
SINKS_OF='{"health_degraded": ["chat"], "health_critical": ["pager", "chat"],
  "divergence_detected": ["chat", "hook"], "ordering_drift_detected": ["hook"],
  "profile_drift_detected": ["hook"]}'

# One escalation as the host's scripts write it.
RECORD='def record($n; $category; $transport):
  {timestamp: ($start + 61 * $n | todate), loopId: $loop, traceId: "pass-\($n)", category: $category,
   transport: $transport, stateFile: "/srv/shop/.superloop/ops-manager/\($loop)/state.json"}
  + if $category | startswith("health_") then
      ($category | ltrimstr("health_")) as $status
      | {ingestStatus: "failed", healthStatus: $status, failureCode: "queue_stalled",
         reasonCodes: ["queue_stalled", "ingest_slow"],
         reasons: [
           {code: "queue_stalled", severity: $status, metric: "queueAgeSeconds", observed: "\(700 + $n)",
            threshold: "300"},
           {code: "ingest_slow", severity: "warning", metric: "ingestLagSeconds", observed: "95",
            threshold: "60"}]}
    elif $category == "divergence_detected" then
      {divergenceFlags: {activeMismatch: true, approvalCompletionConflict: false, cursorRegression: ($n % 2 == 0)},
       state: {transition: {previousState: "paused", currentState: "running", confidence: "medium"},
               cursor: {eventLineOffset: $n, eventLineCount: ($n + 4)}}}
    elif $category == "ordering_drift_detected" then
      {reasonCode: $category,
       sequence: {status: $category, driftActive: true, violations: ["event_sequence_regression"],
                  snapshot: {previous: ($n + 3), current: $n, monotonic: false}}}
    else
      {reasonCode: $category,
       drift: {status: "drift_active", appliedProfile: "relaxed", recommendedProfile: "balanced",
               recommendationConfidence: "high", mismatchStreak: 4, requiredStreak: 3,
               action: "review_threshold_profile", rationale: "Four slow runs in a row & <1 h apart"}}
    end;'

# record N CATEGORY [TRANSPORT] [jq filter]
record() {
  jq -cn --argjson n "$1" --arg category "$2" --arg transport "${3:-local}" --arg loop "$LOOP" \
    --argjson start "$START" "$RECORD"' record($n; $category; $transport) | '"${4:-.}"
}

# append_records FROM TO: the categories in turn, the transports in turn.
append_records() {
  jq -cn --argjson from "$1" --argjson to "$2" --arg loop "$LOOP" --argjson start "$START" "$RECORD"'
    range($from; $to + 1)
    | record(.; $ARGS.positional[. % 5]; if . % 2 == 0 then "local" else "sprite_service" end)
    ' --args "${CATEGORIES[@]}" >>"$ESCALATIONS"
}

# --- what is done, and how it is looked at -----------------------------------------------------------------

reconcile() {
  "$TESTS/reconcile-stand-in.sh" --repo "$REPO" --loop "$LOOP" "$@" >pass.json
}

# check FILE FILTER [jq argument]...: fails, and shows the file, unless the filter holds. `-` is stdin.
check() {
  local file="$1" filter="$2"
  shift 2
  if [[ "$file" == - ]]; then
    file=stdin.json
    cat >"$file"
  fi
  if ! jq -e "$@" "$filter" "$file" >/dev/null; then
    printf 'does not hold: %s\nin %s:\n' "$filter" "$file" >&2
    head -c 4000 "$file" >&2
    return 1
  fi
}

status_script() {
  "$TESTS/status-stand-in.sh" --repo "$REPO" --loop "$LOOP"
}

last_row() {
  tail -n 1 "$TELEMETRY" >last-row.json
  check last-row.json "$@"
}

# The pass went well as reconcile sees it: exit 0, one JSON object on one line, which is the state's.
check_pass() {
  if ! check pass.json '.dispatchExitCode == 0 and (.dispatch | type) == "object" and .dispatch == $state[0]
    and (.dispatch | '"${1:-true}"' and '"$STATE_FIELDS"')' --slurpfile state "$STATE" "${ABOUT_STATE[@]}"; then
    # What a dispatcher that failed said is in the row that reconcile has then written.
    tail -n 1 "$TELEMETRY" >&2
    return 1
  fi
}

# Every field of the state that the contract names, with its type.
STATE_FIELDS='.schemaVersion == "v1" and .loopId == $loop and (.traceId | type == "string" and length > 0)
  and .escalationsFile == $source and .dispatchTelemetryFile == $telemetry
  and (.updatedAt | fromdateiso8601 | type) == "number" and (.status | type) == "string"
  and ([.processedCount, .dispatchedCount, .skippedCount, .failedCount, .escalationsLineOffset,
        .escalationsLineCount] | all(type == "number" and . >= 0))
  and (.failureReasonCodes | type == "array" and . == unique)'

# Every field of a row about a record that was routed. A field that would be null is left out.
check_row_fields() {
  last_row '
    (.timestamp | fromdateiso8601 | type) == "number" and .loopId == $loop and .category == "alert_dispatch"
    and ([.traceId, .escalationTraceId, .escalationCategory, .escalationTimestamp]
         | all(type == "string" and length > 0))
    and (.eventSeverity | IN("info", "warning", "critical"))
    and (.status | IN("dispatched", "partial", "failed", "skipped"))
    and (.escalation | type) == "object" and .escalationCategory == .escalation.category
    and .escalationTimestamp == .escalation.timestamp and .escalationTraceId == .escalation.traceId
    and (.route | type) == "object"
    and (.sinks | type == "array" and all(
          (.id | type) == "string" and (.type | IN("webhook", "slack", "pagerduty_events"))
          and (.status | IN("success", "failed"))
          and has("httpStatus") and has("reasonCode") and has("message") and (.message // "" | length) <= 300))
    and .sinkCount == (.sinks | length)
    and .dispatchedSinkCount == ([.sinks[] | select(.status == "success")] | length)
    and .failedSinkCount == ([.sinks[] | select(.status == "failed")] | length)
    and (.reasonCode == null) == (.status == "dispatched")
    and ([.. | objects | to_entries[] | select(.value == null)] | length)
        == ([.sinks[], .escalation | .. | objects | to_entries[] | select(.value == null)] | length)
    ' --arg loop "$LOOP"
}

# Each record of the source reached the sinks of its category exactly once, whole.
check_each_once() {
  [[ -f "$1.jsonl" ]] || : >"$1.jsonl"
  # A chat message holds no record, but the record's trace.
  check "$1.jsonl" '
    def bodies($path): [.[] | select(.path | startswith($path)) | .json];
    def records_for($sink): [$source[] | select(.category as $c | $sinks[$c] | index($sink))];
    (bodies("/hook") | map(.escalation) | sort) == (records_for("hook") | sort)
    and (bodies("/pager") | map(.payload.custom_details.escalation) | sort) == (records_for("pager") | sort)
    and (bodies("/chat") | map(tostring | [match("pass-[0-9]+"; "g").string] | unique) | sort)
      == (records_for("chat") | map([.traceId]) | sort)
    ' --slurp --slurpfile source "$ESCALATIONS" --argjson sinks "$SINKS_OF"
}

check_no_secrets() {
  run grep -rlE "$HOOK_TOKEN|$PAGER_KEY|path-2f7a|path-91bd" "$REPO" pass.json
  [[ "$status" -eq 1 ]] || { echo "a secret is written in: $output" && false; }
}

# --- the way a record travels ------------------------------------------------------------------------------

@test "11 records of all five categories and both transports reach their sinks once over two passes" {
  start_sinks sinks --answer /pager=202
  use_port "$PORT"
  write_config
  append_records 1 11

  reconcile --trace-id first-pass
  check_pass '.status == "success" and .traceId == "first-pass" and .processedCount == 11
    and .dispatchedCount == 11 and .skippedCount == 0 and .failedCount == 0 and .failureReasonCodes == []
    and .escalationsLineOffset == 11 and .escalationsLineCount == 11'
  check_each_once sinks
  [[ "$(wc -l <"$TELEMETRY")" -eq 11 ]]
  check_row_fields
  last_row '.status == "dispatched" and .traceId == "first-pass" and .escalationTraceId == "pass-11"
    and .escalationCategory == "health_critical" and .eventSeverity == "critical" and .sinkCount == 2
    and ([.sinks[].id] | sort) == ["chat", "pager"] and .dispatchedSinkCount == 2 and .failedSinkCount == 0'
  # Both transports of each category are in it.
  jq -cs 'map([.category, .transport]) | unique' "$ESCALATIONS" | check - 'length == 10'

  reconcile --trace-id second-pass
  check_pass '.status == "no_new_escalations" and .traceId == "second-pass" and .processedCount == 0
    and .dispatchedCount == 0 and .escalationsLineOffset == 11'
  check_each_once sinks
  [[ "$(wc -l <"$TELEMETRY")" -eq 11 ]]

  append_records 12 16
  reconcile
  check_pass '.status == "success" and .processedCount == 5 and .dispatchedCount == 5
    and .escalationsLineOffset == 16'
  check_each_once sinks
  check_no_secrets
}

@test "the status script sees every field of the state and of the last delivery" {
  start_sinks sinks
  use_port "$PORT"
  write_config
  append_records 1 2
  reconcile --trace-id watched-pass
  status_script | check - '
    (.alerts.dispatch | .status == "success" and (.updatedAt | fromdateiso8601 > 0) and .processedCount == 2
      and .dispatchedCount == 2 and .skippedCount == 0 and .failedCount == 0 and .failureReasonCodes == []
      and .escalationsLineOffset == 2 and .escalationsLineCount == 2 and .lastTraceId == "watched-pass")
    and (.alerts.lastDelivery | (.timestamp | fromdateiso8601 > 0) and .status == "dispatched"
      and .reasonCode == null and .escalationCategory == "divergence_detected" and .eventSeverity == "warning"
      and .sinkCount == 2 and .dispatchedSinkCount == 2 and .failedSinkCount == 0
      and .traceId == "watched-pass" and .escalationTraceId == "pass-2")'
}

# --- when something is wrong -------------------------------------------------------------------------------

@test "a sink is down: the others are not late, and it gets everything once it is back" {
  start_sinks sinks
  use_port "$PORT"
  # Nothing listens on port 1.
  export CHAT_URL="http://127.0.0.1:1/chat/path-91bd"
  write_config
  append_records 1 10

  reconcile --trace-id outage
  # Of ten records, six go to chat; two of these only there.
  check_pass '.status == "partial" and .processedCount == 10 and .dispatchedCount == 8 and .failedCount == 6
    and (.failureReasonCodes | index("partial_dispatch_failure")) and .escalationsLineOffset == 10'
  check_counts sinks '{"hook": 6, "pager": 2}'
  jq -cs . "$TELEMETRY" | check - '
    length == 10 and ([.[] | select(.status == "partial") | .reasonCode] | unique) == ["partial_dispatch_failure"]
    and ([.[] | select(.status == "failed") | .reasonCode] | unique) == ["dispatch_failed"]
    and ([.[].sinks[] | select(.id == "chat")] | length == 6 and all(.status == "failed" and .httpStatus == null)
         and .[0].reasonCode == "request_failed")
    and ([.[].sinks[] | select(.id != "chat")] | all(.status == "success" and .httpStatus == 200))'
  record 11 health_critical >>"$ESCALATIONS"
  reconcile
  check_pass '.status == "partial" and .processedCount == 1'
  check_row_fields
  last_row '.status == "partial" and .reasonCode == "partial_dispatch_failure" and .sinkCount == 2
    and .dispatchedSinkCount == 1 and .failedSinkCount == 1'
  status_script | check - '.alerts.dispatch.status == "partial" and .alerts.lastDelivery.failedSinkCount == 1'

  # Another address ends the wait for the next try.
  use_port "$PORT"
  reconcile
  check_pass '.processedCount == 0 and .failedCount == 0'
  check_each_once sinks
  reconcile
  check_each_once sinks
  check_no_secrets
}

@test "an invalid config: nothing is sent or consumed, reconcile records it, the fix sends everything" {
  start_sinks sinks
  use_port "$PORT"
  write_config '.routing.routes[0].sinks = ["pagr"] | .sinks.hook.timeoutSecond = 5'
  append_records 1 5

  reconcile --trace-id wrong-config
  check pass.json '.dispatchExitCode == 3 and .dispatch == null'
  last_row '.status == "failed_command" and .reasonCode == "alert_dispatch_failed" and .traceId == "wrong-config"
    and (.message | test("routes\\[0\\]") and test("pagr") and test("timeoutSecond") and test("timeoutSeconds"))'
  check "$STATE" "$STATE_FIELDS"' and .status == "config_invalid" and .escalationsLineOffset == 0 and .processedCount == 0
    and .failureReasonCodes == ["config_invalid"]' "${ABOUT_STATE[@]}"
  status_script | check - '.alerts.dispatch.status == "config_invalid"
    and .alerts.lastDelivery.status == "failed_command"'
  check_counts sinks '{}'

  echo '{"schemaVersion": "v1",' >"$CONFIG"
  reconcile
  check pass.json '.dispatchExitCode == 3'
  rm "$CONFIG"
  reconcile
  check pass.json '.dispatchExitCode == 3'
  [[ "$(wc -l <"$TELEMETRY")" -eq 3 ]]

  write_config
  reconcile
  check_pass '.status == "success" and .processedCount == 5 and .dispatchedCount == 5
    and .escalationsLineOffset == 5'
  check_each_once sinks
}

# --- the resolver ------------------------------------------------------------------------------------------

@test "config --list-sinks prints id, type and enabled" {
  write_config
  run -0 --separate-stderr "$OPS_MANAGER_ALERT_DISPATCH_SCRIPT" config --config-file "$CONFIG" --list-sinks --no-env-check
  [[ "$stderr" == "" ]]
  diff <(sort <<<"$output") - <<<$'chat\tslack\ttrue\nhook\twebhook\ttrue\npager\tpagerduty_events\ttrue\nspare\twebhook\tfalse'
}

@test "config prints the whole, and resolves a category" {
  use_port 1
  write_config
  "$OPS_MANAGER_ALERT_DISPATCH_SCRIPT" config --config-file "$CONFIG" >whole.json
  check whole.json '.schemaVersion == "v1" and .sourceFile == $file and .defaultMinSeverity == "warning"
    and .enabledSinkCount == 3 and (.sinks | length) == 4
    and all(.sinks[]; has("id") and has("enabled") and has("type") and has("timeoutSeconds") and has("secretRefs"))
    and ([.sinks[] | select(.id == "hook") | .secretRefs] == [{urlEnv: "HOOK_URL", authTokenEnv: "HOOK_TOKEN"}])
    and (.routing.routes | length) == 5 and .envStatus.HOOK_TOKEN.present and .validation.envCheckEnabled' \
    --arg file "$CONFIG"
  "$OPS_MANAGER_ALERT_DISPATCH_SCRIPT" config --config-file "$CONFIG" --category health_critical >one.json
  check one.json '.schemaVersion == "v1" and .sourceFile == $file and .category == "health_critical"
    and .eventSeverity == "critical" and .categoryMappedSeverity == "critical" and .minSeverity == "critical"
    and .shouldDispatch and (.route | type) == "object" and ([.selectedSinks[].id] == ["pager", "chat"])
    and ([.dispatchableSinks[] | if type == "object" then .id else . end] == ["pager", "chat"])
    and all(.selectedSinks[]; has("type") and has("enabled") and has("timeoutSeconds") and has("secretRefs")
      and has("config")) and (.envStatus | type) == "object" and .validation.envCheckEnabled' --arg file "$CONFIG"
  "$OPS_MANAGER_ALERT_DISPATCH_SCRIPT" config --config-file "$CONFIG" --category health_critical \
    --severity warning >below.json
  check below.json '.shouldDispatch == false and .dispatchableSinks == [] and (.selectedSinks | length) == 2'
  run grep -lE "$HOOK_TOKEN|$PAGER_KEY|path-" whole.json one.json below.json
  [[ "$status" -eq 1 ]]
}

# --- the ways it is installed ------------------------------------------------------------------------------

# works_as PROGRAM: the program is all that the host is told.
works_as() {
  export OPS_MANAGER_ALERT_DISPATCH_SCRIPT="$1"
  start_sinks sinks
  use_port "$PORT"
  write_config
  append_records 1 5
  reconcile
  check_pass '.status == "success" and .processedCount == 5'
  check_each_once sinks
}

@test "the host calls a link to the file" {
  # Its first line asks for python3: the one that has the three packages.
  mkdir bin
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" | tee bin/python3 >bin/python
  chmod +x bin/python bin/python3
  ln -s "$ROOT/ops_alert_dispatch.py" bin/ops-alert-dispatch
  PATH="$WORK/bin:$PATH" works_as "$WORK/bin/ops-alert-dispatch"
}

@test "the host calls the console script" {
  local script
  script="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/ops-alert-dispatch"
  if [[ ! -x "$script" ]]; then
    [[ "${CI:-}" == "" ]] || { echo "$script is not installed, and in CI no test is skipped" && false; }
    skip "not installed beside $PYTHON"
  fi
  works_as "$script"
}
