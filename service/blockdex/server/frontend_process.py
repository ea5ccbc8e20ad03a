"""A frontend: gRPC on one side, the ring to the engine core on the other. Never touches torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from blockdex.contract.credentials import Credentials
from blockdex.frontend.grpc.server import RpcServer, start_rpc_server
from blockdex.frontend.http.metrics import RequestMetrics
from blockdex.ring.client import RingChannel, Spinning
from blockdex.ring.control_channel import ControlChannel, Words
from blockdex.ring.selector import RingSelector
from blockdex.server.bootstrap import FLUSH_SECONDS, set_weights, spin_seconds, start_tracing, tell_seconds
from blockdex.server.child_process import run_child
from blockdex.server.config import ServeSettings
from blockdex.server.request_counts import words_of

_WRITE_SECONDS = 1.0
"""How long answers that are there may take to be written."""


class Frontend:
    """One frontend, which serves while the engine core is there.

    Args:
        control: the channel to the supervisor.
        settings: of the server.
        address: where the engine core listens.
        selector: of its loop.
    """

    def __init__(self, control: ControlChannel, settings: ServeSettings, address: str, selector: RingSelector) -> None:
        self._control = control
        self._settings = settings
        self._requests = RequestMetrics()
        self._tracing = start_tracing(settings)
        set_weights(settings)
        self._there = asyncio.Event()
        self._changes: asyncio.Queue[bool] = asyncio.Queue()
        seconds = spin_seconds(settings)
        self._channel = RingChannel(
            address,
            changed=self._changes.put_nowait,
            tell_seconds=tell_seconds(settings),
            timed=self._requests.observe_many,
            spinning=Spinning(selector, seconds) if seconds else None,
        )

    async def run(
        self, grpc_address: str, share_port: bool, credentials: Credentials, heard: AsyncIterator[Words]
    ) -> None:
        """Serves until the supervisor has it finish, or is gone."""
        connecting = asyncio.create_task(self._channel.run())
        # By itself it ends by a fault alone; then this frontend ends too, and another one is started.
        connecting.add_done_callback(lambda _: self._control.hang_up())
        await self._changes.get()
        try:
            rpc = await start_rpc_server(
                self._channel,
                grpc_address,
                observer=self._requests,
                slow_request_seconds=self._settings.slow_request_seconds,
                min_ping_seconds=self._settings.min_ping_seconds,
                tracing=self._tracing,
                share_port=share_port,
                credentials=credentials,
            )
        except OSError as error:
            self._control.tell({"refused": str(error)})
            return
        self._control.tell({"listening": rpc.address, "serving": True})
        telling = asyncio.create_task(self._tell_changes(rpc))
        finishing: asyncio.Task[None] | None = None
        async for told in heard:
            match told:
                case {"ask": "requests"}:
                    self._channel.tell_times()
                    self._control.tell({"answer": words_of(self._requests)})
                case {"credentials": dict(words)}:
                    rpc.take_up(Credentials.restore(words))
                case {"drain": True}:
                    telling.cancel()
                    await rpc.stop_being_ready()
                case {"ask": "refuse_new"}:
                    self._channel.refuse_new()
                    self._control.tell({"answer": {}})
                case {"finish": float(grace)}:
                    finishing = asyncio.create_task(self._finish(rpc, grace))
        if connecting.done():
            connecting.result()
        for task in (connecting, telling):
            task.cancel()
        await asyncio.gather(connecting, telling, return_exceptions=True)
        if finishing is not None:
            await finishing

    async def _tell_changes(self, rpc: RpcServer) -> None:
        while True:
            there = await self._changes.get()
            await rpc.be_ready(there)
            self._control.tell({"serving": there})

    async def _finish(self, rpc: RpcServer, grace: float) -> None:
        await self._channel.drain(grace)
        await rpc.stop(_WRITE_SECONDS)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close, FLUSH_SECONDS)
        self._control.hang_up()


def main() -> None:
    """The process."""
    selector = RingSelector()

    async def run(control: ControlChannel, settings: ServeSettings, words: Words, heard: AsyncIterator[Words]) -> None:
        frontend = Frontend(control, settings, words["address"], selector)
        credentials = Credentials.restore(words["credentials"])
        await frontend.run(words["grpc_address"], words["share_port"], credentials, heard)

    run_child(run, selector)


if __name__ == "__main__":
    main()
