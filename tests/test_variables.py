"""Where secrets come from (variables, files, headers), routes by pattern, who may write a config."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, Repo
from escalations import CHAT, HOOK, HOOK_TOKEN, MARK, PATHS, health_critical, sink_config, sink_env
from leaks import leaked
from loopback import SinkServer, echo

import ops_alert_dispatch as program

Config = dict[str, Any]


def load(folder: Path, config: Config, **environ: str | None) -> program.Config:
    """Load a config in the environment of `sink_env`, changed so; None unsets a variable."""
    path = folder / "ops-manager-alert-sinks.v1.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    path.chmod(0o600)
    found = {**sink_env("https://sink.example.org"), **environ}
    return program.load_config(str(path), {name: value for name, value in found.items() if value is not None})


def faults_of(folder: Path, config: Config, **environ: str | None) -> list[str]:
    with pytest.raises(program.ConfigError) as raised:
        load(folder, config, **environ)
    assert not leaked(str(raised.value))
    return list(raised.value.faults)


# --- Secrets from files


def secret_file(folder: Path, content: str | bytes) -> str:
    # The name begins as that of what a test may write itself: it holds a secret.
    path = folder / "secrets.env.token"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("unset", [None, ""])
def test_a_secret_that_a_container_gets_as_a_file_is_sent_and_masked(
    repo: Repo, server: SinkServer, tmp_path: Path, end: str, unset: str | None
) -> None:
    del repo.env["ALERT_HOOK_TOKEN"]
    env = {"ALERT_HOOK_TOKEN_FILE": secret_file(tmp_path, HOOK_TOKEN + end)}
    if unset is not None:
        env["ALERT_HOOK_TOKEN"] = unset
    server.answer(PATHS[HOOK], echo(503))
    repo.append(health_critical())
    repo.dispatch(env=env)

    assert server.received(PATHS[HOOK])[0].headers["authorization"] == f"Bearer {HOOK_TOKEN}"
    (row,) = [row for row in repo.attempts() if row["sinkId"] == HOOK][:1]
    assert program.MASK in row["message"]
    told = repo.run("config", "--config-file", str(repo.config_file), env=env).json
    assert told["envStatus"]["ALERT_HOOK_TOKEN"] == {"present": True}


def test_a_variable_wins_over_its_file(tmp_path: Path) -> None:
    config = load(tmp_path, sink_config(), ALERT_HOOK_TOKEN_FILE="/nowhere")

    assert config.sinks[HOOK].secrets["authTokenEnv"] == HOOK_TOKEN


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"x" * 70_000, "is larger than 65536 bytes"),
        ("folder", "cannot be read: Is a directory"),
        ("pipe", "cannot be read: not a regular file"),
        ("a\0b", "cannot be read"),
        # The checks of a variable.
        (f"{MARK}\n\n".encode(), "line break"),
        (f"{MARK}\r\n".encode(), "line break"),
        (b"\xff\xfe", "cannot be sent"),
    ],
)
def test_a_file_of_a_secret_that_cannot_be_used_is_a_fault_with_its_place(
    tmp_path: Path, content: bytes | str | None, word: str
) -> None:
    path = str(tmp_path / f"no-{MARK}")
    if isinstance(content, bytes):
        path = secret_file(tmp_path, content)
    elif content == "folder":
        path = str(tmp_path)
    elif content == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
    elif content is not None:
        path = content
    (fault,) = faults_of(tmp_path, sink_config(), ALERT_HOOK_TOKEN=None, ALERT_HOOK_TOKEN_FILE=path)

    assert fault.startswith("$.sinks['team-hook'].authTokenEnv: ")
    assert "ALERT_HOOK_TOKEN" in fault
    assert word in fault
    assert path not in fault


def test_the_file_of_a_disabled_sinks_secret_stops_nothing(tmp_path: Path) -> None:
    config = sink_config()
    config["sinks"][CHAT]["enabled"] = False
    loaded = load(tmp_path, config, ALERT_CHAT_URL=None, ALERT_CHAT_URL_FILE="/nowhere")

    assert loaded.env_status()["ALERT_CHAT_URL"] == {"present": False}


def test_the_hosts_of_a_cluster_stay_readable_in_what_its_peers_say(tmp_path: Path) -> None:
    urls = f"http://127.0.0.1:9093/{MARK}-one,http://127.0.0.2:9093/{MARK}-two"
    config = with_sink(type="alertmanager")
    redactor = load(tmp_path, config, ALERT_HOOK_URL=urls).redactor

    assert redactor.mask("127.0.0.2:9093 refused the connection") == "127.0.0.2:9093 refused the connection"
    assert not leaked(redactor.mask(f"no {MARK}-one, no {MARK}-two"))


# --- Secret headers


def with_sink(**settings: Any) -> Config:
    return {
        "schemaVersion": "v1",
        "defaultMinSeverity": "info",
        "sinks": {HOOK: {"enabled": True, "type": "webhook", "urlEnv": "ALERT_HOOK_URL", **settings}},
        "routing": {"defaultSinks": [HOOK]},
    }


KEY = f"apikey {MARK}-7a1b"


@pytest.mark.parametrize("kind", ["webhook", "alertmanager"])
def test_a_secret_header_is_sent_and_never_shown(repo: Repo, server: SinkServer, kind: str) -> None:
    headers = {"headers": {"X-Scope-OrgID": "team-a"}, "headersEnv": {"X-Api-Key": "ALERT_API_KEY"}}
    repo.write_config(with_sink(type=kind, **headers))
    repo.append(health_critical())
    server.answer("/", echo(503))
    shown = repo.dispatch("--dry-run", "--show-payload", env={"ALERT_API_KEY": KEY})
    repo.dispatch(env={"ALERT_API_KEY": KEY})

    request = server.requests[0]
    assert (request.headers["x-api-key"], request.headers["x-scope-orgid"]) == (KEY, "team-a")
    assert request.headers["content-type"] == "application/json"
    assert "X-Api-Key" in shown.stdout
    told = repo.run("config", "--config-file", str(repo.config_file), env={"ALERT_API_KEY": KEY}).json
    assert told["envStatus"]["ALERT_API_KEY"] == {"present": True}
    assert told["sinks"][0]["secretRefs"]["headersEnv.X-Api-Key"] == "ALERT_API_KEY"
    unset = repo.dispatch()
    assert unset.exit_code == 3
    assert (
        "$.sinks['team-hook'].headersEnv['X-Api-Key']: enabled sink secret env var(s) are unset"
        in unset.stderr
    )


@pytest.mark.parametrize("kind", ["webhook", "alertmanager"])
@pytest.mark.parametrize(
    ("settings", "path", "word"),
    [
        ({"headersEnv": {"X Team": "ALERT_API_KEY"}}, ".headersEnv", "RFC 9110"),
        ({"headersEnv": {"X-Key": "not a name"}}, ".headersEnv['X-Key']", "name of an environment variable"),
        ({"headersEnv": {"X-Key": 3}}, ".headersEnv['X-Key']", "a string"),
        ({"headersEnv": ["ALERT_API_KEY"]}, ".headersEnv", "an object"),
        ({"headersEnv": {"Host": "ALERT_API_KEY"}}, ".headersEnv.Host", "by the program alone"),
        (
            {"headersEnv": {"webhook-id": "ALERT_API_KEY"}},
            ".headersEnv['webhook-id']",
            "by the program alone",
        ),
        (
            {"headersEnv": {"Content-Type": "ALERT_API_KEY"}},
            ".headersEnv['Content-Type']",
            "application/json",
        ),
        (
            {"headers": {"X-Team": "a"}, "headersEnv": {"x-team": "ALERT_API_KEY"}},
            ".headersEnv['x-team']",
            "twice",
        ),
        (
            {"authTokenEnv": "ALERT_HOOK_TOKEN", "headersEnv": {"Authorization": "ALERT_API_KEY"}},
            ".headersEnv.Authorization",
            "authTokenEnv",
        ),
        ({"headers": {"X-Api-Key": "x"}}, ".headers['X-Api-Key']", "headersEnv"),
        ({"headers": {"X-Team": "a\n"}}, ".headers['X-Team']", "RFC 9110"),
    ],
)
def test_a_header_that_cannot_be_sent_is_a_fault_with_its_place(
    tmp_path: Path, kind: str, settings: Config, path: str, word: str
) -> None:
    (fault,) = faults_of(tmp_path, with_sink(type=kind, **settings), ALERT_API_KEY=KEY)

    assert fault.startswith(f"$.sinks['team-hook']{path}: ")
    assert word in fault


@pytest.mark.parametrize("value", ["a\r\nX-Evil: b", "a\n", " a", "a\t", "\u00e9", "a\0"])
def test_the_value_of_a_secret_header_breaks_no_request(tmp_path: Path, value: str) -> None:
    config = with_sink(headersEnv={"X-Api-Key": "ALERT_API_KEY"})
    (fault,) = faults_of(tmp_path, config, ALERT_API_KEY=MARK + value if value[0] != " " else value)

    assert "a header cannot hold" in fault


# --- Quotes


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_secret_in_quotes_gets_a_hint(repo: Repo, quote: str) -> None:
    env = {"ALERT_HOOK_TOKEN": f"{quote}{HOOK_TOKEN}{quote}"}
    place = "$.sinks['team-hook'].authTokenEnv: the value of ALERT_HOOK_TOKEN stands in quotes"
    for command in (["config", "--config-file", str(repo.config_file)], ["test"]):
        assert any(place in hint for hint in repo.run(*command, env=env).json["warnings"])
        shown = repo.run(*command, "--format", "text", env=env).stdout
        assert place in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALERT_HOOK_URL", "https://sink.example.org/"), ("ALERT_CHAT_URL", "https://a.example/")],
)
def test_a_url_in_quotes_is_a_fault_that_names_the_quotes(tmp_path: Path, name: str, value: str) -> None:
    (fault,) = faults_of(tmp_path, sink_config(), **{name: f'"{value}"'})

    assert "stands in quotes" in fault


# --- Routes by pattern


def routed(*routes: Config, **severities: str) -> Config:
    config = sink_config(everywhere=True)
    config["routing"] = {"defaultSinks": [HOOK], "routes": list(routes), "categorySeverity": severities}
    return config


@pytest.mark.parametrize(
    ("category", "index"),
    [
        ("health_critical", 1),
        ("health_", 0),
        ("health_degraded", 0),
        ("health", None),
        ("a_health_b", None),
        ("disk_full", 2),
        ("Disk_full", None),
        ("off_x", None),
        ("health_*", 0),
        ("mid*dle", 5),
        ("middle", None),
    ],
)
def test_a_pattern_covers_categories_that_have_no_route_of_their_own(
    tmp_path: Path, category: str, index: int | None
) -> None:
    routes: list[Config] = [
        {"category": "health_*", "minSeverity": "info"},
        {"category": "health_critical", "minSeverity": "critical"},
        {"category": "disk_*", "minSeverity": "warning"},
        {"category": "disk_f*", "minSeverity": "critical"},
        {"category": "off_*", "enabled": False},
        {"category": "mid*dle", "minSeverity": "critical"},
    ]
    found = program.Router(load(tmp_path, routed(*routes))).resolve(category, None)

    assert found.route["matched"] is (index is not None)
    route: Config = {} if index is None else routes[index]
    assert found.min_severity == route.get("minSeverity", sink_config(everywhere=True)["defaultMinSeverity"])
    assert found.route["category"] == category
    pattern = route["category"] if index in (0, 2) and category != "health_*" else None
    assert found.route.get("pattern") == pattern


@pytest.mark.parametrize(
    ("categories", "never"),
    [
        (["a", "a"], [1]),
        (["a*", "ab*", "abc"], [1]),
        (["ab*", "a*"], []),
        (["*", "x*", "*"], [1, 2]),
        ([" a", "b ", "c *", " d*"], [0, 1, 3]),
        (["a*b", "a*b*"], [0, 1]),
        (["health_*", "health_critical"], []),
    ],
)
def test_a_route_that_can_match_nothing_is_warned_of(
    tmp_path: Path, categories: list[str], never: list[int]
) -> None:
    config = routed(*({"category": category} for category in categories))
    warnings = [text for text in program.config_warnings(load(tmp_path, config)) if "never used" in text]

    assert [text.partition(":")[0] for text in warnings] == [f"$.routing.routes[{index}]" for index in never]


def test_a_severity_for_a_pattern_is_warned_of(tmp_path: Path) -> None:
    warnings = program.config_warnings(load(tmp_path, routed(**{"health_*": "critical"})))

    assert any(text.startswith("$.routing.categorySeverity['health_*']: never used") for text in warnings)


# --- Who can write


def test_a_config_on_a_read_only_mount_is_taken_whatever_its_mode_says(tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: 0777, and nobody can write."""
    folder = tmp_path / "configmap"
    folder.mkdir(mode=0o777)
    path = folder / "ops-manager-alert-sinks.v1.json"
    path.write_text(json.dumps(sink_config()), encoding="utf-8")
    folder.chmod(0o777)
    path.chmod(0o666)
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    inner = ["unshare", "-rm", "bash", "-c", script, "bash", str(folder)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inner, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody mount")
    config = [*COMMAND, "config", "--config-file", str(path)]
    where = {
        "cwd": Path(program.__file__).parent,
        "env": {**os.environ, **sink_env("https://sink.example.org")},
    }
    writable = subprocess.run(config, check=False, capture_output=True, text=True, **where)  # type: ignore[call-overload]
    mounted = subprocess.run([*inner, *config], check=False, capture_output=True, text=True, **where)  # type: ignore[call-overload]

    assert (writable.returncode, writable.stderr.count("chmod o-w")) == (3, 2)
    assert (mounted.returncode, mounted.stderr) == (0, "")


# --- One list of sink types


def test_schema_adapters_and_readme_know_the_same_sink_types_and_variables() -> None:
    schema = json.loads(Path(program.SCHEMA_FILE).read_bytes())
    sink = schema["$defs"]["sink"]
    types = set(program.ADAPTERS)

    assert set(sink["properties"]["type"]["enum"]) == types
    assert {
        branch["if"]["properties"]["type"]["const"]: branch["then"]["$ref"] for branch in sink["allOf"]
    } == {kind: f"#/$defs/{kind}" for kind in types}
    readme = Path(program.__file__).with_name("README.md").read_text(encoding="utf-8")
    received = readme[readme.index("| type | body | escalationId |") :].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", received, re.MULTILINE)) == types
    # Each key that names a variable says what that holds, and the URL of each type is one of them.
    keys = {
        key
        for kind in (*types, "common")
        for key in schema["$defs"][kind]["properties"]
        if key.endswith("Env")
    }
    assert keys == set(program.VARIABLE_KEYS)
    for kind, adapter in program.ADAPTERS.items():
        assert adapter.url_key in schema["$defs"][kind]["properties"]
        assert program.VARIABLE_KEYS[adapter.url_key] == "url"
        is_cluster = type(adapter).peers is not program.Adapter.peers
        assert is_cluster == (kind in program.CLUSTER_TYPES)


def test_each_pattern_of_the_schema_says_what_it_wants() -> None:
    waiting, patterns = [json.loads(Path(program.SCHEMA_FILE).read_bytes())], 0
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict) and "pattern" in part:
            assert part["patternErrorMessage"]
            patterns += 1
    assert patterns
