"""Senna's planning questions on nuScenes: meta actions, a speed and a path, read from six camera views.

Two readings of an answer are scored and never averaged. *Senna's* is that of its authors' script: labels are looked for
as parts of the text, and an answer that names two labels of an axis, one of them right, is right. The *strict* one
takes the first label of each axis. Beside both stands what an answer that is always the same would get: on nuScenes
most of the truth is KEEP, STRAIGHT.

Arithmetic and thresholds follow Senna's evaluation and label scripts (hustvl/Senna, cddce26).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json
from llava.eval.common.questions import Question
from llava.eval.tasks.join import join_answers, load_answers, percent, require_joined
from llava.eval.tasks.task import Answers, Column, Grader, Score, Task, Truths, covered, figure, id_of
from llava.schema import ID, Fields, ListOf, check, one_of
from llava.utils import UserError

SPEEDS = ("KEEP", "ACCELERATE", "DECELERATE", "STOP")
PATHS = ("STRAIGHT", "LEFT_TURN", "RIGHT_TURN", "LEFT_CHANGE", "RIGHT_CHANGE")
SENNA_PATHS = ("RIGHT_TURN", "LEFT_TURN", "STRAIGHT")
"""The paths that have an F1 in Senna's script; changes of lane have none."""
STEP = 0.5
"""Seconds between the points of a trajectory."""
_TRUTH = ListOf(Fields({"question_id": ID, "speed": one_of(*SPEEDS), "path": one_of(*PATHS)}), least=1)

MetaAction = tuple[str, str]


def meta_action(points: Sequence[Sequence[float]], change_degrees: float = 5.0) -> MetaAction:
    """Speed and path of a trajectory, as Senna labels its data.

    points: (x right, y forward) in metres at 0.5 ... 3.0 s. Speeds lie between the points, so that the first half
    second does not count; the path is that of the last point. change_degrees: the direction of the last point up to
    which a path that ends beside the car is a change of lane, beyond it a turn.
    """
    pairs = zip(points, points[1:], strict=False)
    speeds = [math.hypot(x1 - x0, y1 - y0) / STEP for (x0, y0), (x1, y1) in pairs]
    gain = speeds[-1] - speeds[0]
    if max(speeds) < 2:
        speed = "STOP"
    else:
        speed = "ACCELERATE" if gain >= 3 else "DECELERATE" if gain <= -3 else "KEEP"
    x, y = points[-1]
    angle = math.degrees(math.atan2(y, x)) - 90
    for sideways, turned, side in ((x, -angle, "RIGHT"), (-x, angle, "LEFT")):
        if sideways > 4 and turned >= change_degrees:
            return speed, f"{side}_TURN"
        if sideways > 4 and abs(turned) < change_degrees:
            return speed, f"{side}_CHANGE"
    return speed, "STRAIGHT"


def read_meta_action(text: str) -> MetaAction | None:
    """`SPEED, PATH` as the data have it; None if the text is something else."""
    parts = tuple(part.strip() for part in text.split(","))
    if len(parts) == 2 and parts[0] in SPEEDS and parts[1] in PATHS:
        return parts[0], parts[1]
    return None


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that stands first in a text, as a word of its own; None if there is none."""
    found = re.search(rf"(?<!\w)(?:{'|'.join(labels)})(?!\w)", text)
    return found[0] if found else None


def evaluate_senna(truth: Mapping[str, MetaAction], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both readings over the answered questions.

    truth: question id -> speed and path; answers: `question_id` and `text`. Returns `senna` and `strict`, flat figures
    in percent; `constant` and `constant_accuracy`, the commonest truth and its share; `samples` and `coverage`.
    """
    found, coverage = join_answers(truth, answers, lambda answer: str(answer["question_id"]))
    pairs = [(truth[key], text) for key, text in found.items()]
    (constant, times), *_ = Counter(actions for actions, _ in pairs).most_common(1) or [(("", ""), 0)]
    return {
        "senna": senna_figures(pairs),
        "strict": strict_figures(pairs),
        "constant": ", ".join(constant),
        "constant_accuracy": 100.0 * times / len(pairs) if pairs else 0.0,
        "samples": len(pairs),
        "coverage": coverage,
    }


def is_right(actions: MetaAction, text: str) -> bool:
    """Senna's planning accuracy of one answer: both true labels are part of it, whatever else is."""
    return actions[0] in text and actions[1] in text


def senna_figures(pairs: Sequence[tuple[MetaAction, str]]) -> dict[str, float]:
    """`accuracy`, `f1_LABEL` and `accuracy_SPEED_PATH` in percent, by the arithmetic of Senna's script."""
    figures = {"accuracy": percent(is_right(actions, text) for actions, text in pairs)}
    for axis, labels in enumerate((SPEEDS, SENNA_PATHS)):
        for label in labels:
            figures[f"f1_{label}"] = _senna_f1([(actions[axis], text) for actions, text in pairs], label)
    groups: dict[str, list[bool]] = {}
    for actions, text in pairs:
        groups.setdefault("_".join(actions), []).append(is_right(actions, text))
    return figures | {f"accuracy_{name}": percent(values) for name, values in sorted(groups.items())}


