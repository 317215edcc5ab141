"""The benchmarks still work. How fast it is they tell elsewhere: here too much runs at the same time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODULE_FILE, Repo
from escalations import health_critical

RUN = Path(__file__).resolve().parent / "benchmarks" / "run.py"


@pytest.mark.first
def test_the_benchmarks_work_and_find_every_delivery_made(tmp_path: Path) -> None:
    # One of each kind: they share hosts, receiver and measuring.
    cases = ("idle", "storm", "memory")
    written = tmp_path / "result.json"

    done = subprocess.run(
        [sys.executable, str(RUN), *cases, "--smoke", "--json", str(written)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= len(cases)
    # Of so small sizes a difference may be less than the noise.
    assert all(row["case"] in done.stdout and math.isfinite(row["ratio"]) for row in rows)


@pytest.mark.parametrize("past", ["nothing ever escalated", "nothing new"])
def test_a_pass_that_sends_nothing_does_not_pay_for_the_client_or_the_validator(
    repo: Repo, past: str
) -> None:
    """Nearly every pass is one: each of these would more than double what it costs."""
    # The host keeps other files of the loop there.
    repo.folder.mkdir(parents=True)
    if past == "nothing new":
        repo.append(health_critical())
    assert repo.dispatch().exit_code == 0

    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(MODULE_FILE), "dispatch", *repo.target],
        capture_output=True,
        encoding="utf-8",
        env=repo.env,
        check=True,
    )

    assert "no_source" in done.stdout or "no_new_escalations" in done.stdout
    loaded = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert "click" in loaded
    assert loaded.isdisjoint(
        {"requests", "urllib3", "jsonschema", "http.client", "ssl", "hashlib", "random", "sqlite3"}
    )


def test_the_comparison_of_noise_works(tmp_path: Path) -> None:
    script = RUN.with_name("noise.py")

    done = subprocess.run(
        [sys.executable, str(script), "--records", "12", "--problems", "2", "--speed", "20"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("| webhook", "14", "3"),
        ("| Slack", "14", "1"),
        ("| PagerDuty", "14", "3"),
    ]
