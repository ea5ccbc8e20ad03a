"""Faults of device channels: the kernels in Triton, the hand-over, and how a core takes and answers their requests."""

from __future__ import annotations

from mutants.mutant import Mutant

_KERNELS, _CALLS, _MEMORY = (f"device_channel/{name}.py" for name in ("kernels", "calls", "memory"))
_CHANNEL, _CONNECTION = "device_channel/channel.py", "device_channel/connection.py"
_HAND_OVER, _SERVER = "ring/channels.py", "csrc/ring/server.c"
_ADMIT, _ANSWER, _LAUNCH, _LOOP, _REQUEST = (
    f"csrc/core/{name}.c" for name in ("admit", "answer", "launch", "loop", "request")
)
_IN_KERNELS = ("device_channel/test_kernels.py",)
_IN_CHANNEL = ("device_channel/test_channel.py",)
_IN_CORE = ("scheduler/test_core_channels.py",)

MUTANTS = (
    # --- The kernels ---
    Mutant(
        "rows with gaps are read where they lie",
        _KERNELS,
        "is_packed = tl.sum(((length > 0) & (first != row * row_tokens)).to(tl.int32), 0) == 0",
        "is_packed = row_tokens > 0",
        _IN_KERNELS,
    ),
    Mutant("padding has a place", _KERNELS, "tl.where(live, place, -1)", "tl.where(live, place, place)", _IN_KERNELS),
    Mutant("padding has a row", _KERNELS, "    live = length > 0\n", "    live = length >= 0\n", _IN_KERNELS),
    Mutant(
        "the number of the replay is left out",
        _KERNELS,
        "        revision += tl.load(replays)",
        "        tl.load(replays)",
        _IN_KERNELS,
    ),
    Mutant(
        "lengths are not checked", _KERNELS, "        elif invalid > 0:", "        elif invalid > 1000:", _IN_KERNELS
    ),
    Mutant(
        "one request behind another",
        _KERNELS,
        "        if answered != written:",
        "        if answered > written:",
        _IN_KERNELS,
    ),
    Mutant("a request without rows", _KERNELS, "if tl.sum(length, 0) > 0:", "if tl.sum(length, 0) >= 0:", _IN_KERNELS),
    Mutant(
        "ids of an earlier call stay",
        _KERNELS,
        "            place = tl.where(error == 0, place, -1)\n",
        "",
        _IN_KERNELS,
    ),
    Mutant(
        "scores of an earlier call stay",
        _KERNELS,
        "inside, _MINUS_INFINITY, WIDTH",
        "inside & (place >= 0), _MINUS_INFINITY, WIDTH",
        _IN_KERNELS,
    ),
    Mutant("no bound", _KERNELS, "(time - begin > bound)", "(time - begin > bound * 1000)", _IN_KERNELS),
    Mutant("refusals are not looked for", _KERNELS, "(refusals != 0)", "(refusals > 1)", _IN_KERNELS),
    Mutant(
        "the host is not heard",
        _KERNELS,
        "error = load_acquire(segment + _CHANNEL_ERROR).to(tl.int32)",
        "error = load_acquire(segment + _CHANNEL_ERROR).to(tl.int32) & 0",
        _IN_KERNELS,
    ),
    Mutant("the host is not told", _KERNELS, "    if error != dead:\n", "    if error < dead:\n", _IN_KERNELS),
    Mutant("a dead channel asks", _KERNELS, "    if dead == 0:", "    if dead >= 0:", _IN_KERNELS),
    # --- The client ---
    Mutant("numbers begin anew", _CHANNEL, "_GENERATION = 1 << 32", "_GENERATION = 0", _IN_CHANNEL),
    Mutant("the watcher sees nothing", _CONNECTION, "            self._lost()\n", "", _IN_CHANNEL),
    Mutant("any dtype", _CALLS, "        if tensor.dtype not in _NUMBERS:", "        if False:", _IN_CHANNEL),
    Mutant(
        "scores are never raw", _CALLS, "RAW_SCORES if call.raw_scores else RETURN_SCORES", "RETURN_SCORES", _IN_CHANNEL
    ),
    Mutant("always ascending", _CALLS, "ORDERS.index(call.order) + 1", "1", _IN_CHANNEL),
    Mutant("any strides", _CALLS, "    if not tensor.is_contiguous():", "    if False:", _IN_CHANNEL),
    Mutant("any number of tokens", _CALLS, "<= max_tokens:", "<= 1 << 20:", _IN_CHANNEL),
    Mutant(
        "a refusal is not taken",
        _MEMORY,
        '        counters[AT["answers_read"] // 8] = counters[AT["answers_written"] // 8]\n',
        "",
        _IN_CHANNEL,
    ),
    # --- The hand-over ---
    Mutant(
        "a segment that can be shrunk", _HAND_OVER, "    if seals & _SEALS != _SEALS:", "    if False:", _IN_CHANNEL
    ),
    Mutant("a large segment", _HAND_OVER, "> MAX_SEGMENT_BYTES:", "> 1 << 30:", _IN_CHANNEL),
    Mutant("any epoch", _HAND_OVER, '        if words.get("epoch") != epoch:', "        if False:", _IN_CHANNEL),
    Mutant("nobody's channel", _HAND_OVER, "        if not self._tenant:", "        if False:", _IN_CHANNEL),
    Mutant("any bound", _HAND_OVER, " or not 0 < bound <= MOST_BOUND_SECONDS", "", _IN_CHANNEL),
    Mutant("any number of channels", _HAND_OVER, ">= MAX_CHANNELS:", ">= 1000:", _IN_CHANNEL),
    Mutant("a refused segment stays open", _HAND_OVER, "        os.close(own)\n", "", _IN_CHANNEL),
    Mutant("memory without room", _SERVER, "memory->bytes < BLOCKDEX_HEADER_BYTES || ", "", _IN_CORE),
    Mutant(
        "requests are counted from 0",
        _SERVER,
        "    link->read = atomic_load_explicit(&header->requests_written, memory_order_acquire);\n",
        "",
        _IN_CORE,
    ),
    Mutant(
        "answers are counted from 0",
        _SERVER,
        "    link->written = atomic_load_explicit(&header->answers_read, memory_order_acquire);\n",
        "",
        _IN_CORE,
    ),
    # --- The core ---
    Mutant(
        "received when it was read", _REQUEST, "slot.received = link->channel.looked;", "slot.received = now;", _IN_CORE
    ),
    Mutant("any epoch of a request", _REQUEST, "        slot.epoch = link->channel.epoch;\n", "", _IN_CORE),
    Mutant(
        "requests that nobody waits for are taken",
        _REQUEST,
        "        if (atomic_load_explicit(&link->header->channel_error, memory_order_acquire)) return;\n",
        "",
        _IN_CORE,
    ),
    Mutant(
        "the core forgets when it looked",
        _ADMIT,
        "            channel->looked = now;\n",
        "",
        _IN_CORE,
    ),
    Mutant("signalled twice", _ANSWER, "    request->signalled = true;\n", "", _IN_CORE),
    Mutant(
        "a success has an answer", _ANSWER, "if (!succeeded && !server_link_answer", "if (!server_link_answer", _IN_CORE
    ),
    Mutant(
        "a refusal is signalled",
        _ANSWER,
        "request->link->channel.bound && !answer.code",
        "request->link->channel.bound",
        _IN_CORE,
    ),
    Mutant(
        "no step signals",
        _LAUNCH,
        "        if (!shape->num_addresses || !request->link->channel.on_device) continue;\n",
        "        continue;\n",
        _IN_CORE,
    ),
    Mutant(
        "nobody signals what a step has no room for",
        _LAUNCH,
        "if (request->link->channel.on_device && !request->signalled)",
        "if (request->link->channel.on_device && request->signalled)",
        _IN_CORE,
    ),
    Mutant(
        "more signals than there is room for", _LAUNCH, " && signals < CORE_SIGNALS", " && signals < 1000", _IN_CORE
    ),
    Mutant(
        "a signal that goes well hides a launch that did not",
        "csrc/core/core.h",
        "if (!error || core->driver_error) return;",
        "",
        _IN_CORE,
    ),
    Mutant("a signal that failed goes on", _LOOP, "core->no_memory || core->driver_error", "core->no_memory", _IN_CORE),
    Mutant(
        "the core sleeps beside a channel",
        _LOOP,
        "    if (core->num_channels && now + nap < until) until = now + nap;\n",
        "",
        _IN_CORE,
    ),
    Mutant("the core never naps", _LOOP, "CHANNEL_SPIN = 100000000", "CHANNEL_SPIN = 100000000000", _IN_CORE),
    # --- Those that come together ---
    Mutant(
        "who came together is not waited for",
        _ADMIT,
        "        if (others_come(core, now)) return true;\n",
        "",
        _IN_CORE,
    ),
    Mutant(
        "who is waited for is waited for for ever",
        _ADMIT,
        "        if (now - asking->came >= core->hold) return false;\n",
        "",
        _IN_CORE,
    ),
    Mutant(
        "strangers are waited for",
        _ADMIT,
        "return late->came && asking->before && -core->hold < apart && apart < core->hold;",
        "return late->came && asking->before && apart < core->hold;",
        _IN_CORE,
    ),
)
