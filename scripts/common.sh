# What the benchmark scripts share: source it, then `begin BENCHMARK FOLDER "$@"`, `answer ...`, `score MODULE ...`, `finish`.
#
#   bash scripts/v1_5/eval/<benchmark>.sh TOKENS [TAG] [flags of the answering tool ...]
#
# TOKENS: mean number of visual tokens per layer, a share of each prompt's visual tokens with a point (0.11; answers go to
# r_0.11), or `dense` for no pruning. TAG: a word for the name of the run, as in
# AutoPrune's textvqa.sh: answers go to n_TOKENS_TAG (there with a time behind it, which would keep a run from being
# continued). Environment:
#   CKPT                  checkpoint folder name below MODEL_DIR            (v1_5: llava-v1.5-7b, v1_6: llava-v1.6-vicuna-7b)
#   MODEL_DIR             folder with checkpoints                          (playground/models)
#   DATA_DIR              benchmark data in upstream's layout              (playground/data/eval)
#   OUT_DIR               answers go to OUT_DIR/<benchmark>/answers        (DATA_DIR)
#   METHOD                pruning method                                   (autoprune)
#   CONV_MODE             conversation template                            (that of the checkpoint, by its name)
#   PYTHON                interpreter                                      (the repository's .venv, else python3)
#   CUDA_VISIBLE_DEVICES  "0,1,2": one process and one part of the questions per device
#   DRY_RUN=1             print the commands instead of running them
# A relative path in these variables is meant from where the script was called.
# Exit status: 0 done; 2 wrong input; 3 scored, but some samples were skipped; other: a process failed.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
SKIPPED_STATUS=3
# A script sets these before `begin` where its benchmark differs.
VISUAL_TOKENS=        # visual tokens that may enter the decoder; set for 1.6
TOOL=model_vqa_loader # module of llava.eval that answers
SPLIT=                # answers/SPLIT/..., in the benchmarks where upstream has it
MERGED=               # 1: parts and merge.jsonl in a folder of the run, in the benchmarks that upstream answers in parts

die() { printf 'error: %s\n' "$*" >&2; exit 2; }
note() { printf '[%s] %s\n' "$BENCHMARK" "$*" >&2; }

# Runs a command, or prints it so that a shell would take it back.
run() {
    if [ -n "${DRY_RUN:-}" ]; then
        # In one write: parts run at the same time.
        printf '%s\n' "$(printf '%q ' "$@")"
    elif [ -n "${REPLACE_SHELL:-}" ]; then
        exec "$@" # in the background, so that a signal for the job reaches the process and not a shell around it
    else
        "$@"
    fi
}

# The template that a checkpoint was trained with.
conv_mode_of() {
    case "$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]')" in
        *mistral*) echo mistral_instruct ;;
        *34b* | *hermes*) echo chatml_direct ;;
        *) echo vicuna_v1 ;;
    esac
}

# The data that ship with the repository are made on first use.
make_miniature() { [ -n "${DRY_RUN:-}" ] || "$PYTHON" -m llava.tiny --only-for "$DATA_DIR"; }

begin() {
    BENCHMARK="$1"; FOLDER="$2"; shift 2
    [ $# -ge 1 ] || die "usage: bash $0 TOKENS [TAG] [flags of llava.eval.$TOOL ...]; TOKENS is a number, a share or 'dense'"
    TOKENS="$1"; shift
    TAG=
    case "${1--}" in
        "") shift ;;
        -*) ;;
        *[!A-Za-z0-9._-]* | .*) die "TAG becomes part of a file name: letters, digits and ._- only, got '$1'" ;;
        *) TAG="$1"; shift ;;
    esac
    TOOL_ARGS=("$@")
    LLAVA_VERSION="${LLAVA_VERSION:-v1_5}"
    case "$LLAVA_VERSION" in
        v1_5) CKPT="${CKPT:-llava-v1.5-7b}" ;;
        # 2880: the most that five tiles have, so nothing is taken away before the decoder.
        v1_6) CKPT="${CKPT:-llava-v1.6-vicuna-7b}"; VISUAL_TOKENS=2880 ;;
        *) die "LLAVA_VERSION must be v1_5 or v1_6, got '$LLAVA_VERSION'" ;;
    esac
    MODEL_DIR="${MODEL_DIR:-$ROOT/playground/models}"
    DATA_DIR="${DATA_DIR:-$ROOT/playground/data/eval}"
    OUT_DIR="${OUT_DIR:-$DATA_DIR}"
    METHOD="${METHOD:-autoprune}"
    CONV_MODE="${CONV_MODE:-$(conv_mode_of "$CKPT")}"
    case "$TOKENS" in
        dense) METHOD=dense; RUN=dense ;;
        *.*) # one spelling of each share, as it names files
            [[ "$TOKENS" =~ ^(0\.[0-9]{0,3}[1-9]|1\.0)$ ]] ||
                die "a share of the tokens is written 0.11, up to 1.0, with up to four digits and no 0 at the end, got '$TOKENS'"
            RUN="$METHOD/r_$TOKENS"; BUDGET=(--target-ratio "$TOKENS") ;;
        "" | *[!0-9]*) die "TOKENS must be a number, a share such as 0.11, or 'dense', got '$TOKENS'" ;;
        *) RUN="$METHOD/n_$TOKENS"; BUDGET=(--target-token-num "$TOKENS") ;;
    esac
    RUN="$RUN${TAG:+_$TAG}"
    if [ -z "${PYTHON:-}" ]; then
        PYTHON="${AUTOPRUNE_PYTHON:-$ROOT/.venv/bin/python}"
        [ -x "$PYTHON" ] || command -v "$PYTHON" >/dev/null 2>&1 || PYTHON=python3
    fi
    [ -n "${DRY_RUN:-}" ] ||
        "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))' \
            >/dev/null 2>&1 || die "$PYTHON has no torch and transformers; run scripts/demo.sh once, or set PYTHON"
    # In an installation, where these scripts lie inside the package, Python finds it by itself.
    [ ! -f "$ROOT/llava/__init__.py" ] || export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    # Waiting threads sleep instead of spinning; spinning slows every process down when cores are shared.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    make_miniature
    NAME="$CKPT/$RUN" # of the run, in all files of answers and uploads
    DATA="$DATA_DIR/$FOLDER"
    OUT="$OUT_DIR/$FOLDER"
    ANSWERS="$OUT/answers/${SPLIT:+$SPLIT/}$NAME${MERGED:+/merge}.jsonl"
    RESULT="${ANSWERS%.jsonl}.json"
    STATUS=0
    run "$PYTHON" -m llava.eval.check_data "$BENCHMARK" --data-dir "$DATA_DIR" --quiet
}

