"""What an answer means, and what a person reads about a fault: by code, never by words."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
from conftest import Repo
from escalations import CHAT, HOOK, PAGER, PATHS, health_critical, sink_config
from loopback import SinkServer, closed_port, error, rate_limited
from zygote import break_the_webhook

import ops_alert_dispatch as program
from ops_alert_dispatch import ADAPTERS, CODES, Answer, Client, HttpRequest, Redactor, Sink, Verdict

NOW = 1_772_366_400.0
MATTERMOST = '{"id":"web.incoming_webhook.%s.app_error","message":"%s","status_code":400}'


def judged(kind: str, status: int, body: str = "", **headers: str) -> Verdict:
    fields = {name.lower().replace("_", "-"): value for name, value in headers.items()}
    return ADAPTERS[kind].judge(Answer(status, fields, body.encode()), NOW)


@pytest.mark.parametrize(
    ("status", "outcome", "fault"),
    [
        *((status, "delivered", None) for status in (200, 201, 202, 204)),
        *((status, "misconfigured", "redirect") for status in (301, 302, 303, 307, 308)),
        *((status, "dead_letter", "record_refused") for status in (400, 413, 422)),
        *((status, "misconfigured", "unauthorized") for status in (401, 403)),
        *((status, "misconfigured", "not_found") for status in (404, 405, 410)),
        *((status, "misconfigured", "rejected") for status in (402, 406, 411, 415, 431, 451)),
        (407, "misconfigured", "proxy_login"),
        (429, "retry", "rate_limited"),
        *((status, "retry", "server_error") for status in (408, 425, 500, 502, 503, 504, 507, 529, 599)),
    ],
)
def test_every_status_has_one_meaning(status: int, outcome: str, fault: str | None) -> None:
    for kind in ADAPTERS:
        verdict = judged(kind, status, '"words"')
        assert (verdict.outcome, verdict.fault, verdict.http_status) == (outcome, fault, status), kind
        assert verdict.reason_code == (None if outcome == "delivered" else "http_error")


@pytest.mark.parametrize(
    ("kind", "status", "body", "outcome", "fault"),
    [
        ("slack", 404, "no_service", "misconfigured", "not_found"),
        ("slack", 403, "invalid_token", "misconfigured", "unauthorized"),
        ("slack", 410, "channel_is_archived", "misconfigured", "channel"),
        ("slack", 400, "invalid_blocks", "dead_letter", "record_refused"),
        ("slack", 400, "rollup_error", "retry", "rate_limited"),
        ("slack", 500, "fatal_error", "retry", "server_error"),
        ("slack", 200, '{"ok":false,"error":"token_revoked"}', "misconfigured", "unauthorized"),
        ("slack", 200, '{"ok":false,"error":"new_word"}', "dead_letter", "record_refused"),
        ("slack", 200, "<html>Log in", "misconfigured", "wrong_receiver"),
        ("slack", 400, MATTERMOST % ("invalid", "Invalid webhook."), "misconfigured", "not_found"),
        (
            "slack",
            400,
            MATTERMOST % ("disabled", "Incoming webhooks have been disabled by the admin."),
            "misconfigured",
            "not_found",
        ),
        ("slack", 400, MATTERMOST % ("channel", "Couldn't find the channel."), "misconfigured", "not_found"),
        ("slack", 404, MATTERMOST % ("invalid", "Invalid webhook."), "misconfigured", "not_found"),
        (
            "slack",
            400,
            '{"success":false,"error":"Invalid integration id or token provided."}',
            "misconfigured",
            "not_found",
        ),
        ("slack", 400, '{"message": "Unknown Webhook", "code": 10015}', "misconfigured", "not_found"),
        ("slack", 400, '{"result":"error","msg":"Invalid API key"}', "misconfigured", "not_found"),
        (
            "slack",
            400,
            MATTERMOST % ("parse", "Unable to parse incoming data."),
            "dead_letter",
            "record_refused",
        ),
        (
            "slack",
            400,
            MATTERMOST % ("decode", "Unable to decode the payload of incoming webhook."),
            "dead_letter",
            "record_refused",
        ),
        (
            "pagerduty_events",
            400,
            '{"status":"invalid event","errors":["Invalid routing key"]}',
            "misconfigured",
            "unauthorized",
        ),
        (
            "pagerduty_events",
            400,
            '{"errors":["Length of \'routing_key\' is incorrect"]}',
            "misconfigured",
            "unauthorized",
        ),
        ("pagerduty_events", 400, '{"errors":["severity is invalid"]}', "dead_letter", "record_refused"),
        ("pagerduty_events", 202, "<html>Log in", "misconfigured", "wrong_receiver"),
        ("alertmanager", 400, '"bad label"', "dead_letter", "record_refused"),
        ("alertmanager", 400, "Bad Request", "misconfigured", "wrong_receiver"),
        (
            "webhook",
            400,
            "Client sent an HTTP request to an HTTPS server.\n",
            "misconfigured",
            "wrong_scheme",
        ),
        (
            "webhook",
            400,
            "<h1>400</h1>The plain HTTP request was sent to HTTPS port",
            "misconfigured",
            "wrong_scheme",
        ),
        ("webhook", 200, "<html>Log in", "delivered", None),
    ],
)
def test_a_providers_own_words_say_whose_fault_it_is(
    kind: str, status: int, body: str, outcome: str, fault: str | None
) -> None:
    """A record that is given up for the sink's fault is an alert that nobody gets."""
    verdict = judged(kind, status, body)
    assert (verdict.outcome, verdict.fault) == (outcome, fault)


