"""Passes that are killed, that are asked to end, and that overlap: nothing lost, nothing doubled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo
from crash import PER_MESSAGE, crash
from escalations import CHAT, HOOK, PAGER, PATHS, escalation_id, health_critical, health_degraded, sink_config
from loopback import Answer, SinkServer, accepted, error, ok

import ops_alert_dispatch

pytestmark = pytest.mark.slow

# A pass leaves within two seconds of finding the lock held; the rest is for starting Python on a machine
# that runs many tests at once.
LEAVES_WITHIN = 2.0
START_UP = 6.0


def everywhere(**delivery: Any) -> dict[str, Any]:
    """Each record to all three sinks; no wait between passes."""
    config = sink_config(everywhere=True)
    config["delivery"] = {"backoffSeconds": {"initial": 0, "max": 0}, **delivery}
    return config


def slow(server: SinkServer, seconds: float) -> None:
    """Let every answer take some time."""
    for sink in (HOOK, CHAT):
        server.answer(PATHS[sink], ok().after(seconds))
    server.answer(PATHS[PAGER], accepted().after(seconds))


def arrived(server: SinkServer) -> Counter[tuple[str, str]]:
    """How often each delivery arrived."""
    return Counter((request.path, escalation_id(request)) for request in server.requests)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


# --- Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sinks", "kills", "seed", "quiet"), [(3, 20, 11, False), (1, 10, 12, False), (3, 15, 13, True)]
)
def test_what_is_killed_at_random_moments_loses_nothing_and_repeats_only_what_was_in_flight(
    tmp_path: Path, sinks: int, kills: int, seed: int, quiet: bool
) -> None:
    result = crash(tmp_path, kills=kills, sinks=sinks, seed=seed, quiet=quiet)

    assert not result.faults, str(result)
    assert result.kills == kills
    assert result.lost == 0
    in_flight = {CHAT: PER_MESSAGE} if quiet else {}
    assert all(count <= kills * in_flight.get(sink, 1) for sink, count in result.repeats.items())
    assert quiet == bool(result.held_back)


def test_what_was_in_flight_at_a_kill_comes_again_under_the_same_id(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    repo.append(health_critical(serial=1), health_critical(serial=2))
    slow(server, 30)
    process = repo.start("dispatch", *repo.target)
    server.wait_for(3)
    process.kill()
    assert end_of(process)[0] == -signal.SIGKILL
    slow(server, 0)

    assert repo.dispatch().json["dispatchedCount"] == 2
    assert sorted(arrived(server).values()) == [1, 1, 1, 2, 2, 2]


def by_rename(file: Path) -> None:
    """The new file is made by whoever writes to it next."""
    file.rename(f"{file}.1")


def by_rename_twice(file: Path) -> None:
    if Path(f"{file}.1").exists():
        Path(f"{file}.1").rename(f"{file}.3")
    file.rename(f"{file}.2")
    Path(f"{file}.1").touch()
    file.touch()


def by_copy(file: Path) -> None:
    """As logrotate's copytruncate does."""
    shutil.copy(file, f"{file}.1")
    os.truncate(file, 0)


@pytest.mark.parametrize("before", [0, 6])
@pytest.mark.parametrize("rotate", [by_rename, by_rename_twice, by_copy])
def test_a_telemetry_that_is_rotated_under_a_killed_pass_repeats_only_what_was_in_flight(
    repo: Repo, server: SinkServer, rotate: Callable[[Path], None], before: int
) -> None:
    config = everywhere()
    for sink in config["sinks"].values():
        sink["maxPerMinute"] = 6000
    repo.write_config(config)
    repo.append(*(health_critical(serial=n) for n in range(before)))
    repo.dispatch()
    if before:
        by_copy(repo.telemetry_file)
        by_copy(repo.attempts_file)
    server.answer(PATHS[CHAT], ok().after(0.05))
    repo.append(*(health_critical(serial=n) for n in range(before, before + 30)))
    server.forget()
    process = repo.start("dispatch", *repo.target)
    server.wait_for(10, PATHS[CHAT])
    rotate(repo.telemetry_file)
    rotate(repo.attempts_file)
    server.wait_for(13, PATHS[CHAT])
    process.kill()
    assert end_of(process)[0] == -signal.SIGKILL
    repo.dispatch()

    for path in PATHS.values():
        counts = Counter(escalation_id(request) for request in server.received(path))
        assert len(counts) == 30
        assert sum(counts.values()) <= 31


