"""The kernels of a device channel, in Triton and in CUDA, behind one call; the former on a CPU in the interpreter."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blockdex.device_channel import calls, kernels
from blockdex.device_channel.calls import Call, Heads
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring.channel_layout import REQUEST_SLOTS
from blockdex_kernels import IndexSpec, cuda_driver
from support.programs import REPOSITORY

HEADER = REPOSITORY / "service" / "blockdex" / "ring" / "include" / "blockdex_device.cuh"
THREADS = 256

Launch = Callable[[ChannelMemory, IndexSpec, Heads, Call, torch.Tensor | None, float], None]


class ChannelStruct(ctypes.Structure):
    """struct blockdex_channel."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("memory", "segment", "columns_at")),
        *((name, ctypes.c_uint64) for name in ("token_places", "keys", "queries", "block_ids")),
        ("slots", ctypes.c_uint32),
    )


class CallStruct(ctypes.Structure):
    """struct blockdex_call."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("keys", "queries")),
        *((name, ctypes.c_uint64) for name in ("ids", "starts", "lengths", "revisions", "replays")),
        *((name, ctypes.c_uint64) for name in ("kind", "layer", "heads")),
        *((name, ctypes.c_int64) for name in ("own_keys", "own_queries")),
        *((name, ctypes.c_uint32) for name in ("key_bytes", "query_bytes")),
        *((name, ctypes.c_int32) for name in ("rows", "row_tokens")),
    )


def launch_cuda(
    memory: ChannelMemory, spec: IndexSpec, heads: Heads, call: Call, block_ids: torch.Tensor | None, bound: float
) -> None:
    """As `calls.launch`, with the kernels of `blockdex_device.cuh`."""
    module = _module()
    places = memory.places
    channel = ChannelStruct(
        memory.address,
        memory.segment_address,
        memory.segment.request_arena_offset,
        places.token_places,
        places.keys,
        places.queries,
        places.block_ids,
        REQUEST_SLOTS,
    )
    asked = calls.words_of(memory, spec, heads, call)
    numbers = (call.ids, call.starts, call.lengths, call.revisions, call.replays)
    assert all(each is None or each.dtype == torch.int64 for each in numbers)
    struct = CallStruct(
        *(0 if each is None else each.data_ptr() for each in (call.keys, call.queries, *numbers)),
        asked.kind,
        call.layer,
        asked.heads,
        asked.own_keys,
        asked.own_queries,
        asked.key_bytes,
        asked.query_bytes,
        call.rows,
        call.row_tokens,
    )
    stream = torch.cuda.current_stream(memory.device).cuda_stream
    blocks = min(call.rows * call.row_tokens, 64)
    _run(module, "blockdex_ring_kernel", blocks, stream, channel, struct)
    width = 0 if block_ids is None else heads.count * spec.topk
    _run(
        module,
        "blockdex_wait_kernel",
        1,
        stream,
        channel,
        ctypes.c_uint64(0 if block_ids is None else block_ids.data_ptr()),
        ctypes.c_int32(call.rows * call.row_tokens if width else 0),
        ctypes.c_int32(width),
        ctypes.c_uint64(int(1e9 * bound)),
    )


def _run(module: int, name: str, blocks: int, stream: int, *arguments: Any) -> None:
    function = ctypes.c_uint64()
    cuda_driver.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    sizes = [ctypes.c_uint(number) for number in (blocks, 1, 1, THREADS, 1, 1, 0)]
    cuda_driver.call("cuLaunchKernel", function, *sizes, stream, addresses, 0)


@functools.cache
def _module() -> int:
    module = ctypes.c_uint64()
    cuda_driver.call("cuModuleLoadData", ctypes.byref(module), _compiled())
    return module.value


def _compiled() -> bytes:
    """PTX of the header, by the runtime compiler that comes with torch."""
    (library,) = [*Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/libnvrtc.so.*[0-9]"), None][:1]
    nvrtc = ctypes.CDLL(str(library or "libnvrtc.so.13"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=compute_{major}{minor}".encode(), b"--std=c++17"]
    checked = nvrtc.nvrtcCreateProgram(ctypes.byref(program), HEADER.read_bytes(), b"blockdex_device.cu", 0, None, None)
    assert checked == 0
    if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    assert nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    code = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetPTX(program, code) == 0
    return code.raw


def interpreted(patch: Callable[[object, str, object], None]) -> None:
    """Gives Triton's interpreter what stands in PTX, which it does not know."""
    import time

    import triton.language as tl

    def now() -> Any:
        time.sleep(0)
        return tl.full([], time.monotonic_ns(), tl.int64)

    def load_acquire(address: Any) -> Any:
        return tl.load(address.to(tl.pointer_type(tl.int64)))

    def store_release(address: Any, number: Any) -> None:
        tl.store(address.to(tl.pointer_type(tl.int64)), number)

    for function in (now, load_acquire, store_release):
        patch(kernels, function.__name__, function)


TWINS: dict[str, Launch] = {"triton": calls.launch}
if torch.cuda.is_available():
    TWINS["cuda"] = launch_cuda
