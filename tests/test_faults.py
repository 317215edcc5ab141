"""Sinks that fail in every way, and what becomes of what waits for them: nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo, Run, edit_queue, queue_rows, time_passes
from escalations import (
    CHAT,
    HOOK,
    MARK,
    NO_WAIT,
    PAGER,
    PATHS,
    SINK_TYPES,
    divergence_detected,
    escalation_id,
    health_critical,
    health_degraded,
    sink_config,
)
from loopback import (
    Answer,
    Behaviour,
    SinkServer,
    accepted,
    closed_port,
    cut_off,
    drip,
    error,
    garbage,
    hang,
    hang_up,
    ok,
    rate_limited,
    redirect,
    silent_port,
)
from promise import SAME_RECORD_ATTEMPTS, check_promise
from tools import needs_tool
from zygote import move_one_and_die, move_one_and_end

# For starting Python on a machine that runs many tests at once; what the issue bounds comes on top.
START_UP = 8.0


def everywhere(*hasty: str, **delivery: Any) -> dict[str, Any]:
    """Each record to all three sinks; every pass tries. `hasty` sinks get two seconds for an answer."""
    config = sink_config(everywhere=True)
    for sink in hasty:
        config["sinks"][sink]["timeoutSeconds"] = 2
    config["delivery"] = {"backoffSeconds": NO_WAIT, **delivery}
    return config


def webhooks(*names: str, **delivery: Any) -> dict[str, Any]:
    """A webhook for each name, at a path of that name; each record goes to all."""
    config = sink_config(everywhere=True)
    config["sinks"] = {
        name: {"enabled": True, "type": "webhook", "urlEnv": variable(name), "timeoutSeconds": 2}
        for name in names
    }
    config["routing"]["defaultSinks"] = list(names)
    config["delivery"] = {"backoffSeconds": NO_WAIT, **delivery}
    return config


def variable(name: str) -> str:
    return "URL_" + name.upper().replace("-", "_")


def webhook_env(server: SinkServer, *names: str) -> dict[str, str]:
    return {variable(name): f"{server.url}/{name}/" for name in names}


def ids(server: SinkServer, sink: str) -> list[str]:
    return [escalation_id(request) for request in server.received(PATHS[sink])]


def webhook_ids(server: SinkServer, name: str) -> list[str]:
    return [request.headers["webhook-id"] for request in server.received(f"/{name}/")]


def row_ids(repo: Repo) -> list[str]:
    """The ids of what was ingested, in the order of the source."""
    return [row["escalationId"] for row in repo.telemetry() if "position" in row and "late" not in row]


def figures_of(repo: Repo, sink: str) -> dict[str, Any]:
    figures: dict[str, Any] = repo.state()["sinks"][sink]
    return figures


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def leave_alone(repo: Repo, sink: str, seconds: float) -> None:
    """Let a sink be left alone for so many seconds from now on; jitter may have made it a moment."""
    edit_queue(
        repo, f"UPDATE destinations SET next_attempt_at = {time.time() + seconds} WHERE sink = '{sink}'"
    )


def records(*names: str) -> list[dict[str, Any]]:
    return [health_critical(traceId=name) for name in names]


# --- A sink that is not well (1)


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port where nobody accepts and the queue is full: connecting never ends."""
    with socket.socket() as listening, contextlib.ExitStack() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listening.getsockname())
        yield int(listening.getsockname()[1])


@contextlib.contextmanager
def tls_that_nobody_vouches_for() -> Iterator[int]:
    with SinkServer(tls=True) as server:
        yield server.port


@contextlib.contextmanager
def no_port() -> Iterator[int]:
    yield 9


UNREACHABLE = {
    "refuses_the_connection": ("http://127.0.0.1", closed_port),
    "never_accepts_the_connection": ("http://127.0.0.1", deaf_port),
    "has_no_address": ("https://no-such-host.invalid", no_port),
    "shows_a_certificate_that_is_not_trusted": ("https://127.0.0.1", tls_that_nobody_vouches_for),
    "speaks_no_tls": ("https://127.0.0.1", silent_port),
    "never_reads": ("http://127.0.0.1", silent_port),
}


@pytest.mark.first
@pytest.mark.parametrize("fault", UNREACHABLE)
def test_while_a_sink_cannot_be_reached_the_others_get_all_and_it_gets_all_later(
    repo: Repo, server: SinkServer, fault: str
) -> None:
    repo.write_config(everywhere(HOOK, maxAttemptsPerPass=1))
    # More than fits into the buffers of a connection: a sink that never reads keeps it from being sent.
    filler = "x" * 8_000_000 if fault == "never_reads" else ""
    repo.append(health_critical(traceId="one", filler=filler), *records("two", "three"))
    base, port_of = UNREACHABLE[fault]
    with port_of() as port:
        down = {"ALERT_HOOK_URL": f"{base}:{port}{PATHS[HOOK]}"}
        started = time.monotonic()
        first = repo.dispatch(env=down).json
        assert time.monotonic() - started < START_UP + 2
        assert (first["status"], first["processedCount"], first["waitingCount"]) == ("partial", 3, 3)
        assert figures_of(repo, HOOK)["reasonCode"] == "request_failed"
        check_promise(repo)
        repo.append(*records("four"))
        second = repo.dispatch(env=down).json
        assert (second["processedCount"], second["waitingCount"]) == (1, 4)
    check_promise(repo)
    order = row_ids(repo)
    assert (ids(server, CHAT), ids(server, PAGER)) == (order, order)

    server.forget()
    back = repo.dispatch().json
    assert (back["lateDispatchedCount"], back["waitingCount"]) == (4, 0)
    assert ids(server, HOOK) == order
    assert len(server.requests) == 4
    check_promise(repo)


