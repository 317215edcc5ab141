"""Many loops in one process: each as if it were alone, none in the way of the others, one voice to a sink."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo, Run, time_passes
from escalations import HOOK, NO_WAIT, PAGER, PATHS, SINK_TYPES, escalation_id, health_critical, sink_config
from loopback import Answer, Received, SinkServer, accepted, error, hang, hang_up, ok, rate_limited
from promise import check_promise
from zygote import lose_power

import ops_alert_dispatch as program


def everywhere(*sinks: str, **delivery: Any) -> dict[str, Any]:
    """Each record to these sinks, all three when none is named."""
    config = sink_config(everywhere=True)
    config["sinks"] = {sink: config["sinks"][sink] for sink in sinks or SINK_TYPES}
    config["routing"]["defaultSinks"] = list(config["sinks"])
    config["delivery"] = {"maxAttemptsPerPass": 1, **delivery}
    return config


def loops_of(repo: Repo, *names: str) -> list[Repo]:
    return [replace(repo, loop=name) for name in names]


def fill(loops: list[Repo], count: int = 1) -> None:
    """Append so many records to each loop, each with the loop's name and a number."""
    for loop in loops:
        loop.append(*(health_critical(loopId=loop.loop, number=number) for number in range(count)))


def dispatch_all(repo: Repo, *options: str) -> Run:
    return repo.run("dispatch", "--repo", str(repo.root), "--all-loops", *options)


def arrived(server: SinkServer, sink: str = HOOK) -> list[tuple[str, int]]:
    """Loop and number of what a webhook was sent, in order."""
    records = [request.json["escalation"] for request in server.received(PATHS[sink])]
    return [(record["loopId"], record["number"]) for record in records]


def end_waits(config: dict[str, Any], repo: Repo) -> None:
    """A changed sink ends its wait."""
    for settings in config["sinks"].values():
        settings["timeoutSeconds"] = 11
    repo.write_config(config)


# --- All of them


def test_every_loop_is_delivered_as_if_it_were_alone(repo: Repo, server: SinkServer, tmp_path: Path) -> None:
    repo.write_config(everywhere())
    loops = loops_of(repo, "east", "north", "west")
    fill(loops, 3)
    folder = repo.folder.parent / "fleet"
    folder.mkdir()
    (folder / "escalations.jsonl").write_text('{"category":"health_critical"}\n')
    (repo.folder.parent / "registry.json").write_text("{}")
    (repo.folder.parent / "new-loop").mkdir()
    run = dispatch_all(repo, "--trace-id", "t-1")

    assert run.stderr == ""
    summary = run.json
    assert len(run.stdout.splitlines()) == 1
    counts = {"processedCount": 3, "dispatchedCount": 3, "skippedCount": 0, "failedCount": 0}
    late = {"lateDispatchedCount": 0, "lateFailedCount": 0, "waitingCount": 0, "deadLetterCount": 0}
    late["unreadCount"] = 0
    assert [{key: loop[key] for key in loop if key != "sinks"} for loop in summary["loops"]] == [
        {"loopId": name, "status": "success", "stoppedBy": None, **counts, **late, "failureReasonCodes": []}
        for name in ("east", "north", "west")
    ]
    assert {key: value for key, value in summary.items() if key not in ("loops", "updatedAt")} == {
        "schemaVersion": "v1",
        "repoPath": str(repo.root),
        "status": "success",
        "loopCount": 3,
        "lockedLoopCount": 0,
        "brokenLoopCount": 0,
        **{key: 3 * count for key, count in counts.items()},
        **late,
        "failureReasonCodes": [],
    }
    for sink in SINK_TYPES:
        requests = server.received(PATHS[sink])
        assert len({escalation_id(request) for request in requests}) == len(requests) == 9
        assert len({request.connection for request in requests}) == 1, "one connection for all loops"
    for loop in loops:
        state = loop.state()
        assert (state["loopId"], state["status"], state["traceId"]) == (loop.loop, "success", "t-1")
        assert [row["loopId"] for row in loop.telemetry()] == [loop.loop] * 3
        check_promise(loop)
    assert not (folder / "alert-dispatch-state.json").exists(), "fleet is no loop"

    idle = dispatch_all(repo).json
    assert (idle["status"], idle["loopCount"], idle["processedCount"]) == ("no_new_escalations", 3, 0)
    assert {loop["status"] for loop in idle["loops"]} == {"no_new_escalations"}
    loops[0].append(health_critical(loopId="east", number=3))
    alone = loops[0].dispatch().json
    assert (alone["processedCount"], alone["escalationsLineOffset"]) == (1, 4)


