"""The command line: `blockdex serve`, `blockdex plan`, `blockdex loadtest`, `blockdex health`, `blockdex info`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, MessageToJson

from blockdex.client.command_line import EndpointError, add_endpoint_flags, endpoint_of
from blockdex.client.endpoint import Endpoint
from blockdex.client.failures import error_of_call
from blockdex.contract.version import VERSION
from blockdex.flags import REFUSED, FlagParser
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc

OK, FAILED, INTERRUPTED = 0, 1, 130

_PATIENT = ()
"""gRPC's own options: a command asks once, and a client's would give a connection up early and try again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments (without the program's name) say; the exit status is the answer.

    0: done. 1: a server does not answer, or does not serve. 2: refused, with one line on stderr that says why.
    """
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read, `head` for instance, has seen enough. Python itself would write what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return status


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    if words[:1] == ["loadtest"]:
        return _loadtest(words[1:])
    if words[:1] == ["plan"]:
        return _plan(words[1:])
    options = _parser().parse_args(words)
    run: Callable[[argparse.Namespace, Endpoint], int] = options.run
    try:
        return run(options, endpoint_of(options))
    except (EndpointError, ValueError) as error:
        return _refuse(options.command, str(error))


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="blockdex", description="Block selection for block-sparse attention, served from a sidecar."
    )
    parser.add_argument("--version", action="version", version=f"blockdex {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run a server; `blockdex serve --help` lists its settings")
    commands.add_parser("loadtest", help="load on a server; `blockdex loadtest --help` lists its settings")
    commands.add_parser("plan", help="memory of so many tokens; `blockdex plan --help` lists what to say")
    health = commands.add_parser("health", help="exit with 0 if a server serves, with 1 if not")
    health.set_defaults(run=_health)
    info = commands.add_parser("info", help="what a server is, holds and can do")
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="as ProtoJSON, like /v1/info")
    for command in (health, info):
        add_endpoint_flags(command)
        command.add_argument(
            "--timeout", type=float, default=5.0, metavar="SECONDS", help="longest wait (default: %(default)s)"
        )
    return parser


def _serve(words: Sequence[str]) -> int:
    try:
        # Only here, so that the other commands run with the client's packages alone and without loading torch.
        from blockdex.server.config import ConfigError, load_settings  # noqa: PLC0415
        from blockdex.server.main import serve  # noqa: PLC0415

        try:
            settings = load_settings(words)
        except ConfigError as error:
            return _refuse("serve", str(error))
        return serve(settings, lambda: load_settings(words))
    except ModuleNotFoundError as error:
        return _refuse_without("serve", error)


def _loadtest(words: Sequence[str]) -> int:
    from blockdex.loadtest.command import loadtest  # noqa: PLC0415 - only here, as above

    return loadtest(words)


def _plan(words: Sequence[str]) -> int:
    from blockdex.cli.sizing import plan  # noqa: PLC0415 - only here, as above

    return plan(words)


def _health(options: argparse.Namespace, endpoint: Endpoint) -> int:
    try:
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415 - comes with the server's packages
    except ModuleNotFoundError as error:
        return _refuse_without("health", error)
    with endpoint.channel(_PATIENT) as channel:
        try:
            request, metadata = health_pb2.HealthCheckRequest(), endpoint.metadata(None)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=options.timeout, metadata=metadata)
        except grpc.RpcError as error:
            return _unanswered(options.address, error)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(status)
    return OK if answer.status == health_pb2.HealthCheckResponse.SERVING else FAILED


def _info(options: argparse.Namespace, endpoint: Endpoint) -> int:
    with endpoint.channel(_PATIENT) as channel:
        try:
            answer = pb_grpc.IndexerServiceStub(channel).GetInfo(
                pb.GetInfoRequest(), timeout=options.timeout, metadata=endpoint.metadata(None)
            )
        except grpc.RpcError as error:
            return _unanswered(options.address, error)
    if options.json:
        print(MessageToJson(answer, always_print_fields_with_no_presence=True))
    else:
        fields = MessageToDict(answer, always_print_fields_with_no_presence=True, preserving_proto_field_name=True)
        print("\n".join(_lines(fields)))
    return OK


def _lines(fields: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif name == "kernels":
            yield f"{indent}{name}:"
            for kernel in value:
                phase = kernel["phase"].removeprefix("PHASE_").lower()
                yield f"{indent}  {phase}: {kernel['kernel']} ({kernel['reason']})"
        else:
            yield f"{indent}{name}: {', '.join(value) if isinstance(value, list) else value}"


def _unanswered(address: str, error: grpc.RpcError) -> int:
    failure = error_of_call(error, address)
    print(f"blockdex: {address}: {failure.code.name}: {failure.message.removeprefix(f'{address}: ')}", file=sys.stderr)
    return FAILED


def _refuse_without(command: str, error: ModuleNotFoundError) -> int:
    if error.name is None or error.name.startswith("blockdex"):
        raise error
    return _refuse(command, f"package {error.name!r} is missing: pip install 'blockdex[server]'")


def _refuse(command: str, why: str) -> int:
    print(f"blockdex {command}: {why}", file=sys.stderr)
    return REFUSED
