"""Peer methods one number at a time, in float64: written from their descriptions, not from the code under test.

Every function takes plain tensors of one crop or one sample and returns lists. Ties go to the lower index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ranked(scores, among=None) -> list[int]:
    """Indices by falling score."""
    among = range(len(scores)) if among is None else among
    return sorted(among, key=lambda i: (-float(scores[i]), i))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def visionzip(tokens: Tensor, cls: Tensor, keys: Tensor, dominant: int, contextual: int):
    """Kept patches, and the contextual tokens."""
    kept = sorted(ranked(cls)[:dominant])
    rest = [i for i in range(len(tokens)) if i not in kept]
    step = max(1, len(rest) // max(contextual, 1))
    targets = rest[::step][:contextual]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            groups[max(targets, key=lambda t: (cosine(keys[i], keys[t]), -t))].append(i)
    merged = []
    for target in targets:
        token = tokens[target].double().clone()
        if groups[target]:
            token += sum(tokens[i].double() for i in groups[target]) / len(groups[target])
        merged.append(token)
    return kept, merged


def prumerge_plus(tokens: Tensor, cls: Tensor, keys: Tensor, target: int, neighbors: int, spacing: str = "stride"):
    """Kept patches (important ones first come from the outliers), their merged features, and the token of the rest."""
    count = len(tokens)
    values = sorted(cls.double().tolist())

    def quantile(q: float) -> float:
        place = q * (count - 1)
        low = math.floor(place)
        high = min(low + 1, count - 1)
        return values[low] + (place - low) * (values[high] - values[low])

    limit = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
    wanted = target - 1 if target > 1 else 1
    outliers = [i for i in ranked(cls) if float(cls[i]) > limit]
    important = outliers[:wanted]
    rest = [i for i in range(count) if i not in important]
    fill = wanted - len(important)
    if spacing == "stride":
        strides = {s: [i for i in range(0, count - 1, s) if i in rest] for s in range(1, count + 1)}
        own = max(int(int(1 / (len(outliers) / count)) / 3), 1) if outliers else count
        if len(strides[own]) != fill:
            own = max(s for s in strides if len(strides[s]) >= fill)
        rest = strides[own]
    spaced = [i for j, i in enumerate(rest) if (j + 1) * fill // len(rest) > j * fill // len(rest)]
    kept = sorted(important + spaced)
    merged = []
    for i in kept:
        nearest = sorted((j for j in range(count) if j != i), key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbors]
        merged.append(tokens[i].double() + sum(float(cls[j]) * tokens[j].double() for j in nearest))
    dropped = [i for i in range(count) if i not in kept]
    extra = sum((float(cls[i]) * tokens[i].double() for i in dropped), torch.zeros(tokens.shape[1]).double())
    return kept, merged, extra


def hiprune(middle: Tensor, deep: Tensor, width: int, target: int, alpha: float) -> list[int]:
    anchors = ranked(middle)[: round(target * alpha / 5)]
    chosen = list(anchors)
    last = len(middle) - 1
    around = {min(max(a + step, 0), last) for a in anchors for step in (1, -1, width, -width)} - set(anchors)
    chosen += ranked(deep, sorted(around))
    chosen += ranked(deep, [i for i in range(len(deep)) if i not in chosen])
    return sorted(chosen[:target])


def vispruner(tokens: Tensor, cls: Tensor, target: int, ratio: float) -> list[int]:
    order = ranked(cls)
    important, left = order[: int(target * ratio)], order[int(target * ratio) :]
    wanted = target - len(important)
    while wanted and len(left) > wanted:
        first, second = left[::2], left[1::2]
        likeness = [max(cosine(tokens[i], tokens[j]) for j in second) for i in first]
        best = sorted(range(len(first)), key=lambda place: (-likeness[place], place))
        left = [first[place] for place in best[min(8, len(left) - wanted) :]] + second
    return sorted(important + (left if wanted else []))


def scope(tokens: Tensor, cls: Tensor, target: int, alpha: float) -> list[int]:
    count, chosen = len(tokens), []
    covered = [0.0] * count
    while len(chosen) < target:
        gains = {}
        for i in set(range(count)) - set(chosen):
            added = (max(cosine(tokens[i], tokens[j]) - covered[j], 0) for j in range(count) if j not in chosen)
            gains[i] = sum(added) * float(cls[i]) ** alpha
        best = max(sorted(gains), key=lambda i: gains[i])
        chosen.append(best)
        covered = [max(old, cosine(tokens[best], tokens[j])) for j, old in enumerate(covered)]
    return sorted(chosen)


def cdpruner(tokens: Tensor, relevance: list[float], target: int, low: float, high: float) -> list[int]:
    """By volumes: always the patch with which the determinant of the chosen ones' kernel grows most."""
    weights = [(value - low + 1e-6) / (high - low) for value in relevance]
    unit = tokens.double() / tokens.double().norm(dim=1, keepdim=True)
    kernel = torch.tensor(weights).double()[:, None] * (unit @ unit.T) * torch.tensor(weights).double()
    chosen: list[int] = []
    while len(chosen) < target:
        volumes = {
            i: float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]])[1])
            for i in range(len(tokens))
            if i not in chosen
        }
        chosen.append(max(volumes, key=lambda i: (volumes[i], -i)))
    return sorted(chosen)


