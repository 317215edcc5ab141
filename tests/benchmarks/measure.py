"""Run processes and see what they cost; compare two by turns, so that a busy machine treats both alike."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

PYTHON = sys.executable
PROGRAM = str(Path(sys.executable).with_name("ops-alert-dispatch"))

# The peak that the kernel reports for a process includes that of the process which started it: a small one
# stands between.
PEAK = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Cost(NamedTuple):
    """What a run cost: wall time and processor time, in seconds."""

    wall: float
    cpu: float


# What of the caller's environment would make a run something else than it is on a host.
LEFT_OUT = re.compile(r"PYTHON.*|.*_proxy|.*_CA_BUNDLE|OPS_MANAGER_.*", re.IGNORECASE)


def clean_env(home: Path, **more: str) -> dict[str, str]:
    """Nothing of the caller's own settings or proxies; compiled modules are kept, as they are on a host."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **more}


def callers_env(home: Path) -> dict[str, str]:
    """The caller's environment, but for settings of Python and of HTTP."""
    kept = {name: value for name, value in os.environ.items() if not LEFT_OUT.fullmatch(name)}
    return {**kept, "HOME": str(home)}


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> tuple[Cost, str]:
    """Run a command to its end. Returns its cost and its output; ends the benchmark where it failed."""
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=env
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    check(process.returncode == 0, f"exit {process.returncode}: {' '.join(command)}\n{text}")
    return Cost(wall, usage.ru_utime + usage.ru_stime), text


def peak_memory(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> tuple[float, str]:
    """Run a command to its end. Returns the most memory that it held, in MB, and its output."""
    _, text = run([PYTHON, "-I", "-S", "-c", PEAK, *command], folder, env)
    output, _, kilobytes = text.rstrip("\n").rpartition("\n")
    return int(kilobytes) / 1024, output


def check(holds: bool, what: str) -> None:
    """End the benchmark where a result is worth nothing, because what was measured did not do its work."""
    if not holds:
        raise SystemExit(f"benchmark broken: {what}")


@dataclass
class Row:
    """A line of the table; `ratio` is what the goal is about."""

    case: str
    ours: str
    theirs: str
    ratio: float
    goal: str
    met: bool
    best_ratio: float | None = None
    cpu_ratio: float | None = None
    samples: dict[str, list[Cost]] = field(default_factory=dict)

    def text(self) -> str:
        best, cpu = (f"{r:.2f}" if r is not None else "-" for r in (self.best_ratio, self.cpu_ratio))
        verdict = "met" if self.met else "MISSED"
        return (
            f"{self.case:<76} {self.ours:>12} {self.theirs:>12} {self.ratio:>6.2f} {best:>6} {cpu:>6}"
            f"  {self.goal} {verdict}"
        )

    def to_json(self) -> dict[str, object]:
        samples = {who: [cost._asdict() for cost in costs] for who, costs in self.samples.items()}
        return {**asdict(self), "samples": samples}


def take_turns(
    turns: int, ours: Callable[[], Cost], theirs: Callable[[], Cost]
) -> tuple[list[Cost], list[Cost]]:
    """Measure both by turns, each the first of every other one; turn 0, where there is one, warms caches."""
    pairs: list[tuple[Cost, Cost]] = []
    for turn in all_turns(turns):
        if turn % 2:
            other, mine = theirs(), ours()
        else:
            mine, other = ours(), theirs()
        pairs.append((mine, other))
    return [mine for mine, _ in pairs[-turns:]], [other for _, other in pairs[-turns:]]


def all_turns(turns: int) -> range:
    """The turns that are counted, and one that warms caches; a single one only shows that it works."""
    return range(turns + 1 if turns > 1 else 1)


def compare(
    case: str, ours: Sequence[Cost], theirs: Sequence[Cost], goal: float, *, as_rate: bool = False
) -> Row:
    """A row whose ratio is the median of the turns' own: both halves of a turn meet the same machine.

    `goal`: the most that ours may take for each of theirs or, `as_rate`, the least that its rate must be.
    """

    def ratio(mine: float, other: float) -> float:
        return other / mine if as_rate else mine / other

    value = statistics.median(ratio(a.wall, b.wall) for a, b in zip(ours, theirs, strict=True))
    best = [min(cost.wall for cost in costs) for costs in (ours, theirs)]
    worked = [min(cost.cpu for cost in costs) for costs in (ours, theirs)]
    return Row(
        case=case,
        ours=f"{best[0] * 1000:.0f} ms",
        theirs=f"{best[1] * 1000:.0f} ms",
        ratio=value,
        goal=f"{'≥' if as_rate else '≤'} {goal:.2f}",
        met=value >= goal if as_rate else value <= goal,
        best_ratio=ratio(*best),
        cpu_ratio=ratio(*worked) if all(worked) else None,
        samples={"ours": list(ours), "theirs": list(theirs)},
    )
