"""A crash test that runs for as long as one likes: dispatchers killed at random moments, nothing lost.

    python tests/crash.py --kills 500
    python tests/crash.py --kills 1000000 --seconds 3600 --seed 7
    python tests/crash.py --kills 500 --quiet

A real receiver with up to three sinks, up to three loops that share one queue, real processes of the program,
several at a time, SIGKILL. All the while escalations are appended, some lines in two halves, the sources are
rotated and compressed, the telemetry files are rotated; a sink is out of order now and then. After the last
kill, passes run undisturbed until nothing waits. Then what arrived is compared with what was written, and the
program's own records with both: each of their rows must be there exactly once. Exit 1 if anything was lost,
or repeated beyond what was in flight at a kill. `--quiet` has repeats held back and digests sent; then how
many were held back must be exact, too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from conftest import Repo, make_repo
from escalations import (
    CHAT,
    HOOK,
    LOOP,
    NO_WAIT,
    PAGER,
    PATHS,
    SINK_TYPES,
    escalation_ids,
    health_critical,
    line,
    sink_config,
)
from loopback import Answer, Received, SinkServer, accepted, error, ok

import ops_alert_dispatch as program

SINKS = (HOOK, CHAT, PAGER)
LOOPS = (LOOP, "east", "west")
TRACE = re.compile(rb"pass-\d+")
# With --quiet: repeats within this time are held back, and one message to Slack holds up to so many.
WINDOW_SECONDS = 1
PER_MESSAGE = 4
# Passes without a kill that may be needed at the end: each outage is over by then.
CLEAN_PASSES = 20
# One fault may come with hundreds that follow from it.
SHOWN_FAULTS = 30


class Written(NamedTuple):
    """An escalation that the host has written. Repeats of each other have the same loop and reason code."""

    serial: int
    loop: str
    reason: str
    timestamp: str


class Arrival(NamedTuple):
    """A delivery that a sink took: what it holds, and which pass sent it."""

    sink: str
    identity: str
    trace_id: str


class Receiver:
    """What the sinks saw and took. Answers take a few milliseconds, so that kills hit in flight."""

    def __init__(self, chance: random.Random) -> None:
        self.arrivals: list[Arrival] = []
        self.down: set[str] = set()
        self.seen = 0
        self._chance = chance
        self._lock = threading.Lock()

    def __call__(self, request: Received) -> Answer:
        sink = next(sink for sink, path in PATHS.items() if request.path == path)
        if request.json is None:  # the kill came while the request was being sent: no sink takes half of one
            return error(400, "not JSON")
        trace = TRACE.search(request.body)
        assert trace is not None
        with self._lock:
            self.seen += 1
            delay = self._chance.uniform(0.0, 0.008)
            if sink in self.down:
                return error(503, "out of order").after(delay)
            self.arrivals += [Arrival(sink, one, trace[0].decode("ascii")) for one in escalation_ids(request)]
        return (accepted() if sink == PAGER else ok()).after(delay)


class Writer:
    """The host: appends escalations and a few bad lines, rotates its files, and the telemetry."""

    def __init__(self, loops: Sequence[Repo], chance: random.Random) -> None:
        # By escalationId, in the order of writing.
        self.written: dict[str, Written] = {}
        self.bad_lines: Counter[tuple[str, str]] = Counter()
        self.rotations = 0
        self._loops = loops
        self._chance = chance
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._append_until_ended)

    def append(self, count: int) -> None:
        with self._lock:
            for _ in range(count):
                loop = self._chance.choice(self._loops)
                if self._chance.random() < 0.05:
                    self._append_bad_line(loop, "torn by hand")
                    continue
                serial = len(self.written)
                reason = f"code_{self._chance.randrange(8)}"
                record = health_critical(serial=serial, reasonCodes=[reason])
                del record["traceId"]
                text = line(record)
                identity = program.escalation_id(loop.loop, text.strip().encode())
                self.written[identity] = Written(serial, loop.loop, reason, record["timestamp"])
                half = self._chance.randrange(len(text)) if self._chance.random() < 0.2 else 0
                loop.append(text[:half])
                time.sleep(0.002 if half else 0)
                loop.append(text[half:])

    def _append_bad_line(self, loop: Repo, text: str) -> None:
        text = f"{text} {self.bad_lines.total()}"
        self.bad_lines[loop.loop, text] += 1
        loop.append(f"{text}\n")

    def rotate_source(self, loop: Repo) -> None:
        """As logrotate does it, by rename or with copytruncate, whatever a dispatcher does meanwhile."""
        with self._lock:
            shift_numbers(loop.source)
            newest = loop.source.with_name(f"{loop.source.name}.1")
            if self._chance.random() < 0.5:
                loop.source.rename(newest)
            else:
                shutil.copyfile(loop.source, newest)
                os.truncate(loop.source, 0)
            self.rotations += 1
            # The host never leaves its file missing for long: the next append makes a new one.
            self._append_bad_line(loop, "rotated")
            if self._chance.random() < 0.5:
                compress(newest)

    def rotate_telemetry(self, loop: Repo) -> None:
        """By rename, as a file must be rotated that others append to, and only if it is not empty."""
        for file in (loop.telemetry_file, loop.attempts_file):
            if self._chance.random() < 0.5 and file.exists() and file.stat().st_size:
                shift_numbers(file)
                file.rename(file.with_name(f"{file.name}.1"))
                self.rotations += 1

    def _append_until_ended(self) -> None:
        while not self._ended.wait(self._chance.uniform(0.01, 0.12)):
            self.append(1)
            if self._chance.random() < 0.15:
                self.rotate_source(self._chance.choice(self._loops))
            if self._chance.random() < 0.1:
                self.rotate_telemetry(self._chance.choice(self._loops))

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def rotated(file: Path) -> list[Path]:
    """What rotations have made of a file, the oldest first."""
    found = [path for path in file.parent.glob(f"{file.name}.*") if path.name.split(".")[2].isdigit()]
    return sorted(found, key=lambda path: -int(path.name.split(".")[2]))


def shift_numbers(file: Path) -> None:
    """Make room for a new `.1`. None is ever removed: what is gone unread is beyond any promise."""
    for path in rotated(file):
        number, *ending = path.name.removeprefix(f"{file.name}.").split(".")
        path.rename(path.with_name(".".join([file.name, str(int(number) + 1), *ending])))


def compress(path: Path) -> None:
    """As gzip does it: the new file keeps the time of the old one, which is then removed."""
    stat = path.stat()
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    os.utime(packed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.unlink()


def unpacked(path: Path) -> bytes:
    """What is in a file, compressed by a rotation or not."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


