"""What a hostile record, path or stream must not cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RUN_TIMEOUT, Repo
from escalations import PAGER, health_critical, sink_config
from loopback import SinkServer

import ops_alert_dispatch


@pytest.mark.parametrize(
    "timestamp",
    ["9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "yesterday", 7],
)
def test_a_record_with_an_impossible_time_reaches_the_pager_and_stops_nothing(
    repo: Repo, server: SinkServer, timestamp: object
) -> None:
    repo.append({**health_critical(), "timestamp": timestamp}, health_critical())

    assert repo.dispatch().json["status"] == "success"
    assert len(server.received("/pager")) == 2
    assert server.received("/pager")[0].json["payload"]["timestamp"].startswith("20")


@pytest.mark.parametrize(
    ("option", "path_of"),
    [
        ("--dispatch-state-file", "source"),
        ("--dispatch-state-file", "config_file"),
        ("--dispatch-telemetry-file", "source"),
        ("--dispatch-telemetry-file", "state_file"),
        ("--dispatch-telemetry-file", "attempts_file"),
    ],
)
def test_a_path_given_twice_overwrites_neither_evidence_nor_config(
    repo: Repo, option: str, path_of: str
) -> None:
    repo.append(health_critical())
    before = repo.snapshot()
    run = repo.dispatch(option, str(getattr(repo, path_of)))

    assert run.exit_code == 2
    assert "same file" in run.stderr
    assert repo.snapshot() == before


@pytest.mark.parametrize("ending", [".tmp", ".lock"])
def test_a_source_is_not_taken_for_a_file_that_the_program_makes_beside_its_state(
    repo: Repo, server: SinkServer, ending: str
) -> None:
    source = repo.folder / f"queue{ending}"
    repo.append(health_critical())
    repo.source.rename(source)
    files = ["--escalations-file", str(source), "--dispatch-state-file", str(repo.folder / "queue")]

    assert repo.dispatch(*files).exit_code == 2
    assert source.read_bytes()


def test_a_device_or_a_pipe_in_place_of_a_file_is_refused_and_left_as_it_is(
    repo: Repo, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    repo.append(health_critical())

    assert repo.dispatch("--dispatch-state-file", str(pipe)).exit_code == 4
    assert repo.dispatch("--dispatch-telemetry-file", "/dev/null").exit_code == 5
    assert repo.dispatch("--alert-config-file", str(pipe)).exit_code == 3
    assert pipe.is_fifo()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "</dev/null >&- 2>&-"])
def test_a_closed_stream_keeps_no_alert_back(repo: Repo, server: SinkServer, closed: str) -> None:
    repo.append(health_critical())
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *repo.command, "dispatch", *repo.target],
        env=repo.env,
        cwd=repo.root,
        capture_output=True,
        timeout=RUN_TIMEOUT,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert len(server.received("/pager")) == 1


def test_output_that_cannot_be_written_is_told_in_words_after_the_alert_is_out(
    repo: Repo, server: SinkServer
) -> None:
    repo.append(health_critical())
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [*repo.command, "dispatch", *repo.target],
            env=repo.env,
            cwd=repo.root,
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=RUN_TIMEOUT,
            check=False,
        )

    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert "cannot write the output" in done.stderr
    assert len(server.received("/pager")) == 1


def test_an_error_that_nobody_can_be_told_of_has_its_exit_code(repo: Repo) -> None:
    repo.write_config("no JSON")
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = [*repo.command, "dispatch", *repo.target]
        done = subprocess.run(
            command, env=repo.env, cwd=repo.root, stdout=full, stderr=full, timeout=RUN_TIMEOUT, check=False
        )

    assert done.returncode == 3


def test_a_current_folder_that_is_gone_is_told_in_words(repo: Repo, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD" && exec "$@" config'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, ops_alert_dispatch.__file__],
        env=repo.env,
        cwd=gone,
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT,
        check=False,
    )

    assert done.returncode == 2
    assert "the current folder is not there any more" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("X-A", "a\r\nB: c"), ("X A", "b"), ("X-A", "é"), ("X-A\n", "b")]
)
def test_a_header_that_http_does_not_allow_is_found_before_the_night_it_matters(
    repo: Repo, name: str, value: str
) -> None:
    config = sink_config()
    config["sinks"]["team-hook"]["headers"] = {name: value}
    repo.write_config(config)
    run = repo.dispatch()

    assert run.exit_code == 3
    assert "headers" in run.stderr
    assert "RFC 9110" in run.stderr


def test_a_lone_surrogate_is_delivered_and_can_be_shown(repo: Repo, server: SinkServer) -> None:
    repo.append('{"category":"odd \\ud800","severity":"critical"}\n')

    assert repo.dispatch("--dry-run", "--format", "text").exit_code == 0
    assert repo.dispatch().json["status"] == "success"
    assert server.received("/hook")[0].json["event"]["category"] == "odd \ufffd"


@pytest.mark.parametrize("path", ["/hook", "/delivered", "/escalation", "/position", "/dispatched"])
def test_a_url_that_holds_a_word_of_the_programs_own_spoils_no_row(
    repo: Repo, server: SinkServer, path: str
) -> None:
    repo.append(health_critical())
    env = {"ALERT_PAGER_URL": f"{server.url}{path}"}
    repo.dispatch(env=env)

    assert {row["outcome"] for row in repo.attempts()} == {"delivered"}
    assert {row["status"] for row in repo.telemetry()} == {"dispatched"}
    assert repo.dispatch(env=env).json["status"] == "no_new_escalations"
    assert PAGER in repo.state()["sinks"]