# A name for each fault, which is the sink's too, and whether the sink may be asked again in the same pass.
UNWELL: dict[str, tuple[Behaviour, bool]] = {
    **{f"answers-{status}": (error(status), True) for status in (408, 425, 429, 500, 503, 529)},
    **{f"answers-{status}": (error(status), False) for status in (502, 504)},
    "never-answers": (hang(), False),
    "hangs-up": (hang_up(), False),
    "drips-its-head": (drip("head"), False),
    "speaks-no-http": (garbage(), False),
}
MISCONFIGURED: dict[str, tuple[Behaviour, bool]] = {
    **{
        f"answers-{status}": (error(status), False)
        for status in (401, 403, 404, 405, 410, 411, 415, 431, 451)
    },
    **{
        f"redirects-{status}": (redirect("/elsewhere/", status), False)
        for status in (300, 301, 302, 303, 307, 308)
    },
}


@pytest.mark.parametrize(
    ("faults", "outcome"),
    [(UNWELL, "retry"), (MISCONFIGURED, "misconfigured")],
    ids=["unwell", "misconfigured"],
)
def test_what_a_sink_did_not_take_it_gets_in_order_and_once_when_it_is_back(
    repo: Repo, server: SinkServer, faults: dict[str, tuple[Behaviour, bool]], outcome: str
) -> None:
    """One sink for each fault, side by side, and one that is well."""
    names = ["well", *faults]
    repo.write_config(webhooks(*names))
    repo.env.update(webhook_env(server, *names))
    for name, (behaviour, _) in faults.items():
        server.answer(f"/{name}/", behaviour)
    repo.append(*records("one", "two"))
    first = repo.dispatch().json
    assert first["waitingCount"] == 2 * len(faults)
    assert webhook_ids(server, "well") == row_ids(repo)
    for name, (_, again) in faults.items():
        assert webhook_ids(server, name) == row_ids(repo)[:1] * (3 if again else 1), name
        outcomes = {row["outcome"] for row in repo.attempts() if row["sinkId"] == name}
        assert outcomes == {outcome}, name
    assert server.received("/elsewhere/") == []
    check_promise(repo)

    for name in faults:
        server.answer(f"/{name}/", ok())
    server.forget()
    repo.append(*records("three"))
    time_passes(repo, 3600)
    back = repo.dispatch().json
    assert (back["status"], back["waitingCount"]) == ("success", 0)
    assert webhook_ids(server, "well") == row_ids(repo)[2:]
    for name in faults:
        assert webhook_ids(server, name) == row_ids(repo), name
    check_promise(repo)


@pytest.mark.parametrize("answer", [cut_off(), drip("body"), Answer(headers={"Content-Length": "9"})])
def test_a_webhooks_2xx_counts_however_its_body_ends(repo: Repo, server: SinkServer, answer: Answer) -> None:
    """The same alert would be sent on every pass, and nothing after it."""
    repo.write_config(webhooks("team"))
    repo.env.update(webhook_env(server, "team"))
    server.answer("/team/", answer)
    repo.append(*records("one"))
    assert repo.dispatch().json["status"] == "success"
    assert repo.dispatch().json["status"] == "no_new_escalations"
    assert webhook_ids(server, "team") == row_ids(repo)


def test_a_slow_sink_does_not_hold_up_the_others(repo: Repo, server: SinkServer) -> None:
    """The others have got everything before the slow one has answered its second request."""
    repo.write_config(everywhere())
    server.answer("/hook", ok().after(0.7))
    repo.append(*records("one", "two", "three"))
    repo.dispatch()
    second = server.received("/hook")[1].at
    assert len(server.received("/hook")) == 3
    for path in ("/chat", "/pager"):
        assert [request.at < second for request in server.received(path)] == [True] * 3


@pytest.mark.parametrize(
    ("answer", "sink"),
    [
        (error(403, "invalid_token"), CHAT),
        (error(404, "no_service"), CHAT),
        (error(410, "channel_is_archived"), CHAT),
        (error(400, '{"status":"invalid event","errors":["Invalid routing key"]}'), PAGER),
    ],
    ids=["slack_token", "slack_service", "slack_channel", "pagerduty_key"],
)
def test_a_provider_that_complains_of_the_configuration_costs_no_escalation(
    repo: Repo, server: SinkServer, answer: Behaviour, sink: str
) -> None:
    repo.write_config(everywhere())
    server.script(PATHS[sink], answer)
    repo.append(*records("one", "two"))
    repo.dispatch()
    assert figures_of(repo, sink)["waitingCount"] == 2
    assert [row["outcome"] for row in repo.attempts() if row["sinkId"] == sink] == ["misconfigured"]
    server.forget()
    time_passes(repo, 3600)
    assert repo.dispatch().json["waitingCount"] == 0
    assert ids(server, sink) == row_ids(repo)
    check_promise(repo)


def test_a_sink_that_fails_in_mid_backlog_goes_on_there(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(maxAttemptsPerPass=1))
    server.script("/hook", ok(), ok(), error(503), ok(), error(503))
    repo.append(*records("one", "two", "three", "four", "five"))
    waiting = [repo.dispatch().json["waitingCount"] for _ in range(3)]
    assert waiting == [3, 2, 0]
    check_promise(repo)
    one, two, three, four, five = row_ids(repo)
    assert ids(server, HOOK) == [one, two, three, three, four, four, five]


# --- The wait between tries (2)


