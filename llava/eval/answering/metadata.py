"""The metadata of a run, beside its answers: `X.meta.json` for `X.jsonl`.

They identify the run (options, checkpoint, question file, versions), so that runs are never mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llava
from llava.eval.answering.sums import TokenTotals, first_difference
from llava.eval.common.jsonio import read_json, write_json
from llava.eval.common.paths import former_meta_path, meta_path
from llava.schema import ANYTHING, NUMBER, TEXT, Fields, MapOf, at_least, check, optional
from llava.utils import UserError

FORMAT = 1
DEFAULT_KERNEL = "sdpa"
# Files up to this size count whole in a checkpoint's fingerprint, larger ones with both ends: 13 GB take too long.
_WHOLE_BYTES = 1 << 20
_OBJECT = MapOf(ANYTHING)
_COUNTS = Fields({name: at_least(0) for name in ("total", "answered", "skipped", "failed")})
_TIMING = Fields({"samples": at_least(0), "prefill_seconds": at_least(0, NUMBER)})
_SHAPE = Fields(
    {
        "options": _OBJECT,
        "checkpoint?": optional(_OBJECT),
        "question_file?": optional(_OBJECT),
        "arguments?": optional(Fields({"limit?": optional(at_least(0))})),
        "counts?": optional(_COUNTS),
        "timing?": optional(_TIMING),
        "seconds?": optional(at_least(0, NUMBER)),
        "started?": optional(TEXT),
        "finished?": optional(TEXT),
    }
)
_REMEDY = "give another --answers-file, or --overwrite to start over"


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def file_sha256(path: str | os.PathLike[str]) -> str | None:
    """Hash of a file's bytes, in hex; None if there is no such file."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while data := file.read(_WHOLE_BYTES):
        digest.update(data)
    return digest.hexdigest()


