"""Device channels of a client, blocking or not: what they are opened with."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

from blockdex.client.answers import Info
from blockdex.client.core import Core
from blockdex.client.ring import socket_to
from blockdex.contract.errors import BlockdexError

if TYPE_CHECKING:
    from blockdex.device_channel.channel import DeviceChannel


class ChannelOptions(TypedDict, total=False):
    """What a channel is opened with.

    Attributes:
        device: where the tensors of its calls are; `cuda`.
        max_tokens: of a call, padding included; 64, at most 512.
        max_rows: sequences of a call, likewise; at most 256. Left out: as many as tokens.
        first_head: first head of the queries; 0.
        num_heads: how many there are; 0, all from the first one on.
        bound_seconds: longest that a call waits for its answer; 2, at most 60.
        own_bytes: room for tensors of `DeviceChannel.empty`; 0.
    """

    device: str
    max_tokens: int
    max_rows: int
    first_head: int
    num_heads: int
    bound_seconds: float
    own_bytes: int


def open_channel(core: Core, info: Info, **options: Unpack[ChannelOptions]) -> DeviceChannel:
    """A channel to the server that said this of itself."""
    from blockdex.device_channel.channel import DeviceChannel  # noqa: PLC0415 - torch and Triton

    return DeviceChannel(socket_to(core, info), core.tenant or "", info.spec, info.epoch, **options)


def obstacle_of_channels(core: Core, info: Info, device: str) -> str:
    """Why no channel can be opened from a device, as a sentence; empty where one can, which is closed again."""
    try:
        open_channel(core, info, device=device, max_tokens=1).close()
    except BlockdexError as error:
        return error.message
    except (AssertionError, ImportError, OSError, RuntimeError) as error:  # of torch, Triton or the driver
        return f"no device channel from {device}: {error}"
    return ""


def reopen_channel(core: Core, info: Info, channel: DeviceChannel) -> None:
    """Opens a channel again, to the server that said this of itself."""
    channel.reopen(socket_to(core, info), info.epoch)