def test_what_a_killed_pass_delivered_late_has_its_late_row_all_the_same(
    repo: Repo, server: SinkServer
) -> None:
    """The pass is killed between the row of the attempt and the late row."""
    repo.write_config(everywhere())
    repo.append(health_critical(serial=1))
    server.answer("/chat", error(503))
    repo.dispatch()
    server.answer("/chat", ok())
    before = repo.telemetry_file.read_bytes()
    state = repo.state_file.read_bytes()
    repo.dispatch()
    # As if that pass had been killed once the attempt was on record.
    repo.telemetry_file.write_bytes(before)
    repo.state_file.write_bytes(state)

    repo.dispatch()
    repo.dispatch()

    assert len(server.received("/chat")) == 4
    main, late = repo.telemetry()
    assert [entry["id"] for entry in main["sinks"] if entry["status"] == "failed"] == [CHAT]
    assert late["late"] is True
    assert [(entry["id"], entry["status"]) for entry in late["sinks"]] == [(CHAT, "success")]


def test_a_dead_letter_whose_row_two_kills_have_cost_is_still_one_in_the_row(
    repo: Repo, server: SinkServer
) -> None:
    """The first kill comes between attempt and row; the second after the state was saved anew."""
    repo.write_config(everywhere())
    repo.append(health_critical(serial=1))
    repo.dispatch()
    telemetry, state = repo.telemetry_file.read_bytes(), repo.state_file.read_bytes()
    server.answer("/chat", error(400, "no"))
    repo.append(health_critical(serial=2))
    repo.dispatch()
    repo.telemetry_file.write_bytes(telemetry)
    repo.state_file.write_bytes(state)
    # A changed config has the state saved before anything is sent. A hook that hangs holds the pass there.
    repo.write_config({**everywhere(), "x-note": "changed"})
    repo.append(health_critical(serial=3))
    slow(server, 30)
    server.forget()
    process = repo.start("dispatch", *repo.target)
    server.wait_for(3)
    process.kill()
    end_of(process)
    repo.telemetry_file.write_bytes(telemetry)
    slow(server, 0)

    assert repo.dispatch().exit_code == 0

    second = repo.telemetry()[1]
    assert second["escalation"]["serial"] == 2
    (entry,) = (entry for entry in second["sinks"] if entry["id"] == CHAT)
    assert (entry["status"], entry.get("deadLetter")) == ("failed", True)


# --- Asked to end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_pass_in_good_order_and_the_next_one_goes_on(
    repo: Repo, server: SinkServer, number: signal.Signals
) -> None:
    repo.write_config(everywhere())
    records = [health_critical(serial=serial) for serial in range(40)]
    repo.append(*records)
    slow(server, 0.05)
    process = repo.start("dispatch", *repo.target)
    server.wait_for(10)
    process.send_signal(number)
    exit_code, stdout, stderr = end_of(process)

    assert (exit_code, stderr) == (0, "")
    assert stdout.count("\n") == 1
    assert 0 < repo.state()["processedCount"] < 40
    slow(server, 0)
    after = repo.dispatch().json
    assert after["processedCount"] + repo.telemetry().index(repo.telemetry()[-1]) + 1 >= 40
    assert after["waitingCount"] == 0
    assert len(arrived(server)) == 120
    assert set(arrived(server).values()) == {1}
    assert [row["escalation"] for row in repo.telemetry() if not row.get("late")] == records


@pytest.mark.parametrize("how", ["signal", "budget"])
def test_a_delivery_on_its_way_when_a_pass_must_end_is_not_repeated(
    repo: Repo, server: SinkServer, how: str
) -> None:
    """The lane of the pager is ahead, with its answer still to come, when the chat's lane stops."""
    config = everywhere()
    config["routing"]["routes"] = [{"category": "health_degraded", "sinks": [CHAT]}]
    config["routing"]["defaultSinks"] = [PAGER]
    repo.write_config(config)
    repo.append(*(health_degraded(serial=serial) for serial in range(40)), health_critical(serial=40))
    slow(server, 0.1)
    server.answer(PATHS[PAGER], accepted().after(2.0))
    process = repo.start("dispatch", *repo.target, *(["--time-budget", "1"] if how == "budget" else []))
    server.wait_for(1, "/pager")
    server.wait_for(3, "/chat")
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 0
    slow(server, 0)

    assert repo.dispatch().exit_code == 0

    assert len(arrived(server)) == 41
    assert set(arrived(server).values()) == {1}
    rows = repo.telemetry()
    assert sorted(row["escalation"]["serial"] for row in rows if not row.get("late")) == list(range(41))


