"""The command line: help that reads as a manual, every way to start the program, and the demo."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import MODULE_FILE, Repo, Run, clean_env
from escalations import health_critical
from zygote import interrupt_the_first_request

ROOT = MODULE_FILE.parent
OPTIONS = {
    "dispatch": {
        "--repo",
        "--loop",
        "--escalations-file",
        "--dispatch-state-file",
        "--dispatch-telemetry-file",
        "--trace-id",
        "--alert-config-file",
        "--max-escalations",
        "--time-budget",
        "--dry-run",
        "--show-payload",
        "--strict",
        "--format",
        "--pretty",
        "--help",
    },
    "config": {
        "--config-file",
        "--category",
        "--severity",
        "--list-sinks",
        "--no-env-check",
        "--format",
        "--pretty",
        "--help",
    },
    "demo": {"--help"},
}


def program(folder: Path, *arguments: str, **env: str) -> Run:
    return Repo(folder, clean_env(folder, **env)).run(*arguments)


def flat(text: str) -> str:
    """Without the line breaks that wrapping makes."""
    return re.sub(r"\s+", " ", re.sub(r"(?<=\w-)\n\s+", "", text))


# --- Help


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(tmp_path: Path, command: str) -> None:
    done = program(tmp_path, command, "--help")

    assert (done.exit_code, done.stderr) == (0, "")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", done.stdout))
    assert named >= OPTIONS[command]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "dispatch",
            [
                "OPS_MANAGER_TRACE_ID",
                "OPS_MANAGER_ALERT_SINKS_FILE",
                "config/ops-manager-alert-sinks.v1.json",
                "escalations.jsonl",
                "alert-dispatch-state.json",
                "telemetry/alerts.jsonl",
                "30",
                "auto|text|json",
                "OPS_MANAGER_REPO",
            ],
        ),
        ("config", ["OPS_MANAGER_ALERT_SINKS_FILE", "config/ops-manager-alert-sinks.v1.json"]),
    ],
)
def test_help_tells_defaults_and_environment_variables(
    tmp_path: Path, command: str, words: list[str]
) -> None:
    text = program(tmp_path, command, "--help").stdout
    for word in words:
        assert word in text or word in flat(text), word


def test_the_help_has_the_exit_codes_and_where_the_files_are(tmp_path: Path) -> None:
    text = flat(program(tmp_path, "--help").stdout)
    told = text[text.lower().index("exit code") :]
    for code, word in enumerate(["done", "strict", "command line", "config", "state", "disk"]):
        assert str(code) in told
        assert word in told.lower()
    assert "130 interrupted" in told
    assert ".superloop/ops-manager/" in text


def test_help_lists_the_commands(tmp_path: Path) -> None:
    text = program(tmp_path, "--help").stdout
    for command in OPTIONS:
        assert re.search(rf"^\s+{command}\s+\S.*\.$", text, re.MULTILINE)
    assert "..." not in text.partition("Commands:")[2]


def test_a_call_with_nothing_shows_the_help(tmp_path: Path) -> None:
    done = program(tmp_path)

    assert done.exit_code in {0, 2}
    assert "dispatch" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["dispach"], ["dispatch", "--lop", "x"], ["config", "extra"]])
def test_a_slip_of_the_pen_is_a_usage_error(tmp_path: Path, arguments: list[str]) -> None:
    done = program(tmp_path, *arguments)

    assert (done.exit_code, done.stdout) == (2, "")
    assert arguments[-1] in done.stderr or "--lop" in done.stderr
    assert "--help" in done.stderr


def test_a_repo_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    gone = program(tmp_path, "status", "--repo", "gone")
    file = program(tmp_path, "status", OPS_MANAGER_REPO="file")
    assert (gone.exit_code, file.exit_code) == (2, 2)
    assert "'--repo' (env var: 'OPS_MANAGER_REPO'): folder 'gone' does not exist" in gone.stderr
    assert "'--repo' (env var: 'OPS_MANAGER_REPO'): folder 'file' is a file" in file.stderr


def test_an_empty_path_counts_as_not_given(repo: Repo) -> None:
    repo.append(health_critical())
    empty = ("--alert-config-file", "", "--escalations-file", "", "--queue-file", "")
    assert repo.dispatch(*empty).json["dispatchedCount"] == 1


def test_an_error_before_anything_is_sent_leaves_no_empty_progress_bar(repo: Repo) -> None:
    repo.append(health_critical())
    repo.write_config("{")
    run = repo.run_on_terminal("dispatch", *repo.target, streams=("stdout", "stderr"))
    assert run.exit_code == 3
    assert run.stderr.startswith("error: config invalid")


def test_version_is_told(tmp_path: Path) -> None:
    done = program(tmp_path, "--version")

    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"ops-alert-dispatch.* \d+\.\d+", done.stdout)


# --- Every way to start it


def test_the_file_copied_beside_its_schema_runs_through_a_link(repo: Repo, tmp_path: Path) -> None:
    """As an operator puts it on a host: two files somewhere, a link in the path."""
    folder = tmp_path / "opt"
    folder.mkdir()
    for name in (MODULE_FILE.name, "alert-sinks.schema.json"):
        shutil.copy(ROOT / name, folder)
    link = tmp_path / "ops-alert-dispatch"
    link.symlink_to(folder / MODULE_FILE.name)
    repo.append(health_critical())
    repo.command = [sys.executable, str(link)]

    assert repo.dispatch().json["dispatchedCount"] == 1


def test_a_missing_schema_is_told_and_nothing_is_consumed(repo: Repo, tmp_path: Path) -> None:
    shutil.copy(MODULE_FILE, tmp_path / "alone.py")
    repo.append(health_critical())
    repo.command = [sys.executable, str(tmp_path / "alone.py")]
    run = repo.dispatch()

    assert run.exit_code not in {0, 1, 2}
    assert "alert-sinks.schema.json" in run.stderr
    assert "Traceback" not in run.stderr
    assert repo.telemetry() == []


def test_the_inline_metadata_asks_for_what_the_package_asks_for() -> None:
    """`uv run --script` reads it."""
    text = MODULE_FILE.read_text(encoding="utf-8")
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)
    assert block is not None
    inline = tomllib.loads("\n".join(row[2:] for row in block[1].splitlines()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert inline["requires-python"] == project["requires-python"]
    assert sorted(inline["dependencies"]) == sorted(project["dependencies"])


@pytest.mark.parametrize("past", ["nothing ever escalated", "nothing new"])
def test_a_pass_that_sends_nothing_does_not_pay_for_the_client_or_the_validator(
    repo: Repo, past: str
) -> None:
    """Nearly every pass is one: each of these would more than double what it costs."""
    # The host keeps other files of the loop there.
    repo.folder.mkdir(parents=True)
    if past == "nothing new":
        repo.append(health_critical())
    assert repo.dispatch().exit_code == 0

    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(MODULE_FILE), "dispatch", *repo.target],
        capture_output=True,
        encoding="utf-8",
        env=repo.env,
        check=True,
    )

    assert "no_source" in done.stdout or "no_new_escalations" in done.stdout
    loaded = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert "click" in loaded
    assert loaded.isdisjoint(
        {"requests", "urllib3", "jsonschema", "http.client", "ssl", "hashlib", "random", "sqlite3"}
    )


# --- Demo


def test_the_demo_shows_all_three_sinks_and_leaves_nothing_behind(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = program(tmp_path, "demo", TMPDIR=str(temporary))

    assert (done.exit_code, done.stderr) == (0, "")
    for word in ("webhook", "slack", "pagerduty_events"):
        assert word in done.stdout.lower()
    for category in (
        "health_degraded",
        "health_critical",
        "divergence_detected",
        "ordering_drift_detected",
        "profile_drift_detected",
    ):
        assert category in done.stdout
    assert "🚨 4 escalations: 1 critical, 3 warning" in done.stdout
    assert "Received in all: webhook 5, slack 5, pagerduty 5." in done.stdout
    assert "\x1b" not in done.stdout
    assert list(temporary.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_ctrl_c_ends_the_demo(tmp_path: Path) -> None:
    """It would go on with a second pass, in which what is left goes out under a headline that denies it."""
    repo = Repo(tmp_path, clean_env(tmp_path), prepare=interrupt_the_first_request)
    done = repo.run("demo")

    assert (done.exit_code, done.stdout) == (130, "")


def test_the_demo_is_json_for_scripts(tmp_path: Path) -> None:
    found = json.loads(program(tmp_path, "demo", "--format", "json").stdout)
    assert (found["status"], found["escalationCount"]) == ("success", 5)
    assert found["receivedCounts"] == {"webhook": 5, "slack": 5, "pagerduty": 5}
    assert [one["processedCount"] for one in found["passes"]] == [5, 0]
    assert [row["status"] for row in found["telemetry"]] == ["dispatched"] * 5


def test_the_demo_needs_nothing_from_the_environment_and_takes_no_proxy(tmp_path: Path) -> None:
    """A host with a proxy set must not send the demo's loopback traffic through it."""
    nowhere = "http://127.0.0.1:9"
    done = program(
        tmp_path, "demo", HTTP_PROXY=nowhere, http_proxy=nowhere, OPS_MANAGER_ALERT_SINKS_FILE="/nowhere.json"
    )

    assert done.exit_code == 0, done.stderr