def test_a_repo_without_loops_is_no_error(repo: Repo) -> None:
    summary = dispatch_all(repo).json

    assert (summary["status"], summary["loopCount"], summary["loops"]) == ("no_source", 0, [])
    assert dispatch_all(repo, "--dry-run").json["loops"] == []


def test_what_one_loop_was_told_is_news_to_another(repo: Repo, server: SinkServer) -> None:
    config = everywhere(HOOK)
    config["routing"]["repeat"] = {"windowSeconds": 900}
    repo.write_config(config)
    loops = loops_of(repo, "east", "west")
    fill(loops, 2)
    dispatch_all(repo)

    assert sorted(arrived(server)) == [("east", 0), ("west", 0)]
    for loop in loops:
        check_promise(loop)


# --- A sink that is down


def test_a_sink_that_is_down_is_asked_once_and_all_loops_wait_alike(repo: Repo, server: SinkServer) -> None:
    """More loops than are open at a time: the later ones are not for that reason another try."""
    config = everywhere(HOOK, PAGER)
    repo.write_config(config)
    loops = loops_of(repo, *(f"loop-{number:02}" for number in range(program.LOOPS_AT_ONCE + 6)))
    fill(loops)
    server.answer(PATHS[HOOK], rate_limited(600, status=503))
    summary = dispatch_all(repo).json

    assert len(server.received(PATHS[HOOK])) == 1
    assert len(server.received(PATHS[PAGER])) == len(loops)
    assert (summary["status"], summary["loopCount"], summary["waitingCount"]) == (
        "partial",
        len(loops),
        len(loops),
    )
    sinks = [loop.state()["sinks"][HOOK] for loop in loops]
    assert len({sink["nextAttemptAt"] for sink in sinks}) == 1
    assert {sink["reasonCode"] for sink in sinks} == {"http_error"}
    assert {sink["message"] for sink in sinks} == {"slow down"}
    assert min(sink["consecutiveFailures"] for sink in sinks) == 1
    assert sum(len([row for row in loop.attempts() if row["sinkId"] == HOOK]) for loop in loops) == 1

    server.answer(PATHS[HOOK], ok())
    server.forget()
    end_waits(config, repo)
    back = dispatch_all(repo).json
    assert (back["lateDispatchedCount"], back["waitingCount"]) == (len(loops), 0)
    assert Counter(arrived(server)) == {(loop.loop, 0): 1 for loop in loops}
    for loop in loops:
        check_promise(loop)


def test_a_sink_that_hangs_costs_one_timeout_and_not_one_a_loop(repo: Repo, server: SinkServer) -> None:
    config = everywhere(HOOK, PAGER)
    config["sinks"][HOOK]["timeoutSeconds"] = 1
    repo.write_config(config)
    loops = loops_of(repo, *"abcd")
    fill(loops)
    server.answer(PATHS[HOOK], ok().after(30))
    dispatch_all(repo)

    assert len(server.received(PATHS[HOOK])) == 1
    assert len(server.received(PATHS[PAGER])) == 4
    for loop in loops:
        check_promise(loop)


def test_one_record_that_a_sink_hangs_up_on_holds_up_one_loop_alone(repo: Repo, server: SinkServer) -> None:
    def answer(request: Received) -> Answer:
        return hang_up() if request.json["escalation"]["loopId"] == "a" else ok()

    config = everywhere(HOOK, backoffSeconds=NO_WAIT)
    repo.write_config(config)
    loops = loops_of(repo, *"abc")
    fill(loops)
    server.answer(PATHS[HOOK], answer)
    for _ in range(program.SAME_RECORD_ATTEMPTS + 2):
        dispatch_all(repo)

    waiting = {loop.loop: loop.state()["waitingCount"] for loop in loops}
    assert waiting == {"a": 1, "b": 0, "c": 0}


