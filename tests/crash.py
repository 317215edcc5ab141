"""A crash test that runs for as long as one likes: dispatchers killed at random moments, nothing lost.

    python tests/crash.py --kills 500
    python tests/crash.py --kills 1000000 --seconds 3600 --seed 7
    python tests/crash.py --kills 500 --quiet

A real receiver with up to three sinks, real processes of the program, SIGKILL. All the while escalations are
appended, some lines in two halves, and the source is rotated; a sink is out of order now and then.
After the last kill, passes run undisturbed until nothing waits. Then what arrived is compared with what was
written. Exit 1 when anything was lost, or repeated beyond what was in flight at a kill. `--quiet` has repeats
held back and digests sent; then how many were held back must be told exactly, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conftest import Repo, make_repo
from escalations import (
    CHAT,
    HOOK,
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
TRACE = re.compile(rb"pass-\d+")
# With --quiet: how long the same is not told again, and how much one message to Slack may hold.
WINDOW_SECONDS = 1
PER_MESSAGE = 4
# Passes without a kill that may be needed at the end: each outage is over by then.
CLEAN_PASSES = 20
# One fault may come with hundreds that follow from it.
SHOWN_FAULTS = 30


@dataclass(frozen=True)
class Arrival:
    """A delivery that a sink took: what it holds, and which pass sent it."""

    sink: str
    serial: int
    escalation_id: str
    trace_id: str


class Receiver:
    """What the three sinks saw and took. Answers take a few milliseconds, so that kills hit in flight."""

    def __init__(self, serials: dict[str, int], chance: random.Random) -> None:
        # By escalationId, as the host has written them.
        self._serials = serials
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
            self.arrivals += [
                Arrival(sink, self._serials.get(identity, -1), identity, trace[0].decode("ascii"))
                for identity in escalation_ids(request)
            ]
        return (accepted() if sink == PAGER else ok()).after(delay)


class Writer:
    """The host: appends escalations and a few bad lines, each with a serial number, and rotates the file."""

    def __init__(self, repo: Repo, ids: dict[str, int], chance: random.Random) -> None:
        self.serials: list[int] = []
        self.ids = ids
        self.bad_lines: list[str] = []
        self.rotations = 0
        self._repo = repo
        self._chance = chance
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._append_until_ended)

    def append(self, count: int) -> None:
        with self._lock:
            for _ in range(count):
                if self._chance.random() < 0.05:
                    self.bad_lines.append(f"torn by hand {len(self.bad_lines)}")
                    self._repo.append(self.bad_lines[-1] + "\n")
                    continue
                self.serials.append(len(self.serials))
                codes = [f"code_{self._chance.randrange(8)}"]
                record = health_critical(serial=self.serials[-1], reasonCodes=codes)
                del record["traceId"]
                text = line(record)
                self.ids[program.escalation_id(self._repo.loop, text.strip().encode())] = self.serials[-1]
                half = self._chance.randrange(len(text)) if self._chance.random() < 0.2 else 0
                self._repo.append(text[:half])
                time.sleep(0.002 if half else 0)
                self._repo.append(text[half:])

    def rotate(self) -> None:
        """As logrotate does it, by rename or with copytruncate, whatever a dispatcher does meanwhile: `.1` is
        the newest."""
        with self._lock:
            source = self._repo.source
            newest = source.with_name(f"{source.name}.1")
            # None is ever removed: what is gone before it was read is beyond any promise.
            for number in range(self.rotations, 0, -1):
                older = source.with_name(f"{source.name}.{number}")
                older.rename(source.with_name(f"{source.name}.{number + 1}"))
            if self._chance.random() < 0.5:
                source.rename(newest)
            else:
                shutil.copyfile(source, newest)
                os.truncate(source, 0)
            self.rotations += 1
            # The host never leaves its file missing for long: the next append makes a new one.
            self._repo.append(f"rotated {self.rotations}\n")
            self.bad_lines.append(f"rotated {self.rotations}")

    def _append_until_ended(self) -> None:
        while not self._ended.wait(self._chance.uniform(0.01, 0.12)):
            self.append(1)
            # A dispatcher that never ran knows of no file but the current one.
            if self._repo.state_file.exists() and self._chance.random() < 0.15:
                self.rotate()

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@dataclass
class Result:
    """What came of it. Each fault is a sentence; none: the promise held."""

    kills: int = 0
    passes: int = 0
    rotations: int = 0
    escalations: int = 0
    lost: int = 0
    repeated: int = 0
    held_back: int = 0
    repeats: dict[str, int] = field(default_factory=dict)
    late: int = 0
    torn_rows: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        per_kill = ", ".join(
            f"{sink} {count} ({count / max(self.kills, 1):.2f} a kill)"
            for sink, count in self.repeats.items()
        )
        return "\n".join(
            [
                f"kills {self.kills}  lost {self.lost}  repeated {self.repeated}",
                f"repeats by lane: {per_kill}; held back on purpose: {self.held_back}",
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
    seed: int = 0,
    quiet: bool = False,
) -> Result:
    """Run until so many dispatchers were killed or so much time has passed, and judge what came of it."""
    chance = random.Random(seed)
    ids: dict[str, int] = {}
    receiver = Receiver(ids, random.Random(seed + 1))
    result = Result()
    began = time.monotonic()
    with SinkServer(default=receiver) as server:
        repo = make_repo(folder, server)
        server.answer(PATHS[PAGER], receiver)
        used = SINKS[:sinks]
        repo.write_config(crash_config(used, quiet=quiet))
        killed: set[str] = set()
        with Writer(repo, ids, random.Random(seed + 2)) as writer:
            writer.append(3)
            while result.kills < kills and time.monotonic() - began < seconds:
                trace = f"pass-{result.passes}"
                writer.append(chance.choice((0, 1, 2, 8)))
                receiver.down = {chance.choice(used)} if chance.random() < 0.15 else set()
                if run_and_kill(repo, receiver, trace, chance, result.faults):
                    result.kills += 1
                    killed.add(trace)
                result.passes += 1
        receiver.down = set()
        for _ in range(CLEAN_PASSES):
            done = repo.dispatch("--trace-id", f"pass-{result.passes}")
            result.passes += 1
            if done.exit_code != 0 or done.stderr:
                result.faults.append(f"a pass ended with exit {done.exit_code}: {done.stderr.strip()}")
            elif done.json["processedCount"] == done.json["waitingCount"] == 0:
                break
        else:
            result.faults.append("something still waits when all sinks are well")
        judge(repo, receiver.arrivals, writer, used, killed, result)
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
    config["delivery"] = {"backoffSeconds": {"initial": 0, "max": 0}, "maxAttemptsPerPass": 2}
    return config


def run_and_kill(
    repo: Repo, receiver: Receiver, trace: str, chance: random.Random, faults: list[str]
) -> bool:
    """Start a dispatcher and kill it at some moment; tells whether it was still alive.

    A third of the moments lie anywhere in the first quarter of a second (start-up, reading), a third just
    after some request has arrived (sending), a third just after some row or the state was written.
    """
    kind = chance.choice(("start", "send", "write"))
    # Only the first kind is there to hit the imports too.
    starter = replace(repo, command=[*repo.command]) if kind == "start" else repo
    process = starter.start("dispatch", *repo.target, "--trace-id", trace)
    try:
        count = chance.randrange(1, 14)
        if kind == "start":
            time.sleep(chance.uniform(0.0, 0.25))
        elif kind == "send":
            enough = receiver.seen + count
            wait_until(process, lambda: receiver.seen >= enough)
        else:
            for _ in range(count):
                before = written(repo)
                wait_until(process, lambda before=before: written(repo) != before)
        if kind != "start":
            time.sleep(chance.uniform(0.0, 0.01))
        alive = process.poll() is None
        process.kill()
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    if process.returncode in (0, -9):
        return alive and process.returncode == -9
    faults.append(f"{trace} ended with exit {process.returncode}: {stderr.strip()[-500:]}")
    return False


def wait_until(process: subprocess.Popen[str], reached: Any) -> None:
    while process.poll() is None and not reached():
        time.sleep(0.0005)


def written(repo: Repo) -> list[tuple[int, int]]:
    """Tells, by comparison, whether anything was written."""
    found = []
    for path in (repo.attempts_file, repo.telemetry_file, repo.state_file):
        try:
            stat = path.stat()
        except FileNotFoundError:
            found.append((0, 0))
        else:
            found.append((stat.st_size, stat.st_ino))
    return found


def rows_of(path: Path, result: Result) -> Iterator[dict[str, Any]]:
    """The whole rows of a file; a kill may leave a torn one, which is counted."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except ValueError:
            result.torn_rows += 1