def test_a_sink_is_left_alone_across_passes_and_the_state_says_until_when(
    repo: Repo, server: SinkServer
) -> None:
    config = everywhere()
    del config["delivery"]
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(*records("one"))
    before = time.time()
    repo.dispatch()
    figures = figures_of(repo, HOOK)
    assert before <= moment(figures["nextAttemptAt"]) <= time.time() + 30
    assert figures["consecutiveFailures"] == 3

    leave_alone(repo, HOOK, 25)
    server.forget()
    repo.append(*records("two"))
    waits = repo.dispatch().json
    assert server.received("/hook") == []
    assert len(server.received("/chat")) == 1
    assert waits["waitingCount"] == 2
    row = repo.telemetry()[-1]
    reasons = {sink["id"]: sink["reasonCode"] for sink in row["sinks"]}
    assert reasons[HOOK] == "delivery_deferred"
    check_promise(repo)

    time_passes(repo, 26)
    server.answer("/hook", ok())
    assert repo.dispatch().json["waitingCount"] == 0
    assert ids(server, HOOK) == row_ids(repo)
    check_promise(repo)


def test_the_wait_grows_from_pass_to_pass_up_to_the_maximum_and_ends_with_a_success(
    repo: Repo, server: SinkServer
) -> None:
    """Jitter takes a random part of each wait: of ten sinks, one at least shows that the whole has grown."""
    names = [f"down-{number}" for number in range(10)]
    repo.write_config(webhooks(*names, maxAttemptsPerPass=1, backoffSeconds={"initial": 100, "max": 1000}))
    repo.env.update(webhook_env(server, *names))
    server.answer("/down", error(503))
    repo.append(*records("one"))
    for longest in (100, 200, 400, 800, 1000, 1000):
        repo.dispatch()
        waits = [row["backoffSeconds"] for row in repo.attempts()[-10:]]
        assert all(0 <= wait <= longest for wait in waits)
        assert len(set(waits)) > 5
        assert max(waits) > longest / 4
        time_passes(repo, 2000)
    server.script("/down", *[ok()] * 10)
    repo.dispatch()
    assert repo.state()["waitingCount"] == 0
    repo.append(*records("two"))
    repo.dispatch()
    assert all(row["backoffSeconds"] <= 100 for row in repo.attempts()[-10:])
    check_promise(repo)


def test_a_misconfigured_sink_waits_longer_than_one_that_is_not_well(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(backoffSeconds={"initial": 1, "max": 600}))
    server.answer("/hook", error(401))
    repo.append(*records("one"))
    repo.dispatch()
    [row] = [row for row in repo.attempts() if row["sinkId"] == HOOK]
    assert 300 <= row["backoffSeconds"] <= 600
    assert moment(figures_of(repo, HOOK)["nextAttemptAt"]) > time.time() + 200


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_a_delivery_is_tried_so_often_in_a_pass_as_is_configured(
    repo: Repo, server: SinkServer, tries: int
) -> None:
    repo.write_config(everywhere(maxAttemptsPerPass=tries))
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    assert ids(server, HOOK) == row_ids(repo)[:1] * tries
    assert [row["attempt"] for row in repo.attempts() if row["sinkId"] == HOOK] == [*range(1, tries + 1)]


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_a_sink_that_names_a_time_is_not_asked_before_it(
    repo: Repo, server: SinkServer, as_date: bool
) -> None:
    repo.write_config(everywhere())
    wanted = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=120)
    server.answer("/hook", rate_limited(wanted if as_date else 120))
    repo.append(*records("one"))
    before = time.time()
    repo.dispatch()
    earliest = wanted.timestamp() if as_date else before + 120
    assert len(server.received("/hook")) == 1
    assert earliest - 0.01 <= moment(figures_of(repo, HOOK)["nextAttemptAt"]) <= earliest + START_UP
    repo.dispatch()
    assert len(server.received("/hook")) == 1
    check_promise(repo)


@pytest.mark.parametrize("status", [429, 503])
def test_a_named_time_is_waited_for_in_the_pass_where_the_budget_allows(
    repo: Repo, server: SinkServer, status: int
) -> None:
    repo.write_config(everywhere())
    server.script("/hook", rate_limited(1, status))
    repo.append(*records("one", "two"))
    done = repo.dispatch().json
    assert (done["status"], done["waitingCount"]) == ("success", 0)
    first, second, _ = server.received("/hook")
    assert second.at - first.at >= 1.0
    check_promise(repo)


