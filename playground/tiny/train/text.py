"""Tokenizer and token ids of training examples: exactly the ids that evaluation feeds.

A prompt is built by `llava.conversation` and split at `<image>` as LLaVA does; the ids before the picture are the
same for all examples, the ids behind it belong to one question each.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from llava.conversation import conv_templates
from playground.tiny.world.questions import LETTER, SHORT, sample_questions
from playground.tiny.world.scenes import COLORS, SHAPES, WORDS, sample_scene

HERE = Path(__file__).resolve().parents[1]
CHECKPOINT = HERE / "models" / "tiny-llava-v1.5"
CHECKPOINT_16 = HERE / "models" / "tiny-llava-v1.6"
CHECKPOINT_DRIVE, CHECKPOINT_SENNA = HERE / "models" / "tiny-drive", HERE / "models" / "tiny-senna"
CHECKPOINT_DEEP = HERE / "models" / "tiny-llava-deep"
TEMPLATE = "vicuna_v1"
VOCABULARY = 640


def prompt(text: str, answer: str | None = None) -> str:
    """The whole conversation in the vicuna_v1 template; without an answer it ends where the model goes on."""
    conversation = conv_templates[TEMPLATE].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" + text)
    conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


@lru_cache(maxsize=1)
def tokenizer():
    """The tokenizer of the checkpoint.

    The Llama class by name: beside a config.json of type `llava`, AutoTokenizer converts tokenizer.model without the
    blank that Llama puts before every text.
    """
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(CHECKPOINT)


def prompt_of(text: str, answer: str | None = None, picture: bool = True) -> str:
    """`prompt`, or the same without a picture."""
    return prompt(text, answer) if picture else prompt(text, answer).replace("<image>\n", "")


@lru_cache(maxsize=2)
def head_ids(picture: bool = True) -> tuple[int, ...]:
    """Ids before the picture, BOS first; without a picture: before the question."""
    start = prompt("").split("<image>")[0]
    return tuple(tokenizer()(start if picture else start.rstrip()).input_ids)


@lru_cache(maxsize=400_000)
def tail_ids(text: str, answer: str, picture: bool = True) -> tuple[tuple[int, ...], int]:
    """Ids behind the picture, ending with EOS, and how many of them are the answer's (EOS included)."""

    def tail(said: str | None) -> list[int]:
        if picture:
            return tokenizer()(prompt(text, said).split("<image>")[1]).input_ids[1:]
        ids, head = tokenizer()(prompt_of(text, said, False)).input_ids, head_ids(False)
        if tuple(ids[: len(head)]) != head:
            raise AssertionError(f"the question changes the ids before it: {text!r}")
        return ids[len(head) :]

    question, whole = tail(None), tail(answer)
    if whole[: len(question)] != question:
        raise AssertionError(f"the answer changes the ids of its own prompt: {text!r} {answer!r}")
    return tuple(whole), len(whole) - len(question)


@lru_cache(maxsize=100_000)
def token_ends(text: str, picture: bool = True) -> dict[int, int]:
    """Where a token ends at character `i` of the text (exclusive): its index in the ids behind the picture.

    A character that is spelled by several bytes counts with the last of them.
    """
    whole = prompt(text).split("<image>")[1] if picture else prompt_of(text, None, False)
    start = whole.index(text)
    offsets = tokenizer()(whole, return_offsets_mapping=True).offset_mapping
    skip = 1 if picture else len(head_ids(False))
    return {end - start: place - skip for place, (_, end) in enumerate(offsets) if end > start and place >= skip}


def corpus(lines: int = 20000, seed: int = 7) -> list[str]:
    """Text to train the tokenizer on."""
    rng = np.random.default_rng([99, seed])
    out = []
    for _ in range(lines // 10):
        scene = sample_scene(rng, 3, 6, held_out=False)
        for question in sample_questions(scene, rng, 10):
            out.append(prompt(question.text, question.answer).split("<image>")[1].replace("</s>", ""))
    names = [*COLORS, *SHAPES, *(w.lower() for w in WORDS), *WORDS]
    extra = [
        prompt("").replace("<image>", ""),
        SHORT,
        LETTER,
        "Reference OCR token:",
        "yes no Yes No yes no",
        "Describe the image. Please answer yes or no. A photo of",
        "A. B. C. D. E.",
        *names,
        *(f'"{w}"' for w in WORDS),
    ]
    return [line for line in out + extra * 200 if line]


def train_tokenizer(folder: Path = CHECKPOINT) -> None:
    """Train the sentencepiece model and write the tokenizer's files into the checkpoint folder."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
