"""Every reader of the evaluation with small intact files: scorers, converters, metadata, reports, question files."""

import json
import runpy
from pathlib import Path

from llava.eval import (
    check_data,
    compare_report,
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_mmvet,
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    eval_vqa,
    merge_answers,
    summarize_gpt_review,
    table,
    trace_summary,
)
from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.metadata import RunMetadata, read_metadata
from llava.eval.answering.parallel import crop_counter
from llava.eval.common.questions import read_questions
from llava.eval.reports.results import align, collect, costs
from llava.eval.reports.settings import make_settings, read_variants
from llava.eval.tasks.mmbench_data import write_workbook
from llava.eval.tasks.mmbench_rows import read_rows
from llava.eval.tasks.registry import get_task
from llava.eval.tasks.science_conversations import read_conversations
from tests.eval.helpers import ROOT, answer, write_json, write_jsonl
from tests.eval.small_data import write_all
from tests.fuzzing import Target

TSV = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\tsplit\n" + "".join(
    f'{index}\t"Which\none?"\tnan\tcat\tdog\t\t\t{letter}\tanimals\tAAAA\tall\tdev\n'
    for index, letter in ((0, "A"), (1, "B"), (1_000_000, "B"), (1_000_001, "A"))
)
PROBLEM = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "image": "i.png", "subject": "nature"}
ANNOTATED = {"question_id": 1, "answer_type": "other", "answers": [{"answer": "a red dog", "answer_id": 1}] * 10}
TOKENS = {"visual": 16, "nominal": 4.0, "processed": 6.5, "flops": 500, "dense_flops": 900, "selection_flops": 3,
          "kv_bytes": 4096, "prefill_ms": 1.5, "peak_bytes": None}  # fmt: skip
OPTIONS = {"method": "autoprune", "target_tokens": 4, "temperature": 0.0}
RUN = [
    {**answer(i, "dog", "Which?"), "answer_id": "x", "model_id": "m", "metadata": {**OPTIONS, "tokens": TOKENS}}
    for i in range(4)
]
META = {
    "format": 1, "model": "m", "checkpoint": {"path": "c", "base": None, "fingerprint": "ab"}, "method": "autoprune",
    "options": OPTIONS, "arguments": {"limit": None, "answers_file": "a.jsonl"}, "versions": {"torch": "2"},
    "device": "cpu", "dtype": "float32", "mm_patch_merge_type": "flat", "git_revision": None,
    "question_file": {"path": "q.jsonl", "sha256": None, "questions": 4}, "started": "2026-01-01T00:00:00Z",
    "finished": "2026-01-01T00:01:00Z", "complete": True, "seconds": 3.5, "tokens": {"visual": 16.0, "nominal": 4.0},
    "counts": {"total": 4, "answered": 4, "skipped": 0, "failed": 0}, "flops_ratio": 0.5, "prefill_ms": 1.5,
    "timing": {"samples": 4, "prefill_seconds": 0.006},
}  # fmt: skip
ESTIMATE = {"value": 50.0, "low": 25.0, "high": 75.0}
COMPARED = {
    "run": {"model": "m", "budget": "nominal", "level": 95.0, "resamples": 100, "seed": 0, "batch_size": 8,
            "device": "cpu", "threads": 2, "dtype": "float32", "torch": "2", "transformers": "5"},
    "benchmarks": [{"name": "POPE", "answered": 4, "available": 9, "graded": True}],
    "rows": [
        {"label": label, "variant": label.split()[0], "group": "", "budget": budget, "method": "m", "options": {},
         "accuracy": {"POPE": ESTIMATE}, "mean_accuracy": ESTIMATE, "retained": ESTIMATE, "agreement": ESTIMATE,
         "tokens_visual": 16.0, "tokens_nominal": 4.0, "tokens_processed": 5.0, "flops_ratio": 0.5,
         "selection_ratio": 0.1, "kv_bytes": 4096.0, "kv_ratio": 0.5, "prefill_ms": 1.0, "peak_bytes": 2**20}
        for label, budget in (("dense", None), ("autoprune 4", 4), ("fastv 4", 4))
    ],
}  # fmt: skip
CREDITS = "benchmark,question_id,dense,autoprune 4,fastv 4\n" + "".join(
    f"POPE,{i},{100 * (i % 2)},{100 * (i % 2)},{100 * (i < 2)}\n" for i in range(4)
)
DEMO = {
    "run": {"model": "m", "visual_tokens": 16.0, "batch_size": 8, "device": "cpu", "threads": 2, "dtype": "float32",
            "torch": "2", "transformers": "5"},
    "benchmarks": [{"name": "POPE", "metric": "F1", "samples": 4, "available": 9}],
    "rows": [{"label": "dense", "scores": {"POPE": {"score": 50.0}}, "mean_accuracy": 50.0, "retained": 100.0,
              "tokens_nominal": 16.0, "tokens_processed": 16.0, "flops_ratio": 1.0, "prefill_ratio": 1.0,
              "prefill_ms": 2.0}],
}  # fmt: skip
TRACE = {"question_id": 1, "prompt": "?", "visual_tokens": 4, "tokens_out": [3, 2], "flops": 5, "dense_flops": 9,
         "mutual_information": {"layer0": 0.1, "layer1": 0.2}, "slope": 0.3, "prefill_seconds": 0.1,
         "decode_seconds": 0.2, "mean_nominal": 3.0, "mean_processed": 3.5}  # fmt: skip
