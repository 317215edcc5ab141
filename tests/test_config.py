"""The sink config: the resolver command, routing and severities, and faults that an operator can correct."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Repo, Run
from escalations import (
    CHAT,
    HOOK,
    MAKERS,
    PAGER,
    ROUTED,
    SECRET_ENV,
    SECRETS,
    SINK_TYPES,
    health_critical,
    sink_config,
)
from hypothesis import given
from hypothesis import strategies as st
from zygote import lose_the_source

import ops_alert_dispatch

Config = dict[str, Any]


def config_of(repo: Repo, *options: str, env: dict[str, str] | None = None) -> Run:
    return repo.run("config", "--config-file", str(repo.config_file), *options, env=env)


# --- The resolver, in the place of the host's own


def test_the_resolver_describes_the_whole_config(repo: Repo) -> None:
    run = config_of(repo)
    told = run.json

    assert run.stderr == ""
    assert run.stdout.count("\n") == 1
    assert set(told) >= {
        "schemaVersion",
        "sourceFile",
        "defaultMinSeverity",
        "sinks",
        "enabledSinkCount",
        "routing",
        "envStatus",
        "validation",
    }
    assert told["schemaVersion"] == "v1"
    assert told["sourceFile"] == str(repo.config_file)
    assert told["defaultMinSeverity"] == "warning"
    assert [{**sink, "secretRefs": sorted(sink["secretRefs"].values())} for sink in told["sinks"]] == [
        {
            "id": HOOK,
            "enabled": True,
            "type": "webhook",
            "timeoutSeconds": 10,
            "secretRefs": ["ALERT_HOOK_TOKEN", "ALERT_HOOK_URL"],
        },
        {
            "id": CHAT,
            "enabled": True,
            "type": "slack",
            "timeoutSeconds": 10,
            "secretRefs": ["ALERT_CHAT_URL"],
        },
        {
            "id": PAGER,
            "enabled": True,
            "type": "pagerduty_events",
            "timeoutSeconds": 10,
            "secretRefs": ["ALERT_PAGER_KEY", "ALERT_PAGER_URL"],
        },
    ]
    assert set(told["sinks"][0]["secretRefs"]) == {"urlEnv", "authTokenEnv"}
    assert told["enabledSinkCount"] == 3
    assert told["routing"]["defaultSinks"] == [HOOK]
    assert told["envStatus"] == {name: {"present": True} for name in SECRET_ENV}
    assert told["validation"] == {"envCheckEnabled": True}


@pytest.mark.parametrize("category", MAKERS)
def test_the_resolver_tells_where_a_category_goes(repo: Repo, category: str) -> None:
    told = config_of(repo, "--category", category).json

    assert set(told) >= {
        "schemaVersion",
        "sourceFile",
        "category",
        "eventSeverity",
        "minSeverity",
        "shouldDispatch",
        "route",
        "selectedSinks",
        "dispatchableSinks",
        "envStatus",
        "validation",
    }
    assert (told["schemaVersion"], told["sourceFile"]) == ("v1", str(repo.config_file))
    assert told["category"] == category
    assert told["shouldDispatch"] is True
    assert [sink["id"] for sink in told["selectedSinks"]] == ROUTED[category]
    assert told["dispatchableSinks"] == told["selectedSinks"]
    for sink in told["selectedSinks"]:
        assert set(sink) == {"id", "type", "enabled", "timeoutSeconds", "secretRefs", "config"}
        assert sink["type"] == SINK_TYPES[sink["id"]]
    # The one category without a severity of its own gets the threshold.
    assert ("categoryMappedSeverity" in told) is (category != "ordering_drift_detected")
    assert told["eventSeverity"] == told.get("categoryMappedSeverity", told["minSeverity"])


def test_a_severity_below_the_threshold_is_not_dispatched(repo: Repo) -> None:
    told = config_of(repo, "--category", "health_critical", "--severity", "warning").json

    assert (told["eventSeverity"], told["minSeverity"], told["shouldDispatch"]) == (
        "warning",
        "critical",
        False,
    )
    assert told["categoryMappedSeverity"] == "critical"
    assert [sink["id"] for sink in told["selectedSinks"]] == ROUTED["health_critical"]
    assert told["dispatchableSinks"] == []


def test_a_disabled_sink_is_selected_but_not_dispatchable(repo: Repo) -> None:
    config = sink_config()
    config["sinks"][CHAT]["enabled"] = False
    repo.write_config(config)
    told = config_of(repo, "--category", "health_critical").json

    assert [sink["id"] for sink in told["selectedSinks"]] == [PAGER, CHAT, HOOK]
    assert [sink["id"] for sink in told["dispatchableSinks"]] == [PAGER, HOOK]
    assert config_of(repo).json["enabledSinkCount"] == 2


def test_the_resolver_lists_sinks_for_a_shell(repo: Repo) -> None:
    config = sink_config()
    config["sinks"][PAGER]["enabled"] = False
    repo.write_config(config)
    run = config_of(repo, "--list-sinks")

    assert run.exit_code == 0
    assert run.stdout.splitlines() == [
        f"{HOOK}\twebhook\ttrue",
        f"{CHAT}\tslack\ttrue",
        f"{PAGER}\tpagerduty_events\tfalse",
    ]


def test_the_resolver_indents_when_asked(repo: Repo) -> None:
    run = config_of(repo, "--pretty")
    assert run.json == config_of(repo).json
    assert run.stdout.startswith("{\n  ")


def test_the_config_file_comes_from_the_option_then_from_the_host_then_from_the_repo(
    repo: Repo, tmp_path: Path
) -> None:
    other = repo.root / "other.json"
    config = sink_config()
    config["defaultMinSeverity"] = "info"
    other.write_text(json.dumps(config), encoding="utf-8")
    env = {"OPS_MANAGER_ALERT_SINKS_FILE": str(other)}

    assert config_of(repo, env=env).json["defaultMinSeverity"] == "warning"
    assert repo.run("config", "--repo", str(repo.root), env=env).json["defaultMinSeverity"] == "info"
    elsewhere = replace(repo, root=tmp_path / "elsewhere")
    elsewhere.root.mkdir()
    assert elsewhere.run("config", "--repo", str(repo.root)).json["defaultMinSeverity"] == "warning"
    assert elsewhere.run("config").exit_code == 3


def test_unset_secrets_are_named_and_never_shown(repo: Repo) -> None:
    run = config_of(repo, env={"ALERT_CHAT_URL": "", "ALERT_PAGER_KEY": ""})

    assert (run.exit_code, run.stdout) == (3, "")
    assert "enabled sink secret env var(s) are unset: ALERT_CHAT_URL ALERT_PAGER_KEY" in run.stderr
    assert not [secret for secret in SECRETS if secret in run.stderr]
    assert run.stderr.splitlines()[-1] == (
        "  what to do: set each where reconcile runs, and here to try it (export ALERT_CHAT_URL=…), "
        'or set "enabled": false on the sink'
    )


@pytest.mark.parametrize("value", ["127.0.0.1:8080/hook", "localhost:8080", "ftp://127.0.0.1/hook"])
def test_a_local_url_without_its_scheme_is_told_that_http_is_enough(repo: Repo, value: str) -> None:
    run = config_of(repo, env={"ALERT_HOOK_URL": value})
    assert run.exit_code == 3
    assert "set it to https://… (http://… if the receiver is on this machine)" in run.stderr


def test_each_unset_secret_has_a_line_of_its_own_with_its_place(repo: Repo) -> None:
    config = sink_config()
    config["sinks"]["twin"] = {**config["sinks"][CHAT]}
    repo.write_config(config)
    run = config_of(repo, env={"ALERT_CHAT_URL": "", "ALERT_HOOK_URL": ""})
    faults = {fault.strip() for fault in run.stderr.splitlines()[1:]}
    twins = f"$.sinks.twin.webhookUrlEnv, $.sinks['{CHAT}'].webhookUrlEnv"
    assert {fault for fault in faults if fault.startswith("$")} == {
        "$.sinks: enabled sink secret env var(s) are unset: ALERT_CHAT_URL ALERT_HOOK_URL",
        f"{twins}: ALERT_CHAT_URL is unset or empty; set it",
        f"$.sinks['{HOOK}'].urlEnv: ALERT_HOOK_URL is unset or empty; set it",
    }


def test_a_fault_names_the_known_words_once(repo: Repo) -> None:
    config = sink_config()
    config["defaultMinSeverity"] = "loud"
    config["sinks"][CHAT]["type"] = "slak"
    wrong_type, wrong_severity = sorted(faults_of(config), key=lambda fault: "loud" in fault)
    assert wrong_severity == (
        '$.defaultMinSeverity: "loud" is not one of info, warning, critical; set it to one of them'
    )
    assert wrong_type.endswith("did you mean 'slack'?")


@pytest.mark.parametrize("type_of_it", [{}, {"type": "slak"}], ids=["missing", "unknown"])
def test_the_other_faults_of_a_sink_whose_type_is_wrong_are_told_at_once(type_of_it: dict[str, str]) -> None:
    config = sink_config()
    config["sinks"][CHAT] = {**type_of_it, "enabled": "yes", "timeoutSeconds": 999, "webhookUrlEnv": "URL"}
    places = {fault.partition(":")[0] for fault in faults_of(config)}

    assert places == {f"$.sinks['{CHAT}'].{key}" for key in ("type", "enabled", "timeoutSeconds")}


def test_the_resolver_shows_no_secret(repo: Repo) -> None:
    for options in ([], ["--category", "health_critical"], ["--list-sinks"]):
        run = config_of(repo, *options)
        assert run.exit_code == 0
        assert not [secret for secret in SECRETS if secret in run.stdout + run.stderr]


def test_without_the_env_check_unset_secrets_are_no_fault(repo: Repo) -> None:
    told = config_of(repo, "--no-env-check", env={"ALERT_CHAT_URL": ""}).json

    assert told["validation"] == {"envCheckEnabled": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--severity", "critical"], "--severity requires --category"),
        (["--list-sinks", "--category", "health_critical"], "--category"),
        (["--category", "health_critical", "--severity", "loudest"], "loudest"),
    ],
)
def test_options_that_make_no_sense_together_are_a_usage_error(
    repo: Repo, options: list[str], message: str
) -> None:
    run = config_of(repo, *options)

    assert (run.exit_code, run.stdout) == (2, "")
    assert message in run.stderr


def test_the_resolver_works_without_touching_anything(repo: Repo) -> None:
    before = repo.snapshot()
    config_of(repo)
    config_of(repo, "--category", "health_critical")
    assert repo.snapshot() == before


# --- Faults


def load(config: Any, environ: Mapping[str, str] | None = None) -> ops_alert_dispatch.Config:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(config if isinstance(config, str) else json.dumps(config))
        file.flush()
        return ops_alert_dispatch.load_config(file.name, environ or {}, check_env=environ is not None)


def faults_of(config: Any) -> list[str]:
    """The faults of a config where every secret is set; [] where it has none."""
    try:
        load(config, dict.fromkeys(SECRET_ENV, "https://sink.example.org/"))
    except ops_alert_dispatch.ConfigError as error:
        return list(error.faults)
    return []


def set_at(*path: str | int, to: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        target: Any = config
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return change


def drop_at(*path: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        target: Any = config
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


# A change, the key at fault, and a word that tells what is wrong with it.
FAULTS: list[tuple[Callable[[Config], None], str, str]] = [
    (set_at("schemaVersion", to="v2"), "$.schemaVersion", "v1"),
    (drop_at("schemaVersion"), "$", "schemaVersion"),
    (drop_at("sinks"), "$", "sinks"),
    (drop_at("routing"), "$", "routing"),
    (set_at("defaultMinSeverity", to="loud"), "$.defaultMinSeverity", "loud"),
    (set_at("sinks", to={}), "$.sinks", ""),
    (set_at("sinks", to=[]), "$.sinks", "object"),
    (set_at("sinks", HOOK, to=3), HOOK, "object"),
    (set_at("sinks", HOOK, "type", to="pigeon"), HOOK, "pigeon"),
    (drop_at("sinks", HOOK, "type"), HOOK, "type"),
    (drop_at("sinks", HOOK, "enabled"), HOOK, "enabled"),
    (set_at("sinks", HOOK, "enabled", to="yes"), HOOK, "boolean"),
    (drop_at("sinks", HOOK, "urlEnv"), HOOK, "urlEnv"),
    (drop_at("sinks", CHAT, "webhookUrlEnv"), CHAT, "webhookUrlEnv"),
    (drop_at("sinks", PAGER, "routingKeyEnv"), PAGER, "routingKeyEnv"),
    (set_at("sinks", HOOK, "urlEnv", to="not-a-name"), HOOK, "urlEnv"),
    (set_at("sinks", HOOK, "urlEnv", to="https://example.org/x"), HOOK, "urlEnv"),
    (set_at("sinks", HOOK, "urlEnv", to="ALERT_HOOK_URL\n"), HOOK, "urlEnv"),
    (set_at("sinks", HOOK, "timeoutSeconds", to=0), HOOK, "timeoutSeconds"),
    (set_at("sinks", HOOK, "timeoutSeconds", to=121), HOOK, "120"),
    # With 0 nothing would ever be sent.
    (set_at("delivery", to={"giveUpAfterSeconds": 0}), "$.delivery.giveUpAfterSeconds", "use 1 to"),
    (set_at("sinks", HOOK, "timeoutSeconds", to="5"), HOOK, "number"),
    (set_at("sinks", HOOK, "timeoutSeconds", to=True), HOOK, "timeoutSeconds"),
    (set_at("sinks", HOOK, "minSeverity", to="loud"), HOOK, "loud"),
    (set_at("sinks", HOOK, "headers", to={"X": 3}), HOOK, "X"),
    (set_at("sinks", "a sink", to={"enabled": False, "type": "webhook", "urlEnv": "U"}), "a sink", ""),
    (set_at("sinks", "a\n", to={"enabled": False, "type": "webhook", "urlEnv": "U"}), "$.sinks", ""),
    (set_at("routing", "defaultSinks", to=["nobody"]), "$.routing.defaultSinks[0]", "nobody"),
    (set_at("routing", "defaultSinks", to="team-hook"), "$.routing.defaultSinks", "array"),
    (set_at("routing", "routes", 0, "sinks", to=[HOOK, "nobody"]), "$.routing.routes[0].sinks[1]", "nobody"),
    (set_at("routing", "routes", 1, "category", to=""), "$.routing.routes[1].category", ""),
    (set_at("routing", "routes", 1, "minSeverity", to="loud"), "$.routing.routes[1].minSeverity", "loud"),
    (set_at("routing", "categorySeverity", "health_degraded", to=2), "categorySeverity", "2"),
]


@pytest.mark.parametrize(("change", "path", "word"), FAULTS)
def test_a_fault_is_told_with_its_path(change: Callable[[Config], None], path: str, word: str) -> None:
    config = sink_config()
    change(config)
    faults = faults_of(config)

    assert len(faults) == 1, faults
    assert faults[0].startswith("$")
    assert path in faults[0]
    assert word in faults[0]


def test_the_faults_of_a_config_are_shown_although_the_source_cannot_be_read_any_more(repo: Repo) -> None:
    repo.append(health_critical())
    repo.write_config("{}")
    run = replace(repo, prepare=lose_the_source).dispatch()

    assert (run.exit_code, "schemaVersion" in run.stderr) == (3, True)


def test_all_faults_are_told_at_once_sorted_by_path(repo: Repo) -> None:
    config = sink_config()
    set_at("schemaVersion", to="v9")(config)
    set_at("sinks", PAGER, "timeoutSeconds", to=0)(config)
    set_at("sinks", CHAT, "enabled", to="no")(config)
    set_at("routing", "routes", 2, "sinks", to=["nobody"])(config)
    set_at("routing", "defaultSinks", to=["someone"])(config)
    repo.write_config(config)
    run = config_of(repo, env={"ALERT_HOOK_TOKEN": ""})

    assert (run.exit_code, run.stdout) == (3, "")
    assert run.stderr.startswith("error: ")
    faults = run.stderr.splitlines()[1:]
    for word in ("v9", PAGER, CHAT, "nobody", "someone", "ALERT_HOOK_TOKEN"):
        named = [fault for fault in faults if "$" in fault and word in fault.split("; ")[0]]
        assert len(named) == 1, (word, run.stderr)
    paths = [fault.split(":", 1)[0].strip(" -") for fault in faults if "$" in fault]
    assert paths == sorted(paths)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        (("defaultMinSeverty",), "defaultMinSeverity"),
        (("sinks", HOOK, "urlenv"), "urlEnv"),
        (("sinks", HOOK, "auth_token_env"), "authTokenEnv"),
        (("sinks", CHAT, "iconemoji"), "iconEmoji"),
        (("sinks", PAGER, "routingkeyEnv"), "routingKeyEnv"),
        (("routing", "defaultsinks"), "defaultSinks"),
        (("routing", "routes", 0, "minseverity"), "minSeverity"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(path: tuple[str | int, ...], known: str) -> None:
    config = sink_config()
    set_at(*path, to="warning")(config)
    (fault,) = faults_of(config)

    assert str(path[-1]) in fault
    assert f"did you mean {known!r}?" in fault


def test_a_key_of_another_sink_type_is_unknown() -> None:
    config = sink_config()
    config["sinks"][HOOK]["channel"] = "#x"
    (fault,) = faults_of(config)

    assert "channel" in fault


def test_notes_are_free_everywhere(repo: Repo) -> None:
    config = sink_config()
    places: list[dict[str, Any]] = [config, config["routing"], config["routing"]["routes"][0]]
    places += config["sinks"].values()
    for place in places:
        place["description"] = "who to ask: the night watch"
        place["x-owner"] = {"team": ["night", "watch"]}
    repo.write_config(config)

    assert config_of(repo).json["enabledSinkCount"] == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"schemaVersion": "v1",}', '"v1"', "\x00", '{"a": NaN}', "[" * 5000]
)
def test_a_file_that_is_no_config_is_told_by_name(repo: Repo, text: str) -> None:
    repo.write_config(text)
    run = config_of(repo)

    assert (run.exit_code, run.stdout) == (3, "")
    assert str(repo.config_file) in run.stderr
    assert "Traceback" not in run.stderr


def test_a_key_given_twice_is_a_fault(repo: Repo) -> None:
    """JSON readers take the last one, so the first would be lost in silence."""
    text = json.dumps(sink_config()).replace('"enabled": true', '"enabled": false, "enabled": true', 1)
    repo.write_config(text)
    run = config_of(repo)

    assert run.exit_code == 3
    assert "enabled" in run.stderr


def test_a_minimal_config_is_enough(repo: Repo) -> None:
    repo.write_config(
        {
            "schemaVersion": "v1",
            "defaultMinSeverity": "info",
            "sinks": {"a": {"enabled": True, "type": "webhook", "urlEnv": "ALERT_HOOK_URL"}},
            "routing": {"defaultSinks": ["a"], "categorySeverity": {}, "routes": []},
        }
    )
    told = config_of(repo, "--category", "anything").json

    assert [sink["id"] for sink in told["dispatchableSinks"]] == ["a"]
    assert told["dispatchableSinks"][0]["timeoutSeconds"] == 5


# --- Routing and severities, as an operator asks for them


def test_the_higher_threshold_of_route_and_sink_counts(repo: Repo) -> None:
    config = sink_config()
    config["sinks"][CHAT]["minSeverity"] = "critical"
    config["sinks"][HOOK]["minSeverity"] = "info"
    repo.write_config(config)

    def dispatchable(severity: str) -> list[str]:
        told = config_of(repo, "--category", "divergence_detected", "--severity", severity).json
        return [sink["id"] for sink in told["dispatchableSinks"]]

    assert dispatchable("critical") == [CHAT, HOOK]
    assert dispatchable("warning") == [HOOK]
    assert dispatchable("info") == []


# --- The same as pure functions

SEVERITIES = ["info", "warning", "critical"]


@pytest.mark.parametrize(
    ("word", "severity"),
    [
        *((name, name) for name in SEVERITIES),
        ("Critical", "critical"),
        ("  WARNING\t", "warning"),
        *((word, "warning") for word in ("warn", "degraded", "Minor")),
        *((word, "critical") for word in ("crit", "error", "ERR", "fatal", "emergency", "alert", "high")),
        *((word, "info") for word in ("notice", "informational", "debug", "ok")),
        *((word, None) for word in ("", "  ", "catastrophic", "warnings!", "критично")),
        *((value, None) for value in (None, 1.5, True, [], ["critical"], {"severity": "critical"})),
    ],
)
def test_a_severity_is_understood_in_its_usual_spellings(word: Any, severity: str | None) -> None:
    assert ops_alert_dispatch.normalise_severity(word) == severity


@pytest.mark.parametrize(
    ("category", "severity", "event", "minimum", "goes_to"),
    [
        # category, the record's own severity; then event severity, threshold, where it goes
        ("health_critical", None, "critical", "critical", [PAGER, CHAT, HOOK]),
        ("health_critical", "critical", "critical", "critical", [PAGER, CHAT, HOOK]),
        ("health_critical", "warning", "warning", "critical", []),
        ("health_degraded", None, "warning", "warning", [CHAT]),
        ("health_degraded", "info", "info", "warning", []),
        ("health_degraded", "critical", "critical", "warning", [CHAT]),
        # No threshold of its own: the default one.
        ("divergence_detected", None, "warning", "warning", [CHAT, HOOK]),
        ("divergence_detected", "info", "info", "warning", []),
        # No sinks of its own: the default ones.
        ("profile_drift_detected", None, "info", "info", [HOOK]),
        # The only route is off; no severity of its own: the threshold.
        ("ordering_drift_detected", None, "warning", "warning", [HOOK]),
        ("ordering_drift_detected", "info", "info", "warning", []),
        ("never_seen", None, "warning", "warning", [HOOK]),
        # Equal means equal.
        ("Health_Critical", None, "warning", "warning", [HOOK]),
        ("health_critical ", None, "warning", "warning", [HOOK]),
    ],
)
def test_an_escalation_goes_where_the_routes_say(
    category: str, severity: str | None, event: str, minimum: str, goes_to: list[str]
) -> None:
    resolution = ops_alert_dispatch.Router(load(sink_config())).resolve(category, severity)

    assert (resolution.event_severity, resolution.min_severity) == (event, minimum)
    assert [sink.id for sink in resolution.dispatchable] == goes_to
    assert resolution.should_dispatch is bool(goes_to)


@pytest.mark.parametrize(
    ("first", "second", "goes_to"),
    [
        ({"sinks": [CHAT]}, {"sinks": [PAGER]}, [CHAT]),
        ({"sinks": [CHAT], "enabled": False}, {"sinks": [PAGER]}, [PAGER]),
        ({"sinks": [CHAT], "enabled": True}, {"sinks": [PAGER]}, [CHAT]),
        ({"sinks": []}, {"sinks": [PAGER]}, [HOOK]),
        ({}, {"sinks": [PAGER]}, [HOOK]),
        ({"enabled": False}, {"enabled": False}, [HOOK]),
        # Named twice is meant once.
        ({"sinks": [CHAT, PAGER, CHAT]}, {}, [CHAT, PAGER]),
    ],
)
def test_the_first_enabled_route_of_a_category_counts(
    first: Config, second: Config, goes_to: list[str]
) -> None:
    config = sink_config()
    config["routing"]["routes"] = [{"category": "full", **first}, {"category": "full", **second}]
    resolution = ops_alert_dispatch.Router(load(config)).resolve("full", None)

    assert [sink.id for sink in resolution.dispatchable] == goes_to


def expected_sinks(config: Config, category: str, severity: str | None) -> list[str]:
    """Where section 3 of the host's contract sends a record, written as plainly as it stands there."""
    routing = config["routing"]
    route = {}
    for candidate in reversed(routing.get("routes", [])):
        if candidate["category"] == category and candidate.get("enabled", True):
            route = candidate
    names = route.get("sinks") or routing["defaultSinks"]
    minimum = route.get("minSeverity") or config["defaultMinSeverity"]
    event = severity or routing.get("categorySeverity", {}).get(category) or minimum
    found = []
    for name in names:
        sink = config["sinks"][name]
        thresholds = [minimum, sink.get("minSeverity", "info")]
        reached = all(SEVERITIES.index(event) >= SEVERITIES.index(level) for level in thresholds)
        if sink["enabled"] and reached and name not in found:
            found.append(name)
    return found


