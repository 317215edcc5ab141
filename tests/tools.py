"""Programs that are not Python packages and that a test runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in {"", "0", "false", "no"}


def powerless(command: Sequence[str]) -> list[str]:
    """A command to which the modes of files apply: for root, without the power to pass them over."""
    if os.geteuid() != 0:
        return [*command]
    return [needs_tool("setpriv"), "--bounding-set=-dac_override,-dac_read_search", *command]


def needs_tool(name: str) -> str:
    """The program's path. Without it the test is skipped; in CI, where `.ci/run` installs it, it fails."""
    path = shutil.which(name)
    if path is not None:
        return path
    message = f"{name} is not installed"
    if in_ci():
        pytest.fail(f"{message}, and in CI no test is skipped: add it to .ci/run", pytrace=False)
    pytest.skip(message)
