"""Images that nobody has checked, and the worker processes that read them."""

import io
import os
import signal
import struct
import zlib

import pytest
import torch
from PIL import Image

from llava.eval.answering.adapter import LlavaAdapter
from llava.eval.answering.answerer import Answerer, SampleError, decode_image, open_image
from llava.eval.answering.workers import prepared
from llava.eval.common.questions import Question, read_questions
from llava.eval.model_vqa_loader import main
from tests.eval.helpers import read_jsonl, write_jsonl
from tests.eval.processes import needs_fork

pytestmark = needs_fork


@pytest.fixture
def quick_watch(monkeypatch):
    """torch looks for dead workers every five seconds; the tests need not wait that long."""
    import torch.utils.data.dataloader as dataloader

    monkeypatch.setattr(dataloader._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.fixture
def answerer(loaded, data):
    tokenizer, model, processor, _ = loaded
    return Answerer(LlavaAdapter(tokenizer, model, processor), data / "images")


def png_header(width, height):
    """A PNG of any size without its pixels: what a decompression bomb looks like from outside."""

    def piece(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header) + piece(b"IDAT", zlib.compress(b"\0")) + piece(b"IEND", b"")


def test_what_cannot_be_read_is_named(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "loop.png").symlink_to(folder / "loop2.png")
    (folder / "loop2.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    cases = {
        "cut.jpg": "truncated",
        "bomb.png": "--max-image-pixels",
        "text.jpg": "cannot identify",
        "empty.png": "cannot identify",
        "loop.png": "symbolic link",
        "dangling.png": "No such file",
        "missing.png": "No such file",
        "sub": "folder",
        "pipe.png": "not a regular file",
        "a" * 300: "too long",
        "../images/text.jpg": "leaves the image folder",
        "sub/../../x.png": "leaves the image folder",
        str(folder / "text.jpg"): "leaves the image folder",
        "nul\0.png": "null",
    }
    for name, reason in cases.items():
        with pytest.raises(SampleError) as error:
            open_image(folder, name)
        assert reason in str(error.value) and (name in str(error.value) or repr(name) in str(error.value)), name
        assert "\n" not in str(error.value)


def test_what_can_be_read(tmp_path):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    image = Image.new("RGB", (5, 4), "red")
    image.save(elsewhere / "red.png")
    (folder / "wrong.jpg").write_bytes((elsewhere / "red.png").read_bytes())  # the content decides
    (folder / "link.png").symlink_to(elsewhere / "red.png")
    (folder / "linked").symlink_to(elsewhere)
    for name in ("wrong.jpg", "link.png", "linked/red.png"):
        assert open_image(folder, name).tobytes() == image.tobytes()


def test_limit_of_pixels_is_an_option(argv, data, preloaded, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--max-image-pixels", 1300))  # images are 40, 50, 60 x 30
    assert exit_info.value.code == 3
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == ["img0", "img0", 99]
    assert "50 x 30 pixels are more than --max-image-pixels 1300" in capsys.readouterr().err
    before = Image.MAX_IMAGE_PIXELS
    image = io.BytesIO()
    Image.new("L", (30, 30)).save(image, "PNG")
    assert decode_image(lambda: image, "x", 900).size == (30, 30)
    assert Image.MAX_IMAGE_PIXELS == before, "other users of PIL keep its limit"


def same(one, other):
    assert one.question == other.question and one.image_sizes == other.image_sizes
    assert torch.equal(one.input_ids, other.input_ids) and one.input_ids.dtype == other.input_ids.dtype
    assert len(one.pixels) == len(other.pixels) == len(one.question.images)
    for pixels, sent in zip(one.pixels, other.pixels, strict=True):
        assert torch.equal(pixels, sent) and pixels.dtype == sent.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workers_prepare_what_the_process_itself_would(answerer, data, monkeypatch, dtype):
    monkeypatch.setattr(type(answerer.model), "dtype", property(lambda self: dtype))
    (data / "images" / "1.png").write_bytes(b"damaged")
    questions = read_questions(data / "q.jsonl")
    alone, together = (list(prepared(answerer, questions, workers, 4)) for workers in (0, 2))
    assert len(alone) == len(together) == 7
    errors = 0
    for (question, sample), (other_question, other) in zip(alone, together, strict=True):
        assert question == other_question
        if isinstance(sample, SampleError):
            errors += 1
            assert str(other) == str(sample) and "1.png" in str(other)
        else:
            same(sample, other)
    assert errors == 2


def test_answers_with_workers(argv, data, preloaded):
    main(argv())
    main(argv("--num-workers", 2, "--batch-size", 3, answers="b.jsonl"))
    assert (data / "b.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()


class Deadly(Answerer):
    """Preparing the question `deadly` ends the process, always or only the first time."""

    def prepare(self, question):
        if question.text == "deadly" and os.getpid() != self.parent and not (self.once and self.flag.exists()):
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(question)


@pytest.mark.parametrize("once", [False, True])
def test_death_of_a_worker_costs_one_sample_at_most(loaded, data, quick_watch, once):
    tokenizer, model, processor, _ = loaded
    answerer = Deadly(LlavaAdapter(tokenizer, model, processor), data / "images")
    answerer.parent, answerer.once, answerer.flag = os.getpid(), once, data / "died"
    texts = [f"question {i}" for i in range(20)]
    texts[7] = "deadly"
    questions = [Question(i, f"q:{i}", i, text, f"{i % 4}.png") for i, text in enumerate(texts)]
    results = list(prepared(answerer, questions, 2, 4))
    assert [question.index for question, _ in results] == list(range(20))
    failed = [question.index for question, sample in results if isinstance(sample, SampleError)]
    assert failed == ([] if once else [7]) and (data / "died").exists()
    if not once:
        assert "ended the process that prepared it" in str(results[7][1])


def test_death_of_a_worker_does_not_disturb_the_model(loaded, data, quick_watch):
    """torch reports a dead worker by raising in whatever the main thread does; a batch must not be hit by that."""
    import time

    tokenizer, model, processor, _ = loaded
    answerer = Deadly(LlavaAdapter(tokenizer, model, processor), data / "images")
    answerer.parent, answerer.once, answerer.flag = os.getpid(), False, data / "died"
    questions = [Question(0, "q:1", 0, "fine"), Question(1, "q:2", 1, "deadly"), Question(2, "q:3", 2, "fine")]
    stream = prepared(answerer, questions, 2, 4)
    first = next(stream)
    deadline = time.monotonic() + 20
    while not (data / "died").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # "the model" is at work here while the signal of the child's death arrives
    rest = list(stream)
    assert [question.index for question, _ in [first, *rest]] == [0, 1, 2]
    assert isinstance(rest[0][1], SampleError) and not isinstance(rest[1][1], SampleError)


def test_abandoned_workers_end(answerer, data):
    questions = read_questions(data / "q.jsonl")
    stream = prepared(answerer, questions, 2, 4)
    next(stream)
    import multiprocessing

    assert multiprocessing.active_children()
    stream.close()
    assert not multiprocessing.active_children()


def test_questions_about_one_image_share_a_worker_and_its_decoding(loaded, data):
    tokenizer, model, processor, _ = loaded

    class Counting(Answerer):
        def load_image(self, name):
            with open(data / "opened", "a") as file:
                file.write(f"{name}\n")
            return super().load_image(name)

    answerer = Counting(LlavaAdapter(tokenizer, model, processor), data / "images")
    write_jsonl(
        data / "q.jsonl",
        [{"question_id": i, "image": f"{i // 6 % 4}.png", "text": f"{i}?"} for i in range(24)],
    )
    assert len(list(prepared(answerer, read_questions(data / "q.jsonl"), 2, 4))) == 24
    assert sorted((data / "opened").read_text().split()) == ["0.png", "1.png", "2.png", "3.png"]


def test_a_side_that_scaling_cannot_bear_costs_one_sample(argv, data, preloaded, capsys):
    Image.new("1", (10_000_000, 1)).save(data / "images" / "1.png")
    with pytest.raises(SystemExit) as exit_info:
        main(argv())
    assert exit_info.value.code == 3 and len(read_jsonl(data / "a.jsonl")) == 5
    printed = capsys.readouterr().err
    assert "q.jsonl:3: image 1.png: 10000000 x 1 pixels: a side may have" in printed


@pytest.mark.parametrize(
    "place", ["llava.eval.answering.answerer.to_rgb", "llava.eval.answering.adapter.process_images"]
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB")])
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_trouble_costs_one_sample(argv, data, preloaded, capsys, monkeypatch, place, error, workers):
    """Whichever step finds no memory for the second picture."""
    module, name = place.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[name]), name)

    def short_of_memory(images, *rest):
        if (images[0] if isinstance(images, list) else images).size == (50, 30):
            raise error
        return original(images, *rest)

    monkeypatch.setattr(place, short_of_memory)
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--num-workers", workers))
    assert exit_info.value.code == 3
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == ["img0", "img0", 99, "img2", "img2"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert len(lines) == 2 and "q.jsonl:3" in lines[0] and "memory" in lines[0]
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--strict", answers="s.jsonl"))
    assert exit_info.value.code == 2 and "q.jsonl:3" in capsys.readouterr().err
