"""A program that runs every kernel once or twice, on small shapes, for a sanitizer to look on."""

from __future__ import annotations

import torch

from blockdex_kernels import IndexSpec
from support.kernel_cases import Run, load, random_run
from support.triton_device import DEVICE, backend_for


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    for key_dtype, fp8_scoring in (("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast")):
        for forced in ({"local_blocks": 1}, {"local_blocks": 0}, {"init_blocks": 1, "local_blocks": 2}):
            spec = IndexSpec(num_layers=2, key_dtype=key_dtype, **forced)  # type: ignore[arg-type]
            runs = [random_run(generator, spec, *shape, layer=1) for shape in ((2900, 1), (129, 3), (40, 40))]
            runs.append(Run(runs[0].keys, runs[0].queries, 0, 700))
            backend = backend_for(spec, runs, fp8_scoring)  # type: ignore[arg-type]
            spans = load(backend, runs, generator)
            queries = torch.cat([run.queries for run in runs]).to(DEVICE)
            for phase in (backend.decode, backend.prefill):
                phase(queries, spans, order="ascending", return_scores=False)
                phase(queries, spans, order="score", return_scores=True)
            backend.copy_pages(torch.tensor([0]), torch.tensor([1]))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
