#!/usr/bin/env bash
# GQA testdev, balanced. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin gqa "$@"
data="$DATA_DIR/gqa"
answer "$data/llava_gqa_testdev_balanced.jsonl" "$data/data/images"
score eval_gqa --annotation-file "$data/data/testdev_balanced_questions.json"
finish
