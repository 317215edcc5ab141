"""A receiver of POSTs that is quick enough to measure a sender by: a thread a connection, plain sockets."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import NamedTuple, Self

ANSWERS = {
    200: b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok",
    404: b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nno",
}
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Arrival(NamedTuple):
    """One POST: when its last byte was read (monotonic seconds), its path, its head, its body."""

    at: float
    path: str
    head: bytes
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        """By their names in lower case."""
        fields = (field.partition(":") for field in self.head.decode("latin-1").split("\r\n")[1:])
        return {name.lower(): value.strip() for name, _, value in fields}


class Receiver:
    """Answers 200, on `/gone` 404, and on `/hang` never. Keeps what arrived, in order."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (self._listening, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def received(self, path: str) -> list[Arrival]:
        """What has arrived at this path so far."""
        return [arrival for arrival in self.arrivals if arrival.path == path]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        with contextlib.suppress(OSError):
            while True:
                while (end := data.find(b"\r\n\r\n")) < 0:
                    if not (piece := connection.recv(65536)):
                        return
                    data += piece
                head, data = data[:end], data[end + 4 :]
                length = LENGTH.search(head)
                wanted = int(length[1]) if length else 0
                while len(data) < wanted:
                    if not (piece := connection.recv(65536)):
                        return
                    data += piece
                path = head[: head.index(b"\r\n")].split(b" ")[1].decode("latin-1")
                self.arrivals.append(Arrival(time.monotonic(), path, head, data[:wanted]))
                data = data[wanted:]
                if path != "/hang":
                    connection.sendall(ANSWERS[404 if path == "/gone" else 200])
