#!/usr/bin/env bash
# Planned trajectories on nuScenes, L2 and collisions in every convention. Usage and environment: see scripts/common.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../common.sh"

begin nuscenes_planning nuscenes_planning "$@"
answer --question-file "$DATA/llava_nuscenes_planning.jsonl" --image-folder "$DATA/../nuscenes"
score eval_planning --truth "$DATA/planning_truth.jsonl" --convention all
finish
