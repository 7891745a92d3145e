# Shared set-up helper: source it, then call `autoprune_setup`. It is not run by itself.
#
# Creates one virtual environment, .venv in the repository root, or reuses it, and sets
#   AUTOPRUNE_ROOT  the repository root (absolute)
#   PYTHON          the interpreter to use
# AUTOPRUNE_PYTHON=/path/to/python skips the virtual environment: that interpreter must already have everything.
# Package indexes, proxies and caches are pip's own business (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...).

AUTOPRUNE_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

_autoprune_say() { printf '[setup] %s\n' "$*" >&2; }
_autoprune_die() { printf 'error: %s\n' "$*" >&2; return 2; }

# An active environment must not leak into ours: its site-packages would shadow the pinned versions, and pip settings
# made for it (--user, --target, --prefix) would install outside of .venv.
_autoprune_isolate() {
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
    export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
}

_autoprune_version_ok() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Prints the first interpreter that is new enough; the user's own `python3` is preferred.
_autoprune_find_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13 python3.10 python; do
        if command -v "$candidate" >/dev/null 2>&1 && _autoprune_version_ok "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    _autoprune_die "no Python >= 3.10 found (python3 is $(python3 -V 2>&1 || true)); install one or set AUTOPRUNE_PYTHON"
}

# Everything the installation depends on; the path is part of it because the editable install points to it.
_autoprune_stamp() {
    "$1" - "$AUTOPRUNE_ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
}

autoprune_setup() {
    local venv="$AUTOPRUNE_ROOT/.venv" base stamp
    if [ -n "${AUTOPRUNE_PYTHON:-}" ]; then
        if ! command -v "$AUTOPRUNE_PYTHON" >/dev/null 2>&1; then
            _autoprune_die "AUTOPRUNE_PYTHON=$AUTOPRUNE_PYTHON is not an executable"; return
        fi
        if ! _autoprune_version_ok "$AUTOPRUNE_PYTHON"; then
            _autoprune_die "AUTOPRUNE_PYTHON=$AUTOPRUNE_PYTHON is $("$AUTOPRUNE_PYTHON" -V 2>&1); Python >= 3.10 is needed"
            return
        fi
        if ! "$AUTOPRUNE_PYTHON" -c 'import torch, transformers, sentencepiece, google.protobuf, PIL, tqdm, shortuuid' >/dev/null 2>&1; then
            _autoprune_die "AUTOPRUNE_PYTHON=$AUTOPRUNE_PYTHON lacks packages; run: $AUTOPRUNE_PYTHON -m pip install" \
                "-c constraints.txt -e '.[dev]' in $AUTOPRUNE_ROOT"
            return
        fi
        PYTHON="$AUTOPRUNE_PYTHON"
        export PYTHONPATH="$AUTOPRUNE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
        _autoprune_say "using AUTOPRUNE_PYTHON=$PYTHON, no virtual environment"
        return 0
    fi

    _autoprune_isolate
    if [ -e "$venv" ] && ! _autoprune_version_ok "$venv/bin/python"; then
        _autoprune_say "$venv does not run (moved, or its Python was removed): creating it anew"
        rm -rf -- "$venv"
    fi
    if [ ! -e "$venv" ]; then
        base="$(_autoprune_find_python)" || return
        _autoprune_say "creating $venv with $("$base" -V 2>&1)"
        if ! "$base" -m venv "$venv" >&2; then
            rm -rf -- "$venv"
            _autoprune_die "$base cannot create virtual environments; install its venv module" \
                "(Debian/Ubuntu: apt install python3-venv) or set AUTOPRUNE_PYTHON"
            return
        fi
    fi
    PYTHON="$venv/bin/python"
    stamp="$(_autoprune_stamp "$PYTHON")" || return
    if [ "$(cat -- "$venv/.autoprune-stamp" 2>/dev/null)" = "$stamp" ]; then
        _autoprune_say "environment is up to date: $venv"
        return 0
    fi
    rm -f -- "$venv/.autoprune-stamp"
    # torch first: it is the large one, and the other packages must see the pinned version instead of choosing one.
    _autoprune_say "installing torch (large; only the first time)"
    "$PYTHON" -m pip install --quiet -c "$AUTOPRUNE_ROOT/constraints.txt" torch >&2 || {
        _autoprune_die "pip could not install torch; see its message above"; return; }
    _autoprune_say "installing the project and its development tools"
    "$PYTHON" -m pip uninstall --quiet --yes llava >/dev/null 2>&1 || true # the name of earlier versions
    (cd -- "$AUTOPRUNE_ROOT" && "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[dev]' >&2) || {
        _autoprune_die "pip could not install the project; see its message above"; return; }
    printf '%s\n' "$stamp" >"$venv/.autoprune-stamp"
    _autoprune_say "environment is ready: $venv"
}
