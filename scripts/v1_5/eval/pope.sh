#!/usr/bin/env bash
# POPE: mean F1 of adversarial, popular and random. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin pope pope "$@"
answer --question-file "$DATA/llava_pope_test.jsonl" --image-folder "$DATA/val2014"
score eval_pope --annotation-dir "$DATA/coco" --question-file "$DATA/llava_pope_test.jsonl"
finish
