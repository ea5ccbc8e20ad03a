"""Faults of the cache, the loop and the core that show in some order of events alone."""

from __future__ import annotations

from mutants.mutant import Mutant

_SIMULATION = ("scheduler/test_simulation.py",)

MUTANTS = (
    Mutant(
        "what a prefill reads is evicted",
        "cache/eviction.py",
        "idle & (sequences.reading_sequence[entries] == 0)",
        "idle & (sequences.reading_sequence[entries] >= 0)",
        _SIMULATION,
    ),
    Mutant(
        "a batch evicts what a later request of it names",
        "cache/index_cache.py",
        "        named = np.concatenate((named, self._named))\n",
        "",
        ("scheduler/test_faults.py",),
    ),
    Mutant(
        "a page that was shared stays held",
        "cache/index_cache.py",
        "                pool.release(shared)\n",
        "",
        _SIMULATION,
    ),
    Mutant(
        "pages are not copied",
        "scheduler/loop.py",
        "self._executor.copy_pages(*map(",
        "list(map(",
        _SIMULATION,
    ),
    Mutant(
        "a step is made in the memory of one that runs",
        "csrc/core/loop.c",
        "if (core->in_flight < CORE_STEPS) {",
        "if (core->in_flight < CORE_STEPS + 1) {",
        _SIMULATION,
    ),
    Mutant(
        "a layer that a prefill reads is appended to",
        "scheduler/launcher.py",
        "        self._cache.begin_reading(prefill.layer, prefill.entry)\n",
        "        self._cache.begin_reading(1 - prefill.layer, prefill.entry)\n",
        _SIMULATION,
    ),
    Mutant(
        "what has pages is given up with them",
        "csrc/core/admit.c",
        "    if (request->has_pages) return false; /* it takes effect next */\n",
        "",
        _SIMULATION,
    ),
    Mutant(
        "what was cut keeps its pages",
        "scheduler/sequences.py",
        "            self._cache.trim(entry)",
        "            self._cache.trim(entry) if entry % 2 else None",
        _SIMULATION,
    ),
    Mutant(
        "steps of before a fault are waited for",
        "csrc/core/handover.c",
        "    core->in_flight = 0;\n",
        "",
        _SIMULATION,
    ),
)
