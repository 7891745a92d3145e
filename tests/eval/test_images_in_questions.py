"""Where the images of a question belong, several of them, and questions that cannot be asked."""

import json

import pytest
from PIL import Image

from llava.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science
from llava.eval.answering.adapter import LlavaAdapter
from llava.eval.answering.answerer import Answerer, SampleError, question_problem
from llava.eval.answering.batching import answer_questions
from llava.eval.common.questions import Question, read_questions
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import get_method
from llava.utils import UserError
from tests.eval.helpers import SHARED, fails_with_one_line, read_jsonl, write_json, write_jsonl
from tests.eval.processes import needs_fork
from tests.eval.test_model_vqa_tools import ROWS, flags, write_tsv
from tests.eval.test_run_llava import anyres_checkpoint  # noqa: F401 - a fixture
from tests.eval.test_sharding import ends, start

INPUTS = SHARED.parents[3] / "inputs" / "questions"
PLAIN = [
    {"question_id": 1, "image": "0.png", "text": "Is there a blue square?"},
    {"question_id": 2, "image": "1.png", "text": "Is there a pink square?"},
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def by_hand(loaded, data, message, names, method=None):
    """The answer to a message with placeholders, from `generate` itself."""
    tokenizer, model, processor, _ = loaded
    ids = tokenizer_image_token(f"{SYSTEM} USER: {message} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    images = [Image.open(data / "images" / name).convert("RGB") for name in names]
    with (method or get_method("autoprune")(target_tokens=4)).attach(model) as run:
        output = model.generate(
            ids,
            images=process_images(images, processor, model.config),
            image_sizes=[image.size for image in images],
            do_sample=False,
            max_new_tokens=4,
        )
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip(), run.traces[-1]


def texts(path):
    return [record["text"] for record in read_jsonl(path)]


def exits(main, argv):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    return exit_info.value.code


@pytest.fixture
def watched(loaded, monkeypatch, capsys):
    """What was printed before the model was loaded; `seen` stays empty if it never was."""
    seen = []

    def load_model(args):
        seen.append(capsys.readouterr().err)
        return loaded

    monkeypatch.setattr("llava.eval.answering.loading.load_model", load_model)
    return seen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<image>\nIs there a blue square?", "<image>\nIs there a blue square?"),
        ("In this <image> is there a blue square?", "In this <image> is there a blue square?"),
        ("What is it?\n<image>", "What is it?\n<image>"),
        ("In <image-placeholder>: what is it?", "In <image>: what is it?"),
    ],
)
def test_a_placeholder_in_the_text_is_the_place_of_the_image(argv, data, loaded, preloaded, text, message):
    write_jsonl(data / "q.jsonl", PLAIN)
    assert model_vqa_loader.main(argv()) == 0
    write_jsonl(data / "q.jsonl", [*PLAIN, {"question_id": 3, "image": "2.png", "text": text}])
    assert model_vqa_loader.main(argv(answers="b.jsonl")) == 0
    assert texts(data / "b.jsonl")[:2] == texts(data / "a.jsonl"), "the others are answered as without it"
    assert texts(data / "b.jsonl")[2] == by_hand(loaded, data, message, ["2.png"])[0]
    assert read_jsonl(data / "b.jsonl")[2]["prompt"] == text


