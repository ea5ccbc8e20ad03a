"""One shape after another through every version of the kernels: checked, then timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks import kernel_checks, roofline
from benchmarks.gpu_timing import Call, Mode, time_calls
from benchmarks.kernel_figures import PEER, Row
from benchmarks.kernel_inputs import Batch, batches
from benchmarks.kernel_shapes import Shape, Workload
from benchmarks.kernel_versions import Version
from blockdex_kernels.spec import KEY_DTYPE_BYTES


@dataclass(frozen=True)
class Bench:
    """Everything that a part is measured with.

    Attributes:
        workload: the shapes.
        versions: what is timed, by name: the cache dtypes for ours, `vllm` for the peer.
        device: where.
        modes: of each part, how it is timed.
        replays: of each version.
    """

    workload: Workload
    versions: dict[str, Version]
    device: torch.device
    modes: dict[str, Mode]
    replays: int

    def tune(self) -> None:
        """Has kernels that tune themselves do so on the shapes that production asked for most often."""
        prefill = max(self.workload.prefill, key=lambda shape: shape.weight)
        decode = max(self.workload.decode, key=lambda shape: shape.weight)
        for version in self.versions.values():
            version.prefill(self._batches("prefill", prefill, prefill.touched_bytes())[0])
            version.decode(self._batches("decode", decode, decode.touched_bytes())[0])

    def roofline(self) -> Row:
        """What the device can do at best."""
        sizes = self.workload.memory_bytes, self.workload.product
        return asdict(roofline.measure(self.device, self.modes["roofline"], self.replays, *sizes))

    def prefill(self, shape: Shape) -> Row:
        """Whole calls."""
        inputs = self._batches("prefill", shape, shape.touched_bytes())
        checks = self._check("prefill", inputs[0], sampled=True)
        return _row(shape) | checks | self._timed("prefill", self._calls("prefill", inputs))

    def decode(self, shape: Shape) -> Row:
        """Whole calls; of the batches of one length, the smallest is held against the reference."""
        inputs = self._batches("decode", shape, shape.touched_bytes())
        smallest = min(len(other.lengths) for other in self.workload.decode)
        checks = self._check("decode", inputs[0], sampled=len(shape.lengths) == smallest)
        key_bytes = {name: shape.key_bytes(KEY_DTYPE_BYTES[name]) for name in self.versions if name != PEER}
        return _row(shape) | checks | {"key_bytes": key_bytes} | self._timed("decode", self._calls("decode", inputs))

    def scoring(self, shape: Shape) -> Row:
        """Scoring alone."""
        operations = shape.operations()
        inputs = self._batches("scoring", shape, shape.touched_bytes())
        timed = self._timed("scoring", self._calls("score", inputs))
        tflops = {name: operations / us / 1e6 for name, us in timed["us"].items()}
        return _row(shape) | {"operations": operations, "tflops": tflops} | timed

    def topk(self, shape: Shape) -> Row:
        """Top-k alone, on other scores in every call."""
        inputs = self._batches("topk", shape, shape.score_bytes())
        calls: dict[str, list[Call]] = {
            name: [partial(version.rank, version.score(batch), batch) for batch in inputs]
            for name, version in self.versions.items()
        }
        return _row(shape) | {"score_bytes": shape.score_bytes()} | self._timed("topk", calls)

    def _batches(self, part: str, shape: Shape, touched_bytes: int) -> list[Batch]:
        return batches(shape, self.workload.pages, self.device, self.workload.rotated_bytes[part], touched_bytes)

    def _calls(self, method: str, inputs: Sequence[Batch]) -> dict[str, list[Call]]:
        return {
            name: [partial(getattr(version, method), batch) for batch in inputs]
            for name, version in self.versions.items()
        }

    def _timed(self, part: str, calls: dict[str, list[Call]]) -> Row:
        timings = time_calls(calls, self.modes[part], self.replays)
        return {
            "calls": len(next(iter(calls.values()))),
            "us": {name: timing.median_us for name, timing in timings.items()},
            "range_us": {name: [timing.least_us, timing.most_us] for name, timing in timings.items()},
        }

    def _check(self, method: str, batch: Batch, *, sampled: bool) -> Row:
        """Blocks that rounding exchanged in a sample of each answer; rows in which ours differs from the peer's."""
        answers = {name: getattr(version, method)(batch) for name, version in self.versions.items()}
        row: Row = {}
        if sampled:
            row["flips"] = {name: kernel_checks.flips(self.versions[name], ids, batch) for name, ids in answers.items()}
        if "bf16" in answers and PEER in answers:
            row["rows_apart"] = kernel_checks.rows_apart(answers["bf16"], answers[PEER])
        return row


def _row(shape: Shape) -> Row:
    return {
        "sequences": len(shape.lengths),
        "queries": shape.queries,
        "tokens": shape.tokens,
        "weight": shape.weight,
    }
