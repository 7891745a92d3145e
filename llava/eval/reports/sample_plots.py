"""Pictures of single samples: which patches survive in which layer, and retention curves against mutual information.

Drawn from traces and images, by the demo. Needs matplotlib, which is an extra (`pip install matplotlib`).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.eval.answering.answerer import open_image
from llava.eval.common.questions import Question
from llava.eval.reports.plots import EASY, FAINT, HARD, INK, MUTED, pyplot, save
from llava.mm_utils import expand2square


@dataclass(frozen=True)
class Example:
    """One answered sample with its trace. benchmark: the set of questions (`name`, `image_folder`) it is from."""

    benchmark: Any
    question: Question
    answer: str
    trace: Any


def layers_to_show(num_layers: int, count: int = 5) -> list[int]:
    """`count` layers from the first to the last: the first two, where most is decided, then evenly spread."""
    if num_layers <= count:
        return list(range(num_layers))
    rest = np.linspace(1, num_layers - 1, count - 1).round().astype(int)
    return [0, *rest.tolist()]


def information(example: Example) -> float:
    """Bits of text-to-image mutual information in layer 1, summed over heads: what sets the slope."""
    return example.trace.mutual_information["layer1"]


def pick_examples(examples: Sequence[Example], quantiles: Sequence[float] = (0.05, 0.5, 0.95)) -> list[Example]:
    """Samples at these quantiles of mutual information, from different benchmarks as far as there are."""
    ranked = sorted(examples, key=information)
    chosen: list[Example] = []
    for quantile in quantiles:
        place = quantile * (len(ranked) - 1)
        used = {example.benchmark.name for example in chosen}
        by_distance = sorted(range(len(ranked)), key=lambda i: abs(i - place))
        near = by_distance[: max(1, len(ranked) // 10)]
        fresh = [i for i in near if ranked[i].benchmark.name not in used]
        chosen.append(ranked[(fresh or near)[0]])
    return chosen


def square_image(path: Path, name: str, config: Any, processor: Any) -> np.ndarray:
    """The picture as the vision tower's patches divide it: padded to a square, RGB, 0 to 1."""
    image = open_image(path, name)
    if getattr(config, "image_aspect_ratio", None) == "pad":
        image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
    side = config.vision_config.image_size
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def survivors_mask(kept: Any, grid: int) -> tuple[np.ndarray, int]:
    """Which patches `[grid, grid]` survive, and the number of merged tokens beside them."""
    indices = kept.numpy()
    mask = np.zeros(grid * grid, dtype=bool)
    mask[indices[indices >= 0]] = True
    return mask.reshape(grid, grid), int((indices < 0).sum())