def flowcut(cls: Tensor, semantic: Tensor, values: Tensor, before: list[float] | None, target: int, left: int):
    """New scores of the patches of one picture, and how many go after a layer with ``left`` layers behind it."""
    count = len(cls)
    shares = [float(value) / float(cls.sum()) for value in cls]
    likeness = [float(value) / float(semantic.sum()) for value in semantic]
    score = [(a + b) * float(v.double().abs().sum()) for a, b, v in zip(shares, likeness, values, strict=True)]
    if before is not None:
        score = [(old + new) / 2 for old, new in zip(before, score, strict=True)]
    if left <= 0:
        return score, count - target
    entropy = -sum(share * math.log(share) for share in shares)
    drop = round((count - target) / math.sqrt(left) * (1 - (entropy / math.log(count)) ** 2))
    return score, 0 if left % 2 else min(drop, count - target)


def vscan(tokens, local, cls, grid, target, window, share, fill) -> tuple[list[int], Tensor]:
    """Of one whole crop of grid x grid patches: the kept ones, and their means with those that are merged into them."""
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(len(tokens)):
        windows.setdefault((i // grid // window, i % grid // window), []).append(i)
    wanted = int(target * share)
    each = wanted // len(windows)
    chosen = [i for part in windows.values() for i in ranked(local, part)[:each]]
    count = target if fill else max(each * len(windows) + target - wanted, 1)
    kept = sorted(chosen + [i for i in ranked(cls) if i not in chosen][: count - len(chosen)])
    groups = {i: [tokens[i].double()] for i in kept}
    for i in set(range(len(tokens))) - set(kept):
        groups[max(kept, key=lambda k: (cosine(tokens[i], tokens[k]), -k))].append(tokens[i].double())
    return kept, torch.stack([sum(groups[i]) / len(groups[i]) for i in kept])


def zooprune(tokens: Tensor, project, directions: Tensor, step: float, target: int) -> list[int]:
    raw = []
    for token in tokens.double():
        moves = [step * direction / direction.norm() for direction in directions.double()]
        raw.append(
            sum(float((project(token + m) - project(token - m)).norm()) for m in moves) / (2 * step * len(moves))
        )
    weights = [(value - min(raw)) / (max(raw) - min(raw)) for value in raw]
    projected = [project(token) for token in tokens.double()]
    chosen = [max(range(len(tokens)), key=lambda i: (weights[i], -i))]
    while len(chosen) < target:
        rest = [i for i in range(len(tokens)) if i not in chosen]
        gains = {i: weights[i] * min(1 - cosine(projected[i], projected[j]) for j in chosen) for i in rest}
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return sorted(chosen)


def gtp_scores(weights: Tensor) -> list[float]:
    """Of the patches, from the attention map ``[H, T, T]`` of one picture."""
    own = [max(float(head[i, i]) for head in weights) for i in range(1, weights.shape[1])]
    received = [max(float(head[:, i].double().sum()) for head in weights) for i in range(1, weights.shape[1])]
    return [a * b for a, b in zip(own, received, strict=True)]


def gtp_graph(patches: Tensor, neighbors: int) -> list[list[float]]:
    count = len(patches)
    width = math.isqrt(count)
    linked = []
    for i in range(count):
        around = {j for j in range(count) if max(abs(i // width - j // width), abs(i % width - j % width)) == 1}
        likeness = [-1.0 if i == j else cosine(patches[i], patches[j]) for j in range(count)]
        linked.append(around | set(ranked(likeness)[:neighbors]))
    return [
        [1 / math.sqrt(len(linked[i]) * len(linked[j])) if j in linked[i] else 0.0 for j in range(count)]
        for i in range(count)
    ]


def mmtok(
    tokens: Tensor, projected: Tensor, text: Tensor, target: int, weight: float, temperatures: tuple[float, float]
) -> list[int]:
    def shares(token: Tensor, patches: Tensor, temperature: float) -> list[float]:
        powers = [math.exp(cosine(token, patch) / temperature) for patch in patches]
        return [power / sum(powers) for power in powers]

    things = [[share / len(text) for share in shares(word, projected, temperatures[0])] for word in text]
    things += [[weight * s / len(tokens) for s in shares(token, tokens, temperatures[1])] for token in tokens]
    chosen: list[int] = []
    while len(chosen) < target:
        gains = {
            i: sum(max(thing[i] - max((thing[j] for j in chosen), default=0.0), 0.0) for thing in things)
            for i in range(len(tokens))
            if i not in chosen
        }
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return sorted(chosen)


def holov(tokens: Tensor, cls: Tensor, target: int, chunks: int, alpha: float) -> list[int]:
    count = len(tokens)
    parts, start = [], 0
    for chunk in range(min(chunks, count)):
        size = count // min(chunks, count) + (chunk < count % min(chunks, count))
        parts.append(list(range(start, start + size)))
        start += size
    scores = []
    for part in parts:
        if len(part) == 1:
            scores.append(float(cls[part[0]]))
            continue
        variances = []
        for i in part:
            likeness = [0.0 if i == j else cosine(tokens[i], tokens[j]) for j in part]
            mean = sum(likeness) / (len(part) - 1)
            variances.append(sum((value - mean) ** 2 for value in likeness) / (len(part) - 1))
        attention = [1000 * float(cls[i]) for i in part]
        scale = (sum(attention) / len(part)) / (sum(variances) / len(part) + 1e-6)
        scores.append(sum(a + alpha * v * scale for a, v in zip(attention, variances, strict=True)) / len(part))
    quotas = [math.floor(target * score / sum(scores)) for score in scores]
    for chunk in ranked(scores)[: target - sum(quotas)]:
        quotas[chunk] += 1
    chosen = [i for part, quota in zip(parts, quotas, strict=True) for i in ranked(cls, part)[:quota]]
    chosen += [i for i in ranked(cls) if i not in chosen][: target - len(chosen)]
    return sorted(chosen)


def dart(keys: Tensor, states: Tensor, first: int, count: int, keep: int, visual: int, text: int) -> list[int]:
    """``keys`` [heads, tokens, D] and normed ``states`` [tokens, C] of a prompt with one image, text behind it."""
    norms = keys.double().abs().sum((0, 2))
    pivots = ranked(norms, range(first, first + count))[: min(visual, keep)]
    chosen = list(pivots)
    walked = list(set(pivots + ranked(norms, range(first + count, len(norms)))[:text]))
    for place, pivot in enumerate(walked):
        total = keep - min(visual, keep)
        quota = total // len(walked) + (place < total % len(walked))
        left = [i for i in range(first, first + count) if i not in chosen]
        chosen += sorted(left, key=lambda i: (cosine(states[i], states[pivot]), i))[:quota]
    return sorted(i - first for i in chosen)


def tome_step(tokens: list[Tensor], keys: list[Tensor], sizes: list[float], places: list[int], count: int, cls: bool):
    """One bipartite merge; lists of tokens, keys, sizes and places of what is left, even ones first."""
    evens, odds = range(0, len(tokens), 2), range(1, len(tokens), 2)
    links = {}
    for i in evens:
        if not (cls and i == 0):
            links[i] = max(odds, key=lambda j: (cosine(keys[i], keys[j]), -j))
    strongest = sorted(links, key=lambda i: (-cosine(keys[i], keys[links[i]]), i))[:count]
    staying = [i for i in evens if i not in strongest]
    groups = [[i] for i in staying] + [[j, *(i for i in strongest if links[i] == j)] for j in odds]

    def mean(values, group):
        return sum(sizes[i] * values[i].double() for i in group) / sum(sizes[i] for i in group)

    return (
        [mean(tokens, group) for group in groups],
        [mean(keys, group) for group in groups],
        [sum(sizes[i] for i in group) for group in groups],
        [places[group[0]] for group in groups],
    )


def tome_schedule(patches: int, target: int, layers: int) -> list[int]:
    """Tokens left after each layer: the same number merged everywhere, as few as possible."""
    for each in range(patches + 1):
        left, counts = patches, []
        for _ in range(layers):
            left = max(left - min(each, left // 2), target) if left > target else left
            counts.append(left)
        if left <= target or each == patches:
            return counts
    return []


def raters(visual: Tensor, text: Tensor) -> list[bool]:
    received = [0.0] * len(text)
    for v in visual.double():
        logits = [float(v @ t) for t in text.double()]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        for j, weight in enumerate(weights):
            received[j] += weight / sum(weights) / len(visual)
    average = sum(received) / len(received)
    chosen = [value > average for value in received]
    return chosen if any(chosen) else [True] * len(text)


def head_entropy(states: Tensor) -> float:
    """Of one token's ``[heads, width]``: entropy of its Gram matrix, heads centered, by its characteristic roots."""
    heads = len(states)
    rows = [row.double() - states.double().mean(0) for row in states]
    gram = torch.tensor([[float(a @ b) / heads for b in rows] for a in rows], dtype=torch.float64)
    roots = [max(float(root.real), 1e-10) for root in torch.linalg.eigvals(gram)]
    return -sum(root * math.log(root) for root in roots) / math.log(heads)


def transition(before: Tensor, after: Tensor) -> list[float]:
    """Of the tokens of one prompt: change of length times the share of ``exp(1 - cosine)``."""
    weights = [math.exp(1 - cosine(a, b)) for a, b in zip(before, after, strict=True)]
    pairs = zip(before.double(), after.double(), weights, strict=True)
    return [float(b.norm() / a.norm()) * weight / sum(weights) for a, b, weight in pairs]


def text_guided_score(text: Tensor, attention: Tensor, smoothing: float) -> list[float]:
    """Of one prompt: ``[H, T, T]`` and ``[H, T, V]``; the importance of a text token times what it attends to."""
    heads, rows = range(len(text)), range(text.shape[1])
    text = text.double()
    both = [[[float(a[i, j] + a[j, i]) if i != j else float(a[i, i]) for j in rows] for i in rows] for a in text]
    mean = sum(both[h][i][j] for h in heads for i in rows for j in rows) / (len(heads) * len(rows) ** 2)
    scores = []
    for v in range(attention.shape[2]):
        score = 0.0
        for h in heads:
            for j in rows:
                importance = sum(smoothing * both[h][i][j] + (1 - smoothing) * mean for i in rows)
                score += importance * float(attention[h, j, v])
        scores.append(score)
    return scores


def rotary_corrected(
    attention: Tensor, raters: list[int], text: list[int], visual: list[int], heads: int
) -> list[float]:
    """Of one prompt ``[H, T, V]``, with the positions of its tokens and rotary embedding in base 10,000, 16 wide."""

    def bias(m: int, n: int) -> float:
        return 2 * sum(math.cos((m - n) / 10000 ** (i / 8)) for i in range(8)) / 4

    corrected = [
        [
            [float(row[v]) / bias(text[t], at) for v, at in enumerate(visual)]
            for t, row in enumerate(head)
            if t in raters
        ]
        for head in attention.double()
    ]
    best = ranked([sum(map(sum, head)) for head in corrected])[:heads]
    total = len(best) * len(raters)
    return [sum(row[v] for head in best for row in corrected[head]) / total for v in range(len(visual))]


def agilepruner(tokens: Tensor, cls: Tensor, target: int, step: float, most: float, average: float | None) -> list[int]:
    complexity = 1.0
    if average is not None:
        values = torch.linalg.svdvals(tokens.double())
        shares = [float(value / values.sum()) for value in values]
        complexity = math.exp(-sum(share * math.log(share) for share in shares if share > 0)) / average
    order, kept, gone = ranked(cls), [], set()
    for place, i in enumerate(order):
        if i in gone or len(kept) == target:
            continue
        kept.append(i)
        near = min((place + 1) * step * complexity, most)
        gone |= {j for j in order if j not in kept and 1 - cosine(tokens[i], tokens[j]) < near}
    return sorted(kept + [i for i in order if i not in kept][: target - len(kept)])


def todre(tokens: Tensor, target: int) -> list[int]:
    everyone = range(len(tokens))
    chosen = [min(everyone, key=lambda i: sum(cosine(tokens[i], tokens[j]) for j in everyone))]
    while len(chosen) < target:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(min(rest, key=lambda i: sum(cosine(tokens[i], tokens[j]) for j in chosen)))
    return chosen


def vflowopt(tokens: Tensor, importance: Tensor, width: int, target: int, side: float):
    """Of one whole crop: the places that leave, and what stands there."""
    order = ranked(importance)
    while (int((width - 1) // side) + 1) ** 2 > target:
        side *= 1.25
    cells = (int((width - 1) // side) + 1) ** 2
    kept, dropped = order[: target - cells], order[target - cells :]
    groups: dict[tuple[int, int], list[int]] = {}
    for i in dropped:
        groups.setdefault((int(i // width // side), int(i % width // side)), []).append(i)
    features = {i: tokens[i].double() for i in kept}
    for group in groups.values():
        weights = [float(importance[i]) for i in group]
        weights = weights if sum(weights) else [1.0] * len(group)
        mean = sum(w * tokens[i].double() for w, i in zip(weights, group, strict=True)) / sum(weights)
        features[group[0]] = mean
    for i in dropped:  # cells of which nothing was dropped leave their places
        if len(features) < target and i not in features:
            features[i] = tokens[i].double()
    places = sorted(features)
    return places, torch.stack([features[i] for i in places])
