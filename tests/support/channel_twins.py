"""The kernels of a device channel behind one call: in Triton, in CUDA, and, for a CPU, in numpy.

Triton's interpreter runs one kernel at a time in a process, so where channels are used by several threads of one, numpy
takes its place.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from blockdex.device_channel import calls, kernels
from blockdex.device_channel.calls import Call, Heads
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring.channel_layout import (
    CONTROL_AT,
    INVALID_LENGTHS,
    REFUSED,
    REQUEST_SLOTS,
    TIMED_OUT,
    UNANSWERED,
)
from blockdex.ring.layout import AT, HEADER_BYTES, SLOT_BYTES, aligned
from blockdex_kernels import IndexSpec, cuda_driver
from support.programs import REPOSITORY

HEADER = REPOSITORY / "service" / "blockdex" / "ring" / "include" / "blockdex_device.cuh"
THREADS = 256

Launch = Callable[[ChannelMemory, IndexSpec, Heads, Call, torch.Tensor | None, float], None]


class ChannelStruct(ctypes.Structure):
    """struct blockdex_channel."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("memory", "segment", "columns_at")),
        *((name, ctypes.c_uint64) for name in ("token_places", "keys", "queries", "block_ids", "scores")),
        ("slots", ctypes.c_uint32),
    )


