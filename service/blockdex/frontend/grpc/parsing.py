"""Bytes that are no message, refused as such: gRPC itself would say UNKNOWN, and log a traceback of each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from blockdex.contract.errors import InvalidArgumentError, Reason
from blockdex.frontend.grpc.call_context import RequestLog
from blockdex.frontend.grpc.status import Context, refuse


def checked(
    rpc: str, handler: grpc.RpcMethodHandler[Any, Any], log: RequestLog, *, is_counted: bool
) -> grpc.RpcMethodHandler[Any, Any]:
    """The same method, which refuses bytes that are no message as MALFORMED_MESSAGE.

    Args:
        rpc: its name.
        handler: of one request, or of a stream in both directions; as messages.
        log: told of what is refused.
        is_counted: whether metrics are told of it too.
    """
    parse, method = handler.request_deserializer, _method_of(handler)
    assert parse is not None

    def read(message: bytes, context: Context) -> Any:
        """The message; None where it was refused."""
        try:
            return parse(message)
        except DecodeError:
            call = log.call_of(context)
            error = InvalidArgumentError(f"{rpc}: its {len(message)} bytes are no message", Reason.MALFORMED_MESSAGE)
            if is_counted:
                log.answered(rpc, error, time.monotonic(), call)
            refuse(context, error, call.request_id)
            return None

    async def unary(message: bytes, context: Context) -> Any:
        request = read(message, context)
        return None if request is None else await method(request, context)

    async def watch(message: bytes, context: Context) -> None:
        if (request := read(message, context)) is not None:
            await method(request, context)

    async def stream(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async def parsed() -> AsyncIterator[Any]:
            async for message in messages:
                if (request := read(message, context)) is None:
                    return
                yield request

        async for response in method(parsed(), context):
            yield response

    respond = handler.response_serializer
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, response_serializer=respond)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(watch, response_serializer=respond)
    return grpc.unary_unary_rpc_method_handler(unary, response_serializer=respond)


def _method_of(handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_stream


class CheckingServer:
    """A server as generated code takes it, which adds services that refuse what is no message."""

    def __init__(self, server: grpc.aio.Server, log: RequestLog) -> None:
        self._server = server
        self._log = log

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Nothing: the same methods come by their names."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Adds a service's methods."""
        methods = {rpc: checked(rpc, handler, self._log, is_counted=False) for rpc, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
