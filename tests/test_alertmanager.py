"""The sink type alertmanager: what is sent, and what a real Alertmanager, or a cluster, makes of it."""

from __future__ import annotations

import email.utils
import json
import re
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from alertmanager import Node, new_node, running_cluster, start_cluster, wait_until
from conftest import MODULE_FILE, Repo, clean_env, queue_rows, time_passes
from escalations import LOOP, MAKERS, NO_WAIT, Record, health_critical, health_degraded, timestamp
from loopback import HOST, TLS_PEM, Answer, SinkServer, accepted, error, hang, ok
from tools import needs_tool
from zygote import move_one_and_die, move_one_and_stop

import ops_alert_dispatch as program

SINK = "fleet"
TOKEN = "fleettoken-5a0c77d1e2"
SETTINGS = {"enabled": True, "type": "alertmanager", "urlEnv": "ALERT_FLEET_URLS"}
PEERS = "https://am-1.example.org:9093,https://am-2.example.org:9093"
ADAPTER = program.ADAPTERS["alertmanager"]
NOW = 1_772_366_400.0  # 2026-03-01T12:00:00Z


def fleet_config(**settings: Any) -> dict[str, Any]:
    return {
        "schemaVersion": "v1",
        "defaultMinSeverity": "info",
        "sinks": {SINK: {**SETTINGS, **settings}},
        "routing": {"defaultSinks": [SINK], "categorySeverity": {"health_critical": "critical"}},
        # Whatever fails is tried by the very next pass.
        "delivery": {"backoffSeconds": NO_WAIT},
    }


# --- What is sent


def fleet_sink(urls: str = PEERS, **settings: Any) -> program.Sink:
    secrets = {"urlEnv": urls, **({"authTokenEnv": TOKEN} if "authTokenEnv" in settings else {})}
    return program.Sink(SINK, "alertmanager", True, 5, None, {**SETTINGS, **settings}, secrets)


def delivery(record: Record, severity: str = "warning") -> program.Delivery:
    line = json.dumps(record).encode()
    [escalation] = program.parse_line(line, len(line), LOOP)
    assert isinstance(escalation, program.Escalation)
    resolution = program.Resolution(escalation.category, severity, None, "info", True, {}, (), (), ())
    return program.Delivery(escalation, resolution)


def alerts_of(
    *records: Record, sink: program.Sink | None = None, repo: str = "/srv/shop", sent: float = NOW
) -> Any:
    """The alerts of one request that holds these records."""
    deliveries = [delivery(record) for record in records]
    origin = program.Origin(repo, "trace-of-the-pass", sent)
    return json.loads(ADAPTER.build(sink or fleet_sink(), deliveries, origin).body)


def at(seconds: float) -> str:
    return program.iso(NOW + seconds)


@pytest.mark.parametrize("category", MAKERS)
def test_an_alert_says_what_is_wrong_where(category: str) -> None:
    (alert,) = alerts_of(MAKERS[category](timestamp=at(-30)))

    assert alert["labels"] == {
        "alertname": category,
        "severity": "warning",
        "loop": LOOP,
        "repo": "shop",
        "source": "ops-manager",
    }
    assert alert["annotations"]["summary"].startswith(f"[warning] {category} on {LOOP}: ")
    assert alert["annotations"]["description"].strip()
    assert re.fullmatch(r"esc_[0-9a-f]{32}", alert["annotations"]["escalationId"])
    assert alert["annotations"]["traceId"] == f"pass-{category.replace('_', '-')}"
    assert (alert["startsAt"], alert["endsAt"]) == (at(-30), at(3570))


def test_repeats_are_one_alert() -> None:
    first = health_degraded(timestamp=at(-600), traceId="one", reasonCodes=["a"], observed=1)
    again = health_degraded("sprite_service", timestamp=at(-5), traceId="two", reasonCodes=["b"], observed=2)

    assert alerts_of(first)[0]["labels"] == alerts_of(again, sent=NOW + 60)[0]["labels"]


def test_of_repeats_in_one_request_the_newest_is_sent_from_the_earliest_start() -> None:
    """Alertmanager would keep what the last one says, and the operator read how it was an hour ago."""
    records = [
        health_degraded(timestamp=at(seconds), traceId=f"at{seconds}") for seconds in (-900, -60, -300)
    ]
    other = health_critical(timestamp=at(-100))
    repeated, single = alerts_of(*records[:1], other, *records[1:])

    assert repeated["annotations"]["traceId"] == "at-300"
    assert (repeated["startsAt"], repeated["endsAt"]) == (at(-900), at(3540))
    assert single["labels"]["alertname"] == "health_critical"


def test_a_sink_adds_its_own_labels_and_its_token() -> None:
    sink = fleet_sink(authTokenEnv="T", labels={"team": "night-watch", "host": "web 17"})
    (alert,) = alerts_of(health_critical(), sink=sink)
    request = ADAPTER.build(sink, [delivery(health_critical())], program.Origin("/srv/shop", "t", NOW))

    assert list(alert["labels"]) == ["alertname", "severity", "loop", "repo", "source", "team", "host"]
    assert (alert["labels"]["team"], alert["labels"]["host"]) == ("night-watch", "web 17")
    assert request.headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_hundred_alerts_fit_into_one_request_that_a_proxy_lets_through() -> None:
    longest = {"category": "c" * 5000, "loopId": "l" * 5000, "traceId": "t" * 5000, "note": "n" * 50_000}
    assert ADAPTER.batch_size(fleet_sink()) == 100
    assert 100 * len(json.dumps(alerts_of(longest))) < 1 << 20


