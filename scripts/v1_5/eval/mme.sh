#!/usr/bin/env bash
# MME: perception and cognition. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin MME "$@"
data="$DATA_DIR/MME"
answer "$data/llava_mme.jsonl" "$data/MME_Benchmark_release_version"
score eval_mme --annotation-dir "$data/MME_Benchmark_release_version" --question-file "$data/llava_mme.jsonl"
finish
