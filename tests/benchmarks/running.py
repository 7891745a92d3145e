"""Running the benchmarks on the smallest geometry, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.geometry import geometry, random_decoder

CPU = torch.device("cpu")


def tiny_decoder() -> Any:
    return random_decoder(geometry("tiny"), CPU, torch.float32, "sdpa")


def arguments(*flags: Any) -> list[str]:
    """Few rounds, on the CPU; later flags count."""
    tiny = ["--geometry", "tiny", "--rounds", 2, "--warmup", 0, "--device", "cpu"]
    return [str(flag) for flag in (*tiny, *flags)]


def printed(capsys: Any, main: Callable[[list[str]], Any], *flags: Any) -> dict[str, Any]:
    """The object in the last line of a benchmark with these flags."""
    capsys.readouterr()
    main([str(flag) for flag in flags])
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result
