"""What each provider accepts, judged by its own code: slack_sdk, standardwebhooks, pagerduty."""

from __future__ import annotations

import base64
import html
import inspect
import json
import re
import ssl
import time
import unicodedata
from typing import Any

import pytest
import standardwebhooks
from conftest import Repo
from escalations import (
    CHAT,
    HOOK,
    LOOP,
    MAKERS,
    PAGER,
    PAGER_KEY,
    PATHS,
    batch,
    divergence_detected,
    health_critical,
    health_degraded,
    sink_config,
)
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import TLS_PEM, SinkServer, accepted

import ops_alert_dispatch as program
from ops_alert_dispatch import ADAPTERS, Answer, Delivery

NOW = 1_772_366_400.0
SIGNING = "whsec_" + base64.b64encode(b"first key of 24 bytes ok").decode()
SIGNING_NEXT = "whsec_" + base64.b64encode(b"next key, also 24 bytes!").decode()
HELD_BACK: dict[str, Any] = {"repeats": 14, "repeats_since": "2026-03-01T12:00:00Z"}

FAMILY, FLAG, ACCENT = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7", "e\u0301"
# What a record may hold to fool, to break or to burst a message.
HURTFUL = (
    "<!channel> <!here> @channel <@U012AB3CD> <https://evil.example.org|log in> https://evil.example.org "
    "&lt; `code` ```block``` *bold* _it_ ~no~ > quote :tada: \u202egnp.exe\u202c \u2066\u061c\u200f "
    f"\x00\x1b[31m line\nbreak\r\t{FAMILY} {FLAG} {ACCENT} \U0001f44d\U0001f3fd \ufeff"
)