@dataclass
class Result:
    """What came of it. Each fault is a sentence; none: the promise held."""

    kills: int = 0
    passes: int = 0
    rotations: int = 0
    escalations: int = 0
    lost: int = 0
    held_back: int = 0
    repeats: Counter[str] = field(default_factory=Counter)
    late: int = 0
    torn_rows: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        per_kill = ", ".join(
            f"{sink} {count} ({count / max(self.kills, 1):.2f} a kill)"
            for sink, count in sorted(self.repeats.items())
        )
        return "\n".join(
            [
                f"kills {self.kills}  lost {self.lost}  repeated {self.repeats.total()}",
                f"repeats by sink: {per_kill or 'none'}; held back on purpose: {self.held_back}",
                (
                    f"{self.escalations} escalations, {self.passes} passes, {self.rotations} rotations, "
                    f"{self.late} late deliveries, {self.torn_rows} torn rows, {self.seconds:.1f} s"
                ),
                *(f"FAULT: {fault}" for fault in self.faults[:SHOWN_FAULTS]),
                *([f"and {more} more faults"] if (more := len(self.faults) - SHOWN_FAULTS) > 0 else []),
                "the promise was broken" if self.faults else "the promise held",
            ]
        )


def crash(
    folder: Path,
    *,
    kills: int,
    seconds: float = float("inf"),
    sinks: int = 3,
    loops: int = 3,
    seed: int = 0,
    quiet: bool = False,
) -> Result:
    """Run until so many dispatchers were killed or so much time has passed, and judge what came of it."""
    chance = random.Random(seed)
    receiver = Receiver(random.Random(seed + 1))
    result = Result()
    began = time.monotonic()
    with SinkServer(default=receiver) as server:
        repo = make_repo(folder, server)
        server.answer(PATHS[PAGER], receiver)
        used, repos = SINKS[:sinks], [replace(repo, loop=loop) for loop in LOOPS[:loops]]
        repo.write_config(crash_config(used, quiet=quiet))
        killed: set[str] = set()
        writer = Writer(repos, random.Random(seed + 2))
        writer.append(3)
        for one in repos:
            one.append("")
        # A dispatcher that never ran knows of no file but the current one.
        run_undisturbed(repo, result)
        with writer:
            while result.kills < kills and time.monotonic() - began < seconds:
                writer.append(chance.choice((0, 1, 2, 8)))
                receiver.down = {chance.choice(used)} if chance.random() < 0.15 else set()
                gone = run_and_kill(repos, receiver, chance, result)
                result.kills += len(gone)
                killed |= gone
        receiver.down = set()
        for _ in range(CLEAN_PASSES):
            summary = run_undisturbed(repo, result)
            if summary.get("processedCount") == summary.get("waitingCount") == 0:
                break
        else:
            result.faults.append("something still waits when all sinks are well")
        judge_arrivals(repos, receiver.arrivals, writer, used, killed, result)
    result.rotations = writer.rotations
    result.seconds = time.monotonic() - began
    return result


