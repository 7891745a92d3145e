"""Questions about scenes, with their answers and the objects they ask about.

Every generator takes a scene and a random stream and returns a question, or None where the scene does not allow one.
Prompts differ only in the lines after the question (`Question.text`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .crowded import DIGITS, counts
from .scenes import COLORS, SHAPES, WORDS, Scene, full_name

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
SIDES = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        asked: indices of the objects that the answer depends on; empty when all of them matter (counts, absence).
        options: the choices of a multiple-choice question, in order.
        ocr: the words on the `Reference OCR token` line.
        category: what a benchmark groups by (the kind of negative, the relation, ...).
        names: phrases of the question that name one object each, with that object.
        lead: a line before the question; note: a line behind it.
        target: the answer in plain words where `answer` is only the letter of an option.
        instruction: the last line; None: the usual one of short or lettered answers, empty: none.
        picture: False for a question without one.
    """

    kind: str
    question: str
    answer: str
    asked: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    ocr: tuple[str, ...] | None = None
    category: str = ""
    names: tuple[tuple[str, int], ...] = ()
    lead: str = ""
    note: str = ""
    target: str = ""
    instruction: str | None = None
    picture: bool = True

    @property
    def body(self) -> str:
        """`text` without the instruction."""
        lines = [self.lead] * bool(self.lead) + [self.question] + [self.note] * bool(self.note)
        if self.ocr is not None:
            lines.append("Reference OCR token: " + ", ".join(self.ocr))
        lines += [f"{letter}. {option}" for letter, option in zip("ABCD", self.options, strict=False)]
        return "\n".join(lines)

    @property
    def text(self) -> str:
        """What the user says after the picture, as the question files of the real benchmarks say it."""
        usual = LETTER if self.options else SHORT
        instruction = usual if self.instruction is None else self.instruction
        return f"{self.body}\n{instruction}" if instruction else self.body


def pick(rng: np.random.Generator, items: list | tuple) -> object:
    """One item at random."""
    return items[int(rng.integers(len(items)))]


def article(word: str) -> str:
    """`a` or `an` before a word."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def yes_no(answer: bool) -> str:
    return "Yes" if answer else "No"


def refer(scene: Scene, index: int, rng: np.random.Generator, hide: str = "") -> str:
    """A phrase that names one object: `red star`, or `star` or `red object` where that is enough. `hide`: what it must
    not tell."""
    return pick(rng, scene.names(index, hide))


def _referable(scene: Scene, hide: str = "") -> list[int]:
    """Objects that can be named without the attribute `hide`."""
    return [i for i in range(len(scene.things)) if scene.names(i, hide)]


def _near(scene: Scene, color: int, shape: int) -> tuple[int, ...]:
    """Objects to look at before one says that there is none of this color and shape: all that have either; in a crowd
    the fewer of those that have the color and those that have the shape."""
    by_color = tuple(i for i, t in enumerate(scene.things) if t.color == color)
    by_shape = tuple(i for i, t in enumerate(scene.things) if t.shape == shape)
    if scene.crowded:
        return min(by_color, by_shape, key=len)
    return tuple(sorted({*by_color, *by_shape}))


def exists(scene: Scene, rng: np.random.Generator, category: str = "", want: bool | None = None) -> Question | None:
    """`Is there a red star in the image?` Negatives: random, popular (color or shape present) or adversarial (both)."""
    want = bool(rng.integers(2)) if want is None else want
    category = category or pick(rng, ("random", "popular", "adversarial", "adversarial"))
    if want:
        index = int(rng.integers(len(scene.things)))
        name = full_name(scene.things[index])
        text = f"Is there {article(name)} in the image?"
        alike = tuple(i for i, t in enumerate(scene.things) if full_name(t) == name)
        return Question("exists", text, "Yes", alike, category=category, names=((name, index),))
    present = {(t.color, t.shape) for t in scene.things}
    colors, shapes = {c for c, _ in present}, {s for _, s in present}
    level = {"random": (0, 1, 2), "popular": (1,), "adversarial": (2,)}[category]
    absent = [
        (c, s)
        for c in range(len(COLORS))
        for s in range(len(SHAPES))
        if (c, s) not in present and (c in colors) + (s in shapes) in level and scene.fits(_near(scene, c, s))
    ]
    if not absent:
        return None
    color, shape = pick(rng, absent)
    near = _near(scene, color, shape)
    name = f"{COLORS[color]} {SHAPES[shape]}"
    return Question("exists", f"Is there {article(name)} in the image?", "No", near, category=category)


def color_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`What color is the star?`"""
    able = _referable(scene, "color")
    if not able:
        return None
    index = pick(rng, able)
    thing = scene.things[index]
    name = scene.names(index, "color")[0]
    return Question("color", f"What color is the {name}?", COLORS[thing.color], (index,), names=((name, index),))


