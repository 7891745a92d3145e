#!/usr/bin/env bash
# VQAv2 test-dev: writes the upload for EvalAI; scores only where there is a local ground truth. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

SPLIT=llava_vqav2_mscoco_test-dev2015 MERGED=1
begin vqav2 vqav2 "$@"
answer --question-file "$DATA/$SPLIT.jsonl" --image-folder "$DATA/test2015"
whole=()
has_gaps || whole=(--split "$SPLIT") # every question of the split has to have its answer
convert vqav2_for_submission --dir "$DATA" ${whole[@]+"${whole[@]}"} --result-file "$ANSWERS" --result-upload-file "$OUT/answers_upload/$SPLIT/$NAME.json"
truth="$DATA/v2_mscoco_test-dev2015_annotations.json"
[ ! -f "$truth" ] || score eval_vqa --annotation-file "$truth"
finish
