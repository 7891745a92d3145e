#!/usr/bin/env bash
# LLaVA-1.6 on the same benchmark: ../../v1_5/eval/llavabench.sh with the checkpoint and the flags of 1.6.
export LLAVA_VERSION=v1_6
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../../v1_5/eval/llavabench.sh" "$@"
