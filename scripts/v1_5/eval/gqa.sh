#!/usr/bin/env bash
# GQA testdev, balanced. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

SPLIT=llava_gqa_testdev_balanced MERGED=1
begin gqa gqa "$@"
answer --question-file "$DATA/$SPLIT.jsonl" --image-folder "$DATA/data/images"
convert gqa_for_eval --src "$ANSWERS" --dst "$(dirname -- "$ANSWERS")/testdev_balanced_predictions.json"
score eval_gqa --annotation-file "$DATA/data/testdev_balanced_questions.json"
finish
