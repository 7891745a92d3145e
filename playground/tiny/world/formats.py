"""Questions in the prompt formats of ScienceQA, MMBench, SEED-Bench, VizWiz, MM-Vet and LLaVA-Bench.

They ask about the scenes of `scenes.py` like `questions.py` does, but want a letter, a sentence, or `Unanswerable`.
The Chinese forms are in `chinese.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from . import questions as q
from .questions import NUMBERS, Question, pick
from .scenes import COLORS, SHAPES, WORDS, Scene

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
ANIMALS = ("CAT", "DOG", "FOX")
HINTS = (
    "The image shows colored shapes.",
    "Some of the objects have a word on them.",
    "Each object has one color and one shape.",
)
"""Lines before a question (MMBench's hint, ScienceQA's context). They say nothing about the answer."""
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above", "top": "bottom", "bottom": "top"}


def plural(shape: int) -> str:
    return "crosses" if SHAPES[shape] == "cross" else SHAPES[shape] + "s"


def distractors(rng: np.random.Generator, pool: tuple[str, ...], near: list[str], answer: str, count: int) -> list[str]:
    """Wrong options: up to all but one from `near` (what the scene shows), the others from the pool."""
    near = [x for x in dict.fromkeys(near) if x != answer]
    far = [x for x in pool if x != answer and x not in near]
    wanted = min(len(near), int(rng.integers(count + 1)))
    chosen = [near[int(i)] for i in rng.permutation(len(near))[:wanted]]
    rest = far + [x for x in near if x not in chosen]
    return chosen + [rest[int(i)] for i in rng.permutation(len(rest))[: count - wanted]]


def with_options(base: Question, rng: np.random.Generator, wrong: list[str], kind: str) -> Question:
    """The question with lettered options in random order, `base.answer` among them."""
    options = [*wrong, base.answer]
    options = tuple(options[int(i)] for i in rng.permutation(len(options)))
    letter = "ABCD"[options.index(base.answer)]
    return replace(base, kind=kind, answer=letter, target=base.answer, options=options, ocr=None)


def how_many(rng: np.random.Generator) -> int:
    """Number of wrong options: three, now and then two or one."""
    return int(pick(rng, (3, 3, 3, 2, 2, 1)))


def choice_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.color_of(scene, rng)
    near = [COLORS[t.color] for t in scene.things]
    return base and with_options(base, rng, distractors(rng, COLORS, near, base.answer, how_many(rng)), "choice_color")


def choice_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.shape_of(scene, rng)
    near = [SHAPES[t.shape] for t in scene.things]
    return base and with_options(base, rng, distractors(rng, SHAPES, near, base.answer, how_many(rng)), "choice_shape")


def choice_word(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.word_on(scene, rng, ocr=False)
    near = [WORDS[t.word] for t in scene.things if t.word >= 0]
    return base and with_options(base, rng, distractors(rng, WORDS, near, base.answer, how_many(rng)), "choice_word")


def choice_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Options are number words, one to four."""
    base = q.count(scene, rng)
    if not 1 <= len(base.asked) <= 4:
        return None
    base = replace(base, answer=NUMBERS[len(base.asked)])
    return with_options(base, rng, distractors(rng, NUMBERS[1:5], [], base.answer, how_many(rng)), "choice_count")


def choice_relation(scene: Scene, rng: np.random.Generator, limit: int = 3) -> Question | None:
    """`Where is the red star compared to the blue circle?` All four sides are options only where one of them holds."""
    base = q.choose_relation(scene, rng)
    if base is None:
        return None
    (first, i), (second, j) = base.names
    straight = scene.things[i].row == scene.things[j].row or scene.things[i].col == scene.things[j].col
    wrong = [OPPOSITES[base.answer]]
    if straight:
        others = [side for side in ("left", "right", "above", "below") if side not in (base.answer, wrong[0])]
        wrong += [others[int(k)] for k in rng.permutation(2)[: int(rng.integers(min(limit, 3)))]]
    base = replace(base, question=f"Where is the {first} compared to the {second}?")
    return with_options(base, rng, wrong, "choice_relation")


