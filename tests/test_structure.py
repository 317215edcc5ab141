"""The order of the file: what keeps it a place where one finds one's way."""

from __future__ import annotations

import ast
import json
import re
import symtable
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from conftest import MODULE_FILE

import ops_alert_dispatch as program

SOURCE = MODULE_FILE.read_text(encoding="utf-8")
Definition = ast.FunctionDef | ast.ClassDef


class Section(NamedTuple):
    """A part of the file under a headline between two rules."""

    line: int
    title: str


@cache
def tree() -> ast.Module:
    return ast.parse(SOURCE)


@cache
def sections() -> list[Section]:
    rule = r"^# -{20,}\n"
    found = re.finditer(rf"{rule}# (?P<title>[^\n]+)\n{rule}", SOURCE, re.MULTILINE)
    return [Section(SOURCE.count("\n", 0, match.start()) + 1, match["title"]) for match in found]


def section_of(line: int) -> int:
    return sum(section.line <= line for section in sections()) - 1


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement at the top level defines."""
    if isinstance(node, Definition):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def defined() -> dict[str, int]:
    """The lines of what is defined at the top level."""
    return {name: node.lineno for node in tree().body for name in names_of(node)}


def globals_of(scope: symtable.SymbolTable) -> Iterator[str]:
    """The names that a scope, and those within it, look up in the module."""
    for symbol in scope.get_symbols():
        if symbol.is_referenced() and symbol.is_global():
            yield symbol.get_name()
    for inner in scope.get_children():
        yield from globals_of(inner)


def quoted_in_annotations() -> Iterator[tuple[int, str]]:
    """Names in annotations in quotes, which Python does not look up: a line and a name each."""
    for node in ast.walk(tree()):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for part in ast.walk(annotation) if annotation else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from ((part.lineno, name) for name in re.findall(r"\w+", part.value))


def test_no_section_uses_a_later_one() -> None:
    assert len(sections()) >= 12
    scopes = symtable.symtable(SOURCE, str(MODULE_FILE), "exec").get_children()
    used = {(scope.get_lineno(), name) for scope in scopes for name in globals_of(scope)}
    ahead = [
        f"line {line}: {name} is defined in line {defined()[name]}"
        for line, name in used.union(quoted_in_annotations())
        if name in defined() and section_of(defined()[name]) > section_of(line)
    ]
    assert not ahead, "\n".join(sorted(ahead))


def test_each_section_begins_with_what_it_knows_and_never_does() -> None:
    lines = SOURCE.splitlines()
    for section in sections():
        assert lines[section.line + 2].startswith("# "), f"{section.title}: nothing below its headline"


def test_a_private_name_is_used_where_it_is_defined() -> None:
    owners: dict[str, set[str]] = {}
    used: list[tuple[str, str, int]] = []
    for top in tree().body:
        owner = top.name if isinstance(top, Definition) else ""
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                used.append((node.attr, owner, node.lineno))
                if isinstance(node.ctx, ast.Store):
                    owners.setdefault(node.attr, set()).add(owner)
            elif isinstance(node, Definition) and node.name.startswith("_"):
                owners.setdefault(node.name, set()).add(owner)
    strange = [
        f"line {line}: {name} belongs to {', '.join(sorted(owners[name]))}"
        for name, owner, line in used
        if not name.endswith("__") and name in owners and owner not in owners[name]
    ]
    # What is private at the top level belongs to its section.
    strange += [
        f"line {node.lineno}: {node.id} is defined in line {defined()[node.id]}, in another section"
        for node in ast.walk(tree())
        if isinstance(node, ast.Name)
        and node.id in defined()
        and node.id.startswith("_")
        and not node.id.endswith("__")
        and section_of(node.lineno) != section_of(defined()[node.id])
    ]
    assert not strange, "\n".join(strange)


def methods_of(node: ast.stmt) -> list[Definition]:
    body = node.body if isinstance(node, ast.ClassDef) else []
    return [item for item in body if isinstance(item, Definition)]


def uses_in(tree: ast.AST) -> Counter[str]:
    return Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and not isinstance(node.ctx, ast.Store)
    )


def is_called_by_a_library(node: ast.stmt) -> bool:
    parts = node.decorator_list if isinstance(node, ast.FunctionDef) else getattr(node, "bases", [])
    return any(re.match(r"(cli|click|io)\.|Command$", ast.unparse(part)) for part in parts)


def test_nothing_is_defined_and_never_used() -> None:
    uses = uses_in(tree())
    # Annotations in quotes.
    quoted = Counter(
        word
        for node in ast.walk(tree())
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 100
        for word in re.findall(r"\w+", node.value)
    )
    # A function that only calls itself is not used.
    defined = [
        (item, name)
        for top in tree().body
        if not is_called_by_a_library(top)
        for item in (top, *methods_of(top))
        for name in names_of(item)
    ]
    unused = [
        f"line {item.lineno}: {name}"
        for item, name in defined
        if not (name.startswith("__") or quoted[name])
        and uses[name] == (uses_in(item)[name] if isinstance(item, Definition) else 0)
    ]
    assert not unused, "\n".join(unused)


def test_every_key_of_the_schema_is_read() -> None:
    def keys(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (key for key, known in value.get("properties", {}).items() if known is not True)
            for item in value.values():
                yield from keys(item)
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    named = set(keys(json.loads(Path(program.SCHEMA_FILE).read_text(encoding="utf-8"))))
    assert len(named) > 30
    words = {node.value for node in ast.walk(tree()) if isinstance(node, ast.Constant)}
    assert not named - words