@pytest.mark.parametrize("status", [400, 403, 413, 422, 429, 503])
def test_an_answer_that_says_when_to_come_back_gives_nothing_up(status: int) -> None:
    for kind in ADAPTERS:
        verdict = judged(kind, status, '"later"', Retry_After="120")
        assert (verdict.outcome, verdict.retry_after) == ("retry", 120.0), kind
        assert verdict.fault == ("server_error" if status == 503 else "rate_limited")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("64.57", 65.0),
        ("64.", 64.0),
        ("0.2", 1.0),
        ("0", 0.0),
        ("9" * 400, 3600.0),
        ("9" * 400 + ".5", 3600.0),
    ]
    + [(value, None) for value in ("", "soon", "-1", "1e3", "1.2.3", ".5", "1,5", "\u0663")],
)
def test_a_pause_of_a_fraction_is_rounded_up(value: str, seconds: float | None) -> None:
    assert program.parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize("body", ["x" * 65536, "webhook " * 8192, "invalid " * 8192, '["' + "{" * 60000])
def test_no_answer_takes_long_to_judge(body: str) -> None:
    """64 KB from a hostile sink would hold up the pass for minutes."""
    for kind in ADAPTERS:
        assert judged(kind, 400, body).outcome in ("dead_letter", "misconfigured")


# --- The table


def test_each_fault_code_has_its_row() -> None:
    assert set(get_args(program.FaultCode)) <= set(CODES)
    for code, found in CODES.items():
        for text in found:
            named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            assert named <= set(program.GENERAL_WORDS), code
            assert text, code


def sink(kind: str, **settings: str) -> Sink:
    secrets = {key: "value" for key in settings if key.endswith("Env")}
    return Sink("team", kind, True, 5.0, None, {"type": kind, **settings}, secrets)


SINKS = {
    "webhook": sink("webhook", urlEnv="HOOK_URL", authTokenEnv="HOOK_TOKEN"),
    "webhook without a token": sink("webhook", urlEnv="HOOK_URL"),
    "slack": sink("slack", webhookUrlEnv="CHAT_URL"),
    "pagerduty": sink("pagerduty_events", routingKeyEnv="PAGER_KEY"),
    "alertmanager": sink("alertmanager", urlEnv="FLEET_URLS"),
}


@pytest.mark.parametrize(
    ("name", "fault", "variable"),
    [
        ("webhook", "unauthorized", "HOOK_TOKEN"),
        ("webhook", "not_found", "HOOK_URL"),
        ("webhook without a token", "unauthorized", "HOOK_URL"),
        ("slack", "unauthorized", "CHAT_URL"),
        ("slack", "channel", "CHAT_URL"),
        ("pagerduty", "unauthorized", "PAGER_KEY"),
        ("pagerduty", "dns", "https://events.pagerduty.com/v2/enqueue"),
        ("alertmanager", "wrong_receiver", "FLEET_URLS"),
        ("webhook", "wrong_scheme", "HOOK_URL"),
    ],
)
def test_advice_names_the_variable_to_set(name: str, fault: str, variable: str) -> None:
    assert variable in program.advise(fault, SINKS[name], {})


def test_advice_names_what_is_unset() -> None:
    unset = SINKS["webhook"]._replace(secrets={"urlEnv": "value"})
    assert "set HOOK_TOKEN in" in program.advise("missing_secret", unset, {})


def test_advice_without_a_config_has_no_gaps() -> None:
    for fault in (*CODES, None, "unheard_of"):
        advice = program.advise(fault, None, {})
        assert advice
        assert not set("{}") & set(advice), fault


# --- A fault of the program


class Broken(program.WebhookAdapter):
    def judge(self, answer: Answer, now: float) -> Verdict:
        raise OverflowError(answer.text)


class Unbuilt(program.WebhookAdapter):
    def build(
        self, sink: Sink, deliveries: Sequence[program.Delivery], origin: program.Origin
    ) -> HttpRequest:
        raise KeyError(sink.secrets["urlEnv"])


