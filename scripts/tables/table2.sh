#!/usr/bin/env bash
# LLaVA-1.5-13B at 288, 144 and 58 visual tokens. Usage and environment: see run_table.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/run_table.sh" 2 "$@"
