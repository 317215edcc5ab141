"""What `status` sees: a loop as it is right now, whatever befell its state file, and all that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo, edit_queue, time_passes
from escalations import (
    CHAT,
    HOOK,
    NO_WAIT,
    PAGER,
    PATHS,
    batch,
    escalation_ids,
    health_critical,
    health_degraded,
    sink_config,
    timestamp,
)
from loopback import SinkServer, closed_port, error, hang, ok, rate_limited
from operate import check, make_backlog, make_dead_letter, sink_of, to_all
from promise import check_promise

import ops_alert_dispatch


@pytest.fixture(autouse=True)
def config(repo: Repo) -> None:
    repo.write_config(to_all())


def look(repo: Repo) -> dict[str, Any]:
    """The status, without the cost of a process."""
    job = ops_alert_dispatch.make_job(ops_alert_dispatch.Paths(str(repo.root)), repo.loop)
    return ops_alert_dispatch.loop_status(job, 900.0)


def fared(found: dict[str, Any]) -> list[dict[str, Any]]:
    """How each sink fares; the wait between two passes is not known from the telemetry alone."""
    return [{key: sink[key] for key in sink if key != "nextAttemptAt"} for sink in found["sinks"]]


# --- As it is right now


def kill_before_the_state(repo: Repo, before: str) -> None:
    repo.state_file.write_text(before)


def lose_the_state(repo: Repo, _: str) -> None:
    repo.state_file.unlink()


def damage_the_state(repo: Repo, before: str) -> None:
    repo.state_file.write_text(before[: len(before) // 2])


@pytest.mark.parametrize("befall", [kill_before_the_state, lose_the_state, damage_the_state])
def test_status_is_right_after_a_kill_and_without_a_state(
    repo: Repo, server: SinkServer, befall: Callable[[Repo, str], None]
) -> None:
    make_backlog(repo, server, 3)
    before = repo.state_file.read_text()
    server.script(PATHS[HOOK], error(422, "I do not take this"))
    server.script(PATHS[CHAT], ok(), error(503, "down again"))
    server.answer(PATHS[PAGER], error(500, "pager's own trouble"))
    repo.append(health_critical(), health_degraded())
    repo.dispatch()
    repo.run("redeliver", *repo.target, "--dead-letters", "--yes")
    right = look(repo)
    assert {sink["id"]: sink["lagCount"] for sink in right["sinks"]} == {CHAT: 4, HOOK: 0, PAGER: 2}
    assert sink_of(right, HOOK)["deadLetterCount"] == 0

    befall(repo, before)
    found = look(repo)
    assert fared(found) == fared(right)
    assert (found["health"], found["verdict"]) == (right["health"], right["verdict"])
    told = [note for note in found["notes"] if str(repo.state_file) in note]
    assert bool(told) == (befall is not kill_before_the_state)
    assert all("the next pass writes a new one" in note for note in told)
    # What it says is what the next pass finds.
    server.answer(PATHS[CHAT], ok())
    server.answer(PATHS[PAGER], ok())
    repo.dispatch()
    assert look(repo)["verdict"].startswith("nothing is waiting")


def test_status_tells_how_far_a_pass_is_that_is_still_at_work(repo: Repo, server: SinkServer) -> None:
    repo.append(*batch(2))
    repo.dispatch()
    server.script(PATHS[CHAT], ok(), hang())
    server.forget()
    repo.append(health_critical(seconds_ago=2), health_degraded(seconds_ago=1), health_critical())
    process = repo.start("dispatch", *repo.target)
    try:
        server.wait_for(2, PATHS[CHAT])
        server.wait_for(3, PATHS[HOOK])
        server.wait_for(3, PATHS[PAGER])
        # A sink's answer and our note of it are two things. The last row may be half written.
        while repo.attempts_file.read_bytes().count(b"\n") < 6 + 3 + 3 + 1:
            assert process.poll() is None
            time.sleep(0.01)
        found = look(repo)
    finally:
        process.kill()
        process.communicate()
    assert {sink["id"]: sink["lagCount"] for sink in found["sinks"]} == {CHAT: 2, HOOK: 0, PAGER: 0}


def test_a_rotated_telemetry_does_not_hide_what_waits(repo: Repo, server: SinkServer) -> None:
    make_backlog(repo, server, 3)
    repo.telemetry_file.rename(repo.telemetry_file.with_name("alerts.jsonl.1"))
    assert sink_of(look(repo), CHAT)["lagCount"] == 3


@pytest.mark.parametrize("befall", [kill_before_the_state, lose_the_state])
def test_what_waits_after_a_loss_is_told_where_there_is_no_config_either(
    repo: Repo, server: SinkServer, befall: Callable[[Repo, str], None]
) -> None:
    repo.append(health_critical())
    repo.dispatch()
    before = repo.state_file.read_text()
    make_backlog(repo, server, 3)
    befall(repo, before)
    repo.config_file.unlink()
    assert sink_of(look(repo), CHAT)["lagCount"] == 3


def test_what_waits_after_a_killed_pass_is_neither_hidden_nor_lost_in_silence(
    repo: Repo, server: SinkServer
) -> None:
    """Its sink went down in the very pass that was killed: the state knows of nothing that waits."""
    repo.append(health_critical())
    repo.dispatch()
    before = repo.state_file.read_text()
    dead = make_dead_letter(repo, server)
    make_backlog(repo, server, 3)
    kill_before_the_state(repo, before)

    assert len(repo.run("dispatch", *repo.target, "--dry-run").json["escalations"]) == 3
    skipped = repo.run("skip", *repo.target, "--dead-letters", "--yes").json["deliveries"]
    assert [item["escalationId"] for item in skipped] == [dead]
    assert sink_of(look(repo), CHAT)["lagCount"] == 3
    summary = repo.dispatch().json
    assert summary["waitingCount"] == 3
    config = to_all()
    del config["sinks"][CHAT]
    config["routing"]["defaultSinks"] = [HOOK, PAGER]
    repo.write_config(config)
    repo.dispatch()
    assert (repo.telemetry()[-1]["reasonCode"], repo.telemetry()[-1]["droppedCount"]) == ("sink_removed", 3)


def test_a_last_row_of_any_depth_does_not_stop_a_monitor(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    with repo.telemetry_file.open("a") as telemetry:
        telemetry.write("[" * 100_000 + "\n")
    assert check(repo)[0] == 0


# --- All that is wrong


def test_every_failing_sink_is_named_with_its_own_advice(repo: Repo, server: SinkServer) -> None:
    server.answer(PATHS[CHAT], error(403, "invalid_token"))
    server.answer(PATHS[PAGER], error(503, "down"))
    repo.append(health_critical())
    repo.dispatch()
    found = look(repo)
    assert f"{CHAT} is failing (http_error 403: invalid_token), 1 delivery waiting" in found["verdict"]
    assert f"{PAGER} is failing (http_error 503: down), 1 delivery waiting" in found["verdict"]
    [pager, chat] = found["advice"]
    assert pager.startswith(f"{PAGER}: the sink has trouble: wait")
    assert chat.startswith(f"{CHAT}: the credential is wrong")
    text = repo.run("status", *repo.target, "--format", "text").stdout
    # People read when the next attempt is in other words.
    said = [line.partition("; next attempt")[0] for line in found["advice"]]
    assert re.findall("^What to do: (.*); next attempt ", text, re.MULTILINE) == said
    assert check(repo)[1].endswith(found["verdict"])


def test_the_one_line_that_a_sink_chokes_on_is_named_with_what_gives_it_up(
    repo: Repo, server: SinkServer
) -> None:
    """The sink answers it with 500, and would take what waits behind it."""
    server.answer("/hook", lambda sent: error(500) if sent.json["escalation"]["traceId"] == "bad" else ok())
    repo.append(health_critical(), health_critical(traceId="bad"), *batch(3))
    for _ in range(4):
        repo.dispatch()
    assert sink_of(look(repo), HOOK)["pendingLine"] is None
    for _ in range(4):
        repo.dispatch()
    assert repo.state()["waitingCount"] == 1
    found = look(repo)
    assert sink_of(found, HOOK)["pendingLine"] == 2
    [command] = re.findall("`ops-alert-dispatch (skip [^`]+)`", " ".join(found["advice"]))
    assert repo.run(*command.split(), "--yes").json["skippedCount"] == 1
    assert repo.dispatch().json["waitingCount"] == 0
    assert check(repo)[0] == 0


def test_the_one_record_that_a_sink_chokes_on_does_not_hold_up_those_it_is_sent_with(
    repo: Repo, server: SinkServer
) -> None:
    config = to_all()
    config["sinks"][CHAT]["maxPerMessage"] = 3
    repo.write_config(config)
    records = [health_critical(traceId=str(number)) for number in range(5)]
    repo.append(*records)
    bad = ops_alert_dispatch.escalation_id(repo.loop, json.dumps(records[2], separators=(",", ":")).encode())
    server.answer(PATHS[CHAT], lambda sent: error(500) if bad in escalation_ids(sent) else ok())
    repo.dispatch()
    assert bad in {row["escalationId"] for row in repo.telemetry()}
    for _ in range(9):
        repo.dispatch()
    assert repo.state()["waitingCount"] == 1
    assert sink_of(look(repo), CHAT)["pendingLine"] == 3
    assert repo.run("skip", *repo.target, "--sink", CHAT, "--to-line", "3", "--yes").json["skippedCount"] == 1
    assert repo.dispatch().json["waitingCount"] == 0


def test_that_no_pass_runs_any_more_is_critical_once_something_waits_for_one(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(*batch(2))
    repo.dispatch()
    time_passes(repo, 90_000)
    assert check(repo)[0] == 0  # nothing to do
    repo.append(health_critical())
    assert check(repo)[0] == 1  # it has just been written
    assert check(repo, "--critical-after", "0")[0] == 2
    repo.dispatch()
    time_passes(repo, 90_000)
    repo.append(health_critical(seconds_ago=3600))
    code, line = check(repo)
    assert (code, "no pass has run since" in line) == (2, True)
    assert any("reconcile" in advice and "dispatch" in advice for advice in look(repo)["advice"])
    repo.dispatch()
    assert check(repo)[0] == 0


def test_that_no_pass_runs_any_more_is_seen_where_no_record_has_a_time_and_no_config_is_at_hand(
    repo: Repo,
) -> None:
    repo.append(*batch(2))
    repo.dispatch()
    time_passes(repo, 90_000)
    repo.config_file.rename(repo.root / "elsewhere")
    repo.append(health_critical())
    assert check(repo)[0] == 1  # it has just been written
    repo.append({"category": "health_critical", "traceId": "timeless"})
    (repo.root / "elsewhere").rename(repo.config_file)
    repo.dispatch()
    time_passes(repo, 90_000)
    repo.append({"category": "health_critical", "traceId": "timeless, too"})
    assert check(repo)[0] == 2


@pytest.mark.parametrize("said", ["2099-01-01T00:00:00Z", "yesterday", None])
def test_that_no_pass_runs_any_more_is_seen_whatever_the_state_says_of_the_last_one(
    repo: Repo, said: str | None
) -> None:
    repo.append(*batch(2))
    repo.dispatch()
    rows = [{**row, "timestamp": timestamp(90_000)} for row in repo.telemetry()]
    repo.telemetry_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if said is None:
        repo.state_file.unlink()
    else:
        repo.state_file.write_text(json.dumps({**repo.state(), "updatedAt": said}))
    repo.append(health_critical(seconds_ago=3600))
    assert check(repo)[0] == 2


def test_a_monitor_sees_what_waits_in_files_that_are_elsewhere(repo: Repo, tmp_path: Path) -> None:
    source = tmp_path / "elsewhere.jsonl"
    source.write_text(json.dumps(health_critical()) + "\n")
    elsewhere = (
        "--escalations-file",
        str(source),
        "--dispatch-telemetry-file",
        str(tmp_path / "alerts.jsonl"),
    )
    repo.dispatch(*elsewhere)
    assert check(repo)[0] == 0
    with source.open("a") as file:
        file.write(json.dumps(health_critical()) + "\n")
    assert check(repo)[0] == 1
    assert "1 delivery waiting" not in check(repo, "--loop", repo.loop, "--escalations-file", "/none")[1]


def test_what_reached_nobody_is_a_warning_for_a_day(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"][CHAT]["enabled"] = False
    config["routing"]["routes"] = [{"category": "health_critical", "sinks": [CHAT]}]
    repo.write_config(config)
    repo.append(health_critical(), health_degraded())
    assert repo.dispatch().json["status"] == "success"
    code, line = check(repo)
    assert (code, "1 escalation reached nobody: no sink enabled" in line) == (1, True)


def test_what_was_given_up_with_a_removed_sink_is_a_warning_for_a_day(repo: Repo, server: SinkServer) -> None:
    """A sink that was renamed, say: what waited for it is not sent to the new one."""
    make_backlog(repo, server, 3)
    config = to_all()
    config["sinks"]["renamed"] = config["sinks"].pop(CHAT)
    config["routing"]["defaultSinks"] = [HOOK, PAGER, "renamed"]
    repo.write_config(config)
    repo.dispatch()
    code, line = check(repo)
    assert (code, "3 deliveries given up with a sink that was removed" in line) == (1, True)


def test_what_is_lost_is_counted_once_though_the_pass_that_noted_it_was_killed(
    repo: Repo, server: SinkServer
) -> None:
    make_backlog(repo, server, 3)
    config = to_all()
    del config["sinks"][CHAT]
    config["routing"] |= {"defaultSinks": [HOOK, PAGER], "routes": []}
    repo.write_config(config)
    server.answer(PATHS[HOOK], ok().after(5))
    repo.append(health_critical())
    process = repo.start("dispatch", *repo.target)
    server.wait_for(1, PATHS[HOOK])
    process.kill()
    process.communicate()
    server.answer(PATHS[HOOK], ok())
    repo.dispatch()
    assert "3 deliveries given up with a sink that was removed" in look(repo)["verdict"]


def test_what_a_route_leads_to_again_can_be_sent_after_all(repo: Repo, server: SinkServer) -> None:
    """A sink waits out its failure while a route is changed, and changed back."""
    config = to_all(backoffSeconds=NO_WAIT)
    repo.write_config(config)
    server.answer(PATHS[CHAT], rate_limited(3000))
    repo.append(*(health_critical(traceId=str(number)) for number in range(5)))
    repo.dispatch()
    changed = json.loads(json.dumps(config))
    changed["routing"]["routes"] = [{"category": "health_critical", "sinks": [HOOK]}]
    repo.write_config(changed)
    assert repo.dispatch().json["waitingCount"] == 0
    repo.write_config(config)
    repo.dispatch()
    check_promise(repo)
    server.answer(PATHS[CHAT], ok())
    server.forget()
    again = repo.run("redeliver", *repo.target, "--from-line", "1", "--sink", CHAT, "--yes").json
    assert again["deliveredCount"] == len(server.received(PATHS[CHAT])) == 5
    assert check(repo)[0] == 0


def test_the_worst_loop_is_on_top_for_people(repo: Repo, server: SinkServer) -> None:
    for name in ("a-calm", "z-broken"):
        replace(repo, loop=name).append(*batch(1))
    repo.run("dispatch", "--repo", str(repo.root), "--all-loops")
    server.answer(PATHS[CHAT], error(503))
    replace(repo, loop="z-broken").append(*batch(1))
    repo.run("dispatch", "--repo", str(repo.root), "--all-loops")
    text = repo.run("status", "--repo", str(repo.root), "--format", "text").stdout
    assert re.findall("loop ([a-z-]+):", text) == ["z-broken", "a-calm"]


def test_a_dead_letter_is_told_with_its_reason_after_the_sink_took_others(
    repo: Repo, server: SinkServer
) -> None:
    make_dead_letter(repo, server)
    hook = sink_of(look(repo), HOOK)
    assert (hook["consecutiveFailures"], hook["deadLetterCount"]) == (0, 1)
    assert (hook["reasonCode"], hook["httpStatus"], hook["message"]) == (
        "http_error",
        422,
        "I do not take this",
    )


BAD_LINES = {
    "invalid_escalation_json": "no JSON\n",
    "missing_escalation_category": '{"severity": "critical"}\n',
}


@pytest.mark.parametrize("code", BAD_LINES)
def test_a_line_that_reached_nobody_is_a_warning_for_a_day(repo: Repo, code: str) -> None:
    repo.append(BAD_LINES[code], health_critical())
    repo.dispatch()
    found = look(repo)
    assert found["health"] == "warning"
    assert f"1 line of the source sent to nobody ({code}" in found["verdict"]
    assert [(r["reasonCode"], r["count"]) for r in found["failureReasons"]] == [(code, 1)]
    code_and_line = check(repo)
    assert code_and_line[0] == 1
    assert code in code_and_line[1]

    time_passes(repo, 86_400)
    found = look(repo)
    assert (found["health"], found["advice"]) == ("ok", [])
    assert found["failureReasons"][0]["reasonCode"] == code


def test_what_was_lost_is_told_of_however_much_came_after_it(repo: Repo, server: SinkServer) -> None:
    """Long telemetry, rotated telemetry, a killed pass and a lost state: whoever asks then asks too late."""
    lost = "2 lines of the source sent to nobody"
    repo.append("no JSON\n", "nor this\n", health_critical(note="x" * 2_000_000))
    repo.dispatch()
    assert lost in look(repo)["verdict"]
    repo.telemetry_file.rename(f"{repo.telemetry_file}.1")
    repo.attempts_file.rename(f"{repo.attempts_file}.1")
    assert lost in look(repo)["verdict"]
    repo.dispatch()
    assert lost in look(repo)["verdict"]

    repo.append("a third\n")
    repo.dispatch()
    assert "3 lines of the source" in look(repo)["verdict"]
    repo.state_file.unlink()
    repo.dispatch()
    assert "3 lines of the source" in look(repo)["verdict"]


def test_the_command_that_the_code_names_shows_the_lines_that_were_lost(repo: Repo) -> None:
    repo.append("no JSON\n", health_critical())
    repo.dispatch()
    looked = repo.run("explain", "invalid_escalation_json").json["howToSee"]
    [command] = re.findall("`ops-alert-dispatch (log .*)`", looked)
    [entry] = repo.run(*command.replace("--loop L", f"--loop {repo.loop}").split()).json["escalations"]
    assert entry["reasonCode"] == "invalid_escalation_json"
    assert repo.run("show", entry["escalationId"]).json["rawLine"] == "no JSON"


def test_a_last_line_that_nobody_finishes_is_a_warning_until_it_is_ended(repo: Repo) -> None:
    repo.loop = "night build"  # the advice is pasted into a shell
    repo.append(health_critical())
    repo.dispatch()
    repo.append(json.dumps(health_degraded()))
    assert look(repo)["health"] == "ok"  # somebody may be writing it
    os.utime(repo.source, (1_000_000_000, 1_000_000_000))
    found = look(repo)
    assert found["health"] == "warning"
    assert "without a line feed" in found["verdict"]
    [command] = re.findall("`(echo .*)`", found["advice"][0])
    subprocess.run(["sh", "-c", command], check=True)
    assert repo.dispatch().json["dispatchedCount"] == 1
    assert look(repo)["health"] == "ok"


def test_a_source_on_a_volume_that_is_gone_does_not_look_like_a_quiet_loop(
    repo: Repo, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    repo.folder.mkdir(parents=True)
    repo.source.symlink_to(volume / "escalations.jsonl")
    repo.append(health_critical())
    repo.dispatch()
    assert look(repo)["health"] == "ok"
    volume.rename(tmp_path / "unmounted")
    assert repo.dispatch().exit_code == 0
    found = look(repo)

    assert found["health"] == "warning"
    assert f"is a link to {volume}/escalations.jsonl, which is not there" in found["verdict"]


def test_a_pass_that_ended_with_an_error_is_told_of_until_one_ends_well(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    row = {
        "timestamp": ops_alert_dispatch.iso(time.time() + 1),
        "status": "failed_command",
        "reasonCode": "alert_dispatch_failed",
        "message": "error: cannot append to /x: No space left on device\n  free space",
    }
    with repo.telemetry_file.open("a") as telemetry:
        telemetry.write(json.dumps(row) + "\n")
    found = look(repo)
    assert found["health"] == "warning"
    assert "the last pass ended with an error: error: cannot append to /x" in found["verdict"]
    state = repo.state()
    state["updatedAt"] = "2099-01-01T00:00:00Z"
    repo.state_file.write_text(json.dumps(state))
    assert look(repo)["health"] == "ok"


def test_passes_that_fail_are_reported_although_nobody_writes_a_row_about_them(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    repo.append(health_critical())
    edit_queue(repo, "PRAGMA user_version = 99")
    failed = repo.dispatch()
    assert failed.exit_code == 4
    said = failed.stderr.splitlines()[0].removeprefix("error: ")
    state = repo.state()
    assert (state["status"], state["failureReasonCodes"]) == ("error", ["alert_dispatch_failed"])
    assert said in state["message"]
    edit_queue(repo, f"PRAGMA user_version = {ops_alert_dispatch.QUEUE_VERSION}")
    found = look(repo)
    assert found["health"] == "warning"
    assert f"the last pass ended with an error: {said}" in found["verdict"]
    # Somebody who looks hours later, while timers went on to start passes.
    state["failedSince"] = ops_alert_dispatch.iso(time.time() - 3 * 3600)
    repo.state_file.write_text(json.dumps(state))
    found = look(repo)
    assert found["health"] == "critical"
    assert f"every pass since {state['failedSince']} ended with an error" in found["verdict"]
    assert repo.dispatch().json["dispatchedCount"] == 1
    assert "failedSince" not in repo.state()
    assert look(repo)["health"] == "ok"


@pytest.mark.parametrize("timestamp", [None, "2099-01-01T00:00:00Z", "no time"])
def test_what_waits_without_a_usable_timestamp_has_an_age(
    repo: Repo, server: SinkServer, timestamp: str | None
) -> None:
    server.answer("/hook", error(503))
    record = {"category": "health_critical", "severity": "critical", "timestamp": timestamp}
    repo.append({key: value for key, value in record.items() if value is not None})
    repo.dispatch()
    time_passes(repo, 3600)
    text = repo.run("status", *repo.target, "--format", "prometheus").stdout
    ages = re.findall(r"^ops_alert_dispatch_oldest_waiting_age_seconds\{.*\} (\S+)$", text, re.MULTILINE)

    assert 3600 <= max(map(float, ages)) < 7200


def test_lines_that_are_no_escalations_do_not_wait(repo: Repo) -> None:
    repo.append("no JSON\n")
    repo.dispatch()

    assert repo.run("log", *repo.target, "--status", "waiting").json["escalations"] == []
    assert len(repo.run("log", *repo.target, "--status", "failed").json["escalations"]) == 1


def test_a_success_that_a_wrong_clock_noted_does_not_hide_the_next_one(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(health_critical())
    repo.dispatch()
    time_passes(repo, -86400.0)
    repo.append(health_critical(traceId="next"))
    repo.dispatch()

    noted = datetime.fromisoformat(repo.state()["sinks"][HOOK]["lastSuccessAt"])
    assert noted < datetime.now(UTC) + timedelta(hours=1)


def test_a_repeat_that_was_held_back_is_no_failure() -> None:
    sinks = [
        {"id": "a", "status": "skipped", "reasonCode": "x"},
        {"id": "b", "status": "failed", "reasonCode": "y"},
    ]
    rows = [
        {"status": "skipped", "reasonCode": "repeat_suppressed", "sinks": sinks[:1], "timestamp": "t"},
        {"status": "partial", "reasonCode": "partial_dispatch_failure", "sinks": sinks, "timestamp": "t"},
    ]
    assert ops_alert_dispatch.count_failures(rows) == [{"reasonCode": "y", "count": 1, "lastSeenAt": "t"}]


def test_one_loop_that_cannot_be_read_does_not_hide_the_others(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    other = repo.folder.parent / "a-loop"
    other.mkdir()
    (other / "alert-dispatch-state.json").write_text('{"schemaVersion": "v2"}')
    run = repo.run("status", "--repo", str(repo.root))
    assert [loop["loopId"] for loop in json.loads(run.stdout)["loops"]] == [repo.loop]
    assert run.exit_code == 4
    assert run.stderr.startswith("error: loop a-loop: ")
    code, line = check(repo)
    assert (code, line.split(":")[1].strip()) == (3, "a-loop")


# --- Configs that are valid and hardly meant


def routes(*wanted: dict[str, Any], enabled: tuple[str, ...] = (HOOK, CHAT, PAGER)) -> dict[str, Any]:
    config = sink_config()
    config["routing"]["routes"] = list(wanted)
    config["routing"]["defaultSinks"] = [HOOK]
    for sink_id, sink in config["sinks"].items():
        sink["enabled"] = sink_id in enabled
    return config


WARNINGS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("all led to", routes({"category": "a", "sinks": [CHAT, PAGER]}), []),
    (
        "an enabled sink without a route",
        routes({"category": "a", "sinks": [CHAT]}),
        [f"$.sinks['{PAGER}']: the sink is enabled, and no route leads to it"],
    ),
    (
        "a route that is switched off leads nowhere",
        routes({"category": "a", "sinks": [CHAT, PAGER], "enabled": False}, enabled=(HOOK, CHAT)),
        [f"$.sinks['{CHAT}']: the sink is enabled, and no route leads to it"],
    ),
    (
        "a route all of whose sinks are disabled",
        routes({"category": "a", "sinks": [CHAT, PAGER]}, enabled=(HOOK,)),
        ["$.routing.routes[0]: no sink of it is enabled: 'a' reaches nobody"],
    ),
    (
        "default sinks that are disabled",
        routes({"category": "a", "sinks": [CHAT]}, enabled=(CHAT,)),
        ["$.routing.defaultSinks: no sink of it is enabled: what has no route of its own reaches nobody"],
    ),
    (
        "a second route of a category",
        routes({"category": "a", "sinks": [CHAT]}, {"category": "a", "sinks": [PAGER]}, enabled=(HOOK, CHAT)),
        ["$.routing.routes[1]: never used: routes[0] has the same category 'a'"],
    ),
    (
        "nothing enabled",
        routes({"category": "a", "sinks": [CHAT]}, enabled=()),
        ["$.sinks: no sink is enabled: nothing is sent"],
    ),
]


@pytest.mark.parametrize(("config", "warnings"), [c[1:] for c in WARNINGS], ids=[c[0] for c in WARNINGS])
def test_what_leads_nowhere_is_warned_of(tmp_path: Path, config: dict[str, Any], warnings: list[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    loaded = ops_alert_dispatch.load_config(str(path), {}, check_env=False)
    assert ops_alert_dispatch.config_warnings(loaded) == warnings


def test_a_config_that_leads_nowhere_is_told_of_wherever_an_operator_looks(repo: Repo) -> None:
    config = to_all()
    config["sinks"]["spare"] = {"enabled": True, "type": "webhook", "urlEnv": "ALERT_HOOK_URL"}
    repo.write_config(config)
    repo.append(health_critical())
    warning = "$.sinks.spare: the sink is enabled, and no route leads to it"
    where = ["--config-file", str(repo.config_file)]
    assert f"warning: {warning}\n" in repo.run("config", *where, "--format", "text").stdout
    assert warning in look(repo)["notes"]
    assert f"note: {warning}\n" in repo.dispatch("--dry-run", "--format", "text").stdout
    assert warning in repo.dispatch("--dry-run").json["notes"]
    # The resolver's own output has no room for it.
    assert "spare: the" not in repo.run("config", *where).stdout


# --- A cluster


def test_a_peer_that_is_down_behind_one_that_takes_all_is_seen(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"] = {"fleet": {"enabled": True, "type": "alertmanager", "urlEnv": "ALERT_FLEET_URLS"}}
    config["routing"]["defaultSinks"] = ["fleet"]
    repo.write_config(config)
    with closed_port() as port:
        down = f"127.0.0.1:{port}"
        repo.env["ALERT_FLEET_URLS"] = f"{server.url},http://{down}"
        tried = repo.run("test")
        assert tried.exit_code == 1
        results = {sink["peer"]: sink for sink in json.loads(tried.stdout)["sinks"]}
        assert [results[peer]["status"] for peer in results] == ["success", "failed"]
        assert "is up" in results[down]["advice"]
        repo.append(health_critical())
        assert repo.dispatch().json["dispatchedCount"] == 1
    found = look(repo)
    fleet = sink_of(found, "fleet")
    assert (found["health"], fleet["health"]) == ("warning", "warning")
    assert (fleet["lagCount"], fleet["consecutiveFailures"]) == (0, 0)
    assert [behind["peer"] for behind in fleet["laggingPeers"]] == [down]
    assert f"{down} of fleet misses what its peers have" in found["verdict"]


def test_the_advice_for_what_reached_nobody_repeats_nothing_that_was_delivered(
    repo: Repo, server: SinkServer
) -> None:
    config = to_all()
    repo.write_config(config)
    repo.append(health_critical(number=1))
    repo.dispatch()
    for sink in config["sinks"].values():
        sink["enabled"] = False
    repo.write_config(config)
    repo.append(health_critical(number=2))
    repo.dispatch()
    advice = repo.run("status", *repo.target, "--format", "text").stdout

    assert "--from-line" not in advice
    assert f"log --repo {repo.root} --loop {repo.loop} --status skipped" in advice
    [missed] = repo.run("log", *repo.target, "--status", "skipped", "--format", "json").json["escalations"]
    config["sinks"][HOOK]["enabled"] = True
    repo.write_config(config)
    assert repo.run("redeliver", *repo.target, "--id", missed["escalationId"], "--yes").exit_code == 0
    assert [request.json["escalation"]["number"] for request in server.received(PATHS[HOOK])] == [1, 2]


def test_no_row_that_is_malformed_keeps_people_from_seeing_the_others(repo: Repo, server: SinkServer) -> None:
    odd = [1]
    malformed: list[dict[str, Any]] = [
        {"status": "failed", "reasonCode": odd, "sinks": []},
        {"status": "partial", "sinks": [{"id": HOOK, "status": odd, "reasonCode": odd}]},
        {"status": "dispatched", "sinks": 5, "route": {"sinks": odd}, "timestamp": 5},
        {"status": "failed", "late": True, "sinks": 5},
        {"status": "failed_command", "message": odd, "reasonCode": {}},
    ]
    repo.append(health_critical())
    repo.dispatch()
    first = repo.telemetry()[0]
    with repo.telemetry_file.open("a") as rows:
        for number, row in enumerate(malformed):
            common = {"timestamp": first["timestamp"], "loopId": repo.loop, "escalationId": f"esc_0{number}"}
            rows.write(json.dumps({**common, "escalationCategory": "odd", "position": odd, **row}) + "\n")
    repo.state_file.write_text(json.dumps({**repo.state(), "updatedAt": 7, "message": odd}))

    assert repo.run("status", *repo.target).json["verdict"]
    assert repo.run("status", *repo.target, "--check").stdout.startswith("ALERT DISPATCH")
    listed = repo.run("log", *repo.target).json["escalations"]
    assert first["escalationId"] in {entry["escalationId"] for entry in listed}
    assert {repo.run("show", f"esc_0{number}", *repo.target).exit_code for number in (0, 1, 2, 4)} == {0}


def test_status_says_nothing_of_a_last_pass_that_the_state_does_not_tell_of(repo: Repo) -> None:
    repo.append(health_critical())
    repo.state_file.write_text('{"schemaVersion":"v1","escalationsLineOffset":1}')

    assert "Last pass" not in repo.run("status", *repo.target, "--format", "text").stdout
