"""The HTTP side: is it alive, does it serve, what does it count, what is it."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from google.protobuf.json_format import MessageToJson
from prometheus_client.exposition import choose_encoder

from blockdex import __version__
from blockdex.rpc.convert import info_response
from blockdex.rpc.service import TRANSPORTS
from blockdex.transport.channel import Channel
from blockdex.web.metrics import RequestMetrics, metrics_registry
from blockdex.web.readiness import Readiness


def create_app(channel: Channel, requests: RequestMetrics, readiness: Readiness) -> FastAPI:
    """The application of one server.

    Args:
        channel: the engine.
        requests: what the gRPC side counts its requests in.
        readiness: whether the server takes requests.
    """
    # The pages with the API's documentation would load scripts from elsewhere.
    app = FastAPI(title="blockdex", docs_url=None, redoc_url=None)
    registry = metrics_registry(channel, requests, readiness)

    # All of them are coroutines, so that the channel is only ever used on its loop.
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """200 while the process answers at all."""
        return "alive\n"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> PlainTextResponse:
        """200 while requests are taken; 503 and the reason otherwise."""
        if readiness.ready:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"{readiness.obstacle}\n", status_code=503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus text, or OpenMetrics where the caller accepts it."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    @app.get("/v1/info")
    async def info() -> Response:
        """What `GetInfo` answers, as ProtoJSON: 64-bit numbers are strings."""
        message = info_response(channel.info(), __version__, TRANSPORTS)
        return Response(
            MessageToJson(message, always_print_fields_with_no_presence=True), media_type="application/json"
        )

    return app
