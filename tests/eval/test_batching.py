"""Batches: grouped by length, halved when memory runs out, and faults that cost one sample only."""

import json
import random
from dataclasses import dataclass, field

import pytest
import torch

from llava.eval.answering import batching
from llava.eval.answering.adapter import LlavaAdapter
from llava.eval.answering.answerer import Answerer, build_prompt
from llava.eval.answering.batching import Batcher, BatchSize
from llava.eval.model_vqa_loader import main
from llava.utils import UserError
from tests.eval.helpers import fails_with_one_line, read_json, read_jsonl, write_jsonl


@dataclass
class FakeSample:
    number: int
    length: int
    pixels: None = None

    @property
    def question(self):
        return self

    @property
    def input_ids(self):
        return range(self.length)

    source, id = "q.jsonl:1", 1


@dataclass
class FakeAnswer:
    question: FakeSample
    seconds: float = 1.0
    failed: str | None = None


@dataclass
class Model:
    """Answers batches of at most `memory` tokens, padding included; larger ones raise what torch raises."""

    memory: int
    seconds: dict = field(default_factory=dict)
    batches: list = field(default_factory=list)

    def answer(self, samples, run):
        size = len(samples) * max(sample.length for sample in samples)
        if size > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        self.batches.append([sample.number for sample in samples])
        return [FakeAnswer(sample, self.seconds.get(len(samples), 1.0)) for sample in samples]


def samples(count, seed=0):
    draw = random.Random(seed)
    return [FakeSample(i, draw.randint(1, 50)) for i in range(count)]


def test_batches_are_full_and_of_similar_length():
    model, asked = Model(10**9), samples(64)
    answered = list(Batcher(model, None, BatchSize(8)).answer_all(asked))
    assert sorted(a.question.number for a in answered) == list(range(64))
    assert [len(batch) for batch in model.batches] == [8] * 8
    padded = sum(len(b) * max(asked[i].length for i in b) for b in model.batches)
    in_order = sum(8 * max(s.length for s in asked[i : i + 8]) for i in range(0, 64, 8))
    real = sum(s.length for s in asked)
    assert padded - real < 0.25 * (in_order - real), "grouping saves most of the padding"


def test_batch_size_one_keeps_the_order():
    model = Model(10**9)
    list(Batcher(model, None, BatchSize(1)).answer_all(samples(20)))
    assert model.batches == [[i] for i in range(20)]


@pytest.mark.parametrize("memory", [50, 130, 400])
def test_out_of_memory_halves_and_loses_nothing(memory):
    model, asked, size = Model(memory), samples(100), BatchSize(16)
    answered = list(Batcher(model, None, size).answer_all(asked))
    assert sorted(a.question.number for a in answered) == list(range(100))
    assert size.current < 16 and max(map(len, model.batches)) * 1 <= 16
    assert sum(len(batch) for batch in model.batches) == 100


def test_sample_too_large_for_any_batch_is_reported_alone():
    model, reports = Model(40), []
    asked = samples(30)
    large = [s.number for s in asked if s.length > 40]
    assert large
    batcher = Batcher(model, None, BatchSize(4), lambda question, reason: reports.append((question.number, reason)))
    answered = list(batcher.answer_all(asked))
    assert sorted(number for number, _ in reports) == large and {r for _, r in reports} == {"out of memory even alone"}
    assert sorted([a.question.number for a in answered] + large) == list(range(30))
    with pytest.raises(UserError, match="out of memory even alone"):
        list(Batcher(model, None, BatchSize(4)).answer_all(asked))


def test_memory_of_the_failed_pass_is_free_before_the_next():
    import weakref

    alive = []

    class Activation:
        pass

    class Leaky(Model):
        def answer(self, batch, run):
            assert not any(reference() is not None for reference in alive), "the failed pass still holds its tensors"
            activation = Activation()
            alive.append(weakref.ref(activation))
            return super().answer(batch, run)

    assert len(list(Batcher(Leaky(60), None, BatchSize(8)).answer_all(samples(16)))) == 16


@pytest.mark.parametrize(
    ("seconds", "memory", "expected"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39, 16: 0.1}, 10**9, 4),  # 8 gains less than 5%
        ({n: 1 / n for n in (1, 2, 4, 8, 16, 32, 64)}, 10**9, batching.MAX_AUTO),
        ({n: 1 / n for n in (1, 2, 4, 8, 16, 32, 64)}, 8 * 50, 8),  # 16 do not fit
        ({}, 10**9, 1),
    ],
)
def test_auto_finds_a_size(seconds, memory, expected):
    model, size = Model(memory, seconds), BatchSize("auto")
    asked = [FakeSample(i, 50) for i in range(800)]
    answered = list(Batcher(model, None, size).answer_all(asked))
    assert len(answered) == 800 and size.current == expected


def test_defects_of_the_program_are_not_hidden(loaded, data):
    class Broken(Answerer):
        def generate(self, encoded, run):
            raise ValueError("a defect")

    from llava.eval.answering.batching import answer_questions
    from llava.eval.common.questions import read_questions
    from llava.pruning import get_method

    tokenizer, model, processor, _ = loaded
    with get_method("dense").from_options({}).attach(model) as run:
        answerer = Broken(LlavaAdapter(tokenizer, model, processor), data / "images")
        with pytest.raises(ValueError, match="a defect"):
            list(answer_questions(answerer, read_questions(data / "q.jsonl"), run, 3, print, print))


