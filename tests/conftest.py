"""Fixtures: a loopback server, and a repo of a host in a temporary folder to run the real program in."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from escalations import LOOP, PAGER, PATHS, lines, sink_config, sink_env
from hypothesis import settings
from leaks import leaked, leaks_under
from loopback import SinkServer, accepted
from zygote import Forked

# While tests are collected, hardly anything becomes garbage, and each search for it costs more than the last.
gc.disable()

# The same examples on every run, however slow the machine: a suite says the same of the same code.
# Search for more is fuzz.py's.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("suite")

# No test is about a power cut: in memory, the fsyncs of thousands of runs take no time.
MEMORY = Path("/dev/shm")
if (
    os.access(MEMORY, os.W_OK)
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    and shutil.disk_usage(MEMORY).free > 4 * 10**9
):
    os.environ.setdefault("TMPDIR", str(MEMORY))
    tempfile.tempdir = None  # pytest has asked for it already

# A suite under nohup, or in the background of a script, hands them on as ignored, and the program then leaves
# them so.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

MODULE_FILE = Path(__file__).resolve().parent.parent / "ops_alert_dispatch.py"
# As `-m` does, but always with the file of this checkout, whatever is installed; and, as that, compiled once.
RUN_MODULE = (
    f"import runpy, sys; sys.path.insert(0, {str(MODULE_FILE.parent)!r}); "
    f"runpy.run_module({MODULE_FILE.stem!r}, run_name='__main__', alter_sys=True)"
)
# The very object: a test that sets the same as a command of its own has it executed.
COMMAND = [sys.executable, "-c", RUN_MODULE]
AT_THE_START = re.compile("PYTHON|LD_|LC_")
# Far beyond what any run needs: it is there so that a program that hangs fails its test and not the suite.
RUN_TIMEOUT = 90.0


def pytest_xdist_auto_num_workers() -> int:
    """Four on two cores: half of the time a test waits, for a timeout or for an answer that is late."""
    return max(4, len(os.sched_getaffinity(0)))


def pytest_sessionstart(session: pytest.Session) -> None:
    """In a fresh checkout, share the work of compiling the tests: else each worker would compile them all.

    Each begins with others, and finds compiled what the workers before it had begun with.
    """
    folder = Path(__file__).parent
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or [Path(argument).resolve() for argument in session.config.args] != [folder.resolve()]:
        return
    names = sorted(path.stem for path in folder.glob("test_*.py"))
    begin = int(worker.removeprefix("gw")) * len(names) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for name in names[begin:] + names[:begin]:
        if not any(folder.glob(f"__pycache__/{name}.*-pytest-*.pyc")):
            # If it cannot be imported, pytest will say so.
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def pytest_collection_finish() -> None:
    """What was collected stays to the end: no later search for garbage looks at it again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@dataclass(frozen=True)
class Run:
    """What a run of the program left behind."""

    exit_code: int
    stdout: str
    stderr: str

    def __post_init__(self) -> None:
        for name, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            assert not leaked(text), f"a secret is on {name}: {text}"

    @property
    def json(self) -> Any:
        """What was printed, as JSON; the run must have succeeded."""
        assert self.exit_code == 0, f"exit {self.exit_code}\n{self.stdout}\n{self.stderr}"
        return json.loads(self.stdout)


