"""`python -m examples.transformers_engine`: a MiniMax-M3 model on blockdex, checked against its own indexer."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

import blockdex
from blockdex_kernels import SpecError
from blockdex_kernels.reference import SelectionMismatchError
from examples.transformers_engine.demo import run_demo
from examples.transformers_engine.model import build_model
from examples.transformers_engine.report import print_report
from examples.transformers_engine.server import ServerError, server_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    0: every selection agrees, and every token that no flip came before. 1: one does not, or a server or client failed.
    """
    options = _parser().parse_args(arguments)
    # As Ctrl-C does: unwinds, so that the server goes with the demo.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    console = Console()
    model = build_model(options.device)
    try:
        with _server(options, model) as address, _client(options, address) as client:
            outcome = run_demo(model, client, console, small=options.small)
    except (SelectionMismatchError, ServerError, SpecError, blockdex.BlockdexError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print_report(outcome, console)
    return 0 if outcome.agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.transformers_engine", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where model and server run")
    parser.add_argument("--key-dtype", choices=["bf16", "fp8_e4m3"], default="bf16", help="the server's cache")
    parser.add_argument("--address", metavar="HOST:PORT", help="use this server instead of starting one")
    parser.add_argument("--tls-ca", metavar="FILE", help="with TLS, and these authorities (PEM)")
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="file with the token to show")
    parser.add_argument(
        "--transport", choices=["auto", "ring", "stream", "unary"], default="auto", help="auto: the fastest there is"
    )
    parser.add_argument("--small", action="store_true", help="shorter prompts")
    return parser


@contextmanager
def _server(options: argparse.Namespace, model: MiniMaxM3VLForCausalLM) -> Iterator[str]:
    """The address of the server that was named, or of one started for the model."""
    if options.address is not None:
        yield options.address
        return
    with server_of(model, ["--device", options.device, "--key-dtype", options.key_dtype]) as address:
        yield address


def _client(options: argparse.Namespace, address: str) -> blockdex.Client:
    tls = None if options.tls_ca is None else blockdex.TLS(ca=options.tls_ca)
    token = None if options.token_file is None else options.token_file.read_text(encoding="utf-8").strip()
    if options.transport == "auto":
        return blockdex.connect(address, tls=tls, token=token)
    return blockdex.Client(address, transport=options.transport, tls=tls, token=token)


if __name__ == "__main__":
    sys.exit(main())