categories = st.sampled_from(["a", "b", "c"])
severities = st.sampled_from(SEVERITIES)
sink_lists = st.lists(st.sampled_from(["s1", "s2", "s3"]), max_size=4)


def optional(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


configs = st.fixed_dictionaries(
    {
        "schemaVersion": st.just("v1"),
        "defaultMinSeverity": severities,
        "sinks": st.fixed_dictionaries(
            {
                name: st.builds(
                    lambda fixed, free: {**fixed, **free},
                    st.fixed_dictionaries(
                        {"type": st.just("webhook"), "urlEnv": st.just("U"), "enabled": st.booleans()}
                    ),
                    optional(minSeverity=severities),
                )
                for name in ("s1", "s2", "s3")
            }
        ),
        "routing": st.builds(
            lambda names, free: {"defaultSinks": names, **free},
            sink_lists,
            optional(
                categorySeverity=st.dictionaries(categories, severities),
                routes=st.lists(
                    st.builds(
                        lambda category, free: {"category": category, **free},
                        categories,
                        optional(sinks=sink_lists, minSeverity=severities, enabled=st.booleans()),
                    ),
                    max_size=4,
                ),
            ),
        ),
    }
)


@given(configs, categories, st.none() | severities)
def test_any_valid_config_routes_as_the_contract_says(
    config: Config, category: str, severity: str | None
) -> None:
    resolution = ops_alert_dispatch.Router(load(config)).resolve(category, severity)

    assert [sink.id for sink in resolution.dispatchable] == expected_sinks(config, category, severity)
    assert all(sink in resolution.selected for sink in resolution.dispatchable)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [place for key, child in children for place in [(*path, key), *places(child, (*path, key))]]


@given(st.sampled_from(places(sink_config())), json_values)
def test_whatever_stands_in_a_config_it_is_valid_or_its_faults_are_told(
    place: tuple[str | int, ...], value: Any
) -> None:
    config = copy.deepcopy(sink_config())
    set_at(*place, to=value)(config)
    for fault in faults_of(config):
        assert fault.startswith("$")
        assert ": " in fault
        assert fault.isprintable()


@pytest.mark.parametrize("place", ["timeoutSeconds", "activeForSeconds"])
@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_a_fault_and_not_the_end_of_every_pass(
    repo: Repo, place: str, word: str
) -> None:
    config = sink_config()
    config["sinks"][HOOK][place] = 17
    repo.write_config(json.dumps(config).replace(f'"{place}": 17', f'"{place}": {word}'))
    repo.append(MAKERS["health_critical"]())
    run = repo.dispatch()
    assert (run.exit_code, run.stdout) == (3, "")
    assert "fault of the program" not in run.stderr


def test_a_whole_number_is_one_however_it_is_written(repo: Repo) -> None:
    config = sink_config()
    config["delivery"] = {"maxAttemptsPerPass": 3.0}
    config["sinks"][HOOK]["timeoutSeconds"] = 10.0
    repo.write_config(config)
    repo.append(MAKERS["health_critical"]())
    assert repo.dispatch().json["status"] == "success"
    assert config_of(repo).json["sinks"][0]["timeoutSeconds"] == 10
