"""The evaluator of TextVQA under the names that LLaVA's own package has for it (`llava.eval.m4c_evaluator`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.tasks.vqa_text import normalize_answer, soft_accuracy


class EvalAIAnswerProcessor:
    """Called with an answer, gives the normal form in which answers are compared."""

    def __call__(self, item: str) -> str:
        return normalize_answer(item)


class TextVQAAccuracyEvaluator:
    """Soft accuracy over a list of answers."""

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """The mean, 0 to 1. pred_list: entries with `pred_answer` and the human `gt_answers`."""
        return statistics.fmean(soft_accuracy(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list)
