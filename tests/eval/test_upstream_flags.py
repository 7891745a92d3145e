"""Command lines as LLaVA's scripts and documentation have them: every flag is still taken, by every tool."""

import importlib
import runpy

import pytest

from llava.eval.common.arguments import Parser
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