def judge(
    repo: Repo,
    arrivals: Sequence[Arrival],
    writer: Writer,
    sinks: Sequence[str],
    killed: set[str],
    result: Result,
) -> None:
    """Compare what arrived with what was written, and the program's own records with both."""
    faults = result.faults
    result.escalations = len(writer.serials)
    held = judge_repeats(repo, writer, result)
    result.held_back = len(held)
    seen: dict[tuple[str, int], Arrival] = {}
    repeats: Counter[str] = Counter()
    repeats_of_kill: Counter[tuple[str, str]] = Counter()
    for arrival in arrivals:
        if arrival.serial < 0:
            faults.append(f"{arrival} came under an id of no escalation")
        if (arrival.sink, arrival.serial) in held:
            faults.append(f"{arrival} came although it is on record as held back")
        before = seen.get((arrival.sink, arrival.serial))
        if before is not None:
            repeats[arrival.sink] += 1
            repeats_of_kill[arrival.sink, before.trace_id] += 1
            if before.trace_id not in killed:
                faults.append(f"{arrival} repeats a delivery of {before.trace_id}, which was not killed")
        else:
            newest = max((serial for sink, serial in seen if sink == arrival.sink), default=-1)
            if arrival.serial < newest:
                faults.append(f"{arrival} came after {newest}: out of order")
        seen[arrival.sink, arrival.serial] = arrival
    for (sink, trace), count in repeats_of_kill.items():
        if count > (PER_MESSAGE if sink == CHAT and result.held_back else 1):
            faults.append(f"{sink} repeated {count} deliveries after the kill of {trace}")
    missing = [(sink, n) for sink in sinks for n in writer.serials if (sink, n) not in {*seen, *held}]
    faults += [f"escalation {serial} never reached {sink}" for sink, serial in missing]
    result.lost = len(missing)
    result.repeats = {sink: repeats[sink] for sink in sinks}
    result.repeated = sum(repeats.values())
    judge_records(repo, arrivals, writer, sinks, killed, held, result)


