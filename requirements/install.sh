#!/usr/bin/env bash
# Make the virtual environment .venv and install the complete lock into it; nothing global.
# Usage: requirements/install.sh [cpu|gpu]    default: gpu where nvidia-smi finds one, else cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
hardware=${1:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}

find_python() {
    for name in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$name" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
        then command -v "$name"; return; fi
    done
    echo "Manta needs Python 3.11 or 3.12 with venv; install one, or name it: make PYTHON=/path/to/python3.12" >&2
    return 1
}

# uv unpacks in parallel, which halves the wait; pip knows the indexes of a pip.conf, uv does not.
install() { .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps "$@" 2>.venv/uv.log \
    || .venv/bin/pip install --quiet --no-deps "$@"; }

python=$(find_python)
echo "Setting up .venv with $("$python" --version), lock requirements/$hardware.txt (some minutes)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps uv==0.13.9
if [ "$hardware" = cpu ]; then
    torch=$(grep '^torch==' requirements/cpu.txt)
    # A plain `torch` is the CUDA build on x86; the CPU build comes from a configured index or
    # wheel folder, else from PyTorch's own index, which uv knows by name.
    .venv/bin/pip install --quiet --no-deps "$torch+cpu" 2>/dev/null \
        || .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --torch-backend cpu "$torch"
fi
install -r "requirements/$hardware.txt" -r requirements/dev.txt
install --no-build-isolation -e .
# Ray starts many processes, and each imports much: without bytecode a job starts 2.5 times as slowly.
# Neither uv nor an environment with PYTHONDONTWRITEBYTECODE makes any. Templates that are no Python fail.
.venv/bin/python -m compileall -qq -j 0 .venv/lib/python3*/site-packages || true
.venv/bin/python -c 'import manta, ray, torch, transformers, vllm'
cat requirements/*.txt pyproject.toml | sha256sum > .venv/ready
echo "Ready: .venv/bin/manta --help"
