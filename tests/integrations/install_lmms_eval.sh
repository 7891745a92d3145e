#!/usr/bin/env bash
# An environment with lmms-eval for test_lmms_eval.py: bash tests/integrations/install_lmms_eval.sh FOLDER
# Afterwards: LMMS_EVAL_PYTHON=FOLDER/bin/python bash scripts/test.sh tests/integrations
#
# lmms-eval itself comes without its requirements: what its judges, trackers and unused models need (wandb, sentence
# transformers, ...) is left out, and so is torchvision, whose builds must fit that of torch.
set -euo pipefail

folder="${1:?usage: bash $0 FOLDER}"
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
install() { "$folder/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$@"; }
install torch
install transformers accelerate psutil sentencepiece protobuf safetensors pillow numpy tqdm shortuuid
install datasets evaluate httpx jsonlines aiohttp numexpr pytablewriter sacrebleu loguru tenacity tiktoken pydantic \
    python-dotenv sympy latex2sympy2 Jinja2 zstandard einops scikit-learn packaging openai "av<16" math-verify \
    tqdm-multiprocess hf_transfer ftfy "filelock==3.20.0"
install --no-deps lmms-eval==0.7.3 decord
