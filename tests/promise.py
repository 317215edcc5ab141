"""What must hold after any scenario: each delivery made, a dead letter or waiting, none twice, in order."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from conftest import Repo

Place = tuple[int, int]


def place_of(row: dict[str, Any]) -> Place:
    """Segment number and offset of a row's record: they grow as the log does."""
    position = row["position"]
    return int(position["segment"].partition("-")[0]), int(position["offset"])


def check_promise(repo: Repo) -> None:
    """Hold telemetry, attempts and state against each other.

    Each record has one row. Each delivery that its row puts off has one late row, or waits in its lane, or
    was dropped on record. A sink settles each record at most once, the older before the newer.
    """
    state = repo.state()
    rows = [row for row in repo.telemetry() if "position" in row]
    taken_up = [place_of(row) for row in rows if "late" not in row]
    assert taken_up == sorted(set(taken_up)), "a record was taken up twice, or out of order"

    put_off: Counter[tuple[Place, str]] = Counter()
    settled: Counter[tuple[Place, str]] = Counter()
    rerouted: Counter[str] = Counter()
    for row in rows:
        for sink in row["sinks"]:
            key = (place_of(row), sink["id"])
            if sink["status"] != "failed" or sink.get("deadLetter"):
                settled[key] += 1
                known = put_off[key] == 1 or "rerouted" in row
                assert "late" not in row or known, f"a late row for what was not put off: {key}"
                rerouted[sink["id"]] -= "rerouted" in row
            else:
                put_off[key] += 1
                assert "late" not in row, f"a late row that settles nothing: {key}"
    assert not [key for key, count in settled.items() if count > 1], "a delivery is settled twice"
    dropped: Counter[str] = Counter()
    for row in repo.telemetry():
        if "droppedCount" in row:
            dropped[row["sinkId"]] += row["droppedCount"]
        rerouted[row.get("sinkId", "")] += row.get("reroutedCount", 0)
    waiting = Counter(sink for _, sink in (put_off - settled).elements()) + rerouted
    kept = {sink: lane["waitingCount"] for sink, lane in state.get("lanes", {}).items()}
    assert {sink: count for sink, count in (waiting - dropped).items() if count} == {
        sink: count for sink, count in kept.items() if count
    }, "what waits is not what was put off"
    assert state.get("waitingCount", 0) == sum(kept.values())

    ends: dict[str, list[Place]] = defaultdict(list)
    for attempt in repo.attempts():
        if attempt["outcome"] in ("delivered", "dead_letter", "skipped") and "peer" not in attempt:
            ends[attempt["sinkId"]].append(place_of(attempt))
    went_back = {(place_of(row), row["sinks"][0]["id"]) for row in rows if "rerouted" in row}
    for sink, places in ends.items():
        assert len(places) == len(set(places)), f"{sink} has settled a record twice"
        in_order = [place for place in places if (place, sink) not in went_back]
        assert in_order == sorted(in_order), f"{sink} has settled a record out of order"
    dead = Counter(attempt["sinkId"] for attempt in repo.attempts() if attempt["outcome"] == "dead_letter")
    assert state.get("deadLetterCount", 0) == sum(count for sink, count in dead.items() if sink in kept)