def choice_where(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.where(scene, rng)
    if base is None:
        return None
    ((name, _),) = base.names
    base = replace(base, question=f"On which side of the image is the {name}?")
    return with_options(base, rng, [OPPOSITES[base.answer]], "choice_where")


def choice_exists(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.exists(scene, rng)
    return base and with_options(base, rng, ["No" if base.answer == "Yes" else "Yes"], "choice_exists")


CHOICES: dict[str, Callable[..., Question | None]] = {
    "color": choice_color,
    "shape": choice_shape,
    "word": choice_word,
    "count": choice_count,
    "relation": choice_relation,
    "where": choice_where,
    "exists": choice_exists,
}


def hinted(question: Question | None, rng: np.random.Generator, label: str = "") -> Question | None:
    """With a hint before the question, after `label`."""
    return question and replace(question, lead=label + pick(rng, HINTS))


def held_out_text(question: Question) -> bool:
    """The split of questions without a picture: True belongs to evaluation."""
    return zlib.crc32(question.body.encode()) % 16 == 0


def text_only(rng: np.random.Generator, held_out: bool = False) -> Question:
    """A lettered question that needs no picture, from the wanted half of the split."""
    while True:
        topic = int(rng.integers(6))
        if topic < 3:
            pools = [COLORS, SHAPES, WORDS]
            name = ("color", "shape", "word in capital letters")[topic]
            answer = pick(rng, pools[topic])
            others = [x for k, pool in enumerate(pools) if k != topic for x in pool]
            base = Question("text", f"Which of these is {q.article(name)}?", answer, category="vocabulary")
        elif topic == 3:
            answer = pick(rng, ANIMALS)
            others = [w for w in WORDS if w not in ANIMALS]
            base = Question("text", "Which of these is an animal?", answer, category="animals")
        elif topic == 4:
            answer = pick(rng, tuple(OPPOSITES))
            others = [x for x in OPPOSITES if x not in (answer, OPPOSITES[answer])]
            base = Question("text", f"What is the opposite of {OPPOSITES[answer]}?", answer, category="opposites")
        else:
            number = int(rng.integers(1, 4))
            answer = NUMBERS[number + 1]
            others = [NUMBERS[n] for n in range(1, 5) if n not in (number, number + 1)]
            base = Question("text", f"Which number comes after {NUMBERS[number]}?", answer, category="numbers")
        wrong = [others[int(i)] for i in rng.permutation(len(others))[: min(how_many(rng), len(others))]]
        question = replace(with_options(base, rng, wrong, "text"), picture=False)
        if held_out_text(question) == held_out:
            return question


def unanswerable(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asks about an object that is not there, or for a word on an object without one."""
    topic = pick(rng, ("color", "shape", "word", "word"))
    present = {t.shape for t in scene.things} if topic == "color" else {t.color for t in scene.things}
    if topic == "color":
        absent = [s for i, s in enumerate(SHAPES) if i not in present]
        text = f"What color is the {pick(rng, absent)}?" if absent else ""
    elif topic == "shape":
        absent = [c for i, c in enumerate(COLORS) if i not in present]
        text = f"What shape is the {pick(rng, absent)} object?" if absent else ""
    else:
        bare = [i for i, t in enumerate(scene.things) if t.label < 0 and scene.names(i, "word")]
        if not bare:
            return None
        index = pick(rng, bare)
        name = q.refer(scene, index, rng, "word")
        return Question(
            "vizwiz_no",
            f"What word is on the {name}?",
            "Unanswerable",
            (index,),
            names=((name, index),),
            note=UNANSWERABLE,
            category="unanswerable",
        )
    return Question("vizwiz_no", text, "Unanswerable", note=UNANSWERABLE, category="unanswerable") if text else None


def vizwiz(scene: Scene, rng: np.random.Generator) -> Question | None:
    """An answerable question under the prompt that also allows `Unanswerable`."""
    make = pick(rng, (q.color_of, q.shape_of, q.count, q.word_on, q.word_on))
    base = make(scene, rng, ocr=False) if make is q.word_on else make(scene, rng)
    category = "number" if make is q.count else "other"
    kind = "vizwiz_count" if make is q.count else "vizwiz"
    return base and replace(base, kind=kind, note=UNANSWERABLE, category=category)


def _open(base: Question | None, answer: str, **changes: object) -> Question | None:
    return base and replace(base, kind="open_" + base.kind, answer=answer, instruction="", **changes)


def open_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.color_of(scene, rng)
    return base and _open(base, f"The {base.names[0][0]} is {base.answer}.", target=base.answer)


def open_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.shape_of(scene, rng)
    return base and _open(base, f"The {base.names[0][0]} is {q.article(base.answer)}.", target=base.answer)


def open_word(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.word_on(scene, rng, ocr=False)
    return base and _open(base, f"The word on the {base.names[0][0]} is {base.answer}.", target=base.answer)


def word_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`What color is the object with the word CAT?`: reading and recognizing."""
    able = [i for i, t in enumerate(scene.things) if t.word >= 0]
    if not able:
        return None
    index = pick(rng, able)
    color, name = COLORS[scene.things[index].color], f"object with the word {WORDS[scene.things[index].word]}"
    return Question(
        "open_word_color",
        f"What color is the {name}?",
        f"The {name} is {color}.",
        (index,),
        names=((name, index),),
        target=color,
        instruction="",
    )


def open_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    base = q.choose_relation(scene, rng)
    if base is None:
        return None
    (first, _), (second, _) = base.names
    return _open(base, f"The {first} is {base.category} the {second}.", target=base.answer)


def open_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    single, many, members = q.count_target(scene, rng)
    number = len(members)
    if not 1 <= number <= 4:
        return None
    answer = f"There is one {single}." if number == 1 else f"There are {NUMBERS[number]} {many}."
    return Question(
        "open_count", f"How many {many} are there?", answer, tuple(members), target=NUMBERS[number], instruction=""
    )


def open_sum(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`How many red objects and blue objects are there altogether?`: counting and adding."""
    colors = sorted({t.color for t in scene.things})
    if len(colors) < 2:
        return None
    a, b = (colors[int(i)] for i in rng.permutation(len(colors))[:2])
    members = tuple(i for i, t in enumerate(scene.things) if t.color in (a, b))
    if len(members) > 4 or not scene.fits(members):
        return None
    return Question(
        "open_sum_count",
        f"How many {COLORS[a]} objects and {COLORS[b]} objects are there altogether?",
        f"There are {NUMBERS[len(members)]}.",
        members,
        target=NUMBERS[len(members)],
        instruction="",
    )


def open_animal(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`Which animal is written in the image?`, where exactly one is."""
    able = [i for i, t in enumerate(scene.things) if t.word >= 0 and WORDS[t.word] in ANIMALS]
    if len(able) != 1:
        return None
    word = WORDS[scene.things[able[0]].word]
    return Question(
        "open_animal",
        "Which animal is written in the image?",
        f"It is the {word}.",
        (able[0],),
        target=word,
        instruction="",
    )


def describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`Describe the image.`: all objects in reading order; not asked about a crowd."""
    if scene.crowded:
        return None
    order = sorted(range(len(scene.things)), key=lambda i: (scene.things[i].row, scene.things[i].col))
    names = [q.article(q.full_name(scene.things[i])) for i in order]
    return Question(
        "describe",
        "Describe the image.",
        "There is " + ", ".join(names[:-1]) + f" and {names[-1]}.",
        tuple(order),
        instruction="",
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """What a reader of answers is told about the picture: all objects, of a crowd their number."""
    described = describe(scene, rng)
    if described is not None:
        return described.answer
    words = sum(thing.word >= 0 for thing in scene.things)
    return f"There are {len(scene.things)} objects, {words} of them with a word."


OPEN: dict[str, tuple[Callable[..., Question | None], tuple[str, ...]]] = {  # generator, MM-Vet's capabilities
    "color": (open_color, ("rec",)),
    "word": (open_word, ("ocr",)),
    "relation": (open_relation, ("rec", "spat")),
    "word_color": (word_color, ("rec", "ocr")),
    "count": (open_count, ("rec",)),
    "shape": (open_shape, ("rec",)),
    "sum": (open_sum, ("rec", "math")),
    "animal": (open_animal, ("ocr", "know")),
    "describe": (describe, ("rec", "gen")),
}