FILES = {
    "answers.jsonl": [
        answer(i, text, "Which?\n<image>")
        for i, text in enumerate(("A", "B. dog", "The answer is C.", "None of them, isn't it?"))
    ] + [{**answer(1_000_000, "B"), "round_id": 1, "options": ["dog", "cat"], "option_char": ["B", "A"]}],
    "questions.jsonl": [{"question_id": i, "image": f"{i}.png", "text": "Which?"} for i in range(4)],
    "problems.json": {str(i): PROBLEM for i in range(4)},
    "pid_splits.json": {"test": ["0", "1", "2"]},
    "rows.tsv": TSV,
    "mm-vet.json": {f"v1_{i}": {"question": "?", "answer": "a", "capability": ["rec", "ocr"]} for i in range(4)},
    "grades.json": {f"v1_{i}": {"score": [0.5, 1.0], "content": ["0.5", "1"]} for i in range(4)},
    "plain_grades.json": {f"v1_{i}": 0.25 for i in range(4)},
    "vqa.json": {"annotations": [{**ANNOTATED, "question_id": i} for i in range(4)]},
    "vizwiz.json": [{**ANNOTATED, "image": f"{i}.png"} for i in range(4)],
    "upload.json": [{"question_id": i, "answer": "dog"} for i in range(4)],
    "questions.json": {
        str(i): {"question": "Which?", "answer": "dog", "isBalanced": True, "types": {"structural": "query"}}
        for i in range(4)
    },
    "predictions.json": [{"questionId": str(i), "prediction": "dog"} for i in range(4)],
    "SEED-Bench.json": {
        "question_type": {"Scene": 1, "Action": 2},
        "questions": [
            {"question_id": i, "question_type_id": 1 + i % 2, "answer": "A", "data_type": "image"} for i in range(4)
        ],
    },
    "reviews.jsonl": [{"question_id": i, "category": "llava_bench_conv", "tuple": [8, 7.5]} for i in range(4)],
    "part.jsonl": RUN,
    "part.meta.json": META,
    "trace.jsonl": [TRACE] * 5,
    "compare.json": COMPARED,
    "compare.credits.csv": CREDITS,
    "demo.json": DEMO,
    "document.md": "# Results\n<!-- demo table: begin -->\nold\n<!-- demo table: end -->\n",
    "variants.json": [{"label": "a", "method": "autoprune", "options": {"gamma": 0.1, "x0": 3.5}, "group": "g"},
                      {"label": "b", "method": "fastv", "options": {"layer": 1}}],
    "variants.yaml": "- label: a\n  method: autoprune\n  options: {gamma: 0.1, positions: original}\n"
                     "- {label: b, method: fastv}\n",
    "config.json": {"image_grid_pinpoints": [[336, 672], [672, 336]], "image_aspect_ratio": "anyres",
                    "anyres_resolution_rule": "fill"},
    "conversations.json": [
        {"id": str(i), "image": f"{i}.png", "conversations": [{"from": "human", "value": "Which?\n<image>"}]}
        for i in range(4)
    ],
}  # fmt: skip


def write_small(folder: Path, name: str) -> Path:
    """One of the intact files."""
    content = FILES[name]
    if isinstance(content, str):
        (folder / name).write_text(content, encoding="utf-8", newline="")
    elif name.endswith(".jsonl"):
        write_jsonl(folder / name, content)
    else:
        write_json(folder / name, content)
    return folder / name


