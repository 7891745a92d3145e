#!/usr/bin/env bash
# seed.sh with the 13B checkpoint.
export CKPT="${CKPT:-llava-v1.6-vicuna-13b}"
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/seed.sh" "$@"
