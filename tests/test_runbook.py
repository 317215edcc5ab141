"""The README's runbook: each command of each recipe is run in the situation that the recipe is about."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MODULE_FILE, Repo, Run, make_repo
from escalations import MARK, batch, divergence_detected, health_critical, health_degraded
from loopback import Answer, SinkServer, accepted, error, ok
from tools import needs_tool

import ops_alert_dispatch

README = MODULE_FILE.with_name("README.md").read_text(encoding="utf-8")
PROGRAM = "ops-alert-dispatch"
INTRODUCTION = "Runbook"
SLACK_URL = "OPS_MANAGER_ALERT_SLACK_WEBHOOK_URL"
HOOK, SLACK, PAGER = f"/hook/{MARK}-a1b2c3d4e5", f"/slack/{MARK}-f6a7b8c9d0", "/pager"


def sections() -> dict[str, str]:
    """The parts of the runbook by their headings; what stands before the first one, by the runbook's own."""
    [runbook] = re.findall(r"^## Runbook\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    parts = re.split(r"^### (.+)\n", runbook, flags=re.MULTILINE)
    return {INTRODUCTION: parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


SECTIONS = sections()
BLOCKS = {title: code_blocks(text, "bash") for title, text in SECTIONS.items()}
TESTED: dict[str, str] = {}
Test = Callable[..., None]


def recipe_of(title: str) -> Callable[[Test], Test]:
    """Name the recipe that a test runs; each of its blocks must be run in it."""

    def name(test: Test) -> Test:
        TESTED[title] = test.__name__
        return pytest.mark.parametrize("recipe", [title], indirect=True, ids=[""])(test)

    return name


@dataclass
class Recipe:
    """The blocks of a recipe, to be run on a host as an operator would: in bash, at a terminal."""

    host: Repo
    blocks: list[str]
    folder: Path
    done: set[int] = field(default_factory=set)

    def run(
        self,
        number: int,
        *,
        typed: str = "",
        root: Path | None = None,
        env: Mapping[str, str] | None = None,
        then: str = "",
    ) -> Run:
        """Run a block after the runbook's first one, which sets the names; `typed` is what it reads.

        Every command of it must succeed.
        """
        self.done.add(number)
        [names] = BLOCKS[INTRODUCTION]
        script = (
            f"{names}\ncd '{self.folder}'\n{{\n{self.blocks[number]}\n{then}\n}} <<'TYPED'\n{typed}\nTYPED\n"
        )
        shell = replace(self.host, command=["bash", "-eu", "-c"])
        ours = {"R": str(root or self.host.root), "L": self.host.loop, **(env or {})}
        done = shell.run_on_terminal(script, env={**ours, "NO_COLOR": "1"})
        assert done.exit_code == 0, done
        # jq colours what it says to a terminal, whatever NO_COLOR says.
        return replace(done, stdout=re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))


@pytest.fixture
def host(tmp_path: Path, server: SinkServer) -> Repo:
    """A repo with the README's own example of a config, whose sinks are all on the loopback server."""
    needs_tool("jq")
    example, *_ = code_blocks(README, "json")
    config = json.loads(example)
    config["delivery"] |= {"maxAttemptsPerPass": 1, "backoffSeconds": {"initial": 0, "max": 900}}
    config["routing"]["repeat"]["windowSeconds"] = 0  # the recipes' records are alike
    # An escalation a message, so that what was told can be counted.
    config["sinks"]["slack-default"]["maxPerMessage"] = 1
    made = make_repo(tmp_path, server)
    made.write_config(config)
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / PROGRAM
    program.write_text("#!/bin/sh\nexec " + " ".join(f'"{word}"' for word in made.command) + ' "$@"\n')
    program.chmod(0o755)
    made.env = {
        "PATH": f"{programs}:{made.env['PATH']}",
        "HOME": made.env["HOME"],
        "LANG": "C.UTF-8",
        "OPS_MANAGER_ALERT_WEBHOOK_URL": server.url + HOOK,
        "OPS_MANAGER_ALERT_WEBHOOK_TOKEN": "token-0a1b2c3d4e",
        "OPS_MANAGER_ALERT_WEBHOOK_SIGNING_SECRET": "whsec_c2lnbmluZy0wYTFiMmMzZDRl",
        SLACK_URL: server.url + SLACK,
        "OPS_MANAGER_ALERT_PAGERDUTY_ROUTING_KEY": f"key{MARK}0a1b2c3d4e5f",
        "OPS_MANAGER_ALERT_PAGERDUTY_URL": server.url + PAGER,
    }
    server.answer(PAGER, accepted())
    return made


@pytest.fixture
def recipe(request: pytest.FixtureRequest, host: Repo, tmp_path: Path) -> Iterator[Recipe]:
    made = Recipe(host, BLOCKS[request.param], tmp_path)
    yield made
    left = set(range(len(made.blocks))) - made.done
    assert not left, f"of {request.param!r} these blocks are not run: {[made.blocks[i] for i in left]}"


def told_to_slack(server: SinkServer, path: str = SLACK) -> list[str]:
    return [request.json["blocks"][0]["block_id"] for request in server.received(path)]


def ids(host: Repo) -> list[str]:
    """The escalations that were taken up, in order."""
    return list(dict.fromkeys(row["escalationId"] for row in host.telemetry() if "escalationId" in row))


def degraded(count: int) -> list[dict[str, Any]]:
    """Records that go to Slack alone."""
    return [health_degraded(seconds_ago=60 - number, traceId=f"pass-{number}") for number in range(count)]


# --- The recipes


@recipe_of("No alert arrives")
def test_no_alert_arrives(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    host.append(*(health_degraded(severity="info", traceId=str(number)) for number in range(3)))
    host.dispatch()
    said = recipe.run(0).stdout
    assert said.startswith(f"OK  loop {host.loop}: nothing waits")
    assert len(re.findall(r"^[a-z]+-default: delivered \(20\d\), \d+ ms$", said, re.MULTILINE)) == 3
    assert "Nothing waits: a pass would send nothing." in said
    assert len(server.requests) == 3
    said = recipe.run(1).stdout
    assert said.count('"skipped","severity_below_min","health_degraded","info"]') == 3
    assert '"minSeverity": "warning"' in said


@recipe_of("A sink is down")
def test_a_sink_is_down(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, Answer(503, b"down for repair", {"Retry-After": "3000"}))
    host.append(*degraded(3))
    host.dispatch()
    said = recipe.run(0).stdout
    assert "slack-default is failing (http_error 503: down for repair), 3 deliveries waiting" in said
    assert '"slack-default","retry",503,"down for repair"' in said

    server.answer(SLACK, ok())
    server.forget()
    said = recipe.run(1).stdout
    assert "slack-default: delivered (200)" in said
    assert f"OK  loop {host.loop}: nothing waits" in said
    assert told_to_slack(server)[1:] == ids(host)

    server.answer(SLACK, error(503))
    host.append(*degraded(2))
    host.dispatch()
    said = recipe.run(2, typed="y").stdout
    assert "2 deliveries skipped" in said
    assert host.state()["waitingCount"] == 0


@recipe_of("A wrong credential")
def test_a_wrong_credential(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, error(403, "invalid_token"))
    host.append(*degraded(3))
    host.dispatch()
    new = "/slack-new/0f1e2d3c4b"
    said = recipe.run(0, typed=server.url + new).stdout
    assert "What to do: the credential is wrong or was revoked" in said
    assert "slack-default: delivered (200)" in said
    assert new not in said
    assert len(server.received(new)) == 1
    # The wait of a lane that is misconfigured is long; the changed secret ends it.
    assert host.dispatch().json["waitingCount"] == 3
    recipe.run(1, env={SLACK_URL: server.url + new})
    assert told_to_slack(server, new)[1:] == ids(host)
    assert host.state()["waitingCount"] == 0


@recipe_of("An alert storm")
def test_an_alert_storm(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(HOOK, error(503))
    storm = [divergence_detected(seconds_ago=200 - number, traceId=f"pass-{number}") for number in range(20)]
    host.append(*storm, health_critical())
    host.dispatch()
    said = recipe.run(0).stdout
    assert re.match(r" +20 divergence_detected\n +1 health_critical\n", said)
    assert "20 deliveries waiting" in said

    server.answer(HOOK, ok())
    server.forget()
    assert recipe.run(1).stdout.startswith('{"windowSeconds":900}\n')
    assert len(server.received(HOOK)) == 1
    assert host.state()["waitingCount"] == 0
    assert [row["status"] for row in host.telemetry() if row.get("reasonCode") == "repeat_suppressed"] == (
        ["skipped"] * 19
    )

    server.answer(HOOK, error(503))
    host.append(divergence_detected(reasonCodes=["another_one"]))
    host.dispatch()
    server.answer(HOOK, ok())
    server.forget()
    host.append(divergence_detected(traceId="still-there"), health_critical(reasonCodes=["another_one"]))
    assert recipe.run(2).stdout.startswith("true\n")
    assert server.received(HOOK) == []
    assert len(server.received(PAGER)) == 1
    assert host.state()["waitingCount"] == 0
    assert {"route_changed", "severity_below_min"} <= {row.get("reasonCode") for row in host.telemetry()}

    before = host.config_file.read_text()
    assert recipe.run(3).stdout == "true\n"
    assert "still-there" not in before
    host.append(divergence_detected(traceId="another", reasonCodes=["one_more"]))
    host.dispatch()
    assert [request.json["escalation"]["traceId"] for request in server.received(HOOK)] == ["another"]


@recipe_of("Dead letters")
def test_dead_letters(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.script(SLACK, error(422, "no such field"))
    host.append(*degraded(2))
    host.dispatch()
    dead = ids(host)[0]
    said = recipe.run(0).stdout
    assert json.loads(said) == [dead, "slack-default", "http_error", 422, "no such field"]
    server.forget()
    said = recipe.run(1, typed="y").stdout
    assert f"{dead} to slack-default: delivered (200)" in said
    assert f"OK  loop {host.loop}" in said
    assert told_to_slack(server) == [dead]

    server.script(SLACK, error(422, "no such field"))
    host.append(*degraded(1))
    host.dispatch()
    server.forget()
    said = recipe.run(2, typed="y").stdout
    assert "1 dead letter dismissed" in said
    assert f"OK  loop {host.loop}" in said
    assert server.requests == []


@recipe_of("Replay after an outage")
def test_replay_after_an_outage(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    host.append(*degraded(4))
    host.dispatch()
    server.forget()
    lines = [row.split("\t") for row in recipe.run(0).stdout.splitlines()]
    assert [(row[1], row[3], row[4]) for row in lines] == [
        (str(number), "health_degraded", "dispatched") for number in range(1, 5)
    ]
    assert [row[5] for row in lines] == ids(host)
    recipe.run(1)
    first, second, third, _ = ids(host)
    assert told_to_slack(server) == [second, third, first]


@recipe_of("A safe fallback")
def test_a_safe_fallback(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, error(503))
    host.append(*degraded(1))
    host.dispatch()
    config = host.config_file.read_text()
    server.answer(SLACK, ok())
    server.forget()
    said = recipe.run(0).stdout
    assert re.findall(r"\t(true|false)$", said, re.MULTILINE) == ["false"] * 3
    assert "no sink is enabled: nothing is sent" in said
    host.append(*batch(5))
    assert host.dispatch().json["skippedCount"] == 5
    assert server.requests == []
    assert [row["reasonCode"] for row in host.telemetry()[-5:]] == ["no_dispatchable_sinks"] * 5

    said = recipe.run(1).stdout
    assert host.config_file.read_text() == config
    assert said.count(": delivered (") == 3
    assert told_to_slack(server)[1:] == ids(host)[:1]
    assert len(server.requests) == 4
    # What came in between is sent on demand.
    host.run("redeliver", *host.target, "--from-line", "2", "--yes")
    assert len(server.requests) > 4


@recipe_of("Moving to another machine")
def test_moving_to_another_machine(recipe: Recipe, host: Repo, server: SinkServer, tmp_path: Path) -> None:
    host.append(*batch(5))
    host.dispatch()
    server.answer(SLACK, error(503))
    host.append(*degraded(2))
    host.dispatch()
    recipe.run(0)
    server.answer(SLACK, ok())
    server.forget()

    there = replace(host, root=tmp_path / "new-machine")
    there.root.mkdir()
    said = recipe.run(1, root=there.root).stdout
    waiting = ids(host)[-2:]
    assert said.count(": delivered (") == 3
    assert re.findall(r"^line (\d+): ", said, re.MULTILINE) == ["6", "7"]
    assert "A pass would make 2 deliveries of 2 escalations." in said
    server.forget()
    there.append(health_degraded(traceId="pass-on-the-new-machine"))
    there.dispatch()
    assert told_to_slack(server) == [*waiting, ids(there)[-1]]
    assert len(server.requests) == 3


@recipe_of("Monitoring")
def test_monitoring(recipe: Recipe, host: Repo, server: SinkServer, tmp_path: Path) -> None:
    host.append(*batch(5))
    host.dispatch()
    assert recipe.run(0).stdout.startswith("ALERT DISPATCH OK: ")
    recipe.run(1)
    metrics = tmp_path / "alerts.prom"
    written = metrics.read_text()
    names = re.findall(r"`(?:ops_alert_dispatch|…)_([a-z_]+)[` ]", SECTIONS["Monitoring"])
    assert len(set(names)) == 11
    for name in names:
        assert f"ops_alert_dispatch_{name}{{" in written

    metrics.unlink()
    [crontab] = code_blocks(SECTIONS["Monitoring"], "crontab")
    [(schedule, command)] = re.findall(r"^((?:\S+ ){5})root (.*)$", crontab, re.MULTILINE)
    assert schedule.split() == ["*"] * 5
    assert "%" not in command  # cron takes it for a line break
    installed = re.findall(rf"/\S+/{PROGRAM}", command)[0]
    for written_there, here in (
        ("/var/lib/prometheus/node-exporter", f"'{tmp_path}'"),
        (installed, PROGRAM),
        ("/srv/shop", f"'{host.root}'"),
    ):
        assert written_there in command
        command = command.replace(written_there, here)
    subprocess.run(["sh", "-c", command], env=host.env, check=True)
    promtool = needs_tool("promtool")
    with metrics.open() as file:
        judged = subprocess.run(
            [promtool, "check", "metrics"], stdin=file, capture_output=True, text=True, check=False
        )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")


@recipe_of("Shell completion")
def test_shell_completion(recipe: Recipe) -> None:
    # What bash does on a tab: the words, where the cursor is, then the function.
    ask = f"""
    complete -p {PROGRAM}
    for words in 're' 'status --for' '--repo . --dry'; do
      COMPREPLY=() COMP_WORDS=({PROGRAM} $words)
      COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
      _ops_alert_dispatch_completion {PROGRAM}
      echo "$words: ${{COMPREPLY[*]}}"
    done
    """
    said = recipe.run(0, then=ask).stdout.splitlines()
    assert said[0].endswith(PROGRAM)
    assert said[1:] == ["re: redeliver", "status --for: --format", "--repo . --dry: --dry-run"]


# --- The section as a whole


def test_nothing_in_the_example_of_a_config_leads_nowhere(host: Repo) -> None:
    loaded = ops_alert_dispatch.load_config(str(host.config_file), {}, check_env=False)
    assert ops_alert_dispatch.config_warnings(loaded) == []


def test_every_recipe_with_commands_has_its_test() -> None:
    with_commands = {title for title, blocks in BLOCKS.items() if blocks}
    assert with_commands == {INTRODUCTION, *TESTED}
    assert "```sh\n" not in "".join(SECTIONS.values())


def test_every_command_and_option_of_the_runbook_is_real(host: Repo) -> None:
    text = "".join(SECTIONS.values())
    pages: dict[str, str] = {}
    commands = re.findall(rf"{PROGRAM} ([a-z]+)((?: [^\n&|>)`]+)?)", text)
    inline = re.findall(r"`(status|test|redeliver|skip|config|dispatch)((?: [^`]+)?)`", text)
    assert len(commands) > 20
    for command, rest in commands + inline:
        if command not in pages:
            pages[command] = host.run(command, "--help").stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in pages[command], (command, option)


def test_every_link_of_the_readme_leads_to_a_heading() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", prose)
    assert links
    assert set(links) <= anchors


def test_every_reason_code_is_explained_and_there_is_no_other() -> None:
    program = MODULE_FILE.read_text(encoding="utf-8")
    used = {
        code
        for pattern in (
            r'Verdict\(\s*"\w+",\s*"(\w+)"',
            r'"reasonCode": "(\w+)"',
            r'return "(?:skipped|failed|partial)", "(\w+)"',
            r'write_event\(\s*[^)]*?"(?:skipped|failed)", "(\w+)"',
            r'Unusable\(identity, "(\w+)"',
            r'^[A-Z_]+ = "(\w+_by_\w+)"',
            r'"failureReasonCodes": \["(\w+)"\]',
        )
        for code in re.findall(pattern, program, re.MULTILINE)
    }
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", SECTIONS["Reason codes"], re.MULTILINE)
    explained = {code for code, _, _ in rows}
    assert len(rows) == len(explained)
    assert len(used) > 10
    assert used <= explained
    # One is the host's own; for the others the program has the word.
    assert {code for code in explained if f'"{code}"' not in program} == {"alert_dispatch_failed"}
    assert README.count("### Reason codes") == 1
