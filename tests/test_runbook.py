"""The README's runbook: each command of each recipe is run in the situation that the recipe is about."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import MODULE_FILE, Repo, Run, make_repo, time_passes
from escalations import MARK, batch, divergence_detected, health_degraded
from loopback import Answer, SinkServer, accepted, error, ok
from tools import needs_tool
from zygote import for_a_shell

import ops_alert_dispatch

README = MODULE_FILE.with_name("README.md").read_text(encoding="utf-8")
PROGRAM = "ops-alert-dispatch"
SLACK_URL = "OPS_MANAGER_ALERT_SLACK_WEBHOOK_URL"
HOOK, SLACK, PAGER = f"/hook/{MARK}-a1b2c3d4e5", f"/slack/{MARK}-f6a7b8c9d0", "/pager"


def sections() -> dict[str, str]:
    """The sections of the README by their headings."""
    _, *parts = re.split(r"^##+ (.+)\n", README, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str) -> dict[str, list[str]]:
    """The commands of each row of the runbook's table, by its symptom."""
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| (`[^|]+`) \|$", text, re.MULTILINE)
    return {symptom: commands.strip("`").split("`<br>`") for symptom, commands in found}


SECTIONS = sections()
[NAMES] = code_blocks(SECTIONS["Runbook"], "bash")
# What a recipe runs: the commands of a symptom, or the blocks of a section that says how to set something up.
BLOCKS = rows(SECTIONS["Runbook"]) | {
    title: code_blocks(SECTIONS[title], "bash") for title in ("Commands", "Monitoring")
}
TESTED: set[str] = set()
Test = Callable[..., None]


def recipe_of(title: str) -> Callable[[Test], Test]:
    """Name the recipe that a test runs; each of its blocks must be run in it."""

    def name(test: Test) -> Test:
        TESTED.add(title)
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
        *numbers: int,
        typed: str = "",
        env: Mapping[str, str] | None = None,
        then: str = "",
        exit_code: int = 0,
    ) -> Run:
        """Run commands in one shell, after the block that sets the names; they read `typed`.

        It must end with this exit code.
        """
        self.done.update(numbers)
        wanted = "\n".join(self.blocks[number] for number in numbers)
        script = f"{NAMES}\ncd '{self.folder}'\n{{\n{wanted}\n{then}\n}} <<'TYPED'\n{typed}\nTYPED\n"
        shell = replace(self.host, command=["bash", "-eu", "-c"])
        ours = {"OPS_MANAGER_REPO": str(self.host.root), "L": self.host.loop, **(env or {})}
        done = shell.run_on_terminal(script, env={**ours, "NO_COLOR": "1"})
        assert done.exit_code == exit_code, done
        return done