def shape_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`What shape is the red object?`"""
    able = _referable(scene, "shape")
    if not able:
        return None
    index = pick(rng, able)
    thing = scene.things[index]
    name = scene.names(index, "shape")[0]
    return Question("shape", f"What shape is the {name}?", SHAPES[thing.shape], (index,), names=((name, index),))


def verify_color(scene: Scene, rng: np.random.Generator, want: bool | None = None) -> Question | None:
    """`Is the star red?` Wrong colors come from the scene when they can."""
    able = _referable(scene, "color")
    if not able:
        return None
    want = bool(rng.integers(2)) if want is None else want
    index = pick(rng, able)
    thing = scene.things[index]
    others = [t.color for t in scene.things if t.color != thing.color] or [(thing.color + 1) % len(COLORS)]
    color = thing.color if want else pick(rng, others)
    name = scene.names(index, "color")[0]
    text = f"Is the {name} {COLORS[color]}?"
    return Question("verify_color", text, yes_no(want), (index,), names=((name, index),))


def verify_shape(scene: Scene, rng: np.random.Generator, want: bool | None = None) -> Question | None:
    """`Is the red object a star?`"""
    able = _referable(scene, "shape")
    if not able:
        return None
    want = bool(rng.integers(2)) if want is None else want
    index = pick(rng, able)
    thing = scene.things[index]
    others = [t.shape for t in scene.things if t.shape != thing.shape] or [(thing.shape + 1) % len(SHAPES)]
    shape = thing.shape if want else pick(rng, others)
    name = scene.names(index, "shape")[0]
    text = f"Is the {name} {article(SHAPES[shape])}?"
    return Question("verify_shape", text, yes_no(want), (index,), names=((name, index),))


def choose_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`Is the star red or blue?`"""
    able = _referable(scene, "color")
    if not able:
        return None
    index = pick(rng, able)
    thing = scene.things[index]
    others = [t.color for t in scene.things if t.color != thing.color] or [(thing.color + 1) % len(COLORS)]
    pair = [COLORS[thing.color], COLORS[pick(rng, others)]]
    if rng.integers(2):
        pair.reverse()
    name = scene.names(index, "color")[0]
    text = f"Is the {name} {pair[0]} or {pair[1]}?"
    return Question("choose_color", text, COLORS[thing.color], (index,), names=((name, index),))


def relation(scene: Scene, rng: np.random.Generator, want: bool | None = None) -> Question | None:
    """`Is the red star above the blue circle?` Only between objects in different rows (or columns)."""
    if len(scene.things) < 2:
        return None
    want = bool(rng.integers(2)) if want is None else want
    for _ in range(20):
        i, j = (int(k) for k in rng.permutation(len(scene.things))[:2])
        side = int(rng.integers(4))
        a, b = scene.things[i], scene.things[j]
        delta = (a.col - b.col, b.col - a.col, a.row - b.row, b.row - a.row)[side]
        if delta != 0 and (delta < 0) == want and scene.names(i) and scene.names(j):
            first, second = refer(scene, i, rng), refer(scene, j, rng)
            return Question(
                "relation",
                f"Is the {first} {SIDES[side]} the {second}?",
                yes_no(want),
                (i, j),
                category=SIDES[side],
                names=((first, i), (second, j)),
            )
    return None


