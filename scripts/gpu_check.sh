#!/usr/bin/env bash
# Everything that only a GPU can say, in one run of about nine minutes that keeps what it has when it is cut off.
#   bash scripts/gpu_check.sh [OUT]                   tests, times, profile; OUT/gpu_check.json has all of it
#   bash scripts/gpu_check.sh --rehearse [OUT]        the same paths on a CPU with tiny sizes
#   bash scripts/gpu_check.sh OUT --minutes prefill=3,profile=0
# Installs nothing: it takes the first interpreter that has torch and transformers, with a GPU unless it is a rehearsal.
# AUTOPRUNE_PYTHON=/path/to/python names one.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
need="True"
gpu="a GPU, "
for argument in "$@"; do
    case "$argument" in
        --rehearse) need="False"; gpu=""; ;;
        --take) need="False"; gpu="" ;;
    esac
done

python=""
for candidate in ${AUTOPRUNE_PYTHON:+"$AUTOPRUNE_PYTHON"} "$root/.venv/bin/python" python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "
import sys, torch, transformers
major, minor = (int(part) for part in torch.__version__.split('.')[:2])
sys.exit((major, minor) < (2, 9) or ($need and not torch.cuda.is_available()))" >/dev/null 2>&1; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no interpreter here has ${gpu}torch >= 2.9 and transformers; name one with AUTOPRUNE_PYTHON=/path/to/python" >&2
    exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu_check "$@"
