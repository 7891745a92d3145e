#!/usr/bin/env bash
# MM-Vet: answers for its evaluator; run again, it adds up the grades that the evaluator left beside them. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

TOOL=model_vqa
begin mmvet mm-vet "$@"
answer --question-file "$DATA/llava-mm-vet.jsonl" --image-folder "$DATA/images"
convert mmvet_for_eval --src "$ANSWERS" --dst "$OUT/results/$NAME.json"
for grades in "$OUT/results/$NAME"_*-grade-*runs.json; do
    [ ! -f "$grades" ] ||
        run "$PYTHON" -m llava.eval.eval_mmvet --result-file "$grades" --annotation-file "$DATA/mm-vet.json" --json "$RESULT"
done
finish
