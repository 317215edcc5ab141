"""The client that sends: what the environment asks of it, and a connection that is kept between requests.

The first request connects, the ones after it take another way through the code: each test sends several.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest
from benchmarks.receiver import Receiver
from loopback import (
    TLS_PEM,
    Answer,
    SinkServer,
    closed_port,
    drip,
    garbage,
    hang_up,
    huge,
    ok,
    scripted_port,
    silent_port,
)
from tools import needs_tool

from ops_alert_dispatch import (
    MAX_ANSWER_BYTES,
    Client,
    HttpRequest,
    NoAnswerError,
    attempt_seconds,
    host_of,
)

CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
HEADERS = {"Content-Type": "application/json", "webhook-id": "esc_1"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no CA of the tester's own."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in CA_VARIABLES:
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[SinkServer]:
    with SinkServer() as sink_server:
        yield sink_server


def send(client: Client, count: int = 3) -> list[bytes]:
    """Send requests with the bodies 0, 1, 2, …; returns the bodies of the answers."""
    return [client.send(HttpRequest(HEADERS, b"%d" % number)).body for number in range(count)]


def test_a_connection_is_kept_between_requests(server: SinkServer) -> None:
    client = Client(f"{server.url}/hook", 5.0)

    assert send(client) == [b"ok"] * 3
    assert [request.body for request in server.requests] == [b"0", b"1", b"2"]
    assert {request.connection for request in server.requests} == {1}
    assert len({tuple(request.headers.items()) for request in server.requests}) == 1
    assert server.requests[0].headers["user-agent"].startswith("ops-alert-dispatch/")


def test_a_header_is_sent_once_however_it_is_spelled() -> None:
    with Receiver() as receiver:
        client = Client(f"{receiver.url}/hook", 5.0)
        request = HttpRequest({"user-AGENT": "mine", "X-Team": "night-watch"}, b"x")
        for _ in range(2):
            client.send(request)

        for arrival in receiver.arrivals:
            names = [field.partition(b":")[0].lower() for field in arrival.head.split(b"\r\n")[1:]]
            assert len(names) == len(set(names))
            assert arrival.headers["user-agent"] == "mine"


def test_a_proxy_gets_every_request_with_its_credentials(
    server: SinkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that reaches the world through a proxy alone would never send an alert."""
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:word@"))

    send(Client("http://alerts.example.org/hook", 5.0))

    assert [request.path for request in server.requests] == ["http://alerts.example.org/hook"] * 3
    for request in server.requests:
        assert request.headers["proxy-authorization"] == "Basic dXNlcjp3b3Jk"
        assert request.headers["host"] == "alerts.example.org"


