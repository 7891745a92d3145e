"""The page of the web demo, and its server. Gradio is an extra (`pip install 'autoprune-llava[serve]'`).

Uploads lie in a folder of this process that ends with it and forgets old files before; pictures that are drawn go into
the page as they are. The page loads nothing from elsewhere, and nothing is told to anybody.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.common.arguments import (
    DEFAULT_METHOD,
    DEFAULT_TARGET_TOKENS,
    MAX_IMAGE_PIXELS,
    Parser,
    add_generation_arguments,
    add_model_arguments,
    check_range,
)
from llava.tiny import BENCHMARKS, CHECKPOINT, make_benchmarks
from llava.utils import UserError, describe_error, visible

if TYPE_CHECKING:
    from llava.serve.side_by_side import Half, SideBySide

LOOPBACK, PORT = "127.0.0.1", 7860
MAX_UPLOAD_MB = 20
MAX_NEW_TOKENS = 256
KEPT_SECONDS = 1800  # of an upload that nobody asks about any more
_COLORS = {"blue": "#3b6fd4", "orange": "#d9480f", "gray": "#6b7280"}  # of the curves
_CURVE = "Visual tokens leaving each layer"
_FONTS = ["system-ui", "sans-serif"]


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = Parser(
        prog="python -m llava.serve.gradio_app",
        description="Ask a model about pictures in the browser: dense and pruned side by side, with what survives.",
    )
    add_model_arguments(parser, default=str(CHECKPOINT))
    for bits in (8, 4):
        parser.add_argument(f"--load-{bits}bit", action="store_true", help=f"quantize to {bits} bits (bitsandbytes)")
    add_generation_arguments(parser, single=True)
    parser.set_defaults(max_new_tokens=MAX_NEW_TOKENS)
    group = parser.add_argument_group("page")
    group.add_argument("--method", default=DEFAULT_METHOD, help="pruning method that the page begins with")
    group.add_argument(
        "--budget", default=str(DEFAULT_TARGET_TOKENS),
        help="budget that it begins with: visual tokens per layer, or a share of a picture's tokens (0.11)",
    )  # fmt: skip
    group.add_argument(
        "--data-dir", default=str(BENCHMARKS), help="benchmarks in upstream's layout, whose questions are the examples"
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=LOOPBACK, help="address to listen at; 0.0.0.0: every network of this machine")
    group.add_argument("--port", type=int, default=PORT, help="port to listen at; 0: any that is free")
    group.add_argument("--max-upload-mb", type=int, default=MAX_UPLOAD_MB, help="largest picture file, in megabytes")
    group.add_argument("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, help="larger pictures are refused")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Loads the model and serves the page until Ctrl-C."""
    check_range("--port", args.port, 0, 65535)
    check_range("--max-upload-mb", args.max_upload_mb, 1, 10_000)
    check_range("--max-image-pixels", args.max_image_pixels, 1)
    gradio = import_gradio()
    from llava.serve.side_by_side import SideBySide, method_of

    method_of(args.method, args.budget)  # a mistake in the flags is told before a model is loaded
    side_by_side = SideBySide(args)
    side_by_side.warm_up(side_by_side.method(args.method, args.budget))
    with tempfile.TemporaryDirectory(prefix="autoprune-demo-") as folder:
        page, address = launch(gradio, side_by_side, args, Path(folder))
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if args.host != LOOPBACK:
            print("warning: everybody who reaches this address can use the model", file=sys.stderr)
        try:
            page.block_thread()
        except KeyboardInterrupt:
            page.close()


