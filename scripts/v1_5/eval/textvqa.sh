#!/usr/bin/env bash
# TextVQA validation, with the reference OCR tokens in the prompt. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin textvqa "$@"
data="$DATA_DIR/textvqa"
answer "$data/llava_textvqa_val_v051_ocr.jsonl" "$data/train_images"
score eval_textvqa --annotation-file "$data/TextVQA_0.5.1_val.json"
finish
