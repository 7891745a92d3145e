"""FLOPs by formula: a decoder by hand, the estimate of prompt lengths, the published percentages."""

import pytest

from llava.eval import flops as flops_tool
from llava.eval.reports import flops
from llava.eval.reports.flops import GEOMETRIES, Geometry
from llava.pruning import retention_schedule
from tests.eval.helpers import SHARED, fails_with_one_line, needs_shared, read_json, write_jsonl


def test_estimate_counts_pieces():
    assert flops.estimate_tokens("Is it red?") == 4
    assert flops.estimate_tokens("Extraordinarily big.") == 2 + 1 + 1
    assert flops.estimate_tokens("2014\nSTOP, McDonald") == 4 + 1 + 2 + 1 + 3
    assert flops.estimate_tokens("") == 0
    # 36 tokens of this sentence are known: it is LLaVA's system prompt with the role behind it, and one for the start.
    known = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: "
    )
    assert abs(1 + flops.estimate_tokens(known) - 35) <= 2


def test_relative_flops_by_hand():
    """Two layers, 10 visual and 5 text tokens: the second layer computes on what the first leaves."""
    geometry = Geometry(2, 8, 16, 10)
    leaving = retention_schedule(2, 10, 4, 0.2)

    def layer(n):
        return 4 * n * 64 + 2 * n * n * 8 + 3 * n * 8 * 16

    dense = 2 * layer(15)
    expected = 100 * (layer(15) + layer(5 + leaving[0])) / dense
    assert flops.relative_flops(geometry, 5, 4) == pytest.approx(expected)
    nominal = 100 * sum(layer(5 + count) for count in leaving) / dense
    assert flops.relative_flops(geometry, 5, 4, counting="nominal") == pytest.approx(nominal)


@pytest.mark.parametrize(("budget", "published"), [(192, 42.9), (128, 33.7), (64, 23.2)])
def test_published_percentages_need_a_prompt_of_usual_length(budget, published):
    """With processed counts 71 to 78 text tokens give the paper's figures; one length for all three misses by < 0.6."""
    geometry = GEOMETRIES["llava-v1.5-7b"]
    tokens = flops.matching_prompt(geometry, budget, published)
    assert 70 < tokens < 79
    assert flops.relative_flops(geometry, tokens, budget) == pytest.approx(published, abs=1e-6)
    assert flops.relative_flops(geometry, 74, budget) == pytest.approx(published, abs=0.6)


@needs_shared
def test_real_question_files(tmp_path, capsys):
    names = ("textvqa/llava_textvqa_val_v051_ocr.jsonl", "pope/llava_pope_test.jsonl", "MME/llava_mme.jsonl")
    out = tmp_path / "f.json"
    flops_tool.main(["--question-files", *(str(SHARED / name) for name in names), "--json", str(out)])
    assert "| 64 | " in capsys.readouterr().out
    for row in read_json(out)["rows"]:
        prompts = row["prompts"]
        assert 55 < prompts["pope"]["text_tokens"] < prompts["MME"]["text_tokens"] < prompts["textvqa"]["text_tokens"]
        assert prompts["mean"]["processed"] == pytest.approx(row["published"], abs=0.7)
        assert prompts["mean"]["nominal"] < row["published"] - 2


def test_command_line(tmp_path, capsys):
    path = write_jsonl(tmp_path / "mini" / "q.jsonl", [{"question_id": 1, "image": "a.jpg", "text": "Is it red?"}])
    flops_tool.main(["--question-files", str(path), "--text-tokens", "71", "--budgets", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert "| tokens | given, 71 text tokens | mini, 45 text tokens | published |" in lines[0]
    assert lines[2].startswith("| 64 | 23.2% (20.5%) |") and lines[2].endswith("| 23.2% | 71 (95) |")
    for argv, part in (
        ([], "--question-files"),
        (["--text-tokens", "x"], "--text-tokens"),
        (["--text-tokens", "9", "--budgets", "577"], "--budgets"),
        (["--question-files", tmp_path / "none"], "none"),
    ):
        fails_with_one_line(flops_tool.main, argv, capsys, part)
