#!/usr/bin/env bash
# Tests of device channels on a GPU, each part for so many seconds at most: alone, then under MPS. Their figures are a
# row of `python -m benchmarks.colocated`; what a kill does under MPS shows `colocated.sh`.
set -u
python=${PYTHON:-python}
out=${OUT:-.}
log=$out/device_channel.log
export PYTHONUNBUFFERED=1
. "$(dirname "$0")/part.sh"
tests() { "$python" -m pytest -q -s --timeout=80 -p no:cacheprovider "$@"; }
export -f tests
export python

part 60 "kernels, both twins" bash -c 'tests -x tests/device_channel/test_kernels.py'
part 40 "kernels in graphs, shared memory" bash -c 'tests tests/gpu/test_device_kernels.py'
part 120 "channels" bash -c 'tests --maxfail=3 tests/gpu/test_device_channel.py'

export CUDA_MPS_PIPE_DIRECTORY=/tmp/blockdex-mps CUDA_MPS_LOG_DIRECTORY=/tmp/blockdex-mps-log
mkdir -p $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY
nvidia-cuda-mps-control -d
part 100 "channels under MPS, nobody killed" bash -c 'tests -k "not killed" tests/gpu/test_device_channel.py'
echo quit | timeout 10 nvidia-cuda-mps-control
cp $CUDA_MPS_LOG_DIRECTORY/*.log "$out" 2>/dev/null
exit 0