def long(text: str = HURTFUL, length: int = 5000) -> str:
    return (text * (length // len(text) + 1))[:length]


def hurtful_record() -> dict[str, Any]:
    """Each field is hurtful and of 5,000 characters, but what names the condition begins as it should."""
    record = health_critical()
    record["reasons"] = [{**record["reasons"][0], "metric": long(), "observed": long(), "note": long()}]
    for key in (
        "timestamp",
        "transport",
        "healthStatus",
        "ingestStatus",
        "failureCode",
        "stateFile",
        "notes",
    ):
        record[key] = long()
    record["traceId"] = "pass-health-critical " + long()
    record["loopId"] = f"{LOOP} " + long()
    record["reasonCodes"] = ["runtime_heartbeat_stale", long()]
    record[long("<!channel>")] = long()
    record["log"] = long(HURTFUL, 700_000)
    return record


def delivery_of(record: dict[str, Any], severity: str = "warning", **held_back: Any) -> Delivery:
    line = json.dumps(record).encode()
    [escalation] = program.parse_line(line, len(line), LOOP)
    assert isinstance(escalation, program.Escalation)
    severity = escalation.severity or severity
    resolution = program.Resolution(escalation.category, severity, None, "info", True, {}, (), (), ())
    return Delivery(escalation, resolution, **held_back)


def build(kind: str, *deliveries: Delivery, **sink_settings: Any) -> program.HttpRequest:
    secrets = {"urlEnv": "https://hook.example.org/", "webhookUrlEnv": "https://chat.example.org/"}
    secrets |= {"routingKeyEnv": PAGER_KEY}
    if signing := sink_settings.pop("signing", None):
        secrets["signingSecretEnv"] = signing
    sink = program.Sink("any", kind, True, 5, None, sink_settings, secrets)
    return ADAPTERS[kind].build(sink, deliveries, program.Origin("/repo", "trace", time.time()))


def body(kind: str, *deliveries: Delivery, **sink_settings: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(build(kind, *deliveries, **sink_settings).body)
    return made


def shown_texts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        text
        for block in message["blocks"]
        for text in ([block["text"]] if "text" in block else block["elements"])
    ]


def seen(message: dict[str, Any]) -> str:
    """What a person sees of a Slack message, a block a line."""
    return "\n".join(html.unescape(text["text"]) for text in shown_texts(message))


def check_slack(message: dict[str, Any]) -> None:
    """Slack takes the message, by its own models and its documented limits, and nothing in it is active."""
    from slack_sdk.models.blocks import Block  # imports asyncio

    for block in message["blocks"]:
        parsed = Block.parse(block)
        assert parsed is not None
        assert parsed.to_dict() == block
    ids = [block["block_id"] for block in message["blocks"] if "block_id" in block]
    assert len(ids) == len(set(ids))
    assert len(message["blocks"]) <= 50
    assert 0 < len(message["text"]) <= 4000
    texts = shown_texts(message)
    assert {text["type"] for text in texts} == {"plain_text"}
    assert all(0 < len(text["text"]) <= 3000 for text in texts)
    for text in (message["text"], *(text["text"] for text in texts)):
        assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", text)
        check_characters(text.replace("\n", ""))
    # The fallback is taken as it is written, and no address in it is looked up.
    assert [message[key] for key in ("mrkdwn", "link_names", "unfurl_links", "unfurl_media")] == [False] * 4
    assert message["parse"] == "none"


def check_characters(text: str) -> None:
    """No control character, and none that changes the direction of what follows."""
    for character in text:
        assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
        assert character not in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def check_pagerduty(request: program.HttpRequest) -> None:
    event = json.loads(request.body)
    assert len(request.body) <= 512_000
    assert set(event) == {"routing_key", "event_action", "dedup_key", "payload"}
    assert 0 < len(event["dedup_key"]) <= 255
    payload = event["payload"]
    assert 0 < len(payload["summary"]) <= 1024
    assert payload["severity"] in {"info", "warning", "error", "critical"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", payload["timestamp"])
    check_characters(event["dedup_key"] + payload["summary"])


# --- Slack: what a message may hold

SCRAPS = (
    *("<!channel>", "<@U1>", "&", "&amp;", "<", ">", "`", "*", "\n", "\x00", "\u202e", "\u061c", "\ud800"),
    *(FAMILY, FLAG, ACCENT, "\ufe0f", "a", " ", "word ", "x" * 400),
)
hostile_text = st.lists(st.sampled_from(SCRAPS), max_size=12).map("".join) | st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | hostile_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=10,
)
FIELDS = (
    *("timestamp", "loopId", "traceId", "transport", "reasonCodes", "reasonCode", "reasons", "state"),
    *("divergenceFlags", "sequence", "drift", "healthStatus", "ingestStatus", "failureCode", "noteFile"),
)
hostile_records = st.builds(
    lambda base, category, odd, more: {**base, **more, **odd, "category": category or base["category"]},
    st.sampled_from([maker(timestamp="2026-03-01T12:00:00Z") for maker in MAKERS.values()]),
    st.none() | hostile_text.filter(lambda text: text.strip() != ""),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5),
    st.dictionaries(hostile_text, json_values, max_size=3),
)
ORDINARY = delivery_of(health_critical(), "critical")
held_backs = st.fixed_dictionaries(
    {}, optional={"repeats": st.integers(1, 10**9), "repeats_since": hostile_text}
)


@given(hostile_records, st.sampled_from(program.SEVERITIES), held_backs)
def test_no_record_breaks_a_slack_message_or_makes_anything_in_it_active(
    record: dict[str, Any], severity: str, held_back: dict[str, Any]
) -> None:
    delivery = delivery_of(record, severity, **held_back)
    check_slack(body("slack", delivery))
    check_slack(body("slack", delivery, ORDINARY, delivery))


def test_slacks_own_client_knows_every_part_of_a_message_that_it_can_send() -> None:
    from slack_sdk.webhook import WebhookClient  # imports asyncio

    known = set(inspect.signature(WebhookClient.send).parameters)
    message = body("slack", delivery_of(health_critical()))
    # Slack documents the others for every message; its client leaves them at their defaults.
    assert set(message) - known == {"mrkdwn", "parse", "link_names"}


@given(st.lists(st.sampled_from(SCRAPS), max_size=30).map("".join), st.integers(1, 60))
@example("&" * 9, 8)
def test_a_cut_splits_no_entity(text: str, limit: int) -> None:
    escaped = program.slack_escape(text, limit)

    assert len(escaped) <= limit
    plain, whole = html.unescape(escaped), program.printable(text)
    assert plain == whole or (plain.endswith("…") and whole.startswith(plain[:-1]))


def test_a_character_that_unicode_has_not_assigned_yet_is_shown_as_it_is() -> None:
    """Which characters are printable depends on no version of Unicode's tables."""
    assert program.printable("a\u0378\U0003fffd\ufeff\u00a0b") == "a\u0378\U0003fffd\ufeff\u00a0b"
    assert program.printable("a\u0378\x1b[2J\u2028\u202eb\ud800") == "a\u0378 [2J b "


def test_what_people_write_in_a_record_is_shown_as_it_stands() -> None:
    """No format, no link: a reason code with underscores, a path, a command can be copied."""
    note = (
        "run `df -h` on *all* hosts_of_loop ~ see https://wiki.example.org/a_b_c :smile: @channel <3 & more"
    )
    message = body("slack", delivery_of({"category": "disk_almost_full", "note": note}))
    check_slack(message)
    assert f"• note: {note}" in seen(message)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"category": "odd"}, ["no details in the record"]),
        ({"category": "odd", "logFile": "/var/log/odd.log"}, ["logFile: /var/log/odd.log"]),
        ({"category": "odd", "state": {"disk": "full"}}, ['state: {"disk":"full"}']),
        ({"category": "odd", "reasons": ["disk is full", 7]}, ["• disk is full", "• 7"]),
        ({"category": "odd", "reasons": [{"disk": "full"}]}, ['{"disk":"full"}']),
        ({"category": "odd", "reasons": "disk is full"}, ["disk is full"]),
        ({"category": "odd", "reasons": ["a b"], "reasonCodes": ["disk_full"]}, ["a b", "disk_full"]),
        ({"category": "odd", "ok": False, "free": 0, "none": None, "blank": " "}, ["ok: false", "free: 0"]),
        ({"category": "\u202e"}, ["no details in the record"]),
    ],
)
def test_a_message_always_says_something(record: dict[str, Any], words: list[str]) -> None:
    message = body("slack", delivery_of(record))
    check_slack(message)
    lines = message["blocks"][1]["text"]["text"].splitlines()
    assert all(any(word in html.unescape(line) for line in lines) for word in words), lines
    assert not [line for line in lines if line.startswith(("• none", "• blank"))]


