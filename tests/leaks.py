"""Finds made-up secrets in what the program writes: in files, on its outputs, in any usual encoding.

Every secret of the tests holds `escalations.MARK`, so a part or an encoding of one is found by that alone.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from escalations import MARK

# What tests write themselves, and what the loopback server was sent: these may hold secrets.
OURS = ("escalations.jsonl", "ops-manager-alert-sinks.v1.json", "received", "secrets.env")


def _encodings(text: str) -> Iterator[str]:
    yield text
    yield text[::-1]
    yield text.encode().hex()
    yield "".join(f"%{ord(character):02x}" for character in text)
    yield "".join(f"\\u{ord(character):04x}" for character in text)
    yield quote("".join(f"%{ord(character):02x}" for character in text), safe="")
    for lead in range(3):
        coded = base64.b64encode(b"\0" * lead + text.encode()).decode()
        # What depends on the bytes before and after is left out.
        yield coded[(0, 2, 3)[lead] :].rstrip("=")[:-1]


ENCODED_MARKS = sorted({encoded.lower().encode() for encoded in _encodings(MARK)})


def leaked(data: bytes | str) -> list[str]:
    """The encodings of a secret that stand in some data, in any case; [] is good."""
    folded = (data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data).lower()
    return [mark.decode() for mark in ENCODED_MARKS if mark in folded]


def leaks_under(folder: Path) -> list[str]:
    """The files under a folder, but for those that tests write, that hold a secret in some encoding."""
    found = []
    # Not `rglob`, and no `Path` for each file: they would take longer than the search itself.
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118
            try:
                if name.startswith(OURS) or not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                    marks = leaked(file.read())
            except OSError:  # gone meanwhile
                continue
            if marks:
                found.append(f"{path.removeprefix(f'{folder}/')}: {marks}")
    return found