def test_what_a_sink_asks_one_loop_to_wait_all_loops_wait(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(HOOK))
    loops = loops_of(repo, *"abc")
    fill(loops[:1])
    server.script(PATHS[HOOK], rate_limited(300))
    dispatch_all(repo)
    fill(loops)
    dispatch_all(repo)

    assert len(server.received(PATHS[HOOK])) == 1
    assert len({loop.state()["sinks"][HOOK]["nextAttemptAt"] for loop in loops}) == 1
    for loop in loops:
        check_promise(loop)


# --- Loops that are in the way of nobody


@pytest.fixture
def three(repo: Repo) -> list[Repo]:
    """Three loops with a record each; `b` is the one that is to be broken."""
    repo.write_config(everywhere(HOOK))
    loops = loops_of(repo, *"abc")
    fill(loops)
    return loops


def test_a_loop_that_is_locked_is_told_and_the_others_are_served(
    repo: Repo, server: SinkServer, three: list[Repo]
) -> None:
    lock = three[1].state_file.with_name(three[1].state_file.name + ".lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = dispatch_all(repo)
        assert not three[1].state_file.exists()
    assert run.stderr == ""
    assert [loop["status"] for loop in run.json["loops"]] == ["success", "locked", "success"]
    assert (run.json["status"], run.json["lockedLoopCount"]) == ("success", 1)
    assert arrived(server) == [("a", 0), ("c", 0)]

    assert dispatch_all(repo).json["processedCount"] == 1


def test_where_all_loops_are_locked_the_status_says_so(repo: Repo, three: list[Repo]) -> None:
    descriptors = [loop.state_file.with_name(loop.state_file.name + ".lock").open("w") for loop in three]
    for held in descriptors:
        fcntl.flock(held, fcntl.LOCK_EX)
    assert dispatch_all(repo).json["status"] == "locked"
    for held in descriptors:
        held.close()


def newer_state(loop: Repo) -> None:
    loop.state_file.write_text('{"schemaVersion":"v1","stateVersion":99}')


def no_telemetry_folder(loop: Repo) -> None:
    loop.telemetry_file.parent.write_text("")


def source_folder(loop: Repo) -> None:
    loop.source.unlink()
    loop.source.mkdir()


BROKEN: dict[str, tuple[Callable[[Repo], object], int, str]] = {
    "a state of a newer version": (newer_state, 4, "newer version"),
    "no folder for telemetry": (no_telemetry_folder, 5, "telemetry"),
    "telemetry is a folder": (lambda loop: loop.telemetry_file.mkdir(parents=True), 5, "not a regular file"),
    "the state is a folder": (lambda loop: loop.state_file.mkdir(), 4, "not a regular file"),
    "a folder where the next state is made": (
        lambda loop: loop.state_file.with_name(loop.state_file.name + ".tmp").mkdir(),
        5,
        ".tmp: Is a directory\n  it is a folder: move it away",
    ),
    "the lock is a folder": (
        lambda loop: loop.state_file.with_name(loop.state_file.name + ".lock").mkdir(),
        5,
        "cannot lock",
    ),
    "the source is a folder": (source_folder, 5, "not a regular file\n  it is a folder: move it away"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_loop_that_is_broken_is_told_and_the_others_are_served(
    repo: Repo, server: SinkServer, three: list[Repo], name: str
) -> None:
    damage, code, words = BROKEN[name]
    damage(three[1])
    planned = dispatch_all(repo, "--dry-run")
    run = dispatch_all(repo)

    assert run.exit_code == code
    assert run.stderr.startswith("error: loop b: ")
    assert words in run.stderr
    summary = json.loads(run.stdout)
    assert [loop["status"] for loop in summary["loops"]] == ["success", "error", "success"]
    assert words in summary["loops"][1]["message"]
    assert (summary["status"], summary["brokenLoopCount"], summary["dispatchedCount"]) == ("partial", 1, 2)
    assert arrived(server) == [("a", 0), ("c", 0)]
    assert [len(loop.get("escalations", ())) for loop in json.loads(planned.stdout)["loops"]][::2] == [1, 1]


def test_a_status_of_loops_that_cannot_be_read_prints_nothing_but_what_is_wrong(repo: Repo) -> None:
    fill([repo])
    source_folder(repo)
    run = repo.run("status", "--format", "text")

    assert (run.exit_code, run.stdout) == (5, "")
    assert run.stderr.startswith(f"error: loop {repo.loop}: ")


@pytest.mark.parametrize("command", [["dispatch", "--all-loops"], ["status"]])
def test_what_is_wrong_with_a_loop_is_said_before_how_the_others_are(
    repo: Repo, three: list[Repo], command: list[str]
) -> None:
    source_folder(three[1])
    reader, writer = os.pipe()
    process = repo.popen(*command, "--format", "text", stdout=writer, stderr=writer)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        said = stream.read()
    assert process.wait(60) == 5
    assert said.startswith("error: loop b: cannot read ")
    assert "it is a folder: move it away" in said.splitlines()[1]
    # A dry run does not say of a loop that cannot be read that nothing waits in it.
    dry = dispatch_all(repo, "--dry-run", "--format", "text").stdout
    assert re.search("^b +error ", dry, re.MULTILINE)


def test_a_loop_that_may_not_be_read_is_told_and_the_others_are_served(
    repo: Repo, server: SinkServer, three: list[Repo]
) -> None:
    three[1].folder.chmod(0)
    try:
        run = dispatch_all(replace(repo, prepare=lose_power))
    finally:
        three[1].folder.chmod(0o700)

    assert run.exit_code == 5
    assert run.stderr.startswith("error: loop b: ")
    assert "Permission denied" in run.stderr
    assert "give this user access" in run.stderr
    assert arrived(server) == [("a", 0), ("c", 0)]


def test_a_loop_that_cannot_be_served_is_not_said_to_be_locked_while_others_are(
    repo: Repo, server: SinkServer, three: list[Repo]
) -> None:
    server.answer(PATHS[HOOK], hang())
    three[1].attempts_file.parent.mkdir()
    three[1].attempts_file.symlink_to("nowhere")
    process = repo.start("dispatch", "--repo", str(repo.root), "--all-loops")
    try:
        server.wait_for(1, PATHS[HOOK])
        elsewhere = str(repo.root / "another.json")
        run = three[1].dispatch("--dispatch-state-file", elsewhere)
    finally:
        process.kill()
        process.communicate()

    assert (run.exit_code, run.stdout) == (5, "")
    assert "it is a symbolic link" in run.stderr


@pytest.mark.parametrize("command", ["dispatch", "skip"])
def test_a_loop_that_may_not_be_looked_for_is_not_taken_for_one_without_escalations(
    repo: Repo, command: str
) -> None:
    repo.append(health_critical())
    manager = repo.folder.parent
    manager.chmod(0)
    try:
        options = ["--sink", HOOK, "--yes"] if command == "skip" else []
        run = replace(repo, prepare=lose_power).run(command, *repo.target, *options)
    finally:
        manager.chmod(0o700)

    assert (run.exit_code, "Permission denied" in run.stderr) == (5, True)


def test_a_loop_whose_rows_cannot_be_written_any_more_ends_and_the_others_go_on(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    small, large = loops_of(repo, "small", "large")
    fill([small], 20)
    large.append(*(health_critical(loopId="large", number=n, text="x" * 30_000) for n in range(20)))
    server.answer(PATHS[HOOK], lambda request: ok().after(0.03 if len(request.body) > 30_000 else 0))
    # What is kept free at the beginning of a pass is less than the rows of this one.
    large.telemetry_file.parent.mkdir()
    large.telemetry_file.write_bytes(
        (b" " * 999 + b"\n") * ((8000 * 512 - program.RESERVE_BYTES) // 1000 - 1)
    )
    limited = replace(repo, command=["sh", "-c", 'ulimit -f 8000; exec "$0" "$@"', *repo.command])
    run = dispatch_all(limited)

    assert run.exit_code == 5
    assert run.stderr.startswith("error: loop large: cannot append to")
    assert "ulimit -f" in run.stderr
    assert [loop["status"] for loop in json.loads(run.stdout)["loops"]] == ["error", "success"]
    assert [number for loop, number in arrived(server) if loop == "small"] == list(range(20))
    assert len(arrived(server)) < 40, "nothing more is sent for a loop that has ended"

    assert dispatch_all(repo).json["status"] == "success"
    got = [number for loop, number in arrived(server) if loop == "large"]
    assert list(dict.fromkeys(got)) == list(range(20))
    assert len(got) <= 21, "more than what was in flight came again"


def test_an_invalid_config_is_told_once_and_noted_for_each_loop(
    repo: Repo, server: SinkServer, three: list[Repo]
) -> None:
    three[2].state_file.with_name(three[2].state_file.name + ".lock").mkdir()
    repo.write_config("{")
    run = dispatch_all(repo)

    assert (run.exit_code, run.stdout) == (3, "")
    assert run.stderr.count("error:") == 1
    assert [loop.state()["status"] for loop in three[:2]] == ["config_invalid"] * 2
    assert dispatch_all(repo, "--dry-run").exit_code == 3
    assert server.requests == []


# --- Fairness


def test_a_loop_with_a_long_backlog_does_not_hold_up_a_loop_with_one_record(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    busy, calm = loops_of(repo, "busy", "calm")
    fill([busy], 300)
    fill([calm])
    dispatch_all(repo)

    found = arrived(server)
    assert found.index(("calm", 0)) <= 2
    assert [number for loop, number in found if loop == "busy"] == list(range(300))


@pytest.mark.parametrize("limit", ["ulimit -S -n 48", "ulimit -n 96"], ids=["soft", "hard"])
def test_a_low_limit_of_open_files_costs_no_loop_its_alerts(
    repo: Repo, server: SinkServer, limit: str
) -> None:
    repo.write_config(everywhere(HOOK))
    loops = loops_of(repo, *(f"loop-{number:02}" for number in range(20)))
    fill(loops)
    limited = replace(repo, command=["sh", "-c", f'{limit}; exec "$@"', "sh", *repo.command])
    summary = dispatch_all(limited).json
    assert (summary["brokenLoopCount"], summary["dispatchedCount"]) == (0, 20)
    assert Counter(arrived(server)) == Counter((loop.loop, 0) for loop in loops)


def test_a_pass_that_ends_beside_a_long_run_costs_nothing_that_the_run_has_recorded(
    repo: Repo, server: SinkServer
) -> None:
    """The run looks at an idle loop after it has opened the queue."""
    repo.write_config(everywhere(HOOK))
    first, second, idle, late = loops_of(repo, "first", "second", "idle", "late")
    for loop in (idle, late):
        fill([loop])
        loop.dispatch()
    os.utime(late.state_file, (2**32, 2**32))  # it comes last
    fill([first, second])
    late.append(*(health_critical(loopId="late", number=number) for number in range(1, 31)))
    server.answer(PATHS[HOOK], ok().after(0.1))
    limited = replace(repo, command=["sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *repo.command])
    run = limited.start("dispatch", "--repo", str(repo.root), "--all-loops")
    server.wait_for(4 + 5)
    first.append(health_critical(loopId="first", number=1))
    assert first.dispatch().json["status"] == "success"
    server.wait_for(len(server.requests) + 8)
    run.kill()
    run.communicate()
    server.answer(PATHS[HOOK], ok())
    dispatch_all(repo)

    # Only the request that was on its way is sent again.
    assert sum(count - 1 for count in Counter(arrived(server)).values()) <= 1
    assert [number for number in range(31) if ("late", number) not in arrived(server)] == []
    check_promise(late)


def test_loops_that_fail_leave_no_file_open_for_those_that_come_after(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(HOOK))
    loops = loops_of(repo, "east", "north", "west")
    fill(loops)
    for loop in loops:
        no_telemetry_folder(loop)
    jobs = [program.make_job(program.Paths(str(repo.root)), loop.loop) for loop in loops]
    outcomes = program.run_loops(jobs, {**os.environ, **repo.env})
    assert all(isinstance(outcome, program.StorageError) for outcome in outcomes.values())
    files = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert [file for file in files if file.startswith(str(repo.root))] == []


def test_passes_that_reach_few_loops_reach_each_in_its_turn(repo: Repo, server: SinkServer) -> None:
    """A paced sink allows one request a pass."""
    config = everywhere(HOOK)
    config["sinks"][HOOK]["maxPerMinute"] = 6
    repo.write_config(config)
    loops = loops_of(repo, *"abcd")
    fill(loops, 3)
    for _ in range(5):
        dispatch_all(repo, "--time-budget", "1.2")
        time_passes(repo, 60)

    assert [loop for loop, _ in arrived(server)] == ["a", "b", "c", "d", "a"]


def test_a_rate_holds_over_loops_and_passes(repo: Repo, server: SinkServer) -> None:
    config = everywhere(HOOK)
    config["sinks"][HOOK]["maxPerMinute"] = 12
    repo.write_config(config)
    one, other = loops_of(repo, "a", "b")
    fill([one])
    dispatch_all(repo, "--time-budget", "1")
    fill([other], 3)
    dispatch_all(repo, "--time-budget", "1")

    assert arrived(server) == [("a", 0), ("b", 0)]
    check_promise(other)


# --- Asked to end


def test_a_signal_ends_all_loops_in_good_order(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    loops = loops_of(repo, *"abc")
    fill(loops, 6)
    for sink in SINK_TYPES:
        server.answer(PATHS[sink], (accepted() if sink == PAGER else ok()).after(0.1))
    process = repo.start("dispatch", "--repo", str(repo.root), "--all-loops")
    server.wait_for(8)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)

    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["loopCount"] == 3
    for loop in loops:
        check_promise(loop)
    for sink in SINK_TYPES:
        server.answer(PATHS[sink], accepted() if sink == PAGER else ok())
    assert dispatch_all(repo).json["waitingCount"] == 0
    for sink in SINK_TYPES:
        assert Counter(map(escalation_id, server.received(PATHS[sink]))).most_common(1)[0][1] == 1
        assert len(server.received(PATHS[sink])) == 18


# --- The command line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loop", "a"], "--loop ID, or --all-loops"),
        (["--escalations-file", "x"], "name none"),
        (["--dispatch-state-file", "x"], "name none"),
        (["--dispatch-telemetry-file", "x"], "name none"),
        (["--show-payload"], "--dry-run"),
    ],
)
def test_all_loops_go_with_no_loop_and_no_files(
    repo: Repo, server: SinkServer, three: list[Repo], options: list[str], words: str
) -> None:
    run = dispatch_all(repo, *options)

    assert (run.exit_code, run.stdout) == (2, "")
    assert words in run.stderr
    assert server.requests == []


def test_a_dry_run_over_all_loops_touches_nothing_and_names_each(
    repo: Repo, server: SinkServer, three: list[Repo]
) -> None:
    three[1].dispatch()
    server.forget()
    before = repo.snapshot()
    plan = dispatch_all(repo, "--dry-run").json
    text = dispatch_all(repo, "--dry-run", "--format", "text").stdout

    assert repo.snapshot() == before
    assert server.requests == []
    assert (plan["status"], plan["loopCount"]) == ("dry_run", 3)
    assert [(loop["loopId"], len(loop["escalations"])) for loop in plan["loops"]] == [
        ("a", 1),
        ("b", 0),
        ("c", 1),
    ]
    listed = [line.split()[0] for line in text.splitlines() if line.endswith(HOOK)]
    assert listed == ["a", "c"]
    dispatch_all(repo)
    assert (
        "Nothing waits: a pass would send nothing."
        in dispatch_all(repo, "--dry-run", "--format", "text").stdout
    )


def test_a_terminal_gets_a_line_for_each_loop_that_has_something_to_tell(
    repo: Repo, server: SinkServer, three: list[Repo]
) -> None:
    server.answer(PATHS[HOOK], error(422, "not this one"))
    three[1].dispatch()
    server.answer(PATHS[HOOK], ok())
    dispatch_all(repo)
    fill(three[:1])
    newer_state(three[2])
    run = repo.run_on_terminal("dispatch", "--repo", str(repo.root), "--all-loops")

    assert run.exit_code == 4
    first, _, headings, *rows = run.stdout.splitlines()
    assert "partial" in first
    assert "3 loops, 1 new" in first
    shown = re.split("  +", headings)[1:-1]
    # The last one is cut if the path in a row is long.
    assert [*shown[:-1], shown[-1][:4]] == ["STATUS", "NEW", "DELIVERED", "DEAD"], "no column of noughts"
    assert [row.split()[:2] for row in rows] == [
        ["a", "success"],
        ["b", "no_new_escalations"],
        ["c", "error"],
    ]


def test_strict_tells_of_a_failure_in_any_loop(repo: Repo, server: SinkServer, three: list[Repo]) -> None:
    server.script(PATHS[HOOK], error(422, "no"))

    run = dispatch_all(repo, "--strict")
    assert (run.exit_code, run.stderr) == (1, "")
    assert json.loads(run.stdout)["status"] == "partial"
    assert dispatch_all(repo, "--strict").exit_code == 0
    server.answer(PATHS[HOOK], error(422, "no"))
    fill(three)
    assert dispatch_all(repo).json["status"] == "failed"


@pytest.mark.parametrize("name", ["o\x1bdd", "a\r\nb", "\x1b[31mred\x1b[m", os.fsdecode(b"\xff\xfe")])
def test_a_folder_that_cannot_be_a_loop_is_named_and_stops_no_other(
    repo: Repo, server: SinkServer, name: str
) -> None:
    """Its escalations would be lost in silence otherwise. `fleet` is the host's, and a link is its loop."""
    repo.write_config(everywhere(HOOK))
    one, odd, fleet = loops_of(repo, "one", name, "fleet")
    fill([one, fleet])
    odd.append("what nobody will ever send\n")
    one.folder.with_name("current").symlink_to("one")
    for _ in range(2):
        done = dispatch_all(repo)
        summary = json.loads(done.stdout)
        assert (done.exit_code, summary["loopCount"], summary["brokenLoopCount"]) == (5, 2, 1)
        assert "no loop id" in done.stderr
        assert "\x1b" not in done.stdout + done.stderr
    assert arrived(server) == [("one", 0)]
    assert not list(one.folder.glob("*.damaged-*"))

    watched = repo.run("status", "--repo", str(repo.root), "--check")
    assert watched.exit_code == 3
    assert "no loop id" in watched.stdout


def test_a_folder_that_cannot_be_a_loop_is_not_taken_for_one_that_looks_like_it(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    loop, odd = loops_of(repo, "a b", "a\nb")
    fill([loop, odd])
    done = dispatch_all(repo)
    summary = json.loads(done.stdout)
    assert [(one["loopId"], one["status"]) for one in summary["loops"]] == [
        ("a b", "success"),
        ("a\\u000ab", "error"),
    ]
    assert (done.exit_code, summary["dispatchedCount"]) == (5, 1)
    assert arrived(server) == [("a b", 0)]


def test_a_folder_that_can_neither_be_a_loop_nor_be_read_stops_no_other(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    loop, odd = loops_of(repo, "one", "-odd")
    fill([loop, odd])
    odd.folder.chmod(0)
    try:
        done = dispatch_all(replace(repo, prepare=lose_power))
    finally:
        odd.folder.chmod(0o700)
    assert (done.exit_code, arrived(server)) == (5, [("one", 0)])
    assert "error: loop -odd: " in done.stderr


def test_a_loop_is_served_although_its_source_was_rotated_and_its_state_is_gone(
    repo: Repo, server: SinkServer
) -> None:
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_critical())
    repo.dispatch()
    repo.source.rename(f"{repo.source}.1")
    repo.state_file.unlink()
    assert repo.run("status", "--repo", str(repo.root), "--check").exit_code == 1
    server.answer(PATHS[HOOK], ok())
    server.forget()
    summary = dispatch_all(repo, "--now").json

    assert (summary["loopCount"], len(server.received(PATHS[HOOK]))) == (1, 1)


@pytest.mark.parametrize("which", ["--all-loops", "--loop"])
@pytest.mark.parametrize("left", ["no folder", "an empty folder"])
def test_what_waits_of_a_loop_whose_files_were_removed_still_arrives(
    repo: Repo, server: SinkServer, which: str, left: str
) -> None:
    config = everywhere(HOOK)
    repo.write_config(config)
    gone, other = loops_of(repo, "gone", "other")
    fill([other])
    other.dispatch()
    server.answer(PATHS[HOOK], error(503))
    fill([gone], 2)
    gone.dispatch()
    shutil.rmtree(gone.folder)
    if left == "an empty folder":
        gone.folder.mkdir()
    server.answer(PATHS[HOOK], ok())
    server.forget()
    end_waits(config, repo)

    seen = {loop["loopId"]: loop for loop in repo.run("status").json["loops"]}
    assert [sink["waitingCount"] for sink in seen["gone"]["sinks"]] == [2]
    check = repo.run("status", "--check", "--critical-after", "0")
    assert (check.exit_code, "gone: " in check.stdout) == (2, True)
    planned = {loop["loopId"]: loop for loop in dispatch_all(repo, "--dry-run").json["loops"]}
    assert len(planned["gone"]["escalations"]) == 2
    summary = dispatch_all(repo).json if which == "--all-loops" else gone.dispatch().json

    assert (summary["lateDispatchedCount"], summary["waitingCount"]) == (2, 0)
    assert sorted(arrived(server)) == [("gone", 0), ("gone", 1)]
    assert [row["sinks"][0]["status"] for row in gone.telemetry()] == ["success"] * 2


def test_dead_letters_of_a_loop_whose_folder_was_removed_can_be_sent_again(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    server.answer(PATHS[HOOK], error(400))
    fill([repo])
    repo.dispatch()
    shutil.rmtree(repo.folder)
    server.answer(PATHS[HOOK], ok())
    server.forget()

    [seen] = repo.run("status").json["loops"]
    assert (seen["health"], "1 dead letter" in seen["verdict"]) == ("warning", True)
    repo.run("redeliver", *repo.target, "--dead-letters", "--yes")
    assert arrived(server) == [(repo.loop, 0)]


def test_a_loop_whose_folder_was_removed_is_forgotten_once_nothing_of_it_waits(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    gone, other = loops_of(repo, "gone", "other")
    fill([gone, other])
    dispatch_all(repo)
    shutil.rmtree(gone.folder)

    assert [loop["loopId"] for loop in dispatch_all(repo).json["loops"]] == ["other"]
    assert [loop["loopId"] for loop in repo.run("status").json["loops"]] == ["other"]
    for name in ("gone", "never-seen"):
        loop = replace(repo, loop=name)
        summary = loop.dispatch().json
        assert (summary["status"], "loops: other" in summary["message"]) == ("no_source", True)
        assert not loop.folder.exists()


def test_a_config_that_is_invalid_is_noted_for_a_loop_whose_folder_was_removed(
    repo: Repo, server: SinkServer
) -> None:
    """Else its alerts would wait, and no monitor would know of it."""
    repo.write_config(everywhere(HOOK))
    server.answer(PATHS[HOOK], error(503))
    fill([repo])
    repo.dispatch()
    shutil.rmtree(repo.folder)
    repo.write_config("{}")

    assert dispatch_all(repo).exit_code == 3
    assert repo.state()["status"] == "config_invalid"


def test_a_loop_that_links_lead_to_is_served_once(repo: Repo, server: SinkServer, tmp_path: Path) -> None:
    """Whatever the links are called, and wherever it lies."""
    repo.write_config(everywhere(HOOK))
    [loop] = loops_of(repo, "kept")
    fill([loop])
    loop.folder.rename(tmp_path / "kept")
    for name in ("kept", "other", "-odd"):
        loop.folder.with_name(name).symlink_to(tmp_path / "kept")
    for _ in range(2):
        done = dispatch_all(repo)
        assert [one["loopId"] for one in done.json["loops"]] == ["kept"]
    assert arrived(server) == [("kept", 0)]
    assert not list(loop.folder.glob("*.damaged-*"))


def test_a_folder_in_place_of_one_state_file_does_not_hide_the_other_loops(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(HOOK))
    good, bad = loops_of(repo, "good", "bad")
    fill([good, bad])
    bad.state_file.mkdir()
    done = repo.run("status", "--repo", str(repo.root))
    assert [loop["loopId"] for loop in json.loads(done.stdout)["loops"]] == ["good"]
    assert done.exit_code == 4
    assert "loop bad" in done.stderr
    metrics = repo.run("status", "--repo", str(repo.root), "--format", "prometheus")
    assert metrics.exit_code == 0
    health = re.findall(r'^ops_alert_dispatch_health\{loop="bad"\} (\S+)$', metrics.stdout, re.MULTILINE)
    assert health == ["3"]
