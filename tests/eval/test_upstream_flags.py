"""Command lines as LLaVA's scripts and documentation have them: every flag is still taken, by every tool."""

import importlib
import re
import runpy

import pytest

from llava.eval.common.arguments import Parser
from llava.utils import UserError
from tests.eval.helpers import ROOT

_COMMON = "--model-path M --model-base B --image-folder I --question-file Q --answers-file A --conv-mode vicuna_v1"
_COMMON += " --num-chunks 2 --chunk-idx 1 --temperature 0"
_SAMPLING = "--top_p 0.9 --num_beams 1"
TOOLS = {
    "llava.eval.model_vqa": f"{_COMMON} {_SAMPLING}",
    "llava.eval.model_vqa_loader": f"{_COMMON} {_SAMPLING} --max_new_tokens 128 --visual-token-num 576",
    "llava.eval.model_vqa_science": f"{_COMMON} --answer-prompter --single-pred-prompt",
    "llava.eval.model_vqa_mmbench": f"{_COMMON} {_SAMPLING} --all-rounds --single-pred-prompt --lang cn",
    "llava.eval.eval_pope": "--annotation-dir D --question-file Q --result-file R",
    "llava.eval.eval_textvqa": "--annotation-file A --result-file R --result-dir D",
    "llava.eval.eval_science_qa": "--base-dir D --result-file R --output-file O --output-result S --split test",
    "llava.eval.eval_gqa": "--annotation-file A --result-file R",
    "llava.eval.eval_mme": "--annotation-dir D --question-file Q --result-file R",
    "llava.eval.eval_mmbench": "--annotation-file A --result-file R",
    "llava.eval.eval_mmvet": "--annotation-file A --result-file R",
    "llava.eval.summarize_gpt_review": "-d D -v V -s a b -f x y -i c",
    "scripts/convert_gqa_for_eval.py": "--src S --dst D",
    "scripts/convert_vqav2_for_submission.py": "--dir D --ckpt C --split S --src A --dst B",
    "scripts/convert_vizwiz_for_submission.py": "--annotation-file A --result-file R --result-upload-file U",
    "scripts/convert_mmbench_for_submission.py": "--annotation-file A --result-dir R --upload-dir U --experiment E",
    "scripts/convert_mmvet_for_eval.py": "--src S --dst D",
    "scripts/convert_seed_for_submission.py": "--annotation-file A --result-file R --result-upload-file U",
    "scripts/convert_sqa_to_llava.py": "convert_to_llava --base-dir D --split test --prompt-format CQM-A",
}


@pytest.mark.parametrize("name", TOOLS)
def test_every_flag_of_upstream_is_taken(name, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(self, argv=None, namespace=None):
        super(Parser, self).parse_args(argv, namespace)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    main = runpy.run_path(str(ROOT / name))["main"] if name.endswith(".py") else importlib.import_module(name).main
    with pytest.raises(Parsed):
        main(TOOLS[name].split())


# Defaults in LLaVA's own tools.
PUBLISHED = {
    "model_vqa_loader": {"--model-path": "facebook/opt-350m", "--conv-mode": "llava_v1", "--temperature": "0.2"},
    "model_vqa_science": {"--model-path": "facebook/opt-350m", "--conv-mode": "llava_v0", "--temperature": "0.2"},
    "run_llava": {"--model-path": "facebook/opt-350m", "--conv-mode": "None", "--temperature": "0.2", "--sep": ","},
    "eval_textvqa": dict.fromkeys(("--annotation-file", "--result-file", "--result-dir"), "None"),
}
_MORE = {"--model-base": "None", "--top_p": "None", "--num_beams": "1"}
_FILES = {"--image-folder": "", "--answers-file": "answer.jsonl", "--num-chunks": "1", "--chunk-idx": "0"}
PUBLISHED["model_vqa"] = {
    **PUBLISHED["model_vqa_loader"],
    **_MORE,
    **_FILES,
    "--question-file": "tables/question.jsonl",
}
PUBLISHED["model_vqa_mmbench"] = {**PUBLISHED["model_vqa_loader"], **_MORE, **_FILES, "--lang": "en"}
PUBLISHED["model_vqa_loader"] |= {
    **_MORE,
    **_FILES,
    "--max_new_tokens": "128",
    "--question-file": "tables/question.jsonl",
}
PUBLISHED["model_vqa_science"] |= {**_FILES, "--question-file": "tables/question.json", "--model-base": "None"}
PUBLISHED["run_llava"] |= {**_MORE, "--image-file": "required", "--query": "required", "--max_new_tokens": "512"}


def documented():
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- flags: begin -->\n(.*?)<!-- flags: end -->", text, re.S)[1]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {(tool, flag): (published, here) for tool, flag, published, here, _ in rows}


def default_of(tool, flag, monkeypatch):
    """What our tool takes where the flag is not given."""
    caught = []

    def parse_args(self, argv=None, namespace=None):
        caught.append(self)
        raise UserError

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_args)
        with pytest.raises(SystemExit):
            importlib.import_module(f"llava.eval.{tool}").main([])
    action = next((action for action in caught[0]._actions if flag in action.option_strings), None)
    if action is None:
        return "refused"
    return "required" if action.required else str(action.default)


@pytest.mark.parametrize("tool", sorted(PUBLISHED))
def test_the_table_of_differences_is_whole_and_right(tool, monkeypatch):
    told = {flag: values for (name, flag), values in documented().items() if name == tool}
    for flag, published in PUBLISHED[tool].items():
        here = default_of(tool, flag, monkeypatch)
        assert told.pop(flag, (published, published)) == (published, here), flag
    for flag, (_, here) in told.items():
        assert here == "refused" == default_of(tool, flag, monkeypatch), flag


def test_the_table_names_no_other_tools():
    assert {tool for tool, _ in documented()} <= set(PUBLISHED)