# --- on a model ---


def texts(path):
    return [record["text"] for record in read_jsonl(path)]


@pytest.mark.parametrize("batch_size", [2, 5, "auto"])
def test_answers_do_not_depend_on_the_batch_size(argv, data, preloaded, batch_size):
    main(argv("--max-new-tokens", 8))
    main(argv("--max-new-tokens", 8, "--batch-size", batch_size, answers="b.jsonl"))
    assert (data / "b.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()


def test_random_method_draws_the_same_in_any_batch(argv, data, preloaded):
    main(argv("--method", "random", "--trace-file", data / "t1.jsonl", "--trace-kept"))
    main(
        argv(
            *("--method", "random", "--batch-size", 3, "--trace-file", data / "t3.jsonl", "--trace-kept"),
            answers="b.jsonl",
        )
    )
    kept = [[(t["question_id"], t["kept"]) for t in read_jsonl(data / f"t{n}.jsonl")] for n in (1, 3)]
    assert kept[0] == kept[1] and len({json.dumps(k) for _, k in kept[0]}) > 3


def test_out_of_memory_in_a_run(argv, data, preloaded, monkeypatch, capsys):
    main(argv())
    sizes = []
    answer = Answerer.answer

    def limited(self, batch, run):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return answer(self, batch, run)

    monkeypatch.setattr(Answerer, "answer", limited)
    assert main(argv("--batch-size", 7, answers="b.jsonl")) == 0
    assert sizes[0] == 7 and max(sizes[1:]) <= 4
    assert (data / "b.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()
    printed = capsys.readouterr().err
    assert "batch size 1)" in printed or "batch size 2)" in printed


@pytest.fixture
def poisoned(data, loaded, monkeypatch):
    """Makes the embedding of a token that only the fourth question has NaN or infinite."""
    tokenizer, model, *_ = loaded
    records = read_jsonl(data / "q.jsonl")
    records[3]["text"] += " \u0436"
    write_jsonl(data / "q.jsonl", records)
    ids = [set(tokenizer(build_prompt(r["text"], False, "vicuna_v1")).input_ids) for r in records]
    (word,) = sorted(ids[3] - set.union(*ids[:3], *ids[4:]))[:1]
    weight = model.get_input_embeddings().weight
    before = weight.data[word].clone()

    def poison(value):
        weight.data[word] = value

    yield poison
    weight.data[word] = before


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", ["autoprune", "dense"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_cost_one_sample(
    argv, data, preloaded, poisoned, capsys, recwarn, method, value, batch_size
):
    flags = ("--method", method, "--batch-size", batch_size)
    main(argv(*flags, answers="good.jsonl"))
    poisoned(value)
    with pytest.raises(SystemExit) as exit_info:
        main(argv(*flags))
    assert exit_info.value.code == 3
    good, records = read_jsonl(data / "good.jsonl"), read_jsonl(data / "a.jsonl")
    assert [r["question_id"] for r in records] == [g["question_id"] for g in good]
    assert records[3]["text"] == "" and "not finite" in records[3]["metadata"]["failed"]
    assert [r for i, r in enumerate(records) if i != 3] == [g for i, g in enumerate(good) if i != 3]
    printed = capsys.readouterr().err
    assert "failed" in printed and "q.jsonl:4 (question img1)" in printed and "Traceback" not in printed
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)], "numpy's, on stderr"
    meta = read_json(data / "a.meta.json")
    assert meta["counts"] == {"total": 7, "answered": 6, "skipped": 0, "failed": 1} and meta["complete"]
    with pytest.raises(SystemExit) as exit_info:
        main(argv(*flags))  # the rerun has nothing to do, and says again that a sample is marked
    assert exit_info.value.code == 3 and "1 samples failed" in capsys.readouterr().err


def test_sampling_from_numbers_that_are_not_finite(argv, data, preloaded, poisoned):
    poisoned(float("nan"))
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--method", "dense", "--temperature", 1, "--batch-size", 7))
    assert exit_info.value.code == 3
    assert [i for i, r in enumerate(read_jsonl(data / "a.jsonl")) if "failed" in r["metadata"]] == [3]


def test_strict_stops_at_numbers_that_are_not_finite(argv, data, preloaded, poisoned, capsys):
    poisoned(float("nan"))
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--strict"))
    assert exit_info.value.code == 2 and len(read_jsonl(data / "a.jsonl")) == 3
    assert "q.jsonl:4 (question img1)" in capsys.readouterr().err


def test_bad_batch_size(argv, capsys):
    fails_with_one_line(main, argv("--batch-size", "many"), capsys, "--batch-size", "auto", "many")
    fails_with_one_line(main, argv("--num-workers", "-1"), capsys, "--num-workers", "-1")
    fails_with_one_line(main, argv("--max-image-pixels", "0"), capsys, "--max-image-pixels")


def test_questions_of_very_unequal_length(argv, data, preloaded):
    records = [
        {"question_id": i, "image": f"{i % 4}.png", "text": "word " * (1 + 40 * (i % 3)) + "?"} for i in range(12)
    ]
    write_jsonl(data / "q.jsonl", records)
    main(argv())
    main(argv("--batch-size", 5, answers="b.jsonl"))
    assert (data / "b.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()
