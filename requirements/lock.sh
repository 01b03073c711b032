#!/usr/bin/env bash
# Resolve the complete lock files anew: `make lock`. They are installed with --no-deps.
set -euo pipefail
cd "$(dirname "$0")"
compile() { uv pip compile --universal --python-version 3.11 --no-annotate --no-header --quiet "$@"; }
compile cpu.in --override cpu-overrides.in --output-file cpu.txt
compile gpu.in --output-file gpu.txt
compile dev.in --constraint cpu.txt --output-file dev.txt
# What can only be wanted elsewhere than on Linux is noise here.
sed -i "/sys_platform == '\(win32\|none\)'$/d; / ; .*sys_platform == 'emscripten'/d" ./*.txt
