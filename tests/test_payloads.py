"""What each sink receives: payloads as the contract names them, over real HTTP."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from conftest import Repo, make_repo, make_server
from escalations import (
    CHAT,
    HOOK,
    HOOK_TOKEN,
    MAKERS,
    PAGER,
    PAGER_KEY,
    PATHS,
    SINK_TYPES,
    TRANSPORTS,
    escalation_id,
    health_critical,
    health_degraded,
    sink_config,
    timestamp,
)
from hypothesis import given
from hypothesis import strategies as st
from loopback import Received, SinkServer

import ops_alert_dispatch
from ops_alert_dispatch import ADAPTERS, Answer

Sent = dict[tuple[str, str], dict[str, Received]]
TRACE = "pass-of-payloads"
# What a person must be able to read of each category: in the Slack message, and in PagerDuty's event.
FACTS = {
    "health_degraded": ["transport_unreachable", "ingest_slow", "ingestLagSeconds", "412", "300"],
    "health_critical": ["runtime_heartbeat_stale", "heartbeatLagSeconds", "1874", "600"],
    "divergence_detected": ["activeMismatch", "cursorRegression"],
    "ordering_drift_detected": ["event_sequence_regression"],
    "profile_drift_detected": ["strict", "relaxed", "relax_threshold_profile", "Noisy but harmless"],
}
SEVERITIES = {
    "health_degraded": "warning",
    "health_critical": "critical",
    "divergence_detected": "warning",
    "ordering_drift_detected": "info",
    "profile_drift_detected": "info",
}


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    """One record of each category and transport, with one timestamp for all, to all three sinks."""
    keys = [(category, transport) for category in MAKERS for transport in TRANSPORTS]
    with make_server() as server:
        repo = make_repo(tmp_path_factory.mktemp("payloads"), server)
        repo.write_config(sink_config(everywhere=True))
        moment = timestamp(30)
        repo.append(*(MAKERS[category](transport, timestamp=moment) for category, transport in keys))
        assert repo.dispatch("--trace-id", TRACE).json["dispatchedCount"] == len(keys)
        ids = [row["escalationId"] for row in repo.telemetry()]
        arrived = {
            (escalation_id(request), sink): request
            for sink in SINK_TYPES
            for request in server.received(PATHS[sink])
        }
        yield {
            key: {sink: arrived[identity, sink] for sink in SINK_TYPES}
            for key, identity in zip(keys, ids, strict=True)
        }


def texts(value: Any) -> list[str]:
    """Every string of a Slack message that a person sees."""
    if isinstance(value, dict):
        own = [value["text"]] if isinstance(value.get("text"), str) else []
        return own + [found for child in value.values() for found in texts(child)]
    if isinstance(value, list):
        return [found for child in value for found in texts(child)]
    return []


every_record = pytest.mark.parametrize(
    ("category", "transport"), [(category, transport) for category in MAKERS for transport in TRANSPORTS]
)


# --- All three


@every_record
def test_every_sink_gets_json_with_one_id_for_the_escalation(
    sent: Sent, category: str, transport: str
) -> None:
    requests = sent[category, transport]
    ids = {escalation_id(request) for request in requests.values()}

    assert len(ids) == 1
    assert re.fullmatch(r"esc_[0-9a-f]{32}", ids.pop())
    for request in requests.values():
        assert request.method == "POST"
        assert request.headers["content-type"].startswith("application/json")
        assert int(request.headers["content-length"]) == len(request.body)
        assert isinstance(json.loads(request.body.decode("utf-8")), dict)


def test_no_two_escalations_share_an_id(sent: Sent) -> None:
    assert len({escalation_id(requests[HOOK]) for requests in sent.values()}) == len(sent)


@pytest.mark.parametrize("sink", SINK_TYPES)
@pytest.mark.parametrize("category", MAKERS)
def test_the_transport_changes_nothing_but_its_own_field(sent: Sent, category: str, sink: str) -> None:
    def neutral(transport: str) -> Any:
        request = sent[category, transport][sink]
        body = copy.deepcopy(request.json)
        body.pop("emittedAt", None)
        text = json.dumps(body, sort_keys=True)
        return text.replace(escalation_id(request), "ID").replace(transport, "TRANSPORT")

    assert neutral("local") == neutral("sprite_service")


def test_the_id_is_the_same_on_every_machine_and_differs_for_another_loop(
    tmp_path_factory: pytest.TempPathFactory, server: SinkServer
) -> None:
    record = health_degraded()
    ids = []
    for loop in ("night-build", "night-build", "day-build"):
        repo = make_repo(tmp_path_factory.mktemp("machine"), server)
        repo.loop = loop
        repo.append(record)
        repo.dispatch()
        ids.append(repo.telemetry()[0]["escalationId"])

    assert ids[0] == ids[1] != ids[2]
    assert [escalation_id(request) for request in server.requests] == ids


# --- webhook


@every_record
def test_the_webhook_gets_the_envelope_of_the_contract(sent: Sent, category: str, transport: str) -> None:
    request = sent[category, transport][HOOK]
    body = request.json

    assert set(body) >= {"schemaVersion", "emittedAt", "source", "event", "sink", "escalation"}
    assert body["schemaVersion"] == "v1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", body["emittedAt"])
    assert body["source"]["loopId"] == "night-build"
    assert body["source"]["channel"] == "ops_manager_alert_dispatch"
    assert body["source"]["traceId"] == TRACE
    assert body["source"]["repoPath"].endswith("/repo")
    assert body["event"] == {"category": category, "severity": SEVERITIES[category]}
    assert body["sink"] == {"id": HOOK, "type": "webhook"}
    # The record itself, whole.
    made = MAKERS[category](transport, timestamp=body["escalation"]["timestamp"])
    assert body["escalation"] == made


def test_the_webhook_gets_its_token_and_its_headers(sent: Sent) -> None:
    for requests in sent.values():
        headers = requests[HOOK].headers
        assert headers["authorization"] == f"Bearer {HOOK_TOKEN}"
        assert headers["x-team"] == "night-watch"


def test_a_webhook_without_a_token_gets_no_authorization(repo: Repo, server: SinkServer) -> None:
    """Not even one that the user of the host keeps in a .netrc for this machine."""
    config = sink_config()
    del config["sinks"][HOOK]["authTokenEnv"]
    repo.write_config(config)
    (repo.root.parent / ".netrc").write_text("machine 127.0.0.1 login user password netrc-word\n")
    repo.append(health_critical())
    repo.dispatch()

    assert len(server.requests) == 3
    assert [request for request in server.requests if "authorization" in request.headers] == []


# --- slack


@every_record
def test_the_slack_message_is_complete_for_a_person(sent: Sent, category: str, transport: str) -> None:
    body = sent[category, transport][CHAT].json
    seen = "\n".join(texts(body["blocks"]))

    assert (body["channel"], body["username"], body["icon_emoji"]) == (
        "#night-watch",
        "loop-watch",
        ":owl:",
    )
    kinds = [block["type"] for block in body["blocks"]]
    assert (kinds[0], kinds[-1]) == ("header", "context")
    assert "section" in kinds
    assert category in body["blocks"][0]["text"]["text"].replace(" ", "_").lower()
    for fact in FACTS[category]:
        assert fact in seen
    context = "\n".join(texts(body["blocks"][-1]))
    for word in ("night-build", transport, f"pass-{category.replace('_', '-')}"):
        assert word in context
    # The fallback is what a phone shows.
    assert category in body["text"].replace(" ", "_").lower()
    assert "night-build" in body["text"]


def test_slack_headers_of_different_severities_differ_at_a_glance(sent: Sent) -> None:
    emoji = {
        SEVERITIES[category]: sent[category, "local"][CHAT].json["blocks"][0]["text"]["text"].split()[0]
        for category in MAKERS
    }
    assert len(set(emoji.values())) == 3


def test_flags_that_are_down_are_not_shown_as_trouble(sent: Sent) -> None:
    seen = "\n".join(texts(sent["divergence_detected", "local"][CHAT].json["blocks"]))
    assert "approvalCompletionConflict" not in seen


def test_what_the_config_leaves_out_is_not_in_the_slack_message(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    for key in ("channel", "username", "iconEmoji"):
        del config["sinks"][CHAT][key]
    repo.write_config(config)
    repo.append(health_degraded())
    repo.dispatch()

    (request,) = server.requests
    assert not {"channel", "username", "icon_emoji"} & set(request.json)


def test_a_category_of_the_future_still_says_something(repo: Repo, server: SinkServer) -> None:
    repo.write_config(sink_config(everywhere=True))
    record = {"timestamp": timestamp(), "category": "disk_almost_full", "volume": "/var", "freePercent": 3}
    repo.append(record)
    repo.dispatch()

    (request,) = server.received(PATHS[CHAT])
    seen = "\n".join(texts(request.json["blocks"]))
    assert "volume" in seen
    assert "/var" in seen


# --- pagerduty_events


@every_record
def test_pagerduty_gets_a_trigger_of_its_events_api(sent: Sent, category: str, transport: str) -> None:
    request = sent[category, transport][PAGER]
    body = request.json
    record = sent[category, transport][HOOK].json["escalation"]

    assert body["routing_key"] == PAGER_KEY
    assert body["event_action"] == "trigger"
    assert body["dedup_key"] == f"night-build:{category}:{record['timestamp']}"
    payload = body["payload"]
    assert category in payload["summary"].replace(" ", "_").lower()
    assert "night-build" in payload["summary"]
    assert payload["severity"] == SEVERITIES[category]
    assert payload["timestamp"] == record["timestamp"]
    assert {name: payload[name] for name in ("source", "component", "group", "class")} == {
        "source": "loops.example.org",
        "component": "night-watch",
        "group": "builds",
        "class": "loop-alert",
    }
    details = payload["custom_details"]
    assert details["escalation"] == record
    assert details["traceId"] == TRACE
    assert details["escalationId"] == escalation_id(sent[category, transport][HOOK])


def test_pagerduty_gets_the_defaults_of_the_contract(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    for key in ("source", "component", "group", "class"):
        del config["sinks"][PAGER][key]
    repo.write_config(config)
    repo.append(health_critical())
    repo.dispatch()

    (request,) = server.received(PATHS[PAGER])
    payload = request.json["payload"]
    assert {name: payload[name] for name in ("source", "component", "group", "class")} == {
        "source": "superloop-ops-manager",
        "component": "ops-manager",
        "group": "loop-run",
        "class": "escalation",
    }


@pytest.mark.parametrize("odd", [None, "yesterday", 12, ""])
def test_pagerduty_gets_no_timestamp_that_it_would_refuse(repo: Repo, server: SinkServer, odd: Any) -> None:
    repo.append(health_critical(timestamp=odd))
    repo.dispatch()

    (request,) = server.received(PATHS[PAGER])
    stamp = request.json["payload"].get("timestamp")
    assert stamp is None or re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", stamp)
    assert request.json["dedup_key"]


# --- What an answer means

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("kind", "status", "body", "outcome"),
    [
        *(
            ("slack", status, word, "misconfigured")
            for status, word in [
                (400, "no_service"),
                (404, "no_service"),
                (403, "invalid_token"),
                (403, "action_prohibited"),
                (404, "channel_not_found"),
                (410, "channel_is_archived"),
                (404, "no_team"),
            ]
        ),
        *(
            ("slack", 400, word, "dead_letter")
            for word in ("invalid_payload", "no_text", "too_many_attachments", "something_new")
        ),
        ("slack", 500, "rollup_error", "retry"),
        ("pagerduty_events", 400, '{"errors":["Invalid routing key"]}', "misconfigured"),
        ("pagerduty_events", 400, '{"errors":["\'routing_key\' is missing or blank"]}', "misconfigured"),
        ("pagerduty_events", 400, '{"errors":["\'severity\' is invalid"]}', "dead_letter"),
        ("pagerduty_events", 400, "no JSON", "dead_letter"),
        ("alertmanager", 400, '"start time must be before end time"', "dead_letter"),
        ("alertmanager", 422, '{"code":602,"message":"0.labels in body is required"}', "dead_letter"),
        ("alertmanager", 400, "Client sent an HTTP request to an HTTPS server.", "misconfigured"),
        ("alertmanager", 400, "<html>The plain HTTP request was sent to HTTPS port", "misconfigured"),
        # What means something to Slack means nothing to others.
        ("webhook", 400, "no_service", "dead_letter"),
        ("webhook", 400, "Invalid routing key", "dead_letter"),
    ],
)
def test_the_words_of_a_provider_decide_where_its_status_does_not(
    kind: str, status: int, body: str, outcome: str
) -> None:
    assert ADAPTERS[kind].judge(Answer(status, {}, body.encode()), NOW.timestamp()).outcome == outcome


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        (" 120 ", 120),
        ("3600", 3600),
        ("86400", 3600),
        ("9" * 5000, 3600.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
        (format_datetime(NOW + timedelta(days=1), usegmt=True), 3600),
        ("-5", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_believed_for_an_hour_at_most(value: str | None, seconds: float | None) -> None:
    assert ops_alert_dispatch.parse_retry_after(value, NOW.timestamp()) == seconds


# --- Any record at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
fields = (
    *("timestamp", "loopId", "traceId", "transport", "severity", "reasonCodes", "reasonCode", "reasons"),
    *("divergenceFlags", "state", "sequence", "drift", "healthStatus", "ingestStatus", "failureCode"),
)
records = st.builds(
    lambda base, odd, more: {**base, **odd, **more, "category": base["category"]},
    st.sampled_from([maker() for maker in MAKERS.values()]),
    st.dictionaries(st.sampled_from(fields), json_values, max_size=5),
    st.dictionaries(st.text(max_size=12), json_values, max_size=3),
)


@given(records)
def test_any_record_with_a_category_becomes_a_valid_request_for_every_sink(record: dict[str, Any]) -> None:
    requests = {kind: build(kind, json.dumps(record).encode()) for kind in ADAPTERS}

    bodies = {kind: json.loads(request.body.decode("utf-8")) for kind, request in requests.items()}
    assert bodies["webhook"]["event"]["category"] == record["category"].strip()
    assert bodies["slack"]["text"]
    assert len(bodies["slack"]["text"]) <= 4000
    assert all(len(text) <= 3000 for text in texts(bodies["slack"]["blocks"]))
    assert bodies["pagerduty_events"]["payload"]["severity"] in {"info", "warning", "critical"}
    assert 0 < len(bodies["pagerduty_events"]["payload"]["summary"]) <= 1024
    assert 0 < len(bodies["pagerduty_events"]["dedup_key"]) <= 255
    for request in requests.values():
        assert all(name.isascii() and value.isprintable() for name, value in request.headers.items())


MANY = 20_000


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    "record",
    [
        {"reasons": [{"code": f"c{number}", "metric": "m", "observed": 1} for number in range(MANY)]},
        {f"key {number}": number for number in range(MANY)},
        {"reasonCodes": [f"c{number}" for number in range(MANY)]},
        {"sequence": {"violations": [f"v{number}" for number in range(MANY)]}},
        {"divergenceFlags": {f"f{number}": True for number in range(MANY)}},
    ],
    ids=["reasons", "fields", "codes", "violations", "flags"],
)
def test_a_record_with_tens_of_thousands_of_items_does_not_hold_its_pass_up(
    kind: str, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing limits the time in which a request is made. What a person can read is made of a part."""
    looks = 0
    shown = ops_alert_dispatch.shown

    def look(*arguments: Any) -> str:
        nonlocal looks
        looks += 1
        return shown(*arguments)

    monkeypatch.setattr(ops_alert_dispatch, "shown", look)
    body = build(kind, json.dumps({**record, "category": "large"}).encode()).body.decode()

    assert looks < MANY
    # Of what would have a line of its own it says how many more there are.
    if kind in ("slack", "discord", "teams") and len(record) + len(record.get("reasons", ())) > 2:
        [more] = re.findall(r"and (\d+) more", body)
        shown_lines = body.count("\\u2022 ") + body.count("• ")
        assert shown_lines + int(more) == MANY


