"""Everything that only a GPU can say, in one run of nine minutes: tests, times, a profile.

    bash scripts/gpu_check.sh OUT                      # on a machine with a GPU; nothing is installed
    bash scripts/gpu_check.sh --rehearse OUT           # the same paths on a CPU, with tiny sizes
    python -m benchmarks.gpu_check --take OUT/gpu_check.json     # its figures become the rows of docs/performance.md

OUT/gpu_check.json is written anew after every step, so that a run that is cut off keeps what it had. Each part has its
minutes; a step that would not fit in what is left is skipped and says so, and rounds end when the time of a step does.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import decode, first_token, prefill, profile, report
from benchmarks.candidates import Graphed, build_method
from benchmarks.environment import environment, use_fixed_allocator
from benchmarks.flags import Job, Settings
from benchmarks.geometry import Geometry, geometry
from benchmarks.published import NAME, Published
from benchmarks.saved import ENVIRONMENT, MEASURED, RESULTS, ordered, save, table
from benchmarks.whole_model import random_image_prompt, random_llava
from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, write_text_atomic
from llava.eval.common.outputs import JsonObject, OutputFolder, Text
from llava.pruning.engine.graphs import PrefillGraphs, capture_on_cuda
from llava.pruning.method import PruningMethod
from llava.schema import FLAG, Fields, ListOf
from llava.schema import check as check_shape
from llava.utils import UserError, cli_main

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {"tests": 1.5, "prefill": 6.0, "profile": 1.0}
"""Parts in their order, with the minutes that each may take."""
FILE = "gpu_check.json"
OUTPUT = OutputFolder(
    {
        FILE: JsonObject("a record of a GPU check", ("rehearsal", "steps", "results")),
        "tests.xml": Text("what pytest found", r"\s*<\?xml", streams=False),
    }
)
TINY = "tiny"
CUT_AT = {"llava-1.5-7b": 64, "llava-next-7b": 160, TINY: 16}
ROUNDS, WARMUP = 15, 3
SLOPED, SLOPE = "autoprune slope 0.25", {"k0": 0.25, "gamma": 0.0}
"""Random weights give so much mutual information that the curve is flat: hardly any layer drops anything. With this one
most of them do.
"""
SHAPES = ("llava-1.5-7b", "llava-next-7b")
_RECORD = Fields({"rehearsal": FLAG, "environment": ENVIRONMENT, "results": ListOf(Fields(MEASURED))})


class Check:
    """A run: its parts, what they found, and the file that has all of it."""

    def __init__(self, folder: Path, minutes: Mapping[str, float], rehearse: bool) -> None:
        self.folder, self.minutes, self.rehearse = folder, minutes, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.record: dict[str, Any] = {
            "rehearsal": rehearse, "minutes": dict(minutes), "environment": {}, "steps": {}, "tests": {}, "results": [],
        }  # fmt: skip
        self.began = time.monotonic()

    def write(self) -> None:
        """All that is known so far."""
        self.record["seconds"] = round(time.monotonic() - self.began, 1)
        self.record["environment"] = environment(self.device)
        write_text_atomic(self.folder / FILE, json.dumps(self.record, indent=1) + "\n")

    def begin(self, part: str) -> None:
        """Steps belong to this part from now on, and share its minutes."""
        self.part, self.until = part, time.monotonic() + 60 * self.minutes[part]
        self.record["steps"][part] = {}

    def left(self) -> float:
        """Seconds of the part."""
        return max(self.until - time.monotonic(), 0.0)

    def step(self, name: str, seconds: float, work: Callable[[float], None]) -> None:
        """Run a step, if the `seconds` that it takes at least are left; `work` gets the time to end at.

        Whatever goes wrong in it is told and does not keep the others from running.
        """
        if self.left() < seconds:
            said = f"skipped: {self.left():.0f} s are left, it takes {seconds:.0f} at least"
        else:
            began = time.monotonic()
            try:
                work(min(began + 2 * seconds, self.until))
                said = f"done in {time.monotonic() - began:.1f} s"
            except Exception as error:
                said = f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self.record["steps"][self.part][name] = said
        print(f"[gpu check] {self.part}: {name}: {said}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write()

    def add(self, tool: str, job: Job, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
        """Rows of a benchmark, as it would have saved them; further ones of the same kind join the earlier."""
        label, results = job.labelled(rows), self.record["results"]
        rows = ordered(rows, columns)
        known = next((one for one in results if (one["tool"], one["label"]) == (tool, label)), None)
        if known is None:
            results.append({"tool": tool, "label": label, "rows": rows})
        else:
            known["rows"] += rows
        print(f"\n{tool}: {label}\n{table(rows, columns)}\n", flush=True)

    def job(self, name: str) -> Job:
        """Of a geometry; a rehearsal has the tiny one instead."""
        shape = geometry(TINY if self.rehearse else name)
        return Job(self.device, self.dtype, shape, shape.visual, {})

    def args(self, rounds: int = ROUNDS) -> SimpleNamespace:
        """What the benchmarks ask of their flags."""
        if self.rehearse:
            return SimpleNamespace(rounds=1, warmup=0, new_tokens=2, top=5, trace=None)
        return SimpleNamespace(rounds=rounds, warmup=WARMUP, new_tokens=16, top=10, trace=None)


# --- the parts ----------------------------------------------------------------------------------------------------


def run_tests(check: Check) -> None:
    """The tests marked `gpu`, in a process of their own."""

    def work(until: float) -> None:
        found = check.folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short",
                   f"--junitxml={found}", "--confcutdir=tests/pruning", "tests/pruning/test_gpu.py"]  # fmt: skip
        with (check.folder / "tests.log").open("w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=check.left())
        check.record["tests"] = outcomes_of_tests(found)

    check.step("tests marked gpu", 45.0, work)


def outcomes_of_tests(path: Path) -> dict[str, str]:
    """Test -> `passed`, or `failed:` and `skipped:` with a line that says why."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        state = "passed"
        for kind in ("failure", "error", "skipped"):
            if (said := case.find(kind)) is not None:
                state = f"{'skipped' if kind == 'skipped' else 'failed'}: {(said.get('message') or '').splitlines()[0]}"
        found[case.get("name", "")] = state
    return found