def crash_config(sinks: Sequence[str], *, quiet: bool) -> dict[str, Any]:
    config = sink_config(everywhere=True)
    if quiet:
        config["routing"]["repeat"] = {"windowSeconds": WINDOW_SECONDS}
        config["sinks"][CHAT]["maxPerMessage"] = PER_MESSAGE
    config["sinks"] = {sink: config["sinks"][sink] for sink in sinks}
    config["routing"]["defaultSinks"] = list(sinks)
    # A sink that was out of order is tried again by the next pass.
    config["delivery"] = {"backoffSeconds": NO_WAIT, "maxAttemptsPerPass": 2}
    return config


def run_undisturbed(repo: Repo, result: Result) -> dict[str, Any]:
    """One pass over all loops; its summary."""
    trace = f"pass-{result.passes}"
    done = repo.run("dispatch", "--repo", str(repo.root), "--all-loops", "--trace-id", trace)
    result.passes += 1
    if done.exit_code != 0 or done.stderr:
        result.faults.append(f"a pass ended with exit {done.exit_code}: {done.stdout} {done.stderr}")
        return {}
    summary: dict[str, Any] = done.json
    return summary


def run_and_kill(
    loops: Sequence[Repo], receiver: Receiver, chance: random.Random, result: Result
) -> set[str]:
    """Start dispatchers for some of the loops or all, and kill some of them at some moment. Returns the
    traces of those that were still alive; the others come to an end by themselves.

    A third of the moments lie anywhere in the first quarter of a second (start-up, reading), a third just
    after some request has arrived (sending), a third just after some row or summary was written.
    """
    kind = chance.choice(("start", "send", "write"))
    started: dict[str, subprocess.Popen[str]] = {}
    for _ in range(chance.choice((1, 1, 2, 3))):
        repo = chance.choice(loops)
        # Only the first kind is there to hit the imports, too.
        repo = replace(repo, command=[*repo.command]) if kind == "start" else repo
        target = ["--repo", str(repo.root), "--all-loops"] if chance.random() < 0.3 else repo.target
        trace = f"pass-{result.passes}"
        started[trace] = repo.start("dispatch", *target, "--trace-id", trace)
        result.passes += 1
    processes = [*started.values()]
    killed = set()
    try:
        count = chance.randrange(1, 14)
        if kind == "start":
            time.sleep(chance.uniform(0.0, 0.25))
        elif kind == "send":
            enough = receiver.seen + count
            wait_until(processes, lambda: receiver.seen >= enough)
        else:
            for _ in range(count):
                wait_until(processes, partial(is_changed, loops, written(loops)))
        if kind != "start":
            time.sleep(chance.uniform(0.0, 0.01))
        victims = chance.sample(sorted(started), chance.randint(1, len(started)))
        for trace in victims:
            if started[trace].poll() is None:
                started[trace].kill()
        for trace, process in started.items():
            stdout, stderr = process.communicate(timeout=90)
            if process.returncode == -9 and trace in victims:
                killed.add(trace)
            elif process.returncode or stderr:
                text = f"{stdout.strip()[-500:]} {stderr.strip()[-500:]}"
                result.faults.append(f"{trace} ended with exit {process.returncode}: {text}")
    finally:
        for process in processes:
            process.kill()
    return killed


def wait_until(processes: Sequence[subprocess.Popen[str]], reached: Callable[[], bool]) -> None:
    while any(process.poll() is None for process in processes) and not reached():
        time.sleep(0.0005)


def written(loops: Sequence[Repo]) -> list[tuple[int, int]]:
    """Tells, by comparison, whether anything was written."""
    found = []
    for path in [p for loop in loops for p in (loop.attempts_file, loop.telemetry_file, loop.state_file)]:
        try:
            stat = path.stat()
        except FileNotFoundError:
            found.append((0, 0))
        else:
            found.append((stat.st_size, stat.st_ino))
    return found