# --- Side by side


def test_of_five_passes_at_once_one_works_and_the_others_leave(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    repo.append(*(health_critical(serial=serial) for serial in range(40)))
    slow(server, 0.2)
    processes = [repo.start("dispatch", *repo.target)]
    server.wait_for(3)
    before = repo.state_file.read_bytes()
    began = time.monotonic()
    processes += [repo.start("dispatch", *repo.target) for _ in range(4)]
    found = [end_of(process) for process in processes[1:]]
    took = time.monotonic() - began

    assert took < LEAVES_WITHIN + START_UP
    assert processes[0].poll() is None, "the pass that works ended too early for this test to say anything"
    assert {(exit_code, stderr) for exit_code, _, stderr in found} == {(0, "")}
    assert [status_of(stdout) for _, stdout, _ in found] == ["locked"] * 4
    assert repo.state_file.read_bytes() == before
    slow(server, 0)
    assert status_of(end_of(processes[0])[1]) == "success"
    assert len(arrived(server)) == 120
    assert set(arrived(server).values()) == {1}


def test_five_passes_that_start_together_send_everything_once(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    repo.append(*(health_critical(serial=serial) for serial in range(30)))
    slow(server, 0.02)
    found = [end_of(process) for process in [repo.start("dispatch", *repo.target) for _ in range(5)]]

    assert {(exit_code, stderr) for exit_code, _, stderr in found} == {(0, "")}
    statuses = Counter(status_of(stdout) for _, stdout, _ in found)
    assert statuses["success"] == 1
    assert set(statuses) <= {"success", "locked", "no_new_escalations"}
    assert len(arrived(server)) == 90
    assert set(arrived(server).values()) == {1}


def test_a_pass_that_found_the_lock_held_has_touched_nothing(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical())
    repo.dispatch()
    repo.append(health_critical(serial=2))
    server.answer("/hook", Answer(fault="hang"))
    process = repo.start("dispatch", *repo.target)
    server.wait_for(2, "/hook")
    server.wait_for(2, "/chat")
    server.wait_for(2, "/pager")
    time.sleep(0.3)  # the rows of the other two are written
    before = repo.snapshot()
    second = repo.dispatch().json
    after = repo.snapshot()
    process.kill()
    end_of(process)

    assert second["status"] == "locked"
    assert second["processedCount"] == 0
    assert after == before


def test_a_lock_file_that_is_removed_as_a_pass_begins_does_not_look_like_its_own(repo: Repo) -> None:
    repo.append(health_critical())
    job = ops_alert_dispatch.make_job(str(repo.root), repo.loop)
    with ops_alert_dispatch.loop_lock(job.lock_file) as lock:
        Path(job.lock_file).unlink()
        with ops_alert_dispatch.loop_lock(job.lock_file) as other:
            assert lock != other
            state = ops_alert_dispatch.State()
            source = state.open_source(job.escalations_file)
            redactor = ops_alert_dispatch.Redactor()
            first = ops_alert_dispatch.Ledger(job, state, source, redactor, lock=lock)
            second = ops_alert_dispatch.Ledger(job, state, source, redactor, lock=other)
            with pytest.raises(ops_alert_dispatch.StorageError):
                first.check_lock()
            second.check_lock()


def test_a_lock_left_by_a_killed_pass_does_not_count(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical())
    server.answer("/hook", Answer(fault="hang"))
    process = repo.start("dispatch", *repo.target)
    server.wait_for(1, "/hook")
    process.kill()
    end_of(process)
    assert list(repo.folder.glob("*.lock"))
    server.answer("/hook", ok())

    assert repo.dispatch().json["status"] == "success"


def status_of(stdout: str) -> str:
    import json

    status: str = json.loads(stdout)["status"]
    return status


# --- The wait of a lane


@pytest.mark.parametrize("answer", [error(503), Answer(fault="hang_up")])
def test_a_backoff_is_never_slept_through_within_a_pass(
    repo: Repo, server: SinkServer, answer: Answer
) -> None:
    """However short the draw came out: waiting is for the time between passes."""
    config = sink_config(everywhere=True)
    config["delivery"] = {"backoffSeconds": {"initial": 0.001, "max": 0.001}}
    repo.write_config(config)
    repo.append(health_critical())
    server.answer("/hook", answer)

    assert repo.dispatch().json["status"] == "partial"
    assert len(server.received("/hook")) == (3 if answer.status == 503 else 1)
