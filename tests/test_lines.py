"""What a line of the source gives: its escalation, all that can be salvaged of it, or why there is none."""

from __future__ import annotations

import json
import sys
from types import FrameType
from typing import Any

import pytest
from conftest import Repo
from escalations import HOOK, PATHS
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import SinkServer

import ops_alert_dispatch as program
from ops_alert_dispatch import Escalation, Unusable

LOOP = "night-build"


def parse(line: bytes) -> list[Escalation | Unusable]:
    return program.parse_line(line, len(line), LOOP)


def record(category: str = "health_critical", **fields: Any) -> bytes:
    return json.dumps({"category": category, **fields}, ensure_ascii=False).encode()


GOOD = record(reasons=[{"code": "ingest_stale"}], note='a "quoted" {"category": "inner"} é')
OTHER = record("profile_drift_detected", drift={"category": "nested"})


INCOMPLETE = [
    b'{"a":' + GOOD,
    b'{"category":"health_cri' + GOOD,
    b'{"category":"health_critical","note":"cut of' + GOOD,
    b'{"category":"health_critical","note":"cut off\\' + GOOD,
    b'{"reasons":[{"code":"a"},{"code":"b"},{"co' + GOOD,
    GOOD + b'{"category":"torn',
    b'{"a":\0\0\0\0' + GOOD + b"\0\0x",
    b'{"' * 500 + GOOD,
]
DEBRIS = [
    b"\x1e" + GOOD,
    GOOD + b"\x1e",
    GOOD + b"} trailing garbage",
    GOOD + b",",
    b"garbage { [ ] } " + GOOD,
    b'"' + GOOD,
    b"\xff\xfe" + GOOD + b"\xc3",
    b"2026-03-01T12:00:00Z " + GOOD,
    b"[" + GOOD + b"]",
    b'{"no":"category"}' + GOOD,
    b"{}" + GOOD + b"{}",
    b"{" * 5000 + GOOD,
    b"[" * 50 + GOOD,
]


@pytest.mark.parametrize("line", [*INCOMPLETE, *DEBRIS])
def test_a_good_record_among_debris_is_not_lost_and_an_incomplete_one_is_told(line: bytes) -> None:
    found, *rest = parse(line)

    assert isinstance(found, Escalation)
    assert found.raw_line is not None
    assert found.raw_line == line.strip(b"\0").decode("utf-8", "replace")
    # The record is as it would be on a line of its own, and has the id that it has there.
    (alone,) = parse(GOOD)
    assert found._replace(raw_line=None) == alone
    assert found.raw == GOOD
    assert [isinstance(item, Unusable) and item.raw_line == found.raw_line for item in rest] == (
        [True] if line in INCOMPLETE else []
    )


def test_records_without_a_line_feed_between_are_all_sent_in_order() -> None:
    found = parse(GOOD + OTHER + b" " + GOOD)

    assert [item.raw for item in found if isinstance(item, Escalation)] == [GOOD, OTHER, GOOD]
    assert all(isinstance(item, Escalation) and item.raw_line is not None for item in found)


def test_an_object_within_a_record_is_no_second_alert() -> None:
    for line in (OTHER, b"x" + OTHER, OTHER + GOOD[:0]):
        assert [item.category for item in parse(line) if isinstance(item, Escalation)] == [
            "profile_drift_detected"
        ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "blank_line"),
        (b"\0\0 \r", "blank_line"),
        (b"no JSON", "invalid_escalation_json"),
        (b'{"category":"torn', "invalid_escalation_json"),
        (b"[1, 2]", "invalid_escalation_json"),
        (b'{"a":{"category":"inner"}}', "missing_escalation_category"),
        (b'{"category":null}', "missing_escalation_category"),
        (b'{"category":" "} {"x":1}', "invalid_escalation_json"),
        (b'{"category":"a","x":' + b"[" * 101 + b"]" * 101 + b"}", "invalid_escalation_json"),
        (b"[" * 100_000, "invalid_escalation_json"),
    ],
)
def test_a_line_without_a_record_is_one_unusable_line(line: bytes, reason: str) -> None:
    (found,) = parse(line)

    assert isinstance(found, Unusable)
    assert found.reason_code == reason


