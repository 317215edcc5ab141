"""Each line of the promise "secrets stay secret, and nothing that others write can do harm"."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import RUN_TIMEOUT, Repo
from escalations import (
    CHAT,
    HOOK,
    HOOK_TOKEN,
    MARK,
    PAGER,
    PATHS,
    SECRETS,
    health_critical,
    lines,
    sink_config,
    sink_env,
)
from fuzz import CORPUS, TARGETS, harmless, seeds
from hypothesis import given
from hypothesis import strategies as st
from leaks import leaked
from loopback import HOST, TLS_PEM, Answer, SinkServer, closed_port, echo, error, huge

import ops_alert_dispatch as program

SEEDS = seeds()


def config_faults(config: dict[str, Any] | str, folder: Path, **environ: str) -> list[str]:
    """The faults of a config in the environment of `sink_env`, changed so; [] where it is valid."""
    path = folder / "ops-manager-alert-sinks.v1.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    path.chmod(0o600)
    try:
        program.load_config(str(path), {**sink_env("https://sink.example.org"), **environ})
    except program.ConfigError as fault:
        told = str(fault)
        faults = list(fault.faults)
    else:
        return []
    assert not leaked(told), told
    return faults


def hook_only(**settings: Any) -> dict[str, Any]:
    """A config whose only sink is a webhook, with these settings more."""
    config = sink_config(everywhere=True)
    config["sinks"] = {HOOK: {"enabled": True, "type": "webhook", "urlEnv": "ALERT_HOOK_URL", **settings}}
    config["routing"] = {"defaultSinks": [HOOK]}
    return config


# --- Where it may send


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://sink.example.org", None),
        ("https://sink.example.org:8443/a%20b?c=d#e", None),
        ("https://[2001:db8::1]:443/", None),
        ("https://user:p%40ss@sink.example.org/", None),
        ("http://127.0.0.1:8080/", None),
        ("http://127.8.9.10/", None),
        ("http://LOCALHOST/", None),
        ("http://[::1]:8080/", None),
        ("HTTPS://sink.example.org", None),
        ("http://sink.example.org/", "allowInsecureHttp"),
        ("http://127.0.0.1.example.org/", "allowInsecureHttp"),
        ("http://128.0.0.1/", "allowInsecureHttp"),
        ("http://127.0.0.256/", "allowInsecureHttp"),
        ("http://127.0.0.08/", "allowInsecureHttp"),
        ("http://127.1/", "allowInsecureHttp"),
        ("http://localhost.example.org/", "allowInsecureHttp"),
        ("http://0.0.0.0/", "allowInsecureHttp"),
        # Readers of URLs do not agree on which host these name.
        ("http://127.0.0.1\\@sink.example.org/", "host"),
        ("http://sink.example.org\\@127.0.0.1/", "host"),
        ("http://127.0.0.1@sink.example.org/", "allowInsecureHttp"),
        ("http://a@127.0.0.1@sink.example.org/", "host"),
        ("https://sink.example.org%2f@evil.example.org/", "without a password"),
        ("ftp://sink.example.org/", "not an https:// URL"),
        ("file:///etc/passwd", "not an https:// URL"),
        ("javascript:alert(1)", "not an https:// URL"),
        ("sink.example.org/hook", "not an https:// URL"),
        ("//sink.example.org/hook", "not an https:// URL"),
        ("https://", "without a host"),
        ("https:///hook", "without a host"),
        ("https://:443/hook", "without a host"),
        ("https://user:word@:443/hook", "without a host"),
        ("https://sink.example.org/a%zz", "%25"),
        ("https:sink.example.org", "not an https:// URL"),
        ("https://sink.example.org:port/", "host or port"),
        ("https://sink.example.org:65536/", "host or port"),
        ("https://sink.example.org:0/", "host or port"),
        ("https://[::1/", "host or port"),
        ("https://[::1::]/", "host or port"),
        ("https://[fe80::1%25eth0]/", "host or port"),
        ("https://a b.example.org/", "space"),
        ("https://sink.example.org/a b", "space"),
        ("https://sink.example.org/\nHost: evil", "line break"),
        ("https://sink.example.org/\r", "line break"),
        ("\thttps://sink.example.org/", "space"),
        ("https://sink.example.org/\0", "another character"),
        ("https://sünk.example.org/", "another character"),
    ],
)
def test_a_url_is_https_to_a_host_or_a_fault_that_does_not_show_it(
    tmp_path: Path, url: str, word: str | None
) -> None:
    config = sink_config()
    del config["sinks"][HOOK]["authTokenEnv"]
    names = ["ALERT_HOOK_URL", "ALERT_CHAT_URL", "ALERT_PAGER_URL"]
    faults = config_faults(config, tmp_path, **dict.fromkeys(names, url))

    if word is None:
        assert faults == []
        return
    assert len(faults) == len(names)
    for name in names:
        (fault,) = (told for told in faults if name in told)
        assert word in fault
        assert "example.org" not in fault
        assert "passwd" not in fault


@pytest.mark.parametrize("sink", [HOOK, CHAT, PAGER])
def test_plain_http_to_another_machine_needs_the_sinks_own_word(tmp_path: Path, sink: str) -> None:
    config = sink_config()
    url_key = "webhookUrlEnv" if sink == CHAT else "urlEnv"
    environ = {config["sinks"][sink][url_key]: "http://sink.example.org/hook"}

    assert "allowInsecureHttp" in config_faults(config, tmp_path, **environ)[0]
    config["sinks"][sink]["allowInsecureHttp"] = True
    assert config_faults(config, tmp_path, **environ) == []
    config["sinks"][sink]["allowInsecureHttp"] = "yes"
    assert "boolean" in config_faults(config, tmp_path, **environ)[0]


def test_a_url_that_is_refused_sends_nothing_and_is_not_shown(repo: Repo, server: SinkServer) -> None:
    repo.append(health_critical())
    run = repo.dispatch(env={"ALERT_HOOK_URL": f"http://sink.example.org/{MARK}"})

    assert run.exit_code == 3
    assert "$.sinks['team-hook'].urlEnv" in run.stderr
    assert server.requests == []


def test_a_user_and_a_password_in_a_url_are_sent_as_basic_auth_and_never_shown(
    repo: Repo, server: SinkServer
) -> None:
    user, password = "watchman", f"p@ss/{MARK}"
    host = server.url.removeprefix("http://")
    env = {"ALERT_HOOK_URL": f"http://{user}:{quote(password, safe='')}@{host}/hook"}
    server.answer("/hook", echo(400))
    repo.write_config(hook_only())
    repo.append(health_critical())
    repo.dispatch(env=env)

    coded = base64.b64encode(f"{user}:{password}".encode()).decode()
    assert server.received("/hook")[0].headers["authorization"] == f"Basic {coded}"
    assert repo.attempts()[0]["outcome"] == "dead_letter"

    repo.write_config(hook_only(authTokenEnv="ALERT_HOOK_TOKEN"))
    run = repo.dispatch(env=env)
    assert run.exit_code == 3
    assert "only one can be sent" in run.stderr


@contextlib.contextmanager
def tunnel() -> Iterator[tuple[str, list[str]]]:
    """A real HTTP proxy that makes tunnels: its URL, and the first lines of what it was asked."""
    asked: list[str] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            asked.append(head.split(b"\r\n")[0].decode())
            _, address, _ = asked[-1].split()
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port))) as sink:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=pump, args=(sink, client))
                back.start()
                pump(client, sink)
                back.join()

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                serve(listening.accept()[0])

    with socket.create_server((HOST, 0)) as listening:
        thread = threading.Thread(target=accept, args=(listening,), daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{listening.getsockname()[1]}", asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_a_proxy_of_the_environment_carries_tls_that_a_private_ca_vouches_for(
    repo: Repo, tmp_path: Path
) -> None:
    ca_file = tmp_path / "a private ca.pem"
    ca_file.write_text(TLS_PEM[TLS_PEM.index("-----BEGIN CERTIFICATE") :], encoding="ascii")
    repo.write_config(hook_only(caFileEnv="ALERT_CA_FILE", authTokenEnv="ALERT_HOOK_TOKEN"))
    repo.append(health_critical())
    with SinkServer(tls=True) as sink, tunnel() as (proxy, asked):
        env = {"ALERT_HOOK_URL": f"{sink.url}{PATHS[HOOK]}", "https_proxy": proxy}
        done = repo.dispatch(env={**env, "ALERT_CA_FILE": str(ca_file)})

        assert done.json["status"] == "success"
        assert [line.rpartition(" ")[0] for line in asked] == [f"CONNECT {HOST}:{sink.port}"]
        assert len(sink.received("/hook")) == 1
        # Nothing else may vouch for it, and nothing lets it pass unvouched.
        repo.write_config(hook_only(authTokenEnv="ALERT_HOOK_TOKEN"))
        told = repo.run("test", env={**env, "PYTHONHTTPSVERIFY": "0", "CURL_CA_BUNDLE": ""})
        assert told.exit_code == 1
        assert "certificate" in told.stdout
        assert "caFileEnv" in told.stdout
        assert len(sink.received("/hook")) == 1


@pytest.mark.parametrize("sink", [HOOK, CHAT, PAGER])
@pytest.mark.parametrize("content", [None, "", "no certificate", "folder", "unset"])
def test_a_ca_file_that_cannot_be_used_is_found_before_the_night_it_matters(
    tmp_path: Path, sink: str, content: str | None
) -> None:
    ca_file = tmp_path / "ca.pem"
    if content == "folder":
        ca_file.mkdir()
    elif content is not None:
        ca_file.write_text(content, encoding="ascii")
    config = sink_config()
    config["sinks"][sink]["caFileEnv"] = "ALERT_CA_FILE"
    fault, *_ = config_faults(config, tmp_path, ALERT_CA_FILE="" if content == "unset" else str(ca_file))

    assert f"$.sinks['{sink}'].caFileEnv" in fault
    assert "ALERT_CA_FILE" in fault
    assert str(tmp_path) not in fault


def test_plain_http_goes_by_way_of_the_environments_proxy(repo: Repo, server: SinkServer) -> None:
    repo.write_config(hook_only(allowInsecureHttp=True))
    repo.append(health_critical())
    proxy = f"http://proxy-user:{MARK}@{server.url.removeprefix('http://')}"
    server.script("http://sink.example.org", echo(407))
    env = {"ALERT_HOOK_URL": "http://sink.example.org/hook", "http_proxy": proxy}
    told = repo.run("test", env=env)
    assert "user name and a password" in told.stdout
    done = repo.dispatch(env=env)

    assert done.json["status"] == "success"
    refused, taken = server.received("http://sink.example.org/hook")
    assert refused.headers["proxy-authorization"].startswith("Basic ")
    assert taken.json["event"]["category"] == "health_critical"


def test_the_fault_of_a_proxy_is_not_blamed_on_the_sink(repo: Repo) -> None:
    repo.append(health_critical())
    with closed_port() as port:
        env = {"http_proxy": f"http://{HOST}:{port}"}
        told = repo.run("test", env=env)

    assert told.exit_code == 1
    for sink in json.loads(told.stdout)["sinks"]:
        assert sink["message"] == f"the proxy {HOST}:{port} refused the connection"
        assert "proxy" in sink["advice"]


def test_a_proxy_elsewhere_gets_nothing_that_is_meant_for_this_machine(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(health_critical())
    done = repo.dispatch(env={"http_proxy": "http://proxy.invalid:3128", "ALL_PROXY": "http://proxy.invalid"})

    assert done.json["status"] == "success"
    assert len(server.requests) == 3


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1", "http://[127.0.0.1"])
def test_a_proxy_that_cannot_be_used_is_told_in_words(repo: Repo, proxy: str) -> None:
    repo.write_config(hook_only())
    told = repo.run("test", env={"http_proxy": proxy})

    assert told.exit_code == 1
    assert "proxy" in json.loads(told.stdout)["sinks"][0]["message"]


def test_netrc_replaces_no_token_and_adds_none(repo: Repo, server: SinkServer) -> None:
    netrc = Path(repo.env["HOME"], ".netrc")
    netrc.write_text(f"machine {HOST} login thief password thiefs-own\n", encoding="ascii")
    netrc.chmod(0o600)
    repo.append(health_critical())
    repo.dispatch(env={"NETRC": str(netrc)})

    (hook,) = server.received("/hook")
    assert hook.headers["authorization"] == f"Bearer {HOOK_TOKEN}"
    for request in (*server.received("/chat"), *server.received("/pager")):
        assert "authorization" not in request.headers


# --- Headers


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("X-Team", "night-watch", None),
        ("X-Team", "", None),
        ("Idempotency-Key", "1", None),
        ("X-Author", "night-watch", None),
        ("Content-Type", "application/json", None),
        ("content-type", "application/json; charset=utf-8", None),
        ("User-Agent", "night-watch/1", None),
        ("Content-Type", "text/plain", "always application/json"),
        ("Content-Type", "application/jsonp", "always application/json"),
        *(
            (name, "x", "by the program alone")
            for name in (
                *("Content-Length", "HOST", "Transfer-Encoding", "connection", "webhook-id", "Webhook-X"),
                *("Accept-Encoding", "Content-Encoding", "TE", "Trailer", "Upgrade", "Expect"),
            )
        ),
        *(
            (name, "x", "authTokenEnv")
            for name in (
                *("Authorization", "authorization", "Proxy-Authorization", "Cookie", "X-Api-Key"),
                *("X-APIKEY", "Api_Key", "X-Auth-Token", "X-Gitlab-Token", "DD-API-KEY", "X-Client-Secret"),
            )
        ),
        ("", "x", "RFC 9110"),
        ("X Team", "x", "RFC 9110"),
        ("X-Team:", "x", "RFC 9110"),
        ("X-Té", "x", "RFC 9110"),
        ("X-Team\r\nHost", "x", "RFC 9110"),
        ("X-Team", "a\r\nHost: evil", "RFC 9110"),
        ("X-Team", "a\n", "RFC 9110"),
        ("X-Team", " a", "RFC 9110"),
        ("X-Team", "a\t", "RFC 9110"),
        ("X-Team", "é", "RFC 9110"),
        ("X-Team", "\0", "RFC 9110"),
    ],
)
def test_a_header_is_one_that_http_allows_holds_no_secret_and_breaks_no_request(
    tmp_path: Path, name: str, value: str, word: str | None
) -> None:
    faults = config_faults(hook_only(headers={name: value}), tmp_path)

    assert len(faults) == (word is not None), faults
    assert word is None or word in faults[0]


def test_a_header_given_twice_in_another_case_is_not_lost_in_silence(tmp_path: Path) -> None:
    (fault,) = config_faults(hook_only(headers={"X-Team": "a", "x-team": "b"}), tmp_path)

    assert "twice" in fault


@pytest.mark.parametrize("name", ["ALERT_HOOK_TOKEN", "ALERT_PAGER_KEY", "ALERT_CHAT_URL"])
@pytest.mark.parametrize("value", ["a\nX-Evil: b", "a\r", "a b", "\x1b[2J", "é", "a\0"])
def test_a_line_break_in_a_secret_is_a_fault_that_does_not_show_it(
    tmp_path: Path, name: str, value: str
) -> None:
    (fault,) = config_faults(sink_config(), tmp_path, **{name: f"{MARK}{value}"})

    assert name in fault
    assert fault.isprintable()


# --- Secrets

ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "upper case": str.upper,
    "other case": str.swapcase,
    "percent": lambda text: quote(text, safe=""),
    "all percent": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "percent twice": lambda text: quote("".join(f"%{byte:02X}" for byte in text.encode())),
    "json": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "json codes": lambda text: "".join(f"\\u{ord(character):04x}" for character in text),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 after a byte": lambda text: base64.b64encode(b"u" + text.encode()).decode(),
    "base64 after two": lambda text: base64.urlsafe_b64encode(b"u:" + text.encode()).decode(),
    "a part of it": lambda text: text[len(text) // 2 :],
    "another part": lambda text: text[: 2 * len(text) // 3],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_sink_echoes_in_whatever_encoding_names_no_secret(encoding: str) -> None:
    redactor = program.Redactor(
        [f"https://watch:pass-{MARK}@sink.example.org{PATHS[HOOK]}?key=k{MARK}-abcdef", *SECRETS]
    )
    for secret in (*SECRETS, f"watch:pass-{MARK}", f"k{MARK}-abcdef"):
        told = redactor.mask(f"request refused: <{ENCODINGS[encoding](secret)}> is wrong")
        assert not leaked(told)
        # No run of eight characters of it is left, and what is no secret still is.
        pieces = told.removeprefix("request refused: <").removesuffix("> is wrong").split(program.MASK)
        assert len(pieces) > 1, told
        assert all(len(piece) < 40 for piece in pieces), told
        assert told.startswith("request refused: <")
        assert told.endswith("> is wrong")


@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(SECRETS), st.sampled_from([*ENCODINGS]))
def test_no_text_around_a_secret_hides_it_from_the_redactor(
    before: str, after: str, secret: str, encoding: str
) -> None:
    redactor = program.Redactor(SECRETS)
    # A letter or a digit before base64 shifts it: that is another text, and its parts are looked for below.
    text = f"{before}|{ENCODINGS[encoding](secret)}|{after}"

    assert not leaked(redactor.mask(text))


@pytest.mark.parametrize(
    ("secret", "said", "shown"),
    [
        ("1234567890", "is 1234567890 yours?", "is [secret] yours?"),
        # A short one only where it stands as a word, also in base64; one of three characters never.
        ("tok5", "Bearer TOK5, stok5", "Bearer [secret], stok5"),
        ("tok5", "Basic dG9rNQ== tok5", "Basic [secret]== [secret]"),
        ("abc", "abc", "abc"),
        ("https://u:tok5@sink.example.org/hook", "Basic dTp0b2s1", "Basic [secret]"),
        # In the header, what the URL must escape is not escaped: u:p@ss, u:correct horse.
        ("https://u:p%40ss@sink.example.org/hook", "Basic dTpwQHNz", "Basic [secret]"),
        ("https://u:correct%20horse@h.example.org", "Basic dTpjb3JyZWN0IGhvcnNl", "Basic [secret]"),
        # Seven characters of a secret may stand, eight not.
        ("abcdefghijklmnop", "abcdefg", "abcdefg"),
        ("abcdefghijklmnop", "got 'cdefghij…'", "got '[secret]…'"),
        # The scheme and the host of a URL are what an operator looks for.
        (
            "https://sink.example.org/T0/x9y8z7",
            "no https://sink.example.org/T0/x9y8z7",
            "no https://sink.example.org/[secret]",
        ),
        ("https://u:passw0rd1@h.example.org/", "u:passw0rd1@h.example.org", "[secret]@h.example.org"),
    ],
)
def test_what_is_masked_of_an_answer_is_the_secret_and_nothing_else(
    secret: str, said: str, shown: str
) -> None:
    assert program.Redactor([secret]).mask(said) == shown


def test_every_part_of_several_signing_secrets_is_a_secret() -> None:
    key = f"signing-{MARK}-key".encode()
    coded = base64.b64encode(key).decode()
    redactor = program.Redactor([f"whsec_{coded} whsec_{base64.b64encode(key[::-1]).decode()}"])

    for text in (coded, key.decode(), f"whsec_{coded}"):
        assert redactor.mask(f"is {text} wrong?") == "is [secret] wrong?"
    unpadded = base64.b64encode(key + b"!").decode().rstrip("=")
    assert program.Redactor([f"whsec_{unpadded}"]).mask((key + b"!").decode()) == "[secret]"


def test_a_secret_with_letters_beyond_ascii_is_found_in_the_config(tmp_path: Path) -> None:
    config = sink_config()
    config["description"] = "the token is pässwörd-of-the-hook"
    faults = config_faults(config, tmp_path, ALERT_HOOK_TOKEN="pässwörd-of-the-hook")
    assert any("a secret never stands in the file" in fault for fault in faults)


def test_the_programs_own_words_are_no_secrets() -> None:
    config = sink_config()
    redactor = program.make_redactor(
        config, {"ALERT_HOOK_URL": "https://sink.example.org/team-hook/services/dispatched"}
    )

    assert redactor.mask("team-hook is down") == "team-hook is down"
    assert "services" not in redactor.mask("no /team-hook/services/dispatched")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "place",
    [
        lambda config, secret: config["sinks"].update({secret.replace("/", ""): {}}),
        lambda config, secret: config["sinks"][HOOK].update({secret: 1}),
        lambda config, secret: config["sinks"][HOOK].update({"urlEnv": secret}),
        lambda config, secret: config["sinks"][HOOK]["headers"].update({"X-Team": secret}),
        lambda config, secret: config["sinks"][HOOK].update({"description": f"the token is {secret}"}),
        lambda config, secret: config["routing"]["defaultSinks"].append(secret),
        lambda config, secret: config["routing"]["categorySeverity"].update({secret: "loud"}),
        lambda config, secret: config.update({"defaultMinSeverity": secret, "x-note": {secret: [secret]}}),
    ],
)
def test_a_secret_that_stands_in_the_config_is_a_fault_and_not_told_to_a_log(
    tmp_path: Path, place: Callable[[dict[str, Any], str], None], secret: str
) -> None:
    config = sink_config()
    place(config, secret)
    faults = config_faults(config, tmp_path, ALERT_HOOK_URL=f"https://sink.example.org{PATHS[HOOK]}")

    if not secret.startswith("/"):
        assert any("a secret never stands in the file" in fault for fault in faults)


def test_a_key_that_stands_twice_and_is_a_secret_is_not_told_to_a_log(tmp_path: Path) -> None:
    text = json.dumps(sink_config())[:-1] + f', "{HOOK_TOKEN}": 1, "{HOOK_TOKEN}": 2}}'

    assert any("twice" in fault for fault in config_faults(text, tmp_path))


def test_a_record_stays_as_it_was_written_whatever_words_a_secret_has(repo: Repo, server: SinkServer) -> None:
    """`production` stands in the URL of the sink: a record that names it is sent and kept verbatim."""
    env = {"ALERT_HOOK_URL": f"{server.url}/hook?env=production"}
    repo.write_config(hook_only(authTokenEnv="ALERT_HOOK_TOKEN"))
    server.answer("/hook", error(422, "no production_down here"))
    record = health_critical(category="production_down", traceId="for-production")
    repo.append(record)
    plan = repo.dispatch("--dry-run", env=env).json
    repo.dispatch("--trace-id", "pass-in-production", env=env)

    assert plan["escalations"][0]["category"] == "production_down"
    (row,) = repo.telemetry()
    assert row["escalation"] == record
    assert (row["escalationCategory"], row["traceId"]) == ("production_down", "pass-in-production")
    # What the sink says of it is text from outside.
    assert row["sinks"][0]["message"] == "no [secret]_down here"
    server.answer("/hook", Answer(200))
    repo.run("redeliver", *repo.target, "--dead-letters", "--yes", env=env)
    assert [request.json["escalation"] for request in server.received("/hook")] == [record, record]


def test_a_secret_that_a_sink_echoes_is_nowhere_and_a_request_that_is_shown_hides_it(
    repo: Repo, server: SinkServer
) -> None:
    """Each run and each file is looked through by the fixtures."""
    repo.write_config(sink_config(everywhere=True))
    repo.append(health_critical(), "no JSON\n")
    server.answer(PATHS[HOOK], echo(503))
    server.answer(PATHS[CHAT], echo(422))
    server.answer(PATHS[PAGER], echo(400))
    for form in ("text", "json"):
        shown = repo.dispatch("--dry-run", "--show-payload", "--format", form)
        assert program.MASK in shown.stdout
    said = [
        repo.dispatch(),
        repo.run_on_terminal("dispatch", *repo.target, streams=("stdout", "stderr")),
        repo.run("status", *repo.target),
        repo.run("redeliver", *repo.target, "--dead-letters", "--yes"),
        repo.run("skip", *repo.target, "--sink", HOOK, "--yes"),
    ]

    assert [run.exit_code for run in said] == [0, 0, 0, 1, 0]
    assert {row["outcome"] for row in repo.attempts()} == {"retry", "dead_letter", "skipped"}


def test_a_fault_of_the_program_itself_is_told_without_its_words(repo: Repo, tmp_path: Path) -> None:
    """A traceback would show whatever the exception holds. Here a package is broken as nobody foresaw."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "jsonschema.py").write_text(
        "import os\nraise RuntimeError(os.environ['ALERT_HOOK_TOKEN'])\n", encoding="ascii"
    )
    run = repo.dispatch(env={"PYTHONPATH": str(broken)})

    assert (run.exit_code, run.stdout) == (5, "")
    assert "RuntimeError" in run.stderr
    assert "Traceback" not in run.stderr