@pytest.mark.parametrize(
    ("fields", "text", "message"),
    [
        ({"image": ["1.png", "3.png"]}, "Which is larger?", "<image>\n<image>\nWhich is larger?"),
        ({"images": ["1.png", "3.png"]}, "In <image> and <image>?", "In <image> and <image>?"),
        ({"image": "0.png", "images": ["3.png", "3.png", "1.png"]}, "Which?", "<image>\n<image>\n<image>\nWhich?"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_questions_of_several_images(argv, data, loaded, preloaded, fields, text, message, workers):
    write_jsonl(data / "q.jsonl", [PLAIN[0], {"question_id": 2, "text": text, **fields}, PLAIN[1]])
    assert model_vqa_loader.main(argv("--batch-size", 3, "--num-workers", workers)) == 0
    record = read_jsonl(data / "a.jsonl")[1]
    names = fields.get("images") or fields["image"]
    expected, trace = by_hand(loaded, data, message, names)
    assert record["text"] == expected
    assert record["metadata"]["tokens"]["visual"] == trace.visual_tokens == 16 * len(names)
    # A budget that one image could not fill is right for several, and refused only above what all have.
    assert model_vqa_loader.main(argv("--target-token-num", 20, answers="b.jsonl")) == 0


def test_traces_and_budgets_by_image(argv, data, preloaded):
    several = {"question_id": 2, "text": "Which?", "images": ["0.png", "1.png", "2.png"]}
    write_jsonl(data / "q.jsonl", [PLAIN[0], several])
    flags = ("--method", "random", "--target-token-num", 9, "--view-budget", "equal", "--trace-file", data / "t.jsonl")
    assert model_vqa_loader.main(argv(*flags)) == 0
    one, three = read_jsonl(data / "t.jsonl")
    assert "views" not in one and three["views"] == [16, 16, 16]
    assert three["kept_per_view"] == [[3, 3, 3]] * len(three["tokens_out"])
    assert read_jsonl(data / "a.jsonl")[1]["metadata"]["view_budget"] == "equal"


def test_a_budget_above_all_images_is_refused(argv, data, preloaded, capsys):
    write_jsonl(data / "q.jsonl", [{"question_id": 2, "text": "?", "images": ["0.png", "1.png"]}])
    fails_with_one_line(model_vqa_loader.main, argv("--target-token-num", 33), capsys, "33 is more than the 32")


def test_images_that_do_not_fit_are_skipped_not_cut(argv, data, loaded, preloaded, capsys, monkeypatch):
    monkeypatch.setattr(loaded[1].config, "tokenizer_model_max_length", 100, raising=False)
    many = {"question_id": 2, "text": "Which?", "images": [f"{i % 4}.png" for i in range(6)]}
    write_jsonl(data / "q.jsonl", [PLAIN[0], many, PLAIN[1]])
    assert exits(model_vqa_loader.main, argv("--batch-size", 3)) == 3
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == [1, 2]
    printed = capsys.readouterr().err
    assert "q.jsonl:2: 6 images and the question are" in printed and "this model takes 100" in printed


def test_several_tiled_images(anyres_checkpoint, argv, data):  # noqa: F811
    for name, size in (("wide", (60, 30)), ("large", (60, 60))):
        Image.new("RGB", size, "green").save(data / "images" / f"{name}.png")
    names = ["wide.png", "large.png"]
    write_jsonl(data / "q.jsonl", [{"question_id": 1, "images": names, "text": "Which is larger?"}, PLAIN[0]])
    assert model_vqa_loader.main(argv("--model-path", anyres_checkpoint, "--batch-size", 2)) == 0
    loaded = load_pretrained_model(str(anyres_checkpoint), None, "llava", device="cpu", mm_patch_merge_type="spatial")
    expected, trace = by_hand(loaded, data, "<image>\n<image>\nWhich is larger?", names)
    record = read_jsonl(data / "a.jsonl")[0]
    assert record["text"] == expected
    assert record["metadata"]["tokens"]["visual"] == trace.visual_tokens == 8 * 16, "1 + 2 and 1 + 4 crops"


# --- what cannot be asked -----------------------------------------------------------------------------------


BAD = [
    ({"text": "<image>\nIs there a square?"}, "1 image placeholder(s)", "0 image(s)"),
    ({"image": "0.png", "text": "<image>\n<image>\nSquare?"}, "2 image placeholder(s)", "1 image(s)"),
    ({"images": ["0.png", "1.png"], "text": "<image>\nSquare?"}, "1 image placeholder(s)", "2 image(s)"),
    ({"image": "../0.png", "text": "Square?"}, "leaves the image folder", "../0.png"),
    ({"image": "nul\0.png", "text": "Square?"}, "null character", "nul"),
]


@pytest.mark.parametrize(("fields", "part", "other"), BAD)
@pytest.mark.parametrize("main", [model_vqa_loader.main, model_vqa.main])
def test_a_bad_question_is_named_before_loading_and_costs_only_itself(
    argv, data, watched, capsys, main, fields, part, other
):
    write_jsonl(data / "q.jsonl", [PLAIN[0], {"question_id": 3, **fields}, PLAIN[1]])
    assert exits(main, argv()) == 3
    capsys.readouterr()
    assert len(watched) == 1 and "q.jsonl:2: " in watched[0] and part in watched[0] and other in watched[0]
    assert len(watched[0].splitlines()) == 1
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == [1, 2]
    meta = json.loads((data / "a.meta.json").read_text())
    assert meta["counts"] == {"total": 3, "answered": 2, "skipped": 1, "failed": 0} and meta["complete"]
    # Again: the same line and status, and no model for nothing.
    capsys.readouterr()
    assert exits(main, argv()) == 3 and len(watched) == 1
    assert "q.jsonl:2: " in capsys.readouterr().err
    # Strict: nothing is answered.
    fails_with_one_line(main, argv("--strict", answers="s.jsonl"), capsys, "q.jsonl:2: ", part)
    assert len(watched) == 1 and not (data / "s.jsonl").exists()


@needs_fork
def test_processes_together_name_each_bad_question_once(argv, data, preloaded):
    bad = [{"question_id": 9, "text": "<image>?"}, {"question_id": 10, "image": "../0.png", "text": "?"}]
    several = {"question_id": 11, "images": ["2.png", "1.png"], "text": "Which?"}
    write_jsonl(data / "q.jsonl", [PLAIN[0], bad[0], PLAIN[1], several, bad[1]])
    assert exits(model_vqa_loader.main, argv(answers="alone.jsonl")) == 3
    children = start(argv(), 2, data)
    assert max(ends(children)) == 3
    assert (data / "a.jsonl").read_bytes() == (data / "alone.jsonl").read_bytes()
    printed = "".join(child.text() for child in children)
    assert printed.count("q.jsonl:2: ") == printed.count("q.jsonl:5: ") == 1
    counts = json.loads((data / "a.meta.json").read_text())["counts"]
    assert counts == {"total": 5, "answered": 3, "skipped": 2, "failed": 0}


@pytest.mark.parametrize("conv_mode", ["mistral_instruct", "llava_llama_2"])
def test_an_empty_question_in_templates_that_take_none(argv, data, watched, capsys, conv_mode):
    empty = [{"question_id": i, "text": text} for i, text in enumerate(("Is there a star?", "", "A circle?"))]
    write_jsonl(data / "q.jsonl", [*empty, {"question_id": 3, "image": "0.png", "text": ""}])
    assert exits(model_vqa_loader.main, argv("--conv-mode", conv_mode)) == 3
    assert "q.jsonl:2: the first message of this template must not be empty" in watched[0]
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == [0, 2, 3], "an image alone is a message"
    flags = ("--conv-mode", conv_mode, "--strict")
    capsys.readouterr()
    fails_with_one_line(model_vqa_loader.main, argv(*flags, answers="s.jsonl"), capsys, "q.jsonl:2", "empty")


def test_science_questions(checkpoint, data, watched, capsys):
    def entry(identity, value, **fields):
        return {"id": identity, "conversations": [{"from": "human", "value": value}], **fields}

    entries = [
        entry("1", "Which?\nA. x\nB. y\n<image>", image="0.png"),
        entry("2", "<image>\nWhich?"),
        entry("3", "<image>\n<image>\nWhich?", image="0.png"),
        entry("4", "<image>\n<image>\nWhich?", image=["0.png", "1.png"]),
        entry("5", "Which?", images=["0.png", "1.png"]),
        entry("6", "Which of <image> and <image>?", images=["0.png", "1.png"]),
    ]
    path = write_json(data / "q.json", entries)
    argv = flags(checkpoint, data, path, "--image-folder", data / "images", "--single-pred-prompt")
    assert exits(model_vqa_science.main, argv) == 3
    lines = watched[0].splitlines()
    capsys.readouterr()
    assert len(lines) == 2 and "entry 1 (id 2)" in lines[0] and "entry 2 (id 3)" in lines[1]
    records = read_jsonl(data / "a.jsonl")
    assert [r["question_id"] for r in records] == ["1", "4", "5", "6"]
    assert [r["prompt"].count("<image>") for r in records] == [1, 2, 2, 2]
    assert records[2]["prompt"].startswith("<image>\n<image>\nWhich?\n")
    assert [r["metadata"]["tokens"]["visual"] for r in records] == [16, 32, 32, 32]
    fails_with_one_line(model_vqa_science.main, [*argv, "--overwrite", "--strict"], capsys, "entry 1 (id 2)")


def test_mmbench_rows(checkpoint, data, watched):
    rows = [list(row) for row in ROWS]
    rows[0][1] = "Two <image> and <image>?"
    rows[1][1] = "None"
    path = write_tsv(data / "dev.tsv", rows)
    assert exits(model_vqa_mmbench.main, flags(checkpoint, data, path)) == 3
    assert "dev.tsv:2: the text has 2 image placeholder(s)" in watched[0]
    assert "dev.tsv:3: the cell of the question is empty" in watched[0]
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == [4]


def test_without_the_check_in_front_a_bad_question_costs_only_itself(loaded, data):
    """Other callers of the answerer (comparisons) have no list of questions in advance."""
    tokenizer, model, processor, _ = loaded
    answerer = Answerer(LlavaAdapter(tokenizer, model, processor), data / "images")
    questions = [Question(0, "q:1", 1, "<image> <image>", "0.png"), Question(1, "q:2", 2, "Fine?", "0.png")]
    with pytest.raises(SampleError, match="2 image placeholder"):
        answerer.prepare(questions[0])
    skipped = []
    with get_method("dense")().attach(model) as run:
        answers = list(answer_questions(answerer, questions, run, on_skip=lambda q, reason: skipped.append(q.id)))
    assert [a.question.id for a in answers] == [2] and skipped == [1]
    assert question_problem(questions[1], lambda question: "Fine?", "vicuna_v1", data / "images") is None


@pytest.mark.parametrize("value", [3, {"a": 1}, ["a.png", 5], ["a.png", ""], [None], True])
def test_images_that_are_no_names(tmp_path, value):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?", "image": value}])
    with pytest.raises(UserError, match="q.jsonl:1: image must"):
        read_questions(path)
    path = write_jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?", "images": "a.png"}])
    with pytest.raises(UserError, match="q.jsonl:1: images must be a list"):
        read_questions(path)


def test_one_image_in_a_list_is_one_image(tmp_path):
    records = [{"question_id": 1, "text": "?", "image": image} for image in ("a.png", ["a.png"], [], None, "")]
    found = read_questions(write_jsonl(tmp_path / "q.jsonl", records))
    assert [q.images for q in found] == [("a.png",), ("a.png",), (), (), ()]
    assert [q.image for q in found] == ["a.png", "a.png", None, None, None]


@pytest.mark.skipif(not INPUTS.is_dir(), reason="the collected question files (../shared/inputs) are not here")
@pytest.mark.parametrize(
    ("name", "status", "answered"),
    [
        ("image_tag_front", 0, [1, 2, 3]),
        ("image_tag_middle", 0, [1, 2, 3]),
        ("listimg", 0, [1, 2, 3]),
        ("image_tag_noimage", 3, [1, 2]),
        ("two_tags", 3, [1, 2]),
    ],
)
def test_collected_question_files(argv, data, preloaded, name, status, answered):
    Image.new("RGB", (40, 30), "blue").save(data / "images" / "COCO_val2014_000000945784.png")
    argv = argv("--question-file", INPUTS / f"{name}.jsonl")
    assert (exits(model_vqa_loader.main, argv) if status else model_vqa_loader.main(argv)) == status
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == answered
