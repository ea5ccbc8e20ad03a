#!/usr/bin/env bash
# Figures and tests of pools on a GPU, each part for so many seconds at most.
set -u
python=${PYTHON:-python}
out=${OUT:-.}
log=$out/pools.log
export PYTHONUNBUFFERED=1
. "$(dirname "$0")/part.sh"

# Rows of a pool beside the plain call (at most 1.1x), and 64 rows x 8 cells (at most 30 us).
part 150 "figures" "$python" -m benchmarks.engine_step cuda --output "$out"
part 200 "pools" "$python" -m pytest -q --tb=short --timeout=180 -p no:cacheprovider tests/gpu/test_pools.py
exit 0
