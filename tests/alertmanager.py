"""Nodes of a real Prometheus Alertmanager on loopback, alone or as a cluster, that page a loopback server."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopback import HOST
from tools import needs_tool

PROGRAM = "prometheus-alertmanager"
# Seconds: far beyond what a node needs, so that one that hangs fails its test and not the suite.
PATIENCE = 30.0
# A node asks the one before it in the cluster whether it has paged, after so many seconds.
PEER_TIMEOUT = 1.5

CONFIG = """\
route:
  receiver: page
  group_by: [alertname, loop]
  group_wait: 200ms
  group_interval: 1s
  repeat_interval: 1h
receivers:
  - name: page
    webhook_configs:
      - url: PAGE_URL
"""


def wait_until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.02)


@dataclass
class Node:
    """One Alertmanager. Its web port stays its own while it is down; its gossip port is new at each start."""

    folder: Path
    page_url: str
    port: int
    options: tuple[str, ...] = ()
    config: str = CONFIG
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")

    def start(self, peers: Sequence[Node] = ()) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "alertmanager.yml").write_text(self.config.replace("PAGE_URL", self.page_url))
        command = [
            needs_tool(PROGRAM),
            f"--config.file={self.folder / 'alertmanager.yml'}",
            f"--storage.path={self.folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
            f"--cluster.listen-address={HOST}:0",
            "--cluster.settle-timeout=100ms",
            "--cluster.gossip-interval=20ms",
            f"--cluster.peer-timeout={PEER_TIMEOUT}s",
            "--cluster.probe-interval=200ms",
            "--cluster.probe-timeout=100ms",
            *(f"--cluster.peer={peer.gossip_address}" for peer in peers),
            *self.options,
        ]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(f"{self.url} listens\n{self.log}", self._listens)

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v2/{path}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def post(self, body: bytes) -> tuple[int, str]:
        """Post alerts as they are. Returns the status and the body of the answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/api/v2/alerts", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def gossip_address(self) -> str:
        cluster = self.get("status")["cluster"]
        return next(str(peer["address"]) for peer in cluster["peers"] if peer["name"] == cluster["name"])

    def knows(self, count: int) -> bool:
        """Tell whether it sees so many nodes, itself included, and is done with settling."""
        cluster = self.get("status")["cluster"]
        return cluster["status"] == "ready" and len(cluster["peers"]) == count

    def names(self) -> list[str]:
        """The names of the alerts that it holds as firing."""
        return sorted(alert["labels"]["alertname"] for alert in self.get("alerts"))

    def decided(self, name: str) -> bool:
        """Tell whether it has paged for an alert, or has left that to another node: then it has come to the
        second turn of the alert's group."""
        flushes = re.findall(rf"msg=flushing alerts=\[[^\n]*\b{re.escape(name)}\[", self.log)
        return len(flushes) >= 2

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given. Until a node listens on it, it refuses connections."""
    with socket.socket() as bound:
        # A node that sets the same, as every Go program does, can listen beside it.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, 0))
        yield int(bound.getsockname()[1])


@contextlib.contextmanager
def new_node(folder: Path, page_url: str, *options: str) -> Iterator[Node]:
    """A node that is not started yet. No process is left of it."""
    needs_tool(PROGRAM)
    with reserved_port() as port:
        node = Node(folder, page_url, port, options)
        try:
            yield node
        finally:
            node.kill()


@contextlib.contextmanager
def running_cluster(folder: Path, page_url: str) -> Iterator[tuple[Node, Node]]:
    """Two nodes that know each other."""
    telling = "--log.level=debug"  # by which a test knows what they have decided
    with (
        new_node(folder / "a", page_url, telling) as first,
        new_node(folder / "b", page_url, telling) as second,
    ):
        start_cluster(first, second)
        yield first, second


def start_cluster(first: Node, second: Node) -> None:
    first.start()
    second.start([first])
    wait_until("both nodes know each other", lambda: first.knows(2) and second.knows(2))
