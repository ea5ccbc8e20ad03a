"""`blockdex plan`: how much memory the keys of so many tokens take, what fits where, and how to start the server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockdex.contract.sizes import automatic_cache_bytes, parse_size
from blockdex.flags import FlagParser
from blockdex_kernels import IndexSpec
from blockdex_kernels.spec import KEY_DTYPE_BYTES, KeyDtype

OK = 0

RANKS = (4, 8)
"""Tensor-parallel ranks of the engines that the plan is compared with."""

KEY_DTYPES: tuple[KeyDtype, ...] = ("bf16", "fp8_e4m3")
_TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Fit:
    """What the wanted tokens take with one element type of the cache.

    Attributes:
        key_dtype: the element type.
        bytes_per_token: of all layers.
        bytes_per_page: of `block_size` tokens.
        cache_bytes: of the pages that the wanted tokens need at most.
        capacity_tokens: tokens that fit in the cache of one GPU; None where no GPU was named.
        gpus: GPUs that the wanted tokens need; None where no GPU was named, 0 where it holds no page.
    """

    key_dtype: KeyDtype
    bytes_per_token: int
    bytes_per_page: int
    cache_bytes: int
    capacity_tokens: int | None
    gpus: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What so many tokens take.

    Attributes:
        num_layers: sparse layers.
        head_dim: elements of a key.
        block_size: tokens of a page.
        tokens: tokens wanted; a shared prefix counts once.
        sequences: sequences that they belong to. Each may leave its last page partly empty.
        pages: pages that they need at most.
        gpu_bytes: memory of a GPU; None where none was named.
        gpu_cache_bytes: the part of it that the cache gets.
        fits: one for each element type of the cache.
        engine_bytes: ranks to the bytes of an engine that keeps the keys in bf16 on each of them.
        chosen: the element type asked for.
        command: starts a server for them; None where not even a page fits.
    """

    num_layers: int
    head_dim: int
    block_size: int
    tokens: int
    sequences: int
    pages: int
    gpu_bytes: int | None
    gpu_cache_bytes: int | None
    fits: tuple[Fit, ...]
    engine_bytes: dict[int, int]
    chosen: KeyDtype
    command: str | None

    @property
    def fit(self) -> Fit:
        """The fit of the element type asked for."""
        return next(fit for fit in self.fits if fit.key_dtype == self.chosen)


