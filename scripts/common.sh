# What the benchmark scripts share: source it, then `begin BENCHMARK "$@"`, `answer ...`, `score MODULE ...`, `finish`.
#
#   bash scripts/v1_5/eval/<benchmark>.sh TOKENS [flags of llava.eval.model_vqa_loader ...]
#
# TOKENS: mean number of visual tokens per layer, or `dense` for no pruning. Environment:
#   CKPT                  checkpoint folder name below MODEL_DIR            (llava-v1.5-7b)
#   MODEL_DIR             folder with checkpoints                          (playground/models)
#   DATA_DIR              benchmark data in upstream's layout              (playground/data/eval)
#   OUT_DIR               answers go to OUT_DIR/<benchmark>/answers        (DATA_DIR)
#   METHOD                pruning method                                   (autoprune)
#   PYTHON                interpreter                                      (the repository's .venv, else python3)
#   CUDA_VISIBLE_DEVICES  "0,1,2": one process and one part of the questions per device
# Exit status: 0 done; 2 wrong input; 3 scored, but some samples were skipped; other: a process failed.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
SKIPPED_STATUS=3

die() { printf 'error: %s\n' "$*" >&2; exit 2; }
note() { printf '[%s] %s\n' "$BENCHMARK" "$*" >&2; }

begin() {
    BENCHMARK="$1"; shift
    [ $# -ge 1 ] || die "usage: bash $0 TOKENS [flags of llava.eval.model_vqa_loader ...]; TOKENS is a number or 'dense'"
    TOKENS="$1"; shift
    LOADER_ARGS=("$@")
    CKPT="${CKPT:-llava-v1.5-7b}"
    MODEL_DIR="${MODEL_DIR:-$ROOT/playground/models}"
    DATA_DIR="${DATA_DIR:-$ROOT/playground/data/eval}"
    OUT_DIR="${OUT_DIR:-$DATA_DIR}"
    METHOD="${METHOD:-autoprune}"
    if [ -z "${PYTHON:-}" ]; then
        PYTHON="${AUTOPRUNE_PYTHON:-$ROOT/.venv/bin/python}"
        [ -x "$PYTHON" ] || command -v "$PYTHON" >/dev/null 2>&1 || PYTHON=python3
    fi
    "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))' \
        >/dev/null 2>&1 || die "$PYTHON has no torch and transformers; run scripts/demo.sh once, or set PYTHON"
    case "$TOKENS" in
        dense) METHOD=dense; RUN=dense ;;
        "" | *[!0-9]*) die "TOKENS must be a number or 'dense', got '$TOKENS'" ;;
        *) RUN="$METHOD/n_$TOKENS" ;;
    esac
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    # Waiting threads sleep instead of spinning; spinning slows every process down when cores are shared.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    ANSWERS="$OUT_DIR/$BENCHMARK/answers/$CKPT/$RUN.jsonl"
    RESULT="$OUT_DIR/$BENCHMARK/answers/$CKPT/$RUN.json"
    STATUS=0
    TOOL=model_vqa_loader # a script whose questions need another tool of llava.eval sets this after begin
}

# Runs the tool on one part: run_part ANSWERS_FILE NUM_CHUNKS CHUNK_IDX QUESTION_FILE IMAGE_FOLDER
run_part() {
    local budget=()
    [ "$METHOD" = dense ] || budget=(--target-token-num "$TOKENS")
    "$PYTHON" -m "llava.eval.$TOOL" \
        --model-path "$MODEL_DIR/$CKPT" --question-file "$4" --image-folder "$5" --answers-file "$1" \
        --num-chunks "$2" --chunk-idx "$3" --temperature 0 --conv-mode vicuna_v1 \
        --method "$METHOD" ${budget[@]+"${budget[@]}"} ${LOADER_ARGS[@]+"${LOADER_ARGS[@]}"}
}

# Remembers a process's exit status: skipped samples do not stop the run, anything else does.
take_status() {
    case "$1" in
        0) ;;
        "$SKIPPED_STATUS") STATUS="$SKIPPED_STATUS" ;;
        *) FAILED="$1" ;;
    esac
}

# answer QUESTION_FILE IMAGE_FOLDER: answers all questions into $ANSWERS, in parts if there are several devices.
answer() {
    local devices=() pids=() parts=() status index
    FAILED=0
    IFS=',' read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-}"
    if [ "${#devices[@]}" -le 1 ]; then
        status=0
        run_part "$ANSWERS" 1 0 "$1" "$2" || status=$?
        take_status "$status"
        [ "$FAILED" -eq 0 ] || exit "$FAILED"
        return 0
    fi
    for index in "${!devices[@]}"; do
        parts+=("${ANSWERS%.jsonl}/${#devices[@]}_$index.jsonl")
        CUDA_VISIBLE_DEVICES="${devices[$index]}" run_part "${parts[$index]}" "${#devices[@]}" "$index" "$1" "$2" &
        pids+=($!)
    done
    trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
    for index in "${!pids[@]}"; do
        status=0
        wait "${pids[$index]}" || status=$?
        [ "$status" -eq 0 ] || note "part $index on device ${devices[$index]} ended with status $status"
        take_status "$status"
    done
    trap - INT TERM
    [ "$FAILED" -eq 0 ] || { note "not merged; run the same command again to finish the missing parts"; exit "$FAILED"; }
    # Under its final name only when it is whole. A part can be missing: more devices than questions.
    for index in "${!parts[@]}"; do
        [ ! -f "${parts[$index]}" ] || cat -- "${parts[$index]}"
    done >"$ANSWERS.tmp.$$" || { rm -f -- "$ANSWERS.tmp.$$"; die "cannot write $ANSWERS"; }
    mv -- "$ANSWERS.tmp.$$" "$ANSWERS"
}

# score MODULE [flags]: scores $ANSWERS; prints the result and writes it beside the answers as JSON.
score() {
    local module="$1"; shift
    "$PYTHON" -m "llava.eval.$module" "$@" --result-file "$ANSWERS" --json "$RESULT"
    note "answers: $ANSWERS"
    note "result:  $RESULT"
}

finish() { exit "$STATUS"; }
