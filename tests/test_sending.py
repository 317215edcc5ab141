"""The client that sends: what the environment asks of it, and a connection that is kept between requests.

The first request connects, the ones after it take another way through the code: each test sends several.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.receiver import Receiver
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import (
    TLS_PEM,
    Answer,
    SinkServer,
    closed_port,
    cut_off,
    garbage,
    hang_up,
    huge,
    ok,
    scripted_port,
)

from ops_alert_dispatch import (
    MAX_ANSWER_BYTES,
    Client,
    HttpRequest,
    NoAnswerError,
    host_of,
    read_answer,
    read_plain_head,
    response_classes,
)

HEADERS = {"Content-Type": "application/json", "webhook-id": "esc_1"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no CA of the tester's own."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[SinkServer]:
    with SinkServer() as sink_server:
        yield sink_server


def send(client: Client, url: str, count: int = 3) -> list[bytes]:
    """Send requests with the bodies 0, 1, 2, …; returns the bodies of the answers."""
    return [client.send(HttpRequest(url, HEADERS, b"%d" % number)).body for number in range(count)]


def test_a_connection_is_kept_between_requests(server: SinkServer) -> None:
    client = Client(5.0)

    assert send(client, f"{server.url}/hook") == [b"ok"] * 3
    assert [request.body for request in server.requests] == [b"0", b"1", b"2"]
    assert {request.connection for request in server.requests} == {1}
    assert len({tuple(request.headers.items()) for request in server.requests}) == 1
    assert server.requests[0].headers["user-agent"].startswith("ops-alert-dispatch/")


def test_a_header_is_sent_once_however_it_is_spelled() -> None:
    client = Client(5.0)
    with Receiver() as receiver:
        request = HttpRequest(f"{receiver.url}/hook", {"user-AGENT": "mine", "X-Team": "night-watch"}, b"x")
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

    send(Client(5.0), "http://alerts.example.org/hook")

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
        send(Client(5.0), f"{server.url}/hook")

    assert [request.path for request in server.requests] == ["/hook"] * 3


@pytest.fixture
def private_ca(tmp_path: Path) -> str:
    bundle = tmp_path / "ca.pem"
    bundle.write_text(TLS_PEM)
    return str(bundle)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_private_ca_is_trusted(private_ca: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, private_ca)
    with SinkServer(tls=True) as server:
        assert send(Client(5.0), f"{server.url}/hook") == [b"ok"] * 3

        assert {request.connection for request in server.requests} == {1}


def test_a_certificate_of_nobody_known_is_refused() -> None:
    with SinkServer(tls=True) as server:
        with pytest.raises(NoAnswerError, match=r"certificate of 127\.0\.0\.1:.* is not valid"):
            send(Client(5.0), f"{server.url}/hook")

        assert server.requests == []


def test_tls_goes_through_a_proxy_unread(private_ca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", private_ca)
    with SinkServer(tls=True) as server, tunnel(server.port) as (port, asked):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert send(Client(5.0), "https://localhost:7443/hook") == [b"ok"] * 3

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
    send(Client(5.0), server.url.replace("//", "//user:word@") + "/hook")

    assert [request.headers["authorization"] for request in server.requests] == ["Basic dXNlcjp3b3Jk"] * 3
    assert {request.path for request in server.requests} == {"/hook"}


SLOW = ok().after(1.0)


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (cut_off(), "hung up before the answer was complete"),
        (hang_up(), "hung up before the answer was complete"),
        (garbage(), "answered with something that is not HTTP"),
        (SLOW, "no complete answer .* within 0.3 s"),
    ],
    ids=["cut off", "hang-up", "garbage", "too slow"],
)
def test_an_answer_that_fails_is_judged_alike_and_never_taken_for_that_to_the_next_request(
    server: SinkServer, fault: Answer, words: str, kept: bool
) -> None:
    client = Client(0.3)
    server.script("/hook", *([ok()] if kept else []), fault, Answer(body=b"next"))
    if kept:
        send(client, f"{server.url}/hook", 1)

    with pytest.raises(NoAnswerError, match=words) as caught:
        send(client, f"{server.url}/hook", 1)

    assert not caught.value.not_taken
    assert send(client, f"{server.url}/hook", 1) == [b"next"]


@pytest.mark.parametrize(
    "ending",
    [
        Answer(headers={"Connection": "close"}),
        huge(length=MAX_ANSWER_BYTES + 1),
        Answer(
            body=b"okHTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno", headers={"Content-Length": "2"}
        ),
    ],
    ids=["close", "huge", "two answers"],
)
def test_a_connection_that_is_of_no_more_use_is_replaced(server: SinkServer, ending: Answer) -> None:
    server.script("/hook", ok(), ending, ok(), ending, ok())

    answers = send(Client(5.0), f"{server.url}/hook", 5)

    length = min(int(ending.headers.get("Content-Length", MAX_ANSWER_BYTES)), MAX_ANSWER_BYTES)
    assert answers == [b"ok", ending.body[:length]] * 2 + [b"ok"]
    assert [request.connection for request in server.requests] == [1, 1, 2, 2, 3]


def test_a_sink_that_was_restarted_between_two_requests_costs_no_attempt() -> None:
    client = Client(5.0)
    with SinkServer() as before:
        send(client, f"{before.url}/hook", 2)
    with SinkServer(port=before.port) as after:
        assert send(client, f"{after.url}/hook", 2) == [b"ok"] * 2
        assert [request.connection for request in after.requests] == [1, 1]


@pytest.mark.parametrize("url", ["http://[::1", "http://alerts.invalid:1/"])
def test_a_url_that_leads_nowhere_is_no_traceback(url: str) -> None:
    with pytest.raises(NoAnswerError):
        send(Client(2.0), url, 1)


def test_a_ca_bundle_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")

    with pytest.raises(NoAnswerError, match=r"CA.*/nowhere/ca\.pem"):
        send(Client(2.0), "https://127.0.0.1:1/hook", 1)


# --- An answer, which http.client reads slowly and trusts too much


def heard(kind: type[http.client.HTTPResponse], data: bytes) -> object:
    """What a kind of response makes of these bytes from a sink that then hangs up."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        response = kind(ours, method="POST")
        try:
            response.begin()
            fields = [(name.lower(), value.strip()) for name, value in response.headers.items()]
            # One that is followed by something else ends ours, where http.client goes on.
            closes = response.will_close or len(data.partition(b"\r\n\r\n")[2]) > (response.length or 0)
            return response.status, fields, closes, response.chunked, read_answer(response)
        except (http.client.HTTPException, ValueError) as fault:
            return type(fault)
        finally:
            response.close()


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

