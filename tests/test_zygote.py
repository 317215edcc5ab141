"""The tests of the tests: a forked run of the program is like one that was started for itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zygote
from conftest import COMMAND, Repo
from escalations import HOOK, PATHS, health_critical, sink_config
from loopback import Answer, SinkServer
from zygote import Forked, Zygote


@pytest.fixture
def executed(repo: Repo) -> Repo:
    """The same repo, with each run in an interpreter of its own."""
    return replace(repo, command=[*COMMAND])


def seen_from_outside(pid: int) -> dict[str, Any]:
    """What the kernel knows of a process that depends on how it was started."""
    folder = Path(f"/proc/{pid}")
    status = dict(row.split(":\t", 1) for row in (folder / "status").read_text().splitlines())
    names = ("PPid", "Uid", "Gid", "Groups", "Umask", "SigBlk", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs")
    # Of a pipe or a socket the kind, without its number.
    files = {int(path.name): str(path.readlink()).partition(":[")[0] for path in (folder / "fd").iterdir()}
    return {
        **{name: status[name] for name in names},
        "group": os.getpgid(pid),
        "session": os.getsid(pid),
        "niceness": os.getpriority(os.PRIO_PROCESS, pid),
        "folder": str((folder / "cwd").readlink()),
        "limits": (folder / "limits").read_text(),
        "streams": [files[number] for number in range(3)],
        "files": sorted(files.values()),
    }


def test_a_forked_run_is_to_the_kernel_what_an_executed_one_is(
    repo: Repo, executed: Repo, server: SinkServer
) -> None:
    config = sink_config(everywhere=True)
    config["sinks"] = {HOOK: config["sinks"][HOOK]}
    config["routing"]["defaultSinks"] = [HOOK]
    repo.write_config(config)
    repo.append(health_critical())
    server.answer(PATHS[HOOK], Answer(fault="hang"))
    repo.dispatch("--time-budget", "0")
    found = []
    for one in (repo, executed):
        server.forget()
        process = one.start("dispatch", *repo.target)
        try:
            assert isinstance(process, Forked) == (one is repo)
            server.wait_for(1, PATHS[HOOK])
            found.append(seen_from_outside(process.pid))
        finally:
            process.kill()
            process.communicate()

    assert found[0] == found[1]
    assert found[0]["PPid"] == str(os.getpid())


@pytest.mark.parametrize(
    ("arguments", "stdin", "exit_code"),
    [
        (["dispach"], "", 2),
        (["dispatch", "--dry-run", "--show-payload", "--format", "text"], "", 0),
        (["redeliver", "--from-line", "1"], "n\n", 130),
        (["config", "--config-file", "no/such/file"], "", 3),
    ],
    ids=["usage", "text", "question", "fault"],
)
def test_a_forked_run_says_and_does_what_an_executed_one_does(
    repo: Repo, executed: Repo, arguments: list[str], stdin: str, exit_code: int
) -> None:
    repo.append(health_critical(seconds_ago=100_000))  # its age is in whole days: it is the same for both
    repo.dispatch()
    if arguments[0] in {"dispatch", "redeliver"}:
        arguments = [*arguments, *repo.target]
    found = [one.run(*arguments, stdin=stdin) for one in (repo, executed)]

    assert found[0] == found[1]
    assert found[0].exit_code == exit_code


def test_a_forked_run_knows_a_terminal_from_a_pipe(repo: Repo, executed: Repo) -> None:
    repo.append(health_critical(seconds_ago=100_000))
    for streams in (["stdout"], ["stderr"]):
        found = [
            one.run_on_terminal("dispatch", *repo.target, "--dry-run", streams=streams)
            for one in (repo, executed)
        ]
        assert found[0] == found[1]


def test_a_forked_run_has_no_variable_but_its_own(repo: Repo) -> None:
    del repo.env["LANG"]  # the zygote has it
    config = sink_config()
    config["sinks"][HOOK]["urlEnv"] = "LANG"
    repo.write_config(config)

    assert "are unset: LANG\n" in repo.run("config").stderr


def test_no_test_passes_because_of_a_program_that_is_installed_from_elsewhere(
    executed: Repo, tmp_path: Path
) -> None:
    (tmp_path / "ops_alert_dispatch.py").write_text("print('another one')")
    started = executed.run("--version", env={"PYTHONPATH": str(tmp_path)})
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        forking = subprocess.run(
            [sys.executable, zygote.__file__, "0"],
            stdin=theirs.fileno(),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            check=True,
        )

    assert "another one" not in started.stdout + forking.stdout


def test_a_zygote_ends_with_the_process_that_started_it() -> None:
    one = Zygote()
    one.close()

    assert one.process.returncode == 0