def test_records_that_differ_in_the_last_of_thousands_of_reason_codes_are_no_repeats() -> None:
    resolution = ops_alert_dispatch.Resolution("c", "warning", None, "info", True, {}, (), (), ())
    subjects = set()
    for end in ("a", "b"):
        found = parse(json.dumps({"category": "c", "reasonCodes": [*map(str, range(5000)), end]}).encode())
        assert isinstance(found, ops_alert_dispatch.Escalation)
        subjects.add(ops_alert_dispatch.subject_of(found, resolution))

    assert len(subjects) == 2


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_type_of_sink_is_sent_the_id_by_which_a_repeat_is_known(kind: str) -> None:
    line = json.dumps(health_critical()).encode()
    request = build(kind, line)
    assert parse(line).id in f"{request.headers} {request.body.decode()}"


def parse(line: bytes) -> ops_alert_dispatch.Escalation | ops_alert_dispatch.Unusable:
    return ops_alert_dispatch.parse_line(line, len(line), "night-build")[0]


def build(kind: str, line: bytes) -> ops_alert_dispatch.HttpRequest:
    escalation = parse(line)
    assert isinstance(escalation, ops_alert_dispatch.Escalation)
    sink = ops_alert_dispatch.Sink(
        id="any",
        type=kind,
        enabled=True,
        timeout_seconds=5,
        min_severity=None,
        settings={},
        secrets=dict.fromkeys(("urlEnv", "webhookUrlEnv", "routingKeyEnv"), "https://sink.example.org/"),
    )
    resolution = ops_alert_dispatch.Resolution(
        category=escalation.category,
        event_severity=escalation.severity or "warning",
        mapped_severity=None,
        min_severity="info",
        should_dispatch=True,
        route={},
        selected=(sink,),
        reached=(sink,),
        dispatchable=(sink,),
    )
    delivery = ops_alert_dispatch.Delivery(escalation, resolution)
    return ADAPTERS[kind].build(
        sink, [delivery], ops_alert_dispatch.Origin("/repo", "trace", NOW.timestamp())
    )
