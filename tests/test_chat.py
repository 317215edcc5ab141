"""Discord and Microsoft Teams: what they are sent, and what their answers mean."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import Repo
from escalations import health_critical, timestamp
from loopback import Answer, SinkServer, error, ok
from test_providers import delivery_of, hurtful_record

import ops_alert_dispatch as program

CHAT = {"discord": "discord-room", "teams": "teams-room"}
TAKES = {"discord": Answer(204), "teams": Answer(202)}
PATH = "/webhook"


@pytest.fixture(params=CHAT)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def room(repo: Repo, server: SinkServer, kind: str) -> Repo:
    """A repo with one sink of this type, and a backoff that no test waits for."""
    repo.env["ROOM_URL"] = server.url + PATH
    sink = {"enabled": True, "type": kind, "webhookUrlEnv": "ROOM_URL"}
    repo.write_config(
        {
            "schemaVersion": "v1",
            "defaultMinSeverity": "critical",
            "sinks": {CHAT[kind]: sink},
            "routing": {"defaultSinks": [CHAT[kind]]},
        }
    )
    server.answer(PATH, TAKES[kind])
    return repo


def built(kind: str, record: dict[str, Any]) -> dict[str, Any]:
    sink = program.Sink("any", kind, True, 5, None, {}, {"webhookUrlEnv": "https://chat.example.org/"})
    request = program.ADAPTERS[kind].build(sink, [delivery_of(record)], program.Origin("/repo", "trace", 0.0))
    message: dict[str, Any] = json.loads(request.body)
    return message


def lines_of(kind: str, message: dict[str, Any]) -> list[str]:
    """What a person sees, a line each."""
    if kind == "discord":
        lines: list[str] = message["content"].split("\n")
        return lines
    return [run["text"] for block in message["attachments"][0]["content"]["body"] for run in block["inlines"]]


def test_an_alert_arrives_with_all_that_a_person_on_call_needs(
    room: Repo, server: SinkServer, kind: str
) -> None:
    record = health_critical(timestamp=timestamp(30))
    room.append(record)
    assert room.dispatch().json["status"] == "success"

    [request] = server.received(PATH)
    title, *rest = lines_of(kind, request.json)
    text = "\n".join(rest)
    assert title.startswith("🚨")
    assert "critical" in title
    for fact in ("heartbeatLagSeconds", "1874", record["timestamp"], room.loop, "critical"):
        assert fact in text
    [row] = room.telemetry()
    assert row["escalationId"] in text


def test_a_discord_message_mentions_nobody() -> None:
    assert built("discord", health_critical())["allowed_mentions"] == {"parse": []}


def utf16_units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def check_discord(message: dict[str, Any]) -> None:
    head, block, after = message["content"].split("```")
    assert after == ""
    assert utf16_units(message["content"]) <= 2000
    assert "`" not in block
    # In the headline each character of markup is escaped.
    assert not re.search(r"(?<!\\)(\\\\)*[*_~`|<>\[\]()#@:]", head)


def check_teams(message: dict[str, Any]) -> None:
    assert len(json.dumps(message, ensure_ascii=False).encode()) <= 28 * 1024
    body = message["attachments"][0]["content"]["body"]
    assert {block["type"] for block in body} == {"RichTextBlock"}
    assert {run["type"] for block in body for run in block["inlines"]} == {"TextRun"}


# What each type of sink demands of a message.
CHECKS = {"discord": check_discord, "teams": check_teams}


def test_each_type_has_a_check() -> None:
    assert list(CHECKS) == list(CHAT)


def test_a_hurtful_record_is_shown_as_it_is_and_within_the_limits(kind: str) -> None:
    record = hurtful_record()
    record["reasons"] = record["reasons"] * 100
    message = built(kind, record)
    assert not re.search("[\u202e\u2066]", "\n".join(lines_of(kind, message)))
    CHECKS[kind](message)


def test_a_discord_message_of_emoji_is_within_the_limit_too() -> None:
    record = health_critical()
    record["reasons"] = [{**record["reasons"][0], "observed": "🚨" * 150}] * 9
    record["reasonCodes"] = ["🚨" * 90]
    content = built("discord", record)["content"]
    assert "🚨🚨" in content
    # It has no more than a line's worth of unused room.
    assert 1950 < utf16_units(content) <= 2000


def test_lines_that_do_not_fit_are_counted(kind: str) -> None:
    record = health_critical()
    record["reasons"] = record["reasons"] * 3000
    assert any(re.search(r"… and \d+ more", line) for line in lines_of(kind, built(kind, record)))


def test_a_deleted_discord_webhook_is_a_sink_to_fix_and_costs_no_alert(
    server: SinkServer, repo: Repo
) -> None:
    gone = json.dumps({"message": "Unknown Webhook", "code": 10015}).encode()
    verdict = program.ADAPTERS["discord"].judge(program.Answer(404, {}, gone), 0.0)
    assert (verdict.outcome, verdict.fault) == ("misconfigured", "not_found")


@pytest.mark.parametrize("kind", ["discord"], indirect=True)
def test_the_wait_that_discord_asks_for_in_the_body_counts(room: Repo, server: SinkServer) -> None:
    server.answer(
        PATH, error(429, '{"message": "You are being rate limited.", "retry_after": 64.57, "global": false}')
    )
    room.append(health_critical())
    room.dispatch()

    [row] = room.attempts()
    assert (row["faultCode"], row["retryAfterSeconds"]) == ("rate_limited", 65)


@pytest.mark.parametrize(("status", "then"), [(404, "waiting"), (400, "dead"), (503, "waiting")])
def test_an_alert_that_is_refused_waits_or_becomes_a_dead_letter(
    room: Repo, server: SinkServer, kind: str, status: int, then: str
) -> None:
    server.answer(PATH, error(status, '{"message": "no"}'))
    room.append(health_critical())
    summary = room.dispatch().json
    assert (summary["waitingCount"], summary["deadLetterCount"]) == ((1, 0) if then == "waiting" else (0, 1))

    server.answer(PATH, ok())
    assert room.run("dispatch", *room.target, "--now").json["lateDispatchedCount"] == (then == "waiting")