def tool(name: str, main, flags: str, more: str = "", weight: float = 1.0) -> Target:
    """A command line; `@` stands before files that are read, `>` before what is written; more: read, but not named."""

    def build(folder):
        names = [flag[1:] for flag in flags.split() if flag[0] == "@"] + more.split()
        for read in names:
            write_small(folder, read)
        call = main
        if isinstance(main, str):
            call = runpy.run_path(str(ROOT / "scripts" / f"convert_{main}.py"))["main"]
        argv = [flag.lstrip("@").replace(">", "out/") for flag in flags.split()]
        return names, lambda: call(argv)

    return Target(name, build, weight)


def function(name: str, files: str, call, weight: float = 1.0) -> Target:
    """A function that reads some of the small files."""

    def build(folder):
        for read in files.split():
            write_small(folder, read)
        return files.split(), lambda: call(folder)

    return Target(name, build, weight)


def benchmark(name: str, folder_name: str, main, flags: str, files: str) -> Target:
    """A scorer on the benchmark's folder in upstream's layout; answers are made of its questions."""

    def build(folder):
        write_all(folder)
        entry = get_task(name)
        questions = entry.read_questions(folder / folder_name / entry.question_file)
        write_jsonl(folder / folder_name / "answers.jsonl", [answer(q.id, "Yes", q.text) for q in questions])
        argv = [flag.replace("@", f"{folder / folder_name}/") for flag in flags.split()]
        return [f"{folder_name}/{file}" for file in files.split()], lambda: main(argv)

    return Target(name, build)


def _read_all(path: Path) -> None:
    questions = read_questions(path)
    assert [questions[i] for i in range(len(questions))] == list(questions)


def _continue(folder: Path) -> None:
    meta = RunMetadata("part.jsonl", {key: value for key, value in META.items() if key != "format"})
    meta.continue_from(read_metadata("part.jsonl"))
    meta.set_model("cpu", "float32", "flat")
    answers = AnswerFile("part.jsonl", "m", OPTIONS)
    try:
        meta.path = Path("out/part.meta.json")
        meta.save({"total": 4, "answered": 4, "skipped": 0, "failed": 0}, answers.totals, 1.0, 1, 0.1, finished=True)
    finally:
        answers.close()


def _compared(folder: Path) -> None:
    questions = read_questions("questions.jsonl")
    align(Path("part.jsonl"), questions)
    for records in collect("x", questions, [Path("part.jsonl")]).records:
        costs(records)


def _finished_runs(folder: Path):
    write_all(folder)
    answers = folder / "gqa/answers/llava_gqa_testdev_balanced/tiny/autoprune/n_4"
    write_jsonl(answers / "merge.jsonl", [{**record, "question_id": f"20{i}"} for i, record in enumerate(RUN[:3])])
    write_json(answers / "merge.meta.json", {**META, "counts": {**META["counts"], "total": 3, "answered": 3}})
    write_json(answers / "merge.json", {"accuracy": 50.0, "samples": 3})
    write_json(answers / "merge.server.json", {"accuracy": 51.0})
    names = [f"{answers.relative_to(folder)}/{name}" for name in ("merge.jsonl", "merge.meta.json", "merge.json")]
    names += [f"{answers.relative_to(folder)}/merge.server.json", "gqa/llava_gqa_testdev_balanced.jsonl"]
    argv = "--checkpoint tiny --benchmarks gqa --csv out/t.csv --json out/t.json --data-dir".split()
    return names, lambda: table.main([*argv, str(folder)])


def _checked_data(folder: Path):
    write_all(folder)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".tsv")]
    names += [str(path.relative_to(folder)) for path in folder.rglob("*.txt")]
    return sorted(names), lambda: check_data.main(["all", "--data-dir", str(folder)])


def _workbook(folder: Path):
    write_small(folder, "rows.tsv")
    rows = [[0, "Which?", "cat", "dog", "A"], [1, "Which?", "cat", "dog", "B."], [1_000_000, "Which?", "dog", "cat", 3]]
    write_workbook(folder / "upload.xlsx", ["index", "question", "A", "B", "prediction"], rows)
    argv = ["--annotation-file", "rows.tsv", "--result-file", "upload.xlsx", "--json", "out/j"]
    return ["upload.xlsx"], lambda: eval_mmbench.main(argv)