def test_a_field_of_any_length_leaves_room_for_the_others() -> None:
    record = hurtful_record() | {"reasons": [{"code": "first", "metric": long()}, {"code": "second"}]}
    message = body("slack", delivery_of(record, "critical", **HELD_BACK))
    check_slack(message)
    for word in ("health_critical", LOOP, "first", "second", "• health ", "ingest ", "notes: ", "14 repeats"):
        assert word in seen(message)
    assert "health_critical" in message["text"]
    assert "14 repeats held back since 2026-03-01T12:00:00Z" in message["text"]


def test_a_record_of_nothing_but_entities_keeps_to_every_limit_and_says_what_was_held_back() -> None:
    codes = [f"{number}{'>' * 500}" for number in range(20)]
    record = {"category": "<" * 500, "loopId": "&" * 500, "reasonCodes": codes, "timestamp": "<" * 500}
    delivery = delivery_of(record, "critical", **HELD_BACK)
    for message in (body("slack", delivery), body("slack", *[delivery] * 20)):
        check_slack(message)
        assert "14 repeats held back since 2026-03-01T12:00:00Z" in message["text"]
    request = build("pagerduty_events", delivery)
    check_pagerduty(request)
    assert json.loads(request.body)["payload"]["summary"].endswith(" since 2026-03-01T12:00:00Z)")


def test_a_thousand_reason_codes_leave_room_for_what_else_the_record_says() -> None:
    record = {
        "category": "odd",
        "reasonCodes": [f"code_{number}" for number in range(1000)],
        "volume": "/var",
    }
    assert "• volume: /var" in seen(body("slack", delivery_of(record)))


def test_what_does_not_fit_is_counted() -> None:
    reasons = [f"reason {number}: {'x' * 80}" for number in range(60)]
    said = seen(body("slack", delivery_of({"category": "odd", "reasons": reasons})))
    kept = said.count("• reason ")
    assert 20 < kept < 60
    assert f"… and {60 - kept} more" in said


