"""One tenant floods a server, and another one goes on."""

from __future__ import annotations

import pytest

from benchmarks.tenancy import LAYERS, drill, share_kept
from support.serving import serve

FLAGS = ("--processes", "split", "--device", "cpu", "--num-layers", str(LAYERS), "--cache-bytes", "256MiB")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_flood_costs_another_tenant_a_part_of_its_share() -> None:
    """`python -m benchmarks.tenancy` has the figure; here it is whether the other one goes on at all, and well."""
    with serve(*FLAGS) as server:
        rates = drill(server.grpc_address, seconds=6.0, streams=16)
    print(rates)
    assert rates["beside"].errors == 0
    assert rates["beside"].slowest_open_ms < 2000
    assert share_kept(rates) > 0.25, "of half of what it takes alone; the flood and others take processors too"