@pytest.fixture
def host(tmp_path: Path, server: SinkServer) -> Repo:
    """A repo with the README's own example of a config, whose sinks are all on the loopback server."""
    example = max(code_blocks(README, "json"), key=len)
    config = json.loads(example)
    config["delivery"] |= {"maxAttemptsPerPass": 1, "backoffSeconds": {"initial": 0, "max": 900}}
    config["routing"]["repeat"]["windowSeconds"] = 0  # the records are alike
    # An escalation a message, so that they can be counted.
    config["sinks"]["slack-default"]["maxPerMessage"] = 1
    made = make_repo(tmp_path, server)
    made.write_config(config)
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / PROGRAM
    program.write_text(f'#!/bin/sh\nexec {for_a_shell()} "$@"\n')
    program.chmod(0o755)
    made.env = {
        "PATH": f"{programs}:{made.env['PATH']}",
        "HOME": made.env["HOME"],
        "LANG": "C.UTF-8",
        "OPS_MANAGER_ALERT_WEBHOOK_URL": server.url + HOOK,
        "OPS_MANAGER_ALERT_WEBHOOK_TOKEN": "token-0a1b2c3d4e",
        "OPS_MANAGER_ALERT_WEBHOOK_API_KEY": "key-1b2c3d4e5f",
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


def sent_to_slack(server: SinkServer, path: str = SLACK) -> list[str]:
    return [request.json["blocks"][0]["block_id"] for request in server.received(path)]


def ids(host: Repo) -> list[str]:
    """The escalations that were ingested, in order."""
    return list(dict.fromkeys(row["escalationId"] for row in host.telemetry() if "escalationId" in row))


def degraded(count: int) -> list[dict[str, Any]]:
    """Records that go to Slack alone."""
    return [health_degraded(seconds_ago=60 - number, traceId=f"pass-{number}") for number in range(count)]


# --- Quick start


def test_the_quick_start_sends_a_test_alert_and_what_a_loop_has_written(
    host: Repo, server: SinkServer, tmp_path: Path
) -> None:
    [block] = code_blocks(SECTIONS["Quick start"], "bash")
    enable = tmp_path / "enable"
    enable.write_text('#!/bin/sh\nsed -i \'0,/"enabled": false/s//"enabled": true/\' "$1"\n')
    enable.chmod(0o755)
    host.config_file.unlink()
    loop = replace(host, loop=re.findall(r"--loop (\S+)", block)[0])
    loop.append(health_degraded())
    url = server.url + HOOK
    script, count = re.subn(r"https://\S+", url, block)
    shell = replace(host, command=["bash", "-eu", "-c"])
    done = shell.run_on_terminal(script, env={"EDITOR": str(enable), "NO_COLOR": "1"})
    assert (done.exit_code, count) == (0, 1), done
    assert re.search(r"^webhook-default: delivered \(200\)", done.stdout, re.MULTILINE)
    categories = [request.json["event"]["category"] for request in server.received(HOOK)]
    assert categories == ["test_alert", "health_degraded"]


# --- The symptoms


@recipe_of("No alert arrives")
def test_no_alert_arrives(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    host.append(*(health_degraded(severity="info", traceId=str(number)) for number in range(3)))
    host.dispatch()
    said = recipe.run(0).stdout
    assert said.startswith(f"OK  loop {host.loop}: ")
    said = recipe.run(1).stdout
    assert re.findall(r"^([a-z]+)-default: delivered \(20\d\)", said, re.MULTILINE) == (
        ["webhook", "slack", "pagerduty"]
    )
    assert len(server.requests) == 3
    assert "a pass would send nothing" in recipe.run(2).stdout
    # It was escalated, and its severity was too low.
    assert len(re.findall(r"info +health_degraded +esc_\w+ +skipped", recipe.run(3).stdout)) == 3
    said = recipe.run(4).stdout
    assert "from warning on" in said
    assert re.search(r"send +slack-default", said)


@recipe_of("A sink is down, or was")
def test_a_sink_is_down_or_was(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, Answer(503, b"down for repair", {"Retry-After": "3000"}))
    host.append(*degraded(3))
    host.dispatch()
    said = recipe.run(0).stdout
    first, second, *_ = said.splitlines()
    assert "slack-default is failing (http_error 503: down for repair), 3 deliveries waiting" in first
    assert second.startswith("What to do: ")

    server.answer(SLACK, ok())
    server.forget()
    assert "slack-default: delivered (200)" in recipe.run(1).stdout
    recipe.run(2)
    assert sent_to_slack(server)[1:] == ids(host)
    assert host.state()["waitingCount"] == 0


@recipe_of("401, 403 or 404")
def test_a_credential_is_wrong(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, error(403, "invalid_token"))
    host.append(*degraded(3))
    host.dispatch()
    assert SLACK_URL in host.run("status", "--repo", str(host.root), "--format", "text").stdout
    new = "/slack-new/0f1e2d3c4b"
    done = recipe.run(0, 1, 2, 3, typed=server.url + new)
    assert "slack-default: delivered (200)" in done.stdout
    assert new not in done.stdout + done.stderr
    # The wait of a sink that is misconfigured is long; the changed secret ends it.
    assert sent_to_slack(server, new)[1:] == ids(host)
    assert host.state()["waitingCount"] == 0


@recipe_of("The config is invalid")
def test_the_config_is_invalid(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    good = host.config_file.read_text()
    host.write_config(good.replace('"type": "slack"', '"type": "slakc"').replace("900", "-900"))
    host.append(*degraded(2))
    assert host.dispatch().exit_code == 3
    said = recipe.run(0, exit_code=3).stderr
    assert "$.sinks['slack-default'].type" in said
    assert "$.delivery.backoffSeconds.max" in said
    assert server.requests == []

    host.write_config(good)
    recipe.run(0)
    host.dispatch()
    assert sent_to_slack(server) == ids(host)
    assert len(ids(host)) == 2


@recipe_of("Dead letters")
def test_dead_letters(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.script(SLACK, error(422, "no such field"))
    host.append(*degraded(2))
    host.dispatch()
    dead = ids(host)[0]
    [shown] = re.findall(r"esc_\w+", recipe.run(0).stdout)
    assert dead.startswith(shown)
    assert "slack-default  dead: http_error 422: no such field" in recipe.run(1, env={"ID": shown}).stdout
    server.forget()
    assert f"{shown} to slack-default: delivered (200)" in recipe.run(2, typed="y").stdout
    assert sent_to_slack(server) == [dead]

    server.script(SLACK, error(422, "no such field"))
    host.append(*degraded(1))
    host.dispatch()
    server.forget()
    assert "1 dead letter dismissed" in recipe.run(3, typed="y").stdout
    assert recipe.run(0).stdout == "Nothing on record matches.\n"
    assert server.requests == []


@recipe_of("A flood of alerts")
def test_a_flood_of_alerts(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer("/", error(503))
    flood = [divergence_detected(seconds_ago=200 - number, traceId=f"pass-{number}") for number in range(12)]
    host.append(*flood, *degraded(5))
    host.dispatch()
    server.answer("/", ok())
    server.forget()
    assert len(re.findall("warning +divergence_detected", recipe.run(0).stdout)) == 12
    assert re.search(r"send +webhook-default", recipe.run(1).stdout)
    config = json.loads(host.config_file.read_text())
    config["routing"]["repeat"]["windowSeconds"] = 900
    config["sinks"]["slack-default"]["maxPerMessage"] = 10
    host.write_config(config)
    recipe.run(2)
    assert (len(server.received(HOOK)), len(server.received(SLACK))) == (1, 1)
    assert host.state()["waitingCount"] == 0

    # It is not enough: another kind of them waits.
    server.answer("/", error(503))
    host.append(divergence_detected(reasonCodes=["another"]))
    host.dispatch()
    assert host.state()["waitingCount"] == 1
    server.answer("/", ok())
    server.forget()
    config["routing"]["categorySeverity"]["divergence_detected"] = "info"
    host.write_config(config)
    assert "below the route's minimum warning" in recipe.run(1).stdout
    host.append(divergence_detected(reasonCodes=["one_more"]))
    recipe.run(2)
    assert server.requests == []
    assert host.state()["waitingCount"] == 0


@recipe_of("What waits is of no use any more")
def test_what_waits_is_of_no_use_any_more(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, error(503))
    host.append(*degraded(3))
    host.dispatch()
    server.forget()
    host.run("skip", *host.target, "--sink", "slack-default", "--to-line", "1", "--yes")
    assert host.state()["waitingCount"] == 2
    assert "2 deliveries skipped" in recipe.run(0, typed="y").stdout
    host.dispatch("--now")
    assert host.state()["waitingCount"] == 0
    assert server.requests == []
    assert [row["reasonCode"] for row in host.telemetry()[-3:]] == ["skipped_by_operator"] * 3


@recipe_of("A receiver lost what it took")
def test_a_receiver_lost_what_it_took(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    host.append(*degraded(4))
    host.dispatch()
    server.forget()
    shown = re.findall(r"(esc_\w+) +delivered\b", recipe.run(0).stdout)
    assert [identity[: len(shown[0])] for identity in ids(host)] == shown
    said = recipe.run(1, env={"ID": shown[1]}).stdout
    assert '"traceId": "pass-1"' in said
    [whole] = re.findall(r"^Id: (\w+)$", said, re.MULTILINE)
    recipe.run(2, typed="y", env={"ID": whole})
    assert sent_to_slack(server) == [ids(host)[1]]
    host.run("redeliver", *host.target, "--from-line", "3", "--to-line", "4", "--yes")
    assert sent_to_slack(server) == [ids(host)[number] for number in (1, 2, 3)]


@recipe_of("Alerts must stop for a while")
def test_alerts_must_stop_for_a_while(recipe: Recipe, host: Repo, server: SinkServer) -> None:
    server.answer(SLACK, error(503))
    host.append(*degraded(1))
    host.dispatch()
    server.answer(SLACK, ok())
    server.forget()
    config = json.loads(host.config_file.read_text())
    off = {name: {**sink, "enabled": False} for name, sink in config["sinks"].items()}
    host.write_config({**config, "sinks": off})
    assert re.findall(r"\t(true|false)$", recipe.run(0).stdout, re.MULTILINE) == ["false"] * 3
    host.append(*batch(5))
    host.dispatch()
    assert [row["reasonCode"] for row in host.telemetry()[-5:]] == ["no_dispatchable_sinks"] * 5
    said = recipe.run(1).stdout
    assert said.startswith("WARNING")
    assert "no sink is enabled" in said
    assert server.requests == []

    host.write_config(config)
    host.dispatch("--now")
    assert sent_to_slack(server) == ids(host)[:1]
    recipe.run(2, typed="y")
    recipe.run(3)
    assert host.run("status", *host.target).json["health"] == "ok"
    reached = {row["escalationId"] for row in host.attempts() if row["outcome"] == "delivered"}
    assert reached == {*ids(host)}


@recipe_of("A loss that you have seen")
def test_a_loss_that_you_have_seen(recipe: Recipe, host: Repo) -> None:
    host.append("{broken\n")
    host.dispatch()
    status, log = ([name, "--repo", str(host.root), "--format", "text"] for name in ("status", "log"))
    assert host.run(*status).stdout.startswith("WARNING")
    recipe.run(0)
    assert host.run(*status).stdout.startswith("OK")
    assert "invalid_escalation_json" in host.run(*log).stdout


@recipe_of("A move to another machine")
def test_a_move_to_another_machine(recipe: Recipe, host: Repo, server: SinkServer, tmp_path: Path) -> None:
    host.append(*batch(5))
    host.dispatch()
    server.answer(SLACK, error(503))
    host.append(*degraded(2))
    host.dispatch()
    waiting = ids(host)[-2:]
    there = replace(host, root=tmp_path / "new-machine")
    recipe.run(0, then=f"mkdir '{there.root}' && tar -C '{there.root}' -xzf alerts.tar.gz")
    server.answer(SLACK, ok())
    server.forget()
    said = recipe.run(1, env={"OPS_MANAGER_REPO": str(there.root)}).stdout
    assert re.findall(r"^(\d+) .* send: slack-default$", said, re.MULTILINE) == ["6", "7"]
    assert "0 new: 0 to send, 0 skipped, 0 failed; late: 2 to send, 0 given up" in said
    there.dispatch("--now")
    assert sent_to_slack(server) == waiting
    assert len(server.requests) == 2


# --- Monitoring


@recipe_of("Monitoring")
def test_monitoring(recipe: Recipe, host: Repo, tmp_path: Path) -> None:
    host.append(*batch(5))
    host.dispatch()
    assert recipe.run(0).stdout.startswith("ALERT DISPATCH OK: ")
    written = (tmp_path / "alerts.prom").read_text()
    named = re.findall(r"`(?:ops_alert_dispatch|…)_([a-z_]+)`", SECTIONS["Monitoring"])
    assert {f"ops_alert_dispatch_{name}" for name in named} == {*re.findall(r"# TYPE (\w+)", written)}
    promtool(tmp_path, "check", "metrics", stdin=written)


def test_the_alert_rules_fire_when_alerts_do_not_get_out(
    host: Repo, server: SinkServer, tmp_path: Path
) -> None:
    [rules] = code_blocks(SECTIONS["Monitoring"], "yaml")
    (tmp_path / "rules.yml").write_text(rules)
    promtool(tmp_path, "check", "rules", "--lint=all", "--lint-fatal", "rules.yml")

    host.append(*degraded(1))
    host.dispatch()
    well = series(host)
    server.script(SLACK, error(422), error(503))
    host.append(*(health_degraded(seconds_ago=1000 - number) for number in range(3)))
    host.dispatch()
    time_passes(host, 1000)
    unwell = series(host)
    loop, sink = host.loop, "slack-default"
    firing = {
        "AlertDispatchUnhealthy": f"Alerts of {loop} do not get out: run ops-alert-dispatch status",
        "AlertDispatchWaiting": f"An alert of {loop} has waited for {sink} for over 15 minutes",
        "AlertDispatchNotRunning": f"No pass has run for {loop} for 15 minutes",
        "AlertDispatchDeadLetters": f"1 alerts of {loop} to {sink} were given up",
        "AlertDispatchSinkFailing": f"Sink {sink} of {loop} has failed for 15 minutes",
        "AlertDispatchMissing": "No loop has reported for 15 minutes: is the file of metrics still written?",
    }
    assert set(firing) == set(re.findall(r"- alert: (\w+)", rules))

    def expected(name: str, text: str) -> dict[str, Any]:
        severity = re.findall(rf"{name}\n.*?severity: (\w+)", rules, re.DOTALL)[0]
        of_what = {name: value for name, value in (("loop", loop), ("sink", sink)) if value in text}
        labels = {"severity": severity, **of_what}
        return {"exp_labels": labels, "exp_annotations": {"summary": text}}

    def case(given: list[dict[str, str]], minute: int, wanted: Collection[str]) -> dict[str, Any]:
        tests = [
            {
                "eval_time": f"{minute}m",
                "alertname": name,
                "exp_alerts": [expected(name, text)] if name in wanted else [],
            }
            for name, text in firing.items()
        ]
        return {"interval": "1m", "input_series": given, "alert_rule_test": tests}

    document = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            case(well, 14, []),
            case(well, 16, ["AlertDispatchNotRunning"]),
            case(unwell, 16, firing.keys() - {"AlertDispatchMissing"}),
            case([], 16, ["AlertDispatchMissing"]),
        ],
    }
    (tmp_path / "rules.test.yml").write_text(json.dumps(document))
    promtool(tmp_path, "test", "rules", "rules.test.yml")


def series(host: Repo) -> list[dict[str, str]]:
    """What Prometheus reads of a host for half an hour from its moment 0, when the last pass ended."""
    metrics = host.run("status", "--repo", str(host.root), "--format", "prometheus").stdout
    given = re.findall(r"^(\w+\{.*\}) (\S+)$", metrics, re.MULTILINE)
    return [
        {"series": name, "values": f"{0 if 'timestamp' in name else value}+0x30"} for name, value in given
    ]


def promtool(folder: Path, *arguments: str, stdin: str = "") -> None:
    """Let promtool judge something: it must have nothing to say against it."""
    judged = subprocess.run(
        [needs_tool("promtool"), *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (judged.returncode, judged.stderr) == (0, ""), judged


# --- Commands


@recipe_of("Commands")
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
    assert len(BLOCKS) > 10
    assert set(BLOCKS) == TESTED


def test_every_command_and_option_of_the_runbook_is_real(host: Repo) -> None:
    text = SECTIONS["Runbook"] + SECTIONS["Commands"] + SECTIONS["Monitoring"]
    pages = {name: host.run(name, "--help").stdout for name in ops_alert_dispatch.cli.commands}
    commands = re.findall(rf"{PROGRAM} ([a-z]+)((?: [^\n&|>)`]+)?)", text)
    inline = re.findall(rf"`({'|'.join(pages)})((?: [^`]+)?)`", text)
    assert len(commands) > 20
    for command, rest in commands + inline:
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in pages[command], (command, option)


def test_the_table_of_commands_names_all_of_them_and_options_that_they_have(host: Repo) -> None:
    listed: list[str] = []
    for names, meaning in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", SECTIONS["Commands"], re.MULTILINE):
        found = re.findall(r"`([a-z]+)[^`]*`", names)
        pages = "".join(host.run(name, "--help").stdout for name in found)
        assert [option for option in re.findall(r"--[a-z-]+", meaning) if option not in pages] == []
        listed += found
    assert sorted(listed) == sorted(ops_alert_dispatch.cli.commands)


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
            r'write_event\(\s*"(\w+)"',
            r'Unusable\(identity, "(\w+)"',
            r'^[A-Z_]+ = "(\w+_by_\w+)"',
            r'"failureReasonCodes": \["(\w+)"\]',
        )
        for code in re.findall(pattern, program, re.MULTILINE)
    }
    explained = {*ops_alert_dispatch.CODES} - {*get_args(ops_alert_dispatch.FaultCode)} | {"missing_secret"}
    assert len(used) > 10
    assert used <= explained
    assert not [code for code in explained if program.count(f'"{code}"') < 2]
