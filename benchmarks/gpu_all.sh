#!/usr/bin/env bash
# All checks and benchmarks that need a GPU: benchmarks/gpu_all.sh [PART...] [OPTION...], see `python -m benchmarks.gpu --help`.
# $PYTHON is the interpreter (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
