#!/usr/bin/env bash
# SEED-Bench: accuracy by question type, and the upload for the leaderboard. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

MERGED=1
begin seed seed_bench "$@"
answer --question-file "$DATA/llava-seed-bench.jsonl" --image-folder "$DATA"
upload=()
has_gaps || upload=(--result-upload-file "$OUT/answers_upload/$NAME.jsonl")
convert seed_for_submission --annotation-file "$DATA/SEED-Bench.json" --result-file "$ANSWERS" --json "$RESULT" \
    ${upload[@]+"${upload[@]}"}
finish
