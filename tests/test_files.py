"""What happens to the files: the source, the state, and the disk under them."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo, Run, edit_queue
from escalations import (
    HOOK,
    PAGER,
    PATHS,
    divergence_detected,
    everywhere,
    health_critical,
    line,
    only,
    sink_config,
)
from loopback import Answer, Behaviour, Received, SinkServer, error, ok
from promise import check_promise
from tools import in_ci, needs_tool
from zygote import lose_power

from ops_alert_dispatch import MAX_STATE_BYTES


@pytest.fixture(autouse=True)
def _config(repo: Repo) -> None:
    repo.write_config(only(HOOK))


def names(server: SinkServer, sink: str = HOOK) -> list[str]:
    """Which records a sink was sent, by their trace ids."""
    return [name_in(request.json) for request in server.received(PATHS[sink])]


def name_in(body: dict[str, Any]) -> str:
    record = body.get("escalation") or body["payload"]["custom_details"]["escalation"]
    return str(record["traceId"])


def record(name: str, **more: Any) -> dict[str, Any]:
    return health_critical(traceId=name, **more)


def rotate(repo: Repo, suffix: str = ".1") -> Path:
    """As logrotate does by default: older ones move on, the file is renamed, a new one comes later."""
    source = repo.source
    for number in range(8, 0, -1):
        old = source.with_name(f"{source.name}.{number}")
        if old.exists() and suffix == ".1":
            old.rename(source.with_name(f"{source.name}.{number + 1}"))
    return source.rename(source.with_name(source.name + suffix))


def the_sink_got(server: SinkServer, *expected: str) -> None:
    """It got these, in this order, and nothing else."""
    assert names(server) == [*expected]


# --- The source: rotation (7)


@pytest.mark.parametrize(
    "suffix", [".1", "-20261123", "-20261123-1795470050", ".20261123", ".2026-11-23", "-2026-11-23T04:05:06Z"]
)
def test_what_was_written_before_a_rotation_goes_out_before_what_came_after(
    repo: Repo, server: SinkServer, suffix: str
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    rotate(repo, suffix)
    repo.append(record("three"))
    done = repo.dispatch().json
    assert (done["processedCount"], done["escalationsLineOffset"], done["escalationsLineCount"]) == (2, 1, 1)
    the_sink_got(server, "one", "two", "three")
    check_promise(repo)


def test_several_rotations_between_two_passes_lose_nothing(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    for name in ("three", "four", "five"):
        rotate(repo)
        repo.append(record(name), record(f"{name}-b"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three", "three-b", "four", "four-b", "five", "five-b")
    check_promise(repo)


@pytest.mark.parametrize(
    "names",
    [
        ("escalations.jsonl.2026-11-22", "escalations.jsonl.2026-11-23"),  # as Python's logging has it
        ("escalations.jsonl-2026-11-22", "escalations.jsonl-2026-11-23"),  # logrotate, dateformat
        ("escalations-20261122.jsonl", "escalations-20261123.jsonl"),  # logrotate, extension
        ("escalations.jsonl.99999", "escalations.jsonl.9999"),
        ("escalations.jsonl-20261122-9", "escalations.jsonl-20261122-10"),
    ],
)
def test_several_rotations_lose_nothing_however_the_files_are_named(
    repo: Repo, server: SinkServer, names: tuple[str, str]
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    for text, name in zip(("two", "three"), names, strict=True):
        repo.append(record(text))
        repo.source.rename(repo.folder / name)
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three", "four")
    check_promise(repo)


def test_where_the_numbers_of_rotations_go_up_no_history_is_sent_again(
    repo: Repo, server: SinkServer
) -> None:
    """The other way round than logrotate: the file with the smaller number is older, not newer."""
    for number, name in enumerate(("one", "two", "three"), start=1):
        repo.append(record(name))
        repo.dispatch()
        repo.append(record(f"{name}, too"))
        repo.source.rename(repo.folder / f"escalations.jsonl.{number}")
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "one", "one, too", "two", "two, too", "three", "three, too", "four")
    assert all("droppedCount" not in row and row.get("reasonCode") is None for row in repo.telemetry())
    for number, name in enumerate(("five", "six"), start=4):
        repo.source.rename(repo.folder / f"escalations.jsonl.{number}")
        repo.append(record(name))
    repo.dispatch()
    assert names(server)[-1] == "six"
    assert "escalations.jsonl.5" in repo.telemetry()[-2]["message"]


def test_a_rotation_that_nobody_can_follow_is_on_record(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    for name in ("two", "three"):
        repo.append(record(name))
        repo.source.rename(repo.folder / f"escalations.jsonl.until-{name}")
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "four")
    [told] = [row for row in repo.telemetry() if row.get("reasonCode") == "source_replaced"]
    assert "escalations.jsonl.until-three" in told["message"]
    assert "source_replaced" in repo.run("status", *repo.target).json["verdict"]
    repo.dispatch()
    assert sum(row.get("reasonCode") == "source_replaced" for row in repo.telemetry()) == 1


def lost(repo: Repo) -> list[str]:
    """What the rows say that may have been lost with the source."""
    return [row["message"] for row in repo.telemetry() if row.get("reasonCode") == "source_replaced"]


def make_older(path: Path, seconds: float) -> None:
    before = path.stat().st_mtime - seconds
    os.utime(path, (before, before))


def test_a_file_without_a_rotations_name_that_no_pass_has_read_is_reported(
    repo: Repo, server: SinkServer
) -> None:
    old = repo.folder / "escalations.jsonl.old"
    repo.append(record("one"))
    repo.dispatch()
    repo.source.rename(old)
    repo.dispatch()
    repo.append(record("two"))
    repo.source.rename(old)
    for _ in range(2):
        repo.dispatch()
    repo.append(record("three"))
    repo.dispatch()
    the_sink_got(server, "one", "three")
    [told] = lost(repo)
    assert "escalations.jsonl.old" in told


def test_a_file_that_no_pass_can_place_is_reported_once_and_not_at_each_rotation(repo: Repo) -> None:
    repo.append(record("one"))
    repo.dispatch()
    copy = repo.folder / "escalations.jsonl.copy"
    copy.write_text(line(record("elsewhere")))
    os.utime(copy, (time.time() + 3600,) * 2)
    for name in ("two", "three"):
        rotate(repo)
        repo.append(record(name))
        repo.dispatch()
    [told] = lost(repo)
    assert "escalations.jsonl.copy" in told


def test_a_rotated_file_whose_last_line_was_never_read_is_missed_if_it_goes(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(line(record("two"))[:20])
    rotated = rotate(repo)
    repo.dispatch()
    rotated.unlink()
    repo.append(record("three"))
    repo.dispatch()
    the_sink_got(server, "one", "three")
    assert len(lost(repo)) == 1


def test_rotations_are_followed_although_the_clock_was_set_back(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    rotate(repo)
    repo.append(record("three"))
    make_older(rotate(repo), 60)
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three", "four")
    assert not lost(repo)


def test_a_pass_with_a_clock_that_was_ahead_hides_no_later_rotation(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    rotate(repo)
    repo.dispatch()
    edit_queue(repo, "UPDATE loops SET cursor = json_set(cursor, '$.seen_at', 4e9)")
    repo.append(record("two"))
    repo.source.rename(repo.source.with_name("escalations.jsonl.1"))
    repo.append(record("three"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three")


def test_what_was_rotated_before_the_first_pass_is_never_sent(repo: Repo, server: SinkServer) -> None:
    repo.append(record("old"))
    rotate(repo)
    repo.append(record("one"))
    repo.dispatch()
    repo.source.unlink()
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    assert len(lost(repo)) == 1


def test_a_damaged_rotated_file_is_reported_and_what_follows_goes_out(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    rotate(repo)
    repo.append(record("three"))
    plain = rotate(repo)
    packed = plain.with_name(plain.name + ".gz")
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-9])
    plain.unlink()
    repo.append(record("four"))
    # Somebody may be about to finish it.
    failed = repo.dispatch()
    assert (failed.exit_code, f"{packed}: cannot be unpacked" in failed.stderr) == (5, True)
    for file in (packed, packed.with_name("escalations.jsonl.2")):
        make_older(file, 60)
    repo.dispatch()
    the_sink_got(server, "one", "two", "four")
    [told] = lost(repo)
    assert packed.name in told


def test_a_record_that_is_too_deep_is_on_record_although_it_shares_its_line_with_a_good_one(
    repo: Repo, server: SinkServer
) -> None:
    deep = '{"category": "deep", "x": ' + "[" * 200 + "]" * 200 + "}"
    repo.append(json.dumps(record("good")) + deep + "\n")
    repo.dispatch()
    the_sink_got(server, "good")
    assert {row.get("reasonCode") for row in repo.telemetry()} == {None, "invalid_escalation_json"}


@pytest.mark.parametrize("command", ["dispatch", "redeliver", "skip"])
def test_what_waits_is_served_although_its_source_cannot_be_read_any_more(
    repo: Repo, server: SinkServer, command: str
) -> None:
    server.answer("/hook", error(400) if command == "redeliver" else error(503))
    repo.append(record("one"))
    repo.dispatch()
    repo.source.unlink()
    repo.source.mkdir()
    server.answer("/hook", ok())
    server.forget()
    if command == "dispatch":
        run = repo.dispatch("--now")
        assert (run.exit_code, "it is a folder: move it away" in run.stderr) == (5, True)
        state = repo.state()
        assert (state["status"], state["waitingCount"]) == ("error", 0)
    elif command == "redeliver":
        assert repo.run("redeliver", *repo.target, "--dead-letters", "--yes").json["deliveredCount"] == 1
    else:
        assert repo.run("skip", *repo.target, "--sink", HOOK, "--to-line", "1", "--yes").exit_code == 0
    assert names(server) == ([] if command == "skip" else ["one"])
    repo.source.rmdir()
    repo.append(record("two"))
    assert repo.dispatch().json["dispatchedCount"] == 1


def test_a_backlog_in_rotated_files_is_counted(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(*(record(str(number)) for number in range(5)))
    rotate(repo)
    repo.append(record("last"))
    summary = repo.dispatch("--max-escalations", "2").json
    assert (summary["unreadCount"], summary["escalationsLineCount"]) == (4, 1)


def test_an_operators_command_does_not_hide_a_rotation_that_nobody_can_follow(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(record("one"))
    repo.dispatch()
    for name in ("two", "three"):
        repo.append(record(name))
        repo.source.rename(repo.folder / f"escalations.jsonl.until-{name}")
    repo.append(record("four"))
    assert repo.run("skip", *repo.target, "--sink", HOOK, "--yes").json["skippedCount"] == 3
    repo.dispatch()
    assert [row["reasonCode"] for row in repo.telemetry() if "position" not in row] == ["source_replaced"]
    assert names(server, PAGER) == ["one", "two", "four"]


def test_however_many_files_were_rotated_the_right_one_is_found(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    for number in range(2, 302):
        (repo.folder / f"escalations.jsonl.{number}").write_text(line(record(f"old-{number}", seconds_ago=9)))
        os.utime(repo.folder / f"escalations.jsonl.{number}", (1.0, 1.0))
    repo.source.rename(repo.folder / "escalations.jsonl.1")
    repo.append(record("three"))
    limited = replace(repo, command=["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *repo.command])
    assert limited.dispatch().json["processedCount"] == 2
    the_sink_got(server, "one", "two", "three")


def test_a_rotation_with_no_new_file_yet_loses_nothing(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    rotate(repo)
    repo.dispatch()
    the_sink_got(server, "one", "two")
    repo.source.touch()
    assert repo.dispatch().json["processedCount"] == 0
    repo.append(record("three"))
    rotate(repo)
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three", "four")
    check_promise(repo)


def test_a_backlog_is_read_from_the_rotated_files_through_more_rotations(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    for name in ("one", "two", "three"):
        repo.append(record(name), record(f"{name}-b"))
        repo.dispatch()
        rotate(repo)
    assert repo.state()["waitingCount"] == 6
    check_promise(repo)
    server.answer("/hook", ok())
    server.forget()
    repo.append(record("four"))
    assert repo.dispatch().json["waitingCount"] == 0
    assert names(server) == ["one", "one-b", "two", "two-b", "three", "three-b", "four"]
    assert names(server, PAGER) == ["four"]
    check_promise(repo)


def test_files_that_no_rotation_made_are_left_alone(repo: Repo, server: SinkServer) -> None:
    """Copies and backups of an operator are no log; nor is a compressed file that nothing waits in."""
    repo.append(record("one"))
    repo.dispatch()
    for suffix in (".bak", ".orig", ".1.gz", "~", ".new", ".2024"):
        repo.source.with_name(repo.source.name + suffix).write_text(line(record("other" + suffix)))
    rotate(repo)
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


def test_an_older_rotation_is_not_history_to_send(repo: Repo, server: SinkServer) -> None:
    repo.append(record("before"))
    rotate(repo)
    repo.append(record("one"))
    repo.dispatch()
    rotate(repo)
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


def test_an_unterminated_last_line_of_a_rotated_file_is_read_once_nobody_writes_it(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(line(record("two")).rstrip("\n"))
    rotated = rotate(repo)
    repo.append(record("three"))
    repo.dispatch()  # its writer may still be at it
    the_sink_got(server, "one")
    long_ago = time.time() - 60
    os.utime(rotated, (long_ago, long_ago))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three")
    check_promise(repo)


def test_a_rotated_file_that_holds_nothing_but_an_unterminated_line_is_not_lost(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    rotate(repo)
    repo.append(line(record("two")).rstrip("\n"))
    rotate(repo)
    repo.append(record("three"))
    repo.dispatch()
    long_ago = time.time() - 60
    os.utime(repo.source.with_name(repo.source.name + ".1"), (long_ago, long_ago))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three")
    check_promise(repo)


# --- The source: truncation and replacement (7)


def test_copytruncate_loses_nothing_and_repeats_nothing(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    shutil.copy(repo.source, repo.source.with_name(repo.source.name + ".1"))
    os.truncate(repo.source, 0)
    repo.dispatch()
    assert names(server, PAGER) == ["one", "two"]
    repo.append(record("three"))
    server.answer("/hook", ok())
    server.forget()
    repo.dispatch()
    assert names(server) == ["one", "two", "three"]
    assert names(server, PAGER) == ["three"]
    check_promise(repo)


@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer_than_the_old_offset"])
@pytest.mark.parametrize("how", ["truncated", "replaced"])
def test_a_new_file_is_read_from_its_beginning(
    repo: Repo, server: SinkServer, how: str, longer: bool
) -> None:
    repo.append(record("one"), record("two"))
    repo.dispatch()
    fresh = [f"new-{number}" for number in range(5 if longer else 1)]
    if how == "truncated":
        os.truncate(repo.source, 0)
    else:
        repo.source.unlink()
    repo.append(*[record(name) for name in fresh])
    done = repo.dispatch().json
    assert done["escalationsLineOffset"] == done["escalationsLineCount"] == len(fresh)
    the_sink_got(server, "one", "two", *fresh)
    check_promise(repo)


def test_a_new_file_that_begins_as_the_old_one_did_is_still_noticed(repo: Repo, server: SinkServer) -> None:
    """A writer that starts each file with the same line: the first line alone tells nothing."""
    same = record("header")
    repo.append(same, record("one"), record("two"))
    repo.dispatch()
    repo.source.unlink()
    repo.append(same, record("three"), record("four"), record("five"))
    repo.dispatch()
    the_sink_got(server, "header", "one", "two", "header", "three", "four", "five")
    check_promise(repo)


def test_an_emptied_source_is_no_fault_and_goes_on(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    os.truncate(repo.source, 0)
    for _ in range(2):
        assert repo.dispatch().json["processedCount"] == 0
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


@pytest.mark.parametrize("new_file", [False, True], ids=["the_file", "a_copy_in_its_place"])
@pytest.mark.parametrize("more", [(), ("a new one",)], ids=["nothing_new", "a_new_line"])
def test_what_is_left_of_a_source_that_lost_its_end_is_not_sent_again(
    repo: Repo, server: SinkServer, new_file: bool, more: tuple[str, ...]
) -> None:
    """After a power cut, or from a backup: the queue may know more lines than the file has."""
    repo.append(record("one"), "\n", record("two"), record("three"), record("four"))
    repo.dispatch()
    before = repo.source.read_bytes()
    left = b"".join(before.splitlines(keepends=True)[:-1])
    if new_file:
        repo.source.rename(repo.root / "aside")
        repo.source.write_bytes(left)
    else:
        os.truncate(repo.source, len(left))
    repo.append(*map(record, more))
    assert repo.dispatch().json["processedCount"] == len(more)
    repo.append(record("five"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three", "four", *more, "five")
    check_promise(repo)


def test_a_deleted_source_forgets_nothing_and_goes_on_when_it_is_back(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(record("one"))
    repo.dispatch()
    away = repo.source.rename(tmp_path / "away.jsonl")
    for _ in range(2):
        gone = repo.dispatch().json
        assert (gone["status"], gone["waitingCount"]) == ("no_source", 1)
    check_promise(repo)
    away.rename(repo.source)
    repo.append(record("two"))
    server.answer("/hook", ok())
    server.forget()
    assert repo.dispatch().json["waitingCount"] == 0
    assert names(server) == ["one", "two"]
    assert names(server, PAGER) == ["two"]
    check_promise(repo)


def test_a_source_restored_as_a_copy_goes_on_where_it_was(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    shutil.copy(repo.source, tmp_path / "copy")
    repo.source.unlink()
    repo.dispatch()
    shutil.copy(tmp_path / "copy", repo.source)
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


def link_source(repo: Repo, real: Path) -> Path:
    """Let the source be a link to a file in a folder of its own, of which one record was ingested."""
    real.parent.mkdir()
    real.write_text(line(record("one")))
    repo.folder.mkdir(parents=True)
    repo.source.symlink_to(real)
    repo.dispatch()
    return real


def test_a_source_behind_a_symbolic_link_is_followed(repo: Repo, server: SinkServer, tmp_path: Path) -> None:
    real = link_source(repo, tmp_path / "log" / "elsewhere.jsonl")
    with real.open("a") as source:
        source.write(line(record("two")))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


def test_a_source_that_is_no_file_is_an_error_and_not_a_hang(repo: Repo, server: SinkServer) -> None:
    repo.folder.mkdir(parents=True)
    os.mkfifo(repo.source)
    failed = repo.dispatch()
    assert failed.exit_code == 5
    assert "not a regular file" in failed.stderr
    repo.source.unlink()
    repo.append(record("one"))
    assert repo.dispatch().json["status"] == "success"


# --- The source: what a line can hold (7)


def test_a_half_written_last_line_waits_until_it_is_whole(repo: Repo, server: SinkServer) -> None:
    whole = line(record("two"))
    repo.append(record("one"), whole[:1])
    for start, stop in ((1, 30), (30, len(whole) - 1)):
        assert repo.dispatch().json["escalationsLineCount"] == 1
        repo.append(whole[start:stop])
    assert repo.dispatch().json["waitingCount"] == 0
    the_sink_got(server, "one")
    repo.append(whole[-1:], record("three"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three")
    check_promise(repo)


def test_a_half_written_first_line_waits_until_it_is_whole(repo: Repo, server: SinkServer) -> None:
    """Also when it is so long that the file has a name before the line has an end."""
    whole = line(record("one", filler="x" * 20_000))
    repo.append(whole[:100])
    repo.dispatch()
    repo.append(whole[100:10_000])
    repo.dispatch()
    assert server.requests == []
    repo.append(whole[10_000:])
    repo.dispatch()
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


def test_a_record_of_4_mb_is_delivered(repo: Repo, server: SinkServer) -> None:
    config = sink_config(everywhere=True)
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    repo.append(record("one"), record("large", filler="x" * 4_000_000), record("three"))
    assert repo.dispatch().json["status"] == "success"
    assert names(server) == ["one", "large", "three"]
    assert len(server.received("/hook")[1].json["escalation"]["filler"]) == 4_000_000
    check_promise(repo)


def test_a_line_of_40_mb_is_on_record_without_being_held_and_what_follows_goes_on(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"), b'{"category":"' + b"x" * 40_000_000 + b'"}\n', record("three"))
    done = repo.dispatch().json
    assert (done["processedCount"], done["failedCount"]) == (3, 1)
    the_sink_got(server, "one", "three")
    row = repo.telemetry()[1]
    assert row["reasonCode"] == "escalation_too_large"
    assert len(row["rawLine"]) <= 10_000
    check_promise(repo)


LINES: dict[str, tuple[bytes, bool]] = {
    # A line as bytes, and whether an escalation is to be read from it.
    "crlf": (line(record("crlf")).encode().replace(b"\n", b"\r\n"), True),
    "byte_order_mark": (b"\xef\xbb\xbf" + line(record("byte_order_mark")).encode(), True),
    "invalid_utf8": (
        line(record("invalid_utf8", note="@")).encode().replace(b"@", b"\xff\xc3"),
        True,
    ),
    "nul_before_it": (b"\0" * 4096 + line(record("nul_before_it")).encode(), True),
    "nul_within": (line(record("nul_within")).encode().replace(b"local", b"lo\0cal"), False),
    "nul_only": (b"\0" * 10 + b"\n", False),
    "blank": (b"   \t\n", False),
    "empty": (b"\n", False),
    "random_bytes": (bytes(range(128, 256)) + b"\n", False),
    "number": (b"42\n", False),
    "array": (b"[1,2]\n", False),
    "cut_in_the_middle": (line(record("cut_in_the_middle")).encode()[:80] + b"\n", False),
    "nested_without_end": (b"[" * 100_000 + b"\n", False),
    "a_number_of_9999_digits": (
        line(record("a_number_of_9999_digits", n=0)).encode().replace(b'"n":0', b'"n":' + b"7" * 9999),
        True,
    ),
    "lone_surrogate": (line(record("lone_surrogate", note="@")).encode().replace(b"@", b"\\ud800"), True),
    "not_a_number": (line(record("not_a_number", n=0)).encode().replace(b'"n":0', b'"n":NaN'), True),
}


def test_an_odd_line_is_handled_on_record_and_never_fatal(repo: Repo, server: SinkServer) -> None:
    expected = ["first"]
    repo.append(record("first"))
    for what, (odd, delivered) in LINES.items():
        repo.append(odd, record(f"after {what}"))
        expected += [*([what] if delivered else []), f"after {what}"]
    done = repo.dispatch().json
    assert done["processedCount"] == done["escalationsLineOffset"] == 1 + 2 * len(LINES)
    the_sink_got(server, *expected)
    for (what, (_, delivered)), row in zip(LINES.items(), repo.telemetry()[1::2], strict=True):
        blank = what in ("blank", "empty", "nul_only")
        reason = None if delivered else "blank_line" if blank else "invalid_escalation_json"
        status = "dispatched" if delivered else "skipped" if blank else "failed"
        assert (row["status"], row.get("reasonCode")) == (status, reason), what
    check_promise(repo)


def test_an_odd_line_at_the_very_beginning_is_no_trap(repo: Repo, server: SinkServer) -> None:
    repo.append(b"\xef\xbb\xbf\r\n", record("one"))
    repo.dispatch()
    repo.append(record("two"))
    repo.dispatch()
    the_sink_got(server, "one", "two")
    check_promise(repo)


# --- The state (8)


def shell_state(repo: Repo, lines: int, **more: Any) -> dict[str, Any]:
    """All that the shell dispatcher left behind."""
    return {
        "schemaVersion": "v1",
        "updatedAt": "2026-01-31T04:05:06Z",
        "loopId": repo.loop,
        "traceId": "shell",
        "escalationsFile": str(repo.source),
        "dispatchTelemetryFile": str(repo.telemetry_file),
        "status": "success",
        "processedCount": lines,
        "dispatchedCount": lines,
        "skippedCount": 0,
        "failedCount": 0,
        "failureReasonCodes": [],
        "escalationsLineOffset": lines,
        "escalationsLineCount": lines,
        **more,
    }


def test_the_shell_dispatchers_state_is_taken_over_and_a_backlog_kept_from_then_on(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"), record("two"))
    repo.state_file.write_text(json.dumps(shell_state(repo, 2)))
    assert repo.dispatch().json["processedCount"] == 0
    assert server.requests == []
    server.answer("/hook", error(503))
    repo.append(record("three"))
    assert repo.dispatch().json["waitingCount"] == 1
    server.answer("/hook", ok())
    server.forget()
    repo.dispatch()
    assert names(server) == ["three"]
    check_promise(repo)


def test_a_shell_state_whose_source_is_gone_for_now_is_kept(repo: Repo, server: SinkServer) -> None:
    repo.folder.mkdir(parents=True)
    repo.state_file.write_text(json.dumps(shell_state(repo, 2)))
    for _ in range(2):
        gone = repo.dispatch().json
        assert (gone["status"], gone["escalationsLineOffset"]) == ("no_source", 2)
    repo.append(record("one"), record("two"), record("three"))
    repo.dispatch()
    the_sink_got(server, "three")


def test_what_the_shell_dispatcher_sent_meanwhile_is_not_sent_again(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"), record("three"))
    repo.state_file.write_text(json.dumps(shell_state(repo, 2)))
    assert repo.dispatch().json["escalationsLineOffset"] == 3
    the_sink_got(server, "one", "three")
    check_promise(repo)
    # A state that was left behind by then says nothing about a new file.
    repo.state_file.write_text(json.dumps(shell_state(repo, 2)))
    make_older(repo.state_file, 60)
    rotate(repo)
    repo.append(record("four"), record("five"), record("six"))
    repo.dispatch()
    the_sink_got(server, "one", "three", "four", "five", "six")


def test_a_first_pass_over_an_empty_source_does_not_cost_what_the_shell_dispatcher_sent_since(
    repo: Repo, server: SinkServer
) -> None:
    repo.append("")
    repo.dispatch()
    repo.append(record("one"), record("two"))
    repo.state_file.write_text(json.dumps(shell_state(repo, 1)))
    repo.dispatch()
    the_sink_got(server, "two")


def test_a_half_written_line_that_the_shell_dispatcher_counted_sends_nothing_again(
    repo: Repo, server: SinkServer
) -> None:
    whole = line(record("three"))
    repo.append(record("one"), record("two"), whole[:30])
    repo.state_file.write_text(json.dumps(shell_state(repo, 3)))
    repo.dispatch()
    assert server.requests == []
    repo.append(whole[30:])
    repo.dispatch()
    the_sink_got(server, "three")


def test_what_the_shell_dispatcher_left_unread_in_a_rotated_file_goes_out(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"), record("two"), record("three"))
    repo.state_file.write_text(json.dumps(shell_state(repo, 2)))
    rotate(repo)
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "three", "four")


def test_a_shell_state_survives_an_invalid_config(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"), record("two"), record("three"))
    repo.state_file.write_text(json.dumps(shell_state(repo, 2)))
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    repo.write_config(only(HOOK))
    repo.dispatch()
    the_sink_got(server, "three")


def test_a_shell_state_that_is_ahead_of_its_source_begins_at_the_new_file(
    repo: Repo, server: SinkServer
) -> None:
    """The file was rotated since: the shell dispatcher stopped for good with "offset is ahead" here."""
    repo.append(record("one"), record("two"))
    repo.state_file.write_text(json.dumps(shell_state(repo, 900)))
    repo.dispatch()
    the_sink_got(server, "one", "two")


def changed(text: str, **fields: Any) -> bytes:
    return json.dumps({**json.loads(text), **fields}).encode()


def read_up_to(text: str, offset: float) -> bytes:
    return changed(text, cursor={**json.loads(text)["cursor"], "offset": offset})


# What may stand in place of a state.
DAMAGES: dict[str, Callable[[str], bytes]] = {
    "empty": lambda _: b"",
    "cut_off": lambda text: text.encode()[: len(text) // 2],
    "another_kind_of_json": lambda _: b"[1, 2, 3]\n",
    "of_another_program": lambda _: b'{"version": 3, "cursor": "abc"}\n',
    "of_another_loop": lambda text: changed(text, loopId="another-loop"),
    "nested_without_end": lambda _: b"[" * 100_000,
    "larger_than_any": lambda text: text.encode() + b" " * MAX_STATE_BYTES,
    "sinks_of_the_wrong_kind": lambda text: changed(text, sinks=[1]),
    "a_place_that_is_none": lambda text: read_up_to(text, float("inf")),
    "a_place_before_the_beginning": lambda text: read_up_to(text, -5),
}
# JSON of this program and this loop: there is nothing to keep.
READABLE = [*DAMAGES][-3:]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_state_is_kept_aside_and_costs_neither_a_repeat_nor_a_gap(
    repo: Repo, server: SinkServer, how: str
) -> None:
    """With a sink behind, a dead letter, and something that no pass has seen."""
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    server.script("/chat", ok(), error(422))
    repo.append(record("one"), record("two"), record("three"))
    before = repo.dispatch().json
    damaged = DAMAGES[how](repo.state_file.read_text())
    repo.state_file.write_bytes(damaged)
    repo.append(record("four"))
    server.answer("/hook", ok())
    server.forget()
    after = repo.dispatch().json
    assert (after["processedCount"], after["waitingCount"]) == (1, 0)
    assert after["deadLetterCount"] == before["deadLetterCount"] == 1
    assert names(server) == ["one", "two", "three", "four"]
    assert names(server, PAGER) == ["four"]
    assert len(server.received("/chat")) == 1
    kept = [path.read_bytes() for path in repo.folder.glob("alert-dispatch-state.json.damaged-*")]
    assert kept == ([] if how in READABLE else [damaged])
    check_promise(repo)


def test_a_lost_state_is_rebuilt_while_a_sink_is_still_down(repo: Repo, server: SinkServer) -> None:
    server.answer("/hook", error(503))
    repo.append(record("one"), record("two"))
    repo.dispatch()
    repo.state_file.unlink()
    server.forget()
    assert repo.dispatch().json["waitingCount"] == 2
    assert server.received("/chat") == []
    check_promise(repo)
    server.answer("/hook", ok())
    server.forget()
    assert repo.dispatch().json["waitingCount"] == 0
    assert names(server) == ["one", "two"]
    check_promise(repo)


def test_a_lost_state_is_rebuilt_through_a_rotation(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(record("one"), record("two"))
    repo.dispatch()
    rotate(repo)
    repo.append(record("three"))
    repo.dispatch()
    repo.state_file.unlink()
    repo.append(record("four"))
    server.answer("/hook", ok())
    server.forget()
    repo.dispatch()
    assert names(server) == ["one", "two", "three", "four"]
    assert names(server, PAGER) == ["four"]
    check_promise(repo)


def shell_row(repo: Repo, sent: dict[str, Any]) -> str:
    """What the shell dispatcher wrote of a record."""
    row = {"timestamp": "2026-01-31T04:05:06Z", "loopId": repo.loop, "category": "alert_dispatch"}
    return line({**row, "status": "dispatched", "escalation": sent})


@pytest.mark.parametrize("left", ['{"schemaVersion": "v1", "escalationsLi', None], ids=["damaged", "gone"])
def test_a_lost_shell_state_is_rebuilt_from_the_shell_dispatchers_telemetry(
    repo: Repo, server: SinkServer, left: str | None
) -> None:
    one, two = record("one"), record("two")
    repo.append(one, two, record("three"))
    repo.telemetry_file.parent.mkdir()
    repo.telemetry_file.write_text(shell_row(repo, one) + shell_row(repo, two))
    if left is not None:
        repo.state_file.write_text(left)
    repo.dispatch()
    the_sink_got(server, "three")


def test_an_invalid_config_does_not_hide_what_the_shell_dispatcher_has_sent(
    repo: Repo, server: SinkServer
) -> None:
    one = record("one")
    repo.append(one, record("two"))
    repo.telemetry_file.parent.mkdir()
    repo.telemetry_file.write_text(shell_row(repo, one))
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    assert (repo.state()["status"], repo.state()["escalationsLineOffset"]) == ("config_invalid", 1)
    repo.write_config(only(HOOK))
    repo.dispatch()
    the_sink_got(server, "two")


def test_where_a_shell_state_is_gone_and_its_telemetry_tells_nothing_all_is_new(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("two"))
    repo.telemetry_file.parent.mkdir()
    repo.telemetry_file.write_text(shell_row(repo, record("one")))
    repo.dispatch()
    the_sink_got(server, "two")


@pytest.mark.parametrize("first", ["an operator's command", "a pass on a full disk"])
def test_a_damaged_shell_state_stays_until_a_new_one_is_written(
    repo: Repo, server: SinkServer, first: str
) -> None:
    """Without it the next pass would take the loop for a new one, and send all that was sent."""
    one = record("one")
    repo.append(one, record("two"))
    row = {"loopId": repo.loop, "category": "alert_dispatch", "status": "dispatched", "escalation": one}
    repo.telemetry_file.parent.mkdir()
    repo.telemetry_file.write_text(line(row))
    repo.state_file.write_text('{"schemaVersion": "v1", "escalationsLi')
    if first == "a pass on a full disk":
        assert limited(repo, 100).exit_code == 5
    else:
        # What the telemetry says was delivered is not among it, so there is nothing to skip there.
        assert (
            repo.run("skip", *repo.target, "--sink", HOOK, "--to-line", "1", "--yes").json["skippedCount"]
            == 0
        )
    assert server.requests == []
    repo.dispatch()
    the_sink_got(server, "two")
    [kept] = repo.folder.glob("alert-dispatch-state.json.damaged-*")
    assert kept.read_text() == '{"schemaVersion": "v1", "escalationsLi'


@pytest.mark.parametrize(
    "odd",
    [
        {"late": True, "sinks": [], "position": {"segment": "1-0", "offset": 0, "end": 1, "line": 1}},
        {"position": {"segment": 5, "offset": 0, "end": 1, "line": 1}, "sinks": []},
        {"position": {"segment": "1-0", "offset": 0, "end": float("inf"), "line": 1}, "sinks": []},
        {"position": {"segment": "9-0", "offset": 0, "end": 9, "line": 9}, "sinks": [7]},
        {"sinkId": HOOK, "outcome": "retry", "attempt": "x", "timestamp": 5},
        {"sinkId": [HOOK], "outcome": {}, "position": None},
    ],
)
def test_no_odd_row_of_the_telemetry_stops_a_loop(
    repo: Repo, server: SinkServer, odd: dict[str, Any]
) -> None:
    """The host writes there, too, and so may a hand."""
    repo.append(record("one"))
    repo.dispatch()
    placed = {"position": {**repo.attempts()[-1]["position"], "end": 1 << 40}, **odd}
    for path in (repo.telemetry_file, repo.attempts_file):
        with path.open("a") as file:
            file.write(json.dumps({"loopId": repo.loop, **placed}) + "\n")
    repo.append(record("two"))
    assert repo.run("status", *repo.target).exit_code == 0
    assert repo.dispatch().exit_code == 0
    repo.state_file.unlink()
    repo.append(record("three"))
    assert repo.dispatch().exit_code == 0
    assert {"one", "three"} <= set(names(server))


def test_only_a_state_that_cannot_be_rebuilt_is_an_error_with_advice(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"), record("two"))
    row = {"loopId": repo.loop, "category": "alert_dispatch", "escalation": record("of-a-lost-file")}
    repo.telemetry_file.parent.mkdir()
    repo.telemetry_file.write_text(line(row))
    repo.state_file.write_text('{"schemaVersion": "v1", "escalationsLi')
    for _ in range(2):  # an error is not to heal itself by sending everything
        failed = repo.dispatch()
        assert (failed.exit_code, failed.stdout) == (4, "")
        assert '{"schemaVersion":"v1","escalationsLineOffset":N}' in failed.stderr
    assert server.requests == []
    repo.state_file.write_text('{"schemaVersion":"v1","escalationsLineOffset":1}')
    repo.dispatch()
    the_sink_got(server, "two")


@pytest.mark.parametrize("newer", [{"stateVersion": 3}, {"schemaVersion": "v2"}, {"schemaVersion": "v10"}])
def test_a_state_of_a_newer_version_is_refused_and_left_as_it_is(
    repo: Repo, server: SinkServer, newer: dict[str, Any]
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.state_file.write_text(json.dumps({**repo.state(), **newer, "queues": "of a new kind"}))
    repo.append(record("two"))
    before = repo.snapshot()
    failed = repo.dispatch()
    assert failed.exit_code == 4
    assert "newer version" in failed.stderr
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    repo.write_config(only(HOOK))
    after = repo.snapshot()
    state = str(repo.state_file.relative_to(repo.root))
    assert after[state] == before[state]
    the_sink_got(server, "one")


# --- The disk (9)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs of its own. Where that is not allowed the test is skipped; in CI, which is root, it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        if in_ci() and os.geteuid() == 0:
            pytest.fail(f"cannot mount: {done.stderr.decode()}", pytrace=False)
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fails_of_the_disk(run: Run, *words: str) -> None:
    assert (run.exit_code, run.stdout) == (5, "")
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr


def test_a_full_disk_is_found_out_before_anything_is_sent(repo: Repo, server: SinkServer) -> None:
    with mounted(repo.folder, "size=1m"):
        repo.append(record("one"))
        repo.dispatch()
        repo.append(record("two"))
        with contextlib.suppress(OSError), (repo.folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        server.forget()
        fails_of_the_disk(repo.dispatch(), "No space left on device", "free space")
        assert server.requests == []
        check_promise(repo)
        (repo.folder / "filler").unlink()
        assert repo.dispatch().json["processedCount"] == 1
        assert names(server) == ["two"]
        check_promise(repo)


def test_a_disk_that_fills_up_in_mid_pass_loses_nothing_and_repeats_only_what_was_in_flight(
    repo: Repo, server: SinkServer
) -> None:
    with mounted(repo.folder, "size=1700k"):
        sent = [f"{number}" for number in range(20)]
        repo.append(*[record(name, filler="x" * 50_000) for name in sent])
        fails_of_the_disk(repo.dispatch(), "No space left on device")
        fails_of_the_disk(repo.dispatch(), "No space left on device")
        remount(repo.folder, "size=20m")
        assert repo.dispatch().exit_code == 0
        got = names(server)
        assert list(dict.fromkeys(got)) == sent
        assert len(got) <= len(sent) + 2
        assert repo.state()["escalationsLineOffset"] == 20
        check_promise(repo)
        rows = repo.telemetry()
        assert [row["escalationTraceId"] for row in rows if "late" not in row] == sent


def test_a_state_folder_without_room_is_found_out_before_anything_is_sent(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    """The state on a disk of its own."""
    with mounted(tmp_path / "small", "size=256k"):
        state = tmp_path / "small" / "state.json"
        options = ("--dispatch-state-file", str(state))
        repo.append(record("one"))
        with contextlib.suppress(OSError), (tmp_path / "small" / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        fails_of_the_disk(repo.dispatch(*options), "No space left on device")
        assert server.requests == []
        (tmp_path / "small" / "filler").unlink()
        remount(tmp_path / "small", "size=2m")
        assert repo.dispatch(*options).json["status"] == "success"
        the_sink_got(server, "one")


@contextlib.contextmanager
def with_quota(folder: Path, image: Path) -> Iterator[Callable[[str], object]]:
    """A btrfs of its own, whose quota binds root too; yields what sets it. Without it the test is skipped."""
    make, btrfs = needs_tool("mkfs.btrfs"), needs_tool("btrfs")
    with image.open("wb") as file:
        file.truncate(128 * 2**20)
    subprocess.run([make, "--quiet", "--mixed", image], check=True, stdout=subprocess.DEVNULL)
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, check=False).returncode:
        pytest.skip("a btrfs cannot be mounted here")
    try:
        subprocess.run([btrfs, "quota", "enable", folder], check=True)
        yield lambda size: subprocess.run([btrfs, "qgroup", "limit", size, folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        image.unlink()


def whole_rows(path: Path) -> list[bytes]:
    """The rows of a file in which there may be one that is torn."""
    found = []
    for row in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            json.loads(row)
            found.append(row)
    return found


@pytest.mark.slow
def test_a_quota_that_is_used_up_loses_nothing_and_repeats_only_what_was_in_flight(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    with with_quota(repo.folder, tmp_path / "image") as set_quota:
        sent = [f"{number}" for number in range(20)]
        repo.append(*[record(name, filler="x" * 50_000) for name in sent])
        set_quota("1200K")
        fails_of_the_disk(repo.dispatch(), "Disk quota exceeded", "raise the quota")
        assert server.requests == []
        set_quota("1500K")
        fails_of_the_disk(repo.dispatch(), "Disk quota exceeded", "raise the quota")
        assert server.requests
        set_quota("20M")
        assert repo.dispatch().exit_code == 0
        got = names(server)
        assert list(dict.fromkeys(got)) == sent
        assert len(got) <= len(sent) + 1
        # At its quota a btrfs does not let a file be made shorter either, and loses what it has just taken:
        # the row that met it stays torn, and one before it may be full of NULs. Both are there whole as well.
        rows = whole_rows(repo.telemetry_file)
        assert repo.telemetry_file.read_bytes().count(b"\n") - len(rows) <= 2
        # What was lost was written again, at the end.
        rows.sort(key=lambda row: json.loads(row)["position"]["line"])
        repo.telemetry_file.write_bytes(b"".join(rows))
        check_promise(repo)


def limited(repo: Repo, limit: int) -> Run:
    """A pass whose files may not grow beyond a limit."""
    limit_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    return replace(repo, prepare=limit_files).dispatch()


@pytest.mark.parametrize("limit", [0, 100, 3000, 20_000])
def test_a_file_size_limit_loses_nothing_and_repeats_only_what_was_in_flight(
    repo: Repo, server: SinkServer, limit: int
) -> None:
    sent = [f"{number}" for number in range(20)]
    repo.append(*[record(name) for name in sent])
    for _ in range(3):
        fails_of_the_disk(limited(repo, limit), "ulimit -f")
    assert repo.dispatch().exit_code == 0
    got = names(server)
    assert list(dict.fromkeys(got)) == sent
    assert len(got) <= len(sent) + 3
    check_promise(repo)


def test_a_file_at_its_limit_is_found_out_before_anything_is_sent(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    server.forget()
    for _ in range(2):
        fails_of_the_disk(limited(repo, repo.telemetry_file.stat().st_size + 10), "ulimit -f")
    assert server.requests == []
    repo.dispatch()
    assert names(server) == ["two"]
    check_promise(repo)


def test_a_read_only_disk_is_found_out_before_anything_is_sent(repo: Repo, server: SinkServer) -> None:
    with mounted(repo.folder, "size=2m"):
        repo.append(record("one"))
        repo.dispatch()
        repo.append(record("two"))
        server.forget()
        remount(repo.folder, "ro")
        fails_of_the_disk(repo.dispatch(), "Read-only file system")
        assert server.requests == []
        remount(repo.folder, "rw")
        repo.dispatch()
        assert names(server) == ["two"]
        check_promise(repo)


def as_owner(repo: Repo) -> Run:
    """A pass to which the modes of files apply."""
    return replace(repo, prepare=lose_power).dispatch()


def forbid(path: Path) -> Callable[[], None]:
    mode = path.stat().st_mode & 0o777
    path.chmod(mode & 0o555)
    return lambda: path.chmod(mode)


@pytest.mark.parametrize(
    "what", ["folder", "telemetry_folder", "telemetry_file", "attempts_file", "lock_file"]
)
def test_what_may_not_be_written_is_found_out_before_anything_is_sent(
    repo: Repo, server: SinkServer, what: str
) -> None:
    repo.append(record("one"))
    as_owner(repo)
    repo.append(record("two"))
    lock = repo.state_file.with_name(repo.state_file.name + ".lock")
    paths = {
        "folder": repo.folder,
        "telemetry_folder": repo.telemetry_file.parent,
        "telemetry_file": repo.telemetry_file,
        "attempts_file": repo.attempts_file,
        "lock_file": lock,
    }
    allow = forbid(paths[what])
    server.forget()
    fails_of_the_disk(as_owner(repo), "Permission denied", "give this user access")
    assert server.requests == []
    allow()
    assert as_owner(repo).json["processedCount"] == 1
    assert names(server) == ["two"]
    check_promise(repo)


def test_a_source_that_may_not_be_read_is_an_error_and_costs_nothing(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    as_owner(repo)
    repo.append(record("two"))
    repo.source.chmod(0)
    server.forget()
    fails_of_the_disk(as_owner(repo), "Permission denied")
    repo.source.chmod(0o644)
    as_owner(repo)
    assert names(server) == ["two"]
    check_promise(repo)


@pytest.mark.parametrize("what", ["state_file", "telemetry_file", "attempts_file"])
def test_a_symbolic_link_is_not_followed_for_writing_and_found_out_before_anything_is_sent(
    repo: Repo, server: SinkServer, tmp_path: Path, what: str
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    server.forget()
    path: Path = getattr(repo, what)
    away = path.rename(tmp_path / "away")
    content = away.read_bytes()
    path.symlink_to(away)
    for _ in range(2):
        fails_of_the_disk(repo.dispatch(), "symbolic link", path.name)
    assert server.requests == []
    assert away.read_bytes() == content
    path.unlink()
    away.rename(path)
    repo.dispatch()
    assert names(server) == ["two"]
    check_promise(repo)


def test_rows_that_are_gone_cost_neither_a_repeat_nor_an_escalation(repo: Repo, server: SinkServer) -> None:
    """Telemetry that was rotated or removed by hand: the state is enough."""
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(record("one"))
    repo.dispatch()
    shutil.rmtree(repo.telemetry_file.parent)
    repo.append(record("two"))
    server.answer("/hook", ok())
    server.forget()
    assert repo.dispatch().json["waitingCount"] == 0
    assert names(server) == ["one", "two"]
    assert names(server, PAGER) == ["two"]


@pytest.mark.parametrize("file", ["telemetry_file", "attempts_file"])
def test_a_torn_row_is_closed_and_costs_nothing(repo: Repo, server: SinkServer, file: str) -> None:
    repo.append(record("one"))
    repo.dispatch()
    path: Path = getattr(repo, file)
    with path.open("ab") as rows:
        rows.write(b'{"timestamp":"2026-11-2')
    repo.append(divergence_detected(traceId="two"))
    assert repo.dispatch().json["status"] == "success"
    the_sink_got(server, "one", "two")
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("option", "file", "exit_code"),
    [
        ("--dispatch-state-file", "state.json", 4),
        ("--dispatch-telemetry-file", "alerts.jsonl", 5),
        ("--escalations-file", "in.jsonl", 5),
        ("--alert-config-file", "config.json", 3),
    ],
)
def test_a_folder_in_the_place_of_a_file_that_is_named_has_the_exit_code_of_that_file(
    repo: Repo, server: SinkServer, option: str, file: str, exit_code: int
) -> None:
    repo.append(record("one"))
    (repo.root / file).mkdir()
    failed = repo.dispatch(option, str(repo.root / file))
    assert (failed.exit_code, failed.stdout) == (exit_code, "")
    assert str(repo.root / file) in failed.stderr
    assert server.requests == []


def test_a_copy_that_somebody_made_of_the_source_does_not_hide_the_rotated_file(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    shutil.copy(repo.source, repo.folder / "escalations.jsonl.bak")
    repo.append(record("two"))
    shutil.copy(repo.source, repo.folder / "escalations.jsonl.1")
    repo.source.write_bytes(b"")
    repo.append(record("three"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three")


def many(count: int) -> list[dict[str, Any]]:
    """Records that are read in several goes."""
    return [record(f"r{number}", filler="x" * 16_000) for number in range(count)]


def at_request(number: int, event: Callable[[], object]) -> Behaviour:
    """A sink that takes everything; while it is asked for the so-manieth time, something happens."""
    seen = itertools.count(1)

    def answer(_: Received) -> Answer:
        if next(seen) == number:
            event()
        return ok()

    return answer


@pytest.mark.parametrize("waited", [False, True], ids=["new", "a_backlog"])
@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer_than_what_was_read"])
def test_copytruncate_while_a_pass_reads_loses_nothing_and_repeats_nothing(
    repo: Repo, server: SinkServer, waited: bool, longer: bool
) -> None:
    before, after = many(10), [record(f"s{number}", filler="y" * 16_000) for number in range(12)]
    after = after if longer else after[:1]

    def copytruncate() -> None:
        shutil.copy(repo.source, repo.source.with_name(repo.source.name + ".1"))
        os.truncate(repo.source, 0)
        repo.append(*after)

    repo.append(*before)
    if waited:
        server.answer(PATHS[HOOK], error(503))
        assert repo.dispatch().json["waitingCount"] == len(before)
        server.forget()
    server.answer(PATHS[HOOK], at_request(2, copytruncate))
    assert repo.dispatch().json["failedCount"] == 0
    the_sink_got(server, *(str(found["traceId"]) for found in before))
    check_promise(repo)
    assert repo.dispatch().json["processedCount"] == len(after)
    the_sink_got(server, *(str(found["traceId"]) for found in [*before, *after]))
    assert all("droppedCount" not in row and row["status"] != "skipped" for row in repo.telemetry())
    check_promise(repo)


def test_a_truncation_without_a_copy_during_a_pass_is_reported_and_costs_nothing_that_was_ingested(
    repo: Repo, server: SinkServer
) -> None:
    def truncate() -> None:
        os.truncate(repo.source, 0)
        repo.append(record("fresh"))

    repo.append(*many(10))
    server.answer("/hook", at_request(2, truncate))
    assert repo.dispatch().json["processedCount"] == 10
    repo.dispatch()
    assert len(names(server)) == 11
    assert names(server)[-1] == "fresh"
    assert "source_replaced" in repo.run("status", *repo.target).json["verdict"]


def test_a_source_that_was_emptied_is_on_record_once_although_nothing_is_appended_to_it(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    os.truncate(repo.source, 0)
    repo.dispatch()
    assert "source_replaced" in repo.run("status", *repo.target).json["verdict"]
    repo.dispatch()
    repo.append(record("three"))
    repo.dispatch()

    the_sink_got(server, "one", "three")
    assert [row["reasonCode"] for row in repo.telemetry() if "position" not in row] == ["source_replaced"]


def test_a_file_that_is_gone_is_on_record_while_the_source_is_away(repo: Repo, server: SinkServer) -> None:
    repo.append(record("one"))
    repo.dispatch()
    repo.append(record("two"))
    rotate(repo)
    repo.append(record("three"))
    rotate(repo)
    (repo.folder / "escalations.jsonl.2").unlink()
    repo.dispatch()
    the_sink_got(server, "one", "three")
    assert [row["reasonCode"] for row in repo.telemetry() if "position" not in row] == ["source_replaced"]


@pytest.mark.parametrize("when", ["just now", "long after"])
def test_a_rotated_file_that_was_read_is_not_sent_again_whatever_time_it_bears(
    repo: Repo, server: SinkServer, when: str
) -> None:
    """Somebody restores it, touches it or unpacks it, and the source is emptied."""
    repo.append(record("one"), record("two"))
    repo.dispatch()
    rotated = rotate(repo)
    repo.append(record("three"))
    repo.dispatch()
    if when == "long after":
        os.utime(rotated, (time.time() + 60, time.time() + 60))
    os.truncate(repo.source, 0)
    repo.append(record("four"))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three", "four")


def test_a_line_that_a_rotated_file_began_with_too_is_sent_again_from_the_new_one(
    repo: Repo, server: SinkServer
) -> None:
    """As it would be from the same file: a record that is written twice is delivered twice."""
    same = record("same")
    repo.append(same)
    repo.dispatch()
    rotate(repo)
    repo.append(same, record("two"))
    repo.dispatch()
    the_sink_got(server, "same", "same", "two")
    check_promise(repo)


def test_a_source_that_is_a_link_is_followed_through_the_rotation_of_its_target(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    real = link_source(repo, tmp_path / "log" / "night-build.jsonl")
    with real.open("a") as source:
        source.write(line(record("two")))
    real.rename(real.with_name("night-build.jsonl.1"))
    real.write_text(line(record("three")))
    repo.dispatch()
    the_sink_got(server, "one", "two", "three")
    check_promise(repo)


def test_a_pass_that_root_runs_does_not_lock_out_the_user_of_the_loop(repo: Repo, server: SinkServer) -> None:
    if os.geteuid() != 0:
        assert not in_ci(), "CI runs as root"
        pytest.skip("only root can make files for another user")
    repo.append(record("one"))
    user = 12_345
    for path in (repo.root, *repo.root.rglob("*")):
        os.chown(path, user, user)
    assert repo.dispatch().json["dispatchedCount"] == 1
    assert {path.stat().st_uid for path in repo.root.rglob("*")} == {user}
    repo.append(record("two"))
    assert repo.dispatch().json["dispatchedCount"] == 1
    assert repo.dispatch().json["status"] == "no_new_escalations"
    assert {path.stat().st_uid for path in repo.root.rglob("*")} == {user}


# --- The source: what no pass has seen before it was rotated


def an_invalid_config(repo: Repo) -> None:
    repo.append(*[record(f"r{number}") for number in range(3)])
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    repo.write_config(only(HOOK))


def a_telemetry_that_cannot_be_written(repo: Repo) -> None:
    repo.append(*[record(f"r{number}") for number in range(3)])
    repo.telemetry_file.parent.write_text("in the way")
    assert repo.dispatch().exit_code == 5
    repo.telemetry_file.parent.unlink()


def neither_a_valid_config_nor_a_source(repo: Repo) -> None:
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    repo.write_config(only(HOOK))
    repo.append(*[record(f"r{number}") for number in range(3)])


def no_source_yet(repo: Repo) -> None:
    assert repo.dispatch().json["status"] == "no_source"
    repo.append(*[record(f"r{number}") for number in range(3)])


def an_empty_source(repo: Repo) -> None:
    repo.append("")
    repo.dispatch()
    repo.append(*[record(f"r{number}") for number in range(3)])


def quiet_nights(repo: Repo) -> None:
    repo.append(record("before"))
    repo.dispatch()
    for _ in range(2):
        rotate(repo)
        repo.source.touch()
    repo.dispatch()
    for old in repo.folder.glob("escalations.jsonl.*"):
        old.unlink()
    repo.append(*[record(f"r{number}") for number in range(3)])


def the_last_known_file_compressed(repo: Repo) -> None:
    repo.append(record("before"))
    repo.dispatch()
    rotated = rotate(repo)
    with gzip.open(repo.folder / "escalations.jsonl.2.gz", "wb") as packed:
        packed.write(rotated.read_bytes())
    rotated.unlink()
    repo.append(*[record(f"r{number}") for number in range(3)])


@pytest.mark.parametrize(
    ("before", "how"),
    [
        (an_invalid_config, "renamed"),
        (a_telemetry_that_cannot_be_written, "copied"),
        (no_source_yet, "renamed"),
        (no_source_yet, "copied"),
        (neither_a_valid_config_nor_a_source, "renamed"),
        (an_empty_source, "copied"),
        (quiet_nights, "renamed"),
        (quiet_nights, "copied"),
        (the_last_known_file_compressed, "renamed"),
    ],
)
def test_what_was_rotated_before_any_pass_took_it_up_goes_out(
    repo: Repo, server: SinkServer, before: Callable[[Repo], None], how: str
) -> None:
    # What was there before the first pass of all is history.
    repo.folder.mkdir(parents=True)
    history = repo.folder / "escalations.jsonl.7"
    history.write_text(line(record("history")))
    os.utime(history, (time.time() - 3600, time.time() - 3600))
    before(repo)
    if how == "renamed":
        rotate(repo)
    else:
        shutil.copy(repo.source, repo.source.with_name(repo.source.name + ".1"))
        os.truncate(repo.source, 0)
    repo.append(record("new"))
    for _ in range(2):
        assert repo.dispatch().exit_code == 0
    assert [name for name in names(server) if name != "before"] == ["r0", "r1", "r2", "new"]


def test_a_new_file_with_the_inode_of_a_removed_one_holds_up_nothing(repo: Repo, server: SinkServer) -> None:
    quiet_nights(repo)
    rotated = repo.source.with_name(repo.source.name + ".1")
    shutil.copy(repo.source, rotated)
    os.truncate(repo.source, 0)
    edit_queue(
        repo,
        f"UPDATE loops SET cursor = json_set(cursor, '$.inode', {rotated.stat().st_ino}, "
        f"'$.device', {rotated.stat().st_dev})",
    )
    repo.append(record("new"))
    assert repo.dispatch().exit_code == 0
    the_sink_got(server, "before", "r0", "r1", "r2", "new")


def test_a_file_that_was_taken_up_while_the_source_was_away_is_known_after_a_kill(
    repo: Repo, server: SinkServer
) -> None:
    """Two rotations, and no new file yet; the pass over the second one is killed."""
    repo.append(record("one"))
    repo.dispatch()
    rotate(repo)
    repo.append(*[record(f"b{number}") for number in range(6)])
    rotate(repo)
    server.answer(PATHS[HOOK], ok().after(0.3))
    process = repo.start("dispatch", *repo.target)
    server.wait_for(4, PATHS[HOOK])
    process.kill()
    process.communicate()
    (repo.folder / "escalations.jsonl.2").unlink()
    rotate_on = repo.folder / "escalations.jsonl.1"
    rotate_on.rename(repo.folder / "escalations.jsonl.2")
    repo.append(*[record(f"c{number}") for number in range(9)])
    server.answer(PATHS[HOOK], ok())
    repo.dispatch()
    sent = list(dict.fromkeys(names(server)))
    assert sent == ["one", *(f"b{number}" for number in range(6)), *(f"c{number}" for number in range(9))]
    assert all("rawLine" not in row for row in repo.telemetry())


def test_a_link_into_a_folder_that_may_not_be_listed_stops_no_alert(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    real = link_source(repo, tmp_path / "closed" / "log.jsonl")
    real.rename(real.with_name("log.jsonl.1"))
    real.write_text(line(record("two")))
    real.parent.chmod(0o311)
    try:
        assert replace(repo, prepare=lose_power).dispatch().json["processedCount"] == 1
    finally:
        real.parent.chmod(0o755)
    the_sink_got(server, "one", "two")
    assert "source_replaced" in {row.get("reasonCode") for row in repo.telemetry()}


def test_a_hole_before_a_record_costs_nothing_however_large(repo: Repo, server: SinkServer) -> None:
    """As copytruncate leaves it under a writer that goes on where it was."""
    repo.append(record("one"))
    repo.dispatch()
    with repo.source.open("r+b") as source:
        source.truncate(0)
        source.seek(40 << 20)
        source.write(line(record("two")).encode())
    repo.dispatch()
    the_sink_got(server, "one", "two")
    assert "blank_line" not in repo.telemetry_file.read_text()