@pytest.mark.parametrize("key", ["category", "loopId"])
def test_alerts_with_long_names_are_not_taken_for_one(key: str) -> None:
    alerts = alerts_of(*({**health_degraded(), key: "x" * 5000 + end} for end in "ab"))

    assert len(alerts) == 2
    assert all(len(value) <= 256 for alert in alerts for value in alert["labels"].values())


@pytest.mark.parametrize(
    ("repo", "label"),
    [
        ("/srv/shop/", "shop"),
        ("/", "/"),
        ("/srv/a b", "a b"),
        ("/srv/\udcff", " :[0-9a-f]+"),
        ("/x\n", "x :.+"),
    ],
)
def test_the_repo_is_named_by_the_end_of_its_path(repo: str, label: str) -> None:
    assert re.fullmatch(label, alerts_of(health_critical(), repo=repo)[0]["labels"]["repo"])


@pytest.mark.parametrize(
    ("written", "active_for", "starts", "ends"),
    [
        (at(0), 3600, 0, 3600),
        (at(-3000), 3600, -3000, 600),
        # Late: what is left of it may not be enough for a page.
        (at(-3001), 3600, -3001, 3600),
        (at(-86_400), 3600, -86_400, 3600),
        ("1970-01-01T00:00:00Z", 3600, -NOW, 3600),
        (at(-30), 60, -30, 30),
        (at(-31), 60, -31, 60),
        # A clock that is ahead must not make an alert that stays for years.
        (at(86_400 * 365), 3600, 0, 3600),
        ("yesterday", 3600, 0, 3600),
        (None, 3600, 0, 3600),
    ],
)
def test_an_alert_lasts_long_enough_to_page(
    written: str | None, active_for: float, starts: float, ends: float
) -> None:
    sink = fleet_sink(activeForSeconds=active_for)
    (alert,) = alerts_of(health_critical(timestamp=written), sink=sink)

    assert (alert["startsAt"], alert["endsAt"]) == (at(starts), at(ends))


def test_a_peer_that_gets_an_alert_later_agrees_on_its_end() -> None:
    """Otherwise it would still fire there when the others have resolved it, and page again."""
    record = health_critical(timestamp=at(0))
    seconds = ADAPTER.seconds_to_catch_up(fleet_sink())

    assert alerts_of(record, sent=NOW) == alerts_of(record, sent=NOW + seconds)
    assert alerts_of(record, sent=NOW) != alerts_of(record, sent=NOW + seconds + 1)


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        ("http://a:9093", ["http://a:9093"]),
        ("http://a:9093/", ["http://a:9093"]),
        ("https://a/alerts/,http://b:1", ["https://a/alerts", "http://b:1"]),
        (" http://a:1 , http://b:2,, ", ["http://a:1", "http://b:2"]),
        ("http://a:1,http://a:1/", ["http://a:1"]),
    ],
)
def test_each_peer_is_sent_to_once(value: str, urls: list[str]) -> None:
    sink = fleet_sink(value)
    peers = list(ADAPTER.peers(sink).values())
    assert peers == [f"{url}/api/v2/alerts" for url in urls]


# --- The config


def load(tmp_path: Path, urls: str = PEERS, **settings: Any) -> program.Config:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fleet_config(**settings)), encoding="utf-8")
    return program.load_config(str(path), {"ALERT_FLEET_URLS": urls, "ALERT_FLEET_TOKEN": TOKEN})


@pytest.mark.parametrize(
    ("settings", "path", "word"),
    [
        ({"labels": {"severity": "page"}}, "$.sinks.fleet.labels.severity", "none of alertname, severity"),
        ({"labels": {"on-call": "x"}}, "$.sinks.fleet.labels['on-call']", "A-Z a-z 0-9 _"),
        ({"labels": {"1st": "x"}}, "$.sinks.fleet.labels['1st']", "digit"),
        ({"labels": {"team": ""}}, "$.sinks.fleet.labels.team", "empty"),
        ({"labels": {"team": 3}}, "$.sinks.fleet.labels.team", "string"),
        ({"activeForSeconds": 59}, "$.sinks.fleet.activeForSeconds", "60 to 604800"),
        ({"activeForSeconds": "1h"}, "$.sinks.fleet.activeForSeconds", "number"),
        ({"authToken": "x"}, "$.sinks.fleet.authToken", "authTokenEnv"),
    ],
)
def test_a_fault_in_a_sink_is_told_with_its_path(
    tmp_path: Path, settings: dict[str, Any], path: str, word: str
) -> None:
    with pytest.raises(program.ConfigError) as raised:
        load(tmp_path, **settings)
    (fault,) = raised.value.faults

    assert fault.startswith(path)
    assert word in fault


@pytest.mark.parametrize("name", ["alertname", "severity", "loop", "repo", "source"])
def test_a_sink_cannot_change_what_tells_alerts_apart(tmp_path: Path, name: str) -> None:
    with pytest.raises(program.ConfigError):
        load(tmp_path, labels={name: "x"})


@pytest.mark.parametrize(
    "urls", ["a:9093", "https://a:1,b:2", "https://a:1,https://", "https://a:1;https://b:x", ","]
)
def test_each_of_the_urls_is_checked(tmp_path: Path, urls: str) -> None:
    with pytest.raises(program.ConfigError) as raised:
        load(tmp_path, urls)
    (fault,) = raised.value.faults

    assert fault.startswith("$.sinks.fleet.urlEnv: the value of ALERT_FLEET_URLS ")
    assert urls not in fault


