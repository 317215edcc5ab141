"""A small real HTTP server for tests: it records what it is sent and answers as it is told.

In a test:

    with SinkServer() as server:
        server.answer("/chat", rate_limited(2))       # from now on
        server.script("/hook", error(503), hang_up())  # once each, then the usual answer
        ...
        assert len(server.received("/hook")) == 3

As a process, for shell tests and crash tests:

    python tests/loopback.py --port-file port --log received.jsonl --status 503
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import email.utils
import functools
import http.client
import json
import os
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import TracebackType
from typing import IO, Any, Literal, Self, cast

HOST = "127.0.0.1"

# A throw-away key that protects nothing, self-signed for localhost, valid from 2020 to 2120: written down
# here so that a TLS test needs no other program and no clock.
TLS_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgmIGTTIaVDwWYEPHt
KQW2JJfFyT2FTT61SICt+y6vJG2hRANCAAR9gsRnzufGXVY/1gRGCupsuXi2AAm/
tSBjG1YijSnWEfrxbRHLexFq7dSiJSG7h9aGgbI6UvGFWRFCet8EI9lO
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBejCCASCgAwIBAgIUPvJwnRTd2EBgRIrPxaAa2BHUNLYwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR9gsRnzufGXVY/1gRGCupsuXi2AAm/tSBjG1YijSnWEfrxbRHLexFq
7dSiJSG7h9aGgbI6UvGFWRFCet8EI9lOo04wTDAaBgNVHREEEzARgglsb2NhbGhv
c3SHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUZxXFUSXy6Kkt2GuY
NP/UBU69H5kwCgYIKoZIzj0EAwIDSAAwRQIgQl2Qw7em/Mnn5JNnteVeQQ3EPdvb
5gjdr+cDzzk8QcoCIQDjlo4i2lD3cHZoy9mOVtNET6bljSX2myxwTYfGubrJnA==
-----END CERTIFICATE-----
"""

Fault = Literal["hang", "hang_up", "cut_off", "drip_head", "drip_body", "garbage"]


@dataclass(frozen=True)
class Received:
    """One request as it arrived. Header names are lower-case; `at` is monotonic."""

    at: float
    connection: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @functools.cached_property
    def json(self) -> Any:
        """The parsed body, or None where it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b"ok"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    fault: Fault | None = None
    interval: float = 0.05

    def after(self, seconds: float) -> Answer:
        return replace(self, delay=seconds)


Behaviour = Answer | Callable[[Received], Answer]


def ok() -> Answer:
    return Answer()


def accepted() -> Answer:
    """What PagerDuty's Events API says to an event."""
    return Answer(202, b'{"status":"success","message":"Event processed","dedup_key":"d"}')


def error(status: int, body: str = "") -> Answer:
    return Answer(status, body.encode())


def rate_limited(retry_after: float | datetime.datetime, status: int = 429) -> Answer:
    """429 with Retry-After in seconds or, given a moment, as an HTTP date."""
    if isinstance(retry_after, datetime.datetime):
        value = email.utils.format_datetime(retry_after.astimezone(datetime.UTC), usegmt=True)
    else:
        value = f"{retry_after:g}"
    return Answer(status, b"slow down", {"Retry-After": value})


def redirect(location: str, status: int = 302) -> Answer:
    return Answer(status, b"", {"Location": location})


def hang() -> Answer:
    """Takes the request and never answers; ends when the server closes."""
    return Answer(fault="hang")


def hang_up() -> Answer:
    """Takes the request, then closes the connection without a byte of an answer."""
    return Answer(fault="hang_up")


def cut_off(status: int = 200) -> Answer:
    """Closes the connection in mid-answer: fewer bytes than Content-Length promised."""
    return Answer(status, b"only half of this will arrive", fault="cut_off")


def drip(part: Literal["head", "body"], interval: float = 0.2, length: int = 1000) -> Answer:
    """An answer a byte at a time: each read succeeds, the whole takes `interval * length` and more."""
    return Answer(body=b"." * length, fault="drip_head" if part == "head" else "drip_body", interval=interval)


def huge(status: int = 400, length: int = 50_000_000) -> Answer:
    return Answer(status, b"x" * length)


def garbage() -> Answer:
    """Bytes that are no HTTP."""
    return Answer(body=b"\x00\x01220 smtp.example.org ESMTP\r\n\r\n", fault="garbage")


def echo(status: int = 400) -> Behaviour:
    """An error answer that repeats the whole request, headers included: what leaks secrets into logs."""

    def answer(request: Received) -> Answer:
        head = "".join(f"{name}: {value}\n" for name, value in request.headers.items())
        return Answer(status, f"{request.method} {request.path}\n{head}\n".encode() + request.body)

    return answer


