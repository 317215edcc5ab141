"""What people are spared in an alert storm: a backlog of one lasting divergence, with real problems in it.

    python tests/benchmarks/noise.py            # takes as long as the providers' rates make it: 25 minutes
    python tests/benchmarks/noise.py --records 30 --problems 2 --speed 20

The host has written a divergence a minute for as many minutes as there are records, and the real problems,
critical ones, evenly in between. All goes to a webhook, to Slack and to PagerDuty, played by a server that
answers 429 with Retry-After beyond their rates: Slack one message a second after ten at once, PagerDuty 120
events a minute. Passes run, a second apart, until nothing waits: first without `routing.repeat`,
`maxPerMessage` and `maxPerMinute`, then with what `init` writes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# As pytest has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import Repo, make_repo
from escalations import CHAT, HOOK, PAGER, PATHS, divergence_detected, health_critical, sink_config
from loopback import Answer, Received, SinkServer, accepted, ok, rate_limited

NAMES = {HOOK: "webhook", CHAT: "Slack", PAGER: "PagerDuty"}
# What a provider takes at once, and how much of that it takes again each second.
RATES = {CHAT: (10, 1.0), PAGER: (120, 2.0)}
WINDOW_SECONDS = 900
PER_MESSAGE = 10


@dataclass
class Bucket:
    """A provider's rate limit: a token for each message, so many at most, so many new ones a second."""

    tokens: float
    per_second: float
    size: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.size = self.tokens

    def take(self) -> float:
        """Seconds until there is a token; 0 where one was taken."""
        now = time.monotonic()
        self.tokens = min(self.size, self.tokens + (now - self.at) * self.per_second)
        self.at = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.per_second
        self.tokens -= 1
        return 0.0


@dataclass
class Count:
    """What came to a sink. `critical_after`: seconds until it had taken the first critical escalation."""

    messages: int = 0
    refused: int = 0
    critical_after: float | None = None


class Provider:
    """The three sinks as they answer when too much comes."""

    def __init__(self, speed: float) -> None:
        self.counts = {sink: Count() for sink in NAMES}
        self.began = time.monotonic()
        self._buckets = {sink: Bucket(size, speed * rate) for sink, (size, rate) in RATES.items()}
        self._lock = threading.Lock()

    def __call__(self, request: Received) -> Answer:
        sink = next(sink for sink, path in PATHS.items() if request.path == path)
        with self._lock:
            count, bucket = self.counts[sink], self._buckets.get(sink)
            if bucket and (wait := bucket.take()):
                count.refused += 1
                return rate_limited(math.ceil(wait))
            count.messages += 1
            if count.critical_after is None and b"health_critical" in request.body:
                count.critical_after = time.monotonic() - self.began
        return accepted() if sink == PAGER else ok()


def write_backlog(repo: Repo, records: int, problems: int) -> None:
    """The divergence's records, one a minute up to now, and the problems evenly between them."""
    began = datetime.now(UTC) - timedelta(minutes=records)
    places = {records * (number + 1) // (problems + 1) for number in range(problems)}
    for minute in range(records):
        at = (began + timedelta(minutes=minute)).isoformat(timespec="seconds")
        if minute in places:
            repo.append(health_critical(timestamp=at, reasonCodes=[f"problem_{minute}"]))
        repo.append(divergence_detected(timestamp=at))


def storm_config(speed: float, *, quiet: bool) -> dict[str, Any]:
    config = sink_config(everywhere=True)
    chat, pager = config["sinks"][CHAT], config["sinks"][PAGER]
    if quiet:
        config["routing"]["repeat"] = {"windowSeconds": WINDOW_SECONDS}
        chat |= {"maxPerMessage": PER_MESSAGE, "maxPerMinute": min(6000, round(60 * speed))}
        pager["maxPerMinute"] = min(6000, round(120 * speed))
    return config


def storm(records: int, problems: int, speed: float, *, quiet: bool) -> tuple[dict[str, Count], float]:
    """Run passes until nothing waits. Returns what came to each sink, and the seconds that it took."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        with SinkServer() as server:
            repo = make_repo(Path(folder), server)
            repo.write_config(storm_config(speed, quiet=quiet))
            write_backlog(repo, records, problems)
            provider = Provider(speed)
            for path in PATHS.values():
                server.answer(path, provider)
            while True:
                state = repo.dispatch().json
                taken_up = state["escalationsLineOffset"] == state["escalationsLineCount"]
                if taken_up and not state["waitingCount"]:
                    break
                time.sleep(1 / speed)
            seconds = time.monotonic() - provider.began
        dispatched = sum(row["status"] in ("dispatched", "partial", "skipped") for row in repo.telemetry())
        if state["deadLetterCount"] or dispatched < records + problems:
            raise SystemExit("benchmark broken: an escalation was lost")
    return provider.counts, seconds


def table(before: tuple[dict[str, Count], float], after: tuple[dict[str, Count], float]) -> str:
    """A Markdown table."""
    what = ("messages", "429s met", "first critical one told")
    lines = [["sink", *(f"{word}, {when}" for when in ("before", "after") for word in what)], ["---"] * 7]
    for sink, name in NAMES.items():
        cells = [name]
        for counts, _ in (before, after):
            count = counts[sink]
            cells += [f"{count.messages:,}", f"{count.refused:,}", f"{count.critical_after or 0:,.1f} s"]
        lines.append(cells)
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    end = f"Everything was told after {before[1]:,.0f} s before, {after[1]:,.0f} s after."
    return "\n".join([*rows, "", end])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1000, help="of the divergence (default 1000)")
    parser.add_argument("--problems", type=int, default=5, help="real ones in between (default 5)")
    parser.add_argument("--speed", type=float, default=1.0, help="of the providers (default 1)")
    options = parser.parse_args(argv)
    before, after = (
        storm(options.records, options.problems, options.speed, quiet=quiet) for quiet in (False, True)
    )
    print(table(before, after))
    return 0


if __name__ == "__main__":
    sys.exit(main())