# --- Slack: the digest


def test_a_digest_counts_and_tells_the_worst_first_the_oldest_of_them_on_top() -> None:
    deliveries = [delivery_of(record, "warning") for record in batch(12)]
    deliveries = [
        delivery._replace(resolution=delivery.resolution._replace(event_severity="critical"))
        if delivery.escalation.category == "health_critical"
        else delivery
        for delivery in deliveries
    ]
    message = body("slack", *deliveries)
    check_slack(message)
    lines = [block for block in message["blocks"] if "block_id" in block]
    critical = [d.escalation.id for d in deliveries if d.resolution.event_severity == "critical"]
    others = [d.escalation.id for d in deliveries if d.resolution.event_severity != "critical"]

    assert len(critical) == 3
    header, counts = (message["blocks"][index]["text"]["text"] for index in (0, 1))
    assert header == "🚨 12 escalations: 3 critical, 9 warning"
    assert counts.startswith(f"on {LOOP}: 3 health_critical, 3 health_degraded")
    assert [line["block_id"] for line in lines] == critical + others
    first = lines[0]["text"]["text"]
    assert first.startswith("🚨 health_critical · ")
    assert "heartbeatLagSeconds is 1874, threshold 600" in first
    assert "The worst: [critical] health_critical on night-build: runtime_heartbeat_stale" in message["text"]


def test_a_digest_of_twenty_hurtful_records_is_taken_and_names_each() -> None:
    deliveries = [
        delivery_of({**hurtful_record(), "n": number}, "critical", **HELD_BACK) for number in range(20)
    ]
    message = body("slack", *deliveries)
    check_slack(message)
    lines = [block["text"]["text"] for block in message["blocks"] if "block_id" in block]
    assert len(lines) == 20
    assert all("health_critical" in line and "14 repeats held back" in line for line in lines)
    assert len(json.dumps(message)) < 60_000


def test_two_equal_lines_in_a_digest_are_two_blocks() -> None:
    message = body("slack", *[delivery_of(health_degraded(seconds_ago=5))] * 3)
    check_slack(message)
    ids = [block["block_id"] for block in message["blocks"] if "block_id" in block]
    assert ids == [ids[0], f"{ids[0]}:2", f"{ids[0]}:3"]


def test_a_digest_of_several_loops_names_the_loop_of_each_line() -> None:
    message = body("slack", *(delivery_of(health_degraded(loopId=name)) for name in ("day", "night")))
    lines = [block["text"]["text"] for block in message["blocks"] if "block_id" in block]
    assert [line.split(" · ")[0] for line in lines] == [
        "⚠️ health_degraded on day",
        "⚠️ health_degraded on night",
    ]


def test_a_sink_that_is_not_told_otherwise_gets_a_message_for_each_escalation() -> None:
    sink = program.Sink("any", "slack", True, 5, None, {}, {})
    assert ADAPTERS["slack"].batch_size(sink) == 1
    assert ADAPTERS["slack"].batch_size(sink._replace(settings={"maxPerMessage": 20})) == 20
    for kind in ("webhook", "pagerduty_events"):
        assert ADAPTERS[kind].batch_size(sink._replace(type=kind)) == 1


# --- Slack: whose fault


