"""Merging the answer files of parts of one run into one file, in question order."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.answering.metadata import identity, meta_path, read_metadata
from llava.eval.answering.records import key_hash, match, question_hashes
from llava.eval.answering.sums import FAILED, TOKENS, TokenTotals, first_difference, run_options
from llava.eval.common.jsonio import iter_jsonl, require_file, require_keys, write_json, write_lines_atomic
from llava.eval.common.questions import Question
from llava.schema import ANYTHING, NUMBER, TEXT, Fields, MapOf, check
from llava.utils import UserError

# What a run's metadata hold as soon as they are written, and merging needs.
_MERGEABLE = Fields(
    {
        **dict.fromkeys(("model", "device", "finished"), ANYTHING),
        **dict.fromkeys(("counts", "timing", "arguments", "question_file"), MapOf(ANYTHING)),
        "seconds": NUMBER,
        "started": TEXT,
    }
)


@dataclass
class Part:
    """One answer file: its metadata (None for files of older versions), and where each line lies."""

    path: Path
    meta: dict[str, Any] | None
    hashes: array = field(default_factory=lambda: array("Q"))
    starts: array = field(default_factory=lambda: array("Q"))
    totals: TokenTotals = field(default_factory=TokenTotals)
    failed: int = 0
    options: dict[str, Any] | None = None

    def line(self, number: int) -> bytes:
        """Line `number` (from 0) as bytes, line break included."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            return file.readline()


def read_part(path: str | Path, unfinished: bool = False) -> Part:
    """Reads and checks one answer file. unfinished: a torn last line is left out instead of refused.

    Raises:
        UserError: missing, malformed, torn, or answers of several runs in it.
    """
    path = require_file(path, "part")
    part = Part(path, read_metadata(path))
    if part.meta is not None:
        check(part.meta, _MERGEABLE, str(meta_path(path)))
        part.options = {"model_id": part.meta["model"], **part.meta["options"]}
    position = number = 0
    starts = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                if unfinished:
                    break
                raise UserError(f"{path}:{number}: the last line is torn; run this part again to finish it")
            starts.append(position)
            position += len(raw)
    for number, record in iter_jsonl(path, "part", limit_bytes=position):
        where = f"{path}:{number}"
        require_keys(record, ("question_id", "prompt", "text", "model_id", "metadata"), where)
        if not isinstance(record["metadata"], dict):
            raise UserError(f"{where}: metadata must be an object")
        options = {"model_id": record["model_id"], **run_options(record["metadata"])}
        if part.options is None:
            part.options = options
        _refuse(where, first_difference(part.options, options))
        part.hashes.append(key_hash(record["question_id"], record["prompt"]))
        part.starts.append(starts[number - 1])
        part.totals.add(record["metadata"].get(TOKENS), where)
        part.failed += FAILED in record["metadata"]
    return part


def _refuse(where: str, difference: str | None) -> None:
    if difference is not None:
        raise UserError(f"{where}: answers of another run than before ({difference}); parts must be of one run")


def check_same_run(parts: Sequence[Part], unfinished: bool = False) -> None:
    """Raises `UserError` if the parts are not of one run or, unless `unfinished`, one of them is not finished."""
    known = [part for part in parts if part.options is not None]
    for part in known[1:]:
        _refuse(str(part.path), first_difference(known[0].options or {}, part.options or {}))
    described = [(part, part.meta) for part in parts if part.meta is not None]
    for part, own in described:
        if not own.get("complete") and not unfinished:
            raise UserError(f"{part.path} is not finished ({meta_path(part.path)}): run this part again")
        pair = [identity(meta) for meta in (described[0][1], own)]
        if None in (pair[0]["dtype"], pair[1]["dtype"]):  # a part without questions loads no model
            pair = [{**values, "dtype": None} for values in pair]
        _refuse(str(part.path), first_difference(*pair))
        # A limit decides which questions there are.
        limits = [(meta.get("arguments") or {}).get("limit") for meta in (described[0][1], own)]
        if limits[0] != limits[1]:
            _refuse(str(part.path), f"limit {limits[0]}, now {limits[1]}")


