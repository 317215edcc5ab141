"""Running without reconcile, on one host or on many: the README's units and cron line, and its model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.model import COST_HELP, Costs, Fleet, compute
from conftest import MODULE_FILE, Repo, clean_env
from escalations import health_critical
from loopback import SinkServer
from tools import needs_tool

README = MODULE_FILE.with_name("README.md").read_text(encoding="utf-8")
UNITS = Path("/etc/systemd/system")
INSTALLED = "/opt/ops-alert-dispatch/.venv/bin/ops-alert-dispatch"
SECRETS_FILE = "/etc/ops-alert-dispatch/secrets.env"
SERVICE, TIMER = "ops-alert-dispatch.service", "ops-alert-dispatch.timer"
PROGRAM = Path(sys.executable).with_name("ops-alert-dispatch")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A folder with the README's units, which name the program where it is installed here."""
    folder = tmp_path / "units"
    for block in code_blocks("ini"):
        name = Path(block.partition("\n")[0].removeprefix("# ")).relative_to(UNITS)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(block.replace(INSTALLED, str(PROGRAM)))
    return folder


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(
        [needs_tool("systemd-analyze"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


SEALED = re.compile(r"^#(?=LoadCredentialEncrypted=|Environment=)", re.MULTILINE)


@pytest.mark.parametrize("sealed", [False, True])
def test_systemd_takes_the_units_without_a_complaint(units: Path, sealed: bool) -> None:
    service = units / SERVICE
    if sealed:
        service.write_text(
            SEALED.sub("", service.read_text()).replace(f"EnvironmentFile={SECRETS_FILE}\n", "")
        )
    assert analyze("verify", service, units / TIMER) == ""


def test_the_service_may_do_little(units: Path) -> None:
    """systemd's own measure, in tenths: below 2.0 is what it calls OK."""
    analyze("security", "--offline=true", "--threshold=20", units / SERVICE)


@pytest.fixture
def shop(repo: Repo, server: SinkServer) -> Iterator[Repo]:
    """A host whose secrets stand in a file as the README has it, and nowhere else."""
    secrets = {name: value for name, value in repo.env.items() if name.startswith("ALERT_")}
    path = repo.root.parent / "secrets.env"
    path.write_text("".join(f"{name}='{value}'\n" for name, value in secrets.items()))
    repo.append(health_critical())
    yield replace(repo, env=clean_env(repo.root.parent))
    path.unlink()  # the one place where secrets may stand: what is left is searched for them


def here(command: str, shop: Repo) -> str:
    """A command of the README, with this machine's places."""
    for place, found in (
        (INSTALLED, PROGRAM),
        (SECRETS_FILE, shop.root.parent / "secrets.env"),
        ("/srv/shop", shop.root),
    ):
        assert place in command
        command = command.replace(place, str(found))
    return command


def run_shell(command: str, shop: Repo, **env: str) -> str:
    """Run it as cron does, with /bin/sh and hardly an environment."""
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, env={**shop.env, **env}, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_cron_line_delivers_and_prints_nothing_that_cron_would_mail(
    shop: Repo, server: SinkServer
) -> None:
    (line,) = (block for block in code_blocks("crontab") if "--all-loops" in block)
    assert line.count("\n") == 1
    *when, user, command = line.rstrip("\n").split(" ", 6)
    assert (when, user) == (["*"] * 5, "ops")
    assert "%" not in command  # cron's own sign for the end of a line

    assert run_shell(here(command, shop), shop) == ""
    assert len(server.requests) == 3


def test_the_service_delivers_with_the_secrets_of_its_file(shop: Repo, server: SinkServer) -> None:
    """As systemd runs it: the variables of the file are its environment, and no shell is between."""
    service, *_ = code_blocks("ini")
    command = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)[0]
    assert f"\nEnvironmentFile={SECRETS_FILE}\n" in service
    secrets = f"set -a; . {SECRETS_FILE}; exec {command}"
    summary = json.loads(run_shell(here(secrets, shop), shop))

    assert (summary["status"], summary["loopCount"], summary["processedCount"]) == ("success", 1, 1)
    assert [loop["loopId"] for loop in summary["loops"]] == [shop.loop]
    assert len(server.requests) == 3


def test_the_sealed_secret_reaches_the_program(shop: Repo, server: SinkServer) -> None:
    """systemd puts the opened credential into a folder, which `%d` stands for."""
    service, *_ = code_blocks("ini")
    [(credential, variable, name)] = re.findall(
        r"^LoadCredentialEncrypted=(.+?):.*\nEnvironment=(\w+)_FILE=%d/(.+)$",
        SEALED.sub("", service),
        re.MULTILINE,
    )
    assert credential == name
    place = shop.root.parent / name
    place.write_text(f"{server.url}/sealed\n")
    sink = {"enabled": True, "type": "slack", "webhookUrlEnv": variable}
    shop.write_config(
        {
            "schemaVersion": "v1",
            "defaultMinSeverity": "info",
            "sinks": {"slack-default": sink},
            "routing": {"defaultSinks": ["slack-default"]},
        }
    )
    command = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)[0]
    command = command.replace(INSTALLED, str(PROGRAM)).replace("/srv/shop", str(shop.root))
    run_shell(command, shop, **{f"{variable}_FILE": str(place)})
    place.unlink()
    assert len(server.received("/sealed")) == 1


# --- The model

COSTS = Costs(
    start=0.1,
    idle_loop=0.0005,
    request=0.001,
    alert=0.0001,
    ingest_alone=0.001,
    ingest=0.0001,
    alert_bytes=5000,
)


def test_a_part_saturates_where_its_load_is_all_that_it_can_do() -> None:
    for index, part in enumerate(compute(Fleet(), COSTS)):
        there = compute(replace(Fleet(), rate=part.saturates_at), COSTS)[index]
        assert there.load == pytest.approx(there.capacity, rel=1e-3), part.name


def test_what_waits_after_a_storm_is_what_could_not_be_done_in_it() -> None:
    parts = {part.name: part for part in compute(Fleet(), COSTS)}
    slack = parts["Slack, one webhook for the fleet"]

    assert slack.load == pytest.approx(10_000 / 60)
    assert slack.backlog == pytest.approx(100_000 - 600)
    assert slack.drained_after_minutes == pytest.approx(slack.backlog / 60)
    assert parts["Alertmanager, one core of each peer"].backlog == 0


def test_the_model_is_computed_from_given_costs_without_measuring(tmp_path: Path) -> None:
    given = [f"--{name.replace('_', '-')}={getattr(COSTS, name)}" for name in COST_HELP]
    written = tmp_path / "model.json"
    script = MODULE_FILE.parent / "tests" / "benchmarks" / "model.py"
    done = subprocess.run(
        [sys.executable, script, *given, "--json", written],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )

    assert [part["name"] for part in json.loads(written.read_text())["parts"]] == [
        part.name for part in compute(Fleet(), COSTS)
    ]
    assert "Slack, one webhook for the fleet" in done.stdout
