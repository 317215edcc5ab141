"""Any order of events, against a model; and properties of the pure functions.

The events: appends of good, bad and blank lines, lines in halves, passes, kills, rotations, sinks that fail
in several ways, changes of the config. Whatever happens: each delivery is made, given up or still waits, none
that was acknowledged is made again, and each sink gets its own in order.

Passes run in processes forked from one that has everything imported (`python tests/test_model.py`): that is
quick, and they can be killed for good. A kill comes after so many lines of the program were executed, so that
it lies anywhere in its work and the same example gives much the same run.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import make_repo, make_server, read_rows
from escalations import CHAT, HOOK, PAGER, PATHS, escalation_id, health_critical, line, sink_config
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from loopback import Answer, SinkServer, accepted, error, hang_up, ok

pytestmark = pytest.mark.slow

try:
    import ops_alert_dispatch as program
except ModuleNotFoundError:  # run as a script, which has only this folder on its path
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ops_alert_dispatch as program


def make_job(root: Path, loop: str) -> program.Job:
    """A pass over a loop of a repo, with every file in its usual place."""
    folder = root / ".superloop" / "ops-manager" / loop
    return program.Job(
        repo=root,
        loop_id=loop,
        trace_id="model",
        escalations_file=folder / "escalations.jsonl",
        state_file=folder / "alert-dispatch-state.json",
        telemetry_file=folder / "telemetry" / "alerts.jsonl",
        config_file=root / program.DEFAULT_CONFIG,
    )


def serve() -> None:
    """Run each pass that is asked for on standard input in a forked process, and say what came of it."""
    import jsonschema  # noqa: F401
    import requests  # noqa: F401

    for request in sys.stdin:
        asked = json.loads(request)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                try:
                    if asked["kill_after"] is not None:
                        kill_after(asked["kill_after"])
                    job = make_job(Path(asked["root"]), asked["loop"])
                    answer = program.run_pass(job, asked["env"])
                except Exception as error:  # noqa: BLE001 - told to the test
                    answer = {"error": repr(error)}
                sys.settrace(None)
                out.write(json.dumps(answer))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as result:
            text = result.read()
        os.waitpid(child, 0)
        sys.stdout.write((text or "null") + "\n")
        sys.stdout.flush()


def kill_after(lines: int) -> None:
    """Have this process killed when it has executed so many lines of the program."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith("ops_alert_dispatch.py"):
            return None
        count += event == "line"
        if count > lines:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


SINKS = (HOOK, CHAT, PAGER)
CATEGORIES = ("red", "green", "blue")
Behaviour = str
# What a sink does: it takes all; is not well (tried twice a pass); takes it and hangs up; cannot be reached;
# finds the record unacceptable.
ANSWERS: dict[Behaviour, Answer] = {
    "ok": ok(),
    "unwell": error(503, "later"),
    "hang_up": hang_up(),
    "refuses": error(422, "no"),
}
TRIES = 2


class PassServer:
    """The process that passes are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def run(self, root: Path, loop: str, env: dict[str, str], kill_after: int | None) -> Any:
        """The summary of a pass; None where it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"root": str(root), "loop": loop, "env": env, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Lane:
    """What the model knows of a lane: records (by number) that it has yet to come to, in order."""

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.enabled = True


