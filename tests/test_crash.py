"""Passes that are killed, that are asked to end, and that overlap: nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Repo, time_passes
from crash import PER_MESSAGE, compress, crash, rotated, unpacked
from escalations import (
    CHAT,
    HOOK,
    PAGER,
    PATHS,
    escalation_id,
    everywhere,
    health_critical,
    health_degraded,
    sink_config,
)
from loopback import Answer, SinkServer, accepted, error, ok

pytestmark = pytest.mark.slow

# A pass leaves within two seconds of finding the lock held; the rest is for starting Python on a machine
# that runs many tests at once.
LEAVES_WITHIN = 2.0
START_UP = 6.0


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
    ("sinks", "loops", "kills", "seed", "quiet"),
    [(3, 3, 10, 11, False), (3, 2, 8, 2, True)],
)
def test_what_is_killed_at_random_moments_loses_nothing_and_repeats_only_what_was_in_flight(
    tmp_path: Path, sinks: int, loops: int, kills: int, seed: int, quiet: bool
) -> None:
    result = crash(tmp_path, kills=kills, sinks=sinks, loops=loops, seed=seed, quiet=quiet)

    assert not result.faults, str(result)
    assert result.kills >= kills
    assert result.lost == 0
    in_flight = {CHAT: PER_MESSAGE} if quiet else {}
    assert all(count <= result.kills * in_flight.get(sink, 1) for sink, count in result.repeats.items())
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


def by_rename_and_gzip(file: Path) -> None:
    by_rename(file)
    compress(Path(f"{file}.1"))


@pytest.mark.parametrize(
    ("rotate", "before"), [(by_rename, 0), (by_rename, 6), (by_rename_twice, 6), (by_copy, 0)]
)
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


def put_back(repo: Repo, file: str, rows: list[bytes]) -> None:
    """Let rows be on their way to a file, as a kill leaves them."""
    with contextlib.closing(sqlite3.connect(repo.queue_file)) as queue, queue:
        queue.executemany(
            "INSERT INTO outbox (loop, file, row) VALUES (1, ?, ?)", [(file, row) for row in rows]
        )


@pytest.mark.parametrize(
    ("rotate", "torn"),
    [(None, 0), (None, 40), (by_rename, 0), (by_rename_twice, 40), (by_copy, 40), (by_rename_and_gzip, 40)],
)
def test_rows_that_a_kill_has_left_on_their_way_are_written_once(
    repo: Repo, torn: int, rotate: Callable[[Path], None] | None
) -> None:
    """Some of them are in the file, of one perhaps only a part; the file may have been rotated since."""
    repo.append(*(health_critical(serial=serial) for serial in range(5)))
    repo.dispatch()
    before = repo.telemetry_file.read_bytes()
    *written, last = before.splitlines()
    repo.telemetry_file.write_bytes(before.removesuffix(last + b"\n") + last[:torn])
    put_back(repo, "telemetry", [*written[2:], last])
    if rotate is not None:
        rotate(repo.telemetry_file)

    repo.append(health_critical(serial=5))
    assert repo.dispatch().exit_code == 0

    files = (*rotated(repo.telemetry_file), repo.telemetry_file)
    found = [row for file in files for row in unpacked(file).splitlines()]
    once = [*written, last]
    assert [row for row in found if row in once] == once
    assert [row for row in found if row not in once] == [*([last[:torn]] if torn else []), found[-1]]


# --- Asked to end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_pass_in_good_order_and_the_next_one_goes_on(
    repo: Repo, server: SinkServer, number: signal.Signals
) -> None:
    repo.write_config(everywhere())
    records = [health_critical(serial=serial) for serial in range(40)]
    repo.append(*records)
    for path in PATHS.values():
        server.script(path, *[accepted() if path == PATHS[PAGER] else ok()] * 3)
    # It is not done before the signal comes, even if the machine is busy.
    slow(server, 0.5)
    process = repo.start("dispatch", *repo.target)
    server.wait_for(10)
    process.send_signal(number)
    exit_code, stdout, stderr = end_of(process)

    assert (exit_code, stderr) == (0, "")
    assert stdout.count("\n") == 1
    summary = json.loads(stdout)
    assert (summary["processedCount"], summary["failedCount"]) == (40, 0)
    assert 0 < summary["dispatchedCount"] < 40
    assert 0 < summary["waitingCount"] < 120
    slow(server, 0)
    after = repo.dispatch().json
    assert (after["processedCount"], after["waitingCount"]) == (0, 0)
    assert len(arrived(server)) == 120
    assert set(arrived(server).values()) == {1}
    assert [row["escalation"] for row in repo.telemetry() if not row.get("late")] == records


@pytest.mark.parametrize("how", ["signal", "budget"])
def test_a_delivery_on_its_way_when_a_pass_must_end_is_not_repeated(
    repo: Repo, server: SinkServer, how: str
) -> None:
    """The pager's answer is still to come when the chat has stopped."""
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
    repo.append(health_critical(serial=0))
    repo.dispatch()
    repo.append(*(health_critical(serial=serial) for serial in range(1, 40)))
    slow(server, 0.2)
    processes = [repo.start("dispatch", *repo.target)]
    server.wait_for(6)
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
    time.sleep(1)  # the rows of the other two are written
    before = repo.snapshot()
    second = repo.dispatch().json
    after = repo.snapshot()
    process.kill()
    end_of(process)

    assert second["status"] == "locked"
    assert second["processedCount"] == 0
    assert after == before


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
    status: str = json.loads(stdout)["status"]
    return status


# --- The wait of a sink


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


# --- What a kill must not cost, or give


def kill_while_hook_hangs(repo: Repo, server: SinkServer) -> None:
    server.answer(PATHS[HOOK], Answer(fault="hang"))
    process = repo.start("dispatch", *repo.target)
    server.wait_for(1, PATHS[HOOK])
    process.kill()
    end_of(process)
    server.answer(PATHS[HOOK], ok())
    server.forget()


def test_what_a_killed_pass_spent_of_a_rate_stays_spent(repo: Repo, server: SinkServer) -> None:
    config = everywhere()
    config["sinks"][HOOK]["maxPerMinute"] = 1
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    repo.append(health_critical())
    kill_while_hook_hangs(repo, server)

    assert repo.dispatch("--time-budget", "1").json["waitingCount"] == 1
    assert server.received(PATHS[HOOK]) == []
    time_passes(repo, 60)
    assert repo.dispatch().json["waitingCount"] == 0


def test_what_was_sent_and_lost_its_note_in_a_kill_is_not_given_up_for_its_age(
    repo: Repo, server: SinkServer
) -> None:
    config = everywhere(giveUpAfterSeconds=60)
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    repo.append(health_critical())
    kill_while_hook_hangs(repo, server)
    time_passes(repo, 3600)

    summary = repo.dispatch().json
    assert (summary["waitingCount"], summary["deadLetterCount"]) == (0, 0)
    assert len(server.received(PATHS[HOOK])) == 1
