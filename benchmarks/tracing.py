"""What tracing costs: latency of calls to servers that trace none, a tenth and all of their requests, in one run.

Starts a collector, which throws away what it gets, and four `blockdex serve` of one process each. Each round makes one
call of each server, in turn; two of them trace nothing, so that their ratio says how exact the others are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from benchmarks.client import process
from benchmarks.environment import environment
from blockdex import Client

SERVERS = {"off": None, "off again": None, "a tenth": 0.1, "all": 1.0}
FLAGS = (
    "--num-layers=1 --cache-bytes=16MiB --device=cpu --processes=single --log-format=json "
    "--grpc-address=127.0.0.1:0 --http-address=127.0.0.1:0"
)
SERVING = r'"grpc": "([^"]+)"'
HEAD_DIM, HEADS, TOKENS = 128, 4, 128


class _Sink(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        del handler_call_details
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


def collect() -> None:
    """Takes whatever comes, until it is ended; says its port first."""
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((_Sink(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def measure(rounds: int) -> dict[str, float]:
    """Median seconds of an AppendAndSelect of one token, by server."""
    seconds: dict[str, list[float]] = {name: [] for name in SERVERS}
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(
            process(sys.executable, "-m", "benchmarks.tracing", "--collect", ready=r"^(\d+)$")
        )
        clients: dict[str, Client] = {}
        for name, ratio in SERVERS.items():
            flags = (
                [] if ratio is None else [f"--otlp-endpoint=http://127.0.0.1:{collector[1]}", f"--trace-ratio={ratio}"]
            )
            command = (sys.executable, "-m", "blockdex", "serve", *FLAGS.split(), *flags)
            server = stack.enter_context(process(*command, ready=SERVING))
            clients[name] = stack.enter_context(Client(server[1], transport="unary"))
            clients[name].open_sequence(1)
        keys, queries = np.ones((1, HEAD_DIM), np.float32), np.ones((1, HEADS, HEAD_DIM), np.float32)
        turn = list(clients.items())
        for number in range(rounds + rounds // 10):
            first = number % len(turn)
            for name, client in turn[first:] + turn[:first]:
                began = time.perf_counter()
                at = number % TOKENS
                client.append_and_select(0, sequences=[1], lengths=[1], starts=[at], keys=keys, queries=queries)
                if number >= rounds // 10:
                    seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3000, help="calls of each server")
    parser.add_argument("--collect", action="store_true", help="be the collector")
    arguments = parser.parse_args()
    if arguments.collect:
        collect()
        return
    medians = measure(arguments.rounds)
    print(json.dumps(environment("blockdex", "grpcio", "opentelemetry-sdk")))
    for name, median in medians.items():
        print(f"{name:10} p50 {median * 1e6:7.1f} us, to off {median / medians['off']:.3f}")


if __name__ == "__main__":
    main()
