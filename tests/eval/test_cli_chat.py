"""The chat in the terminal: every turn equals `generate` on the whole conversation, and every way out is clean."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from PIL import Image

from llava.eval.answering.chat import Chat
from llava.pruning import get_method
from llava.serve.cli import main
from llava.utils import UserError
from tests.eval.helpers import ROOT, TINY_MODEL
from tests.eval.test_run_llava import PICTURE, SYSTEM, by_hand, loaded  # noqa: F401 - a fixture

QUESTIONS = ["What color is it?", "Is it a star?", "How many circles are there?"]


@pytest.fixture
def argv(wordy_checkpoint, data):
    def build(*flags):
        flags = ("--model-path", wordy_checkpoint, "--max-new-tokens", 6, "--device", "cpu", *flags)
        return [str(flag) for flag in ("--conv-mode", "vicuna_v1", "--target-token-num", 4, *flags)]

    return build


@pytest.fixture
def type_in(monkeypatch):
    """What the user types; the input ends there, as with Ctrl-D."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def replies(printed):
    """The answers in what was written to stdout (stdin is no terminal: questions are not echoed)."""
    parts = printed.split("USER: ")
    assert parts[0] == "" and parts[-1] == "exit...\n"
    assert all(part.startswith("ASSISTANT: ") and part.endswith("\n") for part in parts[1:-1])
    return [part.removeprefix("ASSISTANT: ").removesuffix("\n") for part in parts[1:-1]]


def whole_conversations(loaded, images, method):  # noqa: F811
    """Answers and traces of the turns, each computed anew from a prompt that is written out here."""
    prompt = SYSTEM.format(who="user") + " "
    turns = []
    for i, question in enumerate(QUESTIONS):
        prompt += f"USER: {'' if i else '<image>' + chr(10)}{question} ASSISTANT:"
        answer, trace = by_hand(loaded, prompt, images, method)
        turns.append((answer, trace))
        prompt += f" {answer}</s>"
    return turns


@pytest.mark.parametrize("method", ["autoprune", "fastv", "visionzip", "dense"])
def test_turns_equal_generate_on_the_whole_conversation(argv, data, loaded, capsys, type_in, method):  # noqa: F811
    path = data / "images" / "2.png"
    type_in("".join(f"{question}\n" for question in QUESTIONS))
    assert main(argv("--image-file", path, "--method", method)) == 0
    printed = capsys.readouterr()
    options = {} if method == "dense" else {"target_tokens": 4}
    expected = whole_conversations(loaded, [Image.open(path)], get_method(method)(**options))
    answers = [answer for answer, _ in expected]
    assert all(answers) and len(set(answers)) > 1, "the conversation says something"
    assert [reply.strip() for reply in replies(printed.out)] == answers
    # One line per turn on what was kept, from that turn's own prefill.
    reports = [line for line in printed.err.splitlines() if line.startswith(f"[{method}: ")]
    assert len(reports) == 3
    for report, (_, trace) in zip(reports, expected, strict=True):
        assert f"nominal {trace.mean_tokens('nominal'):.1f}, processed {trace.mean_tokens('processed'):.1f}" in report
        assert f"{100 * trace.flops() / trace.dense_flops():.1f}% of dense" in report


def test_beams_and_debug(argv, data, loaded, capsys, type_in):  # noqa: F811
    path = data / "images" / "1.png"
    type_in("What color is it?\n\nnever asked\n")
    main(argv("--image-file", path, "--num-beams", 2, "--debug"))
    printed = capsys.readouterr()
    prompt = f"{SYSTEM.format(who='user')} USER: <image>\nWhat color is it? ASSISTANT:"
    answer = by_hand(loaded, prompt, [Image.open(path)], num_beams=2)[0]
    assert replies(printed.out) == [answer]
    assert repr(f"{prompt} {answer}</s>") in printed.err


