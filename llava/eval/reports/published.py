"""Published figures, to stand beside measured ones: the AutoPrune paper's rows and those of other methods.

Metric conventions are those of the columns in `paper_tables`: MME
of LLaVA-1.5-7B is perception + cognition, of the others perception alone; POPE is F1; ScienceQA is over problems with
an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

PAPER = "AutoPrune paper (arXiv 2509.23931)"
REPOSITORY = "AutoPrune repository"
COLLECTED = "AgilePruner's tables (arXiv 2603.01236)"


@dataclass(frozen=True)
class Published:
    """One published row. scores: column key -> figure; retained and flops in percent, None where not given."""

    checkpoint: str
    method: str
    tokens: int | None
    scores: Mapping[str, float] = field(default_factory=dict)
    retained: float | None = None
    flops: float | None = None
    source: str = PAPER


def _rows(checkpoint: str, columns: str, lines: str, source: str = PAPER) -> Iterator[Published]:
    """One row a line: method, tokens (- for dense), retained (- if none), FLOPs (- if none), then the columns."""
    for line in lines.strip().splitlines():
        method, tokens, retained, flops, *values = line.split()
        scores = {key: float(v) for key, v in zip(columns.split(), values, strict=True) if v != "-"}
        yield Published(
            checkpoint,
            method,
            None if tokens == "-" else int(tokens),
            scores,
            None if retained == "-" else float(retained),
            None if flops == "-" else float(flops),
            source,
        )


_7B = "mme_total mmbench sqa gqa textvqa"
_REPOSITORY_7B = "mme_perception mmbench sqa gqa textvqa pope mmbench_cn"
_13B = "vqav2 gqa textvqa pope mme_perception"
_OTHERS_7B = "vqav2 gqa vizwiz sqa textvqa pope mme_total mmbench mmbench_cn"
_OTHERS = "vqav2 gqa vizwiz sqa textvqa pope mme_perception mmbench mmbench_cn"

ROWS: tuple[Published, ...] = (
    *_rows(
        "llava-v1.5-7b",
        _7B,
        """
        dense     -    100   100   1862  64.7  69.5  61.9  58.2
        autoprune 192  99.0  42.9  1832  64.9  69.6  60.4  57.7
        autoprune 128  98.1  33.7  1785  64.3  69.7  59.9  57.4
        autoprune 64   96.7  23.2  1745  63.6  69.6  57.7  57.1
        """,
    ),
    *_rows(
        "llava-v1.5-7b",
        _REPOSITORY_7B,
        """
        dense     -    -  -  1511  64.7  69.5  61.9  58.2  85.9  58.3
        autoprune 128  -  -  1458  64.3  69.6  59.9  57.7  85.2  58.3
        autoprune 64   -  -  1445  63.6  69.6  57.7  57.1  82.5  57.1
        """,
        REPOSITORY,
    ),
    *_rows(
        "llava-v1.5-13b",
        _13B,
        """
        dense     -    100   -  80.0  63.3  61.2  86.0  1531
        autoprune 288  99.8  -  79.8  63.0  60.9  86.1  1530
        autoprune 144  98.7  -  79.0  61.5  60.2  86.7  1506
        autoprune 58   95.8  -  77.2  58.5  59.0  83.6  1478
        """,
    ),
    *_rows(
        "llava-v1.6-vicuna-7b",
        _13B,
        """
        dense     -    100   -  81.2  62.9  59.6  86.3  1513.8
        autoprune 640  99.7  -  80.5  62.6  59.6  86.7  1515.7
        autoprune 320  98.2  -  78.9  61.3  59.5  85.6  1471.6
        autoprune 160  94.9  -  76.4  59.4  57.2  81.4  1457.0
        """,
    ),
    *_rows(
        "llava-v1.5-7b",
        _OTHERS_7B,
        """
        dense     -    -      -  78.5  61.9  50.1  69.5  58.2  85.9  1862  64.7  58.1
        fastv     128  92.31  -  71.0  54.0  51.9  69.2  56.4  68.2  1490  63.0  55.9
        fastv     64   76.86  -  55.9  46.0  49.1  70.1  51.6  35.5  1256  50.1  42.1
        pdrop     128  95.17  -  74.3  57.1  49.4  70.1  56.7  77.5  1696  62.3  55.3
        pdrop     64   76.41  -  56.3  46.1  46.3  68.8  49.2  40.8  1505  48.0  36.6
        sparsevlm 128  96.61  -  75.1  57.3  49.7  69.0  56.3  83.1  1761  62.6  56.9
        sparsevlm 64   88.60  -  66.9  52.0  49.4  69.2  52.1  69.7  1561  58.3  49.6
        prumerge+ 128  95.64  -  75.0  58.2  53.7  69.1  54.0  83.1  1554  61.8  55.8
        prumerge+ 64   92.76  -  71.3  55.4  53.7  69.5  52.0  75.7  1640  59.6  52.1
        visionzip 128  97.19  -  75.6  57.6  51.6  68.7  56.9  83.3  1763  62.1  57.0
        visionzip 64   94.46  -  72.4  55.1  52.9  68.7  55.5  77.0  1690  60.1  55.4
        vispruner 128  98.01  -  75.8  58.2  52.7  69.0  57.0  84.6  1768  62.7  57.3
        vispruner 64   95.07  -  72.7  55.4  53.3  69.1  55.8  80.4  1650  61.3  55.1
        divprune  128  97.25  -  76.0  59.4  52.8  68.6  54.5  85.5  1707  60.1  52.3
        divprune  64   95.02  -  74.1  57.5  53.6  68.0  54.5  85.5  1615  60.1  52.3
        """,
        COLLECTED,
    ),
    *_rows(
        "llava-v1.5-13b",
        _OTHERS,
        """
        dense     -    -     -  80.0  63.3  53.6  72.8  61.2  86.0  1531  68.5  63.5
        fastv     128  96.0  -  75.3  58.3  54.6  74.2  58.6  75.5  1460  66.1  62.3
        fastv     64   85.8  -  65.3  51.9  53.8  73.1  53.4  56.9  1246  59.2  55.1
        pdrop     128  98.4  -  78.2  61.0  53.8  73.3  60.2  83.6  1489  67.5  62.8
        pdrop     64   88.7  -  70.8  54.1  50.5  73.1  55.3  66.1  1247  63.1  56.6
        sparsevlm 128  97.8  -  77.6  59.6  51.4  74.3  59.3  85.0  1488  68.4  62.6
        sparsevlm 64   93.5  -  73.2  55.9  52.1  73.0  57.1  77.9  1374  65.2  60.3
        prumerge+ 128  95.8  -  76.2  58.3  52.8  73.3  56.1  82.7  1446  66.3  61.2
        prumerge+ 64   92.3  -  72.6  56.3  52.4  73.5  54.4  75.7  1338  65.0  59.3
        visionzip 128  96.7  -  76.8  57.9  52.3  73.8  58.9  82.7  1450  67.4  62.5
        visionzip 64   93.9  -  73.7  56.2  53.2  74.2  57.4  75.7  1380  64.9  61.3
        divprune  128  97.0  -  77.1  59.2  53.5  72.8  58.0  86.8  1458  66.3  60.7
        divprune  64   95.6  -  75.2  57.9  54.4  71.7  57.4  84.5  1454  64.1  59.8
        """,
        COLLECTED,
    ),
    *_rows(
        "llava-v1.6-vicuna-7b",
        _OTHERS,
        """
        dense     -    -     -  81.3  62.5  55.2  67.5  60.3  86.8  1512  65.8  57.3
        fastv     640  95.2  -  77.0  58.9  53.9  67.4  58.1  79.5  1412  63.1  53.5
        fastv     320  79.9  -  61.5  49.8  51.3  66.6  52.2  49.5  1099  53.4  42.5
        pdrop     640  97.0  -  79.1  60.0  53.8  66.7  57.8  83.8  1475  64.1  55.2
        pdrop     320  82.5  -  66.8  50.4  49.7  66.7  49.0  60.8  1171  55.5  44.7
        sparsevlm 640  98.8  -  79.2  61.2  53.6  67.6  59.7  85.3  1456  65.9  58.6
        sparsevlm 320  94.6  -  74.6  57.9  54.2  67.2  56.5  76.9  1386  63.1  56.7
        prumerge+ 640  98.3  -  78.2  60.8  57.9  67.8  54.9  85.3  1480  64.6  57.3
        prumerge+ 320  95.7  -  75.3  58.8  57.7  68.1  54.0  79.5  1444  63.0  55.6
        visionzip 640  99.8  -  79.1  61.2  57.1  68.1  59.9  86.0  1493  65.8  58.1
        visionzip 320  96.4  -  76.2  58.9  56.2  67.5  58.8  82.3  1397  63.3  55.6
        divprune  640  98.9  -  79.3  61.9  55.7  67.8  57.0  86.9  1469  65.8  57.3
        divprune  320  97.0  -  77.2  61.1  55.6  67.7  56.2  84.7  1423  63.9  55.7
        """,
        COLLECTED,
    ),
)

# Names that a method has elsewhere.
_ALIASES = {"pyramiddrop": "pdrop", "prumerge": "prumerge+", "prumerge_plus": "prumerge+"}


def published_rows(checkpoint: str, method: str, tokens: float | None) -> list[Published]:
    """The rows published for a checkpoint (by the name of its folder), a method and a budget; most have none."""
    wanted = _ALIASES.get(method, method)
    tokens = None if method == "dense" else tokens
    return [row for row in ROWS if (row.checkpoint, row.method, row.tokens) == (checkpoint, wanted, tokens)]
