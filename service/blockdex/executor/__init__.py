"""Steps on a device: CUDA graphs, slices of prefill, step buffers, and the same on a CPU."""
