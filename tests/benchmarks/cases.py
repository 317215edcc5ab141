"""What is measured, each against something that anyone can run on the same machine at the same time."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `SMOKE` only shows that the benchmarks work."""

    turns: int
    storm_turns: int
    storm: int
    history_bytes: int
    lag: int
    backlog: int
    hang_seconds: int
    loops: int


FULL = Sizes(
    turns=40,
    storm_turns=9,
    storm=1500,
    history_bytes=1 << 30,
    lag=100_000,
    backlog=1_000_000,
    hang_seconds=2,
    loops=500,
)
SMOKE = Sizes(
    turns=1, storm_turns=1, storm=20, history_bytes=1 << 20, lag=50, backlog=50, hang_seconds=1, loops=5
)


class Host:
    """A repo with one loop and one webhook sink for each path of the receiver that is named."""

    def __init__(self, root: Path, receiver: Receiver, *paths: str, timeout: int = 5) -> None:
        self.root = root
        self.folder = root / ".superloop" / "ops-manager" / LOOP
        self.source = self.folder / "escalations.jsonl"
        self.state_file = self.folder / "alert-dispatch-state.json"
        self.telemetry_file = self.folder / "telemetry" / "alerts.jsonl"
        self.folder.mkdir(parents=True)
        self.source.touch()
        self.receiver = receiver
        self.timeout = timeout
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
                "timeoutSeconds": self.timeout,
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

    def append(self, count: int, start: int = 0) -> None:
        with self.source.open("a", encoding="utf-8") as file:
            file.writelines(line(health_critical(serial=start + n)) for n in range(count))

    def settle(self) -> None:
        """Let a first pass see a first escalation: what is measured is no host's first pass."""
        self.append(1, start=-1)
        self.dispatch(processedCount=1)
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


def lagging(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """One escalation to two sinks, one of which has not got what came before it, and to two that have."""
    with Receiver() as receiver:
        behind = Host(folder / "behind", receiver, "/old", "/gone")
        abreast = Host(folder / "abreast", receiver, "/new", "/gone")
        behind.append(sizes.lag, start=-sizes.lag)
        abreast.append(1, start=-1)
        for host, count in ((behind, sizes.lag), (abreast, 1)):
            host.dispatch("--time-budget", "3600", dispatchedCount=count, waitingCount=count)
        receiver.arrivals.clear()
        yield compare(
            f"one alert, a lane lags by {sizes.lag:,} / by none",
            *deliver_by_turns(behind, abreast, receiver, sizes.turns),
            goal=1.5,
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


def memory_and_state(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """A backlog for five sinks that are down, then one of them is back: the peak of memory, and the state."""
    small = max(sizes.backlog // 1000, 1)
    peaks: dict[int, float] = {}
    state_bytes = 0
    paths = ("/gone",) * 5
    with Receiver() as receiver:
        for count in (small, sizes.backlog):
            host = Host(folder / str(count), receiver, *paths)
            record = line({"timestamp": timestamp(), "category": "health_critical", "serial": 0})
            with host.source.open("a", encoding="utf-8") as file:
                for _ in range(count // small):
                    file.write(record * small)
            peak, text = peak_memory(host.command("--time-budget", "3600"), host.root, host.env)
            expect(text, {"status": "failed", "processedCount": count, "waitingCount": 5 * count})
            state_bytes = host.state_file.stat().st_size
            host.set_sinks("/hook", *paths[1:])
            budget = 10 if count > small else 3600
            late, text = peak_memory(host.command("--time-budget", str(budget)), host.root, host.env)
            delivered = json.loads(text)["lateDispatchedCount"]
            check(delivered == len(receiver.received("/hook")), "not what was delivered")
            check(delivered > 0, "nothing was delivered late")
            receiver.arrivals.clear()
            peaks[count] = max(peak, late)
    ratio = peaks[sizes.backlog] / peaks[small]
    yield Row(
        case=f"peak memory, backlog of {sizes.backlog:,} / of {small:,}, five sinks",
        ours=f"{peaks[sizes.backlog]:.1f} MB",
        theirs=f"{peaks[small]:.1f} MB",
        ratio=ratio,
        goal="≤ 1.20, < 60 MB",
        met=ratio <= 1.2 and peaks[sizes.backlog] < 60,
    )
    yield Row(
        case=f"state file, lag of {sizes.backlog:,}, five sinks",
        ours=f"{state_bytes:,} bytes",
        theirs="8,192 bytes",
        ratio=state_bytes / 8192,
        goal="< 1.00",
        met=state_bytes < 8192,
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
        ours=f"{cost[0]:.2f} ms",
        theirs="0.50 ms",
        ratio=cost[0] / 0.5,
        goal="≤ 1.00",
        met=cost[0] <= 0.5,
        best_ratio=cost[0] / 0.5,
        cpu_ratio=cost[1] / 0.5,
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
    "lagging": lagging,
    "memory": memory_and_state,
    "loops": idle_loops,
}
