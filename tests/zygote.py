"""Runs of the program that share its imports and nothing else.

Most of the time of a short run goes into importing requests and jsonschema. So that hundreds of runs do not
each pay for it, a zygote, a process that has imported all, forks for each of them. What a run sees is its
own: arguments, environment, folder, standard streams, signals. It is a child of the process that asked for
it, which can kill it and gets its exit code, as with any `subprocess.Popen`. It begins and ends where the
installed command does.

Not for tests of the start itself: what is imported when, with which interpreter, how it is installed.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import ctypes
import errno
import functools
import gc
import inspect
import json
import os
import pickle
import platform
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from escalations import health_critical, line, sink_config, sink_env

ROOT = Path(__file__).resolve().parent.parent
STREAMS = 3
# From <linux/sched.h> and <asm/unistd.h>: the second number is that of all newer architectures.
CLONE_PARENT = 0x8000
CLONE = 56 if platform.machine() == "x86_64" else 220


# --- In the zygote


def serve(connection: socket.socket) -> list[str]:
    """Fork for each request. Returns in the new process, with its arguments; never in this one."""
    while True:
        size, descriptors, _, _ = socket.recv_fds(connection, 8, STREAMS)
        if not size:
            os._exit(0)
        asked = json.loads(connection.recv(int.from_bytes(size), socket.MSG_WAITALL))
        pid = fork_sibling()
        if not pid:
            connection.close()
            return become(asked, descriptors)
        connection.sendall(pid.to_bytes(8))
        for descriptor in descriptors:
            os.close(descriptor)


def fork_sibling() -> int:
    """Do what `os.fork` does, but let the new process be a child of this one's parent: of whoever asked."""
    # The call keeps the global lock, as `os.fork` does.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    flags = CLONE_PARENT | signal.SIGCHLD
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = int(call(ctypes.c_long(CLONE), ctypes.c_long(flags), *([ctypes.c_void_p()] * 3)))
    if pid:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    if pid < 0:
        raise OSError(ctypes.get_errno(), "cannot fork")
    return pid


def become(asked: Mapping[str, Any], descriptors: Sequence[int]) -> list[str]:
    """Make this process what a new interpreter would be, started with `-m`. Returns its arguments."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    time.tzset()
    pickle.loads(base64.b64decode(asked["prepare"]))()
    sys.path[0] = str(asked["cwd"])
    # The old ones know what the zygote's streams were: a terminal or not.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        new = open(  # noqa: SIM115 - open for as long as the process lives
            number,
            "w" if number else "r",
            buffering=1 if name == "stderr" else -1,
            encoding=old.encoding,
            errors=old.errors,
            newline="\n",
            closefd=False,
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    return list(asked["arguments"])


# --- Before a run begins: see `Repo.prepare`


# From <linux/capability.h>.
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 1, 2, 21, 24


def drop_powers(*powers: int) -> None:
    """Take capabilities from this process, if it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Version 3, for this process; effective, permitted, inheritable, twice.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, sets)
    for kind in (0, 1):
        sets[kind] &= ~sum(1 << power for power in powers)
    if failed or libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "cannot drop powers")


def lose_power() -> None:
    """Have the modes of files apply to this process, also if it is root's."""
    drop_powers(CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)


def break_the_webhook() -> None:
    """Have the adapter for webhooks fail at every answer."""
    import ops_alert_dispatch as program

    class Broken(program.WebhookAdapter):
        def judge(self, answer: program.Answer, now: float) -> program.Verdict:
            raise OverflowError("the words of a secret")

    program.ADAPTERS["webhook"] = Broken()


def lose_the_source() -> None:
    """Have the source open and be found, and then fail at being read, as on a file server that is gone."""
    from unittest import mock  # imports asyncio

    import ops_alert_dispatch as program

    gone = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    mock.patch.object(program.LogFile, "end_of_lines", side_effect=gone).start()


def have_three_threads() -> None:
    """Have the system give this process three threads at most, as TasksMax of a unit does."""
    import resource

    resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
    os.setresuid(23_456, 0, 0)  # the limit is that of a user, and root has none
    drop_powers(CAP_SYS_ADMIN, CAP_SYS_RESOURCE)


def interrupt_the_first_request() -> None:
    """Press Ctrl-C as soon as a request is on its way."""
    import ops_alert_dispatch as program

    send = program.Client.send
    presses = iter([signal.SIGINT])  # a second one would kill the process

    def press_and_send(client: program.Client, request: program.HttpRequest) -> program.Answer:
        for press in presses:
            os.kill(os.getpid(), press)
        return send(client, request)

    program.Client.send = press_and_send  # type: ignore[assignment,method-assign]


def move_one_and_stop() -> None:
    """Have a pass move what waits for a peer that is gone one by one, and stop after the first one."""
    import ops_alert_dispatch as program

    program.MOVED_AT_ONCE = 1
    program.READING_SHARE = 0.0


def move_one_and_die() -> None:
    """Have a pass move what waits to other peers or sinks one by one, and be killed after the first one."""
    signal_after_one_move(signal.SIGKILL)