class CallStruct(ctypes.Structure):
    """struct blockdex_call."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("keys", "queries")),
        *((name, ctypes.c_uint64) for name in ("ids", "starts", "lengths", "revisions", "replays")),
        *((name, ctypes.c_uint64) for name in ("kind", "layer", "heads", "pool")),
        *((name, ctypes.c_int64) for name in ("own_keys", "own_queries")),
        *((name, ctypes.c_uint32) for name in ("key_bytes", "query_bytes", "wants_scores")),
        *((name, ctypes.c_int32) for name in ("rows", "row_tokens")),
    )


class SelectionStruct(ctypes.Structure):
    """struct blockdex_selection."""

    _fields_ = (("block_ids", ctypes.c_uint64), ("scores", ctypes.c_uint64))


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
        places.scores,
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
        call.pool,
        asked.own_keys,
        asked.own_queries,
        asked.key_bytes,
        asked.query_bytes,
        call.scores is not None,
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
        SelectionStruct(*(0 if each is None else each.data_ptr() for each in (block_ids, call.scores))),
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

    def now() -> Any:
        time.sleep(0)
        return tl.full([], time.monotonic_ns(), tl.int64)

    def load_acquire(address: Any) -> Any:
        return tl.load(address.to(tl.pointer_type(tl.int64)))

    def store_release(address: Any, number: Any) -> None:
        tl.store(address.to(tl.pointer_type(tl.int64)), number)

    for function in (now, load_acquire, store_release):
        patch(kernels, function.__name__, function)


def launch_numpy(
    memory: ChannelMemory, spec: IndexSpec, heads: Heads, call: Call, block_ids: torch.Tensor | None, bound: float
) -> None:
    """As `calls.launch`, on a CPU, by any thread: what the kernels do, one thing after the other."""
    places = ring_numpy(memory, spec, heads, call)
    numbers, (counted, error) = memory.segment.counters, _control(memory)
    began = time.monotonic()
    looked = began
    while not error[0] and counted["answered"][0] != counted["written"][0]:
        time.sleep(0)
        if time.monotonic() - looked < 20e-6:
            continue
        looked = time.monotonic()
        if memory.error:
            error[0] = memory.error
        elif numbers[AT["answers_written"] // 8] != numbers[AT["answers_read"] // 8]:
            error[0] = REFUSED
        elif looked - began > bound:
            error[0] = TIMED_OUT
    memory.segment.flags[AT["channel_error"] // 4] = error[0]
    if block_ids is None:
        return
    width, nothing = heads.count * spec.topk, (places < 0) | (error[0] != 0)
    targets = ((block_ids, memory.places.block_ids, -1), (call.scores, memory.places.scores, -np.inf))
    for target, begin, missing in targets:
        if target is None:
            continue
        dtype = target.numpy().dtype
        there = memory.bytes.numpy()[begin : begin + 4 * len(places) * width].view(dtype)
        found = there.reshape(-1, width)[places]
        found[nothing] = missing
        target.copy_(torch.from_numpy(found).view(target.shape))


def _control(memory: ChannelMemory) -> tuple[dict[str, NDArray[np.uint64]], NDArray[np.int32]]:
    """What a channel counts, by name, and its error."""
    control = memory.bytes.numpy()
    counted = {name: control[CONTROL_AT[name] :][:8].view(np.uint64) for name in ("answered", "written")}
    return counted, control[CONTROL_AT["error"] :][:4].view(np.int32)


def ring_numpy(memory: ChannelMemory, spec: IndexSpec, heads: Heads, call: Call) -> NDArray[np.int64]:
    """Rings, and waits for nothing; where each token of the call is in the channel's memory, or -1."""
    words, segment = calls.words_of(memory, spec, heads, call), memory.segment
    lengths = call.lengths.numpy().astype(np.int64)
    places = np.full(call.rows * call.row_tokens, -1)
    counted, error = _control(memory)
    if error[0]:
        return places
    if counted["answered"][0] != counted["written"][0]:
        error[0] = UNANSWERED
        return places
    if ((lengths < 0) | (lengths > call.row_tokens)).any():
        error[0] = INVALID_LENGTHS
        return places
    live, token = lengths > 0, np.arange(call.row_tokens)
    inside = (token < lengths[:, None]).reshape(-1)
    places[inside] = np.arange(inside.sum())
    if not inside.any():
        return places
    packed = bool((places[: inside.sum()] >= 0).all())
    offsets = []
    for tensor, own, staged in (
        (call.keys, words.own_keys, memory.places.keys),
        (call.queries, words.own_queries, memory.places.queries),
    ):
        in_place = packed and own >= 0
        offsets.append(0 if tensor is None else own if in_place else staged)
        if tensor is not None and not in_place:
            rows = tensor.view(torch.uint8).reshape(len(inside), -1)[torch.from_numpy(inside)].reshape(-1)
            memory.bytes[staged : staged + len(rows)] = rows
    revisions = np.zeros(call.rows, np.int64) if call.revisions is None else call.revisions.numpy().astype(np.int64)
    revisions = revisions + (0 if call.replays is None else int(call.replays))
    columns = np.stack([call.ids.numpy(), call.starts.numpy(), lengths, revisions])[:, live].astype(np.int64)
    data = columns.tobytes()
    segment.memory[segment.request_arena_offset : segment.request_arena_offset + len(data)] = data
    number, tokens = int(counted["written"][0]) + 1, int(lengths.sum())
    region = int(memory.bytes[CONTROL_AT["region"] :][:4].view(torch.int32)[0])
    has_keys, has_queries, has_scores = (each is not None for each in (call.keys, call.queries, call.scores))
    slot = (
        *(number, words.kind, 0, 0, 0, call.layer | columns.shape[1] << 32, words.heads, call.pool, 0, 0, 0),
        *(aligned(len(data)), words.key_bytes * tokens, words.query_bytes * tokens),
        *(region * has_keys | region * has_queries << 32, region * has_queries | region * has_scores << 32, *offsets),
        *(memory.places.block_ids * has_queries, memory.places.scores * has_scores),
    )
    at = HEADER_BYTES + (number - 1) % REQUEST_SLOTS * SLOT_BYTES
    segment.memory[at : at + 8 * len(slot)] = np.array(slot, np.uint64).tobytes()
    counted["written"][0] = number
    segment.counters[AT["requests_written"] // 8] = number
    return places


TWINS: dict[str, Launch] = {"triton": calls.launch}
if torch.cuda.is_available():
    TWINS["cuda"] = launch_cuda
else:
    TWINS["numpy"] = launch_numpy
