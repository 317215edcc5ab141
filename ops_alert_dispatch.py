#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["click>=8.3.3", "jsonschema>=4.24.1", "requests>=2.33.0"]
# ///
"""Deliver the escalations of a Superloop ops manager to webhooks, Slack, PagerDuty and Alertmanager.

The host appends one JSON object a line to ``escalations.jsonl``. One pass of ``dispatch`` takes up what is
new there and delivers it, each sink in a lane of its own:

    escalations.jsonl -> Source -> Escalation -> Router -> Lane (one a sink) -> Adapter -> Client -> sink
                                                      \\-> Ledger: attempts, telemetry, state

The promise: an escalation that was written reaches each sink that should have it, or an operator can see
that it did not, and why. The file reads from top to bottom as a record travels.
"""

# Without `from __future__ import annotations`: with it each NamedTuple compiles the texts of its fields'
# types, which costs a twenty-fifth of an idle pass.

import gc

# What imports make stays for good. To search it for garbage over and over costs a tenth of an idle pass: that
# is left out, and what was made is set aside at the end of this file.
gc.disable()

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import signal
import stat
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn, Self, TextIO, cast

import click

try:
    # hashlib loads OpenSSL, which costs as much as a twentieth of an idle pass.
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from urllib3 import HTTPConnectionPool
    from urllib3.connection import HTTPConnection

__version__ = "1.0.0"

PROGRAM = "ops-alert-dispatch"
SCHEMA_VERSION = "v1"
JsonObject = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------
# Errors, time, JSON
# ---------------------------------------------------------------------------------------------------------

EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_CONFIG = 3
EXIT_STATE = 4
EXIT_STORAGE = 5

EXIT_CODES_HELP = """\b
Exit codes:
  0  done; a sink that failed is in the summary, not in the exit code
  1  a delivery failed, of `test`, of `redeliver`, or of `dispatch` with --strict
  2  usage: the command line is wrong
  3  the config is invalid or a secret is unset: nothing sent, nothing consumed
  4  the state file is unusable
  5  the source, the telemetry, the disk or the output failed
  130  interrupted, or a question was not answered with yes
"""


class DispatchError(Exception):
    """What ends a command: a headline, and one line for each fault with its place and what to do."""

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
    """The source, the telemetry or the disk failed."""

    exit_code = EXIT_STORAGE


def program_fault(error: Exception) -> StorageError:
    """Say where the program itself is wrong, for whoever can mend it: an exception's own words could hold
    anything, a secret too."""
    import traceback

    *_, frame = traceback.extract_tb(error.__traceback__)
    return StorageError(
        f"a fault of the program: {type(error).__name__} in {frame.name}, line {frame.lineno}",
        ["report it with this line and the version; what was not delivered goes out with a later pass"],
    )


def storage_error(action: str, path: str, error: OSError) -> StorageError:
    """Say which file failed at what, and what an operator can do about that kind of failure."""
    return StorageError(f"cannot {action} {path}: {error.strerror or error}", [what_to_do(error)])


def what_to_do(error: OSError) -> str:
    """What an operator can do about a failure of a file."""
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
        errno.EMFILE: "raise the limit of open files (ulimit -n) of whatever runs this",
        errno.ENFILE: "raise the limit of open files of this machine (fs.file-max)",
        errno.EISDIR: "it is a folder: move it away",
        errno.EEXIST: "a file stands where the folder should be: move it away",
        errno.ENOTDIR: "a file stands where a folder should be: move it away",
    }.get(error.errno or 0, "check the file and its folder")


# Times that every zone can write: from 1970 to the end of the year 9998.
LAST_SECOND = 253_370_764_800.0


def iso(epoch: float, *, milliseconds: bool = False) -> str:
    """Write seconds since the epoch as the host does: ISO 8601, UTC, whole seconds."""
    return write_time(epoch, "milliseconds") if milliseconds else write_time(int(epoch // 1), "seconds")


# Most times are asked for again and again: those of the second in which a pass works.
@functools.lru_cache(maxsize=64)
def write_time(epoch: float, precision: str) -> str:
    """`iso` to a precision that datetime knows."""
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def parse_time(text: object) -> float | None:
    """Read an ISO 8601 time as seconds since the epoch; None where it is none. No zone means UTC."""
    # Nothing that long is one, and what is read is kept for a while.
    return read_time(text) if isinstance(text, str) and len(text) <= 64 else None


@functools.lru_cache(maxsize=64)
def read_time(text: str) -> float | None:
    """`parse_time` of a text."""
    try:
        moment = datetime.fromisoformat(text.strip())
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < LAST_SECOND else None


# Deeper nesting than this is no escalation that anybody wrote by hand or by jq, and it is far from the
# depth at which Python's own JSON encoder gives up.
MAX_DEPTH = 100
BYTE_ORDER_MARK = "\ufeff".encode()

JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
JSON_DECODER = json.JSONDecoder(parse_constant=str)


class TooDeepError(ValueError):
    """JSON whose containers stand in each other more than MAX_DEPTH deep."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} deep")


# What reading a document or a row that is none of ours may raise, whatever stands in it.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def encode_json(value: object) -> bytes:
    """Encode as compact UTF-8 JSON, whatever the value holds.

    Lone surrogates become U+FFFD; NaN and the infinities, which JSON does not have, become strings.
    """
    try:
        return JSON_ENCODER.encode(value).encode()
    except ValueError:  # UnicodeEncodeError is one, too
        return JSON_ENCODER.encode(mend_json(value)).encode()


def mend_json(value: object) -> object:
    """Replace what strict JSON in UTF-8 cannot say. Nesting is at most MAX_DEPTH, so recursion is safe."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and value - value != 0:  # NaN, inf, -inf
        return repr(value)
    if isinstance(value, Mapping):
        return {mend_json(str(key)): mend_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mend_json(item) for item in value]
    return value


def too_deep(value: object) -> bool:
    """Tell whether containers stand in each other more than MAX_DEPTH deep, without recursion."""
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


def decode_json(text: str) -> object:
    """Read JSON leniently where leniency loses nothing: NaN and oversized integers are kept as strings.

    Raises ValueError for what is not JSON, TooDeepError for what is nested more than MAX_DEPTH deep.
    """
    try:
        value = JSON_DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise TooDeepError from None
    except ValueError:  # an integer of more digits than Python converts
        value = json.loads(text, parse_constant=str, parse_int=as_integer)
    if text.count("{") + text.count("[") > MAX_DEPTH and isinstance(value, dict | list) and too_deep(value):
        raise TooDeepError
    return value


def as_integer(digits: str) -> int | str:
    """An integer of a JSON text; one with more digits than Python converts stays a string."""
    try:
        return int(digits)
    except ValueError:
        return digits


def mapping(value: object) -> JsonObject:
    """A JSON object as it is; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


# Control characters and those that change the direction of text: they forge log lines and terminal output.
FORGING = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f"
UNPRINTABLE = f"[\x00-\x1f{FORGING}\ud800-\udfff]+"


def printable(text: str) -> str:
    """Make text safe for a line of a log or a terminal: control and bidirectional characters go."""
    # Nearly always nothing is to be done: then no pattern is compiled, either.
    return text if text.isprintable() else re.sub(UNPRINTABLE, " ", text)


def spell_out(text: str, pattern: str = UNPRINTABLE) -> str:
    """Write what is unprintable as JSON does, so that what differs stays different, unlike by `printable`."""
    return re.sub(pattern, lambda found: "".join(f"\\u{ord(character):04x}" for character in found[0]), text)


def cut(text: str, limit: int) -> str:
    """Cut text to at most `limit` characters; a cut is marked with an ellipsis."""
    return text if len(text) <= limit else text[: character_boundary(text, limit - 1)] + "…"


# What changes the character before it, as a combining mark does: it joins, gives a skin tone, or is a tag.
EXTENDERS = "\u200d" + "".join(map(chr, [*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)]))
# Two of these make a flag.
FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
# Nobody writes longer ones than this but to break a layout.
LONGEST_CHARACTER = 32


def character_boundary(text: str, end: int) -> int:
    """The last place, at most `end` and before the text's own end, where no visible character is cut in two.

    An accent stays with its letter; a family, a flag or a skin tone is kept or dropped whole.
    """
    from unicodedata import category

    for place in range(end, max(end - LONGEST_CHARACTER, 0), -1):
        before, after = text[:place], text[place]
        half_flag = after in FLAG_LETTERS and (place - len(before.rstrip(FLAG_LETTERS))) % 2
        extended = category(after).startswith("M") or after in EXTENDERS or before.endswith("\u200d")
        if not extended and not half_flag:
            return place
    return end


def beside(path: str, name: str) -> str:
    """The path of another file in the folder of a file."""
    return os.path.join(os.path.dirname(path), name)


def stat_of(path: str) -> os.stat_result | None:
    """What the file system says of a file; None where there is none. Raises OSError."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def plural(count: int, noun: str) -> str:
    """`3 escalations`, `1 escalation`, `2 deliveries`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


# ---------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------

MASK = "[secret]"
# A run of this many characters of a secret is taken for a part of it.
SECRET_RUN = 8
# A whole token of so few characters is masked too, but only where it stands alone.
SECRET_MIN = 4
# An answer may hold a secret percent-encoded within JSON within HTML.
ENCODING_LAYERS = 3

# A pattern that an idle pass does not need is compiled with its first use.
ESCAPED = (
    r"%([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\x([0-9A-Fa-f]{2})|&#[xX]([0-9A-Fa-f]{1,6});"
    r"|&#([0-9]{1,7});|\\([\"'/\\])|&(amp|lt|gt|quot|apos);"
)
PLAIN_WORDS = "[A-Za-z]+(?:[-_.][A-Za-z]+)*"
HTML_NAMES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}


class Redactor:
    """Keeps the secrets that were read from the environment out of every text that leaves the program.

    `mask` is for what sinks say: it finds parts and encodings too, in any case. `mask_value` is for what
    records hold: it finds the secrets as they are and as they are usually encoded, and costs next to nothing.
    The program's own words (keys, outcomes, places) are never touched. The `public` names (sink ids, say)
    are no secrets, even where a URL happens to hold the same word. Only where they are plain words: somebody
    may have written a secret in the place of one.
    """

    def __init__(self, secrets: Iterable[str] = (), public: Iterable[str] = ()) -> None:
        self._secrets = tuple(secrets)
        self._public = tuple(public)

    @functools.cached_property
    def _hidden(self) -> tuple[list[str], set[str]]:
        """What is hidden wherever it stands whole, the longest first; and the runs of it. All folded.

        Made when it is first needed: an idle pass does without.
        """
        whole: set[str] = set()
        runs: set[str] = set()
        public = fold(" ".join(name for name in self._public if re.fullmatch(PLAIN_WORDS, name)))
        for secret in self._secrets:
            for part, is_token in (url_parts(secret) if "://" in secret else token_parts(secret)).items():
                if is_token and len(part) >= SECRET_MIN:
                    whole |= {fold(part), fold(json.dumps(part, ensure_ascii=False)[1:-1])}
                for spelling in map(fold, spellings(part)):
                    if len(spelling) < SECRET_RUN or (not is_token and spelling in public):
                        continue
                    whole.add(spelling)
                    if "://" not in spelling:
                        runs |= {spelling[i : i + SECRET_RUN] for i in range(len(spelling) - SECRET_RUN + 1)}
        return sorted(whole, key=len, reverse=True), {run for run in runs if run not in public}

    @functools.cached_property
    def _marks(self) -> list[bytes]:
        """The shortest texts without one of which a line holds no secret."""
        marks: list[str] = []
        for spelling in reversed(self._hidden[0]):
            if not any(mark in spelling for mark in marks):
                marks.append(spelling)
        return [mark.encode("utf-8", "surrogateescape") for mark in marks]

    def mask(self, text: str) -> str:
        """Mask secrets, and any run of SECRET_RUN characters of one, in a text from outside."""
        whole, runs = self._hidden
        if not whole:
            return text
        spans: list[tuple[int, int]] = []
        layer, places = text, [(index, index + 1) for index in range(len(text))]
        for _ in range(ENCODING_LAYERS + 1):
            folded = fold(layer)
            found = list(self._find(folded))
            found += [
                (start, start + SECRET_RUN)
                for start in range(len(folded) - SECRET_RUN + 1)
                if folded[start : start + SECRET_RUN] in runs
            ]
            spans += [(places[start][0], places[stop - 1][1]) for start, stop in found]
            decoded, places = decode_layer(layer, places)
            if decoded == layer:
                break
            layer = decoded
        return mask_spans(text, spans)

    def mask_value(self, value: Any) -> Any:
        """Mask secrets that stand whole in the texts of a JSON value, keys and numbers included."""
        if isinstance(value, str):
            return mask_spans(value, self._find(fold(value)))
        if isinstance(value, dict):
            return {self.mask_value(key): self.mask_value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mask_value(item) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return MASK if any(self._find(str(value))) else value
        return value

    def finds(self, line: bytes) -> bool:
        """Tell whether a secret stands whole in a line: nearly always not, and quickly told."""
        return any(map(line.lower().__contains__, self._marks))

    def _find(self, folded: str) -> Iterator[tuple[int, int]]:
        """Where secrets stand whole in a text that is folded already."""
        for spelling in self._hidden[0]:
            start = folded.find(spelling)
            while start >= 0:
                stop = start + len(spelling)
                alone = not folded[start - 1 : start].isalnum() and not folded[stop : stop + 1].isalnum()
                if alone or len(spelling) >= SECRET_RUN:
                    yield start, stop
                start = folded.find(spelling, stop)


def fold(text: str) -> str:
    """Write the 26 letters small: a text of the same length."""
    return text.lower() if text.isascii() else text.translate(SMALL_LETTERS)


SMALL_LETTERS = {letter: letter + 32 for letter in range(ord("A"), ord("Z") + 1)}


def mask_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Put one MASK in place of each stretch of a text that these spans cover."""
    pieces: list[str] = []
    covered = 0
    for start, stop in sorted(spans):
        if start > covered or not pieces:
            pieces += [text[covered:start], MASK]
        covered = max(covered, stop)
    return "".join([*pieces, text[covered:]])


def url_parts(url: str) -> dict[str, bool]:
    """The parts of a URL that are secret, and of each whether it is as good as a token."""
    from urllib.parse import unquote, urlsplit

    parts = {url: True}
    with contextlib.suppress(ValueError):
        split = urlsplit(url)
        userinfo = split.netloc.rpartition("@")[0]
        words = {split.path.strip("/"), split.query, split.fragment}
        # A step of a path that is a plain word (`services`) is found with its neighbours only.
        words |= {step for step in split.path.split("/") if len(step) >= 2 * SECRET_RUN or not step.isalpha()}
        words |= {value for pair in split.query.split("&") for value in pair.split("=")[1:]}
        parts |= dict.fromkeys(words, False)
        parts |= dict.fromkeys({userinfo, unquote(userinfo), *userinfo.split(":")}, True)
    return parts


def token_parts(token: str) -> dict[str, bool]:
    """A token, and what else gives it away: each of several signing secrets, and the key that it encodes."""
    parts: dict[str, bool] = {}
    for word in token.split():
        parts |= {word: True, word.removeprefix("whsec_"): True}
        for key in signing_keys(word):
            parts |= {key.hex(): True, key.decode("utf-8", "surrogateescape"): True}
    return parts


def signing_keys(value: str) -> list[bytes]:
    """The keys that a webhook's signing secret holds, in its order; none where any of it is malformed.

    Standard Webhooks, "Signature scheme": `whsec_` and the key in base64. Several stand side by side, with
    a space between them, while a key is rotated.
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
    """How a part of a secret may stand in JSON, in a URL, in HTML, in base64 or as hexadecimal digits."""
    from html import escape
    from urllib.parse import quote, quote_plus, unquote

    raw = part.encode("utf-8", "surrogateescape")
    found = {part, unquote(part), escape(part), raw.hex(), *base64_spellings(raw)}
    found |= {quote(raw), quote(raw, safe=""), quote_plus(raw)}
    found |= {json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]}
    return found


def base64_spellings(raw: bytes) -> set[str]:
    """How bytes may look inside a base64 string: alone, or after one or two other bytes."""
    from base64 import b64encode

    found: set[str] = set()
    for lead in range(3):
        coded = b64encode(b"\0" * lead + raw).decode()
        # The first characters depend on what stands before, the last ones on what comes after.
        coded = coded[(0, 2, 3)[lead] :].rstrip("=")[:-1]
        found |= {coded, coded.replace("+", "-").replace("/", "_")}
    return found


def decode_layer(text: str, places: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """Undo one layer of percent, JSON and HTML escapes, and keep track of where each character came from."""
    decoded: list[str] = []
    kept: list[tuple[int, int]] = []
    at = 0
    for match in re.finditer(ESCAPED, text):
        start, stop = match.span()
        percent, unicode, byte, hexadecimal, decimal, plain, name = match.groups()
        digits = percent or unicode or byte or hexadecimal
        code = int(digits, 16) if digits else int(decimal or 0)
        character = plain or HTML_NAMES.get(name or "") or (chr(code) if code <= sys.maxunicode else "?")
        decoded += [text[at:start], character]
        kept += [*places[at:start], (places[start][0], places[stop - 1][1])]
        at = stop
    return "".join([*decoded, text[at:]]), [*kept, *places[at:]]


# ---------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------

SCHEMA_FILE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "alert-sinks.schema.json")
DEFAULT_CONFIG = "config/ops-manager-alert-sinks.v1.json"
CONFIG_ENV = "OPS_MANAGER_ALERT_SINKS_FILE"
TRACE_ENV = "OPS_MANAGER_TRACE_ID"
MAX_CONFIG_BYTES = 1 << 20
# More faults than this come from a file that is no config, or a hostile one.
MAX_FAULTS = 100
# Of so many known words one is suggested.
MAX_KNOWN = 50
# A key beyond this is told by its length.
LONG_KEY = 200
# The one key of a sink that names a variable which holds no secret.
CA_FILE_KEY = "caFileEnv"

DEFAULT_TIMEOUT: float = 5
SEVERITIES = ("info", "warning", "critical")
SEVERITY_SYNONYMS = {
    word: severity
    for severity, words in {
        "info": "info informational information notice debug trace low ok healthy",
        "warning": "warning warn degraded minor medium moderate",
        "critical": "critical crit error err fatal major high severe alert emergency emerg panic disaster",
    }.items()
    for word in words.split()
}


def normalise_severity(value: object) -> str | None:
    """Map a severity word, in any case, to `info`, `warning` or `critical`; None where nobody knows it."""
    return SEVERITY_SYNONYMS.get(value.strip().lower()) if isinstance(value, str) else None


# What an Alertmanager tells our alerts apart by: a sink's own labels must not stand in for these.
ALERT_LABELS = ("alertname", "severity", "loop", "repo", "source")


class Sink(NamedTuple):
    """A configured sink: `settings` is its object in the config, `secrets` what its `…Env` keys hold."""

    id: str
    type: str
    enabled: bool
    timeout_seconds: float
    min_severity: str | None
    settings: JsonObject
    secrets: Mapping[str, str]

    @property
    def secret_refs(self) -> dict[str, str]:
        """The keys that name environment variables, with those names."""
        return {key: name for key, name in self.settings.items() if key.endswith("Env")}

    def summary(self) -> JsonObject:
        """The sink as the resolver lists it: no secret, only the names of the variables."""
        return {
            "id": self.id,
            "enabled": self.enabled,
            "type": self.type,
            "timeoutSeconds": self.timeout_seconds,
            "secretRefs": self.secret_refs,
        }

    def describe(self) -> JsonObject:
        """The sink as the resolver describes a selected one: `summary` and what else is set on it."""
        known = {"enabled", "type", "timeoutSeconds", *self.secret_refs}
        config = {key: value for key, value in self.settings.items() if key not in known}
        return {**self.summary(), "config": config}


class DeliveryPolicy(NamedTuple):
    """How a lane treats failures. Times are in seconds."""

    max_attempts_per_pass: int = 3
    backoff_initial: float = 30.0
    backoff_max: float = 900.0
    give_up_after: float = 86400.0


class Config(NamedTuple):
    """A valid config. `digest` stands for its bytes: a config with a known digest needs no validation."""

    path: str
    digest: str
    document: JsonObject
    default_min_severity: str
    sinks: Mapping[str, Sink]
    policy: DeliveryPolicy
    env_checked: bool
    hidden: tuple[str, ...]

    @property
    def routing(self) -> JsonObject:
        """The `routing` object as it stands in the file."""
        routing: JsonObject = self.document["routing"]
        return routing

    @property
    def repeat_window(self) -> float:
        """For how many seconds a sink is not told the same again; 0: it always is."""
        window: float = self.routing.get("repeat", {}).get("windowSeconds", 0)
        return window

    def rules(self) -> JsonObject:
        """A config document of nothing but what decides where a record goes; no secret, no name of one."""
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

    @classmethod
    def of_rules(cls, rules: JsonObject) -> Self:
        """A config that routes by what `rules` gave. Raises one of MALFORMED else."""
        for settings in rules["sinks"].values():
            SEVERITIES.index(settings.get("minSeverity", "info"))
        return cls(
            path="",
            digest="",
            document=rules,
            default_min_severity=rules["defaultMinSeverity"],
            sinks=sinks_of(rules, {}),
            policy=DeliveryPolicy(),
            env_checked=False,
            hidden=(),
        )

    def redactor(self) -> Redactor:
        """A redactor for every secret that the environment holds for this config."""
        return make_redactor(self.document, self.hidden)

    def env_status(self) -> JsonObject:
        """For each environment variable that a sink names: whether it is set."""
        return {
            name: {"present": key in sink.secrets}
            for sink in self.sinks.values()
            for key, name in sorted(sink.secret_refs.items())
        }


def json_path(parts: Iterable[str | int]) -> str:
    """Write a place in a document as JSONPath (RFC 9535): `$.sinks['webhook-default'].urlEnv`."""
    path = "$"
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif len(part) > LONG_KEY:
            path += f"[a key of {len(part)} characters]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part):
            path += f".{part}"
        else:
            path += f"[{json.dumps(printable(part), ensure_ascii=False)[1:-1]!r}]"
    return path


def load_config(
    path: str, environ: Mapping[str, str], *, check_env: bool = True, known_digest: str | None = None
) -> Config:
    """Read, validate and resolve the config.

    `known_digest` is the digest of a config that an earlier pass found valid: the same bytes are not
    validated against the schema again, which saves the import of jsonschema. The secrets are always checked.

    Raises ConfigError, which lists every fault with its JSON path.
    """
    document, digest, faults = read_config(path)
    if not faults and digest != known_digest:
        faults += validate_config(document)
    if check_env:
        faults += check_secrets(document, environ)
    faults += find_secrets(document, environ)
    if faults:
        # Whoever wrote a secret into the file is not to find it in a log as well.
        redactor = make_redactor(document, hidden_values(document, environ))
        raise config_error(path, [redactor.mask_value(fault) for fault in faults])
    delivery = document.get("delivery", {})
    backoff = delivery.get("backoffSeconds", {})
    defaults = DeliveryPolicy()
    return Config(
        path=path,
        digest=digest,
        document=document,
        default_min_severity=document["defaultMinSeverity"],
        sinks=sinks_of(document, environ),
        policy=DeliveryPolicy(
            max_attempts_per_pass=delivery.get("maxAttemptsPerPass", defaults.max_attempts_per_pass),
            backoff_initial=backoff.get("initial", min(defaults.backoff_initial, backoff.get("max", 30.0))),
            backoff_max=backoff.get("max", max(defaults.backoff_max, backoff.get("initial", 0.0))),
            give_up_after=delivery.get("giveUpAfterSeconds", defaults.give_up_after),
        ),
        env_checked=check_env,
        hidden=hidden_values(document, environ),
    )


def sinks_of(document: JsonObject, environ: Mapping[str, str]) -> dict[str, Sink]:
    """The sinks of a valid config document, with the secrets that the environment holds for them."""
    return {
        sink_id: Sink(
            id=sink_id,
            type=settings["type"],
            enabled=settings["enabled"],
            timeout_seconds=settings.get("timeoutSeconds", DEFAULT_TIMEOUT),
            min_severity=settings.get("minSeverity"),
            settings={k: v for k, v in settings.items() if k != "description" and not k.startswith("x-")},
            secrets={
                key: environ[name]
                for key, name in settings.items()
                if key.endswith("Env") and not key.startswith("x-") and environ.get(name)
            },
        )
        for sink_id, settings in document["sinks"].items()
    }


def named_secrets(document: JsonObject, environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets that the environment holds for a config, valid or not: name of the variable, value."""
    return {
        name: environ[name]
        for sink in mapping(document.get("sinks")).values()
        for key, name in mapping(sink).items()
        if key.endswith("Env") and not key.startswith("x-") and key != CA_FILE_KEY
        if is_env_name(name) and environ.get(name)
    }


def is_env_name(name: object) -> bool:
    """Tell whether a key of the config names a variable as the schema has it: `[A-Z_][A-Z0-9_]*`."""
    return isinstance(name, str) and name.isascii() and name.isidentifier() and name == name.upper()


def hidden_values(document: JsonObject, environ: Mapping[str, str]) -> tuple[str, ...]:
    """What must not be seen of the environment: a config's secrets, and what proxies ask for."""
    hidden: list[str] = []
    for value in named_secrets(document, environ).values():
        peers = secret_parts("alertmanager", "urlEnv", value) if "://" in value else []
        hidden += [value, *peers]
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for proxy in (environ.get(name, ""), environ.get(name.upper(), "")):
            # Of a proxy's URL only user name and password are secret.
            userinfo = proxy.rpartition("://")[2].partition("/")[0].rpartition("@")[0]
            hidden += filter(None, [userinfo, *userinfo.split(":")])
    return tuple(hidden)


def make_redactor(document: JsonObject, hidden: Iterable[str]) -> Redactor:
    """A redactor for a config, valid or not, that leaves sink ids and categories alone."""
    categories = mapping(mapping(document.get("routing")).get("categorySeverity"))
    return Redactor(hidden, public=(*mapping(document.get("sinks")), *categories))


def find_secrets(document: JsonObject, environ: Mapping[str, str]) -> Iterator[str]:
    """Find what stands in the environment as a secret and in the file as well, where anybody may read it."""
    secrets = {
        name: value for name, value in named_secrets(document, environ).items() if len(value) >= SECRET_RUN
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


def read_config(path: str) -> tuple[JsonObject, str, list[str]]:
    """Read the config's bytes: the document, a digest that stands for it and for this version, and what is
    wrong with it already. Raises ConfigError where there is no document."""
    faults: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> JsonObject:
        document = dict(pairs)
        if len(document) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            shown = ", ".join(show_value(key) for key in sorted(twice)[:MAX_FAULTS])
            faults.append(f"$: the key {shown} stands twice in one object; take one out")
        return document

    def no_number(word: str) -> None:
        faults.append(f"$: {word} is no number of JSON; write one")

    def number(digits: str) -> int | float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            open_to_all = [path] if status.st_mode & stat.S_IWOTH else []
            for folder in {os.path.dirname(path), os.path.dirname(os.path.realpath(path))}:
                mode = os.stat(folder).st_mode
                if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                    open_to_all.append(folder)
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise config_error(
            path, [f"$: the file cannot be read: {error.strerror}; {where_config()}"]
        ) from None
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
    try:
        text = raw.removeprefix(BYTE_ORDER_MARK).decode()
        document = json.loads(text, object_pairs_hook=unique, parse_constant=no_number, parse_float=number)
    except UnicodeDecodeError as error:
        raise config_error(path, [f"$: not UTF-8 at byte {error.start}; save the file as UTF-8"]) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise config_error(path, [f"$: not JSON at {place}: {error.msg}; mend the file there"]) from None
    except (RecursionError, ValueError):
        raise config_error(path, ["$: nested too deeply, or a number too long; mend the file"]) from None
    if not isinstance(document, dict):
        raise config_error(path, ["$: must be one JSON object; see the README's full example"])
    if too_deep(document):
        raise config_error(path, [f"$: nested more than {MAX_DEPTH} deep; mend the file"])
    digest = blake2b(__version__.encode() + b"\0" + raw, digest_size=32).hexdigest()
    return document, digest, faults


def where_config() -> str:
    return f"name the config with --alert-config-file (`config`: --config-file) or {CONFIG_ENV}"


def config_error(path: str, faults: Sequence[str]) -> ConfigError:
    """One error of all faults, which may quote what stands in the file: they steer no terminal."""
    told = sorted({printable(fault) for fault in faults})
    if len(told) > MAX_FAULTS:
        told[MAX_FAULTS:] = [f"… and more; mend these {MAX_FAULTS} first"]
    return ConfigError(f"config invalid, nothing was sent or consumed: {path}", told)


def validate_config(document: JsonObject) -> list[str]:
    """Find every fault in a config document: first what the schema can say, then references between keys."""
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
    faults = (fault for error in validator.iter_errors(document) for fault in explain_schema_error(error))
    found = {
        *itertools.islice(faults, MAX_FAULTS + 1),
        *itertools.islice(check_references(document), MAX_FAULTS + 1),
    }
    return sorted(found | set(check_headers(document)))


def explain_schema_error(error: Any) -> Iterator[str]:
    """Put a jsonschema ValidationError into words that an operator can act on, without the value itself
    where that may be a secret that somebody wrote into the file."""
    path: list[str | int] = list(error.absolute_path)
    value, rule = error.instance, error.validator_value
    match error.validator:
        case "required":
            missing = next(key for key in rule if key not in value and repr(key) in error.message)
            yield f"{json_path([*path, missing])}: is missing; add it"
        case "additionalProperties":
            known = list(error.schema.get("properties", {}))
            for key in value:
                if key not in known and not key.startswith("x-"):
                    yield f"{json_path([*path, key])}: unknown key; {suggest(key, known)}"
        case "enum":
            shown = show_value(value)
            near = nearest(value, rule)
            advice = f"did you mean {near!r}?" if near else "set it to one of them"
            yield f"{json_path(path)}: {shown} is not one of {', '.join(rule)}; {advice}"
        case "const":
            yield f"{json_path(path)}: {show_value(value)} is not {json.dumps(rule)}; set it to that"
        case "type":
            names = {"object": "an object", "array": "an array", "integer": "a whole number"}
            yield f"{json_path(path)}: must be {names.get(rule, f'a {rule}')}; now it is {kind_of(value)}"
        case "minimum" | "maximum":
            low, high = error.schema.get("minimum"), error.schema.get("maximum")
            yield f"{json_path(path)}: {value} is out of range; use {low} to {high}"
        case "pattern" if path and isinstance(path[-1], str) and path[-1].endswith("Env"):
            yield (
                f"{json_path(path)}: must be the name of an environment variable (A-Z, 0-9, _); "
                "a secret never stands in the file"
            )
        case "pattern" if "headers" in path:
            what = "name" if path[-1] == "headers" else "value"
            yield f"{json_path(path)}: holds a header {what} that HTTP does not allow (RFC 9110); mend it"
        case "pattern" | "not" if path and path[-1] == "labels":
            yield (
                f"{json_path([*path, value])}: a label's name is of A-Z a-z 0-9 _, begins with no digit, "
                f"and is none of {', '.join(ALERT_LABELS)}, which each alert has anyway; rename it"
            )
        case "pattern" | "maxLength" if "propertyNames" in error.absolute_schema_path:
            yield f"{json_path([*path, value])}: a sink id is 1 to 64 of A-Z a-z 0-9 . _ -; rename it"
        case "minProperties":
            yield f"{json_path(path)}: at least one sink is needed; add one"
        case "minLength":
            yield f"{json_path(path)}: must not be empty; fill it in or leave the key out"
        case "maxLength":
            yield f"{json_path(path)}: is longer than {rule} characters; shorten it"
        case _:
            yield f"{json_path(path)}: breaks the rule {error.validator} {json.dumps(rule)}; mend it"


def nearest(word: object, known: Sequence[str]) -> str | None:
    """Which of the known words was probably meant; None where nothing is near."""
    from difflib import get_close_matches

    known = known[:MAX_KNOWN]
    near = get_close_matches(str(word).lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    if near:
        return next(item for item in known if item.lower() == near[0])
    return normalise_severity(word) if set(known) == set(SEVERITIES) else None


def suggest(word: object, known: Sequence[str]) -> str:
    """`did you mean …?`, or what is known where nothing is near."""
    near = nearest(word, known)
    if near:
        return f"did you mean {near!r}?"
    more = ", …" if len(known) > MAX_KNOWN else ""
    return f"known here: {', '.join(known[:MAX_KNOWN]) or 'none'}{more}"


def show_value(value: object) -> str:
    """A short value as it stands in the config; what may be a secret, or is long, by its kind only."""
    if isinstance(value, str | int | float | bool) and len(str(value)) <= 40 and "://" not in str(value):
        return json.dumps(value, ensure_ascii=False)
    return kind_of(value)


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def check_references(document: JsonObject) -> Iterator[str]:
    """Find references to sinks that are not there, and what else needs a look at two keys at once."""
    sinks, routing = document.get("sinks"), document.get("routing")
    if isinstance(sinks, dict) and sinks and isinstance(routing, dict):
        lists: list[tuple[list[str | int], object]] = [(["defaultSinks"], routing.get("defaultSinks"))]
        routes = routing.get("routes")
        for index, route in enumerate(routes if isinstance(routes, list) else []):
            if isinstance(route, dict):
                lists.append((["routes", index, "sinks"], route.get("sinks")))
        for place, names in lists:
            for index, name in enumerate(names if isinstance(names, list) else []):
                if isinstance(name, str) and name not in sinks:
                    path = json_path(["routing", *place, index])
                    yield f"{path}: there is no sink {name!r}; {suggest(name, list(sinks))}"
    delivery = document.get("delivery")
    backoff = delivery.get("backoffSeconds") if isinstance(delivery, dict) else None
    if isinstance(backoff, dict):
        initial, maximum = backoff.get("initial"), backoff.get("max")
        if isinstance(initial, int | float) and isinstance(maximum, int | float) and initial > maximum:
            yield f"$.delivery.backoffSeconds: initial {initial} is more than max {maximum}; swap them"


# RFC 9110, sections 6 to 11: what frames the message, names its receiver or proves who we are. The program
# sets these itself, or they must not be sent.
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
    """Find configured headers that would break a request, or that hold what must not stand in the file."""
    for sink_id, sink in mapping(document.get("sinks")).items():
        seen: set[str] = set()
        for name, value in mapping(mapping(sink).get("headers")).items():
            place = json_path(["sinks", sink_id, "headers", name])
            lower = name.lower()
            if lower in seen:
                yield f"{place}: stands twice, in another case; take one out"
            seen.add(lower)
            if re.search(SENSITIVE_HEADER, lower):
                yield (
                    f"{place}: holds a secret, which never stands in the file; name its environment variable "
                    "in authTokenEnv, which is sent as Authorization: Bearer …"
                )
            elif lower in OWN_HEADERS or lower.startswith("webhook-"):
                yield f"{place}: is set by the program alone; take it out"
            elif lower == "content-type" and not re.fullmatch(JSON_TYPE, str(value).strip().lower()):
                yield f"{place}: is always application/json; take it out"


def check_secrets(document: JsonObject, environ: Mapping[str, str]) -> list[str]:
    """Find the secrets of enabled sinks that are unset or unusable. No fault ever shows a value.

    The document may be invalid elsewhere: all faults are to be told at once.
    """
    unset: dict[str, list[str]] = {}
    faults: list[str] = []
    for sink_id, sink in mapping(document.get("sinks")).items():
        settings = mapping(sink)
        if settings.get("enabled") is not True:
            continue
        for key, name in settings.items():
            if not key.endswith("Env") or key.startswith("x-") or not isinstance(name, str):
                continue
            if not is_env_name(name):
                continue  # the schema has told already
            if not environ.get(name):
                unset.setdefault(name, []).append(json_path(["sinks", sink_id, key]))
            else:
                parts = secret_parts(settings.get("type"), key, environ[name])
                found = dict.fromkeys(check_secret(key, part, settings) for part in parts)
                faults += [
                    f"{json_path(['sinks', sink_id, key])}: the value of {name} {fault}"
                    for fault in found
                    if fault
                ]
    if unset:
        places = {name: ", ".join(sorted(found)) for name, found in sorted(unset.items())}
        place = "$.sinks" if len(unset) > 1 else next(iter(places.values()))
        faults.append(f"{place}: enabled sink secret env var(s) are unset: {' '.join(places)}")
        if len(unset) > 1:
            faults += [f"{found}: {name} is unset or empty; set it" for name, found in places.items()]
    return faults


def secret_parts(sink_type: object, key: str, value: str) -> list[str]:
    """What the value of a `…Env` key holds: one secret, or the base URLs of an Alertmanager's peers."""
    if (sink_type, key) != ("alertmanager", "urlEnv"):
        return [value]
    peers = dict.fromkeys(part.strip().rstrip("/") for part in value.split(","))
    return [peer for peer in peers if peer] or [value]


def check_secret(key: str, value: str, settings: JsonObject) -> str | None:
    """Say what is wrong with the value of a `…Env` key; None where nothing is."""
    if key == "signingSecretEnv":
        wrong = (
            "is not whsec_ and base64 (several, while a key is rotated: a space between them); set it again"
        )
        return None if signing_keys(value) else wrong
    if key == CA_FILE_KEY:
        return check_ca_file(value)
    if not value.isascii() or not value.isprintable() or " " in value:
        return "holds a space, a line break or another character that cannot be sent; set it again"
    return check_url(value, settings) if key.lower().endswith("urlenv") else None


def check_ca_file(name: str) -> str | None:
    """Say what is wrong with a file of CA certificates; None where nothing is."""
    import ssl

    try:
        if not os.path.isfile(name):
            return "is not the path of a file; set it to that of a PEM file with CA certificates"
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=name)
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        return "is not the path of a readable PEM file with CA certificates; set it to that of one"
    return None


# RFC 3986, section 3. Of the authority stricter than what readers of URLs take: they do not agree on what
# lies beyond it. Done without urllib.parse, whose import costs a twenty-fifth of an idle pass.
URL = r"(?P<scheme>https?)://(?P<authority>[^/?#]*)[^?#]*(?P<beyond_path>[?#].*)?"
AUTHORITY = (
    r"(?:(?P<userinfo>[A-Za-z0-9._~!$&'()*+,;=:%-]*)@)?"
    r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
)


def check_url(value: str, settings: JsonObject) -> str | None:
    """Say what is wrong with the URL of a sink; None where nothing is."""
    url = re.fullmatch(URL, value, re.IGNORECASE)
    if url is None:
        return "is not an https:// URL; set it to https://…"
    if settings.get("type") == "alertmanager" and url["beyond_path"]:
        return "is a URL with a # or ?, which cannot be right here; set it to https://HOST/…"
    if re.fullmatch(r"(.*@)?(:.*)?", url["authority"]):
        return "is a URL without a host; set it to https://HOST/…"
    if re.search("%(?![0-9A-Fa-f]{2})", value):
        return "holds a % that begins no escape; write that character as %25"
    authority = re.fullmatch(AUTHORITY, url["authority"])
    if authority is None or not 0 < int(authority["port"] or 1) < 1 << 16 or not is_host(authority["host"]):
        return "is a URL whose host or port cannot be right; set it to https://HOST/… or https://HOST:PORT/…"
    plain = url["scheme"].lower() == "http"
    if plain and not is_loopback(authority["host"]) and not settings.get("allowInsecureHttp"):
        return (
            "is an http:// URL of another machine: alerts and credentials would travel in the clear; set it "
            'to https://…, or accept that with "allowInsecureHttp": true on the sink'
        )
    if authority["userinfo"] is not None:
        if ":" not in authority["userinfo"]:
            return "holds a user name without a password; set it to https://USER:PASSWORD@HOST/…"
        if "authTokenEnv" in settings:
            return "holds a user name, and authTokenEnv is set as well: only one can be sent; take one out"
    return None


def is_host(host: str) -> bool:
    """Tell whether the host of a URL can be one: an address in brackets is of IP version 6."""
    if not host.startswith("["):
        return True
    from ipaddress import IPv6Address

    try:
        IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


def is_loopback(host: str | None) -> bool:
    """Tell whether the host of a URL is this machine: 127.0.0.0/8, ::1, localhost."""
    name = (host or "").strip("[]").lower()
    numbers = name.split(".")
    if len(numbers) == 4 and all(re.fullmatch("0|[1-9][0-9]{0,2}", number) for number in numbers):
        return numbers[0] == "127" and all(int(number) < 256 for number in numbers)
    return name in ("localhost", "::1", "0:0:0:0:0:0:0:1")


def config_warnings(config: Config) -> list[str]:
    """What is valid in a config and hardly meant, with its place: sinks and routes that lead nowhere."""
    routing = config.routing
    enabled = {sink.id for sink in config.sinks.values() if sink.enabled}
    if not enabled:
        return ["$.sinks: no sink is enabled: nothing is sent"]
    warnings: list[str] = []
    led_to: set[str] = set(routing["defaultSinks"])
    if not led_to & enabled:
        why = "no sink of it is enabled: what has no route of its own reaches nobody"
        warnings.append(f"$.routing.defaultSinks: {why}")
    first: dict[str, int] = {}
    for index, route in enumerate(routing.get("routes", [])):
        if not route.get("enabled", True):
            continue
        place, category = f"$.routing.routes[{index}]", printable(route["category"])
        if (earlier := first.setdefault(route["category"], index)) != index:
            warnings.append(f"{place}: never used: routes[{earlier}] has the same category {category!r}")
            continue
        sinks = set(route.get("sinks") or routing["defaultSinks"])
        led_to |= sinks
        if not sinks & enabled:
            warnings.append(f"{place}: no sink of it is enabled: {category!r} reaches nobody")
    return warnings + [
        f"{json_path(['sinks', sink_id])}: the sink is enabled, and no route leads to it"
        for sink_id in sorted(enabled - led_to)
    ]


# ---------------------------------------------------------------------------------------------------------
# Source: the escalations file as an append-only log, through rotations
# ---------------------------------------------------------------------------------------------------------

READ_CHUNK = 1 << 17
# A record beyond this is put on record as too large instead of being held in memory.
MAX_RECORD_BYTES = 32 << 20
# How much of a first line stands for the file, and how much before an offset proves that it is still ours.
HEAD_BYTES = 4096
TAIL_BYTES = 256
# A writer that is still in a rotated file gets this long to finish its last line.
ROTATED_TAIL_GRACE = 10.0
# The clock by which a file system notes when a file was written to lags behind ours by no more than this.
COARSE_SECONDS = 1.0
# So many files that were read to their end are told from new ones, whatever time they bear.
FORGOTTEN_MAX = 64
# A file that a rotation moves while its folder is listed is looked for again.
FIND_TRIES = 3


class Position(NamedTuple):
    """A place between two lines of the log: the segment's number, bytes and lines before it there."""

    segment: int
    offset: int
    line: int


class Record(NamedTuple):
    """One line of the log without its line feed. `size` is the line's true size where it was too large."""

    start: Position
    end: Position
    line: bytes
    size: int


def short_hash(data: bytes) -> str:
    """Eight bytes of BLAKE2 as hexadecimal digits: names content, hides none."""
    return blake2b(data, digest_size=8).hexdigest()


def fingerprint(descriptor: int) -> str | None:
    """Name a file by its first line that is not blank, which never changes. None until it is complete."""
    head = os.pread(descriptor, HEAD_BYTES, 0)
    first, newline, _ = head.lstrip(b"\0 \t\r\n").partition(b"\n")
    return short_hash(first) if newline or len(head) == HEAD_BYTES else None


def file_identity(descriptor: int) -> tuple[int, int]:
    """Device and inode of an open file."""
    return identity_of(os.fstat(descriptor))


def identity_of(found: os.stat_result) -> tuple[int, int]:
    """Device and inode, from what the file system says of a file."""
    return found.st_dev, found.st_ino


# In place of a fingerprint: a file that was rotated before its first line was complete. Its inode tells.
NAMELESS = short_hash(b"")


def tail_hash(descriptor: int, offset: int) -> str:
    """Name what stands just before an offset."""
    start = max(0, offset - TAIL_BYTES)
    return short_hash(os.pread(descriptor, offset - start, start))


def end_of_lines(descriptor: int, size: int) -> int:
    """The offset after the last line feed within `size` bytes; 0 where there is none."""
    while size > 0:
        start = max(0, size - READ_CHUNK)
        found = os.pread(descriptor, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


def read_lines(read: Callable[[int, int], bytes], start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Stream the lines of a range: line (cut at MAX_RECORD_BYTES), its true size, the offset after it.

    `read` gives at most so many bytes from an offset on. What stands after the last line feed of the range
    counts as a line: the caller chooses ranges that end where a line does, or in a file that nobody writes
    any more.
    """
    pieces: list[bytes] = []
    size, kept, at = 0, 0, start
    while at < stop:
        chunk = read(min(READ_CHUNK, stop - at), at)
        if not chunk:
            return  # truncated under our hands
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            size += len(piece)
            if kept < MAX_RECORD_BYTES:
                pieces.append(piece)
            start += size + 1
            yield b"".join(pieces) if len(pieces) > 1 else (pieces[0] if pieces else b""), size, start
            pieces, size, kept = [], 0, 0
        size += len(rest)
        if rest and kept < MAX_RECORD_BYTES:
            pieces.append(rest)
            kept += len(rest)
        at += len(chunk)
    if size:
        yield b"".join(pieces), size, stop


def count_from_json(value: object) -> int:
    """Read a size, an inode or a count: 0 or more, in 64 bits. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError("no size, inode or count")
    return value


class Segment:
    """One file of the log. Its name is a number and a fingerprint, for instance `2-9f86d081884c7d65`."""

    def __init__(
        self,
        number: int,
        fingerprint: str,
        device: int = 0,
        inode: int = 0,
        offset: int = 0,
        tail: str = "",
    ) -> None:
        self.number = number
        self.fingerprint = fingerprint
        self.device = device
        self.inode = inode
        # Up to where it was taken up, and a hash of what stands before that place.
        self.offset = offset
        self.tail = tail
        # What waits in it is on record as lost, because it was not to be found.
        self.lost = False
        # Known once it is found on disk in this pass: where its lines end, and what stands before there.
        self.descriptor: int | None = None
        self.stop = 0
        self.stop_tail = ""
        self.growing = False

    @property
    def name(self) -> str:
        return f"{self.number}-{self.fingerprint}"

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """Read what `to_json` wrote. Raises one of MALFORMED for anything else."""
        number, mark = parse_segment_name(value["name"])
        device, inode, offset = (count_from_json(value[key]) for key in ("device", "inode", "offset"))
        segment = cls(number, mark, device, inode, offset, str(value["tail"]))
        segment.lost = value.get("lost") is True
        return segment

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "device": self.device,
            "inode": self.inode,
            "offset": self.offset,
            "tail": self.tail,
            **({"lost": True} if self.lost else {}),
        }

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file that held it last."""
        return self.device, self.inode

    def is_in(self, descriptor: int) -> bool:
        """Tell whether an open file holds this segment: the same first line, and all that was taken up."""
        return self._reaches(descriptor, self.offset, self.tail)

    def is_whole_in(self, descriptor: int) -> bool:
        """Tell whether an open file holds this segment as far as it is read in this pass."""
        return self._reaches(descriptor, self.stop, self.stop_tail)

    def _reaches(self, descriptor: int, offset: int, tail: str) -> bool:
        if self.fingerprint == NAMELESS:
            same = file_identity(descriptor) == self.identity
        else:
            same = fingerprint(descriptor) == self.fingerprint
        return (
            same
            and os.fstat(descriptor).st_size >= offset
            and (not tail or tail_hash(descriptor, offset) == tail)
        )

    def attach(self, descriptor: int) -> bool:
        """Read from this open file in this pass, if it holds this segment; tells whether it does.

        What is appended later belongs to the next pass.
        """
        size = os.fstat(descriptor).st_size
        stop = end_of_lines(descriptor, size)
        tail = tail_hash(descriptor, stop)
        if not self.is_in(descriptor):  # asked last: it may just have been truncated
            return False
        self.descriptor, self.stop, self.stop_tail, self.growing = descriptor, stop, tail, stop < size
        self.device, self.inode = file_identity(descriptor)
        if self.fingerprint == NAMELESS:
            self.fingerprint = fingerprint(descriptor) or NAMELESS
        return True

    def finish(self) -> bool:
        """Take a rotated file's unterminated last line for complete, once nobody can be writing it."""
        if self.growing and self.descriptor is not None:
            found = os.fstat(self.descriptor)
            if abs(time.time() - found.st_mtime) < ROTATED_TAIL_GRACE:
                return False
            self.stop, self.stop_tail = found.st_size, tail_hash(self.descriptor, found.st_size)
        return True


def parse_segment_name(name: str) -> tuple[int, str]:
    """Split a segment's name. Raises ValueError where it is none."""
    number, dash, mark = name.partition("-")
    if not dash or not mark:
        raise ValueError(f"no segment name: {name!r}")
    return int(number), mark


class Neighbour(NamedTuple):
    """A file in which a segment may be: device and inode, size in bytes, when it was last written to in
    seconds since the epoch. `key` orders those that a rotation has named."""

    path: str
    key: tuple[int, str] | None
    identity: tuple[int, int]
    size: int
    written: float


def rotation_names(files: Iterable[Neighbour]) -> list[tuple[str, tuple[int, int]]]:
    """Which file has which of the names that rotations give."""
    return [(file.path, file.identity) for file in files if file.key]


class Source:
    """The log that the host appends to: its current file, and rotated ones that are not read to their end.

    Files are held open for a pass, so that a rotation in its middle changes nothing. `stop` is where the
    complete lines end that were there when the pass began.
    """

    def __init__(
        self,
        path: str,
        segments: Iterable[Segment] = (),
        seen_at: float | None = None,
        forgotten: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.segments = list(segments)
        # The fingerprints of files that were read to their end; the latest comes last.
        self.forgotten = list(forgotten)
        # When a pass has last accounted for what was there, and when this one looks: seconds since the epoch.
        self._seen_at = seen_at
        self.opened_at = 0.0
        self.present = False
        self.change: str | None = None
        self.stop = Position(0, 0, 0)
        # The file at the source's own path; None where nothing complete stands there.
        self.current: Segment | None = None
        # Neighbours that are younger than the last file that was read, and whose names say nothing.
        self.unread: list[str] = []
        # Held by whoever reads, and may find that a file was truncated.
        self._reading = threading.Lock()

    def __enter__(self) -> Self:
        self.opened_at = time.time()
        try:
            self._locate()
        except OSError as error:
            self.__exit__()
            raise storage_error("read", self.path, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        for segment in self.segments:
            if segment.descriptor is not None:
                os.close(segment.descriptor)
                segment.descriptor = None

    def _locate(self) -> None:
        descriptor = self._open(self.path)
        self.present = descriptor is not None
        last = self.segments[-1] if self.segments else None
        if descriptor is not None and last is not None and file_identity(descriptor) == last.identity:
            last.attach(descriptor)
        may_have_moved = self._missing() or (last is None and self._seen_at is not None)
        newer = self._find_rotated(descriptor) if may_have_moved else []
        if last is not None and last.descriptor is not None and last.descriptor == descriptor:
            self.current = last
        for found in newer:
            self._append(found)
        if descriptor is not None and self.current is None:
            if last is not None:
                same_file = os.fstat(descriptor).st_ino == last.inode and last.descriptor is None
                found_again = last.descriptor is not None
                self.change = "truncated" if same_file else "rotated" if found_again else "replaced"
            if fingerprint(descriptor):
                self.current = self._append(descriptor)
            else:
                os.close(descriptor)
        for segment in self.segments:
            if segment.descriptor is None:
                continue
            finished = segment is self.current or segment.finish()
            self.stop = Position(segment.number, segment.stop, 0)
            if not finished:
                break

    def _append(self, descriptor: int) -> Segment | None:
        """Read on in an open file; None where it has just been truncated: that is for the next pass."""
        number = self.segments[-1].number + 1 if self.segments else 1
        segment = Segment(number, fingerprint(descriptor) or NAMELESS, *file_identity(descriptor))
        if not segment.attach(descriptor):
            os.close(descriptor)
            return None
        self.segments.append(segment)
        return segment

    def _missing(self) -> list[Segment]:
        """The segments that are not at hand."""
        return [segment for segment in self.segments if segment.descriptor is None]

    def _find_rotated(self, current: int | None) -> list[int]:
        """Find the segments that are not at hand under whatever names they have now.

        Returns the files that were rotated after the last known one, open, oldest first. Raises OSError.
        """
        newest = self.segments[-1] if self.segments else None
        for _ in range(FIND_TRIES):
            files = self._look_around(current)
            self._match(files, current)
            since: list[Neighbour] = []
            if newest is None or newest.descriptor is None:
                since = self._written_since(files)
            elif newest.descriptor != current:
                since = self._rotated_since(newest, files)
            newer = [found for file in since if (found := self._open_as(file)) is not None]
            # A rotation that comes in between moves what was looked at.
            if rotation_names(self._look_around(current)) == rotation_names(files):
                return newer
            for descriptor in newer:
                os.close(descriptor)
        raise OSError(errno.EBUSY, "it is being rotated, again and again")

    def _match(self, files: Sequence[Neighbour], current: int | None) -> None:
        """Read segments that are not at hand from the files that hold them, in the order of likeness: a file
        that was renamed is the same file; one that was replaced or copied holds the same. A copy that
        somebody made is not taken for the rotated file, which holds more."""
        here = [] if current is None else [Neighbour(self.path, None, file_identity(current), 0, 0.0)]

        def likeness(pair: tuple[Segment, Neighbour]) -> int:
            segment, file = pair
            if file in here:
                return 1
            return (0 if file.key else 2) if file.identity == segment.identity else (3 if file.key else 4)

        taken = {segment.identity for segment in self.segments if segment.descriptor is not None}
        for segment, file in sorted(
            itertools.product(self._missing(), [*here, *reversed(files)]), key=likeness
        ):
            if segment.descriptor is not None or file.identity in taken:
                continue
            if file in here and segment is not self.segments[-1]:
                continue
            descriptor = current if file in here else self._open_as(file)
            if descriptor is not None and segment.is_in(descriptor) and segment.attach(descriptor):
                taken.add(file.identity)
            elif descriptor is not None and descriptor != current:
                os.close(descriptor)

    def _written_since(self, files: Sequence[Neighbour]) -> list[Neighbour]:
        """The rotated files, oldest first, that no pass can have seen, where the last known file is not to be
        found, or there was none: they were written to since, and are no copies of a known one."""
        held = {segment.identity for segment in self.segments if segment.descriptor is not None}
        known = {*self.forgotten, *(segment.fingerprint for segment in self.segments)}
        unseen: list[Neighbour] = []
        for file in files:
            is_new = self._seen_at is not None and file.written > self._seen_at - COARSE_SECONDS
            if not file.key or not file.size or not is_new or file.identity in held:
                continue
            descriptor = self._open_as(file)
            if descriptor is not None:
                if fingerprint(descriptor) not in known:
                    unseen.append(file)
                os.close(descriptor)
        return unseen

    def _rotated_since(self, newest: Segment, files: Sequence[Neighbour]) -> list[Neighbour]:
        """The files that were rotated after the last known one, oldest first: those of a logrotate numbering
        (`.1` is newer than `.2`) or dating (`-20260131`) scheme, and no other neighbour. Where the numbers go
        up with time, an older file has the smaller one: it was not written to later, either."""
        last = next((file for file in files if file.identity == newest.identity), None)
        held = {segment.identity for segment in self.segments if segment.descriptor is not None}
        newer: list[Neighbour] = []
        self.unread = []
        for file in files:
            if last is None or not file.size or file.identity in held:
                continue
            follows = file.key is not None and last.key is not None and file.key > last.key
            is_numbered = file.key is not None and file.key[0] > 0
            if follows and (file.written >= last.written or not is_numbered):
                newer.append(file)
            elif file.path.startswith(f"{last.path}."):  # the same, which is just being compressed
                continue
            elif file.written > last.written or (file.key is None and file.written == last.written):
                self.unread.append(os.path.basename(file.path))
        return newer

    def _look_around(self, current: int | None) -> list[Neighbour]:
        """The neighbours of the source, and of the file that it is a link to, each file once."""
        files: list[Neighbour] = []
        seen = set() if current is None else {file_identity(current)}
        for path, key in neighbours(self.path, os.path.realpath(self.path)).items():
            found = None
            with contextlib.suppress(OSError):
                found = os.stat(path)
            if found is None or not stat.S_ISREG(found.st_mode) or identity_of(found) in seen:
                continue
            seen.add(identity_of(found))
            files.append(Neighbour(path, key, identity_of(found), found.st_size, found.st_mtime))
        return files

    def _open_as(self, file: Neighbour) -> int | None:
        """Open a neighbour; None where another file has its name by now, or it may not be read."""
        descriptor = self._open(file.path)
        if descriptor is not None and file_identity(descriptor) != file.identity:
            os.close(descriptor)
            return None
        return descriptor

    def _open(self, path: str) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if path == self.path or error.errno in (errno.EMFILE, errno.ENFILE):  # it may be there
                raise
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            if path == self.path:
                raise OSError(errno.EINVAL, "not a regular file")
            return None
        return descriptor

    def first(self) -> Position:
        """The place before everything that is there now: where a dispatcher without a past begins."""
        return Position(self.segments[0].number if self.segments else 1, 0, 0)

    def segment(self, number: int) -> Segment | None:
        """The segment of this number, where it is known."""
        return next((segment for segment in self.segments if segment.number == number), None)

    def name_of(self, position: Position) -> str:
        """The name of the segment that a position is in."""
        segment = self.segment(position.segment)
        return segment.name if segment else f"{position.segment}-"

    def readable_from(self, position: Position) -> Position | None:
        """Where reading goes on when the file of this position is gone for good; None while it is not."""
        for segment in self.segments:
            if segment.number >= position.segment and segment.descriptor is not None:
                return None if segment.number == position.segment else Position(segment.number, 0, 0)
        return None

    def is_at_hand(self, start: Position) -> bool:
        """Tell whether all that stands after a place can be read, but for what is on record as lost."""
        return all(
            segment.descriptor is not None or segment.lost
            for segment in self.segments
            if segment.number >= start.segment
        )

    def read(self, start: Position, stop: Position | None = None) -> Iterator[Record]:
        """Stream the complete lines between two places.

        Raises StorageError when the disk fails, or where a file was truncated and no copy is to be found.
        """
        for segment, begin, limit in self._stretches(start, stop):
            at = begin
            for line, size, offset in read_lines(functools.partial(self._pread, segment), at.offset, limit):
                end = Position(segment.number, offset, at.line + 1)
                yield Record(at, end, line, size)
                at = end

    def _pread(self, segment: Segment, size: int, offset: int) -> bytes:
        """Read from a segment what stood there when the pass began. A file that was truncated since is read
        from the copy that was made of it before (logrotate: copytruncate). Raises StorageError."""
        descriptor = cast("int", segment.descriptor)
        try:
            with self._reading:
                while True:
                    data = os.pread(descriptor, size, offset)
                    if segment.is_whole_in(descriptor):  # asked afterwards: then it was, too
                        return data
                    self._take_copy(segment, descriptor)
        except OSError as error:
            raise storage_error("read", self.path, error) from None

    def _take_copy(self, segment: Segment, descriptor: int) -> None:
        """Let the descriptor of a segment that was truncated refer to a copy of it. Raises OSError."""
        for file in reversed(self._look_around(descriptor)):
            copy = self._open_as(file)
            if copy is None:
                continue
            is_it = segment.is_whole_in(copy)
            if is_it:
                os.dup2(copy, descriptor, inheritable=False)
                segment.device, segment.inode = file.identity
            os.close(copy)
            if is_it:
                return
        raise OSError(errno.ESTALE, "it was truncated while it was read, and no copy of it is beside it")

    def count_lines(self, start: Position, stop: Position | None = None) -> int:
        """Count the complete lines between two places, at the speed of the disk."""
        count = 0
        for segment, at, limit in self._stretches(start, stop):
            offset = at.offset
            while offset < limit:
                chunk = os.pread(cast("int", segment.descriptor), min(1 << 20, limit - offset), offset)
                if not chunk:
                    break
                count += chunk.count(b"\n")
                offset += len(chunk)
        return count

    def _stretches(self, start: Position, stop: Position | None) -> Iterator[tuple[Segment, Position, int]]:
        """The segments between two places that are at hand, and of each from where to which offset."""
        stop = stop or self.stop
        for segment in self.segments:
            if start.segment <= segment.number <= stop.segment and segment.descriptor is not None:
                at = start if segment.number == start.segment else Position(segment.number, 0, 0)
                yield segment, at, stop.offset if segment.number == stop.segment else segment.stop

    def mark_taken_up(self, position: Position) -> None:
        """Note in the segments up to where they were taken up, and what stands before those places."""
        for segment in self.segments:
            if segment.descriptor is None or segment.number > position.segment:
                continue
            offset = position.offset if segment.number == position.segment else segment.stop
            if offset != segment.offset or not segment.tail:
                start = max(0, offset - TAIL_BYTES)
                with contextlib.suppress(StorageError):  # what was noted before names it as well
                    tail = short_hash(self._pread(segment, offset - start, start))
                    segment.offset, segment.tail = offset, tail

    def forget_before(self, number: int) -> None:
        """Forget segments that nobody reads any more."""
        for segment in [s for s in self.segments[:-1] if s.number < number]:
            if segment.descriptor is not None:
                os.close(segment.descriptor)
            self.segments.remove(segment)
            self.forgotten = [*self.forgotten, segment.fingerprint][-FORGOTTEN_MAX:]


def unterminated(path: str) -> tuple[int, float]:
    """How many bytes follow the last line feed of a file, and when it was written to. Raises StorageError."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            return found.st_size - end_of_lines(file.fileno(), found.st_size), found.st_mtime
    except FileNotFoundError:
        return 0, 0.0
    except OSError as error:
        raise storage_error("read", path, error) from None


def rotation_key(base: str, name: str) -> tuple[int, str] | None:
    """Order rotated files, oldest first; None for a neighbour that no rotation made.

    `base.3` < `base.2` < `base.1`; `base-20260101` < `base-20260102`, in any usual form of a date, and with
    the extension last, too. Compressed ones do not count.
    """
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
        return (0, suffix)
    return None


def neighbours(*paths: str) -> dict[str, tuple[int, str] | None]:
    """The paths beside these files whose names begin as theirs do, or that a rotation has given, with their
    rotation keys: those without one first, then the oldest rotation first. Raises OSError."""
    keys: dict[str, tuple[int, str] | None] = {}
    for path in dict.fromkeys(paths):
        folder, base = os.path.split(path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            for name in os.listdir(folder):
                key = rotation_key(base, name)
                if name != base and (key or name.startswith(base)):
                    keys[os.path.join(folder, name)] = key
    return dict(sorted(keys.items(), key=lambda item: (item[1] or (-1, ""), item[0])))


# ---------------------------------------------------------------------------------------------------------
# Escalation: what a line says
# ---------------------------------------------------------------------------------------------------------

# What is kept of a line that is no escalation.
RAW_LINE_CHARACTERS = 10_000


# What the config routes by: category, and the record's own severity.
Kind = tuple[str, str | None]


class Escalation(NamedTuple):
    """One record. `severity` is the normalised one; `unknown_severity` the word that nobody knows."""

    id: str
    category: str
    loop_id: str
    trace_id: str | None
    timestamp: str | None
    severity: str | None
    unknown_severity: str | None
    body: JsonObject

    @property
    def kind(self) -> Kind:
        """What the config routes it by."""
        return self.category, self.severity

    @property
    def written_at(self) -> str | None:
        """The timestamp where it is a time: what may stand in the state, in a message, on a terminal."""
        return self.timestamp if parse_time(self.timestamp) is not None else None


# Why a line is no escalation; a blank one is none, either, and nothing is amiss with it.
UNUSABLE = {"invalid_escalation_json", "missing_escalation_category", "escalation_too_large"}


class Unusable(NamedTuple):
    """A line that cannot be routed, why, and the line as text, or the record that has no category."""

    id: str
    reason_code: str
    raw_line: str
    body: JsonObject | None
    message: str | None = None


def escalation_id(loop_id: str, line: bytes) -> str:
    """The idempotency key: derived from the loop and the record's bytes alone, the same on every try."""
    from hashlib import sha256

    return "esc_" + sha256(loop_id.encode("utf-8", "surrogateescape") + b"\0" + line).hexdigest()[:32]


def as_text(value: object) -> str | None:
    """Normalise a field to text; None where there is nothing in it."""
    if value is None:
        return None
    text = value if isinstance(value, str) else encode_json(value).decode()
    return text.strip() or None


def parse_escalation(record: Record, loop_id: str) -> Escalation | Unusable:
    """Read one line of the source.

    A byte order mark, NUL bytes around the line (holes that a crash leaves) and a carriage return are passed
    over; bytes that are not UTF-8 become U+FFFD. Odd fields never make a record unusable.
    """
    line = record.line.removeprefix(BYTE_ORDER_MARK).strip(b"\0 \t\r\n\v\f")
    identity = escalation_id(loop_id, line)
    if not line:
        return Unusable(identity, "blank_line", "", None)
    text = line.decode("utf-8", "replace")
    raw_line = cut(text, RAW_LINE_CHARACTERS)
    if record.size > MAX_RECORD_BYTES:
        return Unusable(identity, "escalation_too_large", raw_line, None)
    try:
        body = decode_json(text)
    except json.JSONDecodeError as error:
        why = f"not JSON at column {error.colno}: {error.msg}"
        return Unusable(identity, "invalid_escalation_json", raw_line, None, why)
    except TooDeepError as error:
        return Unusable(identity, "invalid_escalation_json", raw_line, None, str(error))
    if not isinstance(body, dict):
        return Unusable(identity, "invalid_escalation_json", raw_line, None, "not an object")
    category = as_text(body.get("category"))
    if category is None:
        return Unusable(identity, "missing_escalation_category", raw_line, body)
    word = as_text(body.get("severity"))
    severity = normalise_severity(word)
    return Escalation(
        id=identity,
        category=category,
        loop_id=as_text(body.get("loopId")) or loop_id,
        trace_id=as_text(body.get("traceId")),
        timestamp=as_text(body.get("timestamp")),
        severity=severity,
        unknown_severity=word if severity is None else None,
        body=body,
    )


# A value of a record is shown to people with at most this many characters, so that a long one leaves room for
# the others; then a line with all its values.
SHOWN_CHARACTERS = 200
SHOWN_LINE = 500


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """A field as a person is shown it: one line of at most `limit` characters, empty if it says nothing."""
    return cut(printable(as_text(value) or "").strip(), limit)


def shown_list(values: object) -> list[str]:
    """The items of a list, each as it is shown; of anything else none."""
    return [text for value in values if (text := shown(value))] if isinstance(values, list) else []


def reason_codes(escalation: Escalation) -> list[str]:
    """The reason codes of a record as they are shown, whichever of the host's writers made it."""
    body = escalation.body
    found = [
        *shown_list(body.get("reasonCodes")),
        shown(body.get("reasonCode")),
        shown(body.get("failureCode")),
    ]
    return list(dict.fromkeys(code for code in found if code and code != escalation.category))


# Fields that are read by name, and those that every record has. Like the names of the host's files (`…File`),
# what is left of the former is no news to a person, unless there is nothing else.
READ_FIELDS = {
    *("reasonCodes", "reasonCode", "reasons", "divergenceFlags", "state", "sequence", "drift", "cursor"),
    *("ingestStatus", "healthStatus", "failureCode"),
}
COMMON_FIELDS = {"timestamp", "loopId", "traceId", "category", "transport", "severity"}


def explain(escalation: Escalation) -> list[str]:
    """Say in short lines what a person needs to know of a record, worst news first; at least one line.

    Reads what the category carries: reasons with observed and threshold, divergence flags, sequence
    violations, drift advice; then any other field, so that a category nobody knows says something.
    """
    body = escalation.body
    reasons = body.get("reasons")
    reasons = reasons if isinstance(reasons, list) else []
    lines = [explain_reason(reason) for reason in reasons]
    told = {shown(reason.get("code") if isinstance(reason, dict) else reason) for reason in reasons}
    flags = mapping(body.get("divergenceFlags"))
    if raised := [shown(name) or "?" for name, value in flags.items() if value is True]:
        lines.append(f"divergence: {', '.join(raised)}")
    transition = mapping(mapping(body.get("state")).get("transition"))
    if current := shown(transition.get("currentState")):
        before, cause = shown(transition.get("previousState")), shown(transition.get("triggeringSignal"))
        lines.append(f"state: {before or '?'} → {current}" + (f" on {cause}" if cause else ""))
    sequence = mapping(body.get("sequence"))
    if violations := shown_list(sequence.get("violations")):
        lines.append(f"violations: {', '.join(violations)}")
    told |= {*violations, shown(body.get("failureCode"))}
    for part, before_key, now_key in (
        ("snapshot", "previous", "current"),
        ("events", "previousLast", "last"),
    ):
        numbers = mapping(sequence.get(part))
        if numbers.get("regressed") is True:
            before, now = shown(numbers.get(before_key)), shown(numbers.get(now_key))
            lines.append(f"{part} went back: {before or '?'} → {now or '?'}")
    drift = mapping(body.get("drift"))
    if applied := shown(drift.get("appliedProfile")):
        advice = f"profile: {applied} applied, {shown(drift.get('recommendedProfile')) or '?'} recommended"
        confidence = shown(drift.get("recommendationConfidence"))
        lines.append(advice + (f" ({confidence} confidence)" if confidence else ""))
    lines += show_fields({key: drift.get(key) for key in ("rationale", "action")})
    if codes := [code for code in reason_codes(escalation) if code not in told]:
        lines.append(f"reasons: {', '.join(codes)}")
    status = [
        f"{label} {text}"
        for key, label in (("healthStatus", "health"), ("ingestStatus", "ingest"), ("failureCode", "failure"))
        if (text := shown(body.get(key)))
    ]
    if status:
        lines.append(", ".join(status))
    others = {key: value for key, value in body.items() if key not in COMMON_FIELDS}
    lines += show_fields(
        {key: value for key, value in others.items() if key not in READ_FIELDS and not key.endswith("File")}
    )
    lines = lines or show_fields(others) or ["no details in the record"]
    return [cut(line, SHOWN_LINE) for line in lines]


def show_fields(fields: JsonObject) -> list[str]:
    """`freePercent: 3`: a line for each field that is not empty."""
    return [f"{shown(key) or '?'}: {text}" for key, value in fields.items() if (text := shown(value))]


def explain_reason(reason: object) -> str:
    """`ingest_stale: ingestLagSeconds is 1200, threshold 900 (critical)`; any other one as it stands."""
    known = {key: shown(mapping(reason).get(key), SHOWN_CHARACTERS // 2) for key in REASON_KEYS}
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


REASON_KEYS = ("code", "metric", "observed", "threshold", "severity")


# ---------------------------------------------------------------------------------------------------------
# Routing: where an escalation goes
# ---------------------------------------------------------------------------------------------------------


class Resolution(NamedTuple):
    """Where a record of one category and severity goes, and why."""

    category: str
    event_severity: str
    mapped_severity: str | None
    min_severity: str
    should_dispatch: bool
    route: JsonObject
    # The route's sinks; of these the ones whose minimum the severity reaches; and of those the enabled ones.
    selected: tuple[Sink, ...]
    reached: tuple[Sink, ...]
    dispatchable: tuple[Sink, ...]


class Subject(NamedTuple):
    """What repeats of an escalation have in common, as a key, and when this one was written."""

    key: str
    at: str


class HeldBack(NamedTuple):
    """Repeats of an escalation that a sink was not sent: how many, and when the first was written."""

    repeats: int
    since: str


class Delivery(NamedTuple):
    """One escalation on its way to one sink. `late`: it has been put off in an earlier row already."""

    record: Record
    escalation: Escalation
    resolution: Resolution
    late: bool
    # Where repeats are held back: what would be a repeat of this, and the repeats that this speaks for.
    subject: Subject | None = None
    held_back: HeldBack | None = None


class Router:
    """Resolves records to sinks by the rules of the config. Pure: the same question has the same answer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # A record's category is anybody's text: the memory of answers is bounded.
        self.resolve = functools.lru_cache(maxsize=1024)(self._resolve)

    def _resolve(self, category: str, severity: str | None) -> Resolution:
        """Resolve a category and the record's own severity (None: it has none, or an unknown word)."""
        routing = self.config.routing
        match = next(
            (
                route
                for route in routing.get("routes", [])
                if route["category"] == category and route.get("enabled", True)
            ),
            None,
        )
        chosen = match or {}
        sink_ids = list(dict.fromkeys(chosen.get("sinks") or routing["defaultSinks"]))
        minimum = chosen.get("minSeverity", self.config.default_min_severity)
        mapped = routing.get("categorySeverity", {}).get(category)
        event = severity or mapped or minimum
        selected = tuple(self.config.sinks[sink_id] for sink_id in sink_ids)
        should_dispatch = at_least(event, minimum)
        reached = tuple(
            sink for sink in selected if should_dispatch and at_least(event, sink.min_severity or minimum)
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
            },
            selected=selected,
            reached=reached,
            dispatchable=tuple(sink for sink in reached if sink.enabled),
        )

    def route(self, record: Record, loop_id: str, *, late: bool) -> Delivery | Unusable:
        """Read a record of a loop and resolve it. `late`: it was put off in an earlier row."""
        line = parse_escalation(record, loop_id)
        if isinstance(line, Unusable):
            return line
        return Delivery(record, line, self.resolve(line.category, line.severity), late)


def at_least(severity: str, minimum: str) -> bool:
    """Tell whether a severity reaches a minimum."""
    return SEVERITIES.index(severity) >= SEVERITIES.index(minimum)


# ---------------------------------------------------------------------------------------------------------
# Adapters: an escalation in, a request out; an answer in, a verdict out. Pure, no I/O
# ---------------------------------------------------------------------------------------------------------

MESSAGE_CHARACTERS = 300
# RFC 9110, "Retry-After": a delay in seconds, or a date. Nobody is believed for longer than this.
RETRY_AFTER_MAX = 3600.0

Outcome = Literal["delivered", "retry", "misconfigured", "dead_letter", "skipped"]


class Origin(NamedTuple):
    """What every payload says of where it comes from."""

    repo_path: str
    trace_id: str
    emitted_at: float


class HttpRequest(NamedTuple):
    """What a sink is sent: always a POST of a JSON body."""

    url: str
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """What a sink answered: status, headers (names in lower case), and the first 64 KB of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace").strip()


class Verdict(NamedTuple):
    """What an answer, or the lack of one, means.

    `retry`: the sink is not well. `misconfigured`: it will not get better by itself. `dead_letter`: this
    record is not acceptable to this sink. `not_taken`: the sink surely did not act on the request, so that
    trying again at once cannot repeat anything.
    """

    outcome: Outcome
    reason_code: str | None = None
    http_status: int | None = None
    message: str | None = None
    retry_after: float | None = None
    not_taken: bool = False


# A login page, say, or that of a proxy.
WEB_PAGE = "answered with a web page: the URL is not that of such a sink, or something stands before it"

SINK_UNWELL = {408, 425, 429}
RECORD_REFUSED = {400, 413, 422}


def judge_status(answer: Answer, now: float) -> Verdict:
    """Judge an answer by its status alone, as design and RFC 9110 have it."""
    status = answer.status
    message = answer.text or None
    if 200 <= status < 300:
        return Verdict("delivered", None, status, message)
    if status in SINK_UNWELL or status >= 500:
        wait = parse_retry_after(answer.headers.get("retry-after"), now)
        return Verdict("retry", "http_error", status, message, wait, not_taken=True)
    if status in RECORD_REFUSED:
        return Verdict("dead_letter", "http_error", status, message)
    if 300 <= status < 400:
        message = "answered with a redirect, which is never followed: set the URL that it leads to"
    return Verdict("misconfigured", "http_error", status, message)


def judge_api(answer: Answer, now: float) -> Verdict:
    """Judge the answer of a provider, none of which takes an alert with a web page, by its status."""
    verdict = judge_status(answer, now)
    if verdict.outcome == "delivered" and answer.text.startswith("<"):
        return verdict._replace(outcome="misconfigured", reason_code="http_error", message=WEB_PAGE)
    return verdict


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Read a `Retry-After` as seconds from `now`, 0 to RETRY_AFTER_MAX; None where it says nothing.

    RFC 9110, section 10.2.3: delay-seconds or an HTTP-date.
    """
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]+", value):
        seconds = float(value)  # infinite where there are hundreds of digits
    else:
        from email.utils import parsedate_to_datetime

        try:
            moment = parsedate_to_datetime(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_MAX)


class Adapter:
    """What a sink type is sent, and what its answers mean."""

    url_key: ClassVar[str] = "urlEnv"
    default_url: ClassVar[str | None] = None
    # Requests a minute, where the provider limits them and the config does not say.
    max_per_minute: ClassVar[int | None] = None
    # Whether deliveries that are refused together are tried one by one.
    splits: ClassVar[bool] = False

    def url(self, sink: Sink) -> str:
        """Where the sink is; an empty string where its secret is unset."""
        return sink.secrets.get(self.url_key) or self.default_url or ""

    def urls(self, sink: Sink) -> tuple[str, ...]:
        """Every place that a request goes to: the same to each, and delivered when at least one took it."""
        return (self.url(sink),)

    def seconds_to_catch_up(self, sink: Sink) -> float:  # noqa: ARG002
        """For how long after a delivery a peer that has missed it should still get it."""
        return 0.0

    def missing_secrets(self, sink: Sink) -> list[str]:
        """The variables that this sink needs and that are unset."""
        return [name for key, name in sink.secret_refs.items() if key not in sink.secrets]

    def batch_size(self, sink: Sink) -> int:  # noqa: ARG002
        """How many deliveries one request to this sink may hold."""
        return 1

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
        """Turn deliveries, oldest first and at most `batch_size` of them, into one request for this sink."""
        raise NotImplementedError

    def judge(self, answer: Answer, now: float) -> Verdict:
        """Turn an answer into a verdict."""
        return judge_status(answer, now)


class WebhookAdapter(Adapter):
    """A JSON envelope by POST, with the headers of Standard Webhooks 1.0 (standardwebhooks.com).

    "Webhook headers": `webhook-id` is the idempotency key, the same on every try; `webhook-timestamp` says
    when it was sent, in seconds. "Signature scheme": `webhook-signature` is `v1,` and the base64 of the
    HMAC-SHA256 of `id.timestamp.body`, with one signature for each key, separated by spaces, while a key is
    rotated.
    """

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
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
            "escalation": escalation.body,
        }
        body = encode_json(envelope)
        headers = {
            **sink.settings.get("headers", {}),
            "Content-Type": "application/json",
            "webhook-id": escalation.id,
            "webhook-timestamp": str(int(origin.emitted_at)),
        }
        if token := sink.secrets.get("authTokenEnv"):
            headers["Authorization"] = f"Bearer {token}"
        if secret := sink.secrets.get("signingSecretEnv"):
            signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
            headers["webhook-signature"] = " ".join(signature(key, signed) for key in signing_keys(secret))
        return HttpRequest(self.url(sink), headers, body)


def signature(key: bytes, signed: bytes) -> str:
    """A signature as Standard Webhooks writes it."""
    import hmac
    from base64 import b64encode

    return f"v1,{b64encode(hmac.digest(key, signed, 'sha256')).decode()}"


def held_back_fields(delivery: Delivery) -> JsonObject:
    """What a program is told of repeats that were held back; nothing where there are none."""
    held_back = delivery.held_back
    if held_back is None:
        return {}
    return {"heldBackCount": held_back.repeats, "heldBackSince": shown(held_back.since)}


def held_back_text(delivery: Delivery) -> str:
    """`and 14 repeats held back since 2026-03-01T12:00:00Z`; empty where there are none."""
    held_back = delivery.held_back
    if held_back is None:
        return ""
    return f"and {plural(held_back.repeats, 'repeat')} held back since {shown(held_back.since, 40) or '?'}"


SEVERITY_EMOJI = {"info": "\N{INFORMATION SOURCE}\ufe0f", "warning": "⚠️", "critical": "🚨"}

# Slack, "Block Kit reference", header and section blocks; "chat.postMessage", `text`. Characters as they are
# sent, entities included.
SLACK_HEADER = 150
SLACK_SECTION = 3000
SLACK_TEXT = 4000
# What a phone shows of a message: also within SLACK_TEXT where each character becomes an entity.
SLACK_HEADLINE = 600
# A digest is to be read at a glance: so much for one of its lines.
SLACK_DIGEST_LINE = 450

# Slack, "Formatting text for app surfaces", "Disabling automatic parsing", and "Unfurling links in messages":
# the fallback text is taken as it is written, no name in it becomes a mention and no address a preview.
SLACK_AS_WRITTEN = {
    "mrkdwn": False,
    "parse": "none",
    "link_names": False,
    "unfurl_links": False,
    "unfurl_media": False,
}

# Slack, "Sending messages using incoming webhooks", "Handling errors", and for the same by other names
# "chat.postMessage", "Errors": whose fault each one is.
SLACK_SINK_ERRORS = {
    *("no_service", "no_service_id", "no_team", "team_disabled", "invalid_token", "no_active_hooks"),
    *("action_prohibited", "posting_to_general_channel_denied", "channel_not_found", "channel_is_archived"),
    *("user_not_found", "is_archived", "not_in_channel", "restricted_action", "team_access_not_granted"),
    *("account_inactive", "invalid_auth", "not_authed", "token_expired", "token_revoked", "missing_scope"),
}
SLACK_RECORD_ERRORS = {
    *("invalid_payload", "invalid_blocks", "invalid_blocks_format", "invalid_attachments", "no_text"),
    *("too_many_attachments", "msg_too_long", "msg_blocks_too_long"),
    *("missing_text_or_fallback_or_attachments", "attachment_payload_limit_exceeded"),
}
SLACK_RATE_ERRORS = {"rollup_error", "ratelimited", "rate_limited", "message_limit_exceeded"}
SLACK_WAIT_ERRORS = {
    *SLACK_RATE_ERRORS,
    *("internal_error", "fatal_error", "service_unavailable", "request_timeout"),
}
# By Slack's own words, what was asked for may have been done before these.
SLACK_UNSURE_ERRORS = {"internal_error", "fatal_error"}

SLACK_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def slack_escape(text: str, limit: int) -> str:
    """Escape text for Slack and cut it to `limit` characters as sent, never within an entity.

    Slack, "Formatting text for app surfaces", "Escaping text": `&`, `<` and `>` are the control characters,
    with which mentions and links are made.
    """
    text = printable(text)
    escaped = text.translate(SLACK_ENTITIES)
    if len(escaped) <= limit:
        return escaped
    room, kept = limit - len("…"), 0
    while room >= (needed := len(text[kept].translate(SLACK_ENTITIES))):
        room -= needed
        kept += 1
    return text[: character_boundary(text, kept)].translate(SLACK_ENTITIES) + "…"


def slack_escape_lines(lines: Sequence[str], limit: int) -> str:
    """Escape a list of lines as one text of at most `limit` characters; says how many lines fell off."""
    kept: list[str] = []
    room = limit - len("… and 9999999 more")
    for index, line in enumerate(lines):
        text = slack_escape(f"• {line}", max(room, 1))
        if len(text) > room or room < 20:
            kept.append(f"… and {len(lines) - index} more")
            break
        kept.append(text)
        room -= len(text) + 1
    return "\n".join(kept)


def slack_text(text: str) -> JsonObject:
    """A text object of text that is escaped already.

    Slack, "Text object": in `plain_text`, unlike in `mrkdwn`, no character is a format, no address becomes a
    link and no name a mention; without `emoji` no `:name:` becomes a picture. So what a record says is shown
    as it stands there, backticks and underscores included, and can be copied.
    """
    return {"type": "plain_text", "text": text, "emoji": False}


class SlackAdapter(Adapter):
    """A message to a Slack incoming webhook: a header, what a person needs to know, and where it is from.

    Several deliveries make a digest: counts, then a line each, the worst first. The `block_id` of a message's
    header, or of a digest's line, is the escalationId, by which a receiver can tell a repeat (Slack, "Block
    Kit reference": up to 255 characters, each once in a message).
    """

    url_key = "webhookUrlEnv"
    # Slack, "Rate limits": incoming webhooks, one message a second, short bursts allowed.
    max_per_minute = 60

    def batch_size(self, sink: Sink) -> int:
        return int(sink.settings.get("maxPerMessage", 1))

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
        single = len(deliveries) == 1
        message = slack_message(deliveries[0], origin) if single else slack_digest(deliveries, origin)
        message |= SLACK_AS_WRITTEN
        for key, name in (("channel", "channel"), ("username", "username"), ("iconEmoji", "icon_emoji")):
            if key in sink.settings:
                message[name] = sink.settings[key]
        return HttpRequest(self.url(sink), {"Content-Type": "application/json"}, encode_json(message))

    def judge(self, answer: Answer, now: float) -> Verdict:
        """Slack names its errors in the body, which says more than the status does.

        A webhook answers `ok`. What passes messages on to Slack may answer as its Web API does, with 200 and
        `{"ok": false, "error": …}`: that is judged by the error. A web page is no answer of a webhook.
        """
        error, verdict = slack_error(answer), judge_api(answer, now)
        failed = Verdict("dead_letter", "http_error", answer.status, error)
        if error in SLACK_SINK_ERRORS:
            return failed._replace(outcome="misconfigured")
        if error in SLACK_WAIT_ERRORS:
            wait = parse_retry_after(answer.headers.get("retry-after"), now)
            not_taken = error not in SLACK_UNSURE_ERRORS
            return failed._replace(outcome="retry", retry_after=wait, not_taken=not_taken)
        if error in SLACK_RECORD_ERRORS:
            return failed
        return failed if verdict.outcome == "delivered" and error else verdict


def slack_error(answer: Answer) -> str | None:
    """The error that an answer names, in JSON or as one of Slack's words; None where it names none."""
    if answer.text.startswith("{"):
        with contextlib.suppress(ValueError):
            said = mapping(decode_json(answer.text))
            if said.get("ok") is False:
                return as_text(said.get("error")) or answer.text
    known = SLACK_SINK_ERRORS | SLACK_RECORD_ERRORS | SLACK_WAIT_ERRORS
    return answer.text if answer.text in known else None


def slack_message(delivery: Delivery, origin: Origin) -> JsonObject:
    """One escalation: category and loop, what is wrong, then time, transport and trace."""
    escalation, severity = delivery.escalation, delivery.resolution.event_severity
    title = f"{SEVERITY_EMOJI[severity]} {shown(escalation.category, 80)} on {shown(escalation.loop_id, 60)}"
    context = [
        severity,
        f"loop {shown(escalation.loop_id)}",
        shown(escalation.timestamp),
        f"transport {shown(escalation.body.get('transport')) or 'unknown'}",
        f"trace {shown(escalation.trace_id) or shown(origin.trace_id)}",
    ]
    blocks = [
        slack_header(title) | {"block_id": escalation.id},
        slack_section(slack_escape_lines(explain(escalation), SLACK_SECTION)),
        slack_context(context),
    ]
    if delivery.held_back:
        blocks.insert(2, slack_section(slack_escape(held_back_text(delivery), SLACK_SECTION)))
    return {
        "text": slack_escape(f"{SEVERITY_EMOJI[severity]} {headline(delivery, SLACK_HEADLINE)}", SLACK_TEXT),
        "blocks": blocks,
    }


def slack_digest(deliveries: Sequence[Delivery], origin: Origin) -> JsonObject:
    """Several escalations, oldest first: how many of which severity and category, then a line each."""
    worst_first = sorted(
        deliveries, key=lambda delivery: SEVERITIES.index(delivery.resolution.event_severity), reverse=True
    )
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
        # Two lines of the source that are equal have one id, and Slack takes a block_id only once.
        seen[identity] += 1
        block_id = identity if seen[identity] == 1 else f"{identity}:{seen[identity]}"
        line = slack_section(slack_digest_line(delivery, name_loop=len(loops) > 1))
        blocks.append(line | {"block_id": block_id})
    oldest, newest = (shown(deliveries[index].escalation.timestamp) or "?" for index in (0, -1))
    blocks.append(slack_context([f"{oldest} to {newest}", f"trace {shown(origin.trace_id)}"]))
    text = f"{title}. The worst: {headline(worst, SLACK_HEADLINE)}"
    return {"text": slack_escape(text, SLACK_TEXT), "blocks": blocks}


def slack_digest_line(delivery: Delivery, *, name_loop: bool) -> str:
    """`🚨 health_critical · 2026-03-01T12:00:00Z · ingest_stale: …`, and at its end what was held back."""
    escalation = delivery.escalation
    emoji = SEVERITY_EMOJI[delivery.resolution.event_severity]
    where = f" on {shown(escalation.loop_id, 60)}" if name_loop else ""
    parts = [
        f"{emoji} {shown(escalation.category, 80)}{where}",
        shown(escalation.timestamp, 40),
        "; ".join(explain(escalation)),
    ]
    tail = f" · {held_back_text(delivery)}" if delivery.held_back else ""
    tail = slack_escape(tail, SLACK_DIGEST_LINE // 2)
    return slack_escape(" · ".join(filter(None, parts)), SLACK_DIGEST_LINE - len(tail)) + tail


def count_words(words: Iterable[str]) -> str:
    """`2 critical, 10 warning`, in the order in which they first come."""
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


def headline(delivery: Delivery, limit: int) -> str:
    """One line that says what is wrong where: `[critical] health_critical on demo-loop: ingest_stale`.

    At most `limit` characters; what was held back is said at its end, and never cut off.
    """
    escalation = delivery.escalation
    what = ", ".join(reason_codes(escalation)) or explain(escalation)[0]
    where = f"{shown(escalation.category, 100)} on {shown(escalation.loop_id, 100)}"
    tail = f" ({held_back_text(delivery)})" if delivery.held_back else ""
    return cut(f"[{delivery.resolution.event_severity}] {where}: {what}", limit - len(tail)) + tail


# PagerDuty, "Send an alert event" (Events API v2): an event of 512 KB (taken as the smaller of what that may
# mean), a summary of 1,024 characters, a dedup_key of 255.
PAGERDUTY_EVENT_BYTES = 512_000
PAGERDUTY_SUMMARY = 1024
PAGERDUTY_DEDUP_KEY = 255


class PagerDutyAdapter(Adapter):
    """A `trigger` event of PagerDuty's Events API v2 ("Send an alert event").

    Its severities are info, warning, error and critical: ours are three of them. Its `timestamp` is ISO 8601.
    """

    default_url = "https://events.pagerduty.com/v2/enqueue"
    # PagerDuty, "Events API rate limits": 120 events a minute for an integration key.
    max_per_minute = 120

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
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
            for limits in ABRIDGEMENTS:
                payload["custom_details"]["escalation"] = abridge(plain_first(escalation.body), *limits)
                body = encode_json(event)
                if len(body) <= PAGERDUTY_EVENT_BYTES:
                    break
        return HttpRequest(self.url(sink), {"Content-Type": "application/json"}, body)

    def judge(self, answer: Answer, now: float) -> Verdict:
        """A 400 that complains of the routing key is the sink's fault; any other one is the record's."""
        if answer.status == 400 and any(
            re.search(ROUTING_KEY, complaint) for complaint in pagerduty_complaints(answer)
        ):
            return Verdict("misconfigured", "http_error", answer.status, answer.text)
        return judge_api(answer, now)


ROUTING_KEY = r"(?i)(routing|service|integration)[ _-]?key"


def pagerduty_complaints(answer: Answer) -> list[str]:
    """What an error answer complains of, without what it only quotes of the request.

    PagerDuty, "Send an alert event", 400: `{"status": "…", "message": "…", "errors": ["…"]}`. What stands
    before it may put the same in other words: in `error`, in objects that name the field, or as plain text.
    """
    try:
        said = decode_json(answer.text)
    except ValueError:
        said = answer.text
    told = mapping(said)
    waiting = [
        said if isinstance(said, str) else None,
        *(told.get(key) for key in ("message", "errors", "error")),
    ]
    complaints: list[str] = []
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            complaints.append(re.sub(r"\S*custom_details\S*", "", item.partition("{")[0]))
        elif isinstance(item, dict):  # of fields that complaints are listed for, or that say one
            waiting += [key for key, listed in item.items() if isinstance(listed, list)]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return complaints


def dedup_key(escalation: Escalation, by: str) -> str:
    """PagerDuty's `dedup_key`: by `event` `<loopId>:<category>:<timestamp>`, so that each escalation is an
    alert of its own; by `condition` `<loopId>:<category>`, so that repeats join the open one.

    One that is longer than PagerDuty takes, or not plain text, ends in a hash of the whole.
    """
    key = f"{escalation.loop_id}:{escalation.category}"
    if by == "event":
        key += f":{escalation.timestamp or escalation.id}"
    return cut_identity(key, PAGERDUTY_DEDUP_KEY)


def cut_identity(text: str, limit: int) -> str:
    """A text that tells things apart, printable and of at most `limit` characters: where that changes it, it
    ends in a hash of the whole."""
    plain = printable(text)
    if plain == text and len(text) <= limit:
        return text
    mark = short_hash(text.encode("utf-8", "surrogatepass"))
    return f"{plain[: limit - len(mark) - 1]}:{mark}"


# Characters of a text, items of a list or object, levels: each is tried where the one before still makes too
# large an event. With the last any record fits.
ABRIDGEMENTS = ((4000, 100, 6), (400, 40, 4), (30, 10, 3))


def plain_first(body: JsonObject) -> JsonObject:
    """A record with what matters at its front: the reasons, then what else is known, then plain fields."""

    def rank(field: tuple[str, object]) -> tuple[bool, bool, bool]:
        key, value = field
        reason = key in ("category", "reasons", "reasonCodes")
        return not reason, key not in COMMON_FIELDS | READ_FIELDS, isinstance(value, dict | list)

    return dict(sorted(body.items(), key=rank))


def abridge(value: object, characters: int, items: int, levels: int) -> object:
    """Cut a JSON value down, saying where and how much was left out."""
    if isinstance(value, dict | list):
        if not levels:
            return f"… {len(encode_json(value))} bytes of JSON left out"
        kept: Any
        if isinstance(value, dict):
            fields = list(value.items())[:items]
            kept = {
                cut(key, characters): abridge(item, characters, items, levels - 1) for key, item in fields
            }
            return kept | ({"…": f"{len(value) - items} more fields left out"} if len(value) > items else {})
        kept = [abridge(item, characters, items, levels - 1) for item in value[:items]]
        return kept + ([f"… {len(value) - items} more items left out"] if len(value) > items else [])
    text = value if isinstance(value, str) else encode_json(value).decode()
    return value if len(text) <= characters else cut(text, characters)


# Alertmanager has no limits of its own to these, nor to a request. These keep a page readable and, at a
# hundred alerts, a request below the 1 MB that proxies let through.
ALERT_LABEL = 256
ALERT_SUMMARY = 1024
ALERT_DESCRIPTION = 2048
ALERTS_A_REQUEST = 100

NO_ALERTMANAGER = "that was no Alertmanager"

DEFAULT_ACTIVE_FOR = 3600.0
# An alert that joins a group waits for the group's next turn, by default up to 5 minutes (Alertmanager,
# "Configuration", group_interval). One that ends before it pages nobody: so much must be left of an alert.
ALERT_LEAD_SECONDS = 600.0


class AlertmanagerAdapter(Adapter):
    """Alerts of Prometheus Alertmanager, by `POST /api/v2/alerts` to every peer of a cluster.

    Alertmanager, "High Availability": alerts go to all peers, never through a load balancer. The peers tell
    each other whom they have notified, not which alerts they hold.
    """

    splits = True

    def urls(self, sink: Sink) -> tuple[str, ...]:
        peers = secret_parts(sink.type, self.url_key, super().url(sink))
        return tuple(f"{peer}/api/v2/alerts" if peer else "" for peer in peers)

    def url(self, sink: Sink) -> str:
        return self.urls(sink)[0]

    def seconds_to_catch_up(self, sink: Sink) -> float:
        """As long as the alert has the same end on a peer that gets it later: see `alert_times`."""
        seconds = active_seconds(sink)
        return seconds - min(ALERT_LEAD_SECONDS, seconds / 2)

    def batch_size(self, sink: Sink) -> int:  # noqa: ARG002
        return ALERTS_A_REQUEST

    def build(self, sink: Sink, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest:
        """One request to the first peer. Alertmanager takes alerts with the same labels for one, and keeps
        what the last of them says: so does this, which sends that one, from the earliest start to the latest
        end."""
        alerts: dict[tuple[str, ...], JsonObject] = {}
        for delivery in deliveries:
            alert = self._alert(sink, delivery, origin)
            key = tuple(alert["labels"].values())
            if earlier := alerts.get(key):
                alert["startsAt"] = min(earlier["startsAt"], alert["startsAt"])
                alert["endsAt"] = max(earlier["endsAt"], alert["endsAt"])
            alerts[key] = alert
        headers = {"Content-Type": "application/json"}
        if token := sink.secrets.get("authTokenEnv"):
            headers["Authorization"] = f"Bearer {token}"
        return HttpRequest(self.url(sink), headers, encode_json(list(alerts.values())))

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
        starts, ends = alert_times(sink, escalation, origin.emitted_at)
        return {
            "labels": {name: cut_identity(value, ALERT_LABEL) for name, value in labels.items()},
            "annotations": {
                "summary": headline(delivery, ALERT_SUMMARY),
                "description": cut("\n".join(explain(escalation)), ALERT_DESCRIPTION),
                "escalationId": escalation.id,
                "traceId": shown(escalation.trace_id or origin.trace_id),
            },
            "startsAt": iso(starts),
            "endsAt": iso(ends),
        }

    def judge(self, answer: Answer, now: float) -> Verdict:
        """A complaint about a record is JSON; one in other words is from a proxy or a TLS port.

        Alertmanager, "Alerts API", OpenAPI specification: the body of a 400 is a string. Those alerts of the
        request that it had no complaint of it has taken.
        """
        verdict = judge_api(answer, now)
        if verdict.outcome == "dead_letter" and answer.status in (400, 422):
            try:
                decode_json(answer.text)
            except ValueError:
                return verdict._replace(outcome="misconfigured", message=f"{NO_ALERTMANAGER}: {answer.text}")
        return verdict


def alert_times(sink: Sink, escalation: Escalation, sent: float) -> tuple[float, float]:
    """From when to when an alert lasts, in seconds since the epoch.

    An alert that is sent in good time ends `activeForSeconds` after its record was written, whenever and to
    whichever peer it is sent: peers that do not agree on the end would page again. Of one that is sent late
    nothing, or too little for a page, would be left (Alertmanager takes an alert whose end is in the past for
    a resolved one, and is silent), so it lasts as long from when it is sent.
    """
    written = parse_time(escalation.timestamp)
    starts = min(sent if written is None else written, sent)
    in_good_time = sent - starts <= AlertmanagerAdapter().seconds_to_catch_up(sink)
    return starts, (starts if in_good_time else sent) + active_seconds(sink)


def active_seconds(sink: Sink) -> float:
    """For how long an alert lasts."""
    seconds: float = sink.settings.get("activeForSeconds", DEFAULT_ACTIVE_FOR)
    return seconds


ADAPTERS: dict[str, Adapter] = {
    "webhook": WebhookAdapter(),
    "slack": SlackAdapter(),
    "pagerduty_events": PagerDutyAdapter(),
    "alertmanager": AlertmanagerAdapter(),
}


# ---------------------------------------------------------------------------------------------------------
# Sending: one request, one answer, one deadline
# ---------------------------------------------------------------------------------------------------------

MAX_ANSWER_BYTES = 64 << 10
# Of an answer's lines: its head and interim heads, the sizes of its chunks.
MAX_LINES_BYTES = 1 << 20
# A sink that hangs up so soon after an answer, so many times, does not keep connections.
HANG_UP_SECONDS = 1.0
MAX_HANG_UPS = 2
# Whoever waits for a request gives it this much beyond its timeout, so that its own timeout comes first.
TIMEOUT_GRACE = 0.25


class NoAnswerError(Exception):
    """No usable answer came. `not_taken`: the request surely was not received whole."""

    def __init__(self, message: str, *, not_taken: bool) -> None:
        super().__init__(message)
        self.not_taken = not_taken


class Client:
    """One sink's connection, kept open between requests.

    requests is imported with the first request: a pass that sends nothing does not pay for it. It finds out
    once what the environment says (proxies, a private CA; .netrc is not read at all), and its pool connects
    with the first request. What follows is written to the same connection in one piece, and the answer read
    by http.client, which costs a fraction of what a requests.Session does. `ca_file`: the CA certificates to
    trust in place of the usual ones.
    """

    def __init__(self, timeout: float, ca_file: str | None = None) -> None:
        self.timeout = timeout
        self.ca_file = ca_file
        # Host and port, which may be shown: known with the first request.
        self.host = "the sink"
        # The same of the proxy that the environment names for it.
        self.proxy: str | None = None
        self._verify: str | bool = True
        # What each request has in common, known with the first one.
        self._target = ""
        self._headers: Mapping[str, str] = {}
        self._retries: Any = None
        self._deadline: Any = None
        self._pool: HTTPConnectionPool | None = None
        # A connection whose last answer was read to its end, and when; how often the sink hung up on one.
        self._kept: HTTPConnection | None = None
        self._answered_at = 0.0
        self._hang_ups = 0

    def _find_way(self, url: str) -> "HTTPConnectionPool":
        """Find out how to reach a sink. Raises OSError, requests.RequestException or ValueError."""
        from urllib.parse import unquote_to_bytes, urlsplit

        import requests
        import urllib3
        from requests.adapters import HTTPAdapter

        self.host = host_of(url)
        here = urlsplit(url)
        # Without a body, so that there are none of a body's headers; a URL's user and password become one,
        # byte by byte as they are written there.
        user, colon, password = here.netloc.rpartition("@")[0].partition(":")
        login = (unquote_to_bytes(user), unquote_to_bytes(password)) if colon else None
        prepared = requests.Request("GET", url, auth=login).prepare()
        proxies: dict[str, str] = {}
        if proxy := requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)):
            there = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            # A proxy on another machine cannot reach this one's loopback, and would see what http shows.
            if not is_loopback(here.hostname) or is_loopback(there.hostname):
                proxies = {here.scheme: proxy}
                self.proxy = host_of(there.geturl())
        bundles = (os.environ.get(name) for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
        self._verify = self.ca_file or next(filter(None, bundles), True)
        adapter: Any = HTTPAdapter(pool_connections=1, pool_maxsize=1)
        pool: Any = adapter.get_connection_with_tls_context(prepared, self._verify, proxies)
        adapter.cert_verify(pool, url, self._verify, None)
        careful, _ = response_classes()
        pool.ConnectionCls = type("Connection", (pool.ConnectionCls,), {"response_class": careful})
        self._target = adapter.request_url(prepared, proxies)
        self._headers = {"User-Agent": f"{PROGRAM}/{__version__}", **prepared.headers}
        if not self._target.startswith("/"):  # a proxy is asked for the whole URL, and wants its own headers
            self._headers = {**self._headers, **pool.proxy_headers}
        self._retries = adapter.max_retries
        self._deadline = urllib3.Timeout(total=self.timeout)
        return cast("HTTPConnectionPool", pool)

    def send(self, request: HttpRequest) -> Answer:
        """Send one request and read the whole answer. An answer that is cut off is none.

        Raises NoAnswerError.
        """
        import http.client

        import requests
        from urllib3.exceptions import HTTPError

        connection, self._kept = self._kept, None
        response: Any
        try:
            self._pool = self._pool or self._find_way(request.url)
            # By name in any case: the payload's own headers come first.
            headers = {name.lower(): (name, value) for name, value in self._headers.items()}
            headers |= {name.lower(): (name, value) for name, value in request.headers.items()}
            fields = dict(headers.values())
            if connection is not None and self._is_dropped(connection):
                connection.close()
                connection = None
            if connection is not None:
                connection.sock.sendall(self._head(fields, len(request.body)) + request.body)
                _, quick = response_classes()
                response = quick(connection.sock, method="POST")
                response.begin()
                if response.will_close:  # once it has been read
                    connection.close()
            else:
                response = self._pool.urlopen(
                    "POST",
                    self._target,
                    body=request.body,
                    headers=fields,
                    redirect=False,
                    assert_same_host=False,
                    retries=self._retries,
                    timeout=self._deadline,
                    preload_content=False,
                    decode_content=False,
                )
                connection = response.connection
            with contextlib.closing(response):
                body, complete = read_answer(response)
                names = {name.lower(): value for name, value in response.headers.items()}
        except (
            requests.RequestException,
            HTTPError,
            http.client.HTTPException,
            OSError,
            ValueError,
        ) as error:
            # What may still come on this connection is no answer to another request.
            if connection is not None:
                connection.close()
            raise self._explain(error) from None
        if connection is not None and connection.sock is not None:
            if complete and self._hang_ups < MAX_HANG_UPS:
                connection.sock.settimeout(self.timeout)
                self._kept, self._answered_at = connection, time.monotonic()
            else:
                connection.close()
        return Answer(response.status, names, body)

    def _is_dropped(self, connection: "HTTPConnection") -> bool:
        """Tell whether a connection that was kept is of no more use: the sink has hung up, or has said more
        than it was asked for."""
        from urllib3.util.connection import is_connection_dropped

        # What TLS has read already cannot be seen from outside.
        decrypted = getattr(connection.sock, "pending", None)
        if not is_connection_dropped(connection) and not (decrypted and decrypted()):
            return False
        # Whoever hangs up after its answers, without a word, will do so while the next request is on its way.
        self._hang_ups += time.monotonic() - self._answered_at < HANG_UP_SECONDS
        return True

    def _head(self, fields: Mapping[str, str], length: int) -> bytes:
        """The head of a request: as http.client has written, and checked, the connection's first one.

        Raises NoAnswerError.
        """
        lines = [
            f"POST {self._target} HTTP/1.1",
            f"Host: {self.host}",
            "Accept-Encoding: identity",
            f"Content-Length: {length}",
            *(f"{name}: {value}" for name, value in fields.items()),
        ]
        head = "\r\n".join([*lines, "\r\n"])
        if head.count("\n") != len(lines) + 1:
            message = f"no request to {self.host} can be made: a line break in a header"
            raise NoAnswerError(message, not_taken=True)
        return head.encode("latin-1")

    def _explain(self, error: Exception) -> NoAnswerError:
        """Say in words what went wrong, without the URL that exceptions carry."""
        import http.client
        import socket
        import ssl

        import requests.exceptions as refused
        import urllib3.exceptions as pool

        chain = list(causes(error))

        def first(*kinds: type[BaseException]) -> BaseException | None:
            return next((cause for cause in chain if isinstance(cause, kinds)), None)

        by_way_of = f" by way of the proxy {self.proxy}" if self.proxy else ""
        if isinstance(self._verify, str) and not os.path.exists(self._verify):
            return NoAnswerError(
                f"no request to {self.host} can be made: there is no CA bundle at {self._verify}",
                not_taken=True,
            )
        unusable = first(refused.InvalidURL, refused.InvalidSchema, pool.LocationValueError, UnicodeError)
        if unusable or self._pool is None:
            return NoAnswerError(
                f"no request to {self.host} can be made: its URL, or that of the proxy which the environment "
                "names, cannot be used",
                not_taken=True,
            )
        if first(pool.ProxyError):
            return self._explain_proxy(chain)
        certificate = first(ssl.SSLCertVerificationError)
        if isinstance(certificate, ssl.SSLCertVerificationError):
            reason = certificate.verify_message
            return NoAnswerError(
                f"TLS: the certificate of {self.host} is not valid: {reason}", not_taken=True
            )
        if first(socket.gaierror, pool.NameResolutionError):
            return NoAnswerError(f"no such host: {self.host}", not_taken=True)
        if first(ConnectionRefusedError):
            return NoAnswerError(f"connection refused by {self.host}", not_taken=True)
        if first(pool.ConnectTimeoutError):
            return NoAnswerError(f"no connection to {self.host} within {self.timeout:g} s", not_taken=True)
        if tls := first(ssl.SSLError):
            return NoAnswerError(
                f"TLS with {self.host} failed: {getattr(tls, 'reason', None) or 'hang-up'}", not_taken=False
            )
        if first(pool.ReadTimeoutError, TimeoutError):
            return NoAnswerError(
                f"no complete answer from {self.host}{by_way_of} within {self.timeout:g} s", not_taken=False
            )
        no_http = (
            http.client.BadStatusLine,
            http.client.UnknownProtocol,
            http.client.LineTooLong,
            ValueError,
        )
        if first(*no_http, pool.InvalidHeader) and not first(http.client.RemoteDisconnected):
            return NoAnswerError(
                f"{self.host}{by_way_of} answered with something that is not HTTP", not_taken=False
            )
        if first(pool.NewConnectionError):
            failed = first(OSError)
            words = getattr(failed, "strerror", None) or "connection failed"
            return NoAnswerError(f"no connection to {self.host}: {words}", not_taken=True)
        return NoAnswerError(
            f"{self.host}{by_way_of} hung up before the answer was complete", not_taken=False
        )

    def _explain_proxy(self, chain: Sequence[BaseException]) -> NoAnswerError:
        """Say what went wrong between here and the proxy: the sink has no part in it."""
        import socket

        import urllib3.exceptions as pool

        not_taken = True
        if any(isinstance(cause, socket.gaierror | pool.NameResolutionError) for cause in chain):
            what = "has no such host name"
        elif any(isinstance(cause, ConnectionRefusedError) for cause in chain):
            what = "refused the connection"
        elif any(isinstance(cause, pool.ConnectTimeoutError) for cause in chain):
            what = f"gave no connection within {self.timeout:g} s"
        elif tunnel := re.search(r"Tunnel connection failed: (\d+)", " ".join(map(str, chain))):
            what = f"gave no connection to {self.host} and answered {tunnel[1]}"
        else:
            what = f"gave no connection to {self.host}"
            # A proxy that hung up may have passed the request on.
            not_taken = any(isinstance(cause, pool.NewConnectionError) for cause in chain)
        return NoAnswerError(f"the proxy {self.proxy} {what}", not_taken=not_taken)


# The head of an answer in its plainest form: RFC 9112, sections 4 and 5, without folded lines.
PLAIN_HEAD = rb"HTTP/1\.1 ([2-5][0-9]{2}) [^\r\n]*\r\n((?:[!#-'*+.0-9A-Z^-z|~-]+:[^\r\n]*\r\n)+)\r\n"


def read_plain_head(data: bytes) -> tuple[int, dict[str, str], int] | None:
    """Status, fields and size in bytes of an answer's head; None where it is not whole and of the plainest:
    each field once, a body of a given length, and a connection that stays."""
    head = re.match(PLAIN_HEAD, data)
    if head is None:
        return None
    lines = head[2].decode("latin-1").split("\r\n")[:-1]
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    plain = (
        len(fields) == len(lines)
        and re.fullmatch("[0-9]{1,9}", fields.get("content-length", ""))
        and "transfer-encoding" not in fields
        and fields.get("connection", "keep-alive").lower() == "keep-alive"
        and head[1] not in (b"204", b"304")
    )
    return (int(head[1]), fields, head.end()) if plain else None


class AnswerFile:
    """What a sink sends, as http.client reads it, which trusts it too much: here no read is without a bound,
    and a head that ends in its middle is none."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = MAX_LINES_BYTES
        self.in_head = True

    def readline(self, limit: int) -> bytes:
        """A line of a head, or the size of a chunk. Raises http.client.HTTPException."""
        import http.client

        line: bytes = self._file.readline(limit)
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("head")
        if self.in_head and not line.endswith(b"\n") and len(line) < limit:
            raise http.client.RemoteDisconnected("the head is cut off")
        return line

    def read(self, size: int = -1) -> bytes:
        """So many bytes. Raises ValueError for a size that is none, as a chunk's may be."""
        if size < 0:
            raise ValueError("no size")
        data: bytes = self._file.read(size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@functools.cache
def response_classes() -> tuple[type["HTTPResponse"], type["HTTPResponse"]]:
    """A response of http.client that is careful, and one that is quick, too: it reads the plainest of heads
    by itself, and leaves any other to http.client.

    http.client has the email package read each one: that is a quarter of what a storm costs.
    """
    import http.client

    class CarefulResponse(http.client.HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.fp: Any = AnswerFile(self.fp)

        def begin(self) -> None:
            super().begin()
            # RFC 9110, section 15.2: there may be any number of interim answers. http.client knows one kind.
            while 100 < self.status < 200 and self.status != 101:
                vars(self).update(headers=None)
                super().begin()
            self.fp.in_head = False

    class QuickResponse(CarefulResponse):
        def begin(self) -> None:
            try:
                data = self.fp.peek()
                found = read_plain_head(data)
                if found is None:
                    super().begin()
                    return
            except BaseException:
                self.close()
                raise
            status, fields, size = found
            length = int(fields["content-length"])
            self.fp.read(size)
            vars(self).update(version=11, code=status, status=status, reason="", headers=fields, msg=fields)
            # What else has come by now is no answer to the next request.
            vars(self).update(chunked=False, length=length, will_close=len(data) > size + length)

    return CarefulResponse, QuickResponse


def read_answer(response: Any) -> tuple[bytes, bool]:
    """Read an answer's body, at most MAX_ANSWER_BYTES of it, and tell whether that is all of it.

    Raises what http.client or urllib3 do, where it is cut off: that shows only at its end.
    """
    import http.client

    body = b""
    while len(body) < MAX_ANSWER_BYTES:
        piece = response.read(MAX_ANSWER_BYTES - len(body))
        if not piece:
            if isinstance(response, http.client.HTTPResponse) and response.length:
                raise http.client.IncompleteRead(body, response.length)
            return body, True
        body += piece
    return body, False


class Connections:
    """The connections to a sink: one, or one to each peer of a cluster. Peers are named `host:port`."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.adapter = ADAPTERS[sink.type]
        self._urls: dict[str, str] = {}
        for url in self.adapter.urls(sink):
            name = host_of(url)
            same = sum(other.partition("#")[0] == name for other in self._urls)
            self._urls[f"{name}#{same + 1}" if same else name] = url
        self._clients: dict[str, Client] = {}

    @property
    def peers(self) -> list[str]:
        """The names of the places that each request goes to: one, but for a cluster."""
        return list(self._urls)

    def build(self, deliveries: Sequence[Delivery], origin: Origin) -> HttpRequest | Verdict:
        """Make the request that deliveries go out as. A large record takes longer than many a timeout: that
        time is none of the sink's."""
        try:
            return self.adapter.build(self.sink, deliveries, origin)
        except Exception as error:  # noqa: BLE001 - one record must not stop what comes after it
            message = f"no payload could be made of this record: {type(error).__name__}"
            return Verdict("dead_letter", "payload_failed", message=message)

    def ask(
        self, request: HttpRequest | Verdict, redactor: Redactor, peers: Collection[str]
    ) -> dict[str, Verdict]:
        """Send a request once to each of these peers at the same time; what could not be made fails at each.

        Returns what came of it by peer. Where there are several, one that takes too long does not hold up
        this call for longer than the sink's timeout.
        """
        if isinstance(request, Verdict):
            return dict.fromkeys(peers, request)
        if len(self._urls) == 1:
            return {name: self._attempt(name, request, redactor) for name in self._urls}
        verdicts: dict[str, Verdict] = {}

        def ask_one(name: str) -> None:
            verdict = self._attempt(name, request, redactor)
            if name in waited_for:
                verdicts[name] = verdict

        waited_for = set(peers)
        threads = [threading.Thread(target=ask_one, args=(name,), daemon=True) for name in peers]
        deadline = time.monotonic() + self.sink.timeout_seconds + TIMEOUT_GRACE / 2
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = waited_for - set(verdicts)
        waited_for.clear()
        for name in late:
            self._clients.pop(name, None)
            verdicts.setdefault(name, timed_out(self.sink, name))
        return {name: verdicts[name] for name in peers}

    def _attempt(self, name: str, request: HttpRequest, redactor: Redactor) -> Verdict:
        """Send one request to one place, and judge what comes back: masked and cut."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(
                self.sink.timeout_seconds, self.sink.secrets.get(CA_FILE_KEY)
            )
        try:
            answer = client.send(request._replace(url=self._urls[name]))
        except NoAnswerError as error:
            return Verdict("retry", "request_failed", message=str(error), not_taken=error.not_taken)
        verdict = self.adapter.judge(answer, time.time())
        if verdict.outcome == "delivered":
            return verdict._replace(message=None)
        # Masked before it is cut: half a secret would not be found.
        message = redactor.mask(cut(printable(verdict.message or ""), 10 * MESSAGE_CHARACTERS))
        return verdict._replace(message=cut(message.strip(), MESSAGE_CHARACTERS) or None)


def host_of(url: str) -> str:
    """Host and port of a URL, which may be shown: as a `Host` header has them, the port where it is none of
    the scheme's own."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = parts.hostname or "the sink"
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{host}:{parts.port}" if parts.port not in (None, usual) else host


def timed_out(sink: Sink, *places: str) -> Verdict:
    """A sink, or some peers of it, have not answered in time."""
    message = f"no complete answer from {', '.join(places)} within {sink.timeout_seconds:g} s"
    return Verdict("retry", "request_failed", message=message)


def best_verdict(verdicts: Mapping[str, Verdict]) -> Verdict:
    """What the answers of several peers come to: delivered where at least one took it."""
    order = ("delivered", "dead_letter", "retry", "misconfigured")
    best = min(verdicts.values(), key=lambda verdict: order.index(verdict.outcome))
    if len(verdicts) == 1 or best.outcome == "delivered":
        return best
    said = "; ".join(
        f"{name}: {verdict.message or verdict.http_status}" for name, verdict in verdicts.items()
    )
    not_taken = all(verdict.not_taken for verdict in verdicts.values())
    return best._replace(message=cut(said, MESSAGE_CHARACTERS), not_taken=not_taken)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what is behind it: causes, contexts, and the exceptions it carries as arguments."""
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


# ---------------------------------------------------------------------------------------------------------
# Files: append, replace, lock
# ---------------------------------------------------------------------------------------------------------

# What must fit on the disk before anything is sent.
RESERVE_BYTES = 256 << 10
LOCK_WAIT_SECONDS = 1.0


def make_folder(path: str) -> None:
    """Make a folder for this user alone; one that is there keeps its mode."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent != path:  # not `os.makedirs`, which gives what lies between the usual mode
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
    """Let a file that root has made belong to whoever has the other one, its folder say: a pass that root
    runs by hand must not lock out those of the user who runs it otherwise."""
    if os.geteuid() == 0:
        owner = os.stat(other)
        if (owner.st_uid, owner.st_gid) != (0, 0):
            with contextlib.suppress(OSError):  # there are file systems on which nobody may
                os.fchown(descriptor, owner.st_uid, owner.st_gid)


def open_own(path: str, flags: int) -> int:
    """Open a file of the program's own in a folder that is there. One that is new is for the folder's owner
    alone; a symbolic link is not followed. Raises OSError."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):  # another pass was quicker
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            give_to_owner_of(os.path.dirname(path), descriptor)
            return descriptor


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte at the descriptor's place. What an error cuts short is taken back, where it is at the
    end of a file. Raises OSError."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        if len(view) < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(data) + len(view))
        raise


class Checkpoint(NamedTuple):
    """Up to where a file of rows is accounted for in the state; `tail` names what stands before there."""

    device: int = 0
    inode: int = 0
    offset: int = 0
    tail: str = ""

    @classmethod
    def at_end(cls, descriptor: int) -> Self:
        """A checkpoint at the end of an open file. Raises OSError."""
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, tail_hash(descriptor, found.st_size))

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Self:
        """Read a list of its fields. Raises one of MALFORMED for anything else."""
        device, inode, offset, tail = value
        return cls(count_from_json(device), count_from_json(inode), count_from_json(offset), str(tail))

    def is_in(self, path: str) -> bool:
        """Tell whether a file holds what was accounted for, under whichever name. Raises OSError."""
        with open(path, "rb", buffering=0) as file:
            descriptor = file.fileno()
            whole = os.fstat(descriptor).st_size >= self.offset
            return whole and tail_hash(descriptor, self.offset) == self.tail


# The fields of a row that hold what others wrote; a sink's message is masked as it comes in.
FROM_OUTSIDE = {
    *("escalation", "rawLine", "unknownSeverity", "escalationCategory", "escalationTimestamp"),
    *("traceId", "escalationTraceId", "route"),
}


class JsonlFile:
    """An append-only file of JSON lines, opened with the first row. A row is in it whole, or visibly torn."""

    def __init__(self, path: str, redactor: Redactor) -> None:
        self.path = path
        self._redactor = redactor
        self._descriptor: int | None = None

    @property
    def is_open(self) -> bool:
        return self._descriptor is not None

    def open(self) -> int:
        """Open for appending, and close a line that a crash or a full disk has torn. Raises StorageError."""
        if self._descriptor is None:
            make_folder(os.path.dirname(self.path))
            try:
                self._descriptor = open_own(self.path, os.O_RDWR | os.O_APPEND)
                size = os.fstat(self._descriptor).st_size
                if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                    write_all(self._descriptor, b"\n")
            except OSError as error:
                raise storage_error("append to", self.path, error) from None
        return self._descriptor

    def append(self, rows: Iterable[JsonObject]) -> None:
        """Append rows with one write: a kill leaves all of them or, at worst, a torn last one.

        Raises StorageError.
        """
        descriptor = self.open()
        data = b"".join(map(self._encode, rows))
        try:
            write_all(descriptor, data)  # the host appends to telemetry too: not to half a row
        except OSError as error:
            raise storage_error("append to", self.path, error) from None

    def _encode(self, row: JsonObject) -> bytes:
        line = encode_json(row)
        if self._redactor.finds(line):
            mask = self._redactor.mask_value
            line = encode_json({k: mask(v) if k in FROM_OUTSIDE else v for k, v in row.items()})
        return line + b"\n"

    def close(self) -> Checkpoint | None:
        """Flush to disk and close. Returns the place after the last row; None where nothing was opened."""
        if self._descriptor is None:
            return None
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.fsync(descriptor)
            return Checkpoint.at_end(descriptor)
        except OSError as error:
            raise storage_error("flush", self.path, error) from None
        finally:
            os.close(descriptor)


def replace_file(path: str, data: bytes, *, durable: bool) -> None:
    """Replace a file in one step: a reader sees the old content or the new one. Mode and owner are kept. The
    folder is there.

    `durable`: flush to disk before and after the rename. Raises StorageError.
    """
    temporary = f"{path}.tmp"
    try:
        mode, owned_like = 0o600, os.path.dirname(path)
        with contextlib.suppress(FileNotFoundError):
            mode, owned_like = os.lstat(path).st_mode, path
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(temporary, flags, 0o600)
        except FileExistsError:  # left by a pass that was killed
            os.unlink(temporary)
            descriptor = os.open(temporary, flags, 0o600)
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


def check_room(folder: str, *files: str) -> None:
    """Find out before anything is sent whether what happens to it can be written down.

    Takes RESERVE_BYTES of the disk for a moment (free space, quota, a read-only mount), and looks at the file
    size limit. Raises StorageError.
    """
    import resource

    make_folder(folder)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = RESERVE_BYTES if limit == resource.RLIM_INFINITY else max(1, min(RESERVE_BYTES, limit))
    probe = os.path.join(folder, f".{PROGRAM}.reserve")
    try:
        for file in files:
            if limit == resource.RLIM_INFINITY:
                break
            if (found := stat_of(file)) and found.st_size + room > limit:
                raise storage_error("append to", file, OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(probe)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(probe, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, room)
        finally:
            os.close(descriptor)
            os.unlink(probe)
    except OSError as error:
        raise storage_error(f"reserve {RESERVE_BYTES >> 10} KiB in", folder, error) from None


@contextlib.contextmanager
def loop_lock(path: str, wait: float = LOCK_WAIT_SECONDS) -> Iterator[tuple[int, int] | None]:
    """Hold the loop's lock; yields device and inode of the locked file, None where it was not to be had
    within `wait` seconds.

    The kernel drops the lock with its process, so none is ever left behind. Raises StorageError.
    """
    make_folder(os.path.dirname(path))
    deadline = time.monotonic() + wait
    descriptor: int | None = None
    try:
        while descriptor is None:
            try:
                descriptor = open_own(path, os.O_RDWR)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock_identity(path) == file_identity(descriptor):
                    break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield None
                    return
                time.sleep(0.05)
            except OSError as error:
                raise storage_error("lock", path, error) from None
            # Whoever had it may have been told to go on without that file: the one that is there counts.
            os.close(cast("int", descriptor))
            descriptor = None
        yield file_identity(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock_identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the lock file that is there now; None where it was removed. Raises OSError."""
    found = stat_of(path)
    return found and identity_of(found)


def read_rows(path: str, since: Checkpoint) -> tuple[list[Iterator[JsonObject]], Checkpoint]:
    """The rows after a checkpoint, as streams in order, and the checkpoint after them.

    What was rotated away meanwhile, by rename or by copy, is found under its new name; torn lines are passed
    over. Raises StorageError.
    """
    try:
        found = stat_of(path)
        if found and (found.st_dev, found.st_ino, found.st_size) == since[:3]:
            return [], since
        files = [neighbour for neighbour, key in neighbours(path).items() if key]
        files += [path] if found else []
        # Where that place is in no file any more, or in an empty one, all that there is counts: no row that
        # was accounted for moves a lane.
        known = [index for index, file in enumerate(files) if since.offset and since.is_in(file)]
        files = files[known[-1] :] if known else files
        offset = since.offset if known else 0
        if not files:
            return [], since
        rows = [iterate_rows(file, 0 if index else offset) for index, file in enumerate(files)]
        with open(files[-1], "rb", buffering=0) as file:
            return rows, Checkpoint.at_end(file.fileno())
    except OSError as error:
        raise storage_error("read", path, error) from None


def iterate_rows(path: str, offset: int = 0) -> Iterator[JsonObject]:
    """The JSON objects of a file of rows, from an offset on. What is none is passed over."""
    try:
        with open(path, "rb") as file:
            read = functools.partial(os.pread, file.fileno())
            for line, _, _ in read_lines(read, offset, os.fstat(file.fileno()).st_size):
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
    except OSError as error:
        raise storage_error("read", path, error) from None


# ---------------------------------------------------------------------------------------------------------
# State: a checkpoint of the lanes
# ---------------------------------------------------------------------------------------------------------
# The attempts file is the log from which the state can always be brought up to date: a row is appended to it
# with one write as each attempt ends, and says which record of which lane it settles. The state names the
# place in that file up to which it accounts for it. So a delivery is safe from being repeated as soon as its
# row is written, and the state itself needs writing only once a pass.

STATE_VERSION = 1
# Far more than any state has; beyond it a file is none of ours.
MAX_STATE_BYTES = 32 << 20

# Of escalations that did not reach a sink, or any, and never will by themselves. How many they were is told
# for so many seconds: until whoever is on duty has seen it.
LOST = {*UNUSABLE, "no_dispatchable_sinks", "sink_removed", "source_lost", "source_replaced"}
LOSS_SHOWN = 86400.0

# So many different things does a lane remember to have told: enough for what lasts, little for the state.
TOLD_MAX = 32


class Told(NamedTuple):
    """What a sink was told last of a subject: when the record was written; repeats held back since."""

    at: str
    repeats: int = 0
    since: str | None = None

    def hold_back(self, at: str) -> "Told":
        """The same with one repeat more."""
        return self._replace(repeats=self.repeats + 1, since=self.since or at)


class PeerLag(NamedTuple):
    """From where on a peer has missed deliveries, since when, why, and when it is asked again."""

    position: Position
    since: float
    next_attempt_at: float | None = None
    backoff_step: int = 0
    reason_code: str | None = None
    http_status: int | None = None
    message: str | None = None

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """Read what `to_json` wrote. Raises one of MALFORMED for anything else."""
        since, next_attempt_at = parse_time(value["since"]), parse_time(value["nextAttemptAt"])
        position, step = position_from_json(value["position"]), int(value["backoffStep"])
        code, status, message = value.get("reasonCode"), value.get("httpStatus"), value.get("message")
        return cls(
            position,
            since or 0.0,
            next_attempt_at,
            step,
            code and str(code),
            None if status is None else int(status),
            message and str(message),
        )

    def to_json(self, source: Source) -> JsonObject:
        return {
            "position": position_to_json(self.position, source),
            "since": iso(self.since),
            "nextAttemptAt": self.next_attempt_at and iso(self.next_attempt_at, milliseconds=True),
            "backoffStep": self.backoff_step,
            "reasonCode": self.reason_code,
            "httpStatus": self.http_status,
            "message": self.message,
        }

    def due(self, now: float) -> bool:
        """Tell whether the peer may be asked: its wait is over, or the clock went back."""
        return self.next_attempt_at is None or not self.since - 1.0 <= now < self.next_attempt_at


class Stretch(NamedTuple):
    """A stretch of the log in which a lane, though it has come past it before, takes records of one kind:
    of this category and own severity. They waited elsewhere when a changed config routed them here."""

    start: Position
    stop: Position
    category: str
    severity: str | None

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Self:
        """Read what `to_json` wrote. Raises one of MALFORMED for anything else."""
        start, stop, category, severity = value
        kind = str(category), None if severity is None else str(severity)
        return cls(position_from_json(start), position_from_json(stop), *kind)

    def to_json(self, source: Source) -> list[Any]:
        ends = (position_to_json(self.start, source), position_to_json(self.stop, source))
        return [*ends, self.category, self.severity]

    def holds(self, place: Position, kind: Kind) -> bool:
        """Tell whether a record of a kind at a place is one of these."""
        return self.start <= place < self.stop and (self.category, self.severity) == kind


class Lane:
    """The place of one sink in the log, and how it fares there. Times are seconds since the epoch."""

    # Attribute and key of each plain field; what is None is not written.
    FIELDS: ClassVar = (
        ("waiting_count", "waitingCount"),
        ("oldest_pending_at", "oldestPendingAt"),
        ("attempts", "attempts"),
        ("backoff_step", "backoffStep"),
        ("consecutive_failures", "consecutiveFailures"),
        ("dead_letter_count", "deadLetterCount"),
        ("delivered_count", "deliveredCount"),
        ("failed_attempt_count", "failedAttemptCount"),
        ("given_up_count", "givenUpCount"),
        ("skipped_count", "skippedCount"),
        ("reason_code", "reasonCode"),
        ("http_status", "httpStatus"),
        ("message", "message"),
        ("sink_digest", "sinkDigest"),
    )
    TIMES: ClassVar = (
        ("lagging_since", "laggingSince"),
        ("failing_since", "failingSince"),
        ("waiting_since", "waitingSince"),
        ("next_attempt_at", "nextAttemptAt"),
        ("last_success_at", "lastSuccessAt"),
        ("last_failure_at", "lastFailureAt"),
        ("paced_until", "pacedUntil"),
    )
    PRECISE: ClassVar = ("waiting_since", "next_attempt_at", "paced_until")

    def __init__(self, position: Position) -> None:
        self.position = position
        # Deliveries that a row says were put off, and the timestamp of the first of them.
        self.waiting_count = 0
        self.oldest_pending_at: str | None = None
        self.lagging_since: float | None = None
        # Attempts of the delivery at `position`; failures in a row; how often the lane has given up a pass.
        self.attempts = 0
        self.consecutive_failures = 0
        self.backoff_step = 0
        self.failing_since: float | None = None
        # The wait between passes: since when, until when, and the sink's digest as it was then.
        self.waiting_since: float | None = None
        self.next_attempt_at: float | None = None
        self.sink_digest: str | None = None
        self.last_success_at: float | None = None
        self.last_failure_at: float | None = None
        self.reason_code: str | None = None
        self.message: str | None = None
        self.http_status: int | None = None
        # Dead letters now; the others count up for good: delivered, failed attempts of what was to be tried
        # again, made a dead letter, skipped.
        self.dead_letter_count = 0
        self.delivered_count = 0
        self.failed_attempt_count = 0
        self.given_up_count = 0
        self.skipped_count = 0
        # Up to when the requests that were sent are paid for, at the sink's rate.
        self.paced_until: float | None = None
        # What the sink was told, by what repeats of it have in common; the latest told comes last.
        self.told: dict[str, Told] = {}
        # Up to the end of the last of these the lane takes nothing else.
        self.rerouted: list[Stretch] = []
        # The peers of a cluster that have missed deliveries which another one took.
        self.peers: dict[str, PeerLag] = {}
        # Where the lane stood still because its sink was disabled, and stretches of the log that it passes
        # over because their rows say that the sink was disabled then.
        self.disabled_at: Position | None = None
        self.gaps: list[tuple[Position, Position]] = []

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """Read what `to_json` wrote. Raises one of MALFORMED for anything else."""
        lane = cls(position_from_json(value["position"]))
        for name, key in cls.FIELDS:
            if key in value:
                is_count = isinstance(getattr(lane, name), int) or name == "http_status"
                setattr(lane, name, count_from_json(value[key]) if is_count else str(value[key]))
        for name, key in cls.TIMES:
            setattr(lane, name, parse_time(value.get(key)))
        if "disabledAt" in value:
            lane.disabled_at = position_from_json(value["disabledAt"])
        lane.gaps = [(position_from_json(a), position_from_json(b)) for a, b in value.get("gaps", [])]
        lane.rerouted = [Stretch.from_json(stretch) for stretch in value.get("rerouted", [])]
        lane.peers = {str(name): PeerLag.from_json(lag) for name, lag in value.get("peers", {}).items()}
        lane.told = {key: Told(str(at), int(n), since) for key, at, n, since in value.get("told", [])}
        return lane

    def to_json(self, source: Source) -> JsonObject:
        value: JsonObject = {"position": position_to_json(self.position, source)}
        value |= {key: field for name, key in self.FIELDS if (field := getattr(self, name)) is not None}
        for name, key in self.TIMES:
            if (moment := getattr(self, name)) is not None:
                value[key] = iso(moment, milliseconds=name in self.PRECISE)
        if self.disabled_at:
            value["disabledAt"] = position_to_json(self.disabled_at, source)
        if self.gaps:
            value["gaps"] = [[position_to_json(p, source) for p in gap] for gap in self.gaps]
        if self.rerouted:
            value["rerouted"] = [stretch.to_json(source) for stretch in self.rerouted]
        if self.peers:
            value["peers"] = {name: lag.to_json(source) for name, lag in self.peers.items()}
        if self.told:
            value["told"] = [[key, *told] for key, told in self.told.items()]
        return value

    def apply(self, attempt: JsonObject) -> None:
        """Bring the lane up to date with one row of the attempts file, as it is written or after a crash."""
        at = parse_time(attempt["timestamp"])
        outcome = attempt["outcome"]
        if "peer" in attempt:
            self._apply_to_peer(attempt, at or 0.0)
            return
        # The deliveries of one request fail together: that is one failure.
        counts = not attempt.get("batchIndex")
        self.note_told(attempt)
        if outcome == "delivered":
            self.last_success_at = at
            self.delivered_count += 1
            self.reason_code = self.message = self.http_status = None
        elif outcome != "skipped":
            self.last_failure_at = at
            self.reason_code, self.message = attempt.get("reasonCode"), attempt.get("message")
            self.http_status = attempt.get("httpStatus")
        if outcome in SETTLED:
            self.position = max(self.position, end_of_row(attempt))
            if attempt.get("reasonCode") == SKIPPED_BY_OPERATOR:  # nor does a peer get it later
                for name, lag in self.peers.items():
                    self.peers[name] = lag._replace(position=max(lag.position, self.position))
            self.attempts = 0
            self.waiting_count = max(0, self.waiting_count - bool(attempt.get("late")))
            self.skipped_count += outcome == "skipped"
            if outcome == "dead_letter":
                self.dead_letter_count += 1
                self.given_up_count += 1
            if attempt.get("httpStatus") is not None:  # the sink is there, whatever it said of the record
                self.consecutive_failures = self.backoff_step = 0
                self.failing_since = self.waiting_since = self.next_attempt_at = None
        else:
            self.attempts = count_from_json(attempt["attempt"])
            self.failed_attempt_count += counts
            self.consecutive_failures += counts
            if counts:
                self.oldest_pending_at = attempt.get("escalationTimestamp")
            self.failing_since = self.failing_since or at
            self.waiting_since, self.next_attempt_at = at, parse_time(attempt.get("nextAttemptAt"))
            self.backoff_step += counts and attempt.get("backoffSeconds") is not None

    def _apply_to_peer(self, attempt: JsonObject, at: float) -> None:
        name, lag = attempt["peer"], self.peers.get(attempt["peer"])
        if attempt["outcome"] in SETTLED:
            if lag is not None:
                self.peers[name] = PeerLag(max(lag.position, end_of_row(attempt)), lag.since)
            return
        lag = lag or PeerLag(start_of_row(attempt), at)
        self.peers[name] = PeerLag(
            lag.position,
            lag.since,
            parse_time(attempt.get("nextAttemptAt")),
            lag.backoff_step + 1,
            attempt.get("reasonCode"),
            attempt.get("httpStatus"),
            attempt.get("message"),
        )

    def note_told(self, attempt: JsonObject) -> None:
        """Keep in mind what the sink was told, and what was held back since, from a row of the attempts."""
        repeat = attempt.get("repeat")
        if repeat is None:
            return
        key, at = str(repeat["key"]), str(repeat["at"])
        if attempt["outcome"] == "delivered":
            self.told.pop(key, None)
            self.told[key] = Told(at)
            while len(self.told) > TOLD_MAX:
                del self.told[next(iter(self.told))]
        elif attempt["outcome"] == "skipped" and (told := self.told.get(key)):
            self.told[key] = told.hold_back(at)

    def note_put_off(self, timestamp: str | None) -> None:
        """Count a delivery that a row says waits, of a record with this timestamp."""
        self.waiting_count += 1
        if self.oldest_pending_at is None and parse_time(timestamp) is not None:
            self.oldest_pending_at = timestamp

    def wait_like(self, other: "Lane", sink_digest: str) -> None:
        """Wait as another loop's lane to the same sink does, which has just found the sink unwell."""
        self.reason_code, self.message, self.http_status = other.reason_code, other.message, other.http_status
        self.waiting_since, self.next_attempt_at = other.waiting_since, other.next_attempt_at
        self.last_failure_at, self.sink_digest = other.last_failure_at, sink_digest
        self.failing_since = self.failing_since or other.failing_since
        self.consecutive_failures = max(self.consecutive_failures, 1)
        self.backoff_step = max(self.backoff_step, other.backoff_step)

    def apply_operator(self, attempt: JsonObject) -> None:
        """Bring the lane up to date with what an operator did with a delivery that it is past."""
        if "peer" in attempt:  # another one took it
            return
        if attempt["outcome"] == "delivered":
            self.last_success_at = parse_time(attempt["timestamp"])
            self.delivered_count += 1
        self.skipped_count += attempt["outcome"] == "skipped"
        if attempt.get("deadLetter") and attempt["outcome"] in ("delivered", "skipped"):
            self.dead_letter_count = max(0, self.dead_letter_count - 1)

    def due(self, now: float, sink_digest: str) -> bool:
        """Tell whether the lane may try: the wait is over, the sink has changed, or the clock went back."""
        if self.next_attempt_at is None or self.waiting_since is None:
            return True
        if self.sink_digest is not None and self.sink_digest != sink_digest:
            return True
        return not self.waiting_since - 1.0 <= now < self.next_attempt_at

    def is_again(self, place: Position) -> bool:
        """Tell whether the lane has come past a place before."""
        return any(place < stretch.stop for stretch in self.rerouted)

    def takes(self, place: Position, kind: Kind) -> bool:
        """Tell whether the lane has yet to see to a record of a kind at a place, if it is for its sink."""
        return not self.is_again(place) or any(stretch.holds(place, kind) for stretch in self.rerouted)

    def go_back(self, missed: Iterable[tuple[Position, Kind]]) -> int:
        """Take up what waits elsewhere and is routed here now: these records, in order. Returns how many of
        them the lane would not have come to by itself."""
        reach = max([self.position, *(stretch.stop for stretch in self.rerouted)])
        new: dict[Kind, Position] = {}
        count = 0
        for place, kind in missed:
            if place < self.position or not self.takes(place, kind):
                new.setdefault(kind, place)
                count += 1
        # What it took on its way here it does not take again.
        kept = [stretch._replace(start=max(stretch.start, self.position)) for stretch in self.rerouted]
        self.rerouted = [*kept, *(Stretch(place, reach, *kind) for kind, place in new.items())]
        self.position = min([self.position, *new.values()])
        self.waiting_count += count
        return count

    def ranges(self, stop: Position) -> Iterator[tuple[Position, Position]]:
        """The stretches of the log that the lane has yet to go through."""
        at = self.position
        for start, end in self.gaps:
            if at < start:
                yield at, min(start, stop)
            at = max(at, end)
        if at < stop:
            yield at, stop


# A record (segment, offset) and a sink.
Key = tuple[int, int, str]

SETTLED = ("delivered", "dead_letter", "skipped")
# What an operator gave up on purpose.
SKIPPED_BY_OPERATOR = "skipped_by_operator"


def position_from_json(value: JsonObject) -> Position:
    """Read a position. Raises one of MALFORMED where it is none."""
    number, _ = parse_segment_name(value["segment"])
    return Position(number, count_from_json(value["offset"]), count_from_json(value["line"]))


def position_to_json(position: Position, source: Source) -> JsonObject:
    return {"segment": source.name_of(position), "offset": position.offset, "line": position.line}


def record_place(record: Record, source: Source) -> JsonObject:
    """Where a record stands, as rows give it: `line` counts from 1, `offset` to `end` are its bytes."""
    return {
        "segment": source.name_of(record.start),
        "offset": record.start.offset,
        "end": record.end.offset,
        "line": record.end.line,
    }


def end_of_row(row: JsonObject) -> Position:
    """The place after the record of a row. Raises one of MALFORMED where it has none."""
    place = row["position"]
    return position_from_json({**place, "offset": place["end"]})


def start_of_row(row: JsonObject) -> Position:
    """The place of the record of a row. Raises one of MALFORMED where it has none."""
    end = position_from_json(row["position"])
    return end._replace(line=end.line - 1)


def sink_entry(attempt: JsonObject) -> JsonObject:
    """What a telemetry row says of one sink, from the row of the attempt."""
    outcome = attempt["outcome"]
    entry = {
        "id": attempt["sinkId"],
        "type": attempt["sinkType"],
        "status": {"delivered": "success", "skipped": "skipped"}.get(outcome, "failed"),
        "httpStatus": attempt.get("httpStatus"),
        "reasonCode": attempt.get("reasonCode"),
        "message": attempt.get("message"),
    }
    return {**entry, "deadLetter": True} if outcome == "dead_letter" else entry


def is_put_off(entry: JsonObject) -> bool:
    """Tell whether a delivery waits, by its sink's entry in a row."""
    return entry["status"] == "failed" and not entry.get("deadLetter")


def put_off(entries: Iterable[JsonObject]) -> list[str]:
    """The sinks for which a delivery waits, by the entries of its row."""
    return [entry["id"] for entry in entries if is_put_off(entry)]


def key_of_row(row: JsonObject, sink_id: str) -> Key:
    """Which delivery a row is about. Raises one of MALFORMED where it does not say."""
    return (*start_of_row(row)[:2], sink_id)


class State:
    """Everything that a pass must know of earlier ones; kept in the state file beside what the host reads."""

    def __init__(self, salt: str = "") -> None:
        # What the host reads, as the last pass wrote it.
        self.published: JsonObject = {}
        # Where escalations were taken up to. None: nothing was yet, or only by the shell dispatcher, whose
        # state gives lines alone.
        self.taken_up: Position | None = None
        self.legacy_lines = 0
        self.segments: list[Segment] = []
        # When a pass has last accounted for what the source held, and what it has read to its end before.
        self.seen_at: float | None = None
        self.forgotten: list[str] = []
        self.lanes: dict[str, Lane] = {}
        self.attempts = Checkpoint()
        self.telemetry = Checkpoint()
        self.config_digest: str | None = None
        # What was lost of late, by reason code: how much, and when last.
        self.lost: dict[str, tuple[int, float]] = {}
        # Where records went under that config, as long as some wait.
        self.rules: JsonObject | None = None
        # After a crash: attempts that settled a delivery of which no row tells yet, and what they say for
        # rows that are still to come.
        self.unrecorded: list[JsonObject] = []
        self.remembered: dict[Key, JsonObject] = {}
        # Rebuilt from telemetry, of which some may be gone: what waits is to be counted anew.
        self.recount = False
        # Makes digests of secrets worthless to whoever reads the state.
        self.salt = salt or os.urandom(16).hex()

    @classmethod
    def from_json(cls, document: JsonObject) -> Self:
        """Read a state document, ours or the shell dispatcher's. Raises one of MALFORMED."""
        state = cls(str(document.get("salt", "")))
        if len(bytes.fromhex(state.salt)) > 64:  # what it keys takes no longer one
            raise ValueError("no salt")
        state.published = document
        state.seen_at = parse_time(document.get("sourceSeenAt"))
        if "source" not in document:
            state.legacy_lines = count_from_json(document.get("escalationsLineOffset") or 0)
            return state
        source = document["source"]
        state.taken_up = position_from_json(source["takenUp"])
        state.segments = [Segment.from_json(segment) for segment in source["segments"]]
        state.forgotten = [str(mark) for mark in source.get("forgotten", [])]
        state.lanes = {name: Lane.from_json(lane) for name, lane in dict(document["lanes"]).items()}
        checkpoint = document["checkpoint"]
        state.attempts = Checkpoint.from_json(checkpoint["attempts"])
        state.telemetry = Checkpoint.from_json(checkpoint["telemetry"])
        state.lost = {
            str(code): (count_from_json(loss["count"]), parse_time(loss["lastSeenAt"]) or 0.0)
            for code, loss in document.get("lost", {}).items()
        }
        state.config_digest = document.get("configDigest")
        state.rules = document.get("rules")
        state.recount = document.get("recount") is True
        state.unrecorded = list(document.get("unrecorded", []))
        state.remember(state.unrecorded, ())
        return state

    def to_json(self, source: Source) -> JsonObject:
        """The fields that are added to those which the host reads."""
        seen = {} if self.seen_at is None else {"sourceSeenAt": iso(self.seen_at, milliseconds=True)}
        if self.taken_up is None:  # a config that was found valid is, even where nothing was escalated yet
            return {"configDigest": self.config_digest, **seen}
        return {
            "stateVersion": STATE_VERSION,
            **seen,
            "source": {
                "takenUp": position_to_json(self.taken_up, source),
                "segments": [segment.to_json() for segment in self.segments],
                **({"forgotten": self.forgotten} if self.forgotten else {}),
            },
            "lanes": {name: lane.to_json(source) for name, lane in sorted(self.lanes.items())},
            "checkpoint": {"attempts": list(self.attempts), "telemetry": list(self.telemetry)},
            "configDigest": self.config_digest,
            "salt": self.salt,
            **({"lost": self._lost_to_json()} if self.lost else {}),
            **({"recount": True} if self.recount else {}),
            **({"unrecorded": self.unrecorded} if self.unrecorded else {}),
            **({"rules": self.rules} if any(lane.waiting_count for lane in self.lanes.values()) else {}),
        }

    def _lost_to_json(self) -> JsonObject:
        return {code: {"count": count, "lastSeenAt": iso(at)} for code, (count, at) in self.lost.items()}

    def open_source(self, path: str) -> Source:
        """The source as it is now, to be entered."""
        return Source(path, self.segments, self.seen_at, self.forgotten)

    def note_lost(self, row: JsonObject) -> None:
        """Count what a row of the telemetry says is lost, if it says so."""
        code, at = row.get("reasonCode"), parse_time(row.get("timestamp"))
        if not isinstance(code, str) or code not in LOST or at is None:
            return
        count, last = self.lost.get(code, (0, at))
        dropped = row.get("droppedCount")
        count = count if at - last < LOSS_SHOWN else 0
        self.lost[code] = (count + (dropped if isinstance(dropped, int) else 1), max(last, at))

    def note_found(self, count: int) -> None:
        """Take back that so many deliveries were lost with a file: it is there again."""
        lost, at = self.lost.get("source_lost", (0, 0.0))
        if lost > count:
            self.lost["source_lost"] = lost - count, at
        else:
            self.lost.pop("source_lost", None)

    def remember(self, attempts: Iterable[JsonObject], told: Collection[Key]) -> None:
        """Keep what settled a delivery whose row was not written before a crash.

        `told`: the deliveries that have a late row. Raises one of MALFORMED.
        """
        self.unrecorded, self.remembered = [], {}
        for attempt in attempts:
            key = key_of_row(attempt, attempt["sinkId"])
            if attempt.get("late"):
                if key not in told:
                    self.unrecorded.append(attempt)
            elif self.taken_up is None or end_of_row(attempt) > self.taken_up:
                self.unrecorded.append(attempt)
                self.remembered[key] = sink_entry(attempt)

    def sink_digest(self, sink: Sink) -> str:
        """A salted digest of a sink's settings and secrets: tells that they changed, and nothing else."""
        content = encode_json([sink.settings, dict(sink.secrets)])
        return blake2b(content, digest_size=8, key=bytes.fromhex(self.salt)).hexdigest()


def read_state_document(path: str) -> JsonObject | None:
    """Read the state file; None where there is none.

    Raises ValueError for a damaged or foreign file, StateError for one that cannot be read or is newer.
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
    schema, version = document.get("schemaVersion"), document.get("stateVersion", STATE_VERSION)
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


class Job(NamedTuple):
    """What one pass works on. Paths are absolute; `time_budget` is in seconds."""

    repo: str
    loop_id: str
    trace_id: str
    escalations_file: str
    state_file: str
    telemetry_file: str
    config_file: str
    max_escalations: int = 0
    time_budget: float = 30.0
    # Try every lane, also those that wait after a failure.
    now: bool = False

    @property
    def attempts_file(self) -> str:
        return beside(self.telemetry_file, "alert-attempts.jsonl")

    @property
    def lock_file(self) -> str:
        return f"{self.state_file}.lock"

    @property
    def temporary_file(self) -> str:
        """What becomes the state file: see `replace_file`."""
        return f"{self.state_file}.tmp"


def read_state(job: Job) -> State | None:
    """The state as its file has it; None where there is none.

    Raises ValueError for a damaged or foreign file, StateError for one that cannot be read or is newer.
    """
    document = read_state_document(job.state_file)
    if document is None:
        return None
    if "source" in document and document.get("loopId") != job.loop_id:
        raise ValueError("the state of another loop")
    try:
        return State.from_json(document)
    except MALFORMED as error:
        raise ValueError(f"not a state: {error}") from None


def read_sound_state(job: Job) -> tuple[State | None, bool]:
    """The state as its file has it, None where there is none or a damaged one; and whether that is so.

    Raises StateError for one that cannot be read or is newer.
    """
    try:
        return read_state(job), False
    except ValueError:
        return None, True


def load_state(job: Job) -> State:
    """Read the state, or rebuild it from telemetry where it is missing, damaged or foreign.

    A damaged file is kept under another name. Raises StateError or StorageError.
    """
    found, damaged = read_sound_state(job)
    state = bring_up_to_date(job, found, damaged)
    if damaged:
        keep_damaged(job.state_file)
    return state


def bring_up_to_date(job: Job, found: State | None, damaged: bool) -> State:
    """Add to a state what rows say that were written after it, or rebuild it where it knows nothing.

    Raises StateError or StorageError; a damaged file stays then: without it the next pass would send
    everything.
    """
    if found is not None and (found.taken_up is not None or found.legacy_lines):
        catch_up(found, job)
        return found
    state = rebuild_state(job)
    if found is not None:
        state.published, state.seen_at = found.published, found.seen_at
    # One that an operator wrote, to begin at some line, holds no more than that.
    if state.taken_up is None and (found is None or "updatedAt" in found.published):
        adopt_shell_telemetry(state, job, damaged=damaged)
    return state


def keep_damaged(path: str) -> None:
    """Keep a damaged state file under a second name. Under its own it stays until a new one takes its place:
    without it, a pass after one that was killed meanwhile would take the loop for one without a past.

    Raises StorageError.
    """
    try:
        kept = f"{path}.damaged-{int(os.lstat(path).st_mtime)}"
        try:
            os.link(path, kept, follow_symlinks=False)
        except FileExistsError:  # by a pass that did not get further
            return
        except OSError:  # there are file systems without links
            import shutil

            shutil.copy2(path, kept, follow_symlinks=False)
    except OSError as error:
        raise storage_error("keep a copy of the damaged state file", path, error) from None


def loop_rows(
    job: Job, path: str, since: Checkpoint, *, operator: bool = False
) -> tuple[Iterator[JsonObject], Checkpoint]:
    """The rows of this loop after a checkpoint.

    What an operator did with deliveries that were settled (`byOperator`) says nothing of a lane's place: it
    is left out unless asked for.
    """
    streams, after = read_rows(path, since)

    def rows() -> Iterator[JsonObject]:
        for stream in streams:
            for row in stream:
                if row.get("loopId") == job.loop_id and (operator or "byOperator" not in row):
                    yield row

    return rows(), after


def catch_up(state: State, job: Job) -> None:
    """Bring a state up to date with the rows that a pass wrote after it, before it was killed."""
    rows, state.telemetry = loop_rows(job, job.telemetry_file, state.telemetry)
    told: set[Key] = set()
    for row in rows:
        state.note_lost(row)
        with contextlib.suppress(*MALFORMED):
            if "late" in row:
                told.add(key_of_row(row, row["sinks"][0]["id"]))
            elif state.taken_up is not None and (end := end_of_row(row)) > state.taken_up:
                state.taken_up = end
                for sink_id in put_off(row["sinks"]):
                    if lane := state.lanes.get(sink_id):
                        lane.note_put_off(row.get("escalationTimestamp"))
    rows, state.attempts = loop_rows(job, job.attempts_file, state.attempts, operator=True)
    for row in rows:
        with contextlib.suppress(*MALFORMED):
            lane = state.lanes.get(row["sinkId"])
            if lane is not None and "byOperator" in row:
                lane.apply_operator(row)
            elif lane is not None and "peer" in row:
                lane.apply(row)
            elif lane is not None and end_of_row(row) > lane.position:
                lane.apply(row)
                if row["outcome"] in SETTLED:
                    state.unrecorded.append(row)
    state.remember(state.unrecorded, told)


def note_dead_letter(dead: set[Key], row: JsonObject) -> None:
    """Keep account of the dead letters that nobody has delivered or dismissed since, from rows of the
    attempts in order. Raises one of MALFORMED."""
    if "peer" in row:
        return
    key = key_of_row(row, str(row["sinkId"]))
    if row["outcome"] == "dead_letter" and "byOperator" not in row:
        dead.add(key)
    elif row["outcome"] in ("delivered", "skipped"):
        dead.discard(key)


def find_dead_letters(job: Job) -> set[Key]:
    """The dead letters of a loop that nobody has delivered or dismissed since."""
    dead: set[Key] = set()
    rows, _ = loop_rows(job, job.attempts_file, Checkpoint(), operator=True)
    for row in rows:
        with contextlib.suppress(*MALFORMED):
            note_dead_letter(dead, row)
    return dead


class Past:
    """What all the telemetry of a loop says of one sink."""

    def __init__(self) -> None:
        # Up to where it has settled what was its own; from where, and up to where, something was put off.
        self.settled: Position | None = None
        self.first_put_off: Position | None = None
        self.last_put_off: Position | None = None
        self.waiting = 0

    def note_settled(self, end: Position) -> None:
        self.settled = max(self.settled or end, end)

    def note_put_off(self, row: JsonObject) -> None:
        start = start_of_row(row)
        self.first_put_off = self.first_put_off or start
        self.last_put_off = start
        self.waiting += 1

    def place(self, taken_up: Position) -> Position:
        """Where the lane is: after what it has settled, since it delivers in order; at the end where nothing
        was put off after that."""
        if self.last_put_off is None or (self.settled and self.last_put_off < self.settled):
            return max(self.settled or taken_up, taken_up)
        return max(filter(None, (self.settled, self.first_put_off)))


def rebuild_state(job: Job) -> State:
    """Rebuild a state from all the telemetry there is. Nothing there: a state without a past."""
    state = State()
    state.recount = True
    past: defaultdict[str, Past] = defaultdict(Past)
    names: dict[int, str] = {}
    told: set[Key] = set()
    rows, state.telemetry = loop_rows(job, job.telemetry_file, Checkpoint())
    for row in rows:
        state.note_lost(row)
        with contextlib.suppress(*MALFORMED):
            end = end_of_row(row)
            names[end.segment] = row["position"]["segment"]
            for entry in row["sinks"]:
                if is_put_off(entry):
                    past[entry["id"]].note_put_off(row)
                else:
                    past[entry["id"]].note_settled(end)
                    past[entry["id"]].waiting -= "late" in row and "rerouted" not in row
            if "late" in row:
                told.add(key_of_row(row, row["sinks"][0]["id"]))
            else:
                state.taken_up = max(state.taken_up or end, end)
    dead: set[Key] = set()
    unrecorded: list[JsonObject] = []
    lanes: dict[str, Lane] = {}
    rows, state.attempts = loop_rows(job, job.attempts_file, Checkpoint(), operator=True)
    for row in rows:
        with contextlib.suppress(*MALFORMED):
            end, sink_id = end_of_row(row), str(row["sinkId"])
            note_dead_letter(dead, row)
            if "byOperator" in row:
                lanes[sink_id].apply_operator(row)
                continue
            names[end.segment] = row["position"]["segment"]
            if row["outcome"] in SETTLED and "peer" not in row:
                if row.get("late") or state.taken_up is None or end > state.taken_up:
                    unrecorded.append(row)
                past[sink_id].note_settled(end)
            lanes.setdefault(sink_id, Lane(start_of_row(row))).apply(row)
    state.remember(unrecorded, told)
    if state.taken_up is None:
        settled = [known.settled for known in past.values() if known.settled]
        if not settled:
            return state
        state.taken_up = Position(min(end.segment for end in settled), 0, 0)
    for sink_id, known in past.items():
        lane = state.lanes[sink_id] = lanes.get(sink_id) or Lane(state.taken_up)
        lane.position = known.place(state.taken_up)
        lane.dead_letter_count = sum(key[2] == sink_id for key in dead)
        owed = sum(1 for row in state.unrecorded if row.get("late") and row["sinkId"] == sink_id)
        lane.waiting_count = max(0, known.waiting - owed)
        # Whether its sink was mended meanwhile cannot be told: the next pass tries at once.
        lane.waiting_since = lane.next_attempt_at = None
    needed = min([state.taken_up, *(lane.position for lane in state.lanes.values())]).segment
    for number in sorted(names):
        if number >= needed:
            offset = state.taken_up.offset if number == state.taken_up.segment else 0
            state.segments.append(Segment(*parse_segment_name(names[number]), offset=offset))
    return state


def adopt_shell_telemetry(state: State, job: Job, *, damaged: bool) -> None:
    """Find the last record that the shell dispatcher took up, whose state is damaged or gone, in the source.

    Raises StateError where there is telemetry of its to a damaged state, but that record cannot be found.
    """
    last: JsonObject | None = None
    for row in iterate_rows(job.telemetry_file) if os.path.exists(job.telemetry_file) else ():
        if row.get("category") == "alert_dispatch" and ("escalation" in row or "rawLine" in row):
            last = row
    if last is None:
        return
    with Source(job.escalations_file) as source:
        for record in source.read(source.first()):
            line = parse_escalation(record, job.loop_id)
            if (line.body is not None and line.body == last.get("escalation")) or (
                isinstance(line, Unusable) and line.body is None and line.raw_line == last.get("rawLine")
            ):
                state.legacy_lines = record.end.line
    if not state.legacy_lines and damaged:
        raise StateError(
            f"the state file {job.state_file} is damaged, and what was sent cannot be told from telemetry",
            [
                "the damaged file is left as it is, and nothing is sent",
                f"to go on after line N of {job.escalations_file}, write this to the state file:",
                '{"schemaVersion":"v1","escalationsLineOffset":N}',
            ],
        )


# ---------------------------------------------------------------------------------------------------------
# Ledger: what happened, written down as it happens
# ---------------------------------------------------------------------------------------------------------

# So many answers may be at hand before the row of the slowest record is written without its last ones.
ROW_WINDOW = 1000


# What a sink has been told already.
REPEATED = Verdict("skipped", "repeat_suppressed", message="a repeat of what this sink was told")


class Counts:
    """What a pass did, as the summary gives it."""

    def __init__(self) -> None:
        self.processed = self.dispatched = self.skipped = self.failed = 0
        self.late_dispatched = self.late_failed = 0
        self.reason_codes: set[str] = set()


class Ledger:
    """Writes attempts and rows, and keeps the state of the lanes in step with them.

    `changed` guards everything in here and in the lanes; it is notified when a lane has news.
    """

    def __init__(
        self,
        job: Job,
        state: State,
        source: Source,
        redactor: Redactor,
        changed: threading.Condition | None = None,
        lock: tuple[int, int] | None = None,
    ) -> None:
        self.job = job
        self.state = state
        self.source = source
        self.counts = Counts()
        self.changed = changed or threading.Condition()
        self.results: dict[Key, JsonObject] = state.remembered
        # Whether there was anything to flush.
        self.wrote = False
        self._lock = lock or lock_identity(job.lock_file)
        self._attempts = JsonlFile(job.attempts_file, redactor)
        self._telemetry = JsonlFile(job.telemetry_file, redactor)

    @property
    def taken_up(self) -> Position:
        """Up to where rows are written."""
        if self.state.taken_up is None:
            raise StateError("no place in the source is known yet")
        return self.state.taken_up

    def prepare(self) -> None:
        """Before anything is sent: open what will be written to, and make sure of room.

        Raises StorageError.
        """
        check_room(os.path.dirname(self.job.telemetry_file), self.job.attempts_file, self.job.telemetry_file)
        check_room(os.path.dirname(self.job.state_file))
        if os.path.islink(self.job.state_file):
            raise storage_error("write", self.job.state_file, OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
        if os.path.isdir(self.job.temporary_file):
            raise storage_error(
                "write", self.job.temporary_file, OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            )
        self.state.attempts = Checkpoint.at_end(self._attempts.open())
        self.state.telemetry = Checkpoint.at_end(self._telemetry.open())

    def check_lock(self) -> None:
        """Make sure that no other pass is at work: while this one is, nothing may remove the lock file.

        Raises StorageError.
        """
        if lock_identity(self.job.lock_file) != self._lock:
            raise StorageError(
                f"the lock file {self.job.lock_file} was removed while a pass was at work: another may be "
                "at work by now, so this one stops",
                ["leave that file alone: what counts is a lock on it, which ends with its process"],
            )

    def record(
        self,
        sink: Sink,
        deliveries: Sequence[Delivery],
        verdict: Verdict,
        *,
        attempt: int,
        duration: float,
        wait: float | None = None,
        gave_up: bool = False,
        repeats: Sequence[Delivery] = (),
    ) -> list[JsonObject]:
        """Write down what came of deliveries that went out as one request; from then on they are settled.

        `wait`: seconds until the next attempt. `gave_up`: that is not within this pass. `repeats`: what is
        held back because of these deliveries. Returns the deliveries' entries for their rows.
        """
        now = time.time()
        lane = self.state.lanes[sink.id]
        rows: list[tuple[Delivery, JsonObject]] = []
        for index, delivery in enumerate(deliveries):
            place = record_place(delivery.record, self.source)
            row = self._attempt_row(
                now, sink, delivery, verdict, attempt=attempt, duration=duration, place=place
            )
            if len(deliveries) > 1:
                row |= {"batchSize": len(deliveries), "batchIndex": index}
            if wait is not None:
                row["nextAttemptAt"] = iso(now + wait, milliseconds=True)
                if gave_up:
                    row["backoffSeconds"] = round(wait, 3)
            rows.append((delivery, row))
        entries = [sink_entry(row) for _, row in rows]
        for delivery in repeats:
            place = record_place(delivery.record, self.source)
            row = self._attempt_row(now, sink, delivery, REPEATED, attempt=0, duration=0.0, place=place)
            rows.append((delivery, row))
        for delivery, row in rows:
            if row["outcome"] in ("delivered", "skipped") and delivery.subject:
                row["repeat"] = delivery.subject._asdict()
            if delivery.record.start < self.taken_up:
                row["late"] = True
        rows.sort(key=lambda item: item[0].record.start)
        self._attempts.append([row for _, row in rows])
        for _, row in rows:
            lane.apply(row)
        if verdict.outcome not in SETTLED:
            lane.sink_digest = self.state.sink_digest(sink)
            return entries
        late: list[tuple[Delivery, JsonObject]] = []
        for delivery, row in rows:
            if "late" in row:
                late.append((delivery, sink_entry(row)))
            else:
                self.results[(*delivery.record.start[:2], sink.id)] = sink_entry(row)
        if late:
            self.write_late_rows(late)
        return entries

    def record_peer(
        self, sink: Sink, peer: str, deliveries: Sequence[Delivery], verdict: Verdict, wait: float | None
    ) -> None:
        """Write down what came of asking one peer of a cluster for deliveries that another one has taken."""
        now = time.time()
        first, last = deliveries[0].record, deliveries[-1].record
        place = record_place(last if verdict.outcome in SETTLED else first, self.source)
        row = self._attempt_row(now, sink, deliveries[0], verdict, attempt=1, duration=0.0, place=place)
        row |= {"peer": peer, "batchSize": len(deliveries)}
        if wait is not None:
            row["nextAttemptAt"] = iso(now + wait, milliseconds=True)
        self._attempts.append([row])
        self.state.lanes[sink.id].apply(row)

    def _attempt_row(
        self,
        now: float,
        sink: Sink,
        delivery: Delivery,
        verdict: Verdict,
        *,
        attempt: int,
        duration: float,
        place: JsonObject,
    ) -> JsonObject:
        row: JsonObject = {
            "timestamp": iso(now),
            "loopId": self.job.loop_id,
            "traceId": self.job.trace_id,
            "escalationId": delivery.escalation.id,
            "sinkId": sink.id,
            "sinkType": sink.type,
            "attempt": attempt,
            "durationMs": round(duration * 1000),
            "httpStatus": verdict.http_status,
            "outcome": verdict.outcome,
            "reasonCode": verdict.reason_code,
            "retryAfterSeconds": verdict.retry_after,
            "position": place,
        }
        if verdict.message and verdict.outcome != "delivered":
            row["message"] = verdict.message
        if verdict.outcome not in SETTLED:
            row["escalationTimestamp"] = delivery.escalation.written_at
        if delivery.held_back and verdict.outcome == "delivered":
            row["heldBack"] = {"repeats": delivery.held_back.repeats, "since": delivery.held_back.since}
        return row

    def write_late_rows(self, settled: Iterable[tuple[Delivery, JsonObject]]) -> None:
        """Write the rows of deliveries that had been put off in earlier ones, with one write."""
        rows: list[JsonObject] = []
        for delivery, entry in settled:
            lane = self.state.lanes.get(entry["id"])
            rerouted = lane is not None and lane.is_again(delivery.record.start)
            if entry["status"] == "success":
                self.counts.late_dispatched += 1
            elif entry["status"] == "failed":
                self.counts.late_failed += 1
                self.counts.reason_codes.add(entry["reasonCode"])
            row = self._row(delivery, [entry])
            rows.append({**row, "late": True, **({"rerouted": True} if rerouted else {})})
        self._telemetry.append(rows)

    def record_by_operator(
        self,
        sink: Sink,
        delivery: Delivery,
        verdict: Verdict,
        *,
        place: JsonObject,
        dead: bool,
        duration: float,
        missed_by: Mapping[str, Verdict] | None = None,
    ) -> None:
        """Write down what an operator did with a delivery that its lane is past: sent it again, or dismissed
        it; `dead`: it was a dead letter. `missed_by`: the peers of a cluster that did not take it."""
        now, sent = time.time(), verdict.outcome != "skipped"

        def attempt_row(said: Verdict) -> JsonObject:
            row = self._attempt_row(
                now, sink, delivery, said, attempt=int(sent), duration=duration, place=place
            )
            return {**row, "byOperator": True}

        row = attempt_row(verdict) | ({"deadLetter": True} if dead else {})
        missed = [attempt_row(said) | {"peer": peer} for peer, said in (missed_by or {}).items()]
        self._attempts.append([row, *missed])
        lane = self.state.lanes.get(sink.id)
        if lane is not None:
            lane.apply_operator(row)
        written = self._row(delivery, [sink_entry(row)])
        self._telemetry.append([{**written, "position": place, "late": True, "byOperator": True}])

    def write_unusable(self, record: Record, line: Unusable) -> None:
        """Write the row of a line that cannot be routed."""
        skipped = line.reason_code == "blank_line"
        row = self._base_row(record, line.id, line.body)
        row |= {
            "status": "skipped" if skipped else "failed",
            "reasonCode": line.reason_code,
            **({"message": line.message} if line.message else {}),
            **({"rawLine": line.raw_line} if line.body is None else {"escalation": line.body}),
            **count_sinks([]),
        }
        self._take_up(record, row)

    def write_row(self, delivery: Delivery, entries: list[JsonObject]) -> None:
        """Write the row of an escalation: from then on it is taken up."""
        for sink_id in put_off(entries):
            self.state.lanes[sink_id].note_put_off(delivery.escalation.timestamp)
        self._take_up(delivery.record, self._row(delivery, entries))

    def _take_up(self, record: Record, row: JsonObject) -> None:
        self._telemetry.append([row])
        self.state.note_lost(row)
        self.state.taken_up = record.end
        counts = self.counts
        counts.processed += 1
        counts.dispatched += row["status"] in ("dispatched", "partial")
        counts.failed += row["status"] in ("failed", "partial")
        counts.skipped += row["status"] == "skipped"
        if row["status"] in ("failed", "partial"):
            codes = [entry["reasonCode"] for entry in row["sinks"] if entry["status"] == "failed"]
            counts.reason_codes |= {row["reasonCode"], *codes}

    def _base_row(self, record: Record, identity: str, body: JsonObject | None) -> JsonObject:
        fields = body or {}
        row = {
            "timestamp": iso(time.time()),
            "loopId": self.job.loop_id,
            "traceId": self.job.trace_id,
            "escalationTraceId": as_text(fields.get("traceId")) or self.job.trace_id,
            "category": "alert_dispatch",
            "escalationCategory": as_text(fields.get("category")),
            "escalationTimestamp": as_text(fields.get("timestamp")),
            "escalationId": identity,
            "position": record_place(record, self.source),
        }
        return {key: value for key, value in row.items() if value is not None}

    def _row(self, delivery: Delivery, entries: list[JsonObject]) -> JsonObject:
        escalation, resolution = delivery.escalation, delivery.resolution
        row = self._base_row(delivery.record, escalation.id, escalation.body)
        status, reason = judge_row(resolution, entries)
        row |= {"eventSeverity": resolution.event_severity, "status": status}
        if reason:
            row["reasonCode"] = reason
        if escalation.unknown_severity is not None:
            row["unknownSeverity"] = cut(escalation.unknown_severity, 100)
        return {**row, "escalation": escalation.body, "route": resolution.route, **count_sinks(entries)}

    def write_event(
        self,
        sink_id: str | None,
        status: str,
        reason_code: str,
        dropped: int | None,
        message: str,
        *,
        rerouted: int | None = None,
    ) -> None:
        """Write the row of something that befell a whole lane, or the source."""
        row = {
            "timestamp": iso(time.time()),
            "loopId": self.job.loop_id,
            "traceId": self.job.trace_id,
            "category": "alert_dispatch",
            "status": status,
            "reasonCode": reason_code,
            "sinkId": sink_id,
            "droppedCount": dropped,
            "reroutedCount": rerouted,
            "message": message,
        }
        self._telemetry.append([{key: value for key, value in row.items() if value is not None}])
        self.state.note_lost(row)
        if status == "failed":
            self.counts.reason_codes.add(reason_code)

    def account_for_events(self) -> None:
        """Note in the state that it accounts for the events that were written so far. Raises StorageError."""
        if self._telemetry.is_open:
            self.state.telemetry = Checkpoint.at_end(self._telemetry.open())

    def flush(self) -> None:
        """Flush the rows to disk and note in the state, which is to be written next, that it accounts for
        them. Raises StorageError."""
        before = (self.state.attempts, self.state.telemetry)
        self.state.attempts = self._attempts.close() or self.state.attempts
        self.state.telemetry = self._telemetry.close() or self.state.telemetry
        self.wrote = before != (self.state.attempts, self.state.telemetry)
        self.check_lock()

    def close(self) -> None:
        """Close the files of a pass that has failed; one that has not has flushed them."""
        for file in (self._attempts, self._telemetry):
            with contextlib.suppress(StorageError):
                file.close()


def judge_row(resolution: Resolution, entries: Sequence[JsonObject]) -> tuple[str, str | None]:
    """The status and reason code of an escalation's row."""
    taken = sum(entry["status"] == "success" for entry in entries)
    failed = sum(entry["status"] == "failed" for entry in entries)
    if not resolution.should_dispatch and not entries:
        return "skipped", "severity_below_min"
    if not entries:
        held_back = any(sink.enabled for sink in resolution.selected)
        return "skipped", "severity_below_min" if held_back else "no_dispatchable_sinks"
    if failed:
        return ("partial", "partial_dispatch_failure") if taken else ("failed", "dispatch_failed")
    return ("dispatched", None) if taken else ("skipped", entries[0]["reasonCode"])


def count_sinks(entries: list[JsonObject]) -> JsonObject:
    return {
        "sinks": entries,
        "sinkCount": len(entries),
        "dispatchedSinkCount": sum(entry["status"] == "success" for entry in entries),
        "failedSinkCount": sum(entry["status"] == "failed" for entry in entries),
    }


# ---------------------------------------------------------------------------------------------------------
# Lanes: one worker a sink, each lane in order, none waiting for another sink
# ---------------------------------------------------------------------------------------------------------

# The waits between quick tries within a pass are up to twice as many seconds, then four times, and so on.
QUICK_RETRY_SECONDS = 0.25
# A lane looks through so many records, or takes so many bytes of them, before others have their turn.
TURN_RECORDS = 1000
TURN_BYTES = 1 << 20

# After so many attempts of one record, it may be the record that its sink cannot take.
SAME_RECORD_ATTEMPTS = 10

# As seconds until the next attempt.
NOT_IN_THIS_PASS = float("inf")

Ending = Literal["caught_up", "failed", "out_of_time", "abandoned"]


class Clock:
    """The time budget of a pass, and whether somebody asked it to end. Monotonic seconds."""

    def __init__(self, budget: float, stop: threading.Event) -> None:
        self.stop = stop
        self._deadline = time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds in which new attempts may start."""
        return 0.0 if self.stop.is_set() else self._deadline - time.monotonic()

    def pause(self, seconds: float) -> bool:
        """Wait, where the budget allows; tells whether it did."""
        if seconds >= self.left:
            return False
        return not self.stop.wait(seconds)


def expired(delivery: Delivery, lane: Lane, policy: DeliveryPolicy, now: float) -> bool:
    """Tell whether nobody will act on a delivery any more: it and its lane have waited too long."""
    since = lane.lagging_since
    if not delivery.late or since is None:
        return False
    written = parse_time(delivery.escalation.timestamp)
    return now - max(written or since, since) > policy.give_up_after


PACE_MINUTE = 60.0


class Pace:
    """Keeps the requests to a sink within so many in any minute, a sixth of them at once.

    The generic cell rate algorithm (ITU-T I.371): `until` is up to when what was sent is paid for, in seconds
    since the epoch, and all there is to keep between passes.
    """

    def __init__(self, per_minute: int) -> None:
        burst = max(1, per_minute // 6)
        self._interval = PACE_MINUTE / (per_minute - burst + 1)
        self._credit = (burst - 1) * self._interval
        self.until = 0.0

    @classmethod
    def of(cls, sink: Sink) -> Self | None:
        """The pace of a sink; None for one that takes any."""
        per_minute = sink.settings.get("maxPerMinute", ADAPTERS[sink.type].max_per_minute)
        return cls(per_minute) if per_minute else None

    def wait(self, now: float) -> float:
        """Seconds until the next request may start."""
        # No debt is larger than this, unless the clock was ahead.
        self.until = min(self.until, now + self._credit + self._interval)
        return max(0.0, self.until - self._credit - now)

    def take_over(self, until: float, now: float) -> None:
        """Go on from what was sent in earlier passes; what cannot be was noted by a clock that was ahead."""
        if until <= now + PACE_MINUTE:
            self.until = max(self.until, until)

    def spend(self, now: float) -> None:
        """Note that a request starts."""
        self.until = max(self.until, now) + self._interval


class Batch(NamedTuple):
    """Deliveries that go out as one request, oldest first, and the repeats that stand between them."""

    deliveries: list[Delivery]
    repeats: list[Delivery]

    def refused(self) -> "Batch":
        """What a sink has refused: a repeat of what it would have been told goes the same way."""
        untold = {delivery.subject.key for delivery in self.deliveries if delivery.subject}
        lost: list[Delivery] = []
        repeats: list[Delivery] = []
        for delivery in self.repeats:
            refused = delivery.subject is not None and delivery.subject.key in untold
            (lost if refused else repeats).append(delivery)
        return Batch(sorted([*self.deliveries, *lost], key=lambda found: found.record.start), repeats)


class Memory:
    """What a sink was told, and what it is about to be told: finds what would be no news to it."""

    def __init__(self, told: Mapping[str, Told], window: float) -> None:
        self._told = told
        self._telling: dict[str, Told] = {}
        self._window = window

    def look_back(self, delivery: Delivery) -> tuple[Delivery, Told | None]:
        """Say what a delivery is about, and what it repeats: what the sink was told of the same within the
        window, by the records' own timestamps. What repeats nothing speaks for those held back before."""
        written = parse_time(delivery.escalation.timestamp)
        if not self._window or written is None:
            return delivery, None
        codes = sorted(reason_codes(delivery.escalation))
        about = [delivery.escalation.category, delivery.resolution.event_severity, codes]
        subject = Subject(short_hash(encode_json(about)), iso(written))
        told = self._last(subject)
        before = parse_time(told.at) if told else None
        if before is not None and abs(written - before) < self._window:
            return delivery._replace(subject=subject), told
        held_back = HeldBack(told.repeats, told.since) if told and told.since else None
        return delivery._replace(subject=subject, held_back=held_back), None

    def tell(self, delivery: Delivery) -> None:
        """Note that the sink is about to be told of a delivery that was looked back on."""
        if subject := delivery.subject:
            self._telling[subject.key] = Told(subject.at)

    def hold_back(self, delivery: Delivery) -> None:
        """Note that a repeat is about to be held back."""
        if (subject := delivery.subject) and (told := self._last(subject)):
            self._telling[subject.key] = told.hold_back(subject.at)

    def _last(self, subject: Subject) -> Told | None:
        return self._telling.get(subject.key) or self._told.get(subject.key)


def waiting_delivery(record: Record, lane: Lane, sink: Sink, router: Router, loop_id: str) -> Delivery | None:
    """A record that waits in a sink's lane, enabled or not; None where it is not for that sink."""
    delivery = router.route(record, loop_id, late=True)
    if isinstance(delivery, Unusable) or all(other.id != sink.id for other in delivery.resolution.reached):
        return None
    return delivery if lane.takes(record.start, delivery.escalation.kind) else None


def count_backlog(lane: Lane, waiting: Iterable[Delivery]) -> None:
    """Count anew what waits in a lane, and find the timestamp of the first that has one."""
    lane.waiting_count, lane.oldest_pending_at = 0, None
    for delivery in waiting:
        lane.note_put_off(delivery.escalation.timestamp)


def backlog(
    lane: Lane, sink: Sink, router: Router, source: Source, taken_up: Position, loop_id: str
) -> Iterator[Delivery]:
    """What was taken up and waits in a sink's lane, in order."""
    for start, stop in list(lane.ranges(min(lane.disabled_at or taken_up, taken_up))):
        for record in source.read(start, stop):
            delivery = waiting_delivery(record, lane, sink, router, loop_id)
            if delivery is not None:
                yield delivery


def router_before(state: State) -> Router | None:
    """Routes as the config did under which the last pass ran; None where that is not known."""
    if state.rules is None:
        return None
    try:
        router = Router(Config.of_rules(state.rules))
        routing = router.config.routing
        routes = (route["category"] for route in routing.get("routes", []))
        for category in ("", *routes, *routing.get("categorySeverity", {})):
            router.resolve(category, None)
            router.resolve(category, SEVERITIES[-1])
    except MALFORMED:
        return None
    return router


def find_rerouted(
    state: State, source: Source, before: Router, router: Router, job: Job
) -> dict[str, list[tuple[Position, Kind]]]:
    """Find what waits in some lane and is now, unlike before, routed to other ones, too.

    Returns for each of their sinks the records, in order: place, and kind (category, own severity).
    """
    taken_up, sinks = state.taken_up, before.config.sinks
    waiting = {name: lane for name, lane in state.lanes.items() if lane.waiting_count and name in sinks}
    found: dict[str, list[tuple[Position, Kind]]] = {}
    if taken_up is None or not waiting:
        return found
    for record in source.read(min(lane.position for lane in waiting.values()), taken_up):
        held = (
            waiting_delivery(record, lane, sinks[name], before, job.loop_id)
            for name, lane in waiting.items()
            if any(start <= record.start < stop for start, stop in lane.ranges(taken_up))
        )
        delivery = next(filter(None, held), None)
        if delivery is None:
            continue
        kind, known = delivery.escalation.kind, {sink.id for sink in delivery.resolution.selected}
        for sink in router.resolve(*kind).dispatchable:
            if sink.id not in known and sink.id in sinks and sink.id in state.lanes:
                found.setdefault(sink.id, []).append((record.start, kind))
    if found:  # under routes before those, it may have been theirs
        settled = find_settled_of(job, found)
        for sink_id, missed in found.items():
            found[sink_id] = [item for item in missed if (*item[0][:2], sink_id) not in settled]
    return found


def find_settled_of(job: Job, sinks: Collection[str]) -> set[Key]:
    """What these sinks have settled, by all the attempts there are."""
    settled: set[Key] = set()
    rows, _ = loop_rows(job, job.attempts_file, Checkpoint(), operator=True)
    for row in rows:
        with contextlib.suppress(*MALFORMED):
            if row["sinkId"] in sinks and row["outcome"] in SETTLED and "peer" not in row:
                settled.add(key_of_row(row, row["sinkId"]))
    return settled


class LaneRun:
    """One lane of one loop in a pass: what it has to deliver, in order, and what came of it."""

    def __init__(self, sink: Sink, ledger: Ledger, router: Router) -> None:
        self.sink = sink
        self.ledger = ledger
        self.lane = ledger.state.lanes[sink.id]
        # None while there is work. Whoever sets it holds the ledger's lock.
        self.ending: Ending | None = None
        self.error: Exception | None = None
        # What came of the last attempt, for each of its deliveries that is not settled.
        self.failures: dict[tuple[int, int], JsonObject] = {}
        self._router = router
        self._window = router.config.repeat_window
        self._policy = router.config.policy
        self._batch_size = ADAPTERS[sink.type].batch_size(sink)
        self._began = ledger.taken_up
        self._records = self._read()
        # What was read and not settled, in order; and how many of these go out one by one.
        self._put_back: deque[tuple[Record, Delivery | None]] = deque()
        # What fails together again and again is sent one by one: it may be one record of it.
        self._single = self._batch_size if self.lane.attempts >= SAME_RECORD_ATTEMPTS else 0

    def behind(self, record: Record) -> bool:
        """Tell whether the lane is still to come to a record in this pass. The ledger's lock is held."""
        return self.ending is None and self.lane.position <= record.start

    def is_over(self) -> bool:
        """Tell whether the lane's pass is at its end, or given up."""
        return self.ending is not None

    def end(self, ending: Ending) -> None:
        """Note how the pass ended for this lane, and wake up whoever waits for it."""
        with self.ledger.changed:
            self.ending = self.ending or ending
            self.ledger.changed.notify_all()

    def fail(self, error: Exception) -> None:
        """End with an error that ends the loop's pass, too."""
        with self.ledger.changed:
            self.error = error
            self.end("failed")

    def next_batch(self) -> Batch | None:
        """What goes out with the next request; None when the lane has caught up.

        What needs no request, because it has expired or is a repeat, is settled on the way. A batch without
        deliveries: that was so much that others come first. Raises OSError or StorageError.
        """
        deliveries: list[Delivery] = []
        repeats: list[Delivery] = []
        memory = Memory(self.lane.told, self._window)
        size = 1 if self._single else self._batch_size
        self._single = max(0, self._single - 1)
        records, held = 0, 0
        step: tuple[Record, Delivery | None] | None = None
        while (
            len(deliveries) < size and records < TURN_RECORDS and held < TURN_BYTES and (step := self._next())
        ):
            record, delivery = step
            records += 1
            if delivery is None:
                if not deliveries and not repeats:
                    self.lane.position = max(self.lane.position, record.end)
                continue
            held += len(record.line)
            delivery, repeated = memory.look_back(delivery)
            if repeated:
                memory.hold_back(delivery)
                repeats.append(delivery)
            elif expired(delivery, self.lane, self._policy, time.time()):
                if deliveries:
                    self._put_back.appendleft(step)
                    break
                self._settle(repeats, REPEATED)
                repeats = []
                self._settle([delivery], EXPIRED)
            else:
                if not deliveries:  # what was held back so far is not held back because of this one
                    self._settle(repeats, REPEATED)
                    repeats = []
                memory.tell(delivery)
                deliveries.append(delivery)
        if not deliveries:
            self._settle(repeats, REPEATED)
            return None if step is None else Batch([], [])
        return Batch(deliveries, repeats)

    def _read(self) -> Iterator[tuple[Record, Delivery | None]]:
        ledger = self.ledger
        for start, stop in list(self.lane.ranges(ledger.source.stop)):
            for record in ledger.source.read(start, stop):
                yield record, self._route(record)

    def _next(self) -> tuple[Record, Delivery | None] | None:
        if self.ending:  # the pass has been given up
            return None
        return self._put_back.popleft() if self._put_back else next(self._records, None)

    def split(self, batch: Batch) -> None:
        """Take back a batch that was refused as a whole: its deliveries go out one by one."""
        together = sorted([*batch.deliveries, *batch.repeats], key=lambda delivery: delivery.record.start)
        self._put_back.extendleft((delivery.record, delivery) for delivery in reversed(together))
        self._single = len(together)

    def missed_batch(self, peer: str, seconds: float) -> list[Delivery]:
        """What a peer of a cluster has missed within these seconds, as much as one request holds."""
        lag = self.lane.peers[peer]
        memory = Memory({}, self._window)
        missed: list[Delivery] = []
        for record in self.ledger.source.read(lag.position, self.lane.position):
            delivery = self._route(record)
            if delivery is None:
                continue
            sent = max(lag.since, parse_time(delivery.escalation.timestamp) or 0.0)
            if sent + seconds <= time.time():
                continue
            delivery, repeated = memory.look_back(delivery)
            if repeated:
                continue
            memory.tell(delivery)
            missed.append(delivery)
            if len(missed) == self._batch_size:
                break
        return missed

    def _route(self, record: Record) -> Delivery | None:
        delivery = self._router.route(record, self.ledger.job.loop_id, late=record.start < self._began)
        if isinstance(delivery, Unusable):
            return None
        if all(sink.id != self.sink.id for sink in delivery.resolution.dispatchable):
            return None
        return delivery if self.lane.takes(record.start, delivery.escalation.kind) else None

    def _settle(self, deliveries: Sequence[Delivery], verdict: Verdict) -> None:
        """Settle deliveries that are sent no request."""
        with self.ledger.changed:
            if deliveries and not self.ending:
                attempt = self.lane.attempts if verdict is EXPIRED else 0
                self.ledger.record(self.sink, deliveries, verdict, attempt=attempt, duration=0.0)


# Every peer of a cluster has missed something, and none has got through it.
CATCHING_UP = Verdict("retry", "request_failed", message="it has yet to get what it missed")
EXPIRED = Verdict("dead_letter", "delivery_expired", message="waited longer than giveUpAfterSeconds")


class SinkWorker:
    """Serves one sink in a thread of its own: the lanes of all loops in turn, one request at a time.

    So a sink has one connection, one pace and, where it is down, one failure, however many loops there are.
    """

    def __init__(
        self,
        sink: Sink,
        policy: DeliveryPolicy,
        origin: Origin,
        redactor: Redactor,
        changed: threading.Condition,
    ) -> None:
        self.sink = sink
        self._policy = policy
        self._origin = origin
        # Until lanes are to be served, there is no time.
        self._clock = Clock(0.0, threading.Event())
        self._redactor = redactor
        self._changed = changed
        self._adapter = ADAPTERS[sink.type]
        self._connections = Connections(sink)
        self._pace = Pace.of(sink)
        # The lanes that are still to be served, and those that wait until the sink is seen to be well.
        self._runs: deque[LaneRun] = deque()
        self._held: list[LaneRun] = []
        # Whether one failure may be that of a record: the sink has answered well to another, just before.
        self._well = False
        # Of a cluster: the peers that have failed, and how. They are not asked again in this pass.
        self._peers_down: dict[str, Verdict] = {}
        # The lane that has found the sink unwell: nothing more is sent in this pass.
        self._down: LaneRun | None = None
        # The attempt that is on its way, and since when: guarded by the lock.
        self._in_flight: tuple[LaneRun, Batch] | None = None
        self._attempt_started = 0.0
        self._abandoned = False
        self._thread: threading.Thread | None = None

    def note_paid(self, until: float) -> None:
        """Count what earlier passes have sent: it is paid for then, at the sink's rate."""
        if self._pace:
            self._pace.take_over(until, time.time())

    def serve(self, runs: Iterable[LaneRun], held: Iterable[LaneRun], clock: Clock) -> None:
        """Serve these lanes, the one first that was served longest ago, in a thread that dies with the
        process."""
        if self._thread is not None and not self._abandoned:
            self._thread.join()  # it has ended the lanes of an earlier call, and has nothing left to do
        # What was tried and refused comes last: one record that a sink cannot take holds up one loop alone.
        self._runs.extend(
            sorted(runs, key=lambda run: (run.lane.attempts > 0, run.lane.last_success_at or 0.0))
        )
        self._held.extend(held)
        self._clock = clock
        limited = [run for run in self._held if run.lane.http_status == 429]
        if limited and self._runs and self._down is None:  # what one loop was told is meant for all
            self._down = max(limited, key=lambda run: run.lane.next_attempt_at or 0.0)
        if self._abandoned:
            self._put_off("failed")
        else:
            self._thread = threading.Thread(target=self._work, name=f"sink {self.sink.id}", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        if self._down is not None:
            self._put_off("failed")
        while self._runs:
            run = self._runs.popleft()
            try:
                batch = run.next_batch()
                ending: Ending | None = None
                if batch is not None:
                    ending = self._deliver(run, batch)
                elif not self._catch_up_some_peer(run):
                    ending = "caught_up"
            except Exception as error:  # noqa: BLE001 - whatever it is, the main thread must learn of it
                run.fail(error)
                continue
            if self._abandoned:
                return
            if ending is None:
                self._runs.append(run)
                continue
            run.end(ending)
            if ending == "abandoned":  # the loop's own trouble, none of the sink's
                continue
            if ending == "failed" and self._well:  # it may be that record alone: the next lane will tell
                self._well = False
                continue
            if ending == "failed":
                self._down = run
            if ending != "caught_up":
                self._put_off(ending)
        for run in self._held:
            run.end("failed")
        self._held.clear()

    def _put_off(self, ending: Ending) -> None:
        """End the lanes that were not served: the sink is down, or the time is up."""
        down = self._down
        for run in (*self._runs, *self._held):
            try:
                batch = run.next_batch()
            except Exception as error:  # noqa: BLE001 - whatever it is, the main thread must learn of it
                run.fail(error)
                continue
            with self._changed:
                if batch is not None and batch.deliveries:
                    run.lane.oldest_pending_at = batch.deliveries[0].escalation.written_at
                if batch is not None and ending == "failed" and down is not None and down is not run:
                    run.lane.wait_like(down.lane, run.ledger.state.sink_digest(self.sink))
                run.end("caught_up" if batch is None else ending)
        self._runs.clear()
        self._held.clear()

    def _deliver(self, run: LaneRun, batch: Batch) -> Ending | None:
        """Try until the batch is settled (None), or until this pass is over for the lane."""
        if not batch.deliveries:
            return None if self._clock.left > 0 else "out_of_time"
        for tries in range(1, self._policy.max_attempts_per_pass + 1):
            if self._clock.left <= 0 or not self._keep_pace(run):
                return self._stop_at(run, batch, "out_of_time")
            wait = self._attempt(run, batch, tries)
            if wait is None:
                return run.ending
            if not self._clock.pause(wait):
                return self._stop_at(run, batch, "failed")
        return self._stop_at(run, batch, "failed")

    def _stop_at(self, run: LaneRun, batch: Batch, ending: Ending) -> Ending:
        run.lane.oldest_pending_at = batch.deliveries[0].escalation.written_at
        return ending

    def _keep_pace(self, run: LaneRun) -> bool:
        """Wait until the sink's rate allows a request; tells whether the time budget allows that."""
        if self._pace is None:
            return True
        wait = self._pace.wait(time.time())
        if wait and not self._clock.pause(wait):
            return False
        self._pace.spend(time.time())
        run.lane.paced_until = self._pace.until
        return True

    def _attempt(self, run: LaneRun, batch: Batch, tries: int) -> float | None:
        """Make one attempt and write it down.

        Returns the seconds until the next one; None where there is none, because the batch is settled or
        the attempt has been abandoned.
        """
        missing = self._adapter.missing_secrets(self.sink)
        # On a busy machine this takes longer than many a request: its time is none of the sink's.
        import requests  # noqa: F401

        with self._changed:
            if run.is_over():  # while it waited for its turn, the loop's pass has failed
                return None
            run.ledger.check_lock()
            self._in_flight, self._attempt_started = (run, batch), time.monotonic()
        if missing:
            verdict = Verdict("misconfigured", "missing_secret", message=f"unset: {' '.join(missing)}")
        else:
            try:
                verdicts = self._ask(run, batch)
            except BaseException:
                with self._changed:
                    self._in_flight = None
                raise
            verdict = best_verdict(verdicts)
        with self._changed:
            self._in_flight = None
            if self._abandoned:  # it is on record as timed out
                return None
            if verdict.outcome == "dead_letter" and self._adapter.splits and len(batch.deliveries) > 1:
                run.split(batch)
                return None
            try:
                if verdict.outcome == "delivered":
                    for peer, said in verdicts.items():
                        if said.outcome != "delivered" and peer not in run.lane.peers:
                            run.ledger.record_peer(
                                self.sink, peer, batch.deliveries, said, self._peer_wait(run, peer, said)
                            )
                wait = self._settle(run, batch, verdict, tries)
            except StorageError:
                if run.is_over():  # that is what the loop's pass has failed for, or no worse
                    return None
                raise
            return None if run.is_over() else wait

    def is_asking_for(self, ledger: Ledger) -> bool:
        """Tell whether an attempt of a loop's pass is on its way. The lock is held."""
        return self._in_flight is not None and self._in_flight[0].ledger is ledger

    def _ask(self, run: LaneRun, batch: Batch) -> dict[str, Verdict]:
        """Send a batch to every peer that has missed nothing. Where none of them takes it, to the others, as
        soon as they have what they missed: each peer gets everything in order, and once."""
        peers, behind = self._connections.peers, run.lane.peers
        current = [peer for peer in peers if peer not in behind and peer not in self._peers_down]
        verdicts = self._ask_peers(batch.deliveries, current)
        if any(verdict.outcome == "delivered" for verdict in verdicts.values()):
            missed = {peer: said for peer, said in self._peers_down.items() if peer not in behind}
            return missed | verdicts
        for peer in [peer for peer in behind if peer in peers and peer not in self._peers_down]:
            if self._clock.left > 0 and self._catch_up(run, peer):
                verdicts |= self._ask_peers(batch.deliveries, [peer])
        # Where all of them have failed before, only asking again can tell whether that is over.
        if not verdicts and self._clock.left > 0:
            verdicts = self._ask_peers(batch.deliveries, [peer for peer in peers if peer not in behind])
        return verdicts or dict.fromkeys(peers, CATCHING_UP)

    def _ask_peers(self, deliveries: Sequence[Delivery], peers: Sequence[str]) -> dict[str, Verdict]:
        """Send deliveries to these peers at the same time. One that fails is down for this pass."""
        if not peers:
            return {}
        with self._changed:
            self._attempt_started = float("inf")
        request = self._connections.build(deliveries, self._origin._replace(emitted_at=time.time()))
        with self._changed:
            self._attempt_started = time.monotonic()
        verdicts = self._connections.ask(request, self._redactor, peers)
        if len(self._connections.peers) > 1:
            for peer, verdict in verdicts.items():
                if verdict.outcome in SETTLED:
                    self._peers_down.pop(peer, None)
                else:
                    self._peers_down[peer] = verdict
        return verdicts

    def _catch_up_some_peer(self, run: LaneRun) -> bool:
        """Send a peer that is due one request of what it has missed; tells whether there was one.

        One at a time, when the lane has nothing else to send: what is new comes first.
        """
        for peer, lag in list(run.lane.peers.items()):
            if peer not in self._connections.peers:
                del run.lane.peers[peer]
            elif self._clock.left > 0 and peer not in self._peers_down and lag.due(time.time()):
                if not self._keep_pace(run):
                    return False
                self._catch_up_once(run, peer)
                return True
        return False

    def _catch_up(self, run: LaneRun, peer: str) -> bool:
        """Send a peer all that it has missed; tells whether it has everything then."""
        while peer in run.lane.peers and self._clock.left > 0 and run.ending is None:
            if not self._keep_pace(run) or not self._catch_up_once(run, peer):
                return False
        return peer not in run.lane.peers

    def _catch_up_once(self, run: LaneRun, peer: str) -> bool:
        """Send a peer one request of what it has missed, if anything; tells whether it took it."""
        missed = run.missed_batch(peer, self._adapter.seconds_to_catch_up(self.sink))
        if not missed:
            with self._changed:
                del run.lane.peers[peer]
            return True
        verdict = self._ask_peers(missed, [peer])[peer]
        with self._changed:
            if run.ending is None:
                # What it refuses it is not asked for again: another peer has it.
                run.ledger.record_peer(self.sink, peer, missed, verdict, self._peer_wait(run, peer, verdict))
        return verdict.outcome in SETTLED

    def _peer_wait(self, run: LaneRun, peer: str, verdict: Verdict) -> float | None:
        if verdict.outcome in SETTLED:
            return None
        lag = run.lane.peers.get(peer)
        return self._backoff(verdict, lag.backoff_step if lag else 0)

    def _settle(self, run: LaneRun, batch: Batch, verdict: Verdict, tries: int) -> float | None:
        """Write down an attempt; the lock is held. Returns the seconds until the next one."""
        lane = run.lane
        wait, gave_up = None, False
        if verdict.outcome not in SETTLED:
            last = tries >= self._policy.max_attempts_per_pass
            wait = self._quick_wait(verdict, tries)
            gave_up = last or wait is None or wait >= self._clock.left
            if gave_up:
                wait = self._backoff(verdict, lane.backoff_step)
            batch = Batch(batch.deliveries, [])
        elif verdict.outcome == "dead_letter":
            batch = batch.refused()
        entries = run.ledger.record(
            self.sink,
            batch.deliveries,
            verdict,
            attempt=lane.attempts + 1,
            duration=time.monotonic() - self._attempt_started,
            wait=wait,
            gave_up=gave_up,
            repeats=batch.repeats,
        )
        if verdict.outcome in SETTLED:
            run.failures = {}
            if verdict.http_status is not None:
                self._well = True
                self._runs.extend(self._held)
                self._held = []
            return None
        if verdict.retry_after is not None:
            self._well = False
        places = (delivery.record.start[:2] for delivery in batch.deliveries)
        run.failures = dict(zip(places, entries, strict=True))
        # A backoff is for another pass, however short it came out.
        return NOT_IN_THIS_PASS if gave_up else wait

    def _quick_wait(self, verdict: Verdict, tries: int) -> float | None:
        """Seconds until another try within this pass; None where that would be of no use, or a repeat.

        After a timeout or a hang-up the sink may have acted on the request: that is not tried at once.
        """
        if verdict.outcome != "retry" or not verdict.not_taken:
            return None
        if verdict.retry_after is not None:
            return verdict.retry_after
        return jitter(min(self._policy.backoff_initial, QUICK_RETRY_SECONDS * 2**tries))

    def _backoff(self, verdict: Verdict, step: int) -> float:
        """Seconds until another pass may try: exponential with full jitter; long where nobody mends it."""
        policy = self._policy
        if verdict.outcome == "misconfigured":
            return policy.backoff_max / 2 + jitter(policy.backoff_max / 2)
        longest = min(policy.backoff_max, policy.backoff_initial * 2 ** min(step, 30))
        return max(verdict.retry_after or 0.0, jitter(longest))

    def watch(self) -> float | None:
        """Abandon an attempt that is over its time, whatever holds it: name lookup, handshake, a dripping
        answer. The lock is held. Returns the seconds until there is something to look at again."""
        if self._abandoned or self._in_flight is None:
            return None
        left = self._attempt_started + self.sink.timeout_seconds + TIMEOUT_GRACE - time.monotonic()
        if left > 0:
            return left
        (run, batch), self._in_flight = self._in_flight, None
        self._abandoned, self._down = True, run
        verdict = timed_out(self.sink, *self._connections.peers)
        if not run.ending:
            try:
                self._settle(run, batch, verdict, self._policy.max_attempts_per_pass)
                run.end(self._stop_at(run, batch, "failed"))
            except DispatchError as error:
                run.fail(error)
        self._put_off("failed")
        return None


def jitter(longest: float) -> float:
    """A random part of a wait, so that many lanes on many machines do not come back at the same moment."""
    import random

    return random.uniform(0.0, longest)  # noqa: S311


# ---------------------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------------------

# How long the writer of rows sleeps while lanes work: rows are written in batches, off the lanes' path.
ROW_INTERVAL = 0.05
# So many loops with work are open at a time, each with so many files: its lock, its source and what was
# rotated out of it, its attempts and its telemetry. Besides, there are the connections.
LOOPS_AT_ONCE = 64
FILES_OF_A_LOOP = 8
FILES_BESIDES = 64


class Pass:
    """One pass over one loop: what is new is taken up, and every lane goes as far as it can.

    `begin`, then whoever drives it serves `runs` and `held` and goes through `work`, then `finish`.
    """

    def __init__(
        self,
        job: Job,
        router: Router,
        state: State,
        source: Source,
        redactor: Redactor,
        changed: threading.Condition,
        lock: tuple[int, int],
        clock: Clock,
        progress: Callable[[int], None],
    ) -> None:
        self.job = job
        self.router = router
        self.config = router.config
        self.state = state
        self.source = source
        # Whoever drives it may give it a share of this.
        self.clock = clock
        self._progress = progress
        self.ledger = Ledger(job, state, source, redactor, changed, lock)
        # The lanes that may try, and those that wait.
        self.runs: dict[str, LaneRun] = {}
        self.held: dict[str, LaneRun] = {}
        # What it has failed for.
        self.error: DispatchError | None = None
        # Whether the state does not know the source, the lanes or the config as they are now.
        self._changed = False

    # -- before anything is sent

    def begin(self) -> bool:
        """Find the place where the last pass ended, bring the lanes in line with source and config, and get
        ready to write. Returns whether there is anything to do.

        Raises StateError, StorageError or OSError.
        """
        self._find_place()
        if self.state.taken_up is None:
            return False
        self._open_lanes()
        busy = bool(self.runs or self.ledger.taken_up < self.source.stop or self.state.unrecorded)
        if busy:
            # Rows name segments and lanes: the state must know them before the first row does.
            if self._changed or not self.state.published.get("source"):
                self.ledger.account_for_events()
                self._save(self.state.published or self._summary("no_new_escalations"), durable=False)
            self.ledger.prepare()
            self._write_owed_rows()
        return busy

    def _find_place(self) -> None:
        state, source = self.state, self.source
        if state.taken_up is None and source.segments:
            state.taken_up = after_lines(source, state.legacy_lines)
            for sink_id, sink in self.config.sinks.items():
                if sink.enabled:
                    state.lanes[sink_id] = Lane(state.taken_up)
            state.recount = False
        if state.taken_up is None:
            state.config_digest = self.config.digest
            return
        last_read, lost = state.taken_up.segment, source.readable_from(state.taken_up)
        if lost:
            what = source.change or "removed"
            message = (
                f"the file that was taken up to line {state.taken_up.line} is gone ({what}): what was "
                "appended to it after that, if anything, was not read"
            )
            self.ledger.write_event(None, "skipped", "source_replaced", None, message)
            state.taken_up = lost
        elif source.unread and source.current:
            names = ", ".join(map(printable, source.unread))
            message = f"the source was rotated, and what {names} may hold of it was not read"
            self.ledger.write_event(None, "skipped", "source_replaced", None, message)
        unknown = any(sink.enabled and name not in state.lanes for name, sink in self.config.sinks.items())
        changed = state.config_digest != self.config.digest or unknown
        if changed or state.recount:
            self._align_lanes()
        self._note_lost_segments(last_read)
        waits = [lane.position for lane in state.lanes.values() if lane.waiting_count or state.recount]
        self._changed |= changed or bool(lost or source.change) or len(source.segments) != len(state.segments)
        if (changed or state.recount) and waits and not source.is_at_hand(min(waits)):
            return  # what waits cannot be looked at: what becomes of it is for when it can be
        if changed or state.recount:
            before = router_before(state)
            if changed and before is not None:
                self._reroute(before)
            for sink_id, lane in state.lanes.items():
                if lane.waiting_count or lane.position < self.ledger.taken_up:
                    self._apply_routes(sink_id, lane)
        state.config_digest, state.recount = self.config.digest, False
        state.rules = self.config.rules()

    def _align_lanes(self) -> None:
        """Open lanes for new sinks, hold those of disabled ones, drop those of removed ones, on record."""
        state, taken_up = self.state, self.ledger.taken_up
        for sink_id in sorted(set(state.lanes) - set(self.config.sinks)):
            lane = state.lanes.pop(sink_id)
            if lane.waiting_count:
                message = (
                    f"sink {sink_id} was removed while {plural(lane.waiting_count, 'delivery')} "
                    f"waited, the oldest of {lane.oldest_pending_at or 'unknown time'}"
                )
                self.ledger.write_event(sink_id, "skipped", "sink_removed", lane.waiting_count, message)
        for sink_id, sink in self.config.sinks.items():
            held = state.lanes.get(sink_id)
            if held is None:
                if sink.enabled:
                    state.lanes[sink_id] = Lane(taken_up)
            elif not sink.enabled:
                held.disabled_at = held.disabled_at or taken_up
            elif held.disabled_at is not None:
                if held.disabled_at < taken_up:
                    held.gaps.append((held.disabled_at, taken_up))
                held.disabled_at = None

    def _note_lost_segments(self, taken_up: int) -> None:
        """Put on record what is lost because files of the source are gone, while newer ones are there. Where
        one is back, what waits in it is sent after all. `taken_up`: the segment that was read last."""
        source, lanes = self.source, self.state.lanes
        newest = max((s.number for s in source.segments if s.descriptor is not None), default=0)
        changed = [
            s for s in source.segments[:-1] if s.number < newest and s.lost is not (s.descriptor is None)
        ]
        self._changed |= bool(changed)
        for segment in changed:
            segment.lost = not segment.lost
            if segment.lost and segment.number > taken_up:
                message = "a file of the source is gone that was rotated before all of it was taken up"
                self.ledger.write_event(None, "skipped", "source_replaced", None, message)
        back = {segment.number for segment in changed if not segment.lost}
        for sink_id, lane in lanes.items() if changed else ():
            if lane.position.segment > changed[-1].number:
                continue
            before = lane.waiting_count
            self._recount(sink_id, lane)
            returned = 0
            if back:
                found = self._backlog(sink_id, lane)
                returned = sum(delivery.record.start.segment in back for delivery in found)
                self.state.note_found(returned)
            if (dropped := before + returned - lane.waiting_count) > 0:
                message = (
                    f"{plural(dropped, 'delivery')} to {sink_id} lost: the file that held the records "
                    f"was removed, compressed or truncated before they were sent"
                )
                self.ledger.write_event(sink_id, "failed", "source_lost", dropped, message)

    def _reroute(self, before: Router) -> None:
        """Take lanes back to what waits elsewhere and is now, unlike before, routed to them."""
        found = find_rerouted(self.state, self.source, before, self.router, self.job)
        for sink_id, missed in found.items():
            if count := self.state.lanes[sink_id].go_back(missed):
                message = (
                    f"{plural(count, 'delivery')} waited for another sink, and a route leads to {sink_id} now"
                )
                self.ledger.write_event(sink_id, "skipped", "route_changed", None, message, rerouted=count)

    def _apply_routes(self, sink_id: str, lane: Lane) -> None:
        """Count what waits in a lane under the routes of a changed config; what they drop, and what they add
        to what the lane has yet to come to, is on record."""
        waited = lane.waiting_count
        self._recount(sink_id, lane)
        if self.state.recount:  # what was rebuilt from telemetry is counted for the first time
            return
        if (dropped := waited - lane.waiting_count) > 0:
            message = f"{plural(dropped, 'delivery')} waited for {sink_id}, where no route leads any more"
            self.ledger.write_event(sink_id, "skipped", "route_changed", dropped, message)
        elif dropped < 0:
            message = (
                f"{plural(-dropped, 'delivery')} that {sink_id} has yet to come to, and a route leads to now"
            )
            self.ledger.write_event(sink_id, "skipped", "route_changed", None, message, rerouted=-dropped)

    def _backlog(self, sink_id: str, lane: Lane) -> Iterator[Delivery]:
        sink, taken_up = self.config.sinks[sink_id], self.ledger.taken_up
        return backlog(lane, sink, self.router, self.source, taken_up, self.job.loop_id)

    def _recount(self, sink_id: str, lane: Lane) -> None:
        count_backlog(lane, self._backlog(sink_id, lane))

    def _open_lanes(self) -> None:
        """Find the lanes that have something to go through, and which of them may try."""
        if self.job.max_escalations:
            self._limit(self.job.max_escalations)
        now = time.time()
        for sink_id, lane in self.state.lanes.items():
            sink = self.config.sinks[sink_id]
            missed = any(lag.due(now) for lag in lane.peers.values())
            if not sink.enabled or not (missed or any(lane.ranges(self.source.stop))):
                continue
            digest = self.state.sink_digest(sink) if lane.next_attempt_at else ""
            due = self.job.now or lane.due(now, digest)
            (self.runs if due else self.held)[sink_id] = LaneRun(sink, self.ledger, self.router)

    def _write_owed_rows(self) -> None:
        """Write the late rows that a kill between attempt and row has cost."""
        for attempt in [attempt for attempt in self.state.unrecorded if attempt.get("late")]:
            for record in self.source.read(start_of_row(attempt), end_of_row(attempt)):
                delivery = self.router.route(record, self.job.loop_id, late=True)
                if not isinstance(delivery, Unusable):
                    self.ledger.write_late_rows([(delivery, sink_entry(attempt))])
                self.state.unrecorded.remove(attempt)

    def _limit(self, count: int) -> None:
        for record in self.source.read(self.ledger.taken_up):
            count -= 1
            if count == 0:
                self.source.stop = record.end
                return

    # -- while the lanes work

    def work(self) -> Iterator[None]:
        """Write the rows of what is new as the lanes get through it. Yields whenever it has to wait for one.

        Raises StorageError or OSError when something could not be read or written.
        """
        yield from self._take_up()
        while any(run.ending is None for run in (*self.runs.values(), *self.held.values())):
            yield
            self._raise_errors()
        self._raise_errors()
        yield from self._take_up()  # what was on its way when the budget was used up, and has come since

    def _take_up(self) -> Iterator[None]:
        """Take up what is new: write the row of each escalation once its sinks have answered or it is known
        that they will not in this pass."""
        if self.ledger.taken_up >= self.source.stop:
            return
        for record in self.source.read(self.ledger.taken_up):
            if self.clock.left <= 0 and not self._answered_beyond(record):
                return
            delivery = self.router.route(record, self.job.loop_id, late=False)
            if isinstance(delivery, Unusable):
                with self.ledger.changed:
                    self.ledger.write_unusable(record, delivery)
                self._progress(1)
                continue
            while True:
                with self.ledger.changed:  # held until the row is written: what comes later is late
                    if not self._must_wait(record, delivery.resolution):
                        entries = self._answers(record, delivery.resolution)
                        if entries is None:
                            return
                        self.ledger.write_row(delivery, entries)
                        break
                yield
                self._raise_errors()
            self._progress(1)

    def _must_wait(self, record: Record, resolution: Resolution) -> bool:
        """Tell whether a lane is still to come to a record, and there is room to wait for it."""
        return len(self.ledger.results) <= ROW_WINDOW and any(
            self.runs[sink.id].behind(record) and (*record.start[:2], sink.id) not in self.ledger.results
            for sink in resolution.dispatchable
            if sink.id in self.runs
        )

    def _answers(self, record: Record, resolution: Resolution) -> list[JsonObject] | None:
        """What the sinks of a record said. None: the budget is used up and no sink has been asked yet."""
        ledger = self.ledger
        entries: list[JsonObject] = []
        out_of_time = False
        for sink in resolution.dispatchable:
            entry = ledger.results.get((*record.start[:2], sink.id))
            run = self.runs.get(sink.id)
            out_of_time |= entry is None and run is not None and run.ending == "out_of_time"
            entries.append(entry or self._put_off(record, sink, run))
        if out_of_time and not self._answered_beyond(record):
            return None
        for sink in resolution.dispatchable:
            ledger.results.pop((*record.start[:2], sink.id), None)
        return entries

    def _answered_beyond(self, record: Record) -> bool:
        """Tell whether a lane has tried this record or a later one, whose row is still to be written."""
        tried = [place for run in self.runs.values() for place in run.failures]
        return any(key[:2] >= record.start[:2] for key in (*self.ledger.results, *tried))

    def _put_off(self, record: Record, sink: Sink, run: LaneRun | None) -> JsonObject:
        """The entry of a sink that has not taken a record in this pass: its failure, or that it waits."""
        if run is not None and (failure := run.failures.get(record.start[:2])):
            return failure
        lane = self.state.lanes[sink.id]
        if lane.position > record.start:  # settled before a crash that has cost its row
            message = "settled in an earlier pass"
            return {**entry_without_answer(sink), "status": "success", "message": message}
        why = (
            f"waits behind earlier deliveries ({lane.reason_code})" if lane.reason_code else "waits its turn"
        )
        if lane.next_attempt_at:
            why += f"; next attempt at {iso(lane.next_attempt_at)}"
        return {**entry_without_answer(sink), "reasonCode": "delivery_deferred", "message": why}

    def _raise_errors(self) -> None:
        for run in (*self.runs.values(), *self.held.values()):
            if run.error is not None:
                raise run.error

    # -- afterwards

    def abandon(self, error: DispatchError | None = None) -> None:
        """Send nothing more. No lane is in the middle of a row when this returns."""
        self.error = error
        with self.ledger.changed:
            for run in (*self.runs.values(), *self.held.values()):
                run.ending = run.ending or "abandoned"

    def finish(self) -> JsonObject:
        """Write the state. Returns the summary. Raises StorageError."""
        if self.state.taken_up is not None:
            self._settle_lanes()
        counts = self.ledger.counts
        if not counts.processed:
            return self._publish("no_new_escalations" if self.source.present else "no_source")
        if not counts.failed:
            return self._publish("success")
        return self._publish("partial" if counts.dispatched else "failed")

    def _settle_lanes(self) -> None:
        """Bring the lanes' places in line with what was taken up, and forget what nobody needs any more."""
        state, source, taken_up = self.state, self.source, self.ledger.taken_up
        now = time.time()
        # What the source is not there for stays on the list.
        state.unrecorded = [
            row
            for row in state.unrecorded
            if row.get("late") or key_of_row(row, row["sinkId"]) in self.ledger.results
        ]
        for sink_id, lane in state.lanes.items():
            run = self.runs.get(sink_id) or self.held.get(sink_id)
            if run is not None and run.ending == "caught_up":
                lane.position = taken_up
            settled = [end_of_row(row) for row in state.unrecorded if row["sinkId"] == sink_id]
            lane.position = min(lane.position, max([taken_up, *settled]))
            lane.gaps = [gap for gap in lane.gaps if lane.position < gap[1]]
            lane.rerouted = [stretch for stretch in lane.rerouted if lane.position < stretch.stop]
            if lane.waiting_count:
                lane.lagging_since = min(lane.lagging_since or now, now)
            else:
                lane.lagging_since = lane.oldest_pending_at = None
        source.mark_taken_up(taken_up)
        needed = [lane.position for lane in state.lanes.values()]
        needed += [lag.position for lane in state.lanes.values() for lag in lane.peers.values()]
        source.forget_before(min([taken_up, *needed]).segment)

    def _summary(self, status: str) -> JsonObject:
        return summarise(self.job, self.state, self.source, self.ledger.counts, status)

    def _save(self, summary: JsonObject, *, durable: bool) -> None:
        self.state.segments, self.state.seen_at = self.source.segments, self.source.opened_at
        self.state.forgotten = self.source.forgotten
        self.state.published = {**summary, **self.state.to_json(self.source)}
        replace_file(self.job.state_file, encode_json(self.state.published) + b"\n", durable=durable)

    def _publish(self, status: str) -> JsonObject:
        self.ledger.flush()
        self._save(self._summary(status), durable=self.ledger.wrote)
        return self.state.published


def entry_without_answer(sink: Sink) -> JsonObject:
    return {"id": sink.id, "type": sink.type, "status": "failed", "httpStatus": None, "reasonCode": None}


def after_lines(source: Source, lines: int) -> Position:
    """The place after so many lines of the source: where the shell dispatcher stopped.

    It counted lines of a file that may have been rotated since: one with fewer lines is a new file.
    """
    position = source.first()
    if lines:
        for record in source.read(position):
            if record.end.line == lines:
                return record.end
    return position


def summarise(job: Job, state: State, source: Source | None, counts: Counts, status: str) -> JsonObject:
    """The summary of a pass, with the fields that the host reads."""
    taken, total = state.legacy_lines, 0
    current = source.current if source else None
    if state.taken_up is not None:
        taken = state.taken_up.line
        if current is not None and current.number != state.taken_up.segment:
            taken = 0
    if source is not None and current is not None:
        start = Position(current.number, 0, 0)
        if state.taken_up is not None and state.taken_up.segment == current.number:
            start = state.taken_up
        total = start.line + source.count_lines(start, Position(current.number, current.stop, 0))
    return {
        "schemaVersion": SCHEMA_VERSION,
        "updatedAt": iso(time.time()),
        "loopId": job.loop_id,
        "traceId": job.trace_id,
        "escalationsFile": job.escalations_file,
        "dispatchTelemetryFile": job.telemetry_file,
        "status": status,
        "processedCount": counts.processed,
        "dispatchedCount": counts.dispatched,
        "skippedCount": counts.skipped,
        "failedCount": counts.failed,
        "failureReasonCodes": sorted(counts.reason_codes),
        "escalationsLineOffset": taken,
        "escalationsLineCount": total,
        "lateDispatchedCount": counts.late_dispatched,
        "lateFailedCount": counts.late_failed,
        **count_lanes(state),
    }


def count_lanes(state: State) -> JsonObject:
    """What the lanes of a loop come to."""
    return {
        "waitingCount": sum(lane.waiting_count for lane in state.lanes.values()),
        "deadLetterCount": sum(lane.dead_letter_count for lane in state.lanes.values()),
    }


# What comes of a loop: the summary of its pass, or what stopped it.
Result = JsonObject | DispatchError


class Run:
    """One run over one loop or many: what its passes share."""

    def __init__(self, config: Config, first: Job, stop: threading.Event) -> None:
        self.router = Router(config)
        self.redactor = config.redactor()
        self.clock = Clock(first.time_budget, stop)
        self.changed = threading.Condition()
        self._origin = Origin(first.repo, first.trace_id, time.time())
        self._workers: dict[str, SinkWorker] = {}

    def open(
        self,
        job: Job,
        lock: tuple[int, int],
        files: contextlib.ExitStack,
        progress: Callable[[int], None],
    ) -> Pass:
        """Open a pass over a loop whose lock is held; `files` closes what it reads and writes.

        Raises StateError or StorageError.
        """
        state = load_state(job)
        source = files.enter_context(state.open_source(job.escalations_file))
        for sink_id, lane in state.lanes.items():  # a sink's rate holds over all loops
            sink = self.router.config.sinks.get(sink_id)
            if sink is not None and sink.enabled and (lane.paced_until or 0.0) > time.time():
                self._worker(sink).note_paid(lane.paced_until or 0.0)
        if any(secret in job.trace_id for secret in self.router.config.hidden):
            job = job._replace(trace_id=self.redactor.mask_value(job.trace_id))
        shared = self.redactor, self.changed
        found = Pass(job, self.router, state, source, *shared, lock, self.clock, progress)
        files.callback(found.ledger.close)
        return found

    def drive(self, passes: Sequence[Pass], clock: Clock) -> Iterator[tuple[Pass, Result]]:
        """Take passes that have begun to their ends, side by side. Yields each with its summary or error."""
        for sink in self.router.config.sinks.values():
            runs = [found.runs[sink.id] for found in passes if sink.id in found.runs]
            held = [found.held[sink.id] for found in passes if sink.id in found.held]
            if runs or held:
                self._worker(sink).serve(runs, held, clock)
        steps: dict[Pass, Iterator[None]] = {}
        for found in passes:
            found.clock = clock
            steps[found] = found.work()
        try:
            while steps:
                ended = count_ended(passes)
                for found, work in list(steps.items()):
                    outcome = self._step(found, work)
                    if outcome is not None:
                        del steps[found]
                        yield found, outcome
                if steps:
                    with self.changed:
                        waits = [wait for w in self._workers.values() if (wait := w.watch()) is not None]
                        if count_ended(passes) == ended:
                            self.changed.wait(min([ROW_INTERVAL, *waits]))
        except BaseException:
            clock.stop.set()
            for found in passes:
                found.abandon()
            raise

    def _step(self, found: Pass, work: Iterator[None]) -> Result | None:
        """Go on with a pass until it has to wait (None) or is at its end.

        One that fails waits for the answers that are on their way: what a sink has taken is to be on record.
        """
        try:
            if found.error is None:
                return found.finish() if next(work, AT_END) is AT_END else None
        except DispatchError as error:
            found.abandon(error)
        except OSError as error:
            found.abandon(storage_error("read", found.job.escalations_file, error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other loops go on
            found.abandon(program_fault(error))
        with self.changed:
            is_asked = any(worker.is_asking_for(found.ledger) for worker in self._workers.values())
        return None if is_asked else found.error

    def _worker(self, sink: Sink) -> SinkWorker:
        if sink.id not in self._workers:
            self._workers[sink.id] = SinkWorker(
                sink, self.router.config.policy, self._origin, self.redactor, self.changed
            )
        return self._workers[sink.id]


AT_END = object()


def count_ended(passes: Iterable[Pass]) -> int:
    """How many lanes have nothing left to do."""
    return sum(run.ending is not None for p in passes for run in (*p.runs.values(), *p.held.values()))


def loops_at_once() -> int:
    """How many loops may be open at a time, as many files as may be: of these, as many as are wanted where
    the process may allow itself that."""
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


def run_loops(
    jobs: Sequence[Job],
    environ: Mapping[str, str],
    stop: threading.Event | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Result]:
    """Run one pass over each of these loops of a repo: with one config, one connection a sink, one budget.

    Returns for each loop id the summary, which is what the state file holds, or what stopped that loop.
    Raises ConfigError.
    """
    stop = stop or threading.Event()
    # One loop is waited for; of many, the others come first.
    wait = LOCK_WAIT_SECONDS / max(len(jobs), 1)
    at_once = loops_at_once() if len(jobs) > 1 else 1
    outcomes: dict[str, Result] = {}
    run: Run | None = None
    busy: list[tuple[Pass, contextlib.ExitStack]] = []
    begun = 0
    with contextlib.ExitStack() as everything:

        def drive(share: float) -> None:
            nonlocal begun
            if run is not None and busy:
                passes = [found for found, _ in busy]
                for found, outcome in run.drive(passes, Clock(run.clock.left * share, stop)):
                    outcomes[found.job.loop_id] = outcome
            for _, files in busy:
                files.close()
            busy.clear()
            begun = 0

        for index, job in enumerate(jobs):
            begun += 1
            files = everything.enter_context(contextlib.ExitStack())
            try:
                lock = files.enter_context(loop_lock(job.lock_file, wait))
                if lock is None:
                    outcomes[job.loop_id] = locked_summary(job)
                    continue
                run = run or Run(load_known_config(job, environ), job, stop)
                found = run.open(job, lock, files, progress)
                if found.begin():
                    busy.append((found, files))
                else:
                    outcomes[job.loop_id] = found.finish()
            except ConfigError as error:
                files.close()
                for other in jobs[index:]:
                    note_invalid_config(other, error, wait)
                raise
            except DispatchError as error:
                outcomes[job.loop_id] = error
            except OSError as error:
                outcomes[job.loop_id] = storage_error("read", job.escalations_file, error)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other loops go on
                outcomes[job.loop_id] = program_fault(error)
            finally:
                if not busy or busy[-1][1] is not files:
                    files.close()
            if len(busy) == at_once:
                drive(begun / (len(jobs) - index - 1 + begun))
        drive(1.0)
    return outcomes


def run_pass(
    job: Job,
    environ: Mapping[str, str],
    stop: threading.Event | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> JsonObject:
    """Run one pass over one loop. Returns the summary. Raises ConfigError, StateError or StorageError."""
    outcome = run_loops([job], environ, stop, progress)[job.loop_id]
    if isinstance(outcome, DispatchError):
        raise outcome
    return outcome


def load_known_config(job: Job, environ: Mapping[str, str]) -> Config:
    """Load the config; one that the loop's state knows to be valid is not validated again."""
    known = None
    with contextlib.suppress(ValueError, StateError):
        known = (read_state_document(job.state_file) or {}).get("configDigest")
    return load_config(job.config_file, environ, known_digest=known)


LINE_COUNTS = ("escalationsLineOffset", "escalationsLineCount")


def locked_summary(job: Job) -> JsonObject:
    """The summary of a pass that found another one at work: it did nothing and left the state alone."""
    state = State()
    with contextlib.suppress(ValueError, StateError):
        state = read_state(job) or state
    summary = summarise(job, state, None, Counts(), "locked")
    return {**summary, **{key: state.published[key] for key in LINE_COUNTS if key in state.published}}


def note_invalid_config(job: Job, error: ConfigError, wait: float) -> None:
    """Say in the state, which the status script reads, that the config is invalid and why. Where that cannot
    be written down, or another pass is at work for so many seconds, it is at least said."""
    # A state that cannot be read is seen to by the next pass with a valid config.
    with contextlib.suppress(ValueError, StateError, StorageError), loop_lock(job.lock_file, wait) as held:
        if not held:
            return
        state = load_state(job)
        with state.open_source(job.escalations_file) as source:
            if state.taken_up is None and source.segments:
                # Whatever becomes of the file until the config is mended: it goes out from here.
                state.taken_up = after_lines(source, state.legacy_lines)
                state.segments, state.seen_at = source.segments, source.opened_at
            elif state.taken_up is None and not state.legacy_lines:
                state.seen_at = state.seen_at or source.opened_at
            seen = summarise(job, state, source, Counts(), "config_invalid")
            known = {**(state.published or seen), **state.to_json(source)}
        document = {**known, **{key: seen[key] for key in LINE_COUNTS}}
        zero = dict.fromkeys(("processedCount", "dispatchedCount", "skippedCount", "failedCount"), 0)
        document |= zero | {
            "updatedAt": iso(time.time()),
            "traceId": job.trace_id,
            "status": "config_invalid",
            "failureReasonCodes": ["config_invalid"],
            "message": cut("; ".join(error.faults), 2000),
        }
        replace_file(job.state_file, encode_json(document) + b"\n", durable=False)


# ---------------------------------------------------------------------------------------------------------
# What will happen: the dry run
# ---------------------------------------------------------------------------------------------------------


def plan_loops(jobs: Sequence[Job], environ: Mapping[str, str], *, show_payload: bool) -> dict[str, Result]:
    """Plan a pass over each of these loops. Returns for each loop id the plan, or what prevents it.

    Raises ConfigError.
    """
    outcomes: dict[str, Result] = {}
    if not jobs:
        return outcomes
    config = load_config(jobs[0].config_file, environ)
    for job in jobs:
        try:
            outcomes[job.loop_id] = plan_pass(job, config, show_payload=show_payload)
        except DispatchError as error:
            outcomes[job.loop_id] = error
    return outcomes


def plan_pass(job: Job, config: Config, *, show_payload: bool) -> JsonObject:
    """Say for each escalation that waits where it would go, and why not to others. Changes nothing.

    Raises StateError or StorageError.
    """
    state = bring_up_to_date(job, *read_sound_state(job))
    plans: list[JsonObject] = []
    notes = config_warnings(config)
    with state.open_source(job.escalations_file) as source:
        if source.segments:
            plan = Plan(job, config, state, source, show_payload=show_payload)
            plans = list(plan.escalations())
            notes += dropped_notes(state, config, plan.left)
    if show_payload and plans:
        for sink in config.sinks.values():
            if sink.enabled and (most := ADAPTERS[sink.type].batch_size(sink)) > 1:
                notes.append(f"{sink.id} is sent up to {most} of these in one request")
    size, _ = unterminated(job.escalations_file)
    if size:
        notes.append(f"the last {plural(size, 'byte')} of {job.escalations_file} wait for a line feed")
    return {
        "schemaVersion": SCHEMA_VERSION,
        "status": "dry_run",
        "loopId": job.loop_id,
        "escalations": plans,
        "notes": notes,
    }


class Plan:
    """What a pass over a loop would do, where every sink takes what it is sent."""

    def __init__(self, job: Job, config: Config, state: State, source: Source, *, show_payload: bool) -> None:
        self._job = job
        self._config = config
        self._state = state
        self._source = source
        self._show_payload = show_payload
        self._router = Router(config)
        self._redactor = config.redactor()
        self._now = time.time()
        self._taken_up = state.taken_up or after_lines(source, state.legacy_lines)
        self._memories: dict[str, Memory] = {}
        # For each sink, the places of the records that wait for it, in order; and how many did already.
        self.waiting: dict[str, dict[Position, None]] = {}
        self.left: dict[str, int] = {}
        for sink_id, lane in state.lanes.items():
            sink = config.sinks.get(sink_id)
            if sink is not None:
                found = backlog(lane, sink, self._router, source, self._taken_up, job.loop_id)
                self.waiting[sink_id] = {delivery.record.start: None for delivery in found}
                self.left[sink_id] = len(self.waiting[sink_id])
        before = router_before(state) if state.config_digest != config.digest else None
        rerouted = find_rerouted(state, source, before, self._router, job) if before else {}
        for sink_id, missed in rerouted.items():
            places = {*self.waiting.get(sink_id, ()), *(place for place, _ in missed)}
            self.waiting[sink_id] = dict.fromkeys(sorted(places))

    def escalations(self) -> Iterator[JsonObject]:
        """What would become of each escalation, those that have waited first."""
        new_from = self._source.readable_from(self._taken_up) or self._taken_up
        first = min([new_from, *(next(iter(places)) for places in self.waiting.values() if places)])
        new = 0
        for record in self._source.read(first):
            late = record.start < new_from
            new += not late
            if self._job.max_escalations and new > self._job.max_escalations:
                return
            delivery = self._router.route(record, self._job.loop_id, late=late)
            if not isinstance(delivery, Unusable):
                plan = self._of_escalation(delivery)
                if plan is not None:
                    yield plan
            elif not late:
                decision = {"escalationId": delivery.id, "decision": delivery.reason_code}
                yield {"line": record.end.line, **decision}

    def _of_escalation(self, delivery: Delivery) -> JsonObject | None:
        """The plan of one escalation; None where no sink waits for it any more."""
        record, escalation, resolution = delivery.record, delivery.escalation, delivery.resolution
        sinks: list[JsonObject] = []
        for sink in resolution.selected:
            lane = self._state.lanes.get(sink.id) or Lane(self._taken_up)
            # The lane may be past a new record, too: settled before a crash that has cost its row.
            due = (
                record.start in self.waiting.get(sink.id, ())
                if delivery.late
                else lane.position <= record.start
            )
            if due:
                sinks.append(self._of_delivery(sink, lane, delivery))
        if delivery.late and not sinks:
            return None
        plan = {
            "line": record.end.line,
            "escalationId": escalation.id,
            "category": self._redactor.mask_value(escalation.category),
            "eventSeverity": resolution.event_severity,
            "minSeverity": resolution.min_severity,
            "timestamp": escalation.written_at,
            "late": delivery.late,
            "decision": decide(sinks, resolution),
            "sinks": sinks,
        }
        return {key: value for key, value in plan.items() if value is not None}

    def _of_delivery(self, sink: Sink, lane: Lane, delivery: Delivery) -> JsonObject:
        memory = self._memories.setdefault(sink.id, Memory(lane.told, self._config.repeat_window))
        delivery, repeated = memory.look_back(delivery)
        decision, why = self._decide(sink, lane, delivery)
        entry: JsonObject = {"id": sink.id, "type": sink.type, "decision": decision}
        if repeated and decision in ("send", "drop"):
            memory.hold_back(delivery)
            decision, why = "skip", f"a repeat of what the sink is told of {repeated.at}"
            entry |= {"decision": decision, "reasonCode": REPEATED.reason_code}
        elif decision == "send":
            memory.tell(delivery)
        if why is not None:
            entry["why"] = why
        if self._show_payload and decision in ("send", "wait"):
            origin = Origin(str(self._job.repo), self._job.trace_id, self._now)
            request = ADAPTERS[sink.type].build(sink, [delivery], origin)
            entry["request"] = show_request(request, self._redactor)
        return entry

    def _decide(self, sink: Sink, lane: Lane, delivery: Delivery) -> tuple[str, str | None]:
        """What a pass would do with a delivery that is no repeat, and why, where that is not to send it."""
        if not sink.enabled and delivery.late:
            return "keep", "the sink is disabled; it waits until the sink is enabled"
        if why := why_not(sink, delivery.resolution):
            return "skip", why
        if not self._job.now and not lane.due(self._now, self._state.sink_digest(sink)):
            until = iso(lane.next_attempt_at or self._now)
            return "wait", f"the sink failed ({lane.reason_code}); next attempt at {until}"
        if expired(delivery, lane, self._config.policy, self._now):
            return "drop", "waited longer than giveUpAfterSeconds: a dead letter"
        return "send", None


def dropped_notes(state: State, config: Config, counted: Mapping[str, int] | None = None) -> list[str]:
    """What waits in a lane and will not be sent, because the config has changed since it was put off.

    `counted`: how much still waits under the routes of this config, where that is known.
    """
    notes = []
    for sink_id, lane in sorted(state.lanes.items()):
        gone = sink_id not in config.sinks
        left = (counted or {}).get(sink_id, lane.waiting_count)
        if (dropped := lane.waiting_count - (0 if gone else left)) > 0:
            why = "the config has no such sink any more" if gone else "no route leads there any more"
            notes.append(f"{plural(dropped, 'delivery')} waiting for {sink_id} will be given up: {why}")
    return notes


def why_not(sink: Sink, resolution: Resolution) -> str | None:
    """Why a sink that a route selects is not sent a record; None where it is."""
    severity = resolution.event_severity
    if not resolution.should_dispatch:
        return f"severity {severity} is below the route's minimum {resolution.min_severity}"
    if not sink.enabled:
        return "the sink is disabled in the config"
    if sink not in resolution.dispatchable:
        return f"severity {severity} is below the sink's minimum {sink.min_severity}"
    return None


def decide(sinks: Sequence[JsonObject], resolution: Resolution) -> str:
    """One word, or the reason code that the record's row would have."""
    for word in ("send", "wait", "keep", "drop"):
        if any(sink["decision"] == word for sink in sinks):
            return word
    codes = [sink["reasonCode"] for sink in sinks if "reasonCode" in sink]
    return codes[0] if codes else judge_row(resolution, [])[1] or "skip"


def show_request(request: HttpRequest, redactor: Redactor) -> JsonObject:
    """A request as it may be shown: secrets masked, of the URL only scheme and host."""
    from urllib.parse import urlsplit

    url = urlsplit(request.url)
    port = f":{url.port}" if url.port else ""
    headers = {name: redactor.mask(value) for name, value in request.headers.items()}
    body: JsonObject = redactor.mask_value(json.loads(request.body))
    return {"url": f"{url.scheme}://{url.hostname}{port}/…", "headers": headers, "body": body}


# ---------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------

Format = Literal["auto", "text", "json"]


MAX_TIME_BUDGET = 86400
MAX_LOOP_ID_BYTES = 200


class Commands(click.Group):
    """The command group: an option before any command means `dispatch`, as the host calls it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = ["dispatch", *args]
        return super().parse_args(ctx, args)


def check_loop_id(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A loop id names a folder: one path component, and nothing that leads elsewhere."""
    if value is not None and (wrong := what_is_wrong_with(value)):
        raise click.BadParameter(wrong, param=param)
    return value


def what_is_wrong_with(loop_id: str) -> str | None:
    """Say why a text is no loop id; None where it is one."""
    if loop_id in ("", ".", "..") or loop_id[0] == "-" or "/" in loop_id or printable(loop_id) != loop_id:
        shown = spell_out(loop_id)
        return f"'{shown}' is no loop id: it is one path component, can be printed, and does not start with -"
    if len(loop_id.encode("utf-8", "surrogateescape")) > MAX_LOOP_ID_BYTES:
        return f"a loop id is at most {MAX_LOOP_ID_BYTES} bytes long"
    return None


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a person reads this stream, which may be closed."""
    return stream is not None and stream.isatty()


def wants_json(form: str, pretty: bool) -> bool:
    return form == "json" or pretty or (form == "auto" and not is_terminal(sys.stdout))


def print_json(document: JsonObject, pretty: bool) -> None:
    """Print one JSON object: on one line, or indented."""
    if pretty:
        text = json.dumps(mend_json(document), indent=2, ensure_ascii=False, allow_nan=False)
    else:
        text = encode_json(document).decode()
    # JSON escapes the first 32 control characters by itself; a terminal may act on the others too.
    if not text.isascii() or "\x7f" in text:
        text = spell_out(text, f"[{FORGING}]")
    click.echo(text)


def terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table for people: every cell printable, the columns aligned.

    Where the terminal is too narrow for it, each row becomes a block of lines.
    """
    cells = [[str(cell) for cell in headings]]
    cells += [[printable("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    if is_terminal(sys.stdout) and sum(widths) + 2 * len(widths) - 2 > terminal_width():
        name = max(map(len, headings))
        blocks = (
            "\n".join(f"{title.ljust(name)}  {cell}" for title, cell in zip(headings, row, strict=True))
            for row in cells[1:]
        )
        return "\n\n".join(blocks)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([click.style(lines[0], bold=True), *lines[1:]])


CONTEXT = {"help_option_names": ["--help", "-h"], "show_default": True, "max_content_width": 100}

# Made once each: click looks up a translation for every one.
FOLDER_TYPE = click.Path(exists=True, file_okay=False)
FILE_TYPE = click.Path()

repo_option = click.option(
    "--repo",
    required=True,
    type=FOLDER_TYPE,
    help="The repository that the loop works on.",
)
here_option = click.option(
    "--repo",
    type=FOLDER_TYPE,
    default=".",
    show_default="the current folder",
    help="The repository whose config is meant.",
)
loop_option = click.option(
    "--loop", "loop_id", required=True, metavar="ID", callback=check_loop_id, help="The loop."
)
config_option = click.option(
    "--alert-config-file",
    envvar=CONFIG_ENV,
    show_envvar=True,
    type=FILE_TYPE,
    show_default=f"REPO/{DEFAULT_CONFIG}",
    help="The sinks and routes.",
)


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name a loop's files, for each command that works on them."""
    options = (
        (
            "--escalations-file",
            "escalations.jsonl",
            "What is to be delivered: one JSON object a line.",
        ),
        ("--dispatch-state-file", "alert-dispatch-state.json", "How far each sink has got."),
        (
            "--dispatch-telemetry-file",
            "telemetry/alerts.jsonl",
            "What became of each escalation; alert-attempts.jsonl beside it has every attempt.",
        ),
    )
    for name, default, text in reversed(options):
        command = click.option(
            name,
            type=FILE_TYPE,
            show_default=f"REPO/.superloop/ops-manager/LOOP/{default}",
            help=text,
        )(command)
    return command


pretty_option = click.option("--pretty", is_flag=True, help="Print indented JSON.")
format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    help="text for people, json for scripts; auto: text on a terminal, else JSON on one line.",
)


@click.group(cls=Commands, context_settings=CONTEXT, epilog=EXIT_CODES_HELP)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Deliver the escalations of a Superloop ops manager to webhooks, Slack, PagerDuty and Alertmanager.

    An option in place of a command means `dispatch`: so the ops manager calls it. `COMMAND --help` says
    more about each command.
    """


@cli.command(epilog=EXIT_CODES_HELP)
@repo_option
@click.option("--loop", "loop_id", metavar="ID", callback=check_loop_id, help="The loop.")
@click.option("--all-loops", is_flag=True, help="In place of --loop: every loop of the repo, side by side.")
@file_options
@click.option(
    "--trace-id",
    envvar=TRACE_ENV,
    show_envvar=True,
    show_default="a new UUID",
    help="Written into everything this pass writes.",
)
@config_option
@click.option(
    "--max-escalations",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Take up at most N new escalations; 0: all that are there.",
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
    help="Try every sink at once, also one that is to be left alone for a while.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 when any delivery failed or was put off.")
@click.option(
    "--dry-run", is_flag=True, help="Send and write nothing; say what would be sent where, and why."
)
@click.option("--show-payload", is_flag=True, help="With --dry-run: show the requests, secrets masked.")
@format_option
@pretty_option
def dispatch(
    repo: str,
    loop_id: str | None,
    all_loops: bool,
    escalations_file: str | None,
    dispatch_state_file: str | None,
    dispatch_telemetry_file: str | None,
    trace_id: str | None,
    alert_config_file: str | None,
    max_escalations: int,
    time_budget: float,
    at_once: bool,
    strict: bool,
    dry_run: bool,
    show_payload: bool,
    form: Format,
    pretty: bool,
) -> None:
    """Deliver what is new, and what waits.

    Prints the summary of the pass, which is also the state file's content. A sink that fails stops its own
    lane only: what it has not taken waits for the next pass.
    """
    if show_payload and not dry_run:
        raise click.UsageError("--show-payload goes with --dry-run")
    if not 0 < time_budget <= MAX_TIME_BUDGET:  # NaN is neither
        raise click.BadParameter(
            f"{time_budget:g} is not more than 0 and at most {MAX_TIME_BUDGET}", param_hint="--time-budget"
        )
    if (loop_id is None) is not all_loops:
        raise click.UsageError("say which: --loop ID, or --all-loops")
    files = (escalations_file, dispatch_state_file, dispatch_telemetry_file)
    if all_loops and any(files):
        raise click.UsageError("--all-loops works on each loop's own files: name none")
    trace = printable(trace_id) if trace_id else new_trace_id()
    found, unusable = make_jobs(repo, loop_id, alert_config_file, *files, trace_id=trace)
    # Those first that were served longest ago: so none is left out for ever.
    jobs = [
        job._replace(max_escalations=max_escalations, time_budget=time_budget, now=at_once)
        for job in sorted(found, key=last_served)
    ]
    if dry_run:
        outcomes = plan_loops(jobs, os.environ, show_payload=show_payload)
    else:
        with orderly_end() as stop, progress_bar(jobs) as progress:
            outcomes = run_loops(jobs, os.environ, stop, progress)
    outcomes |= unusable
    errors = {name: error for name, error in outcomes.items() if isinstance(error, DispatchError)}
    if errors and not all_loops:
        raise next(iter(errors.values()))
    if not all_loops:
        document = cast("JsonObject", outcomes[jobs[0].loop_id])
    elif dry_run:
        document = summarise_plans(outcomes)
    else:
        document = summarise_loops(absolute(repo), outcomes)
    if wants_json(form, pretty):
        print_json(document, pretty)
    elif dry_run:
        click.echo(plans_text(document) if all_loops else plan_text(document))
    else:
        click.echo(loops_text(document) if all_loops else summary_text(document))
    for name, error in errors.items():
        click.echo(f"error: loop {printable(name)}: {error}", err=True)
    if errors:
        raise click.exceptions.Exit(max(error.exit_code for error in errors.values()))
    failed = ("failedCount", "lateFailedCount", "waitingCount")
    if strict and not dry_run and any(document[key] for key in failed):
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


NO_LOOPS = "No loop of this repo has escalations."


def find_loops(repo: str) -> tuple[list[str], dict[str, StorageError]]:
    """The loops of a repo: folders that have escalations or a dispatcher's state; and those with
    escalations that cannot be served, with the reason.

    `fleet` is the host's and no loop, a link to a loop is that loop. Raises StorageError.
    """
    folder = os.path.join(repo, MANAGER_FOLDER)
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name != "fleet" and is_loop(entry.path)]
    except FileNotFoundError:
        return [], {}
    except OSError as error:
        raise storage_error("read", folder, error) from None
    root = os.path.realpath(folder)
    loops: dict[str, str] = {}
    faults: dict[str, str] = {}
    for entry in sorted(found, key=lambda entry: (entry.is_symlink(), entry.name)):
        if wrong := what_is_wrong_with(entry.name):
            faults[entry.name] = wrong
        else:
            linked = entry.is_symlink()
            place = os.path.realpath(entry.path) if linked else os.path.join(root, entry.name)
            loops.setdefault(place, entry.name)
    odd: dict[str, StorageError] = {}
    for name, wrong in faults.items():
        path = os.path.join(folder, name)
        try:
            written = stat_of(os.path.join(path, SOURCE_FILE))
            holds_some = written is not None and written.st_size > 0
        except OSError:
            holds_some = True  # it may
        if holds_some and os.path.realpath(path) not in loops:
            odd[spell_out(name)] = StorageError(
                f"{wrong}; its escalations are not sent: rename it in {folder}"
            )
    return sorted(loops.values()), odd


def is_loop(folder: str) -> bool:
    """Tell whether a folder is that of a loop. One that cannot be looked into is: whoever tries says why."""
    for name in (SOURCE_FILE, STATE_FILE):
        try:
            os.stat(os.path.join(folder, name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return True
        return True
    return False


def last_served(job: Job) -> tuple[float, str]:
    """When a loop was served last, in seconds since the epoch, and its id."""
    with contextlib.suppress(OSError):
        return os.stat(job.state_file).st_mtime, job.loop_id
    return 0.0, job.loop_id


# What the summary of a loop holds that adds up over loops, and what a column of it is called.
LOOP_COUNTS = (
    *("processedCount", "dispatchedCount", "skippedCount", "failedCount"),
    *("lateDispatchedCount", "lateFailedCount", "waitingCount", "deadLetterCount"),
)
LOOP_HEADINGS = (
    *("NEW", "DISPATCHED", "SKIPPED", "FAILED"),
    *("LATE", "LATE FAILED", "WAITING", "DEAD LETTERS"),
)


def list_loops(outcomes: Mapping[str, Result]) -> list[JsonObject]:
    """What came of each loop, by its id; of one that was stopped, the error."""
    return [
        {"loopId": name, "status": "error", "message": str(outcome)}
        if isinstance(outcome, DispatchError)
        else outcome
        for name, outcome in sorted(outcomes.items())
    ]


def summarise_loops(repo: str, outcomes: Mapping[str, Result]) -> JsonObject:
    """The summary of a run over many loops: their sums, and each loop's own status and counts."""
    shown = ("loopId", "status", "message", *LOOP_COUNTS, "failureReasonCodes")
    loops = [{key: loop[key] for key in shown if key in loop} for loop in list_loops(outcomes)]
    sums = {key: sum(loop.get(key, 0) for loop in loops) for key in LOOP_COUNTS}
    statuses = [loop["status"] for loop in loops]
    broken, locked = statuses.count("error"), statuses.count("locked")
    if broken or sums["failedCount"]:
        none = not sums["dispatchedCount"] and (sums["failedCount"] or broken == len(loops))
        status = "failed" if none else "partial"
    elif sums["processedCount"]:
        status = "success"
    elif loops:
        status = "locked" if locked == len(loops) else "no_new_escalations"
    else:
        status = "no_source"
    return {
        "schemaVersion": SCHEMA_VERSION,
        "updatedAt": iso(time.time()),
        "repoPath": repo,
        "status": status,
        "loopCount": len(loops),
        "lockedLoopCount": locked,
        "brokenLoopCount": broken,
        **sums,
        "failureReasonCodes": sorted({code for loop in loops for code in loop.get("failureReasonCodes", [])}),
        "loops": loops,
    }


def loops_text(summary: JsonObject) -> str:
    """The summary of a run over many loops for people: the loops that have something to tell."""
    quiet = {"no_new_escalations", "no_source"}
    loops = [
        loop
        for loop in summary["loops"]
        if loop["status"] not in quiet or loop["waitingCount"] or loop["deadLetterCount"]
    ]
    counts = [
        (heading, key)
        for heading, key in zip(LOOP_HEADINGS, LOOP_COUNTS, strict=True)
        if any(loop.get(key) for loop in loops)
    ]
    rows = [
        (
            loop["loopId"],
            loop["status"],
            *(loop.get(key) for _, key in counts),
            cut(" ".join((loop.get("message") or ", ".join(loop["failureReasonCodes"])).split()), 60) or None,
        )
        for loop in loops
    ]
    colour = STATUS_COLOURS.get(summary["status"], "yellow")
    counted = f"{plural(summary['loopCount'], 'loop')}, {plural(summary['processedCount'], 'new escalation')}"
    lines = [f"{click.style(summary['status'], fg=colour)}  {counted}"]
    if rows:
        lines += ["", table(("LOOP", "STATUS", *(heading for heading, _ in counts), "REASONS"), rows)]
    return "\n".join(lines)


MANAGER_FOLDER = ".superloop/ops-manager"
SOURCE_FILE = "escalations.jsonl"
STATE_FILE = "alert-dispatch-state.json"


def loop_folder(repo: str, loop_id: str) -> str:
    """Where the host keeps a loop's files."""
    return os.path.join(repo, MANAGER_FOLDER, loop_id)


def absolute(path: str) -> str:
    """A path from the root, its links not followed. Raises UsageError."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise click.UsageError("the current folder is not there any more: change to another one") from None


def files_of(job: Job) -> dict[str, str]:
    """A job's files by the options that name them."""
    return {
        "--escalations-file": job.escalations_file,
        "--dispatch-state-file": job.state_file,
        "--dispatch-telemetry-file": job.telemetry_file,
        "--alert-config-file": job.config_file,
    }


def check_files(job: Job, *, named: bool = True) -> None:
    """Refuse paths that would make the program overwrite what is not its own.

    `named`: not all of them are where the host keeps them, so that two may be the same. Raises UsageError
    where they are, StateError or StorageError for what is no file.
    """
    files = {
        **files_of(job),
        "the attempts file": job.attempts_file,
        "the lock file": job.lock_file,
        "the temporary file of the state": job.temporary_file,
    }
    places: dict[str, str] = {}
    for name, file in files.items() if named else ():
        other = places.setdefault(os.path.realpath(file), name)
        if other != name:
            raise click.UsageError(f"{other} and {name} are the same file: {files[other]}")
    for name in ("--dispatch-state-file", "--dispatch-telemetry-file", "the attempts file"):
        found = None
        with contextlib.suppress(OSError):  # what is wrong with it is said when it is opened
            found = stat_of(files[name])
        if found and not stat.S_ISREG(found.st_mode):
            kind = StateError if name == "--dispatch-state-file" else StorageError
            raise kind(f"{files[name]} is not a regular file", ["it is to be written to: move it away"])


def new_trace_id() -> str:
    """The trace id that the environment names, else a new one."""
    return printable(os.environ.get(TRACE_ENV) or str(uuid.uuid4()))


def usual_job(repo: str, loop_id: str, trace_id: str | None = None) -> Job:
    """A job on the files where the host keeps them."""
    repo = absolute(repo)
    folder = loop_folder(repo, loop_id)
    return Job(
        repo=repo,
        loop_id=loop_id,
        trace_id=trace_id or new_trace_id(),
        escalations_file=os.path.join(folder, SOURCE_FILE),
        state_file=os.path.join(folder, STATE_FILE),
        telemetry_file=os.path.join(folder, "telemetry", "alerts.jsonl"),
        config_file=os.path.join(repo, DEFAULT_CONFIG),
    )


def make_job(
    repo: str,
    loop_id: str,
    config_file: str | None = None,
    escalations_file: str | None = None,
    state_file: str | None = None,
    telemetry_file: str | None = None,
    *,
    trace_id: str | None = None,
) -> Job:
    """A job on the files that the command line names, the others where the host keeps them.

    Raises UsageError, StateError or StorageError.
    """
    files = {
        "escalations_file": escalations_file,
        "state_file": state_file,
        "telemetry_file": telemetry_file,
        "config_file": config_file,
    }
    named: dict[str, Any] = {name: absolute(path) for name, path in files.items() if path is not None}
    job = usual_job(repo, loop_id, trace_id)._replace(**named)
    check_files(job, named=bool(named))
    return job


def make_jobs(
    repo: str, loop_id: str | None, config_file: str | None, *files: str | None, trace_id: str | None = None
) -> tuple[list[Job], dict[str, DispatchError]]:
    """The jobs of one loop or, where none is named, of all; and of those that cannot be served what is wrong.

    Raises UsageError, StateError or StorageError where one is named, StorageError where there is no looking.
    """
    if loop_id is not None:
        return [make_job(repo, loop_id, config_file, *files, trace_id=trace_id)], {}
    names, odd = find_loops(absolute(repo))
    jobs: list[Job] = []
    faults: dict[str, DispatchError] = dict(odd)
    for name in names:
        try:
            jobs.append(make_job(repo, name, config_file, trace_id=trace_id))
        except DispatchError as error:
            faults[name] = error
        except click.UsageError as fault:
            faults[name] = StorageError(fault.format_message())
    return jobs, faults


def shell_line(*words: str) -> str:
    """A command to be pasted into a shell."""
    import shlex

    return printable(shlex.join(words))


def command_line(command: str, job: Job, *options: str) -> str:
    """A command of this program on a job's files, to be pasted into a shell."""
    usual = files_of(usual_job(job.repo, job.loop_id, job.trace_id))
    words = [PROGRAM, command, "--repo", job.repo, "--loop", job.loop_id]
    for name, path in files_of(job).items():
        if path != usual[name]:
            words += [name, path]
    return shell_line(*words, *options)


@contextlib.contextmanager
def orderly_end() -> Iterator[threading.Event]:
    """Let SIGTERM, SIGINT and SIGHUP end a pass as its time budget would; a second one ends it at once."""
    stop = threading.Event()

    def ask(signum: int, _: object) -> None:
        stop.set()
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, ask)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def progress_bar(jobs: Sequence[Job]) -> Iterator[Callable[[int], None]]:
    """A progress bar for a backlog, where a person watches standard error."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    new = 0
    for job in jobs:
        state = State()
        with contextlib.suppress(ValueError, StateError):
            state = read_state(job) or state
        with contextlib.suppress(DispatchError), state.open_source(job.escalations_file) as source:
            count = source.count_lines(state.taken_up or source.first())
            new += min(count, job.max_escalations) if job.max_escalations else count
    if not new:
        yield lambda _: None
        return
    bar = click.progressbar(length=new, label="Dispatching", file=sys.stderr)
    with contextlib.ExitStack() as shown:

        def advance(count: int) -> None:
            # An error before anything was taken up stands alone.
            if not bar.entered:
                shown.enter_context(bar)
            bar.update(count)

        yield advance


STATUS_COLOURS = {"success": "green", "no_new_escalations": "green", "partial": "yellow", "failed": "red"}


def summary_text(summary: JsonObject) -> str:
    """The summary of a pass for people: what happened, and how each lane stands."""
    status = summary["status"]
    outcome = ", ".join(f"{summary[f'{word}Count']} {word}" for word in ("dispatched", "skipped", "failed"))
    new = plural(summary["processedCount"], "new escalation")
    coloured = click.style(status, fg=STATUS_COLOURS.get(status, "yellow"))
    lines = [f"{coloured}  loop {summary['loopId']}, {new}: {outcome}"]
    if status == "no_source":
        lines.append(printable(f"there are no escalations at {summary['escalationsFile']}"))
    if summary["lateDispatchedCount"] or summary["lateFailedCount"]:
        late = plural(summary["lateDispatchedCount"], "delivery")
        lines.append(f"late: {late} that had waited, {summary['lateFailedCount']} given up")
    if summary["failureReasonCodes"]:
        lines.append(f"reasons: {', '.join(summary['failureReasonCodes'])}")
    if lanes := summary.get("lanes"):
        rows = [
            (
                sink_id,
                lane["waitingCount"],
                lane.get("oldestPendingAt"),
                lane["deadLetterCount"],
                lane.get("nextAttemptAt") if lane["consecutiveFailures"] else None,
                cut(why_it_failed(lane), 60) if lane.get("reasonCode") else None,
            )
            for sink_id, lane in lanes.items()
        ]
        headings = ("SINK", "WAITING", "OLDEST", "DEAD LETTERS", "NEXT ATTEMPT", "LAST FAILURE")
        lines += ["", table(headings, rows)]
    return "\n".join(lines)


PLAN_COLOURS = {"send": "green", "wait": "yellow", "keep": "yellow", "drop": "red"}


def plan_text(plan: JsonObject) -> str:
    """A dry run for people: each escalation with what becomes of it at each sink, and why; then the sum."""
    blocks = []
    counts: dict[str, int] = {}
    for item in plan["escalations"]:
        head = f"line {item['line']}: {item.get('category', 'no escalation')}"
        if "eventSeverity" in item:
            head += f", severity {item['eventSeverity']} (the route asks for {item['minSeverity']})"
        head += ", has waited since an earlier pass" if item.get("late") else ""
        lines = [click.style(printable(head), bold=True)]
        for sink in item.get("sinks", []):
            counts[sink["decision"]] = counts.get(sink["decision"], 0) + 1
            why = f": {sink['why']}" if "why" in sink else ""
            decision = click.style(f"{sink['decision']:5}", fg=PLAN_COLOURS.get(sink["decision"]))
            lines.append(f"  {decision} {printable(sink['id'] + why)}")
            if "request" in sink:
                shown = json.dumps(sink["request"], indent=2, ensure_ascii=False)
                lines += [f"        {printable(text)}" for text in shown.splitlines()]
        if not item.get("sinks"):
            lines.append(f"  skip  sent to nobody, on record as {item['decision']}")
        blocks.append("\n".join(lines))
    sends = plural(counts.get("send", 0), "delivery")
    end = f"A pass would make {sends} of {plural(len(blocks), 'escalation')}"
    if waits := counts.get("wait", 0) + counts.get("keep", 0):
        end += f", leave {waits} waiting"
    if drops := counts.get("drop", 0):
        end += f", give up {drops}"
    last = [f"{end}. Nothing was sent or written."]
    if not blocks:
        last = ["Nothing waits: a pass would send nothing."]
    return "\n".join([*blocks, *([""] if blocks else []), *last, *note_lines(plan["notes"])])


def note_lines(notes: Iterable[str]) -> list[str]:
    """Notes as lines of a text for people."""
    return [f"note: {printable(note)}" for note in notes]


def summarise_plans(outcomes: Mapping[str, Result]) -> JsonObject:
    """The plans of many loops."""
    loops = list_loops(outcomes)
    return {"schemaVersion": SCHEMA_VERSION, "status": "dry_run", "loopCount": len(loops), "loops": loops}


def plans_text(document: JsonObject) -> str:
    """A dry run over many loops for people: those of which there is something to say."""
    waiting = [plan for plan in document["loops"] if plan.get("escalations") or plan.get("notes")]
    texts = [f"{click.style(printable(plan['loopId']), bold=True)}\n{plan_text(plan)}" for plan in waiting]
    return "\n\n".join(texts) or f"Nothing waits in {plural(document['loopCount'], 'loop')}."


@cli.command(epilog=EXIT_CODES_HELP)
@here_option
@click.option(
    "--config-file",
    envvar=CONFIG_ENV,
    show_envvar=True,
    type=FILE_TYPE,
    show_default=f"REPO/{DEFAULT_CONFIG}",
    help="The sinks and routes.",
)
@click.option("--category", metavar="NAME", help="Show where an escalation of this category goes.")
@click.option("--severity", metavar="LEVEL", help="With --category: the record's own severity.")
@click.option(
    "--list-sinks", is_flag=True, help="Print a line for each sink: id, type, enabled, tab-separated."
)
@click.option("--no-env-check", is_flag=True, help="Do not ask whether the secrets are set.")
@format_option
@pretty_option
def config(
    repo: str,
    config_file: str | None,
    category: str | None,
    severity: str | None,
    list_sinks: bool,
    no_env_check: bool,
    form: Format,
    pretty: bool,
) -> None:
    """Validate the config, and show where alerts go.

    With --category: where an escalation of that category goes, and why.
    """
    if severity is not None and category is None:
        raise click.UsageError("--severity requires --category")
    if list_sinks and category is not None:
        raise click.UsageError("--list-sinks does not go with --category")
    if list_sinks and form == "json":
        raise click.UsageError("--list-sinks prints plain lines: it does not go with --format json")
    level = None if severity is None else read_severity(severity)
    if category is not None and not category.strip():
        raise click.BadParameter("is empty", param_hint="--category")
    path = absolute(config_file or os.path.join(repo, DEFAULT_CONFIG))
    loaded = load_config(path, os.environ, check_env=not no_env_check)
    if list_sinks:
        for sink in loaded.sinks.values():
            click.echo(f"{sink.id}\t{sink.type}\t{json.dumps(sink.enabled)}")
    elif category is not None:
        resolution = Router(loaded).resolve(category.strip(), level)
        if wants_json(form, pretty):
            print_json(resolution_document(loaded, resolution), pretty)
        else:
            click.echo(resolution_text(resolution))
    elif wants_json(form, pretty):
        print_json(config_document(loaded), pretty)
    else:
        click.echo(config_text(loaded))


def read_severity(word: str) -> str:
    """The severity that a word on the command line means. Raises BadParameter where nobody knows it."""
    level = normalise_severity(word)
    if level is None:
        known = ", ".join(SEVERITIES)
        raise click.BadParameter(f"{printable(word)!r} is not one of {known}", param_hint="--severity")
    return level


def config_document(config: Config) -> JsonObject:
    """What `config` prints: the whole config, resolved."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "sourceFile": config.path,
        "defaultMinSeverity": config.default_min_severity,
        "sinks": [sink.summary() for sink in config.sinks.values()],
        "enabledSinkCount": sum(sink.enabled for sink in config.sinks.values()),
        "routing": config.routing,
        "envStatus": config.env_status(),
        "validation": {"envCheckEnabled": config.env_checked},
    }


def resolution_document(config: Config, resolution: Resolution) -> JsonObject:
    """What `config --category` prints: where a record goes, and why."""
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
    """The config for people: the sinks and their secrets, where each category goes, what is hardly meant."""
    present = config.env_status()

    def secrets(sink: Sink) -> str:
        names = sink.secret_refs.values()
        return ", ".join(name if present[name]["present"] else f"{name} (unset)" for name in names)

    def reached(resolution: Resolution) -> str:
        names = (
            sink.id if sink.enabled else f"{sink.id} (disabled)"
            for sink in resolution.selected
            if not resolution.should_dispatch or why_not(sink, resolution) is None or not sink.enabled
        )
        listed = ", ".join(names) or "no sink"
        return listed if resolution.should_dispatch else f"only from {resolution.min_severity} on: {listed}"

    router = Router(config)
    routing = config.routing
    named = [route["category"] for route in routing.get("routes", []) if route.get("enabled", True)]
    rows = [
        (category, found.event_severity, found.min_severity, reached(found))
        for category in dict.fromkeys([*named, *routing.get("categorySeverity", {})])
        for found in (router.resolve(category, None),)
    ]
    other = router.resolve("", None)
    rows.append(("any other", other.event_severity, other.min_severity, reached(other)))
    sinks = (
        (sink.id, sink.type, "yes" if sink.enabled else "no", sink.min_severity, secrets(sink))
        for sink in config.sinks.values()
    )
    return "\n".join(
        [
            f"{click.style('valid', fg='green')}  {printable(config.path)}",
            "",
            table(("SINK", "TYPE", "ENABLED", "MINIMUM", "SECRETS"), sinks),
            "",
            table(("CATEGORY", "SEVERITY", "MINIMUM", "GOES TO"), rows),
            "",
            "SEVERITY counts where a record has none of its own.",
            *(f"warning: {printable(warning)}" for warning in config_warnings(config)),
        ]
    )


def resolution_text(resolution: Resolution) -> str:
    """Where a record of a category goes, for people, and why not elsewhere."""
    route = "its route" if resolution.route["matched"] else "no route of its own: the default sinks"
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

# Failure reasons are counted over this much of the end of the telemetry.
RECENT_BYTES = 1 << 20
# An unfinished line whose writer has been silent for so many seconds is told of.
WRITER_GRACE = 60.0
Health = Literal["ok", "warning", "critical", "disabled", "unknown"]
# Of loops, of which the worst is told to a monitor.
HEALTH_ORDER: tuple[Health, ...] = ("ok", "warning", "unknown", "critical")
# The monitoring-plugin convention: OK, WARNING, CRITICAL, UNKNOWN.
PLUGIN_CODES = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}

STATUS_EXIT_CODES_HELP = """\b
Exit codes:
  0  done, whatever it says
  2  usage: the command line is wrong
  4  the state file is unusable
  5  the source, the telemetry, the disk or the output failed

\b
Exit codes with --check:
  0  OK
  1  WARNING: something waits or was lost, a sink fails, no sink is enabled, or there are dead letters
  2  CRITICAL: a sink has been failing, or something has waited for a pass and none has run, for longer
     than --critical-after; or the config is invalid
  3  UNKNOWN: no pass has run, the files cannot be read, or the command line is wrong
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
    """One thing that an operator should know of a loop, how bad it is, and what to do about it."""

    health: Health
    words: str
    advice: str | None = None


def advise(
    reason_code: str | None,
    http_status: int | None,
    message: str | None,
    *,
    waits: bool = True,
    refused: bool = False,
) -> str:
    """Say what to do about a failure. `waits`: what failed waits in a lane, and is tried again by itself.
    `refused`: it is a dead letter."""
    text = (message or "").lower()
    time_will_tell = "nothing to do, what waits goes out by itself" if waits else "try again later"
    if reason_code == "missing_secret":
        return "set the variable in the environment that reconcile runs in"
    if reason_code == "request_failed":
        # The phrases of `Client`: none is a part of a host's name.
        if "the proxy " in text:
            return "check the proxy that the environment names, or name the sink's host in no_proxy"
        if "no such host: " in text:
            return "check the host name in the sink's URL, and this machine's DNS"
        if "tls: the certificate of " in text:
            return "check the sink's certificate; name the file of a private CA with caFileEnv"
        if "connection refused by " in text or "no connection to " in text:
            return "check that the sink is up and reachable from here (firewall, proxy)"
        return "check that the sink is up; where it is only slow, raise its timeoutSeconds"
    if refused:
        return "the sink does not take this record: read its answer, then redeliver or skip"
    if (
        http_status in (401, 403)
        or text == "invalid_token"
        or (http_status == 400 and re.search(ROUTING_KEY, text))
    ):
        return "the credential is wrong or was revoked: make a new one and set its variable"
    if text in SLACK_SINK_ERRORS and ("channel" in text or "archived" in text):
        return "Slack does not let this webhook post to its channel: unarchive it, or set another one"
    if http_status == 407:
        return "the proxy wants a user name and a password: set them in its URL in the environment"
    if http_status in (404, 405, 410) or text in SLACK_SINK_ERRORS or text == WEB_PAGE.lower():
        return "the URL is wrong or was deleted: make a new one and set its variable"
    if http_status is not None and 300 <= http_status < 400:
        return "set the URL that the redirect leads to"
    if http_status == 429 or text in SLACK_RATE_ERRORS:
        return f"the sink limits the rate: {time_will_tell}"
    if text in SLACK_WAIT_ERRORS or (
        http_status is not None and (http_status >= 500 or http_status in SINK_UNWELL)
    ):
        return f"the sink has trouble of its own: {time_will_tell}"
    if text.startswith(NO_ALERTMANAGER.lower()):
        return "check the sink's URLs: https:// where TLS is spoken, and what a proxy before it wants"
    if http_status is not None:
        return "the sink takes nothing as it is set up: read its answer, mend its URL, headers or settings"
    return "see the last rows of telemetry/alert-attempts.jsonl"


def why_it_failed(failure: Mapping[str, Any]) -> str:
    """The reason code of a failure, the HTTP status and what was answered, as far as they are known."""
    status, message = failure.get("httpStatus"), failure.get("message")
    answer = f" {status}" if status is not None else ""
    return f"{failure.get('reasonCode') or 'failed'}{answer}" + (f": {message}" if message else "")


def loop_status(job: Job, critical_after: float) -> JsonObject:
    """How each sink of a loop fares, right now: the state is brought up to date in memory from the rows that
    were written after it. Needs neither config nor secrets; what it cannot know without, it says.

    Raises StateError or StorageError.
    """
    now = time.time()
    notes: list[str] = []
    kept, damaged = read_sound_state(job)
    document = kept.published if kept else None
    state = bring_up_to_date(job, kept, damaged)
    known = state.taken_up is not None or state.legacy_lines > 0
    if document is None and (damaged or known):
        notes.append(
            f"the state file {job.state_file} is {'damaged' if damaged else 'not there'}: "
            + (
                "this is from the telemetry, from which the next pass rebuilds it"
                if known
                else "the next pass begins anew"
            )
        )
    config, config_valid, told = config_of_status(job, state)
    notes += told
    with state.open_source(job.escalations_file) as source:
        new, oldest_new, pending = count_new(job, state, config, source)
        if state.recount and state.taken_up is not None and config is not None:
            router = Router(config)
            for sink_id, lane in state.lanes.items():
                if sink := config.sinks.get(sink_id):
                    waiting = backlog(lane, sink, router, source, state.taken_up, job.loop_id)
                    count_backlog(lane, waiting)
        pending_lines = find_pending_lines(job, state, config, source)
    if new and config is None:
        notes.append(
            f"{plural(new, 'escalation')} not taken up yet, for which sinks is not known without a config"
        )
    failures = last_failures(job)
    sinks = [
        sink_status(
            sink_id,
            config,
            state.lanes.get(sink_id),
            failures.get(sink_id, {}),
            pending.get(sink_id),
            pending_lines.get(sink_id),
            critical_after,
            now,
        )
        for sink_id in sorted({*state.lanes, *(config.sinks if config else ())})
    ]
    notes += [
        f"{plural(sink['lagCount'], 'delivery')} waiting for {sink['id']}, which is disabled: kept until it "
        f"is enabled, or given up with `skip`"
        for sink in sinks
        if sink["enabled"] is False and sink["lagCount"]
    ]
    # The file is well; a secret was unset, or it has been mended since.
    was_invalid = (document or {}).get("status") == "config_invalid" and config_valid is not False
    if was_invalid:
        config_valid = False
        notes.append(f"the last pass found the config invalid: {(document or {}).get('message')}")
    rows = recent_rows(job.telemetry_file)
    found = {
        "schemaVersion": SCHEMA_VERSION,
        "generatedAt": iso(now),
        "repoPath": job.repo,
        "loopId": job.loop_id,
        "health": "unknown",
        "alerts": {
            "dispatch": document
            and {
                **{key: document.get(key) for key in DISPATCH_FIELDS},
                "lastTraceId": document.get("traceId"),
            },
            "lastDelivery": (last := last_row(job.telemetry_file))
            and {key: last.get(key) for key in DELIVERY_FIELDS},
        },
        "sinks": sinks,
        "failureReasons": count_failures(rows),
        "untakenCount": new,
        "configValid": config_valid,
        "silent": is_silent(document, last, sinks, new, oldest_new, critical_after, now),
    }
    findings = list(find_troubles(job, found, known or document is not None, was_invalid=was_invalid))
    if not (config_valid is False or not (known or document)):
        findings += [
            *find_lost(job, state, now),
            *find_unfinished(job, now),
            *find_broken_pass(document, last),
        ]
    if not findings:
        findings = [
            Finding("ok", "nothing waits: all that was taken up is delivered, or its row says why not")
        ]
    return {
        **found,
        "health": max((finding.health for finding in findings), key=HEALTH_ORDER.index),
        "verdict": "; ".join(finding.words for finding in findings),
        "advice": list(dict.fromkeys(finding.advice for finding in findings if finding.advice)),
        "notes": notes,
    }


def config_of_status(job: Job, state: State) -> tuple[Config | None, bool | None, list[str]]:
    """The config, as far as it can be had; whether it is valid, None where there is none; and what is to be
    said of it."""
    try:
        config = load_config(job.config_file, {}, check_env=False, known_digest=state.config_digest)
    except ConfigError as error:
        if os.path.exists(job.config_file):
            return None, False, [error.headline, *error.faults]
        # No fault where status is asked on another machine.
        return None, None, [f"config not read: {job.config_file} is not there"]
    enabled = any(sink.enabled for sink in config.sinks.values())
    return config, True, [*(config_warnings(config) if enabled else ()), *dropped_notes(state, config)]


def count_new(
    job: Job, state: State, config: Config | None, source: Source
) -> tuple[int, str | None, dict[str, tuple[int, str | None]]]:
    """Count what no pass has taken up yet: in all, and for each sink; with the timestamp of the oldest."""
    router = Router(config) if config else None
    new, oldest_new = 0, None
    pending: dict[str, tuple[int, str | None]] = {}
    if not source.segments:
        return 0, None, {}
    start = state.taken_up or after_lines(source, state.legacy_lines)
    for record in source.read(source.readable_from(start) or start):
        new += 1
        line = parse_escalation(record, job.loop_id)
        if isinstance(line, Unusable):
            continue
        oldest_new = oldest_new or line.written_at
        for sink in router.resolve(line.category, line.severity).dispatchable if router else ():
            lane = state.lanes.get(sink.id)
            if lane is None or lane.position <= record.start:  # else it has been sent, its row is to come
                count, oldest = pending.get(sink.id, (0, line.written_at))
                pending[sink.id] = (count + 1, oldest)
    return new, oldest_new, pending


def find_pending_lines(job: Job, state: State, config: Config | None, source: Source) -> dict[str, int]:
    """For sinks that fail on the same record again and again, its line in the current file."""
    found: dict[str, int] = {}
    for sink_id, lane in state.lanes.items():
        sink = config.sinks.get(sink_id) if config else None
        if config and sink and state.taken_up and source.current and lane.attempts > SAME_RECORD_ATTEMPTS:
            waiting = backlog(lane, sink, Router(config), source, state.taken_up, job.loop_id)
            first = next(waiting, None)
            if first is not None and first.record.start.segment == source.current.number:
                found[sink_id] = first.record.end.line
    return found


def sink_status(
    sink_id: str,
    config: Config | None,
    lane: Lane | None,
    failure: JsonObject,
    new: tuple[int, str | None] | None,
    pending_line: int | None,
    critical_after: float,
    now: float,
) -> JsonObject:
    """How one sink fares. `failure`: the attempts row of its last failure, as far as it is at hand.
    `pending_line`: where that is, the line of the record that it fails on again and again."""
    sink = config.sinks.get(sink_id) if config else None
    lane = lane or Lane(Position(1, 0, 0))
    lag = lane.waiting_count + (new[0] if new else 0)
    # Where nothing is left to be sent, nothing is stuck, whatever became of it.
    failing = lane.consecutive_failures > 0 and lag > 0
    health: Health = "ok"
    if sink is not None and not sink.enabled:
        health = "disabled"
    elif failing and lane.failing_since is not None and now - lane.failing_since > critical_after:
        health = "critical"
    elif lag or lane.dead_letter_count or lane.peers:
        health = "warning"
    # The lane itself forgets why it failed as soon as a delivery is made.
    reason = (
        failure
        if lane.last_failure_at and lane.reason_code is None
        else {"reasonCode": lane.reason_code, "httpStatus": lane.http_status, "message": lane.message}
    )
    return {
        "id": sink_id,
        "type": sink.type if sink else None,
        "enabled": sink.enabled if sink else None,
        "health": health,
        "lagCount": lag,
        "oldestPendingAt": (lane.oldest_pending_at if lane.waiting_count else None)
        or (new[1] if new else None),
        "lastSuccessAt": iso(lane.last_success_at) if lane.last_success_at else None,
        "lastFailureAt": iso(lane.last_failure_at) if lane.last_failure_at else None,
        **{key: reason.get(key) for key in ("reasonCode", "httpStatus", "message")},
        "consecutiveFailures": lane.consecutive_failures,
        "pendingLine": pending_line if failing else None,
        "failingSince": iso(lane.failing_since) if failing and lane.failing_since else None,
        "nextAttemptAt": iso(lane.next_attempt_at) if failing and lane.next_attempt_at else None,
        "deadLetterCount": lane.dead_letter_count,
        "deliveredCount": lane.delivered_count,
        "failedAttemptCount": lane.failed_attempt_count,
        "givenUpCount": lane.given_up_count,
        "skippedCount": lane.skipped_count,
        # Of a cluster: the peers that have missed what another one took.
        "laggingPeers": [
            {
                "peer": name,
                "since": iso(behind.since),
                "reasonCode": behind.reason_code,
                "httpStatus": behind.http_status,
                "message": behind.message,
                "nextAttemptAt": behind.next_attempt_at and iso(behind.next_attempt_at),
            }
            for name, behind in sorted(lane.peers.items())
        ],
    }


def find_troubles(job: Job, status: JsonObject, ran: bool, *, was_invalid: bool) -> Iterator[Finding]:
    """What is wrong with a loop's config, passes and lanes, worst first.

    `ran`: a pass has. `was_invalid`: the last one found the config invalid, which it does not look now.
    """
    if was_invalid:
        words = "the last pass found the config invalid, and sent nothing"
        advice = "mend what the note names where reconcile runs; where that is done, the next pass sends all"
        yield Finding("critical", words, advice)
        return
    if status["configValid"] is False:
        checked = shell_line(PROGRAM, "config", "--config-file", job.config_file)
        advice = f"run `{checked}`, mend what it names; then all that waits goes out"
        yield Finding("critical", "the config is invalid: nothing is sent", advice)
        return
    dispatch = f"`{command_line('dispatch', job)}`"
    if not ran:
        yield Finding("unknown", "no pass has run yet", f"run {dispatch}, or hook it into reconcile")
        return
    if status["silent"]:
        last = (status["alerts"]["dispatch"] or {}).get("updatedAt") or "who knows when"
        words = f"no pass has run since {last}, and something waits for one"
        yield Finding(
            "critical", words, f"see why reconcile, or the timer, runs none; {dispatch} runs one now"
        )
    active = [sink for sink in status["sinks"] if sink["health"] != "disabled"]
    stuck = [sink for sink in active if sink["consecutiveFailures"] and sink["lagCount"]]
    for sink in sorted(stuck, key=lambda sink: sink["health"] != "critical"):
        waiting = plural(sink["lagCount"], "delivery")
        words = f"{sink['id']} is failing ({why_it_failed(sink)}), {waiting} waiting"
        advice = advise(sink["reasonCode"], sink["httpStatus"], sink["message"])
        if sink["pendingLine"] and (sink["httpStatus"] or 0) >= 500:
            given_up = command_line("skip", job, "--sink", sink["id"], "--to-line", str(sink["pendingLine"]))
            advice += (
                f"; where others get through to it, it is line {sink['pendingLine']} that it fails on, "
                f"which `{given_up}` gives up"
            )
        elif sink["nextAttemptAt"]:
            at_once = command_line("dispatch", job, "--now")
            advice += f"; the next attempt is at {sink['nextAttemptAt']}, or at once with `{at_once}`"
        named = f"{sink['id']}: " if len(stuck) > 1 else ""
        yield Finding(sink["health"], words, named + advice)
    if lagging := [sink for sink in active if sink["lagCount"] and sink not in stuck]:
        waiting = plural(sum(sink["lagCount"] for sink in lagging), "delivery")
        words = f"{waiting} waiting for {', '.join(sink['id'] for sink in lagging)}"
        yield Finding("warning", words, f"the next pass goes on with them; {dispatch} does so now")
    for sink in active:
        for behind in sink["laggingPeers"]:
            why = f" ({why_it_failed(behind)})" if behind["reasonCode"] else ""
            words = (
                f"{behind['peer']} of {sink['id']} misses what its peers have, since {behind['since']}{why}"
            )
            advice = advise(behind["reasonCode"], behind["httpStatus"], behind["message"])
            yield Finding("warning", words, f"{behind['peer']}: {advice}; it gets what it misses by itself")
    if dead := [sink for sink in active if sink["deadLetterCount"]]:
        count = plural(sum(sink["deadLetterCount"] for sink in dead), "dead letter")
        words = f"{count} of {', '.join(sink['id'] for sink in dead)}"
        again = f"`{command_line('redeliver', job, '--dead-letters')}` sends them again"
        yield Finding("warning", words, f"{again}, `skip` in its place dismisses them")
    if status["untakenCount"] and status["configValid"] is None:
        words = f"{plural(status['untakenCount'], 'escalation')} not taken up yet"
        yield Finding("warning", words, f"run {dispatch}")
    if status["sinks"] and not active:
        words = "no sink is enabled: nothing is sent"
        yield Finding("warning", words, 'set "enabled": true on a sink in the config')


def where_it_worked(job: Job) -> Job:
    """A job on the source and the telemetry of the last pass, where there are none at the places that this
    one names."""
    document: JsonObject = {}
    files: dict[str, Any] = {}
    with contextlib.suppress(ValueError, StateError):
        document = read_state_document(job.state_file) or {}
    for key, name in (("escalationsFile", "escalations_file"), ("dispatchTelemetryFile", "telemetry_file")):
        path = document.get(key)
        if isinstance(path, str) and os.path.isfile(path) and not os.path.lexists(getattr(job, name)):
            files[name] = path
    return job._replace(**files)


def is_silent(
    document: JsonObject | None,
    last: JsonObject | None,
    sinks: Sequence[JsonObject],
    new: int,
    oldest_new: str | None,
    critical_after: float,
    now: float,
) -> bool:
    """Tell whether no pass runs any more, though something has waited for one for too long.

    `last`: the last row of the telemetry, for when the state does not say when a pass has run. Of what has no
    timestamp it is not known since when it waits: for long, that is.
    """
    waiting = [sink["oldestPendingAt"] for sink in sinks if sink["lagCount"] and sink["health"] != "disabled"]
    waiting += [oldest_new] if new else []
    times = (parse_time((row or {}).get(key)) for row, key in ((document, "updatedAt"), (last, "timestamp")))
    worked = next((at for at in times if at is not None and at <= now + WRITER_GRACE), 0.0)
    since = min((parse_time(at) or 0.0 for at in waiting), default=now)
    return now - max(worked, 0.0) > critical_after and now - since > critical_after


def find_lost(job: Job, state: State, now: float) -> Iterator[Finding]:
    """Tell of escalations that reached no sink and never will by themselves, for as long as LOSS_SHOWN."""
    for code, (count, at) in state.lost.items():
        if now - at >= LOSS_SHOWN:
            continue
        last = iso(at)
        if code == "source_replaced":
            words = f"the source was replaced, perhaps before all of it was read ({code}, at {last})"
            advice = f"compare what is there with the last rows of {job.telemetry_file}"
        elif code == "source_lost":
            words = f"{plural(count, 'delivery')} lost ({code}, at {last})"
            advice = "keep a few rotations of the source, uncompressed, for as long as a sink may be down"
        elif code == "sink_removed":
            words = f"{plural(count, 'delivery')} given up with a sink that was removed ({code}, at {last})"
            advice = "where that was not wanted, put the sink back under its id, then `redeliver` to it"
        elif code == "no_dispatchable_sinks":
            words = f"{plural(count, 'escalation')} reached nobody: no sink enabled ({code}, last at {last})"
            advice = (
                "enable a sink of their route, then `redeliver` what was missed; where nobody is to be told, "
                "raise the route's minSeverity"
            )
        else:
            words = f"{plural(count, 'line')} of the source sent to nobody ({code}, last at {last})"
            select = shell_line("jq", "-c", f'select(.reasonCode == "{code}")', job.telemetry_file)
            advice = f"`{select}` shows them; mend their writer, append what is worth it to the source"
        yield Finding("warning", words, advice)


def find_unfinished(job: Job, now: float) -> Iterator[Finding]:
    """Tell of a last line that nobody finishes: it waits for its line feed, and spoils the next one."""
    size, written = unterminated(job.escalations_file)
    if size and now - written > WRITER_GRACE:
        words = f"the source ends in {plural(size, 'byte')} without a line feed, since {iso(written)}"
        end = f"`echo >>{shell_line(job.escalations_file)}`"
        advice = f"where its writer has gone, end the line: {end}; the next pass takes it up"
        yield Finding("warning", words, advice)


def find_broken_pass(document: JsonObject | None, last: JsonObject | None) -> Iterator[Finding]:
    """Tell of a last pass that ended with an error, of which only reconcile's own row knows."""
    if last is not None and last.get("status") == "failed_command":
        ended, worked = parse_time(last.get("timestamp")), parse_time((document or {}).get("updatedAt"))
        if ended is not None and (worked is None or ended >= worked):
            said = cut(printable(str(last.get("message"))), 200)
            yield Finding("warning", f"the last pass ended with an error: {said}", "do what the error says")


def last_lines(path: str, size: int) -> list[bytes]:
    """The whole lines in the last `size` bytes of a file, as far as there are any."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error("read", path, error) from None
    return lines[1:] if end > size else lines


def last_row(path: str) -> JsonObject | None:
    """The last line of the telemetry, as the status script reads it; None where it is no row."""
    for size in (RECENT_BYTES, 2 * MAX_RECORD_BYTES):
        if lines := last_lines(path, size):
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(lines[-1])
                return row if isinstance(row, dict) else None
    return None


def recent_rows(path: str) -> list[JsonObject]:
    """The rows at the end of a file of rows."""
    rows = []
    for line in last_lines(path, RECENT_BYTES):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(mapping(json.loads(line)))
    return rows


def last_failures(job: Job) -> dict[str, JsonObject]:
    """The last failed attempt of each sink, as far as the end of the attempts file has one."""
    return {
        str(row.get("sinkId")): row
        for row in recent_rows(job.attempts_file)
        if row.get("loopId") == job.loop_id
        and "peer" not in row
        and row.get("outcome") in ("retry", "misconfigured", "dead_letter")
    }


def count_failures(rows: Iterable[JsonObject]) -> list[JsonObject]:
    """Count the failure reasons of rows, most frequent first."""
    found: dict[str, JsonObject] = {}
    for row in rows:
        if row.get("status") not in ("failed", "partial", "failed_command"):
            continue
        sinks = row.get("sinks")
        entries = [mapping(entry) for entry in sinks] if isinstance(sinks, list) else []
        codes = {entry.get("reasonCode") for entry in entries if entry.get("status") == "failed"}
        for code in codes or {row.get("reasonCode")}:
            if isinstance(code, str):
                reason = found.setdefault(code, {"reasonCode": code, "count": 0, "lastSeenAt": None})
                reason["count"] += 1
                reason["lastSeenAt"] = row.get("timestamp")
    return sorted(found.values(), key=lambda reason: (-reason["count"], reason["reasonCode"]))


HEALTH_COLOURS = {"ok": "green", "warning": "yellow", "critical": "red", "unknown": "yellow"}


def status_text(status: JsonObject) -> str:
    """The status of a loop for people: the verdict and the advice, then each sink, then the evidence."""
    head = click.style(status["health"].upper(), fg=HEALTH_COLOURS[status["health"]], bold=True)
    lines = [f"{head}  loop {status['loopId']}: {printable(status['verdict'])}"]
    lines += [f"What to do: {printable(advice)}" for advice in status["advice"]]
    now = parse_time(status["generatedAt"]) or 0.0
    rows = [
        (
            sink["id"],
            sink["health"],
            sink["lagCount"],
            how_long(sink["oldestPendingAt"], now),
            how_long(sink["lastSuccessAt"], now),
            how_long(sink["lastFailureAt"], now),
            sink["consecutiveFailures"],
            how_long(sink["nextAttemptAt"], now),
            sink["deadLetterCount"],
        )
        for sink in status["sinks"]
    ]
    headings = ("SINK", "HEALTH", "LAG", "OLDEST", "LAST SUCCESS", "LAST FAILURE", "FAILURES")
    if rows:
        lines += ["", table((*headings, "NEXT ATTEMPT", "DEAD"), rows), ""]
    for sink in status["sinks"]:
        if sink["reasonCode"]:
            why = cut(why_it_failed(sink), 200)
            lines.append(printable(f"{sink['id']}: last failure at {sink['lastFailureAt']}: {why}"))
    if status["failureReasons"]:
        reasons = (
            f"{r['reasonCode']} {r['count']} (last {r['lastSeenAt']})" for r in status["failureReasons"]
        )
        lines.append(f"Recent failures: {printable(', '.join(reasons))}")
    if last := status["alerts"]["dispatch"]:
        ago = how_long(last["updatedAt"], now) or last["updatedAt"]
        lines.append(printable(f"Last pass: {ago} ({last['updatedAt']}), {last['status']}"))
    return "\n".join([*lines, *note_lines(status["notes"])])


def how_long(moment: str | None, now: float) -> str | None:
    """A time as people at a terminal say it: `40 s ago`, `in 3 min`. What is no time is shown as it is."""
    at = parse_time(moment)
    if at is None:
        return cut(moment, 20) if moment else None
    seconds = abs(now - at)
    units = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    length, unit = next((pair for pair in units if seconds >= 2 * pair[0]), (1, "s"))
    amount = f"{seconds // length:.0f} {unit}"
    return f"in {amount}" if at > now else f"{amount} ago"


def prometheus_text(statuses: Sequence[JsonObject], unreadable: Sequence[str] = ()) -> str:
    """The status of loops as text exposition, for node_exporter's textfile collector.

    `unreadable`: loops of which nothing is known but that. Prometheus, "Exposition formats": a label's value
    escapes backslash, quote and line feed.
    """

    def labels(**pairs: str) -> str:
        escaped = {
            key: printable(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            for key, value in pairs.items()
        }
        return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"

    def age(moment: str | None) -> float | None:
        written = parse_time(moment)
        return None if written is None else max(0.0, round(time.time() - written, 3))

    of_loops: list[tuple[str, str, Callable[[JsonObject], float | None]]] = [
        ("health", "0 ok, 1 warning, 2 critical, 3 unknown.", lambda s: PLUGIN_CODES[s["health"]]),
        ("config_valid", "1 where the config is valid, else 0.", lambda s: s["configValid"]),
        ("untaken", "Escalations that no pass has taken up.", lambda s: s["untakenCount"]),
        (
            "last_pass_timestamp_seconds",
            "When the last pass ended.",
            lambda s: parse_time((s["alerts"]["dispatch"] or {}).get("updatedAt")),
        ),
    ]
    of_sinks: list[tuple[str, str, Callable[[JsonObject], float | None]]] = [
        ("lag", "Deliveries that wait for the sink.", lambda s: s["lagCount"]),
        (
            "oldest_pending_age_seconds",
            "Age of the oldest delivery that waits.",
            lambda s: age(s["oldestPendingAt"]) if s["lagCount"] else 0,
        ),
        (
            "last_success_timestamp_seconds",
            "When the sink last took a delivery.",
            lambda s: parse_time(s["lastSuccessAt"]),
        ),
        ("consecutive_failures", "Failed attempts in a row.", lambda s: s["consecutiveFailures"]),
        ("dead_letters", "Deliveries given up for good.", lambda s: s["deadLetterCount"]),
        ("lagging_peers", "Peers of a cluster that miss deliveries.", lambda s: len(s["laggingPeers"])),
    ]
    lines: list[str] = []

    def family(name: str, text: str, samples: Iterable[tuple[str, float | None]]) -> None:
        metric = f"ops_alert_dispatch_{name}"
        lines.extend((f"# HELP {metric} {text}", f"# TYPE {metric} gauge"))
        lines.extend(f"{metric}{found} {value:.15g}" for found, value in samples if value is not None)

    for name, text, value_of in of_loops:
        samples = [(labels(loop=status["loopId"]), value_of(status)) for status in statuses]
        if name == "health":
            samples += [(labels(loop=loop), PLUGIN_CODES["unknown"]) for loop in unreadable]
        family(name, text, samples)
    for name, text, value_of in of_sinks:
        found = [
            (labels(loop=status["loopId"], sink=sink["id"]), value_of(sink))
            for status in statuses
            for sink in status["sinks"]
        ]
        family(name, text, found)
    metric = "ops_alert_dispatch_deliveries_total"
    text = "Deliveries made, made dead letters or skipped; and failed, which are attempts."
    lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter"]
    outcomes = {
        "delivered": "deliveredCount",
        "failed": "failedAttemptCount",
        "dead_letter": "givenUpCount",
        "skipped": "skippedCount",
    }
    for status in statuses:
        for sink in status["sinks"]:
            for outcome, key in outcomes.items():
                label = labels(loop=status["loopId"], sink=sink["id"], outcome=outcome)
                lines.append(f"{metric}{label} {sink[key]}")
    return "\n".join(lines)


class StatusCommand(click.Command):
    """With `--check`, nothing that goes wrong looks CRITICAL to a monitor, whose exit codes have meanings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with unknown_to_a_monitor(check="--check" in args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        with unknown_to_a_monitor(check=ctx.params["check"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def unknown_to_a_monitor(*, check: bool) -> Iterator[None]:
    """Tell a monitor in one line on standard output where nothing can be said; others get the error."""
    try:
        yield
    except (DispatchError, click.UsageError) as fault:
        if not check:
            raise
        said = fault.format_message() if isinstance(fault, click.UsageError) else str(fault)
        click.echo(printable(f"ALERT DISPATCH UNKNOWN: {said}".replace("\n", ";")))
        raise click.exceptions.Exit(PLUGIN_CODES["unknown"]) from None


@cli.command(cls=StatusCommand, epilog=STATUS_EXIT_CODES_HELP)
@repo_option
@click.option(
    "--loop", "loop_id", metavar="ID", callback=check_loop_id, show_default="all loops", help="The loop."
)
@config_option
@file_options
@click.option("--check", is_flag=True, help="One line for a monitor, and its exit codes.")
@click.option(
    "--critical-after",
    type=click.FloatRange(min=0),
    default=900.0,
    metavar="SECONDS",
    help="A sink that has been failing for longer is critical, and so is it when no pass has run for longer "
    "though something waits for one.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "text", "json", "prometheus"]),
    default="auto",
    help="text for people, json for scripts, prometheus for a textfile collector; auto: text on a terminal, "
    "else JSON on one line.",
)
@pretty_option
def status(
    repo: str,
    loop_id: str | None,
    alert_config_file: str | None,
    escalations_file: str | None,
    dispatch_state_file: str | None,
    dispatch_telemetry_file: str | None,
    check: bool,
    critical_after: float,
    form: str,
    pretty: bool,
) -> None:
    """Is it working, what is stuck, why, what to do.

    Says how each sink of a loop fares, from the files alone: it sends nothing and changes nothing. The files
    that can be named are those of one loop: they go with --loop.
    """
    files = (escalations_file, dispatch_state_file, dispatch_telemetry_file)
    statuses: list[JsonObject] = []
    if not critical_after >= 0:  # NaN is neither
        raise click.BadParameter(f"{critical_after:g} is no time", param_hint="--critical-after")
    if loop_id is None and any(files):
        raise click.UsageError("a loop's own files go with --loop")
    jobs, errors = make_jobs(repo, loop_id, alert_config_file, *files)
    for job in jobs:
        try:
            statuses.append(loop_status(where_it_worked(job), critical_after))
        except DispatchError as error:  # it does not hide the other loops
            errors[job.loop_id] = error
    if check:
        said_of = [(known["health"], known["loopId"], known["verdict"]) for known in statuses]
        said_of += [("unknown", name, str(error).replace("\n", ";")) for name, error in errors.items()]
        worst = max((health for health, _, _ in said_of), key=HEALTH_ORDER.index, default="unknown")
        words = [f"{name}: {verdict}" for health, name, verdict in said_of if health == worst]
        said = "; ".join(words) or "no loop has escalations or a state"
        click.echo(printable(f"ALERT DISPATCH {worst.upper()}: {said}"))
        raise click.exceptions.Exit(PLUGIN_CODES[worst])
    if loop_id and errors:
        raise errors[loop_id]
    if form == "prometheus":
        click.echo(prometheus_text(statuses, list(errors)))
    elif wants_json(form, pretty):
        print_json(statuses[0] if loop_id else {"loops": statuses}, pretty)
    elif statuses or errors:
        statuses.sort(key=lambda known: HEALTH_ORDER.index(known["health"]), reverse=True)
        click.echo("\n\n".join(map(status_text, statuses)))
    else:
        click.echo(NO_LOOPS)
    for name, problem in errors.items():
        click.echo(f"error: loop {name}: {problem}", err=True)
    # The metrics of the other loops are to reach their collector; of these they say that nothing is known.
    if errors and form != "prometheus":
        raise click.exceptions.Exit(max(error.exit_code for error in errors.values()))


# ---------------------------------------------------------------------------------------------------------
# What an operator does: test, redeliver, skip, init
# ---------------------------------------------------------------------------------------------------------


def check_sink(config: Config, sink_id: str | None) -> None:
    """Raises BadParameter where a sink that was named is not in the config."""
    if sink_id is not None and sink_id not in config.sinks:
        known = suggest(sink_id, list(config.sinks))
        raise click.BadParameter(f"there is no sink {printable(sink_id)!r}; {known}", param_hint="--sink")


def check_credentials(config: Config, sinks: Iterable[Sink]) -> None:
    """Raises ConfigError where a sink that is about to be asked, enabled or not, has unusable secrets."""
    document = {"sinks": {sink.id: {**sink.settings, "enabled": True} for sink in sinks}}
    if faults := check_secrets(document, os.environ):
        raise config_error(config.path, faults)


def attempt_once(
    connections: Connections, delivery: Delivery, origin: Origin, redactor: Redactor
) -> tuple[dict[str, Verdict], float]:
    """Make one attempt outside of any lane, within the timeout.

    Returns what came of it at each peer, of which most sinks are the only one, and the seconds it took.
    """
    sink = connections.sink
    verdicts: dict[str, Verdict] = {}
    request = connections.build([delivery], origin)
    began = time.monotonic()
    worker = threading.Thread(
        target=lambda: verdicts.update(connections.ask(request, redactor, connections.peers)),
        daemon=True,
    )
    worker.start()
    worker.join(sink.timeout_seconds + TIMEOUT_GRACE)
    return verdicts or {sink.id: timed_out(sink, *connections.peers)}, time.monotonic() - began


def outcome_json(verdict: Verdict, seconds: float) -> JsonObject:
    """What came of an attempt, for scripts."""
    delivered = verdict.outcome == "delivered"
    result: JsonObject = {
        "status": "success" if delivered else "failed",
        "httpStatus": verdict.http_status,
        "reasonCode": verdict.reason_code,
        "message": verdict.message,
        "durationMs": round(seconds * 1000),
    }
    if not delivered:
        said = verdict.reason_code, verdict.http_status, verdict.message
        result["advice"] = advise(*said, waits=False, refused=verdict.outcome == "dead_letter")
    return result


def outcome_text(what: str, verdict: Verdict, seconds: float) -> str:
    """What came of an attempt, for people: what happened, how long it took, what to do about it."""
    duration = f"{seconds * 1000:.0f} ms"
    if verdict.outcome == "delivered":
        said = click.style(f"delivered ({verdict.http_status})", fg="green")
        said += f" {verdict.message}" if verdict.message else ""
        return f"{printable(what)}: {said}, {duration}"
    failure = outcome_json(verdict, seconds)
    why = click.style(printable(why_it_failed(failure)), fg="red")
    return f"{printable(what)}: {why}, {duration}\n  what to do: {failure['advice']}"


@cli.command("test", epilog=EXIT_CODES_HELP)
@here_option
@config_option
@click.option(
    "--sink", "sink_ids", multiple=True, metavar="ID", help="Only this sink, enabled or not. Repeatable."
)
@click.option("--severity", default="info", metavar="LEVEL", help="The severity of the test alert.")
@format_option
@pretty_option
def send_test(
    repo: str,
    alert_config_file: str | None,
    sink_ids: tuple[str, ...],
    severity: str,
    form: Format,
    pretty: bool,
) -> None:
    """Send a marked test alert to each enabled sink.

    Says for each what came of it, how long it took and, when it failed, what to do. Goes through the real
    adapters with the real credentials, and touches no offset.
    """
    level = read_severity(severity)
    repo = absolute(repo)
    config_file = absolute(alert_config_file or os.path.join(repo, DEFAULT_CONFIG))
    loaded = load_config(config_file, os.environ, check_env=not sink_ids)
    for sink_id in sink_ids:
        check_sink(loaded, sink_id)
    chosen = [sink for sink in loaded.sinks.values() if (sink.id in sink_ids if sink_ids else sink.enabled)]
    check_credentials(loaded, chosen)
    if not chosen:
        raise click.UsageError("no sink is enabled; name one with --sink ID, or enable one in the config")
    trace_id = new_trace_id()
    body = {
        "timestamp": iso(time.time()),
        "loopId": PROGRAM,
        "traceId": trace_id,
        "category": "test_alert",
        "severity": level,
        "transport": "local",
        "message": "This is a test alert. Nothing is wrong, and there is nothing to do.",
    }
    results = []
    for sink in chosen:
        delivery = delivery_of(encode_json(body), Router(loaded), PROGRAM, Position(1, 0, 0))
        origin = Origin(repo, trace_id, time.time())
        verdicts, seconds = attempt_once(Connections(sink), delivery, origin, loaded.redactor())
        for peer, verdict in verdicts.items():
            named = {"peer": peer} if len(verdicts) > 1 else {}
            results.append({"id": sink.id, "type": sink.type, **named, **outcome_json(verdict, seconds)})
            if not wants_json(form, pretty):
                what = f"{sink.id} ({peer})" if named else sink.id
                click.echo(outcome_text(what, verdict, seconds))
    if wants_json(form, pretty):
        print_json({"schemaVersion": SCHEMA_VERSION, "sinks": results}, pretty)
    if any(result["status"] == "failed" for result in results):
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def delivery_of(line: bytes, router: Router, loop_id: str, place: Position) -> Delivery:
    """A delivery of a line that is an escalation. Raises ValueError where it is none."""
    record = Record(
        place, place._replace(offset=place.offset + len(line) + 1, line=place.line + 1), line, len(line)
    )
    delivery = router.route(record, loop_id, late=True)
    if isinstance(delivery, Unusable):
        raise ValueError(delivery.reason_code)
    return delivery


class Redelivery(NamedTuple):
    """A delivery that its lane is past, which an operator names, and what its rows say of its place."""

    sink: Sink
    delivery: Delivery
    place: JsonObject
    dead_letter: bool

    @property
    def key(self) -> Key:
        """Which delivery it is. Lines that are the same have one escalationId: it does not tell."""
        return (*self.delivery.record.start[:2], self.sink.id)

    def to_json(self, redactor: Redactor) -> JsonObject:
        """The delivery as a command's JSON names it."""
        return {
            "escalationId": self.delivery.escalation.id,
            "escalationCategory": redactor.mask_value(self.delivery.escalation.category),
            "escalationTimestamp": redactor.mask_value(self.delivery.escalation.timestamp),
            "sinkId": self.sink.id,
            "sinkType": self.sink.type,
            "deadLetter": self.dead_letter,
        }


class Wanted(NamedTuple):
    """What an operator names: all dead letters, one escalation, or lines from-to; of one sink or of each."""

    dead_letters: bool = False
    escalation: str | None = None
    lines: tuple[int, int | None] | None = None
    sink_id: str | None = None


def find_settled(job: Job, config: Config, state: State, wanted: Wanted) -> list[Redelivery]:
    """Find the deliveries that an operator names. What still waits in a lane is left to it.

    Raises BadParameter where there is no such escalation or line.
    """
    router = Router(config)
    dead = find_dead_letters(job)
    found: dict[Key | tuple[str, str], Redelivery] = {}
    if wanted.lines is not None:
        candidates = settled_in_source(job, router, state, *wanted.lines)
    else:
        candidates = settled_on_record(job, router, wanted.escalation, {key[:2] for key in dead})
    for delivery, place, sinks in candidates:
        resolution = delivery.resolution
        # A disabled sink is meant where it is named.
        routed = resolution.reached if wanted.sink_id else resolution.dispatchable
        for name in [*sinks, *(sink.id for sink in routed)]:
            sink, lane = config.sinks.get(name), state.lanes.get(name)
            key = (*delivery.record.start[:2], name)
            waits = lane is not None and lane.position <= delivery.record.start and key not in dead
            if sink is None or waits or wanted.sink_id not in (None, name):
                continue
            # Lines that are the same have one id: asked for by that, they are one.
            found_by = key if wanted.escalation is None else (delivery.escalation.id, name)
            if key in dead or (not wanted.dead_letters and found_by not in found):
                found[found_by] = Redelivery(sink, delivery, place, key in dead)
    if wanted.escalation is not None and not found:
        check_on_record(job, wanted.escalation)
    return list(found.values())


# A delivery, its place, and the sinks that are known to have been meant.
Candidate = tuple[Delivery, JsonObject, Sequence[str]]


def settled_in_source(
    job: Job, router: Router, state: State, first: int, last: int | None
) -> Iterator[Candidate]:
    """The escalations of these lines of the current file. Raises BadParameter where it has fewer."""
    line = 0
    with state.open_source(job.escalations_file) as source:
        for record in source.read(Position(source.current.number, 0, 0)) if source.current else ():
            line = record.end.line
            if line < first or (last is not None and line > last):
                continue
            delivery = router.route(record, job.loop_id, late=True)
            if not isinstance(delivery, Unusable):
                yield delivery, record_place(record, source), ()
    if line < first:
        said = f"{first} is beyond the end: {job.escalations_file} has {plural(line, 'line')}"
        raise click.BadParameter(said, param_hint="--from-line")


def settled_on_record(
    job: Job, router: Router, escalation: str | None, places: Collection[tuple[int, int]]
) -> Iterator[Candidate]:
    """What the telemetry has of one escalation, or of the records at these places."""
    rows, _ = loop_rows(job, job.telemetry_file, Checkpoint())
    for row in rows:
        identity = row.get("escalationId")
        if identity != escalation if escalation is not None else not is_at(row, places):
            continue
        with contextlib.suppress(*MALFORMED):
            body, place = row["escalation"], row["position"]
            sinks = [str(entry["id"]) for entry in row["sinks"]]
            if isinstance(body, dict):
                delivery = delivery_of(encode_json(body), router, job.loop_id, start_of_row(row))
                named = delivery.escalation._replace(id=str(identity))
                yield delivery._replace(escalation=named), place, sinks


def check_on_record(job: Job, escalation: str) -> None:
    """Say why an escalation cannot be sent again, where that is so: it is not on record, or it is none.

    Raises BadParameter.
    """
    rows, _ = loop_rows(job, job.telemetry_file, Checkpoint())
    codes = {str(row.get("reasonCode")) for row in rows if row.get("escalationId") == escalation}
    if not codes:
        where = f"see escalationId in {job.telemetry_file}"
        said = f"no escalation {printable(escalation)!r} is on record; {where}"
        raise click.BadParameter(said, param_hint="--id")
    if unusable := codes & {*UNUSABLE, "blank_line"}:
        said = f"its line is no escalation ({unusable.pop()}): append a mended one to the source"
        raise click.BadParameter(said, param_hint="--id")


def is_at(row: JsonObject, places: Collection[tuple[int, int]]) -> bool:
    """Tell whether the record of a row stands at one of these places."""
    try:
        return start_of_row(row)[:2] in places
    except MALFORMED:
        return False


# A sink that has failed is not asked again for the rest of a command.
NOT_TRIED = "not_tried"


# An operator's command that takes longer lets a pass have the lock after so many seconds, for so long at
# least: a pass waits for it for LOCK_WAIT_SECONDS.
TURN_SECONDS = LOCK_WAIT_SECONDS / 2
TURN_PAUSE = 0.2
# No pass that has the lock then takes longer than this: it is bounded by its budget and a timeout.
LONGEST_PASS = 600.0


def redeliver_all(
    job: Job,
    config: Config,
    deliveries: Sequence[Redelivery],
    since: Checkpoint,
    stop: threading.Event,
    tell: Callable[[Redelivery, Verdict | None, float], None],
) -> None:
    """Send again what an operator asked for, under the same ids and at each sink's rate, and write down what
    came of it. The alerts of the moment come first: no pass is held up for longer than one request.

    What another command has settled after `since`, a place in the attempts, is not sent again. `tell` learns
    of each delivery as it ends. No verdict: it was not tried, because its sink had failed, or on `stop`.
    """
    redactor = config.redactor()
    sinks = {item.sink.id: item.sink for item in deliveries}
    connections = {name: Connections(sink) for name, sink in sinks.items()}
    paces = {name: Pace.of(sink) for name, sink in sinks.items()}
    failing: set[str] = set()
    left = deque(deliveries)
    pause = 0.0
    while left:
        stop.wait(pause)
        with (
            operator_session(job, wait=LONGEST_PASS) as state,
            state.open_source(job.escalations_file) as source,
        ):
            settled = settled_by_operator(job, since)
            left = deque(item for item in left if item.key not in settled)
            ledger = Ledger(job, state, source, redactor)
            ledger.prepare()
            turn, pause = Clock(TURN_SECONDS, threading.Event()), TURN_PAUSE
            try:
                while left and turn.left > 0:
                    item, lane = left[0], state.lanes.get(left[0].sink.id)
                    if stop.is_set() or item.sink.id in failing:
                        tell(left.popleft(), None, 0.0)
                        continue
                    if pace := paces[item.sink.id]:
                        if lane:
                            pace.take_over(lane.paced_until or 0.0, time.time())
                        if wait := pace.wait(time.time()):
                            pause = max(pause, wait)
                            break
                        pace.spend(time.time())
                        if lane:
                            lane.paced_until = pace.until
                    verdict, seconds = redeliver_one(item, ledger, connections[item.sink.id], redactor)
                    if verdict.outcome not in SETTLED:
                        failing.add(item.sink.id)
                    tell(left.popleft(), verdict, seconds)
            finally:
                ledger.flush()
                save_lanes(job, state, source)
            since = state.attempts


def redeliver_one(
    item: Redelivery, ledger: Ledger, connections: Connections, redactor: Redactor
) -> tuple[Verdict, float]:
    """Send one delivery again, and write down what came of it. Returns that, and the seconds it took."""
    origin = Origin(ledger.job.repo, ledger.job.trace_id, time.time())
    verdicts, seconds = attempt_once(connections, item.delivery, origin, redactor)
    verdict = best_verdict(verdicts)
    without: dict[str, Verdict] = {}
    if verdict.outcome == "delivered":
        without = {peer: said for peer, said in verdicts.items() if said.outcome != "delivered"}
    if without:
        verdict = verdict._replace(message=f"but not to {', '.join(without)}")
    ledger.record_by_operator(
        item.sink,
        item.delivery,
        verdict,
        place=item.place,
        dead=item.dead_letter,
        duration=seconds,
        missed_by=without,
    )
    return verdict, seconds


def settled_by_operator(job: Job, since: Checkpoint) -> set[Key]:
    """What operators have sent again or dismissed after a place in the attempts."""
    settled: set[Key] = set()
    rows, _ = loop_rows(job, job.attempts_file, since, operator=True)
    for row in rows:
        with contextlib.suppress(*MALFORMED):
            if "byOperator" in row and "peer" not in row and row["outcome"] in ("delivered", "skipped"):
                settled.add(key_of_row(row, str(row["sinkId"])))
    return settled


def save_lanes(job: Job, state: State, source: Source) -> None:
    """Write the lanes as an operator's command has left them. What the last pass published stays, and what
    has become of the source since then is left to the next one."""
    document = {**state.published, **state.to_json(source), **count_lanes(state)}
    replace_file(job.state_file, encode_json(document) + b"\n", durable=True)


@contextlib.contextmanager
def operator_session(job: Job, wait: float = 10.0) -> Iterator[State]:
    """Hold a loop's lock, with its state at hand, for a command that changes it; `wait` seconds for it."""
    with loop_lock(job.lock_file, wait) as held:
        if not held:
            raise StateError(
                f"another pass works on loop {job.loop_id}", ["wait until it has ended, then try again"]
            )
        state = load_state(job)
        if state.taken_up is None:
            raise StateError(f"no pass has run for loop {job.loop_id} yet", ["run `dispatch` first"])
        yield state


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def ask(question: str, what: str, *, err: bool) -> None:
    """Show what is about to be done and ask; anything but yes ends the command.

    `err`: on standard error, because standard output is for the JSON.
    """
    click.echo(what, err=err)
    try:
        # Older versions of click write the blank before the answer to standard output all the same.
        with contextlib.redirect_stdout(sys.stderr) if err else contextlib.nullcontext():
            click.confirm(question, abort=True, err=err)
    except click.Abort:
        hint = "" if is_terminal(sys.stdin) else "; --yes goes ahead without asking"
        click.echo(f"nothing was done{hint}", err=True)
        raise


# So many deliveries are listed before a question; the rest is counted.
LISTED = 20


def listing(deliveries: Sequence[Redelivery], redactor: Redactor) -> str:
    """Deliveries as a table, to be looked at before something is done with them."""
    rows = (
        (
            item.delivery.record.end.line,
            item.sink.id,
            redactor.mask_value(item.delivery.escalation.category),
            item.delivery.escalation.written_at,
            item.delivery.escalation.id,
        )
        for item in deliveries[:LISTED]
    )
    text = table(("LINE", "SINK", "CATEGORY", "TIMESTAMP", "ESCALATION"), rows)
    return f"{text}\n… and {len(deliveries) - LISTED} more" if len(deliveries) > LISTED else text


@cli.command(epilog=EXIT_CODES_HELP)
@repo_option
@loop_option
@config_option
@file_options
@click.option("--dead-letters", is_flag=True, help="All dead letters.")
@click.option("--id", "escalation", metavar="ESCALATION_ID", help="One escalation.")
@click.option(
    "--from-line", type=click.IntRange(min=1), metavar="N", help="From this line of escalations.jsonl …"
)
@click.option("--to-line", type=click.IntRange(min=1), metavar="M", help="… to this one, or to the end.")
@click.option("--sink", "sink_id", metavar="ID", help="To this sink only.")
@yes_option
@format_option
@pretty_option
def redeliver(
    repo: str,
    loop_id: str,
    alert_config_file: str | None,
    escalations_file: str | None,
    dispatch_state_file: str | None,
    dispatch_telemetry_file: str | None,
    dead_letters: bool,
    escalation: str | None,
    from_line: int | None,
    to_line: int | None,
    sink_id: str | None,
    yes: bool,
    form: Format,
    pretty: bool,
) -> None:
    """Send again what was given up, skipped or delivered.

    Shows what it will send, asks, and sends it under the same ids. A dead letter that is delivered is one no
    longer. What still waits in a lane is left to it, and a disabled sink left out unless --sink names it.
    After a sink has failed it is not asked again: the rest stays as it was.
    """
    if (dead_letters + (escalation is not None) + (from_line is not None)) != 1:
        raise click.UsageError("say what: one of --dead-letters, --id, --from-line")
    if to_line is not None and from_line is None:
        raise click.UsageError("--to-line goes with --from-line")
    if to_line is not None and from_line is not None and to_line < from_line:
        raise click.UsageError(f"--to-line {to_line} is before --from-line {from_line}")
    job = make_job(
        repo, loop_id, alert_config_file, escalations_file, dispatch_state_file, dispatch_telemetry_file
    )
    lines = None if from_line is None else (from_line, to_line)
    wanted = Wanted(dead_letters, escalation, lines, sink_id)
    as_json = wants_json(form, pretty)
    results: list[JsonObject] = []

    def tell(item: Redelivery, verdict: Verdict | None, seconds: float) -> None:
        if verdict is None:
            results.append({**item.to_json(loaded.redactor()), "status": NOT_TRIED})
        else:
            results.append({**item.to_json(loaded.redactor()), **outcome_json(verdict, seconds)})
        if as_json:
            return
        what = f"{item.delivery.escalation.id} to {item.sink.id}"
        if verdict is None:
            why = "the command was told to end" if stop.is_set() else "the sink has just failed"
            click.echo(printable(f"{what}: not tried, because {why}"))
        else:
            click.echo(outcome_text(what, verdict, seconds))

    stop = threading.Event()
    loaded = load_config(job.config_file, os.environ)
    check_sink(loaded, sink_id)
    with operator_session(job) as state:
        found = find_settled(job, loaded, state, wanted)
        faded = faded_dead_letters(state, found, sink_id).total() if dead_letters else 0
    shown = [item for item in found if item.sink.enabled or item.sink.id == sink_id]
    for name in dict.fromkeys(item.sink.id for item in found if item not in shown):
        click.echo(f"note: nothing is sent to {name}, which is disabled: --sink {name} does", err=True)
    check_credentials(loaded, {item.sink.id: item.sink for item in shown}.values())
    if shown:
        if not yes:
            ask(f"Send {plural(len(shown), 'delivery')}?", listing(shown, loaded.redactor()), err=as_json)
        # No lock was held while a person thought.
        with orderly_end() as stop:
            redeliver_all(job, loaded, shown, state.attempts, stop, tell)
    delivered = sum(result["status"] == "success" for result in results)
    failed = len(results) - delivered
    if as_json:
        summary = {
            "schemaVersion": SCHEMA_VERSION,
            "loopId": loop_id,
            "status": "nothing_to_do" if not results else batch_status(delivered, failed),
            "deliveredCount": delivered,
            "failedCount": failed,
            "deliveries": results,
        }
        print_json(summary, pretty)
    elif not found and faded:
        click.echo(
            f"Nothing to redeliver: the rows of {plural(faded, 'dead letter')} are in no file any more. "
            "`redeliver --from-line` may find the records, `skip --dead-letters` dismisses them."
        )
    elif not found and dead_letters:
        click.echo(f"Nothing to redeliver: there is no dead letter{f' of {sink_id}' if sink_id else ''}.")
    elif not results:
        click.echo("Nothing to redeliver. What still waits in a lane goes out by itself: see `status`.")
    else:
        click.echo(f"{plural(delivered, 'delivery')} made, {failed} not.")
    if failed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def batch_status(done: int, failed: int) -> str:
    """The status of several deliveries, in the words of a pass."""
    if not failed:
        return "success"
    return "partial" if done else "failed"


@cli.command(epilog=EXIT_CODES_HELP)
@repo_option
@loop_option
@config_option
@file_options
@click.option(
    "--sink", "sink_id", metavar="ID", help="The sink that is meant.  [required without --dead-letters]"
)
@click.option(
    "--to-line", type=click.IntRange(min=1), metavar="N", show_default="all", help="Up to this line."
)
@click.option(
    "--dead-letters", is_flag=True, help="Dismiss dead letters, of --sink or of all, and not what waits."
)
@yes_option
@format_option
@pretty_option
def skip(
    repo: str,
    loop_id: str,
    alert_config_file: str | None,
    escalations_file: str | None,
    dispatch_state_file: str | None,
    dispatch_telemetry_file: str | None,
    sink_id: str | None,
    to_line: int | None,
    dead_letters: bool,
    yes: bool,
    form: Format,
    pretty: bool,
) -> None:
    """Give up what waits for a sink, or its dead letters.

    Shows what it will pass over, and asks. Each delivery is on record as skipped_by_operator; `redeliver` can
    send it after all.
    """
    if dead_letters and to_line is not None:
        raise click.UsageError("--to-line does not go with --dead-letters")
    if sink_id is None and not dead_letters:
        raise click.UsageError("say which: --sink ID, or --dead-letters")
    job = make_job(
        repo, loop_id, alert_config_file, escalations_file, dispatch_state_file, dispatch_telemetry_file
    )
    as_json = wants_json(form, pretty)

    def find(state: State, source: Source) -> list[Redelivery]:
        if dead_letters:
            return find_settled(job, loaded, state, Wanted(dead_letters=True, sink_id=sink_id))
        newest = source.current.number if source.current else 0
        return [
            Redelivery(loaded.sinks[str(sink_id)], delivery, record_place(delivery.record, source), False)
            for delivery in find_backlog(job, loaded, state, source, str(sink_id))
            if to_line is None
            or delivery.record.start.segment < newest
            or delivery.record.end.line <= to_line
        ]

    loaded = load_config(job.config_file, os.environ)
    with operator_session(job) as state, state.open_source(job.escalations_file) as source:
        if dead_letters:
            check_sink(loaded, sink_id)
        shown = find(state, source)
        faded = faded_dead_letters(state, shown, sink_id) if dead_letters else Counter()
    skipped: list[Redelivery] = []
    if shown or faded:
        what = listing(shown, loaded.redactor())
        if faded:
            what += f"\nand {plural(faded.total(), 'dead letter')} whose rows are in no file any more"
        if not yes:
            noun = "dead letter" if dead_letters else "delivery"
            ask(f"Give up {plural(len(shown) + faded.total(), noun)}?", what, err=as_json)
        # No lock was held while a person thought: what a pass has delivered since then is not skipped.
        keys = {item.key for item in shown}
        with operator_session(job) as state, state.open_source(job.escalations_file) as source:
            found = find(state, source)
            ledger = Ledger(job, state, source, loaded.redactor())
            ledger.prepare()
            if dead_letters:
                faded = faded_dead_letters(state, found, sink_id)
                skipped = [item for item in found if item.key in keys]
                dismiss(ledger, skipped, faded)
            else:
                # Nobody was shown what a changed config has put among them since.
                skipped = list(itertools.takewhile(lambda item: item.key in keys, found))
                skip_backlog(ledger, skipped, find_backlog(job, loaded, state, source, str(sink_id)))
            ledger.flush()
            save_lanes(job, state, source)
    if as_json:
        results = [
            {**item.to_json(loaded.redactor()), "status": "skipped", "reasonCode": SKIPPED_BY_OPERATOR}
            for item in skipped
        ]
        summary = {
            "schemaVersion": SCHEMA_VERSION,
            "loopId": loop_id,
            "status": "success" if skipped or faded else "nothing_to_do",
            "skippedCount": len(skipped) + faded.total(),
            "deliveries": results,
        }
        print_json(summary, pretty)
    elif not shown and not faded:
        click.echo("There is no dead letter." if dead_letters else "Nothing waits there.")
    elif dead_letters:
        click.echo(
            f"{plural(len(skipped) + faded.total(), 'dead letter')} dismissed. To send one after all: "
            "redeliver --id."
        )
    else:
        said = f"{plural(len(skipped), 'delivery')} skipped"
        click.echo(f"{said}. To send them after all: redeliver --from-line or --id.")


GIVEN_UP = Verdict("skipped", SKIPPED_BY_OPERATOR, message="given up by an operator")


def skip_backlog(ledger: Ledger, skipped: Sequence[Redelivery], backlog: Sequence[Delivery]) -> None:
    """Pass over the first of what waits in a lane, on record."""
    if not skipped:
        return
    deliveries = [item.delivery for item in skipped]
    ledger.record(skipped[0].sink, deliveries, GIVEN_UP, attempt=0, duration=0.0)
    lane = ledger.state.lanes[skipped[0].sink.id]
    left = backlog[len(skipped) :]
    lane.oldest_pending_at = left[0].escalation.written_at if left else None
    if not left:
        # Nothing is stuck any more: the next delivery is a new start.
        lane.consecutive_failures = lane.backoff_step = lane.attempts = 0
        lane.lagging_since = lane.failing_since = lane.waiting_since = lane.next_attempt_at = None


def dismiss(ledger: Ledger, dead: Sequence[Redelivery], faded: Mapping[str, int]) -> None:
    """Take dead letters off the count, on record. `faded`: so many of each sink, too."""
    for item in dead:
        ledger.record_by_operator(
            item.sink, item.delivery, GIVEN_UP, place=item.place, dead=True, duration=0.0
        )
    for name, count in faded.items():
        message = "dead letters dismissed by an operator, whose own rows are in no file any more"
        ledger.write_event(name, "skipped", SKIPPED_BY_OPERATOR, count, message)
        ledger.state.lanes[name].dead_letter_count -= count


def faded_dead_letters(state: State, found: Iterable[Redelivery], sink_id: str | None) -> Counter[str]:
    """How many dead letters of each sink are counted whose rows were rotated away: they cannot be sent any
    more."""
    counted = Counter(
        {name: lane.dead_letter_count for name, lane in state.lanes.items() if sink_id in (None, name)}
    )
    return +(counted - Counter(item.sink.id for item in found))


def find_backlog(job: Job, config: Config, state: State, source: Source, sink_id: str) -> list[Delivery]:
    """What waits in a sink's lane, in order. Raises BadParameter where there is no such lane."""
    lane, sink = state.lanes.get(sink_id), config.sinks.get(sink_id)
    if lane is None or sink is None or state.taken_up is None:
        raise click.BadParameter(
            f"there is no lane {printable(sink_id)!r}; {suggest(sink_id, list(state.lanes))}",
            param_hint="--sink",
        )
    return list(backlog(lane, sink, Router(config), source, state.taken_up, job.loop_id))


def initial_config() -> JsonObject:
    """What `init` writes: the three sinks, disabled, with good defaults."""
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


@cli.command(epilog=EXIT_CODES_HELP)
@repo_option
@format_option
@pretty_option
def init(repo: str, form: Format, pretty: bool) -> None:
    """Write a config with three sinks, disabled.

    Says what to set next. Never overwrites.
    """
    path = os.path.join(absolute(repo), DEFAULT_CONFIG)
    if os.path.lexists(path):
        raise click.UsageError(f"{path} is there already, and is left as it is")
    document = initial_config()
    make_folder(os.path.dirname(path))
    replace_file(path, json.dumps(document, indent=2).encode() + b"\n", durable=True)
    sinks = [
        {
            "id": sink_id,
            "type": sink["type"],
            "secretRefs": {key: name for key, name in sink.items() if key.endswith("Env")},
        }
        for sink_id, sink in document["sinks"].items()
    ]
    if wants_json(form, pretty):
        print_json({"schemaVersion": SCHEMA_VERSION, "configFile": path, "sinks": sinks}, pretty)
        return
    click.echo(printable(f"Wrote {path}. It holds no secret; only you can read it (mode 0600)."))
    click.echo("Next, for each sink that you want:")
    for sink in sinks:
        names = ", ".join(sink["secretRefs"].values())
        click.echo(f'  {sink["id"]}: set {names} where reconcile runs, and "enabled": true in the config')
    click.echo(f"Then: {shell_line(PROGRAM, 'test', '--repo', repo)}")


# ---------------------------------------------------------------------------------------------------------
# Demo
# ---------------------------------------------------------------------------------------------------------


def demo_escalations(loop_id: str) -> list[JsonObject]:
    """One escalation of each category, over both transports, as the host's writers make them."""

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


@cli.command(epilog=EXIT_CODES_HELP)
def demo() -> None:
    """Show it all on this machine: no account, no network.

    Takes one escalation of each category through a webhook, a Slack and a PagerDuty sink, all played by a
    receiver on 127.0.0.1, shows what each received and what the telemetry says, and runs a second pass to
    show that nothing goes out twice. Works in a temporary folder, which it removes.
    """
    import http.server
    import tempfile

    received: dict[str, list[JsonObject]] = {"webhook": [], "slack": [], "pagerduty": []}

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
    base = f"http://127.0.0.1:{server.server_address[1]}"
    environ = {
        "DEMO_WEBHOOK_URL": f"{base}/webhook",
        "DEMO_SLACK_URL": f"{base}/slack",
        "DEMO_PAGERDUTY_URL": f"{base}/pagerduty",
        "DEMO_ROUTING_KEY": uuid.uuid4().hex,
    }
    # A proxy could not reach this machine's own loopback.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"
    try:
        with tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-demo-") as name:
            failed = run_demo(name, environ, received)
    finally:
        server.shutdown()
        server.server_close()
    if failed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def run_demo(repo: str, environ: Mapping[str, str], received: Mapping[str, list[JsonObject]]) -> bool:
    """Play the demo in a folder. Returns whether a sink missed an escalation or received one twice."""
    import html

    def title(text: str) -> None:
        click.echo(f"\n{click.style(text, bold=True)}")

    job = usual_job(repo, "demo-loop")
    escalations = demo_escalations(job.loop_id)
    make_folder(os.path.dirname(job.config_file))
    make_folder(os.path.dirname(job.escalations_file))
    replace_file(job.config_file, encode_json(demo_config()), durable=False)
    source = b"".join(encode_json(record) + b"\n" for record in escalations)
    replace_file(job.escalations_file, source, durable=False)
    click.echo(f"{plural(len(escalations), 'escalation')} in escalations.jsonl, three sinks on 127.0.0.1.")
    title("First pass")
    click.echo(summary_text(run_pass(job, environ)))
    title("What webhook-demo received (webhook: JSON)")
    for body in received["webhook"]:
        event = body["event"]
        click.echo(f"  {event['severity']:8} {event['category']:24} of {body['source']['loopId']}")
    title("What slack-demo received (slack: as it shows it, up to four escalations a message)")
    for body in received["slack"]:
        for block in body["blocks"]:
            texts = [block["text"]["text"]] if "text" in block else [e["text"] for e in block["elements"]]
            for text in map(html.unescape, texts):
                style = {"bold": block["type"] == "header", "dim": block["type"] == "context"}
                click.echo("\n".join(click.style(f"  {line}", **style) for line in text.splitlines()))
        click.echo()
    title("What pagerduty-demo received (pagerduty_events: Events API v2)")
    for body in received["pagerduty"]:
        click.echo(f"  {body['event_action']}  {body['payload']['summary']}\n           {body['dedup_key']}")
    title("What the telemetry says (telemetry/alerts.jsonl)")
    rows = [
        (
            row["status"],
            row["escalationCategory"],
            row["eventSeverity"],
            f"{row['dispatchedSinkCount']}/{row['sinkCount']}",
        )
        for row in iterate_rows(job.telemetry_file)
    ]
    click.echo(table(("STATUS", "CATEGORY", "SEVERITY", "SINKS"), rows))
    title("Second pass: nothing goes out twice")
    click.echo(summary_text(run_pass(job, environ)))
    told = [block for body in received["slack"] for block in body["blocks"] if "block_id" in block]
    counts = {name: len(bodies) for name, bodies in received.items()} | {"slack": len(told)}
    exact = all(count == len(escalations) for count in counts.values())
    click.echo(f"\nReceived in all: {', '.join(f'{name} {count}' for name, count in counts.items())}.")
    click.echo(
        "Each sink has each escalation exactly once." if exact else "A sink missed one, or got one twice."
    )
    return not exact


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; every error is words on standard error."""
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
    except click.ClickException as error:
        complain(error)
        return EXIT_STORAGE
    except (click.Abort, KeyboardInterrupt):
        complain("aborted")
        return 128 + signal.SIGINT
    except OSError as error:
        complain(f"error: cannot write the output: {error.strerror}")
        return EXIT_STORAGE
    except SystemExit as end:
        # So click ends when whoever read our output has gone.
        return EXIT_STORAGE if end.code else 0
    except Exception as error:  # noqa: BLE001 - whatever it is, no traceback helps an operator
        complain(f"error: {program_fault(error)}")
        return EXIT_STORAGE


def complain(about: str | click.ClickException) -> None:
    """Say on standard error what is wrong, where that can be written."""
    with contextlib.suppress(OSError):
        if isinstance(about, str):
            click.echo(about, err=True)
        else:
            about.show()


def program() -> NoReturn:
    """What is installed as the command.

    Leaves without taking the interpreter apart, which costs a tenth of an idle pass: no file is open any
    more, what was printed is flushed, and a thread that still hangs on a sink is not waited for.
    """
    os._exit(main())


gc.freeze()
gc.enable()

if __name__ == "__main__":
    program()
