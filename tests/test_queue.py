"""What the queue is there for: an escalation that was ingested is delivered, whatever becomes of the files,
and what one pass has learned of a destination holds for all of them."""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import Repo, Run, edit_queue, queue_rows, time_passes
from escalations import (
    CHAT,
    HOOK,
    MARK,
    PATHS,
    batch,
    escalation_ids,
    health_critical,
    health_degraded,
    only,
    sink_config,
)
from loopback import SinkServer, error, hang, ok, rate_limited
from promise import check_promise
from tools import in_ci
from zygote import have_three_threads

from ops_alert_dispatch import FILES_BESIDES, FILES_OF_A_LOOP


def loops_of(repo: Repo, count: int) -> list[Repo]:
    return [Repo(repo.root, repo.env, f"loop-{number:02d}") for number in range(count)]


def all_at_once(loops: list[Repo], *options: str) -> list[Run]:
    with ThreadPoolExecutor(len(loops)) as pool:
        return list(pool.map(lambda loop: loop.dispatch(*options), loops))


def numbers(server: SinkServer, sink: str = HOOK) -> list[int]:
    return [request.json["escalation"]["number"] for request in server.received(PATHS[sink])]


# --- 1: the source, once ingested, is not needed


def gzip_away(source: Path) -> None:
    source.with_suffix(".jsonl.1.gz").write_bytes(gzip.compress(source.read_bytes(), mtime=0))
    source.unlink()


def edit(source: Path) -> None:
    source.write_text(source.read_text().replace("health", "wealth"))


FATES: dict[str, Callable[[Path], None]] = {
    "removed": Path.unlink,
    "truncated": lambda source: os.truncate(source, 0),
    "cut short": lambda source: os.truncate(source, 100),
    "compressed": gzip_away,
    "edited": edit,
}


@pytest.mark.parametrize("fate", FATES)
def test_what_waits_for_a_sink_that_is_down_survives_its_source_and_is_delivered_once(
    repo: Repo, server: SinkServer, fate: str
) -> None:
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], error(503))
    repo.append(*(health_degraded(number=number) for number in range(5)))
    assert repo.dispatch().json["waitingCount"] == 5
    FATES[fate](repo.source)
    repo.dispatch()
    server.answer(PATHS[HOOK], ok())
    server.forget()
    done = repo.dispatch().json

    assert (done["waitingCount"], done["deadLetterCount"]) == (0, 0)
    # What an edited file holds is new.
    received = [request.json["escalation"] for request in server.received(PATHS[HOOK])]
    assert [record["number"] for record in received if record["category"] == "health_degraded"] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert len(received) == (10 if fate == "edited" else 5)
    server.forget()
    repo.dispatch()
    assert server.requests == []


# --- 3: the worst first, and loops by turns