def test_without_an_image(argv, capsys, type_in):
    type_in("How many?\n")
    main(argv())
    printed = capsys.readouterr()
    assert len(replies(printed.out)) == 1 and "no image, nothing pruned" in printed.err


@pytest.mark.parametrize("typed", ["", "\n", "   \n"])
def test_nothing_typed_ends_the_chat(argv, data, capsys, type_in, typed):
    type_in(typed)
    assert main(argv("--image-file", data / "images" / "0.png")) == 0
    assert capsys.readouterr().out == "USER: exit...\n"


def test_ctrl_c_ends_the_chat(argv, data, capsys, monkeypatch, type_in):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    type_in("What color is it?\n")
    with monkeypatch.context() as patch:  # while an answer is computed
        patch.setattr("llava.model.llava_llama.LlavaLlamaForCausalLM.generate", interrupted)
        assert main(argv("--image-file", data / "images" / "0.png")) == 0
    printed = capsys.readouterr()
    assert printed.out == "USER: ASSISTANT: \nexit...\n" and "Traceback" not in printed.err
    monkeypatch.setattr("builtins.input", interrupted)  # at the prompt
    assert main(argv()) == 0
    assert capsys.readouterr().out == "\nexit...\n"


def test_a_wrong_turn_is_told_and_forgotten(argv, data, loaded, capsys, type_in):  # noqa: F811
    path = data / "images" / "2.png"
    type_in("\n".join(["Compare <image> with <image>.", QUESTIONS[0], "And <image>?", "word " * 3000, QUESTIONS[1]]))
    main(argv("--image-file", path))
    printed = capsys.readouterr()
    expected = whole_conversations(loaded, [Image.open(path)], get_method("autoprune")(target_tokens=4))
    given = [reply.strip() for reply in replies(printed.out)]
    assert given == ["", expected[0][0], "", "", expected[1][0]]
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "2 image placeholder(s)" in errors[0] and "0 image(s)" in errors[1]
    assert "this model takes 512" in errors[2]


def test_a_prompt_that_only_the_image_makes_too_long_is_refused(loaded):  # noqa: F811
    # The model would cut the question away and answer what is left.
    chat = chat_about(loaded, [Image.new("RGB", (40, 30), "red")])
    ids = len(chat.tokenizer(f"{SYSTEM.format(who='user')} USER: \nWhat is it? ASSISTANT:").input_ids)
    limit, loaded[1].config.tokenizer_model_max_length = ids + 10, ids + 10
    chat._limit = limit
    try:
        with get_method("autoprune")(target_tokens=4).attach(chat.model) as run:
            with pytest.raises(UserError, match=f"this model takes {limit}"):
                chat.ask("What is it?", run)
            assert chat.conversation.messages == []
            chat._limit = loaded[1].config.tokenizer_model_max_length = ids + 18
            assert chat.ask("What is it?", run).text
    finally:
        del loaded[1].config.tokenizer_model_max_length


def test_as_a_program_on_the_trained_tiny_model():
    typed = "What color is the circle?\nWhat shape is the red object? Answer the question using a single word.\n\n"
    command = ["-m", "llava.serve.cli", "--model-path", TINY_MODEL, "--image-file", PICTURE, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], input=typed, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(replies(done.stdout)) == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("576 visual tokens; kept per layer: nominal 64.0") == 2


# --- the conversation behind it -----------------------------------------------------------------------------


class Words:
    """A streamer that keeps what it was given, call by call."""

    def __init__(self):
        self.calls, self.ended = [], False

    def put(self, value):
        self.calls.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def chat_about(loaded, images, conv_mode="vicuna_v1"):  # noqa: F811
    from llava.eval.common.arguments import GenerationOptions

    tokenizer, model, image_processor, _ = loaded
    return Chat(tokenizer, model, image_processor, images, conv_mode, GenerationOptions(max_new_tokens=6))