def choose_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`Is the red star to the left or to the right of the blue circle?` (or above / below)."""
    asked = relation(scene, rng, want=True)
    if asked is None:
        return None
    (first, i), (second, j) = asked.names
    answer = asked.category.split()[-2] if "the" in asked.category else asked.category
    pair = ("to the left", "to the right of") if answer in ("left", "right") else ("above", "below")
    return Question(
        "choose_relation",
        f"Is the {first} {pair[0]} or {pair[1]} the {second}?",
        answer,
        (i, j),
        category=asked.category,
        names=((first, i), (second, j)),
    )


def where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`Is the red star on the left or on the right of the image?` (or top / bottom), never asked of the middle."""
    index = int(rng.integers(len(scene.things)))
    if not scene.names(index):
        return None
    row, col = scene.bins(scene.things[index])
    vertical = bool(rng.integers(2))
    place = row if vertical else col
    middle = scene.side - 1
    if place == middle:
        return None
    pair = ("top", "bottom") if vertical else ("left", "right")
    answer = pair[int(place > middle)]
    order = pair if rng.integers(2) else pair[::-1]
    name = refer(scene, index, rng)
    return Question(
        "where",
        f"Is the {name} on the {order[0]} or on the {order[1]} of the image?",
        answer,
        (index,),
        names=((name, index),),
    )


def count_target(scene: Scene, rng: np.random.Generator) -> tuple[str, str, list[int]]:
    """Something to count: singular, plural and the objects. In a crowd one kind of object, of one color and shape."""
    if scene.crowded:
        return _crowd_target(scene, rng)
    if rng.integers(2):
        color = int(rng.integers(len(COLORS))) if rng.random() < 0.1 else pick(rng, scene.things).color
        return (
            f"{COLORS[color]} object",
            f"{COLORS[color]} objects",
            [i for i, t in enumerate(scene.things) if t.color == color],
        )
    shape = int(rng.integers(len(SHAPES))) if rng.random() < 0.1 else pick(rng, scene.things).shape
    plural = "crosses" if SHAPES[shape] == "cross" else SHAPES[shape] + "s"
    return SHAPES[shape], plural, [i for i, t in enumerate(scene.things) if t.shape == shape]


