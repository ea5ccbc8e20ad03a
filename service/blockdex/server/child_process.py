"""A child of the supervisor, seen from both sides. Neither outlives the other for long, however it ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from blockdex.faults import arm
from blockdex.logs import configure_logging, set_level
from blockdex.ring.control_channel import ControlChannel, Words
from blockdex.server import mps
from blockdex.server.bootstrap import StartError
from blockdex.server.config import ServeSettings

Run = Callable[[ControlChannel, ServeSettings, Words, AsyncIterator[Words]], Coroutine[Any, Any, None]]
"""What a child does, given the conversation with the supervisor, the settings, what else it is told at the start, and
what it will be told from then on."""

END_SECONDS = 5.0
"""How long a child may take to end that has hung up or was told to stop."""

_PR_SET_PDEATHSIG = 1


class Child:
    """A process that the supervisor started, and the conversation with it; used on one asyncio loop.

    Attributes:
        pid: its process id.
        control: the channel to the process.
        heard: what it says.
        ended: its exit status (negative: the signal), once it has ended.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: ControlChannel) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self.pid = process.pid
        self.control = control
        self.heard = control.heard()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._has_ended)

    @classmethod
    async def start(
        cls, module: str, settings: ServeSettings, fds: Sequence[int] = (), **words: Any
    ) -> tuple[Child, Words]:
        """Starts a process and waits until it is ready.

        Args:
            module: its name; run as a program, it calls `run_child`.
            settings: of the server.
            fds: files that it inherits, under the same numbers.
            words: what else it is told.

        Returns:
            The child, and what it says when it is ready.

        Raises:
            StartError: it refuses, or ends first.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            control = await ControlChannel.on(ours)
            try:
                # A group of its own, since a terminal's Ctrl-C is the supervisor's business.
                process = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *fds),
                    process_group=0,
                )
            except OSError:
                control.hang_up()
                raise
        # Nothing was awaited since it began, so where this is cancelled it is always ended below.
        child = cls(process, control)
        child.control.tell({"settings": settings.model_dump(mode="json"), **words})
        try:
            said = await anext(child.heard, None)
            if said is None:
                raise StartError(f"{module} ended with {await child.end(END_SECONDS)} before it was ready")
            if "refused" in said:
                raise StartError(said["refused"])
        except BaseException:
            await child.kill()
            await child.ended
            raise
        return child, said

    async def end(self, seconds: float) -> int:
        """Waits until it has ended, and kills it if that takes longer; its exit status."""
        await asyncio.wait([self.ended], timeout=seconds)
        await self.kill()
        return await asyncio.shield(self.ended)

    async def kill(self) -> None:
        """Ends it at once, if it has not ended; under MPS that first gives back what it has on the GPU."""
        if not self.ended.done():
            await asyncio.to_thread(mps.end_client, self.pid)
            self._process.kill()

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.control.hang_up()
        self.ended.set_result(self._process.wait())


def run_child(run: Run, selector: selectors.BaseSelector | None = None) -> None:
    """What the process of a child does, from its beginning to its end.

    Signals to a server are the supervisor's to act on, who may still need the child when it is to stop. When the
    supervisor has ended, the kernel ends the child.

    Args:
        run: what is a child's own.
        selector: what its asyncio loop waits with; left out, asyncio's own.
    """
    connected, supervisor = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == supervisor:  # else it ended before the kernel was asked
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as executor:
            executor.run(_converse(connected, run))


async def _converse(connected: socket.socket, run: Run) -> None:
    control = await ControlChannel.on(connected)
    heard = control.heard()
    words = await anext(heard)
    settings = ServeSettings.restore(words["settings"])
    configure_logging(settings.log_format, settings.log_level)
    arm()
    await run(control, settings, words, _after_log_levels(heard))


async def _after_log_levels(heard: AsyncIterator[Words]) -> AsyncIterator[Words]:
    """What is heard besides another log level, which is alike for all children."""
    async for told in heard:
        match told:
            case {"log_level": str(level)}:
                set_level(level)
            case _:
                yield told
