"""The benchmarks as upstream lays them out: where questions, images and truth lie, and where a run leaves its files.

Knows names and paths only; the metrics are in the `eval_*` modules. The scripts in `scripts/v1_5/eval/` spell out the
same paths, as upstream's do; a test holds both together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.utils import UserError


@dataclass(frozen=True)
class Entry:
    """One benchmark. Paths are relative to `folder`, which is relative to the data folder.

    name: of the script; split, merged: where answers go (see `answers_file`); truth: files and folders that scoring
    needs; source: where the data come from, for messages; server: who grades, for messages; local: scored here, from
    the public files.
    """

    name: str
    title: str
    folder: str
    tool: str
    question_file: str
    image_folder: str | None
    truth: tuple[str, ...] = ()
    split: str = ""
    merged: bool = False
    source: str = ""
    server: str = ""
    local: bool = True

    def answers_file(self, out_dir: str | Path, run: str) -> Path:
        """Answers of a run, `CHECKPOINT/METHOD/n_TOKENS` or `CHECKPOINT/dense`."""
        folder = Path(out_dir) / self.folder / "answers" / self.split
        return folder / run / "merge.jsonl" if self.merged else folder / f"{run}.jsonl"


_EVAL_ZIP = "LLaVA's eval.zip"

ENTRIES = (
    Entry(
        "vqav2", "VQAv2", "vqav2", "model_vqa_loader",
        "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015", ("llava_vqav2_mscoco_test2015.jsonl",),
        split="llava_vqav2_mscoco_test-dev2015", merged=True,
        source=f"question files: {_EVAL_ZIP}; images: COCO test2015, visualqa.org",
        server="EvalAI (VQA challenge)", local=False,
    ),
    Entry(
        "gqa", "GQA", "gqa", "model_vqa_loader",
        "llava_gqa_testdev_balanced.jsonl", "data/images", ("data/testdev_balanced_questions.json",),
        split="llava_gqa_testdev_balanced", merged=True,
        source=f"question file: {_EVAL_ZIP}; the rest: GQA's questions and images, cs.stanford.edu/people/dorarad/gqa",
    ),
    Entry(
        "vizwiz", "VizWiz", "vizwiz", "model_vqa_loader", "llava_test.jsonl", "test",
        source=f"question file: {_EVAL_ZIP}; images: test.zip, vizwiz.org", server="EvalAI (VizWiz VQA)", local=False,
    ),
    Entry(
        "sqa", "ScienceQA", "scienceqa", "model_vqa_science",
        "llava_test_CQM-A.json", "images/test", ("problems.json", "pid_splits.json"),
        source=f"question file: {_EVAL_ZIP} (or scripts/convert_sqa_to_llava.py, CQM-A-lettered); the rest: ScienceQA",
    ),
    Entry(
        "textvqa", "TextVQA", "textvqa", "model_vqa_loader",
        "llava_textvqa_val_v051_ocr.jsonl", "train_images", ("TextVQA_0.5.1_val.json",),
        source=f"question file: {_EVAL_ZIP}; the rest: textvqa.org (annotations 0.5.1, train and val images)",
    ),
    Entry(
        "pope", "POPE", "pope", "model_vqa_loader", "llava_pope_test.jsonl", "val2014", ("coco",),
        source=f"question file: {_EVAL_ZIP}; coco/: POPE's repository, output/coco; images: COCO val2014",
    ),
    Entry(
        "mme", "MME", "MME", "model_vqa_loader",
        "llava_mme.jsonl", "MME_Benchmark_release_version", ("MME_Benchmark_release_version",),
        source=f"question file: {_EVAL_ZIP}; the rest: MME_Benchmark_release_version from MME's authors",
    ),
    Entry(
        "mmbench", "MMBench", "mmbench", "model_vqa_mmbench", "mmbench_dev_20230712.tsv", None,
        split="mmbench_dev_20230712", source="OpenMMLab's download page of MMBench",
        server="MMBench's server (dev is also scored here)",
    ),
    Entry(
        "mmbench_cn", "MMBench-CN", "mmbench_cn", "model_vqa_mmbench", "mmbench_dev_cn_20231003.tsv", None,
        split="mmbench_dev_cn_20231003", source="OpenMMLab's download page of MMBench",
        server="MMBench's server (dev is also scored here)",
    ),
    Entry(
        "mmvet", "MM-Vet", "mm-vet", "model_vqa", "llava-mm-vet.jsonl", "images",
        source=f"question file: {_EVAL_ZIP}; images and mm-vet.json: mm-vet.zip of its authors",
        server="MM-Vet's evaluator (a GPT model)", local=False,
    ),
    Entry(
        "seed", "SEED-Bench", "seed_bench", "model_vqa_loader", "llava-seed-bench.jsonl", "", ("SEED-Bench.json",),
        merged=True, source=f"question file: {_EVAL_ZIP}; the rest: SEED-Bench's authors (images, middle video frames)",
        server="SEED-Bench's leaderboard (accuracy is also computed here)",
    ),
    Entry(
        "llavabench", "LLaVA-Bench", "llava-bench-in-the-wild", "model_vqa", "questions.jsonl", "images",
        source="the data set liuhaotian/llava-bench-in-the-wild", server="a review by GPT-4", local=False,
    ),
)  # fmt: skip


def get_entry(name: str) -> Entry:
    """The benchmark of that script name, title or folder, whatever the case; `UserError` lists the known names."""
    wanted = name.lower().removesuffix(".sh")
    for entry in ENTRIES:
        if wanted in (entry.name, entry.title.lower(), entry.folder.lower()):
            return entry
    raise UserError(f"unknown benchmark {name!r}; known: {', '.join(entry.name for entry in ENTRIES)}")


def run_name(checkpoint: str, method: str, tokens: int | None = None) -> str:
    """`CHECKPOINT/METHOD/n_TOKENS`, and `CHECKPOINT/dense` without pruning."""
    return f"{checkpoint}/dense" if method == "dense" else f"{checkpoint}/{method}/n_{tokens}"