@pytest.mark.parametrize(
    ("status", "outcome", "reason"), [(200, "delivered", None), (503, "retry", "http_error")]
)
def test_an_adapter_that_fails_at_an_answer_costs_at_most_its_delivery(
    status: int, outcome: str, reason: str | None
) -> None:
    """The same alert would be sent on every pass, and nothing after it."""
    with SinkServer() as server:
        server.answer("/", error(status, "secret words"))
        verdict = program.send_and_judge(
            Broken(),
            SINKS["webhook without a token"],
            Client(f"{server.url}/hook", 5.0),
            HttpRequest({}, b"{}"),
            Redactor([]),
        )
    assert (verdict.outcome, verdict.reason_code, verdict.http_status) == (outcome, reason, status)
    assert verdict.fault == "adapter_fault"
    assert verdict.message is not None
    assert verdict.message.startswith("the answer could not be judged: OverflowError in judge, line ")
    assert "secret" not in verdict.message


def test_an_adapter_that_fails_at_a_record_says_where_and_nothing_of_the_record() -> None:
    made = program.build_request(Unbuilt(), SINKS["webhook"], [], program.Origin("/r", "t", NOW))
    assert isinstance(made, Verdict)
    assert (made.outcome, made.reason_code, made.fault) == ("retry", "payload_failed", "adapter_fault")
    assert made.message is not None
    assert "KeyError in build, line " in made.message
    assert "value" not in made.message


def test_a_sink_without_its_secret_is_sent_nothing() -> None:
    unset = SINKS["webhook"]._replace(secrets={})
    with SinkServer() as server:
        verdict = program.send_and_judge(
            ADAPTERS["webhook"], unset, Client(server.url, 5.0), HttpRequest({}, b""), Redactor([])
        )
        assert server.requests == []
    assert (verdict.outcome, verdict.fault) == ("misconfigured", "missing_secret")
    assert verdict.message == "unset: HOOK_URL HOOK_TOKEN"


# --- As the program shows it


def test_each_failed_attempt_is_on_record_with_its_fault_code(repo: Repo, server: SinkServer) -> None:
    config = sink_config(everywhere=True)
    config["delivery"] = {"maxAttemptsPerPass": 1}
    repo.write_config(config)
    server.answer(PATHS[CHAT], error(404, "no_service"))
    server.answer(PATHS[PAGER], rate_limited(60))
    repo.append(health_critical())
    with closed_port() as port:
        repo.dispatch(env={"ALERT_HOOK_URL": f"http://127.0.0.1:{port}/"})
    assert {row["sinkId"]: row["faultCode"] for row in repo.attempts()} == {
        HOOK: "refused",
        CHAT: "not_found",
        PAGER: "rate_limited",
    }
    [advice] = [text for text in repo.run("status", *repo.target).json["advice"] if CHAT in text]
    assert "set it in ALERT_CHAT_URL" in advice
    assert f"`ops-alert-dispatch test --repo {repo.root} --sink {CHAT}`" in advice


def broken(repo: Repo) -> Repo:
    """The repo, with a program whose webhook adapter fails at every answer."""
    return replace(repo, prepare=break_the_webhook)


def test_an_adapter_that_fails_at_an_answer_of_200_costs_nothing(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical())
    run = broken(repo).dispatch()
    assert (run.exit_code, run.json["status"], run.json["waitingCount"]) == (0, "success", 0)
    hook = [row for row in repo.attempts() if row["sinkId"] == HOOK]
    assert [(row["outcome"], row["faultCode"]) for row in hook] == [("delivered", "adapter_fault")]
    assert "words of a secret" not in repo.attempts_file.read_text()
    assert repo.dispatch().json["processedCount"] == 0
    assert len(server.received(PATHS[HOOK])) == 1


def test_an_adapter_that_fails_at_other_answers_costs_one_delivery_and_no_other_sink(
    repo: Repo, server: SinkServer
) -> None:
    server.answer(PATHS[HOOK], error(503))
    repo.append(health_critical())
    failing = broken(repo)
    for _ in range(program.SAME_RECORD_ATTEMPTS):
        assert failing.dispatch("--now").exit_code == 0
    hook = [row for row in repo.attempts() if row["sinkId"] == HOOK]
    assert [row["outcome"] for row in hook] == ["retry"] * (program.SAME_RECORD_ATTEMPTS - 1) + [
        "dead_letter"
    ]
    assert {row["faultCode"] for row in hook} == {"adapter_fault"}
    assert {row["outcome"] for row in repo.attempts() if row["sinkId"] != HOOK} == {"delivered"}
    assert "OverflowError in judge, line " in repo.run("status", *repo.target, "--format", "text").stdout