def highlight(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Surviving patches as they are, the others gray and pale."""
    side = image.shape[0]
    cells = np.arange(side) * mask.shape[0] // side
    full = mask[np.ix_(cells, cells)][..., None]
    pale = 0.86 + 0.14 * image.mean(-1, keepdims=True).repeat(3, -1)
    return np.where(full, image, pale)


def plot_survivors(examples: Sequence[Example], config: Any, processor: Any, path: Path) -> bool:
    """One row per sample, one column per layer: the patches whose tokens leave that layer unmerged.

    Returns whether there was anything to draw: methods that measure no mutual information have no picture.
    """
    candidates = [e for e in examples if e.question.image is not None and e.trace.mutual_information is not None]
    if not candidates:
        return False
    plot = pyplot()
    chosen = pick_examples(candidates)
    layers = layers_to_show(len(chosen[0].trace.tokens_out))
    height = 2.75 * len(chosen) + 0.75
    figure, axes = plot.subplots(len(chosen), len(layers) + 1, figsize=(2.0 * (len(layers) + 1), height), squeeze=False)
    figure.subplots_adjust(left=0.012, right=0.988, top=1 - 1.4 / height, bottom=0.2 / height, wspace=0.06, hspace=0.42)
    target = chosen[0].trace.mean_tokens("nominal")
    title = f"Which patches survive ({target:.0f} tokens per layer on average)"
    figure.text(0.012, 1 - 0.3 / height, title, fontsize=13, color=INK)
    figure.text(
        0.012,
        1 - 0.55 / height,
        "In color: patches whose tokens leave the layer. Merged tokens have no place in the image; they are counted.",
        fontsize=8.5,
        color=MUTED,
    )
    kinds = ("hard", "typical", "easy")
    for row, example, kind in zip(axes, chosen, kinds, strict=True):
        image = square_image(example.benchmark.image_folder, example.question.images[0], config, processor)
        grid = math.isqrt(example.trace.visual_tokens)
        _show(row[0], image, f"{example.trace.visual_tokens} patches")
        kept = example.trace.kept
        for axis, layer in zip(row[1:], layers, strict=True):
            mask, merged = survivors_mask(kept[layer], grid)
            note = f"{mask.sum()} patches" + (f" + {merged} merged" if merged else "")
            _show(axis, highlight(image, mask), f"after layer {layer}\n{note}")
        question, answer = (_printable(text) for text in (example.question.text.split("\n")[0], example.answer))
        caption = (
            f"{example.benchmark.name}: “{textwrap.shorten(question, 88)}”  answer: {textwrap.shorten(answer, 24)}    "
            f"({kind}: MI {information(example):.2f} bits, slope {example.trace.slope:.2f})"
        )
        row[0].text(0, 1.27, caption, transform=row[0].transAxes, fontsize=9, color=INK)
    save(plot, figure, path)
    return True


def _printable(text: str) -> str:
    # An untrained model says control characters, for which no font has a glyph.
    return "".join(character if character.isprintable() else " " for character in text)


def _show(axis: Any, image: np.ndarray, title: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=7.5, color=INK, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(FAINT)


def plot_retention_curves(examples: Sequence[Example], target: int, path: Path) -> bool:
    """Visual tokens leaving each layer: the hardest and the easiest samples, and where all samples lie in MI.

    Returns whether there was anything to draw.
    """
    ranked = sorted((e for e in examples if e.trace.mutual_information is not None), key=information)
    if not ranked:
        return False
    plot = pyplot()
    figure, (curves, zoom, histogram) = plot.subplots(
        1, 3, figsize=(13, 4.2), gridspec_kw={"width_ratios": [1.25, 1.25, 1]}, layout="constrained"
    )
    few = max(1, min(5, len(ranked) // 2))
    for group, color in ((ranked[:few], HARD), (ranked[-few:], EASY)):
        for example in group:
            counts = [example.trace.visual_tokens, *example.trace.tokens_out]
            curves.plot(range(-1, len(counts) - 1), counts, color=color, alpha=0.75, linewidth=1.4)
            zoom.plot(range(1, len(counts) - 1), counts[2:], color=color, alpha=0.75, linewidth=1.4)
    num_layers = len(ranked[0].trace.tokens_out)
    curves.axhline(target, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    curves.text(num_layers - 1, target * 1.06, f"target {target}", fontsize=8, color=MUTED, ha="right")
    for group, color, name in ((ranked[:few], HARD, "hardest"), (ranked[-few:], EASY, "easiest")):
        low, high = information(group[0]), information(group[-1])
        slopes = sorted(e.trace.slope for e in group)
        label = f"{few} {name}: MI {low:.2f} to {high:.2f} bits, slope {slopes[0]:.2f} to {slopes[-1]:.2f}"
        curves.plot([], [], color=color, linewidth=2, label=label)
    curves.set_yscale("log")
    ticks = [t for t in (5, 10, 20, 40, 80, 160, 320, 576) if t <= ranked[0].trace.visual_tokens]
    curves.set_yticks(ticks, [str(t) for t in ticks])
    curves.minorticks_off()
    curves.set_ylim(bottom=0.75 * min(target, *(min(e.trace.tokens_out) for e in (*ranked[:few], *ranked[-few:]))))
    curves.set_xticks(range(-1, num_layers), ["in", *map(str, range(num_layers))])
    curves.set_xlabel("decoder layer", fontsize=9)
    curves.set_ylabel("visual tokens leaving the layer", fontsize=9)
    curves.set_title("Retention curves, easy and hard samples", fontsize=11, loc="left", color=INK)
    curves.legend(fontsize=8, frameon=False)
    zoom.set_xticks(range(1, num_layers))
    zoom.yaxis.get_major_locator().set_params(integer=True)
    zoom.set_xlabel("decoder layer", fontsize=9)
    zoom.set_title("From layer 1 on, linear scale", fontsize=11, loc="left", color=INK)

    values = [information(example) for example in ranked]
    bins = np.linspace(min(values), max(values) + 1e-9, 31)
    histogram.hist(values, bins=bins, color="#bbbbbb")
    for group, color in ((ranked[:few], HARD), (ranked[-few:], EASY)):
        for example in group:
            histogram.axvline(information(example), ymax=0.06, color=color, linewidth=1.5)
    histogram.set_xlabel("mutual information in layer 1, bits", fontsize=9)
    histogram.set_ylabel("samples", fontsize=9)
    histogram.set_title(f"All {len(values)} samples", fontsize=11, loc="left", color=INK)
    for axis in (curves, zoom, histogram):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save(plot, figure, path)
    return True
