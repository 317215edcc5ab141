"""What is measured, each against something that anyone can run on the same machine at the same time."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from escalations import LOOP, health_critical, line, timestamp

from benchmarks.measure import (
    PROGRAM,
    PYTHON,
    Cost,
    Row,
    all_turns,
    callers_env,
    check,
    clean_env,
    compare,
    peak_memory,
    run,
    take_turns,
)
from benchmarks.receiver import Receiver

# Sends the POSTs of a file in a bare requests.Session, and prints what that took without its start-up.
BARE_LOOP = """
import json, sys, time
import requests
with open(sys.argv[1]) as file:
    posts = json.load(file)
session = requests.Session()
started, worked = time.perf_counter(), time.process_time()
for url, headers, body in posts:
    session.post(url, data=body.encode(), headers=headers).raise_for_status()
print(json.dumps([time.perf_counter() - started, time.process_time() - worked]))
"""


# Ingests the source of a loop, and prints the seconds that it took without its start-up.
INGEST = """
import os, sys, threading, time
import ops_alert_dispatch as program
job = program.usual_job(*sys.argv[1:])
config = program.load_config(job.config_file, os.environ)
with program.Queue.open(job.queue_file) as queue:
    shared = program.Shared(queue, config, program.Clock(3600))
    loop = program.Loop(shared, job)
    loop.begin()
    started = time.perf_counter()
    while loop.ingest():
        queue.tidy()
    print(time.perf_counter() - started)
    loop.close()
"""

# Puts settled escalations into the queue, older than the retention.
SETTLED = """
import sys, time
import ops_alert_dispatch as program
job = program.usual_job(*sys.argv[1:3])
then = time.time() - program.RETENTION_SECONDS - 3600
record = b'{"category":"health_critical"}' + b" " * 400
with program.Queue.open(job.queue_file) as queue, queue.transaction():
    loop, first = queue.find_loop(job.loop_id)[0], queue.next_id()
    numbers = range(first, first + int(sys.argv[3]))
    place = ("1-0", 0, 1, 1, "health_critical", None, None, then, True, then, None, record, None)
    queue.add_escalations(program.QueuedEscalation(n, loop, f"esc_{n:032d}", *place) for n in numbers)
    queue.add_deliveries([(n, "sink-1", "", loop, 2, 1, then) for n in numbers])
    queue.execute("UPDATE deliveries SET status = 'delivered' WHERE status = 'waiting'")
"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `SMOKE` only shows that the benchmarks work."""

    turns: int
    storm_turns: int
    storm: int
    history_bytes: int
    backlog: int
    ingest: int
    many: int
    hang_seconds: int
    loops: int


FULL = Sizes(
    turns=40,
    storm_turns=9,
    storm=1500,
    history_bytes=1 << 30,
    backlog=100_000,
    ingest=50_000,
    many=1_000_000,
    hang_seconds=2,
    loops=500,
)
SMOKE = Sizes(
    turns=1,
    storm_turns=1,
    storm=20,
    history_bytes=1 << 20,
    backlog=500,
    ingest=50,
    many=50,
    hang_seconds=1,
    loops=5,
)