def import_gradio() -> Any:
    """Gradio, which asks nobody for anything; `UserError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(
            f"the web demo needs Gradio ({error.name} is missing): pip install 'autoprune-llava[serve]'"
        ) from None
    return gradio


def launch(gradio: Any, side_by_side: SideBySide, args: argparse.Namespace, folder: Path) -> tuple[Any, str]:
    """Starts the server in the background; the page and its address. folder: where uploads go."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    page = build_page(gradio, side_by_side, args, example_questions(args.data_dir, folder))
    page.queue(max_size=32, default_concurrency_limit=1, api_open=False)
    try:
        _, address, _ = page.launch(
            server_name=args.host, server_port=args.port or _free_port(args.host), share=False, inbrowser=False,
            prevent_thread_lock=True, quiet=True, show_error=False, footer_links=[], ssr_mode=False, pwa=False,
            enable_monitoring=False, state_session_capacity=64, max_file_size=args.max_upload_mb * 1024 * 1024,
            theme=gradio.themes.Default(font=_FONTS, font_mono=["monospace"]), css=_CSS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--host {args.host} --port {args.port}: cannot listen there ({error})") from None
    return page, address


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def example_questions(data_dir: str, folder: Path, each: int = 2) -> list[list[str]]:
    """Pictures and questions of the demo's benchmarks; none where their data are not there."""
    from llava.eval.common.questions import spread
    from llava.eval.tasks.registry import DEMO

    make_benchmarks(data_dir)
    examples = []
    for task in DEMO:
        path = task.questions_path(Path(data_dir))
        if not path.is_file():
            continue
        for question in spread(task.read_questions(path), each)[:each]:
            source = task.images_path(Path(data_dir)) / (question.image or "")
            if question.image and source.is_file():
                # A copy: what the server may hand out lies in its own folder.
                copy = folder / "examples" / f"{task.key}-{question.index}{source.suffix}"
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, copy)
                examples.append([str(copy), question.text])
    return examples


# --- the page ----------------------------------------------------------------------------------------------------

_CSS = """
.costs table { font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
.costs td { padding: .1rem .4rem; } .costs td + td { text-align: right; }
.problem { border: 2px solid #a8200d; border-radius: 6px; padding: .5rem .75rem; overflow-wrap: anywhere; }
footer { display: none !important; }
"""


def build_page(gradio: Any, side_by_side: SideBySide, args: argparse.Namespace, examples: Sequence[Any]) -> Any:
    """The page's elements and what they do."""
    from llava.pruning import list_methods

    methods = [name for name in list_methods() if name != "dense"]
    chosen = [] if args.method in methods else [args.method]
    last = side_by_side.layers - 1
    page = gradio.Blocks(
        title=f"AutoPrune: {side_by_side.name}", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)
    )
    with page:
        gradio.Markdown(f"# Dense and pruned, side by side\n`{side_by_side.name}`")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                upload = gradio.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"],
                    height=260, elem_id="picture",
                )  # fmt: skip
                upload.preprocess = path_of  # only the tool's own check opens an upload
                question = gradio.Textbox(label="Question", lines=3, elem_id="question")
                method = gradio.Dropdown(
                    [*methods, *chosen], value=args.method, label="Method", allow_custom_value=True, elem_id="method",
                    info="also a+b, or LAYER:METHOD:SHARE;...",
                )  # fmt: skip
                budget = gradio.Textbox(
                    value=args.budget, label="Budget", elem_id="budget",
                    info="visual tokens per layer (64), or a share of the picture's tokens (0.11)",
                )  # fmt: skip
                options = gradio.Textbox(
                    label="Further options of the method", elem_id="options", placeholder="gamma=0.3,x0=12"
                )
                ask = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column(scale=3):
                problem = gradio.HTML(elem_id="problem")
                texts, costs, shown = [], [], []
                with gradio.Row():
                    for name in ("Dense", "Pruned"):
                        with gradio.Column(min_width=260):
                            texts.append(gradio.Textbox(label=name, lines=2, elem_id=f"{name.lower()}-answer"))
                            costs.append(gradio.HTML(elem_classes="costs", elem_id=f"{name.lower()}-costs"))
                layer = gradio.Slider(
                    -1, last, value=min(1, last), step=1, label="Layer", elem_id="layer",
                    info="-1: before the decoder; pale: dropped, hatched: padding, outlined: merged into one token",
                )  # fmt: skip
                with gradio.Row():
                    for name in ("Dense", "Pruned"):
                        shown.append(gradio.HTML(elem_id=f"{name.lower()}-survivors", min_height=40))
                curve = gradio.LinePlot(
                    x="layer", y="visual tokens", color="run", label=_CURVE, color_title=" ", height=300,
                    elem_id="curve", x_lim=[-1, last],
                )  # fmt: skip
        state = gradio.State(None, time_to_live=KEPT_SECONDS)
        if examples:
            gradio.Examples(examples, [upload, question], label="Examples", cache_examples=False)
        outputs = [problem, *texts, *costs, *shown, curve, state]
        inputs = [upload, question, method, budget, options, layer]

        def answer(*values: Any) -> Iterator[tuple[Any, ...]]:
            for *before, table, known in answers(side_by_side, *values):
                names = [] if table is None else list(dict.fromkeys(table["run"]))
                told = ", ".join(f"{color}: {name}" for color, name in zip(_COLORS, names, strict=False))
                plot = gradio.LinePlot(
                    value=table,
                    label=f"{_CURVE} ({told})" if told else _CURVE,
                    color_map=dict(zip(names, _COLORS.values(), strict=False)),
                )
                yield *before, plot, known

        gradio.on([ask.click, question.submit], answer, inputs, outputs, concurrency_id="model")
        layer.change(
            lambda known, value: [drawn(known, value, place) for place in (0, 1)], [state, layer], shown,
            queue=False, show_progress="hidden",
        )  # fmt: skip
    return page