def test_a_critical_escalation_does_not_wait_behind_a_backlog_of_lesser_ones(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(only(HOOK, maxPerMinute=30))
    repo.append(*(health_degraded(number=number) for number in range(20)))
    first = repo.dispatch("--time-budget", "0.5").json
    assert (first["status"], first["failedCount"]) == ("success", 0)
    sent = len(numbers(server))
    assert first["waitingCount"] == 20 - sent > 0
    time_passes(repo, 8)
    repo.append(health_critical(number=99), health_degraded(number=20))
    repo.dispatch("--time-budget", "0.5")

    assert numbers(server)[sent] == 99
    assert numbers(server)[sent + 1 :] == [*range(sent, len(numbers(server)) - 1)], "then the oldest"
    check_promise(repo)


def test_the_backlog_of_one_loop_does_not_keep_another_loop_waiting(repo: Repo, server: SinkServer) -> None:
    repo.write_config(only(HOOK, maxPerMinute=6000))
    loud, quiet = loops_of(repo, 2)
    loud.append(*(health_degraded(number=number) for number in range(60)))
    quiet.append(*(health_degraded(number=number) for number in range(100, 103)))
    run = repo.run("dispatch", "--repo", str(repo.root), "--all-loops")

    assert run.exit_code == 0
    order = numbers(server)
    assert len(order) == 63
    assert max(order.index(number) for number in (100, 101, 102)) < 12
    for loop in (loud, quiet):
        check_promise(loop)


# --- 4: one rate, and no quarrel about the queue


def test_the_rate_of_a_destination_holds_over_the_passes_of_all_loops(repo: Repo, server: SinkServer) -> None:
    repo.write_config(only(CHAT, maxPerMinute=60))
    loops = loops_of(repo, 6)
    for loop in loops:
        loop.append(*batch(10))
    started = time.monotonic()
    for loop in loops[:3]:
        loop.dispatch("--time-budget", "0.5")
    for run in all_at_once(loops, "--time-budget", "1.5"):
        assert run.json["failedCount"] == 0
    seconds = time.monotonic() - started

    # A sixth of 60 at once, then less than one a second.
    assert 10 <= len(server.received(PATHS[CHAT])) <= 10 + seconds + 1
    for loop in loops:
        check_promise(loop)


def test_twenty_passes_that_start_at_once_deliver_each_escalation_once(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(only(HOOK))
    loops = loops_of(repo, 20)
    for number, loop in enumerate(loops):
        loop.append(*(health_degraded(number=100 * number + index) for index in range(5)))
    runs = all_at_once(loops)

    assert [(run.exit_code, run.stderr) for run in runs] == [(0, "")] * 20
    assert [run.json["waitingCount"] for run in runs] == [0] * 20
    assert sorted(numbers(server)) == sorted(
        100 * number + index for number in range(20) for index in range(5)
    )
    for loop in loops:
        check_promise(loop)


# --- 5: a failure is found out once


DOWN = {"hangs": hang(), "fails": error(503), "refuses": error(401)}


@pytest.mark.parametrize("how", DOWN)
@pytest.mark.parametrize("together", [False, True], ids=["one after the other", "at once"])
def test_that_a_destination_is_down_is_found_out_once_for_the_passes_of_six_loops(
    repo: Repo, server: SinkServer, how: str, together: bool
) -> None:
    config = only(HOOK, timeoutSeconds=2)
    config["delivery"] = {"maxAttemptsPerPass": 1, "backoffSeconds": {"initial": 600, "max": 600}}
    repo.write_config(config)
    server.answer(PATHS[HOOK], DOWN[how])
    loops = loops_of(repo, 6)
    for loop in loops:
        loop.append(*batch(3))
    started = time.monotonic()
    if together:
        runs = all_at_once(loops)
    else:
        # Jitter may take nearly all of a wait.
        runs = [loops[0].dispatch()]
        edit_queue(repo, f"UPDATE destinations SET next_attempt_at = {time.time() + 300}")
        runs += [loop.dispatch() for loop in loops[1:]]

    assert time.monotonic() - started < 12
    assert [run.json["waitingCount"] for run in runs] == [3] * 6
    assert [run.json["failedCount"] for run in runs] == [3] * 6
    # One more, where jitter has made the wait a moment.
    assert len(server.received(PATHS[HOOK])) <= (2 if together else 1)
    for loop in loops:
        check_promise(loop)


def test_a_pass_does_not_wait_for_a_hanging_sink_to_which_its_loop_sends_nothing(
    repo: Repo, server: SinkServer
) -> None:
    config = only(HOOK, timeoutSeconds=30)
    config["sinks"][CHAT] = sink_config()["sinks"][CHAT]
    config["routing"]["routes"] = [{"category": "quick", "sinks": [CHAT]}]
    repo.write_config(config)
    server.answer(PATHS[HOOK], hang())
    slow, quick = loops_of(repo, 2)
    slow.append(health_critical())
    quick.append(health_critical(category="quick"))
    process = slow.start("dispatch", *slow.target)
    try:
        server.wait_for(1, PATHS[HOOK])
        assert quick.dispatch("--time-budget", "60").json["status"] == "success"
        assert process.poll() is None, "the other pass is still waiting for its sink"
    finally:
        process.kill()
        process.communicate()


def test_the_queue_gives_back_the_room_of_what_it_no_longer_keeps(repo: Repo) -> None:
    """It would stay as large as the worst backlog that there ever was."""
    repo.write_config(only(HOOK))
    repo.append(*(health_critical(number=number, filler="x" * 20_000) for number in range(50)))
    repo.dispatch()
    assert repo.queue_file.stat().st_size > 1_000_000
    time_passes(repo, 8 * 86_400)
    repo.append(health_critical(number=50))
    repo.dispatch()

    assert repo.queue_file.stat().st_size < 200_000


def test_the_log_of_the_queue_does_not_grow_with_the_backlog(repo: Repo, server: SinkServer) -> None:
    """It fills the disk: 3 KB for each escalation, and its record."""
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], error(503))
    repo.append(*(health_critical(number=number, note="x" * 8_000) for number in range(2_000)))
    log = repo.queue_file.with_name("alert-queue.db-wal")
    largest = 0
    process = repo.start("dispatch", *repo.target)
    try:
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, log.stat().st_size)
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()

    assert repo.state()["waitingCount"] == 2_000
    assert 0 < largest < 32 << 20


