"""Imports inside `llava.pruning` point one way, and methods are built by one function."""

from __future__ import annotations

import ast

import pytest

from llava.pruning import (
    AutoPrune,
    DecoderMethod,
    OptionError,
    TowerMerger,
    VisionReducer,
    build_method,
    get_method,
    list_methods,
)
from tests.conftest import ROOT

PACKAGE = ROOT / "llava" / "pruning"


def imported() -> dict[str, set[str]]:
    """Modules of the package that each of its modules imports, anywhere: at the top, locally, for types only."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & files.keys()) - {name}
    return graph


def test_no_circles():
    graph, done = imported(), set()

    def visit(name, way):
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_engine_imports_no_method():
    for name, others in imported().items():
        if name.startswith("llava.pruning.engine"):
            assert not any(".method" in other or "registry" in other for other in others), name


def test_one_builder():
    assert build_method("autoprune", {"target_tokens": "12", "x0": "3"}) == AutoPrune(target_tokens=12, x0=3.0)
    both = build_method("divprune+fastv", {"divprune.target_tokens": 9, "target_tokens": 5})
    assert both.name == "divprune+fastv" and [part.target_tokens for part in both.parts] == [9, 5]
    assert both == get_method("divprune+fastv")(**{"divprune.target_tokens": 9, "target_tokens": 5})
    schedule = build_method("2:fastv:0.5;4:random:0.25", {"positions": "compact"})
    assert schedule.name == "2:fastv:0.5;4:random:0.25" and schedule.positions == "compact"
    assert schedule != build_method("2:fastv:0.5;4:random:0.5", {"positions": "compact"})
    assert "text" not in schedule.settings() and "curve" not in AutoPrune().settings()
    for spec, options in (("nothing", {}), ("2:fastv:0.5", {"text": "x"}), ("autoprune", {"nothing": 1})):
        with pytest.raises(OptionError, match="nothing|text"):
            build_method(spec, options)


def test_every_method_says_where_it_works():
    bases = (DecoderMethod, VisionReducer, TowerMerger)
    assert all(issubclass(get_method(name), bases) for name in list_methods())