# --- Answers


def test_an_answer_is_read_for_64_kb_and_never_unpacked(repo: Repo, server: SinkServer) -> None:
    packed = gzip.compress(b"\0" * 25_000_000, 1, mtime=0)
    server.answer(PATHS[HOOK], huge(400, 300_000_000))
    server.answer(PATHS[CHAT], Answer(400, packed[:100_000], {"Content-Encoding": "gzip"}))
    server.answer(PATHS[PAGER], Answer(503, b"\x1b]0;owned\x07\x9b2J\xe2\x80\xae\r\nOK\0"))
    repo.append(health_critical())
    began = time.monotonic()
    # With less memory than the first answer alone would take.
    run = subprocess.run(
        ["bash", "-c", 'ulimit -v 600000; exec "$@"', "bash", *repo.command, "dispatch", *repo.target],
        env=repo.env,
        cwd=repo.root,
        capture_output=True,
        timeout=RUN_TIMEOUT,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert time.monotonic() - began < RUN_TIMEOUT / 2
    assert {request.headers["accept-encoding"] for request in server.requests} == {"identity"}
    told = {row["sinkId"]: row for row in repo.attempts()}
    assert told[HOOK]["message"] == "x" * 299 + "…"
    assert len(told[CHAT]["message"]) <= 300
    assert all(harmless(row["message"]) for row in told.values())
    assert told[PAGER]["message"].endswith("OK")


# --- Paths


@pytest.mark.parametrize(
    "loop", ["..", ".", "", "a/b", "/etc", "../a", "-x", "a\nb", "a\x1bb", "a\u202eb", "x" * 300]
)
@pytest.mark.parametrize("command", ["dispatch", "status", "redeliver", "skip"])
def test_a_loop_id_is_one_path_component_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, loop: str
) -> None:
    more = {"redeliver": ["--dead-letters"], "skip": ["--sink", "a"]}.get(command, [])
    code = program.main([command, "--repo", str(tmp_path), f"--loop={loop}", *more])

    assert code == 2
    said = capsys.readouterr()
    assert "--loop" in said.err
    assert said.err.replace("\n", "").isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["alert-dispatch-state.json.lock", "alert-dispatch-state.json.tmp"])