class Host:
    """A repo with one loop and one webhook sink for each path of the receiver that is named."""

    def __init__(
        self, root: Path, receiver: Receiver, *paths: str, timeout: int = 5, **settings: object
    ) -> None:
        self.root = root
        self.folder = root / ".superloop" / "ops-manager" / LOOP
        self.source = self.folder / "escalations.jsonl"
        self.state_file = self.folder / "alert-dispatch-state.json"
        self.telemetry_file = self.folder / "telemetry" / "alerts.jsonl"
        self.folder.mkdir(parents=True)
        self.source.touch()
        self.receiver = receiver
        self.settings = {"timeoutSeconds": timeout, **settings}
        self.env = clean_env(root)
        self.set_sinks(*paths)

    def set_sinks(self, *paths: str) -> None:
        """Sinks are named for their places, so that one can be led to another path."""
        sinks: dict[str, Any] = {}
        for number, path in enumerate(paths, start=1):
            name = f"ALERT_URL_{number}"
            self.env[name] = self.receiver.url + path
            sinks[f"sink-{number}"] = {
                "enabled": True,
                "type": "webhook",
                "urlEnv": name,
                **self.settings,
            }
        config = {
            "schemaVersion": "v1",
            "defaultMinSeverity": "info",
            "sinks": sinks,
            "routing": {"defaultSinks": list(sinks), "routes": []},
        }
        file = self.root / "config" / "ops-manager-alert-sinks.v1.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config), encoding="utf-8")

    def append(self, count: int, start: int = 0, **fields: Any) -> None:
        with self.source.open("a", encoding="utf-8") as file:
            file.writelines(line(health_critical(serial=start + n, **fields)) for n in range(count))

    def settle(self, status: str = "success") -> None:
        """Let a first pass see a first escalation: what is measured is no host's first pass."""
        self.append(1, start=-1)
        self.dispatch(status=status, processedCount=1)
        self.receiver.arrivals.clear()

    def command(self, *options: str) -> list[str]:
        return [PROGRAM, "--repo", str(self.root), "--loop", LOOP, *options]

    def dispatch(self, *options: str, **expected: object) -> Cost:
        """One pass; `expected`: what its summary must say."""
        cost, text = run(self.command(*options), self.root, self.env)
        expect(text, expected)
        return cost

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.state_file.read_text(encoding="utf-8"))
        return state


def expect(text: str, expected: Mapping[str, object]) -> None:
    summary = json.loads(text)
    found = {key: summary.get(key) for key in expected}
    check(found == expected, f"{found} where {expected} was expected")


def check_arrivals(receiver: Receiver, path: str, count: int) -> None:
    """All arrived, in order, once."""
    serials = [json.loads(arrival.body)["escalation"]["serial"] for arrival in receiver.received(path)]
    check(serials == list(range(count)), f"{path} got {len(serials)} of {count}, or not in order")
    ids = {arrival.headers["webhook-id"] for arrival in receiver.received(path)}
    check(len(ids) == count, f"{path} got {len(ids)} different ids for {count} escalations")


