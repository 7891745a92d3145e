#!/usr/bin/env bash
# ScienceQA test: accuracy over all problems and over those with an image. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

TOOL=model_vqa_science
begin sqa scienceqa "$@"
answer --question-file "$DATA/llava_test_CQM-A.json" --image-folder "$DATA/images/test" --single-pred-prompt
score eval_science_qa --base-dir "$DATA" \
    --output-file "${ANSWERS%.jsonl}_output.jsonl" --output-result "${ANSWERS%.jsonl}_result.json"
finish