def _crowd_target(scene: Scene, rng: np.random.Generator) -> tuple[str, str, list[int]]:
    """Up to four objects alike; now and then (one in ten) none."""
    there = counts(scene)
    while True:
        if rng.random() < 0.1:
            color, shape = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
        else:
            many = int(rng.integers(1, 5))  # every number is asked for about equally often
            color, shape = pick(rng, sorted(k for k, n in there.items() if n == many) or sorted(there))
        members = [i for i, t in enumerate(scene.things) if (t.color, t.shape) == (color, shape)]
        if scene.fits(members):
            name = f"{COLORS[color]} {SHAPES[shape]}"
            return name, name + ("es" if SHAPES[shape] == "cross" else "s"), members


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`How many red objects are there?`"""
    _, plural, members = count_target(scene, rng)
    return Question("count", f"How many {plural} are there?", str(len(members)), tuple(members))


def verify_count(
    scene: Scene, rng: np.random.Generator, want: bool | None = None, target: tuple | None = None
) -> Question | None:
    """`Are there two red objects in the image?` Wrong numbers are off by one. `target`: what `count_target` drew."""
    want = bool(rng.integers(2)) if want is None else want
    single, plural, members = target or count_target(scene, rng)
    number = len(members)
    if number == 0:
        return None
    if not want:
        number = number + 1 if number == 1 or rng.integers(2) else number - 1
    verb = f"Is there only one {single}" if number == 1 else f"Are there {NUMBERS[number]} {plural}"
    return Question("verify_count", f"{verb} in the image?", yes_no(want), tuple(members))


def word_on(scene: Scene, rng: np.random.Generator, ocr: bool | None = None) -> Question | None:
    """`What word is on the red star?`, with or without the OCR line that holds all words of the scene, shuffled."""
    able = [i for i, t in enumerate(scene.things) if t.word >= 0]
    named = [i for i in able if scene.names(i, "word")]
    if not named:
        return None
    index = pick(rng, named)
    ocr = rng.random() < 0.7 if ocr is None else ocr
    words = tuple(WORDS[scene.things[i].word] for i in rng.permutation(able)) if ocr else None
    name = refer(scene, index, rng, "word")
    return Question(
        "word",
        f"What word is on the {name}?",
        WORDS[scene.things[index].word],
        (index,),
        ocr=words,
        names=((name, index),),
    )


def verify_word(scene: Scene, rng: np.random.Generator, want: bool | None = None) -> Question | None:
    """`Is the word on the red star "CAT"?`"""
    able = [i for i, t in enumerate(scene.things) if t.word >= 0]
    named = [i for i in able if scene.names(i, "word")]
    if not named:
        return None
    want = bool(rng.integers(2)) if want is None else want
    index = pick(rng, named)
    word = scene.things[index].word
    others = [scene.things[i].word for i in able if i != index] or [(word + 1) % len(WORDS)]
    shown = word if want else pick(rng, others)
    name = refer(scene, index, rng, "word")
    holder = tuple((f'"{WORDS[shown]}', i) for i in able if scene.things[i].word == shown)
    return Question(
        "verify_word",
        f'Is the word on the {name} "{WORDS[shown]}"?',
        yes_no(want),
        (index,),
        names=((name, index), *holder),
    )


def digit_on(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`What digit is on the red star?`, in crowded scenes."""
    able = [i for i in _referable(scene, "word") if scene.things[i].label >= len(WORDS)]
    if not able:
        return None
    index = pick(rng, able)
    name = refer(scene, index, rng, "word")
    answer = DIGITS[scene.things[index].label - len(WORDS)]
    return Question("digit", f"What digit is on the {name}?", answer, (index,), names=((name, index),))


def multiple_choice(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A color, shape or word question with lettered choices."""
    kind = pick(rng, ("color", "shape", "word"))
    base = {"color": color_of, "shape": shape_of, "word": word_on}[kind](scene, rng)
    if base is None:
        return None
    pool = [x for x in {"color": COLORS, "shape": SHAPES, "word": WORDS}[kind] if x != base.answer]
    options = [pool[int(i)] for i in rng.permutation(len(pool))[:3]] + [base.answer]
    options = tuple(options[int(i)] for i in rng.permutation(4))
    return replace(base, kind="choice", answer="ABCD"[options.index(base.answer)], options=options, ocr=None)


KINDS: dict[str, tuple[Callable[..., Question | None], float]] = {
    "exists": (exists, 3.0),
    "color": (color_of, 1.0),
    "shape": (shape_of, 1.0),
    "verify_color": (verify_color, 0.8),
    "verify_shape": (verify_shape, 0.8),
    "choose_color": (choose_color, 0.5),
    "relation": (relation, 2.5),
    "choose_relation": (choose_relation, 1.2),
    "where": (where, 0.8),
    "count": (count, 1.5),
    "verify_count": (verify_count, 2.0),
    "word": (word_on, 2.2),
    "verify_word": (verify_word, 1.6),
    "choice": (multiple_choice, 0.3),
}
"""Generator and training weight of every kind; the kinds that are learned last have more weight."""


def sample_questions(
    scene: Scene, rng: np.random.Generator, count: int, kinds: tuple[str, ...] = tuple(KINDS)
) -> list[Question]:
    """`count` different questions about a scene, kinds drawn by their training weights."""
    weights = np.array([KINDS[k][1] for k in kinds])
    out: list[Question] = []
    seen: set[str] = set()
    for _ in range(20 * count):
        question = KINDS[kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]][0](scene, rng)
        if question is not None and question.question not in seen:
            seen.add(question.question)
            out.append(question)
            if len(out) == count:
                break
    return out
