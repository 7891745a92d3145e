"""Throughput of evaluation with 0, 1, 2, ... processes that read images ahead of the model.

    python -m benchmarks.input_pipeline --workers 0,2,4 --image-side 1024

Photographs of benchmark size are stood for by JPEGs of noise, made for the run; the model is the tiny LLaVA. Each round
runs the whole loop (read, decode, process, encode, prefill, answer) once per number of workers, start of the workers
included. The input column is reading alone, without the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.flags import add_round_arguments, add_running_arguments, numbers, prepare
from benchmarks.saved import deliver
from benchmarks.timing import interleaved_rounds, summary
from llava.eval.common.arguments import GenerationOptions, Parser, check_range
from llava.eval.common.questions import Question
from llava.utils import cli_main

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("workers", "images_per_s", "p10", "p90", "of_none", "input_per_s", "rounds")


def write_images(folder: Path, count: int, side: int) -> list[Question]:
    """JPEGs whose detail and size are those of photographs, and a question about each."""
    draw = np.random.default_rng(0)
    questions = []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        name = f"{number}.jpg"
        coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(folder / name, quality=90)
        questions.append(Question(number, f"{folder}:{number}", number, "What is this?", name))
    return questions


def measure(answerer: Any, questions: Sequence[Question], workers: Sequence[int], args: Any) -> list[dict[str, Any]]:
    """A row per number of workers."""
    from llava.eval.answering.batching import answer_questions
    from llava.eval.answering.workers import prepared
    from llava.pruning import get_method

    options = {} if args.method == "dense" else {"target_tokens": args.target_tokens}
    method = get_method(args.method).from_options(options)

    def whole(number: int) -> Callable[[], None]:
        def work() -> None:
            answerer.forget_images()
            with method.attach(answerer.model) as run:
                stream = answer_questions(answerer, questions, run, args.batch_size, num_workers=number)
                assert sum(1 for _ in stream) == len(questions)

        return work

    def reading(number: int) -> Callable[[], None]:
        def work() -> None:
            answerer.forget_images()
            assert sum(1 for _ in prepared(answerer, questions, number, 4 * args.batch_size)) == len(questions)

        return work

    device = answerer.model.device
    candidates: dict[Any, Callable[[], None]] = {number: whole(number) for number in workers}
    candidates |= {("input", number): reading(number) for number in workers}
    seconds = interleaved_rounds(candidates, args.rounds, device, args.warmup, description="input pipeline")
    rows = []
    for number in workers:
        whole_ms, alone_ms = summary(seconds[number]), summary(seconds["input", number])
        rate = 1000 * len(questions)
        ratios = [none / own for own, none in zip(seconds[number], seconds[0], strict=True)]
        rows.append(
            {
                "workers": number,
                "images_per_s": rate / whole_ms["ms"],
                "p10": rate / whole_ms["p90"],
                "p90": rate / whole_ms["p10"],
                "of_none": float(np.median(ratios)),
                "input_per_s": rate / alone_ms["ms"],
                "rounds": whole_ms["rounds"],
            }
        )
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Throughput of evaluation with processes that read images ahead of the model.")
    tiny = ROOT / "playground" / "tiny" / "models" / "tiny-llava-v1.5"
    parser.add_argument("--model-path", default=str(tiny), help="checkpoint folder")
    parser.add_argument("--workers", default="0,1,2,4", help="numbers of processes, by commas")
    parser.add_argument("--images", type=int, default=64, help="images per round")
    parser.add_argument("--image-side", type=int, default=640, help="width of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per forward pass")
    parser.add_argument("--method", default="autoprune", help="pruning method")
    parser.add_argument("--target-tokens", type=int, default=64, help="budget of the method")
    add_round_arguments(parser, 5, 1)
    add_running_arguments(parser)
    args = parser.parse_args(argv)
    check_range("--images", args.images, 1)
    check_range("--image-side", args.image_side, 16)
    workers = sorted({0, *numbers(args.workers, "--workers", least=0)})  # 0 is what the others are compared with
    device, dtype = prepare(args)

    from llava.eval.answering.adapter import LlavaAdapter
    from llava.eval.answering.answerer import Answerer
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(args.model_path, None, Path(args.model_path).name, device=device, torch_dtype=dtype)
    tokenizer, model, image_processor, _ = loaded
    with tempfile.TemporaryDirectory() as folder:
        questions = write_images(Path(folder), args.images, args.image_side)
        generation = GenerationOptions(max_new_tokens=4)
        answerer = Answerer(LlavaAdapter(tokenizer, model, image_processor), Path(folder), generation=generation)
        rows = measure(answerer, questions, workers, args)
    images = f"{args.images} images, {args.image_side} pixels wide"
    label = f"{Path(args.model_path).name}, {images}, batch {args.batch_size}"
    deliver("input_pipeline", label, rows, COLUMNS, args, device)


if __name__ == "__main__":
    main()
