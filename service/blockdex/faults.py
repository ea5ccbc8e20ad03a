"""Faults made on purpose at the seams where a machine fails by itself, to see what a server makes of them.

Off unless `BLOCKDEX_FAULTS` is set when a process starts: names of seams, each with the share of its uses that fail,
and a seed. With `launch=0.01,clock=0.001,leap=30,seed=7` one launch in a hundred fails, and one reading of the clock in
a thousand is 30 seconds ahead. Every fault is a line on the standard error.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Literal, get_args

from blockdex.logs import log_event

logger = logging.getLogger(__name__)

VARIABLE = "BLOCKDEX_FAULTS"

Seam = Literal["allocation", "launch", "copy", "ring_write", "socket", "clock"]
"""Where a fault is made:

allocation: memory for a request in the core, and memory of the device for a selection.
launch: a step of the device.
copy: pages that are copied on the device.
ring_write: a slot of a frontend, which has nonsense in it.
socket: the connection between two processes of the server, which ends in the midst of what is said.
clock: one reading of the clock of the core, the cache and the scheduler, which leaps ahead, and back at the next.
"""

SEAMS: tuple[Seam, ...] = get_args(Seam)

_LEAP_SECONDS = 60.0
_armed = False


class FaultsError(ValueError):
    """`BLOCKDEX_FAULTS` cannot be read."""


def arm(text: str | None = None) -> None:
    """Switches on what `BLOCKDEX_FAULTS` asks for in this process, or a text like it; nothing where there is none.

    Raises:
        FaultsError: it cannot be read, with what is wrong with it.
    """
    global _armed  # noqa: PLW0603 - one switch a process, read at every seam
    text = os.environ.get(VARIABLE, "") if text is None else text
    if not text:
        return
    numbers: dict[str, float] = {"seed": 0, "leap": _LEAP_SECONDS}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in {*SEAMS, *numbers}:
            raise FaultsError(f"{VARIABLE}: {name!r} is no seam; there are {', '.join(SEAMS)}, and leap and seed")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise FaultsError(f"{VARIABLE}: {name} must be a number, got {number!r}") from None
        if name in SEAMS and not 0 <= numbers[name] <= 1:
            raise FaultsError(f"{VARIABLE}: {name} must be 0 to 1, got {number}")
    native = importlib.import_module("blockdex._native")
    native.arm_faults(int(numbers["seed"]), numbers["leap"], tuple(numbers.get(seam, 0.0) for seam in SEAMS))
    _armed = True
    log_event(logger, logging.WARNING, "faults are made on purpose: this is no server to rely on", faults=text)


def strikes(seam: Seam) -> bool:
    """Whether a seam is to fail now."""
    return _armed and _strikes(seam)


def _strikes(seam: Seam) -> bool:
    native = importlib.import_module("blockdex._native")
    struck: bool = native.fault_strikes(SEAMS.index(seam))
    return struck
