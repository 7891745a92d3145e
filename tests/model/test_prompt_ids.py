"""Prompt ids are those of the sentencepiece tokenizer that LLaVA was published with (transformers 4.37, slow).

`published_ids` below is an independent computation with the sentencepiece model itself, of both behaviors that
checkpoints ask for: `legacy: true` (every text between special tokens gets a blank in front) and `legacy: false`
(only the first one does).

In the vocabulary of these tests, as in Llama's and Mistral's, runs of blanks have low ids and the worst scores, so that
the order of ids and the order of merges differ.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizer import load_tokenizer
from llava.utils import UserError
from tests.conftest import ROOT
from tests.model.tiny import tiny_config, write_tokenizer

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
IMAGE = IMAGE_TOKEN_INDEX


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Runs of blanks in the corpus: as in Llama's own vocabulary, several blanks make one piece.
    corpus = "def f(x):\n    return x\n\n        if  x:   y\n" * 30
    return blank_runs_first(write_tokenizer(tmp_path_factory.mktemp("ids"), corpus=corpus))


def blank_runs_first(folder):
    """Moves runs of two blanks and more behind the bytes, with the score that Mistral's have."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    runs = [piece for piece in proto.pieces if len(piece.piece) > 1 and set(piece.piece) == {"\u2581"}]
    others = [piece for piece in proto.pieces if piece not in runs]
    first = next(i for i, piece in enumerate(others) if piece.type == piece.NORMAL)
    copies = [(piece.piece, piece.score, piece.type) for piece in (*others[:first], *runs, *others[first:])]
    assert len(runs) > 2 and first > 256
    del proto.pieces[:]
    for piece, score, kind in copies:
        run = len(piece) > 1 and set(piece) == {"\u2581"}
        proto.pieces.add(piece=piece, score=-1e9 if run else score, type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def sentencepiece_models(folder):
    """The model as it is, and without the blank that it puts in front."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    models = []
    for prefix in (True, False):
        proto.normalizer_spec.add_dummy_prefix = prefix
        models.append(sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()))
    return models


@pytest.fixture(scope="module")
def published_ids(sentencepiece_models):
    with_blank, without_blank = sentencepiece_models

    def text_ids(text: str, legacy: bool) -> list[int]:
        if not text:
            return []
        if not legacy:
            text = " " + text
        ids = []
        for section in filter(None, re.split(f"({'|'.join(SPECIAL)})", text)):
            if section in SPECIAL:
                ids.append(SPECIAL[section])
            elif legacy:
                ids += with_blank.encode(section)
            else:
                # Nothing in front of the text may change how its first blanks are grouped.
                shield = "<unk>" if section[0] in " \u2581" else ""
                ids += without_blank.encode(shield + section)[len(without_blank.encode(shield)) :]
        blank = without_blank.piece_to_id("\u2581")
        if not legacy and len(ids) > 1 and ids[0] == blank and ids[1] in SPECIAL.values():
            ids = ids[1:]
        return ids

    def prompt_ids(prompt: str, legacy: bool) -> list[int]:
        ids = [1]
        for i, piece in enumerate(prompt.split("<image>")):
            ids += [IMAGE] if i else []
            ids += text_ids(piece, legacy)
        return ids

    return prompt_ids


@pytest.fixture(scope="module")
def tokenizers(folder, tmp_path_factory):
    loaded = {}
    for legacy in (True, False):
        place = tmp_path_factory.mktemp(f"legacy{legacy}")
        (place / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": legacy}))
        loaded[legacy] = load_tokenizer(place, tiny_config())
    return loaded


PROMPTS = [
    "USER: What is the color? ASSISTANT:",
    "<image>\nWhat is the color?",
    "USER: <image>\nWhat is the color? ASSISTANT:",
    "USER:  <image> What is the color? ASSISTANT: ",
    "USER: <image>  What is the color?",
    "USER: <image> <image>\nWhat?",
    "USER: <image><image> ASSISTANT:",
    "USER: <image>",
    "<image>",
    "",
    " ",
    " What",
    "USER: <image>\nHi ASSISTANT: red</s>USER: And? ASSISTANT:",
    "USER: <image>\nHi ASSISTANT: red</s> USER: And? ASSISTANT:",
    "</s>USER", "<s>[INST] <image>\nHi [/INST] red </s><s>[INST] And? [/INST]",
    "\u2581What", "a    b\t\tc \n  d", "\u65e5\u672c <image> \u00e9\U0001f642",
]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_the_published_ones(tokenizers, published_ids, legacy, prompt):
    ids = tokenizer_image_token(prompt, tokenizers[legacy], IMAGE_TOKEN_INDEX)
    assert ids == published_ids(prompt, legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_of_random_prompts(tokenizers, published_ids, legacy):
    parts = ["What", "is", " ", "  ", "\n", "USER:", "</s>", "<s>", "<unk>", "\u00e9", "\u65e5", "\u2581", "\t"]
    parts += ["the color", "star?", "\U0001f642", "###", ".", "1", "23", "<image>", "<image>\n", " <image> "]
    parts += [" " * n for n in (3, 4, 5, 8, 9, 17)]
    draw = random.Random(0)
    for _ in range(2000):
        prompt = "".join(draw.choice(parts) for _ in range(draw.randint(0, 9)))
        assert tokenizer_image_token(prompt, tokenizers[legacy]) == published_ids(prompt, legacy), repr(prompt)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", sorted(conv_templates))
def test_ids_of_every_template(tokenizers, published_ids, name, legacy):
    conv = conv_templates[name].copy()
    turns = ["<image>\nWhat is the color?", "red", " And <image> this? ", "blue  star", "How many?", None]
    for i, turn in enumerate(turns):
        conv.append_message(conv.roles[i % 2], turn)
    prompt = conv.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizers[legacy])
    assert ids == published_ids(prompt, legacy) and ids.count(IMAGE) == 2 and ids[0] == 1


def test_golden_pieces(tokenizers):
    """Written out by hand: what a reader of the prompt should see."""

    def pieces(prompt, legacy=False):
        ids = tokenizer_image_token(prompt, tokenizers[legacy])
        return [str(IMAGE) if i == IMAGE else tokenizers[legacy].convert_ids_to_tokens(i) for i in ids]

    image = str(IMAGE)
    # A newline after the image keeps its leading-space token.
    assert pieces("USER: <image>\nWhat")[-5:] == [image, "\u2581", "<0x0A>", "W", "hat"]
    # A blank after the image is a second one. The word keeps its own: runs of blanks have the worst score.
    assert pieces("USER: <image> What")[-3:] == [image, "\u2581", "\u2581What"]
    assert pieces("USER: <image>   ")[-2:] == [image, "\u2581" * 4]
    assert pieces("<image><image>") == ["<s>", image, image]
    assert pieces("") == ["<s>"]
    # After the end of a turn, only the legacy tokenizer writes a leading space.
    assert pieces("red</s>What")[-3:] == ["</s>", "W", "hat"]
    assert pieces("red</s>What", legacy=True)[-2:] == ["</s>", "\u2581What"]


@pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common, which ships a published vocabulary, is not installed (it comes with the dev extra)",
)
def test_ids_of_a_published_vocabulary(tmp_path):
    """Mistral's first tokenizer.model: 32,000 pieces, runs of blanks with the lowest ids and a score of -1e9."""
    data = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(data.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(data))
    tokenizer = load_tokenizer(tmp_path, tiny_config(text={"vocab_size": 32000}))
    hello = tokenizer.convert_ids_to_tokens(tokenizer_image_token("Hello  world", tokenizer))
    assert hello == ["<s>", "\u2581Hello", "\u2581", "\u2581world"]
    words = ["Hello", "world", "the color", "na\u00efve", "\u65e5\u672c", "\U0001f642", "def f(x):", "return", "12345"]
    words += ["...", "I'm", "\n", "\n\n", "\t", "aaa", "\u2581", "_", "==", "<0x0A>", "Stra\u00dfe"]
    draw = random.Random(5)
    for _ in range(1000):
        parts = [draw.choice(words) + " " * draw.choice((0, 1, 1, 2, 3, 4, 5, 8, 15, 17, 33)) for _ in range(8)]
        text = " " * draw.choice((0, 0, 1, 2, 5)) + "".join(parts[: draw.randint(1, 8)])
        assert tokenizer_image_token(text, tokenizer) == [1, *model.encode(text)], repr(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("unigram", "is no byte-pair model"), ("text", "tokenizer cannot be read"), ("empty", "tokenizer cannot be read")],
)
def test_models_that_cannot_be_used(folder, tmp_path, damage, message):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    content = {"unigram": proto.SerializeToString(), "text": b"hello", "empty": b""}[damage]
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path, tiny_config())
    assert "\n" not in str(caught.value)


