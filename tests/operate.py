"""What an operator does and looks at, and the situations that bring one there: for tests of the commands."""

from __future__ import annotations

import os
from typing import Any

from conftest import RUN_TIMEOUT, Repo, Run
from escalations import CHAT, HOOK, NO_WAIT, PATHS, batch, escalation_id, sink_config
from loopback import SinkServer, error, ok


def to_all(**delivery: Any) -> dict[str, Any]:
    """Each record to all three sinks; one try a pass, and no wait before the next pass may try."""
    config = sink_config(everywhere=True)
    config["delivery"] = {"maxAttemptsPerPass": 1, "backoffSeconds": NO_WAIT, **delivery}
    return config


def sink_of(found: dict[str, Any], sink_id: str) -> dict[str, Any]:
    [sink] = [sink for sink in found["sinks"] if sink["id"] == sink_id]
    assert isinstance(sink, dict)
    return sink


def check(repo: Repo, *options: str) -> tuple[int, str]:
    """The exit code and the one line of `status --check`."""
    run = repo.run("status", "--repo", str(repo.root), "--check", *options)
    assert run.stderr == ""
    assert run.stdout.count("\n") == 1
    return run.exit_code, run.stdout.strip()


def on_terminal(repo: Repo, *arguments: str, answer: str, **env: str) -> Run:
    """Run the program with everything on one terminal, and type the answer once it asks."""
    ours, theirs = os.openpty()
    process = repo.popen(
        *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm-256color", **env}
    )
    os.close(theirs)
    said = b""
    try:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            asked = b"[y/N]" in said
            said += piece
            if not asked and b"[y/N]" in said:
                os.write(ours, f"{answer}\n".encode())
        exit_code = process.wait(RUN_TIMEOUT)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return Run(exit_code, said.decode().replace("\r\n", "\n"), "")


def ids_at(server: SinkServer, sink_id: str) -> list[str]:
    return [escalation_id(request) for request in server.received(PATHS[sink_id])]


def make_dead_letter(repo: Repo, server: SinkServer, sink_id: str = HOOK) -> str:
    """Three records, of which the second is a dead letter for a sink. Returns its id."""
    repo.append(*batch(3))
    server.script(PATHS[sink_id], ok(), error(422, "I do not take this"))
    summary = repo.dispatch().json
    assert (summary["deadLetterCount"], summary["waitingCount"]) == (1, 0)
    [dead] = [row for row in repo.attempts() if row["outcome"] == "dead_letter"]
    server.forget()
    return str(dead["escalationId"])


def make_backlog(repo: Repo, server: SinkServer, count: int = 4) -> list[str]:
    """So many records that chat did not take and the others did. Returns their ids."""
    server.answer(PATHS[CHAT], error(503, "down for repair"))
    repo.append(*batch(count))
    assert repo.dispatch().json["waitingCount"] == count
    ids = [row["escalationId"] for row in repo.telemetry()]
    server.forget()
    return ids