def test_a_link_in_place_of_a_lock_or_a_temporary_file_leads_nowhere(
    repo: Repo, tmp_path: Path, name: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious", encoding="ascii")
    precious.chmod(0o640)
    repo.append(health_critical())
    (repo.folder / name).symlink_to(precious)
    (repo.folder / ".ops-alert-dispatch.reserve").symlink_to(precious)
    run = repo.dispatch()

    assert (run.exit_code, "symbolic link" in run.stderr) == (
        (5, True) if name.endswith("lock") else (0, False)
    )
    assert precious.read_text(encoding="ascii") == "precious"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640


def test_what_it_makes_is_for_its_user_alone_and_what_is_there_keeps_its_mode(
    repo: Repo, tmp_path: Path
) -> None:
    source = tmp_path / "escalations.jsonl"
    source.write_text(lines([health_critical()]), encoding="utf-8")
    target = ["--escalations-file", str(source)]
    subprocess.run(
        ["bash", "-c", 'umask 0; exec "$@"', "bash", *repo.command, "dispatch", *repo.target, *target],
        env=repo.env,
        cwd=repo.root,
        check=True,
        timeout=RUN_TIMEOUT,
        stdout=subprocess.DEVNULL,
    )
    made = list((repo.root / ".superloop").rglob("*"))
    assert {path.name for path in made} >= {
        "alerts.jsonl",
        "alert-attempts.jsonl",
        "alert-dispatch-state.json",
    }
    for path in (repo.root / ".superloop", *made):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    kept = {repo.state_file: 0o644, repo.telemetry_file: 0o640, repo.attempts_file: 0o604, repo.folder: 0o755}
    for path, mode in kept.items():
        path.chmod(mode)
    with source.open("a", encoding="utf-8") as file:
        file.write(lines([health_critical(seconds_ago=1)]))
    assert repo.dispatch(*target).json["status"] == "success"
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in kept} == kept


