#!/usr/bin/env bash
# DriveLM's held-out scenes without an API, and the list for its server. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin drivelm drivelm "$@"
answer --question-file "$DATA/llava_drivelm.jsonl" --image-folder "$DATA/../nuscenes"
score eval_drivelm --truth "$DATA/drivelm_truth.json"
convert_whole drivelm_for_submission --truth "$DATA/drivelm_truth.json" --src "$ANSWERS" --dst "$OUT/answers_upload/$NAME.json"
finish
