"""Builders of the miniature VQAv2 and VizWiz: short answers of ten people, with a local ground truth.

The servers of the real ones keep theirs; here it lies beside the questions, in the format of the published annotations
(VQAv2: `v2_mscoco_..._annotations.json`; VizWiz: `test.json` with answers).
"""

from __future__ import annotations

import json
from functools import partial

import numpy as np

from ..world import formats
from ..world import questions as q
from .items import CROWDED, PLAIN, Build, Family, Item, distinct, dumps_lines

VQA_KINDS = {  # generator, answer type, how VQA names the kind of question: its first words
    "exists": (q.exists, "yes/no", "is there a"),
    "color": (q.color_of, "other", "what color is the"),
    "count": (q.count, "number", "how many"),
    "relation": (q.relation, "yes/no", "is the"),
    "shape": (q.shape_of, "other", "what"),
    "choose_color": (q.choose_color, "other", "is the"),
    "where": (q.where, "other", "is the"),
}

IN_CROWDS = {"digit": (q.digit_on, "other", "what"), "word": (partial(q.word_on, ocr=False), "other", "what")}
"""Kinds that VQAv2 has in crowds beside those."""


def ten_answers(answer: str, kind: str, rng: np.random.Generator) -> list[str]:
    """What ten people said: eight to ten of them the right answer, lower case."""
    answers = [answer.lower()] * 10
    wrong = {"yes/no": ("yes", "no"), "number": ("1", "2", "3"), "other": ("red", "star", "nothing")}[kind]
    for place in rng.permutation(10)[: int(rng.integers(3))]:
        answers[place] = wrong[int(rng.integers(len(wrong)))]
    return answers


def confidence(answer: str, right: str, rng: np.random.Generator) -> str:
    return "yes" if answer == right.lower() or rng.integers(2) else "maybe"


def build_vqav2(pictures: int = 40, others: int = 20, family: Family = PLAIN) -> Build:
    """Five questions per picture of test-dev; test2015 has more questions, which nobody answers (as on the server)."""
    build, dev, whole, asked_of, truth = Build(), [], [], [], []
    able = VQA_KINDS | (IN_CROWDS if family is CROWDED else {})
    kinds = list(able)
    for index in range(pictures + others):
        rng = family.stream("vqav2", index)
        scene, seen = family.draw(rng), set()
        image_id = 100 + 13 * index
        name = f"COCO_test2015_{image_id:012d}.png"
        for place in range(5):
            make, answer_type, question_type = able[kinds[(5 * index + place) % len(kinds)]]
            asked = distinct(lambda: make(scene, rng), seen)  # noqa: B023
            if asked is None:
                continue
            identity = image_id * 1000 + place
            line = {"question_id": identity, "image": name, "text": asked.text, "category": "default"}
            whole.append(line)
            if index >= pictures:
                continue
            dev.append(line)
            asked_of.append({"image_id": image_id, "question": asked.question, "question_id": identity})
            answers = ten_answers(asked.answer, answer_type, rng)
            truth.append(
                {
                    "question_type": question_type,
                    "multiple_choice_answer": asked.answer.lower(),
                    "answers": [
                        {"answer": a, "answer_confidence": confidence(a, asked.answer, rng), "answer_id": n + 1}
                        for n, a in enumerate(answers)
                    ],
                    "image_id": image_id,
                    "answer_type": answer_type,
                    "question_id": identity,
                }
            )
            build.items.append(Item("vqav2", name, line, scene, asked))
        if index < pictures:
            build.images[f"vqav2/test2015/{name}"] = scene
    about = {
        "info": {"description": "Miniature VQAv2: scenes of colored shapes", "version": "2.0"},
        "license": {"name": "Apache-2.0"},
        "data_type": "mscoco",
        "data_subtype": "test-dev2015",
    }
    build.files["vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"] = dumps_lines(dev)
    build.files["vqav2/llava_vqav2_mscoco_test2015.jsonl"] = dumps_lines(whole)
    build.files["vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json"] = json.dumps(
        {**about, "task_type": "Open-Ended", "questions": asked_of}
    )
    build.files["vqav2/v2_mscoco_test-dev2015_annotations.json"] = json.dumps({**about, "annotations": truth})
    return build


def build_vizwiz(pictures: int = 50, family: Family = PLAIN) -> Build:
    """Three questions per picture, about two fifths of them unanswerable."""
    build, lines, truth = Build(), [], []
    for index in range(pictures):
        rng = family.stream("vizwiz", index)
        scene, seen = family.draw(rng), set()
        for place in range(3):
            able = rng.random() >= 0.4
            asked = distinct(lambda: (formats.vizwiz if able else formats.unanswerable)(scene, rng), seen)  # noqa: B023
            if asked is None:
                continue
            name = f"VizWiz_test_{3 * index + place:08d}.png"
            line = {"question_id": len(lines), "image": name, "text": asked.text, "category": "default"}
            lines.append(line)
            answers = ten_answers(asked.answer, "number" if asked.category == "number" else "other", rng)
            answers = ["unsuitable" if a == "nothing" and not able else a for a in answers]
            truth.append(
                {
                    "image": name,
                    "question": asked.question,
                    "answers": [{"answer": a, "answer_confidence": confidence(a, asked.answer, rng)} for a in answers],
                    "answer_type": asked.category,
                    "answerable": int(asked.answer != "Unanswerable"),
                }
            )
            build.items.append(Item("vizwiz", name, line, scene, asked))
            build.images[f"vizwiz/test/{name}"] = scene
    build.files["vizwiz/llava_test.jsonl"] = dumps_lines(lines)
    build.files["vizwiz/test.json"] = json.dumps(truth)
    return build