def checkpoint_fingerprint(*folders: str | os.PathLike[str] | None) -> str | None:
    """Hash of checkpoint folders: names and sizes of all files, small files whole, both ends of large ones.

    None if one of them is no folder (a hub name). Hidden files do not count; None among `folders` is left out.
    """
    digest = hashlib.sha256()
    for folder in [folder for folder in folders if folder]:
        if not os.path.isdir(folder):
            return None
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if any(part.startswith(".") for part in name.parts):
                continue
            size = path.stat().st_size
            digest.update(f"{name.as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
            with open(path, "rb") as file:
                digest.update(file.read(_WHOLE_BYTES))
                if size > _WHOLE_BYTES:
                    file.seek(max(size - _WHOLE_BYTES, _WHOLE_BYTES))
                    digest.update(file.read())
    return digest.hexdigest()


def git_revision() -> str | None:
    """Commit of this source tree, with `+changes` if tracked files differ; None outside a git checkout."""
    root = Path(llava.__file__).resolve().parents[1]

    def git(*command: str) -> str:
        # Looking must not write: `status` refreshes the index otherwise and, where the disk is full or the run is
        # killed meanwhile, leaves a lock behind that stops all further git commands.
        command = ("git", "--no-optional-locks", "-C", str(root), *command)
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed below somebody else's repository
        revision = git("rev-parse", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of what computes the answers."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llava": llava.__version__,
    }


def read_metadata(answers_file: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metadata beside an answer file; None if there is none.

    Those of earlier versions can lie under another name, and are taken if they say that they belong to this file.

    Raises:
        UserError: the file is there but not of this kind, or it belongs to another answer file.
    """
    path = meta_path(answers_file)
    if path.exists():
        meta = _read(path)
        rival = _rival(meta, path, answers_file)
        if rival is None:
            return meta
        if meta_path(rival) == path:
            raise UserError(_taken(path, rival))
    former = former_meta_path(answers_file)
    if former == path or not former.exists():
        return None
    with contextlib.suppress(UserError):
        meta = _read(former)
        if (owner := _owner(meta, former)) is not None and owner.name == Path(answers_file).name:
            return meta
    return None


def _owner(meta: Mapping[str, Any], path: Path) -> Path | None:
    """The answer file that metadata at `path` say they belong to, in the same folder; None if it is not there."""
    arguments = meta.get("arguments")
    name = arguments.get("answers_file") if isinstance(arguments, dict) else None
    if not isinstance(name, str) or "\0" in name or not os.path.basename(name):
        return None
    owner = path.with_name(os.path.basename(name))
    return owner if owner.is_file() else None


def _rival(meta: Mapping[str, Any], path: Path, answers_file: str | os.PathLike[str]) -> Path | None:
    """Another answer file whose metadata those at `path` are, by the present names or the former ones."""
    owner = _owner(meta, path)
    if (
        owner is None
        or owner.name == Path(answers_file).name
        or path not in (meta_path(owner), former_meta_path(owner))
    ):
        return None  # a copy of a run says the name of the original
    return owner


def _taken(path: Path, rival: Path) -> str:
    return f"{path}: the metadata of {rival.name}, which is there as well; give another --answers-file"


def make_room(answers_file: str | os.PathLike[str]) -> None:
    """Sees to it that writing the metadata of `answers_file` costs no other run its own.

    Those that an earlier version has left under this name are moved to where they belong.

    Raises:
        UserError: they belong to another answer file that is there, or are no metadata at all.
    """
    path = meta_path(answers_file)
    if not path.exists() or not path.stat().st_size:
        return
    meta = _read(path)
    rival = _rival(meta, path, answers_file)
    if rival is None:
        return
    if meta_path(rival) == path:
        raise UserError(_taken(path, rival))
    if not meta_path(rival).exists():
        write_json(meta_path(rival), meta)


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path, "run metadata")
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("options"), dict):
        raise UserError(f"{path}: not the metadata of a run (format {FORMAT}); {_REMEDY}")
    try:
        return check(value, _SHAPE, str(path))
    except UserError as error:
        raise UserError(f"{error}; {_REMEDY}") from None


def identity(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for answers to belong to one run, under flat names."""
    checkpoint, questions = meta.get("checkpoint") or {}, meta.get("question_file") or {}
    return {
        "model": meta.get("model"),
        **(meta.get("options") or {}),
        "checkpoint fingerprint": checkpoint.get("fingerprint"),
        "sha256 of the question file": questions.get("sha256"),
        "dtype": meta.get("dtype"),
    }


class RunMetadata:
    """What is known about a run; `save` writes it. Counts and sums continue those of the run that is resumed.

    Attributes:
        values: the content of the file.
    """

    def __init__(self, answers_file: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
        self.path = meta_path(answers_file)
        self._answers_file = answers_file
        self.values = {"format": FORMAT, **values, "started": now(), "finished": None, "complete": False}
        self._earlier: dict[str, Any] = {}

    def continue_from(self, earlier: Mapping[str, Any] | None) -> None:
        """Takes over the times of an earlier part of the same run.

        Raises:
            UserError: it was a run of something else (names what).
        """
        if earlier is None:
            return
        # Without a model it is only known what was asked for; see `set_model`.
        pairs = [{**identity(meta), "dtype": None} for meta in (earlier, self.values)]
        self._refuse(first_difference(*pairs))
        self._refuse(requested_difference(earlier, self.values.get("arguments") or {}))
        self._earlier = dict(earlier)
        for name in ("dtype", "device", "versions", "mm_patch_merge_type", "started"):
            self.values[name] = earlier.get(name)

    def _refuse(self, difference: str | None) -> None:
        if difference is not None:
            raise UserError(f"{self.path}: the answers belong to another run ({difference}); {_REMEDY}")

    def set_model(self, device: str, dtype: str, merge_type: str | None = None) -> None:
        """What the answers are computed with. merge_type: how the crops of a tiled picture are put together.

        Raises:
            UserError: the answers that are there were computed in another precision.
        """
        if self._earlier.get("dtype"):
            self._refuse(first_difference({"dtype": self._earlier["dtype"]}, {"dtype": dtype}))
        self.values |= {"device": device, "dtype": dtype, "versions": package_versions()}
        self.values["mm_patch_merge_type"] = merge_type

    def save(
        self,
        counts: Mapping[str, int],
        totals: TokenTotals,
        seconds: float = 0.0,
        timed: int = 0,
        prefill_seconds: float = 0.0,
        finished: bool = False,
    ) -> None:
        """Writes the file.

        counts: total, answered, skipped, failed, of all questions; seconds, timed, prefill_seconds: wall-clock time,
        samples and prefill time of this process, which earlier ones add to.
        """
        seconds += self._earlier.get("seconds") or 0.0
        timing = self._earlier.get("timing") or {}
        timed += timing.get("samples", 0)
        prefill_seconds += timing.get("prefill_seconds", 0.0)
        self.values |= {
            "counts": dict(counts),
            "seconds": round(seconds, 3),
            "tokens": totals.means(),
            "flops_ratio": totals.flops_ratio(),
            "prefill_ms": round(1000 * prefill_seconds / timed, 3) if timed else None,
            "timing": {"samples": timed, "prefill_seconds": round(prefill_seconds, 6)},
            "finished": now() if finished else None,
            "complete": finished and counts["total"] == sum(counts[k] for k in ("answered", "skipped", "failed")),
        }
        make_room(self._answers_file)
        write_json(self.path, self.values)


def requested_difference(earlier: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """In what precision, kernel or quantization the flags `arguments` differ from an earlier run; None if in nothing.

    `auto` twice is no difference: what it means is known when the model is loaded.
    """
    before = earlier.get("arguments")
    before = before if isinstance(before, dict) else {}
    wanted, used = arguments.get("dtype", "auto"), earlier.get("dtype")
    if used and wanted != before.get("dtype", "auto"):
        found = default_dtype(arguments.get("device")) if wanted == "auto" else wanted
        if found != used:
            return f"dtype {used!r}, now {found!r}"
    kernels = [values.get("attn_implementation") or DEFAULT_KERNEL for values in (before, arguments)]
    if kernels[0] != kernels[1]:
        return f"attn_implementation {kernels[0]!r}, now {kernels[1]!r}"
    for flag in ("load_8bit", "load_4bit"):
        if bool(before.get(flag)) != bool(arguments.get(flag)):
            return f"{flag} {bool(before.get(flag))}, now {bool(arguments.get(flag))}"
    return None


def default_dtype(device: str | None) -> str:
    """What `--dtype auto` means on a device: half precision on an accelerator."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() or torch.backends.mps.is_available() else "cpu"
    return "float32" if device == "cpu" else "float16"


def describe_run(args: Any, model: str, options: Mapping[str, Any], questions: int) -> dict[str, Any]:
    """The metadata that is known before a model is loaded, from the tools' flags (an argparse namespace)."""
    return {
        "model": model,
        "checkpoint": {
            "path": args.model_path,
            "base": args.model_base,
            "fingerprint": checkpoint_fingerprint(args.model_path, args.model_base),
        },
        "method": options["method"],
        "options": dict(options),
        "arguments": dict(sorted(vars(args).items())),
        "versions": None,
        "device": None,
        "dtype": None,
        "mm_patch_merge_type": None,
        "git_revision": git_revision(),
        "question_file": {
            "path": str(args.question_file),
            "sha256": file_sha256(args.question_file),
            "questions": questions,
        },
    }
