#!/usr/bin/env bash
# Runs what a table of the paper still lacks, then prints the table: table1.sh (LLaVA-1.5-7B), table2.sh (13B),
# table3.sh (1.6-7B) call it with the table's number.
#
#   bash scripts/tables/table1.sh [flags of the answering tools, such as --batch-size 8 or --limit 100]
#
# Environment: that of the benchmark scripts (scripts/common.sh), and
#   METHODS               pruning methods, by blanks                        (autoprune)
#   BUDGETS, BENCHMARKS   only these of the table's, by blanks              (all)
#   TINY=1                the model and the data that ship with the repository; results go to results/table<N>
# Runs that are complete are not repeated. A benchmark that fails does not keep the others from running; the exit status is
# 0 if everything ran, 3 if samples were skipped, else that of the first failure.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
TABLE="$1"; shift
case "$TABLE" in
    1) version=v1_5; checkpoint=llava-v1.5-7b; tiny=tiny-llava-v1.5 ;;
    2) version=v1_5; checkpoint=llava-v1.5-13b; tiny=tiny-llava-v1.5 ;;
    3) version=v1_6; checkpoint=llava-v1.6-vicuna-7b; tiny=tiny-llava-v1.6 ;;
    *) printf 'error: table must be 1, 2 or 3, got %s\n' "$TABLE" >&2; exit 2 ;;
esac
if [ -n "${TINY:-}" ]; then
    checkpoint="$tiny"
    export MODEL_DIR="${MODEL_DIR:-$ROOT/playground/tiny/models}" DATA_DIR="${DATA_DIR:-$ROOT/playground/tiny/data/eval}"
    export OUT_DIR="${OUT_DIR:-$ROOT/results/table$TABLE}"
fi
export CKPT="${CKPT:-$checkpoint}"
export MODEL_DIR="${MODEL_DIR:-$ROOT/playground/models}" DATA_DIR="${DATA_DIR:-$ROOT/playground/data/eval}"
export OUT_DIR="${OUT_DIR:-$DATA_DIR}"
[ -d "$MODEL_DIR/$CKPT" ] || { printf 'error: checkpoint folder not found: %s\n' "$MODEL_DIR/$CKPT" >&2; exit 2; }
if [ -z "${PYTHON:-}" ]; then
    PYTHON="${AUTOPRUNE_PYTHON:-$ROOT/.venv/bin/python}"
    [ -x "$PYTHON" ] || command -v "$PYTHON" >/dev/null 2>&1 || PYTHON=python3
fi
export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
[ -z "${TINY:-}" ] || "$PYTHON" -m playground.tiny.build --quiet >&2 # makes what is missing of the miniature benchmarks

limit=()
arguments=("$@")
for index in "${!arguments[@]}"; do
    case "${arguments[$index]}" in
        --limit) limit=(--limit "${arguments[$((index + 1))]:-}") ;;
        --limit=*) limit=(--limit "${arguments[$index]#--limit=}") ;;
    esac
done
by_commas() { printf '%s' "$1" | tr -s ' ' ','; }
table() {
    "$PYTHON" -m llava.eval.table --table "$TABLE" --checkpoint "$CKPT" --data-dir "$DATA_DIR" --out-dir "$OUT_DIR" \
        --methods "$(by_commas "${METHODS:-autoprune}")" ${BUDGETS:+--budgets "$(by_commas "$BUDGETS")"} \
        ${BENCHMARKS:+--benchmarks "$(by_commas "$BENCHMARKS")"} ${limit[@]+"${limit[@]}"} "$@"
}

missing="$(table --missing)"
status=0
while read -r benchmark tokens method; do
    [ -n "$benchmark" ] || continue
    printf '[table %s] %s %s %s\n' "$TABLE" "$benchmark" "$method" "$tokens" >&2
    ended=0
    METHOD="$method" bash "$ROOT/scripts/$version/eval/$benchmark.sh" "$tokens" "$@" </dev/null >&2 || ended=$?
    [ "$ended" -lt 128 ] || exit "$ended" # stopped by a signal: so is the table
    if [ "$ended" -ne 0 ]; then
        printf '[table %s] %s %s %s ended with status %s\n' "$TABLE" "$benchmark" "$method" "$tokens" "$ended" >&2
        { [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; } || status="$ended"
    fi
done <<<"$missing"

name="table$TABLE"
table --csv "$OUT_DIR/$name.csv" --json "$OUT_DIR/$name.json" --markdown "$OUT_DIR/$name.md"
exit "$status"