names = st.sampled_from(
    ["Content-Length", "content-length", "Retry-After", "Transfer-Encoding", "Connection", "X"]
)
values = st.sampled_from(
    ["", "0", "2", "30", "-1", "2, 2", "chunked", "close", "Keep-Alive", " a:b ", "h\xe9"]
)


@given(
    st.sampled_from(
        ["HTTP/1.1 200 OK", "HTTP/1.1 429 ", "HTTP/1.1 204 No", "HTTP/1.0 200 OK", "HTTP/1.1 99 OK"]
    ),
    st.lists(st.tuples(names, st.sampled_from([":", ": ", " : "]), values), max_size=4),
    st.sampled_from(["\r\n\r\n", "\n\n"]),
    st.sampled_from(["", "ok", "2\r\nok\r\n0\r\n\r\n", "okay"]),
)
@example("HTTP/1.1 200 OK", [("Content-Length", ": ", "2")], "\r\n\r\n", "ok")
def test_an_answer_means_what_it_means_to_http_client(
    status: str, fields: list[tuple[str, str, str]], end: str, body: str
) -> None:
    """A message that one reader takes for delivered and another for cut off would be lost, or sent twice."""
    data = ("\r\n".join([status, *map("".join, fields)]) + end + body).encode("latin-1")

    expected = heard(http.client.HTTPResponse, data)
    assert [heard(kind, data) for kind in response_classes()] == [expected, expected]


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nX: y\r\n",
        CHUNKED,
        CHUNKED + b"2\r\no",
        CHUNKED + b"-1\r\n" + b"x" * 1_000_000,
        CHUNKED + b"1" * 70_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100_000,
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_an_answer_that_is_cut_off_or_without_end_is_none(data: bytes, kept: bool) -> None:
    """Taken for a success, an alert that the sink had not finished with is never sent again."""
    with scripted_port([PLAIN, data] if kept else [data]) as port:
        client = Client(5.0)
        url = f"http://127.0.0.1:{port}/hook"
        if kept:
            send(client, url, 1)
        with pytest.raises(NoAnswerError):
            send(client, url, 1)


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_not_taken_for_the_answer(interim: str, kept: bool) -> None:
    """A lane that took it for one would send an alert again that its sink has taken."""
    early = f"HTTP/1.1 {interim}\r\nLink: </a>\r\n\r\n".encode()
    with scripted_port([PLAIN, 2 * early + PLAIN] if kept else [2 * early + PLAIN]) as port:
        assert send(Client(5.0), f"http://127.0.0.1:{port}/hook", 2 if kept else 1) == [b"ok"] * (1 + kept)