def test_two_passes_of_one_loop_with_state_files_of_their_own_send_each_escalation_once(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], ok().after(0.1))
    repo.append(*(health_critical(number=number) for number in range(10)))
    process = repo.start("dispatch", *repo.target)
    try:
        server.wait_for(1, PATHS[HOOK])
        other = repo.dispatch("--dispatch-state-file", str(repo.root / "another.json"))
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert (other.exit_code, other.json["status"]) == (0, "locked")
    assert sorted(numbers(server)) == list(range(10))


@pytest.mark.parametrize("kind", ["text", "database"])
def test_a_file_of_somebody_else_is_not_made_a_queue(
    repo: Repo, server: SinkServer, tmp_path: Path, kind: str
) -> None:
    mine = tmp_path / "mine"
    if kind == "text":
        mine.write_text("precious")
    else:
        with contextlib.closing(sqlite3.connect(mine)) as database, database:
            database.execute("CREATE TABLE customers (name TEXT)")
    before = mine.read_bytes()
    repo.append(health_critical())
    for _ in range(2):
        run = repo.dispatch("--queue-file", str(mine))
        assert (run.exit_code, "is not a queue of this program" in run.stderr) == (4, True)

    assert mine.read_bytes() == before
    assert server.requests == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_passes_that_name_two_queues_in_turn_send_nothing_twice(
    repo: Repo, server: SinkServer, tmp_path: Path, how: str
) -> None:
    repo.write_config(only(HOOK))
    other = tmp_path / "fast" / "queue.db"
    options = ["--queue-file", str(other)] if how == "option" else []
    env = {} if how == "option" else {"OPS_MANAGER_ALERT_QUEUE_FILE": str(other)}
    for number in range(3):
        repo.append(health_critical(number=number))
        assert repo.dispatch().json["status"] == "success"
        for command in ("dispatch", "skip"):
            sink = ["--sink", HOOK, "--yes"] if command == "skip" else []
            refused = repo.run(command, *repo.target, *sink, *options, env=env)
            assert refused.exit_code == 4
            assert f"uses the queue {repo.queue_file}, not {other}: " in refused.stderr
            assert f"`mv {repo.queue_file} {other}`" in refused.stderr
        planned = repo.dispatch("--dry-run", *options, env=env)
        assert (planned.exit_code, str(other) in planned.stderr) == (4, True)
        assert not other.exists()
        [seen] = repo.run("status").json["loops"]
        assert (seen["health"], "uses the queue" in seen["verdict"]) == ("warning", True)

    assert numbers(server) == [0, 1, 2]
    assert repo.dispatch().json["status"] == "no_new_escalations"
    [seen] = repo.run("status").json["loops"]
    assert seen["health"] == "ok"


def test_a_queue_that_was_moved_sends_what_waits_in_it_and_loses_nothing(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(only(HOOK))
    repo.append(health_critical(number=0))
    repo.dispatch()
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_critical(number=1))
    repo.dispatch()
    server.answer(PATHS[HOOK], ok())
    server.forget()
    other = tmp_path / "queue.db"
    repo.queue_file.rename(other)
    repo.append(health_critical(number=2))
    summary = repo.dispatch("--now", "--queue-file", str(other)).json

    assert (summary["lateDispatchedCount"], summary["dispatchedCount"]) == (1, 1)
    assert sorted(numbers(server)) == [1, 2]
    assert "queue_lost" not in {row.get("reasonCode") for row in repo.telemetry()}


