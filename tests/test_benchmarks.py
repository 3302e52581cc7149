"""Benchmarks run by hand, so that nothing else would notice what one no longer offers another."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.py")}


def names_of(module: ast.Module) -> Iterator[str]:
    """Yield what a module defines or imports at its top."""
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (part for target in targets for part in ast.walk(target)):
                if isinstance(name, ast.Name):
                    yield name.id


def test_benchmarks_import_from_each_other_what_is_there() -> None:
    imported = [
        (name, node.module, alias.name)
        for name, module in MODULES.items()
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES
        for alias in node.names
    ]
    assert len(imported) > 50
    missing = [each for each in imported if each[2] not in set(names_of(MODULES[each[1]]))]
    assert missing == []


def test_a_run_too_short_for_a_comparison_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    compared = import_module("serve_on_ray")._compared
    none = {"pieces_per_second": 0.0, "first_token_p50_p99": []}
    some = {"pieces_per_second": 20.0, "first_token_p50_p99": [0.1, 0.3]}
    found = compared({"1": some, "16": none}, {"1": some, "16": none})
    assert found["ray_vs_local"]["1"] == 1
    assert found["added_first_token"]["1"] == [0, 0]
    assert "give more --seconds" in found["ray_vs_local"]["16"]
    assert "give more --seconds" in found["added_first_token"]["16"]
