#!/usr/bin/env bash
# vqav2.sh with the 13B checkpoint.
export CKPT="${CKPT:-llava-v1.5-13b}"
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/vqav2.sh" "$@"
