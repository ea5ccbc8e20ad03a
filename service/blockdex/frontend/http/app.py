"""The HTTP side: is it alive, does it serve, what does it count, what is it, and a page to look at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from google.protobuf.json_format import MessageToDict

from blockdex.contract.errors import UnavailableError
from blockdex.contract.version import VERSION
from blockdex.frontend.grpc.convert import info_response
from blockdex.frontend.http.gpu_metrics import GpuCollector
from blockdex.frontend.http.live_page import LiveView
from blockdex.frontend.http.metrics import Metrics
from blockdex.frontend.http.readiness import Readiness
from blockdex.ring.engine_reports import Reports

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_HEADERS = {
    # The page is its own files and talks to its own server: nothing else, from nowhere else, in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(
    reports: Reports, metrics: Metrics, live: LiveView, readiness: Readiness, gpu: GpuCollector | None = None
) -> FastAPI:
    """The application of one server.

    Args:
        reports: of the engine.
        metrics: what `/metrics` answers.
        live: what the page shows.
        readiness: whether the server takes requests.
        gpu: the engine's, if it has one.
    """
    # The pages with the API's documentation would load scripts from elsewhere.
    app = FastAPI(title="blockdex", docs_url=None, redoc_url=None)

    @app.exception_handler(UnavailableError)
    async def unavailable(request: Request, error: UnavailableError) -> Response:
        """503 while the engine is gone."""
        del request
        return PlainTextResponse(f"{error.message}\n", status_code=503)

    # All of them are coroutines, so that the engine is only ever used on its loop.
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
    async def exposition(request: Request) -> Response:
        """Prometheus text, or OpenMetrics where the caller accepts it."""
        body, content_type = await metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    @app.get("/v1/info")
    async def info() -> Response:
        """What `GetInfo` answers, as ProtoJSON: 64-bit numbers are strings. Of a GPU, also who takes it in turns."""
        message = info_response(await reports.info(), VERSION)
        words = MessageToDict(message, always_print_fields_with_no_presence=True)
        if gpu is not None:
            await gpu.refresh()
            words["gpuProcessesInTurns"] = gpu.in_turns
        return JSONResponse(words)

    @app.get("/v1/live")
    async def live_view() -> Response:
        """What the page shows, as of the last second."""
        headers = PAGE_HEADERS | {"cache-control": "no-store"}
        return Response(await live.body(), media_type="application/json", headers=headers)

    for path, (name, content_type) in PAGE_FILES.items():
        app.get(path, include_in_schema=False)(_page_file(name, content_type))
    return app


def _page_file(name: str, content_type: str) -> Callable[[], Awaitable[Response]]:
    body = (files("blockdex.frontend.http") / "page" / name).read_bytes()
    headers = PAGE_HEADERS | {"content-type": content_type}

    async def answer() -> Response:
        return Response(body, headers=headers)

    return answer
