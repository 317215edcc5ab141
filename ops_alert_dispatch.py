#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["click>=8.3.3", "jsonschema>=4.24.1", "requests>=2.33.0"]
# ///
"""Deliver a Superloop ops manager's escalations: webhooks, Slack, Discord, Teams, PagerDuty, Alertmanager.

The host appends one JSON object a line to ``escalations.jsonl``. One pass of ``dispatch`` ingests what is new
there into a queue, and delivers from the queue:

    escalations.jsonl -> Source -> Escalation -> Router -> Queue (SQLite)
    Queue -> Sender (a thread for each destination) -> Adapter -> Client -> sink
    Queue -> outbox -> telemetry, attempts; summary in the state file

The promise: an escalation that was written reaches each sink that should have it, or an operator can see
that it did not, and why. Start at `Pass`, `Loop` and `Sender`; `QUEUE_SCHEMA` says what the queue holds.
"""

from __future__ import annotations

import gc

# No garbage collection during the imports: what they make stays, and collecting it again and again costs a
# tenth of an idle pass. The end of this file turns collection on again.
gc.disable()

import contextlib
import errno
import fcntl
import functools
import io
import itertools
import json
import os
import re
import stat
import sys
import threading
import time
import uuid
from collections import Counter, deque, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, TextIO, cast, get_args

import click

try:
    # hashlib loads OpenSSL, which costs a twentieth of an idle pass.
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

if TYPE_CHECKING:
    import sqlite3
    from http.client import HTTPResponse
    from ssl import SSLContext
    from typing import NamedTuple

    from click.shell_completion import CompletionItem
    from urllib3 import HTTPConnectionPool
    from urllib3.connection import HTTPConnection
else:

    class NamedTupleType(type):
        """Makes a class a named tuple, as `typing` does, but without a look at the types of its fields, which
        costs a twentieth of an idle pass."""

        def __new__(cls, name, _bases, body):
            # From Python 3.14 on, a body has these only with the import from __future__ above.
            fields = body["__annotations__"]
            made = namedtuple(name, fields, defaults=[body.pop(field) for field in fields if field in body])
            for key, value in body.items():
                setattr(made, key, value)
            return made

    NamedTuple = type.__new__(NamedTupleType, "NamedTuple", (), {})

__version__ = "1.0.0"

PROGRAM = "ops-alert-dispatch"
SCHEMA_VERSION = "v1"
JsonObject = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------
# Errors, time, JSON, words
# ---------------------------------------------------------------------------------------------------------
# Knows nothing of what the program does: the errors that end a command, times, JSON, and text that is shown.
# Every section uses it.

EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_CONFIG = 3
EXIT_STATE = 4
EXIT_STORAGE = 5
# As shells report a process that SIGINT or SIGPIPE has ended.
EXIT_INTERRUPTED = 130
EXIT_READER_LEFT = 141

EXIT_CODES_HELP = """
\b
Exit codes:
  0    done; a sink that failed is in the summary, not in the exit code
  1    a delivery failed, in `test`, `redeliver` or `dispatch --strict`
  2    the command line is wrong
  3    the config is invalid or a secret is unset: nothing ingested or sent
  4    the state file or the queue cannot be used, or a pass is using it
  5    the source, the telemetry, the disk or the output failed, or a file is
       in the way
  130  interrupted while no pass was at work, or a question was not
       answered with yes
"""


class DispatchError(Exception):
    """An error that ends a command: a headline, and a line for each fault with its place and what to do."""

    exit_code: ClassVar[int] = EXIT_STORAGE

    def __init__(self, headline: str, faults: Sequence[str] = ()) -> None:
        super().__init__(headline)
        self.headline = headline
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n  ".join((self.headline, *self.faults))


class ConfigError(DispatchError):
    """The config is unreadable, malformed or inconsistent, or a secret of an enabled sink is unset."""

    exit_code = EXIT_CONFIG


class StateError(DispatchError):
    """The state file cannot be used, and could not be rebuilt."""

    exit_code = EXIT_STATE


class StorageError(DispatchError):
    """The source, the telemetry or the disk failed, or the program itself."""


def place_of(error: Exception) -> str:
    """The type of an exception, and the line of this file that it came through last. Not its message, which
    may hold a secret."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    inner = frames[1:] or frames  # the first frame is the function that caught it
    frame = ([frame for frame in inner if frame.filename == __file__] or inner)[-1]
    return f"{type(error).__name__} in {frame.name}, line {frame.lineno}"


def as_dispatch_error(error: Exception) -> DispatchError:
    """The error itself if it is one of ours; else that of a fault of the program."""
    if isinstance(error, DispatchError):
        return error
    return StorageError(
        f"a fault of the program: {place_of(error)}",
        ["report it with this line and the version; what was not delivered goes out with a later pass"],
    )


def storage_error(action: str, path: str, error: OSError) -> StorageError:
    """`cannot append to alerts.jsonl: No space left on device`, with advice."""
    return StorageError(f"cannot {action} {path}: {error.strerror or error}", [what_to_do(error)])


def what_to_do(error: OSError) -> str:
    """What an operator can do about an error of the file system."""
    return {
        errno.ENOSPC: "free space on this file system; the next pass goes on where this one stopped",
        errno.EDQUOT: "raise the quota or free space; the next pass goes on where this one stopped",
        errno.EFBIG: "raise the file size limit (ulimit -f) or rotate the file",
        errno.EROFS: "mount the file system writable",
        errno.EACCES: "give this user access to the file and its folder",
        errno.EPERM: "give this user access to the file and its folder",
        errno.ELOOP: "it is a symbolic link that is not followed: put a plain file there",
        errno.ESTALE: "put the copy beside it, named as a rotation names it (.1), before the next pass; "
        "without one, what was not read is lost",
        errno.EMFILE: "raise the limit of open files (ulimit -n) of the service that runs this",
        errno.ENFILE: "raise the limit of open files of this machine (fs.file-max)",
        errno.EISDIR: "it is a folder: move it away",
        errno.EEXIST: "a file stands where the folder should be: move it away",
        errno.ENOTDIR: "a file stands where a folder should be: move it away",
    }.get(error.errno or 0, "check the file and its folder")


# Times that every zone can write: from 1970 to the end of the year 9998.
LAST_SECOND = 253_370_764_800.0


def iso(epoch: float) -> str:
    """Write seconds since the epoch as the host does: ISO 8601, UTC, whole seconds (rounded down)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))


def iso_milliseconds(epoch: float) -> str:
    """As `iso`, with milliseconds."""
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: object) -> float | None:
    """Read an ISO 8601 time as seconds since the epoch; None for anything else. Without a zone it is UTC."""
    if not isinstance(text, str) or len(text) > 64:
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < LAST_SECOND else None


# No person and no jq writes an escalation that is nested deeper, and Python's JSON encoder still takes it.
MAX_DEPTH = 100
BYTE_ORDER_MARK = "\ufeff".encode()

JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class TooDeepError(ValueError):
    """JSON that is nested more than MAX_DEPTH deep."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} deep")


# Exceptions that taking apart JSON of an unknown shape can raise.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def encode_json(value: object) -> bytes:
    """Encode any value as compact UTF-8 JSON on one line.

    Lone surrogates become U+FFFD; NaN and the infinities, which JSON does not have, become strings.
    """
    try:
        return one_line(JSON_ENCODER.encode(value).encode())
    except ValueError:  # UnicodeEncodeError is one, too
        return one_line(JSON_ENCODER.encode(strict_value(value)).encode())


LINE_BREAKS = (
    ("\x85".encode(), rb"\u0085"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)


def one_line(data: bytes) -> bytes:
    """Put valid JSON on one line for every reader.

    Some readers also split at U+0085, U+2028 and U+2029. Valid JSON has them only in strings: they are
    escaped. It has a carriage return only between tokens: that becomes a space.
    """
    if not data.isascii():
        for character, written in LINE_BREAKS:
            data = data.replace(character, written)
    return data.replace(b"\r", b" ")


def strict_value(value: object) -> object:
    """Replace what strict JSON in UTF-8 cannot hold. Nesting is at most MAX_DEPTH, so recursion is safe."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and value - value != 0:  # NaN, inf, -inf
        return repr(value)
    if isinstance(value, Mapping):
        return {strict_value(str(key)): strict_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_value(item) for item in value]
    return value


def too_deep(value: object) -> bool:
    """Tell whether a value is nested more than MAX_DEPTH deep, without recursion."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)  # type: ignore[attr-defined]
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def as_integer(digits: str) -> int | str:
    """An integer; with more digits than Python converts, the digits."""
    try:
        return int(digits)
    except ValueError:
        return digits


# `int` refuses NaN, Infinity and -Infinity, as strict JSON does.
STRICT_DECODER = json.JSONDecoder(parse_constant=int)
LENIENT_DECODER = json.JSONDecoder(parse_constant=str, parse_int=as_integer)


def decode_json(text: str) -> object:
    """Read JSON; NaN, the infinities and integers of too many digits become strings.

    Raises ValueError if it is not JSON, TooDeepError if it is nested more than MAX_DEPTH deep.
    """
    return decode_record(text)[0]


def decode_record(text: str) -> tuple[object, bool]:
    """As `decode_json`; and whether a strict reader reads the same."""
    strict = True
    try:
        try:
            value = STRICT_DECODER.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # NaN, an infinity, or an integer of more digits than Python converts
            value, strict = LENIENT_DECODER.decode(text), False
    except RecursionError:
        raise TooDeepError from None
    if text.count("{") + text.count("[") > MAX_DEPTH and isinstance(value, dict | list) and too_deep(value):
        raise TooDeepError
    return value, strict


def mapping(value: object) -> JsonObject:
    """A JSON object as it is; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


# Unprintable characters: those that can forge log lines or terminal output (control characters, line and
# paragraph separators, changes of the text's direction), and lone surrogates, which cannot be encoded. The
# list is fixed, so that what Unicode assigns later is shown the same by every version of Python.
FORGING = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f"
UNPRINTABLE = f"[\x00-\x1f{FORGING}\ud800-\udfff]+"


def printable(text: str) -> str:
    """Make text safe for a line of a log or a terminal: each run of unprintable characters becomes a
    space."""
    # Usually there is nothing to do, and no pattern is compiled. Python finds more unprintable than we do.
    return text if text.isprintable() else re.sub(UNPRINTABLE, " ", text)


def spell_out(text: str, pattern: str = UNPRINTABLE) -> str:
    """Escape what is unprintable as JSON does. Unlike with `printable`, texts that differ still differ."""
    return re.sub(pattern, lambda found: "".join(f"\\u{ord(character):04x}" for character in found[0]), text)


def cut(text: str, limit: int) -> str:
    """Cut text to at most `limit` characters; a cut is marked with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shell_line(*words: str) -> str:
    """A command that can be pasted into a shell."""
    import shlex

    return printable(shlex.join(words))


def as_text(value: object) -> str | None:
    """A field as text; None if there is nothing in it."""
    if value is None:
        return None
    text = value if isinstance(value, str) else encode_json(value).decode()
    return text.strip() or None


# How much of a value is shown to people, so that a long one leaves room for the others.
SHOWN_CHARACTERS = 200
# How much of a value is made printable before it is cut to that: it may be 32 MB.
READ_CHARACTERS = 100 * SHOWN_CHARACTERS


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """A field for people: one line of at most `limit` characters; empty if there is nothing in it."""
    return cut(printable(cut(as_text(value) or "", READ_CHARACTERS)).strip(), limit)


def how_long(moment: str | None, now: float) -> str | None:
    """A time relative to `now`: `40 s ago`, `in 3 min`. A text that is no time is shown as it is."""
    at = parse_time(moment)
    if at is None:
        return cut(moment, 20) if moment else None
    if abs(now - at) < 1:
        return "just now"
    return f"in {duration_words(at - now)}" if at > now else f"{duration_words(now - at)} ago"


def when_due(moment: str | None, now: float) -> str | None:
    """When something will happen: `in 3 min`; `due now` if that time has come."""
    at = parse_time(moment)
    return "due now" if at is not None and at < now + 1 else how_long(moment, now)


def duration_words(seconds: float) -> str:
    """A length of time: `40 s`, `3 min`, `5 h`, `2 days`."""
    units = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    length, unit = next((pair for pair in units if seconds >= 2 * pair[0]), (1, "s"))
    return f"{seconds // length:.0f} {unit}"


def plural(count: int, noun: str) -> str:
    """`3 escalations`, `1 escalation`, `2 deliveries`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


# ---------------------------------------------------------------------------------------------------------
# Files: append, replace, lock
# ---------------------------------------------------------------------------------------------------------
# Knows how the program makes, replaces, extends and locks its own files, not what is in them. Never follows a
# symbolic link to one, and never leaves half a row.

# What must fit on the disk before anything is sent.
RESERVE_BYTES = 256 << 10
# How much of a file of rows is read at once from its end.
BLOCK_BYTES = 1 << 20


def stat_of(path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
    """The status of a file; None if it is not there. Raises OSError."""
    try:
        return os.stat(path, follow_symlinks=follow_symlinks)
    except (FileNotFoundError, NotADirectoryError):
        return None


def may_be_there(path: str, *, follow_symlinks: bool = True) -> bool:
    """Tell whether there is something at a path. If that cannot be seen, say yes."""
    try:
        return stat_of(path, follow_symlinks=follow_symlinks) is not None
    except OSError:
        return True


def same_file(one: str, other: str) -> bool:
    """Tell whether two paths are the same, or lead to the same file. If that cannot be seen, say no."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def make_folder(path: str) -> None:
    """Make a folder that only this user can read; one that is there keeps its mode. Raises StorageError."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent != path:  # not `os.makedirs`: the folders between would get the usual mode
        make_folder(parent)
    try:
        os.mkdir(path, 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        give_to_owner_of(parent, descriptor)
        os.close(descriptor)
    except OSError as error:
        if not os.path.isdir(path):  # else another pass was quicker
            raise storage_error("make the folder", path, error) from None


def give_to_owner_of(other: str, descriptor: int) -> None:
    """Give a file that root has made to the owner of `other`, usually its folder: a pass that root runs by
    hand must not lock out the passes of the usual user."""
    if os.geteuid() == 0:
        owner = os.stat(other)
        if (owner.st_uid, owner.st_gid) != (0, 0):
            with contextlib.suppress(OSError):  # not every file system allows that
                os.fchown(descriptor, owner.st_uid, owner.st_gid)


def open_own(path: str, flags: int) -> int:
    """Open one of the program's own files, or make it, readable by the folder's owner only. The folder is
    there. A symbolic link is not followed. Raises OSError."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):  # another pass was quicker
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            give_to_owner_of(os.path.dirname(path), descriptor)
            return descriptor


def create_anew(path: str) -> int:
    """Make a file for a moment's use. One that a killed pass has left there goes first. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte at the end of a file. If an error cuts that short, the file is truncated to what it
    was. Raises OSError."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        if len(view) < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(data) + len(view))
        raise


def append_rows(path: str, rows: bytes) -> None:
    """Append whole lines to a file. A torn last line, from a crash or a full disk, gets its line feed first.
    The rows are flushed to the disk: some file systems report only then that they are full.

    Raises StorageError.
    """
    make_folder(os.path.dirname(path))
    try:
        descriptor = open_own(path, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            write_all(descriptor, b"\n" + rows if torn else rows)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error("append to", path, error) from None


def check_appendable(path: str) -> None:
    """Check, before anything is sent, that rows can be appended to a file. Raises StorageError."""
    try:
        os.close(open_own(path, os.O_RDWR | os.O_APPEND))
    except OSError as error:
        raise storage_error("append to", path, error) from None


def replace_file(path: str, data: bytes, *, durable: bool) -> None:
    """Replace a file in one step: a reader sees the old content or the new one. Its mode and owner are kept.
    The folder is there.

    `durable`: flush to the disk before and after the rename. Raises StorageError.
    """
    temporary = f"{path}.tmp"
    try:
        mode, owned_like = 0o600, os.path.dirname(path)
        with contextlib.suppress(FileNotFoundError):
            mode, owned_like = os.lstat(path).st_mode, path
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        descriptor = create_anew(temporary)
        try:
            give_to_owner_of(owned_like, descriptor)
            if mode & 0o777 != 0o600:
                os.fchmod(descriptor, mode & 0o777)
            write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        if durable:
            folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise storage_error("write", str(error.filename or path), error) from None


def check_room(folder: str, *files: str, least: int = 0) -> None:
    """Check, before anything is sent, that there is room to write down the results.

    Reserves RESERVE_BYTES in the folder for a moment, which meets free space, quota and a read-only mount,
    and compares `files` with the limit of a file's size. `least`: the lowest limit that will do. Raises
    StorageError.
    """
    import resource

    make_folder(folder)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = RESERVE_BYTES if limit == resource.RLIM_INFINITY else max(1, min(RESERVE_BYTES, limit))
    probe = os.path.join(folder, f".{PROGRAM}.reserve")
    try:
        for file in files if limit != resource.RLIM_INFINITY else ():
            if limit < least or ((found := stat_of(file)) and found.st_size + room > limit):
                raise storage_error("append to", file, OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
        descriptor = create_anew(probe)
        try:
            os.posix_fallocate(descriptor, 0, room)
        finally:
            os.close(descriptor)
            os.unlink(probe)
    except OSError as error:
        raise storage_error(f"reserve {RESERVE_BYTES >> 10} KiB in", folder, error) from None


@contextlib.contextmanager
def loop_lock(path: str, wait: float) -> Iterator[bool]:
    """Hold a loop's lock; yields False if it could not be had within `wait` seconds.

    The kernel drops the lock when the process ends, so none is left behind. Raises StorageError.
    """
    deadline = time.monotonic() + wait
    try:
        try:
            descriptor = open_own(path, os.O_RDWR)
        except FileNotFoundError:
            make_folder(os.path.dirname(path))
            descriptor = open_own(path, os.O_RDWR)
    except OSError as error:
        raise storage_error("lock", path, error) from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.05)
            except OSError as error:
                raise storage_error("lock", path, error) from None
        yield True
    finally:
        os.close(descriptor)


# The fields of rows, of what they say about a sink, and of the state file that are texts.
TEXT_FIELDS = {
    *("timestamp", "updatedAt", "failedSince", "escalationTimestamp"),
    *("loopId", "traceId", "escalationTraceId", "escalationId", "id", "sinkId", "peer", "type", "sinkType"),
    *("category", "escalationCategory", "eventSeverity", "minSeverity", "pattern"),
    *("status", "outcome", "reasonCode", "faultCode", "message", "rawLine"),
}


def checked_texts(fields: JsonObject) -> JsonObject:
    """Fields, except those that must be texts and hold something else."""
    return {key: value for key, value in fields.items() if key not in TEXT_FIELDS or isinstance(value, str)}


def read_row(line: bytes) -> JsonObject | None:
    """The JSON object on a line, without fields of another type than its writers give them; None if the line
    is torn, or no object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    sinks, route = row.get("sinks"), row.get("route")
    row = checked_texts(row)
    entries = sinks if isinstance(sinks, list) else []
    row["sinks"] = [checked_texts(entry) for entry in entries if isinstance(entry, dict)]
    if isinstance(route, dict):
        names = route.get("sinks")
        named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        row["route"] = {**checked_texts(route), "sinks": named}
    else:
        row.pop("route", None)
    return row


@contextlib.contextmanager
def open_rows(path: str) -> Iterator[io.BufferedReader | io.BytesIO]:
    """Open a file of rows to read; an empty one if it is not there. Raises StorageError, also for what fails
    while it is read."""
    file: io.BufferedReader | io.BytesIO = io.BytesIO()
    try:
        with contextlib.ExitStack() as opened:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                file = opened.enter_context(open(path, "rb"))
            yield file
    except OSError as error:
        raise storage_error("read", path, error) from None


def iterate_rows(path: str) -> Iterator[JsonObject]:
    """The JSON objects of a file of rows; torn lines are skipped. Raises StorageError."""
    with open_rows(path) as file:
        yield from filter(None, map(read_row, file))


def rows_backwards(path: str, containing: bytes = b"") -> Iterator[JsonObject]:
    """The JSON objects of a file of rows, the last one first: those whose line contains `containing`. Raises
    StorageError."""
    with open_rows(path) as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            if not start:
                lines.insert(0, rest)
            for line in reversed(lines):
                if containing in line and (row := read_row(line)):
                    yield row
            end = start


# ---------------------------------------------------------------------------------------------------------
# Secrets: what is masked in text that comes from outside
# ---------------------------------------------------------------------------------------------------------
# Knows how a secret can be spelled, not where it is set. Masks sinks' answers, and requests that are shown.
# Never changes a record.

MASK = "[secret]"
# A run of this many characters of a secret is masked: no answer holds one by chance, and a shorter run does
# not help to guess the rest of a key.
SECRET_RUN = 8
# A secret shorter than SECRET_RUN is masked where it is a whole word, and not at all if it is shorter than
# this.
SECRET_MIN = 4
# How often escapes are undone, less one: JSON may quote a percent-encoded URL.
ENCODING_LAYERS = 3

# As in most sections, patterns are texts: what an idle pass does not need is compiled with its first use.
ESCAPED = r"%([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\([\"/\\])"
PLAIN_WORDS = "[A-Za-z]+(?:[-_.][A-Za-z]+)*"


class Redactor:
    """Masks secrets in text.

    Each secret is masked, and every run of SECRET_RUN characters of it, in upper or lower case, plain,
    JSON-escaped, percent-encoded or in base64. `public` names (sink ids and categories) stay, if they are
    plain words and not secrets themselves, even if a secret URL contains them.
    """

    def __init__(self, secrets: Iterable[str] = (), public: Iterable[str] = ()) -> None:
        self._secrets = tuple(secrets)
        self._public = tuple(public)

    @functools.cached_property
    def _hidden(self) -> tuple[set[str], set[str]]:
        """The runs of all secrets, and the secrets that are shorter than a run; in lower case."""
        tokens: set[str] = set()
        paths: set[str] = set()
        for secret in self._secrets:
            if "://" in secret:
                userinfo, path = split_url(secret)
                tokens |= {userinfo, *userinfo.split(":")}
                paths.add(path)
            else:
                tokens |= token_parts(secret)
        tokens = {token for token in tokens if len(token) >= SECRET_MIN}
        names = [fold(name) for name in self._public if re.fullmatch(PLAIN_WORDS, name)]
        public = " ".join(name for name in names if not any(fold(token) in name for token in tokens))
        runs = {
            text[at : at + SECRET_RUN]
            for part in tokens | paths
            for text in map(fold, spellings(part))
            for at in range(len(text) - SECRET_RUN + 1)
        }
        words = {fold(text) for token in tokens for text in spellings(token)}
        return (
            {run for run in runs if run not in public},
            {word for word in words if SECRET_MIN <= len(word) < SECRET_RUN},
        )

    def mask(self, text: str) -> str:
        """Replace each secret, or part of one, by MASK."""
        runs, words = self._hidden
        if not runs and not words:
            return text
        spans: list[tuple[int, int]] = []
        layer, places = text, [(index, index + 1) for index in range(len(text))]
        for _ in range(ENCODING_LAYERS):
            folded = fold(layer)
            found = [
                (start, start + SECRET_RUN)
                for start in range(len(folded) - SECRET_RUN + 1)
                if folded[start : start + SECRET_RUN] in runs
            ]
            for word in words:
                alone = rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"
                found += [match.span() for match in re.finditer(alone, folded)]
            spans += [(places[start][0], places[stop - 1][1]) for start, stop in found]
            decoded, places = decode_layer(layer, places)
            if decoded == layer:
                break
            layer = decoded
        return mask_spans(text, spans)

    def mask_texts(self, value: Any) -> Any:
        """`mask` every text in a JSON value."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, dict):
            return {self.mask(key): self.mask_texts(item) for key, item in value.items()}
        return [self.mask_texts(item) for item in value] if isinstance(value, list) else value


SMALL_LETTERS = {letter: letter + 32 for letter in range(ord("A"), ord("Z") + 1)}


def fold(text: str) -> str:
    """Write A to Z in lower case. Unlike with `str.lower`, the length stays the same."""
    return text.lower() if text.isascii() else text.translate(SMALL_LETTERS)


def mask_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Replace what the spans cover by MASK, once for spans that touch."""
    pieces: list[str] = []
    covered = 0
    for start, stop in sorted(spans):
        if start > covered or not pieces:
            pieces += [text[covered:start], MASK]
        covered = max(covered, stop)
    return "".join([*pieces, text[covered:]])


def split_url(url: str) -> tuple[str, str]:
    """The secret parts of a URL: user name and password, and all that follows the host."""
    beyond_scheme = url.partition("://")[2]
    authority = re.split("[/?#]", beyond_scheme, maxsplit=1)[0]
    return authority.rpartition("@")[0], beyond_scheme[len(authority) :].strip("/")


def token_parts(token: str) -> set[str]:
    """The words of a token, and the keys that they hold if they are signing secrets."""
    parts: set[str] = set()
    for word in token.split():
        parts |= {word, word.removeprefix("whsec_")}
        parts |= {key.decode("utf-8", "surrogateescape") for key in signing_keys(word)}
    return parts


def signing_keys(value: str) -> list[bytes]:
    """The keys of a webhook's signing secret, in its order; empty if a part of it is malformed.

    Standard Webhooks, "Signature scheme": `whsec_` and the key in base64; several, separated by spaces, while
    a key is rotated.
    """
    from base64 import b64decode

    keys: list[bytes] = []
    for secret in value.split(" "):
        coded = secret.removeprefix("whsec_")
        try:
            key = b64decode(coded.rstrip("=") + "=" * (-len(coded.rstrip("=")) % 4), validate=True)
        except ValueError:
            return []
        if coded == secret or not key:
            return []
        keys.append(key)
    return keys


def spellings(part: str) -> set[str]:
    """A part of a secret as it is, percent-decoded, and both in base64: alone, or after other bytes."""
    from base64 import b64encode
    from urllib.parse import unquote, unquote_to_bytes

    coded: set[str] = set()
    own = part.encode("utf-8", "surrogateescape")
    for raw in {own, unquote_to_bytes(own)}:
        coded.add(b64encode(raw).decode().rstrip("="))
        for lead in range(3):
            # The first characters depend on the bytes before, the last one on those after.
            coded.add(b64encode(b"\0" * lead + raw).decode()[(0, 2, 3)[lead] :].rstrip("=")[:-1])
    return {part, unquote(part), *coded, *(text.replace("+", "-").replace("/", "_") for text in coded)}


def decode_layer(text: str, places: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """Undo one layer of percent and JSON escapes. `places`: where in the original text each character is."""
    decoded: list[str] = []
    kept: list[tuple[int, int]] = []
    at = 0
    for match in re.finditer(ESCAPED, text):
        start, stop = match.span()
        percent, unicode, plain = match.groups()
        decoded += [text[at:start], plain or chr(int(percent or unicode, 16))]
        kept += [*places[at:start], (places[start][0], places[stop - 1][1])]
        at = stop
    return "".join([*decoded, text[at:]]), [*kept, *places[at:]]


# ---------------------------------------------------------------------------------------------------------
# Config: what the operator wrote, checked
# ---------------------------------------------------------------------------------------------------------
# Reads the config and the secrets of its sinks, and says what is wrong, where, and what to do. Fails closed:
# never returns half a config. Which keys a type has is in the schema; what their values do, in its adapter.

SCHEMA_FILE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "alert-sinks.schema.json")
DEFAULT_CONFIG = "config/ops-manager-alert-sinks.v1.json"
CONFIG_ENV = "OPS_MANAGER_ALERT_SINKS_FILE"
TRACE_ENV = "OPS_MANAGER_TRACE_ID"
MAX_CONFIG_BYTES = 1 << 20
# Of more faults the rest is not listed: reconcile keeps the last 40 lines of the output.
MAX_FAULTS = 35
# A suggestion is looked for among this many known words.
MAX_KNOWN = 60
# Only the length of a longer key is shown.
LONG_KEY = 200
MAX_SECRET_BYTES = 1 << 16

# The keys of a sink that name environment variables, and what the variable holds. The value of `headersEnv`
# is an object of such names. All but the path of a CA file is secret.
CA_FILE_KEY = "caFileEnv"
HEADERS_KEY = "headersEnv"
HEADER_KEYS = ("headers", HEADERS_KEY)
# Types whose URL variable holds base URLs, to which a path is added, one for each peer of a cluster.
CLUSTER_TYPES = ("alertmanager",)
VariableKind = Literal["url", "token", "signing secret", "header", "CA file"]
VARIABLE_KEYS: Mapping[str, VariableKind] = {
    "urlEnv": "url",
    "webhookUrlEnv": "url",
    "routingKeyEnv": "token",
    "authTokenEnv": "token",
    "signingSecretEnv": "signing secret",
    HEADERS_KEY: "header",
    CA_FILE_KEY: "CA file",
}

DEFAULT_TIMEOUT: float = 5
SEVERITIES = ("info", "warning", "critical")
# Numbers are syslog's (RFC 5424, section 6.2.1); P1 to P5 and sev0 to sev4 come from incident tools.
SEVERITY_WORDS = {
    "info": "info informational information notice debug trace low ok healthy P4 P5 sev4 5 6 7",
    "warning": "warning warn degraded minor medium moderate P2 P3 sev2 sev3 3 4",
    "critical": "critical crit error err fatal major high severe alert emergency emerg panic disaster "
    "blocker urgent page P1 sev0 sev1 0 1 2",
}
SEVERITY_OF_WORD = {
    word.lower(): severity for severity, words in SEVERITY_WORDS.items() for word in words.split()
}


def normalise_severity(value: object) -> str | None:
    """Map a word, in any case, or a number to `info`, `warning` or `critical`; None for any other value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if 0 <= value <= 7 else None
    return SEVERITY_OF_WORD.get(value.strip().lower()) if isinstance(value, str) else None


class Sink(NamedTuple):
    """A configured sink. `settings` is its object in the config, without comments. `secrets` has the values
    of its variables, by the keys of `variables_of`; one that is unset is left out."""

    id: str
    type: str
    enabled: bool
    timeout_seconds: float
    min_severity: str | None
    settings: JsonObject
    secrets: Mapping[str, str]

    @property
    def secret_refs(self) -> dict[str, str]:
        """The variables that it names: see `variables_of`."""
        return variables_of(self.settings)

    def summary(self) -> JsonObject:
        """The sink as the resolver lists it."""
        return {
            "id": self.id,
            "enabled": self.enabled,
            "type": self.type,
            "timeoutSeconds": self.timeout_seconds,
            "secretRefs": self.secret_refs,
        }

    def describe(self) -> JsonObject:
        """The sink as the resolver describes a selected one: `summary`, and its other settings."""
        known = {"enabled", "type", "timeoutSeconds", *VARIABLE_KEYS}
        config = {key: value for key, value in self.settings.items() if key not in known}
        return {**self.summary(), "config": config}


def variables_of(settings: JsonObject) -> dict[str, str]:
    """The variables that a sink's object names, in a valid config or not: `{"urlEnv": "ALERT_URL",
    "headersEnv.X-Api-Key": "ALERT_KEY"}`."""
    named: dict[str, object] = {}
    for key in VARIABLE_KEYS:
        if key == HEADERS_KEY:
            named |= {f"{key}.{header}": name for header, name in mapping(settings.get(key)).items()}
        else:
            named[key] = settings.get(key)
    # As the schema has it: `[A-Z_][A-Z0-9_]*`.
    return {
        key: name
        for key, name in named.items()
        if isinstance(name, str) and name.isascii() and name.isidentifier() and name == name.upper()
    }


def variables_in(document: JsonObject) -> Iterator[tuple[str, str, str, JsonObject]]:
    """The variables that the sinks of a config name, valid or not: each with its key of `variables_of`, the
    id of the sink, and the sink's object."""
    for sink_id, sink in mapping(document.get("sinks")).items():
        settings = mapping(sink)
        for key, name in variables_of(settings).items():
            yield name, key, sink_id, settings


def kind_of_variable(key: str) -> VariableKind:
    """What a variable holds, by its key of `variables_of`."""
    return VARIABLE_KEYS[key.partition(".")[0]]


class DeliveryPolicy(NamedTuple):
    """When a failed delivery is tried again. Times are in seconds."""

    max_attempts_per_pass: int
    backoff_initial: float
    backoff_max: float
    give_up_after: float


class Config(NamedTuple):
    """A valid config. `digest`: of its bytes and the program's version. `redactor`: for its secrets."""

    path: str
    digest: str
    document: JsonObject
    default_min_severity: str
    sinks: Mapping[str, Sink]
    policy: DeliveryPolicy
    env_checked: bool
    redactor: Redactor

    @property
    def routing(self) -> JsonObject:
        """The `routing` object of the document."""
        routing: JsonObject = self.document["routing"]
        return routing

    @property
    def repeat_window(self) -> float:
        """For how many seconds repeats are held back; 0: not at all."""
        window: float = self.routing.get("repeat", {}).get("windowSeconds", 0)
        return window

    def rules(self) -> JsonObject:
        """The part of the document that decides where a record goes, without the names of secrets."""
        sinks = {
            sink_id: {key: settings[key] for key in ("type", "enabled", "minSeverity") if key in settings}
            for sink_id, settings in self.document["sinks"].items()
        }
        routes = [
            {key: route[key] for key in ("category", "sinks", "minSeverity", "enabled") if key in route}
            for route in self.routing.get("routes", [])
        ]
        routing = {"defaultSinks": self.routing["defaultSinks"], "routes": routes}
        if "categorySeverity" in self.routing:
            routing["categorySeverity"] = self.routing["categorySeverity"]
        return {"defaultMinSeverity": self.default_min_severity, "sinks": sinks, "routing": routing}

    def env_status(self) -> JsonObject:
        """For each environment variable that a sink names: whether it is set."""
        return {
            name: {"present": key in sink.secrets}
            for sink in self.sinks.values()
            for key, name in sorted(sink.secret_refs.items())
        }


def json_path(parts: Iterable[str | int]) -> str:
    """A place in a document as JSONPath (RFC 9535): `$.sinks['webhook-default'].urlEnv`."""
    path = "$"
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif len(part) > LONG_KEY:
            path += f"[a key of {len(part)} characters]"
        elif part.isascii() and part.isidentifier():
            path += f".{part}"
        else:
            path += f"[{json.dumps(printable(part), ensure_ascii=False)[1:-1]!r}]"
    return path


def load_config(
    path: str, environ: Mapping[str, str], *, check_env: bool = True, known_digest: str | None = None
) -> Config:
    """Read, validate and resolve the config.

    `known_digest` is the digest of a config that an earlier pass found valid. The same bytes are not
    validated again, which saves the import of jsonschema. The secrets are always checked.

    Raises ConfigError, which lists every fault with its JSON path.
    """
    raw = read_config(path)
    document, faults = parse_config(path, raw)
    digest = blake2b(__version__.encode() + b"\0" + raw, digest_size=32).hexdigest()
    environ, unreadable = read_secret_files(document, environ)
    if not faults and digest != known_digest:
        faults += validate_config(document)
    if check_env:
        faults += check_secrets(document, environ, unreadable)
    faults += find_secrets(document, environ)
    redactor = make_redactor(document, environ)
    if faults:
        # A fault may quote the file, and somebody may have written a secret into it.
        raise config_error(path, [redactor.mask(fault) for fault in faults])
    delivery = document.get("delivery", {})
    backoff = delivery.get("backoffSeconds", {})
    return Config(
        path=path,
        digest=digest,
        document=document,
        default_min_severity=document["defaultMinSeverity"],
        sinks=sinks_of(document, environ),
        policy=DeliveryPolicy(
            max_attempts_per_pass=delivery.get("maxAttemptsPerPass", 3),
            backoff_initial=backoff.get("initial", min(30.0, backoff.get("max", 30.0))),
            backoff_max=backoff.get("max", max(900.0, backoff.get("initial", 0.0))),
            give_up_after=delivery.get("giveUpAfterSeconds", 86400.0),
        ),
        env_checked=check_env,
        redactor=redactor,
    )


def sinks_of(document: JsonObject, environ: Mapping[str, str]) -> dict[str, Sink]:
    """The sinks of a valid config document, with their secrets from the environment."""
    return {
        sink_id: Sink(
            id=sink_id,
            type=settings["type"],
            enabled=settings["enabled"],
            timeout_seconds=settings.get("timeoutSeconds", DEFAULT_TIMEOUT),
            min_severity=settings.get("minSeverity"),
            settings={k: v for k, v in settings.items() if k != "description" and not k.startswith("x-")},
            secrets={key: environ[name] for key, name in variables_of(settings).items() if environ.get(name)},
        )
        for sink_id, settings in document["sinks"].items()
    }


def read_secret_files(
    document: JsonObject, environ: Mapping[str, str]
) -> tuple[Mapping[str, str], dict[str, str]]:
    """Let the file that NAME_FILE names stand in for a variable NAME that is unset, as with secrets of
    Docker, Kubernetes and systemd. A line feed at the end of the file is left out.

    Returns the environment with these values; and by variable what is wrong with a file that cannot be used.
    That never shows the path, which may be the secret itself by mistake.
    """
    found: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for name in {name for name, *_ in variables_in(document)}:
        path = environ.get(f"{name}_FILE")
        if not path or environ.get(name):
            continue
        try:
            raw = read_regular_file(path, MAX_SECRET_BYTES + 1)
        except (OSError, ValueError) as error:
            why = (isinstance(error, OSError) and error.strerror) or "not a path"
            unreadable[name] = f"cannot be read: {why}; name a file that this user can read"
            continue
        value = raw.decode("utf-8", "surrogateescape").removesuffix("\n")
        if len(raw) > MAX_SECRET_BYTES:
            unreadable[name] = f"is larger than {MAX_SECRET_BYTES} bytes; name the file of the secret"
        elif not value:
            unreadable[name] = "is empty; write the secret into it"
        else:
            found[name] = value
    return ({**environ, **found} if found else environ), unreadable


def read_regular_file(path: str, size: int) -> bytes:
    """At most `size` bytes from the start of a file. Raises OSError, also for a folder or a device, and
    ValueError for a path with a NUL character."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(size)


def make_redactor(document: JsonObject, environ: Mapping[str, str]) -> Redactor:
    """A redactor for what the environment holds: the secrets of a config, valid or not, and the logins of
    proxies. Sink ids and categories are public."""
    hidden: list[str] = []
    for name, key, _, settings in variables_in(document):
        if kind_of_variable(key) != "CA file" and environ.get(name):
            hidden += secret_parts(settings.get("type"), key, environ[name])
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for proxy in (environ.get(name, ""), environ.get(name.upper(), "")):
            userinfo = proxy.rpartition("://")[2].partition("/")[0].rpartition("@")[0]
            hidden += filter(None, [userinfo, *userinfo.split(":")])
    categories = mapping(mapping(document.get("routing")).get("categorySeverity"))
    return Redactor(hidden, public=(*mapping(document.get("sinks")), *categories))


def find_secrets(document: JsonObject, environ: Mapping[str, str]) -> Iterator[str]:
    """Find secrets that somebody has also written into the file, where others may read them."""
    secrets = {
        name: environ[name]
        for name, key, *_ in variables_in(document)
        if kind_of_variable(key) != "CA file" and len(environ.get(name, "")) >= SECRET_RUN
    }
    text = json.dumps(document, ensure_ascii=False)
    if not any(json.dumps(value, ensure_ascii=False)[1:-1] in text for value in secrets.values()):
        return
    waiting: list[tuple[list[str | int], object]] = [([], document)]
    while waiting:
        path, value = waiting.pop()
        children = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, child in children:
            waiting.append(([*path, key], child))
            for name, secret in secrets.items():
                if any(isinstance(written, str) and secret in written for written in (key, child)):
                    yield (
                        f"{json_path([*path, key])}: holds the value of {name}; a secret never stands in the "
                        "file: take it out, and replace it at its provider, since others may have read it"
                    )


def read_config(path: str) -> bytes:
    """Read the bytes of the config. Raises ConfigError."""
    try:
        raw = read_regular_file(path, MAX_CONFIG_BYTES + 1)
        folders = {os.path.dirname(path), os.path.dirname(os.path.realpath(path))}
        open_to_all = [item for item in (path, *sorted(folders)) if others_can_write(item)]
    except OSError as error:
        raise config_error(path, [why_unread(path, error)]) from None
    if open_to_all:
        raise config_error(
            path,
            [
                f"$: everybody on this machine may write to {item}, and so choose where alerts and "
                f"credentials go; chmod o-w {item}"
                for item in open_to_all
            ],
        )
    if len(raw) > MAX_CONFIG_BYTES:
        raise config_error(
            path, [f"$: the file is larger than {MAX_CONFIG_BYTES} bytes; is it the right one?"]
        )
    return raw


def parse_config(path: str, raw: bytes) -> tuple[JsonObject, list[str]]:
    """The document of a config, and what is wrong with its JSON. Raises ConfigError if there is none."""
    faults: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> JsonObject:
        document = dict(pairs)
        if len(document) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            keys = ", ".join(show_value(key) for key in sorted(twice)[:MAX_FAULTS])
            faults.append(f"$: the key {keys} stands twice in one object; take one out")
        return document

    def no_number(word: str) -> None:
        faults.append(f"$: {word} is not a JSON number: write a number")

    def number(digits: str) -> int | float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        text = raw.removeprefix(BYTE_ORDER_MARK).decode()
        document = json.loads(text, object_pairs_hook=unique, parse_constant=no_number, parse_float=number)
    except UnicodeDecodeError as error:
        why = f"not UTF-8 at byte {error.start}; save the file as UTF-8"
    except json.JSONDecodeError as error:
        why = (
            f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct the file there, or "
            "take out a comma or a comment just before it"
        )
    except (RecursionError, ValueError):
        why = "nested too deeply, or a number too long; correct the file"
    else:
        if not isinstance(document, dict):
            why = "must be one JSON object; see the README's full example"
        elif too_deep(document):
            why = f"nested more than {MAX_DEPTH} deep; correct the file"
        else:
            return document, faults
    raise config_error(path, [f"$: {why}"])


def others_can_write(path: str) -> bool:
    """Tell whether any user can change a file, or replace the files in a folder. Raises OSError.

    In a folder with the sticky bit, such as /tmp, users can replace only their own files. On a read-only
    mount, such as that of a Kubernetes ConfigMap, nobody can write, even if the mode allows it.
    """
    mode = os.stat(path).st_mode
    if not mode & stat.S_IWOTH or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        return False
    return not os.statvfs(path).f_flag & os.ST_RDONLY


def why_unread(path: str, error: OSError) -> str:
    """Why a config cannot be read, and what to do."""
    advice = what_to_do(error)
    if error.errno == errno.ENOENT:
        repo = path.removesuffix(f"/{DEFAULT_CONFIG}")
        init = shell_line(PROGRAM, "init", *([] if repo == path else ["--repo", repo]))
        advice = f"`{init}` writes one; or name yours with --alert-config-file or {CONFIG_ENV}"
    return f"$: the file cannot be read: {error.strerror}; {advice}"


def config_error(path: str, faults: Sequence[str]) -> ConfigError:
    """One error for all faults. They may quote the file, so they are made printable."""
    listed = sorted({printable(fault) for fault in faults})
    if len(listed) > MAX_FAULTS:
        listed[MAX_FAULTS:] = [f"… and more; correct these {MAX_FAULTS} first"]
    return ConfigError(f"config invalid, nothing was sent or consumed: {path}", listed)


def validate_config(document: JsonObject) -> list[str]:
    """Find every fault in a config document: by the schema, and those that no schema can express."""
    import jsonschema

    try:
        with open(SCHEMA_FILE, "rb") as file:
            schema = json.load(file)
    except OSError as error:
        raise StorageError(
            f"cannot read {SCHEMA_FILE}: {error.strerror}",
            [f"it belongs beside {os.path.basename(__file__)}: put it there, or install again"],
        ) from None
    validator = jsonschema.Draft202012Validator(schema)
    common = schema["$defs"]["common"]["properties"]
    faults = (
        fault for error in validator.iter_errors(document) for fault in explain_schema_error(error, common)
    )
    return [
        *itertools.islice(faults, MAX_FAULTS + 1),
        *itertools.islice(check_references(document), MAX_FAULTS + 1),
        *check_headers(document),
    ]


def explain_schema_error(error: Any, common: Iterable[str]) -> Iterator[str]:
    """Say in words what to do about a jsonschema ValidationError. A value is not shown if it may be a secret
    that somebody wrote into the file. `common`: the keys that all sinks have."""
    path: list[str | int] = list(error.absolute_path)
    value, rule = error.instance, error.validator_value
    match error.validator:
        case "required":
            missing = next(key for key in rule if key not in value and repr(key) in error.message)
            yield f"{json_path([*path, missing])}: is missing; add it"
        case "additionalProperties" | "unevaluatedProperties":
            known = list(error.schema.get("properties", {}))
            if error.validator == "unevaluatedProperties":  # of a sink
                known = [*common, *known]
            for key in value:
                if key not in known and not key.startswith("x-"):
                    yield f"{json_path([*path, key])}: unknown key; {suggest(key, known)}"
        case "enum":
            near = nearest(value, rule)
            advice = f"did you mean {near!r}?" if near else "set it to one of them"
            yield f"{json_path(path)}: {show_value(value)} is not one of {', '.join(rule)}; {advice}"
        case "const":
            yield f"{json_path(path)}: {show_value(value)} is not {json.dumps(rule)}; set it to that"
        case "type":
            names = {"object": "an object", "array": "an array", "integer": "a whole number"}
            yield f"{json_path(path)}: must be {names.get(rule, f'a {rule}')}; now it is {kind_of(value)}"
        case "minimum" | "maximum":
            low, high = error.schema.get("minimum"), error.schema.get("maximum")
            yield f"{json_path(path)}: {value} is out of range; use {low} to {high}"
        case "pattern":
            # Of a key, the place is that of the key. A header's name may be a secret by mistake.
            of_key = "propertyNames" in error.absolute_schema_path and path[-1] not in HEADER_KEYS
            yield f"{json_path([*path, value] if of_key else path)}: {error.schema['patternErrorMessage']}"
        case "minProperties":
            yield f"{json_path(path)}: at least one sink is needed; add one"
        case "minLength":
            yield f"{json_path(path)}: must not be empty; fill it in or leave the key out"
        case "maxLength":
            yield f"{json_path(path)}: is longer than {rule} characters; shorten it"
        case _:
            yield f"{json_path(path)}: breaks the rule {error.validator} {json.dumps(rule)}; correct it"


def nearest(word: object, known: Sequence[str]) -> str | None:
    """The known word that was probably meant; None if none is near."""
    from difflib import get_close_matches

    known = known[:MAX_KNOWN]
    near = get_close_matches(str(word).lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    if near:
        return next(item for item in known if item.lower() == near[0])
    return normalise_severity(word) if set(known) == set(SEVERITIES) else None


def suggest(word: object, known: Sequence[str]) -> str:
    """`did you mean …?`, or the known words if none is near."""
    near = nearest(word, known)
    if near:
        return f"did you mean {near!r}?"
    more = ", …" if len(known) > MAX_KNOWN else ""
    return f"known here: {', '.join(known[:MAX_KNOWN]) or 'none'}{more}"


def show_value(value: object) -> str:
    """A short value as it stands in the config; of a long one, or a possible secret, only the kind."""
    if isinstance(value, str | int | float | bool) and len(str(value)) <= 40 and "://" not in str(value):
        return json.dumps(value, ensure_ascii=False)
    return kind_of(value)


def kind_of(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def check_references(document: JsonObject) -> Iterator[str]:
    """Find references to sinks that are not there, and a backoff that begins above its maximum."""
    sinks, routing = mapping(document.get("sinks")), mapping(document.get("routing"))
    lists: list[tuple[list[str | int], object]] = [(["defaultSinks"], routing.get("defaultSinks"))]
    routes = routing.get("routes")
    for index, route in enumerate(routes if isinstance(routes, list) else []):
        lists.append((["routes", index, "sinks"], mapping(route).get("sinks")))
    for place, names in lists if sinks else ():
        for index, name in enumerate(names if isinstance(names, list) else []):
            if isinstance(name, str) and name not in sinks:
                path = json_path(["routing", *place, index])
                yield f"{path}: there is no sink {name!r}; {suggest(name, list(sinks))}"
    backoff = mapping(mapping(document.get("delivery")).get("backoffSeconds"))
    initial, maximum = backoff.get("initial"), backoff.get("max")
    if isinstance(initial, int | float) and isinstance(maximum, int | float) and initial > maximum:
        yield f"$.delivery.backoffSeconds: initial {initial} is more than max {maximum}; swap them"


# RFC 9110, sections 6 to 11: headers that frame a message or name its receiver. The program sets them, or
# they must not be sent.
OWN_HEADERS = {
    *("accept-encoding", "connection", "content-encoding", "content-length", "expect", "host", "keep-alive"),
    *("te", "trailer", "transfer-encoding", "upgrade", "proxy-connection"),
}
SENSITIVE_HEADER = (
    r"(^|[-_.])(auth|authorization|cookie|credentials?|passw(or)?d|secret|token|(api|access)[-_.]?key)"
    r"([-_.]|$)"
)
JSON_TYPE = r"application/json *(; *charset=\"?utf-8\"?)?"


def check_headers(document: JsonObject) -> Iterator[str]:
    """Find configured headers that would break a request, or that hold a secret."""
    for sink_id, sink in mapping(document.get("sinks")).items():
        seen: set[str] = set()
        settings = mapping(sink)
        named = [(key, name) for key in HEADER_KEYS for name in mapping(settings.get(key))]
        for key, name in named:
            place = json_path(["sinks", sink_id, key, name])
            lower, value = name.lower(), settings[key][name]
            if lower in seen:
                yield f"{place}: stands twice, in another case or place; take one out"
            seen.add(lower)
            if key == "headers" and re.search(SENSITIVE_HEADER, lower):
                yield (
                    f"{place}: holds a secret, which never stands in the file; name its environment variable "
                    f"in {HEADERS_KEY}, or in authTokenEnv, which is sent as Authorization: Bearer …"
                )
            elif lower in OWN_HEADERS or lower.startswith("webhook-"):
                yield f"{place}: is set by the program alone; take it out"
            elif lower == "authorization" and "authTokenEnv" in settings:
                yield f"{place}: is sent by authTokenEnv already; take one out"
            elif lower == "content-type" and (
                key != "headers" or not re.fullmatch(JSON_TYPE, str(value).strip().lower())
            ):
                yield f"{place}: is always application/json; take it out"


def check_secrets(
    document: JsonObject, environ: Mapping[str, str], unreadable: Mapping[str, str]
) -> list[str]:
    """Find the secrets of enabled sinks that are unset or unusable. No fault ever shows a value.

    `environ` and `unreadable` are from `read_secret_files`. The document may be invalid: one message names
    all faults.
    """
    unset: dict[str, list[str]] = {}
    faults: list[str] = []
    for name, key, sink_id, settings in variables_in(document):
        if settings.get("enabled") is not True:
            continue
        place = json_path(["sinks", sink_id, *key.split(".", 1)])
        if name in unreadable:
            faults.append(f"{place}: {name} is unset, and the file that {name}_FILE names {unreadable[name]}")
        elif not environ.get(name):
            unset.setdefault(name, []).append(place)
        else:
            parts = secret_parts(settings.get("type"), key, environ[name])
            found = dict.fromkeys(check_secret(key, part, settings) for part in parts)
            faults += [f"{place}: the value of {name} {fault}" for fault in found if fault]
    if unset:
        places = {name: ", ".join(sorted(found)) for name, found in sorted(unset.items())}
        place = "$.sinks" if len(unset) > 1 else next(iter(places.values()))
        faults.append(f"{place}: enabled sink secret env var(s) are unset: {' '.join(places)}")
        if len(unset) > 1:
            faults += [f"{found}: {name} is unset or empty; set it" for name, found in places.items()]
        # It begins with no place, and so is sorted to the end.
        faults.append(
            f"what to do: set {'each' if len(unset) > 1 else 'it'} where reconcile runs, and here to try it "
            f'(export {next(iter(places))}=…), or set "enabled": false on the sink'
        )
    return faults


def secret_parts(sink_type: object, key: str, value: str) -> list[str]:
    """What the variable of a sink holds: one secret, or the base URLs of a cluster's peers."""
    if sink_type not in CLUSTER_TYPES or kind_of_variable(key) != "url":
        return [value]
    peers = dict.fromkeys(part.strip().rstrip("/") for part in value.split(","))
    return [peer for peer in peers if peer] or [value]


def check_secret(key: str, value: str, settings: JsonObject) -> str | None:
    """What is wrong with the value of a variable; None if nothing is."""
    kind = kind_of_variable(key)
    if kind in ("url", "signing secret", "CA file") and is_quoted(value):
        return f"{IN_QUOTES}; take them away"
    if kind == "signing secret":
        wrong = (
            "is not whsec_ and base64 (several, while a key is rotated: a space between them); set it again"
        )
        return None if signing_keys(value) else wrong
    if kind == "CA file":
        return check_ca_file(value)
    if kind == "header":
        wrong = "holds a line break or another character that a header cannot hold, or a space at an end"
        return None if re.fullmatch(HEADER_VALUE, value) else f"{wrong}; set it again"
    if not value.isascii() or not value.isprintable() or " " in value:
        return "holds a space, a line break or another character that cannot be sent; set it again"
    return check_url(value, settings) if kind == "url" else None


HEADER_VALUE = r"[!-~]([\t -~]*[!-~])?"
IN_QUOTES = "stands in quotes, which are part of it (docker and systemd read some files of variables so)"


def is_quoted(value: str) -> bool:
    """Tell whether a value stands in quotes, which a shell would have removed."""
    return len(value) > 2 and value[0] == value[-1] and value[0] in "\"'"


def quoted_secrets(sinks: Iterable[Sink]) -> list[str]:
    """A warning for each variable of these sinks whose value stands in quotes."""
    return [
        f"{json_path(['sinks', sink.id, *key.split('.', 1)])}: the value of {sink.secret_refs[key]} "
        f"{IN_QUOTES}; take them away unless the provider gave them"
        for sink in sinks
        for key, value in sink.secrets.items()
        if is_quoted(value)
    ]


def check_ca_file(name: str) -> str | None:
    """What is wrong with a file of CA certificates; None if nothing is."""
    import ssl

    try:
        if not os.path.isfile(name):
            return "is not the path of a file; set it to that of a PEM file with CA certificates"
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=name)
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        return "is not the path of a readable PEM file with CA certificates; set it to that of one"
    return None


# RFC 3986, section 3. Stricter about the authority, because parsers disagree on odd ones. Without
# urllib.parse, whose import costs a twenty-fifth of an idle pass, and without patterns, which cost half of
# that to compile.
HOST_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
USER_CHARACTERS = HOST_CHARACTERS + "~!$&'()*+,;=:%"


def check_url(value: str, settings: JsonObject) -> str | None:
    """What is wrong with the URL of a sink; None if nothing is."""
    scheme, separator, rest = value.partition("://")
    plain = scheme.lower() == "http"
    if not separator or not (plain or scheme.lower() == "https"):
        return "is not an https:// URL; set it to https://… (http://… if the receiver is on this machine)"
    if settings.get("type") in CLUSTER_TYPES and ("?" in rest or "#" in rest):
        return "is a URL with a # or ?, which cannot be right here; set it to https://HOST/…"
    authority = rest
    for end in "/?#":
        authority = authority.partition(end)[0]
    user, at, place = authority.rpartition("@")
    address, bracket, name_and_port = place.rpartition("]")
    name, colon, port = name_and_port.partition(":")
    host = address + bracket + name
    if not host:
        return "is a URL without a host; set it to https://HOST/…"
    if "%" in value and re.search("%(?![0-9A-Fa-f]{2})", value):
        return "holds a % that begins no escape; write that character as %25"
    if user.strip(USER_CHARACTERS) or not is_host(host) or (colon and not is_port(port)):
        return "is a URL whose host or port cannot be right; set it to https://HOST/… or https://HOST:PORT/…"
    if plain and not is_loopback(host) and not settings.get("allowInsecureHttp"):
        return (
            "is an http:// URL of another machine: alerts and credentials would travel in the clear; set it "
            'to https://…, or accept that with "allowInsecureHttp": true on the sink'
        )
    if at:
        if ":" not in user:
            return "holds a user name without a password; set it to https://USER:PASSWORD@HOST/…"
        if "authTokenEnv" in settings:
            return "holds a user name, and authTokenEnv is set as well: only one can be sent; take one out"
    return None


def is_host(host: str) -> bool:
    """Tell whether the host of a URL is possible: what stands in brackets is an IPv6 address."""
    if not host.startswith("["):
        return not host.strip(HOST_CHARACTERS)
    from ipaddress import IPv6Address

    try:
        IPv6Address(host[1:-1])
    except ValueError:
        return False
    return host.endswith("]") and "%" not in host


def is_port(text: str) -> bool:
    return text.isdecimal() and len(text) <= 5 and 0 < int(text) < 1 << 16


def is_loopback(host: str | None) -> bool:
    """Tell whether the host of a URL is this machine: 127.0.0.0/8, ::1, localhost."""
    name = (host or "").strip("[]").lower()
    first, *others = name.split(".")
    if first == "127" and len(others) == 3:
        return {*others} <= {str(byte) for byte in range(256)}
    return name in ("localhost", "::1", "0:0:0:0:0:0:0:1")


def config_warnings(config: Config) -> list[str]:
    """What is valid in a config but probably not meant, each with its place: such as a route to no sink."""
    routing = config.routing
    enabled = {sink.id for sink in config.sinks.values() if sink.enabled}
    hints = quoted_secrets(config.sinks.values())
    if not enabled:
        return ["$.sinks: no sink is enabled: nothing is sent", *hints]
    warnings: list[str] = []
    led_to: set[str] = set(routing["defaultSinks"])
    if not led_to & enabled:
        why = "no sink of it is enabled: what has no route of its own reaches nobody"
        warnings.append(f"$.routing.defaultSinks: {why}")
    earlier: dict[str, int] = {}
    for index, route in enumerate(routing.get("routes", [])):
        if not route.get("enabled", True):
            continue
        place, category = f"$.routing.routes[{index}]", printable(route["category"])
        if why_never := never_matches(route["category"], earlier):
            warnings.append(f"{place}: never used: {why_never}")
            continue
        earlier[route["category"]] = index
        sinks = set(route.get("sinks") or routing["defaultSinks"])
        led_to |= sinks
        if not sinks & enabled:
            warnings.append(f"{place}: no sink of it is enabled: {category!r} reaches nobody")
    warnings += [
        f"{json_path(['routing', 'categorySeverity', category])}: never used: it takes no pattern, as a "
        "route does; name each category"
        for category in routing.get("categorySeverity", {})
        if category.endswith("*")
    ]
    warnings += [
        f"{json_path(['sinks', sink_id])}: the sink is enabled, and no route leads to it"
        for sink_id in sorted(enabled - led_to)
    ]
    return warnings + hints


def never_matches(category: str, earlier: Mapping[str, int]) -> str | None:
    """Why a route of this category, after the `earlier` ones, can match nothing; None if it can."""
    if category in earlier:
        return f"routes[{earlier[category]}] has the same category {printable(category)!r}"
    if category != category.lstrip() or (category != category.rstrip() and not category.endswith("*")):
        return f"no category begins or ends with a space, as {printable(category)!r} does"
    if "*" in category[:-1]:
        return f"a * counts only at the end, and {printable(category)!r} has one before it"
    if category.endswith("*"):
        for pattern, index in earlier.items():
            if pattern.endswith("*") and category.startswith(pattern[:-1]):
                return f"routes[{index}] is for {printable(pattern)!r} and stands before it"
    return None


# ---------------------------------------------------------------------------------------------------------
# Source: the escalations file as an append-only log, through rotations
# ---------------------------------------------------------------------------------------------------------
# Knows files and bytes, not what a line says, and never writes. A pass opens the source at its cursor and
# reads chunks of complete lines. The queue stores each chunk in one transaction with the cursor after it.

READ_CHUNK = 1 << 17
# A longer line is put on record as too large, and not held in memory.
MAX_RECORD_BYTES = 32 << 20
# One transaction of the queue holds about this many lines, or this many bytes.
CHUNK_LINES = 1000
CHUNK_BYTES = 4 << 20
# How much of its first line names a file, and how much before an offset shows that it is still the same file.
HEAD_BYTES = 4096
TAIL_BYTES = 256
# Seconds. A writer that still has a rotated file open gets this long to finish its last line.
ROTATED_TAIL_GRACE = 10.0
# Seconds. A file system's clock may lag behind ours by this.
COARSE_SECONDS = 1.0
# Seconds. A clock may have been set back by this much: a file that looks too old is still new if its first
# line is not known.
CLOCK_STEP_SECONDS = 3600.0
# How many finished files to remember, so that touching one does not resend it.
FINISHED_MAX = 64
# How many times in a row a pass looks for files that change meanwhile.
FIND_TRIES = 3

# Blank bytes: a crash can leave a hole of NUL bytes in a file.
BLANK = b"\0 \t\r\v\f"
COMPRESSED = (".gz", ".bz2", ".xz")


def short_hash(data: bytes) -> str:
    """Eight bytes of BLAKE2 in hexadecimal: tells contents apart, and hides nothing."""
    return blake2b(data, digest_size=8).hexdigest()


def identity_of(found: os.stat_result) -> tuple[int, int]:
    """Device and inode of a file."""
    return found.st_dev, found.st_ino


class Cursor(NamedTuple):
    """How far the source has been read.

    `number` counts the files of the source, from 1; 0: none has been read yet, and the first `line` lines are
    to be skipped. Hashes of the file's first line (`fingerprint`) and of the bytes before the offset (`tail`)
    find it again under any name. `offset` is in bytes, `line` counts complete lines. `rotated`: the file was
    read to its end under a rotated name, or it is gone. `finished`: fingerprints of earlier files. `seen_at`:
    when a pass looked last, in seconds since the epoch; 0: never.
    """

    number: int = 0
    fingerprint: str = ""
    device: int = 0
    inode: int = 0
    offset: int = 0
    line: int = 0
    tail: str = ""
    rotated: bool = False
    finished: tuple[str, ...] = ()
    seen_at: float = 0.0

    @property
    def segment(self) -> str:
        """The name of the file in rows: its number and its fingerprint."""
        return f"{self.number}-{self.fingerprint}"

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode

    def moved_to(self, identity: tuple[int, int]) -> Self:
        """The same place in another file with the same content."""
        return self._replace(device=identity[0], inode=identity[1])

    def to_json(self) -> JsonObject:
        return self._asdict()

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """Read what `to_json` wrote. Raises one of MALFORMED for anything else."""
        numbers = {key: value[key] for key in ("number", "device", "inode", "offset", "line")}
        for number in numbers.values():
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 63:
                raise ValueError("not a cursor")
        return cls(
            **numbers,
            fingerprint=str(value["fingerprint"]),
            tail=str(value["tail"]),
            rotated=value["rotated"] is True,
            finished=tuple(str(name) for name in value["finished"])[-FINISHED_MAX:],
            seen_at=float(value["seen_at"]),
        )


class Line(NamedTuple):
    """One line of the source.

    `text` has no line feed and no blanks in front, and is cut at about MAX_RECORD_BYTES; `size` is the size
    in bytes before that cut. `offset` to `end` are its bytes in the file, `number` counts lines from 1.
    """

    text: bytes
    size: int
    offset: int
    end: int
    number: int


class Chunk(NamedTuple):
    """Complete lines of one file, and the cursor after them."""

    lines: list[Line]
    cursor: Cursor


class SourceChangedError(OSError):
    """The source was truncated or rotated while it was read: look for the file again."""

    def __init__(self) -> None:
        super().__init__(errno.EBUSY, "it keeps changing")


class LogFile:
    """One file of the source, open for reading: plain, or compressed by a rotation."""

    def __init__(self, path: str) -> None:
        """Raises OSError, also for what is not a regular file."""
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._file)
            folder = stat.S_ISDIR(found.st_mode)
            raise OSError(errno.EISDIR if folder else errno.EINVAL, "not a regular file")
        self.identity = identity_of(found)
        self.written_at = found.st_mtime
        # Where it can be read at any offset. A compressed file needs a copy, made when it is first read.
        self._plain: int | None = None if path.endswith(COMPRESSED) else self._file

    def close(self) -> None:
        for descriptor in {self._file, self._file if self._plain is None else self._plain}:
            os.close(descriptor)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[Any]:
        """A stream of what a compressed file holds. Raises OSError, also for what cannot be unpacked."""
        import bz2
        import gzip
        import lzma

        opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[os.path.splitext(self.path)[1]]
        # Not opened by its name: a rotation may have given that to another file by now.
        os.lseek(self._file, 0, os.SEEK_SET)
        try:
            with open(os.dup(self._file), "rb") as packed, opener(packed, "rb") as stream:
                yield stream
        except Exception as error:
            # gzip, bz2 and lzma raise different errors for a file that is incomplete or damaged.
            raise OSError(errno.EIO, "cannot be unpacked", self.path) from error

    def unpack(self) -> int:
        """The descriptor of what the file holds: of a copy, if it is compressed. Raises OSError."""
        if self._plain is None:
            import shutil
            import tempfile

            with tempfile.TemporaryFile() as copy:
                with self._stream() as stream:
                    shutil.copyfileobj(stream, copy)
                copy.flush()
                self._plain = os.dup(copy.fileno())
        return self._plain

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from an offset on. Raises OSError."""
        return os.pread(self.unpack(), size, offset)

    @property
    def size(self) -> int:
        """Its size in bytes, unpacked. Raises OSError."""
        return os.fstat(self.unpack()).st_size

    def after_hole(self, offset: int) -> int:
        """The end of a hole that begins at an offset; the offset itself if there is none. Raises OSError."""
        descriptor = self.unpack()
        with contextlib.suppress(OSError):  # there is no data after it, or the file system has no holes
            return os.lseek(descriptor, offset, os.SEEK_DATA)
        return offset

    def fingerprint(self) -> str:
        """A hash of its first line that is not blank, which never changes; empty until that line is complete.

        Raises OSError.
        """
        if self._plain is not None:
            return first_line_hash(self.read, self.after_hole)
        with self._stream() as stream:  # which reads only as much of it as is needed

            def read(size: int, offset: int) -> bytes:
                stream.seek(offset)
                data: bytes = stream.read(size)
                return data

            return first_line_hash(read)

    def tail_before(self, offset: int) -> str:
        """A hash of the bytes just before an offset."""
        start = max(0, offset - TAIL_BYTES)
        return short_hash(self.read(offset - start, start))

    def holds(self, cursor: Cursor) -> bool:
        """Tell whether this file holds everything that was read up to a cursor."""
        if cursor.fingerprint:
            same = self.fingerprint() == cursor.fingerprint
        else:
            same = self.identity == cursor.identity
        return same and self.size >= cursor.offset and self.tail_before(cursor.offset) == cursor.tail

    def after(self, line: Line, cursor: Cursor) -> Cursor:
        """A cursor in this file, moved to the end of a line."""
        return cursor._replace(offset=line.end, line=line.number, tail=self.tail_before(line.end))

    def end_of_lines(self) -> int:
        """The offset after the last line feed; 0 if there is none."""
        at = self.size
        while at > 0:
            start = max(0, at - READ_CHUNK)
            found = self.read(at - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            at = start
        return 0


def first_line_hash(
    read: Callable[[int, int], bytes], after_hole: Callable[[int], int] = lambda offset: offset
) -> str:
    """A hash of a file's first line that is not blank, or of its first HEAD_BYTES; empty while the file has
    neither. `read` gives at most `size` bytes from an offset on; `after_hole`: see `LogFile.after_hole`."""
    offset, size = 0, HEAD_BYTES
    while head := read(size, offset):
        if text := head.lstrip(BLANK + b"\n"):
            if begin := offset + len(head) - len(text):
                text = read(HEAD_BYTES, begin)
            first, newline, _ = text.partition(b"\n")
            return short_hash(first) if newline or len(text) == HEAD_BYTES else ""
        offset = after_hole(offset + len(head))
        size = READ_CHUNK
    return ""


def read_lines(read: Callable[[int, int], bytes], start: int, stop: int, before: int) -> Iterator[Line]:
    """Stream the lines of a range; `before`: how many lines there are before it.

    `read` gives at most `size` bytes from an offset on. Bytes after the last line feed of the range count as
    a line. Blank bytes at the start of a line are not kept in memory: a hole can have any size.
    """
    pieces: list[bytes] = []
    size, at, begin = 0, start, start
    while at < stop:
        data = read(min(READ_CHUNK, stop - at), at)
        if not data:
            raise SourceChangedError
        parts = data.split(b"\n")
        last = len(parts) - 1
        for index, part in enumerate(parts):
            text = part if size else part.lstrip(BLANK)
            if text and size < MAX_RECORD_BYTES:
                pieces.append(text)
            size += len(text)
            at += len(part)
            if index < last:
                at += 1
                before += 1
                yield Line(b"".join(pieces), size, begin, at, before)
                pieces, size, begin = [], 0, at
    if begin < stop:
        yield Line(b"".join(pieces), size, begin, stop, before + 1)


def after_line(file: LogFile, number: int, cursor: Cursor | None = None) -> Line | None:
    """The complete line `number` of a file, read from a cursor on; None if the file has fewer. The shell
    dispatcher may have counted a last line without a line feed, which it could not send: then the line before
    that. Raises OSError."""
    begin, before = (cursor.offset, cursor.line) if cursor else (0, 0)
    stop = file.end_of_lines()
    line = None
    for line in read_lines(file.read, begin, stop, before):
        if line.number == number:
            return line
    return line if line and line.number == number - 1 and stop < file.size else None


def moved_on(path: str, cursor: Cursor, number: int) -> Cursor:
    """A cursor after line `number` of the file at `path`, if that can be read, is the cursor's file and has
    that line. Otherwise the same cursor."""
    with contextlib.suppress(OSError), contextlib.closing(LogFile(path)) as file:
        if file.holds(cursor) and (line := after_line(file, number, cursor)):
            return file.after(line, cursor)
    return cursor


class Neighbour(NamedTuple):
    """A file beside the source. `key` orders those that have a rotation's name, and is None for others.
    `size` is in bytes; `written`: when it was last written to, in seconds since the epoch."""

    path: str
    key: tuple[int, str] | None
    identity: tuple[int, int]
    size: int
    written: float


def rotation_key(base: str, name: str) -> tuple[int, str] | None:
    """A key that sorts rotated files, oldest first; None if the name is not a rotation's.

    `base.3` < `base.2` < `base.1`; `base-20260101` < `base-20260102`, in any usual form of a date, which may
    also stand before the extension. Each may be compressed (`.gz`, `.bz2`, `.xz`).
    """
    if name.endswith(COMPRESSED):
        name = os.path.splitext(name)[0]
    stem, extension = os.path.splitext(base)
    if name.startswith(base):
        suffix = name[len(base) :]
    elif name.startswith(stem) and name.endswith(extension):
        suffix = name[len(stem) : -len(extension)]
    else:
        return None
    if match := re.fullmatch(r"\.(\d{1,7})", suffix):
        return (10_000_000 - int(match[1]), "")
    if re.fullmatch(r"[-._]\d{4}([-_.]?)\d{2}\1\d{2}[-_.:T\d]*Z?", suffix):
        return (0, re.sub(r"\d+", lambda number: number[0].zfill(20), suffix))
    return None


def neighbours(*paths: str) -> dict[str, tuple[int, str] | None]:
    """The paths beside these files that begin with their names, or that a rotation has named, each with its
    rotation key: first those without one, then the oldest first. Raises OSError."""
    keys: dict[str, tuple[int, str] | None] = {}
    for path in dict.fromkeys(paths):
        folder, base = os.path.split(path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            for name in os.listdir(folder):
                key = rotation_key(base, name)
                if name != base and (key or name.startswith(base)):
                    keys[os.path.join(folder, name)] = key
    return dict(sorted(keys.items(), key=lambda item: (item[1] or (-1, ""), item[0])))


def unterminated(path: str) -> tuple[int, float]:
    """How many bytes follow the last line feed of a file, and when it was last written to; 0 and 0.0 if it is
    not there. Raises StorageError."""
    try:
        with contextlib.closing(LogFile(path)) as file:
            return file.size - file.end_of_lines(), file.written_at
    except FileNotFoundError:
        return 0, 0.0
    except OSError as error:
        raise storage_error("read", path, error) from None


class Source:
    """The source as a pass finds it: the files that are still to be read, from the cursor on.

    `present`: there is a file at the source's own path. `loss`: what may have been lost before this pass, in
    words, or None. A file is read to where it ended when the pass came to it.
    """

    def __init__(
        self,
        path: str,
        cursor: Cursor,
        last_known: Callable[[str, Iterable[Line]], Line | None] = lambda *_: None,
    ) -> None:
        """`find` looks for the files. `last_known`: see `Loop.last_known`."""
        self.path = path
        self.cursor = cursor
        self._last_known = last_known
        self.present = False
        self.loss: str | None = None
        # Files in the order in which they are read; the last one may be the current file.
        self._files: list[LogFile] = []
        self._current: LogFile | None = None
        # The fingerprint that the current file had before the folder was listed.
        self._began_with = ""
        self._open = contextlib.ExitStack()
        # How many more lines may be read.
        self._left = sys.maxsize

    def close(self) -> None:
        self._open.close()
        self._files, self._current = [], None

    def chunks(self, limit: int = 0) -> Iterator[Chunk]:
        """Read on from the cursor, at most `limit` lines (0: all), and move the cursor with each chunk.

        Raises StorageError.
        """
        self._left = limit or sys.maxsize
        tries = 0
        while True:
            try:
                for chunk in self._read():
                    self.cursor = chunk.cursor
                    self._left -= len(chunk.lines)
                    tries = 0
                    yield chunk
                    if self._left <= 0:
                        return
                return
            except SourceChangedError as error:
                tries += 1
                if tries > FIND_TRIES:
                    raise storage_error("read", self.path, error) from None
                self.close()
                self.find()
            except OSError as error:
                raise storage_error("read", error.filename or self.path, error) from None

    def count_unread(self) -> int:
        """Count the complete lines after the cursor, in rotated files too. Raises StorageError."""
        places = [file.identity for file in self._files]
        first = places.index(self.cursor.identity) if self.cursor.identity in places else 0
        return sum(map(self._count_unread_in, self._files[first:]))

    def count_lines(self) -> int:
        """Count the complete lines of the current file. Raises StorageError."""
        return self.lines_read + (self._count_unread_in(self._current) if self._current else 0)

    def _count_unread_in(self, file: LogFile) -> int:
        try:
            same = bool(self.cursor.fingerprint) and file.holds(self.cursor)
            at, count = self.cursor.offset if same else 0, 0
            stop = file.end_of_lines()
            while at < stop and (data := file.read(min(1 << 20, stop - at), at)):
                count += data.count(b"\n")
                at += len(data)
        except OSError as error:
            raise storage_error("read", file.path, error) from None
        return count

    def read_again(self, first: int, last: int) -> Iterator[Line]:
        """The lines of the current file from `first` to `last`, as far as they were read before.

        Raises StorageError.
        """
        file = self._current
        if file is None or not self.cursor.fingerprint:
            return
        try:
            if file.holds(self.cursor):
                for line in read_lines(file.read, 0, self.cursor.offset, 0):
                    if line.number > last:
                        return
                    if line.number >= first:
                        yield line
        except OSError as error:
            raise storage_error("read", self.path, error) from None

    @property
    def lines_read(self) -> int:
        """How many lines of the current file were read; 0 while the cursor is in an older file."""
        file = self._current
        return self.cursor.line if file is None or file.identity == self.cursor.identity else 0

    def _read(self) -> Iterator[Chunk]:
        begun_at = self.cursor.number
        for file in self._files:
            cursor = self.cursor
            if file is self._current and cursor.number > max(begun_at, 1) and file.holds(cursor):
                # What was just read is a copy of it, made to truncate it (copytruncate): only what follows
                # the cursor is new.
                cursor = cursor.moved_to(file.identity)
            elif cursor.identity != file.identity or not cursor.number:
                fingerprint = file.fingerprint()
                if file is self._current and fingerprint != self._began_with:
                    raise SourceChangedError  # its earlier content is in another file now
                if not fingerprint and (file is self._current or not file.size):
                    continue  # its first line is not complete yet
                cursor = self._enter(file, fingerprint)
            elif not cursor.fingerprint:
                cursor = cursor._replace(fingerprint=file.fingerprint())
            yield from self._read_file(file, cursor)
            if file is not self._current and self.cursor.offset < file.size:
                return  # its writer may still be at its last line: a later pass reads the next file

    def _enter(self, file: LogFile, fingerprint: str) -> Cursor:
        """The cursor at the start of the next file."""
        before = self.cursor
        finished = [*before.finished, before.fingerprint] if before.number else self._history(file)
        return Cursor(
            before.number + 1,
            fingerprint,
            *file.identity,
            tail=short_hash(b""),
            finished=tuple(filter(None, finished))[-FINISHED_MAX:],
            seen_at=before.seen_at,
        )

    def _history(self, first: LogFile) -> list[str]:
        """The fingerprints of the files that were rotated before the first one that is read: they are not
        new, whatever happens to them. Raises OSError."""
        reading = {first.identity, *(file.identity for file in self._files)}
        rotated = (file for file in self._look_around() if file.key)
        earlier = list(itertools.takewhile(lambda file: file.identity not in reading, rotated))
        return [self._fingerprint_of(file) or "" for file in earlier[-FINISHED_MAX:]]

    def _fingerprint_of(self, file: Neighbour) -> str | None:
        """The fingerprint of a neighbour; None if it cannot be read, or is another file by now."""
        with contextlib.suppress(OSError), contextlib.closing(LogFile(file.path)) as opened:
            if opened.identity == file.identity:
                return opened.fingerprint()
        return None

    def _read_file(self, file: LogFile, cursor: Cursor) -> Iterator[Chunk]:
        stop, size_now = file.end_of_lines(), file.size
        rotated = file is not self._current
        if rotated and stop < size_now and abs(time.time() - file.written_at) >= ROTATED_TAIL_GRACE:
            stop = size_now  # its writer is gone: its last line is complete without a line feed
        stop_tail = file.tail_before(stop)
        lines: list[Line] = []
        size = 0
        stream = read_lines(file.read, file.after_hole(cursor.offset), stop, cursor.line)
        while True:
            line = next(stream, None)
            if line is not None:
                lines.append(line)
                size += len(line.text)
            full = len(lines) >= min(CHUNK_LINES, self._left) or size >= CHUNK_BYTES
            if line is None or full:
                # Checked after reading: if the file is whole now, it was whole when these lines were read.
                if file.size < stop or file.tail_before(stop) != stop_tail or not file.holds(cursor):
                    raise SourceChangedError
                if lines:
                    cursor = file.after(lines[-1], cursor)
                    cursor = cursor._replace(rotated=rotated and cursor.offset == size_now)
                    yield Chunk(lines, cursor)
                lines, size = [], 0
            if line is None:
                # A file that was read to its end may have moved since the cursor was written.
                at_end = rotated and cursor.offset == size_now
                place = cursor.moved_to(file.identity)._replace(rotated=at_end)
                if place != self.cursor:
                    yield Chunk([], place)
                return

    def find(self) -> Self:
        """Find the files that are to be read. Raises StorageError: then there are none."""
        before, looked_at = self.cursor, time.time()
        try:
            for attempt in range(FIND_TRIES):
                try:
                    self._locate()
                    break
                except SourceChangedError:
                    self.close()
                    if attempt == FIND_TRIES - 1:
                        raise
            first = next(iter(self._files), None)
            if not self.cursor.number and first is not None and (fingerprint := first.fingerprint()):
                # Then it is found again after a rotation, even if nothing was read of it.
                self.cursor = self._enter(first, fingerprint)
        except OSError as error:
            self.close()
            self.cursor = before
            raise storage_error("read", error.filename or self.path, error) from None
        self.cursor = self.cursor._replace(seen_at=looked_at)
        return self

    def _locate(self) -> None:
        """Find the files to read: the current one, and before it those that were rotated since the last pass.

        Raises OSError, of it SourceChangedError if a rotation is going on.
        """
        loss = self.loss  # of an earlier look in this pass, not yet on record
        self._current = current = self._open_file(self.path)
        self._began_with = current.fingerprint() if current else ""
        self.present = current is not None
        self._files = [current] if current else []
        if self.cursor.line and not self.cursor.number:
            self.cursor = self._after_lines()
        cursor = self.cursor
        if cursor.number:
            if current and current.identity == cursor.identity and current.holds(cursor):
                return
        elif not cursor.seen_at:
            return
        files = self._look_around()
        found = self._find_cursor(files) if cursor.number else None
        if found:
            self.cursor = cursor.moved_to(found.identity)
            if found is current:
                return
            newer, unread = self._rotated_since(found, files)
            older = [found, *newer]
            if not current:
                unread = []
        else:
            older, unread = self._written_since(files)
            if cursor.number and (current or older or unread):
                if not cursor.rotated:
                    truncated = current is not None and current.identity == cursor.identity
                    change = "truncated" if truncated else "replaced" if current else "removed"
                    self.loss = (
                        f"the file that was read to line {cursor.line} is gone ({change}): if anything was "
                        "appended to it after that, it was not read"
                    )
                if not older and current and (line := self._last_that_was_read(current)):
                    # The file lost its end, or is an older copy: only what follows is new.
                    self.cursor = current.after(line, cursor.moved_to(current.identity))
                else:
                    # Its number is used up, and a new file may have its inode.
                    self.cursor = cursor.moved_to((0, 0))._replace(rotated=True)
        if unread and self.loss is None:
            names = ", ".join(printable(os.path.basename(file.path)) for file in unread)
            self.loss = f"the source was rotated, and what {names} may hold of it was not read"
            # So that it is not reported again.
            finished = (*self.cursor.finished, *filter(None, map(self._fingerprint_of, unread)))
            self.cursor = self.cursor._replace(finished=finished[-FINISHED_MAX:])
        self._files = older + self._files

        def rotated(files: Iterable[Neighbour]) -> list[tuple[str, tuple[int, int]]]:
            return [(file.path, file.identity) for file in files if file.key]

        if rotated(self._look_around()) != rotated(files):
            self.loss = loss
            self.cursor = cursor
            raise SourceChangedError

    def _last_that_was_read(self, file: LogFile) -> Line | None:
        """The line up to which a file is the same as the one that was read; None if it is another from the
        start. Raises OSError."""
        cursor = self.cursor
        if not cursor.fingerprint or file.fingerprint() != cursor.fingerprint:
            return None
        end = min(file.end_of_lines(), cursor.offset)
        return self._last_known(cursor.segment, read_lines(file.read, file.after_hole(0), end, 0))

    def _after_lines(self) -> Cursor:
        """The cursor after as many lines as the shell dispatcher has read. It counted lines of a file that
        may have been rotated since: then that is the youngest with so many lines. If there is none, all of
        the current file is new."""
        cursor = self.cursor
        rotated = [file for file in self._look_around() if file.key]
        older = (self._open_file(file.path, file.identity) for file in reversed(rotated))
        for file in (self._current, *older):
            if file is not None and (end := after_line(file, cursor.line)):
                return file.after(end, self._enter(file, file.fingerprint()))
        return Cursor(seen_at=cursor.seen_at) if self._current else cursor

    def _find_cursor(self, files: Sequence[Neighbour]) -> LogFile | None:
        """The file that holds the cursor, under any name: the very file, if it was renamed; else the current
        one, or another with the same content. An unknown name comes last: it may be a copy that somebody
        made, and the rotated file may hold more."""
        cursor = self.cursor
        current = self._current
        renamed = next((file for file in files if file.key and file.identity == cursor.identity), None)
        if renamed and (found := self._open_if_it_holds(renamed)):
            return found
        if current and current.identity != cursor.identity and current.holds(cursor):
            return current
        others = [file for file in reversed(files) if file is not renamed]
        others.sort(key=lambda file: (file.identity != cursor.identity, not file.key))
        return next(filter(None, map(self._open_if_it_holds, others)), None)

    def _open_if_it_holds(self, file: Neighbour) -> LogFile | None:
        opened = self._open_file(file.path, file.identity)
        with contextlib.suppress(OSError):  # a compressed file that is not complete yet
            if opened is not None and opened.holds(self.cursor):
                return opened
        return None

    def _known(self) -> set[str]:
        """The fingerprints of files that were read, or that were there before."""
        return {*self.cursor.finished, self.cursor.fingerprint} - {""}

    def _written_since(self, files: Sequence[Neighbour]) -> tuple[list[LogFile], list[Neighbour]]:
        """What was written since a pass looked, and is not a copy of a file that was read. Asked if the file
        of the cursor cannot be found, or there was none.

        Returns the rotated files, oldest first; and those that may have been part of the source, but cannot
        be read or have no rotation's name.
        """
        known = self._known()
        looked_at = min(self.cursor.seen_at, time.time())  # it is in the future if the clock was ahead
        unseen: list[LogFile] = []
        unread: list[Neighbour] = []
        for file in files:
            clock_step = CLOCK_STEP_SECONDS if file.key else COARSE_SECONDS
            if not file.size or file.written <= looked_at - clock_step:
                continue
            fingerprint = self._fingerprint_of(file)
            if fingerprint in known:
                continue
            opened = self._open_whole(file) if file.key else None
            if opened is not None:
                unseen.append(opened)
            elif file.written > looked_at - COARSE_SECONDS:
                unread.append(file)
        return unseen, unread

    def _rotated_since(
        self, newest: LogFile, files: Sequence[Neighbour]
    ) -> tuple[list[LogFile], list[Neighbour]]:
        """The files that were rotated after `newest`, the file of the cursor, oldest first; and the younger
        neighbours that cannot be read, or that no rotation scheme explains.

        `.1` is newer than `.2`, and a later date is newer. Where numbers go up with time instead, an older
        file has the smaller number: so the time of the last write must agree, unless the clock may have been
        set back and the file is not known.
        """
        last = next(file for file in files if file.identity == newest.identity)
        known = self._known()
        newer: list[LogFile] = []
        unread: list[Neighbour] = []
        for file in files:
            if file is last or not file.size:
                continue
            follows = file.key is not None and last.key is not None and file.key > last.key
            is_numbered = file.key is not None and file.key[0] > 0
            in_order = file.written >= last.written or not is_numbered
            if follows and (
                in_order
                or (
                    file.written >= last.written - CLOCK_STEP_SECONDS
                    and self._fingerprint_of(file) not in known
                )
            ):
                if opened := self._open_whole(file):
                    newer.append(opened)
                else:
                    unread.append(file)
            elif file.path.startswith(f"{last.path}."):  # the same file while it is being compressed
                continue
            elif (
                file.written > last.written or (file.key is None and file.written == last.written)
            ) and self._fingerprint_of(file) not in known:
                unread.append(file)
        return newer, unread

    def _look_around(self) -> list[Neighbour]:
        """The neighbours of the source, and of the file that it links to, oldest first. Each file is listed
        once, also if it is there both plain and compressed. Raises OSError."""
        files: list[Neighbour] = []
        seen = {self._current.identity} if self._current else set()
        keys = neighbours(self.path, os.path.realpath(self.path))
        for path, key in keys.items():
            if path.endswith(COMPRESSED) and os.path.splitext(path)[0] in keys:
                continue
            found = None
            with contextlib.suppress(OSError):
                found = os.stat(path)
            if found is None or not stat.S_ISREG(found.st_mode) or identity_of(found) in seen:
                continue
            seen.add(identity_of(found))
            files.append(Neighbour(path, key, identity_of(found), found.st_size, found.st_mtime))
        return files

    def _open_whole(self, file: Neighbour) -> LogFile | None:
        """Open a rotated file and unpack it; None if that fails. Raises OSError if it may only be incomplete
        yet."""
        opened = self._open_file(file.path, file.identity)
        if opened is None:
            return None
        try:
            opened.unpack()
            return opened
        except OSError:
            if time.time() - file.written < ROTATED_TAIL_GRACE:
                raise
            return None

    def _open_file(self, path: str, identity: tuple[int, int] | None = None) -> LogFile | None:
        """Open a file of the source; None if it is not there, cannot be read, or is another file by now."""
        try:
            file = LogFile(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if path == self.path or error.errno in (errno.EMFILE, errno.ENFILE):  # too many open files
                raise
            return None
        self._open.callback(file.close)
        return file if identity in (None, file.identity) else None


# ---------------------------------------------------------------------------------------------------------
# Escalation and route: what a line says, and where it goes
# ---------------------------------------------------------------------------------------------------------
# Knows records and routes, neither files nor the queue. Never changes a record.

# How much is kept of a line that is no escalation.
RAW_LINE_CHARACTERS = 10_000


class Escalation(NamedTuple):
    """One record. `severity` is normalised; if the record's own word is not known, that is
    `unknown_severity`.

    `raw` has the record's own bytes, from which its id is made; `strict`: a strict JSON reader reads `body`
    from them. `raw_line` is the text of the line if it was salvaged from one that held more than this record.
    """

    id: str
    category: str
    loop_id: str
    trace_id: str | None
    timestamp: str | None
    severity: str | None
    unknown_severity: str | None
    body: JsonObject
    raw: bytes = b""
    strict: bool = False
    raw_line: str | None = None

    @property
    def written_at(self) -> str | None:
        """The timestamp, if it is a time."""
        return self.timestamp if parse_time(self.timestamp) is not None else None


# Why a line is no escalation. (Nothing is wrong with a blank one.)
UNUSABLE_CODES = {"invalid_escalation_json", "missing_escalation_category", "escalation_too_large"}


class Unusable(NamedTuple):
    """A line that is no escalation, and why. `body`: the record, if it only lacks a category."""

    id: str
    reason_code: str
    raw_line: str
    body: JsonObject | None
    message: str | None = None

    @classmethod
    def from_line(cls, line: bytes, loop_id: str, reason_code: str, message: str | None = None) -> Self:
        return cls(escalation_id(loop_id, line), reason_code, text_of(line), None, message)


def escalation_id(loop_id: str, line: bytes) -> str:
    """The idempotency key. It is made of nothing but the loop and the record's bytes: the same on every
    try."""
    from hashlib import sha256

    return "esc_" + sha256(loop_id.encode("utf-8", "surrogateescape") + b"\0" + line).hexdigest()[:32]


def text_of(line: bytes) -> str:
    """What is kept of a line as text."""
    return cut(line.decode("utf-8", "replace"), RAW_LINE_CHARACTERS)


def parse_line(line: bytes, size: int, loop_id: str) -> list[Escalation | Unusable]:
    """Read one line of the source: its escalation, or what can be salvaged of it, or why there is none.

    `line` is cut at MAX_RECORD_BYTES, `size` is its true size. The list is never empty. Around the record, a
    byte order mark, NUL bytes (holes that a crash leaves) and blanks are ignored. Bytes that are not UTF-8
    become U+FFFD. No field but the category can make a record unusable. A line with debris gives all complete
    objects on it that have a category.
    """
    line = line.removeprefix(BYTE_ORDER_MARK).strip(BLANK + b"\n")
    if not line:
        return [Unusable.from_line(line, loop_id, "blank_line")]
    if size > MAX_RECORD_BYTES:
        return [Unusable.from_line(line, loop_id, "escalation_too_large")]
    try:
        return [parse_record(line, loop_id)]
    except TooDeepError as error:
        return [Unusable.from_line(line, loop_id, "invalid_escalation_json", str(error))]
    except json.JSONDecodeError as error:
        why = f"not JSON at column {error.colno}: {error.msg}"
    except ValueError as error:
        why = str(error)
    return salvage(line, loop_id) or [Unusable.from_line(line, loop_id, "invalid_escalation_json", why)]


def parse_record(line: bytes, loop_id: str) -> Escalation | Unusable:
    """Read bytes that are one JSON object. Raises ValueError if they are not; TooDeepError is one."""
    utf8 = True
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text, utf8 = line.decode("utf-8", "replace"), False
    body, strict = decode_record(text)
    if not isinstance(body, dict):
        raise ValueError("not an object")
    category = as_text(body.get("category"))
    if category is None:
        return Unusable.from_line(line, loop_id, "missing_escalation_category")._replace(body=body)
    severity = normalise_severity(body.get("severity"))
    return Escalation(
        id=escalation_id(loop_id, line),
        category=category,
        loop_id=as_text(body.get("loopId")) or loop_id,
        trace_id=as_text(body.get("traceId")),
        timestamp=as_text(body.get("timestamp")),
        severity=severity,
        unknown_severity=as_text(body.get("severity")) if severity is None else None,
        body=body,
        raw=line,
        strict=strict and utf8 and not has_lone_surrogate(line, body),
    )


def has_lone_surrogate(line: bytes, body: JsonObject) -> bool:
    """Tell whether a record escapes half a surrogate pair, which no strict reader accepts."""
    if b"\\ud" not in line and b"\\uD" not in line:
        return False
    try:
        JSON_ENCODER.encode(body).encode()
    except ValueError:
        return True
    return False


# Where an object with a key may begin.
OBJECT_START = r'\{[ \t\r]*"'
# How many bytes may be read in vain on one line before the rest is given up: about a second's work. To look
# at an object costs as much as to read SALVAGE_COST bytes, even if it is short.
SALVAGE_WASTE = 4 * MAX_RECORD_BYTES
SALVAGE_COST = 1000
SALVAGE_MAX = 10_000
# It only finds the ends of objects: no number is converted.
OBJECT_DECODER = json.JSONDecoder(parse_constant=str, parse_int=str, parse_float=str)


def salvage(line: bytes, loop_id: str) -> list[Escalation | Unusable]:
    """Find the complete objects with a category on a line that is not one object. Objects within others do
    not count.

    If an object beside them is incomplete, the last item is the line, unusable; if there are too many objects
    or too much debris, it is the rest of the line.
    """
    raw_line = text_of(line)
    found: list[Escalation | Unusable] = []
    text = line.decode("latin-1")  # a character for each byte
    pattern = re.compile(OBJECT_START)
    wasted, at = 0, 0
    is_torn = False
    while match := pattern.search(text, at):
        start = match.start()
        if len(found) == SALVAGE_MAX or wasted > SALVAGE_WASTE:
            why = "too much debris or too many records on one line"
            rest = Unusable.from_line(line[start:], loop_id, "invalid_escalation_json", why)
            return [*found, rest] if found else []
        wasted += SALVAGE_COST
        try:
            value, at = OBJECT_DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # It has read up to `pos`; if that is the quote of a string without an end, all of it.
            wasted += len(text) if text[error.pos : error.pos + 1] == '"' else error.pos
            at = start + 1
            is_torn = True
        except RecursionError:
            wasted += len(text)
            at = start + 1
        else:
            if value.get("category") is None:
                continue
            try:
                record = parse_record(line[start:at], loop_id)
            except TooDeepError as error:
                why = str(error)
                found.append(Unusable.from_line(line[start:at], loop_id, "invalid_escalation_json", why))
                continue
            if isinstance(record, Escalation):
                found.append(record._replace(raw_line=raw_line))
                wasted -= SALVAGE_COST
    if found and is_torn:
        why = "a record beside others on its line is incomplete"
        found.append(Unusable.from_line(line, loop_id, "invalid_escalation_json", why))
    return found


def encode_with_record(head: JsonObject, escalation: Escalation) -> bytes:
    """Encode an object with the fields of `head` and, last, the record as `escalation`, in its own bytes:
    numbers keep their digits, keys their order and their repeats.

    A record that is not strict JSON (NaN, bytes that are not UTF-8, half a surrogate pair, an integer of
    thousands of digits) is encoded from what was read of it.
    """
    record = one_line(escalation.raw) if escalation.strict else encode_json(escalation.body)
    return encode_json(head)[:-1] + (b"," if head else b"") + b'"escalation":' + record + b"}"


# A line that explains a record has at most this many characters.
SHOWN_LINE = 500
# How many items of a list, and how many fields, are looked at: no message has room for more, and a record of
# 32 MB may have millions, which would hold a pass for longer than a request may take.
SHOWN_ITEMS = 1000


def shown_list(values: object) -> list[str]:
    """The first SHOWN_ITEMS items of a list as they are shown; empty if it is no list."""
    listed = values[:SHOWN_ITEMS] if isinstance(values, list) else []
    return [text for value in listed if (text := shown(value))]


def reason_codes(escalation: Escalation) -> list[str]:
    """The reason codes of a record as they are shown, of a list the first SHOWN_ITEMS; each of the host's
    writers has other fields for them."""
    body = escalation.body
    found = [
        *shown_list(body.get("reasonCodes")),
        shown(body.get("reasonCode")),
        shown(body.get("failureCode")),
    ]
    return list(dict.fromkeys(code for code in found if code and code != escalation.category))


# Fields that `explain` reads by name, and fields that every record has. It shows what is left of the former,
# and names of files (`…File`), only if there is nothing else.
READ_FIELDS = {
    *("reasonCodes", "reasonCode", "reasons", "divergenceFlags", "state", "sequence", "drift", "cursor"),
    *("ingestStatus", "healthStatus", "failureCode"),
}
COMMON_FIELDS = {"timestamp", "loopId", "traceId", "category", "transport", "severity"}
KNOWN_FIELDS = COMMON_FIELDS | READ_FIELDS


def details_of(escalation: Escalation) -> list[str]:
    """Say in short lines what a person needs to know of a record, worst news first; at least one line.

    Reads what the host's categories have: reasons with observed and threshold, divergence flags, sequence
    violations, drift advice. All other fields follow, so that an unknown category says something, too.
    Of the reasons and of the fields, the first SHOWN_ITEMS are read: see `left_out`.
    """
    body = escalation.body
    reasons = body.get("reasons")
    reasons = reasons[:SHOWN_ITEMS] if isinstance(reasons, list) else []
    sequence, drift = mapping(body.get("sequence")), mapping(body.get("drift"))
    violations = shown_list(sequence.get("violations"))
    codes = {shown(reason.get("code") if isinstance(reason, dict) else reason) for reason in reasons}
    said = {*codes, *violations, shown(body.get("failureCode"))}
    others = (field for field in body.items() if field[0] not in COMMON_FIELDS)
    news = (field for field in body.items() if is_news(field[0]))
    lines = [
        *map(explain_reason, reasons),
        *explain_divergence(body),
        *([f"violations: {', '.join(violations)}"] if violations else []),
        *explain_regression(sequence),
        *explain_drift(drift),
    ]
    if more := [code for code in reason_codes(escalation) if code not in said]:
        lines.append(f"reasons: {', '.join(more)}")
    labels = (("healthStatus", "health"), ("ingestStatus", "ingest"), ("failureCode", "failure"))
    if status := [f"{label} {text}" for key, label in labels if (text := shown(body.get(key)))]:
        lines.append(", ".join(status))
    lines += itertools.islice(show_fields(news), SHOWN_ITEMS)
    lines = lines or [*itertools.islice(show_fields(others), SHOWN_ITEMS)] or ["no details in the record"]
    return [cut(line, SHOWN_LINE) for line in lines]


def is_news(key: str) -> bool:
    """Tell whether `details_of` shows a field in any case: see READ_FIELDS."""
    return key not in KNOWN_FIELDS and not key.endswith("File")


def left_out(escalation: Escalation) -> int:
    """How many reasons and fields of a record `details_of` does not read."""
    body = escalation.body
    reasons = body.get("reasons")
    counts = [len(reasons) if isinstance(reasons, list) else 0]
    if len(body) > SHOWN_ITEMS:
        counts.append(sum(map(is_news, body)))
    return sum(max(0, count - SHOWN_ITEMS) for count in counts)


def explain_divergence(body: JsonObject) -> Iterator[str]:
    """`divergence: cursorMoved`, `state: running → blocked on timeout`."""
    flags = mapping(body.get("divergenceFlags"))
    names = (shown(name) or "?" for name, value in flags.items() if value is True)
    if raised := [*itertools.islice(names, SHOWN_ITEMS)]:
        yield f"divergence: {', '.join(raised)}"
    transition = mapping(mapping(body.get("state")).get("transition"))
    if current := shown(transition.get("currentState")):
        before, cause = shown(transition.get("previousState")), shown(transition.get("triggeringSignal"))
        yield f"state: {before or '?'} → {current}" + (f" on {cause}" if cause else "")


def explain_regression(sequence: JsonObject) -> Iterator[str]:
    """`events went back: 12 → 9`."""
    for part, before_key, now_key in (
        ("snapshot", "previous", "current"),
        ("events", "previousLast", "last"),
    ):
        numbers = mapping(sequence.get(part))
        if numbers.get("regressed") is True:
            before, now = shown(numbers.get(before_key)), shown(numbers.get(now_key))
            yield f"{part} went back: {before or '?'} → {now or '?'}"


def explain_drift(drift: JsonObject) -> Iterator[str]:
    """`profile: fast applied, safe recommended (high confidence)`, and why."""
    if applied := shown(drift.get("appliedProfile")):
        advice = f"profile: {applied} applied, {shown(drift.get('recommendedProfile')) or '?'} recommended"
        confidence = shown(drift.get("recommendationConfidence"))
        yield advice + (f" ({confidence} confidence)" if confidence else "")
    yield from show_fields((key, drift.get(key)) for key in ("rationale", "action"))


def show_fields(fields: Iterable[tuple[str, object]]) -> Iterator[str]:
    """`freePercent: 3`: a line for each field that is not empty."""
    return (f"{shown(key) or '?'}: {text}" for key, value in fields if (text := shown(value)))


def explain_reason(reason: object) -> str:
    """`ingest_stale: ingestLagSeconds is 1200, threshold 900 (critical)`; an odd one as it stands."""
    keys = ("code", "metric", "observed", "threshold", "severity")
    known = {key: shown(mapping(reason).get(key), SHOWN_CHARACTERS // 2) for key in keys}
    if not any(known.values()):
        return shown(reason) or "?"
    metric, observed, threshold = known["metric"], known["observed"], known["threshold"]
    measured = f"{metric or 'observed'} is {observed}" if observed else metric
    return (
        (known["code"] or "reason")
        + (f": {measured}" if measured else "")
        + (f", threshold {threshold}" if threshold else "")
        + (f" ({known['severity']})" if known["severity"] else "")
    )


class Resolution(NamedTuple):
    """Where records of one category and severity go, and why."""

    category: str
    event_severity: str
    mapped_severity: str | None
    min_severity: str
    should_dispatch: bool
    route: JsonObject
    # The route's sinks; those of them whose minimum the severity reaches; and those of these that are
    # enabled.
    selected: tuple[Sink, ...]
    reached: tuple[Sink, ...]
    dispatchable: tuple[Sink, ...]

    @property
    def severity(self) -> int:
        """The event's severity, as an index into SEVERITIES."""
        return SEVERITIES.index(self.event_severity)


class Delivery(NamedTuple):
    """One escalation for one sink, as an adapter needs it. `repeats`: how many were held back before it;
    `repeats_since`: when the first of these was written."""

    escalation: Escalation
    resolution: Resolution
    repeats: int = 0
    repeats_since: str = ""


class Router:
    """Resolves records to sinks by the rules of the config. The same question always has the same answer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # Anybody can write new categories: the number of answers that are remembered is limited.
        self.resolve = functools.lru_cache(maxsize=1024)(self._resolve)

    def _resolve(self, category: str, severity: str | None) -> Resolution:
        """Resolve a category and the record's own severity (None: it has none that is known)."""
        routing = self.config.routing
        match = find_route(routing.get("routes", []), category)
        chosen = match or {}
        sink_ids = list(dict.fromkeys(chosen.get("sinks") or routing["defaultSinks"]))
        minimum = chosen.get("minSeverity", self.config.default_min_severity)
        mapped = routing.get("categorySeverity", {}).get(category)
        event = severity or mapped or minimum
        selected = tuple(self.config.sinks[sink_id] for sink_id in sink_ids)
        rank = SEVERITIES.index
        should_dispatch = rank(event) >= rank(minimum)
        reached = tuple(
            sink for sink in selected if should_dispatch and rank(event) >= rank(sink.min_severity or minimum)
        )
        return Resolution(
            category=category,
            event_severity=event,
            mapped_severity=mapped,
            min_severity=minimum,
            should_dispatch=should_dispatch,
            route={
                "matched": match is not None,
                "category": category,
                "sinks": sink_ids,
                "minSeverity": minimum,
                "enabled": True,
                **({"pattern": match["category"]} if match and match["category"] != category else {}),
            },
            selected=selected,
            reached=reached,
            dispatchable=tuple(sink for sink in reached if sink.enabled),
        )


def find_route(routes: Sequence[JsonObject], category: str) -> JsonObject | None:
    """The first enabled route that names a category, else the first whose pattern (`health_*`) matches it."""
    enabled = [route for route in routes if route.get("enabled", True)]
    exact = (route for route in enabled if route["category"] == category)
    matching = (
        route
        for route in enabled
        if route["category"].endswith("*") and category.startswith(route["category"][:-1])
    )
    return next(itertools.chain(exact, matching), None)


# ---------------------------------------------------------------------------------------------------------
# Codes: what a fault or a reason means, and what to do about it
# ---------------------------------------------------------------------------------------------------------
# One table, from which `status`, `test` and `explain` take their words. Codes decide; words are never parsed.

Outcome = Literal["delivered", "retry", "misconfigured", "dead_letter", "skipped"]

FaultCode = Literal[
    "missing_secret",
    "unusable_url",
    "ca_file",
    "dns",
    "refused",
    "unreachable",
    "connect_timeout",
    "tls_certificate",
    "tls",
    "wrong_scheme",
    "proxy",
    "proxy_login",
    "timeout",
    "hung_up",
    "not_http",
    "redirect",
    "unauthorized",
    "not_found",
    "channel",
    "wrong_receiver",
    "rejected",
    "rate_limited",
    "server_error",
    "record_refused",
    "wrong_clock",
    "adapter_fault",
]


class Code(NamedTuple):
    """What a fault code or a reason code means, how to see it, and how to fix it. Names in braces stand for
    words that `words_of` fills in."""

    meaning: str
    look: str
    fix: str


# First the fault codes, which say why an attempt failed, then the reason codes of rows.
CODES: dict[str, Code] = {
    "missing_secret": Code(
        "A variable that the sink needs is unset or empty.",
        "`ops-alert-dispatch config` lists the variables and whether they are set.",
        "set {unset} in the environment that reconcile runs in",
    ),
    "unusable_url": Code(
        "No request can be made: the sink's URL, or that of the proxy, is not a usable URL.",
        "Compare the value of {url}, and of http_proxy and https_proxy, with what the provider gave you.",
        "set a whole URL in {url}; if the environment names a proxy, check its URL, too",
    ),
    "ca_file": Code(
        "The file of CA certificates is missing, or holds no certificates.",
        "`openssl x509 -in FILE -noout -subject` shows the first certificate of the file that is named.",
        "put the CA certificates, in PEM, at the path that is named, or name another file with caFileEnv",
    ),
    "dns": Code(
        "The sink's host name does not lead to an address.",
        "`getent hosts NAME` asks the same resolver.",
        "check the host name in {url}, and this machine's DNS",
    ),
    "refused": Code(
        "The sink's machine is there, and nothing listens on that port.",
        "`curl -v URL` says the same from this machine.",
        "check that the sink is up and reachable from here, and the port in {url}",
    ),
    "unreachable": Code(
        "There is no way to the sink's address from this machine.",
        "`curl -v URL` says the same from this machine.",
        "check that the sink is up and reachable from here (firewall, routes, proxy)",
    ),
    "connect_timeout": Code(
        "Nobody answered at the sink's address: a firewall drops the packets, or the machine is down.",
        "`curl -v --connect-timeout 5 URL` hangs in the same place.",
        "check that the sink is up and reachable from here (firewall, DNS, proxy)",
    ),
    "tls_certificate": Code(
        "The sink's certificate is not valid, or nobody whom this machine trusts has signed it.",
        "`openssl s_client -connect HOST:PORT` shows it and says what is wrong with it.",
        "check the sink's certificate; if a private CA signed it, name the CA's file with caFileEnv",
    ),
    "tls": Code(
        "The sink and this machine do not agree on TLS, or the sink hung up while they tried.",
        "`openssl s_client -connect HOST:PORT` fails in the same place.",
        "check that the port in {url} speaks TLS; if it speaks plain HTTP, "
        "write http:// in place of https://",
    ),
    "wrong_scheme": Code(
        "The URL says https:// and the port speaks plain HTTP, or the other way round.",
        "`curl -v` with the other scheme gets an answer.",
        "the scheme in {url} is not what the port speaks: write http:// in place of https://, or the reverse",
    ),
    "proxy": Code(
        "The proxy that the environment names gave no connection.",
        "`curl -v URL` uses the same proxy from this machine.",
        "check the proxy that the environment names, or name the sink's host in no_proxy",
    ),
    "proxy_login": Code(
        "The proxy wants a user name and a password, or does not accept the ones it got.",
        "`curl -v URL` shows the proxy's answer 407.",
        "the proxy wants a user name and a password: set them in its URL in the environment",
    ),
    "timeout": Code(
        "The request was sent, and no answer came in time. The sink may have acted on it.",
        "Run `{test}` and compare its duration with timeoutSeconds.",
        "check that the sink is up; if it is only slow, raise its timeoutSeconds",
    ),
    "hung_up": Code(
        "The sink closed the connection before it answered. It may have acted on the request.",
        "The sink's own log, or that of a load balancer before it, says why.",
        "check that the sink is up, and the log of the sink or of what stands before it",
    ),
    "not_http": Code(
        "What listens on that port answered with something that is not HTTP.",
        "`curl -v URL` shows what it says.",
        "check the host and the port in {url}; if the port speaks TLS, write https://",
    ),
    "redirect": Code(
        "The sink answered with a redirect, which is never followed: an alert goes only where you said.",
        "`curl -v URL` shows the Location.",
        "set the URL that the redirect leads to in {url}",
    ),
    "unauthorized": Code(
        "The sink does not accept the credential.",
        "Run `{test}`: it sends one test alert with the same credential.",
        "the credential is wrong or was revoked: make a new one, set it in {credential}, and run `{test}`",
    ),
    "not_found": Code(
        "Nothing takes alerts at this URL: it is wrong, was deleted, or is disabled.",
        "Run `{test}`: it sends one test alert to the same URL.",
        "the URL is wrong or was deleted: make a new one, set it in {url}, and run `{test}`",
    ),
    "channel": Code(
        "Slack does not let this webhook post to its channel: it is archived, gone or restricted.",
        "Open the channel in Slack, and the webhook's settings.",
        "unarchive the channel, or set a webhook of another one in {url}, then run `{test}`",
    ),
    "wrong_receiver": Code(
        "What answered is not a sink of this type: a login page, a proxy, another program.",
        "Open the URL in a browser, or look at the answer that `{show}` has.",
        "check {url}: host, path, https:// if the port speaks TLS, and what stands before the sink",
    ),
    "rejected": Code(
        "The sink takes no request that is set up like this one.",
        "Run `{show}`: its answer is with the attempt.",
        "read the sink's answer, and correct {url} or the headers and settings of {sink}, then run `{test}`",
    ),
    "rate_limited": Code(
        "The sink gets more requests than it allows. What waits is sent later.",
        "Retry-After in its answer says when it takes the next one.",
        "the sink limits the rate: wait; if this lasts, set or lower maxPerMinute of {sink}",
    ),
    "server_error": Code(
        "The sink has trouble. What waits is sent later.",
        "The provider's status page, or the sink's own log.",
        "the sink has trouble: wait, or repair it if it is yours",
    ),
    "record_refused": Code(
        "The sink does not take this one record. It became a dead letter; others are sent.",
        "Run `{show}`: it has the record and the sink's answer.",
        "read the sink's answer and correct what it complains about; then `{redeliver_dead}` sends what it "
        "refused, and `{skip_dead}` dismisses it",
    ),
    "wrong_clock": Code(
        "The sink took the alert, but its clock is more than a minute off, so that the alert may have ended "
        "there at once. It is sent again, once, with an end by the sink's clock: to the sink it is the same "
        "alert.",
        "Run `{status}`: it says by how much the clock is off.",
        "set the clock of the sink, or of this machine: `date -u` shows it",
    ),
    "adapter_fault": Code(
        "The program itself failed while it wrote a request for this sink, or judged an answer.",
        "The message of the attempt names the kind of error, the function and the line.",
        "report it with that message and the version; other deliveries are not affected",
    ),
    "request_failed": Code(
        "There was no usable answer: no connection, DNS, TLS, or a timeout.",
        "Run `{show}`: each attempt has its fault code, which `ops-alert-dispatch explain CODE` explains.",
        "follow the advice of `{status}`; what waits goes out by itself once the sink answers",
    ),
    "http_error": Code(
        "The sink answered, and its answer was no success.",
        "Run `{show}`: each attempt has the answer, and its fault code, which `ops-alert-dispatch explain "
        "CODE` explains.",
        "follow the advice of `{status}`, then run `{test}`",
    ),
    "config_invalid": Code(
        "The config is invalid or a secret is unset: nothing was ingested, nothing was sent.",
        "Run `{config}`: it names each fault and its place.",
        "fix what `{config}` names; the next pass sends everything",
    ),
    "alert_dispatch_failed": Code(
        "The pass ended with an error, which is in the message of the state file, or of reconcile's row.",
        "Run `{dispatch}`: it shows the error again.",
        "do what the error says; the next pass goes on where the last one stopped",
    ),
    "payload_failed": Code(
        "No request could be made of this record for this sink. It became a dead letter.",
        "Run `{show}`: the message names the error, the function and the line.",
        "report it with that message and the version; other deliveries are not affected",
    ),
    "delivery_deferred": Code(
        "The delivery waited: for its turn, or behind others because its sink was failing.",
        "Run `{status}`: it says what the sink waits for.",
        "nothing to do if it only waits for its turn; else follow the advice of `{status}`",
    ),
    "delivery_expired": Code(
        "A dead letter: it waited for longer than giveUpAfterSeconds.",
        "Run `{show}`: it has the attempts that failed.",
        "fix the sink first, and check it with `{test}`; then `{redeliver_dead}` sends it",
    ),
    "partial_dispatch_failure": Code(
        "Some of the sinks of this escalation have it, and others failed.",
        "Run `{show}`: it lists each delivery.",
        "follow the advice of `{status}` for the sinks that failed",
    ),
    "dispatch_failed": Code(
        "No sink of this escalation has it: all of them failed.",
        "Run `{show}`: it lists each delivery.",
        "follow the advice of `{status}` for the sinks that failed",
    ),
    "severity_below_min": Code(
        "The severity is below the minimum of the route, or of each of its sinks. Nothing was sent.",
        "Run `{route}`: it shows the minimum.",
        "nothing to do if that is meant; else lower minSeverity of the route or of the sink",
    ),
    "no_dispatchable_sinks": Code(
        "The route has no enabled sink: the escalation reached nobody.",
        "Run `{route}`: it shows the sinks and which are enabled.",
        "enable a sink of the route and run `{test}`; `{skipped}` lists what was missed, and "
        "`{redeliver_one}` sends it. Then acknowledge this with `{ack}`. If nobody needs to know, raise "
        "minSeverity of the route",
    ),
    "skipped_by_operator": Code(
        "An operator skipped the delivery, or dismissed the dead letter, with `skip`.",
        "Run `{show}`.",
        "nothing to do if that was meant; else `{redeliver_one}` sends it after all",
    ),
    "repeat_suppressed": Code(
        "The sink was sent the same within routing.repeat.windowSeconds.",
        "Run `{show}`: the message says of when that one was.",
        "nothing to do: the next one that is sent says how many were held back",
    ),
    "peer_missed": Code(
        "Another peer of the cluster has it, and it is too old for this one to catch up.",
        "Run `{show}`: it lists the delivery to each peer.",
        "nothing to do: the alert was sent by the other peer",
    ),
    "sink_removed": Code(
        "A sink was removed from the config while deliveries waited for it.",
        "Run `{log}`: the row says how many there were.",
        "if that was not meant, put the sink back under its id; `{skipped}` lists what it missed, and "
        "`{redeliver_one}` sends it. Then, or if it was meant, acknowledge this with `{ack}`",
    ),
    "route_changed": Code(
        "The config has changed: deliveries that waited now go to the sinks that their route names.",
        "Run `{route}`: it shows where such an escalation goes now.",
        "nothing to do if that was meant; else change the route back. `{skipped}` lists what was dropped, "
        "and `{redeliver_one}` sends it",
    ),
    "source_replaced": Code(
        "The source was replaced, perhaps before all of it was read.",
        "Compare the source with what `{log}` shows.",
        "append what is missing to the source; keep a few rotations, with delaycompress; then acknowledge "
        "this with `{ack}`",
    ),
    "queue_lost": Code(
        "The queue was deleted or damaged while deliveries waited in it, or dead letters were kept.",
        "A damaged queue is kept beside the new one, as alert-queue.db.damaged-….",
        "run the commands that its row names (`{log}` shows it), then acknowledge this with `{ack}`",
    ),
    "invalid_escalation_json": Code(
        "The line is not a JSON object. It is on record as rawLine, and nothing was sent.",
        "Run `{failed}`: it lists such lines.",
        "correct the program that writes them, append what is worth it to the source, then acknowledge this "
        "with `{ack}`",
    ),
    "missing_escalation_category": Code(
        "The record has no category, so it has no route. Nothing was sent.",
        "Run `{failed}`: it lists such lines.",
        "correct the program that writes them, append what is worth it to the source, then acknowledge this "
        "with `{ack}`",
    ),
    "escalation_too_large": Code(
        "The line is longer than 32 MiB. Nothing was sent.",
        "Run `{failed}`: it lists such lines.",
        "correct the program that writes them, append a shorter record to the source, then acknowledge this "
        "with `{ack}`",
    ),
    "blank_line": Code(
        "The line is blank.",
        "Run `{log}`.",
        "nothing to do",
    ),
}

# The commands that the texts name: the words of each, before and after the options for a repo and a loop.
COMMANDS: dict[str, tuple[str, ...]] = {
    "ack": ("status", "--ack"),
    "dispatch": ("dispatch",),
    "failed": ("log", "--status", "failed"),
    "log": ("log",),
    "redeliver_dead": ("redeliver", "--dead-letters"),
    "redeliver_one": ("redeliver", "--id", "ID"),
    "skip_dead": ("skip", "--dead-letters"),
    "skipped": ("log", "--status", "skipped"),
    "show": ("show", "ID"),
    "status": ("status",),
}
# The words for the names in braces if no repo, loop or sink is known.
GENERAL_WORDS = {
    **{name: " ".join([PROGRAM, words[0], "--loop L", *words[1:]]) for name, words in COMMANDS.items()},
    "url": "the variable of its URL",
    "credential": "its variable",
    "unset": "what the message names",
    "sink": "the sink",
    "config": f"{PROGRAM} config",
    "route": f"{PROGRAM} config --category NAME",
    "show": f"{PROGRAM} show ID",
    "status": f"{PROGRAM} status",
    "test": f"{PROGRAM} test --sink ID",
}


def words_of(text: str, names: Mapping[str, str] | None = None) -> str:
    """A text of CODES with the names in braces filled in."""
    return text.format_map({**GENERAL_WORDS, **(names or {})})


def why_it_failed(failure: Mapping[str, Any]) -> str:
    """`http_error 503: upstream is down`, as far as that is known."""
    status, message = failure.get("httpStatus"), failure.get("message")
    answer = f" {status}" if status is not None else ""
    return f"{failure.get('reasonCode') or 'failed'}{answer}" + (f": {message}" if message else "")


class Verdict(NamedTuple):
    """What came of a delivery: what an answer, or no answer, means.

    Outcomes: `retry`, the sink is unwell; `misconfigured`, it will not recover by itself; `dead_letter`, it
    does not accept this record. `not_taken`: the sink said that it did not act on the request, or never had
    it, so that a quick new try repeats nothing. `retry_after` is in seconds. `fault`: why it failed; None if
    it did not. `clock_offset`: by how many seconds the sink's clock is ahead of ours, if negative behind;
    None if it did not say.
    """

    outcome: Outcome
    reason_code: str | None = None
    http_status: int | None = None
    message: str | None = None
    retry_after: float | None = None
    not_taken: bool = False
    fault: FaultCode | None = None
    clock_offset: float | None = None


# ---------------------------------------------------------------------------------------------------------
# Queue: the SQLite database in which escalations wait
# ---------------------------------------------------------------------------------------------------------
# Knows tables and transactions, but not HTTP, and not what a failure means. One queue serves all loops of a
# repo, and several passes at once. Everything that the program must not forget is here. All other files that
# it writes are output.

QUEUE_VERSION = 1
# After this many attempts the fault may be in the record: other records go first.
SAME_RECORD_ATTEMPTS = 5
# What an attempt makes of its delivery. After any other outcome it still waits.
STATUS_OF_OUTCOME = {"delivered": "delivered", "dead_letter": "dead", "skipped": "skipped"}
# How long `status` reports a loss, in seconds: long enough for the person on duty to see it.
LOSS_SHOWN = 86400.0
# How long a settled escalation is kept for `redeliver`, in seconds, and how many of them at most.
RETENTION_SECONDS = 7 * 86400.0
RETENTION_COUNT = 100_000
# For how long an answer shows that a destination is well, in seconds.
FRESH_SECONDS = 1.0
# Longer than any transaction that is not stuck.
QUEUE_WAIT_SECONDS = 30.0
# For how long a reader waits for the transaction of another process; then it reads beside it.
QUEUE_READ_WAIT_SECONDS = 5.0
# The write-ahead log is copied into the database when it is larger than this.
WAL_BYTES = 16 << 20
# How many free pages a pass gives back to the file system at most: others wait meanwhile.
VACUUM_PAGES = 10_000
# How many rows are moved from the outbox into the files at a time.
OUTBOX_ROWS = 1000
# How many escalations, which may be large, are read at a time for a list: no pass writes meanwhile.
READ_AT_ONCE = 100
# In the lock file, byte 0 locks transactions, the byte at a destination's number locks its requests, and the
# byte at this plus a loop's number locks the loop.
LOOP_BYTES = 1 << 40
# Every SQLite database begins with this.
QUEUE_HEAD = b"SQLite format 3\0"

QUEUE_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;

-- A loop, how far its source was read (a Cursor as JSON), and the routes under which its deliveries wait.
CREATE TABLE loops (
    id INTEGER PRIMARY KEY,
    loop_id TEXT NOT NULL UNIQUE,
    cursor TEXT NOT NULL,
    rules TEXT
);

-- A record of the source, verbatim. segment, offset, end and line say where it stood. severity is its own.
-- reported: its row is in the telemetry. settled_at: when the last of its deliveries ended. unusable: the row
-- of a line that is no escalation; it is kept only until that is written, in its turn.
CREATE TABLE escalations (
    id INTEGER PRIMARY KEY,
    loop INTEGER NOT NULL,
    escalation_id TEXT NOT NULL,
    segment TEXT NOT NULL,
    offset INTEGER NOT NULL,
    end INTEGER NOT NULL,
    line INTEGER NOT NULL,
    category TEXT NOT NULL,
    severity TEXT,
    written_at TEXT,
    ingested_at REAL NOT NULL,
    reported INTEGER NOT NULL DEFAULT 0,
    settled_at REAL,
    raw_line TEXT,
    record BLOB NOT NULL,
    unusable BLOB
);
CREATE INDEX unreported ON escalations (loop, id) WHERE reported = 0;
CREATE INDEX settled ON escalations (settled_at) WHERE settled_at IS NOT NULL;

-- One escalation to one sink, or to one peer of a cluster. severity is an index into SEVERITIES. lead: this
-- row counts for the sink; of a cluster's rows exactly one does. in_flight: chosen for a request whose answer
-- is not written down yet: the sink may have it, so it does not expire. alone: it goes out in a request
-- without others. by_operator: an operator asked for it.
CREATE TABLE deliveries (
    escalation INTEGER NOT NULL,
    sink TEXT NOT NULL,
    peer TEXT NOT NULL,
    loop INTEGER NOT NULL,
    severity INTEGER NOT NULL,
    status TEXT NOT NULL,
    lead INTEGER NOT NULL,
    waiting_since REAL NOT NULL,
    not_before REAL NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    first_failed_at REAL,
    in_flight INTEGER NOT NULL DEFAULT 0,
    alone INTEGER NOT NULL DEFAULT 0,
    by_operator INTEGER NOT NULL DEFAULT 0,
    reason_code TEXT,
    fault TEXT,
    http_status INTEGER,
    message TEXT,
    PRIMARY KEY (escalation, sink, peer)
) WITHOUT ROWID;
CREATE INDEX waiting ON deliveries (sink, peer, severity DESC, loop, escalation, not_before)
    WHERE status = 'waiting';
CREATE INDEX dead ON deliveries (loop, escalation) WHERE status = 'dead';

-- What the passes of all loops know of a destination. digest stands for what the sink points at, setup for
-- all its settings and secrets. last_loop was served last. Times are seconds since the epoch.
CREATE TABLE destinations (
    id INTEGER PRIMARY KEY,
    sink TEXT NOT NULL,
    peer TEXT NOT NULL,
    digest TEXT NOT NULL,
    setup TEXT NOT NULL,
    used_at REAL NOT NULL,
    paced_until REAL NOT NULL DEFAULT 0,
    next_attempt_at REAL NOT NULL DEFAULT 0,
    consecutive_failures INTEGER NOT NULL DEFAULT 0,
    backoff_step INTEGER NOT NULL DEFAULT 0,
    failing_since REAL,
    last_success_at REAL,
    last_failure_at REAL,
    reason_code TEXT,
    fault TEXT,
    http_status INTEGER,
    message TEXT,
    clock_offset REAL,
    last_loop INTEGER NOT NULL DEFAULT -1,
    UNIQUE (sink, peer, digest)
);

-- The last record of a subject that a sink was sent: when it was written, how many repeats were held back
-- since, and when the first of these was written.
CREATE TABLE last_sent (
    loop INTEGER NOT NULL,
    sink TEXT NOT NULL,
    peer TEXT NOT NULL,
    subject TEXT NOT NULL,
    written_at TEXT NOT NULL,
    repeats INTEGER NOT NULL DEFAULT 0,
    since TEXT,
    PRIMARY KEY (loop, sink, peer, subject)
) WITHOUT ROWID;

-- Counts of a loop's deliveries to a sink. waiting and dead say how many there are now; the others only grow.
-- Triggers keep them.
CREATE TABLE tallies (
    loop INTEGER NOT NULL,
    sink TEXT NOT NULL,
    waiting INTEGER NOT NULL DEFAULT 0,
    dead INTEGER NOT NULL DEFAULT 0,
    delivered INTEGER NOT NULL DEFAULT 0,
    given_up INTEGER NOT NULL DEFAULT 0,
    skipped INTEGER NOT NULL DEFAULT 0,
    failed_attempts INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (loop, sink)
) WITHOUT ROWID;
CREATE TRIGGER delivery_added AFTER INSERT ON deliveries WHEN NEW.lead BEGIN
    UPDATE tallies SET waiting = waiting + 1 WHERE loop = NEW.loop AND sink = NEW.sink;
END;
CREATE TRIGGER delivery_changed AFTER UPDATE OF status, lead ON deliveries BEGIN
    UPDATE tallies SET
        waiting = waiting + (NEW.lead AND NEW.status = 'waiting') - (OLD.lead AND OLD.status = 'waiting'),
        dead = dead + (NEW.lead AND NEW.status = 'dead') - (OLD.lead AND OLD.status = 'dead'),
        delivered = delivered + (NEW.lead AND NEW.status = 'delivered' AND OLD.status <> 'delivered'),
        given_up = given_up + (NEW.lead AND NEW.status = 'dead' AND OLD.status <> 'dead'),
        skipped = skipped + (NEW.lead AND NEW.status = 'skipped' AND OLD.status <> 'skipped')
    WHERE loop = NEW.loop AND sink = NEW.sink;
END;
CREATE TRIGGER delivery_removed AFTER DELETE ON deliveries WHEN OLD.lead AND OLD.status IN ('waiting', 'dead')
BEGIN
    UPDATE tallies SET waiting = waiting - (OLD.status = 'waiting'), dead = dead - (OLD.status = 'dead')
    WHERE loop = OLD.loop AND sink = OLD.sink;
END;

-- Attempts by the hour, for the last day.
CREATE TABLE hours (
    loop INTEGER NOT NULL,
    sink TEXT NOT NULL,
    hour INTEGER NOT NULL,
    delivered INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (loop, sink, hour)
) WITHOUT ROWID;

-- What reached no sink and never will unless somebody acts. status reports it for a day, or until it is
-- acknowledged.
CREATE TABLE losses (
    loop INTEGER NOT NULL,
    reason_code TEXT NOT NULL,
    count INTEGER NOT NULL,
    last_at REAL NOT NULL,
    acknowledged_at REAL,
    PRIMARY KEY (loop, reason_code)
) WITHOUT ROWID;

-- Rows on their way into the telemetry files: deleted once they are there.
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY,
    loop INTEGER NOT NULL,
    file TEXT NOT NULL,
    row BLOB NOT NULL
);
"""


class DamagedQueueError(StorageError):
    """The database is damaged, or not a database."""


class LoopHeldError(StateError):
    """Another process works on the loop."""

    def __init__(self, loop_id: str) -> None:
        super().__init__(f"another pass works on loop {loop_id}", ["wait until it has ended, then try again"])


class Destination(NamedTuple):
    """What is known of a destination: see the table."""

    id: int
    next_attempt_at: float
    consecutive_failures: int
    backoff_step: int
    failing_since: float | None
    last_success_at: float | None
    last_failure_at: float | None
    reason_code: str | None
    fault: str | None
    http_status: int | None
    message: str | None
    clock_offset: float | None
    last_loop: int


class QueuedDelivery(NamedTuple):
    """A delivery, with the record that it delivers."""

    escalation: int
    sink: str
    peer: str
    loop: int
    severity: int
    status: str
    lead: bool
    waiting_since: float
    attempts: int
    first_failed_at: float | None
    in_flight: bool
    alone: bool
    by_operator: bool
    reason_code: str | None
    http_status: int | None
    message: str | None
    fault: str | None
    stored: QueuedEscalation

    @property
    def key(self) -> tuple[int, str, str]:
        return self.escalation, self.sink, self.peer


class QueuedEscalation(NamedTuple):
    """An escalation as the queue keeps it: see the table."""

    id: int
    loop: int
    escalation_id: str
    segment: str
    offset: int
    end: int
    line: int
    category: str
    severity: str | None
    written_at: str | None
    ingested_at: float
    reported: bool
    settled_at: float | None
    raw_line: str | None
    record: bytes
    unusable: bytes | None = None

    @property
    def position(self) -> JsonObject:
        """Where the record stood, as rows give it: `line` counts from 1, `offset` to `end` are its bytes."""
        return {"segment": self.segment, "offset": self.offset, "end": self.end, "line": self.line}

    @classmethod
    def of(
        cls,
        number: int,
        loop: int,
        found: Escalation | Unusable,
        segment: str,
        line: Line,
        now: float,
        *,
        waits: bool = False,
    ) -> Self:
        """What stands in a line, as the queue keeps it. `waits`: for a sink."""
        place = (number, loop, found.id, segment, line.offset, line.end, line.number)
        if isinstance(found, Unusable):
            return cls(*place, "", None, None, now, False, now, None, b"")
        kind = (found.category, found.severity, found.written_at)
        return cls(*place, *kind, now, False, None if waits else now, found.raw_line, found.raw)


class Selectable(NamedTuple):
    """A delivery that an operator may select, without its record; `line` counts from 1. `sink` and `status`
    are empty if the escalation has no delivery. `escalation` is 0 if the queue does not have it."""

    escalation: int
    escalation_id: str
    segment: str
    offset: int
    line: int
    category: str
    severity: str | None
    written_at: str | None
    sink: str = ""
    status: str = ""

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What tells it from others. The id does not suffice: equal lines have the same."""
        return self.segment, self.offset, self.escalation_id, self.sink


SELECTABLE_COLUMNS = (
    "e.id, e.escalation_id, e.segment, e.offset, e.line, e.category, e.severity, e.written_at, "
    "coalesce(d.sink, ''), coalesce(d.status, '')"
)
ESCALATION_COLUMNS = ", ".join(f"e.{name}" for name in QueuedEscalation._fields)
DELIVERY_COLUMNS = ", ".join(f"d.{name}" for name in QueuedDelivery._fields[:-1])
DESTINATION_COLUMNS = ", ".join(Destination._fields)
NEW_DELIVERY = "(escalation, sink, peer, loop, severity, lead, waiting_since, status)"
# What waits. Without the hint, SQLite may ignore a partial index.
WAITING = "deliveries INDEXED BY waiting WHERE status = 'waiting'"
# A delivery that a change of the config has ended.
ENDED_BY_CONFIG = "status = 'skipped' AND reason_code IN ('route_changed', 'sink_removed')"


class Queue:
    """A connection to the queue.

    The lock of `changed` keeps threads apart, and a lock file keeps processes apart. So no two transactions
    meet, and no checkpoint meets a write: SQLite before 3.51.3 can damage a database if one does.

    `changed` is notified when something to send may have come, and when a sender or the whole pass ends.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Device and inode of the file that was opened to write to it.
        self.identity = (0, 0)
        self.changed = threading.Condition()
        self._lock_file = -1
        self._db: Any = None
        # How many transactions stand in each other.
        self._depth = 0
        self._read_only = False

    @classmethod
    def open(cls, path: str) -> Self:
        """Open the queue to write to it; a new one is for this user alone.

        Raises StateError for one of a newer version, DamagedQueueError, StorageError.
        """
        queue = cls(path)
        make_folder(os.path.dirname(path))
        with queue._closed_if_it_fails("open"):
            queue._lock_file = open_own(f"{path}.lock", os.O_RDWR)
            with queue._locked():
                # SQLite follows links, and makes files that others can read. Closed before SQLite opens it:
                # closing any descriptor of a file drops SQLite's locks on it.
                descriptor = open_own(path, os.O_RDWR)
                queue.identity = identity_of(os.fstat(descriptor))
                os.close(descriptor)
                queue._connect()
                queue._set_up()
        return queue

    @classmethod
    def open_to_read(cls, path: str) -> Self | None:
        """Open the queue for queries, so that nothing on disk changes; None if there is none. No pass writes
        until it is closed.

        Raises StateError, DamagedQueueError, StorageError.
        """
        queue = cls(path)
        queue._read_only = True
        with queue._closed_if_it_fails("read"):
            if not os.path.exists(path) or not os.path.getsize(path):
                return None
            with contextlib.suppress(FileNotFoundError):
                queue._lock_file = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                queue._take(fcntl.LOCK_SH, wait=QUEUE_READ_WAIT_SECONDS)
            # A log that a kill has left must be read; without one, SQLite would make files to share.
            queue._connect("?mode=ro" if has_wal(path) else "?immutable=1")
            if not queue._check_version():  # a pass is making it
                queue.close()
                return None
        return queue

    @classmethod
    def keep_aside(cls, path: str, damaged: tuple[int, int]) -> None:
        """Move a damaged queue aside, unless another process has done so. `damaged`: device and inode of the
        file. This process must not have it open, or would lose its locks. Raises StateError, StorageError."""
        kept = f"{path}.damaged-{int(time.time())}-{os.getpid()}"
        queue = cls(path)
        with queue._closed_if_it_fails("keep aside"):
            queue._lock_file = open_own(f"{path}.lock", os.O_RDWR)
            with queue._locked():
                found = stat_of(path)
                if found is not None and identity_of(found) == damaged:
                    for end in ("-wal", "-shm", ""):
                        with contextlib.suppress(FileNotFoundError):
                            os.rename(f"{path}{end}", f"{kept}{end}")
        queue.close()

    @contextlib.contextmanager
    def _closed_if_it_fails(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise storage_error(verb, self.path, error) from None
        except BaseException:
            self.close()
            raise

    def _connect(self, options: str = "") -> None:
        """`options`: the end of SQLite's URI for the file."""
        import sqlite3

        with self._errors():
            self._db = sqlite3.connect(
                f"file:{quote_path(self.path)}{options}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=QUEUE_WAIT_SECONDS,
            )

    def _set_up(self) -> None:
        version = self._check_version()
        if not version:
            self.execute("PRAGMA auto_vacuum = INCREMENTAL")
        if self.execute("PRAGMA journal_mode = WAL") == [("wal",)]:
            # A kill loses nothing. A power cut may take the last transactions, with the cursor.
            self.execute("PRAGMA synchronous = NORMAL")
            self.execute("PRAGMA wal_autocheckpoint = 0")
        else:  # a network file system
            self.execute("PRAGMA journal_mode = DELETE")
            self.execute("PRAGMA synchronous = FULL")
        if not version:
            salt = os.urandom(16).hex()
            with self._errors():
                self._db.executescript(
                    f"BEGIN IMMEDIATE; {QUEUE_SCHEMA} INSERT INTO meta VALUES ('salt', '{salt}'); "
                    f"PRAGMA user_version = {QUEUE_VERSION}; COMMIT;"
                )

    def _check_version(self) -> int:
        version: int = self.first("PRAGMA user_version")[0]
        if version > QUEUE_VERSION:
            raise StateError(
                f"the queue {self.path} was written by a newer version (version {version}); it is left as it "
                "is",
                [f"run that version of {PROGRAM} again, or a later one"],
            )
        if version:  # whether the rest of the file can be read
            self.execute("SELECT count(*) FROM meta")
        elif self.execute("SELECT 1 FROM sqlite_schema"):
            raise foreign_file(self.path)
        return version

    def close(self) -> None:
        """Copy the log into the database, and close. Raises StorageError."""
        try:
            database, self._db = self._db, None
            if database is not None and self._read_only:
                database.close()
            elif database is not None:
                with self._locked(), self._errors():
                    try:
                        # Without it, the next one would copy it: not a loss.
                        with contextlib.suppress(Exception):
                            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    finally:
                        database.close()
        finally:
            if self._lock_file >= 0:
                os.close(self._lock_file)
                self._lock_file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import sqlite3

        try:
            yield
        except sqlite3.Error as error:
            raise self._in_words(error) from None

    def _in_words(self, error: sqlite3.Error) -> StorageError:
        """What went wrong. SQLite hides the system's reason, which is looked for here."""
        import sqlite3

        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "no such" in str(error):
            return DamagedQueueError(
                f"the queue {self.path} is damaged ({error})",
                [f"the next pass keeps it aside as {self.path}.damaged-… and starts a new one"],
            )
        try:
            if code in (
                sqlite3.SQLITE_FULL,
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_READONLY,
                sqlite3.SQLITE_CANTOPEN,
            ):
                check_room(os.path.dirname(self.path), self.path, f"{self.path}-wal", least=RESERVE_BYTES)
        except StorageError as reason:
            return reason
        if code == sqlite3.SQLITE_READONLY:
            return storage_error("write", self.path, OSError(errno.EACCES, os.strerror(errno.EACCES)))
        return StorageError(
            f"the queue {self.path} cannot be used: {error}",
            ["check the file, its folder and the disk; the next pass goes on where this one stopped"],
        )

    # -- locks and transactions

    def _take(self, kind: int, byte: int = 0, wait: float = QUEUE_WAIT_SECONDS) -> bool:
        """Lock a byte of the lock file. Tells whether it became free within `wait` seconds."""
        deadline = time.monotonic() + wait
        # A transaction is short, a request may take seconds.
        pause = 0.02 if byte else 0.002
        while True:
            try:
                fcntl.lockf(self._lock_file, kind | fcntl.LOCK_NB, 1, byte)
                return True
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(pause)

    def _release(self, byte: int = 0) -> None:
        fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, byte)

    def _lock(self) -> None:
        """Keep other processes from writing, until `_release`. Raises StateError."""
        if not self._take(fcntl.LOCK_EX):
            raise StateError(
                f"another process has held the queue {self.path} for {QUEUE_WAIT_SECONDS:g} s",
                [f"see which one, and end it: {shell_line('fuser', '-v', f'{self.path}.lock')}"],
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes from writing. Raises StateError."""
        with self.changed:
            self._lock()
            try:
                yield
            finally:
                self._release()

    def transaction(self) -> Transaction:
        """Everything or nothing. Nobody else reads or writes the queue meanwhile.

        Raises DamagedQueueError, StateError, StorageError.
        """
        return Transaction(self)

    def begin(self) -> None:
        """Begin a transaction, or a part of one: see `transaction`."""
        self.changed.acquire()
        try:
            if not self._depth:
                self._lock()
                try:
                    self.execute("BEGIN IMMEDIATE")
                except BaseException:
                    self._release()
                    raise
        except BaseException:
            self.changed.release()
            raise
        self._depth += 1

    def end(self, *, commit: bool) -> None:
        """End what `begin` began."""
        self._depth -= 1
        try:
            if not self._depth:
                try:
                    if commit:
                        self.execute("COMMIT")
                finally:
                    with contextlib.suppress(Exception):
                        if self._db.in_transaction:  # SQLite rolls back by itself after some errors
                            self._db.execute("ROLLBACK")
                    self._release()
        finally:
            self.changed.release()

    def tidy(self) -> None:
        """Copy the write-ahead log into the database if it has grown large. Raises StorageError."""
        found = stat_of(f"{self.path}-wal")
        if found is not None and found.st_size > WAL_BYTES:
            with self._locked():
                self.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def execute(self, sql: str, *parameters: object) -> list[Any]:
        """Run a statement, inside of `transaction` if it writes, and return all its rows.

        Raises DamagedQueueError, StorageError.
        """
        import sqlite3

        try:
            rows: list[Any] = self._db.execute(sql, parameters).fetchall()
            return rows
        except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and SQLite cannot
            return self.execute(sql, *cast("list[object]", strict_value(parameters)))
        except sqlite3.Error as error:
            raise self._in_words(error) from None

    def first(self, sql: str, *parameters: object) -> Any:
        """The first row of a statement; None if it has none. Raises as `execute`."""
        rows = self.execute(sql, *parameters)
        return rows[0] if rows else None

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement with each of these rows, inside of `transaction`. Raises as `execute`."""
        with self._errors():
            self._db.executemany(sql, rows)

    def copy_to(self, path: str) -> None:
        """Write a copy of the database into a new file. Raises StorageError."""
        import sqlite3

        with self._errors(), contextlib.closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)

    @functools.cached_property
    def salt(self) -> bytes:
        """A random value in all digests of secrets: without the queue, nobody can guess a secret from one."""
        [value] = self.first("SELECT value FROM meta WHERE key = 'salt'")
        return bytes.fromhex(value)

    def owner(self) -> str | None:
        """The repo whose queue this is, if that was noted."""
        row = self.first("SELECT value FROM meta WHERE key = 'repo'")
        return row and str(row[0])

    def set_owner(self, repo: str) -> None:
        self.execute("INSERT OR REPLACE INTO meta VALUES ('repo', ?)", repo)

    # -- loops and escalations

    def find_loop(self, loop_id: str) -> tuple[int, Cursor, JsonObject | None] | None:
        """A loop's number, its cursor, and the routes under which its deliveries wait; None for a new
        loop."""
        row = self.first("SELECT id, cursor, rules FROM loops WHERE loop_id = ?", loop_id)
        if row is None:
            return None
        return row[0], Cursor.from_json(json.loads(row[1])), row[2] and json.loads(row[2])

    def unfinished_loops(self) -> list[str]:
        """The loops of which something waits or is dead."""
        rows = self.execute(
            "SELECT DISTINCT loop_id FROM loops JOIN tallies ON loop = id WHERE waiting > 0 OR dead > 0"
        )
        return [row[0] for row in rows]

    def add_loop(self, loop_id: str, cursor: Cursor) -> int:
        """Add a loop; returns its number."""
        text = encode_json(cursor.to_json()).decode()
        self.execute("INSERT INTO loops (loop_id, cursor) VALUES (?, ?)", loop_id, text)
        return int(self.first("SELECT last_insert_rowid()")[0])

    def save_cursor(self, loop: int, cursor: Cursor) -> None:
        self.execute("UPDATE loops SET cursor = ? WHERE id = ?", encode_json(cursor.to_json()).decode(), loop)

    def save_rules(self, loop: int, rules: JsonObject) -> None:
        self.execute("UPDATE loops SET rules = ? WHERE id = ?", encode_json(rules).decode(), loop)

    def next_id(self) -> int:
        """The number that the next escalation gets: they grow with the order of ingestion."""
        [last] = self.first("SELECT max(id) FROM escalations")
        return (last or 0) + 1

    def add_escalations(self, rows: Sequence[QueuedEscalation]) -> None:
        insert = f"INSERT INTO escalations VALUES ({marks(QueuedEscalation._fields)})"
        try:
            self.execute_many(insert, rows)
        except UnicodeEncodeError:  # see `execute`; the rows before it are stored
            strict = cast("list[QueuedEscalation]", strict_value(rows))
            self.execute_many(insert.replace("INSERT", "INSERT OR IGNORE"), strict)

    def places(self, loop: int, segment: str) -> Iterator[tuple[int, str]]:
        """The offset and the id of each escalation of a loop that is kept, of one segment, in the order of
        ingestion."""
        query = (
            "SELECT id, offset, escalation_id FROM escalations WHERE id > ? AND loop = ? AND segment = ? "
            "ORDER BY id LIMIT 1000"
        )
        last = 0
        while rows := self.execute(query, last, loop, segment):
            yield from (row[1:] for row in rows)
            last = rows[-1][0]

    # -- what waits

    def add_deliveries(self, rows: Sequence[tuple[int, str, str, int, int, int, float]]) -> None:
        """Add deliveries that wait: escalation, sink, peer, loop, severity, lead, since when."""
        row = "(?, ?, ?, ?, ?, ?, ?, 'waiting')"
        # Many in a statement: each for itself would take half as long again.
        for start in range(0, len(rows), 100):
            some = rows[start : start + 100]
            self.execute(
                f"INSERT INTO deliveries {NEW_DELIVERY} VALUES {', '.join([row] * len(some))}",
                *itertools.chain.from_iterable(some),
            )

    def reroute(
        self, escalations: Sequence[tuple[int, int]], sink: str, peers: Collection[str], loop: int
    ) -> int:
        """Let escalations, each with its severity, wait for a sink to which their routes lead now, but for
        those that it has had, and for those whose delivery to it has ended otherwise than by a change of the
        config. Returns how many did not wait for it before."""
        before, now = self.count_waiting(loop, sink), time.time()
        self.execute_many(
            f"DELETE FROM deliveries WHERE escalation = ? AND sink = ? AND {ENDED_BY_CONFIG}",
            ((escalation, sink) for escalation, _ in escalations),
        )
        leads = "SELECT 1 FROM deliveries WHERE escalation = ?1 AND sink = ?2 AND lead"
        self.execute_many(
            f"INSERT OR IGNORE INTO deliveries {NEW_DELIVERY} "
            f"SELECT ?1, ?2, ?3, ?4, ?5, NOT EXISTS ({leads}), ?6, 'waiting' "
            f"WHERE NOT EXISTS ({leads} AND status IN ('skipped', 'dead'))",
            (
                (escalation, sink, peer, loop, severity, now)
                for escalation, severity in escalations
                for peer in peers
            ),
        )
        return self.count_waiting(loop, sink) - before

    def waiting_in_turn(
        self,
        sink: str,
        peer: str,
        loops: Collection[int],
        after: int,
        times: tuple[float, float],
        limit: int,
        *,
        below_limit: bool,
        by_operator: bool,
    ) -> Iterator[QueuedDelivery]:
        """What waits for a destination, in the order in which it is served: the worst severity first, within
        it loop by loop, from the loop `after` on, and of each at most the `limit` oldest.

        A delivery with a `not_before` between the two `times`, now and the latest, has to wait. A later one
        was set by a clock that was ahead, and does not count. `below_limit`: only what was tried less than
        SAME_RECORD_ATTEMPTS times. `by_operator`: only what an operator asked for.
        """
        only = "AND d.by_operator " if by_operator else ""
        only += f"AND d.attempts < {SAME_RECORD_ATTEMPTS} " if below_limit else ""
        for severity, loop in self._turns(sink, peer, loops, after, times):
            yield from self._deliveries(
                "d.status = 'waiting' AND d.sink = ? AND d.peer = ? AND d.severity = ? AND d.loop = ? "
                f"AND d.not_before NOT BETWEEN ? AND ? {only}ORDER BY d.escalation LIMIT ?",
                *(sink, peer, severity, loop, *times, limit),
                index="INDEXED BY waiting",
            )

    def _turns(
        self, sink: str, peer: str, loops: Collection[int], after: int, times: tuple[float, float]
    ) -> Iterator[tuple[int, int]]:
        """The severities and loops of which something may wait for a destination: see `waiting_in_turn`."""
        query = (
            f"SELECT loop FROM {WAITING} AND sink = ? AND peer = ? AND severity = ? AND loop > ? "
            "AND loop <= ? AND not_before NOT BETWEEN ? AND ? ORDER BY loop LIMIT 1"
        )
        for severity in reversed(range(len(SEVERITIES))):
            if len(loops) == 1:
                yield severity, next(iter(loops))
                continue
            for low, high in ((after, sys.maxsize >> 1), (-1, after)):
                at = low
                while row := self.first(query, sink, peer, severity, at, high, *times):
                    at = row[0]
                    if at in loops:
                        yield severity, at

    def waiting_kinds(self, loop: int, after: int, limit: int) -> list[tuple[int, str, str | None]]:
        """The first `limit` escalations of a loop after this one that wait for a sink: number, category,
        and the severity that the record gives. A route depends on nothing else."""
        return self.execute(
            "SELECT id, category, severity FROM escalations e WHERE id > ? AND loop = ? AND EXISTS "
            "(SELECT 1 FROM deliveries WHERE escalation = e.id AND status = 'waiting' AND lead) "
            "ORDER BY id LIMIT ?",
            *(after, loop, limit),
        )

    def had_by(self, escalations: Sequence[int]) -> set[tuple[int, str]]:
        """Those of these escalations that a sink has a delivery of, unless a change of the config has ended
        it; each with the sink."""
        rows = self.execute(
            f"SELECT escalation, sink FROM deliveries WHERE escalation IN ({marks(escalations)}) "
            f"AND NOT ({ENDED_BY_CONFIG})",
            *escalations,
        )
        return set(rows)

    def _deliveries(self, condition: str, *values: object, index: str = "") -> list[QueuedDelivery]:
        """The deliveries `d`, with their escalations `e`, for which a condition holds."""
        rows = self.execute(
            f"SELECT {DELIVERY_COLUMNS}, {ESCALATION_COLUMNS} FROM deliveries d {index} "
            f"JOIN escalations e ON e.id = d.escalation WHERE {condition}",
            *values,
        )
        count = len(QueuedDelivery._fields) - 1
        return [QueuedDelivery._make([*row[:count], QueuedEscalation(*row[count:])]) for row in rows]

    def waiting_peers(self, sink: str) -> Iterator[str]:
        """The peers of a sink for which something waits, of any loop."""
        query = f"SELECT peer FROM {WAITING} AND sink = ? AND peer >= ? ORDER BY peer LIMIT 1"
        at = ""
        while row := self.first(query, sink, at):
            yield row[0]
            at = row[0] + "\0"

    def skip_waiting(
        self, loop: int, sink: str, reason_code: str, escalations: Iterable[int] | None = None
    ) -> int:
        """Skip a loop's waiting deliveries to a sink, all or those of these escalations. Returns how many; a
        cluster's peers count as one."""
        before = self.count_waiting(loop, sink)
        skip = (
            "UPDATE deliveries SET status = 'skipped', in_flight = 0, reason_code = ?, fault = NULL, "
            "http_status = NULL, message = NULL WHERE status = 'waiting' AND loop = ? AND sink = ?"
        )
        if escalations is None:
            self.execute(skip, reason_code, loop, sink)
        else:
            each = ((reason_code, loop, sink, escalation) for escalation in escalations)
            self.execute_many(f"{skip} AND escalation = ?", each)
        return before - self.count_waiting(loop, sink)

    def skip_dead(self, loop: int, sink: str, reason_code: str) -> int:
        """Dismiss a loop's dead letters of a sink. Returns how many."""
        self.execute(
            "UPDATE deliveries SET status = 'skipped', reason_code = ? WHERE status = 'dead' AND loop = ? "
            "AND sink = ?",
            *(reason_code, loop, sink),
        )
        return int(self.first("SELECT changes()")[0])

    def set_severities(self, escalations: Iterable[tuple[int, int]]) -> None:
        """Give the waiting deliveries of each of these escalations this severity."""
        self.execute_many(
            "UPDATE deliveries SET severity = ?2 WHERE escalation = ?1 AND status = 'waiting' "
            "AND severity <> ?2",
            escalations,
        )

    def deliveries_of(self, stored: QueuedEscalation) -> list[QueuedDelivery]:
        """The deliveries of an escalation."""
        return self.deliveries_of_all([stored])[stored.id]

    def deliveries_of_all(self, found: Sequence[QueuedEscalation]) -> dict[int, list[QueuedDelivery]]:
        """The deliveries of these escalations, by their number."""
        stored = {item.id: item for item in found}
        deliveries: dict[int, list[QueuedDelivery]] = {number: [] for number in stored}
        if found:
            rows = self.execute(
                f"SELECT {DELIVERY_COLUMNS} FROM deliveries d WHERE escalation BETWEEN ? AND ?",
                *(min(stored), max(stored)),
            )
            for row in rows:
                if row[0] in stored:
                    deliveries[row[0]].append(QueuedDelivery._make([*row, stored[row[0]]]))
        return deliveries

    def has_waiting(self, sink: str, peer: str, loops: Collection[int]) -> bool:
        """Tell whether anything of these loops waits for a destination."""
        query = (
            f"SELECT 1 FROM {WAITING} AND sink = ? AND peer = ? AND severity = ? "
            f"AND loop IN ({marks(loops)}) LIMIT 1"
        )
        return bool(loops) and any(
            self.first(query, sink, peer, severity, *loops) for severity in range(len(SEVERITIES))
        )

    def waiting_in(self, loop: int) -> set[tuple[int, str]]:
        """What waits of a loop: escalation and sink."""
        return set(self.execute(f"SELECT escalation, sink FROM {WAITING} AND loop = ?", loop))

    def lagging(self, loop: int, sink: str) -> dict[str, float]:
        """The peers of a cluster that miss what another one has, and since when."""
        rows = self.execute(
            "SELECT d.peer, min(d.waiting_since) FROM deliveries d INDEXED BY waiting "
            "JOIN deliveries o ON o.escalation = d.escalation AND o.sink = d.sink AND o.lead "
            "WHERE d.status = 'waiting' AND NOT d.lead AND d.sink = ? AND d.loop = ? "
            "AND o.status = 'delivered' GROUP BY d.peer",
            *(sink, loop),
        )
        return dict(rows)

    def oldest_waiting(self, loop: int, sink: str) -> QueuedEscalation | None:
        """The oldest escalation of a loop that waits for a sink."""
        found: list[tuple[int]] = []
        for peer in self.waiting_peers(sink):
            for severity in range(len(SEVERITIES)):
                found += self.execute(
                    f"SELECT escalation FROM {WAITING} AND sink = ? AND peer = ? AND severity = ? "
                    "AND loop = ? AND lead ORDER BY escalation LIMIT 1",
                    *(sink, peer, severity, loop),
                )
        return self._escalations("WHERE id = ?", *min(found))[0] if found else None

    def reread(self, delivery: QueuedDelivery) -> QueuedDelivery:
        """A delivery as it is now."""
        [found] = self._deliveries("d.escalation = ? AND d.sink = ? AND d.peer = ?", *delivery.key)
        return found

    def escalations_from(self, loop: int, first: int) -> list[QueuedEscalation]:
        """The escalations of a loop from this number on, in the order of ingestion."""
        return self._escalations("WHERE loop = ? AND id >= ? ORDER BY id", loop, first)

    def _escalations(self, condition: str, *values: object) -> list[QueuedEscalation]:
        rows = self.execute(f"SELECT {ESCALATION_COLUMNS} FROM escalations e {condition}", *values)
        return [QueuedEscalation(*row) for row in rows]

    # -- what becomes of a delivery

    def set_in_flight(self, deliveries: Iterable[QueuedDelivery], *, in_flight: bool) -> None:
        """Note that requests with these deliveries are about to be sent, or were not sent after all."""
        self.execute_many(
            "UPDATE deliveries SET in_flight = ? WHERE escalation = ? AND sink = ? AND peer = ?",
            ((in_flight, *delivery.key) for delivery in deliveries),
        )

    def note_attempt(
        self, delivery: QueuedDelivery, verdict: Verdict, now: float, *, not_before: float, alone: bool
    ) -> None:
        """Note an attempt after which a delivery still waits."""
        self.execute(
            "UPDATE deliveries SET attempts = attempts + 1, in_flight = 0, not_before = ?, alone = ?, "
            "first_failed_at = coalesce(first_failed_at, ?), reason_code = ?, fault = ?, http_status = ?, "
            "message = ? WHERE escalation = ? AND sink = ? AND peer = ?",
            *(not_before, alone or delivery.alone, now, verdict.reason_code, verdict.fault),
            *(verdict.http_status, verdict.message, *delivery.key),
        )

    def settle(self, delivery: QueuedDelivery, verdict: Verdict, attempts: int) -> bool:
        """End a delivery. Tells whether it leads: then its sink has ended, too.

        The first peer of a cluster to deliver takes the lead. One that refuses leaves the alert to the
        others, and is skipped; the last one to refuse, if none has delivered, is dead. If one needs no
        request, because the alert is a repeat or an operator skipped it, the others need none.
        """
        lead, status = delivery.lead, STATUS_OF_OUTCOME[verdict.outcome]
        if delivery.peer:
            others = [
                other
                for other in self.deliveries_of(delivery.stored)
                if other.sink == delivery.sink and other.peer != delivery.peer
            ]
            delivered = any(other.status == "delivered" for other in others)
            waiting = [other for other in others if other.status == "waiting"]
            if status == "delivered" and not lead and not delivered:
                self._pass_lead(delivery)
                lead = True
            elif status == "dead" and (delivered or waiting):
                status = "skipped"
                if lead and waiting:
                    self._pass_lead(waiting[0])
                    lead = False
            elif status == "skipped" and not delivered:
                self._pass_lead(delivery)
                lead = True
                for other in waiting:
                    self._set_status(other, status, verdict, other.attempts)
        self._set_status(delivery, status, verdict, attempts)
        return lead

    def replace_peer(
        self, loop: int, sink: str, peer: str, peers: Collection[str], limit: int
    ) -> list[int] | None:
        """Replace what waits of a loop for a peer that is gone by deliveries to those of `peers` that have
        none: the worst severity first, `limit` deliveries at most. None if nothing waits for it.

        If that leaves the sink without a lead, another delivery takes it: one that is delivered, or else one
        that waits. If none is, but a peer has refused, the sink has, and that one is dead. Returns the
        escalations whose new lead has ended.
        """
        query = (
            f"SELECT escalation, lead FROM {WAITING} AND sink = ? AND peer = ? AND severity = ? "
            "AND loop = ? ORDER BY escalation LIMIT ?"
        )
        found: list[tuple[int, int]] = []
        for severity in reversed(range(len(SEVERITIES))):
            found += self.execute(query, sink, peer, severity, loop, limit - len(found))
        if not found:
            return None
        self.execute_many(
            f"INSERT OR IGNORE INTO deliveries {NEW_DELIVERY} "
            "SELECT escalation, sink, ?, loop, severity, 0, waiting_since, 'waiting' "
            "FROM deliveries WHERE escalation = ? AND sink = ? AND peer = ?",
            ((new, escalation, sink, peer) for escalation, _ in found for new in peers),
        )
        self.execute_many(
            "DELETE FROM deliveries WHERE escalation = ? AND sink = ? AND peer = ?",
            ((escalation, sink, peer) for escalation, _ in found),
        )
        self.note_settled(escalation for escalation, lead in found if not lead)
        had_lead = [escalation for escalation, lead in found if lead]
        names = ", ".join(f"?{number}" for number in range(3, 3 + len(peers)))
        self.execute_many(
            "UPDATE deliveries SET lead = 1, status = iif(status = 'skipped' AND fault IS NOT NULL, 'dead', "
            "status) WHERE escalation = ?1 AND sink = ?2 AND peer = (SELECT peer FROM deliveries "
            f"WHERE escalation = ?1 AND sink = ?2 AND peer IN ({names}) "
            "ORDER BY status <> 'delivered', status <> 'waiting', fault IS NULL LIMIT 1)",
            ((escalation, sink, *peers) for escalation in had_lead),
        )
        ended = self.execute(
            "SELECT escalation FROM deliveries WHERE sink = ? AND lead AND status <> 'waiting' "
            f"AND escalation IN ({marks(had_lead)})",
            *(sink, *had_lead),
        )
        return [escalation for [escalation] in ended]

    def _pass_lead(self, delivery: QueuedDelivery) -> None:
        """Let a delivery lead for its sink, and no other one."""
        self.execute(
            "UPDATE deliveries SET lead = (peer = ?3) WHERE escalation = ?1 AND sink = ?2", *delivery.key
        )

    def _set_status(self, delivery: QueuedDelivery, status: str, verdict: Verdict, attempts: int) -> None:
        self.execute(
            "UPDATE deliveries SET status = ?, attempts = ?, in_flight = 0, alone = 0, reason_code = ?, "
            "fault = ?, http_status = ?, message = ? WHERE escalation = ? AND sink = ? AND peer = ?",
            *(status, attempts, verdict.reason_code, verdict.fault, verdict.http_status, verdict.message),
            *delivery.key,
        )

    def note_settled(self, escalations: Iterable[int]) -> None:
        """Note when the last delivery of each of these escalations has ended, if none waits."""
        now = time.time()
        self.execute_many(
            "UPDATE escalations SET settled_at = ?1 WHERE id = ?2 AND NOT EXISTS (SELECT 1 FROM deliveries "
            "WHERE escalation = ?2 AND status = 'waiting')",
            ((now, escalation) for escalation in escalations),
        )

    def note_all_settled(self, loop: int) -> None:
        """Mark each escalation of a loop as settled if none of its deliveries waits any more."""
        self.execute(
            "UPDATE escalations SET settled_at = ? WHERE loop = ? AND settled_at IS NULL AND NOT EXISTS "
            "(SELECT 1 FROM deliveries WHERE escalation = escalations.id AND status = 'waiting')",
            *(time.time(), loop),
        )

    def note_reported(self, found: Iterable[tuple[QueuedEscalation, bool]]) -> None:
        """Note that the rows of these escalations are written, and which of them are settled. The rows of
        unusable lines are removed: nothing else needs them."""
        now = time.time()
        kept: list[tuple[float | None, int]] = []
        gone: list[tuple[int]] = []
        for stored, settled in found:
            if stored.unusable is not None:
                gone.append((stored.id,))
            else:
                kept.append((stored.settled_at or now if settled else None, stored.id))
        self.execute_many("UPDATE escalations SET reported = 1, settled_at = ? WHERE id = ?", kept)
        self.execute_many("DELETE FROM escalations WHERE id = ?", gone)

    def unreported(self, loop: int, limit: int) -> list[QueuedEscalation]:
        """Escalations whose row is still to be written, the oldest first."""
        condition = "INDEXED BY unreported WHERE loop = ? AND reported = 0 ORDER BY id LIMIT ?"
        return self._escalations(condition, loop, limit)

    # -- destinations

    def use_destination(self, sink: str, peer: str, digest: str, setup: str) -> Destination:
        """Note that a destination is used, and return what is known of it. If its settings or secrets have
        changed, its failures are forgotten, but not what was spent of its rate."""
        self.execute(
            "INSERT INTO destinations (sink, peer, digest, setup, used_at) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET used_at = excluded.used_at, setup = excluded.setup, "
            "next_attempt_at = iif(setup = excluded.setup AND NOT EXISTS (SELECT 1 FROM destinations newer "
            "WHERE newer.sink = excluded.sink AND newer.peer = excluded.peer "
            "AND newer.used_at > destinations.used_at), next_attempt_at, 0), "
            "backoff_step = iif(setup = excluded.setup, backoff_step, 0)",
            *(sink, peer, digest, setup, time.time()),
        )
        return self.destination(sink, peer, digest)

    def forget_waits(self, sink: str, peer: str, setup: str) -> None:
        """Let deliveries that wait for a time of their own go out now, if the settings or secrets of their
        destination have changed since it was used last."""
        self.execute(
            "UPDATE deliveries SET not_before = 0 WHERE status = 'waiting' AND sink = ?1 AND peer = ?2 "
            "AND not_before > 0 AND ?3 <> (SELECT setup FROM destinations WHERE sink = ?1 AND peer = ?2 "
            "ORDER BY used_at DESC LIMIT 1)",
            *(sink, peer, setup),
        )

    def destination(self, sink: str, peer: str, digest: str) -> Destination:
        row = self.first(
            f"SELECT {DESTINATION_COLUMNS} FROM destinations WHERE sink = ? AND peer = ? AND digest = ?",
            *(sink, peer, digest),
        )
        return Destination(*row)

    def destinations_of(self, sink: str) -> dict[str, Destination]:
        """What is known of a sink's destinations, by peer: of each the one that was used last, but for
        peers that are retired."""
        rows = self.execute(
            f"SELECT peer, {DESTINATION_COLUMNS} FROM destinations WHERE sink = ? AND used_at > 0 "
            "ORDER BY used_at",
            sink,
        )
        return {row[0]: Destination(*row[1:]) for row in rows}

    def retire_peers(self, sink: str, peers: Collection[str]) -> None:
        """Let what is known of a sink's former peers, all but these, no longer count."""
        self.execute(
            "UPDATE destinations SET used_at = 0 WHERE sink = ? AND used_at > 0 "
            f"AND peer NOT IN ({marks(peers)})",
            *(sink, *peers),
        )

    def paced_until(self, digest: str) -> float:
        """Until when the requests to a destination are paid for, by all sinks that point at it: see Pace."""
        row = self.first("SELECT max(paced_until) FROM destinations WHERE digest = ?", digest)
        return float(row[0] or 0.0)

    def spend_rate(self, digest: str, until: float) -> None:
        self.execute("UPDATE destinations SET paced_until = ? WHERE digest = ?", until, digest)

    def note_last_loop(self, destination: Destination, loop: int) -> None:
        """Note which loop a destination has served last: the next pass begins with the one after it."""
        self.execute("UPDATE destinations SET last_loop = ? WHERE id = ?", loop, destination.id)

    def note_answer(self, destination: Destination, verdict: Verdict, now: float) -> None:
        """Note that a destination is well: it delivered, or refused a record."""
        self.execute(
            "UPDATE destinations SET consecutive_failures = 0, backoff_step = 0, next_attempt_at = 0, "
            "failing_since = NULL, last_success_at = iif(?, ?, last_success_at), clock_offset = ? "
            "WHERE id = ?",
            *(verdict.outcome == "delivered", now, verdict.clock_offset, destination.id),
        )

    def note_failure(
        self, destination: Destination, verdict: Verdict, now: float, next_attempt_at: float, step: int
    ) -> None:
        self.execute(
            "UPDATE destinations SET consecutive_failures = consecutive_failures + 1, backoff_step = ?, "
            "next_attempt_at = ?, failing_since = coalesce(failing_since, ?), last_failure_at = ?, "
            "reason_code = ?, fault = ?, http_status = ?, message = ? WHERE id = ?",
            *(step, next_attempt_at, now, now, verdict.reason_code, verdict.fault, verdict.http_status),
            *(verdict.message, destination.id),
        )

    def try_at_once(self, loop: int) -> None:
        """Let all destinations and the deliveries of a loop be tried now, also after failures."""
        self.execute("UPDATE destinations SET next_attempt_at = 0")
        self.execute("UPDATE deliveries SET not_before = 0 WHERE loop = ? AND status = 'waiting'", loop)

    @contextlib.contextmanager
    def probing(self, destination: Destination, wait: float) -> Iterator[bool]:
        """Hold a destination while requests go to it. Processes share one that has answered in the last
        FRESH_SECONDS. Any other is asked by one process at a time, so that only one waits for its timeout.
        Yields False if it did not become free within `wait` seconds."""
        now = time.time()
        answered_lately = now - FRESH_SECONDS < (destination.last_success_at or 0.0) <= now
        well = answered_lately and not destination.consecutive_failures
        if not self._take(fcntl.LOCK_SH if well else fcntl.LOCK_EX, destination.id, wait):
            yield False
            return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError, ValueError):
                self._release(destination.id)

    def stop_probing(self, destination: Destination) -> None:
        """Let others ask a destination, although a request is still on its way."""
        self._release(destination.id)

    def share(self, destination: Destination) -> None:
        """Let other processes send to a destination as well: it has answered."""
        self._take(fcntl.LOCK_SH, destination.id, 0.0)

    def hold_loop(self, loop: int) -> bool:
        """Keep other processes from working on a loop; tells whether none does."""
        return self._take(fcntl.LOCK_EX, LOOP_BYTES + loop, 0.0)

    def release_loop(self, loop: int) -> None:
        self._release(LOOP_BYTES + loop)

    # -- repeats

    def last_sent(self, delivery: QueuedDelivery, subject: str) -> tuple[str, int, str | None] | None:
        """When the record was written that a sink was sent last of a subject, the repeats held back since,
        and when the first of those was written."""
        row: tuple[str, int, str | None] | None = self.first(
            "SELECT written_at, repeats, since FROM last_sent WHERE loop = ? AND sink = ? AND peer = ? "
            "AND subject = ?",
            *(delivery.loop, delivery.sink, delivery.peer, subject),
        )
        return row

    def note_sent(self, delivery: QueuedDelivery, subject: str, written_at: str) -> None:
        self.execute(
            "INSERT OR REPLACE INTO last_sent (loop, sink, peer, subject, written_at) VALUES (?, ?, ?, ?, ?)",
            *(delivery.loop, delivery.sink, delivery.peer, subject, written_at),
        )

    def note_repeat(self, delivery: QueuedDelivery, subject: str, written_at: str) -> None:
        self.execute(
            "UPDATE last_sent SET repeats = repeats + 1, since = coalesce(since, ?) WHERE loop = ? "
            "AND sink = ? AND peer = ? AND subject = ?",
            *(written_at, delivery.loop, delivery.sink, delivery.peer, subject),
        )

    # -- figures

    def count_attempts(self, loop: int, sink: str, outcome: Outcome, count: int) -> None:
        """Count attempts with the same outcome. `failed_attempts` leaves out those that end a delivery: the
        triggers count these."""
        delivered = count if outcome == "delivered" else 0
        self.execute(
            "INSERT INTO hours VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
            "SET delivered = delivered + excluded.delivered, failed = failed + excluded.failed",
            *(loop, sink, int(time.time() // 3600), delivered, count - delivered),
        )
        if outcome not in STATUS_OF_OUTCOME:
            self.execute(
                "UPDATE tallies SET failed_attempts = failed_attempts + ? WHERE loop = ? AND sink = ?",
                *(count, loop, sink),
            )

    def note_loss(self, loop: int, reason_code: str, count: int, now: float) -> None:
        """Count what reached no sink. The count starts anew if the last loss is older than a day, or was
        acknowledged."""
        self.execute(
            "INSERT INTO losses VALUES (?, ?, ?, ?, NULL) ON CONFLICT DO UPDATE "
            "SET last_at = excluded.last_at, count = iif(last_at > excluded.last_at - ? "
            "AND acknowledged_at IS NULL, count, 0) + excluded.count, acknowledged_at = NULL",
            *(loop, reason_code, count, now, LOSS_SHOWN),
        )

    def tallies(self, loop: int) -> dict[str, JsonObject]:
        """The counts of a loop's sinks, by sink."""
        names = ("waiting", "dead", "delivered", "given_up", "skipped", "failed_attempts")
        rows = self.execute(
            f"SELECT sink, {', '.join(names)} FROM tallies WHERE loop = ? ORDER BY sink", loop
        )
        return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}

    def add_tallies(self, loop: int, sinks: Iterable[str]) -> None:
        """Begin to count a loop's deliveries to these sinks, as far as they are new."""
        self.execute_many(
            "INSERT OR IGNORE INTO tallies (loop, sink) VALUES (?, ?)", ((loop, sink) for sink in sinks)
        )

    def count_waiting(self, loop: int, sink: str) -> int:
        """How many of a loop's deliveries wait for a sink."""
        row = self.first("SELECT waiting FROM tallies WHERE loop = ? AND sink = ?", loop, sink)
        return row[0] if row else 0

    def losses(self, loop: int, now: float) -> list[tuple[str, int, float]]:
        """What reached no sink in the last day and is not acknowledged: reason code, count, last time."""
        return self.execute(
            "SELECT reason_code, count, last_at FROM losses WHERE loop = ? AND acknowledged_at IS NULL "
            "AND last_at > ? ORDER BY last_at",
            *(loop, now - LOSS_SHOWN),
        )

    def hours(self, loop: int, now: float) -> dict[str, dict[int, tuple[int, int]]]:
        """What was delivered to a loop's sinks in each of the last 24 hours, and the attempts that failed: by
        sink, and by hours since the epoch."""
        found: dict[str, dict[int, tuple[int, int]]] = {}
        rows = self.execute(
            "SELECT sink, hour, delivered, failed FROM hours WHERE loop = ? AND hour > ?",
            *(loop, int(now // 3600) - 24),
        )
        for sink, hour, delivered, failed in rows:
            found.setdefault(sink, {})[hour] = delivered, failed
        return found

    def acknowledge(self, loop: int, now: float) -> None:
        """Note that an operator has seen the losses of a loop."""
        self.execute(
            "UPDATE losses SET acknowledged_at = ? WHERE loop = ? AND acknowledged_at IS NULL", now, loop
        )

    def stuck_at(self, loop: int, sink: str) -> tuple[str, int] | None:
        """Segment and line of the first record that a sink has answered with an error SAME_RECORD_ATTEMPTS
        times. Every such delivery has a `not_before`, which keeps the query short."""
        row: tuple[str, int] | None = self.first(
            "SELECT e.segment, e.line FROM deliveries d INDEXED BY waiting "
            "JOIN escalations e ON e.id = d.escalation WHERE d.status = 'waiting' AND d.sink = ? "
            "AND d.loop = ? AND d.not_before > 0 AND d.attempts >= ? "
            "AND (d.http_status >= 500 OR d.fault = 'timeout') ORDER BY d.escalation LIMIT 1",
            *(sink, loop, SAME_RECORD_ATTEMPTS),
        )
        return row

    # -- what operators name

    def dead_letters(self, loop: int) -> list[Selectable]:
        """The dead letters of a loop, in the order of ingestion."""
        dead = "SELECT escalation FROM deliveries INDEXED BY dead WHERE status = 'dead' AND loop = ?"
        return self._selectable(loop, f"e.id IN ({dead}) AND d.status = 'dead'", loop)

    def waiting_for(self, loop: int, sink: str) -> list[Selectable]:
        """What waits of a loop for a sink."""
        waiting = f"SELECT escalation FROM {WAITING} AND sink = ?"
        condition = f"e.id IN ({waiting}) AND d.status = 'waiting' AND d.sink = ?"
        return self._selectable(loop, condition, sink, sink)

    def on_lines(self, loop: int, segment: str, first: int, last: int) -> list[Selectable]:
        """The deliveries of a loop's escalations on these lines of a segment, in the order of ingestion."""
        return self._selectable(loop, "e.segment = ? AND e.line BETWEEN ? AND ?", segment, first, last)

    def with_id(self, loop: int, escalation_id: str) -> list[Selectable]:
        """The deliveries of a loop's escalations with this id, in the order of ingestion."""
        return self._selectable(loop, "e.escalation_id = ?", escalation_id)

    def _selectable(self, loop: int, condition: str, *values: object) -> list[Selectable]:
        """The escalations of a loop for which a condition holds, one for each of their sinks. In the
        condition `e` is the escalation, `d` the delivery that leads for its sink."""
        rows = self.execute(
            f"SELECT {SELECTABLE_COLUMNS} FROM escalations e LEFT JOIN deliveries d ON d.escalation = e.id "
            f"AND d.lead WHERE e.loop = ? AND e.unusable IS NULL AND {condition} ORDER BY e.id",
            *(loop, *values),
        )
        return [Selectable(*row) for row in rows]

    def latest(
        self, loop_id: str | None, category: str | None, since: float, before: int
    ) -> list[tuple[str, QueuedEscalation, list[QueuedDelivery]]]:
        """The last READ_AT_ONCE escalations before number `before` that were ingested since a time, of one
        loop or all, of one category or all, the last one first: loop id, escalation, deliveries."""
        condition = "(?2 IS NULL OR e.category = ?2) AND e.ingested_at >= ?3 AND e.id < ?4"
        return self._last_first(loop_id, condition, category, since, before)

    def with_id_prefix(
        self, loop_id: str | None, prefix: str
    ) -> list[tuple[str, QueuedEscalation, list[QueuedDelivery]]]:
        """The last READ_AT_ONCE escalations of one loop or all whose id begins like this, as `latest` gives
        them."""
        return self._last_first(loop_id, "substr(e.escalation_id, 1, ?2) = ?3", len(prefix), prefix)

    def _last_first(
        self, loop_id: str | None, condition: str, *values: object
    ) -> list[tuple[str, QueuedEscalation, list[QueuedDelivery]]]:
        rows = self.execute(
            f"SELECT l.loop_id, {ESCALATION_COLUMNS} FROM escalations e JOIN loops l ON l.id = e.loop "
            f"WHERE e.unusable IS NULL AND (?1 IS NULL OR l.loop_id = ?1) AND {condition} "
            f"ORDER BY e.id DESC LIMIT {READ_AT_ONCE}",
            *(loop_id, *values),
        )
        found = [(name, QueuedEscalation(*row)) for name, *row in rows]
        return [(name, stored, self.deliveries_of(stored)) for name, stored in found]

    def kept_ids(self) -> set[str]:
        """The ids of all escalations that are in the queue."""
        rows = self.execute("SELECT escalation_id FROM escalations WHERE unusable IS NULL")
        return {identity for [identity] in rows}

    def failing_sinks(self) -> set[str]:
        """The sinks whose destinations, as they were used last, all fail."""
        rows = self.execute("SELECT DISTINCT sink FROM destinations")
        return {
            sink
            for [sink] in rows
            if all(known.consecutive_failures for known in self.destinations_of(sink).values())
        }

    def lead(self, escalation: int, sink: str) -> QueuedDelivery | None:
        """The delivery of an escalation that leads for a sink."""
        found = self._deliveries("d.escalation = ? AND d.sink = ? AND d.lead", escalation, sink)
        return found[0] if found else None

    def requeue(self, escalation: int, sink: str, peers: Collection[str], loop: int, severity: int) -> None:
        """Let an escalation wait for each peer of a sink, which is tried now: an operator asked for it."""
        now = time.time()
        found = self.execute(
            "SELECT peer FROM deliveries WHERE escalation = ? AND sink = ?", escalation, sink
        )
        if {peer for [peer] in found} != set(peers):
            self.execute("DELETE FROM deliveries WHERE escalation = ? AND sink = ?", escalation, sink)
            self.add_deliveries(
                [
                    (escalation, sink, peer, loop, severity, int(place == 0), now)
                    for place, peer in enumerate(peers)
                ]
            )
        self.execute(
            "UPDATE deliveries SET status = 'waiting', severity = ?, waiting_since = ?, not_before = 0, "
            "in_flight = 0, alone = 0, by_operator = 1, reason_code = NULL, fault = NULL, "
            "http_status = NULL, message = NULL WHERE escalation = ? AND sink = ?",
            *(severity, now, escalation, sink),
        )
        self.execute("UPDATE escalations SET settled_at = NULL WHERE id = ?", escalation)
        self.execute("UPDATE destinations SET next_attempt_at = 0 WHERE sink = ?", sink)

    def forget_failures(self, sink: str) -> None:
        """Let the next delivery to a sink be tried as if nothing had failed, if nothing waits for it."""
        self.execute(
            "UPDATE destinations SET next_attempt_at = 0, consecutive_failures = 0, backoff_step = 0, "
            "failing_since = NULL WHERE sink = ?1 AND NOT EXISTS "
            f"(SELECT 1 FROM {WAITING} AND deliveries.sink = ?1 AND deliveries.peer = destinations.peer)",
            sink,
        )

    # -- rows on their way, and the retention

    def write_row(self, loop: int, file: str, row: bytes) -> None:
        """Put a row on its way into a file."""
        self.execute("INSERT INTO outbox (loop, file, row) VALUES (?, ?, ?)", loop, file, row)

    def outbox(self, loop: int, limit: int = OUTBOX_ROWS) -> list[tuple[int, str, bytes]]:
        """The rows of a loop that are on their way: number, file, row."""
        return self.execute(
            "SELECT id, file, row FROM outbox WHERE loop = ? ORDER BY id LIMIT ?", loop, limit
        )

    def clear_outbox(self, loop: int, up_to: int) -> None:
        self.execute("DELETE FROM outbox WHERE loop = ? AND id <= ?", loop, up_to)

    def purge(self, *, more: Callable[[], bool]) -> None:
        """Remove settled escalations that are older than the retention, or too many, while `more` says so;
        not those with a dead letter, unless there are too many. Returns their pages to the file system."""
        now = time.time()
        while more():
            with self.transaction():
                [ids] = self.first("SELECT max(id) - min(id) FROM escalations")
                too_many = 0
                if (ids or 0) > RETENTION_COUNT:  # else it need not be counted
                    count = "SELECT count(*) FROM escalations WHERE settled_at IS NOT NULL"
                    too_many = min(max(0, self.first(count)[0] - RETENTION_COUNT), 1000)
                old = self.execute(
                    "SELECT id FROM escalations e INDEXED BY settled WHERE settled_at < ? AND reported "
                    "AND NOT EXISTS (SELECT 1 FROM deliveries WHERE escalation = e.id AND status = 'dead') "
                    "LIMIT 1000",
                    now - RETENTION_SECONDS,
                )
                if not old and too_many:
                    old = self.execute(
                        "SELECT id FROM escalations INDEXED BY settled WHERE settled_at IS NOT NULL "
                        "AND reported ORDER BY settled_at LIMIT ?",
                        too_many,
                    )
                if not old:
                    break
                self.execute_many("DELETE FROM deliveries WHERE escalation = ?", old)
                self.execute_many("DELETE FROM escalations WHERE id = ?", old)
            self.tidy()
        with self._locked():
            self.execute("DELETE FROM hours WHERE hour < ?", int(now // 3600) - 24)
            # No window is longer than the retention.
            self.execute(
                "DELETE FROM last_sent WHERE julianday(written_at) < julianday(?, 'unixepoch')",
                now - RETENTION_SECONDS,
            )
            # Of a destination whose URL has changed since: `destinations_of` gives the last one.
            self.execute(
                "DELETE FROM destinations AS old WHERE used_at < ? AND EXISTS (SELECT 1 FROM destinations "
                "WHERE sink = old.sink AND peer = old.peer AND used_at > old.used_at)",
                now - RETENTION_SECONDS,
            )
            with self._errors():
                # As a script: `execute` would stop after one page, which is a row without columns.
                self._db.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")


class Transaction:
    """One transaction of the queue; within another one, a part of that. See `Queue.transaction`. It is a
    class because a generator would cost each delivery more than the lock does."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def __enter__(self) -> None:
        self._queue.begin()

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._queue.end(commit=error is None)


def marks(values: Collection[object]) -> str:
    """`?, ?, ?`: a mark for each of these values."""
    return ", ".join("?" * len(values))


def quote_path(path: str) -> str:
    """A path as SQLite's URIs have it."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def has_wal(path: str) -> bool:
    """Tell whether a queue has a write-ahead log with something in it: it is in use, or a pass was killed."""
    found = stat_of(f"{path}-wal")
    return found is not None and found.st_size > 0


def foreign_file(path: str) -> StateError:
    """The error for a file that belongs to another program."""
    return StateError(
        f"{path} is not a queue of this program; it is left as it is",
        ["name another file with --queue-file, or one that is not there yet"],
    )


# ---------------------------------------------------------------------------------------------------------
# Adapters: what each type of sink is sent, and what its answers mean
# ---------------------------------------------------------------------------------------------------------
# Pure: deliveries in, a request out; an answer in, a verdict out. Nothing here connects, waits or writes.
# A new type needs an adapter in `ADAPTERS`, at the end, and a part of the schema. If it is a cluster, it also
# belongs in CLUSTER_TYPES; its variables belong in VARIABLE_KEYS. For people, the types are listed in the
# docstrings of the module and of `cli`, and in README.

# The longest wait, in seconds, that a sink can ask for with Retry-After.
RETRY_AFTER_MAX = 3600.0


def host_of(url: str) -> str:
    """The host and port of a URL, without its secrets. The scheme's usual port is left out.

    Raises ValueError for a malformed URL.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = parts.hostname or "the sink"
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{host}:{parts.port}" if parts.port not in (None, usual) else host


class Origin(NamedTuple):
    """Where a payload comes from, and when.

    `emitted_at`: seconds since the epoch, by our clock. `clock_offset`: how many seconds the sink's clock is
    ahead of ours; 0 if that is too little to matter.
    """

    repo_path: str
    trace_id: str
    emitted_at: float
    clock_offset: float = 0.0


# Seconds. `status` reports clocks that differ by more: signatures and the end of an alert depend on them.
CLOCK_TOLERANCE = 60.0


def clock_correction(clock_offset: float | None) -> float:
    """How many seconds a sink's clock is ahead of ours, rounded to minutes; 0.0 if that is unknown or too
    little to matter."""
    if clock_offset is None or abs(clock_offset) <= CLOCK_TOLERANCE:
        return 0.0
    return round(clock_offset / 60) * 60.0


class HttpRequest(NamedTuple):
    """What is sent to a sink: a POST with a JSON body."""

    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """A sink's answer: its status, its headers (names in lower case), and the first 64 KB of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace").strip()

    @property
    def content(self) -> object:
        """The body's JSON value; its text if it is not JSON."""
        try:
            return decode_json(self.text)
        except ValueError:
            return self.text


TRY_LATER = {408, 425, 429}
# The sink may have acted on the request, although its gateway got no usable answer.
GATEWAY_FAULTS = {502, 504}
RECORD_REFUSED = {400, 413, 422}
# Statuses, besides those of TRY_LATER and RECORD_REFUSED, that say why a request was refused.
STATUS_FAULTS: dict[int, FaultCode] = {
    **dict.fromkeys((401, 403), "unauthorized"),
    **dict.fromkeys((404, 405, 410), "not_found"),
    407: "proxy_login",
}
# How web servers (nginx, Apache, Go) say, with a 400, that a port speaks TLS.
PLAIN_TO_TLS = r"(?i)plain HTTP (request was sent )?to (an )?(HTTPS|SSL)|HTTP request to an HTTPS server"


def judge_status(answer: Answer, now: float) -> Verdict:
    """Judge an answer by its status (RFC 9110, section 15). `now`: seconds since the epoch."""
    status, message = answer.status, answer.text or None
    if 200 <= status < 300:
        return Verdict("delivered", None, status, message)
    wait = parse_retry_after(answer.headers.get("retry-after"), now)
    outcome: Outcome = "misconfigured"
    fault: FaultCode = STATUS_FAULTS.get(status, "rejected")
    if status in TRY_LATER or status >= 500:
        outcome, fault = "retry", "rate_limited" if status == 429 else "server_error"
    elif status >= 400 and wait is not None:  # the sink asks for the same request later
        outcome, fault = "retry", "rate_limited"
    elif status == 400 and re.search(PLAIN_TO_TLS, answer.text):
        fault = "wrong_scheme"
    elif status in RECORD_REFUSED:
        outcome, fault = "dead_letter", "record_refused"
    elif 300 <= status < 400:
        message = "answered with a redirect, which is never followed: set the URL that it leads to"
        fault = "redirect"
    retry = outcome == "retry"
    not_taken = retry and status not in GATEWAY_FAULTS
    return Verdict(
        outcome, "http_error", status, message, wait if retry else None, not_taken=not_taken, fault=fault
    )


# How much of a complaint is searched: its subject comes first, and to search 64 KB may take minutes.
COMPLAINT_CHARACTERS = 500


def complaints(answer: Answer) -> list[str]:
    """The complaints in an error answer, without what they quote of the request.

    PagerDuty, "Send an alert event", 400: `{"status": "…", "message": "…", "errors": ["…"]}`. Others use
    `error` or `msg`, objects by the name of a field, or plain text.
    """
    content = answer.content
    fields = mapping(content)
    waiting = [
        content if isinstance(content, str) else None,
        *(fields.get(key) for key in ("message", "errors", "error", "msg")),
    ]
    found: list[str] = []
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.append(re.sub(r"\S*custom_details\S*", "", item[:COMPLAINT_CHARACTERS].partition("{")[0]))
        elif isinstance(item, dict):  # `{"routing_key": ["is invalid"]}`: the name belongs to the complaint
            waiting += [key for key, listed in item.items() if isinstance(listed, list)]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return found


@functools.lru_cache(maxsize=16)
def parse_http_date(text: str) -> float | None:
    """Read an HTTP-date (RFC 9110, section 5.6.7) as seconds since the epoch; None for any other text."""
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Read a `Retry-After` as seconds from `now`, 0 to RETRY_AFTER_MAX; None if it is missing or malformed.

    RFC 9110, section 10.2.3: seconds or an HTTP-date. Some servers write a fraction, which is rounded up.
    """
    value = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", value):
        seconds = float(value)  # infinite if it has hundreds of digits
        seconds = seconds if seconds > RETRY_AFTER_MAX else float(-(-seconds // 1))
    else:
        moment = parse_http_date(value)
        if moment is None:
            return None
        seconds = moment - now
    return min(max(seconds, 0.0), RETRY_AFTER_MAX)


class Adapter:
    """What a type of sink is sent, and what its answers mean.

    A subclass defines `payload`, which puts the escalation's id into every payload. All else has a default.
    """

    url_key: ClassVar[str] = "urlEnv"
    # The config key of the secret that lets us in. If there is none, the URL is that secret.
    credential_key: ClassVar[str] = "authTokenEnv"
    default_url: ClassVar[str | None] = None
    # How many requests the provider allows in any minute; the config can say otherwise. A sixth of them may
    # go out at once: see `Pace`.
    max_per_minute: ClassVar[int | None] = None
    # Whether a payload says when its alert ends. The sink compares that with its own clock.
    ends_by_clock: ClassVar[bool] = False

    def url(self, sink: Sink) -> str:
        """The sink's URL, or the URLs of a cluster's peers; empty if the variable is unset."""
        return sink.secrets.get(self.url_key) or self.default_url or ""

    def peers(self, sink: Sink) -> dict[str, str]:
        """The URL of each peer of a cluster, by `host:port`. Each peer is sent everything, and it is enough
        if one of them takes it. Any other sink is one peer, named ""."""
        return {"": self.url(sink)}

    def target(self, sink: Sink, url: str) -> list[str]:
        """What identifies the destination at a URL. If any of it changes, it is another destination."""
        return [sink.type, url]

    def seconds_to_catch_up(self, sink: Sink) -> float:  # noqa: ARG002
        """For how many seconds a peer that missed an escalation should still get it."""
        return 0.0

    def missing_secrets(self, sink: Sink) -> list[str]:
        """The variables of this sink that are unset."""
        return [name for key, name in sink.secret_refs.items() if key not in sink.secrets]

    def batch_size(self, sink: Sink) -> int:  # noqa: ARG002
        """How many deliveries one request may hold."""
        return 1

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
        """The request for at most `batch_size` deliveries, the oldest first."""
        return HttpRequest(configured_headers(sink), self.payload(sink, deliveries, origin))

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:
        """The JSON body of that request."""
        raise NotImplementedError

    def judge(self, answer: Answer, now: float) -> Verdict:
        """What an answer means. `now`: seconds since the epoch."""
        # No provider answers an alert with a web page: it comes from a login or a proxy.
        if 200 <= answer.status < 300 and answer.text.startswith("<"):
            message = (
                "answered with a web page: the URL is not that of such a sink, or something stands before it"
            )
            return Verdict("misconfigured", "http_error", answer.status, message, fault="wrong_receiver")
        return judge_status(answer, now)


def configured_headers(sink: Sink) -> dict[str, str]:
    """The headers of a sink's config, its token, and the type of the body."""
    secret = {
        key.partition(".")[2]: value
        for key, value in sink.secrets.items()
        if kind_of_variable(key) == "header"
    }
    headers = {**sink.settings.get("headers", {}), **secret, "Content-Type": "application/json"}
    if token := sink.secrets.get("authTokenEnv"):
        headers["Authorization"] = f"Bearer {token}"
    return headers


class WebhookAdapter(Adapter):
    """A JSON envelope, with the headers of Standard Webhooks 1.0 (standardwebhooks.com).

    "Webhook headers": `webhook-id` is the idempotency key, the same on every try; `webhook-timestamp` says
    when it was sent, in seconds. "Signature scheme": `webhook-signature` is `v1,` and the base64 of the
    HMAC-SHA256 of `id.timestamp.body`; while a key is rotated there is one for each key, separated by spaces.
    """

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:
        [delivery] = deliveries
        escalation = delivery.escalation
        envelope = {
            "schemaVersion": SCHEMA_VERSION,
            "emittedAt": iso(origin.emitted_at),
            "source": {
                "repoPath": origin.repo_path,
                "loopId": escalation.loop_id,
                "channel": "ops_manager_alert_dispatch",
                "traceId": origin.trace_id,
            },
            "event": {
                "category": escalation.category,
                "severity": delivery.resolution.event_severity,
                **held_back_fields(delivery),
            },
            "sink": {"id": sink.id, "type": sink.type},
        }
        return encode_with_record(envelope, escalation)

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
        request = super().build(sink, deliveries, origin)
        message_id, sent = deliveries[0].escalation.id, str(int(origin.emitted_at))
        headers = {**request.headers, "webhook-id": message_id, "webhook-timestamp": sent}
        if secret := sink.secrets.get("signingSecretEnv"):
            signed = f"{message_id}.{sent}.".encode() + request.body
            headers["webhook-signature"] = " ".join(signature(key, signed) for key in signing_keys(secret))
        return request._replace(headers=headers)

    def judge(self, answer: Answer, now: float) -> Verdict:
        """A receiver may answer with any text, even with a web page."""
        return judge_status(answer, now)


def signature(key: bytes, signed: bytes) -> str:
    """A signature in the format of Standard Webhooks."""
    import hmac
    from base64 import b64encode

    return f"v1,{b64encode(hmac.digest(key, signed, 'sha256')).decode()}"


def held_back_fields(delivery: Delivery) -> JsonObject:
    """The number of repeats that were held back, and since when; empty if there are none."""
    if not delivery.repeats:
        return {}
    return {"heldBackCount": delivery.repeats, "heldBackSince": shown(delivery.repeats_since)}


def held_back_text(delivery: Delivery) -> str:
    """`and 14 repeats held back since 2026-03-01T12:00:00Z`."""
    since = shown(delivery.repeats_since, 40) or "?"
    return f"and {plural(delivery.repeats, 'repeat')} held back since {since}"


SEVERITY_EMOJI = {"info": "\N{INFORMATION SOURCE}\ufe0f", "warning": "⚠️", "critical": "🚨"}


def headline(delivery: Delivery, limit: int) -> str:
    """What is wrong and where, in one line: `[critical] health_critical on demo-loop: ingest_stale`.

    At most `limit` characters long. Its end, which says what was held back, is never cut off.
    """
    escalation = delivery.escalation
    what = ", ".join(reason_codes(escalation)) or details_of(escalation)[0]
    where = f"{shown(escalation.category, 100)} on {shown(escalation.loop_id, 100)}"
    tail = f" ({held_back_text(delivery)})" if delivery.repeats else ""
    return cut(f"[{delivery.resolution.event_severity}] {where}: {what}", limit - len(tail)) + tail


def facts_of(delivery: Delivery, origin: Origin) -> list[str]:
    """The facts below the reasons: severity, loop, time, transport, trace."""
    escalation = delivery.escalation
    facts = [
        delivery.resolution.event_severity,
        f"loop {shown(escalation.loop_id)}",
        shown(escalation.timestamp),
        f"transport {shown(escalation.body.get('transport')) or 'unknown'}",
        f"trace {shown(escalation.trace_id) or shown(origin.trace_id)}",
    ]
    return [fact for fact in facts if fact]


def bullets(
    lines: Sequence[str],
    limit: int,
    escape: Callable[[str, int], str],
    most: int | None = None,
    length: Callable[[str], int] = len,
    more: int = 0,
) -> str:
    """A list of at most `most` lines, as one text of at most `limit` characters. Its last line says how many
    more there are. `more`: those that `lines` leaves out.

    `escape`: escapes a text for the sink, and cuts it to a number of characters. `length`: counts characters
    as the sink does.
    """
    kept: list[str] = []
    room = limit - len("… and 9999999 more")
    for index, line in enumerate(lines):
        text = escape(f"• {line}", max(room, 1))
        if length(text) > room or room < 20 or index == most:
            kept.append(f"… and {len(lines) - index + more} more")
            break
        kept.append(text)
        room -= length(text) + 1
    else:
        kept += [f"… and {more} more"] if more else []
    return "\n".join(kept)


def cut_identity(text: str, limit: int) -> str:
    """Make an identifier printable and at most `limit` characters long. If that changes it, it ends in a hash
    of the original, so that different identifiers stay different."""
    plain = printable(text)
    if plain == text and len(text) <= limit:
        return text
    mark = short_hash(text.encode("utf-8", "surrogatepass"))
    return f"{plain[: limit - len(mark) - 1]}:{mark}"


# Slack, "Block Kit reference", header and section blocks; "chat.postMessage", `text`. Characters are counted
# as they are sent, with entities.
SLACK_HEADER = 150
SLACK_SECTION = 3000
SLACK_TEXT = 4000
# A phone shows this text. It fits in SLACK_TEXT even if each character becomes an entity.
SLACK_HEADLINE = 600
# One line of a digest, which people read at a glance.
SLACK_DIGEST_LINE = 450

# So that no name in the fallback text becomes a mention, and no address a preview. Slack, "Formatting text
# for app surfaces", "Disabling automatic parsing", and "Unfurling links in messages".
SLACK_AS_WRITTEN = {
    "mrkdwn": False,
    "parse": "none",
    "link_names": False,
    "unfurl_links": False,
    "unfurl_media": False,
}

# Slack, "Sending messages using incoming webhooks", "Handling errors"; some have other names in
# "chat.postMessage", "Errors".
SLACK_ERRORS: dict[FaultCode, str] = {
    "not_found": "no_service no_service_id no_team team_disabled no_active_hooks",
    "channel": (
        "action_prohibited posting_to_general_channel_denied restricted_action channel_not_found "
        "channel_is_archived is_archived not_in_channel user_not_found"
    ),
    "unauthorized": (
        "invalid_token invalid_auth not_authed token_expired token_revoked missing_scope account_inactive "
        "team_access_not_granted"
    ),
    "record_refused": (
        "invalid_payload invalid_blocks invalid_blocks_format invalid_attachments no_text msg_too_long "
        "msg_blocks_too_long too_many_attachments missing_text_or_fallback_or_attachments "
        "attachment_payload_limit_exceeded"
    ),
    "rate_limited": "rollup_error ratelimited rate_limited message_limit_exceeded",
    "server_error": "internal_error fatal_error service_unavailable request_timeout",
}
SLACK_FAULTS = {word: fault for fault, words in SLACK_ERRORS.items() for word in words.split()}
# Slack says that it may have posted the message before one of these errors.
SLACK_UNSURE_ERRORS = {"internal_error", "fatal_error"}
# How other programs that take Slack's messages (Mattermost, Rocket.Chat, Discord, Zulip) say, with a 400,
# that a webhook was deleted.
WEBHOOK_GONE = (
    r"(?i)(?=.*\b(invalid|unknown|disabled|deleted|expired|revoked|not found|(could ?n.t|cannot) find|"
    r"does not exist)\b)(?=.*\b(webhooks?|integration|api key|channel)\b)"
)


class SlackAdapter(Adapter):
    """A message to a Slack incoming webhook: a header, what a person needs to know, and where it comes from.

    Several deliveries make a digest: counts, then a line for each, the worst first. The `block_id` of a
    message's header, or of a digest's line, is the escalation's id (Slack, "Block Kit reference": up to 255
    characters, each once in a message).
    """

    url_key = "webhookUrlEnv"
    # Slack, "Rate limits": an incoming webhook takes one message a second, and short bursts.
    max_per_minute = 60

    def batch_size(self, sink: Sink) -> int:
        return int(sink.settings.get("maxPerMessage", 1))

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:
        single = len(deliveries) == 1
        message = slack_message(deliveries[0], origin) if single else slack_digest(deliveries, origin)
        message |= SLACK_AS_WRITTEN
        for key, name in (("channel", "channel"), ("username", "username"), ("iconEmoji", "icon_emoji")):
            if key in sink.settings:
                message[name] = sink.settings[key]
        return encode_json(message)

    def judge(self, answer: Answer, now: float) -> Verdict:
        """The error that Slack names in the body says more than the status.

        A webhook answers `ok`. A program that passes messages on to Slack may answer as Slack's Web API does,
        with 200 and `{"ok": false, "error": …}`: then the error counts.
        """
        error, verdict = slack_error(answer), super().judge(answer, now)
        fault = SLACK_FAULTS.get(error or "")
        if fault is None:
            if error and verdict.outcome == "delivered":
                return Verdict("dead_letter", "http_error", answer.status, error, fault="record_refused")
            if verdict.fault == "record_refused" and any(
                re.match(WEBHOOK_GONE, complaint) for complaint in complaints(answer)
            ):
                return verdict._replace(outcome="misconfigured", fault="not_found")
            return verdict
        failed = Verdict("misconfigured", "http_error", answer.status, error, fault=fault)
        if fault == "record_refused":
            return failed._replace(outcome="dead_letter")
        if fault in ("rate_limited", "server_error"):
            wait = parse_retry_after(answer.headers.get("retry-after"), now)
            not_taken = error not in SLACK_UNSURE_ERRORS
            return failed._replace(outcome="retry", retry_after=wait, not_taken=not_taken)
        return failed


def slack_error(answer: Answer) -> str | None:
    """The error that an answer names, in JSON or as one of Slack's words; None if it names none."""
    fields = mapping(answer.content)
    if fields.get("ok") is False:
        return as_text(fields.get("error")) or answer.text
    return answer.text if answer.text in SLACK_FAULTS else None


def slack_message(delivery: Delivery, origin: Origin) -> JsonObject:
    """One escalation: category and loop, what is wrong, then time, transport and trace."""
    escalation, severity = delivery.escalation, delivery.resolution.event_severity
    title = f"{SEVERITY_EMOJI[severity]} {shown(escalation.category, 80)} on {shown(escalation.loop_id, 60)}"
    blocks = [
        slack_header(title) | {"block_id": escalation.id},
        slack_section(
            bullets(details_of(escalation), SLACK_SECTION, slack_escape, more=left_out(escalation))
        ),
        slack_context(facts_of(delivery, origin)),
    ]
    if delivery.repeats:
        blocks.insert(2, slack_section(slack_escape(held_back_text(delivery), SLACK_SECTION)))
    return {
        "text": slack_escape(f"{SEVERITY_EMOJI[severity]} {headline(delivery, SLACK_HEADLINE)}", SLACK_TEXT),
        "blocks": blocks,
    }


def slack_digest(deliveries: Sequence[Delivery], origin: Origin) -> JsonObject:
    """Several escalations: how many of each severity and category, then a line for each, the worst first."""
    worst_first = sorted(deliveries, key=lambda delivery: delivery.resolution.severity, reverse=True)
    worst = worst_first[0]
    severities = count_words(delivery.resolution.event_severity for delivery in worst_first)
    categories = count_words(shown(delivery.escalation.category, 60) for delivery in worst_first)
    loops = list(dict.fromkeys(shown(delivery.escalation.loop_id, 60) for delivery in deliveries))
    emoji = SEVERITY_EMOJI[worst.resolution.event_severity]
    title = f"{emoji} {plural(len(deliveries), 'escalation')}: {severities}"
    counts = slack_escape(f"on {', '.join(loops)}: {categories}", SLACK_SECTION)
    blocks = [slack_header(title), slack_section(counts)]
    seen = Counter[str]()
    for delivery in worst_first:
        identity = delivery.escalation.id
        # Equal lines of the source have the same id, and Slack takes a block_id only once.
        seen[identity] += 1
        block_id = identity if seen[identity] == 1 else f"{identity}:{seen[identity]}"
        line = slack_section(slack_digest_line(delivery, name_loop=len(loops) > 1))
        blocks.append(line | {"block_id": block_id})
    oldest, newest = (shown(deliveries[index].escalation.timestamp) or "?" for index in (0, -1))
    blocks.append(slack_context([f"{oldest} to {newest}", f"trace {shown(origin.trace_id)}"]))
    text = f"{title}. The worst: {headline(worst, SLACK_HEADLINE)}"
    return {"text": slack_escape(text, SLACK_TEXT), "blocks": blocks}


def slack_digest_line(delivery: Delivery, *, name_loop: bool) -> str:
    """`🚨 health_critical · 2026-03-01T12:00:00Z · ingest_stale: …`, then what was held back."""
    escalation = delivery.escalation
    emoji = SEVERITY_EMOJI[delivery.resolution.event_severity]
    where = f" on {shown(escalation.loop_id, 60)}" if name_loop else ""
    parts = [
        f"{emoji} {shown(escalation.category, 80)}{where}",
        shown(escalation.timestamp, 40),
        "; ".join(details_of(escalation)),
    ]
    tail = f" · {held_back_text(delivery)}" if delivery.repeats else ""
    tail = slack_escape(tail, SLACK_DIGEST_LINE // 2)
    return slack_escape(" · ".join(filter(None, parts)), SLACK_DIGEST_LINE - len(tail)) + tail


def count_words(words: Iterable[str]) -> str:
    """`2 critical, 10 warning`, in the order in which they first occur."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def slack_header(text: str) -> JsonObject:
    return {"type": "header", "text": slack_text(slack_escape(text, SLACK_HEADER))}


def slack_section(escaped: str) -> JsonObject:
    return {"type": "section", "text": slack_text(escaped)}


def slack_context(parts: Iterable[str | None]) -> JsonObject:
    return {
        "type": "context",
        "elements": [slack_text(slack_escape(" · ".join(filter(None, parts)), SLACK_SECTION))],
    }


SLACK_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def slack_escape(text: str, limit: int) -> str:
    """Escape text for Slack and cut it to `limit` characters as sent, never within an entity.

    Slack, "Formatting text for app surfaces", "Escaping text": `&`, `<` and `>` make mentions and links.
    """
    text = printable(text)
    escaped = text.translate(SLACK_ENTITIES)
    if len(escaped) <= limit:
        return escaped
    room, kept = limit - len("…"), 0
    while room >= (needed := len(text[kept].translate(SLACK_ENTITIES))):
        room -= needed
        kept += 1
    return text[:kept].translate(SLACK_ENTITIES) + "…"


def slack_text(text: str) -> JsonObject:
    """A text object, for escaped text. A record's text is shown as it is, and can be copied.

    Slack, "Text object": in `plain_text`, unlike in `mrkdwn`, nothing is a format, a link or a mention;
    without `emoji`, no `:name:` becomes a picture.
    """
    return {"type": "plain_text", "text": text, "emoji": False}


# Discord, "Execute Webhook": content of up to 2,000 characters. It does not say how it counts them. We count
# UTF-16 code units, of which an emoji has two: a count of characters is never higher.
DISCORD_CONTENT = 2000
DISCORD_HEADLINE = 200
DISCORD_FACT = 120
# Discord, "JSON Error Codes": unknown webhook; invalid webhook token.
DISCORD_FAULTS: dict[str, FaultCode] = {"10015": "not_found", "50027": "unauthorized"}


class DiscordAdapter(Adapter):
    """A message to a Discord webhook: a headline, and below it a code block with what a person needs to know.

    In a code block nothing is a format, a link or a mention. The headline comes before it, because a phone
    shows the beginning of a message.
    """

    url_key = "webhookUrlEnv"
    # Discord gives no figure and answers 429; users report 30 messages a minute for a webhook.
    max_per_minute = 30

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:  # noqa: ARG002
        [delivery] = deliveries
        escalation = delivery.escalation
        emoji = SEVERITY_EMOJI[delivery.resolution.event_severity]
        head = f"{emoji} {discord_escape(headline(delivery, DISCORD_HEADLINE))}\n```\n"
        facts = [discord_block_text(fact, DISCORD_FACT) for fact in facts_of(delivery, origin)]
        tail = "\n".join(["", "", *facts, f"id {escalation.id}", "```"])
        room = DISCORD_CONTENT - utf16_length(head + tail)
        more = left_out(escalation)
        reasons = bullets(details_of(escalation), room, discord_block_text, length=utf16_length, more=more)
        message = {
            "content": head + reasons + tail,
            # Discord, "Allowed Mentions Object": an empty `parse` lets no text mention anybody.
            "allowed_mentions": {"parse": []},
        }
        return encode_json(message)

    def judge(self, answer: Answer, now: float) -> Verdict:
        """Discord's body has a code for each error, and after a 429 the seconds to wait."""
        verdict, fields = super().judge(answer, now), mapping(answer.content)
        if fault := DISCORD_FAULTS.get(str(fields.get("code"))):
            return Verdict("misconfigured", "http_error", answer.status, verdict.message, fault=fault)
        if verdict.fault == "rate_limited" and verdict.retry_after is None:
            return verdict._replace(retry_after=parse_retry_after(str(fields.get("retry_after")), now))
        return verdict


def discord_escape(text: str) -> str:
    """Escape text for Discord: ASCII punctuation after a backslash makes no format and no link."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(text))


def discord_block_text(text: str, limit: int) -> str:
    """Text for a code block: at most `limit` UTF-16 code units, without the backticks that would end it."""
    text = printable(text).replace("`", "\N{MODIFIER LETTER GRAVE ACCENT}")
    if utf16_length(text) <= limit:
        return text
    # "ignore" drops half a character at the cut.
    return text.encode("utf-16-le")[: 2 * (limit - 1)].decode("utf-16-le", "ignore") + "…"


def utf16_length(text: str) -> int:
    """The length of a text in UTF-16 code units."""
    return len(text.encode("utf-16-le")) // 2


# Microsoft, "Create and send actionable messages": a message of up to 28 KB. A character takes up to four
# bytes, and each line some ninety more.
TEAMS_TEXT = 4000
TEAMS_LINES = 30
TEAMS_HEADLINE = 300
# Colours of an Adaptive Card.
TEAMS_COLOURS = {"info": "Accent", "warning": "Warning", "critical": "Attention"}


class TeamsAdapter(Adapter):
    """An Adaptive Card (version 1.4) for a Microsoft Teams workflow that posts what its webhook receives. The
    workflow answers 202 before Teams shows the card.

    All text is in TextRuns, which show it as it is; a TextBlock would render Markdown.
    """

    url_key = "webhookUrlEnv"
    # Microsoft, "Create and send actionable messages", "Rate limiting": four requests a second. A workflow
    # takes fewer, and people can read one card a second.
    max_per_minute = 60

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:  # noqa: ARG002
        [delivery] = deliveries
        escalation, severity = delivery.escalation, delivery.resolution.event_severity
        title = f"{SEVERITY_EMOJI[severity]} {shown(headline(delivery, TEAMS_HEADLINE), TEAMS_HEADLINE)}"
        reasons = bullets(details_of(escalation), TEAMS_TEXT, shown, TEAMS_LINES, more=left_out(escalation))
        facts = " · ".join([*facts_of(delivery, origin), f"id {escalation.id}"])
        card = {
            "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
            "type": "AdaptiveCard",
            "version": "1.4",
            "msteams": {"width": "Full"},
            "body": [
                teams_text(title, weight="Bolder", size="Medium", color=TEAMS_COLOURS[severity]),
                *(teams_text(line) for line in reasons.split("\n")),
                teams_text(facts, isSubtle=True, size="Small"),
            ],
        }
        attachment = {
            "contentType": "application/vnd.microsoft.card.adaptive",
            "contentUrl": None,
            "content": card,
        }
        return encode_json({"type": "message", "attachments": [attachment]})


def teams_text(text: str, **style: object) -> JsonObject:
    """A line of a card."""
    return {"type": "RichTextBlock", "inlines": [{"type": "TextRun", "text": text, **style}]}


# PagerDuty, "Send an alert event" (Events API v2): an event of 512 KB, taken as 512,000 bytes; a summary of
# 1,024 characters; a dedup_key of 255.
PAGERDUTY_EVENT_BYTES = 512_000
PAGERDUTY_SUMMARY = 1024
PAGERDUTY_DEDUP_KEY = 255
# What PagerDuty calls the key in its complaints.
ROUTING_KEY = r"(?i)(routing|service|integration)[ _-]?key"


class PagerDutyAdapter(Adapter):
    """A `trigger` event of PagerDuty's Events API v2 ("Send an alert event").

    Our severities are among PagerDuty's: info, warning, error and critical. A `timestamp` is ISO 8601.
    """

    default_url = "https://events.pagerduty.com/v2/enqueue"
    credential_key = "routingKeyEnv"
    # PagerDuty, "Events API rate limits": 120 events a minute for an integration key.
    max_per_minute = 120

    def target(self, sink: Sink, url: str) -> list[str]:
        return [*super().target(sink, url), sink.secrets.get("routingKeyEnv", "")]

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:
        [delivery] = deliveries
        escalation, settings = delivery.escalation, sink.settings
        moment = parse_time(escalation.timestamp)
        payload: JsonObject = {
            "summary": headline(delivery, PAGERDUTY_SUMMARY),
            "severity": delivery.resolution.event_severity,
            "source": settings.get("source", "superloop-ops-manager"),
            "timestamp": iso(origin.emitted_at if moment is None else moment),
            "component": settings.get("component", "ops-manager"),
            "group": settings.get("group", "loop-run"),
            "class": settings.get("class", "escalation"),
            "custom_details": {
                "escalation": escalation.body,
                "traceId": cut(origin.trace_id, SHOWN_CHARACTERS),
                "escalationId": escalation.id,
                **held_back_fields(delivery),
            },
        }
        event = {
            "routing_key": sink.secrets.get("routingKeyEnv", ""),
            "event_action": "trigger",
            "dedup_key": dedup_key(escalation, settings.get("dedupBy", "event")),
            "payload": payload,
        }
        body = encode_json(event)
        if len(body) > PAGERDUTY_EVENT_BYTES:
            original = len(encode_json(escalation.body))
            payload["custom_details"] |= {"truncated": True, "originalBytes": original}
            ordered = reasons_first(escalation.body)
            for limits in ABRIDGEMENTS:
                payload["custom_details"]["escalation"] = abridge(ordered, *limits)
                body = encode_json(event)
                if len(body) <= PAGERDUTY_EVENT_BYTES:
                    break
        return body

    def judge(self, answer: Answer, now: float) -> Verdict:
        """A 400 that complains about the routing key means a wrong config, any other 400 a wrong record."""
        verdict = super().judge(answer, now)
        if answer.status == 400 and any(
            re.search(ROUTING_KEY, complaint) for complaint in complaints(answer)
        ):
            return verdict._replace(outcome="misconfigured", message=answer.text, fault="unauthorized")
        return verdict


def dedup_key(escalation: Escalation, by: str) -> str:
    """PagerDuty's `dedup_key`. By `event`: `<loopId>:<category>:<timestamp>`, and each escalation opens an
    alert. By `condition`: `<loopId>:<category>`, and repeats join the open alert."""
    key = f"{escalation.loop_id}:{escalation.category}"
    if by == "event":
        key += f":{escalation.timestamp or escalation.id}"
    return cut_identity(key, PAGERDUTY_DEDUP_KEY)


# How much is kept of a record that is too large: characters of a text, items of a list or object, levels. If
# the event is still too large, the next entry is tried. With the last one, every record fits.
ABRIDGEMENTS = ((4000, 100, 6), (400, 40, 4), (30, 10, 3))


def reasons_first(body: JsonObject) -> JsonObject:
    """A record whose most useful fields come first: reasons, then other known fields, then plain ones."""

    def rank(field: tuple[str, object]) -> tuple[bool, bool, bool]:
        key, value = field
        reason = key in ("category", "reasons", "reasonCodes")
        return not reason, key not in KNOWN_FIELDS, isinstance(value, dict | list)

    return dict(sorted(body.items(), key=rank))


def abridge(value: object, characters: int, items: int, levels: int) -> object:
    """Shorten a JSON value, and say in it how much was left out."""
    if isinstance(value, dict | list):
        if not levels:
            return f"… {len(encode_json(value))} bytes of JSON left out"
        kept: Any
        if isinstance(value, dict):
            fields = itertools.islice(value.items(), items)
            kept = {
                cut(key, characters): abridge(item, characters, items, levels - 1) for key, item in fields
            }
            return kept | ({"…": f"{len(value) - items} more fields left out"} if len(value) > items else {})
        kept = [abridge(item, characters, items, levels - 1) for item in value[:items]]
        return kept + ([f"… {len(value) - items} more items left out"] if len(value) > items else [])
    text = value if isinstance(value, str) else encode_json(value).decode()
    return value if len(text) <= characters else cut(text, characters)


# Alertmanager has no such limits. These keep a page readable, and a request of a hundred alerts below the
# 1 MB that proxies let through (nginx, client_max_body_size).
ALERT_LABEL = 256
ALERT_SUMMARY = 1024
ALERT_DESCRIPTION = 2048
ALERTS_A_REQUEST = 100

DEFAULT_ACTIVE_FOR = 3600.0
# How much of an alert must be left when it is sent. An alert in a group waits for the group's next
# notification, by default up to 5 minutes (Alertmanager, "Configuration", group_interval). If it ends before
# that, it pages nobody.
ALERT_LEAD_SECONDS = 600.0


class AlertmanagerAdapter(Adapter):
    """Alerts for Prometheus Alertmanager: `POST /api/v2/alerts` to every peer of a cluster.

    Alertmanager, "High Availability": alerts go to all peers, never through a load balancer. The peers
    exchange which notifications were sent, not which alerts they hold.
    """

    ends_by_clock = True

    def peers(self, sink: Sink) -> dict[str, str]:
        """Peers on one host and port have a hash of the rest of their URL in their names, which do not depend
        on the order of the list."""
        peers = secret_parts(sink.type, self.url_key, self.url(sink))
        hosts = Counter(map(host_of, peers))
        named: dict[str, str] = {}
        for peer in peers:
            host = host_of(peer)
            scheme, _, rest = peer.partition("//")
            about = short_hash(f"{scheme}{rest.partition('/')[2]}".encode())
            named[host if hosts[host] == 1 else f"{host}#{about}"] = f"{peer}/api/v2/alerts"
        return named

    def seconds_to_catch_up(self, sink: Sink) -> float:
        """For as long as the alert would end at the same time on that peer as on others: see `_times`."""
        seconds = active_seconds(sink)
        return seconds - min(ALERT_LEAD_SECONDS, seconds / 2)

    def batch_size(self, sink: Sink) -> int:  # noqa: ARG002
        return ALERTS_A_REQUEST

    def payload(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> bytes:
        """To Alertmanager, alerts with the same labels are one alert, and the last one counts. So of these,
        only the last one is sent, from the earliest start to the latest end."""
        alerts: dict[tuple[str, ...], JsonObject] = {}
        for delivery in deliveries:
            alert = self._alert(sink, delivery, origin)
            key = tuple(alert["labels"].values())
            if earlier := alerts.get(key):
                alert["startsAt"] = min(earlier["startsAt"], alert["startsAt"])
                alert["endsAt"] = max(earlier["endsAt"], alert["endsAt"])
            alerts[key] = alert
        return encode_json(list(alerts.values()))

    def _alert(self, sink: Sink, delivery: Delivery, origin: Origin) -> JsonObject:
        escalation = delivery.escalation
        path = origin.repo_path.rstrip("/")
        labels = {
            "alertname": escalation.category,
            "severity": delivery.resolution.event_severity,
            "loop": escalation.loop_id,
            "repo": path.rpartition("/")[2] or "/",
            "source": "ops-manager",
            **sink.settings.get("labels", {}),
        }
        starts, ends = self._times(sink, escalation, origin.emitted_at + origin.clock_offset)
        return {
            "labels": {name: cut_identity(value, ALERT_LABEL) for name, value in labels.items()},
            "annotations": {
                "summary": headline(delivery, ALERT_SUMMARY),
                "description": cut("\n".join(details_of(escalation)), ALERT_DESCRIPTION),
                "escalationId": escalation.id,
                "traceId": shown(escalation.trace_id or origin.trace_id),
            },
            "startsAt": iso(starts),
            "endsAt": iso(ends),
        }

    def _times(self, sink: Sink, escalation: Escalation, sent: float) -> tuple[float, float]:
        """When an alert starts and ends, in seconds since the epoch. `sent`: now, by the sink's clock.

        An alert that is sent on time ends `activeForSeconds` after its record was written, on every peer:
        peers that disagree about the end page again. An alert that is sent late ends `activeForSeconds` after
        it is sent. Otherwise too little would be left for a page, or the end would be past and Alertmanager
        would take the alert for resolved.
        """
        written = parse_time(escalation.timestamp)
        starts = min(sent if written is None else written, sent)
        on_time = sent - starts <= self.seconds_to_catch_up(sink)
        return starts, (starts if on_time else sent) + active_seconds(sink)

    def judge(self, answer: Answer, now: float) -> Verdict:
        """Alertmanager complains about a record in JSON. Other text comes from a proxy or another program.

        Alertmanager, "Alerts API", OpenAPI specification: the body of a 400 is a JSON string. Alertmanager
        has taken the other alerts of the request.
        """
        verdict = super().judge(answer, now)
        if verdict.outcome == "dead_letter" and answer.status in (400, 422):
            try:
                decode_json(answer.text)
            except ValueError:
                message = f"that was no Alertmanager: {answer.text}"
                return verdict._replace(outcome="misconfigured", message=message, fault="wrong_receiver")
        return verdict


def active_seconds(sink: Sink) -> float:
    """How long an alert lasts, in seconds."""
    seconds: float = sink.settings.get("activeForSeconds", DEFAULT_ACTIVE_FOR)
    return seconds


# tests/test_variables.py checks that the schema and README have the same types.
ADAPTERS: dict[str, Adapter] = {
    "webhook": WebhookAdapter(),
    "slack": SlackAdapter(),
    "pagerduty_events": PagerDutyAdapter(),
    "alertmanager": AlertmanagerAdapter(),
    "discord": DiscordAdapter(),
    "teams": TeamsAdapter(),
}


def requests_a_minute(sink: Sink) -> int | None:
    """How many requests a sink may get in a minute; None if it has no limit."""
    per_minute: int | None = sink.settings.get("maxPerMinute", ADAPTERS[sink.type].max_per_minute)
    return per_minute


def deliveries_a_minute(sink: Sink) -> int | None:
    """How many deliveries a sink may get in a minute; None if it has no limit."""
    per_minute = requests_a_minute(sink)
    return per_minute * ADAPTERS[sink.type].batch_size(sink) if per_minute else None


# ---------------------------------------------------------------------------------------------------------
# Sending: one request, one answer, and never longer than `attempt_seconds`
# ---------------------------------------------------------------------------------------------------------
# Knows connections, but neither what is sent nor what an answer means. Never retries, and never follows a
# redirect. The requests library finds proxy and credentials once for a sink; its urllib3 pool then sends each
# request. `Session.post` finds them for each request, and takes three times as long.

# How much of an answer is kept as the message of an attempt.
MESSAGE_CHARACTERS = 300
MAX_ANSWER_BYTES = 64 << 10
# The time limit for one step of connecting: one address, a TLS handshake, or a proxy's answer to CONNECT. By
# default, the resolver waits as long for a silent nameserver (resolv.conf(5), timeout).
STEP_SECONDS = 5.0
# The time limit for everything before the answer: enough for a silent nameserver, a silent first address and
# a slow handshake. timeoutSeconds limits only the answer. If it limited both, a request could be sent again
# and again with too little time left for its answer.
CONNECT_SECONDS = 3 * STEP_SECONDS
# The main thread waits this much longer for an attempt, so that the attempt's own timeouts come first.
TIMEOUT_GRACE = 0.25


def attempt_seconds(timeout: float) -> float:
    """How long one attempt may take, in seconds. `timeout`: the sink's timeoutSeconds."""
    return CONNECT_SECONDS + timeout + TIMEOUT_GRACE


class NoAnswerError(Exception):
    """There is no usable answer. `not_taken`: the sink certainly did not receive the whole request."""

    def __init__(self, fault: FaultCode, message: str, *, not_taken: bool) -> None:
        super().__init__(message)
        self.fault: FaultCode = fault
        self.not_taken = not_taken


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those behind it. urllib3 keeps them as causes, contexts, reasons and arguments."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
        waiting += [item for item in inner if isinstance(item, BaseException)]


def first_cause(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The first exception of some kinds behind an error, or the error itself."""
    return next((cause for cause in causes(error) if isinstance(cause, kinds)), None)


class Client:
    """Sends requests to one URL, over a connection that it keeps open.

    `sink_timeout`: how many seconds the answer may take once the request is sent. `ca_file`: a file or folder
    of CA certificates to trust instead of the usual ones. The first request imports requests, and reads
    proxies and CA certificates from the environment (not from .netrc).
    """

    def __init__(self, url: str, sink_timeout: float, ca_file: str | None = None) -> None:
        self.url = url
        self.timeout = sink_timeout
        self.ca_file = ca_file
        # The host and port of the sink and of its proxy, without secrets. The first request sets these and
        # all below.
        self.host = "the sink"
        self.proxy: str | None = None
        self._pool: HTTPConnectionPool | None = None
        self._target = ""
        self._headers: Mapping[str, str] = {}
        self._options: JsonObject = {}

    def send(self, request: HttpRequest) -> Answer:
        """Send one request and read its answer: the head, and what arrives of the first 64 KB of the body.

        Raises NoAnswerError if there is no complete head.
        """
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError

        pool = self._pool or self._make_pool()
        own = {name.lower() for name in request.headers}
        common = {name: value for name, value in self._headers.items() if name.lower() not in own}
        try:
            response: Any = pool.urlopen(
                "POST", self._target, request.body, {**common, **request.headers}, **self._options
            )
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            fault, message = self._why_no_answer(error)
            raise NoAnswerError(fault, message, not_taken=fault == "unusable_url") from None
        body, complete = b"", False
        try:
            while len(body) < MAX_ANSWER_BYTES and not complete:
                piece = response.read1(MAX_ANSWER_BYTES - len(body))
                body += piece
                complete = not piece or response.closed
        except (HTTPError, HTTPException, OSError, ValueError):
            pass  # a head and a part of the body are an answer, too
        if not complete:
            response.close()  # or its rest would be taken for the answer to the next request
        response.release_conn()
        return Answer(
            response.status, {name.lower(): value for name, value in response.headers.items()}, body
        )

    def _make_pool(self) -> HTTPConnectionPool:
        """A connection pool for the URL, with its proxy, credentials and CA certificates.

        Raises NoAnswerError.
        """
        from urllib.parse import urlsplit

        import requests
        import urllib3

        try:
            self.host = host_of(self.url)
            here = urlsplit(self.url)
            # A GET, so that no headers for a body are added.
            prepared = requests.Request("GET", self.url, auth=login_of(here.netloc)).prepare()
            proxy = requests.utils.select_proxy(self.url, requests.utils.get_environ_proxies(self.url)) or ""
            there = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            # A proxy on another machine cannot reach this machine's loopback, and could read plain http.
            if is_loopback(here.hostname) and not is_loopback(there.hostname):
                proxy = ""
            if proxy:
                self.proxy = host_of(there.geturl())
            tls = "https" in (here.scheme, there.scheme) and self._tls_context()
            adapter: Any = transport_class()(tls or None)
            proxies = {here.scheme: proxy} if proxy else {}
            pool: Any = adapter.get_connection_with_tls_context(prepared, True, proxies)
            self._target = adapter.request_url(prepared, proxies)
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError):
            message = (
                f"no request to {self.host} can be made: its URL, or that of the proxy which the environment "
                "names, cannot be used"
            )
            raise NoAnswerError("unusable_url", message, not_taken=True) from None
        pool.ConnectionCls = connection_class(pool.ConnectionCls, self._why_not_connected)
        self._headers = {"User-Agent": f"{PROGRAM}/{__version__}", **prepared.headers}
        self._options = {
            # Here `connect` also limits sending: see `connection_class`.
            "timeout": urllib3.Timeout(connect=min(self.timeout, CONNECT_SECONDS), read=self.timeout),
            "retries": urllib3.Retry(False),
            "redirect": False,
            "assert_same_host": False,
            "preload_content": False,
            "decode_content": False,
        }
        self._pool = pool
        return cast("HTTPConnectionPool", pool)

    def _tls_context(self) -> SSLContext:
        """A TLS context with the CA certificates to trust. Raises NoAnswerError if there are none."""
        import ssl

        from urllib3.util.ssl_ import create_urllib3_context

        context = create_urllib3_context()
        # Python 3.13 demands extensions that many private CAs lack, and that 3.11 and other programs do not.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        bundles = (os.environ.get(name) for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
        path = self.ca_file or next(filter(None, bundles), None)
        try:
            if path is None:
                path = os.environ.get("SSL_CERT_FILE")
                trust_machine(context)
            elif os.path.isdir(path):
                context.load_verify_locations(capath=path)
            else:
                context.load_verify_locations(cafile=path)
        except OSError as error:
            why = "there is no CA bundle" if isinstance(error, FileNotFoundError) else "there are no CAs"
            message = f"no request to {self.host} can be made: {why} at {path}"
            raise NoAnswerError("ca_file", message, not_taken=True) from None
        return context

    def _why_not_connected(self, connection: HTTPConnection, error: BaseException) -> tuple[FaultCode, str]:
        """The fault code and the message for a connection that failed."""
        import socket
        import ssl

        from urllib3.exceptions import ConnectTimeoutError, LocationValueError, NewConnectionError

        if isinstance(error, UnicodeError | LocationValueError):
            return "unusable_url", f"no request to {self.host} can be made: that is no host name"
        tls = first_cause(error, ssl.SSLError)
        if self.proxy and not (connection.has_connected_to_proxy and tls):
            return self._why_no_proxy(error)
        if certificate := first_cause(error, ssl.SSLCertVerificationError):
            reason = getattr(certificate, "verify_message", "")
            return "tls_certificate", f"TLS: the certificate of {self.host} is not valid: {reason}"
        if first_cause(error, socket.gaierror):
            return "dns", f"no such host: {self.host}"
        if first_cause(error, ConnectionRefusedError):
            return "refused", f"connection refused by {self.host}"
        if first_cause(error, ConnectTimeoutError):
            return "connect_timeout", f"no connection to {self.host} within {STEP_SECONDS:g} s"
        if first_cause(error, NewConnectionError):
            words = getattr(first_cause(error, OSError), "strerror", None) or "connection failed"
            return "unreachable", f"no connection to {self.host}: {words}"
        if first_cause(error, TimeoutError):
            return "tls", f"TLS with {self.host} failed: no handshake within {STEP_SECONDS:g} s"
        reason = getattr(tls, "reason", None) or "hang-up"
        return "wrong_scheme" if reason in NO_TLS_REASONS else "tls", f"TLS with {self.host} failed: {reason}"

    def _why_no_proxy(self, error: BaseException) -> tuple[FaultCode, str]:
        """The fault code and the message for a proxy that gave no connection."""
        import socket
        import ssl

        from urllib3.exceptions import ConnectTimeoutError

        if certificate := first_cause(error, ssl.SSLCertVerificationError):
            what = f"has no valid certificate: {getattr(certificate, 'verify_message', '')}"
        elif first_cause(error, socket.gaierror):
            what = "has no such host name"
        elif first_cause(error, ConnectionRefusedError):
            what = "refused the connection"
        elif first_cause(error, ConnectTimeoutError, TimeoutError):
            what = f"gave no connection to {self.host} within {STEP_SECONDS:g} s"
        else:
            what = f"gave no connection to {self.host}"
            if answer := re.search(r"Tunnel connection failed: (\d+)", " ".join(map(str, causes(error)))):
                what += f" and answered {answer[1]}"
                if answer[1] == "407":
                    return "proxy_login", f"the proxy {self.proxy} {what}"
        return "proxy", f"the proxy {self.proxy} {what}"

    def _why_no_answer(self, error: Exception) -> tuple[FaultCode, str]:
        """The fault code and the message for a request without an answer. Exceptions name the URL, which is
        secret: the message does not."""
        import http.client
        import ssl

        from urllib3.exceptions import ReadTimeoutError

        by_way_of = f" by way of the proxy {self.proxy}" if self.proxy else ""
        if isinstance(error, ValueError):
            return "unusable_url", f"no request to {self.host} can be made: a header cannot be sent"
        if first_cause(error, ReadTimeoutError, TimeoutError):
            return "timeout", f"no answer from {self.host}{by_way_of} within {self.timeout:g} s"
        if tls := first_cause(error, ssl.SSLError):
            return "tls", f"TLS with {self.host} failed: {getattr(tls, 'reason', None) or 'hang-up'}"
        not_http = first_cause(error, http.client.HTTPException)
        if not not_http or first_cause(error, http.client.RemoteDisconnected):
            return "hung_up", f"{self.host}{by_way_of} hung up before it answered"
        return "not_http", f"{self.host}{by_way_of} answered with something that is not HTTP"


# OpenSSL's reasons for an error if the other side answers a handshake with something that is not TLS.
NO_TLS_REASONS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"}

# Where Debian, Fedora, openSUSE and Alpine keep a machine's CA certificates in one file. A Python whose
# OpenSSL was built elsewhere does not know these places.
MACHINE_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def trust_machine(context: SSLContext) -> None:
    """Trust the CAs that this machine trusts (SSL_CERT_FILE, SSL_CERT_DIR, or its store); if it has no store,
    those of certifi. Raises FileNotFoundError if the file that SSL_CERT_FILE names is missing."""
    import ssl

    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    if named := os.environ.get("SSL_CERT_FILE"):
        os.stat(named)
    context.set_default_verify_paths()
    paths = ssl.get_default_verify_paths()
    folders = os.environ.get("SSL_CERT_DIR", paths.openssl_capath).split(os.pathsep)
    # OpenSSL finds a certificate in a folder by a hash in the file's name.
    hashed = any(
        re.fullmatch(r"[0-9a-f]{8}\.\d+", name)
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    )
    if not (hashed or paths.cafile):
        bundles = (*MACHINE_BUNDLES, DEFAULT_CA_BUNDLE_PATH)
        context.load_verify_locations(cafile=next(filter(os.path.isfile, bundles)))


def login_of(authority: str) -> tuple[bytes, bytes] | None:
    """User and password of a URL's authority, percent-decoded; None if it has no password."""
    from urllib.parse import unquote_to_bytes

    user, colon, password = authority.rpartition("@")[0].partition(":")
    return (unquote_to_bytes(user), unquote_to_bytes(password)) if colon else None


@functools.cache
def transport_class() -> Any:
    """An HTTPAdapter with one pool. It uses our TLS context to a sink, to a proxy, and through a proxy."""
    from base64 import b64encode
    from urllib.parse import urlsplit

    from requests.adapters import HTTPAdapter

    class Transport(HTTPAdapter):
        def __init__(self, tls: SSLContext | None) -> None:
            self._tls = tls
            super().__init__(pool_connections=1, pool_maxsize=1)

        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            super().init_poolmanager(*args, ssl_context=self._tls, **options)

        def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
            if proxy.startswith("http"):
                options["proxy_ssl_context"] = self._tls
            return super().proxy_manager_for(proxy, ssl_context=self._tls, **options)

        def proxy_headers(self, proxy: str) -> dict[str, str]:
            login = login_of(urlsplit(proxy).netloc)
            if login is None:
                return {}
            return {"Proxy-Authorization": f"Basic {b64encode(b':'.join(login)).decode()}"}

    return Transport


def connection_class(
    base: Any, explain_failure: Callable[[HTTPConnection, BaseException], tuple[FaultCode, str]]
) -> type[HTTPConnection]:
    """A pool's connection that connects within CONNECT_SECONDS, or raises NoAnswerError."""
    import http.client

    from urllib3.exceptions import ConnectTimeoutError, HTTPError

    class Connection(base):  # type: ignore[misc]
        response_class = answer_class()
        pieces: list[bytes] | None = None

        def connect(self) -> None:
            began, to_send = time.monotonic(), self.timeout
            self.timeout: float = STEP_SECONDS
            try:
                super().connect()
                # A name lookup has no time limit, so there may be no time left to send.
                left = began + CONNECT_SECONDS - time.monotonic()
                if left <= 0:
                    raise ConnectTimeoutError
            except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
                fault, message = explain_failure(self, error)
                self.close()
                # Not an HTTPError, so that urllib3 does not wrap it.
                raise NoAnswerError(fault, message, not_taken=True) from None
            self.sock.settimeout(min(left, to_send))

        def request(self, *args: Any, **options: Any) -> None:
            # Head and body go out in one system call: a second one costs a fifth of a request.
            pieces: list[bytes] = []
            self.pieces = pieces
            try:
                super().request(*args, **options)
            finally:
                self.pieces = None
            self.send(b"".join(pieces))

        def send(self, data: Any) -> None:
            if self.pieces is not None:
                self.pieces.append(data)
            else:
                super().send(data)

        @property
        def is_connected(self) -> bool:
            # Bytes that came too early are no answer to the next request. urllib3 does not see those that
            # TLS has read already.
            pending = getattr(self.sock, "pending", None)
            return super().is_connected and not (pending and pending())

    return Connection


class TimedStream(io.RawIOBase):
    """The bytes of one answer. The socket's timeout limits all of them together."""

    def __init__(self, sock: Any, raw: io.RawIOBase) -> None:
        self._sock, self._raw = sock, raw
        self._deadline = time.monotonic() + sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class CompleteLines(io.BufferedReader):
    """A stream that raises RemoteDisconnected for half a line: the answer's head is cut off."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            from http.client import RemoteDisconnected

            raise RemoteDisconnected("the head is cut off")
        return line


@functools.cache
def answer_class() -> type[HTTPResponse]:
    """http.client's response, with a time limit for the whole answer and no limit on headers. It skips
    interim answers (RFC 9110, section 15.2). A head that is cut off is no answer."""
    import http.client

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
            super().__init__(sock, *args, **options)
            self.fp: Any = CompleteLines(TimedStream(sock, self.fp.detach()))

        def begin(self) -> None:
            while True:
                try:
                    super().begin()
                except http.client.HTTPException as error:
                    no_head = (http.client.BadStatusLine, http.client.UnknownProtocol)
                    if not isinstance(self.status, int) or isinstance(error, no_head):
                        raise
                    self._skip_headers()
                if not 100 < self.status < 200 or self.status == 101:
                    break
                self.headers: Any = None  # or `begin` would not read the next answer
            # http.client understands odd lengths. urllib3 would refuse the answer.
            if self.headers.get_all("Content-Length", []) != [str(self.length)]:
                del self.headers["Content-Length"]

        def _skip_headers(self) -> None:
            """Drop headers that are too many or too long for http.client: the status is enough."""
            while self.fp.readline(1 << 16).strip(b"\r\n"):
                pass
            self.headers = self.msg = http.client.HTTPMessage()
            self.chunked, self.length, self.will_close = False, 0, True

    return Response


def build_request(
    adapter: Adapter, sink: Sink, deliveries: Sequence[Delivery], origin: Origin
) -> HttpRequest | Verdict:
    """The request for some deliveries. If the adapter fails, a verdict: to retry, because another version of
    the program may succeed."""
    try:
        return adapter.build(sink, deliveries, origin)
    except Exception as error:  # noqa: BLE001 - one record must not stop the next ones
        message = f"no payload could be made of this record: {place_of(error)}"
        return Verdict("retry", "payload_failed", message=message, not_taken=True, fault="adapter_fault")


def send_and_judge(
    adapter: Adapter, sink: Sink, client: Client, request: HttpRequest, redactor: Redactor
) -> Verdict:
    """Send one request, and judge the answer. The message is masked and cut. Never raises."""
    if missing := adapter.missing_secrets(sink):
        message = f"unset: {' '.join(missing)}"
        return Verdict("misconfigured", "missing_secret", message=message, fault="missing_secret")
    answer = None
    try:
        answer = client.send(request)
        now = time.time()
        verdict = adapter.judge(answer, now)
        # Masked before the last cut, which could leave half a secret.
        message = redactor.mask(cut(printable(verdict.message or ""), 10 * MESSAGE_CHARACTERS)).strip()
        dated = parse_http_date(answer.headers.get("date", ""))
        return verdict._replace(
            message=cut(message, MESSAGE_CHARACTERS) or None if verdict.outcome != "delivered" else None,
            clock_offset=None if dated is None else dated - now,
        )
    except NoAnswerError as error:
        return Verdict(
            "retry", "request_failed", message=str(error), not_taken=error.not_taken, fault=error.fault
        )
    except Exception as error:  # noqa: BLE001 - a fault of the program costs at most this delivery
        message = f"the answer could not be judged: {place_of(error)}"
        if answer is None:
            return Verdict("retry", "request_failed", message=message, fault="adapter_fault")
        if 200 <= answer.status < 300:
            return Verdict("delivered", None, answer.status, message, fault="adapter_fault")
        return Verdict("retry", "http_error", answer.status, message, fault="adapter_fault")


def timed_out(sink: Sink, *places: str) -> Verdict:
    """The verdict if a sink, or some of its peers, did not answer within `attempt_seconds`. The client's own
    timeouts limit neither the name lookup nor the number of addresses."""
    seconds = attempt_seconds(sink.timeout_seconds)
    message = f"no connection to {', '.join(places)} and no answer within {seconds:g} s"
    return Verdict("retry", "request_failed", message=message, fault="connect_timeout")


# ---------------------------------------------------------------------------------------------------------
# Job, rows and summary: a loop's files, and what a pass writes in them
# ---------------------------------------------------------------------------------------------------------
# Output for the host. A pass reads the last summary to skip a loop that is idle, and to find the place of a
# loop that the queue does not know. So a summary must not say that nothing is waiting while something is.

# The reason codes of losses: of what reached no sink, and will not by itself. `status` reports them.
LOSS_CODES = {*UNUSABLE_CODES, "no_dispatchable_sinks", "sink_removed", "source_replaced", "queue_lost"}


class Job(NamedTuple):
    """What one pass does for one loop.

    Paths are absolute. `max_escalations`: 0 for no limit. `time_budget`: seconds.
    """

    repo: str
    loop_id: str
    trace_id: str
    escalations_file: str
    state_file: str
    telemetry_file: str
    config_file: str
    queue_file: str
    max_escalations: int = 0
    time_budget: float = 30.0
    # Try every destination now, even one that should wait after a failure.
    now: bool = False

    @property
    def attempts_file(self) -> str:
        return os.path.join(os.path.dirname(self.telemetry_file), "alert-attempts.jsonl")

    @property
    def lock_file(self) -> str:
        return f"{self.state_file}.lock"

    @property
    def temporary_file(self) -> str:
        """The file that is renamed to the state file: see `replace_file`."""
        return f"{self.state_file}.tmp"


MAX_TIME_BUDGET = 86400
MANAGER_FOLDER = ".superloop/ops-manager"
SOURCE_FILE = "escalations.jsonl"
STATE_FILE = "alert-dispatch-state.json"
QUEUE_FILE = "alert-queue.db"
QUEUE_ENV = "OPS_MANAGER_ALERT_QUEUE_FILE"


def absolute(path: str) -> str:
    """The absolute path, with its links not followed. Raises UsageError if the current folder is gone."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise click.UsageError("the current folder is not there any more: change to another one") from None


def new_trace_id() -> str:
    """The trace id in the environment, or a new one."""
    return printable(os.environ.get(TRACE_ENV) or str(uuid.uuid4()))


def files_of(job: Job) -> dict[str, str]:
    """A job's files, by the options that name them."""
    return {
        "--escalations-file": job.escalations_file,
        "--dispatch-state-file": job.state_file,
        "--dispatch-telemetry-file": job.telemetry_file,
        "--alert-config-file": job.config_file,
        "--queue-file": job.queue_file,
    }


def usual_job(repo: str, loop_id: str, trace_id: str | None = None) -> Job:
    """A job whose files are where the host keeps them. Raises UsageError: see `absolute`."""
    repo = absolute(repo)
    return Job(
        repo=repo,
        trace_id=trace_id or new_trace_id(),
        config_file=os.path.join(repo, DEFAULT_CONFIG),
        queue_file=os.path.abspath(
            os.environ.get(QUEUE_ENV) or os.path.join(repo, MANAGER_FOLDER, QUEUE_FILE)
        ),
        **files_of_loop(repo, loop_id),
    )


def files_of_loop(repo: str, loop_id: str) -> dict[str, Any]:
    """The fields of a job that are a loop's own: its id, and its files where the host keeps them."""
    folder = os.path.join(repo, MANAGER_FOLDER, loop_id)
    return {
        "loop_id": loop_id,
        "escalations_file": f"{folder}/{SOURCE_FILE}",
        "state_file": f"{folder}/{STATE_FILE}",
        "telemetry_file": f"{folder}/telemetry/alerts.jsonl",
    }


def command_line(command: str, job: Job, *options: str) -> str:
    """A command of this program for a job's files, to be pasted into a shell."""
    usual = files_of(usual_job(job.repo, job.loop_id, job.trace_id))
    words = [PROGRAM, command, "--repo", job.repo, "--loop", job.loop_id]
    for name, path in files_of(job).items():
        if path != usual[name]:
            words += [name, path]
    return shell_line(*words, *options)


# Far more than any state file has: a larger file is something else.
MAX_STATE_BYTES = 32 << 20
STATE_VERSION = 2


def read_state_document(path: str) -> JsonObject | None:
    """Read the state file; None if it is missing.

    Raises ValueError if it is damaged or not ours, StateError if it cannot be read or is from a newer
    version.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_STATE_BYTES:
                raise ValueError("too large")
            raw = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(
            f"cannot read the state file {path}: {error.strerror}", [what_to_do(error)]
        ) from None
    try:
        document = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("not an object")
    schema, version = document.get("schemaVersion"), document.get("stateVersion", 1)
    newer = schema != SCHEMA_VERSION and re.fullmatch(r"v([2-9]|[1-9][0-9]+)", str(schema))
    if newer or (isinstance(version, int) and version > STATE_VERSION):
        raise StateError(
            f"the state file {path} was written by a newer version (schemaVersion {schema}, "
            f"stateVersion {version}); it is left as it is",
            [f"run that version of {PROGRAM} again, or a later one"],
        )
    if schema != SCHEMA_VERSION:
        raise ValueError("not a state file of this program")
    return document


def write_state(job: Job, document: JsonObject, *, durable: bool = False) -> None:
    """Replace the state file: see `replace_file`. Raises StorageError."""
    replace_file(job.state_file, encode_json(document) + b"\n", durable=durable)


def keep_damaged(path: str) -> None:
    """Give a damaged state file a second name.

    The first name stays until the new summary replaces the file. If this pass is killed before that, the next
    one must still see that the loop is not new. Raises StorageError.
    """
    try:
        kept = f"{path}.damaged-{int(os.lstat(path).st_mtime)}"
        try:
            os.link(path, kept, follow_symlinks=False)
        except FileExistsError:  # from a pass that was killed
            return
        except OSError:  # some file systems have no links
            import shutil

            shutil.copy2(path, kept, follow_symlinks=False)
    except OSError as error:
        raise storage_error("keep a copy of the damaged state file", path, error) from None


def expect_work(job: Job, count: int) -> None:
    """Write into the summary that `count` more deliveries are waiting, before the queue has them.

    If this command is killed in between, the next pass must not take the loop for idle. Raises StateError,
    StorageError.
    """
    if document := read_summary(job):
        document |= {"waitingCount": count + count_in(document, "waitingCount")}
        write_state(job, document, durable=True)


def count_in(document: JsonObject, key: str) -> int:
    """A count in a state file; 0 if it is missing or not a count."""
    value = document.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62 else 0


def summary_if_readable(job: Job) -> JsonObject:
    """As `read_summary`; empty also if it cannot be read, or is newer."""
    with contextlib.suppress(StateError):
        return read_summary(job)
    return {}


def read_summary(job: Job) -> JsonObject:
    """The summary of the last pass; empty if it is missing or damaged. Raises StateError."""
    try:
        return read_state_document(job.state_file) or {}
    except ValueError:
        return {}


class Counts:
    """What a pass did with the escalations of a loop, as counted in the summary."""

    def __init__(self) -> None:
        self.processed = self.dispatched = self.skipped = self.failed = 0
        self.late_dispatched = self.late_failed = 0
        self.reason_codes: set[str] = set()

    def add(self, row: JsonObject) -> None:
        """Count an escalation by its row."""
        self.processed += 1
        self.dispatched += row["dispatchedSinkCount"] > 0
        self.skipped += row["status"] == "skipped"
        if row["status"] in ("failed", "partial"):
            self.failed += 1
            failed = (entry["reasonCode"] for entry in row["sinks"] if entry["status"] == "failed")
            self.add_codes([row["reasonCode"], *failed])

    def add_late(self, entry: JsonObject) -> None:
        """Count a delivery whose escalation already has its row."""
        self.late_dispatched += entry["status"] == "success"
        if entry["status"] == "failed":
            self.late_failed += 1
            self.add_codes([entry["reasonCode"]])

    def add_codes(self, codes: Iterable[str | None]) -> None:
        self.reason_codes |= {code for code in codes if code}


def attempt_row(
    job: Job,
    sink: Sink,
    found: QueuedDelivery,
    delivery: Delivery | None,
    verdict: Verdict,
    attempt: int,
    seconds: float,
) -> JsonObject:
    """The row of an attempt, or of a delivery that ended without one. `seconds`: how long it took."""
    stored = found.stored
    row: JsonObject = {
        "timestamp": iso(time.time()),
        "loopId": job.loop_id,
        "traceId": job.trace_id,
        "escalationId": stored.escalation_id,
        "sinkId": sink.id,
        "sinkType": sink.type,
        "attempt": attempt,
        "durationMs": round(seconds * 1000),
        "httpStatus": verdict.http_status,
        "outcome": verdict.outcome,
        "reasonCode": verdict.reason_code,
        "faultCode": verdict.fault,
        "retryAfterSeconds": verdict.retry_after,
        "position": stored.position,
    }
    if found.peer:
        row["peer"] = found.peer
    if verdict.message and verdict.outcome != "delivered":
        row["message"] = verdict.message
    if verdict.outcome not in STATUS_OF_OUTCOME:
        row["escalationTimestamp"] = stored.written_at
    if delivery and delivery.repeats and verdict.outcome == "delivered":
        row["heldBack"] = {"repeats": delivery.repeats, "since": delivery.repeats_since}
    if found.by_operator:
        row["byOperator"] = True
    if stored.reported:
        row["late"] = True
    return row


def sink_entry(
    sink_id: str, sink_type: str | None, status: str, result: QueuedDelivery | Verdict
) -> JsonObject:
    """What an escalation's row says about one sink."""
    return {
        "id": sink_id,
        "type": sink_type,
        "status": status,
        "httpStatus": result.http_status,
        "reasonCode": result.reason_code,
        "message": result.message,
    }


def base_row(job: Job, identity: str, position: JsonObject, body: JsonObject | None) -> JsonObject:
    """The fields that the rows of escalations and of unusable lines share. Empty fields are left out."""
    fields = body or {}
    row = {
        "timestamp": iso(time.time()),
        "loopId": job.loop_id,
        "traceId": job.trace_id,
        "escalationTraceId": as_text(fields.get("traceId")) or job.trace_id,
        "category": "alert_dispatch",
        "escalationCategory": as_text(fields.get("category")),
        "escalationTimestamp": as_text(fields.get("timestamp")),
        "escalationId": identity,
        "position": position,
    }
    return {key: value for key, value in row.items() if value is not None}


def escalation_row(
    job: Job,
    stored: QueuedEscalation,
    escalation: Escalation,
    resolution: Resolution,
    entries: list[JsonObject],
) -> JsonObject:
    """The row of an escalation, without the record itself."""
    row = base_row(job, stored.escalation_id, stored.position, escalation.body)
    status, reason = judge_row(resolution, entries)
    row |= {"eventSeverity": resolution.event_severity, "status": status}
    if reason:
        row["reasonCode"] = reason
    if escalation.unknown_severity is not None:
        row["unknownSeverity"] = cut(escalation.unknown_severity, 100)
    if stored.raw_line is not None:
        row |= {"salvaged": True, "rawLine": stored.raw_line}
    return {**row, "route": resolution.route, **count_sinks(entries)}


def unusable_row(job: Job, line: Unusable, position: JsonObject) -> JsonObject:
    """The row of an unusable line."""
    return base_row(job, line.id, position, line.body) | {
        "status": "skipped" if line.reason_code == "blank_line" else "failed",
        "reasonCode": line.reason_code,
        **({"message": line.message} if line.message else {}),
        **({"rawLine": line.raw_line} if line.body is None else {"escalation": line.body}),
        **count_sinks([]),
    }


def judge_row(resolution: Resolution, entries: Sequence[JsonObject]) -> tuple[str, str | None]:
    """The status and the reason code of an escalation's row."""
    found = Counter(entry["status"] for entry in entries)
    if not entries:
        below = not resolution.should_dispatch or any(sink.enabled for sink in resolution.selected)
        return "skipped", "severity_below_min" if below else "no_dispatchable_sinks"
    if found["failed"]:
        taken = found["success"]
        return ("partial", "partial_dispatch_failure") if taken else ("failed", "dispatch_failed")
    if found["waiting"]:
        return "waiting", "delivery_deferred"
    return ("dispatched", None) if found["success"] else ("skipped", entries[0]["reasonCode"])


def count_sinks(entries: list[JsonObject]) -> JsonObject:
    """The last fields of a row: what it says about each sink, and how many sinks got the escalation."""
    return {
        "sinks": entries,
        "sinkCount": len(entries),
        "dispatchedSinkCount": sum(entry["status"] == "success" for entry in entries),
        "failedSinkCount": sum(entry["status"] == "failed" for entry in entries),
    }


COUNT_KEYS = ("processedCount", "dispatchedCount", "skippedCount", "failedCount")
LINE_COUNTS = ("escalationsLineOffset", "escalationsLineCount")


def empty_summary(job: Job, status: str) -> JsonObject:
    """The fields that the host reads, for a pass that did nothing."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "updatedAt": iso(time.time()),
        "loopId": job.loop_id,
        "traceId": job.trace_id,
        "escalationsFile": job.escalations_file,
        "dispatchTelemetryFile": job.telemetry_file,
        "status": status,
        **dict.fromkeys(COUNT_KEYS, 0),
        "failureReasonCodes": [],
        **dict.fromkeys((*LINE_COUNTS, "unreadCount"), 0),
        "stoppedBy": None,
        **dict.fromkeys(("lateDispatchedCount", "lateFailedCount", "waitingCount", "deadLetterCount"), 0),
    }


def sink_figures(queue: Queue, loop: int, sinks: Collection[str] | None) -> dict[str, JsonObject]:
    """The figures of a loop's sinks, by sink id. `sinks`: those of the config; None if it is not known.

    A sink that was removed from the config has figures as long as something waits for it or is dead.
    """
    figures: dict[str, JsonObject] = {}
    tallies = queue.tallies(loop)
    for sink_id in dict.fromkeys([*(sinks or ()), *tallies]):
        tally = tallies.get(sink_id, {})
        if sinks is None or sink_id in sinks or tally.get("waiting") or tally.get("dead"):
            figures[sink_id] = sink_figure(queue, loop, sink_id, tally)
    return figures


def why_json(failed: Verdict | QueuedDelivery | Destination) -> JsonObject:
    """Why an attempt, a delivery or a destination failed, in JSON."""
    return {
        "httpStatus": failed.http_status,
        "reasonCode": failed.reason_code,
        "faultCode": failed.fault,
        "message": failed.message,
    }


# What is known of a destination that no pass has used.
NEVER_USED = Destination(0, 0.0, 0, 0, None, None, None, None, None, None, None, None, -1)


def sink_figure(queue: Queue, loop: int, sink_id: str, tally: JsonObject) -> JsonObject:
    """The figures of one sink of a loop: what is waiting, what became of the rest, and how its destinations
    are."""
    known = queue.destinations_of(sink_id)
    oldest = queue.oldest_waiting(loop, sink_id) if tally.get("waiting") else None
    # Of a cluster, its healthiest peer: it is enough if one takes alerts.
    best = min(known.values(), key=lambda found: found.consecutive_failures, default=NEVER_USED)
    # A sink that is no cluster is one peer, named "".
    lagging = {} if "" in known else queue.lagging(loop, sink_id)
    peers = [lagging_peer(peer, since, known.get(peer)) for peer, since in lagging.items()]
    return figure_of(tally, best, oldest, peers)


def figure_of(
    tally: JsonObject, best: Destination, oldest: QueuedEscalation | None, lagging: list[JsonObject]
) -> JsonObject:
    """The figures of a sink."""
    return {
        "waitingCount": tally.get("waiting", 0),
        "oldestPendingAt": date_of(oldest) if oldest else None,
        "deadLetterCount": tally.get("dead", 0),
        "deliveredCount": tally.get("delivered", 0),
        "givenUpCount": tally.get("given_up", 0),
        "skippedCount": tally.get("skipped", 0),
        "failedAttemptCount": tally.get("failed_attempts", 0),
        "consecutiveFailures": best.consecutive_failures,
        "failingSince": iso(best.failing_since) if best.failing_since else None,
        "nextAttemptAt": iso_milliseconds(best.next_attempt_at)
        if best.consecutive_failures and best.next_attempt_at
        else None,
        "lastSuccessAt": iso(best.last_success_at) if best.last_success_at else None,
        "lastFailureAt": iso(best.last_failure_at) if best.last_failure_at else None,
        **why_json(best),
        "clockOffsetSeconds": best.clock_offset,
        "oldestWaitingLine": oldest.line if oldest else None,
        "oldestWaitingSegment": oldest.segment if oldest else None,
        "laggingPeers": lagging,
    }


def date_of(stored: QueuedEscalation) -> str:
    """The timestamp of an escalation. If that is missing, malformed or in the future, the time when it was
    ingested."""
    written = parse_time(stored.written_at)
    if stored.written_at is None or written is None or written > stored.ingested_at:
        return iso(stored.ingested_at)
    return stored.written_at


def lagging_peer(peer: str, since: float, known: Destination | None) -> JsonObject:
    """A peer of a cluster that lacks what another one has, and since when (seconds since the epoch)."""
    return {
        "peer": peer,
        "since": iso(since),
        **why_json(known or NEVER_USED),
        "nextAttemptAt": iso_milliseconds(known.next_attempt_at) if known and known.next_attempt_at else None,
    }


def unsent(sinks: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
    """The figures of an earlier summary, for a pass that sent nothing."""
    return {sink_id: {**mapping(sink), "sentCount": 0} for sink_id, sink in sinks.items()}


def locked_summary(job: Job) -> JsonObject:
    """The summary of a pass that did nothing because another one is running."""
    document = summary_if_readable(job)
    kept = (*LINE_COUNTS, "waitingCount", "deadLetterCount")
    known = {key: document[key] for key in kept if key in document}
    return {**empty_summary(job, "locked"), **known, "sinks": unsent(mapping(document.get("sinks")))}


# ---------------------------------------------------------------------------------------------------------
# A loop in a pass: ingest, rows, summary
# ---------------------------------------------------------------------------------------------------------
# Knows the files of one loop, whose lock is held, and its part of the queue. Sends nothing. Keeps nothing
# that is not in the queue: if a pass is killed, the next one goes on from the last transaction.

# New lines are read for this part of the time budget, and a backlog is moved to other peers for as long at
# most: the rest is for sending, and for rows.
READING_SHARE = 0.3


class Clock:
    """The time budget of a pass, and whether somebody asked it to end. Monotonic seconds."""

    def __init__(self, budget: float, stop: threading.Event | None = None) -> None:
        """`stop`: that of another clock, to end with it."""
        self.stop = stop or threading.Event()
        # The budget ended while there was still something to send.
        self.cut_short = False
        self._deadline = time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds in which new attempts may start."""
        return 0.0 if self.stop.is_set() else self._deadline - time.monotonic()

    def pause(self, seconds: float) -> bool:
        """Wait, if the budget allows; tells whether it did."""
        if seconds >= self.left or self.stop.wait(seconds):
            self.cut_short = True
            return False
        return True

    @contextlib.contextmanager
    def ends_on_signals(self) -> Iterator[None]:
        """Let SIGTERM, SIGINT and SIGHUP stop a pass as its time budget would. A second one kills the
        process."""
        import signal

        def end(signum: int, _: object) -> None:
            self.stop.set()
            signal.signal(signum, signal.SIG_DFL)

        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {signum: signal.getsignal(signum) for signum in signals}
        for signum, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(signum, end)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


# How many parsed records are kept in memory, and the largest of them in bytes.
PARSED_COUNT = 1000
PARSED_BYTES = 4 << 10


class Shared:
    """What the loops and senders of one pass have in common."""

    def __init__(
        self,
        queue: Queue,
        config: Config,
        clock: Clock,
        *,
        dry_run: bool = False,
        woken: Collection[str] = (),
    ) -> None:
        """`woken`: disabled sinks that are sent what an operator asked for, and nothing else."""
        self.queue = queue
        self.config = config
        self.clock = clock
        self.dry_run = dry_run
        self.router = Router(config)
        self.redactor = config.redactor
        # Open loops by their number in the queue; `active` are those that have not failed.
        self.loops: dict[int, Loop] = {}
        self.active: set[int] = set()
        self.sinks = [sink for sink in config.sinks.values() if sink.enabled or sink.id in woken]
        # By sink: its peers, each with its URL.
        self.peers = {sink.id: ADAPTERS[sink.type].peers(sink) for sink in self.sinks}
        # What ends the whole pass.
        self.error: DispatchError | None = None
        self.ingesting = True
        # In a dry run: whether to show requests, and those that would have been sent.
        self.show_payload = False
        self.requests: dict[tuple[int, str, str], HttpRequest] = {}
        # By loop and number: if an ingest is rolled back, another loop may get its numbers.
        self._parsed: dict[tuple[int, int], Escalation] = {}

    def parse(self, stored: QueuedEscalation) -> Escalation:
        """The escalation that a record of the queue holds."""
        escalation = self._parsed.get((stored.loop, stored.id))
        if escalation is None:
            found = parse_record(stored.record, self.loops[stored.loop].job.loop_id)
            if isinstance(found, Unusable):
                path = self.queue.path
                raise DamagedQueueError(f"the queue {path} holds a record that is none: {stored.id}")
            escalation = found._replace(id=stored.escalation_id)
            if len(self._parsed) >= PARSED_COUNT:
                del self._parsed[next(iter(self._parsed))]
            self.remember(stored, escalation)
        return escalation

    def remember(self, stored: QueuedEscalation, escalation: Escalation) -> None:
        """Keep a parsed record for its sender and its row, if there is room and it is not large."""
        if len(escalation.raw) < PARSED_BYTES and len(self._parsed) < PARSED_COUNT:
            self._parsed[stored.loop, stored.id] = escalation

    def resolve(self, stored: QueuedEscalation) -> Resolution:
        return self.router.resolve(stored.category, stored.severity)

    def digest(self, about: object) -> str:
        """A salted digest, which tells nothing of the secrets that it is made of."""
        return blake2b(encode_json(about), digest_size=8, key=self.queue.salt).hexdigest()

    @functools.cached_property
    def targets(self) -> dict[tuple[str, str], str]:
        """The digests of what the sinks point at, by sink and peer."""
        return {
            (sink.id, peer): self.digest(ADAPTERS[sink.type].target(sink, url))
            for sink in self.sinks
            for peer, url in self.peers[sink.id].items()
        }

    def sinks_at(self, digest: str) -> list[Sink]:
        """The sinks that point at the destination with this digest."""
        found = {sink_id for (sink_id, _), target in self.targets.items() if target == digest}
        return [sink for sink in self.sinks if sink.id in found]

    def failing_destination(self, sink_id: str, peer: str) -> Destination | None:
        """What is known of a destination, if it failed when this pass or an earlier one used it last."""
        known = self.queue.destinations_of(sink_id).get(peer)
        return known if known and known.consecutive_failures else None

    def fail(self, error: DispatchError) -> None:
        """Note an error that ends the whole pass."""
        with self.queue.changed:
            self.error = self.error or error
            self.queue.changed.notify_all()


def open_words(waiting: int, dead: int) -> str:
    """`2 waiting deliveries and 1 dead letter`; empty if there is neither."""
    found = ((waiting, "waiting delivery"), (dead, "dead letter"))
    return " and ".join(plural(count, noun) for count, noun in found if count)


# How many bytes at the end of a telemetry file are read to find what a killed pass has appended, and to count
# failures.
RECENT_BYTES = 1 << 20
# How often rows are moved from the outbox into the files while senders work.
ROW_INTERVAL = 0.25
# How many rows are made in one transaction.
ROWS_AT_ONCE = 500
# How many deliveries are moved to other peers, or escalations to other sinks, in one transaction; and for how
# many seconds other processes can lock the queue before the next one: they try more often than that.
MOVED_AT_ONCE = 1000
OTHERS_TURN = 0.005


class Loop:
    """What a pass does with one loop: its source, its rows, its summary. The loop's lock is held."""

    def __init__(self, shared: Shared, job: Job) -> None:
        """Find the loop in the queue, and the source at the loop's cursor. Raises DispatchError."""
        self.shared = shared
        self.job = job
        self.queue = shared.queue
        self.counts = Counts()
        self.error: DispatchError | None = None
        # By their names in the outbox, the files of rows.
        self._row_files = {"attempts": job.attempts_file, "telemetry": job.telemetry_file}
        self._written = 0
        self._flushed = False
        cursor, self._rules = self._find()
        shared.loops[self.id] = self
        self._before = self.queue.tallies(self.id)
        # What is wrong with the source. What waits is sent all the same.
        self.unreadable: StorageError | None = None
        self.source = Source(job.escalations_file, cursor, self.last_known)
        with self._reading():
            self.source.find()
        self.chunks = self.source.chunks(job.max_escalations)
        self.has_read_all = False

    def last_known(self, segment: str, lines: Iterable[Line]) -> Line | None:
        """The last line that is known before the first one that is new: the queue has its escalation from the
        same place in a segment. None if fewer than two are known, because a new file may begin with the same
        line as an old one."""
        places = self.queue.places(self.id, segment)
        at, known = next(places, None), 0
        last = None
        for line in lines:
            while at is not None and at[0] < line.offset:
                at = next(places, None)
            if at is None:
                break
            if at[0] > line.offset:
                continue  # it is no escalation, or was purged
            if at[1] not in {found.id for found in parse_line(line.text, line.size, self.job.loop_id)}:
                break
            known, last = known + 1, line
        return last if known > 1 else None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self.unreadable = error

    def _find(self) -> tuple[Cursor, JsonObject | None]:
        """Find out the loop's number, its cursor and its routes, and hold it. A loop that is new to the queue
        goes on from its summary, from that of an earlier dispatcher, or from its last row; so does one that
        another queue, which is gone, has served since this one did. Raises StateError, StorageError."""
        job = self.job
        document, rules = read_summary(job), None
        with self.queue.transaction():
            found = self.queue.find_loop(job.loop_id)
            if found is not None:
                self.id, here, rules = found
                self._hold()
                _, there = other_queue(job, document) or ("", here)
                if (there.number, there.offset) <= (here.number, here.offset):
                    return after_shell(job, document, here), rules
            past = read_past(job)
            if found is None:
                self.id = self.queue.add_loop(job.loop_id, past.cursor)
                self._hold()
                for loss in past.losses:
                    self.queue.note_loss(self.id, *loss)
            if past.lost:
                message = f"the queue with {past.lost} is gone: {what_to_do_about_lost(job, past)}"
                self.write_event("queue_lost", message, dropped=past.waiting + past.dead)
            return past.cursor, rules

    def _hold(self) -> None:
        # The other lock is beside the state file: a pass with another state file does not meet that one.
        if not self.shared.dry_run and not self.queue.hold_loop(self.id):
            raise LoopHeldError(self.job.loop_id)

    def begin(self) -> None:
        """Bring what waits in line with the source and the config, and get ready to write.

        Raises DispatchError.
        """
        job = self.job
        with self.queue.transaction():
            if self.source.loss is None:  # else `ingest` saves it, with the report
                self.queue.save_cursor(self.id, self.source.cursor)
            self.queue.add_tallies(self.id, self.shared.config.sinks)
        self._align_peers()
        rules = self.shared.config.rules()
        in_line = self._rules in (None, rules) or self._apply_routes(self._rules)
        with self.queue.transaction():
            if in_line and self._rules != rules:
                self.queue.save_rules(self.id, rules)
            if job.now:
                self.queue.try_at_once(self.id)
        if self.shared.dry_run:
            return
        if is_foreign(job):
            keep_damaged(job.state_file)
        check_room(os.path.dirname(job.telemetry_file), *self._row_files.values())
        check_room(os.path.dirname(job.state_file))
        for path in self._row_files.values():
            check_appendable(path)
        if os.path.islink(job.state_file):
            raise storage_error("write", job.state_file, OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
        if os.path.isdir(job.temporary_file):
            raise storage_error("write", job.temporary_file, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
        self._recover_rows()

    # -- ingest

    def ingest(self) -> bool:
        """Ingest one chunk of new lines, in one transaction; tells whether there may be more."""
        chunk = None
        with self._reading():
            chunk = next(self.chunks, None)
        with self.queue.transaction():
            if self.source.loss:
                self.write_event("source_replaced", self.source.loss)
                self.source.loss = None
            if chunk is not None:
                self._store(chunk)
            self.queue.save_cursor(self.id, self.source.cursor)
        self.has_read_all = chunk is None
        return chunk is not None

    def _store(self, chunk: Chunk) -> None:
        number, now = self.queue.next_id(), time.time()
        segment = chunk.cursor.segment
        kept: list[QueuedEscalation] = []
        deliveries: list[tuple[int, str, str, int, int, int, float]] = []
        for line in chunk.lines:
            for found in parse_line(line.text, line.size, self.job.loop_id):
                place = (number, self.id, found, segment, line, now)
                number += 1
                if isinstance(found, Unusable):
                    unusable = QueuedEscalation.of(*place)
                    row = unusable_row(self.job, found, unusable.position)
                    kept.append(unusable._replace(unusable=encode_json(row)))
                    continue
                resolution = self.shared.router.resolve(found.category, found.severity)
                stored = QueuedEscalation.of(*place, waits=bool(resolution.dispatchable))
                self.shared.remember(stored, found)
                kept.append(stored)
                deliveries += [
                    (stored.id, sink.id, peer, self.id, resolution.severity, position == 0, now)
                    for sink in resolution.dispatchable
                    for position, peer in enumerate(self.shared.peers[sink.id])
                ]
        self.queue.add_escalations(kept)
        self.queue.add_deliveries(deliveries)

    # -- a changed config

    def _apply_routes(self, before: JsonObject) -> bool:
        """Bring what waits in line with a changed config. It goes to the sinks to which its route leads now
        and did not before; to sinks that are new or were disabled only if no other one has it. Deliveries to
        other sinks are skipped. `before`: the rules until now.

        Returns False if a signal ends the pass meanwhile. That, or a kill, leaves the rules in the queue, and
        the next pass begins anew: what is in line already stays as it is.
        """
        config, queue = self.shared.config, self.queue
        minimum, old_sinks = before["defaultMinSeverity"], sinks_of(before, {})
        router = Router(config._replace(document=before, default_min_severity=minimum, sinks=old_sinks))
        at: int | None = 0
        while at is not None:
            at = self._route_some(router, at)
            queue.tidy()
            if self.shared.clock.stop.wait(OTHERS_TURN) and at is not None:
                self.shared.clock.cut_short = True
                return False
        with queue.transaction():
            # Only now: what waited for a sink that was removed has its new sinks.
            for sink_id in queue.tallies(self.id):
                if sink_id not in config.sinks:
                    waited = queue.skip_waiting(self.id, sink_id, "sink_removed")
                    dead = queue.skip_dead(self.id, sink_id, "sink_removed")
                    if words := open_words(waited, dead):
                        message = f"sink {sink_id} was removed with {words}"
                        self.write_event("sink_removed", message, sink_id, dropped=waited + dead)
            queue.note_all_settled(self.id)
        return True

    def _route_some(self, before: Router, after: int) -> int | None:
        """Bring some of what waits in line with changed routes, in one transaction with the rows on it: the
        escalations that follow number `after`. `before` has the old rules. Returns the number of the last
        one; None if none follows."""
        queue, sinks, old_sinks = self.queue, self.shared.config.sinks, before.config.sinks
        removed = old_sinks.keys() - sinks.keys()
        # By sink: the escalations, with their severities, that go to it, and those that no longer do.
        wanted: dict[str, list[tuple[int, int]]] = {sink_id: [] for sink_id in sinks}
        unwanted: dict[str, list[int]] = {sink_id: [] for sink_id in (*sinks, *removed)}
        severities: list[tuple[int, int]] = []
        with queue.transaction():
            kinds = queue.waiting_kinds(self.id, after, MOVED_AT_ONCE)
            had = queue.had_by([escalation for escalation, *_ in kinds])
            for escalation, category, word in kinds:
                resolution = self.shared.router.resolve(category, word)
                severities.append((escalation, resolution.severity))
                led_to = {sink.id for sink in before.resolve(category, word).dispatchable}
                older = [s for s in resolution.dispatchable if s.id in old_sinks and old_sinks[s.id].enabled]
                # What waits for a cluster goes to peers that were added to it, too.
                moves: Sequence[Sink] = [
                    sink for sink in older if sink.id not in led_to or (escalation, sink.id) in had
                ]
                if not any((escalation, sink.id) in had for sink in resolution.dispatchable):
                    moves = older or resolution.dispatchable
                    # What others get is not lost with a sink that was removed.
                    for sink_id in removed if moves else ():
                        unwanted[sink_id].append(escalation)
                for sink in moves:
                    wanted[sink.id].append(severities[-1])
                for sink_id in sinks.keys() - {sink.id for sink in resolution.reached}:
                    unwanted[sink_id].append(escalation)
            for sink_id, dropped in unwanted.items():
                if dropped and (count := queue.skip_waiting(self.id, sink_id, "route_changed", dropped)):
                    words = f"waited for {sink_id}, to which no route leads any more"
                    message = f"{plural(count, 'delivery')} {words}"
                    self.write_event("route_changed", message, sink_id, dropped=count)
            for sink_id, added in wanted.items():
                if added and (count := queue.reroute(added, sink_id, self.shared.peers[sink_id], self.id)):
                    words = f"waited for another sink, and a route leads to {sink_id} now"
                    message = f"{plural(count, 'delivery')} {words}"
                    self.write_event("route_changed", message, sink_id, rerouted=count)
            queue.set_severities(severities)
        return kinds[-1][0] if kinds else None

    def _align_peers(self) -> None:
        """Bring what waits for a cluster in line with its peers, which the environment names. A sink that is
        no cluster any more has one peer, without a name. If there is much, some is left for the next pass:
        until it is moved, it waits."""
        clock = self.shared.clock
        least_left = clock.left * (1 - READING_SHARE)
        for sink in self.shared.sinks:
            peers = self.shared.peers[sink.id]
            with self.queue.changed:
                gone = [peer for peer in self.queue.waiting_peers(sink.id) if peer not in peers]
            for peer in gone:
                while self._move_some(sink.id, peer, peers):
                    self.queue.tidy()
                    if clock.left <= least_left or clock.stop.wait(OTHERS_TURN):
                        clock.cut_short = True
                        return

    def _move_some(self, sink_id: str, peer: str, peers: Collection[str]) -> bool:
        """Move some of what waits for a peer that is gone, in one transaction; tells whether there may be
        more."""
        with self.queue.transaction():
            ended = self.queue.replace_peer(self.id, sink_id, peer, peers, MOVED_AT_ONCE)
            for escalation in ended or ():
                if lead := self.queue.lead(escalation, sink_id):
                    self.note_end(lead, leads=True)
        return ended is not None

    # -- rows

    def write_event(
        self,
        reason_code: str,
        message: str,
        sink_id: str | None = None,
        *,
        dropped: int | None = None,
        rerouted: int | None = None,
    ) -> None:
        """Write the row of something that happened to the source, the queue or all that waits for a sink."""
        failed = reason_code == "queue_lost"
        row = {
            "timestamp": iso(time.time()),
            "loopId": self.job.loop_id,
            "traceId": self.job.trace_id,
            "category": "alert_dispatch",
            "status": "failed" if failed else "skipped",
            "reasonCode": reason_code,
            "sinkId": sink_id,
            "droppedCount": dropped,
            "reroutedCount": rerouted,
            "message": message,
        }
        row = {key: value for key, value in row.items() if value is not None}
        self.queue.write_row(self.id, "telemetry", encode_json(row))
        if reason_code in LOSS_CODES:
            self.queue.note_loss(self.id, reason_code, dropped or 1, time.time())
        if failed:
            self.counts.add_codes([reason_code])

    def write_attempt(self, row: JsonObject) -> None:
        self.queue.write_row(self.id, "attempts", encode_json(row))

    def end(self, found: QueuedDelivery, verdict: Verdict, attempts: int) -> None:
        """End a delivery, and write that down."""
        self.note_end(found, leads=self.queue.settle(found, verdict, attempts))

    def note_end(self, found: QueuedDelivery, *, leads: bool) -> None:
        """Write down that a delivery ended; in a late row, if its escalation's row is written already.

        `leads`: with it, its sink has ended.
        """
        stored = found.stored
        if not stored.reported:
            return
        self.queue.note_settled([stored.id])
        if leads:
            entry = self._entry(self.queue.reread(found), {})
            self.counts.add_late(entry)
            row = escalation_row(
                self.job, stored, self.shared.parse(stored), self.shared.resolve(stored), [entry]
            )
            row |= {"late": True, **({"byOperator": True} if found.by_operator else {})}
            self.queue.write_row(self.id, "telemetry", encode_json(row))

    def _entry(self, found: QueuedDelivery, waiting: dict[tuple[str, str], JsonObject]) -> JsonObject:
        """What an escalation's row says of a sink now: `success`, `skipped`, `failed` or `waiting`.

        `failed` is a dead letter (`deadLetter`), or a delivery that still waits after a failed attempt or
        behind a failing sink. `waiting`: the entries of those without an attempt, by sink and peer: all
        escalations share them.
        """
        sink = self.shared.config.sinks.get(found.sink)
        kind = sink.type if sink else None
        # A delivery that waits has a reason code if it was tried.
        if found.status != "waiting" or found.reason_code:
            status = {"delivered": "success", "skipped": "skipped"}.get(found.status, "failed")
            entry = sink_entry(found.sink, kind, status, found)
            return {**entry, "deadLetter": True} if found.status == "dead" else entry
        place = (found.sink, found.peer)
        if place not in waiting:
            status, why = "waiting", "waits for its turn"
            if failing := self.shared.failing_destination(*place):
                status, why = "failed", f"waits behind earlier deliveries ({failing.reason_code})"
                if failing.next_attempt_at > time.time():
                    why += f"; next attempt at {iso(failing.next_attempt_at)}"
            verdict = Verdict("retry", "delivery_deferred", message=why)
            waiting[place] = sink_entry(found.sink, kind, status, verdict)
        return waiting[place]

    def write_rows(self, *, at_end: bool = False) -> None:
        """Write the rows of new escalations in the order of ingestion, and move what is in the outbox into
        the files. At the end of the pass, when no sender works any more, all rows are written. Before that,
        it ends at the first escalation that waits."""
        limit = ROWS_AT_ONCE if at_end else 1  # usually the first one still waits
        while self._report_some(limit, at_end=at_end) == limit:
            limit = ROWS_AT_ONCE
            self.flush_rows()
        self.flush_rows()
        if at_end:
            with self.queue.transaction():
                self._clear_outbox()

    def _report_some(self, limit: int, *, at_end: bool) -> int:
        """Put the rows of the first `limit` escalations that have none into the outbox, in one transaction,
        up to one that still waits unless `at_end`. Returns how many."""
        written: list[tuple[QueuedEscalation, bool]] = []
        waiting: dict[tuple[str, str], JsonObject] = {}
        with self.queue.transaction():
            found = self.queue.unreported(self.id, limit)
            deliveries = self.queue.deliveries_of_all(found)
            for stored in found:
                leads = [delivery for delivery in deliveries[stored.id] if delivery.lead]
                if not at_end and any(delivery.status == "waiting" for delivery in leads):
                    break
                settled = not any(delivery.status == "waiting" for delivery in deliveries[stored.id])
                written.append((stored, settled))
                if stored.unusable is not None:
                    row, text = json.loads(stored.unusable), stored.unusable
                else:
                    entries = [self._entry(delivery, waiting) for delivery in leads]
                    escalation = self.shared.parse(stored)
                    row = escalation_row(self.job, stored, escalation, self.shared.resolve(stored), entries)
                    text = encode_with_record(row, escalation)
                self.queue.write_row(self.id, "telemetry", text)
                self.counts.add(row)
                if row.get("reasonCode") in LOSS_CODES:
                    self.queue.note_loss(self.id, row["reasonCode"], 1, time.time())
            self.queue.note_reported(written)
        return len(written)

    def flush_rows(self) -> None:
        """Move the rows that are in the outbox now into the files. The next transaction deletes them from the
        outbox: if the pass is killed before that, a later one finds them in both places."""
        if self.shared.dry_run:
            return
        while True:
            with self.queue.transaction():
                self._clear_outbox()
                rows = self.queue.outbox(self.id)
            self.queue.tidy()
            if not rows:
                return
            self._append(rows)
            self._written, self._flushed = rows[-1][0], True
            if len(rows) < OUTBOX_ROWS:
                return  # what senders add meanwhile is left for the next time

    def _clear_outbox(self) -> None:
        if self._written:
            self.queue.clear_outbox(self.id, self._written)
            self._written = 0

    def _append(self, rows: Sequence[tuple[int, str, bytes]]) -> None:
        for file, path in self._row_files.items():
            if data := b"".join(row + b"\n" for _, name, row in rows if name == file):
                append_rows(path, data)

    def _recover_rows(self) -> None:
        """Append the rows that a killed pass left in the outbox, except those that are in the files."""
        while rows := self.queue.outbox(self.id):
            sizes: Counter[str] = Counter()
            for _, file, row in rows:
                sizes[file] += len(row) + 1
            there = {file: rows_at_end(self._row_files[file], size) for file, size in sizes.items()}
            missing = []
            for number, file, row in rows:
                if there[file][row]:
                    there[file][row] -= 1
                else:
                    missing.append((number, file, row))
            self._append(missing)
            with self.queue.transaction():
                self.queue.clear_outbox(self.id, rows[-1][0])

    # -- the end of a pass

    def finish(self) -> JsonObject:
        """Write the rows that are still to be written, and the summary; returns that. Raises
        DispatchError."""
        self.write_rows(at_end=True)
        summary = self.summary()
        if not self.shared.dry_run:
            write_state(self.job, summary, durable=self._flushed)
        return summary

    def summary(self) -> JsonObject:
        """The summary of the pass: what the state file holds, and `dispatch` prints."""
        counts = self.counts
        if not counts.processed:
            status = "no_new_escalations" if self.source.present else "no_source"
        elif not counts.failed:
            status = "success"
        else:
            status = "partial" if counts.dispatched else "failed"
        sinks = sink_figures(self.queue, self.id, self.shared.config.sinks)
        for sink_id, figure in sinks.items():
            sink = self.shared.config.sinks.get(sink_id)
            before = self._before.get(sink_id, {}).get("delivered", 0)
            figure |= {
                "enabled": sink is not None and sink.enabled,
                "sentCount": figure["deliveredCount"] - before,
                "perMinute": deliveries_a_minute(sink) if sink else None,
            }
        unread = self.source.count_unread()
        clock = self.shared.clock
        waiting = any(figure["waitingCount"] for figure in sinks.values())
        stopped = None
        if (waiting and clock.cut_short) or (unread and not self.has_read_all):
            stopped = "signal" if clock.stop.is_set() else "time_budget"
        return {
            **empty_summary(self.job, status),
            "processedCount": counts.processed,
            "dispatchedCount": counts.dispatched,
            "skippedCount": counts.skipped,
            "failedCount": counts.failed,
            "failureReasonCodes": sorted(counts.reason_codes),
            "escalationsLineOffset": self.source.lines_read,
            "escalationsLineCount": self.source.count_lines(),
            "unreadCount": unread,
            "stoppedBy": stopped,
            "lateDispatchedCount": counts.late_dispatched,
            "lateFailedCount": counts.late_failed,
            "waitingCount": sum(sink["waitingCount"] for sink in sinks.values()),
            "deadLetterCount": sum(sink["deadLetterCount"] for sink in sinks.values()),
            "laggingCount": sum(len(sink["laggingPeers"]) for sink in sinks.values()),
            "sinks": sinks,
            "stateVersion": STATE_VERSION,
            "queueFile": self.job.queue_file,
            "queueIdentity": [*self.queue.identity],
            "configDigest": self.shared.config.digest,
            "cursor": self.source.cursor.to_json(),
        }

    def count_deliveries(self) -> tuple[int, int]:
        """How many deliveries have ended in this pass, and how many wait."""
        tallies = self.queue.tallies(self.id)
        ended = sum(
            tally[key] - self._before.get(sink_id, {}).get(key, 0)
            for sink_id, tally in tallies.items()
            for key in ("delivered", "given_up", "skipped")
        )
        return ended, sum(tally["waiting"] for tally in tallies.values())

    def close(self) -> None:
        self.source.close()
        if not self.shared.dry_run:
            self.queue.release_loop(self.id)


def after_shell(job: Job, document: JsonObject, cursor: Cursor) -> Cursor:
    """The cursor after the lines that the shell dispatcher has read, if it was run again after our last pass:
    then `document`, the state, is newer than the cursor, and another program wrote it."""
    lines = count_in(document, "escalationsLineOffset")
    state = stat_of(job.state_file)
    is_newer = state is not None and state.st_mtime > cursor.seen_at
    if not is_newer or "stateVersion" in document or lines <= cursor.line:
        return cursor
    return moved_on(job.escalations_file, cursor, lines) if cursor.number else Cursor(line=lines)


class PastRun(NamedTuple):
    """What a loop's files say of earlier passes, if the queue does not know the loop: where to go on, how
    many deliveries waited and how many were dead letters, and by sink the line of the oldest that waited, or
    0 if that is in a rotated file."""

    cursor: Cursor
    waiting: int
    dead: int
    first_lines: dict[str, int]
    # Reason code, count and time of losses that the queue had on record.
    losses: Sequence[tuple[str, int, float]]

    @property
    def lost(self) -> str:
        """What was in the queue and reached nobody, in words; empty if nothing was."""
        return open_words(self.waiting, self.dead)


def read_past(job: Job) -> PastRun:
    """Find out where a loop goes on that the queue does not know: after the last record that a summary of
    ours, the state of an earlier dispatcher, or a row in the telemetry accounts for. Changes nothing.

    Raises StateError for a state file that cannot be read, is newer, or is damaged beyond that; StorageError.
    """
    damaged = is_foreign(job)
    document = {} if damaged else read_summary(job)
    cursor = Cursor(line=count_in(document, "escalationsLineOffset"))
    with contextlib.suppress(*MALFORMED):
        cursor = Cursor.from_json(document["cursor"])
    first: dict[str, int] = {}
    with contextlib.suppress(*MALFORMED):
        first = {
            # Commands can only name lines of the current file.
            name: line if figure.get("oldestWaitingSegment", cursor.segment) == cursor.segment else 0
            for name, figure in document["sinks"].items()
            if (line := count_in(figure, "oldestWaitingLine"))
        }
    waiting, dead = count_in(document, "waitingCount"), count_in(document, "deadLetterCount")
    losses: list[tuple[str, int, float]] = []
    # A state that an operator wrote, to begin at some line, holds no more than that.
    if not document or "updatedAt" in document:
        last, left, losses = read_past_rows(job, cursor)
        cursor = after_row(job, cursor, last, damaged=damaged)
        for (_, sink), (line, given_up) in left.items():
            dead += given_up
            waiting += not given_up
            if not given_up:
                first.setdefault(sink, line)
    return PastRun(cursor, waiting, dead, first, losses)


def read_past_rows(
    job: Job, cursor: Cursor
) -> tuple[JsonObject | None, dict[tuple[str, str], tuple[int, bool]], list[tuple[str, int, float]]]:
    """Read what a loop's telemetry says of earlier passes. Behind the cursor of the last summary there are
    rows if a pass was killed before it wrote its own.

    Returns the last row of an escalation; what was not delivered of the escalations behind the cursor, by
    escalation and sink: the line, and whether it is a dead letter; and the losses of the last day: reason
    code, count and time. Raises StorageError.
    """
    last: JsonObject | None = None
    left: dict[tuple[str, str], tuple[int, bool]] = {}
    losses: list[tuple[str, int, float]] = []
    since = time.time() - LOSS_SHOWN
    for row in iterate_rows(job.telemetry_file):
        if row.get("category") != "alert_dispatch" or row.get("loopId") != job.loop_id:
            continue
        if row.get("reasonCode") == "queue_lost":
            left.clear()  # it is reported
        at = parse_time(row.get("timestamp")) or 0.0
        # The shell dispatcher's rows of escalations have no position.
        ours = "position" in row or ("escalation" not in row and "rawLine" not in row)
        if ours and at > since and row.get("reasonCode") in LOSS_CODES:
            losses.append((row["reasonCode"], count_in(row, "droppedCount") or 1, at))
        if "late" not in row and ("escalation" in row or "rawLine" in row):
            last = row
        with contextlib.suppress(*MALFORMED):
            if record_end(row) <= (cursor.number, cursor.offset):
                continue
            for entry in row["sinks"]:
                key = row["escalationId"], entry["id"]
                left[key] = row["position"]["line"], entry.get("deadLetter") is True
                if entry["status"] in ("success", "skipped"):
                    del left[key]
    return last, left, losses


def record_end(row: JsonObject) -> tuple[int, int]:
    """Where the record of a row ends: number of the file, offset. Raises one of MALFORMED."""
    place = row["position"]
    return int(place["segment"].partition("-")[0]), int(place["end"])


def what_to_do_about_lost(job: Job, past: PastRun) -> str:
    """The commands that send what waited in a queue that is gone, as far as it is known what that was; and
    where its dead letters are named."""
    advice: list[str] = []
    if past.waiting:
        places = [
            ["--from-line", str(line), "--sink", name] for name, line in past.first_lines.items() if line
        ]
        if places or not past.first_lines:
            commands = [command_line("redeliver", job, *place) for place in places or [["--from-line", "1"]]]
            advice.append(f"run {' and '.join(f'`{command}`' for command in commands)}")
        if rotated := [name for name, line in past.first_lines.items() if not line]:
            advice.append(
                f"append what waited for {', '.join(rotated)} to the source again: it is in a rotated file"
            )
    if past.dead:
        advice.append(f"see the dead letters with `grep deadLetter {shell_line(job.telemetry_file)}`")
    return "; ".join(advice)


def other_queue(job: Job, document: JsonObject) -> tuple[str, Cursor] | None:
    """The queue that the last pass of a loop used, if it is not this one, and how far that pass has read the
    source. `document`: the summary of that pass."""
    with contextlib.suppress(*MALFORMED):
        queue, cursor = str(document["queueFile"]), Cursor.from_json(document["cursor"])
        # Else it is the state of another loop, or that of the repo of which this one is a copy.
        same_source = os.path.realpath(document["escalationsFile"]) == os.path.realpath(job.escalations_file)
        if document["loopId"] == job.loop_id and same_source and not same_file(queue, job.queue_file):
            return queue, cursor
    return None


def wrong_queue(job: Job, document: JsonObject) -> StateError | None:
    """The error that the last pass of a loop used another queue, and that one is still there. `document`: the
    summary of that pass."""
    other, _ = other_queue(job, document) or ("", None)
    if not other or not may_be_there(other):
        return None
    if os.path.lexists(job.queue_file):
        instead = f"move {other} away: what waits in it is then reported as lost"
    else:
        instead = f"run `{shell_line('mv', other, job.queue_file)}` while no pass runs"
    return StateError(
        f"loop {job.loop_id} uses the queue {other}, not {job.queue_file}: each would send again what the "
        "other one has sent",
        [
            f"name the same queue wherever a pass runs: --queue-file, or {QUEUE_ENV}",
            f"to go on with {job.queue_file}, {instead}",
        ],
    )


def is_foreign(job: Job) -> bool:
    """Tell whether the state file is damaged or belongs to another loop. Raises StateError."""
    try:
        document = read_state_document(job.state_file) or {}
    except ValueError:
        return True
    return "cursor" in document and document.get("loopId") != job.loop_id


def after_row(job: Job, cursor: Cursor, last: JsonObject | None, *, damaged: bool) -> Cursor:
    """The cursor after the record of the last row, if that is behind `cursor`. Rows of the shell dispatcher
    have no position: of them the record is looked for in the source.

    Raises StateError if the state is damaged, and the record of such a row is not to be found; StorageError.
    """
    if last is None:
        return cursor
    with contextlib.suppress(*MALFORMED):
        number, end = record_end(last)
        if (number, end) <= (cursor.number, cursor.offset):
            return cursor
        fingerprint = last["position"]["segment"].partition("-")[2]
        return find_place(job.escalations_file, number, fingerprint, end, int(last["position"]["line"]))
    if cursor.number or cursor.line:
        return cursor
    lines = lines_up_to(job, last)
    if not lines and damaged:
        raise StateError(
            f"the state file {job.state_file} is damaged, and telemetry does not say what was sent",
            [
                "the damaged file is left as it is, and nothing is sent",
                f"to go on after line N of {job.escalations_file}, write this to the state file:",
                '{"schemaVersion":"v1","escalationsLineOffset":N}',
            ],
        )
    return Cursor(line=lines)


def lines_up_to(job: Job, row: JsonObject) -> int:
    """How many lines of the source end with the record of a row that has no position; 0 if it is not
    there."""
    found = 0
    with contextlib.closing(Source(job.escalations_file, Cursor()).find()) as source:
        for chunk in source.chunks():
            for line in chunk.lines:
                item = parse_line(line.text, line.size, job.loop_id)[0]
                raw = item.raw_line if isinstance(item, Unusable) and item.body is None else None
                if raw == row["rawLine"] if "rawLine" in row else item.body == row.get("escalation"):
                    found = line.number
    return found


def find_place(path: str, number: int, fingerprint: str, offset: int, line: int) -> Cursor:
    """A cursor at a place that a row names, in the file that has this fingerprint now."""
    place = Cursor(number, fingerprint, offset=offset, line=line, seen_at=time.time())
    for name in (path, *reversed(neighbours(path, os.path.realpath(path)))):
        with contextlib.suppress(OSError), contextlib.closing(LogFile(name)) as file:
            if file.fingerprint() == fingerprint and file.size >= offset:
                return place.moved_to(file.identity)._replace(tail=file.tail_before(offset))
    return place  # the file is gone: what came after it is new


def rows_at_end(path: str, size: int) -> Counter[bytes]:
    """The rows in the last bytes of a file of rows, and of the files that rotations have just made of it,
    compressed or not; a little more than `size` bytes of each, since others append to it as well.

    Raises StorageError.
    """
    rows: Counter[bytes] = Counter()
    rotated = [name for name, key in neighbours(path).items() if key]
    for name in (path, *rotated[-2:]):
        try:
            with contextlib.closing(LogFile(name)) as file:
                start = max(0, file.size - size - RECENT_BYTES)
                rows.update(file.read(file.size - start, start).split(b"\n"))
        except FileNotFoundError:
            continue
        except OSError as error:
            if name == path:
                raise storage_error("read", path, error) from None
    return rows


# ---------------------------------------------------------------------------------------------------------
# A destination in a pass: what goes out next, and what its answer means
# ---------------------------------------------------------------------------------------------------------
# A Sender is a thread that serves one destination for all loops of a pass: order, pace, requests, back-off.
# Knows what each verdict means for a delivery and its destination.

# The waits between quick tries within a pass are up to twice as many seconds, then four times, and so on.
QUICK_RETRY_SECONDS = 0.25
# What is left of a wait that another pass began is waited out if it is no longer than this.
QUICK_WAIT_MAX = 2.0
# How many repeats or expired deliveries are settled in one transaction.
SETTLED_AT_ONCE = 1000
# How many deliveries are fetched at a time, and for how many seconds they may be sent: a delivery with a
# worse severity waits no longer than that.
PREFETCH_COUNT = 20
PREFETCH_SECONDS = 0.1
# What ends deliveries without a request.
REPEATED = Verdict("skipped", "repeat_suppressed")
EXPIRED = Verdict("dead_letter", "delivery_expired", message="waited longer than giveUpAfterSeconds")
MISSED = Verdict("skipped", "peer_missed", message="another peer took it, and it is too old for this one")


class Pace:
    """Limits the requests to a destination in any minute; a sixth of them may go out at once.

    The generic cell rate algorithm (ITU-T I.371). It needs one number: until when the requests that were sent
    are paid for, in seconds since the epoch.
    """

    def __init__(self, per_minute: int) -> None:
        burst = max(1, per_minute // 6)
        self._interval = 60.0 / (per_minute - burst + 1)
        self._credit = (burst - 1) * self._interval

    @classmethod
    def of(cls, sinks: Iterable[Sink]) -> Self | None:
        """The pace of sinks that point at one destination: the slowest; None if none has a limit."""
        rates = [rate for rate in map(requests_a_minute, sinks) if rate]
        return cls(min(rates)) if rates else None

    def wait(self, paid_until: float, now: float) -> float:
        """Seconds until the next request may start."""
        wait = paid_until - self._credit - now
        # A longer wait is no debt: the clock was ahead when it was noted. A second allows for corrections.
        return wait if 0 < wait <= self._interval + 1.0 else 0.0

    def spend(self, paid_until: float, now: float) -> float:
        """Until when the requests are paid for, once another one starts."""
        return max(min(paid_until, now + self._credit), now) + self._interval


# Deliveries that go out as one request, the oldest first, as the queue and as the adapter know them.
Batch = list[tuple[QueuedDelivery, Delivery]]


class Retry(NamedTuple):
    """When deliveries that failed are tried again.

    `wait`: seconds. `quick`: within this pass. `alone`: each in a request of its own, and not before that
    time. Otherwise they are tried as soon as their destination is.
    """

    wait: float
    quick: bool = False
    alone: bool = False


class Sender:
    """Sends what waits for one destination, in a thread that ends with the process.

    However many loops there are, a destination has one connection, one pace and, if it is down, one failure.
    """

    def __init__(self, shared: Shared, sink: Sink, peer: str) -> None:
        self.shared = shared
        self.sink = sink
        self.peer = peer
        self.queue = shared.queue
        self.adapter = ADAPTERS[sink.type]
        self.digest = shared.targets[sink.id, peer]
        # The digest of all settings and secrets.
        self.setup = shared.digest([sink.settings, dict(sink.secrets)])
        # Nothing more is sent in this pass.
        self.resting = False
        # The thread is done, or nobody waits for it any more.
        self.ended = False
        # When the main thread gives up waiting for the attempt that is on its way. Monotonic seconds.
        self.deadline: float | None = None
        self._pace = Pace.of(shared.sinks_at(self.digest))
        # No wait after a failure is longer, unless the clock was ahead.
        self._longest_wait = max(shared.config.policy.backoff_max, RETRY_AFTER_MAX)
        self._client: Client | None = None
        self._batch: Batch | None = None
        self._clock_offset: float | None = None
        self._started = 0.0
        # Attempts in a row that failed in this pass.
        self._failures_in_row = 0
        # Escalations that this sink may not be able to take, and that were tried in this pass.
        self._set_aside: set[int] = set()
        # The loop that was served last, by this pass or an earlier one; -1: none, or not known yet.
        self._last_loop = -1
        # What was fetched and is still to be sent, and until when it may be. Seconds since the epoch.
        self._prefetched: deque[tuple[QueuedDelivery, Delivery]] = deque()
        self._prefetched_until = 0.0
        # Attempts by loop and outcome that are still to be counted in the queue.
        self._counted: Counter[tuple[int, Outcome]] = Counter()
        self.thread = threading.Thread(target=self._run, name=f"sink {sink.id} {peer}", daemon=True)

    @property
    def is_sending(self) -> bool:
        """Tell whether a request was chosen whose answer is not written down. With the queue's lock held."""
        return self._batch is not None

    def _run(self) -> None:
        try:
            while not self.ended and self._serve():
                pass
        except Exception as error:  # noqa: BLE001 - the main thread must learn of it
            self.shared.fail(as_dispatch_error(error))
        with self.queue.changed:
            self.ended = True
            self.queue.changed.notify_all()

    def _serve(self) -> bool:
        """Send until there is a reason to pause; tells whether to go on after it."""
        clock = self.shared.clock
        with self.queue.transaction():
            if self._last_loop < 0:
                self.queue.forget_waits(self.sink.id, self.peer, self.setup)
            destination = self.queue.use_destination(self.sink.id, self.peer, self.digest, self.setup)
            self._clock_offset = destination.clock_offset
            if self._last_loop < 0:
                self._last_loop = destination.last_loop
        with self.queue.probing(destination, max(0.0, clock.left)) as allowed:
            if not allowed:
                clock.cut_short = True
                return False
            step = self._record_and_choose(None)
            while isinstance(step, list):
                step = self._record_and_choose(self._send(step))
        if step is not None:
            return clock.pause(step)
        return not self.resting and self._wait_for_work()

    def _record_and_choose(self, verdict: Verdict | None) -> Batch | float | None:
        """In one transaction, write down what came of the last request, and choose the next one: see `_next`.

        `verdict`: on the last request; None before the first one.
        """
        with self.queue.transaction():
            destination = self._known()
            if verdict is not None and self._batch is not None:
                self._record(self._batch, verdict, destination)
                if verdict.outcome == "delivered":
                    self.queue.share(destination)
                else:
                    destination = self._known()
            self._batch = None
            if self.shared.error is not None:
                self.resting = True
            step = None if self.resting or self.ended else self._next(destination)
            if isinstance(step, list):
                self._batch = step
            else:
                self._write_counts()
            return step

    def _wait_for_work(self) -> bool:
        """Wait until there is something to send; False if it never will in this pass."""
        with self.queue.changed:
            while not self.ended and self.shared.clock.left > 0:
                if self.has_work():
                    return True
                if not self.shared.ingesting:
                    return False
                self.queue.changed.wait(ROW_INTERVAL)
        return False

    def _known(self) -> Destination:
        return self.queue.destination(self.sink.id, self.peer, self.digest)

    # -- what goes out next

    def _next(self, destination: Destination) -> Batch | float | None:
        """What goes out with the next request, or seconds to wait before one, or None: nothing in this pass.

        What needs no request, because it has expired or is a repeat, is settled on the way.
        """
        now = time.time()
        if self.shared.clock.left <= 0:
            self.resting = self.shared.clock.cut_short = True
            return None
        wait = destination.next_attempt_at - now
        if 0 < wait <= self._longest_wait:
            if wait <= QUICK_WAIT_MAX or self._failures_in_row:
                return wait
            self.resting = True
            return None
        paid_until = self.queue.paced_until(self.digest) if self._pace else 0.0
        if self._pace and not self.shared.dry_run:
            wait = self._pace.wait(paid_until, now)
            if wait > 0:
                return wait if self.has_work() else None
        batch = self._gather(now, failing=destination.consecutive_failures > 0)
        if not isinstance(batch, list):
            return batch
        if self._pace:
            self.queue.spend_rate(self.digest, self._pace.spend(paid_until, now))
        return batch

    def has_work(self) -> bool:
        """Tell whether something waits that may be sent now."""
        return next(self._candidates(1, time.time()), None) is not None

    def _gather(self, now: float, *, failing: bool) -> Batch | float | None:
        """What goes out with the next request; 0.0 if something was settled and the next one is to be looked
        for, None if nothing waits."""
        if self._prefetched and now < self._prefetched_until and self.shared.active:
            return [self._prefetched.popleft()]
        self._put_back()
        size = self.adapter.batch_size(self.sink)
        # One by one and of one loop: only a worse severity could come in between.
        prefetch = size == 1 and len(self.shared.active) == 1 and not self.shared.config.repeat_window
        most = PREFETCH_COUNT if prefetch else size
        found: Batch = []
        settled = 0
        if self._set_aside and failing:
            # A record that was tried less often shows whether the fault is in the record or in the sink.
            found, settled = self._choose(most, now, below_limit=True)
        if not found and not settled:
            found, settled = self._choose(most, now)
        if not found:
            return 0.0 if settled else None
        self.queue.set_in_flight((item for item, _ in found), in_flight=True)
        if prefetch:
            self._prefetched.extend(found[1:])
            self._prefetched_until = now + PREFETCH_SECONDS
            del found[1:]
        return sorted(found, key=lambda pair: pair[0].escalation)

    def _choose(self, most: int, now: float, *, below_limit: bool = False) -> tuple[Batch, int]:
        """Choose up to `most` deliveries, and settle those that need no request; returns how many these were
        as well. `below_limit`: only what was tried less than SAME_RECORD_ATTEMPTS times."""
        found: Batch = []
        settled = 0
        # By loop and subject, when what was chosen of it was written; None: a repeat was left behind.
        subjects: dict[tuple[int, str], float | None] = {}
        for item in self._candidates(most, now, below_limit=below_limit):
            if len(found) == most or settled >= SETTLED_AT_ONCE or (found and item.alone):
                break
            delivery, subject, verdict = self._look_at(item, now)
            written_at = parse_time(item.stored.written_at) or 0.0
            if subject is not None and (item.loop, subject) in subjects:
                before = subjects[item.loop, subject]
                if before is None:
                    break  # whether it is a repeat depends on the one that was left behind
                if abs(written_at - before) < self.shared.config.repeat_window:
                    subjects[item.loop, subject] = None  # it is a repeat if the sink takes the other one
                    continue
                delivery, verdict = delivery._replace(repeats=0), None
            if verdict is not None:
                self._settle_unsent(item, subject, verdict)
                settled += 1
                continue
            found.append((item, delivery))
            if subject is not None:
                subjects[item.loop, subject] = written_at
            self._last_loop = item.loop
            if item.alone:
                break
        return found, settled

    def _candidates(self, most: int, now: float, *, below_limit: bool = False) -> Iterator[QueuedDelivery]:
        """What waits and may be sent now, in the order in which it goes out."""
        # Some of them may be repeats, which are skipped.
        window = SETTLED_AT_ONCE // 10 if self.shared.config.repeat_window else most
        window += len(self._set_aside)
        times = (now, now + self._longest_wait)
        items = self.queue.waiting_in_turn(
            *(self.sink.id, self.peer, self.shared.active, self._last_loop, times, window),
            below_limit=below_limit,
            by_operator=not self.sink.enabled,
        )
        return (item for item in items if item.escalation not in self._set_aside)

    def _look_at(self, item: QueuedDelivery, now: float) -> tuple[Delivery, str | None, Verdict | None]:
        """A delivery as the adapter knows it; its subject, if repeats are held back; and a verdict, if it
        needs no request."""
        escalation, resolution = self.shared.parse(item.stored), self.shared.resolve(item.stored)
        delivery = Delivery(escalation, resolution)
        policy = self.shared.config.policy
        if not item.lead and not item.by_operator:
            written = max(parse_time(item.stored.written_at) or 0.0, item.waiting_since)
            catch_up = written + self.adapter.seconds_to_catch_up(self.sink)
            lead = self.queue.lead(item.escalation, item.sink)
            if now >= catch_up and lead is not None and lead.status != "waiting":
                return delivery, None, MISSED
        if now - item.waiting_since > policy.give_up_after and not item.in_flight:
            return delivery, None, EXPIRED
        if item.by_operator:
            return delivery, None, None
        window = self.shared.config.repeat_window
        written_at = parse_time(item.stored.written_at)
        if not window or written_at is None:
            return delivery, None, None
        subject = subject_of(escalation, resolution)
        last = self.queue.last_sent(item, subject)
        if last is not None:
            sent, repeats, since = last
            before = parse_time(sent)
            if before is not None and abs(written_at - before) < window:
                message = f"a repeat of what this sink was sent of {sent}"
                return delivery, subject, REPEATED._replace(message=message)
            if since is not None:
                delivery = delivery._replace(repeats=repeats, repeats_since=since)
        return delivery, subject, None

    def _settle_unsent(self, item: QueuedDelivery, subject: str | None, verdict: Verdict) -> None:
        """End a delivery that is sent no request. `subject`: of what it repeats."""
        if subject is not None:
            self.queue.note_repeat(item, subject, item.stored.written_at or "")
        loop = self.shared.loops[item.loop]
        attempt = item.attempts if verdict is EXPIRED else 0
        loop.write_attempt(attempt_row(loop.job, self.sink, item, None, verdict, attempt, 0.0))
        loop.end(item, verdict, item.attempts)

    # -- the request

    def _send(self, batch: Batch) -> Verdict:
        """Send one request with these deliveries, and judge what comes back."""
        job = self.shared.loops[batch[0][0].loop].job
        origin = Origin(job.repo, job.trace_id, time.time(), clock_correction(self._clock_offset))
        if self.shared.dry_run:
            if self.shared.show_payload:
                for item, delivery in batch:
                    request = self.adapter.build(self.sink, [delivery], origin)
                    self.shared.requests[item.key] = request
            return Verdict("delivered")
        verdict = self._attempt(batch, origin)
        if (
            verdict.outcome == "delivered"
            and self.adapter.ends_by_clock
            and clock_correction(verdict.clock_offset) != origin.clock_offset
            # A clock that is never the same must not have alerts sent for ever.
            and not any(item.fault == "wrong_clock" for item, _ in batch)
        ):
            self._clock_offset = verdict.clock_offset
            message = "took it, but by its clock it may have ended: it is sent again with another end"
            verdict = verdict._replace(
                outcome="retry", reason_code="http_error", message=message, fault="wrong_clock"
            )
        return verdict

    def _attempt(self, batch: Batch, origin: Origin) -> Verdict:
        self._started = 0.0
        # Before the deadline is set: on a busy machine, this takes longer than many requests.
        deliveries = [delivery for _, delivery in batch]
        request = build_request(self.adapter, self.sink, deliveries, origin)
        if isinstance(request, Verdict):
            return request
        if self._client is None:
            import requests  # noqa: F401

            url = self.shared.peers[self.sink.id][self.peer]
            self._client = Client(url, self.sink.timeout_seconds, self.sink.secrets.get(CA_FILE_KEY))
        self._started = time.monotonic()
        self.deadline = self._started + attempt_seconds(self.sink.timeout_seconds)
        verdict = send_and_judge(self.adapter, self.sink, self._client, request, self.shared.redactor)
        self.deadline = None
        return verdict

    def time_out(self) -> None:
        """Record the attempt that is on its way as timed out, and wait for its thread no longer. The main
        thread calls this, with the queue's lock held."""
        with self.queue.transaction():
            self.deadline = None
            if self._batch is not None and not self.ended:
                self.ended = self.resting = True
                self._failures_in_row = self.shared.config.policy.max_attempts_per_pass
                destination = self._known()
                verdict = timed_out(self.sink, self._client.host if self._client else "the sink")
                self._record(self._batch, verdict, destination)
                self._batch = None
                self._write_counts()
                self.queue.stop_probing(destination)

    # -- what came of it

    def _record(self, batch: Batch, verdict: Verdict, destination: Destination) -> None:
        """Write down what came of a request: in the transaction in which the next one is chosen."""
        now = time.time()
        if self.peer:
            # Another peer may have taken the lead meanwhile, and the escalation's row may be written.
            batch = [(self.queue.reread(item), delivery) for item, delivery in batch]
        if verdict.outcome != "delivered":
            self._put_back()
        verdict = self._verdict_for(batch, verdict)
        retry = None
        if verdict.outcome not in STATUS_OF_OUTCOME:
            retry = self._postpone(batch, destination, verdict, now)
        else:
            self._note_answer(destination, verdict, now)
        self._write_attempts(batch, verdict, retry, now)
        for item, delivery in batch:
            self._counted[item.loop, verdict.outcome] += 1
            if retry is not None:
                not_before = now + retry.wait if retry.alone else 0.0
                self.queue.note_attempt(item, verdict, now, not_before=not_before, alone=retry.alone)
                continue
            # What an operator sends again is old: a window is not counted from it.
            opens_window = self.shared.config.repeat_window and not item.by_operator
            if opens_window and verdict.outcome == "delivered" and item.stored.written_at:
                subject = subject_of(delivery.escalation, delivery.resolution)
                self.queue.note_sent(item, subject, item.stored.written_at)
            self.shared.loops[item.loop].end(item, verdict, item.attempts + 1)

    def _verdict_for(self, batch: Batch, verdict: Verdict) -> Verdict:
        """What a verdict on a request means for its deliveries. If several were refused together, each is
        tried alone. A record on which this program has failed too often is given up."""
        together = len(batch) > 1
        if verdict.outcome == "dead_letter" and together:
            return verdict._replace(outcome="retry")
        ours = verdict.outcome == "retry" and verdict.fault == "adapter_fault"
        if ours and not together and batch[0][0].attempts + 1 >= SAME_RECORD_ATTEMPTS:
            return verdict._replace(outcome="dead_letter")
        return verdict

    def _note_answer(self, destination: Destination, verdict: Verdict, now: float) -> None:
        self._failures_in_row = 0
        # It is written down before it is too old to be fresh, and not with each answer: that would cost a
        # write a request. A time in the future is that of a clock that was ahead.
        noted = now - FRESH_SECONDS / 2 <= (destination.last_success_at or 0.0) <= now
        if destination.consecutive_failures or not noted or verdict.fault == "wrong_clock":
            self.queue.note_answer(destination, verdict, now)

    def _write_attempts(self, batch: Batch, verdict: Verdict, retry: Retry | None, now: float) -> None:
        seconds = time.monotonic() - self._started if self._started else 0.0
        for index, (item, delivery) in enumerate(batch):
            loop = self.shared.loops[item.loop]
            row = attempt_row(loop.job, self.sink, item, delivery, verdict, item.attempts + 1, seconds)
            if len(batch) > 1:
                row |= {"batchSize": len(batch), "batchIndex": index}
            if retry is not None:
                row["nextAttemptAt"] = iso_milliseconds(now + retry.wait)
                if not retry.quick:
                    row["backoffSeconds"] = round(retry.wait, 3)
            loop.write_attempt(row)

    def _put_back(self) -> None:
        """Give back what was fetched and not sent, so that the next choice is made anew."""
        self.queue.set_in_flight((item for item, _ in self._prefetched), in_flight=False)
        self._prefetched.clear()

    def _write_counts(self) -> None:
        """Write down how many attempts there were, and for which loop the last one was. If the pass is
        killed, the counts since the last time are lost."""
        self._put_back()
        for (loop, outcome), count in self._counted.items():
            self.queue.count_attempts(loop, self.sink.id, outcome, count)
        if self._counted:
            self.queue.note_last_loop(self._known(), self._last_loop)
        self._counted.clear()

    def _postpone(self, batch: Batch, destination: Destination, verdict: Verdict, now: float) -> Retry:
        """Decide when to try again, and note what that means for the destination."""
        # A refusal of several together, see `_verdict_for`, and a wrong clock, see `_send`: the sink is well.
        if verdict.fault in ("record_refused", "wrong_clock"):
            self._note_answer(destination, verdict, now)
            return Retry(0.0, quick=True, alone=verdict.fault == "record_refused")
        self._failures_in_row += 1
        attempts = max(item.attempts for item, _ in batch) + 1
        if attempts >= SAME_RECORD_ATTEMPTS or verdict.fault == "adapter_fault":
            self._set_aside |= {item.escalation for item, _ in batch}
            return self._postpone_suspect(batch, attempts, destination, verdict, now)
        quick = self._quick_wait(verdict)
        if quick is not None:
            self.queue.note_failure(destination, verdict, now, now + quick, destination.backoff_step)
            return Retry(quick, quick=True)
        self.resting = True
        wait = self._backoff(verdict, destination.backoff_step)
        self.queue.note_failure(destination, verdict, now, now + wait, destination.backoff_step + 1)
        return Retry(wait)

    def _postpone_suspect(
        self, batch: Batch, attempts: int, destination: Destination, verdict: Verdict, now: float
    ) -> Retry:
        """Decide when to try deliveries again whose records may be at fault, and not the sink."""
        first = min(item.first_failed_at or now for item, _ in batch)
        well = not destination.consecutive_failures and (destination.last_success_at or 0.0) > first
        # A sink that says how long to wait, or that is misconfigured, does not mean the record.
        may_be_record = verdict.outcome == "retry" and not verdict.retry_after
        if verdict.fault == "adapter_fault" or (may_be_record and well):
            # The destination takes other records: it need not back off.
            self._failures_in_row = 0
            return Retry(self._backoff(verdict, max(0, attempts - SAME_RECORD_ATTEMPTS)), alone=True)
        wait = self._backoff(verdict, destination.backoff_step)
        # The next record may get through: it is tried once in this pass.
        tries = max(2, self.shared.config.policy.max_attempts_per_pass)
        one_more = may_be_record and self._failures_in_row < tries
        self.resting = not one_more
        step = destination.backoff_step + 1
        self.queue.note_failure(destination, verdict, now, 0.0 if one_more else now + wait, step)
        # Longer than the destination waits: when it is asked again, other records go first.
        return Retry(wait if may_be_record else 2 * wait, alone=True)

    def _quick_wait(self, verdict: Verdict) -> float | None:
        """Seconds until another try within this pass; None if it is left to a later pass.

        After a timeout, a hang-up or a gateway's fault the sink may have acted on the request: a quick try
        could repeat it.
        """
        policy = self.shared.config.policy
        if (
            verdict.outcome != "retry"
            or not verdict.not_taken
            or self._failures_in_row >= policy.max_attempts_per_pass
        ):
            return None
        wait = verdict.retry_after
        if wait is None:
            wait = jitter(min(policy.backoff_initial, QUICK_RETRY_SECONDS * 2**self._failures_in_row))
        return wait if wait < self.shared.clock.left else None

    def _backoff(self, verdict: Verdict, step: int) -> float:
        """Seconds until a later pass may try: exponential with full jitter, or long if somebody has to fix
        something first."""
        policy = self.shared.config.policy
        if verdict.outcome == "misconfigured":
            return max(verdict.retry_after or 0.0, policy.backoff_max / 2 + jitter(policy.backoff_max / 2))
        longest = min(policy.backoff_max, policy.backoff_initial * 2 ** min(step, 30))
        return max(verdict.retry_after or 0.0, jitter(longest))


def subject_of(escalation: Escalation, resolution: Resolution) -> str:
    """What repeats of an escalation have in common: category, event severity and reason codes, as a hash."""
    about = [escalation.category, resolution.event_severity, sorted(reason_codes(escalation))]
    listed = escalation.body.get("reasonCodes")
    # Codes that no message shows tell records apart as well.
    if isinstance(listed, list) and len(listed) > SHOWN_ITEMS:
        about.append(listed[SHOWN_ITEMS:])
    return short_hash(encode_json(about))


def jitter(longest: float) -> float:
    """A random part of a wait, so that machines do not all come back at the same moment."""
    import random

    return random.uniform(0.0, longest)  # noqa: S311


# ---------------------------------------------------------------------------------------------------------
# The pass: loops and senders side by side
# ---------------------------------------------------------------------------------------------------------
# Opens the queue, takes one loop or many from begin to finish, and gives up requests that hang. Finds out
# which loops are idle, and does nothing else for them.

# How many loops with work are open at a time, and the files that each needs: lock, source, rotated files.
LOOPS_AT_ONCE = 64
FILES_OF_A_LOOP = 8
FILES_BESIDES = 64
# What comes of a loop: the summary of its pass, or what stopped it.
Result = JsonObject | DispatchError
# Shows how far a pass is: deliveries that have ended, those there are, and the seconds left.
Progress = Callable[[int, int, float], None]


class Pass:
    """One pass over one loop or many, whose locks are held."""

    def __init__(self, shared: Shared, progress: Progress | None = None) -> None:
        self._shared = shared
        self._progress = progress
        self._senders: dict[tuple[str, str], Sender] = {}

    def run(self, loops: Sequence[Loop]) -> dict[str, Result]:
        """Finish loops that have begun, side by side. Returns what came of each, by its id."""
        shared = self._shared
        shared.active = {loop.id for loop in loops}
        with shared.queue.transaction():
            for sink_id, peers in shared.peers.items():
                shared.queue.retire_peers(sink_id, peers)
        try:
            self._ingest(loops)
            self._deliver(loops)
        except BaseException as error:
            # The senders' threads must not go on with a queue that is about to be closed.
            shared.fail(error if isinstance(error, DispatchError) else StorageError("the pass has ended"))
            raise
        if shared.error is not None:
            raise shared.error
        self._show_progress()
        outcomes: dict[str, Result] = {}
        for loop in loops:
            summary = self._guarded(loop, loop.finish)
            outcomes[loop.job.loop_id] = loop.error or loop.unreadable or cast("JsonObject", summary)
        return outcomes

    def _ingest(self, loops: Sequence[Loop]) -> None:
        """Ingest what is new, a chunk of one loop after the other. Sending starts with the first chunk."""
        shared = self._shared
        least_left = shared.clock.left * (1 - READING_SHARE)
        reading = deque(loops)
        while reading:
            loop = reading.popleft()
            may_be_more = self._guarded(loop, loop.ingest)
            if may_be_more and shared.clock.left > least_left:
                reading.append(loop)
            self._start_senders()
            self._look_after_senders()
            self._show_progress()
            shared.queue.tidy()
        with shared.queue.changed:
            shared.ingesting = False
            shared.queue.changed.notify_all()

    def _deliver(self, loops: Sequence[Loop]) -> None:
        """Look after the senders until the last one ends, and write rows meanwhile."""
        all_started = self._start_senders()
        written_at = time.monotonic()
        while not all_started or any(not sender.ended for sender in self._senders.values()):
            self._look_after_senders(wait=ROW_INTERVAL)
            self._show_progress()
            all_started = all_started or self._start_senders()
            if time.monotonic() - written_at >= ROW_INTERVAL:
                for loop in loops:
                    self._guarded(loop, loop.write_rows)
                written_at = time.monotonic()

    def _show_progress(self) -> None:
        if self._progress is None:
            return
        with self._shared.queue.changed:
            counts = [loop.count_deliveries() for loop in self._shared.loops.values()]
        done = sum(ended for ended, _ in counts)
        self._progress(done, done + sum(waiting for _, waiting in counts), self._shared.clock.left)

    def _guarded(self, loop: Loop, step: Callable[[], Any]) -> Any:
        """Go on with one loop, unless it has failed; if it fails now, the others go on."""
        if loop.error is not None:
            return None
        try:
            return step()
        except DamagedQueueError:
            raise
        except OSError as error:
            loop.error = storage_error("read", loop.job.escalations_file, error)
        except Exception as error:  # noqa: BLE001 - the other loops go on
            loop.error = as_dispatch_error(error)
        with self._shared.queue.changed:
            self._shared.active.discard(loop.id)
        return None

    def _start_senders(self) -> bool:
        """Start a sender for each destination for which something waits. Returns False if the system gives no
        thread for some, and others may leave them theirs."""
        shared = self._shared
        for sink in shared.sinks:
            for peer in shared.peers[sink.id]:
                place = sink.id, peer
                with shared.queue.changed:
                    if place in self._senders or not shared.queue.has_waiting(*place, shared.active):
                        continue
                    sender = self._senders[place] = Sender(shared, sink, peer)
                try:
                    sender.thread.start()
                except RuntimeError:  # the system gives none
                    del self._senders[place]
                    return shared.error is not None or not self._may_get_a_thread()
        return True

    def _may_get_a_thread(self) -> bool:
        """Tell whether a sender may leave its thread to another one. If none has one, the pass fails."""
        if any(not sender.ended for sender in self._senders.values()):
            return True
        # An attempt that was given up keeps its thread for as long as its name lookup hangs.
        if any(sender.thread.is_alive() for sender in self._senders.values()):
            return self._shared.clock.pause(0.05)
        advice = "raise the limit of processes: `ulimit -u`, TasksMax of a unit, pids of a container"
        self._shared.fail(StorageError("the system gives this process no thread to send with", [advice]))
        return False

    def _look_after_senders(self, wait: float = 0.0) -> None:
        """Give up attempts that are over their time: name lookup, handshake or a dripping answer may hold
        them. Waits until something ends, for `wait` seconds at most."""
        with self._shared.queue.changed:
            if wait and any(not sender.ended for sender in self._senders.values()):
                self._shared.queue.changed.wait(wait)
            for sender in self._senders.values():
                deadline = sender.deadline  # its thread clears it without the lock
                if deadline is not None and time.monotonic() > deadline:
                    sender.time_out()
            if self._shared.error is not None:
                for sender in self._senders.values():
                    # What is on its way is waited for: its answer is written down.
                    sender.ended = sender.ended or not sender.is_sending
            self._shared.queue.changed.notify_all()


def loops_at_once() -> int:
    """How many loops may be open at a time, by the number of files that this process may open."""
    import resource

    wanted = LOOPS_AT_ONCE * FILES_OF_A_LOOP + FILES_BESIDES
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= wanted:
        return LOOPS_AT_ONCE
    with contextlib.suppress(ValueError, OSError):
        raised = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, most))
        allowed = raised
    return max(1, min(LOOPS_AT_ONCE, (allowed - FILES_BESIDES) // FILES_OF_A_LOOP))


# How long a run waits for locks that other passes hold, if each of its loops is held.
LOCK_WAIT_SECONDS = 1.0


def run_loops(
    jobs: Sequence[Job], environ: Mapping[str, str], progress: Progress | None = None
) -> dict[str, Result]:
    """Run one pass over each of these loops of a repo: with one config, one queue, one budget.

    Returns for each loop id the summary, which is what the state file holds, or what stopped that loop.
    Raises ConfigError; StateError or StorageError if it cannot be told whether a loop is one.
    """
    outcomes: dict[str, Result] = {}
    if not jobs:
        return outcomes
    # A single loop is worth a wait. With many, the others come first.
    wait = LOCK_WAIT_SECONDS / len(jobs)
    try:
        # One that the loop's last pass found valid is not validated again.
        known = summary_if_readable(jobs[0]).get("configDigest")
        config = load_config(jobs[0].config_file, environ, known_digest=known)
    except ConfigError as error:
        for job in jobs:
            note_invalid_config(job, error, wait)
        raise
    if len(jobs) == 1 and not is_there(jobs[0]):  # several were found by what there is of them
        return {jobs[0].loop_id: empty_summary(jobs[0], "no_source")}
    clock = Clock(jobs[0].time_budget)
    at_once = loops_at_once() if len(jobs) > 1 else 1
    with contextlib.closing(QueueHolder(jobs[0])) as queues:
        busy: list[tuple[Job, contextlib.ExitStack]] = []
        looked_at = 0
        for index, job in enumerate(jobs):
            looked_at += 1
            with contextlib.ExitStack() as files:
                try:
                    if not files.enter_context(loop_lock(job.lock_file, wait)):
                        outcomes[job.loop_id] = locked_summary(job)
                    elif idle := idle_summary(
                        job, document := read_summary(job), config, queues, always=len(jobs) == 1
                    ):
                        outcomes[job.loop_id] = idle
                    elif fault := wrong_queue(job, document):  # before that queue is made
                        note_failed_pass(job, fault)
                        outcomes[job.loop_id] = fault
                    else:
                        busy.append((job, files.pop_all()))
                except DispatchError as error:
                    outcomes[job.loop_id] = error
                except OSError as error:
                    outcomes[job.loop_id] = storage_error("read", job.escalations_file, error)
            if busy and (len(busy) == at_once or index == len(jobs) - 1):
                # Of the loops that are left, these and the idle ones between them get their part of the time.
                share = looked_at / (len(jobs) - index - 1 + looked_at)
                part = Clock(clock.left * share, clock.stop)
                with part.ends_on_signals():
                    outcomes |= run_busy_loops(queues, config, [job for job, _ in busy], part, progress)
                for done, held in busy:
                    outcome = outcomes[done.loop_id]
                    if isinstance(outcome, DispatchError):
                        note_failed_pass(done, outcome)
                    held.close()
                busy, looked_at = [], 0
    return outcomes


class QueueHolder:
    """The queue of a run over loops of one repo, opened when a loop needs it; a damaged one is replaced."""

    def __init__(self, job: Job) -> None:
        self.path = job.queue_file
        self._job = job
        self._queue: Queue | None = None
        # As it was before this run. If it was closed in good order, the summaries say whether anything waits.
        # Found out here, because this closes a descriptor of the file, which drops the locks of a connection
        # that is open.
        self.identity = identity_if_closed(self.path)

    def get(self) -> Queue:
        if self._queue is None:
            self._queue = self._open()
        return self._queue

    def _open(self) -> Queue:
        try:
            found = stat_of(self.path)
        except OSError as error:
            raise storage_error("open", self.path, error) from None
        was_used = os.path.lexists(f"{self.path}.lock")
        try:
            queue = Queue.open(self.path)
        except DamagedQueueError:
            if is_elsewhere(self._job) and not was_used:
                with contextlib.suppress(OSError):
                    os.unlink(f"{self.path}.lock")
                raise foreign_file(self.path) from None
            if found is not None:
                Queue.keep_aside(self.path, identity_of(found))
            queue = Queue.open(self.path)
        if is_elsewhere(self._job):
            try:
                with queue.transaction():
                    check_owner(queue, self._job)
                    queue.set_owner(os.path.realpath(self._job.repo))
            except DispatchError:
                queue.close()
                raise
        return queue

    def close(self) -> None:
        if self._queue is None:
            return
        until = time.monotonic() + 1.0
        try:
            self._queue.purge(more=lambda: time.monotonic() < until)
        except DamagedQueueError:
            self.keep_aside()  # the pass has done its work: the next one starts a new queue
        else:
            self._queue.close()

    def keep_aside(self) -> None:
        """Keep the queue aside, which turned out to be damaged: the next one that is needed is new."""
        if self._queue is not None:
            damaged = self._queue
            self._queue = None
            with contextlib.suppress(DispatchError):
                damaged.close()
            Queue.keep_aside(self.path, damaged.identity)


def identity_if_closed(path: str) -> tuple[int, int] | None:
    """Device and inode of a queue; None if it is not there, or if a pass has it open or was killed with it.
    This process must not have it open."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        if file.read(len(QUEUE_HEAD)) == QUEUE_HEAD and not has_wal(path):
            return identity_of(os.fstat(file.fileno()))
    return None


def is_elsewhere(job: Job) -> bool:
    """Tell whether a queue is outside of its repo, so that two repos could name the same one."""
    return not job.queue_file.startswith((f"{job.repo}/", f"{os.path.realpath(job.repo)}/"))


def check_owner(queue: Queue, job: Job) -> None:
    """Raises StateError if a queue belongs to another repo: loops of two repos may have the same names. An
    owner that is gone, because its repo was moved, does not count."""
    repo, owner = os.path.realpath(job.repo), queue.owner()
    if owner not in (None, repo) and os.path.isdir(os.path.join(owner, MANAGER_FOLDER)):
        raise StateError(
            f"the queue {queue.path} belongs to the repo {owner}, and this is {repo}",
            [f"give each repo a queue of its own: --queue-file, or {QUEUE_ENV}"],
        )


@contextlib.contextmanager
def open_to_read(job: Job) -> Iterator[Queue | None]:
    """Open the queue of a job's repo for queries; None if there is none.

    Raises StateError, also if it is another repo's; DamagedQueueError, StorageError.
    """
    queue = Queue.open_to_read(job.queue_file)
    with queue or contextlib.nullcontext():
        if queue is not None and is_elsewhere(job):
            check_owner(queue, job)
        yield queue


def run_busy_loops(
    queues: QueueHolder,
    config: Config,
    jobs: Sequence[Job],
    clock: Clock,
    progress: Progress | None,
) -> dict[str, Result]:
    """Run one pass over loops whose locks are held. A damaged queue is replaced, once."""
    try:
        try:
            return run_on_queue(queues.get(), config, jobs, clock, progress)
        except DamagedQueueError:
            queues.keep_aside()
            return run_on_queue(queues.get(), config, jobs, clock, progress)
    except Exception as error:  # noqa: BLE001 - the state file is to say it, too
        return dict.fromkeys((job.loop_id for job in jobs), as_dispatch_error(error))


def run_on_queue(
    queue: Queue,
    config: Config,
    jobs: Sequence[Job],
    clock: Clock,
    progress: Progress | None,
) -> dict[str, Result]:
    """Run one pass over loops on this queue. Raises DispatchError for what stops all of them."""
    shared = Shared(queue, config, clock)
    outcomes: dict[str, Result] = {}
    loops: list[Loop] = []
    with contextlib.ExitStack() as open_loops:
        for job in jobs:
            try:
                with contextlib.ExitStack() as opened:
                    loop = opened.enter_context(contextlib.closing(Loop(shared, job)))
                    loop.begin()
                    open_loops.push(opened.pop_all())
                loops.append(loop)
            except DamagedQueueError:
                raise
            except LoopHeldError:
                outcomes[job.loop_id] = locked_summary(job)
            except Exception as error:  # noqa: BLE001 - the other loops go on
                outcomes[job.loop_id] = as_dispatch_error(error)
        return outcomes | Pass(shared, progress).run(loops)


def is_there(job: Job) -> bool:
    """Tell whether a loop has files or, if they were removed, something of it waits in the queue or is dead.
    No file is made for any other. If the files cannot be seen, say yes: a pass then reports what is wrong.

    Raises StateError or StorageError if the queue cannot be read.
    """
    places = (job.escalations_file, os.path.dirname(job.state_file))
    if any(may_be_there(path, follow_symlinks=False) for path in places):
        return True
    return job.loop_id in unfinished_loops(job)


def unfinished_loops(job: Job) -> list[str]:
    """The loops of a job's repo of which something waits in the queue or is dead. This process must not have
    the queue open to write, or would lose its locks. Raises StateError or StorageError."""
    with open_to_read(job) as queue:
        return queue.unfinished_loops() if queue else []


# How often the summary of an idle loop is written if a pass serves many loops, in seconds.
IDLE_SUMMARY_SECONDS = 600.0


def idle_summary(
    job: Job, document: JsonObject, config: Config, queues: QueueHolder, *, always: bool
) -> JsonObject | None:
    """The summary of a pass that has nothing to do; None if there is something to do, or if `document`, the
    last summary, does not show it. It is written if `always`, or if the last one is old.

    Raises StorageError.
    """
    try:
        cursor = Cursor.from_json(document["cursor"])
        same = (
            document["configDigest"] == config.digest
            and document["loopId"] == job.loop_id
            and document["queueFile"] == job.queue_file
            # Another one may have been put in its place, such as one that was moved away.
            and document["queueIdentity"] == [*(queues.identity or ())]
            and document["escalationsFile"] == job.escalations_file
            and document["dispatchTelemetryFile"] == job.telemetry_file
            and document["waitingCount"] == document["laggingCount"] == 0
        )
        updated_at = parse_time(document["updatedAt"]) or 0.0
        kept = {key: document[key] for key in (*LINE_COUNTS, "deadLetterCount")}
        last_status = document["status"]
    except MALFORMED:
        return None
    worked = "failedSince" not in document
    usable = same and worked and not job.now and not os.path.islink(job.state_file)
    status = idle_status(job, cursor) if usable else None
    if status is None:
        return None
    sinks = unsent(mapping(document.get("sinks")))
    summary = {**document, **empty_summary(job, status), **kept, "sinks": sinks}
    old = abs(time.time() - updated_at) > IDLE_SUMMARY_SECONDS
    if always or old or last_status != status:
        write_state(job, summary)
    return summary


def idle_status(job: Job, cursor: Cursor) -> str | None:
    """The status of a pass that finds nothing new in the source; None if something may be new. Raises
    OSError."""
    try:
        file = LogFile(job.escalations_file)
    except FileNotFoundError:
        never_was = not cursor.number and not any(neighbours(job.escalations_file).values())
        return "no_source" if never_was else None
    except OSError:
        return None
    with contextlib.closing(file):
        same = file.identity == cursor.identity and file.size == cursor.offset and file.holds(cursor)
        return "no_new_escalations" if same else None


def note_invalid_config(job: Job, error: ConfigError, wait: float) -> None:
    """Say in the state, which the status script reads, that the config is invalid and why.

    Nothing is written if the file cannot be written, or if another pass works on for `wait` seconds: the
    error itself is shown in any case.
    """
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.suppress(*MALFORMED, StateError, StorageError))
        if not is_there(job) or not opened.enter_context(loop_lock(job.lock_file, wait)):
            return
        document = read_state_document(job.state_file) or {}
        # The file may be rotated before the config is valid: a new loop starts from here.
        known = document.get("cursor")
        cursor = Cursor.from_json(known) if known else read_past(job).cursor
        with contextlib.closing(Source(job.escalations_file, cursor).find()) as source:
            cursor = source.cursor if not cursor.number else cursor
            document |= {
                "escalationsLineOffset": source.lines_read,
                "escalationsLineCount": source.count_lines(),
                "unreadCount": source.count_unread(),
                "cursor": cursor.to_json(),
            }
        write_failed_pass(job, document, "config_invalid", "config_invalid", error.faults)


def note_failed_pass(job: Job, error: DispatchError) -> None:
    """Say in the state, which the status script reads, that a pass ended with an error. The loop's lock is
    held. Nothing is written if the file cannot be written: the error itself is shown in any case."""
    with contextlib.suppress(ValueError, StateError, StorageError):
        document = read_state_document(job.state_file) or {}
        write_failed_pass(job, document, "error", "alert_dispatch_failed", (error.headline, *error.faults))


def write_failed_pass(
    job: Job, document: JsonObject, status: str, reason_code: str, words: Sequence[str]
) -> None:
    """Write the summary of a pass that could not do its work. `document`: what is known from earlier passes.
    Raises StorageError."""
    # On a full disk, the old summary is better than half a new one.
    check_room(os.path.dirname(job.state_file))
    now = iso(time.time())
    summary = {
        **empty_summary(job, status),
        **document,
        **dict.fromkeys(COUNT_KEYS, 0),
        "updatedAt": now,
        "traceId": job.trace_id,
        "status": status,
        "failureReasonCodes": [reason_code],
        "message": cut("; ".join(words), 2000),
        "failedSince": document.get("failedSince") or now,
        "stoppedBy": None,
        "stateVersion": STATE_VERSION,
    }
    write_state(job, summary)


# ---------------------------------------------------------------------------------------------------------
# What will happen: the dry run
# ---------------------------------------------------------------------------------------------------------
# Runs a pass on a copy of the queue, as if every destination took what it is sent. Sends nothing, and changes
# no file of a loop.


def plan_loops(jobs: Sequence[Job], environ: Mapping[str, str], *, show_payload: bool) -> dict[str, Result]:
    """Plan a pass over each of these loops. Returns for each loop id the plan, or the error that prevents it.

    Raises ConfigError.
    """
    import tempfile

    plans: dict[str, Result] = {}
    if not jobs:
        return plans
    config = load_config(jobs[0].config_file, environ)
    with tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-") as folder:
        copy = os.path.join(folder, "queue.db")
        try:
            with open_to_read(jobs[0]) as known:
                if known:
                    known.copy_to(copy)
        except DamagedQueueError:  # a pass starts a new one
            copy = os.path.join(folder, "new.db")
        clock = Clock(jobs[0].time_budget)
        with Queue.open(copy) as queue:
            for index, job in enumerate(jobs):
                part = Clock(clock.left / (len(jobs) - index))
                try:
                    plans[job.loop_id] = plan_pass(queue, job, config, part, show_payload=show_payload)
                except DispatchError as error:
                    plans[job.loop_id] = error
    return plans


# The fields of a summary's sinks that a plan has, too.
DRY_RUN_SINK_FIELDS = (
    *("enabled", "sentCount", "waitingCount", "oldestPendingAt", "deadLetterCount", "perMinute"),
    *("consecutiveFailures", "nextAttemptAt", "reasonCode", "httpStatus", "message"),
)


def plan_pass(queue: Queue, job: Job, config: Config, clock: Clock, *, show_payload: bool) -> JsonObject:
    """The summary of a pass on a copy of the queue, and where each escalation that is new or waits would go.

    Raises StateError or StorageError.
    """
    if fault := wrong_queue(job, read_summary(job)):
        raise fault
    shared = Shared(queue, config, clock, dry_run=True)
    shared.show_payload = show_payload
    notes = config_warnings(config)
    with contextlib.closing(Loop(shared, job)) as loop:
        first_new = queue.next_id()
        waited = queue.waiting_in(loop.id)
        loop.begin()
        written = (json.loads(text) for _, _, text in queue.outbox(loop.id, limit=-1))
        changes = [row["message"] for row in written if "message" in row]
        waited |= queue.waiting_in(loop.id)
        outcome = Pass(shared).run([loop])[job.loop_id]
        if isinstance(outcome, DispatchError):
            raise outcome
        plans = plan_escalations(shared, loop, first_new, waited)
    if show_payload and plans:
        notes += batch_notes(config)
    size, _ = unterminated(job.escalations_file)
    if size:
        notes.append(f"the last {plural(size, 'byte')} of {job.escalations_file} wait for a line feed")
    sent = [plan["timestamp"] for plan in plans if plan["decision"] == "send" and "timestamp" in plan]
    return {
        # A pass that did not happen has no time and no trace.
        **{key: outcome[key] for key in empty_summary(job, "") if key not in ("updatedAt", "traceId")},
        "status": "dry_run",
        "sinks": {
            sink_id: {key: figure[key] for key in DRY_RUN_SINK_FIELDS}
            for sink_id, figure in outcome["sinks"].items()
        },
        "oldestAt": min(sent, key=by_time, default=None),
        "escalations": plans,
        "notes": [*notes, *changes],
    }


def by_time(moment: str) -> float:
    """A key to sort times by. A text that is no time comes first."""
    return parse_time(moment) or 0.0


def batch_notes(config: Config) -> Iterator[str]:
    """Say which sinks get several escalations in one request. A plan shows a request for each."""
    for sink in config.sinks.values():
        if sink.enabled and (most := ADAPTERS[sink.type].batch_size(sink)) > 1:
            yield f"{sink.id} is sent up to {most} of these in one request"


def plan_escalations(
    shared: Shared, loop: Loop, first_new: int, waited: Collection[tuple[int, str]]
) -> list[JsonObject]:
    """The plans of a loop's escalations after the pass, in the order of the source.

    Those from number `first_new` on are new. `waited`: what waited before, as escalation and sink.
    """
    plans = []
    first = min([first_new, *(number for number, _ in waited)])
    found = shared.queue.escalations_from(loop.id, first)
    deliveries = shared.queue.deliveries_of_all(found)
    for stored in found:
        is_new = stored.id >= first_new
        plan = plan_escalation(shared, stored, deliveries[stored.id], None if is_new else waited)
        if is_new or plan["sinks"]:
            plans.append(plan)
    for _, _, text in shared.queue.outbox(loop.id, limit=-1):
        row = json.loads(text)
        # A row with a place in the source but no route is about a line that is not an escalation, unless it
        # names a sink.
        if "position" in row and "route" not in row and "sinkId" not in row:
            line = row["position"]["line"]
            plans.append({"line": line, "escalationId": row["escalationId"], "decision": row["reasonCode"]})
    return sorted(plans, key=lambda plan: plan["line"])


def plan_escalation(
    shared: Shared,
    stored: QueuedEscalation,
    deliveries: Iterable[QueuedDelivery],
    waited: Collection[tuple[int, str]] | None,
) -> JsonObject:
    """The plan of one escalation. `waited`: what waited before the pass; None if the escalation is new."""
    resolution, escalation = shared.resolve(stored), shared.parse(stored)
    leads = {
        found.sink: found
        for found in deliveries
        if found.lead and (waited is None or (stored.id, found.sink) in waited)
    }
    sinks: list[JsonObject] = []
    for sink in resolution.selected:
        if found := leads.get(sink.id):
            entry = decide_delivery(shared, sink, found)
            if request := shared.requests.get(found.key):
                url = shared.peers[sink.id][found.peer]
                entry["request"] = show_request(url, request, shared.redactor)
        elif waited is None:
            entry = {"decision": "skip", "why": why_not(sink, resolution)}
        else:
            continue
        sinks.append({"id": sink.id, "type": sink.type, **entry})
    plan = {
        "line": stored.line,
        "escalationId": stored.escalation_id,
        "category": escalation.category,
        "eventSeverity": resolution.event_severity,
        "minSeverity": resolution.min_severity,
        "timestamp": stored.written_at,
        "late": waited is not None,
        "decision": strongest_decision(sinks, resolution),
        "sinks": sinks,
    }
    return {key: value for key, value in plan.items() if value is not None}


def decide_delivery(shared: Shared, sink: Sink, found: QueuedDelivery) -> JsonObject:
    """What a pass would do with a delivery, by its status after the pass, and why if it would not send it."""
    code = found.reason_code
    if found.status == "delivered":
        return {"decision": "send"}
    if found.status == "skipped":
        return {"decision": "skip", "why": found.message or code, "reasonCode": code}
    if found.status == "dead":
        why = "waited longer than giveUpAfterSeconds: a dead letter"
        return {"decision": "drop", "why": why, "reasonCode": code}
    if not sink.enabled:
        return {"decision": "keep", "why": "the sink is disabled; it waits until the sink is enabled"}
    failing = shared.failing_destination(sink.id, found.peer)
    if failing is None:
        return {"decision": "wait", "why": "the time budget ends before its turn", "reasonCode": None}
    why = f"the sink failed ({failing.reason_code}); next attempt at {iso(failing.next_attempt_at)}"
    return {"decision": "wait", "why": why, "reasonCode": failing.reason_code}


def why_not(sink: Sink, resolution: Resolution) -> str | None:
    """Why a record is not sent to a sink that its route selects; None if it is sent."""
    severity = resolution.event_severity
    if not resolution.should_dispatch:
        return f"severity {severity} is below the route's minimum {resolution.min_severity}"
    if not sink.enabled:
        return "the sink is disabled in the config"
    if sink not in resolution.dispatchable:
        return f"severity {severity} is below the sink's minimum {sink.min_severity}"
    return None


def strongest_decision(sinks: Sequence[JsonObject], resolution: Resolution) -> str:
    """The decision on an escalation: the first of these that a sink has, else the reason code of its row."""
    for word in ("send", "wait", "keep", "drop"):
        if any(sink["decision"] == word for sink in sinks):
            return word
    codes = [sink["reasonCode"] for sink in sinks if "reasonCode" in sink]
    return codes[0] if codes else judge_row(resolution, [])[1] or "skip"


def show_request(url: str, request: HttpRequest, redactor: Redactor) -> JsonObject:
    """A request with its secrets masked. Only the scheme, host and port of the URL are shown."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return {
        "url": f"{parts.scheme}://{parts.hostname}{port}/…",
        "headers": redactor.mask_texts(dict(request.headers)),
        "body": redactor.mask_texts(json.loads(request.body)),
    }


# ---------------------------------------------------------------------------------------------------------
# Command line: options, tables, `dispatch`, `config`
# ---------------------------------------------------------------------------------------------------------
# Turns options into jobs, and summaries into text. Nothing above this section prints or asks.

# In a longer list for people, things that are alike share a row.
LISTED = 20
REPO_ENV = "OPS_MANAGER_REPO"

MAX_LOOP_ID_BYTES = 200

# In the order in which an operator needs them.
COMMAND_ORDER = [
    *("init", "test", "dispatch", "status", "log", "show"),
    *("explain", "redeliver", "skip", "config", "demo"),
]


# In place of click's own --help, --version and paths. Those look up translations, of which click has none:
# that takes a twentieth of an idle pass.


def printing_option(*names: str, help: str, text: Callable[[click.Context], str]) -> click.Option:  # noqa: A002
    """An option that prints a text and exits."""

    def show(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            click.echo(text(ctx), color=ctx.color)
            ctx.exit()

    return click.Option(names, is_flag=True, is_eager=True, expose_value=False, help=help, callback=show)


HELP_OPTION = printing_option("--help", "-h", help="Show this message and exit.", text=click.Context.get_help)
VERSION_OPTION = printing_option(
    "--version", help="Show the version and exit.", text=lambda _: f"{PROGRAM}, version {__version__}"
)


class FilePath(click.types.StringParamType):
    """The path of a file, which need not exist. An empty one counts as not given."""

    name = "path"
    completion = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) or None

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self.completion)]


class FolderPath(FilePath):
    """The path of a folder that exists."""

    name = "directory"
    completion = "dir"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.path.isdir(value):
            fault = "is a file" if os.path.lexists(value) else "does not exist"
            self.fail(f"folder {printable(value)!r} {fault}", param, ctx)
        return value


class Command(click.Command):
    def get_help_option(self, _: click.Context) -> click.Option:
        return HELP_OPTION


class Commands(Command, click.Group):
    """The command group. Options without a command mean `dispatch`: this is how the host calls it."""

    command_class = Command

    def list_commands(self, _: click.Context) -> list[str]:
        return COMMAND_ORDER

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = ["dispatch", *args]
        return super().parse_args(ctx, args)


def examples(*commands: str) -> str:
    """The end of a help page: command lines to try."""
    return "\n".join(["\b", "Examples:", *(f"  {PROGRAM} {command}" for command in commands), ""])


FILES_HELP = f"""
\b
Files:
  The queue is in REPO/{MANAGER_FOLDER}/, the files of a loop are
  in the folder LOOP/ there, and the config is
  REPO/{DEFAULT_CONFIG}.
"""


def given_once(_: click.Context, param: click.Parameter, values: Sequence[str]) -> str | None:
    """The callback of an option that selects one thing. Of several values, click would silently use the last
    one. Raises BadParameter."""
    if len(values) > 1:
        raise click.BadParameter("only one can be given", param=param)
    return values[0] if values else None


def check_loop_id(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> str | None:
    """The callback of --loop. Raises BadParameter."""
    value = given_once(ctx, param, values)
    if value is not None and (fault := loop_id_fault(value)):
        raise click.BadParameter(fault, param=param)
    return value


def loop_id_fault(loop_id: str) -> str | None:
    """Say why a text cannot be a loop id, which names a folder; None if it can."""
    if loop_id in ("", ".", "..") or loop_id[0] == "-" or "/" in loop_id or printable(loop_id) != loop_id:
        text = spell_out(loop_id)
        return f"'{text}' is no loop id: an id is one path component, printable, and does not begin with -"
    if len(loop_id.encode("utf-8", "surrogateescape")) > MAX_LOOP_ID_BYTES:
        return f"a loop id is at most {MAX_LOOP_ID_BYTES} bytes long"
    return None


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream is a terminal. None is a closed stream."""
    return stream is not None and stream.isatty()


class Styled(str):
    """The text of a cell that is coloured already, and otherwise printable."""

    __slots__ = ()


# A table that is too wide is cut in three steps. The last column of text, which has the reasons, is cut to
# REASON_WIDTH. If that is not enough, the other columns are cut to FAIR_WIDTH, and then all to LEAST_WIDTH.
REASON_WIDTH = 26
FAIR_WIDTH = 16
LEAST_WIDTH = 8


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], drop: Collection[str] = ()) -> str:
    """A table for people. Makes cells printable and aligns the columns.

    If the table is too wide for the terminal, the columns in `drop` are left out, in that order, and long
    ones are cut.
    """
    columns: dict[str, list[str]] = {heading: [] for heading in headings}
    for row in rows:
        for heading, cell in zip(headings, row, strict=True):
            text = cell if isinstance(cell, Styled) else printable("-" if cell is None else str(cell))
            columns[heading].append(text)
    if is_terminal(sys.stdout):
        import shutil

        fit_columns(columns, drop, shutil.get_terminal_size().columns)
    widths = {heading: column_width(heading, cells) for heading, cells in columns.items()}
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    texts = [
        "  ".join(
            cell + " " * (width - len(click.unstyle(cell)))
            for cell, width in zip(line, widths.values(), strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([click.style(texts[0], bold=True), *texts[1:]])


def column_width(heading: str, cells: Iterable[str]) -> int:
    return max(len(click.unstyle(cell)) for cell in (heading, *cells))


def fit_columns(columns: dict[str, list[str]], drop: Iterable[str], room: int) -> None:
    """Drop and cut columns of a table until it fits into `room` characters, but no more than needed."""
    texts = [h for h, cells in columns.items() if not any(isinstance(cell, Styled) for cell in cells)]

    def excess(widths: Iterable[int]) -> int:
        return sum(widths) + 2 * (len(columns) - 1) - room

    def widths_after_a_fair_cut() -> Iterator[int]:
        for heading, cells in columns.items():
            width = column_width(heading, cells)
            if heading in texts:
                least = REASON_WIDTH if heading == texts[-1] else FAIR_WIDTH
                width = min(width, max(least, len(heading)))
            yield width

    def shorten(headings: Sequence[str], least: int) -> None:
        while (over := excess(column_width(*column) for column in columns.items())) > 0:
            widest = max(headings, key=lambda heading: column_width(heading, columns[heading]))
            width = column_width(widest, columns[widest])
            limit = max(least, len(widest), width - over)
            if limit >= width:
                return
            columns[widest] = [cut(cell, limit) for cell in columns[widest]]

    for heading in drop:
        if excess(widths_after_a_fair_cut()) > 0:
            del columns[heading]
    texts = [heading for heading in texts if heading in columns]
    shorten(texts[-1:], REASON_WIDTH)
    shorten(texts[:-1], FAIR_WIDTH)
    shorten(texts, LEAST_WIDTH)


# Shell completion. What cannot be read is not offered, and nothing is said.


def complete_loop(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(DispatchError, click.UsageError):
        names = find_loops(usual_job(ctx.params.get("repo") or ".", ""))[0]
    return [name for name in names if name.startswith(incomplete)]


def complete_sink(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    names: Iterable[str] = ()
    with contextlib.suppress(DispatchError, click.UsageError):
        path = config_path(ctx.params.get("repo") or ".", ctx.params.get("config_file"))
        names = load_config(path, {}, check_env=False).sinks
    return [name for name in names if name.startswith(incomplete)]


def complete_code(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return [code for code in CODES if code.startswith(incomplete)]


def config_path(repo: str, config_file: str | None) -> str:
    """The config that the command line names, else that of the repo. Raises UsageError."""
    return absolute(config_file or os.path.join(repo, DEFAULT_CONFIG))


repo_option = click.option(
    "--repo",
    type=FolderPath(),
    envvar=REPO_ENV,
    show_envvar=True,
    default=".",
    show_default="the current folder",
    help="The repository that the loops work on.",
)
loop_option = functools.partial(
    click.option,
    "--loop",
    "loop_id",
    metavar="ID",
    multiple=True,
    callback=check_loop_id,
    shell_complete=complete_loop,
    help="The loop.",
)
sink_option = functools.partial(
    click.option,
    "--sink",
    "sink_id",
    metavar="ID",
    multiple=True,
    callback=given_once,
    shell_complete=complete_sink,
)
config_option = functools.partial(
    click.option,
    "--alert-config-file",
    "config_file",
    envvar=CONFIG_ENV,
    show_envvar=True,
    type=FilePath(),
    show_default=DEFAULT_CONFIG,
    help="The sinks and routes.",
)
file_option_list = (
    config_option(),
    click.option(
        "--escalations-file",
        type=FilePath(),
        show_default=f"{SOURCE_FILE} in the loop's folder",
        help="The source: one JSON object a line.",
    ),
    click.option(
        "--dispatch-state-file",
        "state_file",
        type=FilePath(),
        show_default=f"{STATE_FILE} in the loop's folder",
        help="The summary of the last pass.",
    ),
    click.option(
        "--dispatch-telemetry-file",
        "telemetry_file",
        type=FilePath(),
        show_default="telemetry/alerts.jsonl in the loop's folder",
        help="What became of each escalation; a file beside it has every attempt.",
    ),
    click.option(
        "--queue-file",
        envvar=QUEUE_ENV,
        show_envvar=True,
        type=FilePath(),
        show_default=f"{QUEUE_FILE} of the repo",
        help="The queue of all loops of the repo.",
    ),
)


class Paths(NamedTuple):
    """The repo and the files that the command line names. None: the file is where the host keeps it."""

    repo: str
    config_file: str | None = None
    queue_file: str | None = None
    escalations_file: str | None = None
    state_file: str | None = None
    telemetry_file: str | None = None


def file_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name files to a command, which gets them and --repo as `paths`."""

    @functools.wraps(command)
    def with_paths(**options: Any) -> None:
        paths = Paths(**{name: options.pop(name) for name in Paths._fields})
        command(paths=paths, **options)

    for option in reversed(file_option_list):
        option(with_paths)
    return with_paths


class Positive(click.IntRange):
    """A number of at least 1. The largest number that SQLite knows stands for all larger ones."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return min(int(super().convert(value, param, ctx)), sys.maxsize)


class Output:
    """How a command prints: `--format` and `--pretty`."""

    def __init__(self, form: str, pretty: bool) -> None:
        self.form = form
        self.pretty = pretty
        self.is_json = form == "json" or pretty or (form == "auto" and not is_terminal(sys.stdout))

    def show(self, document: JsonObject, text: Callable[[], str]) -> None:
        """Print a document for scripts, or a text for people."""
        if self.is_json:
            self.print_json(document)
        else:
            click.echo(text())

    def print_json(self, document: JsonObject) -> None:
        """Print a JSON object, indented or on one line."""
        if self.pretty:
            text = json.dumps(strict_value(document), indent=2, ensure_ascii=False, allow_nan=False)
        else:
            text = encode_json(document).decode()
        # JSON escapes only the first 32 control characters. A terminal may act on the others, too.
        if not text.isascii() or "\x7f" in text:
            text = spell_out(text, f"[{FORGING}]")
        click.echo(text)


def output_options(
    command: Callable[..., None], also: Sequence[str] = (), about: str = ""
) -> Callable[..., None]:
    """Add --format, with more formats if there are any, and --pretty to a command, which gets an `output`."""

    @functools.wraps(command)
    def with_output(form: str, pretty: bool, **options: Any) -> None:
        command(output=Output(form, pretty), **options)

    words = f"text for people, json for scripts{about}; auto: text on a terminal, else JSON on one line."
    click.option("--pretty", is_flag=True, help="Print indented JSON.")(with_output)
    formats = click.Choice(["auto", "text", "json", *also])
    return click.option("--format", "form", type=formats, default="auto", help=words)(with_output)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["--help", "-h"], "show_default": True},
    params=[VERSION_OPTION],
    epilog=examples("init", "test", "dispatch --loop night-build", "status") + FILES_HELP + EXIT_CODES_HELP,
)
def cli() -> None:
    """Deliver the escalations of a Superloop ops manager to the people who must see them.

    They go to webhooks, Slack, PagerDuty, Alertmanager, Discord and Teams.

    First `init` writes a config, `test` sends a test alert, `dispatch` delivers, and `status` says whether
    all is well. An option in place of a command means `dispatch`: this is how the ops manager calls it.
    `COMMAND --help` has more about each command.
    """


@cli.command(
    epilog=examples(
        "dispatch --loop night-build",
        "dispatch --loop night-build --dry-run",
        "dispatch --all-loops --time-budget 50",
    )
)
@repo_option
@loop_option()
@click.option("--all-loops", is_flag=True, help="In place of --loop: every loop of the repo, side by side.")
@click.option(
    "--trace-id",
    envvar=TRACE_ENV,
    show_envvar=True,
    show_default="a new UUID",
    help="Written into everything this pass writes.",
)
@click.option(
    "--max-escalations",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Read at most N new escalations; 0: all that are there.",
)
@click.option(
    "--time-budget",
    type=float,
    default=30.0,
    metavar="SECONDS",
    help="More than 0. Start no new attempt after this time; one that has started gets its full timeout.",
)
@click.option(
    "--now",
    "at_once",
    is_flag=True,
    help="Try every sink at once, also one that failed a moment ago.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if a delivery failed or waits for a failing sink.")
@click.option(
    "--dry-run", is_flag=True, help="Send and write nothing; say what would be sent where, and why."
)
@click.option("--show-payload", is_flag=True, help="With --dry-run: show the requests, secrets masked.")
@file_options
@output_options
def dispatch(
    paths: Paths,
    loop_id: str | None,
    all_loops: bool,
    trace_id: str | None,
    max_escalations: int,
    time_budget: float,
    at_once: bool,
    strict: bool,
    dry_run: bool,
    show_payload: bool,
    output: Output,
) -> None:
    """Deliver what is new, and what waits.

    Prints the summary of the pass, which is also the state file's content. A sink that fails holds up no
    other one: what it has not taken waits for the next pass.
    """
    if show_payload and not dry_run:
        raise click.UsageError("--show-payload goes with --dry-run")
    if not 0 < time_budget <= MAX_TIME_BUDGET:  # NaN is neither
        raise click.BadParameter(
            f"{time_budget:g} is not more than 0 and at most {MAX_TIME_BUDGET}", param_hint="--time-budget"
        )
    if (loop_id is None) is not all_loops:
        raise click.UsageError("say which: --loop ID, or --all-loops")
    found, misnamed = make_jobs(paths, loop_id, trace_id and printable(trace_id))
    # The loops that were served longest ago come first. Otherwise the last ones might never be served.
    jobs = [
        job._replace(max_escalations=max_escalations, time_budget=time_budget, now=at_once)
        for job in sorted(found, key=last_served)
    ]
    if dry_run:
        outcomes = plan_loops(jobs, os.environ, show_payload=show_payload)
    else:
        with progress_bar() as progress:
            outcomes = run_loops(jobs, os.environ, progress)
    if all_loops:
        outcomes |= misnamed
        summary = summarise_loops(absolute(paths.repo), outcomes, dry_run=dry_run)
    else:
        summary = summary_of_one(jobs[0], outcomes[jobs[0].loop_id])
    errors = {name: error for name, error in outcomes.items() if isinstance(error, DispatchError)}
    complain_of_loops(errors)
    output.show(summary, lambda: dispatch_text(summary))
    if errors:
        raise click.exceptions.Exit(max(error.exit_code for error in errors.values()))
    if strict and not dry_run and has_failed(summary):
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def summary_of_one(job: Job, outcome: Result) -> JsonObject:
    """The summary or plan of the one loop that was named. Raises its error."""
    if isinstance(outcome, DispatchError):
        raise outcome
    if missing := no_such_loop(job):
        said = f"loop {job.loop_id}: {missing}"
        outcome |= {"notes": [said]} if outcome["status"] == "dry_run" else {"message": said}
    return outcome


def dispatch_text(summary: JsonObject) -> str:
    """What `dispatch` prints for people."""
    several = "loops" in summary
    text = loops_text(summary) if several else summary_text(summary)
    if summary["status"] != "dry_run":
        return text
    plans = [plan for plan in summary.get("loops", [summary]) if "escalations" in plan]
    return f"{text}\n{plan_text(plans, several=several)}"


def has_failed(summary: JsonObject) -> bool:
    """Tell whether a delivery failed in a pass, or waits for a sink that is failing."""
    if summary["failedCount"] or summary["lateFailedCount"]:
        return True
    if "loops" in summary:
        return any(loop["status"] != "error" and has_failed(loop) for loop in summary["loops"])
    return any(
        sink["waitingCount"] and sink["consecutiveFailures"] for sink in summary.get("sinks", {}).values()
    )


def find_loops(job: Job) -> tuple[list[str], dict[str, StorageError]]:
    """The loops of a job's repo; and an error for each folder that has escalations, but no name for a loop.

    Several links to one folder are one loop. A loop whose files were removed counts as long as something of
    it waits or is dead. Raises StorageError; StateError if there are no other loops, which would raise it.
    """
    folder = os.path.join(job.repo, MANAGER_FOLDER)
    found: list[os.DirEntry[str]] = []
    try:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            # `fleet` is a folder of the host, not a loop.
            found = [entry for entry in entries if entry.name != "fleet" and is_loop(entry.path)]
    except OSError as error:
        raise storage_error("read", folder, error) from None
    root = os.path.realpath(folder)
    loops: dict[str, str] = {}
    faults: dict[str, str] = {}
    for entry in sorted(found, key=lambda entry: (entry.is_symlink(), entry.name)):
        if fault := loop_id_fault(entry.name):
            faults[entry.name] = fault
        else:
            linked = entry.is_symlink()
            place = os.path.realpath(entry.path) if linked else os.path.join(root, entry.name)
            loops.setdefault(place, entry.name)
    try:
        for name in unfinished_loops(job):
            loops.setdefault(os.path.realpath(os.path.join(root, name)), name)
    except DispatchError:
        if not loops:
            raise
    misnamed = {}
    for name, fault in faults.items():
        path = os.path.join(folder, name)
        if may_have_escalations(path) and os.path.realpath(path) not in loops:
            words = f"{fault}; its escalations are not sent: rename it in {folder}"
            misnamed[spell_out(name)] = StorageError(words)
    return sorted(loops.values()), misnamed


def is_loop(folder: str) -> bool:
    """Tell whether a folder has escalations or a state file. If it cannot be read, say yes: a pass then
    reports what is wrong with it."""
    if any(may_be_there(os.path.join(folder, name)) for name in (SOURCE_FILE, STATE_FILE)):
        return True
    # The source was rotated, and the state is gone: something may still wait, or be unread.
    return any(neighbours(os.path.join(folder, SOURCE_FILE)).values())


def may_have_escalations(folder: str) -> bool:
    """Tell whether a folder has escalations. If it cannot be read, it may have some."""
    try:
        source = stat_of(os.path.join(folder, SOURCE_FILE))
    except OSError:
        return True
    return source is not None and source.st_size > 0


def nearest_first(word: str, names: Iterable[str]) -> list[str]:
    """Names in the order of their likeness to a word."""
    from difflib import SequenceMatcher

    return sorted(names, key=lambda name: -SequenceMatcher(None, word, name).ratio())


def no_such_loop(job: Job) -> str | None:
    """Say that there is no such loop, and which loops there are, the nearest name first. None if there is.

    Raises StateError or StorageError: see `is_there`.
    """
    if is_there(job):
        return None
    names: list[str] = []
    with contextlib.suppress(StateError, StorageError):
        names = nearest_first(job.loop_id, find_loops(job)[0])
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    there = (
        f"loops: {', '.join(names[:LISTED])}{more}" if names else "no loop of this repo has escalations yet"
    )
    return f"no escalations in {job.escalations_file}; {there}"


def check_sink(config: Config, sink_id: str | None) -> None:
    """Raises BadParameter if a sink that was named is not in the config, and names those that are."""
    if sink_id is not None and sink_id not in config.sinks:
        known = ", ".join(nearest_first(sink_id, config.sinks))
        said = f"there is no sink {printable(sink_id)!r}; sinks: {known}"
        raise click.BadParameter(said, param_hint="--sink")


def no_loops(repo: str) -> str:
    """Say that a repo has no loops."""
    return f"No loop of {printable(repo)} has escalations yet. Use --repo to name another folder."


def last_served(job: Job) -> tuple[float, str]:
    """A key to sort loops by: when the state file was last written, and the loop id."""
    with contextlib.suppress(OSError):
        return os.stat(job.state_file).st_mtime, job.loop_id
    return 0.0, job.loop_id


# The counts in a loop's summary that are added up over loops, and the headings of their columns.
LOOP_COUNTS = {
    "processedCount": "NEW",
    "dispatchedCount": "DELIVERED",
    "skippedCount": "SKIPPED",
    "failedCount": "FAILED",
    "lateDispatchedCount": "LATE",
    "lateFailedCount": "LATE FAILED",
    "waitingCount": "WAITING",
    "unreadCount": "UNREAD",
    "deadLetterCount": "DEAD",
}


def summarise_loops(repo: str, outcomes: Mapping[str, Result], *, dry_run: bool) -> JsonObject:
    """The summary of a run over many loops: their sums, and each loop's own status and counts."""
    fields = (
        *("loopId", "status", "message", "stoppedBy", *LOOP_COUNTS, "failureReasonCodes", "sinks"),
        *("oldestAt", "escalations", "notes"),  # only in plans
    )
    loops: list[JsonObject] = []
    for name, outcome in sorted(outcomes.items()):
        if isinstance(outcome, DispatchError):
            loops.append({"loopId": name, "status": "error", "message": str(outcome)})
        else:
            loops.append({key: outcome[key] for key in fields if key in outcome})
    sums = {key: sum(loop.get(key, 0) for loop in loops) for key in LOOP_COUNTS}
    statuses = Counter(loop["status"] for loop in loops)
    return {
        "schemaVersion": SCHEMA_VERSION,
        "updatedAt": iso(time.time()),
        "repoPath": repo,
        "status": "dry_run" if dry_run else status_of_all(statuses, sums),
        "loopCount": len(loops),
        "lockedLoopCount": statuses["locked"],
        "brokenLoopCount": statuses["error"],
        **sums,
        "failureReasonCodes": sorted({code for loop in loops for code in loop.get("failureReasonCodes", [])}),
        "loops": loops,
    }


def status_of_all(statuses: Counter[str], sums: Mapping[str, int]) -> str:
    """The status of a run over many loops: how many have which status, and what their counts add up to."""
    count = statuses.total()
    if statuses["error"] or sums["failedCount"]:
        all_failed = sums["failedCount"] or statuses["error"] == count
        return "failed" if all_failed and not sums["dispatchedCount"] else "partial"
    if sums["processedCount"]:
        return "success"
    if not count:
        return "no_source"
    return "locked" if statuses["locked"] == count else "no_new_escalations"


def loops_text(summary: JsonObject) -> str:
    """The summary of a run over many loops for people. Loops in which nothing happened are left out."""
    colour = STATUS_COLOURS.get(summary["status"], "yellow")
    counted = (
        f"{plural(summary['loopCount'], 'loop')}, {summary['processedCount']} new{backlog_words(summary)}"
    )
    lines = [f"{click.style(summary['status'], fg=colour)}  {counted}"]
    if not summary["loops"]:
        lines.append(no_loops(summary["repoPath"]))
    quiet = {"no_new_escalations", "no_source", "dry_run"}
    loops = [
        loop
        for loop in summary["loops"]
        if loop["status"] not in quiet or any(loop[key] for key in LOOP_COUNTS)
    ]
    stopped = {loop["stoppedBy"] for loop in loops if loop.get("stoppedBy")}
    lines += [stopped_words(by, summary["unreadCount"]) for by in sorted(stopped)]
    if loops:
        counts = [key for key in LOOP_COUNTS if any(loop.get(key) for loop in loops)]
        rows = [
            (loop["loopId"], loop["status"], *(loop.get(key) for key in counts), loop_note(loop))
            for loop in loops
        ]
        names = LOOP_COUNTS | {"dispatchedCount": sent_word(summary).upper()}
        headings = ("LOOP", "STATUS", *(names[key] for key in counts), "REASONS")
        lines += ["", table(headings, rows, ("SKIPPED", "REASONS", "LATE FAILED", "LATE"))]
    return "\n".join(lines)


def loop_note(loop: JsonObject) -> str | None:
    """What went wrong with one of many loops, on one line."""
    if loop["status"] == "locked":
        return "another pass is running"
    said = loop.get("message") or ", ".join(causes_of(loop))
    return " ".join(said.split()) or None


def check_apart(job: Job) -> None:
    """Refuse files that are the same: the program would overwrite a file that it only reads, or one of its
    own with another. Raises UsageError."""
    files = {
        **files_of(job),
        "the attempts file": job.attempts_file,
        "the lock file": job.lock_file,
        "the temporary file of the state": job.temporary_file,
    }
    places: dict[str, str] = {}
    for name, file in files.items():
        other = places.setdefault(os.path.realpath(file), name)
        if other != name:
            raise click.UsageError(f"{other} and {name} are the same file: {files[other]}")


def check_regular(path: str, error: type[StateError | StorageError]) -> None:
    """Refuse, with that error, to write to anything but a regular file."""
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # opening the file says what is wrong with it
        return
    if not is_regular:
        advice = "the program writes that file: move away what is there"
        raise error(f"{path} is not a regular file", [advice])


def make_job(paths: Paths, loop_id: str, trace_id: str | None = None) -> Job:
    """A job on the files that the command line names. The others are where the host keeps them.

    Raises UsageError, StateError or StorageError.
    """
    job = name_files(usual_job(paths.repo, loop_id, trace_id), paths)
    check_files(job, paths)
    check_regular(job.queue_file, StateError)
    return job


def name_files(job: Job, paths: Paths) -> Job:
    """A job on the files that the command line names in place of the usual ones. Raises UsageError."""
    named: dict[str, Any] = {
        name: absolute(path) for name, path in paths._asdict().items() if path is not None and name != "repo"
    }
    return job._replace(**named)


def check_files(job: Job, paths: Paths) -> None:
    """Check that a loop's files can be used as they are. Raises UsageError, StateError or StorageError."""
    if any(path is not None for path in paths[1:]):
        check_apart(job)
    check_regular(job.state_file, StateError)
    check_regular(job.telemetry_file, StorageError)
    check_regular(job.attempts_file, StorageError)


def make_jobs(
    paths: Paths, loop_id: str | None, trace_id: str | None = None
) -> tuple[list[Job], dict[str, DispatchError]]:
    """The job of one loop or, if none is named, of each loop; and the errors of those that cannot be served.

    Raises UsageError; StateError or StorageError if a loop is named, or if the loops cannot be found.
    """
    if loop_id is not None:
        return [make_job(paths, loop_id, trace_id)], {}
    if paths.escalations_file or paths.state_file or paths.telemetry_file:
        raise click.UsageError("a loop's own files go with --loop ID: name none for all loops")
    alike = name_files(usual_job(paths.repo, "", trace_id), paths)
    names, misnamed = find_loops(alike)
    jobs: list[Job] = []
    errors: dict[str, DispatchError] = dict(misnamed)
    try:
        check_regular(alike.queue_file, StateError)
    except StateError as error:
        return [], errors | dict.fromkeys(names, error)
    for name in names:
        job = alike._replace(**files_of_loop(alike.repo, name))
        try:
            check_files(job, paths)
        except DispatchError as error:
            errors[name] = error
        except click.UsageError as error:
            errors[name] = StorageError(error.format_message())
        else:
            jobs.append(job)
    return jobs, errors


def complain_of_loops(errors: Mapping[str, DispatchError]) -> None:
    """Say on standard error which loops cannot be served or read, and why."""
    for name, error in errors.items():
        click.echo(f"error: loop {name}: {error}", err=True)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """If standard error is a terminal, show how many deliveries have ended, and the seconds left."""
    if not is_terminal(sys.stderr):
        yield None
        return
    bar = click.progressbar(length=1, file=sys.stderr, show_pos=True, show_eta=False)
    with contextlib.ExitStack() as open_bar:

        def update(done: int, total: int, left: float) -> None:
            if not total:  # no empty bar above an early error
                return
            bar.label = f"Delivering, {max(0.0, left):.0f} s left"
            bar.length, bar.pos = total, done
            if bar.entered:
                bar.render_progress()
            else:
                open_bar.enter_context(bar)

        yield update


# Every other status is yellow.
STATUS_COLOURS = {"success": "green", "no_new_escalations": "green", "failed": "red"}


def summary_text(summary: JsonObject) -> str:
    """The summary of a pass for people: what happened, and what is left for each sink."""
    status, now = summary["status"], parse_time(summary.get("updatedAt")) or time.time()
    sinks = summary.get("sinks") or {}
    # The summaries of older versions do not say whether a sink is enabled.
    all_disabled = bool(sinks) and not any(sink.get("enabled", True) for sink in sinks.values())
    warn = all_disabled or summary.get("stoppedBy") or (status != "failed" and has_failed(summary))
    coloured = click.style(status, fg="yellow" if warn else STATUS_COLOURS.get(status, "yellow"))
    lines = [f"{coloured}  {what_a_pass_did(summary)}"]
    if all_disabled:
        lines.append('no sink is enabled: nothing is sent; set "enabled": true on a sink in the config')
    if summary.get("stoppedBy"):
        lines.append(stopped_words(summary["stoppedBy"], summary["unreadCount"]))
    elif summary.get("unreadCount"):
        lines.append(unread_words(summary["unreadCount"]))
    if causes := causes_of(summary):
        lines.append(f"reasons: {', '.join(causes)}; `{PROGRAM} explain {causes[0]}` says more")
    if sinks:
        rows = [
            (
                sink_id,
                sink.get("sentCount", 0),
                sink["waitingCount"],
                how_long(sink.get("oldestPendingAt"), now),
                when_due(sink.get("nextAttemptAt"), now) if is_failing(sink, summary) else None,
                sink["deadLetterCount"],
                what_is_left(sink, failing=is_failing(sink, summary)),
            )
            for sink_id, sink in sinks.items()
        ]
        headings = ("SINK", sent_word(summary).upper(), "WAITING", "OLDEST", "NEXT ATTEMPT", "DEAD", "NOTE")
        lines += ["", table(headings, rows, ("OLDEST", "NEXT ATTEMPT"))]
    return "\n".join(lines)


def what_a_pass_did(summary: JsonObject) -> str:
    """What a pass did, in one line."""
    loop = f"loop {summary['loopId']}"
    if summary["status"] == "locked":
        return f"another pass is running for {loop}; nothing to do"
    if summary["status"] == "no_source":
        return printable(summary.get("message") or f"{loop}: no escalations at {summary['escalationsFile']}")
    counts = ((sent_word(summary), "dispatchedCount"), ("skipped", "skippedCount"), ("failed", "failedCount"))
    outcome = ", ".join(f"{summary[key]} {word}" for word, key in counts)
    return f"{loop}, {summary['processedCount']} new: {outcome}{backlog_words(summary)}"


def sent_word(summary: JsonObject) -> str:
    """What the counts of deliveries count; a dry run sends nothing."""
    return "to send" if summary["status"] == "dry_run" else "delivered"


def backlog_words(summary: JsonObject) -> str:
    """What became of deliveries that had waited, and what waits now; empty if nothing does."""
    delivered, failed = summary["lateDispatchedCount"], summary["lateFailedCount"]
    late = f"; late: {delivered} {sent_word(summary)}, {failed} given up" if delivered or failed else ""
    waiting = plural(summary["waitingCount"], "delivery")
    return late + (f"; {waiting} waiting" if summary["waitingCount"] else "")


def causes_of(summary: JsonObject) -> list[str]:
    """The reason codes of what failed in a pass. Leaves out those that only say that something failed."""
    without_cause = ("dispatch_failed", "partial_dispatch_failure", "delivery_deferred")
    return [code for code in summary["failureReasonCodes"] if code not in without_cause]


def is_failing(sink: JsonObject, summary: JsonObject) -> bool:
    """Tell whether the last attempt failed, and something waits for the sink or may do so."""
    return bool(sink["consecutiveFailures"] and (sink["waitingCount"] or summary["unreadCount"]))


def unread_words(lines: int) -> str:
    """Say how much of a source no pass has read."""
    return f"{plural(lines, 'line')} of the source not read yet"


def stopped_words(by: str, unread: int) -> str:
    """Say why a pass ended before all was sent, and how much of the source it has not read."""
    why = "a signal" if by == "signal" else "its time budget"
    left = f", {unread_words(unread)}" if unread else ""
    return f"stopped by {why}{left}; the next pass goes on"


def what_is_left(sink: JsonObject, *, failing: bool) -> str | None:
    """What the deliveries of a sink wait for: why it fails, or its rate and how long that takes."""
    if sink.get("enabled") is False:
        return "disabled"
    if failing:
        return cut(why_it_failed(sink), SHOWN_CHARACTERS)
    if not sink["waitingCount"]:
        return "given up: status says why" if sink["deadLetterCount"] else None
    rate = sink.get("perMinute")
    if not rate:
        return "waits for the next pass"
    return f"{rate} a minute, about {duration_words(max(1.0, sink['waitingCount'] * 60 / rate))} left"


def note_lines(notes: Iterable[str]) -> list[str]:
    return [f"note: {printable(note)}" for note in notes]


def short_id(escalation: str | None) -> str | None:
    """The beginning of an escalation's id, which is usually unique."""
    return escalation and escalation[:12]


def sinks_words(sinks: Iterable[tuple[str, str | None, str]], *, named: bool) -> str:
    """The deliveries of an escalation in a cell, as `waiting (rate_limited): slack-default`.

    `sinks`: a word, a reason and an id each. `named`: name the sinks even if all have one word and reason.
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    for word, why, sink_id in sinks:
        groups.setdefault((word, why), []).append(sink_id)
    return "; ".join(
        word + (f" ({why})" if why else "") + (f": {', '.join(ids)}" if named or len(groups) > 1 else "")
        for (word, why), ids in groups.items()
    )


# The decisions of a plan in words, in the order in which a cell has them.
PLAN_WORDS = {"send": "send", "wait": "waiting", "keep": "waiting", "drop": "dead", "skip": "skipped"}


def plan_text(plans: Sequence[JsonObject], *, several: bool) -> str:
    """The plans of loops for people. `several`: name the loops."""
    now = time.time()
    if any(plan["escalations"] for plan in plans):
        lines = ["Nothing was sent or written. This is what a pass would do, if each sink took it in time."]
        if written := [plan["oldestAt"] for plan in plans if plan["oldestAt"]]:
            oldest = min(written, key=by_time)
            lines.append(f"Of what it would send, the oldest was written {how_long(oldest, now)}.")
        lines += ["", plan_table(plans, now, several=several)]
    else:
        lines = ["Nothing waits: a pass would send nothing."]
    for plan in plans:
        loop = f"loop {plan['loopId']}, " if several else ""
        lines += note_lines(f"{loop}{note}" for note in plan["notes"])
        lines += request_lines(plan["escalations"], loop)
    return "\n".join(["", *lines])


def request_lines(escalations: Iterable[JsonObject], loop: str) -> Iterator[str]:
    """The requests in a plan for people. `loop`: how their headlines begin."""
    for item in escalations:
        for sink in item.get("sinks", []):
            if "request" in sink:
                head = printable(f"{loop}line {item['line']} to {sink['id']}:")
                text = json.dumps(sink["request"], indent=2, ensure_ascii=False)
                yield from ("", click.style(head, bold=True), *map(printable, text.splitlines()))


def plan_table(plans: Sequence[JsonObject], now: float, *, several: bool) -> str:
    """A table of the escalations in plans. `several`: name the loops."""
    rows = [
        (
            plan["loopId"],
            item["line"],
            item.get("timestamp"),
            item.get("eventSeverity"),
            item.get("category") or item["decision"],
            short_id(item["escalationId"]),
            plan_cell(item),
        )[0 if several else 1 :]
        for plan in plans
        for item in plan["escalations"]
    ]
    headings = ("LOOP", "LINE", "TIME", "SEVERITY", "CATEGORY", "ID", "SINKS")[0 if several else 1 :]
    return long_table(headings, rows, now, ("ID", "TIME"))


def plan_cell(item: JsonObject) -> str:
    """The decisions on an escalation, or on a line that is not one, in a cell."""
    if not item.get("sinks"):
        return f"{'failed' if item['decision'] in UNUSABLE_CODES else 'skipped'} ({item['decision']})"
    order = list(PLAN_WORDS)
    sinks = sorted(item["sinks"], key=lambda sink: order.index(sink["decision"]))
    words = (
        (PLAN_WORDS[sink["decision"]], sink.get("reasonCode") or sink.get("why"), sink["id"])
        for sink in sinks
    )
    return sinks_words(words, named=True)


def long_table(
    headings: Sequence[str], found: Sequence[Sequence[Any]], now: float, drop: Collection[str] = ()
) -> str:
    """A table of things that have a TIME. Of many, those that differ only in LINE, TIME and ID share a row,
    with their number, oldest and newest. The last cell has the reasons."""
    at = headings.index("TIME")
    if len(found) <= LISTED:
        return table(headings, ([*row[:at], how_long(row[at], now), *row[at + 1 :]] for row in found), drop)
    shared = [place for place, heading in enumerate(headings) if heading not in ("LINE", "TIME", "ID")]
    groups: dict[tuple[object, ...], list[str | None]] = {}
    for row in found:
        groups.setdefault(tuple(row[place] for place in shared), []).append(row[at])
    rows = []
    for cells, moments in sorted(groups.items(), key=lambda group: -len(group[1])):
        times = sorted(filter(None, moments), key=by_time)
        ages = [how_long(moment, now) for moment in (times[:1] + times[-1:])] or [None, None]
        rows.append((*cells[:-1], len(moments), *ages, cells[-1]))
    more = f"\n… and {plural(len(rows) - LISTED, 'other group')}" if len(rows) > LISTED else ""
    *first, last = (headings[place] for place in shared)
    return table((*first, "COUNT", "OLDEST", "NEWEST", last), rows[:LISTED], ("NEWEST", "OLDEST")) + more


@cli.command(epilog=examples("config", "config --category health_critical", "config --list-sinks"))
@repo_option
@config_option("--config-file")
@click.option("--category", metavar="NAME", help="Show where an escalation of this category goes.")
@click.option("--severity", metavar="LEVEL", help="With --category: the record's own severity.")
@click.option(
    "--list-sinks", is_flag=True, help="Print a line for each sink: id, type, enabled, tab-separated."
)
@click.option("--no-env-check", is_flag=True, help="Do not ask whether the secrets are set.")
@output_options
def config(
    repo: str,
    config_file: str | None,
    category: str | None,
    severity: str | None,
    list_sinks: bool,
    no_env_check: bool,
    output: Output,
) -> None:
    """Validate the config, and show where alerts go.

    With --category: where an escalation of that category goes, and why.
    """
    if severity is not None and category is None:
        raise click.UsageError("--severity requires --category")
    if list_sinks and category is not None:
        raise click.UsageError("--list-sinks does not go with --category")
    if list_sinks and output.form == "json":
        raise click.UsageError("--list-sinks prints plain lines: it does not go with --format json")
    level = None if severity is None else read_severity(severity)
    if category is not None and not category.strip():
        raise click.BadParameter("is empty", param_hint="--category")
    path = config_path(repo, config_file)
    loaded = load_config(path, os.environ, check_env=not no_env_check)
    if list_sinks:
        for sink in loaded.sinks.values():
            click.echo(f"{sink.id}\t{sink.type}\t{json.dumps(sink.enabled)}")
    elif category is not None:
        resolution = Router(loaded).resolve(category.strip(), level)
        output.show(resolution_document(loaded, resolution), lambda: resolution_text(resolution))
    else:
        output.show(config_document(loaded), lambda: config_text(loaded))


def read_severity(word: str) -> str:
    """The severity that an option means. Raises BadParameter for an unknown word."""
    level = normalise_severity(word)
    if level is None:
        known = ", ".join(SEVERITIES)
        raise click.BadParameter(f"{printable(word)!r} is not one of {known}", param_hint="--severity")
    return level


def config_document(config: Config) -> JsonObject:
    """The config, resolved, as `config` prints it for scripts."""
    warnings = quoted_secrets(config.sinks.values())
    return {
        "schemaVersion": SCHEMA_VERSION,
        "sourceFile": config.path,
        "defaultMinSeverity": config.default_min_severity,
        "sinks": [sink.summary() for sink in config.sinks.values()],
        "enabledSinkCount": sum(sink.enabled for sink in config.sinks.values()),
        "routing": config.routing,
        "envStatus": config.env_status(),
        "validation": {"envCheckEnabled": config.env_checked},
        **({"warnings": warnings} if warnings else {}),
    }


def resolution_document(config: Config, resolution: Resolution) -> JsonObject:
    """Where records of a category go, and why, as `config --category` prints it for scripts."""
    document = {
        "schemaVersion": SCHEMA_VERSION,
        "sourceFile": config.path,
        "category": resolution.category,
        "eventSeverity": resolution.event_severity,
        "categoryMappedSeverity": resolution.mapped_severity,
        "minSeverity": resolution.min_severity,
        "shouldDispatch": resolution.should_dispatch,
        "route": resolution.route,
        "selectedSinks": [sink.describe() for sink in resolution.selected],
        "dispatchableSinks": [sink.describe() for sink in resolution.dispatchable],
        "envStatus": config.env_status(),
        "validation": {"envCheckEnabled": config.env_checked},
    }
    return {key: value for key, value in document.items() if value is not None}


def config_text(config: Config) -> str:
    """The config for people: the sinks and their secrets, where each category goes, and warnings."""

    def secrets(sink: Sink) -> str:
        refs = sink.secret_refs.items()
        return ", ".join(name if key in sink.secrets else f"{name} (unset)" for key, name in refs)

    sinks = (
        (sink.id, sink.type, "yes" if sink.enabled else "no", sink.min_severity, secrets(sink))
        for sink in config.sinks.values()
    )
    router = Router(config)
    routing = config.routing
    routed = [route["category"] for route in routing.get("routes", []) if route.get("enabled", True)]
    categories = {name: name for name in (*routed, *routing.get("categorySeverity", {}))}
    rows = [
        (title, found.event_severity, found.min_severity, where_it_goes(found))
        for title, category in [*categories.items(), ("any other", "")]
        for found in [router.resolve(category, None)]
    ]
    return "\n".join(
        [
            f"{click.style('valid', fg='green')}  {printable(config.path)}",
            "",
            table(("SINK", "TYPE", "ENABLED", "MINIMUM", "SECRETS"), sinks),
            "",
            table(("CATEGORY", "SEVERITY", "MINIMUM", "GOES TO"), rows),
            "",
            "SEVERITY counts if the record has none.",
            *(f"warning: {printable(warning)}" for warning in config_warnings(config)),
        ]
    )


def where_it_goes(resolution: Resolution) -> str:
    """The sinks of a category in a cell."""
    names = (
        sink.id if sink.enabled else f"{sink.id} (disabled)"
        for sink in resolution.selected
        if not (resolution.should_dispatch and sink.enabled) or sink in resolution.dispatchable
    )
    listed = ", ".join(names) or "no sink"
    return listed if resolution.should_dispatch else f"only from {resolution.min_severity} on: {listed}"


def resolution_text(resolution: Resolution) -> str:
    """Where records of a category go, for people, and why not to a sink."""
    route = "its route" if resolution.route["matched"] else "no route, so the default sinks"
    severity, minimum = resolution.event_severity, resolution.min_severity
    head = f"{resolution.category}, severity {severity}: {route}, from {minimum} on"
    lines = [click.style(printable(head), bold=True)]
    for sink in resolution.selected:
        why = why_not(sink, resolution)
        decision = click.style("skip ", fg="yellow") if why else click.style("send ", fg="green")
        lines.append(f"  {decision} {sink.id} ({sink.type})" + (f": {why}" if why else ""))
    if not resolution.selected:
        lines.append("  to no sink: the route names none")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Status: is it working, what is stuck, why, what to do
# ---------------------------------------------------------------------------------------------------------
# Reads the queue, the summary, the source and the ends of the telemetry files (`read_facts`), judges what it
# has read (`loop_status`, `find_troubles`), and shows that. Sends nothing and makes no file or folder. Only
# `--ack` writes, to the queue.

# An unfinished line is reported if its writer has been silent for this many seconds.
WRITER_GRACE = 60.0
Health = Literal["ok", "warning", "critical", "disabled", "unknown"]
# From best to worst: a monitor shows the worst loop.
HEALTH_ORDER: tuple[Health, ...] = ("ok", "warning", "unknown", "critical")
# The monitoring-plugin convention: OK, WARNING, CRITICAL, UNKNOWN.
PLUGIN_CODES = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}

STATUS_EXIT_CODES_HELP = """
\b
Exit codes with --check:
  0  OK
  1  WARNING: something waits or was lost, a sink fails, no sink is enabled,
     or there are dead letters
  2  CRITICAL: the config is invalid; or a sink has failed, or something waits
     and no pass has ended without an error, for longer than --critical-after
  3  UNKNOWN: no pass has run, the files cannot be read, or the command line
     is wrong
"""

DISPATCH_FIELDS = (
    *("status", "updatedAt", "processedCount", "dispatchedCount", "skippedCount", "failedCount"),
    *("failureReasonCodes", "escalationsLineOffset", "escalationsLineCount"),
)
DELIVERY_FIELDS = (
    *("timestamp", "status", "reasonCode", "escalationCategory", "eventSeverity", "sinkCount"),
    *("dispatchedSinkCount", "failedSinkCount", "traceId", "escalationTraceId"),
)


class Finding(NamedTuple):
    """Something that an operator should know about a loop, how bad it is, and what to do about it."""

    health: Health
    words: str
    advice: str | None = None


def worst_health(findings: Iterable[Finding]) -> Health:
    return max((finding.health for finding in findings), key=HEALTH_ORDER.index, default="unknown")


def advise(fault: object, sink: Sink | None, commands: Mapping[str, str]) -> str:
    """Say how to fix what a fault code stands for. `commands`: those of `commands_for`.

    If the sink is not known (the config cannot be read, or no longer has it), the advice names no variables.
    """
    found = CODES.get(str(fault))
    if found is None:
        return words_of("see what the sink answered: `{show}`", commands)
    names = dict(commands)
    if sink is not None:
        adapter, variables = ADAPTERS[sink.type], sink.secret_refs
        url = variables.get(adapter.url_key) or adapter.default_url or GENERAL_WORDS["url"]
        names |= {
            "url": url,
            "credential": variables.get(adapter.credential_key, url),
            "unset": " and ".join(adapter.missing_secrets(sink)) or GENERAL_WORDS["unset"],
            "sink": sink.id,
        }
    return words_of(found.fix, names)


def commands_for(job: Job) -> dict[str, str]:
    """The commands that the texts of CODES name, on a job's files, to be pasted into a shell."""
    named = {name: command_line(words[0], job, *words[1:]) for name, words in COMMANDS.items()}
    return named | {"config": config_command(job.config_file)}


def config_command(config_file: str) -> str:
    """The command that checks a config, to be pasted into a shell."""
    return shell_line(PROGRAM, "config", "--alert-config-file", config_file)


def test_command(repo: str, config_file: str, sink_id: str) -> str:
    """The command that sends a sink a test alert, to be pasted into a shell."""
    words = [PROGRAM, "test", "--repo", repo, "--sink", sink_id]
    if config_file != os.path.join(repo, DEFAULT_CONFIG):
        words += ["--alert-config-file", config_file]
    return shell_line(*words)


class LoopFigures(NamedTuple):
    """What the queue says about a loop."""

    # How far the source was read.
    cursor: Cursor
    # By sink: its figures; the line that it refuses although it takes others; its attempts in each hour.
    sinks: dict[str, JsonObject]
    stuck: dict[str, int]
    hours: dict[str, dict[int, tuple[int, int]]]
    # Reason code, count and last time of what reached nobody.
    losses: list[tuple[str, int, float]]
    # What the loop's files say; None if the queue knows the loop.
    past: PastRun | None = None
    # What is wrong with the queue.
    damage: str | None = None


def read_figures(job: Job, config: Config | None, now: float) -> LoopFigures:
    """Read what the queue says about a loop, at one moment: no pass writes meanwhile.

    Raises StateError or StorageError.
    """
    damage = None
    try:
        with open_to_read(job) as queue:
            if queue and (found := queue.find_loop(job.loop_id)):
                loop, cursor, _ = found
                sinks = sink_figures(queue, loop, config and config.sinks)
                stuck = {
                    sink_id: place[1]
                    for sink_id in sinks
                    if (place := queue.stuck_at(loop, sink_id)) and place[0] == cursor.segment
                }
                return LoopFigures(cursor, sinks, stuck, queue.hours(loop, now), queue.losses(loop, now))
    except DamagedQueueError as error:
        damage = str(error).partition("\n")[0]
    past = read_past(job)
    return LoopFigures(past.cursor, {}, {}, {}, [], past, damage)


class Unread(NamedTuple):
    """The lines that no pass has read yet. `oldest`: the timestamp of the first escalation in them.
    `by_sink`: how many escalations are for the sink, and the timestamp of the first of these."""

    lines: int
    oldest: str | None
    by_sink: dict[str, tuple[int, str | None]]


class LoopFacts(NamedTuple):
    """What `status` has read about a loop, before it judges any of it."""

    job: Job
    now: float
    critical_after: float
    # The state file; empty if there is none, or if it is damaged.
    document: JsonObject
    # None if it cannot be read.
    config: Config | None
    # None if there is no config.
    config_valid: bool | None
    figures: LoopFigures
    unread: Unread
    # The rows at the end of the telemetry, and the last one; empty if there is none.
    rows: list[JsonObject]
    last: JsonObject
    # The last failed attempt of each sink, if the end of the attempts file has it.
    failures: dict[str, JsonObject]
    commands: dict[str, str]
    notes: list[str]

    @property
    def place_is_known(self) -> bool:
        """Tell whether the queue or, without it, the loop's files say how far its source was read."""
        return self.figures.past is None or bool(self.figures.cursor.number or self.figures.cursor.line)

    @property
    def was_invalid(self) -> bool:
        """Tell whether the config is valid now, but was not for the last pass: a secret was unset, or the
        file was corrected since."""
        return self.document.get("status") == "config_invalid" and self.config_valid is not False


def read_facts(job: Job, critical_after: float) -> LoopFacts:
    """Read all that is known about a loop. Raises StateError or StorageError."""
    now = time.time()
    notes: list[str] = []
    try:
        document = checked_texts(read_state_document(job.state_file) or {})
    except ValueError:
        document = {}
        notes.append(f"the state file {job.state_file} is damaged: the next pass writes a new one")
    if fault := wrong_queue(job, document):
        raise fault
    config, config_valid, config_notes = read_config_if_any(job, document)
    figures = read_figures(job, config, now)
    facts = LoopFacts(
        job=job,
        now=now,
        critical_after=critical_after,
        document=document,
        config=config,
        config_valid=config_valid,
        figures=figures,
        unread=read_unread(job, figures.cursor, config),
        rows=recent_rows(job.telemetry_file),
        last=next(rows_backwards(job.telemetry_file), {}),
        failures=last_failures(job),
        commands=commands_for(job),
        notes=notes,
    )
    if not document and not notes and facts.place_is_known:
        notes.append(f"the state file {job.state_file} is not there: the next pass writes a new one")
    if figures.damage:
        notes.append(f"{figures.damage}: the next pass keeps it aside and starts a new one")
    notes += config_notes
    if facts.unread.lines and config is None:
        notes.append(f"{unread_words(facts.unread.lines)}: without a config it is not known for which sinks")
    return facts


def where_it_worked(job: Job) -> Job:
    """A job on the queue, source and telemetry that the last pass used, if this one names files that do not
    exist."""
    document = summary_if_readable(job)
    files: dict[str, Any] = {}
    for key, name in (
        ("escalationsFile", "escalations_file"),
        ("dispatchTelemetryFile", "telemetry_file"),
        ("queueFile", "queue_file"),
    ):
        path = document.get(key)
        if isinstance(path, str) and os.path.isfile(path) and not os.path.lexists(getattr(job, name)):
            files[name] = path
    return job._replace(**files)


def recent_rows(path: str) -> list[JsonObject]:
    """The rows in the last RECENT_BYTES of a file of rows. Raises StorageError."""
    with open_rows(path) as file:
        start = max(0, file.seek(0, os.SEEK_END) - RECENT_BYTES)
        file.seek(start)
        lines = file.read().splitlines()
    return list(filter(None, map(read_row, lines[1:] if start else lines)))


def last_failures(job: Job) -> dict[str, JsonObject]:
    """The last failed attempt of each sink that has one at the end of the attempts file."""
    return {
        str(row.get("sinkId")): {"timestamp": None, **row}
        for row in recent_rows(job.attempts_file)
        if row.get("loopId") == job.loop_id
        and "peer" not in row
        and row.get("outcome") in ("retry", "misconfigured", "dead_letter")
    }


def read_config_if_any(job: Job, document: JsonObject) -> tuple[Config | None, bool | None, list[str]]:
    """The config, None if it cannot be read; whether it is valid, None if there is none; notes about it."""
    try:
        known = as_text(document.get("configDigest"))
        config = load_config(job.config_file, {}, check_env=False, known_digest=known)
    except ConfigError as error:
        if os.path.exists(job.config_file):
            return None, False, [error.headline, *error.faults]
        # `status` may run on a machine that has no config.
        return None, None, [f"config not read: {job.config_file} is not there"]
    enabled = any(sink.enabled for sink in config.sinks.values())
    return config, True, config_warnings(config) if enabled else []


def read_unread(job: Job, cursor: Cursor, config: Config | None) -> Unread:
    """Read the lines that no pass has read yet. Raises StorageError."""
    router = Router(config) if config else None
    lines, oldest = 0, None
    by_sink: dict[str, tuple[int, str | None]] = {}
    with contextlib.closing(Source(job.escalations_file, cursor).find()) as source:
        for line in (line for chunk in source.chunks() for line in chunk.lines):
            lines += 1
            for found in parse_line(line.text, line.size, job.loop_id):
                if isinstance(found, Unusable):
                    continue
                oldest = oldest or found.written_at
                for sink in router.resolve(found.category, found.severity).dispatchable if router else ():
                    count, first = by_sink.get(sink.id, (0, found.written_at))
                    by_sink[sink.id] = (count + 1, first)
    return Unread(lines, oldest, by_sink)


def loop_status(job: Job, critical_after: float) -> JsonObject:
    """The status of a loop and its sinks. Works without config, secrets or queue, and says what it does not
    know.

    Raises StateError or StorageError.
    """
    facts = read_facts(job, critical_after)
    document, last = facts.document, facts.last
    last_pass = {key: document.get(key) for key in DISPATCH_FIELDS} | {"lastTraceId": document.get("traceId")}
    in_config = facts.config.sinks if facts.config else {}
    sinks = [sink_status(facts, sink_id) for sink_id in sorted({*facts.figures.sinks, *in_config})]
    kept = sum(sink["waitingCount"] for sink in sinks if sink["enabled"] is False)
    well = "nothing is waiting" + (f", but for {plural(kept, 'delivery')} to disabled sinks" if kept else "")
    findings = list(find_troubles(facts, sinks)) or [Finding("ok", well)]
    return {
        "schemaVersion": SCHEMA_VERSION,
        "generatedAt": iso(facts.now),
        "repoPath": job.repo,
        "loopId": job.loop_id,
        "health": worst_health(findings),
        "alerts": {
            "dispatch": last_pass if document else None,
            "lastDelivery": {key: last.get(key) for key in DELIVERY_FIELDS} if last else None,
        },
        "sinks": sinks,
        "failureReasons": count_failures(facts.rows),
        "unreadCount": facts.unread.lines,
        "configValid": False if facts.was_invalid else facts.config_valid,
        "silent": is_silent(facts, sinks),
        "verdict": "; ".join(finding.words for finding in findings),
        "advice": list(dict.fromkeys(finding.advice for finding in findings if finding.advice)),
        "notes": [*facts.notes, *notes_of_sinks(facts, sinks)],
    }


def notes_of_sinks(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[str]:
    """Say what will become of deliveries to sinks that are disabled or were removed, and why the last pass
    sent nothing."""
    for sink in sinks:
        waiting = plural(sink["waitingCount"], "delivery")
        if sink["waitingCount"] and sink["enabled"] is False:
            given_up = command_line("skip", facts.job, "--sink", sink["id"])
            yield (
                f"{waiting} waiting for {sink['id']}, which is disabled: sent if it is enabled within "
                f"giveUpAfterSeconds, or given up with `{given_up}`"
            )
        elif sink["waitingCount"] and facts.config is not None and sink["enabled"] is None:
            yield f"{waiting} waiting for {sink['id']} will be given up: the config has no such sink any more"
    if facts.was_invalid:
        yield f"the last pass found the config invalid: {facts.document.get('message')}"


def sink_status(facts: LoopFacts, sink_id: str) -> JsonObject:
    """The status of a sink."""
    sink = facts.config.sinks.get(sink_id) if facts.config else None
    figure = facts.figures.sinks.get(sink_id) or figure_of({}, NEVER_USED, None, [])
    commands = {**facts.commands, "test": test_command(facts.job.repo, facts.job.config_file, sink_id)}
    unread, oldest_unread = facts.unread.by_sink.get(sink_id, (0, None))
    to_come = figure["waitingCount"] + unread
    # If nothing waits for a sink, it does not matter that its last attempt failed.
    failing = figure["consecutiveFailures"] > 0 and to_come > 0
    # The queue does not count a refused record as a failure of the sink. The attempts file has it.
    refused = facts.failures.get(sink_id) if not failing else None
    reason = refused or figure
    return {
        "id": sink_id,
        "type": sink.type if sink else None,
        "enabled": sink.enabled if sink else None,
        "health": sink_health(facts, sink, figure, to_come, failing=failing),
        "lagCount": to_come,
        "waitingCount": figure["waitingCount"],
        "oldestPendingAt": figure["oldestPendingAt"] or oldest_unread,
        "lastSuccessAt": figure["lastSuccessAt"],
        "lastFailureAt": refused["timestamp"] if refused else figure["lastFailureAt"],
        **{key: reason.get(key) for key in ("reasonCode", "httpStatus", "message", "faultCode")},
        "advice": advise(reason.get("faultCode"), sink, commands) if failing else None,
        "consecutiveFailures": figure["consecutiveFailures"],
        "pendingLine": None if failing else facts.figures.stuck.get(sink_id),
        **{key: figure[key] if failing else None for key in ("failingSince", "nextAttemptAt")},
        **{key: figure[key] for key in ("deadLetterCount", "deliveredCount", "failedAttemptCount")},
        **{key: figure[key] for key in ("givenUpCount", "skippedCount", "clockOffsetSeconds")},
        "hours": last_hours(facts.figures.hours.get(sink_id, {}), facts.now),
        # The peers of a cluster that miss what another one has.
        "laggingPeers": [
            {**peer, "advice": advise(peer["faultCode"], sink, commands)}
            for peer in sorted(figure["laggingPeers"], key=lambda peer: str(peer["peer"]))
        ],
    }


def sink_health(
    facts: LoopFacts, sink: Sink | None, figure: JsonObject, to_come: int, *, failing: bool
) -> Health:
    """The health of a sink. `to_come`: how many deliveries wait for it or were not read yet."""
    if sink is not None and not sink.enabled:
        return "disabled"
    if facts.config_valid is False or facts.was_invalid:
        return "critical"  # nothing is sent to it
    since = parse_time(figure["failingSince"])
    if failing and since is not None and facts.now - since > facts.critical_after:
        return "critical"
    return "warning" if to_come or figure["deadLetterCount"] or figure["laggingPeers"] else "ok"


def is_silent(facts: LoopFacts, sinks: Sequence[JsonObject]) -> bool:
    """Tell whether something has waited for too long, and no pass has run since.

    Something without a timestamp has waited for too long. If the state file does not say when the last pass
    ran, the last row of the telemetry does.
    """
    waiting = [sink["oldestPendingAt"] for sink in sinks if sink["lagCount"] and sink["health"] != "disabled"]
    waiting += [facts.unread.oldest] if facts.unread.lines else []
    times = (
        parse_time(row.get(key)) for row, key in ((facts.document, "updatedAt"), (facts.last, "timestamp"))
    )
    # A time in the future, from a clock that was wrong, would hide that no pass runs.
    last_pass = next((at for at in times if at is not None and at <= facts.now + WRITER_GRACE), 0.0)
    waiting_since = min((parse_time(at) or 0.0 for at in waiting), default=facts.now)
    return facts.now - max(last_pass, waiting_since) > facts.critical_after


def last_hours(counts: Mapping[int, tuple[int, int]], now: float) -> list[JsonObject]:
    """The last 24 hours, oldest first: when each began, deliveries made, and attempts that failed."""
    last = int(now // 3600)
    return [
        {"at": iso(hour * 3600), "delivered": delivered, "failed": failed}
        for hour in range(last - 23, last + 1)
        for delivered, failed in [counts.get(hour, (0, 0))]
    ]


def count_failures(rows: Iterable[JsonObject]) -> list[JsonObject]:
    """Count the reasons for failure in rows, the most frequent first."""
    found: dict[str, JsonObject] = {}
    for row in rows:
        if row.get("status") not in ("failed", "partial", "failed_command"):
            continue
        codes = {entry.get("reasonCode") for entry in row["sinks"] if entry.get("status") == "failed"}
        for code in codes or {row.get("reasonCode")}:
            if isinstance(code, str):
                reason = found.setdefault(code, {"reasonCode": code, "count": 0, "lastSeenAt": None})
                reason["count"] += 1
                reason["lastSeenAt"] = row.get("timestamp")
    return sorted(found.values(), key=lambda reason: (-reason["count"], reason["reasonCode"]))


def find_troubles(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """What is wrong with a loop, worst first. If nothing can be sent, only the reason matters."""
    if found := find_obstacle(facts):
        yield found
        return
    active = [sink for sink in sinks if sink["health"] != "disabled"]
    yield from find_broken_pass(facts, active)
    yield from find_silence(facts, sinks)
    yield from find_failing(facts, active)
    yield from find_waiting(facts, active)
    yield from find_lagging_peers(active)
    yield from find_dead_letters(facts, active)
    yield from find_wrong_clocks(active)
    if sinks and not active:
        words = "no sink is enabled: nothing is sent"
        yield Finding("warning", words, 'set "enabled": true on a sink in the config')
    yield from find_lost(facts)
    yield from find_dangling_link(facts)
    yield from find_unfinished(facts)


def find_obstacle(facts: LoopFacts) -> Finding | None:
    """Report why a loop is not served at all: its config is invalid, or no pass has run."""
    commands = facts.commands
    if facts.was_invalid:
        return Finding(
            "critical",
            "the last pass found the config invalid, and sent nothing",
            "fix the error below, in the environment that reconcile runs in; the next pass sends "
            f"everything, and `{commands['dispatch']}` runs one now",
        )
    if facts.config_valid is False:
        advice = f"run `{commands['config']}` and fix what it names; the next pass sends what waits"
        return Finding("critical", "the config is invalid: nothing is sent", advice)
    if facts.place_is_known or facts.document:  # a pass has run
        return None
    if missing := no_such_loop(facts.job):
        return Finding("unknown", missing)
    if facts.config is None:
        words = f"no pass has run yet, and {facts.job.config_file} is not there"
        init = shell_line(PROGRAM, "init", "--repo", facts.job.repo)
        return Finding("unknown", words, f"`{init}` writes one, or name yours with --alert-config-file")
    advice = f"run `{commands['dispatch']}`, or hook it into reconcile"
    return Finding("unknown", "no pass has run yet", advice)


def find_broken_pass(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report that the last pass ended with an error: its summary says so, or the row that reconcile writes if
    there is no summary of it."""
    last, document = facts.last, facts.document
    words, since, said = "the last pass ended", None, None
    if document.get("status") == "error":
        said, since = document.get("message"), parse_time(document.get("failedSince"))
        if since is not None and document["failedSince"] != document.get("updatedAt"):
            words = f"every pass since {document['failedSince']} ended"
    elif last.get("status") == "failed_command":
        ended, worked = parse_time(last.get("timestamp")), parse_time(document.get("updatedAt"))
        if ended is not None and (worked is None or ended >= worked):
            said = last.get("message")
    if said is not None:
        waits = bool(facts.unread.lines) or any(sink["lagCount"] for sink in sinks)
        long = since is not None and facts.now - since > facts.critical_after
        words = f"{words} with an error: {cut(printable(str(said)), 300)}"
        advice = f"do what the error says; `{facts.commands['dispatch']}` tries again"
        yield Finding("critical" if waits and long else "warning", words, advice)


def find_silence(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report that no pass runs any more."""
    if is_silent(facts, sinks):
        last = facts.document.get("updatedAt")
        words = f"no pass has run{f' since {last}' if last else ''}, and something waits for one"
        now = f"`{facts.commands['dispatch']}` runs one now"
        yield Finding("critical", words, f"see why reconcile, or the timer, runs none; {now}")


def find_failing(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report the sinks that are failing, the critical ones first."""
    failing = [sink for sink in sinks if sink["advice"]]
    for sink in sorted(failing, key=lambda sink: sink["health"] != "critical"):
        words = f"{sink['id']} is failing ({why_it_failed(sink)})"
        if sink["waitingCount"]:
            words += f", {plural(sink['waitingCount'], 'delivery')} waiting"
        if sink["health"] == "critical":
            words += f", since {sink['failingSince']}"
        advice = sink["advice"]
        if sink["nextAttemptAt"]:
            at_once = command_line("dispatch", facts.job, "--now")
            advice += f"; next attempt {sink['nextAttemptAt']}, or at once with `{at_once}`"
        named = f"{sink['id']}: " if len(failing) > 1 else ""
        yield Finding(sink["health"], words, named + advice)


def find_waiting(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report what waits for sinks that are well, and what was not read yet."""
    dispatch = f"`{facts.commands['dispatch']}`"
    waiting = [sink for sink in sinks if sink["waitingCount"] and not sink["advice"]]
    for sink in (sink for sink in waiting if sink["pendingLine"]):
        line = sink["pendingLine"]
        given_up = command_line("skip", facts.job, "--sink", sink["id"], "--to-line", str(line))
        count = plural(sink["waitingCount"], "delivery")
        words = f"{sink['id']} fails on line {line} again and again, {count} waiting"
        yield Finding("warning", words, f"others get through to {sink['id']}: `{given_up}` gives that one up")
    if in_turn := [sink for sink in waiting if not sink["pendingLine"]]:
        count = plural(sum(sink["waitingCount"] for sink in in_turn), "delivery")
        words = f"{count} waiting for {', '.join(sink['id'] for sink in in_turn)}"
        yield Finding("warning", words, f"the next pass goes on with them; {dispatch} does so now")
    # Without a config nobody knows whether a sink should get the lines that were not read: one might.
    if facts.unread.lines and (facts.config is None or any(s["lagCount"] > s["waitingCount"] for s in sinks)):
        words = unread_words(facts.unread.lines)
        yield Finding("warning", words, f"the next pass reads on; {dispatch} does so now")


def find_lagging_peers(sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report the peers of a cluster that miss what another one has."""
    for sink in sinks:
        for peer in sink["laggingPeers"]:
            why = f" ({why_it_failed(peer)})" if peer["reasonCode"] else ""
            words = f"{peer['peer']} of {sink['id']} misses what its peers have, since {peer['since']}{why}"
            advice = f"{peer['peer']}: {peer['advice']}; it gets what it misses by itself"
            yield Finding("warning", words, advice)


def find_dead_letters(facts: LoopFacts, sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report the dead letters."""
    if dead := [sink for sink in sinks if sink["deadLetterCount"]]:
        count = plural(sum(sink["deadLetterCount"] for sink in dead), "dead letter")
        words = f"{count} of {', '.join(sink['id'] for sink in dead)}"
        listed = f"`{command_line('log', facts.job, '--status', 'dead')}` says why"
        again = f"fix the cause, then `{facts.commands['redeliver_dead']}` sends them again"
        advice = f"{listed}; {again}, or `{facts.commands['skip_dead']}` dismisses them"
        yield Finding("warning", words, advice)


def find_wrong_clocks(sinks: Sequence[JsonObject]) -> Iterator[Finding]:
    """Report the sinks whose clocks differ from this machine's."""
    for sink in sinks:
        if wrong := clock_words(sink["clockOffsetSeconds"]):
            words = f"the clock of {sink['id']} is {wrong} this machine's"
            advice = f"compare `date -u` with {sink['id']}, and set the one that is wrong"
            yield Finding("warning", words, advice)


def clock_words(offset: float | None) -> str | None:
    """Say how far a clock is off; None if too little to matter."""
    if offset is None or abs(offset) <= CLOCK_TOLERANCE:
        return None
    return f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'}"


def find_lost(facts: LoopFacts) -> Iterator[Finding]:
    """Report what reached no sink and never will unless somebody acts, for as long as LOSS_SHOWN."""
    figures = facts.figures
    if figures.past is not None and figures.past.lost:
        state = "damaged" if figures.damage else "gone"
        words = f"{figures.past.lost} in the queue {facts.job.queue_file}, which is {state} (queue_lost)"
        again = what_to_do_about_lost(facts.job, figures.past)
        yield Finding("warning", words, f"put the queue back, or {again}")
    for code, count, at in figures.losses:
        # The row that reports a lost queue says which lines were lost with it.
        messages = (row.get("message") for row in reversed(facts.rows) if row.get("reasonCode") == code)
        said = f"{next(messages, '')}; " if code == "queue_lost" else ""
        advice = said + words_of(CODES[code].fix, facts.commands)
        yield Finding("warning", loss_words(code, count, at), advice)


# By reason code: a loss in words, and the noun that is counted. Every other loss is one of lines.
LOSSES = {
    "source_replaced": ("the source was replaced, perhaps before all of it was read", ""),
    "queue_lost": ("{} in a queue that was lost", "delivery"),
    "sink_removed": ("{} given up with a sink that was removed", "delivery"),
    "no_dispatchable_sinks": ("{} reached nobody: no sink enabled", "escalation"),
}


def loss_words(code: str, count: int, at: float) -> str:
    """`2 lines of the source sent to nobody (invalid_escalation_json, last 2026-03-01T12:00:00Z)`."""
    words, noun = LOSSES.get(code, ("{} of the source sent to nobody", "line"))
    return f"{words.format(plural(count, noun))} ({code}, last {iso(at)})"


def find_dangling_link(facts: LoopFacts) -> Iterator[Finding]:
    """Report a source on a volume that is gone. It looks like a loop in which nothing was escalated."""
    path = facts.job.escalations_file
    if os.path.islink(path) and not os.path.exists(path):
        words = f"the source is a link to {os.path.realpath(path)}, which is not there: nothing is read"
        yield Finding("warning", words, "mount the volume, or correct the link")


def find_unfinished(facts: LoopFacts) -> Iterator[Finding]:
    """Report a last line that nobody finishes. It is not sent, and spoils the next line."""
    size, written = unterminated(facts.job.escalations_file)
    if size and facts.now - written > WRITER_GRACE:
        words = f"the source ends in {plural(size, 'byte')} without a line feed, since {iso(written)}"
        end = f"`echo >>{shell_line(facts.job.escalations_file)}`"
        advice = f"if its writer has gone, end the line: {end}; the next pass sends it"
        yield Finding("warning", words, advice)


HEALTH_COLOURS = {"ok": "green", "warning": "yellow", "critical": "red", "unknown": "yellow"}


def times_as_ages(text: str, now: float) -> str:
    """Replace the times in a text: `3 min ago`, `next attempt in 3 min`, and `for 3 min` in place of `since`.
    Commands, in backticks, stay as they are."""

    def say(found: re.Match[str]) -> str:
        moment, lead = found["time"], found["lead"] or ""
        if moment is None:
            return found[0]
        at = parse_time(moment)
        if lead == "since " and at is not None:
            return f"for {duration_words(max(0.0, now - at))}"
        if lead == "next attempt ":
            return f"{lead}{when_due(moment, now)}"
        return f"{lead}{how_long(moment, now)}"

    pattern = r"`[^`]*`|(?P<lead>next attempt |since )?(?P<time>\b\d{4}-\d\d-\d\dT[\d:.]+Z)"
    return re.sub(pattern, say, text)


def status_text(status: JsonObject) -> str:
    """The status of a loop for people: the verdict and the advice, then each sink, then the evidence."""
    head = click.style(status["health"].upper(), fg=HEALTH_COLOURS[status["health"]], bold=True)
    now = by_time(status["generatedAt"])
    lines = [f"{head}  loop {status['loopId']}: {times_as_ages(printable(status['verdict']), now)}"]
    lines += [f"What to do: {times_as_ages(printable(advice), now)}" for advice in status["advice"]]
    if status["sinks"] and status["health"] != "unknown":
        lines += ["", sinks_table(status["sinks"], now), ""]
    if status["unreadCount"]:
        lines.append(unread_words(status["unreadCount"]))
    for sink in status["sinks"]:
        if sink["reasonCode"]:
            why = cut(why_it_failed(sink), SHOWN_CHARACTERS)
            ago = how_long(sink["lastFailureAt"], now)
            lines.append(printable(f"{sink['id']}: last failure {ago}: {why}"))
    if (last := status["alerts"]["dispatch"]) and last["status"]:
        ago = how_long(last["updatedAt"], now) or last["updatedAt"]
        lines.append(printable(f"Last pass: {ago}, {last['status']}"))
    lines += note_lines(status["notes"])
    if status["failureReasons"]:
        lines += ["", reasons_table(status["failureReasons"], now)]
    return "\n".join(lines)


def sinks_table(sinks: Sequence[JsonObject], now: float) -> str:
    headings = (
        *("SINK", "HEALTH", "WAITING", "OLDEST", "LAST SUCCESS", "LAST FAILURE", "NEXT ATTEMPT"),
        *("DEAD", "LAST 24 HOURS"),
    )
    rows = (
        (
            sink["id"],
            sink["health"],
            sink["waitingCount"],
            how_long(sink["oldestPendingAt"], now) if sink["waitingCount"] else None,
            how_long(sink["lastSuccessAt"], now),
            how_long(sink["lastFailureAt"], now),
            when_due(sink["nextAttemptAt"], now),
            sink["deadLetterCount"],
            bar_chart(sink["hours"]),
        )
        for sink in sinks
    )
    drop = ("LAST FAILURE", "LAST SUCCESS", "NEXT ATTEMPT", "OLDEST", "LAST 24 HOURS", "DEAD")
    return table(headings, rows, drop)


BARS = "▁▂▃▄▅▆▇█"


def bar_chart(hours: Sequence[JsonObject]) -> Styled:
    """The attempts of the last hours in one cell: green if all succeeded, red if all failed, else yellow."""
    highest = max(hour["delivered"] + hour["failed"] for hour in hours)
    bars = []
    for hour in hours:
        count = hour["delivered"] + hour["failed"]
        if not count:
            bars.append(BARS[0])
            continue
        colour = "green" if not hour["failed"] else "yellow" if hour["delivered"] else "red"
        # Even a single attempt is higher than none.
        height = max(1, round(count / highest * (len(BARS) - 1)))
        bars.append(click.style(BARS[height], fg=colour))
    return Styled("".join(bars))


def reasons_table(reasons: Sequence[JsonObject], now: float) -> str:
    rows = (
        (
            reason["count"],
            how_long(reason["lastSeenAt"], now),
            reason["reasonCode"],
            CODES[reason["reasonCode"]].meaning if reason["reasonCode"] in CODES else None,
        )
        for reason in reasons
    )
    return table(("RECENT FAILURES", "LAST", "CODE", "MEANING"), rows)


def age_of_oldest(sink: JsonObject) -> float | None:
    """How long the oldest delivery has waited for a sink: 0 if none waits, None if it has no timestamp."""
    written = parse_time(sink["oldestPendingAt"])
    if not sink["lagCount"]:
        return 0.0
    return None if written is None else max(0.0, round(time.time() - written, 3))


# A metric: its name, its help text, and its value in the JSON of `status`; None if it is not known.
Metric = tuple[str, str, Callable[[JsonObject], float | None]]
LOOP_METRICS: tuple[Metric, ...] = (
    ("health", "0 ok, 1 warning, 2 critical, 3 unknown.", lambda loop: PLUGIN_CODES[loop["health"]]),
    ("config_valid", "1 if the config is valid, else 0.", lambda loop: loop["configValid"]),
    ("unread", "Lines of the source that no pass has read yet.", lambda loop: loop["unreadCount"]),
    (
        "last_pass_timestamp_seconds",
        "When the last pass ended.",
        lambda loop: parse_time((loop["alerts"]["dispatch"] or {}).get("updatedAt")),
    ),
)
SINK_METRICS: tuple[Metric, ...] = (
    ("waiting", "Deliveries that wait for the sink.", lambda sink: sink["waitingCount"]),
    (
        "oldest_waiting_age_seconds",
        "Age of the oldest that waits for the sink or was not read yet.",
        age_of_oldest,
    ),
    (
        "last_success_timestamp_seconds",
        "When the sink last took a delivery.",
        lambda sink: parse_time(sink["lastSuccessAt"]),
    ),
    ("consecutive_failures", "Failed attempts in a row.", lambda sink: sink["consecutiveFailures"]),
    ("dead_letters", "Deliveries given up for good.", lambda sink: sink["deadLetterCount"]),
    ("clock_offset_seconds", "How far the sink's clock is ahead.", lambda sink: sink["clockOffsetSeconds"]),
    ("lagging_peers", "Peers of a cluster that miss deliveries.", lambda sink: len(sink["laggingPeers"])),
)
DELIVERY_OUTCOMES = {
    "delivered": "deliveredCount",
    "failed": "failedAttemptCount",
    "dead_letter": "givenUpCount",
    "skipped": "skippedCount",
}


def prometheus_text(statuses: Sequence[JsonObject], unreadable: Iterable[str]) -> str:
    """The status of loops as text exposition, for node_exporter's textfile collector.

    `unreadable`: the loops whose status is not known.
    """
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float | None]]) -> None:
        metric = f"ops_alert_dispatch_{name}"
        lines.extend((f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"))
        lines.extend(f"{metric}{{{labels}}} {value:.15g}" for labels, value in samples if value is not None)

    sinks = [
        (f"{metric_label('loop', status['loopId'])},{metric_label('sink', sink['id'])}", sink)
        for status in statuses
        for sink in status["sinks"]
    ]
    for name, text, value_of in LOOP_METRICS:
        samples = [(metric_label("loop", status["loopId"]), value_of(status)) for status in statuses]
        if name == "health":
            samples += [(metric_label("loop", loop), PLUGIN_CODES["unknown"]) for loop in unreadable]
        family(name, "gauge", text, samples)
    for name, text, value_of in SINK_METRICS:
        family(name, "gauge", text, [(labels, value_of(sink)) for labels, sink in sinks])
    text = "Deliveries made, made dead letters or skipped; and failed, which are attempts."
    counts = [
        (f"{labels},{metric_label('outcome', outcome)}", sink[key])
        for labels, sink in sinks
        for outcome, key in DELIVERY_OUTCOMES.items()
    ]
    family("deliveries_total", "counter", text, counts)
    return "\n".join(lines)


def metric_label(key: str, value: str) -> str:
    """A label with backslash and quote escaped. A line feed must be escaped, too (Prometheus, "Exposition
    formats"), but `printable` leaves none."""
    escaped = printable(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


class StatusCommand(Command):
    """With `--check`, an error ends with UNKNOWN. Its usual exit code could mean CRITICAL to a monitor."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with unknown_to_a_monitor(check="--check" in args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        with unknown_to_a_monitor(check=ctx.params["check"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def unknown_to_a_monitor(*, check: bool) -> Iterator[None]:
    """If `check`, print an error as one line on standard output, and end with UNKNOWN."""
    try:
        yield
    except (DispatchError, click.UsageError) as fault:
        if not check:
            raise
        said = fault.format_message() if isinstance(fault, click.UsageError) else str(fault)
        click.echo(printable(f"ALERT DISPATCH UNKNOWN: {said}".replace("\n", ";")))
        raise click.exceptions.Exit(PLUGIN_CODES["unknown"]) from None


@cli.command(
    cls=StatusCommand,
    epilog=examples(
        "status",
        "status --loop night-build --ack",
        "status --check --critical-after 900",
        "status --format prometheus",
    )
    + STATUS_EXIT_CODES_HELP,
)
@repo_option
@loop_option(show_default="all loops")
@click.option("--check", is_flag=True, help="One line for a monitor, and its exit codes.")
@click.option(
    "--ack",
    is_flag=True,
    help="Note that you have seen what was lost and cannot be undone: from now on only `log` shows it.",
)
@click.option(
    "--critical-after",
    type=click.FloatRange(min=0),
    default=900.0,
    metavar="SECONDS",
    help="A sink that has failed for longer is CRITICAL, and so is what waits longer for a pass that works.",
)
@file_options
@functools.partial(output_options, also=["prometheus"], about=", prometheus for a textfile collector")
def status(
    paths: Paths,
    loop_id: str | None,
    check: bool,
    ack: bool,
    critical_after: float,
    output: Output,
) -> None:
    """Say whether all is well, what is stuck, why, and what to do.

    It reads only files: it sends nothing and, without --ack, changes nothing. LAST 24 HOURS has a bar for
    each hour, as high as its attempts are many: green if all of them succeeded, red if none did.
    """
    if not critical_after >= 0:  # the option's range lets NaN through
        raise click.BadParameter(f"{critical_after:g} is no time", param_hint="--critical-after")
    statuses: list[JsonObject] = []
    jobs, errors = make_jobs(paths, loop_id)
    for job in map(where_it_worked, jobs):
        try:
            acknowledged = acknowledge_losses(job) if ack else []
            found = loop_status(job, critical_after)
            statuses.append({**found, "notes": [*acknowledged, *found["notes"]]})
        except DispatchError as error:  # the other loops are shown all the same
            errors[job.loop_id] = error
    if check:
        worst, said = line_for_a_monitor(statuses, errors)
        click.echo(said)
        raise click.exceptions.Exit(PLUGIN_CODES[worst])
    if loop_id and errors:
        raise errors[loop_id]
    complain_of_loops(errors)
    if output.form == "prometheus":
        click.echo(prometheus_text(statuses, errors))
    elif output.is_json:
        output.print_json(statuses[0] if loop_id else {"loops": statuses})
    elif statuses:
        statuses.sort(key=lambda known: HEALTH_ORDER.index(known["health"]), reverse=True)
        click.echo("\n\n".join(map(status_text, statuses)))
    elif not errors:
        click.echo(no_loops(absolute(paths.repo)))
    # The metrics say which loops could not be read. If the command failed, a collector might drop them all.
    if errors and output.form != "prometheus":
        raise click.exceptions.Exit(max(error.exit_code for error in errors.values()))


def line_for_a_monitor(
    statuses: Sequence[JsonObject], errors: Mapping[str, DispatchError]
) -> tuple[Health, str]:
    """The worst health of the loops, and one line that names the loops that have it and says why."""
    findings = [Finding(known["health"], f"{known['loopId']}: {known['verdict']}") for known in statuses]
    findings += [Finding("unknown", f"{name}: {error}".replace("\n", ";")) for name, error in errors.items()]
    worst = worst_health(findings)
    words = [finding.words for finding in findings if finding.health == worst]
    said = "; ".join(words) or "no loop has escalations or a state"
    return worst, printable(f"ALERT DISPATCH {worst.upper()}: {said}")


def acknowledge_losses(job: Job) -> list[str]:
    """Note that an operator has seen the losses of a loop. Returns what they are, in words. Raises StateError
    or StorageError."""
    if not os.path.exists(job.queue_file):
        return []
    now = time.time()
    with Queue.open(job.queue_file) as queue, queue.transaction():
        if is_elsewhere(job):
            check_owner(queue, job)
        found = queue.find_loop(job.loop_id)
        if found is None:
            return []
        losses = queue.losses(found[0], now)
        queue.acknowledge(found[0], now)
    return [f"acknowledged: {loss_words(*loss)}" for loss in losses]


# ---------------------------------------------------------------------------------------------------------
# What happened: log, show
# ---------------------------------------------------------------------------------------------------------
# Reads the queue. Reads the telemetry for what the queue has deleted, and for what it never has: losses, and
# lines that are not escalations. Never writes.

# The state of a delivery, the worst first. `failed`: it waits, and its last attempt or its sink failed.
DeliveryWord = Literal["dead", "failed", "waiting", "skipped", "delivered"]
DELIVERY_WORDS: tuple[DeliveryWord, ...] = get_args(DeliveryWord)
DELIVERY_COLOURS = {
    "dead": "red",
    "failed": "red",
    "waiting": "yellow",
    "skipped": "yellow",
    "delivered": "green",
}
# By the value of --status: what it lists.
ASKED_WORDS: dict[str, set[DeliveryWord]] = {
    "waiting": {"waiting", "failed"},
    "delivered": {"delivered"},
    "dead": {"dead"},
    "skipped": {"skipped"},
    "failed": {"failed", "dead"},
}
# By the status of a sink in a telemetry row.
ROW_WORDS: dict[object, DeliveryWord] = {
    "success": "delivered",
    "failed": "failed",
    "skipped": "skipped",
    "waiting": "waiting",
}


class Filter(NamedTuple):
    """Which escalations `log` lists. `since`: seconds since the epoch."""

    sink: str | None
    status: str | None = None
    category: str | None = None
    since: float = 0.0

    def matches(self, entry: JsonObject) -> bool:
        """Tell whether an entry passes."""
        words = {sink["status"] for sink in entry["sinks"] if self.sink in (None, sink["id"])}
        if not entry["sinks"] and self.sink is None and self.status != "waiting":
            words = {entry["status"]}
        return (
            bool(words & ASKED_WORDS[self.status] if self.status else words)
            and self.category in (None, entry["category"])
            and (parse_time(entry["ingestedAt"]) or 0.0) >= self.since
        )


def delivery_word(found: QueuedDelivery, failing: Collection[str]) -> DeliveryWord:
    """The state of a delivery. `failing`: the sinks that fail."""
    if found.status == "waiting" and (found.reason_code or found.sink in failing):
        return "failed"
    return cast("DeliveryWord", found.status)


def log_entry(found: JsonObject, sinks: Sequence[JsonObject], otherwise: DeliveryWord) -> JsonObject:
    """An entry of the log. Its status is the worst of its sinks', `otherwise` if it has no sinks."""
    words = [sink["status"] for sink in sinks]
    status = min(words, key=DELIVERY_WORDS.index, default=otherwise)
    return {**found, "status": status, "sinks": list(sinks)}


def entry_of_queue(
    loop_id: str, stored: QueuedEscalation, deliveries: Sequence[QueuedDelivery], failing: Collection[str]
) -> JsonObject:
    """The log entry of an escalation in the queue."""
    leads = [found for found in deliveries if found.lead]
    worst = max((found.severity for found in leads), default=None)
    head = {
        "escalationId": stored.escalation_id,
        "loopId": loop_id,
        "line": stored.line,
        "timestamp": stored.written_at,
        "ingestedAt": iso(stored.ingested_at),
        "severity": stored.severity if worst is None else SEVERITIES[worst],
        "category": stored.category,
    }
    sinks = [
        {
            "id": found.sink,
            "status": delivery_word(found, failing),
            "httpStatus": found.http_status,
            "reasonCode": found.reason_code,
            "message": found.message,
        }
        for found in leads
    ]
    return log_entry(head, sinks, "skipped")


def entry_of_row(row: JsonObject, later: Mapping[str, JsonObject]) -> JsonObject:
    """The log entry of a telemetry row. `later`: what later rows say about its sinks, by their id."""
    listed = row["sinks"]
    if row.get("sinkId"):  # the row is about all that waited for this sink
        listed = [{"id": row["sinkId"], "status": row.get("status"), "reasonCode": row.get("reasonCode")}]
    listed = list({**{str(entry.get("id")): entry for entry in listed}, **later}.values())
    head = {
        "escalationId": as_text(row.get("escalationId")),
        "loopId": as_text(row.get("loopId")),
        "line": mapping(row.get("position")).get("line"),
        "timestamp": as_text(row.get("escalationTimestamp")) or as_text(row.get("timestamp")),
        "ingestedAt": as_text(row.get("timestamp")),
        "severity": as_text(row.get("eventSeverity")),
        "category": as_text(row.get("escalationCategory")),
        "reasonCode": as_text(row.get("reasonCode")),
        "message": as_text(row.get("message")),
    }
    sinks = [
        {
            "id": as_text(entry.get("id")),
            "status": "dead" if entry.get("deadLetter") else ROW_WORDS.get(entry.get("status"), "failed"),
            **{key: entry.get(key) for key in ("httpStatus", "reasonCode", "message")},
        }
        for entry in listed
    ]
    return log_entry(head, sinks, "skipped" if row.get("status") == "skipped" else "failed")


def with_reason(entry: JsonObject, row: JsonObject) -> JsonObject:
    """An entry without sinks gets the reason for that from its row. The queue does not have it."""
    return entry if entry["sinks"] else {**entry, "reasonCode": as_text(row.get("reasonCode"))}


def with_reasons(job: Job, entries: Sequence[JsonObject]) -> list[JsonObject]:
    """Log entries, those of this loop without sinks with the reasons for that. Raises StorageError."""
    unexplained = {
        entry["escalationId"]: entry["ingestedAt"]
        for entry in entries
        if entry["loopId"] == job.loop_id and not entry["sinks"] and "reasonCode" not in entry
    }
    oldest = min(unexplained.values(), default="")
    rows: dict[str, JsonObject] = {}
    for row in rows_backwards(job.telemetry_file) if unexplained else ():
        if len(rows) == len(unexplained) or str(row.get("timestamp")) < oldest:
            break
        if row.get("escalationId") in unexplained and not row.get("late"):
            rows.setdefault(row["escalationId"], row)
    return [
        with_reason(entry, rows[entry["escalationId"]]) if entry["escalationId"] in rows else entry
        for entry in entries
    ]


def entries_of_queue(job: Job, loop_id: str | None, wanted: Filter) -> Iterator[JsonObject]:
    """The log entries of the escalations in the queue, of one loop or all, the last one first. The queue is
    open only for a moment at a time, as no pass can write meanwhile. Raises StateError or StorageError."""
    before = sys.maxsize
    while True:
        with open_to_read(job) as queue:
            failing = queue.failing_sinks() if queue else set()
            items = queue.latest(loop_id, wanted.category, wanted.since, before) if queue else []
        if not items:
            return
        before = items[-1][1].id
        for item in items:
            yield entry_of_queue(*item, failing)


def read_log(jobs: Sequence[Job], loop_id: str | None, wanted: Filter, count: int) -> list[JsonObject]:
    """The last `count` entries that match, in the order of ingestion. Raises StateError or StorageError."""
    if not jobs:
        return []
    with open_to_read(jobs[0]) as queue:
        kept = queue.kept_ids() if queue else set()
    listed = entries_of_queue(jobs[0], loop_id, wanted)
    entries = list(itertools.islice(filter(wanted.matches, listed), count))
    # The telemetry is read only as far back as an entry can be among the last `count`.
    oldest = by_time(entries[-1]["ingestedAt"]) if len(entries) == count else wanted.since
    # Oldest first: sorting then keeps the order within a second.
    entries.reverse()
    for job in jobs:
        entries = with_reasons(job, entries)
        entries += [*itertools.islice(filter(wanted.matches, read_old(job, kept, oldest)), count)][::-1]
    return sorted(entries, key=lambda entry: entry["ingestedAt"] or "")[-count:]


def read_old(job: Job, kept: Collection[str], oldest: float) -> Iterator[JsonObject]:
    """The entries of a loop that only its telemetry has, newest first, back to a time. `kept`: the ids that
    the queue has. Raises StorageError."""
    for row, later in rows_with_later(job):
        if (parse_time(row.get("timestamp")) or oldest) < oldest:
            return
        if str(row.get("escalationId")) not in kept and row.get("status") != "failed_command":
            yield entry_of_row(row, later)


def rows_with_later(job: Job, containing: bytes = b"") -> Iterator[tuple[JsonObject, dict[str, JsonObject]]]:
    """The telemetry rows of a loop that contain these bytes, newest first. Each row comes with what late rows
    say about its sinks, by sink id; late rows are left out. Raises StorageError."""
    later: dict[str, dict[str, JsonObject]] = {}
    for row in rows_backwards(job.telemetry_file, containing):
        if row.get("loopId") != job.loop_id:
            continue
        identity = str(row.get("escalationId"))
        if row.get("late"):
            for entry in row["sinks"]:
                later.setdefault(identity, {}).setdefault(str(entry.get("id")), entry)
        else:
            yield row, later.pop(identity, {})


def log_text(entries: Sequence[JsonObject], now: float) -> str:
    """Entries of the log for people. If there are several loops, they are named."""
    if not entries:
        return "Nothing on record matches."
    several = len({entry["loopId"] for entry in entries}) > 1
    rows = []
    for entry in entries:
        sinks = sorted(entry["sinks"], key=lambda sink: DELIVERY_WORDS.index(sink["status"]))
        words = ((sink["status"], sink["reasonCode"], str(sink["id"])) for sink in sinks)
        why = entry.get("message") or entry.get("reasonCode") or "no sink"
        row = (
            how_long(entry["timestamp"] or entry["ingestedAt"], now),
            *([entry["loopId"]] if several else []),
            entry["severity"],
            entry["category"] or entry.get("reasonCode"),
            short_id(entry["escalationId"]),
            sinks_words(words, named=False) or f"{entry['status']} ({why})",
        )
        rows.append(row)
    headings = ("TIME", *(["LOOP"] if several else []), "SEVERITY", "CATEGORY", "ID", "SINKS")
    return table(headings, rows, ("SEVERITY",))


def read_since(_: click.Context, param: click.Parameter, value: str | None) -> float:
    """The callback of --since: `90s`, `2h` or `3d` ago, in seconds since the epoch. Raises BadParameter."""
    if value is None:
        return 0.0
    found = re.fullmatch(r"(\d{1,9})([smhd])", value.strip())
    if found is None:
        raise click.BadParameter(f"{printable(value)!r} is no time: write 30m, 2h or 3d", param=param)
    return time.time() - int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@cli.command(
    epilog=examples(
        "log --since 2h",
        "log --loop night-build --status dead",
        "log --sink slack-default --status failed -n 50",
    )
)
@repo_option
@loop_option(show_default="all loops")
@sink_option(help="Only deliveries to this sink.")
@click.option(
    "--status",
    "word",
    type=click.Choice(list(ASKED_WORDS)),
    help="Only with a delivery that is this; failed: dead, or waiting after a failure.",
)
@click.option("--category", metavar="NAME", help="Only of this category.")
@click.option(
    "--since",
    metavar="TIME",
    callback=read_since,
    help="Only what was ingested since then: 30m, 2h or 3d ago.",
)
@click.option("-n", "count", type=Positive(), default=20, metavar="N", help="List at most N.")
@file_options
@output_options
def log(
    paths: Paths,
    loop_id: str | None,
    sink_id: str | None,
    word: str | None,
    category: str | None,
    since: float,
    count: int,
    output: Output,
) -> None:
    """List what happened lately, the newest last.

    One line for each escalation, and how its deliveries stand; also lines that are no escalation, and losses.
    """
    found, errors = make_jobs(paths, loop_id)
    complain_of_loops(errors)
    jobs = [where_it_worked(job) for job in found]
    entries = read_log(jobs, loop_id, Filter(sink_id, word, category, since), count)
    if loop_id and not entries:
        check_loop(jobs[0])
    if sink_id and not entries and not read_log(jobs, loop_id, Filter(sink_id), 1):
        with contextlib.suppress(ConfigError):  # no config can say whether the sink exists
            path = config_path(paths.repo, paths.config_file)
            check_sink(load_config(path, {}, check_env=False), sink_id)
    document = {"schemaVersion": SCHEMA_VERSION, "escalations": entries}
    output.show(document, lambda: log_text(entries, time.time()))
    if errors:
        raise click.exceptions.Exit(max(error.exit_code for error in errors.values()))


def check_loop(job: Job) -> None:
    """Raises BadParameter if a loop that was named has no files."""
    if missing := no_such_loop(job):
        raise click.BadParameter(f"loop {job.loop_id}: {missing}", param_hint="--loop")


class OnRecord(NamedTuple):
    """What is on record about an escalation. `stored` and `deliveries`: what the queue has. `row`: its first
    telemetry row, {} if there is none."""

    entry: JsonObject
    stored: QueuedEscalation | None
    deliveries: list[QueuedDelivery]
    row: JsonObject


def find_one(jobs: Sequence[Job], loop_id: str | None, prefix: str) -> OnRecord:
    """The escalation whose id begins with `prefix`.

    Raises BadParameter if there is none, or more than one; StateError or StorageError.
    """
    found = find_in_queue(jobs[0], loop_id, prefix) if jobs else {}
    for job in jobs:
        for row, later in rows_with_later(job, prefix.encode("utf-8", "replace")):
            identity = str(row.get("escalationId"))
            if not identity.startswith(prefix):
                continue
            known = found.get(identity)
            if known is None:
                found[identity] = OnRecord(entry_of_row(row, later), None, [], row)
            elif not known.row:
                found[identity] = known._replace(entry=with_reason(known.entry, row), row=row)
    if not found:
        if loop_id:
            check_loop(jobs[0])
        where = f"loop {loop_id}" if loop_id else "this repo"
        unknown = f"no escalation of {where} has an id that begins with {printable(prefix)!r}"
        raise click.BadParameter(f"{unknown}; `{PROGRAM} log` lists those of late", param_hint="ID")
    if len(found) > 1:
        raise ambiguous(prefix, found, "ID")
    return next(iter(found.values()))


def find_in_queue(job: Job, loop_id: str | None, prefix: str) -> dict[str, OnRecord]:
    """The last escalations in the queue whose ids begin with `prefix`, by id. Raises StateError or
    StorageError."""
    found: dict[str, OnRecord] = {}
    with open_to_read(job) as queue:
        if queue:
            failing = queue.failing_sinks()
            items = queue.with_id_prefix(loop_id, prefix)
            for loop, stored, deliveries in itertools.islice(items, LISTED):
                entry = entry_of_queue(loop, stored, deliveries, failing)
                found.setdefault(stored.escalation_id, OnRecord(entry, stored, deliveries, {}))
    return found


def ambiguous(prefix: str, found: Iterable[str], hint: str) -> click.BadParameter:
    """The error that several ids begin with `prefix`. `hint`: the argument or option that gave it."""
    listed = ", ".join(sorted(found)[:LISTED])
    said = f"{printable(prefix)!r} is ambiguous, give more of one of: {listed}"
    return click.BadParameter(said, param_hint=hint)


def read_rows_of(path: str, loop_id: str, escalation: str) -> list[JsonObject]:
    """The rows of an escalation in a file of rows, the first one first. Raises StorageError."""
    rows = rows_backwards(path, escalation.encode("utf-8", "replace"))
    found = [row for row in rows if row.get("escalationId") == escalation and row.get("loopId") == loop_id]
    return found[::-1]


DELIVERY_STATE_FIELDS = ("status", "httpStatus", "reasonCode", "faultCode", "message")
ATTEMPT_FIELDS = (
    *("timestamp", "attempt", "outcome", "httpStatus", "reasonCode", "faultCode", "message", "durationMs"),
)


def describe_escalation(job: Job, known: OnRecord) -> JsonObject:
    """An escalation as `show` prints it for scripts: its record, its route and why, its deliveries."""
    entry, stored, _, row = known
    attempts = read_rows_of(job.attempts_file, job.loop_id, entry["escalationId"])
    route = row.get("route")
    if route is None and stored is not None:
        with contextlib.suppress(ConfigError):  # without a config the route is not known
            config = load_config(job.config_file, {}, check_env=False)
            route = Router(config).resolve(stored.category, stored.severity).route
    return {
        "schemaVersion": SCHEMA_VERSION,
        **{key: value for key, value in entry.items() if key != "sinks"},
        "route": route,
        "why": why_routed(mapping(route), entry),
        "deliveries": [
            {
                "sinkId": sink_id,
                **({"peer": peer} if peer else {}),
                **{key: state.get(key) for key in DELIVERY_STATE_FIELDS},
                "attempts": [
                    {key: attempt[key] for key in ATTEMPT_FIELDS if attempt.get(key) is not None}
                    for attempt in attempts
                    if attempt.get("sinkId") == sink_id and attempt.get("peer", "") == peer
                ],
            }
            for (sink_id, peer), state in delivery_states(known).items()
        ],
        **({"record": decode_json(stored.record.decode("utf-8", "replace"))} if stored else {}),
        **({"record": row["escalation"]} if not stored and "escalation" in row else {}),
        **({"rawLine": row["rawLine"]} if "rawLine" in row else {}),
    }


def delivery_states(known: OnRecord) -> dict[tuple[str, str], JsonObject]:
    """The state of each delivery of an escalation, by sink and peer. Only the queue has those of peers."""
    by_sink = {sink["id"]: sink for sink in known.entry["sinks"]}
    if not known.deliveries:
        return {(sink_id, ""): sink for sink_id, sink in by_sink.items()}
    return {
        (found.sink, found.peer): {
            "status": by_sink[found.sink]["status"] if found.lead else delivery_word(found, ()),
            **why_json(found),
        }
        for found in sorted(known.deliveries, key=lambda found: (found.sink, found.peer))
    }


def why_routed(route: JsonObject, entry: JsonObject) -> str:
    """Why an escalation went where it went."""
    code = entry.get("reasonCode")
    if not route:
        return CODES[code].meaning if code in CODES else "its route is not known: the config cannot be read"
    name = route.get("pattern") or route.get("category")
    why = f"the route {name}" if route.get("matched") else "no route for its category, so the default sinks"
    why += f", from {route.get('minSeverity')} on, to {', '.join(route.get('sinks') or ['no sink'])}"
    return f"{why}. {CODES[code].meaning}" if not entry["sinks"] and code in CODES else why


def escalation_text(found: JsonObject, now: float) -> str:
    """An escalation and all its attempts, for people."""
    head = f"{found['category'] or found.get('reasonCode')}, severity {found['severity'] or 'not known'}"
    ago = how_long(found["timestamp"] or found["ingestedAt"], now)
    lines = [
        f"{click.style(printable(head), bold=True)}: loop {found['loopId']}, line {found['line']}, {ago}",
        f"Id: {found['escalationId']}",
        printable(f"Route: {found['why']}"),
    ]
    for item in found["deliveries"]:
        name = f"{item['sinkId']} ({item['peer']})" if "peer" in item else item["sinkId"]
        word = click.style(item["status"], fg=DELIVERY_COLOURS[item["status"]])
        why = f": {cut(why_it_failed(item), SHOWN_CHARACTERS)}" if item["reasonCode"] else ""
        lines.append(f"{printable(name)}  {word}{printable(why)}")
        lines += [printable(f"  {attempt_text(attempt, now)}") for attempt in item["attempts"]]
    if "record" in found:
        text = json.dumps(strict_value(found["record"]), indent=2, ensure_ascii=False)
        lines += ["Record:", *(f"  {printable(line)}" for line in text.splitlines())]
    if "rawLine" in found:
        lines += ["Line:", printable(f"  {found['rawLine']}")]
    return "\n".join(lines)


def attempt_text(attempt: JsonObject, now: float) -> str:
    said = why_it_failed(attempt) if attempt.get("reasonCode") else attempt.get("httpStatus", "")
    when = how_long(as_text(attempt.get("timestamp")), now)
    took = f", {attempt.get('durationMs', 0)} ms" if attempt.get("attempt") else ""
    fault = f", fault code {attempt['faultCode']}" if "faultCode" in attempt else ""
    return f"{when}: {attempt.get('outcome')} {cut(str(said), SHOWN_CHARACTERS)}{took}{fault}"


@cli.command(epilog=examples("show esc_4f2a", "show esc_4f2a --loop night-build --pretty"))
@click.argument("escalation", metavar="ID")
@repo_option
@loop_option(show_default="all loops")
@file_options
@output_options
def show(
    escalation: str,
    paths: Paths,
    loop_id: str | None,
    output: Output,
) -> None:
    """Show one escalation with all its attempts.

    Its record, its route and why, and each delivery. ID is its id, or as much of it as tells it from others.
    """
    jobs, errors = make_jobs(paths, loop_id)
    complain_of_loops(errors)
    by_loop = {job.loop_id: where_it_worked(job) for job in jobs}
    if not escalation.strip():
        raise click.BadParameter("is empty", param_hint="ID")
    found = find_one(list(by_loop.values()), loop_id, escalation.strip())
    owner = found.entry["loopId"]
    job = by_loop.get(owner) or make_job(paths, owner)
    document = describe_escalation(job, found)
    output.show(document, lambda: escalation_text(document, time.time()))


# ---------------------------------------------------------------------------------------------------------
# What an operator does: test, redeliver, skip, init
# ---------------------------------------------------------------------------------------------------------
# `redeliver` and `skip` change deliveries in the queue and write rows, as a pass does. They hold the loop's
# lock while they search and while they act, but not while they ask.

SKIPPED = Verdict("skipped", "skipped_by_operator", message="skipped by an operator")
# How long an operator's command waits for a pass to end, in seconds.
OPERATOR_WAIT = 10.0


def check_credentials(sinks: Sequence[Sink]) -> None:
    """Raises ConfigError if a secret of these sinks, enabled or not, is unset or unusable."""
    document = {"sinks": {sink.id: {**sink.settings, "enabled": True} for sink in sinks}}
    environ, unreadable = read_secret_files(document, os.environ)
    faults = [
        f"{json_path(['sinks', sink.id])}: {name} is unset or empty; set it here (export {name}=…)"
        for sink in sinks
        for name in ADAPTERS[sink.type].missing_secrets(sink)
        if name not in unreadable
    ]
    if faults := faults or check_secrets(document, environ, unreadable):
        raise ConfigError("nothing was sent: a secret is missing or cannot be used", faults)


def attempt_once(
    sink: Sink, delivery: Delivery, origin: Origin, redactor: Redactor
) -> dict[str, tuple[Verdict, float]]:
    """Send a delivery outside of any pass, to all peers at once, in no more than `attempt_seconds`.

    Returns what came of it for each peer, and the seconds that it took. A sink without peers has one without
    a name.
    """
    adapter = ADAPTERS[sink.type]
    peers = adapter.peers(sink)
    request = build_request(adapter, sink, [delivery], origin)
    if isinstance(request, Verdict):
        return dict.fromkeys(peers, (request, 0.0))
    found: dict[str, tuple[Verdict, float]] = {}

    def send_to(peer: str, url: str) -> None:
        began = time.monotonic()
        client = Client(url, sink.timeout_seconds, sink.secrets.get(CA_FILE_KEY))
        found[peer] = send_and_judge(adapter, sink, client, request, redactor), time.monotonic() - began

    workers = [threading.Thread(target=send_to, args=pair, daemon=True) for pair in peers.items()]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, began + attempt_seconds(sink.timeout_seconds) - time.monotonic()))
    in_time = dict(found)
    seconds = time.monotonic() - began
    return {peer: in_time.get(peer) or (timed_out(sink, peer or sink.id), seconds) for peer in peers}


def outcome_json(verdict: Verdict, seconds: float, sink: Sink, test: str) -> JsonObject:
    """What came of a test alert, for scripts. `test`: the command that sends the sink another one."""
    delivered = verdict.outcome == "delivered"
    result: JsonObject = {
        "status": "success" if delivered else "failed",
        **why_json(verdict),
        "durationMs": round(seconds * 1000),
    }
    if verdict.clock_offset is not None and clock_words(verdict.clock_offset):
        result["clockOffsetSeconds"] = round(verdict.clock_offset)
    if not delivered:
        # A test alert cannot be redelivered. If the sink refuses it, the config does not suit the sink.
        fault = "rejected" if verdict.fault == "record_refused" else verdict.fault
        result["advice"] = advise(fault, sink, {"test": test})
    return result


def outcome_text(what: str, result: JsonObject) -> str:
    """What came of a test alert or a delivery, for people, and what to do if it failed."""
    duration = f", {result['durationMs']} ms" if "durationMs" in result else ""
    lines = []
    if result["status"] == "success":
        said = click.style(f"delivered ({result['httpStatus']})", fg="green")
        said += f" {result['message']}" if result["message"] else ""
        lines.append(f"{printable(what)}: {said}{duration}")
    elif result["status"] == "waiting":
        lines.append(printable(f"{what}: waits for its turn"))
    else:
        why = click.style(printable(why_it_failed(result)), fg="red")
        later = "; it waits, and is tried again" if result.get("willRetry") else ""
        lines += [f"{printable(what)}: {why}{duration}{later}", f"  what to do: {result['advice']}"]
    if wrong := clock_words(result.get("clockOffsetSeconds")):
        lines.append(f"  its clock is {wrong} this machine's: set the one that is wrong")
    return "\n".join(lines)


def make_test_alert(severity: str, trace_id: str) -> Escalation:
    """An escalation that says that it is a test."""
    body = {
        "timestamp": iso(time.time()),
        "loopId": PROGRAM,
        "traceId": trace_id,
        "category": "test_alert",
        "severity": severity,
        "transport": "local",
        "message": "This is a test alert. Nothing is wrong, and there is nothing to do.",
    }
    line = encode_json(body)
    return cast("Escalation", parse_line(line, len(line), PROGRAM)[0])


@cli.command("test", epilog=examples("test", "test --sink slack-default --severity critical"))
@repo_option
@config_option()
@click.option(
    "--sink",
    "sink_ids",
    multiple=True,
    metavar="ID",
    shell_complete=complete_sink,
    help="Only this sink, enabled or not. Repeatable.",
)
@click.option("--severity", default="info", metavar="LEVEL", help="The severity of the test alert.")
@output_options
def send_test(
    repo: str,
    config_file: str | None,
    sink_ids: tuple[str, ...],
    severity: str,
    output: Output,
) -> None:
    """Send a marked test alert to each enabled sink.

    Says for each what came of it, how long it took and, if it failed, what to do. Goes through the real
    adapters with the real credentials, and leaves no trace in any file.
    """
    level = read_severity(severity)
    repo = absolute(repo)
    config_file = config_path(repo, config_file)
    loaded = load_config(config_file, os.environ, check_env=not sink_ids)
    for sink_id in sink_ids:
        check_sink(loaded, sink_id)
    chosen = [sink for sink in loaded.sinks.values() if (sink.id in sink_ids if sink_ids else sink.enabled)]
    check_credentials(chosen)
    if not chosen:
        tried = test_command(repo, config_file, next(iter(loaded.sinks)))
        raise ConfigError(
            f"no sink is enabled in {config_file}",
            [f'set "enabled": true on a sink, or test one that is disabled: `{tried}`'],
        )
    results = []
    for result in send_test_alerts(loaded, chosen, repo, level):
        results.append(result)
        if not output.is_json:
            name = f"{result['id']} ({result['peer']})" if "peer" in result else result["id"]
            click.echo(outcome_text(name, result))
    hints = quoted_secrets(chosen)
    if output.is_json:
        warnings = {"warnings": hints} if hints else {}
        output.print_json({"schemaVersion": SCHEMA_VERSION, "sinks": results, **warnings})
    else:
        click.echo("".join(f"warning: {printable(hint)}\n" for hint in hints), nl=False)
    if any(result["status"] == "failed" for result in results):
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def send_test_alerts(config: Config, sinks: Iterable[Sink], repo: str, severity: str) -> Iterator[JsonObject]:
    """Send a test alert to one sink after the other. Yields what came of it for each peer."""
    trace_id = new_trace_id()
    alert = make_test_alert(severity, trace_id)
    delivery = Delivery(alert, Router(config).resolve(alert.category, alert.severity))
    for sink in sinks:
        verdicts = attempt_once(sink, delivery, Origin(repo, trace_id, time.time()), config.redactor)
        again = test_command(repo, config.path, sink.id)
        for peer, (verdict, seconds) in verdicts.items():
            named = {"peer": peer} if len(verdicts) > 1 else {}
            yield {"id": sink.id, "type": sink.type, **named, **outcome_json(verdict, seconds, sink, again)}


class Selection(NamedTuple):
    """What an operator names: all dead letters, what waits for a sink up to a line, one escalation, or the
    lines from one to another; of one sink or of all. A line is `sys.maxsize` if there is no limit."""

    dead_letters: bool = False
    waiting_to: int | None = None
    escalation: str | None = None
    lines: tuple[int, int] | None = None
    sink_id: str | None = None


def selectable_json(item: Selectable, config: Config) -> JsonObject:
    """A delivery that an operator named, in JSON."""
    return {
        "escalationId": item.escalation_id,
        "escalationCategory": item.category,
        "escalationTimestamp": item.written_at,
        "sinkId": item.sink,
        "sinkType": config.sinks[item.sink].type,
        "deadLetter": item.status == "dead",
    }


@contextlib.contextmanager
def operator_lock(job: Job) -> Iterator[None]:
    """Hold the lock of a loop. Raises StateError if there is no such loop, if its queue is another one, or if
    a pass keeps the lock."""
    if missing := no_such_loop(job):
        raise StateError(f"loop {job.loop_id}: {missing}")
    with loop_lock(job.lock_file, OPERATOR_WAIT) as held:
        if not held:
            raise LoopHeldError(job.loop_id)
        if fault := wrong_queue(job, read_summary(job)):
            raise fault
        yield


def find_selected(job: Job, config: Config, selection: Selection) -> list[Selectable]:
    """Find the deliveries that an operator names. Changes nothing.

    Raises BadParameter if there is no such sink, escalation or line; StateError if there is no such loop, if
    a pass holds it, or if this needs an earlier pass and there was none; StorageError.
    """
    check_sink(config, selection.sink_id)
    with operator_lock(job):
        known: list[Selectable] = []
        cursor = None
        with open_to_read(job) as queue:
            if queue and (found := queue.find_loop(job.loop_id)):
                loop, cursor, _ = found
                known = find_selectable(queue, loop, cursor, selection)
        in_queue = cursor is not None
        # The queue is closed: passes over other loops go on while the source is read.
        cursor = cursor or read_past(job).cursor
        if selection.waiting_to is not None:
            try:
                with contextlib.closing(Source(job.escalations_file, cursor).find()) as source:
                    known += [
                        selectable_of(stored)
                        for chunk in source.chunks()
                        for line in chunk.lines
                        for stored in escalations_of(job, chunk.cursor.segment, line)
                    ]
                    cursor = source.cursor
            except StorageError:
                if not in_queue:
                    raise
        elif not (in_queue or cursor.number or cursor.line):
            first = f"run `{command_line('dispatch', job)}` first"
            raise StateError(f"no pass has run for loop {job.loop_id} yet", [first])
        elif selection.lines is not None:
            with contextlib.closing(Source(job.escalations_file, cursor).find()) as source:
                check_lines(job, source, selection.lines[0])
                known += [*map(selectable_of, read_unknown(job, source, selection.lines, known))]
    if selection.escalation is not None and not known:
        explain_unknown(job, selection.escalation)
    return select(known, cursor, Router(config), selection)


def find_selectable(queue: Queue, loop: int, cursor: Cursor, selection: Selection) -> list[Selectable]:
    """The deliveries in the queue that an operator names."""
    if selection.dead_letters:
        return queue.dead_letters(loop)
    if selection.waiting_to is not None:
        return queue.waiting_for(loop, selection.sink_id or "")
    if selection.lines is not None:
        return queue.on_lines(loop, cursor.segment, *selection.lines)
    return queue.with_id(loop, selection.escalation or "")


def read_unknown(
    job: Job, source: Source, lines: tuple[int, int], known: Iterable[Selectable]
) -> Iterator[QueuedEscalation]:
    """The escalations of lines that were read, but are not in the queue: they are older than the queue, or it
    keeps them no longer. Raises StorageError."""
    there = {(named.offset, named.escalation_id) for named in known}
    for line in source.read_again(*lines):
        for stored in escalations_of(job, source.cursor.segment, line):
            if (stored.offset, stored.escalation_id) not in there:
                yield stored


def escalations_of(job: Job, segment: str, line: Line) -> Iterator[QueuedEscalation]:
    """The escalations of a line as the queue keeps them, with numbers still to be given."""
    for found in parse_line(line.text, line.size, job.loop_id):
        if not isinstance(found, Unusable):
            yield QueuedEscalation.of(0, 0, found, segment, line, time.time())._replace(reported=True)


def selectable_of(stored: QueuedEscalation) -> Selectable:
    """An escalation without deliveries, as the queue would give it."""
    return Selectable(
        *(stored.id, stored.escalation_id, stored.segment, stored.offset, stored.line),
        *(stored.category, stored.severity, stored.written_at),
    )


def select(
    known: Sequence[Selectable], cursor: Cursor, router: Router, selection: Selection
) -> list[Selectable]:
    """The deliveries of these escalations that an operator names. `cursor`: where all of them end."""
    if selection.waiting_to is not None:
        last = selection.waiting_to
        known = [named for named in known if named.line <= last or named.segment != cursor.segment]
    chosen: dict[object, Selectable] = {}
    for _, group in itertools.groupby(known, key=lambda named: (named.escalation, named.key[:3])):
        rows = list(group)
        status_of = {named.sink: named.status for named in rows if named.sink}
        for sink in select_sinks(rows[0], status_of, router, selection):
            found = rows[0]._replace(sink=sink, status=status_of.get(sink, ""))
            # Equal lines have one id. Whoever names it means one of them, a dead letter if there is one.
            key = found.key if selection.escalation is None else sink
            if found.status == "dead" or key not in chosen:
                chosen[key] = found
    return list(chosen.values())


def select_sinks(
    named: Selectable, status_of: Mapping[str, str], router: Router, selection: Selection
) -> list[str]:
    """The sinks of an escalation that an operator names. `status_of`: its deliveries, by sink."""
    skipping = selection.waiting_to is not None
    sink_ids = dict.fromkeys(status_of)
    # `redeliver` also sends to the sinks that the route names now. `skip` goes by the route if there are no
    # deliveries yet.
    if not selection.dead_letters and not (skipping and status_of):
        resolution = router.resolve(named.category, named.severity)
        # Nothing is ingested for a disabled sink, but `redeliver` sends to it if it is named.
        to_disabled = selection.sink_id is not None and not skipping
        routed = resolution.reached if to_disabled else resolution.dispatchable
        sink_ids |= dict.fromkeys(sink.id for sink in routed)
    return [
        sink_id
        for sink_id in sink_ids
        if sink_id in router.config.sinks
        and selection.sink_id in (None, sink_id)
        # What waits is not redelivered: the next pass sends it.
        and (skipping or status_of.get(sink_id) != "waiting")
    ]


def check_lines(job: Job, source: Source, first: int) -> None:
    """Raises BadParameter if the source has no line `first`."""
    count = source.count_lines()
    if count < first:
        said = f"{first} is beyond the end: {job.escalations_file} has {plural(count, 'line')}"
        raise click.BadParameter(said, param_hint="--from-line")


def whole_id(job: Job, prefix: str) -> str:
    """The id in the queue that begins with `prefix`; `prefix` itself if it is an id, or if there is none.
    Raises BadParameter if there are several."""
    with open_to_read(job) as queue:
        items = queue.with_id_prefix(job.loop_id, prefix) if queue else []
    found = {stored.escalation_id for _, stored, _ in items}
    if len(found) > 1 and prefix not in found:
        raise ambiguous(prefix, found, "--id")
    return found.pop() if len(found) == 1 else prefix


def explain_unknown(job: Job, escalation: str) -> NoReturn:
    """Say why an escalation that is not in the queue cannot be redelivered: its line is not an escalation, it
    was settled too long ago, or there is no record of it. Raises BadParameter."""
    found = read_rows_of(job.telemetry_file, job.loop_id, escalation)
    unusable = {str(row.get("reasonCode")) for row in found} & {*UNUSABLE_CODES, "blank_line"}
    if unusable:
        said = f"its line is no escalation ({unusable.pop()}): append a corrected one to the source"
    elif found:
        line = str(mapping(found[0].get("position")).get("line", "N"))
        again = command_line("redeliver", job, "--from-line", line, "--to-line", line)
        said = (
            f"{printable(escalation)} was settled more than {RETENTION_SECONDS / 86400:g} days ago, or "
            f"before {RETENTION_COUNT} others, and is in the queue no more; if its line is still in "
            f"{job.escalations_file}, `{again}` sends it"
        )
    else:
        listed = f"`{command_line('log', job)}` lists those of late"
        said = f"no escalation {printable(escalation)!r} is on record; {listed}"
    raise click.BadParameter(said, param_hint="--id")


@contextlib.contextmanager
def operator_pass(job: Job, config: Config, woken: Collection[str] = ()) -> Iterator[Loop]:
    """Begin a pass over one loop for a command that changes what waits, and hold the loop's lock meanwhile.

    `woken`: disabled sinks that may be sent to. Raises DispatchError.
    """
    with operator_lock(job), contextlib.closing(QueueHolder(job)) as queues:
        shared = Shared(queues.get(), config, Clock(job.time_budget), woken=woken)
        with contextlib.closing(Loop(shared, job)) as loop:
            loop.begin()
            yield loop


def still_selected(loop: Loop, selection: Selection, shown: Sequence[Selectable]) -> list[Selectable]:
    """The deliveries that an operator was shown, without those that a pass or a command has changed since, so
    that they are not selected any more."""
    keys = {item.key for item in shown}
    cursor = loop.source.cursor
    known = find_selectable(loop.queue, loop.id, cursor, selection)
    return [item for item in select(known, cursor, loop.shared.router, selection) if item.key in keys]


def redeliver_selected(
    job: Job, config: Config, selection: Selection, shown: Sequence[Selectable]
) -> list[JsonObject]:
    """Queue the deliveries again that an operator was shown, if they are still selected, and run a pass.
    Returns what came of each. Raises DispatchError."""
    woken = {item.sink for item in shown}
    with operator_pass(job, config, woken) as loop, loop.shared.clock.ends_on_signals():
        queue, shared = loop.queue, loop.shared
        with queue.transaction():
            add_unknown(loop, selection, {item.key[:3] for item in shown})
            chosen = still_selected(loop, selection, shown)
            for item in chosen:
                resolution = shared.router.resolve(item.category, item.severity)
                peers = shared.peers[item.sink]
                queue.requeue(item.escalation, item.sink, peers, loop.id, resolution.severity)
            expect_work(job, len(chosen))
        Pass(shared).run([loop])
        if loop.error is not None:
            raise loop.error
        return [{**selectable_json(item, config), **redelivery_outcome(loop, item)} for item in chosen]


def add_unknown(loop: Loop, selection: Selection, places: Collection[object]) -> None:
    """If lines are selected, add their escalations that are not in the queue. `places`: segment, offset and
    id of those that the operator was shown. Raises StorageError."""
    if selection.lines is None:
        return
    queue = loop.queue
    known = find_selectable(queue, loop.id, loop.source.cursor, selection)
    fresh = [
        stored
        for stored in read_unknown(loop.job, loop.source, selection.lines, known)
        if (stored.segment, stored.offset, stored.escalation_id) in places
    ]
    numbers = itertools.count(queue.next_id())
    queue.add_escalations([stored._replace(id=next(numbers), loop=loop.id) for stored in fresh])


def redelivery_outcome(loop: Loop, item: Selectable) -> JsonObject:
    """What came of a redelivery, in JSON."""
    job, shared = loop.job, loop.shared
    found = shared.queue.lead(item.escalation, item.sink)
    if found is None:
        return {"status": "waiting"}
    result = why_json(found)
    if found.status == "delivered":
        missed = [
            other.peer
            for other in shared.queue.deliveries_of(found.stored)
            if other.sink == found.sink and other.status != "delivered"
        ]
        if missed:
            result["message"] = f"but not to {', '.join(missed)}"
        return {"status": "success", **result}
    if found.status == "waiting" and found.reason_code is None:
        failing = shared.failing_destination(found.sink, found.peer)
        if failing is None:
            return {"status": "waiting", **result}
        result = why_json(failing)
    commands = {**commands_for(job), "test": test_command(job.repo, job.config_file, item.sink)}
    sink = shared.config.sinks[item.sink]
    result["advice"] = advise(result["faultCode"], sink, commands)
    return {"status": "failed", **result, "willRetry": found.status == "waiting" and sink.enabled}


def skip_deliveries(
    job: Job, config: Config, selection: Selection, shown: Sequence[Selectable]
) -> tuple[list[Selectable], str]:
    """Skip the deliveries that an operator was shown, and write that into the telemetry. Returns those
    that were still there, and the segment of the source's current file. Raises DispatchError."""
    with operator_pass(job, config) as loop:
        queue = loop.queue
        with contextlib.suppress(StorageError):  # what is in the queue can be skipped without the source
            while selection.waiting_to is not None and loop.ingest():
                queue.tidy()
        chosen = still_selected(loop, selection, shown)
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            with queue.transaction():
                for item in chosen[start : start + ROWS_AT_ONCE]:
                    skip_one(loop, item)
            loop.flush_rows()
        with queue.transaction():
            for sink_id in {item.sink for item in chosen}:
                queue.forget_failures(sink_id)
        loop.write_rows(at_end=True)
        save_summary(loop)
        return chosen, loop.source.cursor.segment


def skip_one(loop: Loop, item: Selectable) -> None:
    """Skip a delivery, if it is still there."""
    found = loop.queue.lead(item.escalation, item.sink)
    if found is not None:
        found = found._replace(by_operator=True)
        sink = loop.shared.config.sinks[item.sink]
        loop.write_attempt(attempt_row(loop.job, sink, found, None, SKIPPED, 0, 0.0))
        loop.end(found, SKIPPED, found.attempts)


# The fields of a summary that say what the last pass did, and not how things are now.
LAST_PASS = (
    *("updatedAt", "traceId", "status", *COUNT_KEYS, "failureReasonCodes", "message"),
    *("failedSince", "lateDispatchedCount", "lateFailedCount", "stoppedBy"),
)


def save_summary(loop: Loop) -> None:
    """Write the summary after an operator's command. Keeps what it says about the last pass, unless the
    command ingested something. Raises StateError or StorageError."""
    before = read_summary(loop.job) if not loop.counts.processed else {}
    kept = {key: before[key] for key in LAST_PASS if key in before}
    write_state(loop.job, {**loop.summary(), **kept}, durable=True)


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, deliveries: Sequence[Selectable], *, err: bool) -> None:
    """Show the deliveries that are about to be changed, and ask. Any answer but yes ends the command.

    `err`: use standard error, because standard output is for JSON.
    """
    rows = [
        (item.line, item.written_at, item.category, short_id(item.escalation_id), item.sink)
        for item in deliveries
    ]
    click.echo(long_table(("LINE", "TIME", "CATEGORY", "ID", "SINK"), rows, time.time()), err=err)
    try:
        # Even with `err`, older versions of click write the blank before the answer to standard output.
        with contextlib.redirect_stdout(sys.stderr) if err else contextlib.nullcontext():
            click.confirm(question, abort=True, err=err)
    except click.Abort:
        hint = "" if is_terminal(sys.stdin) else "; --yes goes ahead without asking"
        click.echo(f"nothing was done{hint}", err=True)
        raise


@cli.command(
    epilog=examples(
        "redeliver --loop night-build --dead-letters",
        "redeliver --loop night-build --id esc_4f2a…",
        "redeliver --loop night-build --from-line 120",
    )
)
@repo_option
@loop_option(required=True)
@click.option("--dead-letters", is_flag=True, help="All dead letters.")
@click.option(
    "--id",
    "escalation",
    metavar="ESCALATION_ID",
    multiple=True,
    callback=given_once,
    help="One escalation: its id, or the beginning.",
)
@click.option("--from-line", type=Positive(), metavar="N", help="From this line of escalations.jsonl …")
@click.option("--to-line", type=Positive(), metavar="M", help="… to this one, or to the end.")
@sink_option(help="To this sink only.")
@yes_option
@file_options
@output_options
def redeliver(
    paths: Paths,
    loop_id: str,
    dead_letters: bool,
    escalation: str | None,
    from_line: int | None,
    to_line: int | None,
    sink_id: str | None,
    yes: bool,
    output: Output,
) -> None:
    """Send again what was given up, skipped or delivered.

    Shows what it will send, asks, and runs a pass that sends it under the same ids. What fails is retried
    like anything else. A dead letter that is delivered is one no longer. What waits goes out by itself, and
    a disabled sink is left out unless --sink names it.
    """
    if (dead_letters + (escalation is not None) + (from_line is not None)) != 1:
        raise click.UsageError("say what: one of --dead-letters, --id, --from-line")
    if to_line is not None and from_line is None:
        raise click.UsageError("--to-line goes with --from-line")
    if to_line is not None and from_line is not None and to_line < from_line:
        raise click.UsageError(f"--to-line {to_line} is before --from-line {from_line}")
    job = make_job(paths, loop_id)
    selection = Selection(
        dead_letters=dead_letters,
        escalation=escalation and whole_id(job, escalation),
        lines=None if from_line is None else (from_line, to_line or sys.maxsize),
        sink_id=sink_id,
    )
    loaded = load_config(job.config_file, os.environ)
    found = find_selected(job, loaded, selection)
    shown = leave_out_disabled(found, loaded, sink_id)
    check_credentials([loaded.sinks[name] for name in {item.sink for item in shown}])
    results: list[JsonObject] = []
    if shown:
        if not yes:
            confirm(f"Send {plural(len(shown), 'delivery')}?", shown, err=output.is_json)
        results = redeliver_selected(job, loaded, selection, shown)
    summary = redelivery_summary(loop_id, results)
    if output.is_json:
        output.print_json(summary)
    elif results:
        click.echo(redelivery_text(summary))
    elif dead_letters and not found:
        click.echo(f"Nothing to redeliver: there is no dead letter{f' of {sink_id}' if sink_id else ''}.")
    else:
        waits = f"`{command_line('status', job)}` shows what waits"
        click.echo(f"Nothing to redeliver. What waits goes out by itself; {waits}.")
    if summary["failedCount"]:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def leave_out_disabled(
    deliveries: Sequence[Selectable], config: Config, sink_id: str | None
) -> list[Selectable]:
    """Leave out deliveries to disabled sinks other than the one that was named, and say so."""
    names = dict.fromkeys(item.sink for item in deliveries)
    disabled = [name for name in names if not config.sinks[name].enabled and name != sink_id]
    for name in disabled:
        click.echo(f"note: nothing is sent to {name}, which is disabled: --sink {name} does", err=True)
    return [item for item in deliveries if item.sink not in disabled]


def redelivery_summary(loop_id: str, results: Sequence[JsonObject]) -> JsonObject:
    """What came of redeliveries, in the words of a pass."""
    counts = Counter(result["status"] for result in results)
    status = "success"
    if not results:
        status = "nothing_to_do"
    elif counts["failed"]:
        status = "partial" if counts["success"] else "failed"
    return {
        "schemaVersion": SCHEMA_VERSION,
        "loopId": loop_id,
        "status": status,
        "deliveredCount": counts["success"],
        "failedCount": counts["failed"],
        "waitingCount": counts["waiting"],
        "deliveries": results,
    }


def redelivery_text(summary: JsonObject) -> str:
    """What came of redeliveries, for people; of many, one line for those that ended alike."""
    results = summary["deliveries"]
    if len(results) <= LISTED:
        lines = [outcome_text(f"{short_id(r['escalationId'])} to {r['sinkId']}", r) for r in results]
    else:
        alike = Counter(outcome_text(f"to {result['sinkId']}", result) for result in results)
        lines = [f"{count} {text}" for text, count in alike.most_common(LISTED)]
    end = f"{summary['deliveredCount']} delivered, {summary['failedCount']} failed"
    end += f", {summary['waitingCount']} waiting" if summary["waitingCount"] else ""
    return "\n".join([*lines, f"{end}."])


@cli.command(
    epilog=examples(
        "skip --loop night-build --sink slack-default",
        "skip --loop night-build --sink slack-default --to-line 9",
        "skip --loop night-build --dead-letters",
    )
)
@repo_option
@loop_option(required=True)
@sink_option(help="The sink that is meant.  [required without --dead-letters]")
@click.option("--to-line", type=Positive(), metavar="N", show_default="all", help="Up to this line.")
@click.option(
    "--dead-letters", is_flag=True, help="Dismiss dead letters, of --sink or of all, and not what waits."
)
@yes_option
@file_options
@output_options
def skip(
    paths: Paths,
    loop_id: str,
    sink_id: str | None,
    to_line: int | None,
    dead_letters: bool,
    yes: bool,
    output: Output,
) -> None:
    """Skip what waits for a sink, or dismiss its dead letters.

    Shows what it will pass over, and asks. Before a loop's first pass, that is all that is in its source.
    Each delivery is on record as skipped_by_operator; `redeliver` can send it after all.
    """
    if dead_letters and to_line is not None:
        raise click.UsageError("--to-line does not go with --dead-letters")
    if sink_id is None and not dead_letters:
        raise click.UsageError("say which: --sink ID, or --dead-letters")
    job = make_job(paths, loop_id)
    noun, verb, done = (
        ("dead letter", "Dismiss", "dismissed") if dead_letters else ("delivery", "Skip", "skipped")
    )
    selection = Selection(dead_letters, None if dead_letters else to_line or sys.maxsize, sink_id=sink_id)
    loaded = load_config(job.config_file, os.environ)
    shown = find_selected(job, loaded, selection)
    skipped: list[Selectable] = []
    segment = ""
    if shown:
        if not yes:
            confirm(f"{verb} {plural(len(shown), noun)}?", shown, err=output.is_json)
        skipped, segment = skip_deliveries(job, loaded, selection, shown)
    if output.is_json:
        output.print_json(skip_summary(loop_id, skipped, loaded))
    elif skipped:
        again = how_to_send_after_all(job, skipped, segment)
        click.echo(f"{plural(len(skipped), noun)} {done}. {again}")
    elif shown:
        click.echo("Nothing is left to do: a pass or another command has dealt with it.")
    else:
        click.echo("There is no dead letter." if dead_letters else f"Nothing waits for {sink_id}.")


def skip_summary(loop_id: str, skipped: Sequence[Selectable], config: Config) -> JsonObject:
    """What was skipped, in the words of a pass."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "loopId": loop_id,
        "status": "success" if skipped else "nothing_to_do",
        "skippedCount": len(skipped),
        "deliveries": [
            {**selectable_json(item, config), "status": "skipped", "reasonCode": SKIPPED.reason_code}
            for item in skipped
        ],
    }


def how_to_send_after_all(job: Job, skipped: Sequence[Selectable], segment: str) -> str:
    """Say which command sends what was skipped. Commands can only name lines of the file with `segment`."""
    ids = {item.escalation_id for item in skipped}
    lines = [item.line for item in skipped]
    sinks = {item.sink for item in skipped}
    options = ["--sink", *sinks] if len(sinks) == 1 else []
    if len(ids) == 1:
        return f"To send it after all: `{command_line('redeliver', job, '--id', *ids, *options)}`"
    in_range = len(set(lines)) == max(lines) - min(lines) + 1
    if in_range and not any(item.status == "dead" or item.segment != segment for item in skipped):
        options += ["--from-line", str(min(lines)), "--to-line", str(max(lines))]
        return f"To send them after all: `{command_line('redeliver', job, *options)}`"
    listed = command_line("log", job, "--status", "skipped", "-n", str(len(ids)), *options)
    return f"`{listed}` lists them; `{command_line('redeliver', job, *options)} --id ID` sends one after all."


def initial_config() -> JsonObject:
    """The config that `init` writes: three sinks, disabled, with good defaults."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "defaultMinSeverity": "warning",
        "sinks": {
            "webhook-default": {
                "enabled": False,
                "type": "webhook",
                "urlEnv": "OPS_MANAGER_ALERT_WEBHOOK_URL",
                "timeoutSeconds": 5,
            },
            "slack-default": {
                "enabled": False,
                "type": "slack",
                "webhookUrlEnv": "OPS_MANAGER_ALERT_SLACK_WEBHOOK_URL",
                "timeoutSeconds": 5,
                "maxPerMessage": 10,
            },
            "pagerduty-default": {
                "enabled": False,
                "type": "pagerduty_events",
                "routingKeyEnv": "OPS_MANAGER_ALERT_PAGERDUTY_ROUTING_KEY",
                "timeoutSeconds": 5,
            },
        },
        "routing": {
            "defaultSinks": ["slack-default", "webhook-default"],
            "categorySeverity": {
                "divergence_detected": "warning",
                "health_critical": "critical",
                "health_degraded": "warning",
                "ordering_drift_detected": "warning",
                "profile_drift_detected": "info",
            },
            "routes": [
                {
                    "category": "health_critical",
                    "sinks": ["pagerduty-default", "slack-default", "webhook-default"],
                },
                {"category": "profile_drift_detected", "minSeverity": "info"},
            ],
            "repeat": {"windowSeconds": 900},
        },
        "delivery": {
            "maxAttemptsPerPass": 3,
            "backoffSeconds": {"initial": 30, "max": 900},
            "giveUpAfterSeconds": 86400,
        },
    }


@cli.command(epilog=examples("init", "init --repo /srv/shop"))
@repo_option
@output_options
def init(repo: str, output: Output) -> None:
    """Write a config with three sinks, disabled.

    Says what to set next. Never overwrites.
    """
    path = os.path.join(absolute(repo), DEFAULT_CONFIG)
    if os.path.lexists(path):
        raise StorageError(
            f"{path} is there already, and is left as it is",
            [f"`{config_command(path)}` checks it; to start anew, move it away"],
        )
    document = initial_config()
    make_folder(os.path.dirname(path))
    replace_file(path, json.dumps(document, indent=2).encode() + b"\n", durable=True)
    sinks = [
        {"id": sink_id, "type": sink["type"], "secretRefs": variables_of(sink)}
        for sink_id, sink in document["sinks"].items()
    ]
    if output.is_json:
        output.print_json({"schemaVersion": SCHEMA_VERSION, "configFile": path, "sinks": sinks})
        return
    click.echo(printable(f"Wrote {path}. It holds no secret; only you can read it (mode 0600)."))
    click.echo("Next, for each sink that you want:")
    for sink in sinks:
        names = ", ".join(sink["secretRefs"].values())
        click.echo(f'  {sink["id"]}: set {names} where reconcile runs, and "enabled": true in the config')
    click.echo(f"Then: {shell_line(PROGRAM, 'test', '--repo', repo)}")


# ---------------------------------------------------------------------------------------------------------
# Demo, `explain`, and the start of the program
# ---------------------------------------------------------------------------------------------------------
# The demo runs real passes in a temporary folder, against a receiver that it starts.


def demo_escalations(loop_id: str) -> list[JsonObject]:
    """One escalation of each category, as the host writes them, with both transports."""

    def record(category: str, transport: str, **fields: object) -> JsonObject:
        common = {"timestamp": iso(time.time()), "loopId": loop_id, "traceId": str(uuid.uuid4())}
        return {**common, "category": category, "transport": transport, **fields}

    def reason(code: str, severity: str, metric: str, observed: str, threshold: str) -> JsonObject:
        named = {"code": code, "severity": severity, "metric": metric}
        return {**named, "observed": observed, "threshold": threshold}

    return [
        record(
            "health_critical",
            "local",
            healthStatus="critical",
            ingestStatus="success",
            reasonCodes=["ingest_stale"],
            reasons=[reason("ingest_stale", "critical", "ingestLagSeconds", "4210", "900")],
        ),
        record(
            "health_degraded",
            "sprite_service",
            healthStatus="degraded",
            ingestStatus="failed",
            failureCode="service_request_failed",
            reasonCodes=["transport_unreachable"],
            reasons=[reason("transport_unreachable", "degraded", "transportFailureStreak", "1", "1")],
        ),
        record(
            "divergence_detected",
            "local",
            divergenceFlags={
                "activeMismatch": True,
                "approvalCompletionConflict": False,
                "cursorRegression": False,
            },
            state={
                "transition": {
                    "previousState": "running",
                    "triggeringSignal": "event:role_end",
                    "currentState": "idle",
                    "confidence": "low",
                }
            },
        ),
        record(
            "ordering_drift_detected",
            "local",
            reasonCode="ordering_drift_detected",
            sequence={
                "violations": ["event_sequence_regression"],
                "events": {"previousLast": 7, "last": 4, "regressed": True},
            },
        ),
        record(
            "profile_drift_detected",
            "sprite_service",
            reasonCode="profile_drift_detected",
            drift={
                "appliedProfile": "balanced",
                "recommendedProfile": "strict",
                "recommendationConfidence": "high",
                "action": "review_threshold_profile",
                "rationale": "Twelve steady runs: tighter thresholds find trouble sooner",
            },
        ),
    ]


def demo_config() -> JsonObject:
    """A config that sends everything to three sinks."""
    everywhere = ["webhook-demo", "slack-demo", "pagerduty-demo"]
    return {
        "schemaVersion": SCHEMA_VERSION,
        "defaultMinSeverity": "warning",
        "sinks": {
            "webhook-demo": {"enabled": True, "type": "webhook", "urlEnv": "DEMO_WEBHOOK_URL"},
            "slack-demo": {
                "enabled": True,
                "type": "slack",
                "webhookUrlEnv": "DEMO_SLACK_URL",
                "maxPerMessage": 4,
            },
            "pagerduty-demo": {
                "enabled": True,
                "type": "pagerduty_events",
                "routingKeyEnv": "DEMO_ROUTING_KEY",
                "urlEnv": "DEMO_PAGERDUTY_URL",
            },
        },
        "routing": {"defaultSinks": everywhere, "categorySeverity": {"health_critical": "critical"}},
    }


@cli.command("explain", epilog=examples("explain", "explain unauthorized"))
@click.argument("code", required=False, shell_complete=complete_code)
@output_options
def explain_codes(code: str | None, output: Output) -> None:
    """Explain a reason code or a fault code.

    Says what it means, how to see it and how to fix it. Without a code: lists all of them.
    """
    if code is not None and code not in CODES:
        near = suggest(code, sorted(CODES))
        raise click.BadParameter(f"there is no code {printable(code)!r}; {near}", param_hint="CODE")
    described = [describe_code(name) for name in (CODES if code is None else [code])]
    if output.is_json:
        output.print_json(described[0] if code else {"schemaVersion": SCHEMA_VERSION, "codes": described})
    elif code is None:
        rows = ((found["code"], found["kind"], found["meaning"]) for found in described)
        click.echo(table(("CODE", "KIND", "MEANING"), rows))
    else:
        [found] = described
        click.echo(f"{click.style(found['code'], bold=True)}: {found['meaning']}")
        click.echo(f"How to see it: {found['howToSee']}")
        click.echo(f"How to fix it: {found['howToFix']}")


def describe_code(code: str) -> JsonObject:
    """A code in general words, without the names of a sink or a loop."""
    meaning, look, fix = map(words_of, CODES[code])
    return {
        "code": code,
        "kind": "fault" if code in get_args(FaultCode) else "reason",
        "meaning": meaning,
        "howToSee": look,
        "howToFix": f"{fix[0].upper()}{fix[1:]}.",
    }


@cli.command(epilog=examples("demo", "demo | less -R"))
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    help="text for people, json for scripts.",
)
def demo(form: str) -> None:
    """Show it all on this machine: no account, no network.

    Takes one escalation of each category through a webhook, a Slack and a PagerDuty sink, all played by a
    receiver on 127.0.0.1, shows what each received and what the telemetry says, and runs a second pass to
    show that nothing goes out twice. Works in a temporary folder, which it removes.
    """
    import tempfile

    received: dict[str, list[JsonObject]] = {"webhook": [], "slack": [], "pagerduty": []}
    # A proxy could not reach this machine's loopback.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"
    with demo_receiver(received) as base, tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-demo-") as repo:
        environ = {
            "DEMO_WEBHOOK_URL": f"{base}/webhook",
            "DEMO_SLACK_URL": f"{base}/slack",
            "DEMO_PAGERDUTY_URL": f"{base}/pagerduty",
            "DEMO_ROUTING_KEY": uuid.uuid4().hex,
        }
        found = run_demo(repo, environ, received)
    Output(form, pretty=False).show(found, lambda: demo_text(found, received))
    if found["status"] == "failed":
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@contextlib.contextmanager
def demo_receiver(received: Mapping[str, list[JsonObject]]) -> Iterator[str]:
    """Receive requests on 127.0.0.1, and add their bodies to `received` by path. Yields the base URL."""
    import http.server

    class Receiver(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received[self.path.strip("/")].append(body)
            answer = b"ok"
            self.send_response(202 if self.path == "/pagerduty" else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def run_demo(
    repo: str, environ: Mapping[str, str], received: Mapping[str, Sequence[JsonObject]]
) -> JsonObject:
    """Run two passes in a folder. The demo fails if a sink misses an escalation or receives one twice."""
    job = usual_job(repo, "demo-loop")
    escalations = demo_escalations(job.loop_id)
    make_folder(os.path.dirname(job.config_file))
    make_folder(os.path.dirname(job.escalations_file))
    replace_file(job.config_file, encode_json(demo_config()), durable=False)
    source = b"".join(encode_json(record) + b"\n" for record in escalations)
    replace_file(job.escalations_file, source, durable=False)
    passes: list[JsonObject] = []
    for _ in range(2):
        passes.append(summary_of_one(job, run_loops([job], environ)[job.loop_id]))
        if passes[-1]["stoppedBy"] == "signal":
            raise click.Abort
    in_digests = [block for body in received["slack"] for block in body["blocks"] if "block_id" in block]
    counts = {name: len(bodies) for name, bodies in received.items()} | {"slack": len(in_digests)}
    exact = all(count == len(escalations) for count in counts.values())
    return {
        "schemaVersion": SCHEMA_VERSION,
        "status": "success" if exact else "failed",
        "escalationCount": len(escalations),
        "receivedCounts": counts,
        "passes": passes,
        "telemetry": list(iterate_rows(job.telemetry_file)),
    }


def demo_text(found: JsonObject, received: Mapping[str, Sequence[JsonObject]]) -> str:
    """The demo for people: both passes, and between them what each sink received."""

    def title(text: str) -> list[str]:
        return ["", click.style(text, bold=True)]

    first, second = found["passes"]
    count = plural(found["escalationCount"], "escalation")
    rows = [
        (
            row["status"],
            row["eventSeverity"],
            row["escalationCategory"],
            f"{row['dispatchedSinkCount']}/{row['sinkCount']}",
        )
        for row in found["telemetry"]
    ]
    counts = ", ".join(f"{name} {count}" for name, count in found["receivedCounts"].items())
    exact = found["status"] == "success"
    return "\n".join(
        [
            f"{count} in escalations.jsonl, three sinks on 127.0.0.1.",
            *title("First pass"),
            summary_text(first),
            *title("What webhook-demo received (webhook: JSON)"),
            *(
                f"  {got['event']['severity']:8} {got['event']['category']:24} of {got['source']['loopId']}"
                for got in received["webhook"]
            ),
            *title("What slack-demo received (slack: as it shows it, up to four escalations a message)"),
            *(line for body in received["slack"] for line in slack_lines(body)),
            *title("What pagerduty-demo received (pagerduty_events: Events API v2)"),
            *(
                f"  {got['event_action']}  {got['payload']['summary']}\n           {got['dedup_key']}"
                for got in received["pagerduty"]
            ),
            *title("What the telemetry says (telemetry/alerts.jsonl)"),
            table(("STATUS", "SEVERITY", "CATEGORY", "SINKS"), rows),
            *title("Second pass: nothing goes out twice"),
            summary_text(second),
            "",
            f"Received in all: {counts}.",
            "Each sink has each escalation exactly once."
            if exact
            else "A sink missed one, or got one twice.",
        ]
    )


def slack_lines(body: JsonObject) -> Iterator[str]:
    """A message as Slack shows it, and an empty line."""
    import html

    for block in body["blocks"]:
        texts = [block["text"]["text"]] if "text" in block else [e["text"] for e in block["elements"]]
        style = {"bold": block["type"] == "header", "dim": block["type"] == "context"}
        for line in (line for text in texts for line in html.unescape(text).splitlines()):
            yield click.style(f"  {line}", **style)
    yield ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code. Every error is shown on standard error, without a
    traceback."""
    try:
        colour = False if os.environ.get("NO_COLOR") else None
        result = cli.main(None if argv is None else list(argv), PROGRAM, standalone_mode=False, color=colour)
        return result if isinstance(result, int) else 0
    except DispatchError as error:
        complain(f"error: {error}")
        return error.exit_code
    except click.UsageError as error:
        complain(error)
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        complain("aborted")
        return EXIT_INTERRUPTED
    except OSError as error:
        complain(f"error: cannot write the output: {error.strerror}")
        return EXIT_STORAGE
    except SystemExit as end:
        # Click exits like this if the reader of our output has left, as `head` does. End as SIGPIPE would.
        return EXIT_READER_LEFT if end.code else 0
    except Exception as error:  # noqa: BLE001 - no traceback helps an operator
        complain(f"error: {as_dispatch_error(error)}")
        return EXIT_STORAGE


def complain(about: str | click.UsageError) -> None:
    """Say on standard error what is wrong. If nobody can read that, say nothing."""
    with contextlib.suppress(OSError):
        if isinstance(about, str):
            click.echo(about, err=True)
        else:
            about.show()


def program() -> NoReturn:
    """What is installed as the command.

    Exits without tearing down the interpreter: that would take a tenth of an idle pass, and a thread may
    still hang on a sink. By then, no file is open and all output is flushed.
    """
    import warnings

    # Libraries may warn, as requests does of a chardet that it does not know. That would spoil what reconcile
    # reads.
    warnings.simplefilter("ignore")
    os._exit(main())


gc.freeze()
gc.enable()

if __name__ == "__main__":
    program()