def judge_repeats(repo: Repo, writer: Writer, result: Result) -> set[tuple[str, int]]:
    """Hold what attempts say of repeats against each other. Returns what was held back: sink and serial."""
    held: set[tuple[str, int]] = set()
    since: dict[tuple[str, str], list[str]] = {}
    for row in rows_of(repo.attempts_file, result):
        if "repeat" not in row:
            continue
        subject = (row["sinkId"], row["repeat"]["key"])
        if row["outcome"] == "skipped":
            since[subject].append(row["repeat"]["at"])
            held.add((row["sinkId"], writer.ids[row["escalationId"]]))
        else:
            untold = since.get(subject)
            expected = {"repeats": len(untold), "since": untold[0]} if untold else None
            if row.get("heldBack") != expected:
                result.faults.append(f"{row['escalationId']} says {row.get('heldBack')}, not {expected}")
            since[subject] = []
    return held


def judge_records(
    repo: Repo,
    arrivals: Sequence[Arrival],
    writer: Writer,
    sinks: Sequence[str],
    killed: set[str],
    held: set[tuple[str, int]],
    result: Result,
) -> None:
    """Telemetry has one row for each line and says at last what came of it; attempts agree with arrivals."""
    faults = result.faults
    rows = list(rows_of(repo.telemetry_file, result))
    late = [row for row in rows if row.get("late")]
    result.late = len(late)
    told: Counter[int] = Counter()
    bad: Counter[str] = Counter()
    open_entries: set[tuple[str, int]] = set()
    for row in rows:
        if "rawLine" in row:
            bad[row["rawLine"]] += 1
            continue
        if "escalation" not in row:
            faults.append(f"the telemetry tells of {row['reasonCode']}: {row['message']}")
            continue
        serial = row["escalation"]["serial"]
        told[serial] += not row.get("late")
        if writer.ids.get(row["escalationId"]) != serial:
            faults.append(f"the row of escalation {serial} has the id {row['escalationId']}")
        names = [entry["id"] for entry in row["sinks"]]
        if not row.get("late") and sorted(names) != sorted(sinks):
            faults.append(f"the row of escalation {serial} names the sinks {names}")
        for entry in row["sinks"]:
            place = (entry["id"], serial)
            if row.get("late") and place not in open_entries:
                faults.append(f"a late row for {place}, which no row says was put off")
            open_entries -= {place}
            if entry["status"] == "failed":
                open_entries.add(place)
    faults += [f"escalation {n} has {told[n]} rows" for n in writer.serials if told[n] != 1]
    faults += [f"{text!r} has {bad[text]} rows" for text in writer.bad_lines if bad[text] != 1]
    faults += [f"no row says that {place} was delivered in the end" for place in sorted(open_entries)]

    taken = Counter((arrival.sink, arrival.serial, arrival.trace_id) for arrival in arrivals)
    delivered: Counter[tuple[str, int]] = Counter()
    for row in rows_of(repo.attempts_file, result):
        if row["outcome"] == "delivered":
            place = (row["sinkId"], writer.ids.get(row["escalationId"], -1))
            delivered[place] += 1
            taken[*place, row["traceId"]] -= 1
    for (sink, serial, trace), count in taken.items():
        # An arrival without a row was in flight when its pass was killed. A row without an arrival is a lie.
        if count < 0 or (count > 0 and trace not in killed):
            faults.append(f"{sink} took escalation {serial} from {trace} {count} times more than rows say")
    for sink in sinks:
        for serial in writer.serials:
            if delivered[sink, serial] != ((sink, serial) not in held):
                faults.append(
                    f"attempts say that {sink} took escalation {serial} {delivered[sink, serial]} times"
                )
    waiting = repo.state()["waitingCount"]
    if waiting:
        faults.append(f"the state says that {waiting} deliveries wait")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill dispatchers at random moments; nothing may be lost.")
    parser.add_argument("--kills", type=int, default=100, help="end after so many (default 100)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end after this time at the latest"
    )
    parser.add_argument("--sinks", type=int, choices=(1, 2, 3), default=len(SINK_TYPES))
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--quiet", action="store_true", help="with repeats held back, and digests")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = crash(
            Path(folder),
            kills=options.kills,
            seconds=options.seconds,
            sinks=options.sinks,
            seed=options.seed,
            quiet=options.quiet,
        )
    sys.stdout.write(f"{result}\n")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
