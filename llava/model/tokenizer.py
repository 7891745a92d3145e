"""The tokenizer of a checkpoint, with the ids that LLaVA was published with.

LLaVA read `tokenizer.model` with sentencepiece. Transformers 5 has no sentencepiece backend any more and turns the file
into a byte-pair encoder of its own whose merges follow the vocabulary's order. Sentencepiece merges by score, and the
two orders differ in published vocabularies: runs of blanks have low ids and the worst scores. So the merges are made
here, from the scores. The placeholder for images is `llava.mm_utils.tokenizer_image_token`'s.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import models, normalizers
from transformers import AutoTokenizer, LlamaTokenizer

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.configuration import LlavaConfig
from llava.model.fields import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER, usable
from llava.model.locate import read_checkpoint_json, refuse_pointer
from llava.utils import UserError, describe_error

logger = logging.getLogger(__name__)

LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast")


def load_tokenizer(folder: Path, config: LlavaConfig) -> Any | None:
    """The folder's tokenizer; None, with a warning, if it has none.

    With `tokenizer_image_token`, which handles a blank at the start of a text, the ids are those of the sentencepiece
    tokenizer that LLaVA was published with, wherever the folder has the `tokenizer.model`. A `tokenizer.json` alone
    is taken as it is: it holds merges and no scores to check them by.

    Raises:
        UserError: a file that cannot be read, or tokens that the embedding table has no rows for.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            if (folder / name).is_file():
                raise UserError(
                    f"{folder / 'tokenizer.model'}: no such file (nor tokenizer.json), but the folder has {name}; "
                    "copy or download the tokenizer's files again"
                )
        logger.warning("%s has no tokenizer (tokenizer.model or tokenizer.json): only token ids can be used", folder)
        return None
    settings = _checked_files(folder)
    tokenizer_class = settings.get("tokenizer_class") or "LlamaTokenizer"
    try:
        if tokenizer_class in LLAMA_TOKENIZERS:
            # Looked at first: where it is broken, transformers goes on and tries other formats.
            pieces = _sentencepiece_pieces(folder / "tokenizer.model")
            # AutoTokenizer goes by config.json's "llava" instead, and reads a tokenizer.model without Llama's leading
            # blank.
            options = _published_defaults(settings, (folder / "tokenizer.json").is_file())
            tokenizer = LlamaTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
            if pieces is not None:
                _merge_by_score(tokenizer, pieces, folder)
            if options["legacy"]:
                _blank_before_every_text(tokenizer)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer("a")  # settings that cannot be used, a length that is no number for one, show only now
    except ImportError as error:
        raise UserError(f"{folder}: the tokenizer needs a package: {describe_error(error)[:200]}") from None
    except BaseException as error:
        # Depends on the backend: JSON, protobuf, sentencepiece and tokenizers errors; a panic in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = describe_error(error)[:200]
        raise UserError(f"{folder}: tokenizer cannot be read ({reason}); copy or download its files again") from None
    if tokenizer.pad_token is None:
        # Never seen by the decoder (padding is masked), but batches cannot be built without one. LLaVA's is
        # unk.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    extra = []
    if getattr(config, "mm_use_im_patch_token", False):
        extra.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(config, "mm_use_im_start_end", False):
        extra += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if extra:
        tokenizer.add_tokens(extra, special_tokens=True)
        if len(tokenizer) > config.text_config.vocab_size:
            # Growing the table here would give the new rows random weights, which can win an argmax.
            raise UserError(
                f"{folder}: config.json asks for {', '.join(extra)} but the embedding table has no rows for it"
            )
    return tokenizer


def _published_defaults(settings: Mapping[str, Any], has_json: bool) -> dict[str, Any]:
    """What transformers 4.37 took where `tokenizer_config.json` says nothing; transformers 5 takes the opposite.

    Transformers 5 itself leaves `legacy` out when it saves a tokenizer, but then names its backend.
    """
    legacy = settings.get("legacy")
    options: dict[str, Any] = {"legacy": "backend" not in settings if legacy is None else bool(legacy)}
    if "add_bos_token" not in settings and not has_json:  # tokenizer.json has its own word on BOS
        options["add_bos_token"] = True
    return options


def _checked_files(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, after a look at all of the tokenizer's files."""
    for name in ("tokenizer.model", "tokenizer.json"):
        refuse_pointer(folder / name)
    for name, shape in (("special_tokens_map.json", SPECIAL_TOKENS), ("added_tokens.json", ADDED_TOKENS)):
        if (folder / name).is_file():
            usable(read_checkpoint_json(folder / name), shape, folder / name)
    path = folder / "tokenizer_config.json"
    return usable(read_checkpoint_json(path), TOKENIZER, path) if path.is_file() else {}


def _sentencepiece_pieces(file: Path) -> Sequence[Any] | None:
    """The pieces of a sentencepiece model; None if there is no such file.

    Raises:
        ValueError: it is none, or not of the kind that Llama's tokenizer is.
    """
    if not file.is_file():
        return None
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None
    if len(proto.pieces) == 0 or not all(math.isfinite(piece.score) for piece in proto.pieces):
        raise ValueError(f"{file.name} is damaged: no pieces, or scores that are no numbers")
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError(f"{file.name} is no byte-pair model, which {LLAMA_TOKENIZERS[0]} needs")
    return proto.pieces


def _merge_by_score(tokenizer: Any, pieces: Sequence[Any], folder: Path) -> None:
    """Give the tokenizer's byte-pair encoder the merges that sentencepiece makes with these pieces."""
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    known = tokenizer.get_vocab()
    if any(known.get(piece, i) != i for piece, i in vocab.items()):
        # A tokenizer.json of another vocabulary beside it: whoever changed it meant that one.
        logger.warning("%s: the ids of tokenizer.model and tokenizer.json differ; the latter is used as it is", folder)
        return
    unknown = tokenizer.unk_token if tokenizer.unk_token in vocab else None
    tokenizer.backend_tokenizer.model = models.BPE(
        vocab=vocab, merges=merges_by_score(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )


def merges_by_score(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best score first.

    Sentencepiece joins the neighbors whose union has the best score; between equals the leftmost pair. Among equals
    the pair with the longest left half comes first here: a run of blanks then grows from its left end, one blank at a
    time, which is what leftmost-first does where all runs have one score.

    Args:
        pieces: of a sentencepiece model, in the order of their ids, with `piece`, `score` and `type`.
    """
    normal, unused = 1, 5  # sentencepiece looks up no other types (control, byte, unknown) when it joins
    scores = {piece.piece: piece.score for piece in pieces if piece.type in (normal, unused)}
    merges = [
        (score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: (-merge[0], -merge[1]))
    return [(left, right) for _, _, left, right in merges]


def _blank_before_every_text(tokenizer: Any) -> None:
    """The legacy behavior in full: a blank before the text and before every part behind a special token.

    Transformers 5 leaves it out where the text starts with a blank of its own.
    """
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.init_kwargs["legacy"] = True  # kept when the tokenizer is saved
