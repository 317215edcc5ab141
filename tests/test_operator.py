"""The operator's commands (status, test, redeliver, skip, init): what they say, send, change, leave alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import RUN_TIMEOUT, Repo, queue_rows, read_rows, time_passes
from escalations import (
    CHAT,
    HOOK,
    HOOK_TOKEN,
    PAGER,
    PAGER_KEY,
    PATHS,
    SECRETS,
    SINK_TYPES,
    batch,
    escalation_id,
    health_critical,
    health_degraded,
    lines,
    timestamp,
)
from loopback import Answer, SinkServer, closed_port, echo, error, hang, ok, rate_limited
from operate import check, ids_at, make_backlog, make_dead_letter, on_terminal, sink_of, to_all
from promise import check_promise
from tools import needs_tool

import ops_alert_dispatch

STATUS_STAND_IN = Path(__file__).with_name("status-stand-in.sh")
ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

STATUS_FIELDS = ["schemaVersion", "generatedAt", "repoPath", "loopId", "health", "alerts", "sinks"]
STATUS_FIELDS += ["failureReasons"]
SINK_FIELDS = ["id", "type", "enabled", "health", "lagCount", "oldestPendingAt", "lastSuccessAt"]
SINK_FIELDS += ["lastFailureAt", "reasonCode", "message", "consecutiveFailures", "nextAttemptAt"]
SINK_FIELDS += ["deadLetterCount"]


@pytest.fixture(autouse=True)
def config(repo: Repo) -> None:
    repo.write_config(to_all())


def status(repo: Repo, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = repo.run("status", *repo.target, *options).json
    return found


# --- status: is it working, what is stuck, why, what to do


def test_status_has_every_field_that_scripts_read(repo: Repo, server: SinkServer) -> None:
    server.answer(PATHS[CHAT], rate_limited(120))
    server.script(PATHS[HOOK], error(422, "no thanks"))
    first, second = health_critical(seconds_ago=90), health_degraded(seconds_ago=60)
    repo.append(first, second)
    repo.dispatch("--trace-id", "the-pass")
    before = repo.snapshot()
    found = status(repo)

    assert [key for key in found if key in STATUS_FIELDS] == STATUS_FIELDS
    assert (found["schemaVersion"], found["loopId"]) == ("v1", repo.loop)
    assert (found["repoPath"], found["health"]) == (str(repo.root), "warning")
    assert [sink["id"] for sink in found["sinks"]] == sorted(SINK_TYPES)
    for sink in found["sinks"]:
        assert [key for key in sink if key in SINK_FIELDS] == SINK_FIELDS
        assert sink["type"] == SINK_TYPES[sink["id"]]
        assert sink["enabled"] is True

    chat, hook, pager = sink_of(found, CHAT), sink_of(found, HOOK), sink_of(found, PAGER)
    assert (chat["health"], chat["lagCount"], chat["oldestPendingAt"]) == ("warning", 2, first["timestamp"])
    assert (chat["reasonCode"], chat["message"]) == ("http_error", "slow down")
    assert (chat["consecutiveFailures"], chat["lastSuccessAt"]) == (1, None)
    assert chat["lastFailureAt"] < chat["nextAttemptAt"]
    assert (hook["health"], hook["lagCount"], hook["deadLetterCount"]) == ("warning", 0, 1)
    assert hook["lastSuccessAt"]
    assert hook["lastFailureAt"]
    assert (pager["health"], pager["lagCount"], pager["deadLetterCount"]) == ("ok", 0, 0)
    assert pager["reasonCode"] is pager["lastFailureAt"] is pager["nextAttemptAt"] is None

    reasons = {reason["reasonCode"]: reason for reason in found["failureReasons"]}
    assert {code: reason["count"] for code, reason in reasons.items()} == {
        "http_error": 1,
        "delivery_deferred": 1,
    }
    assert all(set(r) == {"reasonCode", "count", "lastSeenAt"} and r["lastSeenAt"] for r in reasons.values())
    assert repo.snapshot() == before
    assert json.loads(repo.run("status", *repo.target, "--pretty").stdout).keys() == found.keys()


def test_status_says_of_alerts_what_the_hosts_status_script_says(repo: Repo, server: SinkServer) -> None:
    needs_tool("jq")

    def agree() -> dict[str, Any]:
        told = subprocess.run(
            [STATUS_STAND_IN, "--repo", repo.root, "--loop", repo.loop], capture_output=True, check=True
        )
        alerts: dict[str, Any] = json.loads(told.stdout)["alerts"]
        assert status(repo)["alerts"] == alerts
        return alerts

    repo.folder.mkdir(parents=True)
    assert agree() == {"dispatch": None, "lastDelivery": None}
    repo.dispatch()
    assert agree()["dispatch"]["status"] == "no_source"
    server.script(PATHS[CHAT], error(503))
    repo.append(*batch(2))
    repo.dispatch()
    assert agree()["lastDelivery"]["failedSinkCount"] == 1
    repo.dispatch()
    assert agree()["lastDelivery"]["dispatchedSinkCount"] == 1
    repo.append("no JSON\n")
    repo.dispatch()
    assert agree()["lastDelivery"]["reasonCode"] == "invalid_escalation_json"
    # A row of reconcile's own, and one that is longer than the stretch of the file that is looked at.
    with repo.telemetry_file.open("a") as telemetry:
        telemetry.write(json.dumps({"status": "failed_command", "message": "x" * 3_000_000}) + "\n")
    assert agree()["lastDelivery"]["status"] == "failed_command"
    repo.write_config("{}")
    assert repo.dispatch().exit_code == 3
    assert agree()["dispatch"]["status"] == "config_invalid"


def test_status_of_a_repo_tells_of_all_its_loops_and_of_nothing_else(repo: Repo) -> None:
    assert repo.run("status", "--repo", str(repo.root)).json == {"loops": []}
    none = f"No loop of {repo.root} has escalations yet. Use --repo to name another folder.\n"
    assert repo.run("status", "--format", "text").stdout == none
    assert (
        repo.run("dispatch", "--all-loops", "--format", "text").stdout == f"no_source  0 loops, 0 new\n{none}"
    )

    repo.append(health_critical())
    for name in ("a-loop", "fleet", "no-loop", f"odd{ESCAPE}"):
        (repo.folder.parent / name).mkdir()
    (repo.folder.parent / "a-loop" / "escalations.jsonl").touch()
    (repo.folder.parent / "fleet" / "escalations.jsonl").touch()
    (repo.folder.parent / f"odd{ESCAPE}" / "escalations.jsonl").touch()
    found = repo.run("status", "--repo", str(repo.root)).json
    assert [loop["loopId"] for loop in found["loops"]] == ["a-loop", repo.loop]
    run = repo.run("status", "--repo", str(repo.root), "--format", "text")
    assert "loop a-loop:" in run.stdout
    assert f"loop {repo.loop}:" in run.stdout


def test_what_no_pass_has_taken_up_yet_counts_as_lag(repo: Repo) -> None:
    oldest = health_critical(seconds_ago=50)
    repo.append(oldest, health_degraded(), "no JSON\n", health_degraded(severity="info"))
    config = to_all()
    config["sinks"][PAGER]["minSeverity"] = "critical"
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    found = status(repo)
    assert {sink["id"]: sink["lagCount"] for sink in found["sinks"]} == {CHAT: 0, HOOK: 3, PAGER: 1}
    assert sink_of(found, HOOK)["oldestPendingAt"] == oldest["timestamp"]
    assert sink_of(found, CHAT)["health"] == "disabled"
    assert found["unreadCount"] == 4
    assert (found["health"], found["alerts"]["dispatch"]) == ("unknown", None)

    repo.dispatch()
    repo.append(health_degraded(timestamp=timestamp(5)))
    found = status(repo)
    assert {sink["id"]: sink["lagCount"] for sink in found["sinks"]} == {CHAT: 0, HOOK: 1, PAGER: 0}
    assert (found["health"], sink_of(found, HOOK)["health"]) == ("warning", "warning")


def test_status_works_without_config_and_secrets_and_says_what_it_cannot_know(
    repo: Repo, server: SinkServer
) -> None:
    make_backlog(repo, server, 2)
    repo.append(health_degraded())
    repo.config_file.unlink()
    repo.env = {"PATH": repo.env["PATH"]}
    found = status(repo)
    assert found["health"] == "warning"
    chat = sink_of(found, CHAT)
    assert (chat["type"], chat["enabled"], chat["lagCount"]) == (None, None, 2)
    assert any("is not there" in note for note in found["notes"])
    assert any("1 line of the source not read yet" in note for note in found["notes"])
    # The config may just be elsewhere: nobody is sent to mend it, even when the sink is critical.
    code, line = check(repo, "--critical-after", "0")
    assert code == 2
    assert f"{CHAT} is failing" in line
    assert "config" not in line


@pytest.mark.parametrize("ran", [False, True], ids=["before any pass", "after a pass"])
def test_an_invalid_config_is_critical(repo: Repo, ran: bool) -> None:
    repo.append(health_critical())
    repo.write_config('{"schemaVersion": "v1"}')
    if ran:
        assert repo.dispatch().exit_code == 3
    found = status(repo)
    assert found["health"] == "critical"
    assert found["notes"][0].startswith("config invalid")
    assert sum(note.startswith("$.") for note in found["notes"]) > 1
    text = repo.run("status", *repo.target, "--format", "text").stdout
    head, advice, *_ = text.splitlines()
    assert head == f"CRITICAL  loop {repo.loop}: the config is invalid: nothing is sent"
    assert f"run `ops-alert-dispatch config --alert-config-file {repo.config_file}`" in advice
    assert check(repo) == (2, f"ALERT DISPATCH CRITICAL: {repo.loop}: the config is invalid: nothing is sent")


def test_an_unset_secret_is_critical_once_a_pass_has_met_it(repo: Repo) -> None:
    repo.append(health_critical())
    assert repo.dispatch(env={"ALERT_CHAT_URL": ""}).exit_code == 3
    code, line = check(repo)
    assert (code, "the last pass found the config invalid, and sent nothing" in line) == (2, True)
    assert any("ALERT_CHAT_URL" in note for note in status(repo)["notes"])


ADVICE: list[tuple[str, Answer, str, str]] = [
    ("a wrong credential", error(401, "who are you"), "http_error 401", "credential is wrong"),
    ("a deleted webhook", error(404, "no_service"), "http_error 404", "URL is wrong or was deleted"),
    ("an archived channel", error(410, "channel_is_archived"), "http_error 410", "unarchive the channel"),
    ("an outage", error(502, "bad gateway"), "http_error 502", "the sink has trouble"),
    ("a rate limit", rate_limited(60), "http_error 429", "limits the rate"),
    ("a moved webhook", error(302), "http_error 302", "the URL that the redirect leads to"),
    ("a refused record", error(422, "bad field"), "http_error 422", "read the sink's answer"),
    ("a proxy's page", error(200, "<html>Log in"), "http_error 200", "what stands before the sink"),
    (
        "words of refusal",
        error(200, '{"ok":false,"error":"no_text"}'),
        "http_error 200",
        "read the sink's answer",
    ),
    ("a failing queue", error(500, "no routing key is bound"), "http_error 500", "the sink has trouble"),
    (
        "words of trouble",
        error(200, '{"ok":false,"error":"internal_error"}'),
        "http_error 200",
        "the sink has trouble",
    ),
    ("words of haste", error(200, '{"ok":false,"error":"ratelimited"}'), "http_error 200", "limits the rate"),
]


def test_a_failed_test_alert_says_what_to_do(repo: Repo, server: SinkServer) -> None:
    """Each fault is a sink of its own, so that one run shows them all."""
    config = to_all()
    config["sinks"] = {}
    for number, (_, answer, _, _) in enumerate(ADVICE):
        config["sinks"][f"sink-{number}"] = {
            "enabled": True,
            "type": "slack",
            "webhookUrlEnv": f"URL_{number}",
        }
        server.answer(f"/sink-{number}", answer)
    config["routing"]["defaultSinks"] = ["sink-0"]
    repo.write_config(config)
    env = {f"URL_{number}": f"{server.url}/sink-{number}" for number in range(len(ADVICE))}
    run = repo.run("test", "--format", "text", env=env)
    assert run.exit_code == 1
    said = run.stdout.splitlines()
    for number, (name, _, what, advice) in enumerate(ADVICE):
        assert said[2 * number].startswith(f"sink-{number}: {what}"), name
        assert said[2 * number + 1].startswith("  what to do: "), name
        assert advice in said[2 * number + 1], name


def test_status_says_the_verdict_and_the_advice_first(repo: Repo, server: SinkServer) -> None:
    server.answer(PATHS[CHAT], error(403, "invalid_token"))
    repo.append(*batch(2))
    repo.dispatch()
    text = repo.run("status", *repo.target, "--format", "text").stdout
    head, advice, blank, titles, *_ = text.splitlines()
    assert head == (
        f"WARNING  loop {repo.loop}: {CHAT} is failing (http_error 403: invalid_token), 2 deliveries waiting"
    )
    assert advice.startswith(
        "What to do: the credential is wrong or was revoked: make a new one, set it in ALERT_CHAT_URL,"
    )
    assert blank == ""
    assert titles.split()[:3] == ["SINK", "HEALTH", "WAITING"]
    [failure] = [line for line in text.splitlines() if " delivery_deferred " in line]
    assert failure.split()[0] == "1"
    assert failure.endswith(ops_alert_dispatch.CODES["delivery_deferred"].meaning)


# --- status --check: for a monitor


def test_a_monitor_gets_one_line_and_the_exit_code_of_its_convention(repo: Repo, server: SinkServer) -> None:
    assert check(repo) == (3, "ALERT DISPATCH UNKNOWN: no loop has escalations or a state")
    repo.append(*batch(2))
    code, line = check(repo)
    assert (code, line) == (3, f"ALERT DISPATCH UNKNOWN: {repo.loop}: no pass has run yet")
    repo.dispatch()
    code, line = check(repo)
    assert (code, line.split(":")[0]) == (0, "ALERT DISPATCH OK")

    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(health_degraded())
    assert check(repo)[0] == 1  # not ingested yet
    repo.dispatch()
    code, line = check(repo)
    assert (code, line.split(":")[0]) == (1, "ALERT DISPATCH WARNING")
    assert f"{repo.loop}: {CHAT} is failing (http_error 503: down), 1 delivery waiting" in line
    time.sleep(1.1)  # the moment is kept in whole seconds
    code, line = check(repo, "--critical-after", "1")
    assert (code, line.split(":")[0]) == (2, "ALERT DISPATCH CRITICAL")
    assert check(repo, "--critical-after", "60")[0] == 1

    # The worst loop decides, and is the one that is named.
    other = repo.folder.parent / "another"
    other.mkdir()
    (other / "escalations.jsonl").touch()
    code, line = check(repo, "--critical-after", "1")
    assert (code, "another" in line) == (2, False)
    assert check(repo)[0] == 3
    assert check(repo, "--loop", repo.loop)[0] == 1


def test_dead_letters_are_a_warning(repo: Repo, server: SinkServer) -> None:
    make_dead_letter(repo, server)
    assert check(repo) == (1, f"ALERT DISPATCH WARNING: {repo.loop}: 1 dead letter of {HOOK}")


def test_a_state_that_cannot_be_used_is_unknown_to_a_monitor_and_an_error_to_people(repo: Repo) -> None:
    repo.folder.mkdir(parents=True)
    repo.state_file.write_text('{"schemaVersion": "v2"}')
    code, line = check(repo)
    assert code == 3
    assert "newer version" in line
    run = repo.run("status", *repo.target)
    assert (run.exit_code, run.stdout) == (4, "")
    assert run.stderr.startswith("error: ")


def test_a_command_line_that_is_wrong_does_not_look_critical_to_a_monitor(repo: Repo) -> None:
    for wrong in (
        ["--lop", "x"],
        ["--loop", "../x"],
        ["--dispatch-state-file", "s.json"],
        ["--critical-after", "nan"],
    ):
        code, line = check(repo, *wrong)
        assert code == 3
        assert line.startswith("ALERT DISPATCH UNKNOWN: ")
        assert wrong[0] in line or "--loop" in line


# --- status --format prometheus


def test_a_dead_letter_is_found_beside_a_line_that_is_the_same_and_was_delivered(
    repo: Repo, server: SinkServer
) -> None:
    """Both have one id: what a monitor warns of must be there to be sent again."""
    twin = health_critical()
    repo.append(twin)
    server.script(PATHS[HOOK], error(422, "not now"))
    repo.dispatch()
    repo.append(twin)
    repo.dispatch()
    server.forget()
    assert repo.state()["deadLetterCount"] == 1

    sent = repo.run("redeliver", *repo.target, "--dead-letters", "--yes").json
    assert sent["deliveredCount"] == len(server.received(PATHS[HOOK])) == 1
    assert repo.state()["deadLetterCount"] == 0


def test_a_metric_says_that_the_config_is_invalid_and_nothing_is_sent(repo: Repo) -> None:
    repo.append(health_critical())
    repo.write_config("{")
    repo.dispatch()
    text = repo.run("status", "--repo", str(repo.root), "--format", "prometheus").stdout
    samples = dict(re.findall(r"^ops_alert_dispatch_(\w+)\{loop=.*\} (\S+)$", text, re.MULTILINE))
    assert (samples["health"], samples["config_valid"], samples["unread"]) == ("2", "0", "1")
    assert abs(float(samples["last_pass_timestamp_seconds"]) - time.time()) < RUN_TIMEOUT


def test_no_time_is_no_time_after_which_a_sink_is_critical(repo: Repo) -> None:
    assert repo.run("status", *repo.target, "--critical-after", "nan").exit_code == 2


def test_prometheus_takes_the_metrics_without_a_remark(repo: Repo, server: SinkServer) -> None:
    promtool = needs_tool("promtool")
    repo.loop = 'night "build" \\ 2'
    server.answer(PATHS[CHAT], rate_limited(120))
    server.script(PATHS[HOOK], error(422))
    repo.append(*batch(3))
    repo.dispatch()
    run = repo.run("status", "--repo", str(repo.root), "--format", "prometheus")
    judged = subprocess.run(
        [promtool, "check", "metrics"], input=run.stdout, capture_output=True, text=True, check=False
    )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")

    samples = {
        name.replace('loop="night \\"build\\" \\\\ 2",', ""): float(value)
        for name, value in re.findall(r"^ops_alert_dispatch_(.*\}) (\S+)$", run.stdout, re.MULTILINE)
    }
    assert samples[f'waiting{{sink="{CHAT}"}}'] == 3
    assert samples[f'waiting{{sink="{HOOK}"}}'] == 0
    assert samples[f'dead_letters{{sink="{HOOK}"}}'] == 1
    assert samples[f'consecutive_failures{{sink="{CHAT}"}}'] == 1
    assert 60 <= samples[f'oldest_waiting_age_seconds{{sink="{CHAT}"}}'] < 60 + RUN_TIMEOUT
    assert abs(samples[f'last_success_timestamp_seconds{{sink="{PAGER}"}}'] - time.time()) < RUN_TIMEOUT
    assert f'last_success_timestamp_seconds{{sink="{CHAT}"}}' not in samples
    assert samples[f'deliveries_total{{sink="{PAGER}",outcome="delivered"}}'] == 3
    assert samples[f'deliveries_total{{sink="{HOOK}",outcome="dead_letter"}}'] == 1
    assert samples[f'deliveries_total{{sink="{HOOK}",outcome="failed"}}'] == 0
    assert samples[f'deliveries_total{{sink="{CHAT}",outcome="failed"}}'] == 1
    assert samples[f'deliveries_total{{sink="{CHAT}",outcome="skipped"}}'] == 0


def test_prometheus_takes_the_metrics_of_a_repo_without_loops(repo: Repo) -> None:
    promtool = needs_tool("promtool")
    run = repo.run("status", "--repo", str(repo.root), "--format", "prometheus")
    judged = subprocess.run(
        [promtool, "check", "metrics"], input=run.stdout, capture_output=True, text=True, check=False
    )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")


# --- test: would an alert arrive


def test_a_test_alert_reaches_each_enabled_sink_marked_as_one_and_touches_nothing(
    repo: Repo, server: SinkServer
) -> None:
    config = to_all()
    config["sinks"][PAGER]["minSeverity"] = "critical"  # a test alert is no escalation: it goes out
    config["sinks"]["spare"] = {"enabled": False, "type": "webhook", "urlEnv": "SPARE_URL"}
    repo.write_config(config)
    repo.append(*batch(2))
    repo.dispatch()
    server.forget()
    before = repo.snapshot()
    run = repo.run("test", "--repo", str(repo.root))
    assert repo.snapshot() == before
    assert run.stderr == ""
    results = {sink["id"]: sink for sink in run.json["sinks"]}
    assert set(results) == set(SINK_TYPES)
    for sink_id, result in results.items():
        assert (result["status"], result["reasonCode"], result["message"]) == ("success", None, None)
        assert result["durationMs"] >= 0
        [request] = server.received(PATHS[sink_id])
        assert "test_alert" in request.body.decode()
        assert "Nothing is wrong" in request.body.decode()
    [request] = server.received(PATHS[HOOK])
    assert request.headers["authorization"] == f"Bearer {HOOK_TOKEN}"
    assert request.json["event"] == {"category": "test_alert", "severity": "info"}
    [request] = server.received(PATHS[PAGER])
    assert (request.json["routing_key"], request.json["payload"]["severity"]) == (PAGER_KEY, "info")


def test_a_disabled_sink_can_be_tested_before_it_is_switched_on(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    run = repo.run(
        "test", "--sink", CHAT, "--severity", "CRIT", "--format", "text", env={"ALERT_HOOK_URL": ""}
    )
    assert run.exit_code == 0
    assert re.fullmatch(rf"{CHAT}: delivered \(200\), \d+ ms\n", run.stdout)
    assert [request.path for request in server.requests] == [PATHS[CHAT]]
    assert "[critical]" in server.requests[0].json["text"]
    run = repo.run("test", "--sink", CHAT, env={"ALERT_CHAT_URL": ""})
    assert (run.exit_code, run.stdout) == (3, "")
    assert "nothing was sent" in run.stderr
    assert "ALERT_CHAT_URL is unset or empty" in run.stderr
    assert "enabled" not in run.stderr


def test_one_failing_sink_does_not_hide_the_others(repo: Repo, server: SinkServer) -> None:
    with closed_port() as port:
        run = repo.run("test", env={"ALERT_CHAT_URL": f"http://127.0.0.1:{port}/chat"})
    assert run.exit_code == 1
    results = {sink["id"]: sink for sink in json.loads(run.stdout)["sinks"]}
    assert [results[sink]["status"] for sink in (HOOK, PAGER)] == ["success", "success"]
    assert results[CHAT]["reasonCode"] == "request_failed"
    assert "refused" in results[CHAT]["message"]
    assert "sink is up and reachable" in results[CHAT]["advice"]
    assert not repo.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["test", "--sink", "ops-chatt"], "ops-chat"),
        (["test", "--severity", "loud"], "--severity"),
        (["redeliver", "--repo", ".", "--loop", "x"], "--dead-letters"),
        (["redeliver", "--repo", ".", "--loop", "x", "--id", "esc_1", "--from-line", "1"], "one of"),
        (["redeliver", "--repo", ".", "--loop", "x", "--dead-letters", "--to-line", "1"], "--from-line"),
        (["redeliver", "--repo", ".", "--loop", "x", "--from-line", "0"], "--from-line"),
        (["redeliver", "--repo", ".", "--loop", "x", "--from-line", "3", "--to-line", "2"], "is before"),
        (["skip", "--repo", ".", "--loop", "x"], "--sink"),
        (["skip", "--repo", ".", "--loop", "x", "--dead-letters", "--to-line", "1"], "--to-line"),
        (["status", "--repo", ".", "--dispatch-state-file", "s.json"], "--loop"),
        (["config", "--list-sinks", "--format", "json"], "--list-sinks"),
        (["log", "--repo", ".", "--escalations-file", "e"], "--loop"),
        (["skip", "--repo", ".", "--loop", "../x", "--sink", "y"], "loop id"),
        (["status", "--repo", "nowhere"], "--repo"),
        (["status", "--repo", ".", "--critical-after", "-1"], "--critical-after"),
    ],
)
def test_a_wrong_command_line_is_exit_2_and_says_what_is_wrong(
    repo: Repo, arguments: list[str], says: str
) -> None:
    run = repo.run(*arguments)
    assert (run.exit_code, run.stdout) == (2, "")
    assert says in run.stderr


def test_a_loop_that_no_pass_has_seen_is_named_as_such(repo: Repo) -> None:
    command = ["redeliver", "--dead-letters"]
    repo.append(health_critical())
    run = repo.run(*command, *repo.target, "--yes")
    assert (run.exit_code, run.stdout) == (4, "")
    assert f"run `ops-alert-dispatch dispatch --repo {repo.root} --loop {repo.loop}` first" in run.stderr
    repo.write_config("{}")
    assert repo.run(*command, *repo.target, "--yes").exit_code == 3


@pytest.mark.parametrize("command", [["redeliver", "--dead-letters"], ["skip", "--sink", CHAT]])
def test_a_command_for_a_loop_that_does_not_exist_makes_no_folder(repo: Repo, command: list[str]) -> None:
    run = repo.run(*command, *repo.target, "--yes")
    assert (run.exit_code, run.stdout) == (4, "")
    assert str(repo.root) in run.stderr
    assert not repo.folder.exists()


def test_history_can_be_skipped_before_the_first_pass_pages_somebody(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(5), "no JSON\n")
    before = repo.snapshot()
    shown = repo.run("skip", *repo.target, "--sink", PAGER, stdin="n\n")
    assert (shown.exit_code, "Skip 5 deliveries?" in shown.stderr) == (130, True)
    lock = str((repo.folder / "alert-dispatch-state.json.lock").relative_to(repo.root))
    folder = str(repo.folder.relative_to(repo.root))
    left = {name: found for name, found in repo.snapshot().items() if name not in (lock, folder)}
    assert left == {name: found for name, found in before.items() if name != folder}

    done = repo.run("skip", *repo.target, "--sink", PAGER, "--yes").json
    assert done["skippedCount"] == 5
    assert server.requests == []
    rows = [row for row in repo.telemetry() if "escalationCategory" in row]
    assert [{entry["id"]: entry["reasonCode"] for entry in row["sinks"]}[PAGER] for row in rows] == [
        "skipped_by_operator"
    ] * 5
    assert repo.state()["escalationsLineOffset"] == 6
    repo.append(health_critical(traceId="new"))
    repo.dispatch()
    assert len(ids_at(server, HOOK)) == 6
    assert len(server.received(PATHS[PAGER])) == 1
    check_promise(repo)


def test_what_waited_in_a_lost_queue_is_reported_and_sent_with_the_command_that_status_prints(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(health_critical(traceId="delivered everywhere"))
    repo.dispatch()
    make_backlog(repo, server, 3)
    waiting = {row["escalationId"] for row in repo.telemetry()[1:]}
    repo.queue_file.unlink()
    found = status(repo)
    assert (found["health"], "3 waiting deliveries in the queue" in found["verdict"]) == ("warning", True)
    assert not repo.queue_file.exists()
    server.answer(PATHS[CHAT], ok())
    repo.dispatch()
    assert server.requests == []
    found = status(repo)
    assert "queue_lost" in found["verdict"]
    [command] = re.findall("`ops-alert-dispatch (redeliver [^`]+)`", " ".join(found["advice"]))
    sent = repo.run(*shlex.split(command), "--yes").json
    assert {item["escalationId"] for item in sent["deliveries"]} == waiting
    assert set(ids_at(server, CHAT)) == waiting
    rows = repo.telemetry()
    late = [row for row in rows if row.get("byOperator")]
    assert len(late) == 3
    assert {(row["late"], row["status"], "escalation" in row) for row in late} == {
        (True, "dispatched", False)
    }
    assert len([row for row in rows if "escalation" in row]) == 4
    server.forget()
    repo.dispatch()
    assert server.requests == []


def test_what_a_damaged_queue_held_is_reported_before_the_next_pass(repo: Repo, server: SinkServer) -> None:
    make_backlog(repo, server, 2)
    repo.queue_file.write_bytes(b"not a database at all, but long enough to look at" * 100)
    before = repo.snapshot()
    found = status(repo)
    assert (found["health"], "which is damaged (queue_lost)" in found["verdict"]) == ("warning", True)
    assert any("keeps it aside" in note for note in found["notes"])
    assert repo.snapshot() == before


def test_what_was_redelivered_and_fails_is_given_up_as_anything_else_is(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(health_critical())
    repo.dispatch()
    server.answer(PATHS[CHAT], error(503))
    again = ["redeliver", *repo.target, "--from-line", "1", "--sink", CHAT, "--yes"]
    assert repo.run(*again).exit_code == 1
    time_passes(repo, 86_500)
    assert repo.dispatch().json["deadLetterCount"] == 1


def test_an_escalation_that_the_queue_has_let_go_says_so_and_is_sent_by_its_line(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(health_critical(), health_critical(traceId="another"))
    repo.dispatch()
    time_passes(repo, 8 * 86_400)
    repo.append(health_degraded())
    repo.dispatch()
    assert queue_rows(repo, "SELECT count(*) FROM escalations") == [(1,)]
    server.forget()
    gone = repo.telemetry()[1]["escalationId"]
    run = repo.run("redeliver", *repo.target, "--id", gone, "--yes")
    assert (run.exit_code, run.stdout) == (2, "")
    assert "settled more than 7 days ago" in run.stderr
    assert "--from-line 2 --to-line 2" in run.stderr
    lines_2 = ("redeliver", *repo.target, "--from-line", "2", "--to-line", "2", "--sink", HOOK, "--yes")
    assert repo.run(*lines_2).json["deliveredCount"] == 1
    assert ids_at(server, HOOK) == [gone]


def test_a_disabled_sink_that_is_named_is_sent_only_what_was_asked_for(
    repo: Repo, server: SinkServer
) -> None:
    ids = make_backlog(repo, server, 2)
    server.answer(PATHS[CHAT], ok())
    repo.run("skip", *repo.target, "--sink", CHAT, "--to-line", "1", "--yes")
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    done = repo.run("redeliver", *repo.target, "--id", ids[0], "--sink", CHAT, "--yes").json
    assert done["deliveredCount"] == 1
    assert ids_at(server, CHAT) == [ids[0]]
    assert repo.dispatch().json["waitingCount"] == 1
    assert status(repo)["verdict"] == "nothing is waiting, but for 1 delivery to disabled sinks"


def test_skip_up_to_a_line_counts_lines_that_no_pass_has_read(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(3))
    repo.dispatch("--max-escalations", "1")
    repo.source.rename(f"{repo.source}.1")
    repo.append(*batch(5))
    server.forget()
    done = repo.run("skip", *repo.target, "--sink", CHAT, "--to-line", "4", "--yes").json
    repo.dispatch()

    assert done["skippedCount"] == 2 + 4
    assert len(ids_at(server, CHAT)) == 1
    assert len(ids_at(server, HOOK)) == 2 + 5


def test_a_clock_that_is_off_is_a_warning(repo: Repo, server: SinkServer) -> None:
    ahead = formatdate(time.time() + 7200, usegmt=True)
    server.answer(PATHS[HOOK], Answer(200, b"ok", {"Date": ahead}))
    repo.append(health_critical())
    repo.dispatch()
    found = status(repo)
    assert found["health"] == "warning"
    assert f"the clock of {HOOK} is 7" in found["verdict"]
    assert abs(sink_of(found, HOOK)["clockOffsetSeconds"] - 7200) < 60


def test_the_commands_work_on_the_files_that_are_named(repo: Repo, server: SinkServer) -> None:
    """A host that keeps a loop's files elsewhere tells each command so, as it tells `dispatch`."""
    elsewhere = repo.root / "elsewhere"
    elsewhere.mkdir()
    source = elsewhere / "source.jsonl"
    source.write_text(lines(batch(2)))
    files = ["--escalations-file", str(source), "--dispatch-state-file", str(elsewhere / "state.json")]
    files += ["--dispatch-telemetry-file", str(elsewhere / "rows.jsonl")]
    server.script(PATHS[HOOK], error(422))
    server.answer(PATHS[CHAT], error(503))
    assert repo.dispatch(*files).json["deadLetterCount"] == 1
    found = status(repo, *files)
    assert (sink_of(found, CHAT)["lagCount"], sink_of(found, HOOK)["deadLetterCount"]) == (2, 1)
    # What it advises is for these files, too.
    [redeliver] = [advice for advice in found["advice"] if "redeliver" in advice]
    assert all(file in redeliver for file in files)
    assert repo.run("redeliver", *repo.target, *files, "--dead-letters", "--yes").json["deliveredCount"] == 1
    assert repo.run("skip", *repo.target, *files, "--sink", CHAT, "--yes").json["skippedCount"] == 2
    assert status(repo, *files)["health"] == "ok"
    assert not (repo.folder / "alert-dispatch-state.json").exists()
    for command in (["redeliver", "--dead-letters"], ["skip", "--sink", CHAT], ["status"]):
        run = repo.run(*command, *repo.target, *files[:2], "--dispatch-state-file", str(source))
        assert (run.exit_code, "are the same file" in run.stderr) == (2, True), command


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (["redeliver", "--from-line", "1", "--sink", HOOK], "deliveredCount"),
        (["skip", "--sink", CHAT], "skippedCount"),
    ],
)
def test_a_question_does_not_spoil_the_json(
    repo: Repo, server: SinkServer, command: list[str], field: str
) -> None:
    ids = make_backlog(repo, server, 2)
    asked = repo.run(*command, *repo.target, stdin="n\n")
    assert (asked.exit_code, asked.stdout) == (130, "")
    assert all(name in asked.stderr for name in (*(i[:12] for i in ids), "2 deliveries?", "--yes"))
    assert server.requests == []
    done = repo.run(*command, *repo.target, stdin="y\n")
    assert done.json[field] == 2
    assert [(d["escalationId"], d["sinkId"]) for d in done.json["deliveries"]] == [
        (name, command[-1]) for name in ids
    ]
    assert all(name[:12] in done.stderr for name in ids)
    quiet = repo.run(*command, *repo.target, "--yes", "--pretty")
    assert quiet.stderr == ""
    assert quiet.stdout.startswith("{\n")


