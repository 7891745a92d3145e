"""One question, and a chat, with folders of other families: answers are those of the model and its processor used
directly on the whole conversation. Comparisons of methods take such folders too.
"""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch
from PIL import Image

from llava.eval import compare, demo
from llava.eval.answering.family import load_processor
from llava.eval.answering.family_chat import message_parts
from llava.eval.model_vqa_loader import main as loader
from llava.eval.run_llava import eval_model
from llava.eval.run_llava import main as run_llava
from llava.pruning import AutoPrune, Dense, get_method
from llava.serve.cli import main as chat
from llava.utils import UserError
from tests.eval.helpers import fails_with_one_line, read_json
from tests.families.models import FAMILIES
from tests.families.processors import picture
from tests.families.test_eval import QUESTIONS, directly, folder  # noqa: F401 - a fixture


def flags(place, *more):
    general = ("--model-path", place, "--device", "cpu", "--max-new-tokens", 6, "--temperature", 0, *more)
    return [str(flag) for flag in general]


def turns(name, place, method, texts, images):
    """Answers and traces of a conversation whose first question shows `images`; every turn is a prompt of its own."""
    model, made, messages, answers, traces = FAMILIES[name].model(), load_processor(str(place)), [], [], []
    for text in texts:
        content = [{"type": "image"}] * (0 if messages else len(images)) + [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        prompt = made.apply_chat_template(messages, add_generation_prompt=True)
        inputs = made(text=[prompt], **({"images": [images]} if images else {}), return_tensors="pt")
        with method.attach(model) as run, torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append(made.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        traces += run.traces
        if answers[-1]:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
        else:
            messages.pop()  # a turn without an answer is forgotten
    return answers, traces


def test_run_llava_answers_as_direct_use(folder, capsys):  # noqa: F811
    name, place = folder
    for budget, method in (
        (("--target-token-num", 6), AutoPrune(target_tokens=6)),
        (("--target-ratio", 0.4), AutoPrune(target_ratio=0.4)),
        (("--method", "dense"), Dense()),
    ):
        assert not run_llava(flags(place, "--image-file", place / "0.png", "--query", QUESTIONS[0], *budget))
        printed = capsys.readouterr()
        assert printed.out == directly(name, place, method)[0] + "\n"
        (_, trace) = turns(name, place, method, QUESTIONS[:1], [picture(0, 30, 40)])
        assert f"{trace[0].visual_tokens} visual tokens; kept per layer: nominal" in printed.err
    assert not run_llava(flags(place, "--query", QUESTIONS[2]))
    printed = capsys.readouterr()
    assert printed.out == directly(name, place, Dense())[2] + "\n" and "no image" in printed.err


def test_run_llava_puts_images_where_the_question_has_them(folder, capsys):  # noqa: F811
    name, place = folder
    paths = f"{place / '0.png'},{place / '1.png'}"
    answers = []
    for query in ("what is <image> and <image-placeholder> ?", "what is and ?"):
        arguments = flags(place, "--image-file", paths, "--query", query, "--method", "dense")
        assert not run_llava(arguments)
        answers.append(capsys.readouterr().out.strip())
    images = [Image.open(place / f"{number}.png").convert("RGB") for number in (0, 1)]
    assert answers[1] == turns(name, place, Dense(), ["what is and ?"], images)[0][0]
    model, made = FAMILIES[name].model(), load_processor(str(place))
    content = [{"type": "text", "text": "what is "}, {"type": "image"}, {"type": "text", "text": " and "}]
    message = {"role": "user", "content": [*content, {"type": "image"}, {"type": "text", "text": " ?"}]}
    prompt = made.apply_chat_template([message], add_generation_prompt=True)
    inputs = made(text=[prompt], images=[images], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert answers[0] == made.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("method", ["autoprune", "dense"])
def test_chat_turns_are_the_whole_conversation(folder, capsys, monkeypatch, method):  # noqa: F811
    name, place = folder
    texts = [QUESTIONS[0], QUESTIONS[1], "yes ?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*texts[:1], "<image> and <image> ?", *texts[1:]]) + "\n"))
    more = ("--image-file", place / "3.png", "--method", method, "--target-token-num", 6, "--debug")
    assert not chat(flags(place, *more))
    printed = capsys.readouterr()
    own = get_method(method)(**({"target_tokens": 6} if method != "dense" else {}))
    answers, traces = turns(name, place, own, texts, [picture(3, 57, 40)])
    told = [part.removeprefix("ASSISTANT:").strip() for part in printed.out.split("USER: ")[1:-1]]
    assert told == [answers[0], "", *answers[1:]]  # the question with a second image is refused and forgotten
    assert "2 image placeholder(s)" in printed.err
    reports = [line for line in printed.err.splitlines() if line.startswith(f"[{method}: ")]
    assert [re.search(r"nominal ([\d.]+)", line)[1] for line in reports] == [
        f"{trace.mean_tokens('nominal'):.1f}" for trace in traces
    ]
    assert printed.err.count("[prompt: ") == 3


def test_what_is_refused(folder, capsys):  # noqa: F811
    name, place = folder
    query = ("--query", "what ?")
    fails_with_one_line(run_llava, flags(place, *query, "--load-4bit"), capsys, "--load-4bit", name)
    fails_with_one_line(run_llava, flags(place, "--query", "what <image> ?"), capsys, "1 image placeholder(s)")
    fails_with_one_line(run_llava, flags(place, *query, "--model-base", place), capsys, "--model-base")
    fails_with_one_line(run_llava, flags(place, *query, "--image-file", place / "none.png"), capsys, "none.png")
    mark = {"qwen2_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}.get(name)
    if mark:
        fails_with_one_line(run_llava, flags(place, "--query", f"what {mark} ?"), capsys, mark, "<image-placeholder>")
    assert not run_llava(flags(place, *query, "--conv-mode", "vicuna_v1"))
    assert "--conv-mode vicuna_v1 is not used" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["qwen2_vl", "qwen3_vl"], indirect=True)
def test_renumbering_several_axes_is_an_option_error(folder, capsys, tmp_path):  # noqa: F811
    """However it is asked for: the method's default is not asked for."""
    _, place = folder
    general = ("--model-path", place, "--device", "cpu")
    asked = (*general, "--query", "what ?", "--image-file", place / "0.png")
    questions = ("--question-file", place / "questions.jsonl", "--image-folder", place)
    variants = tmp_path / "variants.json"
    variants.write_text(json.dumps([{"label": "x", "method": "autoprune", "options": {"positions": "compact"}}]))
    for main, flags in (
        (run_llava, (*asked, "--positions", "compact")),
        (run_llava, (*asked, "--method", "fastv", "--method-args", "positions=compact")),
        (chat, (*general, "--positions", "compact")),
        (loader, (*general, *questions, "--answers-file", tmp_path / "a.jsonl", "--positions", "compact")),
        (compare.main, (*general, *questions, "--variants", variants, "--output-dir", tmp_path / "out")),
    ):
        fails_with_one_line(main, flags, capsys, "positions=compact", "M-RoPE", "original")
    assert not run_llava([str(flag) for flag in (*asked, "--max-new-tokens", 2)])


def test_what_is_missing_has_a_default(folder, capsys):  # noqa: F811
    """LLaVA's own example calls `eval_model` with an object that has some of the flags."""
    name, place = folder
    values = {"model_path": str(place), "query": QUESTIONS[0], "image_file": str(place / "0.png"), "conv_mode": None}
    example = type("Args", (), {**values, "max_new_tokens": 6, "method": "dense", "device": "cpu"})()
    assert eval_model(example) == directly(name, place, Dense())[0]


def test_parts_of_a_message():
    assert message_parts("what ?", 2) == [{"type": "image"}] * 2 + [{"type": "text", "text": "what ?"}]
    assert message_parts("<image>\nwhat ?", 1) == [{"type": "image"}, {"type": "text", "text": "\nwhat ?"}]
    with pytest.raises(UserError, match="2 image placeholder"):
        message_parts("<image> <image-placeholder>", 1)


@pytest.mark.parametrize("folder", ["internvl", "qwen2_5_vl"], indirect=True)
def test_compare_takes_the_folder(folder, tmp_path, capsys):  # noqa: F811
    name, place = folder
    questions = ("--question-file", place / "questions.jsonl", "--image-folder", place)
    settings = ("--methods", "autoprune,fastv", "--budgets", "6,0.5", "--batch-size", 3, "--no-plot")
    general = ("--model-path", place, "--device", "cpu", "--max-new-tokens", 6, "--output-dir", tmp_path)
    assert not compare.main([str(flag) for flag in (*general, *questions, *settings, "--resamples", 100)])
    for label, method in (
        ("dense", Dense()),
        ("autoprune_6", AutoPrune(target_tokens=6)),
        ("autoprune_0.5", AutoPrune(target_ratio=0.5)),
        ("fastv_0.5", get_method("fastv")(target_ratio=0.5)),
    ):
        lines = (tmp_path / "answers" / "questions" / f"{label}.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == directly(name, place, method), label
    rows = read_json(tmp_path / "compare.json")["rows"]
    assert [row["budget"] for row in rows] == [None, 6, 0.5, 6, 0.5]
    assert "0.5 of all" in capsys.readouterr().out
    assert rows[2]["tokens_nominal"] == pytest.approx(rows[0]["tokens_visual"] / 2, abs=3)


@pytest.mark.parametrize("folder", ["llava_onevision", "qwen3_vl"], indirect=True)
def test_demo_takes_the_folder(folder, tmp_path, capsys):  # noqa: F811
    _, place = folder
    general = ("--model-path", place, "--device", "cpu", "--output-dir", tmp_path, "--limit", 2, "--quiet")
    demo.main([str(flag) for flag in (*general, "--budgets", "6,0.5")])
    rows = read_json(tmp_path / "demo.json")["rows"]
    assert [row["label"] for row in rows] == ["dense", "AutoPrune 6", "AutoPrune 0.5"]
    assert all(row["tokens_nominal"] < rows[0]["tokens_nominal"] for row in rows[1:])
    assert "| AutoPrune 0.5 |" in capsys.readouterr().out
