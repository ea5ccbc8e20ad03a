#!/usr/bin/env bash
# What an engine beside its server does on a GPU, each part for so many seconds at most: the transformers example, then
# kills under MPS. Figures are those of `python -m benchmarks.colocated --device cuda --mps`.
set -u
python=${PYTHON:-python}
out=${OUT:-.}
log=$out/colocated.log
export PYTHONUNBUFFERED=1
. "$(dirname "$0")/part.sh"
export PYTHONPATH=.:tests

part 200 "the transformers example" "$python" -m pytest -q -s --timeout=180 -p no:cacheprovider tests/gpu/test_transformers_engine.py
part 240 "kills under MPS" "$python" tests/gpu/mps_kills.py
exit 0