# Runs the tool on one part: run_part ANSWERS_FILE NUM_CHUNKS CHUNK_IDX [flags of the benchmark ...]
run_part() {
    local file="$1" chunks="$2" index="$3" budget=(); shift 3
    [ "$METHOD" = dense ] || budget=(${VISUAL_TOKENS:+--visual-token-num "$VISUAL_TOKENS"} "${BUDGET[@]}")
    run "$PYTHON" -m "llava.eval.$TOOL" \
        --model-path "$MODEL_DIR/$CKPT" "$@" --answers-file "$file" \
        --num-chunks "$chunks" --chunk-idx "$index" --temperature 0 --conv-mode "$CONV_MODE" \
        --method "$METHOD" ${budget[@]+"${budget[@]}"} ${TOOL_ARGS[@]+"${TOOL_ARGS[@]}"}
}

# Remembers a process's exit status: skipped samples do not stop the run, anything else does.
take_status() {
    case "$1" in
        0) ;;
        "$SKIPPED_STATUS") STATUS="$SKIPPED_STATUS" ;;
        *) FAILED="$1" ;;
    esac
}

# answer --question-file FILE [--image-folder FOLDER] [flags ...]: answers all questions into $ANSWERS, one part per device.
answer() {
    local devices=() pids=() parts=() status index folder="${ANSWERS%.jsonl}"
    BENCHMARK_ARGS=("$@")
    FAILED=0
    IFS=',' read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-}"
    if [ "${#devices[@]}" -le 1 ] && [ -z "$MERGED" ]; then
        status=0
        run_part "$ANSWERS" 1 0 "$@" || status=$?
        take_status "$status"
        [ "$FAILED" -eq 0 ] || exit "$FAILED"
        return 0
    fi
    [ -z "$MERGED" ] || folder="${ANSWERS%/merge.jsonl}"
    [ "${#devices[@]}" -ge 1 ] || devices=("")
    for index in "${!devices[@]}"; do
        parts+=("$folder/${#devices[@]}_$index.jsonl")
        if [ -n "${devices[$index]}" ]; then
            REPLACE_SHELL=1 CUDA_VISIBLE_DEVICES="${devices[$index]}" run_part "${parts[$index]}" "${#devices[@]}" "$index" "$@" &
        else
            REPLACE_SHELL=1 run_part "${parts[$index]}" "${#devices[@]}" "$index" "$@" &
        fi
        pids+=($!)
    done
    trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
    for index in "${!pids[@]}"; do
        status=0
        wait "${pids[$index]}" || status=$?
        [ "$status" -eq 0 ] || note "part $index of ${#parts[@]} ended with status $status"
        take_status "$status"
    done
    wait # an interrupted wait returns before its process has written what it had
    trap - INT TERM
    [ "$FAILED" -eq 0 ] || { note "not merged; run the same command again to finish the missing parts"; exit "$FAILED"; }
    merge "${parts[@]}"
}

# Puts the parts together in question order, under the final name only when everything is there.
merge() {
    local question_file="" argument previous=""
    for argument in "${BENCHMARK_ARGS[@]}"; do
        [ "$previous" != --question-file ] || question_file="$argument"
        previous="$argument"
    done
    run "$PYTHON" -m llava.eval.merge_answers --answers-file "$ANSWERS" --question-file "$question_file" "$@"
}

# score MODULE [flags]: scores $ANSWERS; prints the result and writes it beside the answers as JSON.
score() {
    local module="$1"; shift
    run "$PYTHON" -m "llava.eval.$module" "$@" --result-file "$ANSWERS" --json "$RESULT"
    note "answers: $ANSWERS"
    note "result:  $RESULT"
}

# True for a run that may have gaps: limited on purpose, or with samples that could not be read.
has_gaps() {
    local argument
    [ "$STATUS" -eq 0 ] || return 0
    for argument in ${TOOL_ARGS[@]+"${TOOL_ARGS[@]}"}; do
        case "$argument" in --limit | --limit=*) return 0 ;; esac
    done
    return 1
}

# convert NAME [flags]: runs scripts/convert_NAME.py, which writes what a server takes.
convert() {
    local name="$1"; shift
    local status=0
    run "$PYTHON" "$ROOT/scripts/convert_$name.py" "$@" || status=$?
    FAILED=0
    take_status "$status" # what is written has gaps: the rest of the script goes on
    [ "$FAILED" -eq 0 ] || exit "$FAILED"
}

# The same for a server that refuses an upload with gaps.
convert_whole() {
    if has_gaps; then
        note "no upload is written: not all questions are answered"
    else
        convert "$@"
    fi
}

finish() { exit "$STATUS"; }