def test_nobody_is_believed_who_wants_to_be_left_alone_for_days(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", rate_limited(datetime.now(UTC) + timedelta(days=9)))
    server.answer("/chat", rate_limited(500_000))
    repo.append(*records("one"))
    repo.dispatch()
    for sink in (HOOK, CHAT):
        assert 3500 < moment(figures_of(repo, sink)["nextAttemptAt"]) - time.time() <= 3600


def test_a_senseless_retry_after_is_passed_over(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(maxAttemptsPerPass=5))
    for values in (["", "soon", "-5", "1e9"], ["99:99", "Mon, 99 Foo 2026 00:00:00 GMT", "²"]):
        server.forget()
        server.script("/hook", *(Answer(429, b"slow down", {"Retry-After": value}) for value in values))
        repo.append(*records(values[0]))
        assert repo.dispatch().json["status"] == "success"
        assert len(server.received("/hook")) == len(values) + 1


@pytest.mark.parametrize("change", ["secret", "config"])
def test_what_an_operator_fixed_is_tried_at_once(repo: Repo, server: SinkServer, change: str) -> None:
    config = everywhere(backoffSeconds={"initial": 900, "max": 900})
    repo.write_config(config)
    server.answer(PATHS[HOOK], error(401))
    repo.append(*records("one", "two"))
    for _ in range(SAME_RECORD_ATTEMPTS + 1):
        repo.dispatch("--now")
    leave_alone(repo, HOOK, 800)
    assert repo.dispatch().json["waitingCount"] == 2

    server.answer(PATHS[HOOK], ok())
    server.forget()
    if change == "secret":
        repo.env["ALERT_HOOK_TOKEN"] = f"another-token-{MARK}"
    else:
        config["sinks"][HOOK]["headers"] = {"X-Key": "other"}
        repo.write_config(config)
    assert repo.dispatch().json["waitingCount"] == 0
    assert ids(server, HOOK) == row_ids(repo)
    text = "".join(path.read_text() for path in repo.folder.rglob("*") if path.is_file())
    assert f"another-token-{MARK}" not in text
    check_promise(repo)


def test_an_operator_need_not_wait_for_a_sink_that_is_back(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", rate_limited(3000))
    repo.append(*records("one", "two"))
    repo.dispatch()
    server.answer("/hook", ok())
    server.forget()
    assert repo.dispatch().json["waitingCount"] == 2
    [first, _] = repo.dispatch("--now", "--dry-run").json["escalations"]
    assert [sink["decision"] for sink in first["sinks"]] == ["send"]
    assert server.requests == []
    assert repo.dispatch("--now").json["waitingCount"] == 0
    assert len(server.received("/hook")) == 2
    check_promise(repo)


def test_a_mended_sink_does_not_end_the_wait_of_another(repo: Repo, server: SinkServer) -> None:
    config = everywhere(backoffSeconds={"initial": 900, "max": 900}, maxAttemptsPerPass=1)
    repo.write_config(config)
    server.answer("/hook", error(503))
    server.answer("/chat", error(503))
    repo.append(*records("one"))
    repo.dispatch()
    for sink in (HOOK, CHAT):
        leave_alone(repo, sink, 800)
    server.forget()
    config["sinks"][HOOK]["headers"] = {"X-Key": "other"}
    repo.write_config(config)
    repo.dispatch()
    assert len(server.received("/hook")) == 1
    assert server.received("/chat") == []
    check_promise(repo)


# --- What a sink will never take, and what is too old (3)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_record_that_one_sink_will_never_take_does_not_stop_the_others(
    repo: Repo, server: SinkServer, status: int
) -> None:
    repo.write_config(everywhere())
    server.script("/hook", ok(), error(status, "we do not like it"))
    repo.append(*records("one", "two", "three"))
    done = repo.dispatch().json
    assert (done["status"], done["deadLetterCount"], done["waitingCount"]) == ("partial", 1, 0)
    assert ids(server, HOOK) == ids(server, CHAT) == ids(server, PAGER) == row_ids(repo)
    [entry] = [sink for sink in repo.telemetry()[1]["sinks"] if sink["id"] == HOOK]
    assert (entry["deadLetter"], entry["httpStatus"], entry["message"]) == (True, status, "we do not like it")
    assert figures_of(repo, HOOK)["deadLetterCount"] == 1
    check_promise(repo)

    server.forget()
    assert repo.dispatch().json["deadLetterCount"] == 1
    # Not even a lost state forgets it, or sends it again.
    repo.state_file.unlink()
    assert repo.dispatch().json["deadLetterCount"] == 1
    assert server.requests == []
    check_promise(repo)


def test_a_dead_letter_met_late_has_a_late_row(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(maxAttemptsPerPass=1))
    server.script("/hook", error(503), error(422))
    repo.append(*records("one", "two"))
    repo.dispatch()
    late = repo.dispatch().json
    assert (late["lateDispatchedCount"], late["lateFailedCount"], late["deadLetterCount"]) == (1, 1, 1)
    assert (late["status"], late["waitingCount"]) == ("no_new_escalations", 0)
    check_promise(repo)


def test_what_is_too_old_to_act_on_is_given_up_on_record_and_the_rest_goes_on(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(giveUpAfterSeconds=60))
    server.answer("/hook", error(503))
    repo.append(health_critical(seconds_ago=500, traceId="old"))
    repo.dispatch()
    assert repo.dispatch().json["deadLetterCount"] == 0  # old, but it has not waited for long
    time_passes(repo, 400)
    repo.append(*records("new"))
    server.answer("/hook", ok())
    server.forget()
    done = repo.dispatch().json
    assert (done["lateFailedCount"], done["processedCount"], done["waitingCount"]) == (1, 1, 0)
    assert ids(server, HOOK) == row_ids(repo)[1:]
    [row] = [row for row in repo.telemetry() if row.get("late") and row["status"] == "failed"]
    assert row["sinks"][0]["reasonCode"] == "delivery_expired"
    assert row["sinks"][0]["deadLetter"] is True
    assert done["failureReasonCodes"] == ["delivery_expired"]
    check_promise(repo)


def test_history_that_no_pass_has_seen_is_delivered_however_old(repo: Repo, server: SinkServer) -> None:
    repo.write_config(everywhere(giveUpAfterSeconds=60))
    repo.append(health_critical(seconds_ago=9_000_000))
    assert repo.dispatch().json["status"] == "success"
    assert len(server.requests) == 3


# --- An invalid config (4)


@pytest.mark.parametrize("fault", ["config", "secret"])
def test_what_waited_and_what_is_new_goes_out_after_the_config_was_invalid(
    repo: Repo, server: SinkServer, fault: str
) -> None:
    config = everywhere()
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(*records("one"))
    repo.dispatch()
    server.answer("/hook", ok())
    repo.append(*records("two"))
    server.forget()
    before = repo.state()

    token = repo.env.pop("ALERT_CHAT_URL") if fault == "secret" else None
    if fault == "config":
        repo.write_config({**config, "defaultMinSeverity": "grave"})
    failed = repo.dispatch()
    assert (failed.exit_code, failed.stdout) == (3, "")
    after = repo.state()
    assert (after["status"], after["failureReasonCodes"]) == ("config_invalid", ["config_invalid"])
    assert ("ALERT_CHAT_URL" if fault == "secret" else "$.defaultMinSeverity") in after["message"]
    assert (after["cursor"], after["sinks"]) == (before["cursor"], before["sinks"])
    assert server.requests == []
    assert len(repo.telemetry()) == 1

    if token is not None:
        repo.env["ALERT_CHAT_URL"] = token
    repo.write_config(config)
    mended = repo.dispatch().json
    assert (mended["status"], mended["waitingCount"], mended["lateDispatchedCount"]) == ("success", 0, 1)
    assert "message" not in repo.state()
    assert ids(server, HOOK) == row_ids(repo)
    assert ids(server, CHAT) == row_ids(repo)[1:]
    check_promise(repo)


def test_an_invalid_config_on_a_lost_state_does_not_cost_the_rebuilding(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere())
    repo.append(*records("one", "two"))
    repo.dispatch()
    repo.state_file.unlink()
    repo.write_config("{")
    assert repo.dispatch().exit_code == 3
    assert repo.state()["status"] == "config_invalid"
    repo.write_config(everywhere())
    server.forget()
    repo.append(*records("three"))
    assert repo.dispatch().json["processedCount"] == 1
    assert len(server.requests) == 3
    check_promise(repo)


# --- A config that changes (10)


def with_sink(config: dict[str, Any], name: str) -> dict[str, Any]:
    config["sinks"][name] = {**config["sinks"][HOOK], "urlEnv": "ALERT_EXTRA_URL"}
    config["routing"]["defaultSinks"].append(name)
    return config


@pytest.mark.parametrize("why", ["it was routed elsewhere then", "it was disabled then"])
def test_a_lost_state_brings_a_sink_no_history_that_was_never_meant_for_it(
    repo: Repo, server: SinkServer, why: str
) -> None:
    config = everywhere()
    repo.write_config(config)
    repo.append(*records("one"))
    repo.dispatch()
    if why == "it was disabled then":
        config["sinks"][CHAT]["enabled"] = False
    else:
        config["routing"]["routes"] = [{"category": "health_critical", "sinks": [HOOK, PAGER]}]
    repo.write_config(config)
    repo.append(*records("two", "three"))
    repo.dispatch()
    repo.write_config(everywhere())
    repo.dispatch()
    repo.state_file.unlink()
    repo.append(*records("four"))
    assert repo.dispatch().json["processedCount"] == 1
    first, _, _, last = row_ids(repo)
    assert ids(server, CHAT) == [first, last]
    check_promise(repo)


def test_a_new_sink_is_not_flooded_with_history(repo: Repo, server: SinkServer) -> None:
    repo.env["ALERT_EXTRA_URL"] = server.url + "/extra/"
    config = everywhere()
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    repo.write_config(with_sink(config, "extra"))
    repo.append(*records("three"))
    repo.dispatch()
    assert webhook_ids(server, "extra") == row_ids(repo)[2:]
    server.answer("/hook", ok())
    repo.dispatch()
    assert webhook_ids(server, "extra") == row_ids(repo)[2:]
    check_promise(repo)


def test_the_backlog_of_a_disabled_sink_is_kept_for_when_it_is_enabled(
    repo: Repo, server: SinkServer
) -> None:
    config = everywhere()
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(*records("before"))
    repo.dispatch()
    server.answer("/hook", ok())
    server.forget()

    config["sinks"][HOOK]["enabled"] = False
    repo.write_config(config)
    repo.append(*records("meanwhile"))
    assert repo.dispatch().json["waitingCount"] == 1
    assert repo.dispatch().json["waitingCount"] == 1
    assert server.received("/hook") == []

    config["sinks"][HOOK]["enabled"] = True
    repo.write_config(config)
    repo.append(*records("after"))
    assert repo.dispatch().json["waitingCount"] == 0
    before, _, after = row_ids(repo)
    assert ids(server, HOOK) == [before, after]
    check_promise(repo)


def test_what_waited_for_a_removed_sink_goes_where_its_route_leads_now(
    repo: Repo, server: SinkServer
) -> None:
    config = everywhere()
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    del config["sinks"][HOOK]
    config["routing"]["defaultSinks"] = [CHAT]
    repo.write_config(config)
    assert repo.dispatch().json["waitingCount"] == 0
    assert ids(server, CHAT) == row_ids(repo)
    check_promise(repo)


def test_the_backlog_of_a_removed_sink_is_dropped_on_record(repo: Repo, server: SinkServer) -> None:
    config = everywhere()
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    server.answer("/hook", ok())
    server.forget()
    whole = json.dumps(config)
    del config["sinks"][HOOK]
    config["routing"]["defaultSinks"].remove(HOOK)
    repo.write_config(config)
    assert repo.dispatch().json["waitingCount"] == 0
    row = repo.telemetry()[-1]
    assert (row["status"], row["reasonCode"], row["sinkId"]) == ("skipped", "sink_removed", HOOK)
    assert row["droppedCount"] == 2
    # Back again it is a new sink.
    repo.write_config(whole)
    repo.dispatch()
    assert server.requests == []
    repo.append(*records("three"))
    repo.dispatch()
    assert ids(server, HOOK) == row_ids(repo)[2:]
    check_promise(repo)


def test_a_changed_route_applies_to_what_waits_and_what_that_drops_is_on_record(
    repo: Repo, server: SinkServer
) -> None:
    config = everywhere()
    repo.write_config(config)
    server.answer("/hook", error(503))
    repo.append(divergence_detected(), health_degraded(), divergence_detected())
    repo.dispatch()
    server.answer("/hook", ok())
    server.forget()
    config["routing"]["routes"] = [{"category": "divergence_detected", "sinks": [CHAT]}]
    repo.write_config(config)
    assert repo.dispatch().json["waitingCount"] == 0
    assert ids(server, HOOK) == row_ids(repo)[1:2]
    assert len(server.requests) == 1
    dropped = [row for row in repo.telemetry() if "droppedCount" in row]
    assert [(row["sinkId"], row["reasonCode"], row["droppedCount"]) for row in dropped] == [
        (HOOK, "route_changed", 2)
    ]
    check_promise(repo)


def test_what_waits_goes_to_a_new_sink_if_its_route_names_no_other_any_more(
    repo: Repo, server: SinkServer
) -> None:
    config = webhooks("old")
    repo.write_config(config)
    repo.env.update(webhook_env(server, "old", "new"))
    repo.append(*records("delivered"))
    repo.dispatch()
    server.answer("/old/", error(503))
    repo.append(*records("waits"))
    repo.dispatch()
    config["sinks"]["new"] = {**config["sinks"]["old"], "urlEnv": variable("new")}
    config["routing"]["defaultSinks"] = ["new"]
    repo.write_config(config)
    repo.dispatch()

    assert webhook_ids(server, "new") == row_ids(repo)[1:]
    check_promise(repo)


def test_a_changed_route_of_a_backlog_with_thousands_of_categories_keeps_no_pass_waiting(
    repo: Repo, server: SinkServer
) -> None:
    """If each category cost a look at each record, this would take minutes."""
    config = webhooks("old", "new", backoffSeconds={"initial": 900, "max": 900})
    config["routing"]["defaultSinks"] = ["old"]
    repo.write_config(config)
    repo.env.update(webhook_env(server, "old", "new"))
    for name in ("old", "new"):
        server.answer(f"/{name}/", error(503))
    repo.append(*(health_critical(category=f"category {number}") for number in range(4000)))
    assert repo.dispatch().json["waitingCount"] == 4000
    config["routing"]["defaultSinks"] = ["new"]
    repo.write_config(config)
    sinks = repo.dispatch().json["sinks"]

    assert (sinks["old"]["waitingCount"], sinks["new"]["waitingCount"]) == (0, 4000)


@pytest.mark.parametrize("stop", [move_one_and_die, move_one_and_end], ids=["killed", "ended"])
def test_a_pass_that_is_stopped_while_it_routes_a_backlog_anew_neither_loses_nor_repeats_any_of_it(
    repo: Repo, server: SinkServer, stop: Callable[[], None]
) -> None:
    config = webhooks("old", "new")
    config["routing"]["defaultSinks"] = ["old"]
    repo.write_config(config)
    repo.env.update(webhook_env(server, "old", "new"))
    server.answer("/old/", error(503))
    repo.append(*records("one", "two", "three"))
    repo.dispatch()
    server.answer("/old/", ok())
    server.forget()
    config["routing"]["defaultSinks"] = ["new"]
    repo.write_config(config)
    replace(repo, prepare=stop).dispatch()
    waiting = "SELECT count(*) FROM deliveries WHERE status = 'waiting' AND sink = ?"
    assert [queue_rows(repo, waiting, sink) for sink in ("old", "new")] == [[(2,)], [(1,)]]
    repo.dispatch("--now")

    assert sorted(webhook_ids(server, "new")) == sorted(row_ids(repo))
    assert webhook_ids(server, "old") == []
    events = [row for row in repo.telemetry() if row.get("reasonCode") == "route_changed"]
    assert sum(row.get("droppedCount", 0) for row in events) == 3
    assert sum(row.get("reroutedCount", 0) for row in events) == 3
    check_promise(repo)


def test_a_sink_that_is_enabled_is_not_sent_what_came_before(repo: Repo, server: SinkServer) -> None:
    config = webhooks("down", "later")
    config["sinks"]["later"]["enabled"] = False
    repo.write_config(config)
    repo.env.update(webhook_env(server, "down", "later"))
    server.answer("/down/", error(503))
    repo.append(*records("before"))
    repo.dispatch()
    config["sinks"]["later"]["enabled"] = True
    repo.write_config(config)
    repo.append(*records("after"))
    repo.dispatch()
    # Nor does a later change bring it.
    config["routing"]["routes"] = [{"category": "of_another_kind", "sinks": ["down"]}]
    repo.write_config(config)
    repo.dispatch()

    assert webhook_ids(server, "later") == row_ids(repo)[1:]
    check_promise(repo)


def test_what_waits_follows_a_sink_that_is_renamed_and_back_and_nothing_counts_as_lost(
    repo: Repo, server: SinkServer
) -> None:
    repo.env.update(webhook_env(server, "chat", "renamed"))
    for path in ("/chat/", "/renamed/"):
        server.answer(path, error(503))
    repo.append(*records("one", "two"))
    for name in ("chat", "renamed", "chat"):
        repo.write_config(webhooks(name))
        repo.dispatch()
    assert repo.state()["waitingCount"] == 2
    server.answer("/chat/", ok())
    server.forget()
    repo.dispatch("--now")

    assert webhook_ids(server, "chat") == row_ids(repo)
    assert repo.run("status", *repo.target).json["health"] == "ok"
    check_promise(repo)


def test_dead_letters_of_a_removed_sink_are_reported_once_and_not_for_ever(
    repo: Repo, server: SinkServer
) -> None:
    config = webhooks("kept", "removed")
    repo.write_config(config)
    repo.env.update(webhook_env(server, "kept", "removed"))
    server.answer("/removed/", error(400))
    repo.append(*records("one"))
    assert repo.dispatch().json["deadLetterCount"] == 1
    repo.write_config(webhooks("kept"))

    assert repo.dispatch().json["deadLetterCount"] == 0
    row = repo.telemetry()[-1]
    assert (row["reasonCode"], row["sinkId"], row["droppedCount"]) == ("sink_removed", "removed", 1)
    assert "sink_removed" in repo.run("status", *repo.target).json["verdict"]
    repo.run("status", *repo.target, "--ack")
    assert repo.run("status", *repo.target).json["health"] == "ok"


def test_a_sink_that_asks_to_wait_is_not_asked_again_although_a_record_was_tried_often(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(webhooks("team"))
    repo.env.update(webhook_env(server, "team"))
    server.answer("/team/", error(503))
    repo.append(*records("one"))
    for _ in range(2):
        repo.dispatch("--now")
    server.answer("/team/", rate_limited(600))
    repo.dispatch("--now")
    assert max(row["attempt"] for row in repo.attempts()) > 5
    server.forget()
    repo.append(*records("two"))
    repo.dispatch()

    assert server.requests == []
    assert repo.state()["sinks"]["team"]["nextAttemptAt"] is not None


def test_a_url_that_is_changed_back_is_tried_at_once(repo: Repo, server: SinkServer) -> None:
    repo.write_config(webhooks("team", backoffSeconds={"initial": 900, "max": 900}))
    repo.append(*records("one"))
    for path, status in (("/right/", 403), ("/wrong/", 404)):
        server.answer(path, error(status))
        repo.env[variable("team")] = f"{server.url}{path}"
        repo.dispatch()
    server.answer("/right/", ok())
    repo.env[variable("team")] = f"{server.url}/right/"

    assert repo.dispatch().json["waitingCount"] == 0


def test_what_waits_for_one_sink_goes_to_the_one_that_a_changed_route_names(
    repo: Repo, server: SinkServer
) -> None:
    """And nothing else goes there: not what was delivered before, nor what another category waits for."""
    config = everywhere()
    config["routing"]["defaultSinks"] = [HOOK]
    config["routing"]["routes"] = [{"category": "divergence_detected", "sinks": [CHAT, HOOK]}]
    repo.write_config(config)
    repo.append(health_degraded(traceId="delivered"))
    repo.dispatch()
    server.answer("/hook", error(503))
    repo.append(
        *(health_degraded(traceId="waits"), divergence_detected(traceId="told"), health_critical()),
        health_degraded(traceId="waits, too"),
    )
    repo.dispatch()
    assert len(ids(server, CHAT)) == 1
    config["routing"]["routes"].insert(0, {"category": "health_degraded", "sinks": [CHAT]})
    repo.write_config(config)
    repo.append(health_degraded(traceId="new"))

    assert repo.dispatch().json["waitingCount"] == 2
    told = row_ids(repo)
    assert ids(server, CHAT) == [told[2], told[1], told[4], told[5]]
    check_promise(repo)
    server.answer("/hook", ok())
    assert repo.dispatch().json["waitingCount"] == 0
    assert ids(server, CHAT) == [told[2], told[1], told[4], told[5]]
    # The critical one first.
    assert ids(server, HOOK)[-2:] == [told[3], told[2]]
    assert [row.get("reroutedCount") for row in repo.telemetry() if row.get("sinkId") == CHAT] == [2]
    check_promise(repo)


def test_what_a_sink_has_settled_is_not_sent_again_by_a_route_that_leads_away_and_back(
    repo: Repo, server: SinkServer
) -> None:
    both = everywhere()
    away = everywhere()
    away["routing"]["routes"] = [{"category": "health_critical", "sinks": [HOOK]}]
    repo.write_config(both)
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    assert len(ids(server, CHAT)) == 2
    for config in (away, both):
        repo.write_config(config)
        repo.dispatch()
    assert len(ids(server, CHAT)) == 2
    server.answer("/hook", ok())
    assert repo.dispatch().json["waitingCount"] == 0
    check_promise(repo)


def test_a_config_that_changes_while_the_source_is_away_drops_nothing(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    away = repo.source.rename(tmp_path / "away")
    repo.write_config(everywhere(HOOK))
    assert repo.dispatch().json["waitingCount"] == 2
    repo.state_file.unlink()
    assert repo.dispatch().json["waitingCount"] == 2
    away.rename(repo.source)
    assert repo.dispatch().json["waitingCount"] == 2
    assert all("droppedCount" not in row for row in repo.telemetry())
    server.answer("/hook", ok())
    assert repo.dispatch().json["waitingCount"] == 0
    check_promise(repo)


def test_each_change_of_a_route_finds_all_that_waits_and_nothing_that_does_not(
    repo: Repo, server: SinkServer
) -> None:
    """Two changes, one after the other, to a sink that is down meanwhile; and kinds that wait elsewhere from
    different places on."""
    config = everywhere()
    config["routing"]["defaultSinks"] = [HOOK]
    config["routing"]["routes"] = [{"category": "divergence_detected", "sinks": [PAGER]}]
    repo.write_config(config)
    server.answer(PATHS[PAGER], error(503))
    repo.append(divergence_detected(traceId="waits at pager"), health_degraded(traceId="delivered"))
    repo.dispatch()
    server.answer("/hook", error(503))
    repo.append(health_degraded(traceId="waits at hook"), divergence_detected(traceId="waits at pager, too"))
    repo.dispatch()
    server.answer(PATHS[CHAT], error(503))

    config["routing"]["routes"].insert(0, {"category": "health_degraded", "sinks": [CHAT]})
    repo.write_config(config)
    assert repo.dispatch().json["sinks"][CHAT]["waitingCount"] == 1
    config["routing"]["routes"] = [
        {"category": "divergence_detected", "sinks": [CHAT]},
        *config["routing"]["routes"][:1],
    ]
    repo.write_config(config)
    plan = repo.dispatch("--dry-run").json["escalations"]
    assert [(item["line"], item["sinks"][0]["id"]) for item in plan] == [(1, CHAT), (3, CHAT), (4, CHAT)]
    assert repo.dispatch().json["sinks"][CHAT]["waitingCount"] == 3
    server.answer(PATHS[CHAT], ok())
    server.forget()
    repo.dispatch()
    told = row_ids(repo)
    assert ids(server, CHAT) == [told[0], told[2], told[3]]
    assert repo.dispatch().json["waitingCount"] == 0
    check_promise(repo)


# --- The clock (11)


def at_another_time(repo: Repo, hours: float) -> Run:
    """A pass on a machine whose clock is off; its monotonic one, as on a real machine, does not jump."""
    faketime = needs_tool("faketime")
    other = Repo(repo.root, {**repo.env, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}, repo.loop)
    other.command = [faketime, "-f", f"{hours:+g}h", *repo.command]
    return other.dispatch()


@pytest.mark.parametrize("sink_says", [error(503), rate_limited(3000)], ids=["backoff", "retry_after"])
def test_a_sink_that_failed_while_the_clock_was_ahead_is_not_stuck_when_it_is_right_again(
    repo: Repo, server: SinkServer, sink_says: Behaviour
) -> None:
    repo.write_config(everywhere(backoffSeconds={"initial": 900, "max": 900}))
    server.answer("/hook", sink_says)
    repo.append(*records("one"))
    assert at_another_time(repo, +10).json["waitingCount"] == 1
    assert moment(figures_of(repo, HOOK)["nextAttemptAt"]) > time.time() + 35_000
    server.answer("/hook", ok())
    assert repo.dispatch().json["waitingCount"] == 0
    check_promise(repo)


def test_a_clock_that_jumps_forward_gives_up_nothing_early_by_more_than_the_jump(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere())
    server.answer("/hook", error(503))
    repo.append(*records("one"))
    repo.dispatch()
    assert at_another_time(repo, +23).json["deadLetterCount"] == 0
    assert at_another_time(repo, -23).json["deadLetterCount"] == 0
    # It is not taken to have waited since the wrong time either: back, a day has not passed.
    assert repo.dispatch().json["deadLetterCount"] == 0
    server.answer("/hook", ok())
    assert repo.dispatch().json["waitingCount"] == 0
    check_promise(repo)


def test_a_clock_that_jumps_back_keeps_nothing_waiting_and_repeats_nothing(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(everywhere(backoffSeconds={"initial": 900, "max": 900}))
    server.answer("/hook", error(503))
    repo.append(*records("one", "two"))
    repo.dispatch()
    server.answer("/hook", ok())
    server.forget()
    assert at_another_time(repo, -10).json["waitingCount"] == 0
    assert ids(server, HOOK) == row_ids(repo)
    repo.append(*records("three"))
    assert at_another_time(repo, -20).json["status"] == "success"
    assert ids(server, HOOK) == row_ids(repo)
    assert len(server.requests) == 2 + 3
    check_promise(repo)


# --- The time budget (12)


@pytest.mark.parametrize(
    "answer",
    [drip("head", 0.05, 5000), drip("body", 0.05, 5000), hang(), ok().after(0.8), rate_limited(5)],
    ids=["drips_its_head", "drips_its_body", "never_answers", "is_slow", "wants_a_pause"],
)
def test_a_pass_ends_within_one_timeout_of_its_budget_whatever_the_sinks_do(
    repo: Repo, server: SinkServer, answer: Behaviour
) -> None:
    repo.write_config(everywhere(*SINK_TYPES, maxAttemptsPerPass=10))
    for path in PATHS.values():
        server.answer(path, answer)
    repo.append(*[health_critical(traceId=str(number)) for number in range(20)])
    started = time.monotonic()
    first = repo.dispatch("--time-budget", "1").json
    assert time.monotonic() - started < START_UP + 1 + 2
    check_promise(repo)

    server.answer("/", ok())
    for sink in SINK_TYPES:
        server.answer(PATHS[sink], accepted() if sink == PAGER else ok())
    time_passes(repo, 3600)
    repo.dispatch()
    last = repo.state()
    assert (last["waitingCount"], last["escalationsLineOffset"]) == (0, 20)
    assert first["escalationsLineOffset"] <= 20
    check_promise(repo)


def test_what_a_sink_has_taken_is_not_sent_again_because_the_pass_ends_with_an_error(
    repo: Repo, server: SinkServer
) -> None:
    repo.write_config(webhooks("slow", "quick"))
    repo.env.update(webhook_env(server, "slow", "quick"))
    repo.append(*records("one"))
    repo.dispatch()
    edit_queue(
        repo,
        "CREATE TRIGGER fault BEFORE UPDATE OF status ON deliveries WHEN NEW.sink = 'quick' "
        "BEGIN SELECT RAISE(ABORT, 'a fault of the disk'); END",
    )
    server.answer("/slow/", ok().after(1.0))
    server.forget()
    repo.append(*records("two"))
    assert repo.dispatch().exit_code == 5
    edit_queue(repo, "DROP TRIGGER fault")
    repo.dispatch()

    assert webhook_ids(server, "slow") == row_ids(repo)[1:]
    assert repo.state()["waitingCount"] == 0


def test_no_attempt_starts_when_the_budget_is_used_up_and_the_next_pass_goes_on(
    repo: Repo, server: SinkServer
) -> None:
    config = webhooks("slow", "quick")
    repo.write_config(config)
    repo.env.update(webhook_env(server, "slow", "quick"))
    server.answer("/slow/", ok().after(0.3))
    repo.append(*[health_critical(traceId=str(number)) for number in range(8)])
    passes, left = 0, True
    while left:
        done = repo.dispatch("--time-budget", "0.7").json
        left = done["escalationsLineOffset"] < 8 or done["waitingCount"] > 0
        check_promise(repo)
        passes += 1
        assert passes < 10
    assert passes > 1
    assert webhook_ids(server, "slow") == webhook_ids(server, "quick") == row_ids(repo)
    check_promise(repo)