@pytest.mark.parametrize(
    ("status", "said", "outcome"),
    [
        (200, "ok", "delivered"),
        (200, "", "delivered"),
        (200, '{"ok":true}', "delivered"),
        (200, '{"ok":false,"error":"channel_not_found"}', "misconfigured"),
        (200, '{"ok":false,"error":"is_archived"}', "misconfigured"),
        (200, '{"ok":false,"error":"invalid_blocks"}', "dead_letter"),
        (200, '{"ok":false,"error":"ratelimited"}', "retry"),
        (200, '{"ok":false,"error":"of_the_future"}', "dead_letter"),
        (200, '{"ok":false}', "dead_letter"),
        (200, "invalid_token", "misconfigured"),
        (200, "<!DOCTYPE html><title>Log in</title>", "misconfigured"),
        (503, "<html>down</html>", "retry"),
        (500, "rollup_error", "retry"),
        (400, "rollup_error", "retry"),
        (429, "rate_limited", "retry"),
        (404, "no_active_hooks", "misconfigured"),
        (403, "team_disabled", "misconfigured"),
        (400, "user_not_found", "misconfigured"),
        (403, "posting_to_general_channel_denied", "misconfigured"),
        (400, "no_service_id", "misconfigured"),
        (400, "missing_text_or_fallback_or_attachments", "dead_letter"),
        (400, "msg_too_long", "dead_letter"),
        (400, "invalid_blocks", "dead_letter"),
        (400, '{"ok":', "dead_letter"),
    ],
)
def test_slacks_words_tell_whose_fault_it_is(status: int, said: str, outcome: str) -> None:
    verdict = ADAPTERS["slack"].judge(Answer(status, {}, said.encode()), NOW)
    assert verdict.outcome == outcome
    assert (verdict.reason_code is None) == (outcome == "delivered")


def test_an_answer_after_which_slack_may_have_posted_is_not_tried_again_at_once() -> None:
    for word, surely_not in (("ratelimited", True), ("internal_error", False), ("fatal_error", False)):
        said = json.dumps({"ok": False, "error": word}).encode()
        verdict = ADAPTERS["slack"].judge(Answer(200, {"retry-after": "9"}, said), NOW)
        assert (verdict.outcome, verdict.not_taken, verdict.retry_after) == ("retry", surely_not, 9)


# --- PagerDuty


def test_pagerdutys_own_client_sends_the_same_event() -> None:
    import pagerduty  # imports httpx

    event = body("pagerduty_events", ORDINARY)
    trusted = ssl.create_default_context(cadata=TLS_PEM[TLS_PEM.index("-----BEGIN CERTIFICATE") :])
    with SinkServer(tls=True, default=accepted()) as server:
        client = pagerduty.EventsApiV2Client(PAGER_KEY, base_url=server.url, verify=trusted, trust_env=False)
        with client:
            client.send_event(event["event_action"], dedup_key=event["dedup_key"], payload=event["payload"])
        [request] = server.requests

    assert program.PagerDutyAdapter.default_url == f"https://events.pagerduty.com{request.path}"
    assert request.json == event


@given(
    hostile_records, st.sampled_from(program.SEVERITIES), held_backs, st.sampled_from(["event", "condition"])
)
def test_any_record_makes_an_event_that_pagerduty_takes(
    record: dict[str, Any], severity: str, held_back: dict[str, Any], dedup_by: str
) -> None:
    check_pagerduty(build("pagerduty_events", delivery_of(record, severity, **held_back), dedupBy=dedup_by))


@pytest.mark.parametrize(
    "large",
    [
        {"log": "x" * 700_000},
        {"log": "\x01" * 700_000},
        {f"field {number}": "\U0001f600" * 5000 for number in range(200)},
        {"state": {str(number): [{"k" * 500: ["v" * 500] * 9}] * 9 for number in range(99)}},
        {"reasons": [{"code": "c" * 900, "metric": "\x02" * 900, "observed": "o" * 900}] * 2000},
        {"state": [[[[["\x01" * 99] * 9] * 9] * 9] * 9]},
        {"state": [["\x01" * 400] * 30] * 30},
        {"number": 10**4000, "numbers": [10**4000] * 300},
    ],
    ids=["text", "control", "fields", "nested", "reasons", "deep", "wide", "numbers"],
)
def test_a_record_too_large_for_pagerduty_is_cut_down_and_says_so(large: dict[str, Any]) -> None:
    # What matters comes last in the record.
    record = {**large, **health_critical(), **large}
    request = build("pagerduty_events", delivery_of(record, "critical"))
    check_pagerduty(request)
    details = json.loads(request.body)["payload"]["custom_details"]

    assert details["truncated"] is True
    assert details["originalBytes"] == len(program.encode_json(record))
    assert details["escalationId"].startswith("esc_")
    for key in ("category", "loopId", "timestamp", "healthStatus"):
        assert details["escalation"][key] == record[key]
    if "reasons" not in large:
        assert details["escalation"]["reasons"] == record["reasons"]


