#!/usr/bin/env bash
# TextVQA validation, with the reference OCR tokens in the prompt. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin textvqa textvqa "$@"
answer --question-file "$DATA/llava_textvqa_val_v051_ocr.jsonl" --image-folder "$DATA/train_images"
score eval_textvqa --annotation-file "$DATA/TextVQA_0.5.1_val.json"
finish