def test_no_password_in_any_of_the_urls_is_ever_shown(tmp_path: Path) -> None:
    passwords = ("secretofthefirst", "secretofthesecond")
    urls = ",".join(f"http://ops:{password}@{HOST}:9093" for password in passwords)
    redactors = {password: load(tmp_path, urls).redactor for password in passwords} | {
        TOKEN: load(tmp_path, authTokenEnv="ALERT_FLEET_TOKEN").redactor
    }

    for secret, redactor in redactors.items():
        assert secret not in redactor.mask(f"denied: {secret}")


# --- One real Alertmanager

ODD: list[Record] = [
    {"category": "no more than that"},
    {"category": "\u0001"},
    {"category": "\ud800", "loopId": "\udfff", "traceId": "\u0000"},
    {"category": {"nested": True}, "loopId": ["a", "list"], "traceId": {"x": None}},
    {"category": "ünïcode 🚨", "loopId": "\u202eright to left"},
    {"category": "{}=\"'\\", "note": '"quotes" and \\ and \n lines'},
    {"category": "x" * 100_000, "loopId": "y" * 100_000, "note": "z" * 100_000},
    {"category": "old", "timestamp": "1970-01-01T00:00:00Z"},
    {"category": "far ahead", "timestamp": "9998-12-31T23:59:59Z"},
    {"category": "no time at all", "timestamp": "tomorrow"},
    {"category": "deep", "reasons": [[[{"code": [None]}]]], "severity": 7},
]


@pytest.fixture
def node(tmp_path: Path, server: SinkServer) -> Iterator[Node]:
    with new_node(tmp_path / "node", f"{server.url}/page") as alone:
        alone.start()
        yield alone


def test_alertmanager_takes_every_record_as_a_firing_alert(node: Node) -> None:
    deliveries = [delivery(record) for record in ODD]
    sent = program.parse_time(timestamp())
    assert sent is not None
    request = ADAPTER.build(fleet_sink(node.url), deliveries, program.Origin("/srv/shop", "t", sent))

    assert node.post(request.body) == (200, "")
    assert len(node.names()) == len(ODD)
    assert ADAPTER.judge(program.Answer(200, {}, b""), sent).outcome == "delivered"


def test_what_alertmanager_refuses_is_given_up_for_that_record_alone(node: Node) -> None:
    good, bad = alerts_of(health_critical(timestamp=timestamp()), health_degraded(), sent=NOW * 2)
    bad["labels"] = {"not-a-name": "x"}
    for body in (json.dumps([good, bad]), '[{"annotations": {}}]', "no JSON"):
        status, text = node.post(body.encode())
        assert ADAPTER.judge(program.Answer(status, {}, text.encode()), NOW).outcome == "dead_letter", text
    # What was good beside it has been taken.
    assert node.names() == ["health_critical"]


