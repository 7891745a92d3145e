"""The table of docs/methods.md: what each method costs, from the classes and from the results of `benchmarks.costs`.

    python -m benchmarks.costs_table
    python -m benchmarks.costs_table --check

Measures nothing; `--check` says whether the document is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.candidates import build_method
from benchmarks.saved import RESULTS, Result, read_results
from llava.eval.common import outputs
from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_text, write_text_atomic
from llava.eval.common.tables import markdown_table, replace_between, wrap
from llava.pruning import BEFORE_DECODER, Rows, list_methods
from llava.pruning.method import PruningMethod
from llava.pruning.types import LayerFact
from llava.pruning.vision import TowerValue
from llava.utils import UserError, cli_main

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
_DEPTH, _TOWER = 32, 24
_ROWS = {
    Rows.TEXT: "text",
    Rows.LAST: "last token",
    Rows.NEXT_TEXT: "text, of the next layer",
    Rows.NEXT_LAST: "last token, of the next layer",
}
_FACTS = {
    LayerFact.QUERIES: "queries",
    LayerFact.TEXT_ATTENTION: "attention among the text",
    LayerFact.BLOCKS: "states around attention and MLP",
}
_TOWER_VALUES = {
    TowerValue.CLS_ATTENTION: "CLS row",
    TowerValue.WIDE_CLS_ATTENTION: "CLS row",
    TowerValue.RECEIVED_ATTENTION: "all rows",
    TowerValue.KEYS: "keys",
    TowerValue.WIDE_KEYS: "keys",
}
_ANYWHERE, _OWN, _ASKED = "all", "own LLaVA", "those with separate projections"


def declared(method: PruningMethod) -> list[str]:
    """Where it works, what it asks of the tower and of the decoder's layers, whether it runs beside FlashAttention, on
    which models, and whether its prefills can be replayed as CUDA graphs.
    """
    stages = method.stages(_DEPTH)
    places = ["in the tower"] * method.merges_in_tower
    if method.reduces_vision:
        places.append("behind the projector" if method.reduces_projected else "in front of the projector")
    places += ["input embeddings"] * (BEFORE_DECODER in stages)
    places += ["decoder"] * (max(stages, default=BEFORE_DECODER) > BEFORE_DECODER)
    tower = [_TOWER_VALUES.get(fact.value, "all rows") for fact in method.vision_facts(_TOWER).values()]  # type: ignore[call-overload]
    tower += ["CLS row"] * method.needs_cls
    rows: dict[str, int] = {}
    for wanted in stages.values():
        if wanted is not Rows.NONE:
            rows[_ROWS[wanted]] = rows.get(_ROWS[wanted], 0) + 1
    # Rows of a next layer are computed where something is dropped, in fewer layers than are declared.
    layers = [name if "next" in name else f"{name} ({count} layer{'s' * (count > 1)})" for name, count in rows.items()]
    layers += [
        _FACTS[fact] for fact in dict.fromkeys(f for facts in method.layer_facts(_DEPTH).values() for f in facts)
    ]
    layers += ["keys"] * getattr(method, "reads_keys", False)
    asks_next = {Rows.NEXT_LAST, Rows.NEXT_TEXT} & set(stages.values())
    return [
        " and ".join(places) or "–",
        ", ".join(dict.fromkeys(tower)) or "–",
        ", ".join(layers) or "–",
        "not in the tower" if method.merges_in_tower else "yes",
        _OWN if method.merges_in_tower else _ASKED if asks_next else _ANYWHERE,
        "yes" if method.capturable else "–",
    ]


def measured(results: Sequence[Result]) -> dict[int, Mapping[str, Mapping[str, Any]]]:
    """Rows by visual tokens and method; `UserError` if something was measured twice."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        for row in result.rows if result.tool == "costs" else ():
            rows = found.setdefault(int(row["visual"]), {})
            if row["method"] in rows:
                raise UserError(f"{result.stem}.json: {row['method']} was measured in another file too; remove one")
            rows[row["method"]] = row
    return found


def table(results: Sequence[Result]) -> str:
    """The whole generated part."""
    costs = [result for result in results if result.tool == "costs"]
    found = measured(costs)
    head = ["method", "where", "of the tower", "of the decoder's layers", "FlashAttention", "models", "CUDA graphs"]
    for visual, rows in sorted(found.items()):
        budget = next(iter(rows.values()))["budget"]
        head += [f"selection, {budget} of {visual}", "saves", "of pruned floor", "extra memory"]
    lines = []
    for name in list_methods():
        if name == "dense":
            continue
        line = [f"`{name}`", *declared(build_method(name, 64))]
        for _, rows in sorted(found.items()):
            line += cells(rows.get(name))
        lines.append(line)
    where = "; ".join(
        f"{result.label.replace('-', ' ')}: {result.env['hardware']}, {result.env['threads']} thread on "
        f"{result.env['cores']} cores, load average {result.env['load_average']}, {result.rows[0]['rounds']} rounds, "
        f"torch {result.env['torch']}, transformers {result.env['transformers']}"
        for result in costs
    )
    return "\n\n".join([markdown_table(head, lines, labels=7), f"Measured on: {where or 'nothing yet'}."])


def cells(row: Mapping[str, Any] | None) -> list[str]:
    """Milliseconds that selecting takes and saves, percent, MiB."""
    if row is None:
        return ["–"] * 4
    memory = "–" if row["extra_mib"] is None else f"{row['extra_mib']:.1f} MiB"
    saved = f"{row['saved_ms']:.1f} ms" if row["saved_ms"] else "–"
    return [f"{row['selection_ms']:.1f} ms", saved, f"{100 * row['of_pruned_floor']:.1f}%", memory]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Render the table of docs/methods.md from the classes and the saved results.")
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder with the results")
    parser.add_argument(
        "--document", type=outputs.DOCUMENT, default=str(DOCUMENT), help="markdown file with the markers"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if it is not up to date")
    args = parser.parse_args(argv)
    path = Path(args.document)
    before = read_text(path, "document")
    text = replace_between(before, "costs", wrap(table(read_results(Path(args.results_dir)))), str(path))
    if args.check:
        current = text == before
        print("up to date" if current else "not up to date: run python -m benchmarks.costs_table", file=sys.stderr)
        return 0 if current else 1
    write_text_atomic(path, text)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    main()