def test_a_queue_that_comes_back_sends_nothing_again_that_another_one_has_sent(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    """What waits in the other one is lost with it, and reported."""
    repo.write_config(only(HOOK))
    repo.append(health_critical(number=0))
    repo.dispatch()
    aside, other = tmp_path / "aside.db", tmp_path / "queue.db"
    repo.queue_file.rename(aside)
    repo.append(health_critical(number=1))
    repo.dispatch("--queue-file", str(other))
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_critical(number=2))
    repo.dispatch("--queue-file", str(other))
    aside.rename(repo.queue_file)
    server.answer(PATHS[HOOK], ok())
    server.forget()
    repo.append(health_critical(number=3))

    refused = repo.dispatch("--now")
    assert (refused.exit_code, f"move {other} away" in refused.stderr) == (4, True)
    seen = repo.run("status", *repo.target)
    assert (seen.exit_code, f"move {other} away" in seen.stderr) == (4, True)
    assert numbers(server) == []
    other.unlink()
    repo.dispatch("--now")

    assert numbers(server) == [3]
    [lost] = [row for row in repo.telemetry() if row.get("reasonCode") == "queue_lost"]
    assert (lost["droppedCount"], "--from-line 3" in lost["message"]) == (1, True)


def test_what_waits_in_a_queue_that_is_put_back_goes_out_with_the_next_pass(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    """As `status` advises, and after a pass that found it gone."""
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_critical(number=0))
    repo.dispatch()
    aside = tmp_path / "aside.db"
    repo.queue_file.rename(aside)
    server.answer(PATHS[HOOK], ok())
    repo.dispatch()
    server.forget()
    aside.rename(repo.queue_file)
    repo.dispatch()

    assert numbers(server) == [0]


def test_a_queue_that_a_pass_is_making_is_not_called_damaged(repo: Repo, server: SinkServer) -> None:
    repo.write_config(only(HOOK))
    repo.append(health_critical())
    with contextlib.closing(sqlite3.connect(repo.queue_file)) as queue:
        queue.execute("PRAGMA journal_mode = WAL")
    for command in ("status", "log"):
        run = repo.run(command, *repo.target)
        assert (run.exit_code, "damaged" in run.stdout + run.stderr) == (0, False)
    repo.dispatch()

    assert len(server.requests) == 1


def test_a_limit_of_threads_costs_no_sink_its_alerts_and_repeats_none(repo: Repo, server: SinkServer) -> None:
    """As TasksMax of a unit sets it, or the pids of a container."""
    if os.geteuid() != 0:
        assert not in_ci(), "CI runs as root"
        pytest.skip("only root can become another user")
    names = [f"sink-{number}" for number in range(6)]
    config = only(HOOK)
    config["sinks"] = {
        name: {"enabled": True, "type": "webhook", "urlEnv": f"URL_{name[-1]}"} for name in names
    }
    config["routing"]["defaultSinks"] = names
    repo.write_config(config)
    repo.env |= {f"URL_{name[-1]}": f"{server.url}/{name}" for name in names}
    server.answer("/", ok().after(0.2))
    repo.append(health_critical(number=0), health_critical(number=1))
    summary = replace(repo, prepare=have_three_threads).dispatch().json

    assert (summary["status"], summary["waitingCount"]) == ("success", 0)
    assert sorted(request.path for request in server.requests) == sorted(f"/{name}" for name in names * 2)