def test_a_batch_that_is_refused_is_on_record_before_its_alerts_go_out_one_by_one(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    pair.env["ALERT_FLEET_URLS"] = peers[0].url
    peers[0].script(ALERTS, error(400, '"bad label"'))
    pair.append(alert("one"), alert("two"))
    pair.dispatch()

    rows = [
        (row["attempt"], row["outcome"], row["faultCode"], row.get("batchSize")) for row in pair.attempts()
    ]
    assert rows == [
        *[(1, "retry", "record_refused", 2)] * 2,
        *[(2, "delivered", None, None)] * 2,
    ]


def test_what_waits_for_a_cluster_that_becomes_a_webhook_is_delivered_once(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    for peer in peers:
        peer.answer(ALERTS, error(503))
    pair.append(alert("one"))
    pair.dispatch()
    config = fleet_config(timeoutSeconds=1)
    [(name, sink)] = config["sinks"].items()
    config["sinks"][name] = {**sink, "type": "webhook"}
    pair.write_config(config)
    pair.env["ALERT_FLEET_URLS"] = f"{peers[0].url}/hook"
    for _ in range(2):
        assert pair.dispatch("--now").exit_code == 0

    assert len(peers[0].received("/hook")) == 1
    assert pair.state()["waitingCount"] == 0


def test_plain_http_to_a_tls_port_does_not_give_alerts_up(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "tls.pem").write_text(TLS_PEM)
    web = tmp_path / "web.yml"
    web.write_text(f"tls_server_config: {{cert_file: {tmp_path}/tls.pem, key_file: {tmp_path}/tls.pem}}\n")
    with new_node(tmp_path / "node", "http://127.0.0.1:9/", f"--web.config.file={web}") as node:
        node.start()
        # Nothing beyond the head: a node that hangs up on what it has not read takes its answer back.
        status, text = node.post(b"")

    verdict = ADAPTER.judge(program.Answer(status, {}, text.encode()), NOW)
    assert (verdict.outcome, verdict.http_status) == ("misconfigured", 400)
    assert "https://" in program.advise(verdict.fault, None, {})


# --- A cluster


@pytest.fixture
def nodes(tmp_path: Path, server: SinkServer) -> Iterator[tuple[Node, Node]]:
    with running_cluster(tmp_path, f"{server.url}/page") as cluster:
        yield cluster


@pytest.fixture
def fleet(tmp_path: Path, nodes: tuple[Node, Node]) -> Repo:
    """A repo whose only sink is the cluster."""
    (tmp_path / "shop").mkdir()
    urls = ",".join(node.url for node in nodes)
    made = Repo(tmp_path / "shop", clean_env(tmp_path, ALERT_FLEET_URLS=urls))
    made.write_config(fleet_config(labels={"team": "night-watch"}))
    return made


def pages(server: SinkServer) -> list[str]:
    """The names of the alerts that people were paged for, each as often as they were."""
    return sorted(
        alert["labels"]["alertname"]
        for request in server.received("/page")
        for alert in request.json["alerts"]
        if alert["status"] == "firing"
    )


def wait_for_pages(nodes: tuple[Node, ...], *names: str) -> None:
    """Wait until no node will page for these any more."""
    wait_until(
        f"all have decided on {' and '.join(names)}",
        lambda: all(node.decided(name) for node in nodes for name in names),
    )


def test_both_nodes_hold_an_alert_and_page_once_for_it(
    fleet: Repo, nodes: tuple[Node, Node], server: SinkServer
) -> None:
    """An old one, too: Alertmanager says nothing of an alert whose end is in the past."""
    fleet.append(health_degraded(seconds_ago=7200), health_critical())
    summary = fleet.dispatch().json
    names = ["health_critical", "health_degraded"]

    assert (summary["status"], summary["dispatchedCount"]) == ("success", 2)
    assert [node.names() for node in nodes] == [names, names]
    wait_for_pages(nodes, *names)
    assert pages(server) == names

    amtool = subprocess.run(
        [needs_tool("amtool"), f"--alertmanager.url={nodes[1].url}", "alert", "query", "-o", "json"],
        capture_output=True,
        check=True,
    )
    assert [alert["labels"] for alert in json.loads(amtool.stdout)] == [
        {
            "alertname": name,
            "loop": LOOP,
            "repo": "shop",
            "severity": severity,
            "source": "ops-manager",
            "team": "night-watch",
        }
        for name, severity in (("health_critical", "critical"), ("health_degraded", "info"))
    ]


def test_one_node_of_two_is_enough_and_the_other_gets_the_alert_when_it_is_back(
    fleet: Repo, nodes: tuple[Node, Node], server: SinkServer
) -> None:
    living, dead = nodes
    dead.kill()
    fleet.append(health_critical())
    summary = fleet.dispatch().json

    assert (summary["status"], summary["dispatchedCount"], summary["failedCount"]) == ("success", 1, 0)
    failed = [row for row in fleet.attempts() if row.get("peer") == f"{HOST}:{dead.port}"]
    assert {row["outcome"] for row in failed} == {"retry"}
    assert all("connection refused" in row["message"] for row in failed)
    assert living.names() == ["health_critical"]
    server.wait_for(1, "/page")

    dead.start([living])
    wait_until("the nodes know each other", lambda: dead.knows(2) or dead.knows(3))
    fleet.dispatch()
    assert dead.names() == ["health_critical"]
    wait_for_pages(nodes, "health_critical")
    assert pages(server) == ["health_critical"]


def test_an_alert_waits_while_the_whole_cluster_is_down(
    fleet: Repo, nodes: tuple[Node, Node], server: SinkServer
) -> None:
    for node in nodes:
        node.kill()
    fleet.append(health_critical())
    down = fleet.dispatch().json

    assert (down["status"], down["waitingCount"]) == ("failed", 1)

    start_cluster(*nodes)
    back = fleet.dispatch().json
    assert (back["lateDispatchedCount"], back["waitingCount"]) == (1, 0)
    assert [node.names() for node in nodes] == [["health_critical"]] * 2
    wait_for_pages(nodes, "health_critical")
    assert pages(server) == ["health_critical"]


# --- Peers that a test can tell what to say


@pytest.fixture
def peers() -> Iterator[tuple[SinkServer, SinkServer]]:
    with SinkServer() as one, SinkServer() as other:
        yield one, other


@pytest.fixture
def pair(tmp_path: Path, peers: tuple[SinkServer, SinkServer]) -> Repo:
    """A repo whose only sink is these two."""
    (tmp_path / "shop").mkdir()
    made = Repo(tmp_path / "shop", clean_env(tmp_path, ALERT_FLEET_URLS=",".join(peer.url for peer in peers)))
    made.write_config(fleet_config(timeoutSeconds=1))
    return made


def told(peer: SinkServer) -> list[str]:
    """The traces of the alerts that a peer was sent and has taken, in order."""
    return [
        alert["annotations"]["traceId"]
        for request in peer.received("/api/v2/alerts")
        for alert in request.json
        if alert["labels"]
    ]


def alert(name: str) -> Record:
    """One that is no repeat of another, to an Alertmanager."""
    return health_critical(category=f"category {name}", traceId=name)


ALERTS = "/api/v2/alerts"


def test_a_peer_that_hangs_costs_all_loops_together_one_timeout(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    well, hanging = peers
    hanging.answer(ALERTS, hang())
    for number in range(4):
        replace(pair, loop=f"loop-{number}").append(alert(str(number)))

    summary = pair.run("dispatch", "--repo", str(pair.root), "--all-loops").json
    assert (summary["dispatchedCount"], summary["waitingCount"]) == (4, 0)
    assert sorted(told(well)) == ["0", "1", "2", "3"]
    assert len(hanging.requests) == 1
    rows = [row for number in range(4) for row in replace(pair, loop=f"loop-{number}").attempts()]
    assert [row["outcome"] for row in rows if row["peer"] == well.url[7:]] == ["delivered"] * 4
    # Only what was on its way to it has an attempt.
    assert {row["outcome"] for row in rows if row["peer"] == hanging.url[7:]} == {"retry"}

    hanging.answer(ALERTS, ok())
    hanging.forget()
    pair.run("dispatch", "--repo", str(pair.root), "--all-loops")
    assert sorted(told(hanging)) == ["0", "1", "2", "3"]


def test_status_says_how_old_what_waits_for_a_cluster_is_before_the_first_pass(pair: Repo) -> None:
    oldest = alert("two")
    pair.append(alert("one"), oldest)
    pair.run("skip", *pair.target, "--sink", SINK, "--to-line", "1", "--yes")
    [sink] = pair.run("status", *pair.target).json["sinks"]

    assert (sink["lagCount"], sink["oldestPendingAt"]) == (1, oldest["timestamp"])


def test_a_peer_that_was_taken_out_hides_neither_a_refusal_nor_an_outage(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    down, refuses = peers
    down.answer(ALERTS, error(503))
    refuses.answer(ALERTS, error(400, '"bad label"'))
    pair.append(alert("one"))
    assert pair.dispatch().json["waitingCount"] == 1
    pair.env["ALERT_FLEET_URLS"] = refuses.url
    summary = pair.dispatch().json

    assert (summary["waitingCount"], summary["deadLetterCount"], summary["lateFailedCount"]) == (0, 1, 1)
    [entry] = pair.telemetry()[-1]["sinks"]
    assert (entry["status"], entry["reasonCode"]) == ("failed", "http_error")

    refuses.answer(ALERTS, ok())
    pair.append(alert("two"))
    pair.dispatch()
    pair.env["ALERT_FLEET_URLS"] = down.url
    pair.append(alert("three"))
    [sink] = pair.dispatch().json["sinks"].values()
    assert sink["consecutiveFailures"] > 0


def test_a_cluster_that_takes_an_alert_late_is_on_record_once(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    slow, quick = peers
    for peer in peers:
        peer.answer(ALERTS, error(503))
    pair.append(alert("one"))
    pair.dispatch()
    slow.answer(ALERTS, Answer(delay=0.5))
    quick.answer(ALERTS, ok())
    assert pair.dispatch().json["lateDispatchedCount"] == 1
    assert [row.get("late") for row in pair.telemetry()] == [None, True]


def test_an_alert_lasts_by_the_clock_of_a_peer_that_is_hours_ahead(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    """By its clock it would have ended before it came, and a peer says nothing of that."""
    ahead = time.time() + 7200
    peers[0].answer(ALERTS, Answer(headers={"Date": email.utils.formatdate(ahead, usegmt=True)}))
    for name in ("one", "two"):
        pair.append(alert(name))
        assert pair.dispatch().json["status"] == "success"

    assert (told(peers[0]), told(peers[1])) == (["one", "one", "two"], ["one", "two"])
    for sent in peers[0].received(ALERTS)[1:]:
        [found] = sent.json
        assert datetime.fromisoformat(found["endsAt"]).timestamp() > ahead + 600


def test_a_wrong_clock_of_a_peer_delays_the_end_of_a_pass_by_no_second_attempt_and_loses_no_alert(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    peer, _ = peers
    pair.env["ALERT_FLEET_URLS"] = peer.url
    pair.write_config(fleet_config(timeoutSeconds=20))
    ahead = time.time() + 7200
    answer = Answer(headers={"Date": email.utils.formatdate(ahead, usegmt=True)})
    peer.answer(ALERTS, replace(answer, delay=2.5))
    pair.append(alert("one"))
    first = pair.dispatch("--time-budget", "2").json
    assert (told(peer), first["waitingCount"]) == (["one"], 1)
    [row] = pair.attempts()
    assert (row["outcome"], row["httpStatus"], row["faultCode"]) == ("retry", 200, "wrong_clock")
    [sink] = first["sinks"].values()
    assert sink["consecutiveFailures"] == 0
    assert sink["clockOffsetSeconds"] > 7000
    peer.answer(ALERTS, answer)
    assert pair.dispatch().json["waitingCount"] == 0

    assert told(peer) == ["one", "one"]
    [found] = peer.received(ALERTS)[1].json
    assert datetime.fromisoformat(found["endsAt"]).timestamp() > ahead + 600


def test_a_peer_whose_clock_is_never_the_same_is_sent_no_alert_for_ever(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    peer, _ = peers
    pair.env["ALERT_FLEET_URLS"] = peer.url
    dates = (email.utils.formatdate(time.time() + 7200 * hours, usegmt=True) for hours in range(1, 9))
    peer.script(ALERTS, *(Answer(headers={"Date": date}) for date in dates))
    pair.append(alert("one"))
    assert pair.dispatch().json["waitingCount"] == 0
    pair.append(alert("two"))
    assert pair.dispatch().json["waitingCount"] == 0

    assert told(peer) == ["one", "one", "two", "two"]


def test_what_is_new_goes_out_before_what_one_peer_has_missed(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    well, behind = peers
    behind.answer(ALERTS, error(503))
    pair.append(*(alert(str(number)) for number in range(250)))
    pair.dispatch()
    behind.forget()
    behind.answer(ALERTS, ok().after(0.2))
    well.forget()
    pair.append(alert("new"))
    pair.dispatch()

    assert told(well) == ["new"]
    assert well.received(ALERTS)[0].at < behind.received(ALERTS)[-1].at
    arrived = told(behind)
    assert arrived == [*map(str, range(250)), "new"]


def test_a_peer_that_stands_in_for_the_others_gets_everything_in_order_and_once(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    one, other = peers
    other.answer(ALERTS, error(503))
    pair.append(alert("missed"))
    pair.dispatch()
    other.forget()
    other.answer(ALERTS, ok())
    one.answer(ALERTS, error(503))
    one.forget()
    pair.append(alert("taken"))
    assert pair.dispatch().json["waitingCount"] == 0
    one.forget()
    one.answer(ALERTS, ok())
    pair.dispatch()
    pair.dispatch()

    assert told(other) == ["missed", "taken"]
    assert told(one) == ["taken"]


def test_a_peer_that_is_put_in_front_while_alerts_wait_is_sent_each_once(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    new, down = peers
    pair.env["ALERT_FLEET_URLS"] = down.url
    down.answer(ALERTS, error(503))
    pair.append(alert("one"))
    pair.dispatch()
    config = fleet_config(timeoutSeconds=1)
    config["routing"]["routes"] = [{"category": "another", "sinks": [SINK]}]
    pair.write_config(config)
    pair.env["ALERT_FLEET_URLS"] = f"{new.url},{down.url}"
    for _ in range(2):
        assert pair.dispatch("--now").exit_code == 0

    assert told(new) == ["one"]
    assert pair.state()["waitingCount"] == 0


@pytest.mark.parametrize("order", [1, -1])
def test_an_alert_that_the_last_peer_has_refused_is_a_dead_letter_once_the_others_are_gone(
    pair: Repo, peers: tuple[SinkServer, SinkServer], order: int
) -> None:
    down, refuses = peers
    down.answer(ALERTS, error(503))
    refuses.answer(ALERTS, error(400, '"bad label"'))
    gone = [down.url, down.url.replace(HOST, "localhost")][::order]
    pair.env["ALERT_FLEET_URLS"] = ",".join([*gone, refuses.url])
    pair.append(alert("one"))
    assert pair.dispatch().json["waitingCount"] == 1
    pair.env["ALERT_FLEET_URLS"] = refuses.url
    summary = pair.dispatch().json

    assert (summary["waitingCount"], summary["deadLetterCount"]) == (0, 1)
    assert pair.telemetry()[-1]["sinks"][0]["deadLetter"] is True


@pytest.mark.parametrize("end", [move_one_and_stop, move_one_and_die])
@pytest.mark.parametrize("refused", [False, True])
def test_a_pass_that_ends_while_a_backlog_moves_to_another_peer_neither_loses_nor_repeats_any_of_it(
    pair: Repo, peers: tuple[SinkServer, SinkServer], end: Callable[[], None], refused: bool
) -> None:
    down, other = peers
    down.answer(ALERTS, error(503))
    other.answer(ALERTS, error(400, '"bad label"') if refused else ok())
    pair.env["ALERT_FLEET_URLS"] = f"{down.url},{other.url}" if refused else down.url
    names = ["0", "1", "2"]
    pair.append(*map(alert, names))
    assert pair.dispatch().json["waitingCount"] == 3
    pair.env["ALERT_FLEET_URLS"] = other.url
    replace(pair, prepare=end).dispatch()
    gone = queue_rows(pair, "SELECT count(*) FROM deliveries WHERE peer = ?", down.url[7:])
    assert gone == [(2,)]
    pair.dispatch("--now")

    late = [row["sinks"][0]["status"] for row in pair.telemetry() if "late" in row]
    assert late == (["failed"] * 3 if refused else ["success"] * 3)
    state = pair.state()
    assert (state["waitingCount"], state["deadLetterCount"]) == (0, 3 if refused else 0)
    if not refused:
        assert sorted(told(other)) == names


def test_a_backlog_that_moves_to_another_peer_is_not_held_in_memory(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    down, other = peers
    pair.env["ALERT_FLEET_URLS"] = down.url
    down.answer(ALERTS, error(503))
    pair.append(*({**alert(str(number)), "note": "n" * (1 << 20)} for number in range(16)))
    assert pair.dispatch().json["waitingCount"] == 16
    job = program.make_job(program.Paths(str(pair.root)), LOOP)._replace(time_budget=0)
    tracemalloc.start()
    try:
        program.run_loops([job], {**pair.env, "ALERT_FLEET_URLS": other.url})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert queue_rows(pair, "SELECT peer, count(*) FROM deliveries") == [(other.url[7:], 16)]
    assert most < 10 << 20


def with_a_webhook(pair: Repo, server: SinkServer) -> dict[str, Any]:
    """The config of a cluster of one peer, and of a webhook `other` on the same server."""
    pair.env |= {"ALERT_FLEET_URLS": server.url, "ALERT_OTHER_URL": f"{server.url}/other"}
    config = fleet_config(timeoutSeconds=1)
    config["sinks"]["other"] = {"enabled": True, "type": "webhook", "urlEnv": "ALERT_OTHER_URL"}
    return config


def test_a_route_that_comes_back_when_the_peer_is_another_one_delivers_what_waits(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    old, new = peers
    config = with_a_webhook(pair, old)

    def route(*sinks: str) -> None:
        config["routing"]["defaultSinks"] = list(sinks)
        pair.write_config(config)
        pair.dispatch("--now")

    for peer, path in ((old, ALERTS), (new, ALERTS), (old, "/other")):
        peer.answer(path, error(503))
    pair.append(alert("one"))
    route(SINK, "other")
    route("other")
    old.answer("/other", ok())
    pair.env["ALERT_FLEET_URLS"] = new.url
    route(SINK, "other")
    assert pair.state()["waitingCount"] == 1
    new.answer(ALERTS, ok())
    new.forget()
    pair.dispatch("--now")

    assert told(new) == ["one"]
    assert (pair.state()["waitingCount"], pair.state()["laggingCount"]) == (0, 0)


def test_what_waits_follows_a_sink_that_is_renamed_and_back_although_its_peer_is_another_one(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    """It would wait for a peer that nobody counts, and at last be taken for what another peer has."""
    old, new = peers
    fleet = fleet_config(timeoutSeconds=1)
    renamed = json.loads(json.dumps(fleet).replace(SINK, "renamed"))
    for peer in peers:
        peer.answer(ALERTS, error(503))
    pair.append(alert("one"))
    for config, peer in ((fleet, old), (renamed, old), (fleet, new)):
        pair.env["ALERT_FLEET_URLS"] = peer.url
        pair.write_config(config)
        pair.dispatch("--now")
    assert pair.state()["waitingCount"] == 1
    new.answer(ALERTS, ok())
    new.forget()
    pair.dispatch("--now")

    assert told(new) == ["one"]
    assert (pair.state()["waitingCount"], pair.state()["laggingCount"]) == (0, 0)


def test_what_an_operator_skipped_is_not_sent_to_a_peer_that_is_added(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    down, added = peers
    config = with_a_webhook(pair, down)
    config["routing"]["defaultSinks"] = [SINK, "other"]
    pair.write_config(config)
    down.answer("/", error(503))
    pair.append(alert("skipped"))
    pair.dispatch()
    assert pair.run("skip", *pair.target, "--sink", SINK, "--yes").json["skippedCount"] == 1
    pair.env["ALERT_FLEET_URLS"] += f",{added.url}"
    config["routing"]["routes"] = [{"category": "of_another_kind", "sinks": ["other"]}]
    pair.write_config(config)
    pair.dispatch()

    assert told(added) == []


def test_peers_on_one_host_are_known_in_any_order(pair: Repo, peers: tuple[SinkServer, SinkServer]) -> None:
    server, _ = peers
    urls = [f"{server.url}/{name}" for name in ("one", "two")]
    pair.env["ALERT_FLEET_URLS"] = ",".join(urls)
    server.answer("/one", error(503))
    pair.append(alert("missed by one"))
    pair.dispatch()
    server.answer("/one", ok())
    server.forget()
    pair.env["ALERT_FLEET_URLS"] = ",".join(reversed(urls))
    pair.dispatch("--now")

    assert (len(server.received("/one")), len(server.received("/two"))) == (1, 0)


def test_a_repeat_that_one_peer_needs_not_be_sent_does_not_wait_for_the_other(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    down, well = peers
    config = fleet_config(timeoutSeconds=1)
    config["routing"]["repeat"] = {"windowSeconds": 900}
    pair.write_config(config)
    down.answer(ALERTS, error(503))
    pair.append(health_critical(traceId="first"), health_critical(traceId="repeat"))
    summary = pair.dispatch().json

    assert told(well) == ["first"]
    assert (summary["waitingCount"], summary["failedCount"]) == (0, 0)
    assert [row["sinks"][0]["status"] for row in pair.telemetry()] == ["success", "skipped"]


def test_what_a_slow_peer_takes_last_does_not_stay_in_the_queue_for_ever(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    quick, slow = peers
    slow.answer(ALERTS, ok().after(0.7))
    pair.append(alert("one"))
    pair.dispatch()
    assert (told(quick), told(slow)) == (["one"], ["one"])
    time_passes(pair, 8 * 86400)
    pair.append(alert("two"))
    pair.dispatch()
    assert queue_rows(pair, "SELECT count(*) FROM escalations") == [(1,)]


def miss_one_and_give_up_another(pair: Repo, one: SinkServer, other: SinkServer) -> None:
    """One peer has taken an alert that the other missed; neither took the next, which an operator gave up."""
    other.answer(ALERTS, error(503))
    pair.append(alert("sent"))
    pair.dispatch()
    one.answer(ALERTS, error(503))
    pair.append(alert("given up"))
    pair.dispatch()
    assert pair.run("skip", *pair.target, "--sink", SINK, "--yes").exit_code == 0


def test_what_an_operator_gave_up_is_not_sent_to_a_peer_later(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    one, other = peers
    miss_one_and_give_up_another(pair, one, other)
    for peer in peers:
        peer.answer(ALERTS, ok())
        peer.forget()
    pair.append(alert("new"))
    pair.dispatch()
    pair.dispatch()

    assert "given up" not in told(one) + told(other)
    assert told(one) == ["new"]
    assert sorted(told(other)) == ["new", "sent"]


def test_a_lost_state_costs_no_peer_what_it_missed_after_an_operator_gave_something_up(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    one, other = peers
    miss_one_and_give_up_another(pair, one, other)
    one.answer(ALERTS, ok())
    pair.append(alert("missed"))
    pair.dispatch()
    pair.state_file.unlink()
    other.answer(ALERTS, ok())
    other.forget()
    pair.dispatch()
    assert sorted(told(other)) == ["missed", "sent"]


def test_an_operator_who_sends_again_learns_which_peer_did_not_take_it(
    pair: Repo, peers: tuple[SinkServer, SinkServer]
) -> None:
    pair.append(alert("again"))
    pair.dispatch()
    peers[1].answer(ALERTS, error(503))
    sent = pair.run("redeliver", *pair.target, "--from-line", "1", "--yes").json
    assert [row["message"] for row in sent["deliveries"]] == [f"but not to {peers[1].url[7:]}"]
    again = {row["peer"]: row for row in pair.attempts() if "byOperator" in row}
    took, missed = (again[peer.url[7:]] for peer in peers)
    assert (took["outcome"], missed["outcome"], missed["httpStatus"]) == ("delivered", "retry", 503)
    before = pair.state()["sinks"][SINK]
    pair.dispatch()
    assert pair.state()["sinks"][SINK]["deliveredCount"] == before["deliveredCount"] == 2


@pytest.mark.parametrize("kind", ["alertmanager", "pagerduty_events"])
def test_a_login_page_has_taken_no_alert(kind: str) -> None:
    page = program.Answer(200, {"content-type": "text/html"}, b"<html>Log in</html>")
    verdict = program.ADAPTERS[kind].judge(page, NOW)
    assert (verdict.outcome, verdict.reason_code) == ("misconfigured", "http_error")


def test_a_payload_can_be_looked_at_without_sending_it(tmp_path: Path) -> None:
    env = clean_env(tmp_path, ALERT_FLEET_URLS=f"http://{HOST}:9", ALERT_FLEET_TOKEN=TOKEN)
    repo = Repo(tmp_path, env)
    repo.write_config(fleet_config(authTokenEnv="ALERT_FLEET_TOKEN"))
    repo.append(health_critical())
    run = repo.dispatch("--dry-run", "--show-payload")
    (sink,) = run.json["escalations"][0]["sinks"]

    assert sink["request"]["url"] == f"http://{HOST}:9/…"
    assert sink["request"]["body"][0]["labels"]["alertname"] == "health_critical"
    assert TOKEN not in run.stdout


# --- The example of the README

README = MODULE_FILE.with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("severity", "receiver"), [("critical", "on-call"), ("warning", "chat"), ("info", "chat")]
)
def test_the_example_config_works_and_pages_for_what_is_critical(
    tmp_path: Path, severity: str, receiver: str
) -> None:
    (example,) = re.findall(r"^```yaml\n(route:\n.*?)^```$", README, re.MULTILINE | re.DOTALL)
    config = tmp_path / "alertmanager.yml"
    config.write_text(example)
    amtool = needs_tool("amtool")
    check = subprocess.run([amtool, "check-config", config], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    routed = subprocess.run(
        [
            *(amtool, "config", "routes", "test", f"--config.file={config}"),
            *("alertname=health_critical", "source=ops-manager", f"severity={severity}"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert routed.stdout.strip() == receiver


@pytest.mark.first
def test_the_example_config_tells_people_what_they_need_to_know(tmp_path: Path, server: SinkServer) -> None:
    """The providers are on loopback, and half a minute is five seconds; all else is as it stands."""
    (example,) = re.findall(r"^```yaml\n(route:\n.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for place, secret in (("slack-webhook-url", f"{server.url}/chat"), ("pagerduty-routing-key", "k" * 32)):
        (tmp_path / place).write_text(secret)
    # Alertmanager sends the first of a group at once if it is older than group_wait.
    example = example.replace("/etc/alertmanager", str(tmp_path)).replace("group_wait: 30s", "group_wait: 5s")
    server.answer("/pager", accepted())
    alerts = alerts_of(
        *(health_degraded(loopId=loop, timestamp=timestamp()) for loop in ("first", "second", "third")),
        health_critical(loopId="first", timestamp=timestamp()),
        sent=time.time(),
    )
    alerts[-1]["labels"]["severity"] = "critical"
    with new_node(tmp_path / "node", server.url) as node:
        node.config = f"global:\n  pagerduty_url: {server.url}/pager\n{example}"
        node.start()
        assert node.post(json.dumps(alerts).encode()) == (200, "")
        (event,) = server.wait_for(1, "/pager")
        (message,) = server.wait_for(1, "/chat")

    assert event.json["payload"]["summary"] == "health_critical in shop: first"
    (attachment,) = message.json["attachments"]
    assert attachment["title"] == "[firing] health_degraded in shop: 2"
    # That the first loop is degraded is no news beside its critical state.
    assert re.findall(r"on (\w+): transport_unreachable", attachment["text"]) == ["second", "third"]


def test_the_example_of_the_sink_is_valid_and_has_every_key(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```json\n(\"fleet\".*?)^```$", README, re.MULTILINE | re.DOTALL)
    config = {**fleet_config(), "sinks": json.loads(f"{{{example}}}")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prefix = "OPS_MANAGER_ALERT_ALERTMANAGER"
    env = {f"{prefix}_URLS": PEERS, f"{prefix}_TOKEN": TOKEN}
    (sink,) = program.load_config(str(tmp_path / "config.json"), env).sinks.values()

    schema = json.loads(Path(program.SCHEMA_FILE).read_text("utf-8"))["$defs"]
    common = schema["webhook"]["properties"].keys() - {"urlEnv", "authTokenEnv"}
    assert sink.settings.keys() >= schema["alertmanager"]["properties"].keys() - common