def test_ids_of_the_embedded_checkpoint():
    folder = ROOT / "playground" / "tiny" / "models" / "tiny-llava-v1.5"
    tokenizer = load_tokenizer(folder, tiny_config(text={"vocab_size": 32000}))
    encode = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    for before, after in (("USER: ", "\nWhat color is it? ASSISTANT:"), ("USER:", " Hi"), ("", "  "), ("a", "")):
        ids = tokenizer_image_token(f"{before}<image>{after}", tokenizer)
        assert ids == [1, *encode(before), IMAGE, *encode(after)]


@pytest.mark.parametrize(
    ("settings", "legacy"),
    [
        (None, True),  # a bare tokenizer.model
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, True),  # written before the field existed
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, True),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, False),  # vicuna 1.5 and with it LLaVA-1.5
        ({"tokenizer_class": "LlamaTokenizer", "legacy": None}, True),
        ({"tokenizer_class": "LlamaTokenizer", "backend": "tokenizers"}, False),  # transformers 5 drops the field
    ],
)
def test_which_behavior_a_checkpoint_asks_for(folder, tmp_path, published_ids, settings, legacy):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    prompt = "USER: <image> Hi ASSISTANT: red</s>USER: And?"
    assert published_ids(prompt, True) != published_ids(prompt, False)
    assert tokenizer_image_token(prompt, tokenizer) == published_ids(prompt, legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_saving_and_loading_keeps_the_ids(tokenizers, published_ids, tmp_path, legacy):
    tokenizers[legacy].save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists(), "transformers 5 writes tokenizer.json only"
    again = load_tokenizer(tmp_path, tiny_config())
    for prompt in PROMPTS:
        assert tokenizer_image_token(prompt, again) == published_ids(prompt, legacy), prompt


@pytest.mark.parametrize("legacy", [False, True])
def test_text_survives_the_round_trip(tokenizers, legacy):
    tokenizer = tokenizers[legacy]
    for text in ("What is the color?", " What", "a  b", "red\n  star"):
        assert tokenizer.decode(tokenizer_image_token(text, tokenizer), skip_special_tokens=True) == text
