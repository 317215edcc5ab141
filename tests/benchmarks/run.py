"""How fast it is, each figure as a ratio to something measured in the same run, by turns.

    python tests/benchmarks/run.py                  # all
    python tests/benchmarks/run.py idle one-alert   # some
    python tests/benchmarks/run.py --smoke          # tiny: only shows that the benchmarks work

It measures the program as installed beside this Python. Exit 1 when a goal was missed; with --smoke, only
when a benchmark did not work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

# As pytest has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def processor() -> str:
    """The name of the processor and how many this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(part.partition(":")[2].strip() for part in text.splitlines() if "model name" in part)
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{len(os.sched_getaffinity(0))} of {model}"


def main() -> int:
    from benchmarks.cases import CASES, FULL, SMOKE
    from benchmarks.measure import PROGRAM, Row, check

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when left out")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no verdict")
    default = Path(tempfile.gettempdir(), "ops-alert-dispatch-benchmarks.json")
    parser.add_argument("--json", type=Path, default=default, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    check(Path(PROGRAM).exists(), f"{PROGRAM} is not there: install the project beside this Python")

    machine = f"{processor()}, Python {platform.python_version()}, Linux {platform.release()}"
    print(f"{machine}\n\n{'case':<76} {'ours':>12} {'other':>12} {'ratio':>6} {'best':>6} {'cpu':>6}  goal")
    rows: list[Row] = []
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for row in CASES[name](Path(folder), SMOKE if options.smoke else FULL):
                rows.append(row)
                print(row.text(), flush=True)
    document = {
        "machine": machine,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "smoke": options.smoke,
        "rows": [row.to_json() for row in rows],
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\nTimes: best of the turns. Ratio: median of theirs; beside it of the best, of processor time.")
    print(f"Everything that was measured: {options.json}")
    return 0 if options.smoke or all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