def test_a_config_that_everybody_may_write_is_refused(repo: Repo, server: SinkServer, tmp_path: Path) -> None:
    repo.append(health_critical())
    folder = repo.config_file.parent
    repo.config_file.chmod(0o606)
    run = repo.dispatch()
    assert (run.exit_code, "chmod o-w" in run.stderr) == (3, True)
    repo.config_file.chmod(0o664)
    folder.chmod(0o777)
    run = repo.dispatch()
    assert (run.exit_code, f"chmod o-w {folder}" in run.stderr) == (3, True)
    # Behind a link too, from a folder that is safe.
    link = tmp_path / "link.json"
    link.symlink_to(repo.config_file)
    assert repo.dispatch("--alert-config-file", str(link)).exit_code == 3
    assert server.requests == []
    # As /tmp is: nobody can replace what another put there.
    folder.chmod(0o1777)
    assert repo.dispatch().json["status"] == "success"


# --- Records


def hostile_records() -> dict[str, tuple[bytes, bool]]:
    """Lines, and whether they are delivered."""
    return {
        "deep": (b'{"category":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", False),
        "just too deep": (b'{"category":"a","x":' + b"[" * 100 + b"]" * 100 + b"}", False),
        "just not too deep": (b'{"category":"a","x":' + b"[" * 99 + b"]" * 99 + b"}", True),
        "2 MB": (b'{"category":"a","x":"' + b"y" * 2_000_000 + b'"}', True),
        "a hundred thousand keys": (
            b'{"category":"many",' + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
            True,
        ),
        "duplicate keys": (b'{"category":"a","category":"b","x":1,"x":2}', True),
        "NaN": (b'{"category":"a","x":NaN,"y":[-Infinity,1e999]}', True),
        "huge integer": (b'{"category":"a","x":' + b"9" * 100_000 + b',"y":-' + b"8" * 4000 + b"}", True),
        "lone surrogates": (b'{"category":"a\\ud800","\\udfff":"\\ud83d\\ud83d"}', True),
        "homoglyph": ('{"category":"he\u0430lth_critical","x":"\u202etxt"}'.encode(), True),
        "bad UTF-8": (b'{"category":"a","x":"\xff\xc3\x28\xed\xa0\x80"}', True),
    }


@pytest.mark.slow
def test_a_hostile_record_is_delivered_as_valid_json_or_its_row_says_why_not(
    repo: Repo, server: SinkServer
) -> None:
    config = sink_config(everywhere=True)
    # The machine may be busy.
    for sink in config["sinks"].values():
        sink["timeoutSeconds"] = 60
    # Once is enough of what takes seconds.
    config["routing"]["routes"] = [{"category": "many", "sinks": [HOOK]}]
    repo.write_config(config)
    hostile = hostile_records()
    repo.append(*(line + b"\n" for line, _ in hostile.values()), health_critical())
    run = subprocess.run(
        ["bash", "-c", 'ulimit -v 3000000; exec "$@"', "bash", *repo.command, "dispatch", *repo.target],
        env=repo.env,
        cwd=repo.root,
        capture_output=True,
        timeout=RUN_TIMEOUT,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    rows = repo.telemetry()
    for (name, (_, delivered)), row in zip(hostile.items(), rows, strict=False):
        assert row["status"] == ("dispatched" if delivered else "failed"), (name, row["reasonCode"])
        assert delivered or row["message"] == "nested more than 100 deep"
    assert rows[-1]["escalationCategory"] == "health_critical"
    good = sum(delivered for _, delivered in hostile.values()) + 1
    for path in PATHS.values():
        received = server.received(path)
        assert len(received) == good - (path != PATHS[HOOK])
        for request in received:
            json.loads(request.body.decode("utf-8"), parse_constant=pytest.fail)
    # However large the records, the state stays small.
    assert repo.state_file.stat().st_size < 10_000


def test_a_huge_integer_does_not_change_its_neighbours() -> None:
    assert program.decode_json('{"a":' + "9" * 5000 + ',"b":1}') == {"a": "9" * 5000, "b": 1}


def test_a_dry_run_and_a_status_cannot_be_forged_by_a_record(repo: Repo, server: SinkServer) -> None:
    forged = "ok\x1b[2J\x1b[H\r\nOK  loop all-is-well\u2028line 9: \u202edesrever\x9b31m\u061c"
    repo.append(health_critical(category=forged, timestamp=forged, loopId=forged, traceId=forged))
    server.answer("/", error(400, forged))
    plain = Repo(repo.root, repo.env, loop="plain")
    plain.append(health_critical(category="ok", timestamp="ok", loopId="ok", traceId="ok"))
    for one in (repo, plain):
        server.answer(PATHS[HOOK], error(400, forged if one is repo else "ok"))
    said = []
    for one in (repo, plain):
        dry = one.dispatch("--dry-run", "--format", "text").stdout
        one.dispatch()
        said.append([dry, one.run("status", *one.target, "--format", "text").stdout])
    for ours, theirs in zip(*said, strict=True):
        assert ours.count("\n") == theirs.count("\n")
        assert all(line.isprintable() for line in ours.splitlines())
        assert not ours.startswith("OK  loop all-is-well")


# --- The config and the state as files of others


def test_a_config_beyond_its_bounds_is_told_in_time_and_in_few_words(tmp_path: Path) -> None:
    config = sink_config()
    many = {f"key{index}": 1 for index in range(10_000)}
    nested: Any = 1
    for _ in range(101):
        nested = [nested]
    cases = [
        (json.dumps(config | {"x-a": "y" * (1 << 20)}), "larger than"),
        (json.dumps(config | {"x-a": nested}), "deep"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(config | many), "and more"),
        (json.dumps(config | {"sinks": dict.fromkeys(many, 3)}), "and more"),
        (json.dumps(config | {"routing": {"defaultSinks": list(many)}}), "and more"),
        ("{" + ",".join(f'"{key}":1,"{key}":2' for key in many) + "}", "twice"),
        (json.dumps(config | {"k" * 100_000: 1}), "a key of 100000 characters"),
        (json.dumps(config | {"n": 1})[:-1] + "9" * 5000 + "}", "number too long"),
    ]
    began = time.process_time()
    for text, word in cases:
        faults = config_faults(text, tmp_path)
        assert any(word in fault for fault in faults), (word, faults[:3])
        assert sum(map(len, faults)) < 100_000
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    ("sink_id", "valid"),
    [
        *((text, True) for text in ("a", "A.b_c-9", "x" * 64, "..")),
        *((text, False) for text in ("", "x" * 65, "a b", "a/b", "a\n", "é", "a\0", "\u0430", "a\x1b", "$a")),
    ],
)
def test_a_sink_id_is_64_plain_characters(tmp_path: Path, sink_id: str, valid: bool) -> None:
    config = hook_only()
    config["sinks"] = {sink_id: config["sinks"][HOOK]}
    config["routing"]["defaultSinks"] = [sink_id]

    assert (config_faults(config, tmp_path) == []) is valid


def test_no_pattern_of_the_schema_or_of_the_program_can_be_made_slow() -> None:
    def patterns(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "pattern":
                    yield item
                elif key == "patternProperties":
                    yield from item
                yield from patterns(item)
        elif isinstance(value, list):
            for item in value:
                yield from patterns(item)

    found = {re.compile(text) for text in patterns(json.loads(Path(program.SCHEMA_FILE).read_bytes()))}
    assert len(found) >= 4
    searched = (program.UNPRINTABLE, program.ESCAPED, program.SENSITIVE_HEADER, program.ROUTING_KEY)
    matched = (program.PLAIN_WORDS, program.JSON_TYPE)
    asked = [pattern.search for pattern in (*found, *map(re.compile, searched))]
    asked += [re.compile(text).fullmatch for text in matched]
    began = time.process_time()
    for ask in asked:
        for character in "aA0 -.%&#\\:@;/\x1b":
            text = character * 30_000
            for hard in (text, text + "\n", "a" + text + "\0", "\0" + text):
                ask(hard)
    # Milliseconds where it takes time that grows with the length; hours where with its square.
    assert time.process_time() - began < 60


DAMAGES: dict[str, object] = {
    "offset": -7,
    "line": 10**30,
    "inode": True,
    "number": "1",
    "finished": None,
    "seen_at": "then",
}


@pytest.mark.parametrize("field", DAMAGES)
def test_a_summary_that_a_hand_has_damaged_costs_no_repeat_even_without_the_queue(
    repo: Repo, server: SinkServer, field: str
) -> None:
    repo.append(health_critical())
    repo.dispatch()
    state = repo.state()
    state["cursor"][field] = DAMAGES[field]
    repo.state_file.write_text(json.dumps(state), encoding="utf-8")
    repo.queue_file.unlink()
    repo.append(health_critical(seconds_ago=1))

    assert repo.dispatch().json["status"] == "success"
    assert [len(server.received(path)) for path in PATHS.values()] == [2, 2, 2]


@pytest.mark.parametrize("field", DAMAGES)
def test_a_cursor_with_numbers_that_cannot_be_is_not_believed(field: str) -> None:
    cursor = json.loads((CORPUS / "summary" / "waiting").read_text(encoding="utf-8"))["cursor"]
    assert program.Cursor.from_json(cursor).line == 3
    cursor[field] = DAMAGES[field]

    with pytest.raises(program.MALFORMED):
        program.Cursor.from_json(cursor)


# --- Anything at all


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_fuzzer_found_worth_keeping_breaks_nothing(target: str) -> None:
    assert SEEDS[target]
    for data in SEEDS[target]:
        TARGETS[target](data)


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000


odd_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 10**30, float("nan"), float("inf"), "\ud800", "\x1b[2J", "", "v2", [], {}])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@st.composite
def changed(draw: st.DrawFn, target: str) -> bytes:
    """A seed with a bit of it changed: values at some places of its JSON, or some bytes."""
    seed = draw(st.sampled_from(SEEDS[target]))
    document: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(seed)
    spots = [*places(document)][:500]
    if not spots:
        start = draw(st.integers(0, len(seed)))
        return seed[:start] + draw(st.binary(max_size=8)) + seed[start + draw(st.integers(0, 8)) :]
    for path in draw(st.lists(st.sampled_from(spots), min_size=1, max_size=3)):
        parent = document
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = draw(odd_values)
    return json.dumps(document).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_whatever_stands_where_others_write_no_promise_breaks(target: str, data: st.DataObject) -> None:
    TARGETS[target](data.draw(st.binary(max_size=200) | changed(target)))
