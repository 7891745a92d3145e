"""Small runs on disk for the tests of the report: two methods, three questions, with traces, pictures and truth."""

import json
from pathlib import Path

from PIL import Image

from tests.eval.helpers import write_json, write_jsonl

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'> {data} \u2028 \u202e <!-- &amp;"
QUESTIONS = [
    {"question_id": "1", "image": "a.png", "text": "What color is it?\nAnswer the question using a single word."},
    {"question_id": "2", "image": "b.png", "text": "What shape is it?\nAnswer the question using a single word."},
    {"question_id": "3", "image": "a.png", "text": "Is it a star?\nAnswer the question using a single word."},
]
TRUTH = ["red", "circle", "no"]
DENSE, PRUNED = ["Red.", "circle", "yes"], ["red", "square", "no"]
LAYERS, TOKENS = 3, 16
KEPT = [[0, 1, 2, 3, 5, 6, 7, 10], [0, 1, 5, -1], [0, 1, -1]]
MEMBERS = [[], [[2, 3, 6]], [[2, 3, 5, 6]]]
RASTER = {"grid": [4, 4], "box": [0.0, -0.5, 1.0, 1.5], "tiles": [1, 1], "first": 0, "image": 0}


def trace(number, pruned):
    question = QUESTIONS[number]
    kept = KEPT if pruned else [list(range(TOKENS))] * LAYERS
    line = {
        "question_id": question["question_id"],
        "prompt": question["text"],
        "visual_tokens": TOKENS,
        "tokens_in": [TOKENS, *map(len, kept[:-1])],
        "tokens_out": [len(layer) for layer in kept],
        "target_tokens": 5 if pruned else None,
        "flops": 40 if pruned else 100,
        "dense_flops": 100,
        "kept": kept,
        "rasters": [RASTER],
        "encode_seconds": 0.001,
        "prefill_seconds": 0.002,
        "decode_seconds": 0.003,
        "seconds": 0.006,
    }
    if pruned:
        line["mutual_information"] = {"layer0": 0.1, "layer1": 1.5 + number}
        line["slope"] = 0.4 - 0.1 * number
        line["members"] = MEMBERS
    return line


def answer(number, text, method):
    pruned = method != "dense"
    metadata = {"method": method, "tokens": {"visual": 16, "nominal": 5.0 if pruned else 16.0, "processed": 9.0}}
    metadata["tokens"] |= {"flops": 40 if pruned else 100, "dense_flops": 100}
    if pruned:
        metadata["target_tokens"] = 5
    question = QUESTIONS[number]
    return {
        "question_id": question["question_id"],
        "prompt": question["text"],
        "text": text,
        "answer_id": "x",
        "model_id": "tiny",
        "metadata": metadata,
    }


def write_run(folder: Path, method: str, texts) -> Path:
    """Answers, traces and metadata as `--trace-kept` leaves them."""
    path = write_jsonl(folder / f"{method}.jsonl", [answer(i, text, method) for i, text in enumerate(texts)])
    traces = write_jsonl(folder / f"{method}.trace.jsonl", [trace(i, method != "dense") for i in range(len(texts))])
    data = folder / "data" / "gqa"
    arguments = {
        "question_file": str(data / "llava_gqa_testdev_balanced.jsonl"),
        "image_folder": str(data / "data/images"),
        "trace_file": str(traces),
    }
    write_json(folder / f"{method}.meta.json", {"format": 1, "options": {"method": method}, "arguments": arguments})
    return path


def write_runs(folder: Path) -> tuple[Path, Path]:
    """The two runs, with the data of GQA that they answer."""
    data = folder / "data" / "gqa"
    write_jsonl(data / "llava_gqa_testdev_balanced.jsonl", QUESTIONS)
    truth = {q["question_id"]: {"answer": text} for q, text in zip(QUESTIONS, TRUTH, strict=True)}
    write_json(data / "data" / "testdev_balanced_questions.json", truth)
    images = data / "data" / "images"
    images.mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (80, 40), color).save(images / name)
    return write_run(folder, "dense", DENSE), write_run(folder, "autoprune", PRUNED)


def data_of(path: Path):
    """What is embedded in a report."""
    page = path.read_text(encoding="utf-8")
    start = page.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    return json.loads(page[start : page.index("</script>", start)])
