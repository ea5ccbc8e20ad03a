#!/usr/bin/env bash
# Tests and figures of device channels on a GPU, each part for so many seconds at most.
set -u
python=${PYTHON:-python}
out=${OUT:-.}
part() { # seconds, name, command
    local seconds=$1 name=$2
    shift 2
    echo "== $name" | tee -a "$out/device_channel.log"
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$out/device_channel.log"
    echo "== $name: ended with ${PIPESTATUS[0]}" | tee -a "$out/device_channel.log"
}
export PYTHONUNBUFFERED=1
part 120 "kernels, both twins" "$python" -m pytest -q -s -x --timeout=60 tests/device_channel
part 90 "kernels in graphs, shared memory" "$python" -m pytest -q -s --timeout=40 tests/gpu/test_device_kernels.py
