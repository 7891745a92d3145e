#!/usr/bin/env bash
# MME: perception and cognition; also writes the input files of the official tool. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin mme MME "$@"
answer --question-file "$DATA/llava_mme.jsonl" --image-folder "$DATA/MME_Benchmark_release_version"
score eval_mme --annotation-dir "$DATA/MME_Benchmark_release_version" --question-file "$DATA/llava_mme.jsonl" \
    --tool-dir "$OUT/eval_tool/answers/$NAME"
finish