def test_an_answer_that_tls_has_read_ahead_is_none_to_the_next_request(
    private_ca: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 500 that is taken for delivered is an alert that nobody gets."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", private_ca)
    ahead = PLAIN + b" " * (8192 - len(PLAIN)) + PLAIN
    failed = b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"
    with scripted_port([ahead, failed], tls=True) as port:
        client = Client(5.0)
        request = HttpRequest(f"https://127.0.0.1:{port}/hook", HEADERS, b"0")
        assert [client.send(request).status for _ in range(2)] == [200, 500]


def test_a_sink_that_hangs_up_after_each_answer_without_a_word_gets_everything() -> None:
    with scripted_port([PLAIN], hang_up=True) as port:
        client = Client(5.0)
        request = HttpRequest(f"http://127.0.0.1:{port}/hook", HEADERS, b"0")
        statuses = []
        for _ in range(20):
            statuses.append(client.send(request).status)
            time.sleep(0.02)  # its hang-up arrives

    assert statuses == [200] * 20
    assert client._hang_ups == 2


@pytest.mark.parametrize(
    ("written", "sent"),
    [("u:p%40ss", b"u:p@ss"), ("u:%C3%A9%E2%82%AC", "u:é€".encode()), ("u:%E9", b"u:\xe9"), ("u:", b"u:")],
)
def test_a_password_in_a_url_is_sent_byte_by_byte(server: SinkServer, written: str, sent: bytes) -> None:
    send(Client(5.0), server.url.replace("//", f"//{written}@") + "/hook")

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
    "data",
    [
        PLAIN[:-4],
        PLAIN.replace(b"200", b"204"),
        PLAIN.replace(b"/1.1", b"/1.0"),
        PLAIN.replace(b"200", b"100"),
        PLAIN.replace(b"2\r\n\r", b"2\r\nContent-Length: 2\r\n\r"),
        PLAIN.replace(b"2\r\n\r", b"2\r\nConnection: close\r\n\r"),
        PLAIN.replace(b"2\r\n\r", b"2\r\nTransfer-Encoding: chunked\r\n\r"),
        PLAIN.replace(b"2\r\n\r", b"2\r\n folded\r\n\r"),
        PLAIN.replace(b"\r\n", b"\n"),
        b"<html>",
        b"",
    ],
)
def test_only_the_plainest_of_answers_is_read_by_the_program_itself(data: bytes) -> None:
    assert read_plain_head(PLAIN) == (200, {"content-length": "2"}, len(PLAIN) - 2)
    assert read_plain_head(data) is None
