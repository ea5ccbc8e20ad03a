"""The few figures that a run of the kernel benchmark comes down to, each beside its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kernel_shapes import DECODE_QUERIES

Row = dict[str, Any]

PEER = "vllm"
"""Name of the peer among the versions of a result; ours are called by the dtypes of their caches."""
READ_FROM_US = 20.0
"""A top-k is held against its target where reading its scores once takes at least this long."""

_PREFILL_SPEEDUP = {"bf16": 2.4, "fp8_e4m3": 3.5}
_DECODE_SPEEDUP = {(1, "bf16"): 1.07, (1, "fp8_e4m3"): 1.8, (8, "bf16"): 1.33, (8, "fp8_e4m3"): 2.2}
_TFLOPS = {"bf16": 620.0, "fp8_e4m3": 1050.0}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of what.
        measured: the figure.
        unit: of it and of its target.
        target: what it is to reach.
        at_least: whether more is better.
        basis: what it was made of.
    """

    name: str
    measured: float
    unit: str
    target: float
    at_least: bool
    basis: str

    @property
    def reached(self) -> float:
        """Its part of the target: 1 and more has reached it."""
        return self.measured / self.target if self.at_least else self.target / self.measured


def figures(result: Row) -> list[Row]:
    """Those for which everything was measured, as rows of the result."""
    made = (*_prefill(result), *_decode(result), *_scoring(result), *_topk(result))
    return [asdict(figure) | {"reached": figure.reached} for figure in made]


def weighted_mean_us(rows: list[Row], version: str) -> float:
    """Mean microseconds of a call, each shape as often as production asked for it."""
    return _weighted_mean(rows, lambda row: row["us"][version])


def _weighted_mean(rows: list[Row], value: Callable[[Row], float]) -> float:
    weights = [float(row["weight"]) for row in rows]
    return sum(weight * value(row) for weight, row in zip(weights, rows, strict=True)) / sum(weights)


def floor_us(row: Row, cache: str, result: Row) -> float:
    """Microseconds in which the keys of a decode can be read once."""
    return 1e6 * float(row["key_bytes"][cache] / result["roofline"]["read"])


def read_us(row: Row, result: Row) -> float:
    """Microseconds in which the visible scores of a top-k can be read once."""
    return 1e6 * float(row["score_bytes"] / result["roofline"]["read"])


MEANINGS = {"prefill": "x peer", "scoring": "TFLOP/s", "topk": "x read", "decode": "% of the floor"}
"""What the time of a call in a part is told as, besides microseconds."""


def meaning(part: str, row: Row, version: str, result: Row) -> str:
    """A call's time as `MEANINGS` says; nothing where what it stands beside was not measured."""
    us = row["us"][version]
    if part == "scoring":
        return f"{row['tflops'][version]:,.0f}"
    if part == "prefill":
        return f"{row['us'][PEER] / us:.2f}" if PEER in row["us"] else ""
    if "roofline" not in result:
        return ""
    if part == "topk":
        return f"{us / read_us(row, result):.2f}"
    return f"{100 * floor_us(row, version, result) / us:.0f}"


def cells(figure: Row) -> tuple[str, ...]:
    """A figure as a row of a table: what it is, measured, target, its part of it, what it was made of."""
    unit = figure["unit"]
    return (
        figure["name"],
        f"{figure['measured']:,.2f} {unit}",
        f"{'>=' if figure['at_least'] else '<='} {figure['target']:,g} {unit}",
        f"{figure['reached']:.2f}",
        figure["basis"],
    )


def ours(row: Row) -> list[str]:
    """The caches of ours that a row was measured with."""
    return [version for version in row["us"] if version != PEER]


def _prefill(result: Row) -> Iterator[Figure]:
    rows = result.get("prefill", [])
    for cache, target in _PREFILL_SPEEDUP.items():
        yield from _speedup(f"prefill, {cache}", rows, cache, target)


def _speedup(name: str, rows: list[Row], cache: str, target: float) -> Iterator[Figure]:
    """How often faster than the peer."""
    if not rows or not {cache, PEER} <= rows[0]["us"].keys():
        return
    mean, peer = weighted_mean_us(rows, cache), weighted_mean_us(rows, PEER)
    yield Figure(f"{name}, faster than the peer", peer / mean, "x", target, True, f"{mean:,.1f} us, peer {peer:,.1f}")


def _decode(result: Row) -> Iterator[Figure]:
    for queries in DECODE_QUERIES:
        rows = [row for row in result.get("decode", []) if row["queries"] == queries]
        for cache in ("bf16", "fp8_e4m3"):
            name = f"decode, {queries} quer{'y' if queries == 1 else 'ies'}, {cache}"
            yield from _speedup(name, rows, cache, _DECODE_SPEEDUP[queries, cache])
    rows = [row for row in result.get("decode", []) if row["queries"] == 1 and "bf16" in row["us"]]
    if rows and "roofline" in result:
        mean = weighted_mean_us(rows, "bf16")
        floor = _weighted_mean(rows, lambda row: floor_us(row, "bf16", result))
        basis = f"{floor:,.1f} us of {mean:,.1f}"
        yield Figure("decode, 1 query, bf16, part of the byte floor", 100 * floor / mean, "%", 95.0, True, basis)
    for row in rows:
        measured = row["us"]["bf16"]
        if (row["sequences"], row["tokens"]) == (8, 1_000):
            yield Figure("decode, 8 sequences at 1,000, bf16", measured, "us", 6.0, False, result["timing"]["decode"])
        if (row["sequences"], row["tokens"]) == (128, 100_000) and "roofline" in result:
            floor = floor_us(row, "bf16", result)
            basis = f"{row['key_bytes']['bf16'] / measured / 1e6:.2f} TB/s"
            yield Figure(
                "decode, 128 at 100,000, bf16, part of the read rate", 100 * floor / measured, "%", 98.0, True, basis
            )


def _scoring(result: Row) -> Iterator[Figure]:
    for row in result.get("scoring", []):
        if (row["queries"], row["tokens"]) == (16_384, 84_480):
            for cache in ours(row):
                name, tflops = f"scoring alone, 16,384 queries at 84,480, {cache}", row["tflops"][cache]
                yield Figure(name, tflops, "TFLOP/s", _TFLOPS[cache], True, f"{row['us'][cache]:,.1f} us")


def _topk(result: Row) -> Iterator[Figure]:
    """The worst."""
    if "roofline" not in result:
        return
    rows = [row for row in result.get("topk", []) if read_us(row, result) >= READ_FROM_US]
    shares = [(row["us"][cache] / read_us(row, result), cache, row) for row in rows for cache in ours(row)]
    if shares:
        share, cache, row = max(shares, key=lambda each: each[0])
        basis = (
            f"{row['us'][cache]:,.1f} us, read {read_us(row, result):,.1f}: "
            f"{row['queries']:,} queries at {row['tokens']:,}, {cache}"
        )
        yield Figure("top-k alone, over reading the scores once, worst", share, "x", 3.0, False, basis)