# --- redeliver


def test_redeliver_says_in_json_what_came_of_each(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical(traceId="1"), health_critical(traceId="2"))
    repo.dispatch()
    server.script(PATHS[HOOK], ok(), error(422, "no thanks"))
    run = repo.run("redeliver", *repo.target, "--from-line", "1", "--sink", HOOK, "--yes")
    assert (run.exit_code, run.stderr) == (1, "")
    said = json.loads(run.stdout)
    assert (said["status"], said["deliveredCount"], said["failedCount"]) == ("partial", 1, 1)
    first, second = said["deliveries"]
    assert (first["status"], first["httpStatus"], first["reasonCode"]) == ("success", 200, None)
    assert (second["status"], second["httpStatus"], second["message"]) == ("failed", 422, "no thanks")
    assert (second["faultCode"], second["willRetry"]) == ("record_refused", False)
    assert "read the sink's answer" in second["advice"]


def test_a_sink_that_is_down_is_not_asked_for_each_of_many(repo: Repo, server: SinkServer) -> None:
    """Five hundred timeouts in a row would help nobody."""
    repo.append(*batch(3))
    repo.dispatch()
    server.forget()
    server.answer(PATHS[CHAT], error(503, "down"))
    run = repo.run("redeliver", *repo.target, "--from-line", "1", "--yes")
    assert run.exit_code == 1
    said = json.loads(run.stdout)
    failed = [d for d in said["deliveries"] if d["sinkId"] == CHAT]
    assert [(d["status"], d["willRetry"], d["httpStatus"]) for d in failed] == [("failed", True, 503)] * 3
    assert (said["deliveredCount"], said["failedCount"]) == (6, 3)
    assert len(server.received(PATHS[CHAT])) == 1
    assert {d["advice"] for d in failed} == {"the sink has trouble: wait, or repair it if it is yours"}
    # It is retried like anything else.
    server.answer(PATHS[CHAT], ok())
    server.forget()
    repo.dispatch()
    assert sorted(ids_at(server, CHAT)) == sorted(d["escalationId"] for d in failed)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["--id", "esc_nosuch"], "no escalation 'esc_nosuch' is on record"),
        (["--from-line", "9"], "has 2 lines"),
        (["--id", "BAD"], "its line is no escalation (invalid_escalation_json)"),
    ],
)
def test_what_is_not_there_to_be_redelivered_is_a_usage_error(
    repo: Repo, server: SinkServer, wanted: list[str], says: str
) -> None:
    repo.append(health_critical(), "no JSON\n")
    repo.dispatch()
    bad = repo.telemetry()[1]["escalationId"]
    server.forget()
    run = repo.run("redeliver", *repo.target, *(bad if word == "BAD" else word for word in wanted), "--yes")
    assert (run.exit_code, run.stdout) == (2, "")
    assert says in run.stderr
    assert server.requests == []


