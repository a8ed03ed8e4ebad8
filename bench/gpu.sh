#!/usr/bin/env bash
# bench/gpu.py with the Python that has torch: PYTHON (python3).
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
