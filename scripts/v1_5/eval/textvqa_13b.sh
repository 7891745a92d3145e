#!/usr/bin/env bash
# textvqa.sh with the 13B checkpoint.
export CKPT="${CKPT:-llava-v1.5-13b}"
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/textvqa.sh" "$@"