def test_tokens_are_streamed_one_by_one(loaded):  # noqa: F811
    chat, words = chat_about(loaded, [Image.new("RGB", (40, 30), "red")]), Words()
    with get_method("autoprune")(target_tokens=4).attach(chat.model) as run:
        reply = chat.ask("What is it?", run, words)
    prompt, *steps = words.calls
    assert prompt == [] and words.ended, "the prompt reaches the decoder as embeddings and is not shown"
    assert 1 <= len(steps) <= 6 and all(len(step) == 1 for step in steps)
    text = chat.tokenizer.decode([step[0] for step in steps], skip_special_tokens=True)
    assert reply.text and text.strip() == reply.text


@pytest.mark.parametrize(("conv_mode", "stop"), [("llava_v0", "###"), ("chatml_direct", "<|im_end|>")])
def test_turns_end_at_the_templates_separator(loaded, monkeypatch, conv_mode, stop):  # noqa: F811
    chat = chat_about(loaded, [Image.new("RGB", (40, 30), "red")], conv_mode)
    seen = {}

    def says_too_much(self, ids, stopping_criteria=None, **kwargs):
        seen["criteria"] = stopping_criteria
        run.traces.append(trace)
        return torch.tensor([chat.tokenizer(f"a star{stop}and more").input_ids])

    trace = by_hand(loaded, "<image>Hi", chat.images)[1]
    with get_method("autoprune")(target_tokens=4).attach(chat.model) as run:
        monkeypatch.setattr(type(chat.model), "generate", says_too_much)
        assert chat.ask("What is it?", run).text == "a star"
    assert len(seen["criteria"]) == 1 and seen["criteria"][0].keywords == [stop]
    assert chat.prompt().endswith(f"a star{stop}") and "and more" not in chat.prompt()


def test_a_turn_without_answer_or_with_a_failure_leaves_no_trace(loaded, monkeypatch):  # noqa: F811
    chat = chat_about(loaded, [Image.new("RGB", (40, 30), "red")])
    untouched = chat.prompt()
    with get_method("autoprune")(target_tokens=4).attach(chat.model) as run:
        with pytest.raises(UserError):
            chat.ask("<image> <image>", run)
        assert chat.prompt() == untouched
        chat.generation = type(chat.generation)(max_new_tokens=1)
        with monkeypatch.context() as patch:
            patch.setattr(chat.tokenizer, "batch_decode", lambda *args, **kwargs: [""], raising=False)
            assert chat.ask("Hi", run).text == ""
        assert chat.prompt() == untouched
        chat.ask("What is it?", run)
    assert chat.prompt().count("<image>") == 1, "the image comes with the first question that was answered"


def test_a_placeholder_in_an_answer_is_no_place_for_an_image(loaded, monkeypatch):  # noqa: F811
    chat = chat_about(loaded, [Image.new("RGB", (40, 30), "red")])
    with get_method("autoprune")(target_tokens=4).attach(chat.model) as run:
        with monkeypatch.context() as patch:
            patch.setattr(chat.tokenizer, "batch_decode", lambda *args, **kwargs: ["an <image>"], raising=False)
            assert chat.ask("Hi", run).text == "an <image>"
        assert chat.ask("What is it?", run).trace.visual_tokens == 16


def test_no_memory_for_a_turn_is_told_in_words_and_leaves_no_trace(loaded, monkeypatch):  # noqa: F811
    chat = chat_about(loaded, [Image.new("RGB", (40, 30), "red")])
    untouched = chat.prompt()

    def generate(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with get_method("autoprune")(target_tokens=4).attach(chat.model) as run:
        with monkeypatch.context() as patch:
            patch.setattr(type(chat.model), "generate", generate)
            with pytest.raises(UserError, match="out of memory: ask something shorter"):
                chat.ask("What is it?", run)
        assert chat.prompt() == untouched and chat.ask("Hi", run).trace.visual_tokens == 16