def test_a_record_that_pagerduty_takes_whole_is_sent_whole() -> None:
    record = {**health_critical(), "log": "x" * 500_000}
    details = body("pagerduty_events", delivery_of(record))["payload"]["custom_details"]
    assert details["escalation"] == record
    assert "truncated" not in details


def test_by_condition_repeats_join_the_open_incident() -> None:
    def key(record: dict[str, Any], **sink_settings: Any) -> str:
        return str(body("pagerduty_events", delivery_of(record), **sink_settings)["dedup_key"])

    first, again = divergence_detected(seconds_ago=60), divergence_detected()
    assert key(first, dedupBy="condition") == key(again, dedupBy="condition") == f"{LOOP}:divergence_detected"
    assert key(first) == key(first, dedupBy="event") == f"{LOOP}:divergence_detected:{first['timestamp']}"
    assert key(first) != key(again)


def test_a_dedup_key_too_long_or_not_plain_is_shortened_and_stays_unique_and_stable() -> None:
    def key(category: str) -> str:
        return program.dedup_key(delivery_of({"category": category, "loopId": LOOP}).escalation, "condition")

    names = ["x" * 300 + "a", "x" * 300 + "b", "a\u202eb", "a\u202db", "a b", "\ud800"]
    keys = [key(name) for name in names]
    assert len(set(keys)) == len(keys)
    assert keys == [key(name) for name in names]
    assert all(len(made) <= 255 for made in keys)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ({"message": "Event object is invalid", "errors": ["Invalid routing key"]}, "misconfigured"),
        ({"errors": ["Length of 'routing_key' is incorrect (should be 32 characters)"]}, "misconfigured"),
        ({"errors": "'service_key' is missing"}, "misconfigured"),
        ({"message": "Invalid integration key"}, "misconfigured"),
        # What only repeats the request is no complaint of its key.
        ({"routing_key": PAGER_KEY, "errors": ["'summary' is missing"]}, "dead_letter"),
        ({"errors": ['\'severity\' is invalid in {"routing_key":"k"}']}, "dead_letter"),
        ({"errors": [{"routing_key": "k"}, 7, None], "message": None}, "dead_letter"),
        (["routing_key"], "dead_letter"),
        ("Invalid Routing Key", "misconfigured"),
        ('"Invalid Routing Key"', "misconfigured"),
        ({"error": {"message": "Invalid Routing Key", "code": 2001}}, "misconfigured"),
        ({"errors": [{"field": "routing_key", "message": "is invalid"}]}, "misconfigured"),
        ({"errors": {"routing_key": ["is invalid"]}}, "misconfigured"),
        ({"errors": ["payload.custom_details.routing_key is too long"]}, "dead_letter"),
        (f'POST /v2/enqueue\n\n{{"routing_key":"{PAGER_KEY}"}}', "dead_letter"),
    ],
)
def test_only_a_complaint_of_the_routing_key_stops_the_pager(said: Any, outcome: str) -> None:
    text = said if isinstance(said, str) else json.dumps(said)
    assert ADAPTERS["pagerduty_events"].judge(Answer(400, {}, text.encode()), NOW).outcome == outcome


# --- Webhook


@pytest.mark.parametrize("secret", [SIGNING, f"{SIGNING_NEXT} {SIGNING}"], ids=["one", "two"])
@given(hostile_records)
def test_a_receiver_of_standard_webhooks_verifies_the_bytes_it_got(
    secret: str, record: dict[str, Any]
) -> None:
    request = build("webhook", delivery_of(record), signing=secret)
    receiver = standardwebhooks.Webhook(SIGNING)
    said = request.headers["webhook-signature"]

    assert re.fullmatch(r"v1,[A-Za-z0-9+/]{43}=( v1,[A-Za-z0-9+/]{43}=)?", said)
    assert len(said.split(" ")) == len(secret.split(" "))
    assert receiver.verify(request.body, dict(request.headers)) == json.loads(request.body)
    for changed, headers in (
        (request.body + b" ", request.headers),
        (request.body, {**request.headers, "webhook-id": "esc_0"}),
        (request.body, {**request.headers, "webhook-signature": said.replace("v1,", "v1,AAAA")}),
    ):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            receiver.verify(changed, dict(headers))


