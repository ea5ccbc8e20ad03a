#!/usr/bin/env bash
# Figures and tests of shared memory on a GPU, each part for so many seconds at most.
set -u
python=${PYTHON:-python}
out=${OUT:-.}
log=$out/regions.log
export PYTHONUNBUFFERED=1
part() { # seconds, name, command
    local seconds=$1 name=$2 began=$SECONDS
    shift 2
    echo "== $name" | tee -a "$log"
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log"
    echo "== $name: ended with ${PIPESTATUS[0]} after $((SECONDS - began)) s" | tee -a "$log"
}

part 60 "figures" "$python" -m benchmarks.regions
part 90 "regions" "$python" -m pytest -q --tb=short --timeout=60 -p no:cacheprovider tests/gpu/test_regions.py
part 60 "steps" "$python" -m pytest -q --tb=short --timeout=60 -p no:cacheprovider tests/gpu/test_executor.py
part 40 "kernels" "$python" -m pytest -q --tb=short --timeout=60 -p no:cacheprovider tests/kernels/test_triton_stage.py
exit 0
