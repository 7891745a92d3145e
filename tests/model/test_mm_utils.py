"""Placeholder tokenization, stopping on keywords and the small helpers."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    load_image_from_base64,
    tokenizer_image_token,
)
from llava.model.builder import load_tokenizer
from tests.model.tiny import LLAVA_FIELDS, TEXT_FIELDS, tiny_config, write_json, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    # Beside a LLaVA config, AutoTokenizer would take the same file for a tokenizer without leading blanks.
    write_json(folder / "config.json", {"model_type": "llava", **TEXT_FIELDS, **LLAVA_FIELDS})
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, tiny_config())


@pytest.fixture(scope="module")
def sentencepiece_ids(tokenizer_folder):
    """What LLaVA's own (sentencepiece) tokenizer gives for one piece of a prompt."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    return processor.encode


@pytest.mark.parametrize(
    "prompt",
    [
        "A chat. USER: <image>\nWhat is the color? ASSISTANT:",
        "<image>\nWhat is the color?",
        "USER: <image>\n<image>\nWhat is the color of <image>? ASSISTANT:",
        "USER: What is the color? ASSISTANT:",
        "USER: <image>",
        "USER: <image>\nHi ASSISTANT: red</s>USER: What? ASSISTANT:",
    ],
)
def test_pieces_are_tokenized_alone_behind_one_bos(tokenizer, sentencepiece_ids, prompt):
    # Pinned to sentencepiece: a leading-space difference after <image> would change the prompt by a token.
    expected = [tokenizer.bos_token_id]
    for i, piece in enumerate(prompt.split("<image>")):
        expected += [IMAGE_TOKEN_INDEX] if i else []
        head, *turns = piece.split("</s>")
        expected += sentencepiece_ids(head)
        for turn in turns:
            # No leading-space token after a special token (Llama's non-legacy behavior).
            leading_space, *rest = sentencepiece_ids(turn)
            assert tokenizer.convert_ids_to_tokens(leading_space) == "▁"
            expected += [tokenizer.eos_token_id, *rest]
    assert tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX) == expected
    as_tensor = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    assert as_tensor.dtype == torch.long and as_tensor.tolist() == expected


def test_decoded_text_keeps_its_blanks(tokenizer, sentencepiece_ids, tmp_path):
    text = "What is the color of the star?"
    assert tokenizer(text).input_ids[1:] == sentencepiece_ids(text)
    assert tokenizer.decode(sentencepiece_ids(text), skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)  # as transformers writes it: tokenizer.json
    again = load_tokenizer(tmp_path, tiny_config())
    assert again(text).input_ids == tokenizer(text).input_ids


def test_newline_after_the_image_keeps_its_leading_space_token(tokenizer):
    ids = tokenizer_image_token("USER: <image>\nWhat", tokenizer)
    after = tokenizer.convert_ids_to_tokens(ids[ids.index(IMAGE_TOKEN_INDEX) + 1 :])
    assert after[:2] == ["▁", "<0x0A>"]


def test_a_bare_sentencepiece_model_still_gets_bos(tmp_path, tokenizer):
    bare = load_tokenizer(write_tokenizer(tmp_path, with_config=False), tiny_config())
    text = "USER: <image>\nWhat is the color?"
    assert tokenizer_image_token(text, bare) == tokenizer_image_token(text, tokenizer)


def test_a_tokenizer_without_bos_gets_none():
    class Letters:
        bos_token_id = None

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()

    assert tokenizer_image_token("ab<image>c", Letters()) == [97, 98, IMAGE_TOKEN_INDEX, 99]


def test_unknown_tensor_type_is_refused(tokenizer):
    with pytest.raises(ValueError, match="Unsupported tensor type: np"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/models/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("runs/llava-lora/checkpoint-500", "llava-lora_checkpoint-500"),
        ("tiny", "tiny"),
    ],
)
def test_model_names(path, name):
    assert get_model_name_from_path(path) == name


def test_images_from_base64():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(buffer, "PNG")
    image = load_image_from_base64(base64.b64encode(buffer.getvalue()))
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (1, 2, 3)


def test_keywords_stop_rows_one_by_one(tokenizer):
    prompt = torch.tensor([tokenizer("USER: What is the color? ASSISTANT:").input_ids])
    stop = KeywordsStoppingCriteria(["star"], tokenizer, prompt)
    new = [tokenizer(text).input_ids[1:] for text in ("red star", "red word")]
    width = min(map(len, new))
    rows = torch.stack([torch.cat([prompt[0], torch.tensor(ids[-width:])]) for ids in new])
    assert stop(rows, None).tolist() == [True, False]


def test_keywords_in_the_prompt_do_not_stop(tokenizer):
    prompt = torch.tensor([tokenizer("the star").input_ids])
    stop = KeywordsStoppingCriteria(["star"], tokenizer, prompt)
    word = tokenizer("word").input_ids[1:]
    assert stop(torch.cat([prompt, torch.tensor([word])], dim=1), None).tolist() == [False]


def test_keywords_are_found_when_generation_runs_from_embeddings(tokenizer):
    prompt = torch.tensor([tokenizer("USER: What is the color of the star? ASSISTANT:").input_ids])
    stop = KeywordsStoppingCriteria(["red"], tokenizer, prompt)
    ids = tokenizer("star star red").input_ids[1:]
    found = [bool(stop(torch.tensor([ids[: n + 1]]), None)) for n in range(len(ids))]
    assert found == [False] * (len(ids) - 1) + [True]


def test_keyword_tokenized_differently_inside_a_sentence_is_found(tokenizer):
    # "###" alone starts with a leading-space token that it does not have behind a word.
    prompt = torch.tensor([tokenizer("USER:").input_ids])
    stop = KeywordsStoppingCriteria(["###"], tokenizer, prompt)
    ids = torch.tensor([tokenizer("USER: red###").input_ids])
    assert stop(ids, None).tolist() == [True]
