"""Multiple-choice questions in Chinese, for the miniature MMBench-CN: fixed templates over the English questions.

The tokenizer has no Chinese tokens; it spells every character with three bytes. `MEANING` tells which English word a
Chinese one stands for, so that training can teach the spelled words (see `packing.meaning_loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from . import formats
from . import questions as q
from .questions import NUMBERS, Question, pick
from .scenes import COLORS, SHAPES, WORDS, Scene

LETTER = "请直接回答选项字母。"
COLOR = dict(zip(COLORS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "粉色", "青色"), strict=True))
SHAPE = dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "十字形", "菱形"), strict=True))
SIDE = {"left": "左边", "right": "右边", "above": "上面", "below": "下面", "top": "上方", "bottom": "下方"}
YES_NO = {"Yes": "是", "No": "否"}
NUMBER = dict(zip(NUMBERS[1:5], "1234", strict=True))
MEANING = {chinese: english for table in (COLOR, SHAPE, SIDE) for english, chinese in table.items()}
ANSWERS = {chinese: english for english, chinese in YES_NO.items()}
HINTS = ("图中有彩色的图形。", "有些物体上有单词。", "每个物体有一种颜色和一种形状。")


def name_of(phrase: str) -> str:
    """`red star`, `star`, `red object` or `object with the word CAT` in Chinese."""
    if " with the " in phrase:
        kind, label = phrase.split()[-2:]
        return f"有{'单词' if kind == 'word' else '数字'}{label}的物体"
    first, *rest = phrase.split()
    if not rest:
        return SHAPE[first]
    return COLOR[first] + (SHAPE.get(rest[0]) or "物体")


def with_options(
    base: Question, text: str, wrong: list[str], table: dict[str, str], rng: np.random.Generator
) -> Question:
    """The question in Chinese; options are drawn in English and translated by `table`."""
    names = tuple((name_of(name), index) for name, index in base.names)
    asked = formats.with_options(base, rng, wrong, "zh_" + base.kind)
    options = tuple(table.get(option, option) for option in asked.options)
    return replace(asked, question=text, options=options, names=names, instruction=LETTER)


def color(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.color_of(scene, rng)
    if base is None:
        return None
    near = [COLORS[t.color] for t in scene.things]
    wrong = formats.distractors(rng, COLORS, near, base.answer, formats.how_many(rng))
    return with_options(base, f"{name_of(base.names[0][0])}是什么颜色？", wrong, COLOR, rng)


def shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.shape_of(scene, rng)
    if base is None:
        return None
    near = [SHAPES[t.shape] for t in scene.things]
    wrong = formats.distractors(rng, SHAPES, near, base.answer, formats.how_many(rng))
    return with_options(base, f"{name_of(base.names[0][0])}是什么形状？", wrong, SHAPE, rng)


def word(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.word_on(scene, rng, ocr=False)
    if base is None:
        return None
    near = [WORDS[t.word] for t in scene.things if t.word >= 0]
    wrong = formats.distractors(rng, WORDS, near, base.answer, formats.how_many(rng))
    return with_options(base, f"{name_of(base.names[0][0])}上的单词是什么？", wrong, {}, rng)


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    single, _, members = q.count_target(scene, rng)
    if not 1 <= len(members) <= 4:
        return None
    base = Question("count", "", NUMBERS[len(members)], tuple(members))
    wrong = formats.distractors(rng, NUMBERS[1:5], [], base.answer, formats.how_many(rng))
    return with_options(base, f"图中有几个{name_of(single)}？", wrong, NUMBER, rng)


def exists(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.exists(scene, rng)
    if base is None:
        return None
    name = base.question.removesuffix(" in the image?").removeprefix("Is there ").split(" ", 1)[1]
    return with_options(base, f"图中有{name_of(name)}吗？", ["No" if base.answer == "Yes" else "Yes"], YES_NO, rng)


def relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.choose_relation(scene, rng)
    if base is None:
        return None
    (first, _), (second, _) = base.names
    text = f"{name_of(first)}在{name_of(second)}的哪一边？"
    return with_options(base, text, [formats.OPPOSITES[base.answer]], SIDE, rng)


def where(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.where(scene, rng)
    if base is None:
        return None
    text = f"{name_of(base.names[0][0])}在图的哪一边？"
    return with_options(base, text, [formats.OPPOSITES[base.answer]], SIDE, rng)


CHOICES: dict[str, Callable[..., Question | None]] = {
    "color": color,
    "shape": shape,
    "word": word,
    "count": count,
    "relation": relation,
    "where": where,
    "exists": exists,
}


def hinted(question: Question | None, rng: np.random.Generator) -> Question | None:
    """With a hint on a line before the question."""
    return question and replace(question, lead=pick(rng, HINTS))
