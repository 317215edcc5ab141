"""Makers of escalation records as a host writes them, and of a config with three sinks for them.

Timestamps are fresh, since an old record is given up; all else is the same on every run.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from loopback import Received

Record = dict[str, Any]
Transport = Literal["local", "sprite_service"]

LOOP = "night-build"
TRANSPORTS: tuple[Transport, ...] = ("local", "sprite_service")

# The three sinks of `sink_config`: one of each type.
HOOK, CHAT, PAGER = "team-hook", "ops-chat", "on-call-pager"
SINK_TYPES = {HOOK: "webhook", CHAT: "slack", PAGER: "pagerduty_events"}
# For `backoffSeconds`: every pass tries.
NO_WAIT = {"initial": 0, "max": 0}
# In every made-up secret, so that one look finds a leak of any of them: see leaks.py.
MARK = "Kq7vZ2xW9s"
# Where each posts on the loopback server. `/hook`, `/chat` and `/pager` are enough to name them there.
PATHS = {
    HOOK: f"/hook/in/hookpath-{MARK}-6f1c0e",
    CHAT: f"/chat/T0QRS/B0UVW/chatpath-{MARK}-90b3aa",
    PAGER: "/pager/v2/enqueue",
}
# Values that must never be seen in anything that the program writes.
HOOK_TOKEN = f"hooktoken-{MARK}-41d7c2c95e"
PAGER_KEY = f"pagerkey{MARK}b7e2f04a1c8d4e"
SECRETS = (PATHS[HOOK], PATHS[CHAT], HOOK_TOKEN, PAGER_KEY)
SECRET_ENV = (
    "ALERT_CHAT_URL",
    "ALERT_HOOK_TOKEN",
    "ALERT_HOOK_URL",
    "ALERT_PAGER_KEY",
    "ALERT_PAGER_URL",
)


def timestamp(seconds_ago: float = 0) -> str:
    """ISO 8601, UTC, whole seconds: as the host writes it."""
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _record(
    category: str, transport: Transport, seconds_ago: float, facts: Mapping[str, Any], more: Mapping[str, Any]
) -> Record:
    folder = f"/opt/loops/.superloop/ops-manager/{LOOP}"
    return {
        "timestamp": timestamp(seconds_ago),
        "loopId": LOOP,
        "traceId": f"pass-{category.replace('_', '-')}",
        "category": category,
        "transport": transport,
        "stateFile": f"{folder}/state.json",
        **facts,
        **more,
    }


def _reason(code: str, severity: str, metric: str, observed: str, threshold: str) -> dict[str, str]:
    return {
        "code": code,
        "severity": severity,
        "metric": metric,
        "observed": observed,
        "threshold": threshold,
    }


def health_degraded(transport: Transport = "local", seconds_ago: float = 0, **more: Any) -> Record:
    facts = {
        "ingestStatus": "failed",
        "failureCode": "snapshot_unavailable",
        "healthStatus": "degraded",
        "reasonCodes": ["transport_unreachable", "ingest_slow"],
        "reasons": [
            _reason("transport_unreachable", "degraded", "ingestStatus", "failed", "success"),
            _reason("ingest_slow", "degraded", "ingestLagSeconds", "412", "300"),
        ],
    }
    return _record("health_degraded", transport, seconds_ago, facts, more)


def health_critical(transport: Transport = "local", seconds_ago: float = 0, **more: Any) -> Record:
    facts = {
        "ingestStatus": "success",
        "healthStatus": "critical",
        "reasonCodes": ["runtime_heartbeat_stale"],
        "reasons": [
            _reason("runtime_heartbeat_stale", "critical", "heartbeatLagSeconds", "1874", "600"),
        ],
    }
    return _record("health_critical", transport, seconds_ago, facts, more)


def divergence_detected(transport: Transport = "local", seconds_ago: float = 0, **more: Any) -> Record:
    facts = {
        "divergenceFlags": {
            "activeMismatch": True,
            "approvalCompletionConflict": False,
            "cursorRegression": True,
        },
        "state": {
            "transition": {
                "previousState": "running",
                "triggeringSignal": "event:loop_stop",
                "currentState": "stopping",
                "confidence": "medium",
            },
            "projection": {"status": "running", "active": True, "stuck": {"streak": 2, "threshold": 5}},
            "cursor": {"eventLineOffset": 17, "eventLineCount": 19},
        },
    }
    return _record("divergence_detected", transport, seconds_ago, facts, more)


def ordering_drift_detected(transport: Transport = "local", seconds_ago: float = 0, **more: Any) -> Record:
    facts = {
        "reasonCode": "ordering_drift_detected",
        "sequence": {
            "status": "ordering_drift_detected",
            "driftActive": True,
            "violations": ["event_sequence_regression"],
            "snapshot": {"previous": 88, "current": 91, "monotonic": True, "regressed": False},
            "events": {"ingestedCount": 4, "previousLast": 52, "first": 49, "last": 52, "regressed": True},
        },
    }
    return _record("ordering_drift_detected", transport, seconds_ago, facts, more)


def profile_drift_detected(transport: Transport = "local", seconds_ago: float = 0, **more: Any) -> Record:
    facts = {
        "reasonCode": "profile_drift_detected",
        "drift": {
            "status": "drift_active",
            "appliedProfile": "strict",
            "recommendedProfile": "relaxed",
            "recommendationConfidence": "high",
            "mismatchStreak": 4,
            "requiredStreak": 3,
            "action": "relax_threshold_profile",
            "rationale": "Noisy but harmless lag on most runs; widen thresholds",
        },
    }
    return _record("profile_drift_detected", transport, seconds_ago, facts, more)


MAKERS: dict[str, Callable[..., Record]] = {
    "health_degraded": health_degraded,
    "health_critical": health_critical,
    "divergence_detected": divergence_detected,
    "ordering_drift_detected": ordering_drift_detected,
    "profile_drift_detected": profile_drift_detected,
}


def batch(count: int = 36) -> list[Record]:
    """Mixed records, the oldest first, every category with every transport, each with a time of its own."""
    makers = list(MAKERS.values())
    return [
        makers[index % len(makers)](
            TRANSPORTS[index // len(makers) % len(TRANSPORTS)],
            seconds_ago=60 + count - index,
            traceId=f"batch-{index:04d}",
        )
        for index in range(count)
    ]


def line(record: Mapping[str, Any]) -> str:
    """A record as the host's jq writes it: compact, one line."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n"


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(line(record) for record in records)