def test_a_copy_of_a_repo_and_a_link_to_one_have_no_wrong_queue(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(only(HOOK))
    repo.append(health_critical(number=0))
    repo.dispatch()
    copy, link = (replace(repo, root=tmp_path / name) for name in ("copy", "link"))
    shutil.copytree(repo.root, copy.root)
    link.root.symlink_to(repo.root)
    for number, place in ((1, link), (2, copy)):
        place.append(health_critical(number=number))
        assert place.dispatch().json["status"] == "success"

    assert numbers(server) == [0, 1, 2]


def test_two_repos_do_not_share_a_queue_in_which_their_loops_would_be_one(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(only(HOOK))
    other = Repo(tmp_path / "other", repo.env)
    other.root.mkdir()
    other.write_config(only(HOOK))
    for place in (repo, other):
        place.env["OPS_MANAGER_ALERT_QUEUE_FILE"] = str(tmp_path / "shared.db")
        place.append(health_critical())
    assert repo.dispatch().exit_code == 0
    refused = other.dispatch()
    assert (refused.exit_code, len(server.requests)) == (4, 1)
    assert f"belongs to the repo {repo.root}" in refused.stderr
    for command in ("status", "log"):
        assert other.run(command, *other.target).exit_code == 4
    moved = tmp_path / "moved"
    repo.root.rename(moved)
    server.forget()
    assert Repo(moved, repo.env).dispatch().json["status"] == "no_new_escalations"
    assert server.requests == []


def test_no_loop_of_a_long_run_gets_into_the_queue_of_another_repo(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(only(HOOK))
    repo.env["OPS_MANAGER_ALERT_QUEUE_FILE"] = str(tmp_path / "shared.db")
    repo.append(health_critical())
    repo.dispatch()
    few = FILES_BESIDES + FILES_OF_A_LOOP  # one loop at a time
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (few, few))
    other = Repo(tmp_path / "other", repo.env, prepare=limit)
    other.root.mkdir()
    other.write_config(only(HOOK))
    for loop in loops_of(other, 3):
        loop.append(health_critical())
    refused = other.run("dispatch", "--repo", str(other.root), "--all-loops")

    assert (refused.exit_code, len(server.requests)) == (4, 1)
    assert refused.stderr.count(f"belongs to the repo {repo.root}") == 3


def test_a_loss_cannot_be_acknowledged_from_another_repo_before_its_own_people_have_seen_it(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(only(HOOK))
    repo.env["OPS_MANAGER_ALERT_QUEUE_FILE"] = str(tmp_path / "shared.db")
    repo.append(health_critical())
    server.answer(PATHS[HOOK], error(400))
    assert repo.dispatch().json["deadLetterCount"] == 1
    config = only(HOOK)
    config["sinks"]["renamed"] = config["sinks"].pop(HOOK)
    config["routing"]["defaultSinks"] = ["renamed"]
    repo.write_config(config)
    repo.dispatch()
    other = Repo(tmp_path / "other", repo.env)
    other.root.mkdir()
    assert other.run("status", *other.target, "--ack").exit_code == 4

    verdict = repo.run("status", *repo.target).json["verdict"]
    assert "sink_removed" in verdict


@pytest.mark.parametrize("name", ["queue.db", "n" * 300])
def test_a_queue_that_cannot_be_looked_at_is_named_and_not_taken_for_an_output_that_fails(
    repo: Repo, tmp_path: Path, name: str
) -> None:
    queue = tmp_path / name
    if name == "queue.db":
        queue.symlink_to(queue)
    repo.append(health_critical())
    run = repo.dispatch("--queue-file", str(queue))

    assert run.exit_code == 5
    assert run.stderr.startswith(f"error: cannot open {queue}: ")


@pytest.mark.parametrize("change", ["url", "secret"])
def test_a_changed_url_or_secret_is_tried_at_once(repo: Repo, server: SinkServer, change: str) -> None:
    repo.write_config(only(HOOK, delivery={"backoffSeconds": {"initial": 900, "max": 900}}))
    server.answer(PATHS[HOOK], error(401))
    first, second = loops_of(repo, 2)
    first.append(health_critical(number=1))
    second.append(health_critical(number=2))
    assert first.dispatch().json["waitingCount"] == 1
    assert second.dispatch().json["waitingCount"] == 1
    assert len(server.received(PATHS[HOOK])) == 1
    server.answer(PATHS[HOOK], ok())
    server.forget()
    if change == "url":
        repo.env["ALERT_HOOK_URL"] = f"{server.url}{PATHS[HOOK]}/other"
    else:
        repo.env["ALERT_HOOK_TOKEN"] = f"another-token-{MARK}"

    assert first.dispatch().json["waitingCount"] == 0
    assert second.dispatch().json["waitingCount"] == 0
    assert sorted(numbers(server)) == [1, 2]


# --- 6: output is output, and a lost queue is reported


def test_nothing_is_sent_again_when_telemetry_and_summary_are_deleted(repo: Repo, server: SinkServer) -> None:
    repo.write_config(only(HOOK))
    repo.append(*(health_degraded(number=number) for number in range(4)))
    repo.dispatch()
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_degraded(number=4))
    repo.dispatch()
    for file in (repo.telemetry_file, repo.attempts_file, repo.state_file):
        file.unlink()
    server.forget()
    server.answer(PATHS[HOOK], ok())
    repo.append(health_degraded(number=5))
    done = repo.dispatch().json

    assert sorted(numbers(server)) == [4, 5]
    assert (done["processedCount"], done["lateDispatchedCount"], done["waitingCount"]) == (1, 1, 0)


def damage(queue: Path) -> None:
    queue.write_bytes(b"no database " * 500)


def damage_pages(queue: Path) -> None:
    """Leave the head, so that it opens."""
    size = queue.stat().st_size
    with queue.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))


