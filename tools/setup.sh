#!/bin/sh
# Make .venv with this project and everything it is tested with, at the pinned versions.
# Needs python3 with pip, any version; finds or fetches a Python >= 3.12 by itself.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "mmx setup: $*"; }

# uv installs into .uv, touching nothing of the system; --target works where pip may not write.
find_uv() {
    if command -v uv >/dev/null 2>&1; then
        command -v uv
        return
    fi
    if [ ! -x .uv/bin/uv ]; then
        python3 -m pip install --quiet --disable-pip-version-check --target .uv uv >&2 || {
            say "python3 -m pip install uv failed; is there a python3 with pip, and a network?" >&2
            exit 1
        }
    fi
    printf '%s\n' "$PWD/.uv/bin/uv"
}

find_python() {
    for candidate in python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' \
            >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    printf '3.12\n' # none here: uv looks further, and downloads one if it must
}

uv=$(find_uv)
if [ "${1:-}" = tpu-compiler ]; then
    "$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt \
        --no-deps --target .venv/libtpu libtpu
    exit
fi
if [ "${1:-}" = transformers ]; then
    rm -rf .venv-transformers
    "$uv" venv --quiet --no-project --python .venv/bin/python .venv-transformers
    "$uv" pip install --quiet --python .venv-transformers/bin/python --torch-backend cpu \
        torch 'transformers>=5.17' numpy
    exit
fi
python=$(find_python)
say "using $python"
rm -rf .venv
"$uv" venv --quiet --no-project --python "$python" .venv || {
    say "no Python >= 3.12 found and none could be fetched; install one and run make again"
    exit 1
}
# Compiled here once: where Python may not write bytecode, each start of `mmx` takes 3 s more.
"$uv" pip install --quiet --compile-bytecode --python .venv/bin/python \
    --constraint constraints.txt --editable '.[dev]'
say "ready: .venv/bin/python, .venv/bin/mmx"
