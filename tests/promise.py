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
    for row in rows:
        for sink in row["sinks"]:
            key = (place_of(row), sink["id"])
            if sink["status"] == "success" or sink.get("deadLetter"):
                settled[key] += 1
                assert "late" not in row or put_off[key] == 1, f"a late row for what was not put off: {key}"
            else:
                put_off[key] += 1
                assert "late" not in row, f"a late row that settles nothing: {key}"
    assert not [key for key, count in settled.items() if count > 1], "a delivery is settled twice"
    dropped: Counter[str] = Counter()
    for row in repo.telemetry():
        if "droppedCount" in row:
            dropped[row["sinkId"]] += row["droppedCount"]
    waiting = Counter(sink for _, sink in (put_off - settled).elements())
    kept = {sink: lane["waitingCount"] for sink, lane in state.get("lanes", {}).items()}
    assert {sink: count for sink, count in (waiting - dropped).items() if count} == {
        sink: count for sink, count in kept.items() if count
    }, "what waits is not what was put off"
    assert state.get("waitingCount", 0) == sum(kept.values())

    ends: dict[str, list[Place]] = defaultdict(list)
    for attempt in repo.attempts():
        if attempt["outcome"] in ("delivered", "dead_letter"):
            ends[attempt["sinkId"]].append(place_of(attempt))
    for sink, places in ends.items():
        assert places == sorted(set(places)), f"{sink} has settled a record twice, or out of order"
    dead = Counter(attempt["sinkId"] for attempt in repo.attempts() if attempt["outcome"] == "dead_letter")
    assert state.get("deadLetterCount", 0) == sum(count for sink, count in dead.items() if sink in kept)
