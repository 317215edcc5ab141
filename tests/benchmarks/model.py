"""What a fleet can expect of an alert storm: a model, computed from costs that are measured on this machine.

    python tests/benchmarks/model.py
    python tests/benchmarks/model.py --loops 2000 --hosts 10 --rate 5
    python tests/benchmarks/model.py --latency 0.2 --start 0.15 --idle-loop 0.0005   # given, not measured

Every loop of every host writes so many escalations a minute; `dispatch --all-loops` runs each minute. For
each part that an escalation goes through: the load in the storm, what the part can do, and the rate at which
it saturates. Measuring needs the program beside this Python, and prometheus-alertmanager.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

# As pytest has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BATCH = 100
SINK = "measured"


@dataclass(frozen=True)
class Fleet:
    """The storm, and what is assumed of the world around."""

    loops: int = 10_000
    hosts: int = 100
    rate: float = 1.0
    minutes: float = 10.0
    categories: int = 1
    latency: float = 0.1
    peers: int = 2
    group_interval: float = 300.0


FLEET_HELP = {
    "loops": "loops of the whole fleet",
    "hosts": "hosts that they run on, evenly",
    "rate": "escalations that each loop writes a minute in the storm",
    "minutes": "length of the storm",
    "categories": "categories that they are of",
    "latency": "seconds that a sink takes to answer",
    "peers": "peers of the Alertmanager cluster, each of which is sent everything",
    "group_interval": "of the Alertmanager, in seconds",
}


@dataclass(frozen=True)
class Costs:
    """Processor seconds, and bytes of memory of an Alertmanager."""

    start: float
    idle_loop: float
    request: float
    alert: float
    ingest_alone: float
    ingest: float
    alert_bytes: float


COST_HELP = {
    "start": "processor seconds of a pass that finds nothing to do",
    "idle_loop": "of each loop in such a pass",
    "request": "of the dispatcher, of a request with one escalation",
    "alert": f"of the dispatcher, of an alert in a request with {BATCH}",
    "ingest_alone": "of an Alertmanager, of an alert in a request of its own",
    "ingest": f"of an Alertmanager, of an alert in a request with {BATCH}",
    "alert_bytes": "of memory of an Alertmanager, of an alert",
}


@dataclass(frozen=True)
class Part:
    """Load and capacity in escalations a second; `saturates_at` in escalations a loop a minute."""

    name: str
    load: float
    capacity: float
    saturates_at: float
    backlog: float
    drained_after_minutes: float


# --- The model

# A pass starts each minute; no attempt starts after its time budget.
PASS_SECONDS, BUDGET_SECONDS = 60.0, 30.0
# Slack, "Rate limits": incoming webhooks, one message a second each.
SLACK_A_SECOND = 1.0
# PagerDuty, "Events API v2", rate limits: 120 events a minute for an integration key.
PAGERDUTY_A_SECOND = 2.0


def parts_of(fleet: Fleet, costs: Costs) -> list[tuple[str, float, float]]:
    """For each part its name, the load, and what it can do, in escalations a second."""
    everywhere = fleet.loops * fleet.rate / 60
    here = everywhere / fleet.hosts
    # A request holds what waits for a sink in one loop.
    batch = min(float(BATCH), max(1.0, fleet.rate * PASS_SECONDS / 60))

    def each(alone: float, batched: float) -> float:
        return alone / batch + batched * (1 - 1 / batch)

    alert = each(costs.request, costs.alert) * fleet.peers
    idle = costs.start + fleet.loops / fleet.hosts * costs.idle_loop
    busy = (PASS_SECONDS - idle) / PASS_SECONDS
    sending = BUDGET_SECONDS / PASS_SECONDS
    return [
        ("dispatcher, one core of a host: webhook", here, busy / costs.request),
        ("dispatcher, one core of a host: alertmanager", here, busy / alert),
        ("one connection of a host: webhook", here, sending / (fleet.latency + costs.request)),
        ("one connection of a host: alertmanager", here, sending / (fleet.latency / batch + alert)),
        ("Slack, one webhook for the fleet", everywhere, SLACK_A_SECOND),
        ("Slack, a webhook for each host", here, SLACK_A_SECOND),
        ("PagerDuty, one key for the fleet", everywhere, PAGERDUTY_A_SECOND),
        ("PagerDuty, a key for each host", here, PAGERDUTY_A_SECOND),
        ("Alertmanager, one core of each peer", everywhere, 1 / each(costs.ingest_alone, costs.ingest)),
    ]


def compute(fleet: Fleet, costs: Costs) -> list[Part]:
    parts = []
    for index, (name, load, capacity) in enumerate(parts_of(fleet, costs)):
        low, high = 0.0, 1e9
        while high - low > 1e-6 * high:
            rate = (low + high) / 2
            _, burden, limit = parts_of(replace(fleet, rate=rate), costs)[index]
            low, high = (low, rate) if burden > limit else (rate, high)
        backlog = max(0.0, load - capacity) * fleet.minutes * 60
        parts.append(Part(name, load, capacity, high, backlog, backlog / capacity / 60))
    return parts


def notifications(fleet: Fleet) -> float:
    """A second, of the cluster, grouped by category and repo, with a repo on each host: whatever the rate."""
    return fleet.hosts * fleet.categories / fleet.group_interval


def alertmanager_bytes(fleet: Fleet, costs: Costs) -> float:
    """What a peer needs for one alert of each category of each loop."""
    return fleet.loops * fleet.categories * costs.alert_bytes


# --- The costs


class Host:
    """A repo with one sink, and loops in it."""

    def __init__(self, root: Path, kind: str, url: str) -> None:
        from benchmarks.measure import clean_env

        self.root = root
        self.env = clean_env(root, MEASURED_URL=url)
        config = {
            "schemaVersion": "v1",
            "defaultMinSeverity": "info",
            "sinks": {SINK: {"enabled": True, "type": kind, "urlEnv": "MEASURED_URL"}},
            "routing": {"defaultSinks": [SINK]},
        }
        (root / "config").mkdir(parents=True)
        (root / "config" / "ops-manager-alert-sinks.v1.json").write_text(json.dumps(config))

    def append(self, loop: str, count: int) -> None:
        from escalations import health_critical, lines

        folder = self.root / ".superloop" / "ops-manager" / loop
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "escalations.jsonl").open("a") as source:
            source.write(lines(health_critical(loopId=f"{loop}-{number}") for number in range(count)))

    def dispatch(self) -> float:
        """One pass over all loops; the processor seconds that it took."""
        from benchmarks.measure import PROGRAM, run

        cost, _ = run([PROGRAM, "dispatch", "--repo", str(self.root), "--all-loops"], self.root, self.env)
        return cost.cpu

    def idle(self) -> float:
        return min(self.dispatch() for _ in range(5))


def measure_idle(folder: Path) -> Iterator[tuple[str, float]]:
    from loopback import SinkServer

    with SinkServer() as server:
        host = Host(folder / "idle", "webhook", server.url)
        host.append("first", 1)
        host.dispatch()
        start = host.idle()
        more = 200
        for number in range(more):
            host.append(f"loop-{number}", 1)
        host.dispatch()
        yield "start", start
        yield "idle_loop", max(0.0, host.idle() - start) / more


def measure_sending(folder: Path) -> Iterator[tuple[str, float]]:
    from alertmanager import new_node
    from loopback import SinkServer

    count = 20 * BATCH
    with SinkServer() as server, new_node(folder / "node", f"{server.url}/page") as node:
        node.config = node.config.replace("[alertname, loop]", "[alertname, repo]")
        node.start()
        for name, kind, url in (
            ("request", "webhook", server.url),
            ("alert", "alertmanager", node.url),
        ):
            host = Host(folder / kind, kind, url)
            host.append("first", 1)
            host.dispatch()
            idle = host.idle()
            host.append("first", count)
            yield name, (host.dispatch() - idle) / count


def measure_ingest(folder: Path) -> Iterator[tuple[str, float]]:
    from alertmanager import new_node
    from loopback import SinkServer

    count = 10_000
    now = time.time()

    def alert(number: int) -> dict[str, Any]:
        return {
            "labels": {
                "alertname": "health_critical",
                "severity": "critical",
                "loop": f"loop-{number}",
                "repo": f"repo-{number % 100}",
                "source": "ops-manager",
            },
            "annotations": {
                "summary": "[critical] health_critical on this loop: runtime_heartbeat_stale",
                "description": "runtime_heartbeat_stale: heartbeatLagSeconds is 1874, threshold 600",
                "escalationId": f"esc_{number:032d}",
                "traceId": "pass-health-critical",
            },
            "startsAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "endsAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 3600)),
        }

    def requests(first: int, count: int, size: int) -> Iterator[bytes]:
        for start in range(first, first + count, size):
            yield json.dumps([alert(number) for number in range(start, start + size)]).encode()

    with SinkServer() as server, new_node(folder / "ingest", f"{server.url}/page") as node:
        node.config = node.config.replace("[alertname, loop]", "[alertname, repo]")
        node.start()
        assert node.process is not None
        memory = resident(node.process.pid)
        began = processor_seconds(node.process.pid)
        for body in requests(0, count, BATCH):
            node.post(body)
        batched = processor_seconds(node.process.pid)
        yield "alert_bytes", (resident(node.process.pid) - memory) / count
        yield "ingest", (batched - began) / count
        alone = count // 10
        for body in requests(count, alone, 1):
            node.post(body)
        yield "ingest_alone", (processor_seconds(node.process.pid) - batched) / alone


def processor_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


MEASURES = {
    measure_idle: ("start", "idle_loop"),
    measure_sending: ("request", "alert"),
    measure_ingest: ("ingest_alone", "ingest", "alert_bytes"),
}


def measure(given: dict[str, float]) -> Costs:
    """Measure what was not given."""
    costs = dict(given)
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        for source, names in MEASURES.items():
            if set(names) - costs.keys():
                costs = {**dict(source(Path(folder))), **costs}
    return Costs(**costs)


# --- What is shown


def amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def report(fleet: Fleet, costs: Costs, parts: Sequence[Part]) -> str:
    storm = f"each writes {fleet.rate:g} a minute for {fleet.minutes:g} minutes"
    told = [
        f"{fleet.loops:,} loops on {fleet.hosts:,} hosts; {storm}; sinks answer in {fleet.latency:g} s.",
        "",
    ]
    for name, value in asdict(costs).items():
        measured = f"{value / 1024:.1f} kB" if name == "alert_bytes" else f"{amount(value * 1000)} ms"
        told.append(f"{measured:>12}  {COST_HELP[name]}")
    headings = ("part", "load/s", "can do/s", "saturates", "behind", "drained after")
    rows = [
        (
            part.name,
            amount(part.load),
            amount(part.capacity),
            amount(part.saturates_at),
            amount(part.backlog),
            f"{part.drained_after_minutes:,.0f} min" if part.backlog else "-",
        )
        for part in parts
    ]
    told += ["", *(f"{row[0]:<46}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in (headings, *rows))]
    told += [
        "",
        "saturates: at so many escalations a loop a minute. behind: what waits when the storm is over.",
        f"The cluster notifies at most {amount(notifications(fleet))} times a second, whatever the rate.",
        f"Each peer needs {alertmanager_bytes(fleet, costs) / 1e6:,.0f} MB for the alerts.",
    ]
    return "\n".join(told)


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Fleet):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(
            option(field.name),
            type=kind,
            default=field.default,
            help=f"{FLEET_HELP[field.name]} (%(default)s)",
        )
    for name, text in COST_HELP.items():
        parser.add_argument(option(name), type=float, metavar="MEASURED", help=text)
    default = Path(tempfile.gettempdir(), "ops-alert-dispatch-model.json")
    parser.add_argument("--json", type=Path, default=default, metavar="FILE", help="default: %(default)s")
    options = vars(parser.parse_args())

    fleet = Fleet(**{field.name: options[field.name] for field in fields(Fleet)})
    costs = measure({name: options[name] for name in COST_HELP if options[name] is not None})
    parts = compute(fleet, costs)
    print(report(fleet, costs, parts))
    document = {
        "fleet": asdict(fleet),
        "costs": asdict(costs),
        "parts": [asdict(part) for part in parts],
        "notificationsPerSecond": notifications(fleet),
        "alertmanagerBytes": alertmanager_bytes(fleet, costs),
    }
    options["json"].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\nThe same as JSON: {options['json']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