TARGETS = [
    tool("ScienceQA", eval_science_qa.main,
         "--base-dir . --result-file @answers.jsonl --output-file >o --output-result >r --json >j",
         "problems.json pid_splits.json"),
    tool("MMBench", eval_mmbench.main, "--annotation-file @rows.tsv --result-file @answers.jsonl --json >j"),
    Target("workbook", _workbook),
    tool("MM-Vet", eval_mmvet.main, "--annotation-file @mm-vet.json --result-file @grades.json --json >j"),
    tool("MM-Vet, plain grades", eval_mmvet.main, "--annotation-file @mm-vet.json --result-file @plain_grades.json"),
    tool("VQAv2", eval_vqa.main, "--annotation-file @vqa.json --result-file @answers.jsonl --json >j"),
    tool("VizWiz", eval_vqa.main,
         "--annotation-file @vizwiz.json --question-file @questions.jsonl --result-file @answers.jsonl"),
    tool("VQAv2, upload", eval_vqa.main, "--annotation-file @vqa.json --result-file @upload.json"),
    tool("GQA, predictions", eval_gqa.main,
         "--annotation-file @questions.json --result-file @predictions.json --json >j"),
    benchmark("gqa", "gqa", eval_gqa.main,
              "--annotation-file @data/testdev_balanced_questions.json --result-file @answers.jsonl --json out/j",
              "data/testdev_balanced_questions.json answers.jsonl"),
    benchmark("pope", "pope", eval_pope.main,
              "--annotation-dir @coco --question-file @llava_pope_test.jsonl --result-file @answers.jsonl --json out/j",
              "coco/coco_pope_random.json llava_pope_test.jsonl answers.jsonl"),
    benchmark("textvqa", "textvqa", eval_textvqa.main,
              "--annotation-file @TextVQA_0.5.1_val.json --result-file @answers.jsonl --json out/j",
              "TextVQA_0.5.1_val.json answers.jsonl"),
    benchmark("mme", "MME", eval_mme.main,
              "--annotation-dir @MME_Benchmark_release_version --question-file @llava_mme.jsonl "
              "--result-file @answers.jsonl --tool-dir out/tool --json out/j",
              "MME_Benchmark_release_version/color/1.txt llava_mme.jsonl answers.jsonl"),
    tool("reviews", summarize_gpt_review.main, "--files @reviews.jsonl --json >j"),
    tool("convert GQA", "gqa_for_eval", "--src @answers.jsonl --dst >u"),
    tool("convert MM-Vet", "mmvet_for_eval", "--src @answers.jsonl --dst >u"),
    tool("convert VizWiz", "vizwiz_for_submission",
         "--annotation-file @questions.jsonl --result-file @answers.jsonl --result-upload-file >u"),
    tool("convert VQAv2", "vqav2_for_submission",
         "--question-file @questions.jsonl --result-file @answers.jsonl --result-upload-file >u"),
    tool("convert SEED", "seed_for_submission",
         "--annotation-file @SEED-Bench.json --result-file @answers.jsonl --result-upload-file >u --json >j"),
    tool("convert MMBench", "mmbench_for_submission",
         "--annotation-file @rows.tsv --result-dir . --upload-dir >u --experiment answers", "answers.jsonl", 0.5),
    tool("convert ScienceQA", "sqa_to_llava", "--base-dir . --prompt-format QCM-LEPA", "problems.json pid_splits.json"),
    function("questions", "questions.jsonl", lambda folder: _read_all(folder / "questions.jsonl")),
    function("conversations", "conversations.json", lambda folder: read_conversations("conversations.json", True)),
    function("MMBench rows", "rows.tsv", lambda folder: read_rows("rows.tsv", all_rounds=True)),
    tool("merge", merge_answers.main,
         "--answers-file >m.jsonl --question-file @questions.jsonl @part.jsonl", "part.meta.json"),
    function("metadata", "part.meta.json part.jsonl", _continue),
    function("compared answers", "part.jsonl questions.jsonl", _compared),
    tool("traces", trace_summary.main, "@trace.jsonl --json >j"),
    tool("comparison", compare_report.main, "@compare.json --matrix"),
    tool("differences", compare_report.main, "@compare.json --versus dense", "compare.credits.csv"),
    tool("demo table", table.main, "@demo.json --insert @document.md"),
    Target("finished runs", _finished_runs),
    Target("data check", _checked_data),
    function("tiles", "config.json", lambda folder: crop_counter(folder)((100, 50))),
    function("variants", "variants.json", lambda folder: make_settings(read_variants("variants.json"), [4])),
    function("variants, YAML", "variants.yaml", lambda folder: make_settings(read_variants("variants.yaml"), [4])),
]  # fmt: skip
assert len({target.name for target in TARGETS}) == len(TARGETS)
json.dumps(FILES)