def is_changed(loops: Sequence[Repo], before: list[tuple[int, int]]) -> bool:
    return written(loops) != before


def rows_of(file: Path, result: Result) -> Iterator[dict[str, Any]]:
    """The rows of a file and of what rotations have made of it, the oldest first. A kill may leave a torn
    row: then it must be there whole as well."""
    texts = [
        text for path in (*rotated(file), file) if path.exists() for text in path.read_text().split("\n")
    ]
    torn = []
    for text in texts:
        try:
            if text:
                yield json.loads(text)
        except ValueError:
            torn.append(text)
    for text in torn:
        result.torn_rows += 1
        if not any(whole.startswith(text) and whole != text for whole in texts):
            result.faults.append(f"a row of {file.name} is torn, and nowhere whole: {text[:200]}")


def judge_arrivals(
    loops: Sequence[Repo],
    arrivals: Sequence[Arrival],
    writer: Writer,
    sinks: Sequence[str],
    killed: set[str],
    result: Result,
) -> None:
    """Compare what arrived with what was written, and the program's own records with both."""
    faults = result.faults
    result.escalations = len(writer.written)
    held: set[tuple[str, str]] = set()
    delivered: Counter[tuple[str, str, str]] = Counter()
    for loop in loops:
        ends = judge_attempts(loop, writer, sinks, held, result)
        delivered += ends
        judge_telemetry(loop, writer, sinks, result)
        judge_summary(loop, writer, sinks, result)
    judge_queue(loops[0], result)
    result.held_back = len(held)

    seen: dict[tuple[str, str], Arrival] = {}
    newest: dict[tuple[str, str], int] = {}
    repeats_of_kill: Counter[tuple[str, str]] = Counter()
    for arrival in arrivals:
        place = (arrival.sink, arrival.identity)
        known = writer.written.get(arrival.identity)
        if known is None:
            faults.append(f"{arrival} came under an id of no escalation")
            continue
        if place in held:
            faults.append(f"{arrival} came although it is on record as held back")
        if before := seen.get(place):
            result.repeats[arrival.sink] += 1
            repeats_of_kill[arrival.sink, before.trace_id] += 1
            if before.trace_id not in killed:
                faults.append(f"{arrival} repeats a delivery of {before.trace_id}, which was not killed")
        elif known.serial < newest.get((arrival.sink, known.loop), -1):
            faults.append(f"{arrival} ({known.serial}) came too late: out of order")
        newest[arrival.sink, known.loop] = max(known.serial, newest.get((arrival.sink, known.loop), -1))
        seen[place] = arrival
    for (sink, trace), count in repeats_of_kill.items():
        if count > (PER_MESSAGE if sink == CHAT and held else 1):
            faults.append(f"{sink} repeated {count} deliveries after the kill of {trace}")
    missing = [(sink, one) for sink in sinks for one in writer.written if (sink, one) not in {*seen, *held}]
    faults += [f"escalation {writer.written[one]} never reached {sink}" for sink, one in missing]
    result.lost = len(missing)
    taken = Counter((*arrival[:2], arrival.trace_id) for arrival in arrivals)
    for (sink, one, trace), count in (
        (place, taken[place] - delivered[place]) for place in taken | delivered
    ):
        # An arrival without a row was in flight when its pass was killed. A row without an arrival is a lie.
        if count < 0 or (count > 0 and trace not in killed):
            faults.append(f"{sink} took {writer.written[one]} from {trace} {count} times more than rows say")


def judge_attempts(
    loop: Repo, writer: Writer, sinks: Sequence[str], held: set[tuple[str, str]], result: Result
) -> Counter[tuple[str, str, str]]:
    """Each attempt of a delivery has one row, and each delivery one that ends it; what is said of repeats is
    exact. Adds to `held` what was held back; returns what was delivered: sink, id and trace."""
    faults = result.faults
    attempts: dict[tuple[str, str], list[int]] = {}
    ends: Counter[tuple[str, str]] = Counter()
    delivered: Counter[tuple[str, str, str]] = Counter()
    since: dict[tuple[str, str], list[str]] = {}
    for row in rows_of(loop.attempts_file, result):
        sink, one = place = row["sinkId"], row["escalationId"]
        subject = (sink, writer.written[one].reason)
        if row["outcome"] == "skipped":
            since.setdefault(subject, []).append(writer.written[one].timestamp)
            held.add(place)
            ends[place] += 1
            continue
        attempts.setdefault(place, []).append(row["attempt"])
        if row["outcome"] == "delivered":
            held_back = since.pop(subject, [])
            expected = {"repeats": len(held_back), "since": held_back[0]} if held_back else None
            if row.get("heldBack") != expected:
                faults.append(f"{one} says {row.get('heldBack')}, not {expected}")
            ends[place] += 1
            delivered[*place, row["traceId"]] += 1
    for (sink, one), numbers in attempts.items():
        if numbers != [*range(1, len(numbers) + 1)]:
            faults.append(f"the attempts of {one} for {sink} are numbered {numbers}")
    for one, known in writer.written.items():
        for sink in sinks:
            if known.loop == loop.loop and ends[sink, one] != 1:
                faults.append(f"attempts say {ends[sink, one]} times how {known} ended for {sink}")
    return delivered