def test_a_webhook_without_a_signing_secret_is_named_and_timed_but_not_signed() -> None:
    headers = build("webhook", delivery_of(health_degraded())).headers
    assert headers["webhook-id"].startswith("esc_")
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert "webhook-signature" not in headers


def test_a_webhook_body_is_utf8_json_that_holds_the_record_as_it_was() -> None:
    record = {**hurtful_record(), "text": "naïve 🚨"}
    request = build("webhook", delivery_of(record))
    assert json.loads(request.body)["escalation"] == record
    # The record byte for byte, the rest compact.
    assert request.body.endswith(b'"escalation":' + json.dumps(record).encode() + b"}")
    assert b'"schemaVersion":"v1","emittedAt":' in request.body


def test_repeats_that_were_held_back_are_told_to_every_sink() -> None:
    held, plain = (delivery_of(divergence_detected(), "warning", **kept) for kept in (HELD_BACK, {}))
    fields = {"heldBackCount": 14, "heldBackSince": "2026-03-01T12:00:00Z"}
    words = "and 14 repeats held back since 2026-03-01T12:00:00Z"

    hook = body("webhook", held)["event"]
    assert hook == {"category": "divergence_detected", "severity": "warning", **fields}
    assert set(body("webhook", plain)["event"]) == {"category", "severity"}
    pager = body("pagerduty_events", held)["payload"]
    assert words in pager["summary"]
    assert fields.items() <= pager["custom_details"].items()
    assert not set(fields) & set(body("pagerduty_events", plain)["payload"]["custom_details"])
    for message in (body("slack", held), body("slack", held, plain)):
        check_slack(message)
        assert words in seen(message)
        assert words in message["text"]
    assert "held back" not in json.dumps(body("slack", plain))
    assert "and 1 repeat held back" in seen(body("slack", held._replace(repeats=1, repeats_since="x")))


# --- The config

WRONG_SECRETS = {
    "no prefix": SIGNING.removeprefix("whsec_"),
    "no key": "whsec_",
    "no base64": "whsec_not*base64!",
    "url-safe base64": "whsec_-_-_-_-_",
    "one of two": f"{SIGNING} nextsecret",
    "line break": SIGNING + "\n",
    "two spaces": f"{SIGNING}  {SIGNING_NEXT}",
    "not ASCII": "whsec_ä",
}


@pytest.mark.parametrize("value", WRONG_SECRETS.values(), ids=WRONG_SECRETS)
def test_a_malformed_signing_secret_is_told_without_its_value(value: str) -> None:
    document = {"sinks": {HOOK: {"enabled": True, "signingSecretEnv": "SIGNING"}}}
    [fault] = program.check_secrets(document, {"SIGNING": value}, {})
    assert fault.startswith("$.sinks['team-hook'].signingSecretEnv: the value of SIGNING is not whsec_")
    assert [part for part in re.split(r"whsec_|[-_\s]+", value) if part and part in fault] == []


@pytest.mark.parametrize("value", [SIGNING, SIGNING.rstrip("="), f"{SIGNING} {SIGNING_NEXT}"])
def test_a_good_signing_secret_is_no_fault(value: str) -> None:
    document = {"sinks": {HOOK: {"enabled": True, "signingSecretEnv": "SIGNING"}}}
    assert program.check_secrets(document, {"SIGNING": value}, {}) == []


def test_each_of_several_signing_keys_is_kept_out_of_every_output() -> None:
    redactor = program.Redactor([f"{SIGNING} {SIGNING_NEXT}"])
    for secret in (SIGNING, SIGNING_NEXT):
        for said in (f"got {secret}.", f"got {secret.removeprefix('whsec_')}."):
            assert secret.removeprefix("whsec_") not in redactor.mask(said)