def _read_head(stream: BufferedIOBase) -> tuple[str, dict[str, str]] | None:
    """The first line of a request and its headers, or None if the connection ended before they did.

    Not `http.server`: it reads headers as those of a mail, which takes as long as all the rest of a request.
    """
    lines = []
    while (line := stream.readline()).strip():
        lines.append(line.decode("latin-1"))
    if not line or not lines:
        return None
    fields = [field.partition(":") for field in lines[1:]]
    return lines[0], {name.lower(): value.strip() for name, _, value in fields}


class _Server(ThreadingTCPServer):
    # Every handler is joined on close: a test that leaves a thread behind would spoil the next one.
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, port: int, sink: SinkServer, tls: ssl.SSLContext | None) -> None:
        self.sink = sink
        self.tls = tls
        super().__init__((HOST, port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            # The handshake is left to the handler's thread: here it would keep others from connecting.
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.sink.opened(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or refuses our certificate, is a part of many tests."""
        if not isinstance(sys.exception(), OSError) and not self.sink.closing.is_set():
            super().handle_error(request, client_address)


class _Handler(StreamRequestHandler):
    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        number = self.server.sink.connection_number()
        self.is_open = True
        while self.is_open and (head := _read_head(self.rfile)):
            method, path, _ = head[0].split()
            length = int(head[1].get("content-length", "0"))
            body = self.rfile.read(length)
            if len(body) < length:  # its sender has died: nobody could act on half a request
                break
            request = Received(time.monotonic(), number, method, path, head[1], body)
            self.send(self.server.sink.take(request))

    def send(self, answer: Answer) -> None:
        closing = self.server.sink.closing
        if closing.wait(answer.delay):
            self.hang_up()
            return
        reason = http.client.responses.get(answer.status, "Unknown")
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {answer.status} {reason}\r\n{fields}\r\n".encode("latin-1")
        match answer.fault:
            case None:
                self.wfile.write(head + answer.body)
                if headers.get("Connection", "").lower() == "close":
                    self.hang_up()
            case "hang":
                closing.wait()
                self.hang_up()
            case "hang_up":
                self.hang_up()
            case "cut_off":
                self.wfile.write(head + answer.body[: len(answer.body) // 2])
                self.hang_up()
            case "garbage":
                self.wfile.write(answer.body)
                self.hang_up()
            case "drip_head":
                self.drip(head + answer.body, answer.interval)
            case "drip_body":
                self.wfile.write(head)
                self.drip(answer.body, answer.interval)

    def drip(self, data: bytes, interval: float) -> None:
        for number in data:
            if self.server.sink.closing.wait(interval):
                self.hang_up()
                return
            self.wfile.write(bytes([number]))

    def hang_up(self) -> None:
        self.is_open = False
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class SinkServer:
    """The server. `answer` and `script` name a path by its beginning; the longest one that fits counts."""

    def __init__(
        self, *, default: Behaviour | None = None, port: int = 0, tls: bool = False, log: Path | None = None
    ) -> None:
        self.default = default or ok()
        self.closing = threading.Event()
        self._answers: dict[str, Behaviour] = {}
        self._scripts: dict[str, deque[Behaviour]] = {}
        self._requests: list[Received] = []
        self._connections: list[socket.socket] = []
        self._connection_count = 0
        self._changed = threading.Condition()
        self._log: IO[str] | None = log.open("a", encoding="utf-8") if log else None
        self._server = _Server(port, self, _server_context() if tls else None)
        self.port = int(self._server.server_address[1])
        self.url = f"{'https' if tls else 'http'}://{HOST}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="sink-server")
        self._thread.start()

    def answer(self, path: str, behaviour: Behaviour) -> None:
        """From now on, requests to paths that begin with `path` are answered so."""
        with self._changed:
            self._answers[path] = behaviour

    def script(self, path: str, *behaviours: Behaviour) -> None:
        """The next requests are answered so, one each; then as `answer` says."""
        with self._changed:
            self._scripts.setdefault(path, deque()).extend(behaviours)

    @property
    def requests(self) -> list[Received]:
        with self._changed:
            return list(self._requests)

    def received(self, path: str) -> list[Received]:
        """The requests so far to paths that begin with `path`, in the order of their arrival."""
        return [request for request in self.requests if request.path.startswith(path)]

    def forget(self) -> None:
        with self._changed:
            self._requests.clear()

    def wait_for(self, count: int, path: str = "/", timeout: float = 30.0) -> list[Received]:
        """Wait until that many requests have arrived."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.received(path)) >= count, timeout):
                found = len(self.received(path))
                raise TimeoutError(f"{found} of {count} requests to {path} after {timeout} s")
        return self.received(path)

    def take(self, request: Received) -> Answer:
        """Record a request and choose its answer. For the handler."""
        with self._changed:
            self._requests.append(request)
            if self._log is not None:
                self._log.write(_log_line(request))
                self._log.flush()
            behaviour = self._behaviour(request.path)
            self._changed.notify_all()
        return behaviour if isinstance(behaviour, Answer) else behaviour(request)

    def _behaviour(self, path: str) -> Behaviour:
        for beginning in sorted(self._scripts, key=len, reverse=True):
            if path.startswith(beginning) and self._scripts[beginning]:
                return self._scripts[beginning].popleft()
        beginnings = [beginning for beginning in self._answers if path.startswith(beginning)]
        return self._answers[max(beginnings, key=len)] if beginnings else self.default

    def opened(self, connection: socket.socket) -> None:
        """Keep a connection, to end it on close. For the server."""
        self._connections = [known for known in self._connections if known.fileno() != -1]
        self._connections.append(connection)

    def connection_number(self) -> int:
        with self._changed:
            self._connection_count += 1
            return self._connection_count

    def close(self) -> None:
        """End everything at once: what waits, what drips, what is kept alive."""
        if self.closing.is_set():
            return
        self.closing.set()
        # Wakes the thread that waits for connections: it would look only every now and then whether to end.
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        # Nothing is accepted any more, so this list is whole.
        for connection in self._connections:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own shutdown: it would take the TLS state from under the handler.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and stays so: it is bound (nobody else gets it), but not listening."""
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        yield int(bound.getsockname()[1])


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port where connecting works and nothing is ever read or said: TLS never gets its handshake."""
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(128)
        yield int(listening.getsockname()[1])


@contextlib.contextmanager
def scripted_port(answers: Sequence[bytes], *, tls: bool = False, hang_up: bool = False) -> Iterator[int]:
    """A port that answers each request with the next of these bytes, the last one again and again. It hangs
    up after the last one, or with `hang_up` after each."""
    left = list(answers)
    context = _server_context() if tls else None

    class Handler(StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while head := _read_head(self.rfile):
                    self.rfile.read(int(head[1].get("content-length", "0")))
                    last = len(left) == 1
                    self.wfile.write(left[0] if last else left.pop(0))
                    if hang_up or last:
                        return

    class Server(ThreadingTCPServer):
        daemon_threads = True

        def finish_request(self, request: Any, client_address: Any) -> None:
            if context is None:
                super().finish_request(request, client_address)
                return
            with contextlib.suppress(OSError), context.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(cast("Any", wrapped), client_address)

    with Server((HOST, 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.socket.shutdown(socket.SHUT_RDWR)
            server.shutdown()
            serving.join()


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The ssl module loads a key from a file only.
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
        pem.write(TLS_PEM)
        pem.flush()
        context.load_cert_chain(pem.name)
    return context


def _log_line(request: Received) -> str:
    row = {
        "at": request.at,
        "method": request.method,
        "path": request.path,
        "headers": dict(request.headers),
        "body": request.body.decode("utf-8", "replace"),
        "json": request.json,
    }
    return json.dumps(row, separators=(",", ":")) + "\n"


def _path_status(text: str) -> tuple[str, int]:
    path, found, status = text.rpartition("=")
    if not found or not path.startswith("/") or not status.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not /PATH=STATUS")
    return path, int(status)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Receive requests, log them, answer as told.")
    parser.add_argument("--port-file", type=Path, required=True, help="the port is written to this file")
    parser.add_argument("--log", type=Path, help="each request is appended to this file as one JSON line")
    parser.add_argument("--port", type=int, default=0, help="a free one when left out")
    parser.add_argument("--status", type=int, default=200, help="of every answer (default 200)")
    parser.add_argument(
        "--answer", type=_path_status, action="append", default=[], metavar="/PATH=STATUS", help="on one path"
    )
    parser.add_argument("--body", default="ok", help="of every answer (default ok)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--retry-after", type=float, help="seconds, as a header of every answer")
    options = parser.parse_args(argv)
    headers = {} if options.retry_after is None else {"Retry-After": f"{options.retry_after:g}"}
    default = Answer(options.status, options.body.encode(), headers, options.delay)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with SinkServer(default=default, port=options.port, log=options.log) as server:
        for path, status in options.answer:
            server.answer(path, replace(default, status=status))
        # By rename, so that who waits for the file never reads half a number.
        temporary = options.port_file.with_name(f"{options.port_file.name}.{os.getpid()}")
        temporary.write_text(f"{server.port}\n", encoding="ascii")
        temporary.replace(options.port_file)
        ended.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
