"""Programs that are not Python packages and that a test runs."""

from __future__ import annotations

import os
import shutil

import pytest


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in {"", "0", "false", "no"}


def needs_tool(name: str) -> str:
    """The program's path. Without it the test is skipped; in CI, where `.ci/run` installs it, it fails."""
    path = shutil.which(name)
    if path is not None:
        return path
    message = f"{name} is not installed"
    if in_ci():
        pytest.fail(f"{message}, and in CI no test is skipped: add it to .ci/run", pytrace=False)
    pytest.skip(message)
