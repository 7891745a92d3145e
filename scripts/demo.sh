#!/usr/bin/env bash
# The main job on the embedded default: dense and AutoPrune at 192, 128 and 64 visual tokens on the four miniature benchmarks.
# Prints one table; writes it, two pictures and a report for the browser (report.html) to results/demo; --output-dir changes
# that. Arguments go to llava.eval.demo.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
autoprune_setup

export PYTHONPATH="$AUTOPRUNE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" MPLBACKEND=Agg
"$PYTHON" -m playground.tiny.build --quiet >&2
exec "$PYTHON" -m llava.eval.demo "$@"