def move_one_and_end() -> None:
    """As `move_one_and_die`, but be asked to end."""
    signal_after_one_move(signal.SIGTERM)


def signal_after_one_move(number: int) -> None:
    import ops_alert_dispatch as program

    move_one_and_stop()
    signals = iter([number])  # a second one would kill the process

    def send(_: object) -> None:
        for one in signals:
            os.kill(os.getpid(), one)

    program.Queue.tidy = send  # type: ignore[assignment,method-assign]


# --- Where the tests run


class Zygote:
    """The process that forks, and the connection to it. It ends when the connection is closed.

    It has the limits, the umask and the like that this process had when it started it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # A warning in the program is shown, as it is when that is what Python was started with.
                [
                    *(sys.executable, "-W", "default::DeprecationWarning:ops_alert_dispatch"),
                    *(__file__, str(theirs.fileno())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
                cwd="/",
                pass_fds=[theirs.fileno()],
            )

    def fork(self, asked: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """Returns the process id of the new process."""
        request = json.dumps(asked).encode()
        with self._lock:
            socket.send_fds(self._connection, [len(request).to_bytes(8)], descriptors)
            self._connection.sendall(request)
            answer = self._connection.recv(8, socket.MSG_WAITALL)
        assert len(answer) == 8, "the zygote has ended"
        return int.from_bytes(answer)

    def close(self) -> None:
        self._connection.close()
        self.process.wait()


@functools.cache
def zygote() -> Zygote:
    """The one of this process."""
    started = Zygote()
    atexit.register(started.close)
    return started


@functools.cache
def _what_popen_hands_on() -> list[str]:
    """The names of what `subprocess.Popen` starts a process with, in its order."""
    _, *names = inspect.signature(subprocess.Popen._execute_child).parameters  # type: ignore[attr-defined]
    return names


class Forked(subprocess.Popen[str]):
    """The program with these arguments, forked by the zygote.

    Of the options of `subprocess.Popen` it takes `env`, `cwd`, the three streams, all of which must be given,
    what concerns the text in them, and a `preexec_fn` that can be pickled.
    """

    def _execute_child(self, *given: Any) -> None:
        order = dict(zip(_what_popen_hands_on(), given, strict=True))
        asked = {
            "arguments": [*order["args"]],
            "env": dict(order["env"]),
            "cwd": str(order["cwd"]),
            "prepare": base64.b64encode(pickle.dumps(order["preexec_fn"] or int)).decode(),
        }
        self.pid = zygote().fork(asked, [order[name] for name in ("p2cread", "c2pwrite", "errwrite")])
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(order[name] for name in ends))  # type: ignore[attr-defined]


class Door(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Where `forked.py` asks for runs."""

    daemon_threads = True
    request_queue_size = 64


class DoorKeeper(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        connection: socket.socket = self.request
        _, streams, _, _ = socket.recv_fds(connection, 1, STREAMS)
        with connection.makefile() as text:
            arguments, env, cwd = ast.literal_eval(text.read())
        prepare = base64.b64encode(pickle.dumps(int)).decode()
        pid = zygote().fork({"arguments": arguments, "env": env, "cwd": cwd, "prepare": prepare}, streams)
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(bytes([code if code >= 0 else 128 - code]))


@functools.cache
def for_a_shell() -> str:
    """The program as a command of a shell, for tests whose subject is not its start."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    address = str(Path(folder, "door"))
    door = Door(address, DoorKeeper)
    threading.Thread(target=door.serve_forever, daemon=True).start()
    atexit.register(door.server_close)
    atexit.register(door.shutdown)
    return shlex.join([sys.executable, "-I", "-S", str(ROOT / "tests" / "forked.py"), address])


def warm_up(program: ModuleType) -> None:
    """Do once what runs do again and again: import, compile patterns.

    No run does again what was done here, and the memory that it writes to stays shared with all of them.
    """
    import gzip  # noqa: F401
    import resource  # noqa: F401

    import jsonschema  # noqa: F401
    import requests  # noqa: F401

    os.environ.update(sink_env("http://127.0.0.1:9"))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, program.DEFAULT_CONFIG)
        config.parent.mkdir()
        config.write_text(json.dumps(sink_config(everywhere=True)))
        source = Path(folder, ".superloop/ops-manager/loop/escalations.jsonl")
        source.parent.mkdir(parents=True)
        source.write_text(line(health_critical()))
        dry_run = ["dispatch", "--loop", "loop", "--dry-run", "--show-payload", "--format"]
        for command in (["config"], ["status"], ["log"], [*dry_run, "text"], [*dry_run, "json"]):
            program.cli([*command, "--repo", folder], standalone_mode=False)
    with contextlib.suppress(program.NoAnswerError):
        program.Client("http://127.0.0.1:9/", 1.0).send(program.HttpRequest({}, b""))
    # A collection of garbage in a run would write to all of it.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))  # before what is installed, which may be another checkout's
    import ops_alert_dispatch

    warm_up(ops_alert_dispatch)
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [ops_alert_dispatch.__file__, *arguments]
    ops_alert_dispatch.program()
