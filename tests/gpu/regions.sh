#!/usr/bin/env bash
# Tests of shared memory on a GPU, each part for so many seconds at most; with `quick` the shortest of them. Figures are
# rows of `python -m benchmarks.colocated`.
set -u
python=${PYTHON:-python}
out=${OUT:-.}
log=$out/regions.log
export PYTHONUNBUFFERED=1
. "$(dirname "$0")/part.sh"
tests=("$python" -m pytest -q --tb=short --timeout=60 -p no:cacheprovider)

if [ "${1:-}" = quick ]; then
    part 40 "regions" "${tests[@]}" -k "slices or bf16 or refused or are_read or appended" tests/gpu/test_regions.py
    exit 0
fi
part 100 "regions" "${tests[@]}" tests/gpu/test_regions.py
part 60 "client" "${tests[@]}" tests/gpu/test_shared_regions.py
part 60 "steps" "${tests[@]}" tests/gpu/test_executor.py
part 40 "kernels" "${tests[@]}" tests/kernels/test_triton_stage.py
exit 0
