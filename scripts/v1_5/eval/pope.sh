#!/usr/bin/env bash
# POPE: mean F1 of adversarial, popular and random. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin pope "$@"
data="$DATA_DIR/pope"
answer "$data/llava_pope_test.jsonl" "$data/val2014"
score eval_pope --annotation-dir "$data/coco" --question-file "$data/llava_pope_test.jsonl"
finish
