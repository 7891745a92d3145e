"""One question on the command line: the answer is that of `generate` called by hand, bad input costs one line."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading

import pytest
import torch
from PIL import Image

from llava.eval.answering.chat import choose_conv_mode, load_image, with_image_tokens
from llava.eval.run_llava import eval_model, main
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import get_method
from llava.utils import UserError
from tests.eval.helpers import TINY_DATA, TINY_MODEL, fails_with_one_line

SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {who}'s questions."
)
PICTURE = TINY_DATA / "MME" / "MME_Benchmark_release_version" / "existence" / "0001.png"


@pytest.fixture(scope="module")
def loaded(wordy_checkpoint):
    return load_pretrained_model(str(wordy_checkpoint), None, "llava", device="cpu")


def by_hand(loaded, prompt, images, method=None, **options):
    """The answer to a whole prompt, with the method attached for this one call."""
    tokenizer, model, image_processor, _ = loaded
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images(images, image_processor, model.config) if images else None
    options = {"do_sample": False, "max_new_tokens": 6, **options}
    with (method or get_method("autoprune")(target_tokens=4)).attach(model) as run:
        output = model.generate(ids, images=pixels, image_sizes=[i.size for i in images] or None, **options)
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip(), run.traces[-1]


@pytest.fixture
def argv(wordy_checkpoint, data):
    def build(*flags, query="What color is it?"):
        flags = ("--model-path", wordy_checkpoint, "--query", query, "--max-new-tokens", 6, "--device", "cpu", *flags)
        return [str(flag) for flag in ("--target-token-num", 4, *flags)]

    return build


def vicuna(question):
    return f"{SYSTEM.format(who='user')} USER: {question} ASSISTANT:"


def test_the_answer_is_that_of_generate(argv, data, loaded, capsys):
    image = Image.open(data / "images" / "2.png")
    assert main(argv("--image-file", data / "images" / "2.png", "--conv-mode", "vicuna_v1")) == 0
    printed = capsys.readouterr()
    answer, trace = by_hand(loaded, vicuna("<image>\nWhat color is it?"), [image])
    assert answer and printed.out == answer + "\n", "stdout is the answer and nothing else"
    assert f"16 visual tokens; kept per layer: nominal {trace.mean_tokens('nominal'):.1f}" in printed.err
    assert f"FLOPs {100 * trace.flops() / trace.dense_flops():.1f}% of dense" in printed.err
    # Without pruning the same question has another answer: the flags reached the model.
    main(argv("--image-file", data / "images" / "2.png", "--conv-mode", "vicuna_v1", "--method", "dense"))
    dense = by_hand(loaded, vicuna("<image>\nWhat color is it?"), [image], get_method("dense")())[0]
    assert capsys.readouterr().out == dense + "\n" and dense != answer


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("Which is larger?", "<image>\n<image>\nWhich is larger?"),
        ("In <image-placeholder> and in <image-placeholder>?", "In <image> and in <image>?"),
        ("<image> or <image-placeholder>?", "<image> or <image>?"),
    ],
)
def test_several_images(argv, data, loaded, capsys, query, message):
    paths = [data / "images" / "1.png", data / "images" / "3.png"]
    expected = by_hand(loaded, vicuna(message), [Image.open(path) for path in paths])[0]
    main(argv("--image-file", ",".join(map(str, paths)), "--conv-mode", "vicuna_v1", query=query))
    assert capsys.readouterr().out == expected + "\n"
    main(argv("--image-file", "; ".join(map(str, paths)), "--sep", ";", "--conv-mode", "v1", query=query))
    assert capsys.readouterr().out == expected + "\n"


@pytest.fixture(scope="module")
def anyres_checkpoint(wordy_checkpoint, tmp_path_factory):
    """The same weights with pictures cut into tiles, as LLaVA-1.6 has them."""
    folder = tmp_path_factory.mktemp("anyres") / "llava-v1.6-wordy"
    shutil.copytree(wordy_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints, "mm_patch_merge_type": "spatial"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["autoprune", "dense"])
def test_tiled_images_of_different_shapes(anyres_checkpoint, argv, data, capsys, method):
    for name, size in (("wide", (60, 30)), ("large", (60, 60))):
        Image.new("RGB", size, "green").save(data / f"{name}.png")
    paths = [data / "wide.png", data / "large.png"]
    flags = ("--image-file", ",".join(map(str, paths)), "--method", method)
    main([*argv(*flags), "--model-path", str(anyres_checkpoint)])
    printed = capsys.readouterr()
    # A name with v1: LLaVA's template for it, without a warning. 1 + 2 and 1 + 4 crops of 16 patches.
    prompt = f"{SYSTEM.format(who='human')} USER: <image>\n<image>\nWhat color is it? ASSISTANT:"
    options = {} if method == "dense" else {"target_tokens": 4}
    merge_type = None if method == "dense" else "spatial"
    loaded = load_pretrained_model(str(anyres_checkpoint), None, "llava", device="cpu", mm_patch_merge_type=merge_type)
    images = [Image.open(path).convert("RGB") for path in paths]
    answer, trace = by_hand(loaded, prompt, images, get_method(method)(**options))
    assert trace.visual_tokens == 8 * 16
    assert printed.out == answer + "\n" and "WARNING" not in printed.err and "128 visual tokens" in printed.err


def test_without_image(argv, loaded, capsys):
    main(argv("--conv-mode", "vicuna_v1"))
    printed = capsys.readouterr()
    assert printed.out == by_hand(loaded, vicuna("What color is it?"), [])[0] + "\n"
    assert "no image, nothing pruned" in printed.err


@pytest.mark.parametrize("flags", [["--num_beams", 3], ["--temperature", 5, "--top_p", 0.99, "--seed", 3]])
def test_generation_flags(argv, data, loaded, capsys, flags):
    flags = ["--image-file", data / "images" / "0.png", "--conv-mode", "vicuna_v1", *flags]
    main(argv(*flags))
    answer = capsys.readouterr().out
    main(argv(*flags))
    assert capsys.readouterr().out == answer, "the same seed, the same answer"
    torch.manual_seed(3)
    options = {"num_beams": 3} if "--num_beams" in flags else {"do_sample": True, "temperature": 5.0, "top_p": 0.99}
    image = Image.open(data / "images" / "0.png")
    greedy = by_hand(loaded, vicuna("<image>\nWhat color is it?"), [image])[0]
    torch.manual_seed(3)
    assert answer == by_hand(loaded, vicuna("<image>\nWhat color is it?"), [image], **options)[0] + "\n"
    assert "--num_beams" in flags or answer != greedy + "\n"


def test_llavas_own_example_object(wordy_checkpoint, data, loaded, capsys):
    # The quick start of LLaVA: a class with attributes instead of parsed flags, none of them about pruning.
    args = type(
        "Args",
        (),
        {
            "model_path": str(wordy_checkpoint),
            "model_base": None,
            "model_name": "llava",
            "query": "What color is it?",
            "conv_mode": None,
            "image_file": str(data / "images" / "1.png"),
            "sep": ",",
            "temperature": 0,
            "top_p": None,
            "num_beams": 1,
            "max_new_tokens": 6,
            "device": "cpu",
            "target_token_num": 4,
        },
    )()
    answer = eval_model(args)
    # "wordy llava" tells no version: the oldest template, and a warning.
    prompt = f"{SYSTEM.format(who='human')}###Human: <image>\nWhat color is it?###Assistant:"
    assert answer == by_hand(loaded, prompt, [Image.open(data / "images" / "1.png")])[0]
    printed = capsys.readouterr()
    assert printed.out == answer + "\n" and "using the oldest conversation mode, llava_v0" in printed.err


def test_the_trained_tiny_model_sees_the_picture(capsys):
    flags = ["--model-path", TINY_MODEL, "--image-file", PICTURE, "--device", "cpu", "--max-new-tokens", 8]
    question = "What color is the circle?\nAnswer the question using a single word or phrase."
    main([str(flag) for flag in [*flags, "--query", question, "--target-token-num", 64]])
    printed = capsys.readouterr()
    assert printed.out == "red\n"
    assert "576 visual tokens; kept per layer: nominal 64.0" in printed.err and "WARNING" not in printed.err


# --- templates ----------------------------------------------------------------------------------------------


def test_conversation_mode_is_inferred_and_warned_about(capsys):
    assert choose_conv_mode(None, "llava-v1.5-7b") == "llava_v1"
    assert choose_conv_mode("llava_v1", "llava-v1.5-7b") == "llava_v1"
    assert capsys.readouterr().err == ""
    assert choose_conv_mode("vicuna_v1", "llava-v1.6-mistral-7b") == "vicuna_v1"
    warning = capsys.readouterr().err
    assert "mistral_instruct" in warning and "using vicuna_v1" in warning
    with pytest.raises(UserError, match="unknown template 'v9'"):
        choose_conv_mode("v9", "llava-v1.5-7b")


def test_placeholders_with_start_and_end_tokens():
    assert with_image_tokens("Hi", 2, True) == "<im_start><image><im_end>\n<im_start><image><im_end>\nHi"
    assert with_image_tokens("See <image-placeholder>.", 1, True) == "See <im_start><image><im_end>."
    assert with_image_tokens("Hi", 0) == "Hi"


# --- images -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    Image.new("L", (5, 4), 77).save(folder / "gray.png")
    (folder / "text.html").write_text("<html></html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_images_from_an_address(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    image = load_image(f"{server}/gray.png")
    assert image.mode == "RGB" and image.size == (5, 4) and image.getpixel((0, 0)) == (77, 77, 77)
    with pytest.raises(UserError, match=r"missing\.png cannot be read \(HTTP Error 404"):
        load_image(f"{server}/missing.png")
    with pytest.raises(UserError, match=r"text\.html cannot be read \(cannot identify"):
        load_image(f"{server}/text.html")


def test_an_image_of_any_mode(tmp_path):
    import numpy as np

    deep = Image.fromarray(np.full((3, 3), 128 * 256, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert load_image(str(tmp_path / "deep.png")).getpixel((0, 0)) == (128, 128, 128)


# --- wrong input --------------------------------------------------------------------------------------------


def test_wrong_input_costs_one_line(argv, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "llava.eval.answering.loading.load_model", lambda args: pytest.fail("found before the model is loaded")
    )
    image = data / "images" / "0.png"
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:60])
    base = ("--conv-mode", "llava_v0")  # what the name gives: no warning beside the error

    def fails(flags, *parts):
        fails_with_one_line(main, argv(*base, *flags), capsys, *parts)

    fails(["--image-file", tmp_path / "no.png"], "no.png", "does not exist")
    fails(["--image-file", tmp_path], tmp_path, "not a file")
    fails(["--image-file", tmp_path / "broken.png"], "broken.png", "cannot be read")
    fails(["--image-file", f"{image},,{image}"], "--image-file", "empty name", "--sep")
    fails(["--image-file", image, "--sep", ""], "--sep")
    fails(["--image-file", image, "--method", "none"], "--method")
    fails(["--image-file", image, "--temperature", -1], "--temperature")
    fails(["--image-file", image, "--batch-size", 2], "--batch-size")
    fails_with_one_line(main, argv("--conv-mode", "v9", "--image-file", image), capsys, "--conv-mode", "v9")


def test_placeholders_and_budgets_that_do_not_fit(argv, data, capsys):
    image = data / "images" / "0.png"
    base = ("--conv-mode", "llava_v0", "--image-file", image)
    fails_with_one_line(main, argv(*base, query="<image> and <image>?"), capsys, "2 image placeholder(s)", "1 image(s)")
    fails_with_one_line(main, argv(*base, "--target-token-num", 17), capsys, "--target-token-num 17", "16")
    fails_with_one_line(main, argv("--conv-mode", "llava_v0", query="<image>?"), capsys, "1 image placeholder(s)")


def test_quantized_loading_reaches_the_loader(argv, data, capsys, monkeypatch):
    # Whether bitsandbytes is installed is the loader's affair: here only that the flag arrives.
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    base = ("--conv-mode", "llava_v0", "--image-file", data / "images" / "0.png")
    for flag in ("--load-8bit", "--load-4bit"):
        fails_with_one_line(main, argv(*base, flag), capsys, "bitsandbytes")
    fails_with_one_line(main, argv(*base, "--load-8bit", "--load-4bit"), capsys, "one of 8-bit and 4-bit")
