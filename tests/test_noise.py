"""Less noise: repeats that are held back, a pace that a sink can bear, several escalations in one message."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Repo, edit_queue, time_passes
from escalations import (
    CHAT,
    HOOK,
    NO_WAIT,
    PAGER,
    PATHS,
    SINK_TYPES,
    Record,
    divergence_detected,
    escalation_ids,
    health_critical,
    health_degraded,
    sink_config,
)
from hypothesis import given
from hypothesis import strategies as st
from loopback import Answer, Behaviour, Received, SinkServer, accepted, error, ok, rate_limited
from promise import check_promise

import ops_alert_dispatch as program

WINDOW = 900
# For starting Python on a machine that runs many tests at once.
START_UP = 8.0


def quiet(*, per_message: int = 1, window: float = WINDOW, **delivery: Any) -> dict[str, Any]:
    """Each record to all three sinks, none of which is told the same twice within the window."""
    config = sink_config(everywhere=True)
    config["routing"]["repeat"] = {"windowSeconds": window}
    config["sinks"][CHAT]["maxPerMessage"] = per_message
    config["delivery"] = {"backoffSeconds": NO_WAIT, **delivery}
    return config


class Past:
    """A moment some hours ago, to date records from: so that no second passes between two of them."""

    def __init__(self) -> None:
        self.began = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=6)

    def at(self, minutes: float) -> str:
        moment = self.began + timedelta(minutes=minutes)
        return moment.isoformat(timespec="seconds").replace("+00:00", "Z")

    def divergence(self, minutes: float, **more: Any) -> Record:
        return divergence_detected(**{"timestamp": self.at(minutes), **more})


@pytest.fixture
def past() -> Past:
    return Past()


def told(server: SinkServer, sink: str = HOOK) -> list[str]:
    """The timestamps of what the webhook was sent, in order."""
    return [request.json["escalation"].get("timestamp") for request in server.received(PATHS[sink])]


def held_back(server: SinkServer) -> list[tuple[int, str] | None]:
    """What each message to the webhook says of repeats that were held back."""
    events = [request.json["event"] for request in server.received(PATHS[HOOK])]
    return [
        (event["heldBackCount"], event["heldBackSince"]) if "heldBackCount" in event else None
        for event in events
    ]


def statuses(repo: Repo, sink: str = HOOK) -> list[tuple[str, str | None]]:
    """What the rows say of a sink, in order: status and reason code."""
    return [
        (entry["status"], entry["reasonCode"])
        for row in repo.telemetry()
        for entry in row["sinks"]
        if entry["id"] == sink
    ]


SENT, HELD = ("success", None), ("skipped", "repeat_suppressed")


# --- Repeats


def test_a_lasting_divergence_is_told_once_a_window_and_then_how_often_it_was_held_back(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    repo.write_config(quiet())
    repo.append(*(past.divergence(minute) for minute in range(20)))
    first = repo.dispatch().json
    repo.append(*(past.divergence(minute) for minute in range(20, 40)))
    second = repo.dispatch().json

    assert told(server) == [past.at(0), past.at(15), past.at(30)]
    assert held_back(server) == [None, (14, past.at(1)), (14, past.at(16))]
    chat = [json.dumps(request.json) for request in server.received(PATHS[CHAT])]
    assert [
        f"14 repeats held back since {past.at(m)}" in text for text, m in zip(chat, (0, 1, 16), strict=True)
    ] == [
        False,
        True,
        True,
    ]
    pager = [request.json["payload"]["custom_details"] for request in server.received(PATHS[PAGER])]
    assert [details.get("heldBackCount") for details in pager] == [None, 14, 14]
    assert (first["dispatchedCount"], first["skippedCount"], first["failedCount"]) == (2, 18, 0)
    assert (second["dispatchedCount"], second["skippedCount"], second["failedCount"]) == (1, 19, 0)
    rows = repo.telemetry()
    assert Counter((row["status"], row.get("reasonCode")) for row in rows) == {
        ("dispatched", None): 3,
        ("skipped", "repeat_suppressed"): 37,
    }
    attempts = [row for row in repo.attempts() if row["sinkId"] == HOOK]
    assert [row["heldBack"] for row in attempts if "heldBack" in row] == [
        {"repeats": 14, "since": past.at(1)},
        {"repeats": 14, "since": past.at(16)},
    ]
    check_promise(repo)


# Minutes or a field, in order, and whether each is told. The window is 15 minutes.
REPEATS: dict[str, list[tuple[dict[str, Any], bool]]] = {
    "up to the edge of the window": [({"m": 0}, True), ({"m": 14.98}, False), ({"m": 15}, True)],
    "from what was told, not from the last repeat": [({"m": 0}, True), ({"m": 10}, False), ({"m": 20}, True)],
    "an older one that comes later": [({"m": 30}, True), ({"m": 15.02}, False), ({"m": 15}, True)],
    "the same moment": [({"m": 0}, True), ({"m": 0}, False)],
    "another time zone": [
        ({"timestamp": "2026-03-01T12:00:00Z"}, True),
        ({"timestamp": "2026-03-01T14:10:00+02:00"}, False),
        ({"timestamp": "2026-03-01T12:20:00"}, True),
    ],
    "parts of a second": [
        ({"timestamp": "2026-03-01T12:00:00.5Z"}, True),
        ({"timestamp": "2026-03-01T12:14:59.25Z"}, False),
    ],
    "no time": [
        ({"timestamp": None}, True),
        ({"timestamp": None}, True),
        ({"m": 0}, True),
        ({"timestamp": None}, True),
    ],
    "no time that can be read": [({"timestamp": "yesterday"}, True), ({"timestamp": "yesterday"}, True)],
    "a number": [({"timestamp": 1772366400}, True), ({"timestamp": 1772366400}, True)],
    "far in the future": [
        ({"timestamp": "9998-01-01T00:00:00Z"}, True),
        ({"timestamp": "9998-01-01T00:01:00Z"}, False),
        ({"m": 0}, True),
        ({"m": 1}, False),
    ],
    "a higher severity": [({"m": 0}, True), ({"m": 1, "severity": "critical"}, True), ({"m": 2}, False)],
    "the same severity in another word": [({"m": 0}, True), ({"m": 1, "severity": "WARN"}, False)],
    "other reason codes": [
        ({"m": 0, "reasonCodes": ["a", "b"]}, True),
        ({"m": 1, "reasonCodes": ["a"]}, True),
        ({"m": 2, "reasonCodes": ["b", "a"]}, False),
        ({"m": 3, "reasonCodes": []}, True),
    ],
    "another category": [({"m": 0}, True), ({"m": 1, "category": "divergence_2"}, True), ({"m": 2}, False)],
    "another transport": [({"m": 0}, True), ({"m": 1, "transport": "sprite_service"}, False)],
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_repeat_has_category_severity_and_codes_of_what_was_told_within_the_window(
    repo: Repo, server: SinkServer, past: Past, name: str
) -> None:
    config = quiet()
    config["sinks"] = {HOOK: config["sinks"][HOOK]}
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    for number, (fields, _) in enumerate(REPEATS[name]):
        more = {key: value for key, value in fields.items() if key != "m"}
        record = past.divergence(fields.get("m", 0), number=number, **more)
        repo.append({key: value for key, value in record.items() if value is not None})

    assert repo.dispatch().json["failedCount"] == 0

    sent = [request.json["escalation"]["number"] for request in server.received(PATHS[HOOK])]
    # The worst first.
    assert sorted(sent) == [number for number, (_, wanted) in enumerate(REPEATS[name]) if wanted]
    assert statuses(repo) == [SENT if wanted else HELD for _, wanted in REPEATS[name]]


def test_without_a_window_every_record_is_told(repo: Repo, server: SinkServer, past: Past) -> None:
    for config in (quiet(window=0), sink_config(everywhere=True)):
        server.forget()
        repo.write_config(config)
        repo.append(past.divergence(0), past.divergence(1))
        repo.dispatch()
        assert told(server) == [past.at(0), past.at(1)]
    assert "repeat" not in repo.attempts()[-1]


def test_repeats_of_what_waited_for_a_sink_are_held_back_and_counted_when_it_is_back(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    repo.write_config(quiet())
    repo.append(past.divergence(0))
    repo.dispatch()
    server.answer(PATHS[HOOK], error(503))
    repo.append(past.divergence(5), past.divergence(20), past.divergence(21), past.divergence(26))
    during = repo.dispatch().json
    assert during["sinks"][HOOK]["waitingCount"] == 3, "the repeat of what was told before does not wait"
    check_promise(repo)
    server.answer(PATHS[HOOK], ok())
    server.forget()
    repo.append(past.divergence(36))
    after = repo.dispatch().json

    assert told(server) == [past.at(20), past.at(36)]
    assert held_back(server) == [(1, past.at(5)), (2, past.at(21))]
    assert (after["waitingCount"], after["lateDispatchedCount"], after["lateFailedCount"]) == (0, 1, 0)
    late = [row for row in repo.telemetry() if row.get("late")]
    assert [(row["status"], row.get("reasonCode")) for row in late] == [
        ("dispatched", None),
        ("skipped", "repeat_suppressed"),
        ("skipped", "repeat_suppressed"),
    ]
    check_promise(repo)


def test_a_repeat_of_what_the_sink_never_got_is_sent(repo: Repo, server: SinkServer, past: Past) -> None:
    repo.write_config(quiet())
    server.script(PATHS[HOOK], error(422, "no"))
    repo.append(past.divergence(0), past.divergence(1), past.divergence(2))
    repo.dispatch()

    assert told(server) == [past.at(0), past.at(1)]
    assert held_back(server) == [None, None]
    assert statuses(repo) == [("failed", "http_error"), SENT, HELD]
    check_promise(repo)


def test_a_repeat_of_what_expired_is_sent(repo: Repo, server: SinkServer) -> None:
    now = datetime.now(UTC)

    def written(ago: float) -> Record:
        return divergence_detected(timestamp=(now - timedelta(seconds=ago)).isoformat(timespec="seconds"))

    repo.write_config(quiet(giveUpAfterSeconds=600))
    server.answer(PATHS[HOOK], error(503))
    repo.append(written(700), written(300))
    repo.dispatch()
    time_passes(repo, 700)
    server.answer(PATHS[HOOK], ok())
    server.forget()
    repo.append(written(100), written(50))
    repo.dispatch()

    assert len(told(server)) == 1
    assert Counter(statuses(repo)[2:]) == {("failed", "delivery_expired"): 2, SENT: 1, HELD: 1}
    check_promise(repo)


@pytest.mark.parametrize("loss", ["state lost", "state damaged", "telemetry lost"])
def test_what_was_told_and_held_back_is_known_whatever_becomes_of_the_output(
    repo: Repo, server: SinkServer, past: Past, loss: str
) -> None:
    repo.write_config(quiet(per_message=3))
    repo.append(past.divergence(0), past.divergence(1), past.divergence(2))
    repo.dispatch()
    server.script(PATHS[CHAT], error(503), error(503), error(503))
    repo.append(
        past.divergence(3), health_critical(timestamp=past.at(3)), past.divergence(16), past.divergence(17)
    )
    repo.dispatch()
    match loss:
        case "state lost":
            repo.state_file.unlink()
        case "state damaged":
            repo.state_file.write_text("{")
        case "telemetry lost":
            repo.telemetry_file.unlink()
            repo.attempts_file.unlink()
    server.forget()
    repo.append(past.divergence(18), past.divergence(31))
    repo.dispatch()

    assert told(server) == [past.at(31)]
    assert held_back(server) == [(2, past.at(17))]
    assert server.received(PATHS[CHAT]), "what waited was sent"
    if loss != "telemetry lost":
        check_promise(repo)


def test_of_very_many_different_things_each_repeat_is_held_back(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    count = 100
    config = quiet()
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    repo.append(*(past.divergence(0, reasonCodes=[f"code_{n}" * 30]) for n in range(count)))
    repo.append(*(past.divergence(1, reasonCodes=[f"code_{n}" * 30]) for n in reversed(range(count))))
    repo.dispatch()

    sent = [request.json["escalation"]["reasonCodes"][0] for request in server.received(PATHS[HOOK])]
    assert len(set(sent)) == len(sent) == count, "each thing was told once"
    assert statuses(repo)[count:] == [HELD] * count
    check_promise(repo)


def test_a_long_timestamp_does_not_grow_the_state(repo: Repo, past: Past) -> None:
    repo.write_config(quiet())
    repo.append(past.divergence(0, timestamp="2026-03-01T12:00:00." + "0" * 50_000 + "Z"))
    repo.dispatch()

    assert repo.state_file.stat().st_size < 8000


def test_a_sink_that_is_new_is_told_what_the_others_were_told_before(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    config = quiet()
    without = {
        **config,
        "sinks": {sink: settings for sink, settings in config["sinks"].items() if sink != CHAT},
    }
    without["routing"] = {**config["routing"], "defaultSinks": [HOOK, PAGER]}
    repo.write_config(without)
    repo.append(past.divergence(0))
    repo.dispatch()
    repo.write_config(config)
    repo.append(past.divergence(1))
    summary = repo.dispatch().json

    assert (summary["dispatchedCount"], summary["skippedCount"]) == (1, 0)
    assert [len(server.received(PATHS[sink])) for sink in SINK_TYPES] == [1, 1, 1]
    row = repo.telemetry()[-1]
    assert (row["status"], row["dispatchedSinkCount"], row["failedSinkCount"]) == ("dispatched", 1, 0)


def test_a_disabled_sink_remembers_what_it_was_told(repo: Repo, server: SinkServer, past: Past) -> None:
    config = quiet()
    repo.write_config(config)
    repo.append(past.divergence(0), past.divergence(1))
    repo.dispatch()
    config["sinks"][HOOK]["enabled"] = False
    repo.write_config(config)
    repo.append(past.divergence(20))
    repo.dispatch()
    config["sinks"][HOOK]["enabled"] = True
    repo.write_config(config)
    repo.append(past.divergence(14), past.divergence(21))
    repo.dispatch()

    assert told(server) == [past.at(0), past.at(21)]
    assert held_back(server) == [None, (2, past.at(1))]
    check_promise(repo)


def test_a_dry_run_says_which_records_would_be_held_back(repo: Repo, server: SinkServer, past: Past) -> None:
    repo.write_config(quiet())
    repo.append(past.divergence(0))
    repo.dispatch()
    repo.append(past.divergence(1), past.divergence(16), past.divergence(17))
    plan = repo.dispatch("--dry-run", "--show-payload").json["escalations"]
    server.forget()
    repo.dispatch()

    assert [item["decision"] for item in plan] == ["repeat_suppressed", "send", "repeat_suppressed"]
    assert [item["sinks"][0]["why"] for item in plan if "why" in item["sinks"][0]] == [
        f"a repeat of what this sink was sent of {past.at(minute)}" for minute in (0, 16)
    ]
    request = plan[1]["sinks"][0]["request"]["body"]
    assert request["event"] == server.received(PATHS[HOOK])[0].json["event"]
    assert request["event"]["heldBackCount"] == 1


def test_a_pass_that_takes_few_counts_repeats_among_them(repo: Repo, server: SinkServer, past: Past) -> None:
    repo.write_config(quiet())
    repo.append(*(past.divergence(minute) for minute in range(7)))
    counts = [repo.dispatch("--max-escalations", "3").json for _ in range(3)]

    assert [(c["processedCount"], c["skippedCount"]) for c in counts] == [(3, 2), (3, 3), (1, 1)]
    assert told(server) == [past.at(0)]
    check_promise(repo)


def test_a_long_backlog_of_repeats_does_not_outlast_the_budget(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    config = quiet()
    config["sinks"] = {HOOK: config["sinks"][HOOK]}
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    repo.append(past.divergence(0))
    repo.dispatch()
    count = program.SETTLED_AT_ONCE + 100
    repo.append(*(past.divergence(1) for _ in range(count)))
    first = repo.dispatch("--time-budget", "0.001").json
    second = repo.dispatch().json

    assert first["processedCount"] + second["processedCount"] == second["escalationsLineOffset"] - 1 == count
    assert (first["failedCount"], second["waitingCount"]) == (0, 0)
    assert len(server.received(PATHS[HOOK])) == 1
    check_promise(repo)


def test_what_an_operator_sends_again_does_not_open_the_window_for_the_next_repeat(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    repo.write_config(quiet())
    repo.append(past.divergence(-60), past.divergence(0), past.divergence(1))
    repo.dispatch()
    old = repo.telemetry()[0]["escalationId"]
    assert repo.run("redeliver", *repo.target, "--id", old, "--yes").exit_code == 0
    server.forget()
    repo.append(past.divergence(2), past.divergence(20))
    repo.dispatch()

    assert held_back(server) == [(2, past.at(1))]


# --- Several escalations in one request


def digest_sizes(server: SinkServer) -> list[int]:
    """How many escalations each message to Slack told of."""
    return [len(escalation_ids(request)) for request in server.received(PATHS[CHAT])]


def refuse_one(place: int) -> Behaviour:
    """Refuse the escalation in this place of the first request, alone or among others."""
    refused: list[str] = []

    def answer(request: Received) -> Answer:
        found = escalation_ids(request)
        if not refused:
            refused.append(found[place])
        return error(400, "invalid_blocks") if refused[0] in found else ok()

    return answer


def test_a_record_that_its_sink_refuses_costs_the_others_of_its_digest_nothing(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    repo.write_config(quiet(per_message=4, maxAttemptsPerPass=1))
    records = [health_degraded(timestamp=past.at(60 * n), number=n) for n in range(6)]
    server.answer(PATHS[CHAT], error(503))
    repo.append(*records)
    down = repo.dispatch().json["sinks"][CHAT]
    server.answer(PATHS[CHAT], refuse_one(0))
    back = repo.dispatch().json

    assert (down["waitingCount"], down["consecutiveFailures"], down["failedAttemptCount"]) == (6, 1, 4)
    assert digest_sizes(server) == [4, 4, 1, 1, 1, 1, 2]
    mine = [row for row in repo.attempts() if row["sinkId"] == CHAT]
    assert [(row["outcome"], row.get("batchSize"), row.get("batchIndex")) for row in mine] == [
        *(("retry", 4, index) for index in range(4)),
        *(("retry", 4, index) for index in range(4)),
        *((outcome, None, None) for outcome in ("dead_letter", "delivered", "delivered", "delivered")),
        *(("delivered", 2, index) for index in range(2)),
    ]
    assert back["sinks"][CHAT]["deadLetterCount"] == 1
    assert (back["lateFailedCount"], back["lateDispatchedCount"], back["waitingCount"]) == (1, 5, 0)
    check_promise(repo)


def test_each_message_says_exactly_how_many_repeats_were_held_back_before_it(
    repo: Repo, server: SinkServer, past: Past
) -> None:
    """Three hours of a divergence, a record a minute, that wait for a sink: a message for each window, as
    what is a repeat depends on what the sink has taken."""
    repo.write_config(quiet(per_message=20))
    repo.append(*(past.divergence(minute) for minute in range(180)))
    repo.dispatch()
    repo.append(past.divergence(180))
    repo.dispatch()

    said = [json.dumps(request.json) for request in server.received(PATHS[CHAT])]
    assert len(said) == 13
    assert "held back" not in said[0]
    for number, text in enumerate(said[1:]):
        assert f"14 repeats held back since {past.at(15 * number + 1)}" in text
    assert held_back(server)[-1] == (14, past.at(166))
    assert statuses(repo, CHAT) == statuses(repo, HOOK)
    check_promise(repo)


def test_a_repeat_of_what_a_sink_refused_is_sent(repo: Repo, server: SinkServer, past: Past) -> None:
    repo.write_config(quiet(per_message=3))
    repo.append(past.divergence(0))
    repo.dispatch()
    server.answer(PATHS[CHAT], refuse_one(-1))
    repo.append(
        health_degraded(timestamp=past.at(1)),
        past.divergence(2),
        health_degraded(timestamp=past.at(3)),
        health_critical(timestamp=past.at(4)),
        health_degraded(timestamp=past.at(20)),
        health_degraded(timestamp=past.at(40)),
    )
    repo.dispatch()

    refused = ("failed", "http_error")
    assert statuses(repo, CHAT)[1:] == [refused, HELD, SENT, SENT, SENT, SENT]
    check_promise(repo)


# --- Pace


@given(
    st.integers(1, 6000),
    st.lists(st.floats(0, 40), min_size=1, max_size=60),
    st.lists(st.integers(0, 300), min_size=1, max_size=10),
)
def test_a_sink_never_gets_more_than_its_rate_in_any_minute(
    per_minute: int, gaps: list[float], bursts: list[int]
) -> None:
    """However requests come and however they are spread over passes, which keep nothing but `until`."""
    now, sent, until = 1e9, [], 0.0
    for gap, count in zip(gaps, itertools.cycle(bursts), strict=False):
        now += gap
        pace = program.Pace(per_minute)
        for _ in range(count):
            now += pace.wait(until, now)
            assert pace.wait(until, now) < 1e-6
            until = pace.spend(until, now)
            sent.append(now)
        if len(sent) > 2000:
            break
    for first, last in zip(sent, sent[per_minute:], strict=False):
        assert last - first > 60 - 1e-3


@pytest.mark.parametrize("per_minute", [1, 6, 60, 120, 6000])
def test_a_sink_gets_nearly_its_rate_where_so_much_waits(per_minute: int) -> None:
    pace = program.Pace(per_minute)
    now, until, count = 1e9, 0.0, 0
    while now < 1e9 + 600:
        now += pace.wait(until, now)
        until = pace.spend(until, now)
        count += 1
    assert count >= 0.82 * 10 * per_minute


def paced(per_minute: int, *, sinks: tuple[str, ...] = (HOOK,)) -> dict[str, Any]:
    config = sink_config(everywhere=True)
    config["sinks"] = {sink: {**config["sinks"][sink], "maxPerMinute": per_minute} for sink in sinks}
    config["routing"]["defaultSinks"] = list(sinks)
    return config


def numbers(server: SinkServer, sink: str = HOOK) -> list[int]:
    return [request.json["escalation"]["number"] for request in server.received(PATHS[sink])]


def set_paid(repo: Repo, seconds: float) -> None:
    """Have the requests of all sinks paid for so many seconds from now."""
    edit_queue(repo, f"UPDATE destinations SET paced_until = {time.time() + seconds}")


def test_a_disabled_sink_that_was_paced_stops_nobody_whatever_its_variable_holds(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(config := paced(6000, sinks=(HOOK, CHAT)))
    repo.append(health_critical(number=1))
    repo.dispatch()
    set_paid(repo, 30)
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    repo.append(health_critical(number=2))
    done = repo.dispatch(env={"ALERT_CHAT_URL": "https://hooks.example.org:REPLACE_ME/services"})
    assert done.json["status"] == "success"


def test_what_does_not_fit_the_pace_goes_out_with_later_passes_in_order_and_once(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(paced(6))
    repo.append(*(health_critical(number=number) for number in range(3)))
    first = repo.dispatch("--time-budget", "5").json
    again = repo.dispatch("--time-budget", "5").json

    assert numbers(server) == [0]
    assert (first["status"], first["processedCount"], first["failedCount"]) == ("success", 3, 0)
    assert first["waitingCount"] == again["waitingCount"] == 2
    assert (again["status"], again["lateFailedCount"]) == ("no_new_escalations", 0)
    assert repo.dispatch("--strict", "--time-budget", "1").exit_code == 0
    assert [row["status"] for row in repo.telemetry()] == ["dispatched", "waiting", "waiting"]
    set_paid(repo, 0)
    repo.dispatch("--time-budget", "5")
    set_paid(repo, 0)
    repo.dispatch("--time-budget", "5")
    assert numbers(server) == [0, 1, 2]
    check_promise(repo)


def test_a_sink_with_a_slow_pace_does_not_hold_up_the_others(repo: Repo, server: SinkServer) -> None:
    config = paced(6000, sinks=(HOOK, PAGER, CHAT))
    config["sinks"][HOOK]["maxPerMinute"] = 6
    repo.write_config(config)
    repo.append(*(health_critical(number=number) for number in range(4)))
    summary = repo.dispatch("--time-budget", "1").json

    assert [len(server.received(PATHS[sink])) for sink in (HOOK, PAGER, CHAT)] == [1, 4, 4]
    assert (summary["processedCount"], summary["failedCount"], summary["waitingCount"]) == (4, 0, 3)
    assert summary["sinks"][HOOK]["consecutiveFailures"] == 0
    assert summary["sinks"][HOOK]["nextAttemptAt"] is None
    assert [row["status"] for row in repo.telemetry()] == ["dispatched", "waiting", "waiting", "waiting"]
    assert {row["reasonCode"] for row in repo.telemetry() if "reasonCode" in row} == {"delivery_deferred"}
    assert [
        entry["reasonCode"] for row in repo.telemetry() for entry in row["sinks"] if entry["reasonCode"]
    ] == ["delivery_deferred"] * 3
    set_paid(repo, 0)
    assert repo.dispatch("--time-budget", "1").json["lateDispatchedCount"] == 1
    check_promise(repo)


def test_of_two_sinks_at_one_place_the_slower_rate_holds_for_both(repo: Repo, server: SinkServer) -> None:
    config = paced(60)
    config["sinks"]["twin"] = {**config["sinks"][HOOK], "maxPerMinute": 1}
    config["routing"]["defaultSinks"].append("twin")
    repo.write_config(config)
    repo.append(*(health_critical(number=number) for number in range(4)))
    summary = repo.dispatch("--time-budget", "1").json

    assert len(server.received(PATHS[HOOK])) == 1
    assert repo.dispatch("--time-budget", "1").json["waitingCount"] == summary["waitingCount"]
    assert len(server.received(PATHS[HOOK])) == 1


def test_slack_and_pagerduty_are_paced_as_their_providers_ask_and_a_webhook_is_not(
    repo: Repo, server: SinkServer
) -> None:
    config = sink_config(everywhere=True)
    del config["sinks"][CHAT]["maxPerMinute"]
    del config["sinks"][PAGER]["maxPerMinute"]
    repo.write_config(config)
    repo.append(*(health_critical(number=number) for number in range(22)))
    repo.dispatch("--time-budget", "1.5")

    assert len(server.received(PATHS[HOOK])) == 22
    # A sixth of 60 and of 120 at once, then one a second or two.
    assert 10 <= len(server.received(PATHS[CHAT])) <= 12
    assert 20 <= len(server.received(PATHS[PAGER])) <= 22
    at = [request.at for request in server.received(PATHS[CHAT])]
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(at[9:]))
    check_promise(repo)


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_clock_that_jumped_stops_no_paced_sink(repo: Repo, server: SinkServer, jump: float) -> None:
    repo.write_config(paced(6))
    repo.append(health_critical(number=0))
    repo.dispatch()
    set_paid(repo, jump)
    repo.append(health_critical(number=1))
    repo.dispatch("--time-budget", "5")

    assert numbers(server) == [0, 1]


def test_a_pass_that_waits_for_its_turn_ends_in_good_order_when_asked_to(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(paced(6))
    repo.append(*(health_critical(number=number) for number in range(3)))
    process = repo.start("dispatch", *repo.target)
    server.wait_for(1)
    time.sleep(0.3)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)

    assert time.monotonic() - asked < START_UP
    assert (process.returncode, stderr) == (0, "")
    assert (json.loads(stdout)["processedCount"], json.loads(stdout)["waitingCount"]) == (3, 2)
    set_paid(repo, 0)
    repo.dispatch("--time-budget", "1")
    assert numbers(server) == [0, 1]
    check_promise(repo)


def test_tries_count_against_the_pace(repo: Repo, server: SinkServer) -> None:
    config = paced(6)
    config["delivery"] = {"backoffSeconds": NO_WAIT, "maxAttemptsPerPass": 3}
    repo.write_config(config)
    server.answer(PATHS[HOOK], rate_limited(0))
    repo.append(health_critical(number=0))
    repo.dispatch("--time-budget", "2")
    repo.dispatch("--time-budget", "2")

    assert len(server.received(PATHS[HOOK])) == 1
    server.answer(PATHS[HOOK], accepted())
    set_paid(repo, 0)
    repo.dispatch("--time-budget", "2")
    assert len(server.received(PATHS[HOOK])) == 2
    check_promise(repo)