def test_a_whole_good_record_is_not_flagged() -> None:
    (found,) = parse(b"\xef\xbb\xbf" + GOOD + b"\r")

    assert isinstance(found, Escalation)
    assert (found.raw_line, found.raw, found.strict) == (None, GOOD, True)


def tries_of(line: bytes) -> tuple[list[Escalation | Unusable], int]:
    """What a line gives, and how often an object was looked for in it."""
    tries = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal tries
        tries += event == "call" and frame.f_code is json.JSONDecoder.raw_decode.__code__

    sys.setprofile(count)
    try:
        found = parse(line)
    finally:
        sys.setprofile(None)
    return found, tries


MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("head", "part", "times", "tail", "tries"),
    [
        (b"", b"{", 2 * MEGABYTE, b"", 0),
        (b"", b'{"', MEGABYTE, b"", 20_000),
        (b"", b'{"a":', 2 * MEGABYTE, b"", 10),
        (b'{"a":' * 900 + b'"', b"x", 30 * MEGABYTE, b"", 10),
        (b"", b'{"a":1}', 160_000, b"x", 140_000),
        (b"", b"{ ", 2 * MEGABYTE, b'"', 2),
        (b"", b'\\"{"a', MEGABYTE, b"", 30_000),
    ],
)
def test_a_hostile_line_costs_no_more_tries_than_a_pass_can_bear(
    head: bytes, part: bytes, times: int, tail: bytes, tries: int
) -> None:
    (found,), tried = tries_of(head + part * times + tail)

    assert isinstance(found, Unusable)
    assert tried <= tries + 1


def test_more_records_than_a_line_can_hold_are_not_dropped_in_silence() -> None:
    found = parse(record("a") * (program.SALVAGE_MAX + 5))

    assert len(found) == program.SALVAGE_MAX + 1
    assert isinstance(found[-1], Unusable)
    assert found[-1].raw_line == record("a").decode() * 5


def test_a_line_that_is_too_large_is_not_searched() -> None:
    (found,) = program.parse_line(b"x" + GOOD, program.MAX_RECORD_BYTES + 1, LOOP)

    assert isinstance(found, Unusable)
    assert found.reason_code == "escalation_too_large"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
whole_records = st.builds(
    lambda category, fields, ascii_only: json.dumps(
        {**fields, "category": category}, ensure_ascii=ascii_only
    ).encode("utf-8", "replace"),
    st.text('abc_\u00e9{}"\\', min_size=1, max_size=12),
    st.dictionaries(st.text(max_size=6), values, max_size=4),
    st.booleans(),
)


@given(
    st.lists(whole_records, min_size=1, max_size=4), st.binary(max_size=20).filter(lambda b: b"{" not in b)
)
def test_every_whole_record_of_a_line_is_found(records: list[bytes], debris: bytes) -> None:
    found = parse(debris.replace(b"\n", b"").join([b"", *records]))

    assert [item.raw for item in found if isinstance(item, Escalation)] == records


@given(whole_records, st.integers(0, 100), whole_records)
def test_a_torn_record_costs_nothing_of_the_one_behind_it(torn: bytes, at: int, whole: bytes) -> None:
    found = parse(torn[: at % len(torn)] + whole)

    assert whole in [item.raw for item in found if isinstance(item, Escalation)]


@given(
    st.lists(
        st.sampled_from([*(bytes([c]) for c in b'{}[]":,\\ \0\x1e1a\xff'), GOOD, b'{"category":"a"}'])
    ).map(b"".join)
)
@example(b'{"category":"a"}' * 3)
def test_any_line_gives_escalations_with_a_category_or_one_reason_why_not(line: bytes) -> None:
    found = parse(line)

    assert found
    assert len(found) == 1 or all(isinstance(item, Escalation) for item in found)
    for item in found:
        if isinstance(item, Escalation):
            assert item.category
            assert item.raw in line
            assert item.id == program.escalation_id(LOOP, item.raw)
            assert parse(item.raw) == [item._replace(raw_line=None)]


# --- The record as it was