def run_prefills(check: Check) -> None:
    """Prefill at two geometries and three batch sizes; decoding; time to first token of a whole model."""
    model = check.job(SHAPES[0]).decoder()  # both geometries have the same
    for batch, seconds in ((1, 15.0), (8, 20.0)):
        for name in SHAPES:
            check.step(f"prefill {name} batch {batch}", seconds, partial(_prefill, check, model, name, batch))
    for name in SHAPES:
        check.step(f"decode {name}", 10.0, partial(_decoding, check, model, name))
    for name in SHAPES:
        check.step(f"first token {name}", 12.0, partial(_first_token, check, name))
    for name in SHAPES:
        check.step(f"prefill {name} batch 16", 30.0, partial(_prefill, check, model, name, 16))


def _prefill(check: Check, model: Any, name: str, batch: int, until: float) -> None:
    job = check.job(name)
    settings = compared(check, job.shape, batch)
    peak = prefill.peak_flops(check.device, check.dtype)
    rows = prefill.measure(model, job.prompt(batch), settings, check.args(), peak, until)
    check.add("prefill", job, rows, prefill.COLUMNS)


def _decoding(check: Check, model: Any, name: str, until: float) -> None:
    job = check.job(name)
    rows = decode.measure(model, job.prompt(1), autoprune_at(job.shape), check.args(rounds=3))
    check.add("decode", job, rows, decode.COLUMNS)


def _first_token(check: Check, name: str, until: float) -> None:
    job = check.job(name)
    model = random_llava(job.shape, job.device, job.dtype, job.attention)
    prompt = random_image_prompt(job.shape, 1, job.device, job.dtype)
    rows = first_token.measure(model, prompt, autoprune_at(job.shape), check.args(rounds=7))
    check.add("first_token", job, rows, first_token.COLUMNS)


def autoprune_at(shape: Geometry) -> Settings:
    """AutoPrune at the budget of the goals."""
    budget = CUT_AT[shape.name]
    return {("autoprune", budget): build_method("autoprune", budget)}


