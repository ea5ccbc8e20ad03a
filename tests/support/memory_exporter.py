"""A process that shares memory of its GPU over the socket it inherits, and says what it finds there when asked."""

from __future__ import annotations

import ctypes
import socket
import sys

import torch

from blockdex_kernels import cuda_driver

SIZE = 4 << 20


def main() -> None:
    torch.zeros(1, device="cuda")
    handle = cuda_driver.create(0, SIZE, shared=True)
    fd = cuda_driver.export_file(handle)
    address = cuda_driver.reserve(SIZE, cuda_driver.granularity(0))
    cuda_driver.map_memory(address, SIZE, handle, 0)
    cuda_driver.call("cuMemsetD8_v2", address, 7, SIZE)
    cuda_driver.call("cuCtxSynchronize")
    with socket.socket(fileno=int(sys.argv[1])) as connected:
        socket.send_fds(connected, [b"here"], [fd])
        connected.recv(1)
        first = bytearray(1)
        torch.cuda.synchronize()
        cuda_driver.call("cuMemcpyDtoH_v2", (ctypes.c_char * 1).from_buffer(first), address, 1)
        connected.sendall(bytes(first))
        connected.recv(1)


if __name__ == "__main__":
    main()