@pytest.mark.parametrize(
    "raw",
    [
        b'{"category":"a","x":1.10,"y":1e2,"z":12345678901234567890.123456789}',
        b'{"z":1, "category" : "a", "b":-0.0}',
        b'{"category":"a","x":"\\u00e9 \\/ \xc3\xa9 \\ud83d\\ude00"}',
        b'{"category":"a","category":"b","x":1,"x":2}',
        b'{"category":"a","x":1e999,"NaN":"NaN"}',
    ],
)
def test_a_record_that_is_json_is_embedded_to_the_digit(raw: bytes) -> None:
    (found,) = parse(raw)
    assert isinstance(found, Escalation)

    assert program.encode_with_record({"status": "x"}, found) == b'{"status":"x","escalation":' + raw + b"}"
    assert program.encode_with_record({}, found) == b'{"escalation":' + raw + b"}"


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        (b'{"category":"a","x":NaN}', {"category": "a", "x": "NaN"}),
        (b'{"category":"a","x":-Infinity,"y":1.0}', {"category": "a", "x": "-Infinity", "y": 1.0}),
        (b'{"category":"a","x":"\xff"}', {"category": "a", "x": "\ufffd"}),
        (b'{"category":"a","x":"\\ud83d"}', {"category": "a", "x": "\ufffd"}),
        (b'{"category":"a","x":' + b"9" * 5000 + b"}", {"category": "a", "x": "9" * 5000}),
    ],
)
def test_a_record_that_is_no_strict_json_is_embedded_as_it_was_read(raw: bytes, sent: Any) -> None:
    (found,) = parse(raw)
    assert isinstance(found, Escalation)

    assert json.loads(program.encode_with_record({}, found), parse_constant=pytest.fail) == {
        "escalation": sent
    }


@given(values.map(lambda value: {"category": "a", "x": value}), st.booleans())
@example({"category": "a", "x": "a\u2028b\u2029c\u0085d\r\x1c\x0b\x0c"}, False)
def test_no_reader_of_lines_sees_two_where_a_row_is_one(fields: dict[str, Any], spaced: bool) -> None:
    raw = json.dumps(fields, ensure_ascii=False, separators=(",\r", ":\r") if spaced else None)
    (found,) = parse(raw.encode("utf-8", "surrogatepass"))
    assert isinstance(found, Escalation)

    row = program.encode_with_record({"message": "a\u2028\u0085b"}, found).decode()
    assert len(row.splitlines()) == 1
    assert json.loads(row)["message"] == "a\u2028\u0085b"
    assert len(program.encode_json(found.body).decode().splitlines()) == 1
    if found.strict:
        assert json.loads(row)["escalation"] == fields


def test_a_webhook_gets_the_numbers_of_a_record_to_the_digit(repo: Repo, server: SinkServer) -> None:
    raw = b'{"z":1.10,"category":"health_critical","id":12345678901234567890.123456789}'
    repo.append(b'{"torn":' + raw + b"\n")
    repo.dispatch()

    (request,) = server.received(PATHS[HOOK])
    assert request.body.endswith(b'"escalation":' + raw + b"}")


# --- Severity words

WORDS = {
    "critical": ["P1", "p1", "sev0", "SEV1", "blocker", "urgent", "page", "emergency", "high", "0", "1", "2"],
    "warning": ["P2", "P3", "sev2", "Sev3", "3", "4", "medium"],
    "info": ["P4", "P5", "sev4", "5", "6", "7", "low"],
}
UNKNOWN_WORDS: list[Any] = ["P0", "P6", "sev5", "8", 8, -1, 2.5, True, False, None, [], "", "\u0661"]


@pytest.mark.parametrize(
    ("word", "severity"),
    [
        *((word, severity) for severity, words in WORDS.items() for word in words),
        *((int(word), severity) for severity, words in WORDS.items() for word in words if word.isdigit()),
        (2.0, "critical"),
        (" p1 ", "critical"),
        *((word, None) for word in UNKNOWN_WORDS),
    ],
)
def test_the_severity_words_of_other_tools_are_understood(word: Any, severity: str | None) -> None:
    (found,) = parse(record(severity=word))

    assert isinstance(found, Escalation)
    assert found.severity == severity
    assert (found.unknown_severity is None) == (severity is not None or word in (None, ""))