LOSSES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "damaged": damage,
    "emptied": lambda queue: os.truncate(queue, 0),
    "damaged inside": damage_pages,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_queue_repeats_nothing_and_what_waited_is_reported_with_the_command_that_sends_it(
    repo: Repo, server: SinkServer, loss: str
) -> None:
    repo.write_config(only(HOOK, delivery={"maxAttemptsPerPass": 1}))
    repo.append(*(health_degraded(number=number) for number in range(3)))
    repo.dispatch()
    server.answer(PATHS[HOOK], error(503))
    repo.append(*(health_degraded(number=number) for number in range(3, 7)))
    repo.dispatch()
    LOSSES[loss](repo.queue_file)
    server.answer(PATHS[HOOK], ok())
    server.forget()
    repo.append(health_degraded(number=7))
    run = repo.dispatch()

    assert (run.exit_code, run.stderr) == (0, "")
    assert numbers(server) == [7]
    [row] = [row for row in repo.telemetry() if row.get("reasonCode") == "queue_lost"]
    assert (row["status"], row["droppedCount"]) == ("failed", 4)
    assert "redeliver" in row["message"]
    assert "--from-line 4" in row["message"]
    check_promise(repo)
    server.forget()
    repo.dispatch()
    assert server.requests == []
    assert [row.get("reasonCode") for row in repo.telemetry()].count("queue_lost") == 1
    # A second loss takes nothing from what is known of the first one.
    repo.queue_file.unlink()
    repo.dispatch()
    assert "queue_lost" in repo.run("status", *repo.target).json["verdict"]
    kept = list(repo.queue_file.parent.glob("alert-queue.db.damaged-*"))
    assert len(kept) == (1 if "damaged" in loss else 0), "a damaged one is kept aside"


@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_a_lost_queue_of_a_loop_for_which_nothing_waits_repeats_nothing(
    repo: Repo, server: SinkServer, loss: str
) -> None:
    repo.write_config(only(HOOK))
    repo.append(*(health_degraded(number=number) for number in range(3)))
    repo.dispatch()
    LOSSES[loss](repo.queue_file)
    server.forget()
    for number in (7, 8):
        repo.append(health_degraded(number=number))
        assert repo.dispatch().exit_code == 0

    assert numbers(server) == [7, 8]
    check_promise(repo)


@pytest.mark.parametrize("place", ["deliveries", "waiting", "tallies", "outbox", "hours", "last_sent"])
def test_a_queue_of_which_one_page_is_damaged_is_replaced_and_stops_no_loop(
    repo: Repo, server: SinkServer, place: str
) -> None:
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_degraded(number=0))
    repo.dispatch()
    [[page]] = queue_rows(repo, "SELECT rootpage FROM sqlite_schema WHERE name = ?", place)
    [[size]] = queue_rows(repo, "PRAGMA page_size")
    with repo.queue_file.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)
    server.answer(PATHS[HOOK], ok())
    server.forget()
    for number in (1, 2):
        repo.append(health_degraded(number=number))
        run = repo.dispatch("--now")
        assert (run.exit_code, run.stderr) == (0, "")

    assert sorted(set(numbers(server)) - {0}) == [1, 2]
    # As after a kill, what was in flight when the damage was found may be repeated.
    assert len(numbers(server)) - len(set(numbers(server))) <= 1
    assert repo.run("skip", *repo.target, "--sink", HOOK, "--yes").exit_code == 0
    assert len(list(repo.queue_file.parent.glob("alert-queue.db.damaged-*"))) == 1


@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_dead_letters_that_were_in_a_lost_queue_are_reported(
    repo: Repo, server: SinkServer, loss: str
) -> None:
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], error(400))
    repo.append(*(health_degraded(number=number) for number in range(3)))
    repo.dispatch()
    LOSSES[loss](repo.queue_file)
    server.answer(PATHS[HOOK], ok())
    repo.append(health_degraded(number=7))
    repo.dispatch()

    [row] = [row for row in repo.telemetry() if row.get("reasonCode") == "queue_lost"]
    assert (row["status"], row["droppedCount"]) == ("failed", 3)
    assert "3 dead letters" in row["message"]
    assert str(repo.telemetry_file) in row["message"]


def test_the_command_for_a_lost_queue_does_not_name_lines_of_another_file(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(only(HOOK))
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_degraded(number=0))
    repo.dispatch()
    repo.source.rename(f"{repo.source}.1")
    repo.append(*(health_degraded(number=number) for number in (1, 2)))
    repo.dispatch()
    repo.queue_file.unlink()
    repo.dispatch()

    [row] = [row for row in repo.telemetry() if row.get("reasonCode") == "queue_lost"]
    assert "it is in a rotated file" in row["message"]
    assert "--from-line" not in row["message"]