def test_a_host_that_needs_no_proxy_is_asked_itself(
    server: SinkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_port() as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        send(Client(f"{server.url}/hook", 5.0))

    assert [request.path for request in server.requests] == ["/hook"] * 3


@pytest.fixture
def private_ca(tmp_path: Path) -> str:
    bundle = tmp_path / "ca.pem"
    bundle.write_text(TLS_PEM)
    return str(bundle)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_ca_is_trusted(private_ca: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, private_ca)
    with SinkServer(tls=True) as server:
        assert send(Client(f"{server.url}/hook", 5.0)) == [b"ok"] * 3

        assert {request.connection for request in server.requests} == {1}


@pytest.fixture
def hashed_folder(private_ca: str, tmp_path: Path) -> str:
    """A folder of CA certificates as update-ca-certificates leaves it."""
    named = subprocess.run(
        [needs_tool("openssl"), "x509", "-in", private_ca, "-noout", "-hash"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout.strip()
    folder = tmp_path / "certs"
    folder.mkdir()
    (folder / f"{named}.0").write_text(TLS_PEM)
    return str(folder)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_DIR"])
def test_a_folder_of_private_cas_is_trusted(
    hashed_folder: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, hashed_folder)
    with SinkServer(tls=True) as server:
        assert send(Client(f"{server.url}/hook", 5.0)) == [b"ok"] * 3


def test_the_sinks_own_ca_file_wins_over_the_environment(
    private_ca: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sink with caFileEnv would else be refused on a machine whose environment names a bundle."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "not-there.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "not-there-either.pem"))
    with SinkServer(tls=True) as server:
        assert send(Client(f"{server.url}/hook", 5.0, private_ca), 1) == [b"ok"]


def test_a_certificate_of_nobody_known_is_refused() -> None:
    with SinkServer(tls=True) as server:
        with pytest.raises(NoAnswerError, match=r"certificate of 127\.0\.0\.1:.* is not valid") as caught:
            send(Client(f"{server.url}/hook", 5.0))

        assert server.requests == []
        assert (caught.value.fault, caught.value.not_taken) == ("tls_certificate", True)


def test_the_bundle_that_requests_is_given_wins_over_the_machines_store(
    private_ca: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle that REQUESTS_CA_BUNDLE names is all that is trusted: it wins over SSL_CERT_FILE."""
    monkeypatch.setenv("SSL_CERT_FILE", private_ca)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certifi.where())
    with SinkServer(tls=True) as server, pytest.raises(NoAnswerError) as caught:
        send(Client(f"{server.url}/hook", 5.0))
    assert caught.value.fault == "tls_certificate"


def test_tls_goes_through_a_proxy_unread(private_ca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", private_ca)
    with SinkServer(tls=True) as server, tunnel(server.port) as (port, asked):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert send(Client("https://localhost:7443/hook", 5.0)) == [b"ok"] * 3

        assert [line.split()[:2] for line in asked] == [[b"CONNECT", b"localhost:7443"]]
        assert [(r.path, r.headers["host"]) for r in server.requests] == [("/hook", "localhost:7443")] * 3


@contextlib.contextmanager
def tunnel(target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that leads every CONNECT to one port; yields its own port and the first lines it got."""
    asked: list[bytes] = []

    def copy(giver: socket.socket, taker: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := giver.recv(65536):
                taker.sendall(data)
            taker.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                asked.append(client.recv(65536).splitlines()[0])
                upstream = socket.create_connection(("127.0.0.1", target))
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for ends in ((client, upstream), (upstream, client)):
                    sockets.extend(ends)
                    threads.append(threading.Thread(target=copy, args=ends))
                    threads[-1].start()

    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        try:
            yield int(listening.getsockname()[1]), asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for one in sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for one in sockets:
                one.close()


def test_user_and_password_of_a_url_go_with_every_request(server: SinkServer) -> None:
    send(Client(server.url.replace("//", "//user:word@") + "/hook", 5.0))

    assert [request.headers["authorization"] for request in server.requests] == ["Basic dXNlcjp3b3Jk"] * 3
    assert {request.path for request in server.requests} == {"/hook"}


SLOW = ok().after(1.0)


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (hang_up(), "hung up before it answered"),
        (garbage(), "answered with something that is not HTTP"),
        (SLOW, "no answer .* within 0.3 s"),
        (drip("head"), "no answer .* within 0.3 s"),
    ],
    ids=["hang-up", "garbage", "too slow", "drip"],
)
def test_an_answer_that_fails_is_judged_alike_and_never_taken_for_that_to_the_next_request(
    server: SinkServer, fault: Answer, words: str, kept: bool
) -> None:
    client = Client(f"{server.url}/hook", 0.3)
    server.script("/hook", *([ok()] if kept else []), fault, Answer(body=b"next"))
    if kept:
        send(client, 1)

    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=words) as caught:
        send(client, 1)

    assert time.monotonic() - began < 1.0
    assert not caught.value.not_taken
    assert send(client, 1) == [b"next"]


@pytest.mark.parametrize(
    "ending",
    [
        Answer(headers={"Connection": "close"}),
        huge(length=MAX_ANSWER_BYTES + 1),
    ],
    ids=["close", "huge"],
)
def test_a_connection_that_is_of_no_more_use_is_replaced(server: SinkServer, ending: Answer) -> None:
    server.script("/hook", ok(), ending, ok(), ending, ok())

    answers = send(Client(f"{server.url}/hook", 5.0), 5)

    length = min(int(ending.headers.get("Content-Length", MAX_ANSWER_BYTES)), MAX_ANSWER_BYTES)
    assert answers == [b"ok", ending.body[:length]] * 2 + [b"ok"]
    assert [request.connection for request in server.requests] == [1, 1, 2, 2, 3]


def test_a_sink_that_was_restarted_between_two_requests_costs_no_attempt() -> None:
    with SinkServer() as before:
        client = Client(f"{before.url}/hook", 5.0)
        send(client, 2)
    with SinkServer(port=before.port) as after:
        assert send(client, 2) == [b"ok"] * 2
        assert [request.connection for request in after.requests] == [1, 1]


@pytest.mark.parametrize("url", ["http://[::1", "http://alerts.invalid:1/"])
def test_a_url_that_leads_nowhere_is_no_traceback(url: str) -> None:
    with pytest.raises(NoAnswerError):
        send(Client(url, 2.0), 1)


def test_a_ca_bundle_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")

    with pytest.raises(NoAnswerError, match=r"CA.*/nowhere/ca\.pem"):
        send(Client("https://127.0.0.1:1/hook", 2.0), 1)


# --- An answer, which http.client and urllib3 trust too much

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200",
        OK,
        OK + b"Content-Le",
        OK + b"X: y\r\n",
        OK + b"X: y\r\n" * 20_000,
        OK + b"X: " + b"y" * 70_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000,
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_a_head_that_is_cut_off_or_no_head_is_no_answer(data: bytes, kept: bool) -> None:
    """Taken for a success, an alert that the sink had not finished with is never sent again."""
    with scripted_port([PLAIN, data] if kept else [data]) as port:
        client = Client(f"http://127.0.0.1:{port}/hook", 5.0)
        if kept:
            send(client, 1)
        with pytest.raises(NoAnswerError):
            send(client, 1)


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize(
    ("data", "body"),
    [
        (OK + b"Content-Length: 100\r\n\r\nok", b"ok"),
        (OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", b"ok"),
        (OK + b"Content-Length: -2\r\n\r\nok", b"ok"),
        (OK + b"Content-Length: two\r\n\r\nok", b"ok"),
        (OK + b"\r\nok", b"ok"),
        (CHUNKED, b""),
        (CHUNKED + b"2\r\no", b"o"),
        (CHUNKED + b"2\r\nok\r\n", b"ok"),
        (CHUNKED + b"no size\r\nok", b""),
        (CHUNKED + b"1" * 70_000, b""),
        (OK + b"X: y\r\n" * 101 + b"Content-Length: 2\r\n\r\nok", b""),
        (OK + b"X: " + b"y" * 70_000 + b"\r\nContent-Length: 2\r\n\r\nok", b""),
        (OK + b"no header\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    ],
    ids=lambda data: repr(data[:60]),
)
def test_what_follows_a_whole_head_does_not_make_the_answer_less(
    data: bytes, body: bytes, kept: bool
) -> None:
    """An alert that the sink has taken would be sent again on every pass, for ever."""
    with scripted_port([PLAIN, data] if kept else [data]) as port:
        client = Client(f"http://127.0.0.1:{port}/hook", 2.0)
        request = HttpRequest(HEADERS, b"0")
        answers = [client.send(request) for _ in range(1 + kept)]
    assert (answers[-1].status, answers[-1].body) == (200, body)


@pytest.mark.parametrize("headers", [{"Content-Length": "100"}, {"Transfer-Encoding": "chunked"}])
def test_a_body_that_never_ends_is_waited_for_no_longer_than_the_timeout(
    server: SinkServer, headers: dict[str, str]
) -> None:
    server.answer("/hook", Answer(body=b"ok", headers=headers))
    began = time.monotonic()
    answers = send(Client(f"{server.url}/hook", 0.3), 2)
    assert 0.5 < time.monotonic() - began < 2.0
    if "Content-Length" in headers:
        assert answers == [b"ok"] * 2


def test_a_body_that_drips_is_waited_for_no_longer_than_the_timeout(server: SinkServer) -> None:
    server.answer("/hook", drip("body", 0.05))
    began = time.monotonic()
    [body] = send(Client(f"{server.url}/hook", 0.3), 1)
    assert (time.monotonic() - began < 1.0, set(body)) == (True, set(b"."))


def test_what_follows_an_answer_is_none_to_the_next_request(server: SinkServer) -> None:
    """A 400 that is taken for the next answer is an alert that is given up though its sink took it."""
    two = Answer(
        body=b"okHTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno", headers={"Content-Length": "2"}
    )
    server.script("/hook", two, ok(), two, ok())
    client = Client(f"{server.url}/hook", 5.0)
    answers = [client.send(HttpRequest(HEADERS, b"0")) for _ in range(4)]
    assert [(answer.status, answer.body) for answer in answers] == [(200, b"ok")] * 4


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_not_taken_for_the_answer(interim: str, kept: bool) -> None:
    """A sender that took it for one would send an alert again that its sink has taken."""
    early = f"HTTP/1.1 {interim}\r\nLink: </a>\r\n\r\n".encode()
    with scripted_port([PLAIN, 2 * early + PLAIN] if kept else [2 * early + PLAIN]) as port:
        assert send(Client(f"http://127.0.0.1:{port}/hook", 5.0), 2 if kept else 1) == [b"ok"] * (1 + kept)


def test_an_answer_that_tls_has_read_ahead_is_none_to_the_next_request(
    private_ca: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 500 that is taken for delivered is an alert that nobody gets."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", private_ca)
    ahead = PLAIN + b" " * (8192 - len(PLAIN)) + PLAIN
    failed = b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"
    with scripted_port([ahead, failed], tls=True) as port:
        client = Client(f"https://127.0.0.1:{port}/hook", 5.0)
        request = HttpRequest(HEADERS, b"0")
        assert [client.send(request).status for _ in range(2)] == [200, 500]


def wait_for_hang_up(port: int) -> None:
    """Wait until the other end of this process's connection to a port is closed: its state is CLOSE_WAIT."""
    deadline = time.monotonic() + 30.0
    closed = re.compile(rf"0100007F:{port:04X} 08 ")
    while not closed.search(Path("/proc/net/tcp").read_text()):
        assert time.monotonic() < deadline, "the server does not hang up"
        time.sleep(0.002)


def test_a_sink_that_hangs_up_after_each_answer_without_a_word_gets_everything() -> None:
    with scripted_port([PLAIN], hang_up=True) as port:
        client = Client(f"http://127.0.0.1:{port}/hook", 5.0)
        request = HttpRequest(HEADERS, b"0")
        statuses = []
        for _ in range(20):
            statuses.append(client.send(request).status)
            wait_for_hang_up(port)

    assert statuses == [200] * 20


@pytest.mark.parametrize(
    ("written", "sent"),
    [("u:p%40ss", b"u:p@ss"), ("u:%C3%A9%E2%82%AC", "u:é€".encode()), ("u:%E9", b"u:\xe9"), ("u:", b"u:")],
)
def test_a_password_in_a_url_is_sent_byte_by_byte(server: SinkServer, written: str, sent: bytes) -> None:
    send(Client(server.url.replace("//", f"//{written}@") + "/hook", 5.0))

    expected = f"Basic {base64.b64encode(sent).decode()}"
    assert [request.headers["authorization"] for request in server.requests] == [expected] * 3


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://h.example.org:443/a", "h.example.org"),
        ("http://H.example.org:80", "h.example.org"),
        ("http://h.example.org:443", "h.example.org:443"),
        ("https://user:word@[::1]:8443/", "[::1]:8443"),
    ],
)
def test_a_host_is_named_as_its_header_has_it(url: str, host: str) -> None:
    assert host_of(url) == host


@pytest.mark.parametrize(
    ("written", "sent"),
    [("u:p%40ss", b"u:p@ss"), ("u:%C3%A9%E2%82%AC", "u:é€".encode()), ("u:é€", "u:é€".encode())],
)
def test_a_proxys_password_beyond_ascii_is_sent_as_utf_8(
    server: SinkServer, monkeypatch: pytest.MonkeyPatch, written: str, sent: bytes
) -> None:
    """A proxy would refuse every alert of a user whose password has an umlaut."""
    monkeypatch.setenv("http_proxy", server.url.replace("//", f"//{written}@"))
    send(Client("http://alerts.example.org/hook", 5.0))
    expected = f"Basic {base64.b64encode(sent).decode()}"
    assert [request.headers["proxy-authorization"] for request in server.requests] == [expected] * 3


@pytest.mark.first
def test_a_tls_port_that_says_nothing_is_given_up_before_the_attempts_end() -> None:
    with silent_port() as port:
        began = time.monotonic()
        with pytest.raises(NoAnswerError) as caught:
            send(Client(f"https://127.0.0.1:{port}/hook", 0.3), 1)
    assert time.monotonic() - began < attempt_seconds(0.3)
    assert (caught.value.fault, caught.value.not_taken) == ("tls", True)


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [("http", "refused"), ("https", "refused")],
)
def test_a_port_where_nothing_listens_is_told_from_other_faults(scheme: str, fault: str) -> None:
    with closed_port() as port, pytest.raises(NoAnswerError, match="connection refused by") as caught:
        send(Client(f"{scheme}://127.0.0.1:{port}/hook", 5.0), 1)
    assert (caught.value.fault, caught.value.not_taken) == (fault, True)


def test_https_to_a_port_that_speaks_http_is_told_from_other_faults() -> None:
    """The advice would be to raise timeoutSeconds."""
    plain = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(plain)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NoAnswerError) as caught:
            send(Client(f"https://127.0.0.1:{listening.getsockname()[1]}/hook", 5.0), 1)
        thread.join()
    assert (caught.value.fault, caught.value.not_taken) == ("wrong_scheme", True)


@pytest.mark.parametrize(("status", "fault"), [(407, "proxy_login"), (403, "proxy"), (502, "proxy")])
def test_a_proxy_that_gives_no_tunnel_is_told_from_the_sink(
    server: SinkServer, monkeypatch: pytest.MonkeyPatch, status: int, fault: str
) -> None:
    with scripted_port([f"HTTP/1.1 {status} No\r\n\r\n".encode()]) as port:
        monkeypatch.setenv("https_proxy", f"http://user:word@127.0.0.1:{port}")
        with pytest.raises(NoAnswerError, match=f"the proxy 127.0.0.1:{port} .* answered {status}") as caught:
            send(Client("https://alerts.example.org/hook", 5.0), 1)
    assert (caught.value.fault, caught.value.not_taken) == (fault, True)


def test_a_host_without_an_address_is_told_from_other_faults() -> None:
    with pytest.raises(NoAnswerError, match=r"no such host: alerts\.invalid") as caught:
        send(Client("https://alerts.invalid/hook", 5.0), 1)
    assert (caught.value.fault, caught.value.not_taken) == ("dns", True)
