"""Connecting has a time limit of its own: the answer gets its whole timeoutSeconds, once a request is sent.

With the real resolver and the real program: a mount namespace gives it its own /etc/hosts and resolv.conf.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RUN_TIMEOUT, Repo
from escalations import CHAT, HOOK, PATHS, health_critical, sink_config
from loopback import TLS_PEM, Answer, SinkServer, ok
from tools import needs_tool

import ops_alert_dispatch as program

NAME = "alerts.example.test"


def only_the_webhook(**settings: Any) -> dict[str, Any]:
    config = sink_config(everywhere=True)
    sink = {**config["sinks"][HOOK], **settings}
    del sink["timeoutSeconds"]  # the default is what most have
    config["sinks"] = {HOOK: sink}
    config["routing"] = {"defaultSinks": [HOOK]}
    return config


@pytest.fixture
def dispatch_with(tmp_path: Path, repo: Repo) -> Any:
    """Runs a pass in which these files of the machine are others: name to content."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a program other files")
    unshare = needs_tool("unshare")
    if subprocess.run([unshare, "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")

    def run(url: str, files: dict[str, str]) -> dict[str, Any]:
        mounts = []
        for number, (path, content) in enumerate(files.items()):
            mine = tmp_path / f"file-{number}"
            mine.write_text(content)
            mounts.append(f"mount --bind {mine} {path}")
        script = " && ".join([*mounts, 'exec "$@"'])
        done = subprocess.run(
            [unshare, "--mount", "bash", "-c", script, "bash", *repo.command, "dispatch", *repo.target],
            env={**repo.env, "ALERT_HOOK_URL": url},
            cwd=repo.root,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary

    return run


@contextlib.contextmanager
def full_backlog(port: int) -> Iterator[None]:
    """An address of IP version 6 where connecting never ends."""
    with socket.socket(socket.AF_INET6) as listening, contextlib.ExitStack() as waiting:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(("::1", port))
        listening.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket(socket.AF_INET6))
            client.setblocking(False)
            client.connect_ex(("::1", port))
        yield


@pytest.mark.first
def test_a_dead_first_address_costs_no_answer(repo: Repo, server: SinkServer, dispatch_with: Any) -> None:
    """The sink would get the same alert on every pass, and the next one never."""
    repo.write_config(only_the_webhook(allowInsecureHttp=True))
    repo.append(health_critical())
    # Slow, but well within the default timeoutSeconds: all of it must still be there for the answer.
    server.answer(PATHS[HOOK], ok().after(2.0))
    with full_backlog(server.port):
        url = f"http://{NAME}:{server.port}{PATHS[HOOK]}"
        said = dispatch_with(url, {"/etc/hosts": f"::1 {NAME}\n127.0.0.1 {NAME}\n"})
    assert (said["status"], said["dispatchedCount"]) == ("success", 1)
    assert len(server.received(PATHS[HOOK])) == 1


@contextlib.contextmanager
def nameservers() -> Iterator[str]:
    """A resolv.conf of two nameservers: the first says nothing, the second knows one address of NAME."""

    def serve(listening: socket.socket) -> None:
        while True:
            question, asker = listening.recvfrom(512)
            if not question:
                return
            is_a = question[-4:-2] == b"\0\1"  # the type, before the class, ends the question
            counts = b"\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0"
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1" if is_a else b""
            end = question.index(b"\0", 12) + 5
            listening.sendto(question[:2] + b"\x81\x80" + counts + question[12:end] + answer, asker)

    first, second = (f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.{last}" for last in (2, 3))
    with socket.socket(type=socket.SOCK_DGRAM) as silent, socket.socket(type=socket.SOCK_DGRAM) as speaking:
        silent.bind((first, 53))
        speaking.bind((second, 53))
        thread = threading.Thread(target=serve, args=(speaking,))
        thread.start()
        try:
            yield f"nameserver {first}\nnameserver {second}\n"
        finally:
            with socket.socket(type=socket.SOCK_DGRAM) as last:
                last.sendto(b"", (second, 53))
            thread.join()


@pytest.mark.first
def test_a_silent_first_nameserver_costs_no_answer(
    repo: Repo, server: SinkServer, dispatch_with: Any
) -> None:
    repo.write_config(only_the_webhook(allowInsecureHttp=True))
    repo.append(health_critical())
    server.answer(PATHS[HOOK], ok().after(2.0))
    with nameservers() as resolv_conf:
        url = f"http://{NAME}:{server.port}{PATHS[HOOK]}"
        began = time.monotonic()
        said = dispatch_with(url, {"/etc/resolv.conf": resolv_conf})
    assert time.monotonic() - began > 5.0  # the resolver did wait
    assert (said["status"], said["dispatchedCount"]) == ("success", 1)
    assert len(server.received(PATHS[HOOK])) == 1


def test_the_machines_ca_store_is_trusted(repo: Repo, dispatch_with: Any) -> None:
    """curl accepts a private CA that an administrator has added; alerts would not arrive."""
    paths = ssl.get_default_verify_paths()
    bundle = next(filter(os.path.exists, (paths.openssl_cafile, *program.MACHINE_BUNDLES)), None)
    hashed = any(Path(paths.openssl_capath).glob("*.0"))
    if bundle is None or (bundle != paths.openssl_cafile and hashed):
        pytest.skip("this Python takes the machine's CAs from a folder")
    repo.write_config(only_the_webhook())
    repo.append(health_critical())
    with SinkServer(tls=True) as server:
        said = dispatch_with(f"{server.url}{PATHS[HOOK]}", {bundle: TLS_PEM})
        assert said["status"] == "success"
        assert len(server.requests) == 1


# --- What else an answer, or a library, says


def test_a_sinks_clock_that_is_far_off_is_said(repo: Repo, server: SinkServer) -> None:
    """Signatures are refused after five minutes, and an alert that has ended pages nobody."""
    ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    server.answer(PATHS[HOOK], Answer(headers={"Date": email.utils.format_datetime(ahead, usegmt=True)}))
    near = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=20)
    server.answer(PATHS[CHAT], Answer(headers={"Date": email.utils.format_datetime(near, usegmt=True)}))
    run = repo.run("test", "--sink", HOOK, "--sink", CHAT)
    offsets = {sink["id"]: sink.get("clockOffsetSeconds") for sink in run.json["sinks"]}
    assert offsets[CHAT] is None
    assert abs(offsets[HOOK] - 7200) < 60
    text = repo.run("test", "--sink", HOOK, "--format", "text").stdout
    assert re.search(r"\n  its clock is 7[12]\d\d s ahead of this machine's", text)


def test_a_sink_without_a_clock_is_no_trouble(repo: Repo, server: SinkServer) -> None:
    server.answer(PATHS[HOOK], Answer(headers={"Date": "once upon a time"}))
    [found] = repo.run("test", "--sink", HOOK).json["sinks"]
    assert (found["status"], "clockOffsetSeconds" in found) == ("success", False)


def test_a_librarys_warning_does_not_spoil_what_reconcile_reads(
    repo: Repo, server: SinkServer, tmp_path: Path
) -> None:
    """requests warns as it is imported beside a chardet that it does not know."""
    folder = tmp_path / "packages"
    (folder / "chardet").mkdir(parents=True)
    (folder / "chardet" / "__init__.py").write_text("__version__ = '99.0.0'\n")
    repo.append(health_critical())
    run = repo.dispatch(env={"PYTHONPATH": f"{folder}:{Path(program.__file__).parent}"})
    assert run.stderr == ""
    assert run.json["status"] == "success"
