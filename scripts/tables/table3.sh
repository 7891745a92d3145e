#!/usr/bin/env bash
# LLaVA-1.6-7B at 640, 320 and 160 visual tokens. Usage and environment: see run_table.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/run_table.sh" 3 "$@"