def path_of(payload: Any) -> str | None:
    """Where an upload lies; Gradio has checked that it is one of its own."""
    return None if payload is None else payload.path


def answers(
    side_by_side: SideBySide, path: str | None, question: str, method: str, budget: str, options: str, layer: float
) -> Iterator[tuple[Any, ...]]:
    """What the page shows while two answers come: a problem, texts, costs, survivors, curve, state."""
    try:
        if not path:
            raise UserError("choose a picture, or one of the examples")
        own = side_by_side.method(str(method).strip(), str(budget), str(options or ""))
        image = side_by_side.read_picture(path)
        small = image.copy()
        small.thumbnail((960, 960))
        for halves in side_by_side.answer(image, str(question or ""), own):
            yield _shown(halves, (small, halves), int(layer))
    except UserError as error:
        text = escape(describe_error(error))
        yield f'<div class="problem" role="alert">{text}</div>', "", "", "", "", "", "", None, None
    except OSError as error:
        if error.filename is None:
            raise
        yield f'<div class="problem" role="alert">{escape(describe_error(error))}</div>', *[""] * 6, None, None


def _shown(halves: tuple[Half, Half], known: Any, layer: int) -> tuple[Any, ...]:
    done = all(half.done for half in halves)
    return (
        "",
        *(half.text for half in halves),
        *(costs_table(half) if half.done else "" for half in halves),
        *(drawn(known, layer, place) for place in (0, 1)),
        curve_of(halves) if done else None,
        known if done else None,
    )


def drawn(known: Any, layer: float, place: int) -> str:
    """The survivors of one answer as they stand in the page; empty before there are any."""
    from llava.serve.drawing import as_html, survivors, words

    if known is None:
        return ""
    image, halves = known
    looked = halves[place].looked
    if looked is None:
        return ""
    return as_html(survivors(image, looked, int(layer)), words(looked, int(layer)))


def costs_table(half: Half) -> str:
    """Tokens, FLOPs and times of one answer as an HTML table."""
    looked = half.looked
    assert looked is not None
    rows = [("method", visible(half.method)), ("visual tokens", str(looked.visual))]
    rows += [(f"per layer, {kind}", f"{half.costs[kind]:.1f}") for kind in ("nominal", "processed")]
    if looked.flops and looked.dense_flops:
        share = 100 * looked.flops / looked.dense_flops
        rows.append(("FLOPs, of dense", f"{looked.flops / 1e9:.3g} G, {share:.1f}%"))
    times = (("to the first text", half.first), ("prefill", half.prefill), ("in all", half.seconds))
    rows += [(f"time: {name}", f"{1000 * seconds:.1f} ms") for name, seconds in times if seconds is not None]
    if looked.information[1] is not None:
        rows.append(("mutual information", f"{looked.information[1]:.3f} bits"))
    if looked.slope is not None:
        rows.append(("slope", f"{looked.slope:.4f}"))
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def curve_of(halves: tuple[Half, Half]) -> Any:
    """Tokens leaving each layer as a table that Gradio draws."""
    import pandas

    rows: list[tuple[int, float, str]] = []
    for number, half in enumerate(halves):
        if half.looked is None:
            continue
        name = "dense" if number == 0 else half.method
        counts = (half.looked.visual, *half.looked.counts)
        rows += [(layer, count, name) for layer, count in enumerate(counts, start=-1)]
        if half.looked.target is not None:
            rows += [(layer, half.looked.target, "budget") for layer in (-1, len(half.looked.counts) - 1)]
    return pandas.DataFrame(rows, columns=["layer", "visual tokens", "run"])