def choose_lines(
    questions: Sequence[Question], parts: Sequence[Part], allow_missing: bool, keep_others: bool = False
) -> tuple[list[tuple[int, int]], int]:
    """For each answered question, in order, (part, line); and how many questions have no answer.

    keep_others: answers to no question stand behind the others instead of being refused.

    Raises:
        UserError: an answer belongs to no question, two answers contradict each other, or questions have no answer
            although their parts did not skip as many.
    """
    keys = question_hashes(questions)
    import numpy as np  # here: a package in front of llava's would be looked for among the files of this folder

    owner = np.concatenate([np.full(len(part.hashes), i) for i, part in enumerate(parts)])
    line = np.concatenate([np.arange(len(part.hashes)) for part in parts])
    found = array("Q", (value for part in parts for value in part.hashes))
    places = match(keys, found)
    surplus = np.flatnonzero(places < 0)
    first = {found[i]: i for i in reversed(range(len(found)))} if len(surplus) else {}
    asked = set(keys) if len(surplus) else set()

    def record(i: int) -> dict[str, Any]:
        return json.loads(parts[owner[i]].line(int(line[i])))

    others: list[int] = []
    for i in map(int, surplus):
        if keep_others and found[i] in asked:
            continue  # doubles of an earlier accident
        answer = record(i)
        where = f"{parts[owner[i]].path}: question {answer['question_id']!r}"
        if found[i] not in asked:
            if keep_others:
                others.append(i)
                continue
            raise UserError(f"{where} is not in the question file")
        if record(first[found[i]])["text"] != answer["text"]:
            raise UserError(f"{where} is answered twice, and differently")
    chosen = np.full(len(questions), -1, dtype=np.int64)
    chosen[places[places >= 0]] = np.flatnonzero(places >= 0)
    missing = np.flatnonzero(chosen < 0)
    skipped = sum(part.meta["counts"]["skipped"] for part in parts if part.meta is not None)
    if len(missing) > skipped and not allow_missing:
        question = questions[int(missing[0])]
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no answer in the parts (first: {question.source}); "
            "give all parts, or --allow-missing"
        )
    return [(int(owner[i]), int(line[i])) for i in [*chosen[chosen >= 0], *others]], len(missing)


def merged_metadata(
    parts: Sequence[Part], questions: Sequence[Question], answered: int, missing: int
) -> dict[str, Any] | None:
    """The metadata of the whole run; None if no part has any."""
    metas = [part.meta for part in parts if part.meta is not None]
    if not metas:
        return None
    totals, failed = TokenTotals(), 0
    for part in parts:
        totals.merge(part.totals)
        failed += part.failed
    timed = sum(meta["timing"]["samples"] for meta in metas)
    prefill = sum(meta["timing"]["prefill_seconds"] for meta in metas)
    first = metas[0]
    loaded = next((meta for meta in metas if meta.get("device")), first)  # a part without questions loads no model
    return {
        **{name: value for name, value in first.items() if name not in ("plan", "parts")},
        **{name: loaded.get(name) for name in ("versions", "device", "dtype", "mm_patch_merge_type")},
        "arguments": dict(first["arguments"]),
        "question_file": {**first["question_file"], "questions": len(questions)},
        "counts": {
            "total": len(questions),
            "answered": answered - failed,
            "skipped": missing,
            "failed": failed,
        },
        # Parts run side by side: the longest decides. Their sum is what the devices were busy for.
        "seconds": max(meta["seconds"] for meta in metas),
        "device_seconds": round(sum(meta["seconds"] for meta in metas), 3),
        "tokens": totals.means(),
        "flops_ratio": totals.flops_ratio(),
        "prefill_ms": round(1000 * prefill / timed, 3) if timed else None,
        "timing": {"samples": timed, "prefill_seconds": round(prefill, 6)},
        "started": min(meta["started"] for meta in metas),
        "finished": max(meta["finished"] or "" for meta in metas) or None,
        "complete": True,
        "parts": [_describe(part) for part in parts],
    }


def _describe(part: Part) -> Mapping[str, Any]:
    if part.meta is None:
        return {"path": str(part.path), "answers": len(part.hashes)}
    kept = ("counts", "seconds", "device", "started", "finished")
    return {"path": str(part.path), **{name: part.meta[name] for name in kept}}


def merge(
    answers_file: str | Path,
    questions: Sequence[Question],
    parts: Sequence[Part],
    allow_missing: bool = False,
    keep_others: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes the merged file and its metadata; returns how many questions are answered and missing.

    arguments: flags that the whole has otherwise than its parts, for the metadata.
    """
    chosen, missing = choose_lines(questions, parts, allow_missing, keep_others)

    def lines() -> Iterator[bytes]:
        files = [open(part.path, "rb") for part in parts]  # noqa: SIM115 - closed below
        try:
            for part, line in chosen:
                files[part].seek(parts[part].starts[line])
                yield files[part].readline()
        finally:
            for file in files:
                file.close()

    write_lines_atomic(answers_file, lines())
    meta = merged_metadata(parts, questions, len(questions) - missing, missing)
    if meta is not None:
        meta["arguments"] |= {"answers_file": str(answers_file), **(arguments or {})}
        write_json(meta_path(answers_file), meta)
    return {"answered": len(questions) - missing, "missing": missing}
