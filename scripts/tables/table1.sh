#!/usr/bin/env bash
# LLaVA-1.5-7B at 192, 128 and 64 visual tokens. Usage and environment: see run_table.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/run_table.sh" 1 "$@"
