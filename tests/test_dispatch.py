"""Escalations from the source to the sinks, as the host runs it: what a pass sends, says and writes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo, edit_queue
from escalations import (
    CHAT,
    HOOK,
    MAKERS,
    NO_WAIT,
    PAGER,
    PATHS,
    ROUTED,
    SECRETS,
    SINK_TYPES,
    batch,
    divergence_detected,
    escalation_id,
    health_critical,
    health_degraded,
    line,
    profile_drift_detected,
    sink_config,
)
from loopback import SinkServer, closed_port, echo, error, hang_up, redirect

# What the contract names: the host and its operators read these.
STATE_FIELDS = {
    "schemaVersion",
    "updatedAt",
    "loopId",
    "traceId",
    "escalationsFile",
    "dispatchTelemetryFile",
    "status",
    "processedCount",
    "dispatchedCount",
    "skippedCount",
    "failedCount",
    "failureReasonCodes",
    "escalationsLineOffset",
    "escalationsLineCount",
}
ROW_FIELDS = {
    "timestamp",
    "loopId",
    "traceId",
    "escalationTraceId",
    "category",
    "status",
    "sinks",
    "sinkCount",
    "dispatchedSinkCount",
    "failedSinkCount",
}
ESCALATION_ROW_FIELDS = ROW_FIELDS | {
    "escalationCategory",
    "escalationTimestamp",
    "eventSeverity",
    "escalation",
    "route",
    "escalationId",
}
SINK_FIELDS = {"id", "type", "status", "httpStatus", "reasonCode", "message"}
ATTEMPT_FIELDS = {
    "timestamp",
    "traceId",
    "escalationId",
    "sinkId",
    "attempt",
    "durationMs",
    "httpStatus",
    "outcome",
    "reasonCode",
    "retryAfterSeconds",
}
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def counts(summary: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Processed, dispatched, skipped, failed."""
    return (
        summary["processedCount"],
        summary["dispatchedCount"],
        summary["skippedCount"],
        summary["failedCount"],
    )


def at_once(config: dict[str, Any]) -> dict[str, Any]:
    """The config with no wait between tries and passes, so that a test needs none."""
    config["delivery"] = {"backoffSeconds": NO_WAIT}
    return config


def worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a pass in the order in which sinks get the escalations."""
    return sorted(rows, key=lambda row: ["critical", "warning", "info"].index(row["eventSeverity"]))


def delivered_ids(server: SinkServer) -> dict[str, list[str]]:
    return {sink: [escalation_id(request) for request in server.received(PATHS[sink])] for sink in SINK_TYPES}


# --- Once, to the right sinks


def test_each_of_36_escalations_reaches_its_sinks_once_and_in_order_over_two_passes(
    repo: Repo, server: SinkServer
) -> None:
    records = batch(36)
    repo.append(*records[:20])
    first = repo.dispatch().json
    repo.append(*records[20:])
    second = repo.dispatch().json
    third = repo.dispatch().json

    assert counts(first) == (20, 20, 0, 0)
    assert counts(second) == (16, 16, 0, 0)
    assert counts(third) == (0, 0, 0, 0)
    assert (first["status"], second["status"]) == ("success", "success")
    assert third["status"] == "no_new_escalations"
    assert third["escalationsLineOffset"] == third["escalationsLineCount"] == 36

    rows = repo.telemetry()
    assert [row["escalation"] for row in rows] == records
    assert len({row["escalationId"] for row in rows}) == 36
    order = worst_first(rows[:20]) + worst_first(rows[20:])
    assert delivered_ids(server) == {
        sink: [row["escalationId"] for row in order if sink in ROUTED[row["escalationCategory"]]]
        for sink in SINK_TYPES
    }
    assert len(repo.attempts()) == len(server.requests) == sum(len(ROUTED[r["category"]]) for r in records)


def test_two_equal_lines_are_two_escalations(repo: Repo, server: SinkServer) -> None:
    record = health_degraded()
    repo.append(record, record)

    assert counts(repo.dispatch().json) == (2, 2, 0, 0)
    assert len(server.received(PATHS[CHAT])) == 2


def test_an_unknown_category_goes_to_the_default_sinks(repo: Repo, server: SinkServer) -> None:
    repo.append(health_degraded(category="disk_almost_full"))

    assert counts(repo.dispatch().json) == (1, 1, 0, 0)
    assert [request.path for request in server.requests] == [PATHS[HOOK]]


def test_no_odd_or_missing_field_silences_an_escalation(repo: Repo, server: SinkServer) -> None:
    odd: list[tuple[str, Any]] = [
        ("timestamp", None),
        ("timestamp", "yesterday"),
        ("timestamp", 12),
        ("loopId", 7),
        ("loopId", None),
        ("traceId", ["x"]),
        ("traceId", None),
        ("transport", {"kind": "pigeon"}),
        ("reasons", "many"),
        ("reasons", [1, None, {"code": 3}]),
        ("reasonCodes", {"a": 1}),
        ("severity", 5),
        ("severity", "catastrophic"),
        ("category", 42),
    ]
    records = {f"{field}: {value}": health_degraded(**{field: value}) for field, value in odd}
    for field in ("timestamp", "loopId", "traceId", "transport", "reasons", "reasonCodes"):
        records[f"no {field}"] = {
            key: value for key, value in health_degraded(serial=1).items() if key != field
        }
    config = sink_config(everywhere=True)
    config["sinks"][CHAT]["maxPerMessage"] = 1
    repo.write_config(config)
    repo.append(*records.values())

    assert counts(repo.dispatch().json) == (len(records), len(records), 0, 0)
    ids = [row["escalationId"] for row in repo.telemetry()]
    named = dict(zip(ids, records, strict=True))
    for path in PATHS.values():
        assert sorted(named[escalation_id(request)] for request in server.received(path)) == sorted(records)


def test_what_waited_for_a_sink_that_was_down_arrives_when_it_is_back(repo: Repo, server: SinkServer) -> None:
    repo.write_config(at_once(sink_config()))
    server.answer("/chat", error(503, "down for maintenance"))
    repo.append(divergence_detected(), health_degraded())
    down = repo.dispatch().json
    assert counts(down) == (2, 1, 0, 2)
    assert down["status"] == "partial"
    assert down["waitingCount"] == 2
    assert len(server.received("/hook")) == 1

    server.forget()
    server.answer("/chat", error(200, "ok"))
    back = repo.dispatch().json
    assert back["status"] == "no_new_escalations"
    assert counts(back) == (0, 0, 0, 0)
    assert (back["lateDispatchedCount"], back["waitingCount"]) == (2, 0)
    rows = repo.telemetry()
    assert delivered_ids(server)[CHAT] == [row["escalationId"] for row in rows[:2]]
    assert server.received("/hook") == []
    assert [(row["late"], [sink["id"] for sink in row["sinks"]]) for row in rows[2:]] == [(True, [CHAT])] * 2


def test_a_request_that_the_sink_may_have_acted_on_is_not_sent_again_in_the_same_pass(
    repo: Repo, server: SinkServer
) -> None:
    """A hang-up comes after the sink has read the request: the next try belongs to a later pass."""
    repo.write_config(at_once(sink_config()))
    server.answer("/chat", hang_up())
    repo.append(health_degraded())
    repo.dispatch()

    assert len(server.requests) == 1
    assert [row["outcome"] for row in repo.attempts()] == ["retry"]


def test_a_sink_that_says_no_is_asked_once_a_pass(repo: Repo, server: SinkServer) -> None:
    repo.write_config(at_once(sink_config()))
    server.answer("/chat", error(401, "who are you?"))
    repo.append(health_degraded())
    repo.dispatch()

    assert len(server.requests) == 1
    assert [row["outcome"] for row in repo.attempts()] == ["misconfigured"]


def test_a_redirect_is_not_followed(repo: Repo, server: SinkServer) -> None:
    server.answer("/chat", redirect(f"{server.url}/elsewhere", 307))
    repo.append(health_degraded())
    repo.dispatch()

    assert [request.path for request in server.requests] == [PATHS[CHAT]]
    (sink,) = repo.telemetry()[0]["sinks"]
    assert (sink["httpStatus"], sink["reasonCode"]) == (307, "http_error")
    assert "redirect" in sink["message"]


def test_a_sink_that_echoes_its_request_gets_no_secret_into_any_file(repo: Repo, server: SinkServer) -> None:
    for sink in SINK_TYPES:
        server.answer(PATHS[sink], echo(400))
    repo.append(health_critical())
    run = repo.dispatch()

    assert counts(run.json) == (1, 0, 0, 1)
    written = "".join(content.decode(errors="replace") for _, _, content in repo.snapshot().values())
    assert "esc_" in written
    assert not [secret for secret in SECRETS if secret in written + run.stdout + run.stderr]


# --- What is printed and written


def test_the_host_finds_every_field_in_the_state_and_the_same_object_on_stdout(repo: Repo) -> None:
    repo.append(*batch(5))
    run = repo.dispatch("--trace-id", "pass-1")

    assert run.json == repo.state()
    state = repo.state()
    assert set(state) >= STATE_FIELDS
    assert state["schemaVersion"] == "v1"
    assert MOMENT.fullmatch(state["updatedAt"])
    assert state["loopId"] == repo.loop
    assert state["traceId"] == "pass-1"
    assert state["escalationsFile"] == str(repo.source)
    assert state["dispatchTelemetryFile"] == str(repo.telemetry_file)
    assert state["status"] == "success"
    assert counts(state) == (5, 5, 0, 0)
    assert state["failureReasonCodes"] == []
    assert (state["escalationsLineOffset"], state["escalationsLineCount"]) == (5, 5)
    assert set(state["sinks"]) == set(SINK_TYPES)


def test_reconcile_can_parse_what_it_captured(repo: Repo) -> None:
    repo.append(*batch(6))
    run = repo.dispatch()

    assert run.exit_code == 0
    assert run.stderr == ""
    assert run.stdout.endswith("}\n")
    assert run.stdout.count("\n") == 1
    assert isinstance(json.loads(run.stdout), dict)


def test_reconcile_can_parse_what_it_captured_when_every_sink_fails(repo: Repo, server: SinkServer) -> None:
    for path in PATHS.values():
        server.answer(path, error(400, "never"))
    repo.append(*batch(6))
    run = repo.dispatch()

    assert (run.exit_code, run.stderr, run.stdout.count("\n")) == (0, "", 1)
    assert run.json == repo.state()


def test_a_delivered_escalation_is_on_record_with_every_field(repo: Repo, server: SinkServer) -> None:
    record = health_critical(traceId="pass-of-the-host")
    repo.append(record)
    repo.dispatch("--trace-id", "pass-2")

    (row,) = repo.telemetry()
    assert set(row) >= ESCALATION_ROW_FIELDS
    assert MOMENT.fullmatch(row["timestamp"])
    assert row["loopId"] == repo.loop
    assert row["traceId"] == "pass-2"
    assert row["escalationTraceId"] == "pass-of-the-host"
    assert row["category"] == "alert_dispatch"
    assert row["escalationCategory"] == "health_critical"
    assert row["escalationTimestamp"] == record["timestamp"]
    assert row["eventSeverity"] == "critical"
    assert row["status"] == "dispatched"
    assert row["escalation"] == record
    assert row["position"]["line"] == 1
    assert re.fullmatch(r"esc_[0-9a-f]{32}", row["escalationId"])
    assert {escalation_id(request) for request in server.requests} == {row["escalationId"]}
    assert (row["sinkCount"], row["dispatchedSinkCount"], row["failedSinkCount"]) == (3, 3, 0)
    assert all(set(sink) >= SINK_FIELDS for sink in row["sinks"])
    assert {sink["id"]: (sink["type"], sink["status"], sink["httpStatus"]) for sink in row["sinks"]} == {
        HOOK: ("webhook", "success", 200),
        CHAT: ("slack", "success", 200),
        PAGER: ("pagerduty_events", "success", 202),
    }
    assert all(sink["reasonCode"] is None for sink in row["sinks"])


def test_no_row_holds_null_but_inside_its_sinks(repo: Repo, server: SinkServer) -> None:
    server.answer("/chat", error(400, "no"))
    repo.append(*batch(10), "not json\n", {"no": "category"}, health_degraded(severity="info"))
    repo.dispatch()

    rows = repo.telemetry()
    assert len(rows) == 13
    for row in rows:
        assert None not in [value for name, value in row.items() if name != "sinks"]


def test_the_route_on_record_is_the_one_that_the_resolver_gives(repo: Repo) -> None:
    repo.append(*(maker() for maker in MAKERS.values()))
    repo.dispatch()

    rows = repo.telemetry()
    assert len(rows) == 5
    for row in rows:
        told = repo.run(
            "config", "--config-file", str(repo.config_file), "--category", row["escalationCategory"]
        ).json
        assert row["route"] == told["route"]
        assert row["eventSeverity"] == told["eventSeverity"]
        assert [sink["id"] for sink in row["sinks"]] == [sink["id"] for sink in told["dispatchableSinks"]]


def test_each_attempt_is_on_record_with_every_field(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch("--trace-id", "pass-3")

    attempts = repo.attempts()
    assert sorted(row["sinkId"] for row in attempts) == sorted(SINK_TYPES)
    for row in attempts:
        assert set(row) >= ATTEMPT_FIELDS - {"reasonCode", "retryAfterSeconds"}
        assert MOMENT.fullmatch(row["timestamp"])
        assert row["traceId"] == "pass-3"
        assert row["escalationId"] == repo.telemetry()[0]["escalationId"]
        assert row["attempt"] == 1
        assert row["durationMs"] >= 0
        assert row["httpStatus"] in {200, 202}
        assert row["outcome"] == "delivered"


def test_an_attempt_that_was_put_off_says_for_how_long_and_why(repo: Repo, server: SinkServer) -> None:
    repo.write_config(at_once(sink_config()))
    server.answer("/chat", error(503))
    repo.append(health_degraded())
    repo.dispatch()

    attempts = repo.attempts()
    assert len(attempts) == len(server.received("/chat"))
    assert [row["attempt"] for row in attempts] == list(range(1, len(attempts) + 1))
    for row in attempts:
        assert (row["outcome"], row["httpStatus"], row["reasonCode"]) == ("retry", 503, "http_error")


def test_a_sink_that_refuses_makes_a_partial_delivery_and_the_row_says_what_it_answered(
    repo: Repo, server: SinkServer
) -> None:
    server.answer("/chat", error(400, "invalid_payload " + "x" * 1000))
    repo.append(health_critical())
    summary = repo.dispatch().json

    assert summary["status"] == "partial"
    assert counts(summary) == (1, 1, 0, 1)
    assert summary["failureReasonCodes"] == sorted(summary["failureReasonCodes"])
    assert "partial_dispatch_failure" in summary["failureReasonCodes"]
    (row,) = repo.telemetry()
    assert (row["status"], row["reasonCode"]) == ("partial", "partial_dispatch_failure")
    assert (row["sinkCount"], row["dispatchedSinkCount"], row["failedSinkCount"]) == (3, 2, 1)
    (failed,) = [sink for sink in row["sinks"] if sink["status"] == "failed"]
    assert set(failed) >= SINK_FIELDS
    assert (failed["id"], failed["type"]) == (CHAT, "slack")
    assert (failed["httpStatus"], failed["reasonCode"]) == (400, "http_error")
    assert failed["deadLetter"] is True
    assert "invalid_payload" in failed["message"]
    assert len(failed["message"]) <= 300


def test_an_escalation_that_no_sink_took_is_failed(repo: Repo, server: SinkServer) -> None:
    server.answer("/chat", error(422, "no"))
    repo.append(health_degraded())
    summary = repo.dispatch().json

    assert summary["status"] == "failed"
    assert counts(summary) == (1, 0, 0, 1)
    (row,) = repo.telemetry()
    assert (row["status"], row["reasonCode"]) == ("failed", "dispatch_failed")
    assert (row["sinkCount"], row["dispatchedSinkCount"], row["failedSinkCount"]) == (1, 0, 1)
    (attempt,) = repo.attempts()
    assert (attempt["outcome"], attempt["httpStatus"]) == ("dead_letter", 422)


def test_a_sink_that_cannot_be_reached_is_a_failed_request_without_a_status(repo: Repo) -> None:
    repo.write_config(at_once(sink_config()))
    repo.append(health_degraded())
    with closed_port() as port:
        summary = repo.dispatch(env={"ALERT_CHAT_URL": f"http://127.0.0.1:{port}{PATHS[CHAT]}"}).json

    assert summary["status"] == "failed"
    assert "dispatch_failed" in summary["failureReasonCodes"]
    (row,) = repo.telemetry()
    (sink,) = row["sinks"]
    assert (sink["status"], sink["httpStatus"], sink["reasonCode"]) == ("failed", None, "request_failed")
    assert sink["message"]


def test_what_is_below_the_threshold_is_skipped_on_record(repo: Repo, server: SinkServer) -> None:
    repo.append(health_degraded(severity="info"))
    summary = repo.dispatch().json

    assert server.requests == []
    assert summary["status"] == "success"
    assert counts(summary) == (1, 0, 1, 0)
    (row,) = repo.telemetry()
    assert set(row) >= ESCALATION_ROW_FIELDS
    assert (row["status"], row["reasonCode"], row["eventSeverity"]) == (
        "skipped",
        "severity_below_min",
        "info",
    )
    assert (row["sinkCount"], row["dispatchedSinkCount"], row["failedSinkCount"]) == (0, 0, 0)


def test_what_has_no_enabled_sink_is_skipped_on_record_and_not_sent_later(
    repo: Repo, server: SinkServer
) -> None:
    config = sink_config()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    repo.append(health_degraded())
    summary = repo.dispatch().json

    assert counts(summary) == (1, 0, 1, 0)
    (row,) = repo.telemetry()
    assert set(row) >= ESCALATION_ROW_FIELDS
    assert (row["status"], row["reasonCode"]) == ("skipped", "no_dispatchable_sinks")

    repo.write_config(sink_config())
    assert repo.dispatch().json["status"] == "no_new_escalations"
    assert server.requests == []


def test_a_disabled_sink_does_not_keep_an_escalation_from_the_others(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    repo.append(health_critical())

    assert counts(repo.dispatch().json) == (1, 1, 0, 0)
    assert sorted(request.path for request in server.requests) == sorted([PATHS[HOOK], PATHS[PAGER]])
    assert sorted(sink["id"] for sink in repo.telemetry()[0]["sinks"]) == sorted([HOOK, PAGER])


def test_a_bad_line_is_on_record_as_it_was_and_what_follows_goes_on(repo: Repo, server: SinkServer) -> None:
    bad = ["{broken", "[1, 2]", '"text"', "12", "null", '{"category": "x"', "{}}"]
    repo.append(health_degraded(serial=-1))
    for serial, text in enumerate(bad):
        repo.append(f"{text}\n", health_degraded(serial=serial))
    summary = repo.dispatch("--trace-id", "pass-4").json

    assert summary["status"] == "partial"
    assert counts(summary) == (15, 8, 0, 7)
    assert summary["failureReasonCodes"] == ["invalid_escalation_json"]
    rows = repo.telemetry()
    assert [row["status"] for row in rows] == ["dispatched", *["failed", "dispatched"] * 7]
    for text, row in zip(bad, rows[1::2], strict=True):
        assert set(row) >= ROW_FIELDS
        assert row["reasonCode"] == "invalid_escalation_json"
        assert row["rawLine"] == text
        assert "escalation" not in row
        assert row["escalationTraceId"] == row["traceId"] == "pass-4"
        assert (row["sinks"], row["sinkCount"], row["dispatchedSinkCount"], row["failedSinkCount"]) == (
            [],
            0,
            0,
            0,
        )


@pytest.mark.parametrize(
    "record",
    [{"timestamp": "2026-01-01T00:00:00Z"}, {"category": ""}, {"category": None}, {"category": "  "}, {}],
)
def test_a_record_without_category_is_on_record(
    repo: Repo, server: SinkServer, record: dict[str, Any]
) -> None:
    repo.append(record)
    summary = repo.dispatch().json

    assert server.requests == []
    assert summary["status"] == "failed"
    assert counts(summary) == (1, 0, 0, 1)
    assert summary["failureReasonCodes"] == ["missing_escalation_category"]
    (row,) = repo.telemetry()
    assert set(row) >= ROW_FIELDS
    assert (row["status"], row["reasonCode"]) == ("failed", "missing_escalation_category")
    assert row["escalation"] == record
    assert (row["sinks"], row["sinkCount"]) == ([], 0)


def test_an_unknown_severity_is_told_and_does_not_silence(repo: Repo, server: SinkServer) -> None:
    repo.append(health_degraded(severity="catastrophic"))
    repo.dispatch()

    assert len(server.received("/chat")) == 1
    (row,) = repo.telemetry()
    assert row["unknownSeverity"] == "catastrophic"
    assert row["eventSeverity"] == "warning"


def test_the_reason_codes_of_a_run_are_each_named_once_and_sorted(repo: Repo, server: SinkServer) -> None:
    server.answer("/chat", error(400))
    repo.append("x\n", {"a": 1}, "y\n", {"b": 2}, health_degraded(), health_critical())
    codes = repo.dispatch().json["failureReasonCodes"]

    assert codes == sorted(set(codes))
    assert {"invalid_escalation_json", "missing_escalation_category"} <= set(codes)


# --- Where there is nothing to do


def test_no_source_yet_is_told_and_is_no_error(repo: Repo) -> None:
    summary = repo.dispatch().json

    assert summary["status"] == "no_source"
    assert counts(summary) == (0, 0, 0, 0)
    assert set(summary) >= STATE_FIELDS
    assert not repo.folder.exists(), "nothing is made for a loop that has never written anything"

    repo.folder.mkdir(parents=True)
    summary = repo.dispatch().json
    assert summary["status"] == "no_source"
    assert repo.state() == summary


def test_an_idle_pass_changes_nothing_but_the_state(repo: Repo) -> None:
    repo.append(*batch(3))
    repo.dispatch()
    telemetry, attempts = repo.telemetry(), repo.attempts()
    summary = repo.dispatch().json

    assert summary["status"] == "no_new_escalations"
    assert counts(summary) == (0, 0, 0, 0)
    assert (repo.telemetry(), repo.attempts()) == (telemetry, attempts)


# --- Options


def test_pretty_is_the_same_object_indented(repo: Repo) -> None:
    repo.append(*batch(2))
    run = repo.dispatch("--pretty")

    assert run.json == repo.state()
    assert run.stdout.count("\n") > len(STATE_FIELDS)
    assert run.stdout.startswith("{\n  ")


def test_text_is_for_people_also_where_stdout_is_no_terminal(repo: Repo, server: SinkServer) -> None:
    server.answer("/chat", error(400, "no_text"))
    repo.append(health_critical())
    run = repo.dispatch("--format", "text")

    assert run.exit_code == 0
    assert "\x1b" not in run.stdout
    for word in (HOOK, CHAT, PAGER):
        assert word in run.stdout
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(run.stdout)


def test_format_json_is_one_line_on_a_terminal_too(repo: Repo) -> None:
    repo.append(*batch(2))
    run = repo.run_on_terminal("dispatch", *repo.target, "--format", "json")

    assert run.json == repo.state()
    assert run.stdout.count("\n") == 1


def test_a_terminal_gets_a_table(repo: Repo) -> None:
    repo.append(*batch(5))
    run = repo.run_on_terminal("dispatch", *repo.target)

    assert run.exit_code == 0
    assert run.stderr == ""
    assert not run.stdout.startswith("{")
    for word in (HOOK, CHAT, PAGER):
        assert word in run.stdout


def test_progress_is_shown_where_stderr_is_a_terminal_and_only_there(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(36))
    run = repo.run_on_terminal("dispatch", *repo.target, streams=("stderr",))

    assert run.json["dispatchedCount"] == 36
    assert re.search(r" (\d+)/\1\b", run.stderr)
    repo.append(*batch(36))
    assert repo.run_on_terminal("dispatch", *repo.target, streams=("stdout",)).stderr == ""


def test_strict_tells_a_monitor_of_failures_and_still_prints_the_summary(
    repo: Repo, server: SinkServer
) -> None:
    server.answer("/chat", error(400))
    repo.append(health_degraded())
    run = repo.dispatch("--strict")

    assert run.exit_code == 1
    assert json.loads(run.stdout) == repo.state()
    repo.append(profile_drift_detected())
    assert repo.dispatch("--strict").exit_code == 0


def test_max_escalations_takes_the_oldest_and_leaves_the_rest_for_the_next_pass(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(*batch(12))
    first = repo.dispatch("--max-escalations", "5").json
    assert counts(first) == (5, 5, 0, 0)
    assert (first["escalationsLineOffset"], first["escalationsLineCount"]) == (5, 12)
    second = repo.dispatch("--max-escalations", "0").json
    assert counts(second) == (7, 7, 0, 0)
    assert second["escalationsLineOffset"] == 12
    assert [row["escalation"]["traceId"] for row in repo.telemetry()] == [r["traceId"] for r in batch(12)]


@pytest.mark.parametrize("value", ["-1", "many", "1.5", ""])
def test_a_senseless_number_of_escalations_is_a_usage_error(repo: Repo, value: str) -> None:
    run = repo.dispatch("--max-escalations", value)

    assert (run.exit_code, run.stdout) == (2, "")
    assert "--max-escalations" in run.stderr


@pytest.mark.parametrize("value", ["0", "-3", "soon", "nan", "inf"])
def test_a_senseless_time_budget_is_a_usage_error(repo: Repo, value: str) -> None:
    run = repo.dispatch("--time-budget", value)

    assert (run.exit_code, run.stdout) == (2, "")
    assert "--time-budget" in run.stderr


def test_the_trace_id_comes_from_the_option_then_from_the_host_then_is_new(
    repo: Repo, server: SinkServer
) -> None:
    env = {"OPS_MANAGER_TRACE_ID": "from-the-host"}
    assert repo.dispatch("--trace-id", "given", env=env).json["traceId"] == "given"
    assert repo.dispatch(env=env).json["traceId"] == "from-the-host"
    new = [repo.dispatch(env={"OPS_MANAGER_TRACE_ID": ""}).json["traceId"], repo.dispatch().json["traceId"]]
    assert len({uuid.UUID(trace) for trace in new}) == 2


@pytest.mark.parametrize("login", ["ops:", "o:", "ops"])
def test_the_trace_id_is_the_hosts_own_whatever_the_proxy_wants(repo: Repo, login: str) -> None:
    env = {"HTTPS_PROXY": f"http://{login}@127.0.0.1:9"}
    assert repo.dispatch("--trace-id", "reconcile-42", env=env).json["traceId"] == "reconcile-42"


def test_the_file_options_are_what_is_read_and_written(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    source, state, telemetry = (
        elsewhere / "in.jsonl",
        elsewhere / "s" / "state.json",
        elsewhere / "t" / "t.jsonl",
    )
    elsewhere.mkdir()
    source.write_text(line(health_degraded()), encoding="utf-8")
    before = repo.snapshot()
    summary = repo.dispatch(
        "--escalations-file",
        str(source),
        "--dispatch-state-file",
        str(state),
        "--dispatch-telemetry-file",
        str(telemetry),
        "--queue-file",
        str(elsewhere / "q" / "queue.db"),
    ).json

    assert counts(summary) == (1, 1, 0, 0)
    assert summary["escalationsFile"] == str(source)
    assert summary["dispatchTelemetryFile"] == str(telemetry)
    assert json.loads(state.read_text(encoding="utf-8")) == summary
    assert len(telemetry.read_text(encoding="utf-8").splitlines()) == 1
    assert len((telemetry.parent / "alert-attempts.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert repo.snapshot() == before


def test_the_config_comes_from_the_option_then_from_the_host_then_from_the_repo(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    """Each of the three sends a degraded loop to another sink."""
    files = {}
    for sink in (HOOK, PAGER):
        config = sink_config()
        config["routing"]["routes"][1]["sinks"] = [sink]
        files[sink] = tmp_path / f"{sink}.json"
        files[sink].write_text(json.dumps(config), encoding="utf-8")
    env = {"OPS_MANAGER_ALERT_SINKS_FILE": str(files[HOOK])}
    for options, environment, sink in [
        (["--alert-config-file", str(files[PAGER])], env, PAGER),
        ([], env, HOOK),
        ([], {}, CHAT),
    ]:
        server.forget()
        repo.append(health_degraded())
        repo.dispatch(*options, env=environment)
        assert [request.path for request in server.requests] == [PATHS[sink]]


def test_the_bare_call_of_the_host_means_dispatch(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(3))
    run = repo.run(
        *repo.target,
        "--trace-id",
        "bare",
        "--escalations-file",
        str(repo.source),
        "--dispatch-state-file",
        str(repo.state_file),
        "--dispatch-telemetry-file",
        str(repo.telemetry_file),
        "--alert-config-file",
        str(repo.config_file),
    )

    assert counts(run.json) == (3, 3, 0, 0)
    assert run.stderr == ""
    assert repo.state() == run.json
    assert run.json["traceId"] == "bare"


def test_a_call_without_a_loop_says_so(repo: Repo) -> None:
    run = repo.run("dispatch", "--repo", str(repo.root))

    assert (run.exit_code, run.stdout) == (2, "")
    assert "--loop" in run.stderr


@pytest.mark.parametrize("loop", ["../other", "..", ".", "a/b", "/etc", "", "-x", "a\nb"])
def test_a_loop_id_that_leaves_its_folder_is_refused(repo: Repo, tmp_path: Path, loop: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    run = repo.run("dispatch", "--repo", str(repo.root), f"--loop={loop}")

    assert (run.exit_code, run.stdout) == (2, "")
    assert "loop" in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_repo_that_is_not_there_is_a_usage_error(repo: Repo, tmp_path: Path) -> None:
    run = repo.run("dispatch", "--repo", str(tmp_path / "nowhere"), "--loop", repo.loop)

    assert (run.exit_code, run.stdout) == (2, "")
    assert "nowhere" in run.stderr
    assert not (tmp_path / "nowhere").exists()


# --- Fail closed


def test_a_bad_config_sends_nothing_consumes_nothing_and_after_the_fix_all_goes_out(
    repo: Repo, server: SinkServer
) -> None:
    config = sink_config()
    config["routing"]["defaultSinks"] = ["nobody"]
    config["sinks"][CHAT]["timeoutSeconds"] = 0
    config["sinks"][PAGER]["type"] = "pigeon"
    repo.write_config(config)
    repo.append(*batch(6))
    run = repo.dispatch()

    assert (run.exit_code, run.stdout) == (3, "")
    assert run.stderr.startswith("error: ")
    for fault in ("nobody", "timeoutSeconds", "pigeon"):
        assert fault in run.stderr
    assert server.requests == []
    assert repo.telemetry() == []
    state = repo.state()
    assert set(state) >= STATE_FIELDS
    assert (state["status"], state["failureReasonCodes"]) == ("config_invalid", ["config_invalid"])
    assert "nobody" in state["message"]
    assert (state["escalationsLineOffset"], *counts(state)) == (0, 0, 0, 0, 0)
    assert state["escalationsLineCount"] == 6, "what waits is to be seen"
    repo.append("half a li")
    repo.dispatch()
    assert repo.state()["escalationsLineCount"] == 6
    repo.append("ne\n")
    repo.dispatch()
    assert repo.state()["escalationsLineCount"] == 7

    repo.write_config(sink_config())
    assert counts(repo.dispatch().json) == (7, 6, 0, 1)
    assert "message" not in repo.state()


def test_a_config_that_breaks_later_keeps_the_place(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(4))
    repo.dispatch()
    repo.append(*batch(6)[4:])
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    assert repo.state()["escalationsLineOffset"] == 4

    repo.write_config(sink_config())
    assert counts(repo.dispatch().json) == (2, 2, 0, 0)
    assert len({row["escalationId"] for row in repo.telemetry()}) == 6


def test_a_config_that_is_not_there_is_named(repo: Repo) -> None:
    repo.append(health_degraded())
    repo.config_file.unlink()
    run = repo.dispatch()

    assert (run.exit_code, run.stdout) == (3, "")
    assert str(repo.config_file) in run.stderr


def test_an_unset_secret_of_an_enabled_sink_holds_everything_back(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(5))
    kept = repo.env
    for name in ("ALERT_HOOK_URL", "ALERT_HOOK_TOKEN", "ALERT_CHAT_URL", "ALERT_PAGER_KEY"):
        unset = {key: value for key, value in kept.items() if key != name}
        for repo.env in (unset, {**unset, name: ""}):
            run = repo.dispatch()
            assert (run.exit_code, run.stdout) == (3, "")
            assert name in run.stderr
            assert not [secret for secret in SECRETS if secret in run.stderr]
    assert server.requests == []
    assert repo.telemetry() == []

    repo.env = kept
    assert counts(repo.dispatch().json) == (5, 5, 0, 0)


def test_an_unset_secret_of_a_disabled_sink_is_no_fault(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    config["sinks"][PAGER]["enabled"] = False
    repo.write_config(config)
    del repo.env["ALERT_PAGER_KEY"]
    repo.append(health_critical())

    assert counts(repo.dispatch().json) == (1, 1, 0, 0)


# --- From the shell dispatcher


def test_the_state_that_the_shell_dispatcher_left_is_taken_over_without_a_repeat(
    repo: Repo, server: SinkServer
) -> None:
    records = batch(12)
    repo.append(*records[:10])
    legacy = {
        "schemaVersion": "v1",
        "updatedAt": "2026-01-05T10:00:00Z",
        "loopId": repo.loop,
        "traceId": "shell",
        "escalationsFile": str(repo.source),
        "dispatchTelemetryFile": str(repo.telemetry_file),
        "status": "success",
        "processedCount": 3,
        "dispatchedCount": 3,
        "skippedCount": 0,
        "failedCount": 0,
        "failureReasonCodes": [],
        "escalationsLineOffset": 7,
        "escalationsLineCount": 7,
    }
    repo.state_file.write_text(json.dumps(legacy), encoding="utf-8")
    first = repo.dispatch().json
    repo.append(*records[10:])
    second = repo.dispatch().json

    assert (first["processedCount"], first["escalationsLineOffset"]) == (3, 10)
    assert (second["processedCount"], second["escalationsLineOffset"]) == (2, 12)
    assert [row["escalation"] for row in repo.telemetry()] == records[7:]
    assert len(server.requests) == sum(len(ROUTED[record["category"]]) for record in records[7:])


# --- Dry run


def test_a_dry_run_sends_nothing_and_touches_nothing(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(6))
    fresh = repo.snapshot()
    assert repo.dispatch("--dry-run").exit_code == 0
    assert repo.snapshot() == fresh

    repo.dispatch()
    server.forget()
    repo.append(*batch(3))
    before = repo.snapshot()
    for options in ([], ["--show-payload"], ["--format", "text"], ["--pretty"]):
        assert repo.dispatch("--dry-run", *options).exit_code == 0
    assert repo.snapshot() == before
    assert server.requests == []
    assert counts(repo.dispatch().json) == (3, 3, 0, 0)


def test_a_dry_run_says_what_a_new_config_changes_however_many_rows_a_killed_pass_has_left(
    repo: Repo, server: SinkServer
) -> None:
    server.answer("/", error(503))
    repo.append(health_critical())
    repo.dispatch()
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)"
    edit_queue(repo, f"INSERT INTO outbox (loop, file, row) {count} SELECT 1, 'attempts', '{{}}' FROM n")
    config = sink_config()
    del config["sinks"][CHAT]
    for route in config["routing"]["routes"]:
        route["sinks"] = [HOOK]
    repo.write_config(config)

    notes = repo.dispatch("--dry-run").json["notes"]
    assert any(CHAT in note for note in notes), notes


def test_a_dry_run_says_where_each_goes_and_why_not_elsewhere(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    config["sinks"][HOOK]["enabled"] = False
    config["sinks"][CHAT]["minSeverity"] = "critical"
    repo.write_config(config)
    repo.append(
        health_critical(), divergence_detected(), health_degraded(severity="info"), "bad\n", {"no": 1}, "\n"
    )
    plan = repo.dispatch("--dry-run").json

    assert plan["status"] == "dry_run"
    assert [item["line"] for item in plan["escalations"]] == [1, 2, 3, 4, 5, 6]
    first, second, third, *rest = plan["escalations"]
    assert (first["category"], first["eventSeverity"], first["decision"]) == (
        "health_critical",
        "critical",
        "send",
    )
    decisions = {sink["id"]: sink["decision"] for sink in first["sinks"]}
    assert decisions == {PAGER: "send", CHAT: "send", HOOK: "skip"}
    assert "disabled" in first["sinks"][2]["why"]
    assert "sink's minimum critical" in second["sinks"][0]["why"]
    assert "route's minimum warning" in third["sinks"][0]["why"]
    assert [item["decision"] for item in rest] == [
        "invalid_escalation_json",
        "missing_escalation_category",
        "blank_line",
    ]

    repo.dispatch()
    # The decisions were those that the pass then made.
    assert [row["escalationId"] for row in repo.telemetry()] == [
        item["escalationId"] for item in plan["escalations"]
    ]
    assert [row.get("reasonCode", "send") for row in repo.telemetry()] == [
        item["decision"] for item in plan["escalations"]
    ]
    text = repo.dispatch("--dry-run", "--format", "text").stdout
    assert "Nothing waits" in text


def test_a_dry_run_tells_a_person_in_text_what_would_be_sent(repo: Repo) -> None:
    repo.append(health_critical(), profile_drift_detected(severity="info"))
    text = repo.run_on_terminal("dispatch", *repo.target, "--dry-run").stdout

    assert re.search(r"^1 .*\n2 ", text, re.MULTILINE)
    for word in ("health_critical", "profile_drift_detected", HOOK, CHAT, PAGER):
        assert word in text
    assert "2 new: 2 to send, 0 skipped, 0 failed" in text
    assert "Nothing was sent or written" in text
    # A reader in a hurry would take it for done.
    assert "delivered" not in text.lower()


def test_a_dry_run_tells_of_what_waits_for_a_failing_sink(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    config["delivery"] = {"maxAttemptsPerPass": 1, "backoffSeconds": {"initial": 3600, "max": 3600}}
    repo.write_config(config)
    server.answer("/chat", error(403))
    repo.append(health_degraded())
    repo.dispatch()
    (item,) = repo.dispatch("--dry-run").json["escalations"]

    assert item["late"] is True
    assert item["decision"] == "wait"
    assert [(sink["id"], sink["decision"]) for sink in item["sinks"]] == [(CHAT, "wait")]
    assert "next attempt at" in item["sinks"][0]["why"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_dry_run_shows_payloads_without_their_secrets(repo: Repo, form: str) -> None:
    repo.append(health_critical())
    run = repo.dispatch("--dry-run", "--show-payload", "--format", form)

    assert run.exit_code == 0
    for word in ("routing_key", "custom_details", "webhook-id", "emittedAt", "blocks", "Bearer"):
        assert word in run.stdout
    assert not [secret for secret in SECRETS if secret in run.stdout + run.stderr]


def test_the_payload_that_a_dry_run_shows_is_the_one_that_is_sent(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical())
    (item,) = repo.dispatch("--dry-run", "--show-payload", "--trace-id", "t").json["escalations"]
    repo.dispatch("--trace-id", "t")

    shown = {sink["id"]: sink["request"]["body"] for sink in item["sinks"]}
    sent = {sink: server.received(PATHS[sink])[0].json for sink in SINK_TYPES}
    shown[PAGER]["routing_key"] = sent[PAGER]["routing_key"]
    shown[HOOK]["emittedAt"] = sent[HOOK]["emittedAt"]
    assert shown == sent


def test_a_dry_run_of_a_backlog_ends_with_its_time_budget_and_says_what_is_left(
    repo: Repo, server: SinkServer
) -> None:
    line = json.dumps(health_critical()) + "\n"
    repo.append(line * 5000)
    found = repo.dispatch("--dry-run", "--time-budget", "0.01").json
    assert (found["stoppedBy"], found["unreadCount"]) == ("time_budget", 4000)
    assert len(found["escalations"]) == 1000
    [waiting] = {(sink["decision"], sink["why"]) for sink in found["escalations"][-1]["sinks"]}
    assert waiting == ("wait", "the time budget ends before its turn")
    assert server.requests == []


def test_a_dry_run_with_a_bad_config_says_so_and_touches_nothing(repo: Repo) -> None:
    repo.append(health_critical())
    repo.write_config("{}")
    before = repo.snapshot()
    run = repo.dispatch("--dry-run")

    assert (run.exit_code, run.stdout) == (3, "")
    assert "sinks" in run.stderr
    assert repo.snapshot() == before


def test_showing_payloads_needs_a_dry_run(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical())
    run = repo.dispatch("--show-payload")

    assert (run.exit_code, run.stdout) == (2, "")
    assert "--dry-run" in run.stderr
    assert server.requests == []


def test_a_dry_run_says_how_old_what_it_would_send_is(repo: Repo) -> None:
    """A first pass sends all history: who looks before it must see that."""
    repo.append(health_critical(seconds_ago=3 * 86400), health_critical())

    plan = repo.dispatch("--dry-run").json
    text = repo.dispatch("--dry-run", "--format", "text").stdout
    repo.dispatch()

    assert plan["oldestAt"] == repo.telemetry()[0]["escalationTimestamp"]
    assert "the oldest was written 3 days ago" in text