def idle(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """A pass that finds nothing new, against the imports that no pass can do without."""
    with Receiver() as receiver:
        host = Host(folder, receiver, "/hook")
        host.settle()
        imports = [PYTHON, "-c", "import click, json, fcntl"]
        ours, theirs = take_turns(
            sizes.turns,
            lambda: host.dispatch(status="no_new_escalations"),
            lambda: run(imports, folder, host.env)[0],
        )
    yield compare("idle pass / import click, json, fcntl", ours, theirs, 1.15)


def one_alert(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """A pass that delivers one escalation to one webhook, against the imports that it needs."""
    with Receiver() as receiver:
        host = Host(folder, receiver, "/hook")
        host.settle()
        serials = iter(all_turns(sizes.turns))

        def deliver() -> Cost:
            host.append(1, next(serials))
            return host.dispatch(status="success", dispatchedCount=1)

        imports = [PYTHON, "-c", "import click, requests"]
        ours, theirs = take_turns(sizes.turns, deliver, lambda: run(imports, folder, host.env)[0])
        check_arrivals(receiver, "/hook", len(all_turns(sizes.turns)))
    yield compare("one alert / import click, requests", ours, theirs, 1.20)


def storm(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """A backlog to one webhook by the whole program, against a bare loop without its start-up.

    Twice: a requests.Session reads the environment for every request, so its size counts.
    """
    for name, env in (("a bare environment", clean_env(folder)), ("the caller's", callers_env(folder))):
        (folder / name).mkdir()
        yield compare(
            f"{sizes.storm:,} alerts / in a bare Session, {len(env)} variables ({name})",
            *one_storm(folder / name, sizes, env),
            goal=1.3,
            as_rate=True,
        )


def one_storm(folder: Path, sizes: Sizes, env: Mapping[str, str]) -> tuple[list[Cost], list[Cost]]:
    """Measure the program and the bare loop by turns, in one environment."""
    posts = folder / "posts.json"
    kept = ("content-type", "webhook-id", "webhook-timestamp")
    turn = iter(all_turns(sizes.storm_turns))

    def ours() -> Cost:
        with Receiver() as receiver:
            host = Host(folder / f"turn-{next(turn)}", receiver, "/hook")
            host.env = {**env, **host.env}
            host.settle()
            host.append(sizes.storm)
            cost = host.dispatch(status="success", dispatchedCount=sizes.storm, failedCount=0)
            check_arrivals(receiver, "/hook", sizes.storm)
            posts.write_text(
                json.dumps(
                    [
                        [{name: arrival.headers[name] for name in kept}, arrival.body.decode()]
                        for arrival in receiver.arrivals
                    ]
                )
            )
        rows = host.telemetry_file.read_text().splitlines()
        check(len(rows) == 1 + sizes.storm, "not one row an escalation")
        return cost

    def theirs() -> Cost:
        with Receiver() as receiver:
            url = receiver.url + "/hook"
            file = folder / "posts-here.json"
            file.write_text(json.dumps([[url, *post] for post in json.loads(posts.read_text())]))
            _, text = run([PYTHON, "-c", BARE_LOOP, str(file)], folder, env)
            check_arrivals(receiver, "/hook", sizes.storm)
        return Cost(*json.loads(text))

    return take_turns(sizes.storm_turns, ours, theirs)


def hanging(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """When two sinks have got everything, beside a third that hangs until its timeout and alone."""
    count = max(sizes.storm // 3, 1)
    turn = iter(range(2 * len(all_turns(sizes.storm_turns))))

    def last_arrival(*paths: str) -> Cost:
        with Receiver() as receiver:
            host = Host(folder / f"turn-{next(turn)}", receiver, *paths, timeout=sizes.hang_seconds)
            host.append(count)
            started = time.monotonic()
            host.dispatch(dispatchedCount=count, failedCount=count if "/hang" in paths else 0)
            check_arrivals(receiver, "/one", count)
            check_arrivals(receiver, "/two", count)
            ended = max(receiver.received(path)[-1].at for path in ("/one", "/two"))
        return Cost(ended - started, 0.0)

    yield compare(
        f"two sinks have {count:,} alerts, a third hangs / no third",
        *take_turns(
            sizes.storm_turns,
            lambda: last_arrival("/one", "/two", "/hang"),
            lambda: last_arrival("/one", "/two"),
        ),
        goal=1.1,
    )


def history(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """One escalation in a source that has grown for years, and in a new one."""
    with Receiver() as receiver:
        hosts = {name: Host(folder / name, receiver, f"/{name}") for name in ("old", "new")}
        block = "".join(line(health_critical(serial=-1)) for _ in range(1000))
        blocks = max(sizes.history_bytes // len(block), 1)
        with hosts["old"].source.open("a", encoding="utf-8") as file:
            for _ in range(blocks):
                file.write(block)
        # What the shell dispatcher leaves behind: all of it was sent.
        hosts["old"].state_file.write_text(
            json.dumps({"schemaVersion": "v1", "loopId": LOOP, "escalationsLineOffset": 1000 * blocks})
        )
        hosts["old"].dispatch(status="no_new_escalations")
        hosts["new"].settle()
        size = hosts["old"].source.stat().st_size
        yield compare(
            f"one alert after {size / 1e6:,.0f} MB of history / after none",
            *deliver_by_turns(hosts["old"], hosts["new"], receiver, sizes.turns),
            goal=1.1,
        )


def critical(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """When a critical alert reaches a sink for which lesser ones wait, and one for which nothing waits.

    The sink takes one message in ten seconds, so that a turn leaves the backlog as it was.
    """
    with Receiver() as receiver:
        behind = Host(folder / "behind", receiver, "/gone", maxPerMinute=6)
        abreast = Host(folder / "abreast", receiver, "/gone", maxPerMinute=6)
        behind.append(sizes.backlog, severity="warning")
        behind.dispatch("--time-budget", "3600", waitingCount=sizes.backlog)
        abreast.settle("failed")

        def first_request(host: Host, turn: Iterator[str]) -> Cost:
            # A new destination: it is tried at once, and nothing is spent of its rate.
            path = next(turn)
            host.set_sinks(path)
            host.append(1, severity="critical")
            started = time.monotonic()
            host.dispatch("--time-budget", "1", dispatchedCount=1)
            first = receiver.received(path)[0]
            check(json.loads(first.body)["event"]["severity"] == "critical", "a lesser alert came first")
            return Cost(first.at - started, 0.0)

        turns = len(all_turns(sizes.turns))
        ours, theirs = (iter([f"/{name}-{turn}" for turn in range(turns)]) for name in ("behind", "abreast"))
        yield compare(
            f"a critical alert, {sizes.backlog:,} deliveries wait / none, first request out",
            *take_turns(
                sizes.turns, lambda: first_request(behind, ours), lambda: first_request(abreast, theirs)
            ),
            goal=1.3,
        )


def deliver_by_turns(
    first: Host, second: Host, receiver: Receiver, turns: int
) -> tuple[list[Cost], list[Cost]]:
    """Deliver single escalations to the first sink of each host; /old and /new tell what arrived."""

    def deliver(host: Host, serials: Iterator[int]) -> Cost:
        host.append(1, next(serials))
        return host.dispatch(dispatchedCount=1)

    ones, others = iter(all_turns(turns)), iter(all_turns(turns))
    costs = take_turns(turns, lambda: deliver(first, ones), lambda: deliver(second, others))
    check_arrivals(receiver, "/old", len(all_turns(turns)))
    check_arrivals(receiver, "/new", len(all_turns(turns)))
    return costs


def ingest(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """How many records a second come into the queue, with a delivery to each of three sinks."""
    rates = []
    with Receiver() as receiver:
        for turn in range(3):
            host = Host(folder / str(turn), receiver, "/one", "/two", "/three")
            host.append(sizes.ingest)
            _, text = run([PYTHON, "-c", INGEST, str(host.root), LOOP], host.root, host.env)
            rates.append(sizes.ingest / float(text))
    yield Row(
        case=f"ingest of {sizes.ingest:,} records, three sinks",
        ours=f"{max(rates):,.0f}/s",
        theirs="10,000/s",
        ratio=max(rates) / 10_000,
        goal="≥ 1.00",
        met=max(rates) >= 10_000,
    )


def memory(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """A backlog for two sinks that are down, then one of them is back: the peak of memory."""
    small = max(sizes.many // 1000, 1)
    peaks: dict[int, float] = {}
    run([PYTHON, "-c", "import ops_alert_dispatch"], folder, {})  # compiling it takes more than either
    with Receiver() as receiver:
        for count in (small, sizes.many):
            host = Host(folder / str(count), receiver, "/gone", "/gone")
            record = line({"timestamp": timestamp(), "category": "health_critical", "serial": 0})
            with host.source.open("a", encoding="utf-8") as file:
                for _ in range(count // small):
                    file.write(record * small)
            peak, text = peak_memory(host.command("--time-budget", "3600"), host.root, host.env)
            expect(text, {"status": "failed", "processedCount": count, "waitingCount": 2 * count})
            host.set_sinks("/hook", "/gone")
            budget = 10 if count > small else 3600
            late, text = peak_memory(host.command("--time-budget", str(budget)), host.root, host.env)
            delivered = json.loads(text)["lateDispatchedCount"]
            check(delivered == len(receiver.received("/hook")), "not what was delivered")
            check(delivered > 0, "nothing was delivered late")
            receiver.arrivals.clear()
            peaks[count] = max(peak, late)
    ratio = peaks[sizes.many] / peaks[small]
    yield Row(
        case=f"peak memory, {sizes.many:,} records wait / {small:,}, two sinks",
        ours=f"{peaks[sizes.many]:.1f} MB",
        theirs=f"{peaks[small]:.1f} MB",
        ratio=ratio,
        goal="≤ 1.20, < 60 MB",
        met=ratio <= 1.2 and peaks[sizes.many] < 60,
    )


def purged(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """The size of the queue once what was settled is older than the retention."""
    with Receiver() as receiver:
        host = Host(folder, receiver, "/hook")
        host.settle()
        run([PYTHON, "-c", SETTLED, str(host.root), LOOP, str(sizes.backlog)], host.root, host.env)
        queue = host.folder.with_name("alert-queue.db")
        before = queue.stat().st_size
        for _ in range(100):  # each pass gives a second to it
            host.append(1)
            host.dispatch(status="success")
            with contextlib.closing(sqlite3.connect(queue)) as database:
                [left] = database.execute("SELECT count(*) FROM escalations").fetchone()
            if left < 200:
                break
        check(left < 200, f"{left} escalations are left in the queue")
        size = queue.stat().st_size
    yield Row(
        case=f"queue file after {sizes.backlog:,} deliveries were purged / before",
        ours=f"{size / 1e6:.2f} MB",
        theirs=f"{before / 1e6:.2f} MB",
        ratio=size / before,
        goal="< 1 MB",
        met=size < 1_000_000,
    )


def idle_loops(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """An idle pass over many loops in one process: what each costs beyond the start-up of one."""
    hosts = {}
    with Receiver() as receiver:
        for count in (1, sizes.loops):
            hosts[count] = Host(folder / str(count), receiver, "/hook")
            for number in range(count - 1):
                source = hosts[count].folder.with_name(f"loop-{number}") / "escalations.jsonl"
                source.parent.mkdir()
                source.write_text(line(health_critical(serial=number)), encoding="utf-8")
            hosts[count].append(1)
            pass_over(hosts[count], processedCount=count)
        ours, theirs = take_turns(
            sizes.storm_turns,
            lambda: pass_over(hosts[sizes.loops], loopCount=sizes.loops, status="no_new_escalations"),
            lambda: pass_over(hosts[1], loopCount=1, status="no_new_escalations"),
        )
    cost = [
        1000 * (min(kind(run) for run in ours) - min(kind(run) for run in theirs)) / (sizes.loops - 1)
        for kind in (attrgetter("wall"), attrgetter("cpu"))
    ]
    yield Row(
        case=f"idle pass over {sizes.loops:,} loops, each beyond the first",
        ours=f"{cost[0]:.3f} ms",
        theirs="0.20 ms",
        ratio=cost[0] / 0.2,
        goal="≤ 1.00",
        met=cost[0] <= 0.2,
        best_ratio=cost[0] / 0.2,
        cpu_ratio=cost[1] / 0.2,
        samples={"ours": ours, "theirs": theirs},
    )


def pass_over(host: Host, **expected: object) -> Cost:
    """One pass over all loops; `expected`: what its summary must say."""
    cost, text = run([PROGRAM, "dispatch", "--repo", str(host.root), "--all-loops"], host.root, host.env)
    expect(text, expected)
    return cost


CASES: dict[str, Callable[[Path, Sizes], Iterator[Row]]] = {
    "idle": idle,
    "one-alert": one_alert,
    "storm": storm,
    "hanging": hanging,
    "history": history,
    "critical": critical,
    "ingest": ingest,
    "memory": memory,
    "loops": idle_loops,
    "purged": purged,
}
