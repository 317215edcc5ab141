"""What must hold after any scenario: each delivery made, a dead letter or waiting, none twice, in order."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter, defaultdict
from typing import Any

from conftest import Repo

# Segment number and offset of a record: they grow as the source does.
Place = tuple[int, int]
# A record, by its place and its id: one line may hold several.
Key = tuple[Place, str]

ENDS = ("delivered", "dead_letter", "skipped")
# After so many attempts others go before a record: see README.
SAME_RECORD_ATTEMPTS = 5


def place_of(row: dict[str, Any]) -> Place:
    position = row["position"]
    return int(position["segment"].partition("-")[0]), int(position["offset"])


def key_of(row: dict[str, Any]) -> Key:
    return place_of(row), row["escalationId"]


def check_promise(repo: Repo) -> None:
    """Hold telemetry, attempts, summary and queue against each other, after a pass.

    Each escalation has one row, in the order of the source. Each delivery that its row leaves open has one
    late row, or waits, or was dropped on record. A sink settles each escalation once; of one severity the
    older ones first.
    """
    check_queue(repo)
    state = repo.state()
    rows = repo.telemetry()
    ingested = [key_of(row) for row in rows if "position" in row and "late" not in row]
    assert len(ingested) == len(set(ingested)), "an escalation has two rows"
    assert [place for place, _ in ingested] == sorted(place for place, _ in ingested), "rows are out of order"

    severity = {key_of(row): row["eventSeverity"] for row in rows if "eventSeverity" in row}
    is_open: Counter[tuple[Key, str]] = Counter()
    settled: Counter[tuple[Key, str]] = Counter()
    rerouted: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for row in rows:
        if row.get("reasonCode") == "queue_lost":
            is_open, rerouted, dropped = Counter(), Counter(), Counter()
        rerouted[row.get("sinkId", "")] += row.get("reroutedCount", 0)
        dropped[row.get("sinkId", "")] += row.get("droppedCount", 0) if "sinkId" in row else 0
        for sink in row.get("sinks", ()):
            key = (key_of(row), sink["id"])
            is_end = sink["status"] in ("success", "skipped") or sink.get("deadLetter") is True
            if "late" not in row:
                (settled if is_end else is_open)[key] += 1
                continue
            assert "escalation" not in row, "a late row repeats the record"
            assert is_end, f"a late row that settles nothing: {key}"
            if "byOperator" in row:
                continue
            if not is_open[key]:
                rerouted[sink["id"]] -= 1
                assert rerouted[sink["id"]] >= 0, f"a late row for a delivery that was not left open: {key}"
            is_open[key] = 0
            settled[key] += 1
        if "sinks" in row:
            check_verdict(row)
    assert not [key for key, count in settled.items() if count > 1], "a delivery is settled twice"
    if not any("byOperator" in row for row in rows):
        waiting = Counter(sink for _, sink in is_open.elements()) + rerouted - dropped
        assert +waiting == +Counter({name: sink["waitingCount"] for name, sink in state["sinks"].items()}), (
            "what waits is not what was left open"
        )
    assert state["waitingCount"] == sum(sink["waitingCount"] for sink in state["sinks"].values())
    assert state["deadLetterCount"] == sum(sink["deadLetterCount"] for sink in state["sinks"].values())

    check_attempts(repo, set(ingested), severity)


def check_verdict(row: dict[str, Any]) -> None:
    """The status of a row is what its sinks say."""
    found = {sink["status"] for sink in row["sinks"]}
    if not found:
        assert row["status"] in ("failed", "skipped")
    elif "failed" in found:
        assert row["status"] == ("partial" if "success" in found else "failed")
    elif "waiting" in found:
        assert (row["status"], row["reasonCode"]) == ("waiting", "delivery_deferred")
    else:
        assert row["status"] == ("dispatched" if "success" in found else "skipped")


def check_attempts(repo: Repo, ingested: set[Key], severity: dict[Key, str]) -> None:
    """Each delivery ends once in the attempts, and a sink gets the older ones of a severity first."""
    ends: Counter[tuple[Key, str]] = Counter()
    delivered: dict[tuple[str, str], list[Place]] = defaultdict(list)
    went_back = {
        (key_of(row), row["sinkId"])
        for row in repo.attempts()
        if row["attempt"] >= SAME_RECORD_ATTEMPTS or "byOperator" in row
    }
    before: set[tuple[Key, str]] = {
        (key_of(row), sink["id"])
        for row in repo.telemetry()
        if "late" not in row
        for sink in row.get("sinks", ())
    }
    for row in repo.attempts():
        key = (key_of(row), row["sinkId"])
        assert key[0] in ingested, f"an attempt for an escalation without a row: {key}"
        if row["outcome"] not in ENDS or "peer" in row or "byOperator" in row:
            continue
        ends[key] += 1
        # What a changed route brought later has its turn when it comes.
        if row["outcome"] == "delivered" and key not in went_back and key in before:
            delivered[row["sinkId"], severity[key[0]]].append(key[0][0])
    assert not [key for key, count in ends.items() if count > 1], "a sink has settled an escalation twice"
    for (sink, level), places in delivered.items():
        assert places == sorted(places), f"{sink} got {level} escalations out of order"


def check_queue(repo: Repo) -> None:
    """The queue is whole, its counts are right, and no row is left on its way."""
    with contextlib.closing(sqlite3.connect(f"file:{repo.queue_file}?immutable=1", uri=True)) as queue:
        assert queue.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counted = queue.execute(
            "SELECT loop, sink, sum(status = 'waiting'), sum(status = 'dead') FROM deliveries WHERE lead "
            "GROUP BY loop, sink HAVING sum(status IN ('waiting', 'dead')) ORDER BY loop, sink"
        ).fetchall()
        kept = queue.execute(
            "SELECT loop, sink, waiting, dead FROM tallies WHERE waiting OR dead ORDER BY loop, sink"
        ).fetchall()
        assert counted == kept, "the counts are not those of the deliveries"
        unsettled = queue.execute(
            "SELECT id FROM escalations e WHERE (settled_at IS NULL) <> EXISTS "
            "(SELECT 1 FROM deliveries WHERE escalation = e.id AND status = 'waiting')"
        ).fetchall()
        assert not unsettled, "an escalation is settled while a delivery waits, or not although none does"
        [loop] = queue.execute("SELECT id FROM loops WHERE loop_id = ?", (repo.loop,)).fetchone()
        [left] = queue.execute("SELECT count(*) FROM outbox WHERE loop = ?", (loop,)).fetchone()
        assert not left, "a row is still on its way"
        [unreported] = queue.execute(
            "SELECT count(*) FROM escalations WHERE loop = ? AND NOT reported", (loop,)
        ).fetchone()
        assert not unreported, "an escalation has no row"