class Model(RuleBasedStateMachine):
    """The host, the sinks and the operator do what they like; after each pass all is compared."""

    passes: PassServer
    server: SinkServer

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.repo = make_repo(self.folder, self.server)
        self.server.forget()
        self.written: list[tuple[str, str]] = []  # category ("" for a line that is none) and text, by number
        self.half = ""
        self.taken_up = 0
        self.lanes: dict[str, Lane] = {}
        self.behaviour: dict[str, Behaviour] = dict.fromkeys(SINKS, "ok")
        self.enabled: dict[str, bool] = dict.fromkeys(SINKS, True)
        self.routes: dict[str, tuple[str, ...]] = dict.fromkeys(CATEGORIES, SINKS)
        self.known: tuple[Any, ...] | None = None  # the config that the state accounts for
        self.settled: dict[tuple[str, int], str] = {}
        self.rotations = 0

    def teardown(self) -> None:
        if self.taken_up or self.written:
            for sink in SINKS:
                self.behaviour[sink] = "ok"
            self.run_pass()
            self.run_pass()
            assert all(not lane.ahead for lane in self.lanes.values() if lane.enabled)
        shutil.rmtree(self.folder)

    # -- the host

    def _append(self, text: str) -> None:
        self.repo.append(text)

    def _next(self, category: str) -> str:
        """A line with its number; a category of none makes a line that is no escalation."""
        number = len(self.written)
        if category == "bad":
            text = f"no escalation {number}\n"
        elif category == "blank":
            text = " " * (number + 1) + "\n"
        else:
            text = line({**health_critical(category=category), "number": number})
        self.written.append((category if category in CATEGORIES else "", text))
        return text

    @initialize()
    def begin(self) -> None:
        self._append(self._next("red"))
        self._configure()

    @rule(categories=st.lists(st.sampled_from((*CATEGORIES, "bad", "blank")), min_size=1, max_size=5))
    def append(self, categories: list[str]) -> None:
        self._finish_half()
        for category in categories:
            self._append(self._next(category))

    @rule(category=st.sampled_from(CATEGORIES), share=st.floats(0.01, 0.99))
    def append_half(self, category: str, share: float) -> None:
        self._finish_half()
        text = self._next(category)
        at = max(1, int(len(text) * share))
        self._append(text[:at])
        self.half = text[at:]

    def _finish_half(self) -> None:
        if self.half:
            self._append(self.half)
            self.half = ""

    @rule(copy=st.booleans())
    def rotate(self, copy: bool) -> None:
        """As logrotate does it. A dispatcher that never ran knows of no file but the current one."""
        self._finish_half()
        source = self.repo.source
        if self.known is None:
            return
        for number in range(self.rotations, 0, -1):
            source.with_name(f"{source.name}.{number}").rename(
                source.with_name(f"{source.name}.{number + 1}")
            )
        newest = source.with_name(f"{source.name}.1")
        if copy:
            shutil.copyfile(source, newest)
            os.truncate(source, 0)
        else:
            source.rename(newest)
        self.rotations += 1
        self._append(self._next("bad"))

    # -- the sinks and the operator

    @rule(sink=st.sampled_from(SINKS), behaviour=st.sampled_from((*ANSWERS, "unreachable")))
    def behave(self, sink: str, behaviour: Behaviour) -> None:
        self.behaviour[sink] = behaviour

    @rule(sink=st.sampled_from(SINKS), change=st.sampled_from(("enable", "disable", "remove")))
    def change_sink(self, sink: str, change: str) -> None:
        if change == "remove":
            if len(self.enabled) > 1:
                self.enabled.pop(sink, None)
        else:
            self.enabled[sink] = change == "enable"
        self._configure()

    @rule(category=st.sampled_from(CATEGORIES), sinks=st.sets(st.sampled_from(SINKS), min_size=1))
    def change_route(self, category: str, sinks: set[str]) -> None:
        self.routes[category] = tuple(sorted(sinks))
        self._configure()

    def _routed(self, category: str) -> list[str]:
        """The sinks of a category that are in the config; the first one where none of its own is."""
        chosen = [sink for sink in self.routes[category] if sink in self.enabled]
        return chosen or [min(self.enabled)]

    def _configure(self) -> None:
        config = sink_config(everywhere=True)
        config["sinks"] = {
            sink: {**config["sinks"][sink], "enabled": enabled}
            for sink, enabled in sorted(self.enabled.items())
        }
        config["routing"]["defaultSinks"] = [min(self.enabled)]
        config["routing"]["routes"] = [
            {"category": category, "sinks": self._routed(category)} for category in CATEGORIES
        ]
        config["delivery"] = {"backoffSeconds": {"initial": 0, "max": 0}, "maxAttemptsPerPass": TRIES}
        self.repo.write_config(config)

    # -- passes

    @rule()
    def run_pass(self) -> None:
        summary = self._run(None)
        assert "error" not in summary, summary
        self._check_pass(summary)

    @rule(lines=st.integers(0, 6000))
    def kill_pass(self, lines: int) -> None:
        summary = self._run(lines)
        if summary is not None:
            assert "error" not in summary, summary
            self._check_pass(summary)
            return
        self._learn_from_kill()

    def _run(self, kill_after: int | None) -> Any:
        for sink in SINKS:
            answer = ANSWERS.get(self.behaviour[sink], ok())
            self.server.answer(PATHS[sink], accepted() if (sink, answer) == (PAGER, ok()) else answer)
        env = dict(self.repo.env)
        for sink, name in ((HOOK, "ALERT_HOOK_URL"), (CHAT, "ALERT_CHAT_URL"), (PAGER, "ALERT_PAGER_URL")):
            if self.behaviour[sink] == "unreachable":
                env[name] = "http://127.0.0.1:1/none"  # nobody listens there
        self.server.forget()
        self.before = dict(self.settled)
        summary = self.passes.run(self.repo.root, self.repo.loop, env, kill_after)
        self._align(summary is not None)
        return summary

    def _align(self, done: bool) -> None:
        """Bring the lanes in line with the config, where the pass came so far that the state knows it."""
        config = (dict(self.enabled), dict(self.routes))
        if not done:
            digest = program.read_config(self.repo.config_file)[1]
            try:
                known = self.repo.state()
            except FileNotFoundError:
                return
            if known.get("configDigest") != digest:
                return
        if config == self.known:
            return
        self.known = config
        for sink in [sink for sink in self.lanes if sink not in self.enabled]:
            del self.lanes[sink]
        for sink, enabled in self.enabled.items():
            if enabled and sink not in self.lanes:
                self.lanes[sink] = Lane()
            if sink in self.lanes:
                self.lanes[sink].enabled = enabled

    def _complete(self) -> int:
        return len(self.written) - bool(self.half)

    def _wants(self, sink: str, number: int) -> bool:
        category = self.written[number][0]
        return bool(category) and sink in self._routed(category)

    def _numbers(self) -> dict[str, int]:
        return {
            program.escalation_id(self.repo.loop, text.strip().encode()): number
            for number, (_, text) in enumerate(self.written)
            if text.strip()  # blank lines are all one
        }

    def _received(self) -> dict[str, list[int]]:
        numbers = self._numbers()
        return {
            sink: [
                numbers[escalation_id(request)]
                for request in self.server.received(PATHS[sink])
                if request.json is not None
            ]
            for sink in SINKS
        }

    def _check_pass(self, summary: dict[str, Any]) -> None:
        """What a pass that came to its end must have done, to the letter."""
        new = list(range(self.taken_up, self._complete()))
        received = self._received()
        for sink, lane in self.lanes.items():
            if not lane.enabled:
                assert received[sink] == [], f"{sink} is disabled"
                continue
            # What a killed pass had settled is ahead of the rows, and is not done again.
            rest = [n for n in (*lane.ahead, *new) if (sink, n) not in self.settled]
            todo = [n for n in rest if self._wants(sink, n)]
            behaviour = self.behaviour[sink]
            if behaviour in ("ok", "refuses"):
                assert received[sink] == todo, f"{sink} ({behaviour})"
                for number in todo:
                    self.settled[sink, number] = "delivered" if behaviour == "ok" else "dead_letter"
                lane.ahead = []
            else:
                tries = {"unwell": TRIES, "hang_up": 1, "unreachable": 0}[behaviour]
                assert received[sink] == todo[:1] * tries, f"{sink} ({behaviour})"
                lane.ahead = rest[rest.index(todo[0]) :] if todo else []
        for sink in SINKS:
            assert sink in self.lanes or received[sink] == [], f"{sink} is not in the config"
        self.taken_up = self._complete()
        assert summary["processedCount"] <= len(new)
        for sink, lane in self.lanes.items():
            waiting = sum(self._wants(sink, n) for n in lane.ahead)
            assert summary["lanes"][sink]["waitingCount"] == waiting, f"{sink} waits"
        assert set(summary["lanes"]) == set(self.lanes)
        self._check_records()

    def _learn_from_kill(self) -> None:
        """See what a killed pass had done; nothing that was acknowledged and written may ever come again."""
        settled = self._settled()
        received = self._received()
        told = len([row for row in read_rows(self.repo.telemetry_file) if self._is_main(row)])
        assert self.taken_up <= told <= self._complete()
        for sink in SINKS:
            done = [n for n in received[sink] if (sink, n) in settled]
            unknown = [n for n in received[sink] if (sink, n) not in settled]
            assert len(set(unknown)) <= 1, f"more than one delivery to {sink} was in flight"
            assert not [n for n in done if (sink, n) in self.before], f"{sink} got what it had acknowledged"
            assert done == sorted(set(done))
        for sink, lane in self.lanes.items():
            if lane.enabled:
                rest = [*lane.ahead, *range(self.taken_up, told)]
                mine = [n for s, n in settled if s == sink]
                lane.ahead = [n for n in rest if n > max(mine, default=-1)]
        self.settled = settled
        self.taken_up = told

    def _is_main(self, row: dict[str, Any]) -> bool:
        return "position" in row and not row.get("late")

    def _settled(self) -> dict[tuple[str, int], str]:
        numbers = self._numbers()
        found: dict[tuple[str, int], str] = {}
        for row in read_rows(self.repo.attempts_file):
            if row["outcome"] in ("delivered", "dead_letter"):
                place = (row["sinkId"], numbers[row["escalationId"]])
                assert place not in found, f"{place} was settled twice"
                found[place] = row["outcome"]
        return found

    def _check_records(self) -> None:
        """Attempts and telemetry say of every delivery what the model says."""
        assert self._settled() == self.settled
        numbers = self._numbers()
        rows = [row for row in read_rows(self.repo.telemetry_file) if "position" in row]
        main = [numbers.get(row["escalationId"]) for row in rows if self._is_main(row)]
        bad_or_good = [n for n in main if n is not None]
        assert len(main) == self.taken_up
        assert bad_or_good == sorted(bad_or_good)
        last: dict[tuple[str, int], str] = {}
        for row in rows:
            for entry in row["sinks"]:
                place = (entry["id"], numbers[row["escalationId"]])
                # None: a lane that lags meets records that a later route brought to its sink.
                assert not row.get("late") or last.get(place, "waits") == "waits", f"{place}: two late rows"
                outcome = "dead_letter" if entry.get("deadLetter") else "waits"
                last[place] = "delivered" if entry["status"] == "success" else outcome
        for place, outcome in self.settled.items():
            assert last.get(place, outcome) == outcome, f"telemetry says that {place} is {last[place]}"