def clean_env(home: Path, **more: str) -> dict[str, str]:
    """Nothing of the tester's own settings, proxies or locale."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **more}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, [] where there is none. Each line must be whole."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") or not text, f"{path.name} ends in the middle of a row"
    return [json.loads(row) for row in text.splitlines()]


def _read_all(descriptor: int) -> str:
    """Everything until the last writer has closed; a terminal says that with an error."""
    data = b""
    with contextlib.suppress(OSError), open(descriptor, "rb", buffering=0) as stream:
        while piece := stream.read(65536):
            data += piece
    return data.decode().replace("\r\n", "\n")


@dataclass
class Repo:
    """A host's repo with one loop, and the program run on it as a process of its own."""

    root: Path
    env: dict[str, str]
    loop: str = LOOP
    command: list[str] = field(default_factory=lambda: COMMAND)
    # Called in each process of the program before it begins; it must be possible to pickle it.
    prepare: Callable[[], object] | None = None

    @functools.cached_property
    def config_file(self) -> Path:
        return self.root / "config" / "ops-manager-alert-sinks.v1.json"

    @functools.cached_property
    def folder(self) -> Path:
        return self.root / ".superloop" / "ops-manager" / self.loop

    @functools.cached_property
    def source(self) -> Path:
        return self.folder / "escalations.jsonl"

    @functools.cached_property
    def state_file(self) -> Path:
        return self.folder / "alert-dispatch-state.json"

    @functools.cached_property
    def queue_file(self) -> Path:
        return self.root / ".superloop" / "ops-manager" / "alert-queue.db"

    @functools.cached_property
    def telemetry_file(self) -> Path:
        return self.folder / "telemetry" / "alerts.jsonl"

    @functools.cached_property
    def attempts_file(self) -> Path:
        return self.folder / "telemetry" / "alert-attempts.jsonl"

    def write_config(self, config: Mapping[str, Any] | str) -> None:
        text = config if isinstance(config, str) else json.dumps(config)
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(text, encoding="utf-8")

    def append(self, *records: Mapping[str, Any] | str | bytes) -> None:
        """Append records, or text or bytes as they are, to the source."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.source.open("ab") as source:
            for record in records:
                data = lines([record]) if isinstance(record, Mapping) else record
                source.write(data.encode() if isinstance(data, str) else data)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None, stdin: str = "") -> Run:
        """Run the program to its end; `env` is added to the repo's own."""
        with self.popen(*arguments, stdin=subprocess.PIPE, env=env) as process:
            try:
                stdout, stderr = process.communicate(stdin, RUN_TIMEOUT)
            finally:
                process.kill()
        return Run(process.returncode, stdout, stderr)

    def dispatch(self, *options: str, env: Mapping[str, str] | None = None) -> Run:
        return self.run("dispatch", *self.target, *options, env=env)

    @property
    def target(self) -> list[str]:
        return ["--repo", str(self.root), "--loop", self.loop]

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start the program, for tests that signal it or run it beside another."""
        return self.popen(*arguments, env=env)

    def popen(
        self,
        *arguments: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start the program with these streams.

        It is forked by the zygote, unless the test has a command of its own or settings that a process reads
        only as it starts.
        """
        env = {**self.env, **(env or {})}
        forked = self.command is COMMAND and not any(map(AT_THE_START.match, env))
        start, command = (Forked, arguments) if forked else (subprocess.Popen, [*self.command, *arguments])
        return start(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            env=env,
            cwd=self.root,
            preexec_fn=self.prepare,
        )

    def run_on_terminal(
        self, *arguments: str, streams: Collection[str] = ("stdout",), env: Mapping[str, str] | None = None
    ) -> Run:
        """Run the program with these of its output streams on a terminal each; the others are pipes."""
        readers = {}
        writers = {}
        for stream in ("stdout", "stderr"):
            readers[stream], writers[stream] = os.openpty() if stream in streams else os.pipe()
            if stream in streams:
                termios.tcsetwinsize(writers[stream], (50, 160))
        process = self.popen(*arguments, **writers, env={"TERM": "xterm-256color", **(env or {})})
        for writer in writers.values():
            os.close(writer)
        with ThreadPoolExecutor() as pool:
            texts = {stream: pool.submit(_read_all, reader) for stream, reader in readers.items()}
            try:
                exit_code = process.wait(RUN_TIMEOUT)
            finally:
                process.kill()
        return Run(exit_code, texts["stdout"].result(), texts["stderr"].result())

    def state(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.state_file.read_text(encoding="utf-8"))
        return loaded

    def telemetry(self) -> list[dict[str, Any]]:
        return read_rows(self.telemetry_file)

    def attempts(self) -> list[dict[str, Any]]:
        return read_rows(self.attempts_file)

    def snapshot(self) -> dict[str, tuple[int, int, bytes]]:
        """Mode, time and content of everything in the repo: if two are equal, nothing was touched between."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            stat = path.stat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(self.root))] = (stat.st_mode, stat.st_mtime_ns, content)
        return found


# Every column of the queue that holds a time, in seconds since the epoch. Those of the records themselves
# stay.
TIMES = {
    "escalations": ("ingested_at", "settled_at"),
    "deliveries": ("waiting_since", "not_before", "first_failed_at"),
    "destinations": (
        *("used_at", "paced_until", "next_attempt_at", "failing_since", "last_success_at", "last_failure_at"),
    ),
    "losses": ("last_at", "acknowledged_at"),
}


def edit_queue(repo: Repo, *statements: str) -> None:
    """Run statements on the queue, while no pass does."""
    with contextlib.closing(sqlite3.connect(repo.queue_file)) as queue, queue:
        for statement in statements:
            queue.execute(statement)


def queue_rows(repo: Repo, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """What a query of the queue gives, while no pass works."""
    with contextlib.closing(sqlite3.connect(repo.queue_file)) as queue:
        return queue.execute(sql, values).fetchall()


def time_passes(repo: Repo, seconds: float) -> None:
    """Make everything that the program remembers this much older."""
    edit_queue(
        repo,
        *(
            # 0 is no time.
            f"UPDATE {table} SET {column} = {column} - {seconds!r} WHERE {column} > 0"
            for table, columns in TIMES.items()
            for column in columns
        ),
    )
    if repo.state_file.exists():
        state = repo.state()
        then = datetime.fromisoformat(state["updatedAt"]) - timedelta(seconds=seconds)
        state["updatedAt"] = then.strftime("%Y-%m-%dT%H:%M:%SZ")
        repo.state_file.write_text(json.dumps(state), encoding="utf-8")


# Folders that were looked through already.
_SEARCHED: set[Path] = set()


@pytest.fixture(autouse=True)
def nothing_that_a_test_leaves_behind_holds_a_secret(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    folder = request.node.funcargs.get("tmp_path")
    if folder is not None:
        _SEARCHED.add(folder)
        assert not leaks_under(folder)


@pytest.fixture(autouse=True, scope="session")
def nothing_that_the_suite_leaves_behind_holds_a_secret(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    yield
    folders = set(tmp_path_factory.getbasetemp().iterdir()) - _SEARCHED
    leaks = {folder.name: found for folder in folders if (found := leaks_under(folder))}
    assert not leaks


def make_server() -> SinkServer:
    """A server that answers each of the three sinks as its provider does when all is well."""
    sink_server = SinkServer()
    sink_server.answer(PATHS[PAGER], accepted())
    return sink_server


def make_repo(folder: Path, server: SinkServer) -> Repo:
    """A repo with the three-sink config and its environment, all leading to `server`; no escalations yet."""
    root = folder / "repo"
    root.mkdir()
    made = Repo(root, clean_env(folder, **sink_env(server.url)))
    made.write_config(sink_config())
    return made


@pytest.fixture
def server() -> Iterator[SinkServer]:
    with make_server() as sink_server:
        yield sink_server


@pytest.fixture
def repo(tmp_path: Path, server: SinkServer) -> Repo:
    return make_repo(tmp_path, server)