@pytest.mark.parametrize(
    ("sink", "key", "value", "word"),
    [
        (CHAT, "maxPerMessage", 0, "1 to 20"),
        (CHAT, "maxPerMessage", 21, "1 to 20"),
        (CHAT, "maxPerMessage", 2.5, "whole number"),
        (HOOK, "maxPerMessage", 2, "unknown key"),
        (PAGER, "dedupBy", "category", "event, condition"),
        (HOOK, "signingSecretEnv", SIGNING, "name of an environment variable"),
        (CHAT, "signingSecretEnv", "SIGNING", "unknown key"),
    ],
)
def test_a_wrong_setting_of_a_provider_is_told_with_its_path(
    sink: str, key: str, value: Any, word: str
) -> None:
    config = sink_config()
    config["sinks"][sink][key] = value
    [fault] = program.validate_config(config)
    assert fault.startswith(f"$.sinks['{sink}'].{key}: ")
    assert word in fault


# --- Through the real program


def test_a_record_made_to_hurt_arrives_everywhere_harmless_and_whole_enough_to_act_on(
    repo: Repo, server: SinkServer
) -> None:
    config = sink_config(everywhere=True)
    config["sinks"][HOOK]["signingSecretEnv"] = "ALERT_HOOK_SIGNING"
    config["sinks"][PAGER]["dedupBy"] = "condition"
    repo.write_config(config)
    record = hurtful_record()
    repo.append(json.dumps(record) + "\n")
    summary = repo.dispatch(env={"ALERT_HOOK_SIGNING": f"{SIGNING_NEXT} {SIGNING}"}).json
    assert (summary["status"], summary["dispatchedCount"], summary["failedCount"]) == ("success", 1, 0)

    [hook], [chat], [pager] = (server.received(PATHS[sink]) for sink in (HOOK, CHAT, PAGER))
    assert standardwebhooks.Webhook(SIGNING).verify(hook.body, dict(hook.headers)) == hook.json
    assert hook.json["escalation"] == record
    check_slack(chat.json)
    assert chat.json["blocks"][0]["text"]["text"].startswith(f"🚨 health_critical on {LOOP} ")
    for word in ("runtime_heartbeat_stale", "heartbeat", "• health ", "pass-health-critical"):
        assert word in seen(chat.json)
    check_pagerduty(program.HttpRequest({}, pager.body))
    assert pager.json["dedup_key"].startswith(LOOP)
    assert f"[critical] health_critical on {LOOP} " in pager.json["payload"]["summary"]
    assert "runtime_heartbeat_stale" in pager.json["payload"]["summary"]
    details = pager.json["payload"]["custom_details"]
    assert (details["truncated"], details["escalationId"]) == (True, hook.headers["webhook-id"])
    assert details["originalBytes"] > 700_000
    assert details["escalation"]["reasons"][0]["code"] == "runtime_heartbeat_stale"


def test_a_backlog_reaches_slack_in_digests_and_every_escalation_is_in_one(
    repo: Repo, server: SinkServer
) -> None:
    config = sink_config(everywhere=True)
    config["sinks"] = {CHAT: config["sinks"][CHAT] | {"maxPerMessage": 10}}
    config["routing"]["defaultSinks"] = [CHAT]
    repo.write_config(config)
    repo.append(*batch(21))
    assert repo.dispatch().json["dispatchedCount"] == 21

    messages = [request.json for request in server.received(PATHS[CHAT])]
    told = [[block["block_id"] for block in message["blocks"] if "block_id" in block] for message in messages]
    assert [len(ids) for ids in told] == [10, 10, 1]
    assert {escalation for ids in told for escalation in ids} == {
        row["escalationId"] for row in repo.telemetry()
    }
    for message in messages:
        check_slack(message)
    assert messages[0]["blocks"][0]["text"]["text"].startswith("🚨 10 escalations: 4 critical, ")


def test_a_malformed_signing_secret_sends_nothing_and_is_never_shown(repo: Repo, server: SinkServer) -> None:
    config = sink_config()
    config["sinks"][HOOK]["signingSecretEnv"] = "ALERT_HOOK_SIGNING"
    repo.write_config(config)
    repo.append(health_critical())
    run = repo.dispatch(env={"ALERT_HOOK_SIGNING": "notasecret-0a1b2c3d"})

    assert run.exit_code == 3
    assert "$.sinks['team-hook'].signingSecretEnv" in run.stderr
    assert "notasecret" not in run.stdout + run.stderr
    assert server.requests == []