def sink_config(*, everywhere: bool = False) -> dict[str, Any]:
    """Three enabled sinks with every key that version v1 has; `everywhere` takes each record to all three.

    The two that have a pace of their own are given one that no test waits for.
    """
    config: dict[str, Any] = {
        "schemaVersion": "v1",
        "defaultMinSeverity": "warning",
        "sinks": {
            HOOK: {
                "enabled": True,
                "type": "webhook",
                "urlEnv": "ALERT_HOOK_URL",
                "authTokenEnv": "ALERT_HOOK_TOKEN",
                "timeoutSeconds": 10,
                "headers": {"Content-Type": "application/json", "X-Team": "night-watch"},
            },
            CHAT: {
                "enabled": True,
                "type": "slack",
                "webhookUrlEnv": "ALERT_CHAT_URL",
                "channel": "#night-watch",
                "username": "loop-watch",
                "iconEmoji": ":owl:",
                "timeoutSeconds": 10,
                "maxPerMinute": 6000,
            },
            PAGER: {
                "enabled": True,
                "type": "pagerduty_events",
                "routingKeyEnv": "ALERT_PAGER_KEY",
                "urlEnv": "ALERT_PAGER_URL",
                "source": "loops.example.org",
                "component": "night-watch",
                "group": "builds",
                "class": "loop-alert",
                "timeoutSeconds": 10,
                "maxPerMinute": 6000,
            },
        },
        "routing": {
            "defaultSinks": [HOOK],
            "categorySeverity": {
                "divergence_detected": "warning",
                "health_degraded": "warning",
                "health_critical": "critical",
                "profile_drift_detected": "info",
            },
            "routes": [
                {
                    "category": "health_critical",
                    "sinks": [PAGER, CHAT, HOOK],
                    "minSeverity": "critical",
                    "enabled": True,
                },
                {"category": "health_degraded", "sinks": [CHAT], "minSeverity": "warning", "enabled": True},
                {"category": "divergence_detected", "sinks": [CHAT, HOOK], "enabled": True},
                # No sinks of its own: the default ones.
                {"category": "profile_drift_detected", "sinks": [], "minSeverity": "info", "enabled": True},
                # Off: as if it were not there.
                {"category": "ordering_drift_detected", "sinks": [PAGER], "enabled": False},
            ],
        },
    }
    if everywhere:
        config["routing"]["defaultSinks"] = [HOOK, CHAT, PAGER]
        config["routing"]["routes"] = []
        config["defaultMinSeverity"] = "info"
    return config


# Where `sink_config()` takes each category. `ordering_drift_detected` has no route that is on.
ROUTED = {
    "health_critical": [PAGER, CHAT, HOOK],
    "health_degraded": [CHAT],
    "divergence_detected": [CHAT, HOOK],
    "profile_drift_detected": [HOOK],
    "ordering_drift_detected": [HOOK],
}


def everywhere(**delivery: Any) -> dict[str, Any]:
    """Each record to all three sinks; every pass tries."""
    return {**sink_config(everywhere=True), "delivery": {"backoffSeconds": NO_WAIT, **delivery}}


def only(sink: str, *, delivery: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Each record to this sink alone."""
    config = sink_config(everywhere=True)
    config["sinks"] = {sink: {**config["sinks"][sink], **settings}}
    config["routing"]["defaultSinks"] = [sink]
    config["delivery"] = {"backoffSeconds": NO_WAIT, **(delivery or {})}
    return config


def sink_env(server_url: str, **changes: str) -> dict[str, str]:
    """The environment that takes the sinks of `sink_config` to a loopback server."""
    return {
        "ALERT_HOOK_URL": server_url + PATHS[HOOK],
        "ALERT_HOOK_TOKEN": HOOK_TOKEN,
        "ALERT_CHAT_URL": server_url + PATHS[CHAT],
        "ALERT_PAGER_KEY": PAGER_KEY,
        "ALERT_PAGER_URL": server_url + PATHS[PAGER],
        **changes,
    }


def escalation_id(request: Received) -> str:
    """The id that a delivery carries, in the place where a receiver of its kind finds it."""
    if request.path == PATHS[HOOK]:
        return request.headers["webhook-id"]
    if request.path == PATHS[PAGER]:
        return str(request.json["payload"]["custom_details"]["escalationId"])
    return str(request.json["blocks"][0]["block_id"])


def escalation_ids(request: Received) -> list[str]:
    """The ids of all that one request delivers: more than one in a digest."""
    if request.path != PATHS[CHAT]:
        return [escalation_id(request)]
    ids = [str(block["block_id"]) for block in request.json["blocks"] if "block_id" in block]
    return [identity.partition(":")[0] for identity in ids]