def test_whatever_happens_each_delivery_is_made_given_up_or_waits_and_none_is_repeated() -> None:
    Model.passes = PassServer()
    try:
        with make_server() as server:
            Model.server = server
            run_state_machine_as_test(
                Model,
                settings=settings(
                    max_examples=20,
                    stateful_step_count=20,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    # A kill is not the same twice, which shrinking could not bear.
                    phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        Model.passes.close()


# --- Pure functions

PURE = settings(max_examples=60, derandomize=True, database=None, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=12,
)
# What a token looks like; no brackets, since the mask itself has them.
TOKENS = st.text("abcdefABCDEF0123456789-_.~+/=%", min_size=program.SECRET_RUN, max_size=40)


def record(text: bytes) -> program.Record:
    end = program.Position(1, len(text) + 1, 1)
    return program.Record(program.Position(1, 0, 0), end, text, len(text))


@PURE
@given(st.integers(0, 10**15))
def test_retry_after_in_seconds_is_what_it_says_up_to_an_hour(seconds: int) -> None:
    wait = program.parse_retry_after(f" {seconds} ", 0.0)

    assert wait == min(seconds, program.RETRY_AFTER_MAX) or (wait is None and seconds >= 10**12)


@PURE
@given(st.integers(-(10**5), 10**5))
def test_retry_after_as_a_date_is_the_time_until_then(seconds: int) -> None:
    now = datetime(2026, 7, 31, 12, tzinfo=UTC)
    date = format_datetime(now + timedelta(seconds=seconds), usegmt=True)

    assert program.parse_retry_after(date, now.timestamp()) == min(max(seconds, 0), program.RETRY_AFTER_MAX)


@PURE
@given(st.text() | st.from_regex(r"-?[0-9.]+(e[0-9]+)?|Fri, 99 .*|.* 99999 .*"))
def test_retry_after_of_any_kind_is_no_error_and_never_more_than_an_hour(text: str) -> None:
    wait = program.parse_retry_after(text, 1e9)

    assert wait is None or 0 <= wait <= program.RETRY_AFTER_MAX


@PURE
@given(st.binary(max_size=200) | JSON.map(program.encode_json))
@example(b"\xef\xbb\xbf{}")
@example(b'{"category":"a","severity":1e999}')
@example(b"[" * 100_000)
@example(b"9" * 10_000)
def test_any_line_is_an_escalation_or_unusable_and_always_the_same_one(text: bytes) -> None:
    first, second = (program.parse_escalation(record(text), "loop") for _ in range(2))

    assert repr(first) == repr(second)
    assert first.id == program.parse_escalation(record(text + b" \0\r"), "loop").id
    assert isinstance(first, program.Escalation) == (
        isinstance(first.body, dict) and program.as_text(first.body.get("category")) is not None
    )


@PURE
@given(st.text(), st.binary(), st.binary())
def test_an_escalation_id_stands_for_the_loop_and_the_bytes(loop: str, one: bytes, two: bytes) -> None:
    loop = loop.encode("utf-8", "replace").decode()
    identity = program.escalation_id(loop, one)

    assert identity == program.escalation_id(loop, bytes(one))
    assert len(identity) == len("esc_") + 32
    assert (identity == program.escalation_id(loop, two)) == (one == two)
    assert identity != program.escalation_id(loop + "x", one)


@PURE
@given(st.binary(max_size=60).map(lambda data: data.replace(b"\1", b"\n")), st.integers(1, 9), st.data())
def test_lines_are_the_same_however_they_are_read(data: bytes, chunk: int, draw: st.DataObject) -> None:
    start = draw.draw(st.integers(0, len(data)))
    want = data[start:].split(b"\n")
    if not want[-1]:
        want.pop()
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        file.write(data)
        file.flush()
        patch.setattr(program, "READ_CHUNK", chunk)
        found = list(program.read_lines(file.fileno(), start, len(data)))
        end = program.end_of_lines(file.fileno(), len(data))

    assert [line for line, _, _ in found] == want
    assert [size for _, size, _ in found] == [len(line) for line in want]
    offsets = [start, *(offset for _, _, offset in found)]
    assert [data[a:b].rstrip(b"\n") for a, b in itertools.pairwise(offsets)] == [
        text.rstrip(b"\n") for text in want
    ]
    assert end == data.rfind(b"\n") + 1


@PURE
@given(st.lists(TOKENS, min_size=1, max_size=3), st.data())
def test_no_part_of_a_secret_that_names_it_is_left_in_a_text(secrets: list[str], draw: st.DataObject) -> None:
    words = st.text("abcdef 0123:{}", max_size=12)
    whole = st.sampled_from(secrets)
    part = whole.flatmap(
        lambda secret: st.tuples(st.integers(0, len(secret)), st.integers(0, len(secret))).map(
            lambda ends: secret[min(ends) : max(ends)]
        )
    )
    text = "".join(draw.draw(st.lists(words | whole | part, max_size=8)))
    masked = program.Redactor(secrets).mask(text)

    run = program.SECRET_RUN
    for secret in secrets:
        for at in range(len(secret) - run + 1):
            assert secret[at : at + run] not in masked


@PURE
@given(JSON)
@example({"a": [float("nan"), float("inf"), "\ud800", {"\udc00": 1}]})
def test_whatever_is_encoded_is_valid_json_in_utf8(value: object) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = program.encode_json(value).decode("utf-8")

    assert "\n" not in text
    json.loads(text, parse_constant=refuse)


@PURE
@given(st.text("<>&ab;\n\u202e", max_size=60), st.integers(1, 80))
def test_slack_text_keeps_to_its_limit_and_never_ends_within_an_entity(text: str, limit: int) -> None:
    escaped = program.slack_escape(text, limit)

    assert len(escaped) <= limit
    rest = escaped.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")
    assert not set(rest) & set("&<>\n\u202e")


@PURE
@given(st.lists(st.text("<>&ab", max_size=80), max_size=12), st.integers(60, 400))
def test_slack_lines_keep_to_their_limit(lines: list[str], limit: int) -> None:
    assert len(program.slack_escape_lines(lines, limit)) <= limit


def escalation(**fields: Any) -> program.Escalation:
    found = program.parse_escalation(record(program.encode_json(fields)), "loop")
    assert isinstance(found, program.Escalation)
    return found


NAMES = st.text(min_size=1, max_size=300).filter(lambda text: text.strip())


@PURE
@given(NAMES, NAMES, NAMES, NAMES)
def test_a_dedup_key_is_stable_short_and_tells_escalations_apart(
    loop: str, category: str, moment: str, other: str
) -> None:
    fields = {"loopId": loop, "category": category, "timestamp": moment}
    one, same = (
        program.dedup_key(escalation(**fields, transport=name), "event") for name in ("local", "sprite")
    )
    different = program.dedup_key(escalation(**{**fields, "timestamp": moment + "x" + other}), "event")

    assert one == same
    assert one != different
    assert 0 < len(one) <= program.PAGERDUTY_DEDUP_KEY


POSITIONS = st.builds(program.Position, st.integers(1, 3), st.integers(0, 10**9), st.integers(0, 10**6))
SINK_IDS = st.from_regex(r"[A-Za-z0-9._-]{1,9}", fullmatch=True)
MOMENTS = st.none() | st.integers(10**9, 2 * 10**9).map(float)


@st.composite
def lanes(draw: st.DrawFn) -> program.Lane:
    lane = program.Lane(draw(POSITIONS))
    for name, _ in program.Lane.FIELDS:
        before = getattr(lane, name)
        number = isinstance(before, int) or name == "http_status"
        setattr(lane, name, draw(st.integers(0, 999) if number else st.none() | st.text(max_size=9)))
    for name, _ in program.Lane.TIMES:
        setattr(lane, name, draw(MOMENTS))
    lane.disabled_at = draw(st.none() | POSITIONS)
    lane.gaps = draw(st.lists(st.tuples(POSITIONS, POSITIONS), max_size=2))
    return lane


@PURE
@given(
    st.dictionaries(st.from_regex("[A-Za-z0-9._-]{1,9}", fullmatch=True), lanes(), max_size=3),
    POSITIONS,
    st.integers(0, 10**9),
)
def test_a_state_that_is_read_back_is_the_same_state(
    by_sink: dict[str, program.Lane], taken_up: program.Position, offset: int
) -> None:
    segments = [program.Segment(n, f"{n:016x}", 7, n + 10, offset, "tail") for n in (1, 2, 3)]
    source = program.Source(Path("/nowhere/escalations.jsonl"), segments)
    state = program.State()
    state.taken_up, state.lanes, state.segments = taken_up, by_sink, segments
    state.attempts, state.telemetry = program.Checkpoint(1, 2, offset), program.Checkpoint(1, 3, offset)
    state.config_digest = "abc"
    document = {"schemaVersion": "v1", **state.to_json(source)}

    read = program.State.from_json(json.loads(program.encode_json(document)))

    assert {"schemaVersion": "v1", **read.to_json(source)} == document
    assert (read.attempts, read.telemetry, read.salt) == (state.attempts, state.telemetry, state.salt)


if __name__ == "__main__":
    serve()
