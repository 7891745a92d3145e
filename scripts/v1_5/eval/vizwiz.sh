#!/usr/bin/env bash
# VizWiz test: writes the upload for EvalAI; scores only where test.json has answers. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin vizwiz vizwiz "$@"
answer --question-file "$DATA/llava_test.jsonl" --image-folder "$DATA/test"
convert_whole vizwiz_for_submission --annotation-file "$DATA/llava_test.jsonl" --result-file "$ANSWERS" \
    --result-upload-file "$OUT/answers_upload/$NAME.json"
truth="$DATA/test.json"
! grep -q '"answers"' "$truth" 2>/dev/null || score eval_vqa --annotation-file "$truth" --question-file "$DATA/llava_test.jsonl"
finish
