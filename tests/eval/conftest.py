"""A random LLaVA checkpoint with a tokenizer, and a small question file with images, for the loader's tests."""

import pytest
import sentencepiece
from PIL import Image

from tests.eval.forkserver import interpreter
from tests.eval.helpers import write_jsonl
from tests.model.tiny import tiny_model, write_original, write_tokenizer

VOCABULARY = 400  # more than the tokenizer's pieces


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a random model: 3 layers, 16 visual tokens."""
    folder = tmp_path_factory.mktemp("checkpoints") / "random llava"
    write_original(folder, tiny_model(text={"vocab_size": VOCABULARY}), vocab_size=VOCABULARY)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """An interpreter for shell scripts that need not import torch anew for each of their commands."""
    with interpreter(tmp_path_factory.mktemp("bin")) as path:
        yield path


@pytest.fixture(scope="session")
def wordy_checkpoint(tmp_path_factory):
    """The same, but it answers in pieces of words only: texts that tell one answer from another."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wordy llava"
    model = tiny_model(text={"vocab_size": VOCABULARY})
    write_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    words = [i for i in range(VOCABULARY) if i < len(pieces) and i > 2 and not pieces.is_byte(i)]
    model.lm_head.weight.data[[i for i in range(VOCABULARY) if i not in words]] = 0  # some other logit is positive
    write_original(folder, model, vocab_size=VOCABULARY)
    return folder


@pytest.fixture
def data(tmp_path):
    """Folder with `q.jsonl` (seven questions, one of them without image) and `images/`."""
    images = tmp_path / "images"
    images.mkdir()
    colors = ["red", "green", "blue", "yellow"]
    for i, color in enumerate(colors):
        Image.new("RGB", (40 + 10 * i, 30), color).save(images / f"{i}.png")
    questions = [
        {"question_id": f"img{i // 2}", "image": f"{i // 2}.png", "text": text}
        for i, text in enumerate(
            ["What color?", "Is it a star?", "How many?", "What is this?", "Red?", "Blue circles?"]
        )
    ]
    questions.insert(4, {"question_id": 99, "text": "Is there no image?"})
    write_jsonl(tmp_path / "q.jsonl", questions)
    return tmp_path


@pytest.fixture
def argv(checkpoint, data):
    """Builds a loader's command line on the random checkpoint; flags given later win."""

    def build(*flags, answers="a.jsonl"):
        return [
            str(x)
            for x in (
                *("--model-path", checkpoint, "--question-file", data / "q.jsonl"),
                *("--image-folder", data / "images", "--answers-file", data / answers),
                *("--target-token-num", 4, "--max-new-tokens", 4, "--device", "cpu", *flags),
            )
        ]

    return build


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The random checkpoint, loaded once."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(checkpoint), None, checkpoint.name, device="cpu")


@pytest.fixture
def preloaded(loaded, monkeypatch):
    """Runs use the loaded model instead of reading it again."""
    monkeypatch.setattr("llava.eval.answering.loading.load_model", lambda args: loaded)
