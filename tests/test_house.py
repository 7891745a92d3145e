"""Imports of the package: one way, short, and never of a command line tool."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "llava").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
TOOLS = {
    name
    for name, tree in TREES.items()
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
}
LONGEST_CHAIN = 10
LONGEST_TOOL = 40  # lines


def statements(body: list[ast.stmt], everywhere: bool) -> Iterator[ast.stmt]:
    """Statements that run on import; everywhere: also those inside functions and for type checkers only."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if everywhere or "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from statements(node.body, everywhere)
            yield from statements(node.orelse, everywhere)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
            for child in inner:
                yield from statements(child.body if isinstance(child, ast.excepthandler) else [child], everywhere)


def imports(everywhere: bool) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        found = set()
        for node in statements(tree.body, everywhere):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in FILES else node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & FILES.keys()) - {name}
    return graph


def test_imports_have_no_circles():
    """Counting those inside functions and those for type checkers."""
    graph, done = imports(everywhere=True), set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_longest_chain_of_imports():
    graph, known = imports(everywhere=False), {}

    def chain(name: str) -> tuple[str, ...]:
        if name not in known:
            known[name] = (name, *max((chain(other) for other in graph[name]), key=len, default=()))
        return known[name]

    longest = max(map(chain, graph), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)
    assert len(longest) > 5, "the measure works"


def test_nobody_imports_a_tool():
    assert len(TOOLS) > 20
    graph = imports(everywhere=True)
    assert not [(name, other) for name in graph for other in graph[name] & TOOLS]


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_a_tool_is_a_parser_and_a_call(name):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_TOOL, f"{name} has {len(lines)} lines"


ORDER = ("common", "tasks", "answering", "reports")


def test_the_rooms_of_eval_import_one_way():
    """common <- tasks <- answering <- reports <- tools; what stands further left knows nobody to its right."""
    for name, others in imports(everywhere=True).items():
        room = name.split(".")[2] if name.startswith("llava.eval.") else None
        for other in others:
            theirs = other.split(".")[2] if other.startswith("llava.eval.") else None
            if room in ORDER and theirs in ORDER:
                assert ORDER.index(theirs) <= ORDER.index(room), f"{name} imports {other}"
            assert not (name.startswith(("llava.pruning", "llava.model", "llava.families")) and theirs), (name, other)