def plan(arguments: Sequence[str]) -> int:
    """Runs `blockdex plan` with the arguments that follow these words; the answer is the exit status, 0 or 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        made = make_plan(_spec(options), options.tokens, options.sequences, options.gpu, list(_kept_flags(options)))
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(dataclasses.asdict(made), indent=2) if options.json else "\n".join(_lines(made)))
    return OK


def make_plan(
    spec: IndexSpec, tokens: int, sequences: int | None, gpu_bytes: int | None, flags: Sequence[str] = ()
) -> Plan:
    """Plans a cache.

    Args:
        spec: the indexer, with the element type asked for.
        tokens: tokens to hold, at least 1.
        sequences: sequences that they belong to; None = as few as can be.
        gpu_bytes: memory of one GPU; None plans without one.
        flags: of `blockdex serve`, repeated in the command.

    Raises:
        ValueError: the tokens cannot be those of so many sequences.
    """
    fewest = -(-tokens // spec.max_sequence_tokens)
    sequences = fewest if sequences is None else sequences
    if not fewest <= sequences <= tokens:
        raise ValueError(f"sequences: {tokens} tokens are those of {fewest} to {tokens} sequences, got {sequences}")
    # At worst every sequence but one has a single token in its last page.
    pages = (tokens - sequences) // spec.block_size + sequences
    gpu_cache_bytes = None if gpu_bytes is None else automatic_cache_bytes(gpu_bytes)
    fits = tuple(
        _fit(dataclasses.replace(spec, key_dtype=key_dtype), pages, gpu_cache_bytes) for key_dtype in KEY_DTYPES
    )
    engine_key_bytes = spec.num_layers * spec.head_dim * KEY_DTYPE_BYTES["bf16"]
    unstarted = Plan(
        num_layers=spec.num_layers,
        head_dim=spec.head_dim,
        block_size=spec.block_size,
        tokens=tokens,
        sequences=sequences,
        pages=pages,
        gpu_bytes=gpu_bytes,
        gpu_cache_bytes=gpu_cache_bytes,
        fits=fits,
        engine_bytes={ranks: ranks * tokens * engine_key_bytes for ranks in RANKS},
        chosen=spec.key_dtype,
        command=None,
    )
    return dataclasses.replace(unstarted, command=_command(unstarted, flags))


def _fit(spec: IndexSpec, pages: int, gpu_cache_bytes: int | None) -> Fit:
    capacity_tokens = gpus = None
    if gpu_cache_bytes is not None:
        gpu_pages = gpu_cache_bytes // spec.bytes_per_page
        capacity_tokens = gpu_pages * spec.block_size
        gpus = -(-pages // gpu_pages) if gpu_pages else 0
    return Fit(
        spec.key_dtype, spec.bytes_per_token, spec.bytes_per_page, pages * spec.bytes_per_page, capacity_tokens, gpus
    )


def _command(made: Plan, flags: Sequence[str]) -> str | None:
    fit = made.fit
    if fit.gpus == 0:
        return None
    if fit.gpus is not None and fit.gpus > 1:
        assert made.gpu_cache_bytes is not None
        size = f"{made.gpu_cache_bytes // _MIB}MiB"
    else:
        size = f"{-(-fit.cache_bytes // _MIB)}MiB"
    return shlex.join(["blockdex", "serve", "--cache-bytes", size, *flags])


def _lines(made: Plan) -> Iterator[str]:
    yield f"indexer   {made.num_layers} layers x {made.head_dim} elements, pages of {made.block_size} tokens"
    yield f"wanted    {made.tokens:,} tokens; sequences: {made.sequences:,}; pages: at most {made.pages:,}"
    if made.gpu_bytes is not None and made.gpu_cache_bytes is not None:
        part = made.gpu_cache_bytes / made.gpu_bytes
        share = f"of which the cache gets {part:.0%}: {_size(made.gpu_cache_bytes)}"
        yield f"GPU       {_size(made.gpu_bytes)}, {share}"
    yield ""
    yield from _table(made)
    yield ""
    yield "An engine that keeps these keys in bf16 on every tensor-parallel rank:"
    for ranks, engine_bytes in made.engine_bytes.items():
        times = engine_bytes / made.fit.cache_bytes
        yield f"  {ranks} ranks  {_size(engine_bytes)}, {times:.1f} times the {made.chosen} cache"
    yield ""
    yield from _advice(made)


def _table(made: Plan) -> Iterator[str]:
    rows: list[tuple[str, Callable[[Fit], str]]] = [
        ("", lambda fit: fit.key_dtype),
        ("bytes of a token", lambda fit: f"{fit.bytes_per_token:,}"),
        ("bytes of a page", lambda fit: f"{fit.bytes_per_page:,}"),
        ("cache of the wanted tokens", lambda fit: _size(fit.cache_bytes)),
    ]
    if made.gpu_bytes is not None:
        rows.append(("tokens that fit on one GPU", lambda fit: f"{fit.capacity_tokens:,}"))
        rows.append(("GPUs for the wanted tokens", lambda fit: f"{fit.gpus:,}" if fit.gpus else "no page fits"))
    for name, cell in rows:
        yield f"{name:<28}" + "".join(f"{cell(fit):>16}" for fit in made.fits)


def _advice(made: Plan) -> Iterator[str]:
    if made.command is None:
        yield f"Not a single page fits in {made.chosen}."
        return
    if made.fit.gpus is None or made.fit.gpus == 1:
        yield "Start the server with"
    else:
        yield "One GPU is too small."
        yield f"Spread the sequences over {made.fit.gpus} servers, each on a GPU of its own, started with"
    yield f"  {made.command}"
    for fit in made.fits:
        if made.fit.gpus is not None and fit.gpus and fit.gpus < made.fit.gpus:
            yield f"With --key-dtype {fit.key_dtype} {fit.gpus} would do."


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 10**9:,.2f} GB" if num_bytes >= 10**9 else f"{num_bytes / 10**6:,.2f} MB"


def _spec(options: argparse.Namespace) -> IndexSpec:
    if options.model_config is not None:
        return IndexSpec.from_file(options.model_config, num_layers=options.num_layers, key_dtype=options.key_dtype)
    spec = IndexSpec(key_dtype=options.key_dtype)
    return spec if options.num_layers is None else dataclasses.replace(spec, num_layers=options.num_layers)


def _kept_flags(options: argparse.Namespace) -> Iterator[str]:
    if options.key_dtype != KEY_DTYPES[0]:
        yield from ("--key-dtype", options.key_dtype)
    if options.model_config is not None:
        yield from ("--model-config", str(options.model_config))
    if options.num_layers is not None:
        yield from ("--num-layers", str(options.num_layers))


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="blockdex plan", description="How much memory the keys of so many tokens take.")
    parser.add_argument(
        "--tokens",
        required=True,
        type=_said(_parse_tokens),
        metavar="N",
        help="tokens to hold at once, 2000000 or 2M; a prefix that sequences share counts once",
    )
    parser.add_argument(
        "--sequences",
        type=_said(_parse_tokens),
        metavar="N",
        help="sequences that they belong to, each of which may leave its last page partly empty (default: fewest)",
    )
    parser.add_argument("--gpu", type=_said(parse_size), metavar="SIZE", help="memory of one GPU: 141GB, 80GiB")
    parser.add_argument(
        "--model-config", type=Path, metavar="FILE", help="config.json of the model (default: MiniMax-M3)"
    )
    parser.add_argument("--num-layers", type=int, metavar="N", help="sparse layers, instead of the model's own count")
    parser.add_argument(
        "--key-dtype", choices=KEY_DTYPES, default=KEY_DTYPES[0], help="element type of the cache (default: bf16)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    return parser


def _parse_tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text, re.IGNORECASE)
    count = float(match[1]) * _TOKEN_UNITS[match[2].lower()] if match else 0
    if count < 1 or count != int(count):
        raise ValueError(f"must be a whole number of at least 1, with k, M or G where wanted, got {text!r}")
    return int(count)


def _said(parse: Callable[[str], int]) -> Callable[[str], int]:
    """Has argparse print what the parser says, instead of the parser's name."""

    def parsed(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
