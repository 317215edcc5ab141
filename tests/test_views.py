"""What people see and ask for: `explain`, `log`, `show`, the tables, the help."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Repo, Run, edit_queue, time_passes
from escalations import CHAT, HOOK, LOOP, PAGER, PATHS, batch, health_critical, health_degraded
from loopback import SinkServer, error, ok, rate_limited
from operate import check, make_backlog, make_dead_letter, sink_of, to_all

import ops_alert_dispatch as program


def look(repo: Repo, command: str, *options: str) -> Run:
    """What a person sees."""
    return repo.run(command, *repo.target, *options, "--format", "text")


# --- explain


@pytest.mark.parametrize("code", ["unauthorized", "no_dispatchable_sinks"])
def test_a_code_is_explained_in_three_lines(repo: Repo, code: str) -> None:
    run = repo.run("explain", code, "--format", "text")
    meaning, look, fix = run.stdout.splitlines()
    assert meaning.startswith(f"{code}: ")
    assert look.startswith("How to see it: ")
    assert fix.startswith("How to fix it: ")
    assert not set("{}") & set(run.stdout)
    assert repo.run("explain", code).json["meaning"] in meaning


def test_all_codes_are_listed_one_a_line(repo: Repo) -> None:
    run = repo.run("explain", "--format", "text")
    listed = [line.split()[0] for line in run.stdout.splitlines()[1:]]
    assert listed == list(program.CODES)
    assert [found["code"] for found in repo.run("explain").json["codes"]] == listed


def test_a_mistyped_code_is_answered_with_the_nearest_one(repo: Repo) -> None:
    run = repo.run("explain", "unauthorised")
    assert run.exit_code == 2
    assert "did you mean 'unauthorized'?" in run.stderr


# --- log


def make_trouble(repo: Repo, server: SinkServer) -> None:
    """Two records: all sinks take the first one, chat fails at the second."""
    repo.write_config(to_all())
    repo.append(health_degraded(seconds_ago=90))
    repo.dispatch()
    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(health_critical())
    repo.dispatch()


def test_the_log_says_what_happened_lately_the_newest_last(repo: Repo, server: SinkServer) -> None:
    make_trouble(repo, server)
    older, newer = repo.run("log", *repo.target).json["escalations"]
    assert (older["category"], older["status"]) == ("health_degraded", "delivered")
    assert (newer["category"], newer["severity"], newer["status"]) == (
        "health_critical",
        "critical",
        "failed",
    )
    assert {sink["id"]: sink["status"] for sink in newer["sinks"]} == {
        **dict.fromkeys((HOOK, PAGER), "delivered"),
        CHAT: "failed",
    }
    head, first, second = look(repo, "log").stdout.splitlines()
    assert head.split() == ["TIME", "SEVERITY", "CATEGORY", "ID", "SINKS"]
    assert re.match(r"\d+ s ago", first)
    assert f"failed (http_error): {CHAT}; delivered: " in second
    assert newer["escalationId"][:12] in second


ASKED_FOR: list[tuple[list[str], list[str]]] = [
    (["--status", "failed"], ["health_critical"]),
    (["--status", "waiting"], ["health_critical"]),
    (["--status", "dead"], []),
    (["--status", "delivered", "--sink", CHAT], ["health_degraded"]),
    (["--category", "health_degraded"], ["health_degraded"]),
    (["-n", "1"], ["health_critical"]),
    (["--since", "2h"], ["health_degraded", "health_critical"]),
]


def test_the_log_lists_only_what_was_asked_for(repo: Repo, server: SinkServer) -> None:
    make_trouble(repo, server)
    for options, categories in ASKED_FOR:
        for loops in (repo.target, repo.target[:2]):
            found = repo.run("log", *loops, *options).json["escalations"]
            assert [entry["category"] for entry in found] == categories, options


def test_the_log_still_has_what_the_queue_let_go_and_lines_that_are_no_escalation(
    repo: Repo, server: SinkServer
) -> None:
    make_trouble(repo, server)
    server.answer(PATHS[CHAT], error(422, "no"))
    repo.append("this is no record\n")
    repo.dispatch()
    before = repo.run("log", *repo.target).json["escalations"]
    assert [entry["status"] for entry in before] == ["delivered", "dead", "failed"]
    edit_queue(repo, "DELETE FROM deliveries", "DELETE FROM escalations")
    after = repo.run("log", *repo.target).json["escalations"]
    told = [(entry["escalationId"], entry["status"], entry["timestamp"]) for entry in before]
    assert [(entry["escalationId"], entry["status"], entry["timestamp"]) for entry in after] == told
    [dead] = repo.run("log", *repo.target, "--status", "dead").json["escalations"]
    assert dead["category"] == "health_critical"
    assert "invalid_escalation_json" in look(repo, "log").stdout.splitlines()[-1]


def test_the_log_changes_nothing_and_a_wrong_time_is_named(repo: Repo, server: SinkServer) -> None:
    make_trouble(repo, server)
    before = repo.snapshot()
    look(repo, "log")
    look(repo, "show", repo.telemetry()[0]["escalationId"])
    assert repo.snapshot() == before
    run = look(repo, "log", "--since", "yesterday")
    assert (run.exit_code, "write 30m, 2h or 3d" in run.stderr) == (2, True)


# --- show


@pytest.mark.parametrize("forgotten", [False, True])
def test_one_escalation_is_shown_whole_by_the_beginning_of_its_id(
    repo: Repo, server: SinkServer, *, forgotten: bool
) -> None:
    repo.write_config(to_all())
    identity = make_dead_letter(repo, server)
    if forgotten:
        edit_queue(repo, "DELETE FROM deliveries", "DELETE FROM escalations")
    found = repo.run("show", identity[:-2], *repo.target).json
    assert (found["escalationId"], found["loopId"], found["status"]) == (identity, LOOP, "dead")
    assert found["record"]["category"] == found["category"]
    assert found["route"]["sinks"]
    assert {item["sinkId"]: item["status"] for item in found["deliveries"]} == {
        **dict.fromkeys((CHAT, PAGER), "delivered"),
        HOOK: "dead",
    }
    [hook] = [item for item in found["deliveries"] if item["sinkId"] == HOOK]
    [attempt] = hook["attempts"]
    assert (attempt["httpStatus"], attempt["outcome"]) == (422, "dead_letter")
    text = look(repo, "show", identity).stdout
    assert f"{HOOK}  dead: http_error 422: I do not take this" in text
    assert "Route: " in text
    assert '"traceId"' in text


def test_what_no_sink_was_to_get_says_why(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    for sink in config["sinks"].values():
        sink["minSeverity"] = "critical"
    repo.write_config(config)
    repo.append(health_degraded(severity="info"))
    repo.dispatch()
    [entry] = repo.run("log", *repo.target).json["escalations"]
    assert (entry["status"], entry["reasonCode"]) == ("skipped", "severity_below_min")
    assert "skipped (severity_below_min)" in look(repo, "log").stdout
    assert program.CODES["severity_below_min"].meaning in look(repo, "show", entry["escalationId"]).stdout


def test_the_id_that_the_log_shows_is_enough_to_send_again(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    identity = make_dead_letter(repo, server)
    shown = look(repo, "log", "--status", "dead").stdout
    [prefix] = re.findall(r"esc_\w+", shown)
    assert "http_error" in shown
    server.forget()
    sent = repo.run("redeliver", *repo.target, "--id", prefix, "--sink", HOOK, "--yes").json["deliveries"]
    assert [item["escalationId"] for item in sent] == [identity]


def test_an_ambiguous_or_unknown_id_is_named_as_such(repo: Repo) -> None:
    repo.append(*batch(17))
    repo.dispatch()
    ids = [row["escalationId"] for row in repo.telemetry()]
    # Of more than 16 ids two begin with the same digit.
    shared = next(i[0] for i in ids if sum(other[0] == i[0] for other in ids) > 1)
    run = repo.run("show", shared, *repo.target)
    assert (run.exit_code, "is ambiguous" in run.stderr) == (2, True)
    assert sum(identity in re.sub(r"\s+", "", run.stderr) for identity in ids) > 1
    run = repo.run("show", "xyz", *repo.target)
    assert (run.exit_code, "has an id that begins with 'xyz'" in run.stderr) == (2, True)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_reason_gets_the_room_that_a_table_leaves(repo: Repo, server: SinkServer, width: int) -> None:
    repo.write_config(to_all())
    make_dead_letter(repo, server)
    server.answer(PATHS[CHAT], error(503, "repair " * 20))
    repo.append(health_critical())
    env = {"NO_COLOR": "1", "COLUMNS": str(width)}
    for command, heading in (("dispatch", "SINK"), ("log", "TIME")):
        text = repo.run_on_terminal(command, *repo.target, env=env).stdout
        table = text[text.index(f"{heading}  ") :].splitlines()
        wide = max(map(len, table))
        assert wide <= width
        assert wide == width or "…" not in text, "cut though there was room"


def test_an_attempt_is_shown_with_its_fault_code_as_its_reason_code_promises(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(to_all())
    identity = make_dead_letter(repo, server)
    assert "fault code, which `ops-alert-dispatch explain CODE` explains" in look_up(repo, "http_error")
    assert "fault code, which `ops-alert-dispatch explain CODE` explains" in look_up(repo, "request_failed")
    assert ", fault code record_refused\n" in look(repo, "show", identity).stdout


def look_up(repo: Repo, code: str) -> str:
    return repo.run("explain", code, "--format", "text").stdout


# --- A mistyped loop


@pytest.mark.parametrize("command", ["dispatch", "dry run", "status", "log", "show", "redeliver", "skip"])
def test_a_mistyped_loop_makes_nothing_and_is_answered_with_those_there_are(repo: Repo, command: str) -> None:
    for loop in ("another", LOOP):
        replace(repo, loop=loop).append(health_critical())
    arguments = {
        "dry run": ["dispatch", "--dry-run"],
        "show": ["show", "esc"],
        "redeliver": ["redeliver", "--dead-letters"],
        "skip": ["skip", "--sink", CHAT],
    }
    before = repo.snapshot()
    words = arguments.get(command, [command])
    run = repo.run(*words, "--repo", str(repo.root), "--loop", "nigth-build", "--format", "text")
    said = re.sub(r"\s+", " ", run.stdout + run.stderr)
    assert said.count("no escalations in") == 1
    assert "loop nigth-build: no escalations in" in said
    assert f"loops: {LOOP}, another" in said
    assert repo.snapshot() == before


def test_a_loop_without_escalations_is_no_error_for_reconcile(repo: Repo) -> None:
    before = repo.snapshot()
    run = repo.dispatch()
    assert (run.json["status"], run.stderr) == ("no_source", "")
    assert "no loop of this repo has escalations yet" in run.json["message"]
    assert repo.dispatch("--strict").exit_code == 0
    assert repo.snapshot() == before


def test_a_mistyped_sink_is_answered_with_those_there_are(repo: Repo, server: SinkServer) -> None:
    make_trouble(repo, server)
    for command in (["log"], ["skip"], ["redeliver", "--dead-letters"]):
        run = look(repo, *command, "--sink", "team-hok")
        said = re.sub(r"\s+", " ", run.stderr)
        assert run.exit_code == 2
        assert f"there is no sink 'team-hok'; sinks: {HOOK}, " in said
    # One that was removed is no slip of the pen: the log has what it was sent.
    config = to_all()
    del config["sinks"][HOOK]
    config["routing"]["defaultSinks"].remove(HOOK)
    repo.write_config(config)
    assert look(repo, "log", "--sink", HOOK, "--status", "dead").stdout == "Nothing on record matches.\n"


# --- What a pass did, and what is left


def test_a_pass_says_by_sink_what_is_left_and_how_long_that_takes(repo: Repo) -> None:
    config = to_all()
    config["sinks"][CHAT]["maxPerMinute"] = 12
    repo.write_config(config)
    repo.append(*batch(20))
    run = repo.dispatch("--time-budget", "2", "--format", "text")
    state = repo.state()
    chat = state["sinks"][CHAT]
    assert (state["stoppedBy"], state["sinks"][HOOK]["sentCount"]) == ("time_budget", 20)
    assert chat["sentCount"] + chat["waitingCount"] == 20
    assert chat["waitingCount"] > 10
    assert "stopped by its time budget; the next pass goes on" in run.stdout
    [line] = [line for line in run.stdout.splitlines() if line.startswith(CHAT)]
    assert line.split()[1:3] == [str(chat["sentCount"]), str(chat["waitingCount"])]
    assert re.search(r"12 a minute, about (\d+ s|\d min) left$", line)
    # The one and the other say the same.
    status = sink_of(repo.run("status", *repo.target).json, CHAT)
    assert (status["waitingCount"], status["lagCount"]) == (chat["waitingCount"],) * 2
    assert repo.dispatch("--time-budget", "0.1").json["sinks"][HOOK]["sentCount"] == 0


def test_a_pass_that_a_signal_stopped_says_so_and_how_much_is_unread(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"][CHAT]["maxPerMinute"] = 12
    repo.write_config(config)
    repo.append(*batch(9))
    process = repo.start("dispatch", *repo.target)
    server.wait_for(2, PATHS[CHAT])
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["stoppedBy"] == "signal"
    assert json.loads(stdout)["unreadCount"] == 0


def test_what_was_not_read_is_counted(repo: Repo) -> None:
    repo.append(*batch(5))
    run = repo.dispatch("--max-escalations", "2", "--format", "text")
    assert (repo.state()["unreadCount"], repo.state()["stoppedBy"]) == (3, None)
    assert "3 lines of the source not read yet" in run.stdout
    assert "3 lines of the source not read yet" in look(repo, "status").stdout


def test_what_waits_and_late_deliveries_stand_in_the_headline(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    make_backlog(repo, server, 2)
    for which in (["--loop", repo.loop], ["--all-loops"]):
        text = repo.run("dispatch", "--repo", str(repo.root), *which, "--format", "text").stdout
        assert text.splitlines()[0].endswith("; 2 deliveries waiting")
    server.answer(PATHS[CHAT], ok())
    head = look(repo, "dispatch").stdout.splitlines()[0]
    assert head.endswith("0 new: 0 delivered, 0 skipped, 0 failed; late: 2 delivered, 0 given up")


def rows_of(text: str, first: str = "SINK") -> dict[str, dict[str, str]]:
    """The first table in a text, by the cell of its first column, whose heading is `first`."""
    lines = text[text.index(f"{first}  ") :].partition("\n\n")[0].splitlines()
    headings, *rows = (re.split("  +", line) for line in lines)
    return {cells[0]: dict(zip(headings, cells, strict=True)) for cells in rows}


def test_dispatch_and_what_looks_after_it_say_the_same_in_the_same_words(
    repo: Repo, server: SinkServer
) -> None:
    make_trouble(repo, server)
    server.answer(PATHS[CHAT], rate_limited(600))
    repo.append(*batch(2), "no JSON\n", "\n")
    done = look(repo, "dispatch", "--max-escalations", "2")
    after = look(repo, "status")
    shared = ("SINK", "WAITING", "OLDEST", "NEXT ATTEMPT", "DEAD")
    for sink, row in rows_of(done.stdout).items():
        for heading in shared:
            # Ages may differ by a second.
            same, seen = (
                re.sub(r"just now|\d+ (s|min)( ago)?", "age", found[heading])
                for found in (row, rows_of(after.stdout)[sink])
            )
            assert same == seen, (sink, heading)
    waiting = rows_of(done.stdout)[CHAT]["WAITING"]
    assert waiting == "3"
    assert "2 lines of the source not read yet" in done.stdout
    assert "2 lines of the source not read yet" in after.stdout
    metrics = repo.run("status", "--repo", str(repo.root), "--format", "prometheus").stdout
    assert f'ops_alert_dispatch_waiting{{loop="{LOOP}",sink="{CHAT}"}} {waiting}\n' in metrics
    assert f'ops_alert_dispatch_unread{{loop="{LOOP}"}} 2\n' in metrics


def test_a_sink_that_fails_for_another_loop_only_is_not_failing_for_this_one(
    repo: Repo, server: SinkServer
) -> None:
    config = to_all(backoffSeconds={"initial": 900, "max": 900})
    repo.write_config(config)
    make_backlog(replace(repo, loop="another"), server, 2)
    config["sinks"][CHAT]["minSeverity"] = "critical"
    repo.write_config(config)
    repo.append(health_degraded())
    for command in ("dispatch", "status"):
        row = rows_of(look(repo, command).stdout)[CHAT]
        assert (row["WAITING"], row["NEXT ATTEMPT"], row.get("NOTE", "-")) == ("0", "-", "-"), command


def test_a_dry_run_has_the_table_of_a_pass_and_the_words_of_the_log(repo: Repo, server: SinkServer) -> None:
    make_trouble(repo, server)
    server.answer(PATHS[CHAT], rate_limited(600))
    repo.append(*batch(2), "no JSON\n", "\n")
    done = look(repo, "dispatch", "--max-escalations", "2")
    waiting = rows_of(done.stdout)[CHAT]["WAITING"]
    # A dry run has the table of the pass, and the words of `log`. What is no escalation goes to no sink.
    dry = look(repo, "dispatch", "--dry-run").stdout
    assert [*rows_of(dry)[CHAT]] == [
        key.replace("DELIVERED", "TO SEND") for key in rows_of(done.stdout)[CHAT]
    ]
    assert rows_of(dry)[CHAT]["WAITING"] == waiting
    lines = rows_of(dry, "LINE")
    assert {number: row["SINKS"].partition(": ")[0] for number, row in lines.items()} == {
        **dict.fromkeys("234", "waiting (http_error)"),
        "5": "failed (invalid_escalation_json)",
        "6": "skipped (blank_line)",
    }
    assert rows_of(look(repo, "log").stdout, "TIME") != {}


def test_a_pass_names_the_causes_and_where_they_are_explained(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(*batch(3))
    run = look(repo, "dispatch")
    assert "delivery_deferred" in repo.state()["failureReasonCodes"]
    assert "reasons: http_error; `ops-alert-dispatch explain http_error` says more\n" in run.stdout


def test_a_pass_beside_another_one_says_so(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    with Path(f"{repo.state_file}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        head = look(repo, "dispatch").stdout.splitlines()[0]
        assert head == f"locked  another pass is running for loop {LOOP}; nothing to do"
        assert "another pass is running\n" in repo.run("dispatch", "--all-loops", "--format", "text").stdout


def test_a_time_that_has_come_is_due_now(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    make_backlog(repo, server, 1)
    for command in ("status", "dispatch"):
        text = look(repo, command).stdout
        assert "due now" in text
        assert " 0 s ago" not in text


def test_no_sink_is_called_ok_while_the_config_is_invalid(repo: Repo) -> None:
    repo.append(health_critical())
    repo.dispatch()
    repo.config_file.write_text("{")
    status = repo.run("status", *repo.target).json
    assert {sink["health"] for sink in status["sinks"]} == {"critical"}


def test_a_pass_without_an_enabled_sink_is_not_green(repo: Repo) -> None:
    config = to_all()
    for sink in config["sinks"].values():
        sink["enabled"] = False
    repo.write_config(config)
    repo.append(health_critical())
    for _ in range(2):
        text = repo.run_on_terminal("dispatch", *repo.target).stdout
        assert "\x1b[33m" in text.splitlines()[0]
        assert "no sink is enabled: nothing is sent" in text


# --- Losses that were seen


def test_a_list_that_is_read_slowly_holds_up_no_pass(repo: Repo) -> None:
    repo.append(*batch(6))
    repo.dispatch()
    job = program.make_job(program.Paths(str(repo.root)), repo.loop)
    entries = program.entries_of_queue(job, None, program.Filter(None))
    next(entries)
    repo.append(health_critical())
    assert repo.dispatch().json["status"] == "success"
    assert len(list(entries)) == 5


def test_a_loss_that_was_acknowledged_leaves_status_and_stays_in_the_log(repo: Repo) -> None:
    repo.append("this is no record\n", health_critical())
    repo.dispatch()
    before = repo.run("status", *repo.target).json
    assert before["health"] == "warning"
    [advice] = before["advice"]
    [ack] = re.findall(r"`(ops-alert-dispatch status [^`]*--ack)`", advice)
    acknowledged = repo.run(*shlex.split(ack)[1:]).json
    assert acknowledged["health"] == "ok"
    assert acknowledged["notes"][0].startswith("acknowledged: 1 line of the source sent to nobody")
    assert check(repo)[0] == 0
    assert repo.run("log", *repo.target, "--status", "failed").json["escalations"]
    # What comes later is a loss of its own.
    repo.append("nor is this\n")
    repo.dispatch()
    assert "1 line of the source sent to nobody" in repo.run("status", *repo.target).json["verdict"]


def test_acknowledging_makes_no_queue_where_there_is_none(repo: Repo) -> None:
    repo.append(health_critical())
    before = repo.snapshot()
    repo.run("status", *repo.target, "--ack")
    assert repo.snapshot() == before


# --- Advice


def test_a_missing_config_is_answered_with_the_command_that_writes_one(repo: Repo) -> None:
    repo.config_file.unlink()
    run = repo.run("config")
    assert (run.exit_code, f"`ops-alert-dispatch init --repo {repo.root}` writes one" in run.stderr) == (
        3,
        True,
    )


def test_status_before_there_is_a_config_names_the_command_that_writes_one(repo: Repo) -> None:
    repo.append(health_critical())
    repo.config_file.unlink()
    found = repo.run("status", *repo.target).json
    [command] = re.findall("`(.*)`", found["advice"][0])
    assert repo.run(*shlex.split(command)[1:]).exit_code == 0
    assert repo.config_file.is_file()


def test_a_config_that_may_not_be_read_is_not_called_missing(repo: Repo) -> None:
    repo.config_file.unlink()
    repo.config_file.mkdir()
    run = repo.run("config")
    assert (run.exit_code, "init" in run.stderr, "--alert-config-file" in run.stderr) == (3, False, False)


def test_a_refused_test_alert_is_nothing_to_redeliver(repo: Repo, server: SinkServer) -> None:
    server.answer(PATHS[HOOK], error(400, "unknown field"))
    run = repo.run("test", "--sink", HOOK, "--format", "text")
    assert (run.exit_code, "redeliver" in run.stdout) == (1, False)
    assert "read the sink's answer, and correct ALERT_HOOK_URL" in run.stdout


def test_dead_letters_say_to_fix_the_cause_first(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    make_dead_letter(repo, server)
    [advice] = repo.run("status", *repo.target).json["advice"]
    assert advice.index("--status dead` says why") < advice.index("fix the cause") < advice.index("redeliver")
    for command in re.findall("`([^`]+)`", advice):
        answer = repo.run(*shlex.split(command)[1:], stdin="n\n")
        assert answer.exit_code in (0, 130), command


# --- The command line


def test_the_repo_is_that_of_the_current_folder_or_of_the_environment(repo: Repo, tmp_path: Path) -> None:
    repo.append(health_critical())
    assert repo.run("--loop", LOOP).json["dispatchedCount"] == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for command in (["status"], ["log"], ["config"], ["test"], ["dispatch", "--all-loops"]):
        run = repo.run(*command, env={"OPS_MANAGER_REPO": str(elsewhere)})
        assert LOOP not in run.stdout, command
        assert repo.run(*command).exit_code == 0, command


@pytest.mark.first
def test_an_exit_code_says_what_the_help_says(repo: Repo) -> None:
    assert repo.run("init").exit_code == 5
    repo.append(health_critical())
    repo.dispatch()
    with Path(f"{repo.state_file}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert repo.run("skip", *repo.target, "--sink", CHAT, "--yes").exit_code == 4
    text = repo.run("--help").stdout
    assert "4    the state file or the queue cannot be used, or a pass is using it" in text


@pytest.mark.parametrize("command", [["--help"], ["demo"], ["explain"]])
def test_a_reader_who_has_gone_is_no_error(repo: Repo, command: list[str]) -> None:
    """As with `git log | head`: the exit code is that of the signal, and nobody is told."""
    reader, writer = os.pipe()
    os.close(reader)
    process = repo.popen(*command, stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + signal.SIGPIPE, "")


# --- Help and completion


def test_the_help_has_examples_that_work_and_breaks_no_word(repo: Repo) -> None:
    narrow = {"COLUMNS": "80"}
    first = repo.run("--help", env=narrow).stdout
    commands = first.partition("Commands:")[2].partition("Examples:")[0]
    listed = re.findall(r"^  ([a-z]+)  +", commands, re.MULTILINE)
    assert listed[:4] == ["init", "test", "dispatch", "status"]
    assert set(listed) == set(program.cli.commands)
    pages = {command: repo.run(command, "--help", env=narrow).stdout for command in listed}
    assert "..." not in first.partition("Commands:")[2]
    assert "Exit codes:" in first
    for command, page in [("", first), *pages.items()]:
        assert max(map(len, page.splitlines())) <= 80, command
        assert not re.search(r"\w-$", page, re.MULTILINE), command
        assert ("Exit codes:" in page) == (command == "")
        examples = re.findall(r"^    ops-alert-dispatch (.+)", page.partition("Examples:")[2], re.MULTILINE)
        assert len(examples) >= 2, command
        for example in examples:
            words = example.partition("|")[0].split()
            assert command in ("", words[0])
            assert {word for word in words if word.startswith("-")} <= set(
                re.findall(r"--?[a-z-]+", pages[words[0]])
            )


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["status", "--loop", "ni"], [LOOP]),
        (["skip", "--sink", "ops"], [CHAT]),
        (["redeliver", "--loop", "ni"], [LOOP]),
        (["test", "--sink", ""], [CHAT, PAGER, HOOK]),
        (["explain", "unauth"], ["unauthorized"]),
    ],
)
def test_a_shell_completes_loops_sinks_and_codes(
    repo: Repo, words: list[str], completions: list[str]
) -> None:
    repo.append(health_critical())
    said = complete(repo, words[0], "--repo", str(repo.root), *words[1:])
    assert sorted(said) == sorted(f"plain,{word}" for word in completions)


@pytest.mark.parametrize(
    ("option", "kind"), [("--repo", "dir"), ("--alert-config-file", "file"), ("--queue-file", "file")]
)
def test_a_shell_completes_paths(repo: Repo, option: str, kind: str) -> None:
    assert complete(repo, "dispatch", option, "some") == [f"{kind},some"]


def complete(repo: Repo, *words: str) -> list[str]:
    env = {
        "_OPS_ALERT_DISPATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": shlex.join(["ops-alert-dispatch", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return repo.run(env=env).stdout.split()


# --- The last day, and how far a pass is


def test_status_shows_the_last_day_of_each_sink_in_one_cell(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    repo.append(*batch(8))
    repo.dispatch()
    edit_queue(repo, "UPDATE hours SET hour = hour - 2")
    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(health_critical())
    repo.dispatch()
    hours = sink_of(repo.run("status", *repo.target).json, CHAT)["hours"]
    assert len(hours) == 24
    assert [(hour["delivered"], hour["failed"]) for hour in hours[-3:]] == [(8, 0), (0, 0), (0, 1)]
    text = repo.run_on_terminal("status", *repo.target).stdout
    [line] = [line for line in text.splitlines() if line.startswith(CHAT) and "█" in line]
    # Green what was delivered, red what failed; each hour keeps its place.
    assert line.endswith("▁" * 21 + "\x1b[32m█\x1b[0m▁\x1b[31m▂\x1b[0m")
    assert "▁█▁▂" in look(repo, "status").stdout


def test_the_progress_bar_counts_deliveries_and_shows_the_time_left(repo: Repo, server: SinkServer) -> None:
    config = to_all()
    config["sinks"][CHAT]["maxPerMinute"] = 60
    repo.write_config(config)
    repo.append(*batch(12))
    run = repo.run_on_terminal("dispatch", *repo.target, "--time-budget", "20", streams=["stderr"])
    shown = re.findall(r"Delivering, (\d+) s left .*?(\d+)/(\d+)", run.stderr)
    assert shown[-1][1:] == ("36", "36")
    assert int(shown[0][0]) <= 20
    assert int(shown[-1][0]) < int(shown[0][0])


def test_people_read_for_how_long_a_sink_has_failed(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    make_backlog(repo, server, 2)
    time_passes(repo, 3 * 3600)
    assert "), 2 deliveries waiting, for 3 h\n" in look(repo, "status").stdout
    verdict = repo.run("status", *repo.target).json["verdict"]
    assert re.search(r"2 deliveries waiting, since 2\d{3}-", verdict)


def test_people_read_ages_and_scripts_read_times(repo: Repo, server: SinkServer) -> None:
    config = to_all(backoffSeconds={"initial": 600, "max": 600})
    repo.write_config(config)
    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(health_critical(), "no record\n")
    repo.dispatch()
    # Jitter may take nearly all of a wait.
    edit_queue(
        repo, f"UPDATE destinations SET next_attempt_at = {time.time() + 300} WHERE next_attempt_at > 0"
    )
    said = repo.run("status", *repo.target).json
    assert re.search(r"next attempt \d{4}-\d\d-\d\dT", said["advice"][0])
    text = look(repo, "status").stdout
    assert re.search(r"next attempt in \d+ (s|min), or at once with `", text)
    assert not re.search(r"\d{4}-\d\d-\d\dT", text)


def test_a_narrow_summary_still_says_why_and_how_long(repo: Repo, server: SinkServer) -> None:
    repo.write_config(to_all())
    server.answer(PATHS[CHAT], error(503, "down"))
    repo.append(health_critical())
    env = {"NO_COLOR": "1", "COLUMNS": "80"}
    text = repo.run_on_terminal("dispatch", *repo.target, env=env).stdout
    [line] = [line for line in text.splitlines() if line.startswith(CHAT)]
    assert len(line) <= 80
    assert "http_error 503: down" in line


def test_a_loop_that_cannot_be_read_is_named_beside_the_log_of_the_others(
    repo: Repo, server: SinkServer
) -> None:
    broken = replace(repo, loop="broken")
    for loop in (repo, broken):
        loop.append(health_critical())
        loop.dispatch()
    broken.state_file.unlink()
    broken.state_file.mkdir()
    run = repo.run("log", "--repo", str(repo.root))
    shown = repo.run("show", "esc_f0", "--repo", str(repo.root))

    assert (run.exit_code, shown.exit_code) == (4, 2)
    assert repo.loop in {found["loopId"] for found in json.loads(run.stdout)["escalations"]}
    for said in (run.stderr, shown.stderr):
        assert said.startswith(f"error: loop broken: {broken.state_file} is not a regular file")