def test_what_came_while_a_sink_was_disabled_is_redelivered_to_it_by_its_id(
    repo: Repo, server: SinkServer
) -> None:
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    repo.append(health_critical())
    repo.dispatch()
    server.forget()
    repo.write_config(to_all())
    wanted = repo.telemetry()[0]["escalationId"]
    assert repo.run("redeliver", *repo.target, "--id", wanted, "--sink", CHAT, "--yes").exit_code == 0
    assert ids_at(server, CHAT) == [wanted]


def test_a_dead_letter_that_is_redelivered_is_one_no_longer(repo: Repo, server: SinkServer) -> None:
    dead = make_dead_letter(repo, server)
    before = repo.snapshot()
    command = ["redeliver", *repo.target, "--dead-letters", "--format", "text"]
    run = on_terminal(repo, *command, answer="n")
    assert run.exit_code != 0
    assert dead[:12] in run.stdout
    assert "Send 1 delivery?" in run.stdout
    assert server.requests == []
    assert {k: v[2] for k, v in repo.snapshot().items()} == {k: v[2] for k, v in before.items()}

    run = on_terminal(repo, *command, answer="y")
    assert run.exit_code == 0
    assert f"{dead[:12]} to {HOOK}: delivered (200)" in COLOUR.sub("", run.stdout)
    [request] = server.requests
    assert (request.path, request.headers["webhook-id"]) == (PATHS[HOOK], dead)
    assert repo.state()["deadLetterCount"] == 0
    assert repo.state()["sinks"][HOOK]["deadLetterCount"] == 0
    assert (repo.attempts()[-1]["outcome"], repo.attempts()[-1]["escalationId"]) == ("delivered", dead)
    row = repo.telemetry()[-1]
    assert (row["escalationId"], row["status"], [s["id"] for s in row["sinks"]]) == (
        dead,
        "dispatched",
        [HOOK],
    )
    assert check(repo)[0] == 0
    run = repo.run(*command, "--yes")
    assert (run.exit_code, run.stdout) == (0, "Nothing to redeliver: there is no dead letter.\n")

    # A later pass, with the state or without, sends none of it again.
    server.forget()
    repo.dispatch()
    repo.state_file.unlink()
    repo.dispatch()
    assert server.requests == []


