#!/usr/bin/env bash
# LLaVA-Bench in the wild: answers for the review by GPT-4; run again, it adds up the reviews. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

TOOL=model_vqa
begin llavabench llava-bench-in-the-wild "$@"
answer --question-file "$DATA/questions.jsonl" --image-folder "$DATA/images"
reviews="$OUT/reviews/$NAME.jsonl"
[ ! -f "$reviews" ] || run "$PYTHON" -m llava.eval.summarize_gpt_review --files "$reviews" --json "$RESULT"
finish
