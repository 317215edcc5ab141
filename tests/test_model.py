"""Any order of events, against a model; and properties of the pure functions.

The events: appends of good, bad and blank lines, lines in halves, passes, kills, rotations, sinks that fail
in several ways, repeats that are held back, digests, changes of the config. Whatever happens: each delivery
is made, held back, given up or still waits, none that was acknowledged is made again, each sink gets its own
in order, and what it was told and how often that was held back is known exactly.

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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Repo, make_repo, make_server, read_rows
from escalations import CHAT, HOOK, PAGER, PATHS, escalation_ids, health_critical, line, sink_config
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from loopback import Answer, SinkServer, accepted, error, hang_up, ok
from promise import check_promise

pytestmark = pytest.mark.slow

try:
    import ops_alert_dispatch as program
except ModuleNotFoundError:  # run as a script, which has only this folder on its path
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ops_alert_dispatch as program


def make_job(root: Path, loop: str) -> program.Job:
    """A pass over a loop of a repo, with every file in its usual place."""
    return program.usual_job(str(root), loop)._replace(trace_id="model")


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
                    jobs = [make_job(Path(asked["root"]), loop) for loop in asked["loops"]]
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


SINKS = (HOOK, CHAT, PAGER)
# Records are written at some of these minutes of an hour that is over, in any order.
MINUTES = (0, 10, 20, 50)
BEGAN = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
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
TRIES_OF = {"unwell": TRIES, "hang_up": 1, "unreachable": 0}


def instruct(server: SinkServer, repo: Repo, behaviour: Mapping[str, Behaviour]) -> dict[str, str]:
    """Have the sinks behave so from now on. Returns the environment of a pass that meets them."""
    for sink in SINKS:
        answer = ANSWERS.get(behaviour[sink], ok())
        server.answer(PATHS[sink], accepted() if (sink, answer) == (PAGER, ok()) else answer)
    server.forget()
    env = dict(repo.env)
    for sink, name in ((HOOK, "ALERT_HOOK_URL"), (CHAT, "ALERT_CHAT_URL"), (PAGER, "ALERT_PAGER_URL")):
        if behaviour[sink] == "unreachable":
            env[name] = "http://127.0.0.1:1/none"  # nobody listens there
    return env


class PassServer:
    """The process that passes are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def run(self, root: Path, loops: Sequence[str], env: dict[str, str], kill_after: int | None) -> Any:
        """The summaries of passes over these loops, by loop; None where they were killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"root": str(root), "loops": loops, "env": env, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def moment(minute: int) -> str:
    return (BEGAN + timedelta(minutes=minute)).isoformat(timespec="seconds").replace("+00:00", "Z")


class Told(NamedTuple):
    """What a sink was told last of a category: of which minute; repeats held back, and that of the first."""

    minute: int
    repeats: int = 0
    since: int | None = None

    def hold_back(self, minute: int) -> Told:
        return Told(self.minute, self.repeats + 1, minute if self.since is None else self.since)

    def shown(self) -> tuple[str, int, str | None]:
        return moment(self.minute), self.repeats, None if self.since is None else moment(self.since)


class Lane:
    """What the model knows of a lane: records (by number) that it has yet to come to, in order; what its sink
    was told, by category."""

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.enabled = True
        self.told: dict[str, Told] = {}


class Model(RuleBasedStateMachine):
    """The host, the sinks and the operator do what they like; after each pass all is compared."""

    passes: PassServer
    server: SinkServer

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.repo = make_repo(self.folder, self.server)
        self.server.forget()
        # By number: category ("" for a line that is none), text, minute.
        self.written: list[tuple[str, str, int]] = []
        self.half = ""
        self.taken_up = 0
        self.lanes: dict[str, Lane] = {}
        self.behaviour: dict[str, Behaviour] = dict.fromkeys(SINKS, "ok")
        self.enabled: dict[str, bool] = dict.fromkeys(SINKS, True)
        self.routes: dict[str, tuple[str, ...]] = dict.fromkeys(CATEGORIES, SINKS)
        self.known: tuple[Any, ...] | None = None  # the config that the state accounts for
        self.settled: dict[tuple[str, int], str] = {}
        self.rows_seen = 0
        self.window = 0
        self.per_message = 1
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

    def _next(self, category: str, minute: int = 0) -> str:
        """A line with its number; a category of none makes a line that is no escalation."""
        number = len(self.written)
        if category == "bad":
            text = f"no escalation {number}\n"
        elif category == "blank":
            text = " " * (number + 1) + "\n"
        else:
            text = line({**health_critical(category=category, timestamp=moment(minute)), "number": number})
        self.written.append((category if category in CATEGORIES else "", text, minute))
        return text

    @initialize(window=st.sampled_from((900, 0)), per_message=st.sampled_from((3, 1)))
    def begin(self, window: int, per_message: int) -> None:
        self._append(self._next("red"))
        self.change_noise(window, per_message)

    @rule(
        records=st.lists(
            st.tuples(st.sampled_from((*CATEGORIES, "bad", "blank")), st.sampled_from(MINUTES)),
            min_size=1,
            max_size=8,
        )
    )
    def append(self, records: list[tuple[str, int]]) -> None:
        self._finish_half()
        for category, minute in records:
            self._append(self._next(category, minute))

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

    @rule(window=st.sampled_from((0, 900)), per_message=st.sampled_from((1, 3)))
    def change_noise(self, window: int, per_message: int) -> None:
        self.window, self.per_message = window, per_message
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
        if CHAT in self.enabled:
            config["sinks"][CHAT]["maxPerMessage"] = self.per_message
        config["routing"]["repeat"] = {"windowSeconds": self.window}
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
        env = instruct(self.server, self.repo, self.behaviour)
        self.before = dict(self.settled)
        summaries = self.passes.run(self.repo.root, [self.repo.loop], env, kill_after)
        self._align(summaries is not None)
        return summaries and summaries[self.repo.loop]

    def _align(self, done: bool) -> None:
        """Bring the lanes in line with the config, where the pass came so far that the state knows it."""
        config = (dict(self.enabled), dict(self.routes))
        if not done:
            digest = program.read_config(str(self.repo.config_file))[1]
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
            for number, (_, text, _) in enumerate(self.written)
            if text.strip()  # blank lines are all one
        }

    def _received(self) -> dict[str, list[list[int]]]:
        """The numbers in each request to each sink."""
        numbers = self._numbers()
        return {
            sink: [
                [numbers[identity] for identity in escalation_ids(request)]
                for request in self.server.received(PATHS[sink])
                if request.json is not None
            ]
            for sink in SINKS
        }

    def _play(self, sink: str, todo: list[int]) -> tuple[list[list[int]], int | None]:
        """The requests to a sink that has these records before it, and the first that it keeps waiting."""
        lane, behaviour = self.lanes[sink], self.behaviour[sink]
        size = self.per_message if sink == CHAT else 1
        requests: list[list[int]] = []
        while todo:
            told, batch, between = dict(lane.told), list[int](), list[int]()
            while todo and len(batch) < size:
                number, *todo = todo
                category, _, minute = self.written[number]
                last = told.get(category)
                if last and abs(minute - last.minute) * 60 < self.window:
                    told[category] = last.hold_back(minute)
                    between.append(number)
                    if not batch:
                        self._hold_back(sink, [between.pop()])
                else:
                    batch.append(number)
                    if self.window:
                        told[category] = Told(minute)
            if not batch:
                break
            if behaviour not in ("ok", "refuses"):
                return requests + [batch] * TRIES_OF[behaviour], batch[0]
            requests.append(batch)
            if behaviour == "ok":
                lane.told = told
                self.settled |= {(sink, number): "delivered" for number in batch}
                self.settled |= {(sink, number): "skipped" for number in between}
            else:
                refused = {self.written[number][0] for number in batch}
                lost = [number for number in between if self.written[number][0] in refused]
                self.settled |= {(sink, number): "dead_letter" for number in batch + lost}
                self._hold_back(sink, [number for number in between if number not in lost])
        return requests, None

    def _hold_back(self, sink: str, repeats: list[int]) -> None:
        told = self.lanes[sink].told
        for number in repeats:
            category, _, minute = self.written[number]
            told[category] = told[category].hold_back(minute)
            self.settled[sink, number] = "skipped"

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
            requests, kept = self._play(sink, todo)
            assert received[sink] == requests, f"{sink} ({self.behaviour[sink]})"
            lane.ahead = [] if kept is None else rest[rest.index(kept) :]
        for sink in SINKS:
            assert sink in self.lanes or received[sink] == [], f"{sink} is not in the config"
        self.taken_up = self._complete()
        assert summary["processedCount"] <= len(new)
        for sink, lane in self.lanes.items():
            waiting = sum(self._wants(sink, n) for n in lane.ahead)
            assert summary["lanes"][sink]["waitingCount"] == waiting, f"{sink} waits"
            known = sorted(tuple(entry) for _, *entry in summary["lanes"][sink].get("told", []))
            assert known == sorted(told.shown() for told in lane.told.values()), f"{sink} was told"
        assert set(summary["lanes"]) == set(self.lanes)
        self._check_records()

    def _learn_from_kill(self) -> None:
        """See what a killed pass had done; nothing that was acknowledged and written may ever come again."""
        settled = self._settled()
        received = self._received()
        told = len([row for row in read_rows(self.repo.telemetry_file) if self._is_main(row)])
        assert self.taken_up <= told <= self._complete()
        for sink in SINKS:
            done = [n for batch in received[sink] for n in batch if (sink, n) in settled]
            unknown = {tuple(batch) for batch in received[sink] if (sink, batch[0]) not in settled}
            assert len(unknown) <= 1, f"more than one request to {sink} was in flight"
            assert not [n for n in done if (sink, n) in self.before], f"{sink} got what it had acknowledged"
            assert done == sorted(set(done))
        for sink, lane in self.lanes.items():
            if lane.enabled:
                rest = [*lane.ahead, *range(self.taken_up, told)]
                mine = [n for s, n in settled if s == sink]
                lane.ahead = [n for n in rest if n > max(mine, default=-1)]
        for row in read_rows(self.repo.attempts_file)[self.rows_seen :]:
            self._learn_told(row)
        self.settled = settled
        self.taken_up = told

    def _learn_told(self, row: dict[str, Any]) -> None:
        """What an attempt that is on record after a kill says of what a sink was told."""
        lane = self.lanes.get(row["sinkId"])
        category, _, minute = self.written[self._numbers()[row["escalationId"]]]
        if lane and row["outcome"] == "delivered" and "repeat" in row:
            lane.told[category] = Told(minute)
        elif lane and row["outcome"] == "skipped":
            lane.told[category] = lane.told[category].hold_back(minute)

    def _is_main(self, row: dict[str, Any]) -> bool:
        return "position" in row and not row.get("late")

    def _settled(self) -> dict[tuple[str, int], str]:
        numbers = self._numbers()
        found: dict[tuple[str, int], str] = {}
        for row in read_rows(self.repo.attempts_file):
            if row["outcome"] in ("delivered", "dead_letter", "skipped"):
                place = (row["sinkId"], numbers[row["escalationId"]])
                assert place not in found, f"{place} was settled twice"
                found[place] = row["outcome"]
        return found

    def _check_records(self) -> None:
        """Attempts and telemetry say of every delivery what the model says."""
        assert self._settled() == self.settled
        self.rows_seen = len(read_rows(self.repo.attempts_file))
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
                last[place] = {"success": "delivered", "skipped": "skipped"}.get(entry["status"], outcome)
        for place, outcome in self.settled.items():
            assert last.get(place, outcome) == outcome, f"telemetry says that {place} is {last[place]}"


LOOPS = ("east", "north", "west")


class Loops(RuleBasedStateMachine):
    """Several loops in one process, or some of them: what must hold of each, and of each sink for all."""

    passes: PassServer
    server: SinkServer

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        first = make_repo(self.folder, self.server)
        self.loops = {name: replace(first, loop=name) for name in LOOPS}
        self.repo = first
        self.behaviour: dict[str, Behaviour] = dict.fromkeys(SINKS, "ok")
        self.count = 0

    @initialize(window=st.sampled_from((900, 0)), per_message=st.sampled_from((3, 1)))
    def begin(self, window: int, per_message: int) -> None:
        config = sink_config(everywhere=True)
        config["sinks"][CHAT]["maxPerMessage"] = per_message
        config["routing"]["repeat"] = {"windowSeconds": window}
        config["delivery"] = {"backoffSeconds": {"initial": 0, "max": 0}, "maxAttemptsPerPass": TRIES}
        self.repo.write_config(config)
        for name in LOOPS:
            self.append(name, [("red", 0)])

    @rule(
        name=st.sampled_from(LOOPS),
        records=st.lists(st.tuples(st.sampled_from(CATEGORIES), st.sampled_from(MINUTES)), max_size=6),
    )
    def append(self, name: str, records: list[tuple[str, int]]) -> None:
        for category, minute in records:
            record = health_critical(category=category, timestamp=moment(minute), number=self.count)
            self.loops[name].append({**record, "loopId": name})
            self.count += 1

    @rule(sink=st.sampled_from(SINKS), behaviour=st.sampled_from((*ANSWERS, "unreachable")))
    def behave(self, sink: str, behaviour: Behaviour) -> None:
        self.behaviour[sink] = behaviour

    @rule(names=st.permutations(LOOPS), count=st.sampled_from((3, 3, 1, 2)))
    def run_passes(self, names: list[str], count: int) -> None:
        self._run(names[:count], None)

    @rule(names=st.permutations(LOOPS), lines=st.integers(0, 9000))
    def kill_passes(self, names: list[str], lines: int) -> None:
        self._run(names, lines)

    def _run(self, names: list[str], kill_after: int | None) -> None:
        before = self._settled()
        env = instruct(self.server, self.repo, self.behaviour)
        summaries = self.passes.run(self.repo.root, names, env, kill_after)
        after = self._settled()
        for sink in SINKS:
            whole = [request for request in self.server.received(PATHS[sink]) if request.json is not None]
            batches = [escalation_ids(request) for request in whole]
            again = [identity for batch in batches for identity in batch if (sink, identity) in before]
            assert again == [], f"{sink} got what it had acknowledged"
            in_flight = {tuple(batch) for batch in batches if (sink, batch[0]) not in after}
            assert len(in_flight) <= 1, f"more than one request to {sink} was not settled"
            if self.behaviour[sink] not in ("ok", "refuses"):
                assert len(batches) <= TRIES_OF[self.behaviour[sink]], f"{sink} was down, and asked too often"
        if summaries is None:
            return
        assert sorted(summaries) == sorted(names)
        for name in names:
            assert "error" not in summaries[name], summaries[name]
            check_promise(self.loops[name])

    def _settled(self) -> dict[tuple[str, str], str]:
        rows = [row for loop in self.loops.values() for row in read_rows(loop.attempts_file)]
        return {
            (row["sinkId"], row["escalationId"]): row["outcome"]
            for row in rows
            if row["outcome"] in ("delivered", "dead_letter", "skipped")
        }

    def teardown(self) -> None:
        for sink in SINKS:
            self.behaviour[sink] = "ok"
        self._run(list(LOOPS), None)
        assert all(loop.state()["waitingCount"] == 0 for loop in self.loops.values())
        assert len(self._settled()) == self.count * len(SINKS), "a delivery was lost"
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("machine", [Model, Loops])
def test_whatever_happens_each_delivery_is_made_given_up_or_waits_and_none_is_repeated(
    machine: type[Model | Loops],
) -> None:
    machine.passes = PassServer()
    try:
        with make_server() as server:
            machine.server = server
            run_state_machine_as_test(
                machine,
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
        machine.passes.close()


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
        found = list(program.read_lines(partial(os.pread, file.fileno()), start, len(data)))
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
    source = program.Source("/nowhere/escalations.jsonl", segments)
    state = program.State()
    state.taken_up, state.lanes, state.segments = taken_up, by_sink, segments
    state.attempts, state.telemetry = (
        program.Checkpoint(1, 2, offset, "a"),
        program.Checkpoint(1, 3, offset, "b"),
    )
    state.config_digest = "abc"
    document = {"schemaVersion": "v1", **state.to_json(source)}

    read = program.State.from_json(json.loads(program.encode_json(document)))

    assert {"schemaVersion": "v1", **read.to_json(source)} == document
    assert (read.attempts, read.telemetry, read.salt) == (state.attempts, state.telemetry, state.salt)


if __name__ == "__main__":
    serve()