def compared(check: Check, shape: Geometry, batch: int) -> Settings:
    """AutoPrune with and without graphs, as published (one sample only), and two peers."""
    budget = CUT_AT[shape.name]
    method, sloped = build_method("autoprune", budget), build_method("autoprune", budget, **SLOPE)
    divprune = build_method("divprune", budget)
    # FastV can keep no fewer of the tiny decoder's tokens.
    fastv = build_method("fastv", budget, **({"target_tokens": max(budget, 24)} if check.rehearse else {}))
    settings: Settings = {
        ("autoprune", budget): method,
        ("autoprune graphs", budget): graphed(method),
        (SLOPED, budget): sloped,
        (f"{SLOPED} graphs", budget): graphed(sloped),
        ("fastv", budget): fastv,
        ("divprune", budget): divprune,
        ("divprune graphs", budget): graphed(divprune),
    }
    if batch == 1:
        settings[NAME, budget] = Published(method)
    return settings


def graphed(method: PruningMethod) -> Graphed:
    """The method with graphs of its own. On a CPU nothing can be captured, and everything runs as always."""
    return Graphed(method, PrefillGraphs(capture=capture_on_cuda))


def run_profile(check: Check) -> None:
    """Where the time of one prefill goes: launches, and the host's time in which the device has nothing to do."""

    def work(until: float) -> None:
        job = check.job(SHAPES[0])
        budget = CUT_AT[job.shape.name]
        method = build_method("autoprune", budget, **SLOPE)
        found = profile.measure(job.decoder(), method, job.prompt(1), check.args(rounds=3))
        rows = [{"method": SLOPED, "budget": budget, "batch": 1, **row} for row in found]
        check.add("profile", job, rows, profile.COLUMNS)

    check.step("profile of a prefill", 20.0, work)


PARTS: dict[str, Callable[[Check], None]] = {"tests": run_tests, "prefill": run_prefills, "profile": run_profile}


# --- the command --------------------------------------------------------------------------------------------------


def minutes_of(text: str) -> dict[str, float]:
    """`prefill=4,profile=0`: other minutes for some parts; 0 leaves a part out."""
    minutes = dict(MINUTES)
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = entry.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in minutes or not equals or not 0 <= number < 1000:
            raise UserError(f"--minutes: {entry!r} is not PART=MINUTES; parts: {', '.join(minutes)}")
        minutes[name] = number
    return minutes


def take(path: Path, folder: Path) -> int:
    """Save the results of a check as the benchmarks would have, and render the report."""
    record = check_shape(read_json(path, "record of a GPU check"), _RECORD, str(path))
    if record["rehearsal"]:
        raise UserError(f"{path}: is of a rehearsal on a CPU, whose figures say nothing; run it on a GPU")
    for result in record["results"]:
        print(f"wrote {save(result['tool'], result['label'], result['rows'], record['environment'], folder)}")
    return report.main(["--results-dir", str(folder)]) if folder == RESULTS else 0


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Tests, times and profile on a GPU, in one run that keeps what it has.")
    parser.add_argument(
        "output", nargs="?", type=OUTPUT, default="gpu_check", help="folder for everything that is written"
    )
    parser.add_argument("--rehearse", action="store_true", help="the same paths on the CPU with tiny sizes")
    parser.add_argument("--minutes", default="", help=f"by part, such as prefill=4; default: {MINUTES}")
    parser.add_argument("--take", default=None, metavar="JSON", help="make the figures of a check rows of the report")
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder of --take")
    args = parser.parse_args(argv)
    if args.take is not None:
        return take(Path(args.take), Path(args.results_dir))
    use_fixed_allocator()
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --rehearse runs the same paths on a CPU")
    minutes = minutes_of(args.minutes)
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    check = Check(folder, minutes, args.rehearse)
    check.write()
    for name, run in PARTS.items():
        if minutes[name]:
            check.begin(name)
            run(check)
    check.write()
    failed = [f"{part}: {step}: {said}" for part, steps in check.record["steps"].items()
              for step, said in steps.items() if said.startswith("failed")]  # fmt: skip
    failed += [f"{name}: {said}" for name, said in check.record["tests"].items() if said.startswith("failed")]
    print("\n".join(["", *failed, f"wrote {folder / FILE} in {check.record['seconds']:.0f} s"]))
    return 1 if failed else 0


if __name__ == "__main__":
    main()
