#!/usr/bin/env bash
# MMBench dev in Chinese: circular accuracy, and the workbook for the server. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

TOOL=model_vqa_mmbench SPLIT=mmbench_dev_cn_20231003
begin mmbench_cn mmbench_cn "$@"
answer --question-file "$DATA/$SPLIT.tsv" --lang cn --single-pred-prompt
score eval_mmbench --annotation-file "$DATA/$SPLIT.tsv"
convert mmbench_for_submission --annotation-file "$DATA/$SPLIT.tsv" --result-dir "$(dirname -- "$ANSWERS")" \
    --upload-dir "$(dirname -- "$OUT/answers_upload/$SPLIT/$NAME")" --experiment "$(basename -- "$NAME")"
finish
