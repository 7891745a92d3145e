#!/usr/bin/env bash
# Senna's planning questions, six views each. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin senna senna "$@"
answer --question-file "$DATA/llava_senna.jsonl" --image-folder "$DATA/../nuscenes"
score eval_senna --truth "$DATA/senna_truth.json"
finish