def _senna_f1(pairs: Sequence[tuple[str, str]], label: str) -> float:
    """F1 of one label in percent: named beside the true label it is a hit, even where it is not the true one itself."""
    hits = sum(label in text and true in text for true, text in pairs)
    wrong = sum(label in text and true not in text for true, text in pairs)
    missed = sum(label not in text and true == label for true, text in pairs)
    return 100.0 * 2 * hits / (2 * hits + wrong + missed) if hits else 0.0


def strict_figures(pairs: Sequence[tuple[MetaAction, str]]) -> dict[str, float]:
    """`accuracy`, and for each axis accuracy, macro-F1 and balanced accuracy (both over the labels that occur in the
    truth), in percent; read is the first label of each axis.
    """
    read = [(first_label(text, SPEEDS), first_label(text, PATHS)) for _, text in pairs]
    figures = {"accuracy": percent(said == actions for said, (actions, _) in zip(read, pairs, strict=True))}
    for axis, name in enumerate(("speed", "path")):
        rows = [(actions[axis], said[axis]) for (actions, _), said in zip(pairs, read, strict=True)]
        f1, recall = [], []
        for label in dict.fromkeys(true for true, _ in rows):
            hits = sum(true == said == label for true, said in rows)
            occurs, named = (sum(row[i] == label for row in rows) for i in (0, 1))
            f1.append(2 * hits / (occurs + named))
            recall.append(hits / occurs)
        figures[f"{name}_accuracy"] = percent(true == said for true, said in rows)
        figures[f"{name}_macro_f1"], figures[f"{name}_balanced"] = percent(f1), percent(recall)
    figures["unread"] = percent(None in said for said in read)
    return figures


def load_truth(path: str | Path) -> dict[str, MetaAction]:
    """Question id -> speed and path, from a list of `question_id`, `speed` and `path`."""
    content = check(read_json(path, "truth file"), _TRUTH, str(path))
    truth: dict[str, MetaAction] = {}
    for index, entry in enumerate(content):
        key = str(entry["question_id"])
        if key in truth:
            raise UserError(f"{path}: entry {index}: question_id {key} occurs twice")
        truth[key] = entry["speed"], entry["path"]
    return truth


def score_files(truth: str, result_file: str) -> dict[str, Any]:
    """`evaluate_senna` on files; raises `UserError` when no answer belongs to a question."""
    result = evaluate_senna(load_truth(truth), load_answers(result_file, keep_torn=True))
    require_joined(result["samples"], result_file, f"a question of {Path(truth).name}")
    return result


def print_scores(result: dict[str, Any]) -> None:
    """Senna's figures, the strict ones, and what a constant answer gets."""
    for reading, title in (("senna", "Senna's reading"), ("strict", "strict reading")):
        print(f"{title}:")
        for name, value in result[reading].items():
            print(f"  {name}: {value:.2f}%")
    print(f"always {result['constant']}: {result['constant_accuracy']:.2f}% in both")


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """Senna's figures under their names, the strict ones as `strict_...`, `constant`, `constant_accuracy`."""
    strict = {f"strict_{name}": value for name, value in result["strict"].items()}
    rest = {name: result[name] for name in ("constant", "constant_accuracy", "samples")}
    return {**result["senna"], **strict, **rest}


class Senna(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        return covered(load_truth(folder / self.truth[0]), questions, id_of, self.truth[0])

    def grader(self, data_dir: Path) -> Grader:
        """Both true labels are part of the answer."""
        truth = load_truth(self.truth_path(data_dir))

        def grade(answer: Mapping[str, Any]) -> float | None:
            actions = truth.get(str(answer["question_id"]))
            return None if actions is None else float(is_right(actions, answer["text"]))

        return grade

    def truths(self, data_dir: Path) -> Truths:
        truth = {key: " ".join(actions) for key, actions in load_truth(self.truth_path(data_dir)).items()}
        return lambda answer: truth.get(str(answer["question_id"]))

    def score(self, data_dir: Path, answers: Answers) -> Score:
        result = evaluate_senna(load_truth(self.truth_path(data_dir)), answers)
        accuracy = result["senna"]["accuracy"]
        return Score(accuracy, accuracy, result["samples"])


TASK = Senna(
    name="senna",
    title="Senna",
    folder="senna",
    question_file="llava_senna.jsonl",
    image_folder="../nuscenes",
    truth=("senna_truth.json",),
    source="Senna's planning questions through scripts/convert_senna_for_eval.py; images: nuScenes, nuscenes.org",
    metric="accuracy",
    columns=(Column("senna", "Senna", figure("accuracy")),),
)