def judge_telemetry(loop: Repo, writer: Writer, sinks: Sequence[str], result: Result) -> None:
    """Each line has one row; what it puts off has one late row."""
    faults = result.faults
    rows: Counter[str] = Counter()
    bad: Counter[tuple[str, str]] = Counter()
    waiting: set[tuple[str, str]] = set()
    order: list[int] = []
    for row in rows_of(loop.telemetry_file, result):
        if "rawLine" in row:
            bad[loop.loop, row["rawLine"]] += 1
            continue
        if "escalationId" not in row:
            faults.append(f"the telemetry reports {row['reasonCode']}: {row['message']}")
            continue
        one = row["escalationId"]
        if row.get("late"):
            result.late += 1
        else:
            rows[one] += 1
            order.append(row["escalation"]["serial"])
            if writer.written[one].serial != row["escalation"]["serial"]:
                faults.append(f"the row of {row['escalation']} has the id {one}")
            if sorted(entry["id"] for entry in row["sinks"]) != sorted(sinks):
                faults.append(f"the row of {one} names the sinks {row['sinks']}")
        for entry in row["sinks"]:
            place = (entry["id"], one)
            if row.get("late") and place not in waiting:
                faults.append(f"a late row for {place}, which no row says was put off")
            waiting.discard(place)
            if entry["status"] in ("failed", "waiting"):
                waiting.add(place)
    mine = {one: known for one, known in writer.written.items() if known.loop == loop.loop}
    faults += [f"{known} has {rows[one]} rows" for one, known in mine.items() if rows[one] != 1]
    lines = Counter({place: count for place, count in writer.bad_lines.items() if place[0] == loop.loop})
    faults += [f"{place} has {bad[place]} rows" for place in lines | bad if bad[place] != lines[place]]
    faults += [f"no row says that {place} was delivered in the end" for place in sorted(waiting)]
    if order != sorted(order):
        faults.append(f"the rows of {loop.loop} are not in the order of the source")


def judge_summary(loop: Repo, writer: Writer, sinks: Sequence[str], result: Result) -> None:
    """The counts of the summary are exact, whatever was killed."""
    count = sum(known.loop == loop.loop for known in writer.written.values())
    state = loop.state()
    if state["waitingCount"]:
        result.faults.append(f"the summary says that {state['waitingCount']} deliveries wait")
    for sink in sinks if count else ():
        figures = state["sinks"][sink]
        if figures["deliveredCount"] + figures["skippedCount"] != count:
            result.faults.append(f"{figures} do not count the {count} escalations of {loop.loop} for {sink}")


def judge_queue(repo: Repo, result: Result) -> None:
    """The queue is whole, and nothing is left in it that is still to be done."""
    path = program.usual_job(str(repo.root), repo.loop).queue_file
    with closing(sqlite3.connect(path)) as queue:
        for query, expected in (
            ("PRAGMA integrity_check", "ok"),
            ("SELECT count(*) FROM outbox", 0),
            ("SELECT count(*) FROM escalations WHERE NOT reported OR settled_at IS NULL", 0),
            ("SELECT count(*) FROM deliveries WHERE status = 'waiting' OR in_flight", 0),
        ):
            [found] = queue.execute(query).fetchone()
            if found != expected:
                result.faults.append(f"the queue answers {found} to {query}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill dispatchers at random moments; nothing may be lost.")
    parser.add_argument("--kills", type=int, default=100, help="end after so many (default 100)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end after this time at the latest"
    )
    parser.add_argument("--sinks", type=int, choices=(1, 2, 3), default=len(SINK_TYPES))
    parser.add_argument("--loops", type=int, choices=(1, 2, 3), default=len(LOOPS))
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--quiet", action="store_true", help="with repeats held back, and digests")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = crash(Path(folder), **vars(options))
    sys.stdout.write(f"{result}\n")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