def test_a_dead_letter_that_is_refused_again_stays_one_and_exit_1_says_so(
    repo: Repo, server: SinkServer
) -> None:
    make_dead_letter(repo, server)
    server.answer(PATHS[HOOK], error(422, "still not"))
    run = repo.run("redeliver", *repo.target, "--dead-letters", "--yes", "--format", "text")
    assert run.exit_code == 1
    assert "http_error 422: still not" in run.stdout
    assert "what to do: " in run.stdout
    assert repo.state()["deadLetterCount"] == 1
    # And without --yes, with nobody there to answer, nothing is sent.
    server.forget()
    assert repo.run("redeliver", *repo.target, "--dead-letters").exit_code != 0
    assert server.requests == []


def test_one_escalation_is_redelivered_by_its_id_to_every_sink_or_to_one(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(*batch(3))
    repo.dispatch()
    wanted = repo.telemetry()[1]["escalationId"]
    server.forget()
    repo.run("redeliver", *repo.target, "--id", wanted, "--sink", PAGER, "--yes")
    assert [request.path for request in server.requests] == [PATHS[PAGER]]
    server.forget()
    assert repo.run("redeliver", *repo.target, "--id", wanted, "--yes").exit_code == 0
    assert {sink: ids_at(server, sink) for sink in SINK_TYPES} == {sink: [wanted] for sink in SINK_TYPES}


def test_a_range_of_lines_is_redelivered_under_the_same_ids(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(5))
    repo.dispatch()
    ids = [row["escalationId"] for row in repo.telemetry()]
    bodies = {escalation_id(sent): sent.json["escalation"] for sent in server.received(PATHS[HOOK])}
    assert set(bodies) == set(ids)
    server.forget()
    done = repo.run("redeliver", *repo.target, "--from-line", "2", "--to-line", "3", "--sink", HOOK, "--yes")
    assert done.exit_code == 0
    assert sorted(ids_at(server, HOOK)) == sorted(ids[1:3])
    for sent in server.received(PATHS[HOOK]):
        assert sent.json["escalation"] == bodies[escalation_id(sent)]
    assert len(server.requests) == 2
    server.forget()
    assert repo.run("redeliver", *repo.target, "--from-line", "4", "--yes").exit_code == 0
    assert {sink: sorted(ids_at(server, sink)) for sink in SINK_TYPES} == dict.fromkeys(
        SINK_TYPES, sorted(ids[3:])
    )
    assert repo.state()["escalationsLineOffset"] == 5
    assert repo.dispatch().json["status"] == "no_new_escalations"


def test_what_waits_is_left_to_the_next_pass(repo: Repo, server: SinkServer) -> None:
    ids = make_backlog(repo, server, 3)
    server.answer(PATHS[CHAT], ok())
    repo.append(health_degraded())  # not ingested yet: not a redelivery's business either
    again = ["redeliver", *repo.target, "--id", ids[0], "--sink", CHAT]
    assert repo.run(*again).json["status"] == "nothing_to_do"
    assert "goes out by itself" in repo.run(*again, "--format", "text").stdout
    done = repo.run("redeliver", *repo.target, "--from-line", "1", "--yes").json
    assert {(d["escalationId"], d["sinkId"]) for d in done["deliveries"]} == {
        (name, sink) for name in ids for sink in (HOOK, PAGER)
    }
    assert {name: ids_at(server, HOOK).count(name) for name in ids} == dict.fromkeys(ids, 1)
    # The pass that it runs sends what waits as well, once.
    assert {name: ids_at(server, CHAT).count(name) for name in ids} == dict.fromkeys(ids, 1)


@contextlib.contextmanager
def asked(repo: Repo, command: str, *options: str) -> Iterator[Callable[[str], int]]:
    """A command that has asked its question; what answers it returns the exit code."""
    process = repo.popen(command, *repo.target, *options, stdin=subprocess.PIPE)
    assert process.stderr is not None

    def answer(text: str) -> int:
        process.communicate(f"{text}\n", RUN_TIMEOUT)
        return int(process.returncode)

    try:
        said = ""
        while "[y/N]" not in said:
            said += os.read(process.stderr.fileno(), 65536).decode()
        yield answer
    finally:
        process.kill()
        process.communicate()


def test_a_prompt_that_nobody_answers_does_not_hold_up_alerts(repo: Repo, server: SinkServer) -> None:
    make_dead_letter(repo, server)
    repo.append(health_critical())
    process = subprocess.Popen(
        [*repo.command, "redeliver", *repo.target, "--dead-letters", "--format", "text"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=repo.env,
    )
    assert process.stdout is not None
    try:
        said = b""
        while b"[y/N]" not in said:
            said += os.read(process.stdout.fileno(), 65536)
        assert repo.dispatch().json["status"] == "success"
        said, _ = process.communicate(b"y\n", RUN_TIMEOUT)
    finally:
        process.kill()
        process.wait()
    assert b"delivered (200)" in said
    assert repo.state()["deadLetterCount"] == 0
    assert repo.dispatch().json["processedCount"] == 0


def test_a_long_redelivery_that_is_ended_goes_on_with_the_next_pass(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    repo.append(*batch(14))
    repo.dispatch()
    server.answer(PATHS[CHAT], ok().after(0.3))
    server.forget()
    process = repo.start("redeliver", *repo.target, "--from-line", "1", "--sink", CHAT, "--yes")
    try:
        server.wait_for(1, PATHS[CHAT])
        process.terminate()
        stdout, stderr = process.communicate(timeout=RUN_TIMEOUT)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, stderr) == (0, "")
    done = json.loads(stdout)
    sent = {item["escalationId"] for item in done["deliveries"] if item["status"] == "success"}
    assert 0 < done["deliveredCount"] == len(sent) < 14
    assert done["waitingCount"] == 14 - len(sent)
    assert {row["escalationId"] for row in repo.attempts() if row.get("byOperator")} == sent
    # The next pass goes on with it.
    server.answer(PATHS[CHAT], ok())
    repo.append(health_critical(traceId="meanwhile"))
    repo.dispatch()
    assert sorted(ids_at(server, CHAT)) == sorted(
        row["escalationId"] for row in repo.telemetry() if "late" not in row
    )


def test_what_a_killed_redelivery_left_is_sent_by_the_next_pass(repo: Repo, server: SinkServer) -> None:
    """Another loop's pass closes the queue in between: then no log shows that something was left."""
    dead = make_dead_letter(repo, server)
    server.script(PATHS[HOOK], hang())
    process = repo.start("redeliver", *repo.target, "--dead-letters", "--yes")
    try:
        server.wait_for(1, PATHS[HOOK])
    finally:
        process.kill()
        process.communicate()
    other = replace(repo, loop="another")
    other.append(health_critical())
    other.dispatch()
    server.forget()
    repo.dispatch("--now")

    assert ids_at(server, HOOK) == [dead]
    assert repo.state()["waitingCount"] == repo.state()["deadLetterCount"] == 0


def test_lines_are_redelivered_to_a_disabled_sink_that_is_named(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(3))
    repo.dispatch()
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    server.forget()
    lines_2_and_3 = ("redeliver", *repo.target, "--from-line", "2", "--yes")
    assert repo.run(*lines_2_and_3, "--sink", CHAT).json["deliveredCount"] == 2
    assert {request.path for request in server.requests} == {PATHS[CHAT]}
    assert repo.run(*lines_2_and_3).json["deliveredCount"] == 4
    assert len(server.received(PATHS[CHAT])) == 2


def test_a_sink_that_was_put_back_is_sent_what_it_missed_at_its_rate(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"][CHAT]["maxPerMinute"] = 60  # ten at once, then one in 1.2 s
    repo.write_config(config)
    repo.append(health_critical(traceId="first"))
    repo.dispatch()
    without = json.loads(json.dumps(config))
    del without["sinks"][CHAT]
    without["routing"] |= {"defaultSinks": [HOOK, PAGER], "routes": []}
    repo.write_config(without)
    repo.append(*(health_critical(traceId=str(number)) for number in range(11)))
    repo.dispatch("--time-budget", "60")
    repo.write_config(config)
    server.forget()
    done = repo.run("redeliver", *repo.target, "--from-line", "2", "--sink", CHAT, "--yes").json
    assert done["deliveredCount"] == 11
    requests = server.received(PATHS[CHAT])
    assert requests[-1].at - requests[0].at > 1.0


def test_a_disabled_sink_is_sent_nothing_again_unless_it_is_named_and_then_only_with_its_credentials(
    repo: Repo, server: SinkServer
) -> None:
    dead = make_dead_letter(repo, server)
    config = to_all()
    config["sinks"][HOOK]["enabled"] = False
    repo.write_config(config)
    command = ("redeliver", *repo.target, "--dead-letters", "--yes")
    left_out = repo.run(*command)
    assert (left_out.json["status"], f"--sink {HOOK}" in left_out.stderr) == ("nothing_to_do", True)
    without = repo.run(*command, "--sink", HOOK, env={"ALERT_HOOK_TOKEN": ""})
    assert (without.exit_code, "ALERT_HOOK_TOKEN" in without.stderr) == (3, True)
    assert server.requests == []
    assert repo.run(*command, "--sink", HOOK).exit_code == 0
    assert ids_at(server, HOOK) == [dead]


# --- skip


def test_only_what_was_shown_is_skipped_where_two_lines_are_the_same(repo: Repo, server: SinkServer) -> None:
    same = health_critical()
    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(same)
    repo.dispatch()

    def meanwhile() -> None:
        repo.append(health_degraded(), same)
        repo.dispatch()

    with asked(repo, "skip", "--sink", CHAT) as answer:
        meanwhile()
        assert answer("y") == 0
    server.answer(PATHS[CHAT], ok())
    server.forget()
    repo.dispatch()
    left = [row["escalationId"] for row in repo.telemetry() if "late" not in row][1:]
    assert sorted(ids_at(server, CHAT)) == sorted(left)


def test_a_dead_letter_that_came_after_the_question_is_not_dismissed(repo: Repo, server: SinkServer) -> None:
    make_dead_letter(repo, server)
    with asked(repo, "skip", "--dead-letters") as answer:
        make_another = error(422, "nor this")
        server.script(PATHS[HOOK], make_another)
        repo.append(health_critical())
        assert repo.dispatch().json["deadLetterCount"] == 2
        assert answer("y") == 0
    assert repo.state()["deadLetterCount"] == 1
    assert repo.dispatch().json["deadLetterCount"] == 1


def test_a_backlog_is_given_up_on_record_and_can_be_redelivered(repo: Repo, server: SinkServer) -> None:
    ids = make_backlog(repo, server)
    with closed_port() as port:  # another sink that waits, and is not meant
        repo.append(health_critical())
        repo.dispatch(env={"ALERT_HOOK_URL": f"http://127.0.0.1:{port}/hook"})
    rows_before, attempts_before = len(repo.telemetry()), len(repo.attempts())
    state = repo.state()
    server.forget()
    command = ["skip", *repo.target, "--sink", CHAT, "--format", "text"]

    run = on_terminal(repo, *command, answer="n", COLUMNS="160")
    assert run.exit_code == 130
    assert "Skip 5 deliveries?" in run.stdout
    assert all(run.stdout.count(name[:12]) == 1 for name in ids)
    assert len(repo.telemetry()) == rows_before
    assert repo.state() == state

    run = on_terminal(repo, *command, "--to-line", "3", answer="y")
    assert run.exit_code == 0
    assert "3 deliveries skipped. To send them after all: " in run.stdout
    [command_after_all] = re.findall(r"`(.*)`", run.stdout)
    rows = repo.telemetry()[rows_before:]
    assert [(row["escalationId"], row["status"], row["reasonCode"]) for row in rows] == [
        (wanted, "skipped", "skipped_by_operator") for wanted in ids[:3]
    ]
    assert {row["sinkId"] for row in repo.attempts()[attempts_before:]} == {CHAT}
    chat = sink_of(status(repo), CHAT)
    assert (chat["lagCount"], chat["oldestPendingAt"]) == (2, repo.telemetry()[3]["escalationTimestamp"])
    after = repo.state()
    assert (after["waitingCount"], after["deadLetterCount"]) == (state["waitingCount"] - 3, 0)
    assert after["sinks"][HOOK] == state["sinks"][HOOK]
    # What the pass before this one sent is no longer what this one did.
    assert after["sinks"][PAGER] | {"sentCount": 1} == state["sinks"][PAGER] | {"sentCount": 1}
    assert after["escalationsLineOffset"] == state["escalationsLineOffset"]

    assert repo.run(*command, "--yes").exit_code == 0
    assert sink_of(status(repo), CHAT)["lagCount"] == 0
    assert repo.run(*command, "--yes").stdout == f"Nothing waits for {CHAT}.\n"
    assert server.requests == []

    server.answer(PATHS[CHAT], ok())
    repo.dispatch()
    assert ids_at(server, CHAT) == []
    assert len(ids_at(server, HOOK)) == 1
    after_all = shlex.split(command_after_all)[1:]
    assert repo.run(*after_all, "--yes").exit_code == 0
    assert sorted(ids_at(server, CHAT)) == sorted(ids[:3])
    done = repo.run("redeliver", *repo.target, "--id", ids[0], "--sink", CHAT, "--yes")
    assert done.json["deliveredCount"] == 1


def test_the_backlog_of_a_disabled_sink_can_be_given_up_too(repo: Repo, server: SinkServer) -> None:
    make_backlog(repo, server, 2)
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    repo.append(health_critical())
    repo.dispatch()
    assert sink_of(status(repo), CHAT)["lagCount"] == 2
    run = repo.run("skip", *repo.target, "--sink", CHAT, "--yes")
    assert run.json["skippedCount"] == 2
    assert sink_of(status(repo), CHAT)["lagCount"] == 0
    repo.write_config(to_all())
    server.answer(PATHS[CHAT], ok())
    server.forget()
    repo.dispatch()
    assert server.requests == []


def test_skip_counts_only_what_the_sink_would_have_got(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"][CHAT]["minSeverity"] = "critical"
    repo.write_config(config)
    server.answer(PATHS[CHAT], error(503))
    repo.append(health_critical(), health_degraded(), "no JSON\n", health_critical(seconds_ago=1))
    repo.dispatch()
    run = repo.run("skip", *repo.target, "--sink", CHAT, "--yes")
    assert run.json["skippedCount"] == 2
    assert repo.state()["waitingCount"] == 0


def test_an_unknown_sink_is_named_with_those_that_there_are(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    for command in (["skip", "--sink", "ops-cat"], ["redeliver", "--dead-letters", "--sink", "ops-cat"]):
        run = repo.run(*command, *repo.target, "--yes")
        assert (run.exit_code, run.stdout) == (2, "")
        assert "ops-chat" in run.stderr


def test_after_a_skip_nothing_is_failing_and_the_next_record_is_tried_at_once(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(to_all(backoffSeconds={"initial": 600, "max": 900}))
    server.answer(PATHS[CHAT], error(401, "who are you"))
    repo.append(*batch(2))
    repo.dispatch()
    assert sink_of(status(repo), CHAT)["nextAttemptAt"]
    repo.run("skip", *repo.target, "--sink", CHAT, "--yes")
    found = status(repo)
    chat = sink_of(found, CHAT)
    assert (found["health"], chat["health"]) == ("ok", "ok")
    assert (chat["consecutiveFailures"], chat["nextAttemptAt"], chat["failingSince"]) == (0, None, None)
    assert chat["lastFailureAt"]
    assert check(repo, "--critical-after", "0")[0] == 0
    server.answer(PATHS[CHAT], ok())
    repo.append(health_critical())
    assert repo.dispatch().json["waitingCount"] == 0


def test_a_dead_letter_that_no_sink_will_ever_take_is_dismissed_on_record(
    repo: Repo, server: SinkServer
) -> None:
    dead = make_dead_letter(repo, server)
    rows = len(repo.telemetry())
    before = repo.state_file.read_text()
    command = ["skip", *repo.target, "--dead-letters"]
    run = on_terminal(repo, *command, answer="n")
    assert (run.exit_code, "Dismiss 1 dead letter?" in run.stdout) == (130, True)
    assert repo.run(*command, "--sink", CHAT, "--yes").json["status"] == "nothing_to_do"
    assert repo.state()["deadLetterCount"] == 1

    run = on_terminal(repo, *command, "--sink", HOOK, answer="y")
    assert "1 dead letter dismissed" in run.stdout
    [row] = repo.telemetry()[rows:]
    assert (row["escalationId"], row["status"], row["reasonCode"]) == (dead, "skipped", "skipped_by_operator")
    assert server.requests == []
    assert repo.state()["deadLetterCount"] == 0
    assert status(repo)["health"] == "ok"
    for command in (["redeliver", "--dead-letters"], ["skip", "--dead-letters"]):
        assert repo.run(*command, *repo.target, "--yes").json["status"] == "nothing_to_do"
    # Nor does it come back with a kill before the state was written, or with a lost state.
    repo.state_file.write_text(before)
    assert sink_of(status(repo), HOOK)["deadLetterCount"] == 0
    repo.state_file.unlink()
    assert repo.dispatch().json["deadLetterCount"] == 0
    assert server.requests == []
    # It can still be sent.
    assert (
        repo.run("redeliver", *repo.target, "--id", dead, "--sink", HOOK, "--yes").json["deliveredCount"] == 1
    )
    assert ids_at(server, HOOK) == [dead]


def test_dead_letters_can_be_sent_when_neither_their_rows_nor_the_source_are_left(
    repo: Repo, server: SinkServer
) -> None:
    dead = make_dead_letter(repo, server)
    for path in (repo.telemetry_file, repo.attempts_file, repo.source):
        path.unlink()
    assert repo.run("redeliver", *repo.target, "--dead-letters", "--yes").json["deliveredCount"] == 1
    assert ids_at(server, HOOK) == [dead]
    assert repo.state()["deadLetterCount"] == 0


# --- init


def test_init_writes_a_config_that_is_valid_and_sends_nothing(repo: Repo, server: SinkServer) -> None:
    repo.config_file.unlink()
    repo.env = {"PATH": repo.env["PATH"]}
    run = repo.run("init", "--repo", str(repo.root), "--format", "text")
    assert (run.exit_code, run.stderr) == (0, "")
    assert str(repo.config_file) in run.stdout
    written = json.loads(repo.config_file.read_text())
    assert [sink["type"] for sink in written["sinks"].values()] == ["webhook", "slack", "pagerduty_events"]
    for sink in written["sinks"].values():
        assert sink["enabled"] is False
        assert all(name in run.stdout for key, name in sink.items() if key.endswith("Env"))
    assert f"test --repo {repo.root}" in run.stdout
    assert repo.run("config", "--config-file", str(repo.config_file)).json["enabledSinkCount"] == 0
    repo.append(*batch(5))
    summary = repo.dispatch().json
    assert (summary["status"], summary["skippedCount"]) == ("success", 5)
    assert server.requests == []
    assert {row["reasonCode"] for row in repo.telemetry()} == {"no_dispatchable_sinks"}
    code, line = check(repo)
    assert (code, "no sink is enabled" in line) == (1, True)
    run = repo.run("test", "--repo", str(repo.root))
    assert (run.exit_code, run.stdout) == (3, "")
    assert "no sink is enabled" in run.stderr
    assert "Usage" not in run.stderr
    [command] = re.findall("`(.*)`", run.stderr)
    url = {"OPS_MANAGER_ALERT_WEBHOOK_URL": server.url}
    assert repo.run(*shlex.split(command)[1:], env=url).json["sinks"][0]["status"] == "success"


def test_a_lost_state_of_a_config_without_an_enabled_sink_costs_nothing(repo: Repo) -> None:
    repo.config_file.unlink()
    repo.run("init", "--repo", str(repo.root))
    repo.append(*batch(2))
    repo.dispatch()
    repo.state_file.unlink()
    assert status(repo)["verdict"].startswith("no sink is enabled: nothing is sent")
    assert repo.dispatch().json["processedCount"] == 0
    assert repo.state()["escalationsLineOffset"] == 2


def test_with_the_sinks_of_init_enabled_every_category_of_the_host_reaches_somebody(repo: Repo) -> None:
    repo.config_file.unlink()
    made = repo.run("init", "--repo", str(repo.root)).json
    assert made["configFile"] == str(repo.config_file)
    config = json.loads(repo.config_file.read_text())
    for sink in config["sinks"].values():
        sink["enabled"] = True
    repo.write_config(config)
    loaded = ops_alert_dispatch.load_config(str(repo.config_file), {}, check_env=False)
    assert ops_alert_dispatch.config_warnings(loaded) == []
    router = ops_alert_dispatch.Router(loaded)
    reached = {
        record["category"]: {sink.id for sink in router.resolve(record["category"], None).dispatchable}
        for record in batch(5)
    }
    assert len(reached) == 5
    assert [category for category, sinks in reached.items() if not sinks] == []
    assert [category for category, sinks in reached.items() if "pagerduty-default" in sinks] == [
        "health_critical"
    ]
    assert {sink["id"] for sink in made["sinks"]} == set(config["sinks"])
    assert all(sink["secretRefs"] for sink in made["sinks"])


def test_init_never_overwrites(repo: Repo, tmp_path: Path) -> None:
    before = repo.snapshot()
    run = repo.run("init", "--repo", str(repo.root))
    assert (run.exit_code, run.stdout) == (5, "")
    assert "is there already" in run.stderr
    assert repo.snapshot() == before
    repo.config_file.unlink()
    repo.config_file.symlink_to(tmp_path / "elsewhere.json")  # one that leads nowhere yet
    assert repo.run("init", "--repo", str(repo.root)).exit_code == 5
    assert not (tmp_path / "elsewhere.json").exists()


# --- dispatch --dry-run


def test_a_dry_run_says_of_each_delivery_what_becomes_of_it_and_why(repo: Repo, server: SinkServer) -> None:
    config = to_all(backoffSeconds={"initial": 600, "max": 900})
    config["sinks"]["old"] = {"enabled": True, "type": "webhook", "urlEnv": "ALERT_OLD_URL"}
    config["routing"]["defaultSinks"].append("old")
    repo.write_config(config)
    repo.env["ALERT_OLD_URL"] = server.url + "/old"
    for path in (PATHS[CHAT], PATHS[HOOK], "/old"):
        server.answer(path, error(401, "who are you"))
    repo.append(health_critical(seconds_ago=100))
    repo.dispatch()
    del config["sinks"]["old"]
    config["routing"]["defaultSinks"].remove("old")
    config["sinks"][HOOK]["enabled"] = False
    repo.write_config(config)
    repo.append("no JSON\n", health_degraded(severity="info"))
    before = repo.snapshot()
    plan = repo.dispatch("--dry-run").json
    decided = {
        (item["line"], sink["id"]): (sink["decision"], sink.get("why", ""))
        for item in plan["escalations"]
        for sink in item.get("sinks", [])
    }
    assert {key: decision for key, (decision, _) in decided.items()} == {
        (1, CHAT): "wait",
        (1, HOOK): "keep",
        (3, CHAT): "wait",
        (3, HOOK): "skip",
        (3, PAGER): "send",
    }
    assert "next attempt at" in decided[1, CHAT][1]
    assert "waits until the sink is enabled" in decided[1, HOOK][1]
    assert "sink old was removed with 1 waiting delivery" in plan["notes"]
    gone = "1 delivery waiting for old will be given up: the config has no such sink any more"
    assert gone in status(repo)["notes"]
    text = repo.dispatch("--dry-run", "--format", "text").stdout
    assert text.startswith(f"dry_run  loop {repo.loop}, 2 new: 1 to send, 0 skipped, 2 failed")
    assert re.search(rf"^{CHAT} +0 +2 .* http_error 401: who are you$", text, re.MULTILINE)
    assert re.search(
        r"^2 .* invalid_escalation_json .* failed \(invalid_escalation_json\)$", text, re.MULTILINE
    )
    assert "Nothing was sent or written." in text
    assert re.search(r"Of what it would send, the oldest was written (just now|\d s ago)\.", text)
    assert repo.snapshot() == before
    # It is what happens.
    server.forget()
    repo.dispatch()
    assert [request.path for request in server.requests] == [PATHS[PAGER]]
    assert "sink_removed" in {row.get("reasonCode") for row in repo.telemetry()}
    assert repo.state()["sinks"][HOOK]["waitingCount"] == 1


def test_a_dry_run_says_what_is_too_old_to_be_sent(repo: Repo, server: SinkServer) -> None:
    make_backlog(repo, server, 1)
    repo.write_config(to_all(giveUpAfterSeconds=60))
    time_passes(repo, 3600)
    repo.append(health_degraded())
    plan = repo.dispatch("--dry-run").json
    [sink] = plan["escalations"][0]["sinks"]
    assert (sink["id"], sink["decision"]) == (CHAT, "drop")
    assert "0 to send, 1 given up" in repo.dispatch("--dry-run", "--format", "text").stdout
    assert repo.dispatch().json["deadLetterCount"] == 1


# --- config, for people


def test_config_is_text_for_people_and_the_resolvers_json_for_scripts(repo: Repo) -> None:
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    config["routing"]["routes"] = [{"category": "quiet", "sinks": [PAGER], "minSeverity": "critical"}]
    config["routing"]["categorySeverity"] = {"quiet": "info"}
    repo.write_config(config)
    command = ["config", "--config-file", str(repo.config_file)]
    text = repo.run_on_terminal(*command, env={"NO_COLOR": "1"}).stdout
    assert text.startswith(f"valid  {repo.config_file}\n")
    assert re.search(rf"^{CHAT} +slack +no +- +ALERT_CHAT_URL$", text, re.MULTILINE)
    assert re.search(rf"^quiet +info +critical +only from critical on: {PAGER}$", text, re.MULTILINE)
    assert re.search(rf"^any other +\S+ +\S+ +{HOOK}, {CHAT} \(disabled\), {PAGER}$", text, re.MULTILINE)
    unset = repo.run(*command, "--no-env-check", "--format", "text", env={"ALERT_HOOK_URL": ""}).stdout
    assert "ALERT_HOOK_URL (unset)" in unset
    text = repo.run_on_terminal(*command, "--category", "quiet", env={"NO_COLOR": "1"}).stdout
    assert f"  skip  {PAGER} (pagerduty_events): severity info is below the route's minimum critical" in text
    text = repo.run_on_terminal(*command, "--category", "other", env={"NO_COLOR": "1"}).stdout
    assert f"  send  {HOOK} (webhook)\n  skip  {CHAT} (slack): the sink is disabled in the config" in text
    assert "sinks" in repo.run(*command).json
    assert "\n  " in repo.run_on_terminal(*command, "--pretty").stdout


# --- on a terminal


def test_a_terminal_that_is_too_narrow_for_a_table_gets_its_first_columns(
    repo: Repo, server: SinkServer
) -> None:
    make_backlog(repo, server, 1)
    for width in (160, 80, 60):
        env = {"NO_COLOR": "1", "COLUMNS": str(width)}
        text = repo.run_on_terminal("status", *repo.target, env=env).stdout
        found = re.search(r"^SINK +HEALTH +WAITING.*(\n.+)+", text, re.MULTILINE)
        assert found is not None
        table = found[0].splitlines()
        assert max(map(len, table)) <= width
        assert sum(line.startswith((CHAT, HOOK, PAGER)) for line in table) == 3
        assert ("LAST FAILURE" in table[0]) == (width == 160)


def test_a_long_backlog_is_summed_up_before_the_question(repo: Repo, server: SinkServer) -> None:
    make_backlog(repo, server, 25)
    run = on_terminal(repo, "skip", *repo.target, "--sink", CHAT, answer="n", NO_COLOR="1")
    lines = run.stdout.splitlines()
    titles = lines.index(next(line for line in lines if line.startswith("CATEGORY")))
    assert lines[titles].split() == ["CATEGORY", "COUNT", "OLDEST", "NEWEST", "SINK"]
    counts = [int(line.split()[1]) for line in lines[titles + 1 :] if line.endswith(f" {CHAT}")]
    assert sum(counts) == 25
    assert len(lines) < 12
    assert "Skip 25 deliveries?" in run.stdout


def test_colour_only_on_a_terminal_and_not_with_no_color(repo: Repo, server: SinkServer) -> None:
    make_backlog(repo, server, 1)
    commands = (
        ["status", *repo.target, "--format", "text"],
        ["test", "--format", "text"],
        ["redeliver", *repo.target, "--from-line", "1", "--sink", HOOK, "--yes"],
    )
    for command in commands:
        assert COLOUR.search(repo.run_on_terminal(*command).stdout), command
        assert "\x1b" not in repo.run_on_terminal(*command, env={"NO_COLOR": "1"}).stdout
        assert "\x1b" not in repo.run(*command).stdout
    # Text where people look, JSON where a script does.
    assert repo.run_on_terminal("status", *repo.target).stdout.count("What to do: ") == 1
    assert repo.run("status", *repo.target).json["schemaVersion"] == "v1"


def test_what_a_record_or_a_sink_says_never_steers_the_terminal(repo: Repo, server: SinkServer) -> None:
    record = health_critical(
        timestamp=f"2026{ESCAPE}", category=f"health{ESCAPE}", traceId=ESCAPE, severity=f"loud{ESCAPE}"
    )
    repo.append(record)
    server.answer(PATHS[CHAT], error(503, f"down{ESCAPE}"))
    server.script(PATHS[HOOK], error(422, f"no{ESCAPE}"))
    said = [
        repo.run_on_terminal(*command)
        for command in (
            ["dispatch", *repo.target],
            ["status", "--repo", str(repo.root)],
            ["status", *repo.target, "--pretty"],
            ["status", *repo.target, "--check"],
            ["dispatch", *repo.target, "--dry-run", "--show-payload"],
            ["test"],
        )
    ]
    said.append(on_terminal(repo, "redeliver", *repo.target, "--dead-letters", answer="y"))
    said.append(on_terminal(repo, "skip", *repo.target, "--sink", CHAT, answer="y"))
    assert "skipped" in said[-1].stdout
    for run in said:
        left = COLOUR.sub("", run.stdout + run.stderr)
        assert not {"\x07", "\x1b", "\x9b"} & set(left), run


def test_no_secret_is_in_any_output(repo: Repo, server: SinkServer) -> None:
    for path in PATHS.values():
        server.answer(path, echo(422))
    repo.append(*batch(2))
    said = [repo.dispatch()]
    server.answer(PATHS[CHAT], echo(503))
    repo.append(health_critical(seconds_ago=3))
    said += [
        repo.dispatch(),
        repo.run("test"),
        repo.run("test", "--format", "text"),
        repo.run("redeliver", *repo.target, "--dead-letters", "--yes"),
        repo.run("status", *repo.target),
        repo.run("status", *repo.target, "--format", "text"),
        repo.run("status", *repo.target, "--check"),
        repo.run("skip", *repo.target, "--sink", CHAT, "--yes"),
        repo.run("dispatch", *repo.target, env={"ALERT_HOOK_URL": f"ftp://127.0.0.1{PATHS[HOOK]}"}),
        repo.run("test", env={"ALERT_HOOK_URL": f"ftp://127.0.0.1{PATHS[HOOK]}"}),
    ]
    assert any("[secret]" in run.stdout for run in said)
    files = "".join(str(row) for path in (repo.telemetry_file, repo.attempts_file) for row in read_rows(path))
    text = "".join(run.stdout + run.stderr for run in said) + files + repo.state_file.read_text()
    for secret in SECRETS:
        assert secret not in text
        assert secret.rpartition("/")[2] not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["log", "-n", "9" * 20],
        ["redeliver", "--from-line", "1", "--to-line", "9" * 20, "--yes"],
        ["skip", "--sink", HOOK, "--to-line", "9" * 20, "--yes"],
    ],
)
def test_a_number_that_is_too_large_is_no_fault_of_the_program(repo: Repo, arguments: list[str]) -> None:
    repo.append(health_critical())
    repo.dispatch()

    run = repo.run(arguments[0], *repo.target, *arguments[1:])
    assert (run.exit_code, run.stderr) == (0, "")


def test_the_exit_codes_of_a_check_are_in_its_help(repo: Repo) -> None:
    told = repo.run("status", "--help").stdout.partition("Exit codes with --check:")[2]
    assert re.findall(r"^ +(\d)  (\w+)", told, re.MULTILINE) == [
        ("0", "OK"),
        ("1", "WARNING"),
        ("2", "CRITICAL"),
        ("3", "UNKNOWN"),
    ]


# --- What is asked for


def test_skipping_a_backlog_includes_what_no_pass_has_read(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    repo.append(health_critical(number=1))
    repo.dispatch()
    repo.append(*(health_critical(number=number) for number in (2, 3)))
    assert repo.run("skip", *repo.target, "--sink", CHAT, "--yes").json["skippedCount"] == 2
    repo.dispatch()
    assert [len(server.received(PATHS[sink])) for sink in (CHAT, HOOK)] == [1, 3]


@pytest.mark.parametrize(
    "arguments",
    [
        ("redeliver", "--loop", "night-build", "--id", "esc_a", "--id", "esc_b"),
        ("skip", "--loop", "night-build", "--sink", CHAT, "--sink", HOOK),
        ("status", "--loop", "night-build", "--loop", "other"),
    ],
)
def test_nothing_that_an_operator_names_is_ignored(repo: Repo, arguments: tuple[str, ...]) -> None:
    run = repo.run(*arguments)
    assert (run.exit_code, "only one can be given" in run.stderr) == (2, True)


def test_a_secret_that_is_no_text_is_said_to_be_unusable(repo: Repo) -> None:
    repo.append(health_critical())
    run = repo.run("dispatch", *repo.target, env={"ALERT_HOOK_TOKEN": "s3cret-\udcff-token"})
    assert run.exit_code == 3
    assert "the value of ALERT_HOOK_TOKEN holds" in run.stderr
    assert "s3cret" not in run.stderr


def test_a_secret_file_that_cannot_be_read_is_named_by_a_test_of_its_sink(repo: Repo) -> None:
    env = {"ALERT_CHAT_URL": "", "ALERT_CHAT_URL_FILE": "/nowhere"}
    run = repo.run("test", "--sink", CHAT, env=env)
    assert run.exit_code == 3
    assert "the file that ALERT_CHAT_URL_FILE names cannot be read" in run.stderr


def test_status_and_pass_agree_on_a_database_of_another_program(repo: Repo) -> None:
    repo.append(health_critical())
    with contextlib.closing(sqlite3.connect(repo.queue_file)) as database:
        database.execute("CREATE TABLE customers (name TEXT)")
    for command in ("dispatch", "status", "log"):
        run = repo.run(command, *repo.target)
        assert (run.exit_code, "is not a queue of this program" in run.stderr) == (4, True), command
