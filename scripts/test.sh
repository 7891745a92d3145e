#!/usr/bin/env bash
# Runs the style check and the tests; creates the environment first where needed.
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh tests/eval -k pope   any pytest arguments
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
autoprune_setup

# Relative test paths mean paths in the repository, from wherever this was called.
cd -- "$AUTOPRUNE_ROOT"
# Waiting threads sleep instead of spinning: with other work on the machine, spinning makes small operators many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# The tests need no network; a library that tries should fail at once instead of waiting for a time-out.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" MPLBACKEND=Agg
# More than a few threads do not pay for models this small.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
    export OMP_NUM_THREADS="$((cores < 4 ? cores : 4))"
fi

"$PYTHON" -m playground.tiny.build --quiet >&2

# A style error fails the run but does not keep the tests from running.
style=0
if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
    echo "[test] ruff check"
    "$PYTHON" -m ruff check . || style=$?
else
    echo "[test] ruff is not installed for $PYTHON: style check skipped"
fi
echo "[test] pytest -q $* (OMP_NUM_THREADS=$OMP_NUM_THREADS)"
"$PYTHON" -m pytest -q "$@" || exit
[ "$style" -eq 0 ] || { echo "error: the style check failed, see above" >&2; exit "$style"; }
