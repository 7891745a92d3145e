#!/usr/bin/env bash
# Checks style, format and types, then runs the tests; creates the environment first where needed.
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh tests/eval -k pope   any pytest arguments
# TEST_SKIP_CHECKS=1 runs the tests only.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
autoprune_setup

# Relative test paths mean paths in the repository, from wherever this was called.
cd -- "$AUTOPRUNE_ROOT"
# Waiting threads sleep instead of spinning: with other work on the machine, spinning makes small operators many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# The tests need no network; a library that tries should fail at once instead of waiting for a time-out.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" MPLBACKEND=Agg
cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
# The whole suite runs in one process per core; a chosen part of it in one, unless -n says otherwise.
workers=()
if [ $# -eq 0 ] && [ "$cores" -gt 1 ] && "$PYTHON" -c 'import xdist' >/dev/null 2>&1; then
    workers=(-n "$((cores < 4 ? cores : 4))" --dist worksteal)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
# More than a few threads do not pay for models this small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}"

# Checks come first. One that fails makes the run fail but does not keep the tests from running.
FAILING="style format types"
failed=""
check() { # check NAME MODULE [arguments]: a module that is not installed is skipped
    local name="$1" module="$2"; shift
    if ! "$PYTHON" -c "import $module" >/dev/null 2>&1; then
        echo "[test] $name: $module is not installed for $PYTHON, skipped"
        return 0
    fi
    echo "[test] $name: $*"
    case " $FAILING " in
        *" $name "*) "$PYTHON" -m "$@" || failed="$failed $name" ;;
        *) "$PYTHON" -m "$@" 2>&1 | tail -n 1 || true ;;
    esac
}
if [ -z "${TEST_SKIP_CHECKS:-}" ]; then
    check style ruff check .
    check format ruff format --check .
    check types mypy
fi

"$PYTHON" -m playground.tiny.build --quiet >&2
echo "[test] pytest -q ${workers[*]-} $* (OMP_NUM_THREADS=$OMP_NUM_THREADS)"
"$PYTHON" -m pytest -q ${workers[@]+"${workers[@]}"} "$@" || exit
[ -z "$failed" ] || { echo "error: failed:$failed, see above" >&2; exit 1; }
