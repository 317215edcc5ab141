"""Any order of events, against a model of the queue; and properties of the pure functions.

The events: appends of good, bad and blank lines, lines in halves, passes over one loop or several, kills,
rotations, sinks that fail in several ways, repeats that are held back, digests, changes of the config. The
model knows of each record and sink whether the delivery waits, was delivered, is dead or was skipped, and
what the sink was sent last. Each row of the attempts is a step that the model must allow; after each run,
killed or not, the queue must say what the model says.

Passes run in processes forked from one that has everything imported (`python tests/test_model.py`): that is
quick, and they can be killed for good. A kill comes after so many lines of the program were executed, so that
it lies anywhere in its work and the same example gives much the same run.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import make_repo, read_rows
from escalations import CHAT, HOOK, NO_WAIT, PAGER, PATHS, escalation_ids, health_critical, line, sink_config
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from loopback import Answer, SinkServer, accepted, error, hang_up, ok
from promise import check_promise
from zygote import warm_up

pytestmark = pytest.mark.slow

try:
    import ops_alert_dispatch as program
except ModuleNotFoundError:  # run as a script, which has only this folder on its path
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ops_alert_dispatch as program


def serve() -> None:
    """Run each pass that is asked for on standard input in a forked process, and say what came of it."""
    # What it prints is no answer.
    with redirect_stdout(io.StringIO()):
        warm_up(program)
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
                    jobs = [program.usual_job(asked["root"], loop, asked["trace"]) for loop in asked["loops"]]
                    results = program.run_loops(jobs, asked["env"])
                    answer = {
                        loop: result if isinstance(result, dict) else {"error": repr(result)}
                        for loop, result in results.items()
                    }
                except Exception as error:  # noqa: BLE001 - told to the test
                    answer = {loop: {"error": repr(error)} for loop in asked["loops"]}
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


class PassServer:
    """The process that passes are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def run(self, **request: Any) -> Any:
        """The summaries of a pass over `loops` of the repo at `root`, by loop; None if it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


SINKS = (HOOK, CHAT, PAGER)
URLS = {HOOK: "ALERT_HOOK_URL", CHAT: "ALERT_CHAT_URL", PAGER: "ALERT_PAGER_URL"}
CATEGORIES = ("red", "green", "blue")
# Records are written at some of these minutes of an hour that is over, in any order.
MINUTES = (0, 10, 20, 50)
BEGAN = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
# What a sink does: it takes all; is not well (tried twice a pass); takes it and hangs up; cannot be reached;
# finds the record unacceptable. And the outcome that its attempts then have.
ANSWERS: dict[str, Answer] = {
    "ok": ok(),
    "unwell": error(503, "later"),
    "hang_up": hang_up(),
    "unreachable": ok(),
    "refuses": error(422, "no"),
}
OUTCOMES = {"ok": "delivered", "refuses": "dead_letter"}
STATUSES = {"delivered": "delivered", "dead_letter": "dead", "skipped": "skipped"}
TRIES = 2


def moment(minute: int) -> str:
    return (BEGAN + timedelta(minutes=minute)).isoformat(timespec="seconds").replace("+00:00", "Z")


class Written(NamedTuple):
    """An escalation that the host has written."""

    loop: str
    category: str
    minute: int


class LastSent(NamedTuple):
    """What a sink was sent last of a category: of which minute; repeats held back, and that of the first."""

    minute: int
    repeats: int = 0
    since: int | None = None


# A sink and an escalation, by its id.
Place = tuple[str, str]


class Model(RuleBasedStateMachine):
    """The host, the sinks and the operator do what they like with a loop; after each run all is compared."""

    names: tuple[str, ...] = ("only",)
    passes: PassServer
    server: SinkServer

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.repo = make_repo(self.folder, self.server)
        self.loops = {name: replace(self.repo, loop=name) for name in self.names}
        self.written: dict[str, Written] = {}
        # What was written to each loop in whole lines: escalation ids in order, and all lines.
        self.lines: dict[str, list[str]] = {name: [] for name in self.names}
        self.line_count: Counter[str] = Counter()
        self.half: dict[str, str] = {}
        self.behaviour = dict.fromkeys(SINKS, "ok")
        # The behaviours that each run met, by trace id.
        self.met: dict[str, dict[str, str]] = {}
        self.enabled: dict[str, bool] = dict.fromkeys(SINKS, True)
        self.routes: dict[str, tuple[str, ...]] = dict.fromkeys(CATEGORIES, SINKS)
        self.window, self.per_message = 0, 1
        # What the queue must say. `applied`: the rules under which what waits of a loop does so.
        self.statuses: dict[Place, str] = {}
        self.ingested: dict[str, int] = dict.fromkeys(self.names, 0)
        self.applied: dict[str, dict[str, Any]] = {}
        self.last_sent: dict[tuple[str, str, str], LastSent] = {}
        self.rows: dict[str, set[str]] = {name: set() for name in self.names}

    def teardown(self) -> None:
        for name in self.names:
            self._finish_half(name)
        if self.written:
            self.behaviour = dict.fromkeys(SINKS, "ok")
            self._run(list(self.names), None)
            assert {sink for (sink, _), status in self.statuses.items() if status == "waiting"} <= {
                sink for sink, enabled in self.enabled.items() if not enabled
            }
            assert sum(self.ingested.values()) == len(self.written), "an escalation was lost"
        shutil.rmtree(self.folder)

    # -- the host

    @initialize(window=st.sampled_from((900, 0)), per_message=st.sampled_from((3, 1)))
    def begin(self, window: int, per_message: int) -> None:
        for at, _ in enumerate(self.names):
            self.append(at, [("red", 0)])
        self.change_noise(window, per_message)
        self._run(list(self.names), None)

    def _next(self, loop: str, category: str, minute: int = 0) -> str:
        """The next line; a category of none makes a line that is no escalation."""
        number = self.line_count.total()
        self.line_count[loop] += 1
        if category not in CATEGORIES:
            return f"no escalation {number}\n" if category == "bad" else " " * (number + 1) + "\n"
        text = line({**health_critical(category=category, timestamp=moment(minute)), "number": number})
        identity = program.escalation_id(loop, text.strip().encode())
        self.written[identity] = Written(loop, category, minute)
        self.lines[loop].append(identity)
        return text

    @rule(
        at=st.integers(0, 2),
        records=st.lists(
            st.tuples(st.sampled_from((*CATEGORIES, "bad", "blank")), st.sampled_from(MINUTES)),
            min_size=1,
            max_size=8,
        ),
    )
    def append(self, at: int, records: list[tuple[str, int]]) -> None:
        loop = self.names[at % len(self.names)]
        self._finish_half(loop)
        for category, minute in records:
            self.loops[loop].append(self._next(loop, category, minute))

    @rule(at=st.integers(0, 2), category=st.sampled_from(CATEGORIES), share=st.floats(0.01, 0.99))
    def append_half(self, at: int, category: str, share: float) -> None:
        loop = self.names[at % len(self.names)]
        self._finish_half(loop)
        text = self._next(loop, category)
        cut = max(1, int(len(text) * share))
        self.loops[loop].append(text[:cut])
        self.half[loop] = text[cut:]

    def _finish_half(self, loop: str) -> None:
        self.loops[loop].append(self.half.pop(loop, ""))

    @rule(at=st.integers(0, 2), copy=st.booleans(), compress=st.booleans())
    def rotate(self, at: int, copy: bool, compress: bool) -> None:
        """As logrotate does it. A dispatcher that never ran knows of no file but the current one."""
        loop = self.names[at % len(self.names)]
        self._finish_half(loop)
        source = self.loops[loop].source
        for path in sorted(
            source.parent.glob(f"{source.name}.*"), key=lambda path: -int(path.suffixes[1][1:])
        ):
            number = int(path.suffixes[1][1:])
            path.rename(path.with_name(path.name.replace(f".{number}", f".{number + 1}")))
        newest = source.with_name(f"{source.name}.1")
        if copy:
            shutil.copyfile(source, newest)
            os.truncate(source, 0)
        else:
            source.rename(newest)
        if compress:
            newest.with_name(f"{newest.name}.gz").write_bytes(gzip.compress(newest.read_bytes(), mtime=0))
            newest.unlink()
        self.loops[loop].append(self._next(loop, "bad"))

    # -- the sinks and the operator

    @rule(sink=st.sampled_from(SINKS), behaviour=st.sampled_from((*ANSWERS,)))
    def behave(self, sink: str, behaviour: str) -> None:
        self.behaviour[sink] = behaviour

    @rule(sink=st.sampled_from(SINKS), change=st.sampled_from(("enable", "disable", "remove")))
    def change_sink(self, sink: str, change: str) -> None:
        if change != "remove":
            self.enabled[sink] = change == "enable"
        elif len(self.enabled) > 1:
            self.enabled.pop(sink, None)
        self._configure()

    @rule(category=st.sampled_from(CATEGORIES), sinks=st.sets(st.sampled_from(SINKS), min_size=1))
    def change_route(self, category: str, sinks: set[str]) -> None:
        self.routes[category] = tuple(sorted(sinks))
        self._configure()

    @rule(window=st.sampled_from((0, 900)), per_message=st.sampled_from((1, 3)))
    def change_noise(self, window: int, per_message: int) -> None:
        self.window, self.per_message = window, per_message
        self._configure()

    def _routed(self, category: str) -> list[str]:
        """The sinks of a category that are in the config; the first one if none of its own is."""
        chosen = [sink for sink in self.routes[category] if sink in self.enabled]
        return chosen or [min(self.enabled)]

    def _configure(self) -> None:
        config = sink_config(everywhere=True)
        config["sinks"] = {
            sink: {**config["sinks"][sink], "enabled": enabled}
            for sink, enabled in sorted(self.enabled.items())
        }
        if CHAT in self.enabled:
            config["sinks"][CHAT]["maxPerMessage"] = self.per_message
        config["routing"]["repeat"] = {"windowSeconds": self.window}
        config["routing"]["defaultSinks"] = [min(self.enabled)]
        config["routing"]["routes"] = [
            {"category": category, "sinks": self._routed(category)} for category in CATEGORIES
        ]
        config["delivery"] = {"backoffSeconds": NO_WAIT, "maxAttemptsPerPass": TRIES}
        self.repo.write_config(config)
        self.config_rules = program.load_config(str(self.repo.config_file), self.repo.env).rules()

    # -- passes

    @rule(first=st.integers(0, 2), count=st.sampled_from((3, 3, 1, 2)))
    def run_pass(self, first: int, count: int) -> None:
        self._run([*self.names[first:], *self.names[:first]][:count], None)

    @rule(lines=st.integers(0, 9000))
    def kill_pass(self, lines: int) -> None:
        self._run(list(self.names), lines)

    def _run(self, loops: Sequence[str], kill_after: int | None) -> None:
        trace, env = f"pass-{len(self.met)}", dict(self.repo.env)
        self.met[trace] = dict(self.behaviour)
        for sink, behaviour in self.behaviour.items():
            answer = ANSWERS[behaviour]
            self.server.answer(PATHS[sink], accepted() if (sink, answer) == (PAGER, ok()) else answer)
            if behaviour == "unreachable":
                env[URLS[sink]] = "http://127.0.0.1:1/none"  # nobody listens there
        self.server.forget()
        summaries = self.passes.run(
            root=str(self.repo.root), loops=loops, env=env, kill_after=kill_after, trace=trace
        )
        before = dict(self.statuses)
        self._follow()
        self._check_requests(trace, before, killed=summaries is None)
        if summaries is None:
            return
        assert sorted(summaries) == sorted(loops)
        for loop in loops:
            self._check_end(loop, summaries[loop])

    # -- the model, and the queue

    def _follow(self) -> None:
        """Let the model do what the queue and the rows say was done, if it may."""
        with tempfile.TemporaryDirectory() as folder:
            # A copy: who closes the queue last changes the files that a kill has left.
            for path in self.repo.queue_file.parent.glob(f"{self.repo.queue_file.name}*"):
                shutil.copy(path, folder)
            with closing(sqlite3.connect(Path(folder, self.repo.queue_file.name))) as queue:
                for loop in self.names:
                    found = queue.execute("SELECT id, rules FROM loops WHERE loop_id = ?", (loop,)).fetchone()
                    if found is None:
                        continue
                    number, rules = found[0], json.loads(found[1] or "null")
                    if rules != self.applied.get(loop):
                        assert rules == self.config_rules, (
                            "what waits goes by a config that is not the last one"
                        )
                        self._reroute(loop, self.applied.get(loop), rules)
                    ids = queue.execute(
                        "SELECT escalation_id FROM escalations WHERE loop = ? AND unusable IS NULL "
                        "ORDER BY id",
                        (number,),
                    ).fetchall()
                    self._ingest(loop, [identity for [identity] in ids])
                    outbox = queue.execute(
                        "SELECT row FROM outbox WHERE loop = ? AND file = 'attempts' ORDER BY id", (number,)
                    ).fetchall()
                    self._replay(loop, [row.decode() for [row] in outbox])
                kept = queue.execute(
                    "SELECT sink, escalation_id, status, d.reason_code FROM deliveries d "
                    "JOIN escalations e ON e.id = escalation"
                )
                changed = ("route_changed", "sink_removed")
                said = {(row[0], row[1]): row[3] if row[3] in changed else row[2] for row in kept}
        assert said == self.statuses

    def _reroute(self, loop: str, before: dict[str, Any] | None, rules: dict[str, Any]) -> None:
        """What waits goes to the sinks that its route names now and did not before, and no more to others.
        New sinks get it only if no other one has it."""
        self.applied[loop] = rules
        mine = [place for place in self.statuses if self.written[place[1]].loop == loop]
        waited = {place for place in mine if self.statuses[place] == "waiting"}
        waiting = {identity for _, identity in waited}
        for sink, identity in mine:
            if self.statuses[sink, identity] in ("waiting", "dead") and sink not in self.enabled:
                self.statuses[sink, identity] = "sink_removed"
        for identity in waiting:
            routed = self._routed(self.written[identity].category)
            now = [sink for sink in routed if self.enabled[sink]]
            assert before is not None
            on = {sink for sink, settings in before["sinks"].items() if settings["enabled"]}
            older = [sink for sink in now if sink in on]
            [led_to] = [
                route["sinks"]
                for route in before["routing"]["routes"]
                if route["category"] == self.written[identity].category
            ]
            without = (None, "route_changed", "sink_removed")
            nobody = all(self.statuses.get((sink, identity)) in without for sink in now)
            moves = (older or now) if nobody else [sink for sink in older if sink not in led_to]
            for sink in moves:
                if self.statuses.get((sink, identity)) in without:
                    self.statuses[sink, identity] = "waiting"
            for sink in before["sinks"] if nobody and moves else ():
                if sink not in self.enabled and (sink, identity) in waited:
                    self.statuses[sink, identity] = "route_changed"
            for sink in self.enabled:
                if sink not in routed and self.statuses.get((sink, identity)) == "waiting":
                    self.statuses[sink, identity] = "route_changed"

    def _ingest(self, loop: str, ids: Sequence[str]) -> None:
        complete = self.lines[loop][: len(self.lines[loop]) - (loop in self.half)]
        assert list(ids) == complete[: len(ids)], "not what was written, or not in order"
        for identity in ids[self.ingested[loop] :]:
            for sink in self._routed(self.written[identity].category):
                if self.enabled[sink]:
                    self.statuses[sink, identity] = "waiting"
        self.ingested[loop] = len(ids)

    def _replay(self, loop: str, outbox: Sequence[str]) -> None:
        file = self.loops[loop].attempts_file
        texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        torn = texts.pop() if texts and not file.read_bytes().endswith(b"\n") else ""
        whole = [text for text in texts if text.endswith("}")]
        assert len(whole) == len(set(whole)), "an attempt has two rows"
        assert self.rows[loop] <= {*whole, *outbox}, "the row of an attempt is lost"
        assert not torn or any(row.startswith(torn) for row in outbox), "a row is torn and lost"
        for text in dict.fromkeys([*whole, *outbox]):
            if text not in self.rows[loop]:
                self.rows[loop].add(text)
                self._step(loop, json.loads(text))

    def _step(self, loop: str, row: dict[str, Any]) -> None:
        """One row of the attempts is one step of the model."""
        place = sink, identity = row["sinkId"], row["escalationId"]
        assert self.statuses[place] == "waiting", f"{place} is {self.statuses[place]}, and was attempted"
        _, category, minute = self.written[identity]
        last = self.last_sent.get((loop, sink, category))
        is_repeat = last is not None and abs(minute - last.minute) * 60 < self.window
        outcome = row["outcome"]
        if outcome == "skipped":
            assert row["reasonCode"] == "repeat_suppressed"
            assert last is not None
            assert is_repeat, f"{place} was held back"
            since = minute if last.since is None else last.since
            self.last_sent[loop, sink, category] = LastSent(last.minute, last.repeats + 1, since)
        else:
            expected = OUTCOMES.get(self.met[row["traceId"]][sink], "retry")
            # Of a digest that is refused, each is tried alone.
            assert outcome == ("retry" if expected == "dead_letter" and "batchSize" in row else expected)
            assert not is_repeat, f"{place} is a repeat, and was sent"
        if outcome == "delivered":
            held_back = None
            if last is not None and last.since is not None and self.window:
                held_back = {"repeats": last.repeats, "since": moment(last.since)}
            assert row.get("heldBack") == held_back
            if self.window:
                self.last_sent[loop, sink, category] = LastSent(minute)
        self.statuses[place] = STATUSES.get(outcome, "waiting")

    def _check_requests(self, trace: str, before: dict[Place, str], *, killed: bool) -> None:
        """What a sink got is on record, but for one request that was on its way at a kill."""
        recorded = {
            (row["sinkId"], row["escalationId"])
            for rows in self.rows.values()
            for row in map(json.loads, rows)
            if row["traceId"] == trace
        }
        for sink in SINKS:
            got = [request for request in self.server.received(PATHS[sink]) if request.json is not None]
            batches = [escalation_ids(request) for request in got]
            ids = Counter(identity for batch in batches for identity in batch)
            refuses = self.behaviour[sink] == "refuses"
            # A digest that is refused is sent again, one by one.
            most = {"ok": 1, "hang_up": 1, "unreachable": 0}.get(self.behaviour[sink], TRIES)
            assert all(count <= most for count in ids.values()), f"{sink} got the same too often"
            unknown = [batch for batch in batches if not {(sink, one) for one in batch} <= recorded]
            if not refuses or self.per_message == 1 or not killed:
                assert len(unknown) <= killed, f"{len(unknown)} requests to {sink} are not on record"
            for identity in ids:
                assert before.get((sink, identity), "waiting") in ("waiting", "route_changed"), "sent again"

    def _check_end(self, loop: str, summary: dict[str, Any]) -> None:
        """What a pass that came to its end must have done."""
        assert "error" not in summary, summary
        complete = len(self.lines[loop]) - (loop in self.half)
        assert self.ingested[loop] == complete, "a complete line was not ingested"
        assert {*read_texts(self.loops[loop].attempts_file)} == self.rows[loop]
        waiting = Counter(
            sink
            for (sink, identity), status in self.statuses.items()
            if status == "waiting" and self.written[identity].loop == loop
        )
        for sink, behaviour in self.behaviour.items():
            if behaviour in OUTCOMES and self.enabled.get(sink):
                assert not waiting[sink], f"{sink} is well, and something waits for it"
        assert summary["waitingCount"] == waiting.total()
        assert {sink: summary["sinks"][sink]["waitingCount"] for sink in waiting} == waiting
        rows = [row for row in read_rows(self.loops[loop].telemetry_file) if "position" in row]
        main = Counter(row["escalationId"] for row in rows if "late" not in row and "escalation" in row)
        assert main == Counter(self.lines[loop][:complete])
        assert len([row for row in rows if "late" not in row]) == self.line_count[loop] - (loop in self.half)
        check_promise(self.loops[loop])


def read_texts(file: Path) -> list[str]:
    """The whole rows of a file; a kill may have left a torn one, which is closed."""
    return [text for text in file.read_text(encoding="utf-8").splitlines() if is_json(text)]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class Loops(Model):
    """The same with three loops, that share a queue and the sinks."""

    names = ("east", "north", "west")


@pytest.fixture(scope="module")
def passes() -> Iterator[PassServer]:
    one = PassServer()
    yield one
    one.close()


@pytest.mark.parametrize("machine", [Model, Loops])
def test_whatever_happens_each_delivery_is_made_given_up_or_waits_and_none_is_repeated(
    passes: PassServer, server: SinkServer, machine: type[Model]
) -> None:
    machine.passes = passes
    machine.server = server
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=6,
            stateful_step_count=20,
            derandomize=True,
            database=None,
            deadline=None,
            # A kill is not the same twice, which shrinking could not bear.
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- Pure functions

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=12,
)
# What a token looks like; no brackets, since the mask itself has them.
TOKENS = st.text("abcdefABCDEF0123456789-_.~+/=%", min_size=program.SECRET_RUN, max_size=40)


NUMBERS = st.integers() | st.floats()


@given(st.integers(0, 10**15))
def test_retry_after_in_seconds_is_what_it_says_up_to_an_hour(seconds: int) -> None:
    wait = program.parse_retry_after(f" {seconds} ", 0.0)

    assert wait == min(seconds, program.RETRY_AFTER_MAX) or (wait is None and seconds >= 10**12)


@given(st.integers(-(10**5), 10**5))
def test_retry_after_as_a_date_is_the_time_until_then(seconds: int) -> None:
    now = datetime(2026, 7, 31, 12, tzinfo=UTC)
    date = format_datetime(now + timedelta(seconds=seconds), usegmt=True)

    assert program.parse_retry_after(date, now.timestamp()) == min(max(seconds, 0), program.RETRY_AFTER_MAX)


WORDS_OF_DATES = st.sampled_from(["Fri,", "0", "99", "99999", "Nov", "23:59:60", "25:61:61", "-9999", "GMT"])


@given(st.lists(WORDS_OF_DATES | st.text() | NUMBERS.map(str), max_size=7).map(" ".join))
def test_retry_after_of_any_kind_is_no_error_and_never_more_than_an_hour(text: str) -> None:
    wait = program.parse_retry_after(text, 1e9)

    assert wait is None or 0 <= wait <= program.RETRY_AFTER_MAX


REASONS = {"blank_line", "invalid_escalation_json", "missing_escalation_category"}


@given(st.binary(max_size=200) | JSON.map(program.encode_json))
@example(b"\xef\xbb\xbf{}")
@example(b'{"category":"a","severity":1e999}')
@example(b"[" * 100_000)
@example(b"9" * 10_000)
def test_any_line_is_escalations_or_unusable_and_always_the_same(text: bytes) -> None:
    first, second = (program.parse_line(text, len(text), "loop") for _ in range(2))

    assert repr(first) == repr(second)
    again = program.parse_line(text + b" \0\r", len(text) + 3, "loop")
    assert [found.id for found in again] == [found.id for found in first]
    for found in first:
        assert re.fullmatch(r"esc_[0-9a-f]{32}", found.id)
        assert isinstance(found, program.Escalation) or found.reason_code in REASONS
        assert isinstance(found, program.Escalation) == (
            isinstance(found.body, dict) and program.as_text(found.body.get("category")) is not None
        )


@given(st.text(), st.binary(), st.binary())
def test_an_escalation_id_stands_for_the_loop_and_the_bytes(loop: str, one: bytes, two: bytes) -> None:
    loop = loop.encode("utf-8", "replace").decode()
    identity = program.escalation_id(loop, one)

    assert identity == program.escalation_id(loop, bytes(one))
    assert len(identity) == len("esc_") + 32
    assert (identity == program.escalation_id(loop, two)) == (one == two)
    assert identity != program.escalation_id(loop + "x", one)


@given(
    st.binary(max_size=60).map(lambda data: data.replace(b"\1", b"\n").replace(b"\2", b"\0")),
    st.integers(1, 9),
    st.data(),
)
def test_lines_are_the_same_however_they_are_read(data: bytes, chunk: int, draw: st.DataObject) -> None:
    start = draw.draw(st.integers(0, len(data)))
    want = data[start:].split(b"\n")
    if not want[-1]:
        want.pop()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "log")
        path.write_bytes(data)
        patch.setattr(program, "READ_CHUNK", chunk)
        file = program.LogFile(str(path))
        found = list(program.read_lines(file.read, start, len(data), 7))
        end = file.end_of_lines()
        file.close()

    assert [line.text for line in found] == [text.lstrip(program.BLANK) for text in want]
    assert [line.size for line in found] == [len(line.text) for line in found]
    assert [data[line.offset : line.end].removesuffix(b"\n") for line in found] == want
    assert [line.number for line in found] == [*range(8, 8 + len(want))]
    assert end == data.rfind(b"\n") + 1


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


@given(JSON)
@example({"a": [float("nan"), float("inf"), "\ud800", {"\udc00": 1}]})
def test_whatever_is_encoded_is_valid_json_in_utf8(value: object) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = program.encode_json(value).decode("utf-8")

    assert "\n" not in text
    json.loads(text, parse_constant=refuse)


@given(st.text("<>&ab;\n\u202e", max_size=60), st.integers(1, 80))
def test_slack_text_keeps_to_its_limit_and_never_ends_within_an_entity(text: str, limit: int) -> None:
    escaped = program.slack_escape(text, limit)

    assert len(escaped) <= limit
    rest = escaped.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")
    assert not set(rest) & set("&<>\n\u202e")


@given(st.lists(st.text("<>&ab", max_size=80), max_size=12), st.integers(60, 400))
def test_the_lines_of_a_message_keep_to_their_limit(lines: list[str], limit: int) -> None:
    assert len(program.bullets(lines, limit, program.slack_escape)) <= limit


def escalation(**fields: Any) -> program.Escalation:
    text = program.encode_json(fields)
    [found] = program.parse_line(text, len(text), "loop")
    assert isinstance(found, program.Escalation)
    return found


NAMES = st.text(min_size=1, max_size=300).filter(lambda text: text.strip())


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


COUNTS = st.integers(0, 2**63 - 1)
CURSORS = st.builds(
    program.Cursor,
    *(COUNTS, st.text(), COUNTS, COUNTS, COUNTS, COUNTS, st.text(), st.booleans()),
    st.lists(st.text(), max_size=3).map(tuple),
    st.floats(0, 2e9),
)


@given(CURSORS)
def test_a_cursor_that_is_read_back_is_the_same_place(cursor: program.Cursor) -> None:
    assert program.Cursor.from_json(json.loads(program.encode_json(cursor.to_json()))) == cursor


@given(CURSORS, st.sampled_from(program.Cursor._fields), JSON)
def test_what_is_no_cursor_is_refused_and_never_believed(
    cursor: program.Cursor, field: str, value: object
) -> None:
    document = json.loads(program.encode_json({**cursor.to_json(), field: value}))
    try:
        found = program.Cursor.from_json(document)
    except program.MALFORMED:
        return
    assert all(
        0 <= count < 2**63 for count in (found.number, found.device, found.inode, found.offset, found.line)
    )


if __name__ == "__main__":
    serve()
