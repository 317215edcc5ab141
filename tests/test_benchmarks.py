"""The benchmarks still work. How fast it is they tell elsewhere: here too much runs at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.cases import CASES

RUN = Path(__file__).resolve().parent / "benchmarks" / "run.py"


@pytest.mark.parametrize("case", CASES)
def test_a_benchmark_works_and_finds_every_delivery_made(case: str, tmp_path: Path) -> None:
    written = tmp_path / "result.json"

    done = subprocess.run(
        [sys.executable, str(RUN), case, "--smoke", "--json", str(written)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert rows
    assert all(row["case"] in done.stdout and row["ratio"] > 0 for row in rows)
