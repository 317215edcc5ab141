"""Runs the shell tests, with the interpreter of this run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from tools import needs_tool
from zygote import for_a_shell

BATS_FILE = Path(__file__).with_name("ops-manager-alert-sinks.bats")
NAMES = re.findall(r'^@test "(.+)" \{$', BATS_FILE.read_text(encoding="utf-8"), re.MULTILINE)
MARK = "OPS_ALERT_DISPATCH_BATS_RUN"


def processes_of(run: str) -> list[int]:
    """The processes that this run started and that still live, found by a mark in their environment."""
    mark = f"{MARK}={run}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.first
def test_the_shell_tests_pass_and_leave_nothing_running() -> None:
    bats = needs_tool("bats")
    needs_tool("jq")
    run = uuid.uuid4().hex
    # Nothing of the tester's own settings for Python, such as that no bytecode is to be kept.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHON": sys.executable, "DISPATCHER": for_a_shell(), MARK: run}
    process = subprocess.Popen(
        [bats, "--tap", BATS_FILE],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=100)
        left = processes_of(run)
    finally:
        for pid in processes_of(run):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    assert re.findall(r"^ok \d+ (.+?)(?: # skip.*)?$", output, re.MULTILINE) == NAMES, output
    assert " # skip" not in output or not os.environ.get("CI"), output
    assert not left, f"{left} were left running"