@pytest.mark.parametrize("summary", ["of an earlier pass", "none"])
def test_what_waited_is_reported_if_a_pass_is_killed_before_its_summary_and_the_queue_is_lost(
    repo: Repo, server: SinkServer, summary: str
) -> None:
    repo.write_config(only(HOOK))
    repo.append(health_degraded(number=0))
    repo.dispatch()
    before = repo.state_file.read_bytes()
    server.answer(PATHS[HOOK], error(503))
    repo.append(*(health_degraded(number=number) for number in (1, 2)))
    repo.dispatch()
    if summary == "none":
        repo.state_file.unlink()
    else:
        repo.state_file.write_bytes(before)
    repo.queue_file.unlink()
    server.answer(PATHS[HOOK], ok())
    server.forget()
    repo.dispatch()

    [row] = [row for row in repo.telemetry() if row.get("reasonCode") == "queue_lost"]
    assert row["droppedCount"] == 2
    assert f"--from-line 2 --sink {HOOK}" in row["message"]
    assert server.requests == []


def test_a_queue_and_a_summary_that_are_both_lost_repeat_nothing(repo: Repo, server: SinkServer) -> None:
    repo.write_config(only(HOOK))
    repo.append(*(health_degraded(number=number) for number in range(3)))
    repo.dispatch()
    repo.queue_file.unlink()
    repo.state_file.unlink()
    server.forget()
    repo.append(health_degraded(number=7))
    repo.dispatch()

    assert numbers(server) == [7]


# --- 8: a record that its sink cannot take


@pytest.mark.parametrize(("tries", "poison"), [(3, 1), (1, 3)])
def test_records_that_their_sink_always_answers_with_500_block_the_others_for_five_attempts_each_at_most(
    repo: Repo, server: SinkServer, tries: int, poison: int
) -> None:
    backoff = {"initial": 60, "max": 60}
    repo.write_config(only(HOOK, delivery={"maxAttemptsPerPass": tries, "backoffSeconds": backoff}))
    server.answer(
        PATHS[HOOK], lambda request: error(500) if request.json["escalation"]["number"] < poison else ok()
    )
    repo.append(*(health_degraded(number=number) for number in range(10)))
    for _ in range(5 * poison + 1):
        repo.dispatch()
        time_passes(repo, 60)

    received = numbers(server)
    assert [number for number in received if number >= poison] == [*range(poison, 10)]
    # In between, those that have had their five have one more now and then: the sink may be well again.
    assert received.index(poison) <= (5 if poison == 1 else 10 * poison)
    assert repo.state()["waitingCount"] == poison
    check_promise(repo)


def test_a_record_for_which_its_sink_asks_for_no_wait_blocks_the_others_no_longer_than_any(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(only(HOOK))
    server.answer(
        PATHS[HOOK],
        lambda request: rate_limited(0, 503) if request.json["escalation"]["number"] == 0 else ok(),
    )
    repo.append(*(health_degraded(number=number) for number in range(3)))
    for _ in range(3):
        repo.dispatch()

    assert numbers(server)[:7] == [0, 0, 0, 0, 0, 1, 2]


def test_a_digest_that_fails_five_times_is_sent_one_by_one(repo: Repo, server: SinkServer) -> None:
    repo.write_config(only(CHAT, maxPerMessage=10, delivery={"maxAttemptsPerPass": 1}))
    server.answer(PATHS[CHAT], lambda request: error(500) if "poison" in request.body.decode() else ok())
    records = [health_degraded(number=number, reasonCodes=["fine"], reasons=[]) for number in range(6)]
    records[2] = health_degraded(number=2, reasonCodes=["poison"], reasons=[])
    repo.append(*records)
    for _ in range(7):
        repo.dispatch()
        time_passes(repo, 1)

    rows = [row for row in repo.telemetry() if "late" not in row]
    delivered = Counter(row["escalationId"] for row in repo.attempts() if row["outcome"] == "delivered")
    assert delivered == Counter(row["escalationId"] for index, row in enumerate(rows) if index != 2)
    sizes = [len(escalation_ids(request)) for request in server.received(PATHS[CHAT])]
    assert sizes[:6] == [6, 6, 6, 6, 6, 1]
    assert repo.state()["waitingCount"] == 1
    check_promise(repo)
