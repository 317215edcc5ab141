"""What reads text of others, under any bytes: a record, the config, an answer, a `Retry-After`, a summary.

Each target takes bytes, and raises only where the program breaks a promise: where it crashes on what is only
bad input, say, or sends what is no JSON. As a coverage-guided fuzzer (needs `pip install -e '.[fuzz]'`):

    python tests/fuzz.py record -max_total_time=60 FOLDER    # libFuzzer's options; FOLDER keeps what it finds

What it found worth keeping stands in `tests/corpus/TARGET/`. test_security.py runs each target over that, and
over what hypothesis makes up.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from escalations import HOOK_TOKEN, sink_config, sink_env

CORPUS = Path(__file__).with_name("corpus")

with contextlib.ExitStack() as imports:
    if __name__ == "__main__":
        import atheris

        imports.enter_context(atheris.instrument_imports(include=["ops_alert_dispatch"]))
    import ops_alert_dispatch as program


def no_constant(word: str) -> NoReturn:
    raise AssertionError(f"{word} is no JSON")


def strict_json(data: bytes) -> Any:
    """Read JSON as RFC 8259 has it: UTF-8, and no NaN."""
    return json.loads(data.decode("utf-8"), parse_constant=no_constant)


def harmless(text: str) -> bool:
    """Tell whether text steers no terminal and forges no line: no control, break, surrogate or direction."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in DIRECTIONS
        for character in text
    )


# Unicode Standard Annex #9, "Directional Formatting Characters": embeddings, overrides, isolates.
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@contextlib.contextmanager
def file_with(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        yield path


class AnyVariable(dict[str, str]):
    """An environment in which every variable is set."""

    def __missing__(self, name: str) -> str:
        return "https://sink.example.org/path"

    def get(self, name: str, default: Any = None) -> str:
        return self[name]


def example_config() -> program.Config:
    with file_with(json.dumps(sink_config(everywhere=True)).encode()) as path:
        return program.load_config(str(path), sink_env("https://sink.example.org"))


CONFIG = example_config()
ROUTER = program.Router(CONFIG)
REDACTOR = CONFIG.redactor
ORIGIN = program.Origin("/srv/shop", "a-trace", 1_772_366_400.0)


def fuzz_record(data: bytes) -> None:
    """Any line holds escalations, of which every sink gets valid JSON, or has a reason not to hold any."""
    for line in program.parse_line(data, len(data), "a-loop"):
        if isinstance(line, program.Unusable):
            assert re.fullmatch("[a-z_]+", line.reason_code)
            strict_json(program.encode_json([line.raw_line, line.body, line.message]))
            continue
        strict_json(program.encode_with_record({"a": 1}, line))
        delivery = program.Delivery(line, ROUTER.resolve(line.category, line.severity))
        for sink in CONFIG.sinks.values():
            adapter = program.ADAPTERS[sink.type]
            request = adapter.build(sink, [delivery], ORIGIN)
            assert isinstance(strict_json(request.body), dict)
            assert all((name + value).isprintable() for name, value in request.headers.items())
            shown = program.show_request(adapter.url(sink), request, REDACTOR)
            assert HOOK_TOKEN not in json.dumps(shown)


def fuzz_config(data: bytes) -> None:
    """Any file is a config that works, or its faults are told, each with its place, in printable words."""
    environ: Mapping[str, str] = AnyVariable()
    faults: tuple[str, ...] = ()
    with file_with(data) as path:
        try:
            config = program.load_config(str(path), environ)
        except program.ConfigError as error:
            faults = error.faults or ("",)
    if faults:
        assert all(re.match(r"\$|…", fault) and harmless(fault) for fault in faults)
        return
    resolution = program.Router(config).resolve("health_critical", None)
    strict_json(program.encode_json(program.resolution_document(config, resolution)))
    strict_json(program.encode_json(program.config_document(config)))


def fuzz_retry_after(data: bytes) -> None:
    """Any header is a wait of at most an hour, or says nothing."""
    wait = program.parse_retry_after(data.decode("latin-1"), ORIGIN.emitted_at)
    assert wait is None or 0 <= wait <= program.RETRY_AFTER_MAX


def fuzz_answer(data: bytes) -> None:
    """Any answer has a meaning, and no text of it can steer a terminal or give a secret away."""
    status, body = (int.from_bytes(data[:2]) % 500 + 100, data[2:]) if data else (200, b"")
    headers = {"retry-after": body[:40].decode("latin-1")}
    for answered in (body, HOOK_TOKEN.encode() + body, body + HOOK_TOKEN.upper().encode()):
        answer = program.Answer(status, headers, answered)
        for adapter in program.ADAPTERS.values():
            verdict = adapter.judge(answer, ORIGIN.emitted_at)
            assert verdict.outcome in ("delivered", "retry", "misconfigured", "dead_letter")
            said = REDACTOR.mask(program.printable(verdict.message or ""))
            assert harmless(said)
            assert HOOK_TOKEN.lower() not in said.lower()


def fuzz_summary(data: bytes) -> None:
    """Any summary and any telemetry say where to go on, or nothing, or that they cannot be used."""
    with file_with(data) as path:
        # A queue that is there, but is none: what is read here must not need one.
        source_file, rows, queue = (path.with_name(name) for name in ("source", "rows", "queue"))
        source_file.write_bytes(b'{"category":"health_critical"}\n')
        rows.write_bytes(data)
        queue.write_bytes(b"none")
        job = program.usual_job(str(path.parent), "a-loop")._replace(
            state_file=str(path),
            escalations_file=str(source_file),
            telemetry_file=str(rows),
            queue_file=str(queue),
        )
        with contextlib.suppress(program.StateError):
            past = program.read_past(job)
            strict_json(program.encode_json(past.cursor.to_json()))
            with contextlib.closing(program.Source(job.escalations_file, past.cursor).find()) as source:
                assert all(chunk.cursor.offset >= 0 for chunk in source.chunks())
            strict_json(program.encode_json(program.locked_summary(job)))
            queues = program.QueueHolder(job)
            idle = program.idle_summary(job, program.read_summary(job), CONFIG, queues, always=True)
            strict_json(program.encode_json(idle))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "record": fuzz_record,
    "config": fuzz_config,
    "retry_after": fuzz_retry_after,
    "answer": fuzz_answer,
    "summary": fuzz_summary,
}


def seeds() -> dict[str, list[bytes]]:
    """Where the search begins: what is kept in the corpus."""
    return {name: [path.read_bytes() for path in sorted((CORPUS / name).iterdir())] for name in TARGETS}


def main() -> None:
    names = [name for name in TARGETS if name in sys.argv[1:2]]
    if not names:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)} [libFuzzer option]... [FOLDER]...")
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(CORPUS / names[0])], TARGETS[names[0]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
