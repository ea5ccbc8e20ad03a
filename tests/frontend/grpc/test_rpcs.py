"""Every RPC on its good day, over a real port, with the generated stub alone."""

from __future__ import annotations

import math
import re

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from blockdex import __version__
from blockdex.contract.messages import Order
from blockdex.frontend.grpc.server import start_rpc_server
from blockdex.frontend.http.metrics import RequestMetrics
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import reference
from support.ring_engine import hosted
from support.serving import Serving
from support.wire import (
    SPEC,
    TIMEOUT,
    Wire,
    append,
    append_and_select,
    block_ids_of,
    close_request,
    keys_of,
    open_request,
    queries_of,
    select,
    spans,
    tensor,
    wire,
)

BIG = 2**64 - 1


def expected_of(
    keys: NDArray[np.float32], queries: NDArray[np.float32], start: int, order: Order = "ascending"
) -> reference.Reference:
    """What the reference selects."""
    return reference.select(torch.from_numpy(keys), torch.from_numpy(queries), start, SPEC, order=order)


def check_blocks(response: object, expected: list[reference.Reference]) -> None:
    """Asserts that an answer holds the reference's block ids, run after run."""
    ids = np.concatenate([selection.block_ids.numpy() for selection in expected])
    np.testing.assert_array_equal(block_ids_of(response).reshape(ids.shape), ids)


def test_get_info_says_what_is_served(tenant: Wire) -> None:
    info = tenant.stub.GetInfo(pb.GetInfoRequest(), timeout=TIMEOUT)
    assert info.spec == pb.IndexSpec(
        num_layers=3,
        num_index_heads=4,
        head_dim=128,
        block_size=128,
        topk=16,
        init_blocks=0,
        local_blocks=1,
        scoring=pb.SCORING_BLOCK_MAX,
        scale=1 / math.sqrt(128),
        key_dtype=pb.DTYPE_BF16,
        max_sequence_tokens=1_048_576,
    )
    assert info.limits == pb.Limits(
        max_message_bytes=128 << 20,
        max_spans=4096,
        max_queued_requests=4096,
        max_stream_requests=256,
        max_wait_ms=60_000,
        max_queue_ms=1000,
        max_link_regions=256,
        max_link_region_bytes=16 << 30,
        max_region_bytes=64 << 30,
    )
    page_bytes = 3 * 128 * 128 * 2
    pages = (16 << 20) // page_bytes
    assert (info.cache.pages_total, info.cache.page_bytes) == (pages, page_bytes)
    assert info.cache.capacity_tokens == pages * 128
    assert info.epoch
    assert info.device == "cpu"
    assert [choice.phase for choice in info.kernels] == [pb.PHASE_APPEND, pb.PHASE_DECODE, pb.PHASE_PREFILL]
    assert all(choice.kernel and choice.reason for choice in info.kernels)
    assert info.version == __version__
    assert list(info.features) == [1, 2, 3, 4, 5, 6, 7]
    grpc_itself, ring = info.transports
    assert grpc_itself == "grpc" and re.fullmatch("ring:/.+/ring", ring)


def test_the_life_of_a_sequence(tenant: Wire, random: np.random.Generator) -> None:
    epoch = tenant.call(pb.GetInfoRequest()).epoch
    before = tenant.call(pb.GetInfoRequest()).cache
    assert tenant.call(open_request(BIG)) == pb.OpenSequencesResponse(epoch=epoch)
    empty = pb.GetSequenceResponse(lengths=[0, 0, 0], revisions=[0, 0, 0], epoch=epoch)
    assert tenant.call(pb.GetSequenceRequest(sequence_id=BIG, header=pb.RequestHeader(epoch=epoch))) == empty
    for layer, length, revision in ((0, 300, BIG), (2, 130, 0)):
        keys = keys_of(random, length)
        appended = tenant.call(append(layer, [(BIG, 0, length, revision)], keys, header=pb.RequestHeader(epoch=epoch)))
        assert appended == pb.AppendKeysResponse(epoch=epoch)
    assert tenant.call(pb.GetSequenceRequest(sequence_id=BIG)) == pb.GetSequenceResponse(
        lengths=[300, 0, 130], revisions=[BIG, 0, 0], epoch=epoch
    )
    forked = tenant.call(pb.ForkSequenceRequest(parent_id=BIG, child_id=0, length=256))
    assert forked == pb.ForkSequenceResponse(lengths=[256, 0, 130], epoch=epoch)
    assert tenant.call(pb.GetSequenceRequest(sequence_id=0)) == pb.GetSequenceResponse(
        lengths=[256, 0, 130], revisions=[0, 0, 0], epoch=epoch
    )
    during = tenant.call(pb.GetInfoRequest()).cache
    # Of three pages the child shares the first and copies the second, in which its layer 2 ends.
    assert during.pages_used - before.pages_used == 4
    assert during.pages_shared - before.pages_shared == 1
    assert during.sequences - before.sequences == 2
    cut = tenant.call(pb.TruncateSequenceRequest(sequence_id=BIG, length=200))
    assert cut == pb.TruncateSequenceResponse(lengths=[200, 0, 130], epoch=epoch)
    for sequence_id in (BIG, BIG, 0):
        closed = tenant.call(close_request(sequence_id))
        assert closed == pb.CloseSequencesResponse(epoch=epoch)
    assert tenant.call(pb.GetInfoRequest()).cache == before


@pytest.mark.parametrize("dtype", [pb.DTYPE_BF16, pb.DTYPE_FP16, pb.DTYPE_FP32, pb.DTYPE_FP8_E4M3])
def test_append_then_select(tenant: Wire, random: np.random.Generator, dtype: pb.Dtype) -> None:
    keys = {1: keys_of(random, 2500), 2: keys_of(random, 140)}
    queries = queries_of(random, 20)
    for sequence_id in keys:
        tenant.call(open_request(sequence_id))
    request = pb.AppendKeysRequest(
        layer=1,
        spans=spans((1, 0, 2500), (2, 0, 140)),
        keys=tensor(np.concatenate((keys[1], keys[2])), dtype),
        header=pb.RequestHeader(required_features=[pb.FEATURE_REVISIONS], root_id=1),
    )
    tenant.call(request)
    answer = tenant.call(
        pb.SelectBlocksRequest(layer=1, spans=spans((1, 2490, 3), (2, 120, 17)), queries=tensor(queries, dtype))
    )
    check_blocks(answer, [expected_of(keys[1], queries[:3], 2490), expected_of(keys[2], queries[3:], 120)])
    assert not answer.HasField("scores")


def test_append_and_select_with_scores_by_score(tenant: Wire, random: np.random.Generator) -> None:
    keys, queries = keys_of(random, 2300), queries_of(random, 100)
    tenant.call(open_request(5))
    tenant.call(append(2, [(5, 0, 2200, 6)], keys[:2200]))
    both = append_and_select(
        2,
        [(5, 2200, 100, 7)],
        keys[2200:],
        queries[:, 1:3],
        first_head=1,
        num_heads=2,
        order=pb.SELECTION_ORDER_SCORE,
        return_scores=pb.SCORE_FORMAT_SCALED,
        header=pb.RequestHeader(required_features=[pb.FEATURE_SCORES, pb.FEATURE_HEAD_RANGES, pb.FEATURE_REVISIONS]),
    )
    first, again = tenant.call(both), tenant.call(both)
    assert first == again, "an append that is done already changes nothing"
    expected = expected_of(keys, queries[:, 1:3], 2200, "score")
    check_blocks(first, [expected])
    assert first.scores.dtype == pb.DTYPE_FP32
    scores = np.frombuffer(first.scores.data, "<f4").reshape(100, 2, SPEC.topk)
    np.testing.assert_allclose(scores, expected.scores.float().numpy(), rtol=1e-6)


def test_selection_over_heads_that_are_left(tenant: Wire, random: np.random.Generator) -> None:
    """`num_heads` 0 stands for all heads from `first_head` on."""
    keys, queries = keys_of(random, 2300), queries_of(random, 1)
    tenant.call(open_request(5))
    tenant.call(append(0, [(5, 0, 2300)], keys))
    answer = tenant.call(select(0, [(5, 2299, 1)], queries[:, 3:], first_head=3))
    check_blocks(answer, [expected_of(keys, queries[:, 3:], 2299)])


def test_a_unary_selection_waits_for_its_keys(server: Serving, tenant: Wire, random: np.random.Generator) -> None:
    keys, queries = keys_of(random, 200), queries_of(random, 1)
    tenant.call(open_request(5))
    waiting = tenant.stub.SelectBlocks.future(
        select(0, [(5, 199, 1, 3)], queries, wait_for_keys=True), timeout=TIMEOUT, metadata=tenant.metadata
    )
    tenant.call(append(0, [(5, 0, 100, 2)], keys[:100]))
    assert not waiting.done()
    tenant.call(append(0, [(5, 100, 100, 3)], keys[100:]))
    check_blocks(waiting.result(timeout=TIMEOUT), [expected_of(keys, queries, 199)])


def test_tenants_do_not_meet(server: Serving, tenant: Wire, random: np.random.Generator) -> None:
    own, foreign = keys_of(random, 2300), keys_of(random, 2300)
    queries = queries_of(random, 1)
    with wire(server.grpc_address, "another") as other:
        for connection, keys in ((tenant, own), (other, foreign)):
            connection.call(open_request(5))
            connection.call(append(0, [(5, 0, 2300)], keys))
        request = select(0, [(5, 2299, 1)], queries)
        check_blocks(tenant.call(request), [expected_of(own, queries, 2299)])
        check_blocks(other.call(request), [expected_of(foreign, queries, 2299)])
        other.call(close_request(5))
        check_blocks(tenant.call(request), [expected_of(own, queries, 2299)])


def test_a_caller_without_a_tenant_is_the_default_one(server: Serving) -> None:
    with wire(server.grpc_address, "default") as named:
        named.call(open_request(77))
        answer = named.stub.GetSequence(pb.GetSequenceRequest(sequence_id=77), timeout=TIMEOUT)
        assert list(answer.lengths) == [0, 0, 0]


def test_health(server: Serving) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "blockdex.v1.IndexerService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=TIMEOUT).status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(request, timeout=TIMEOUT)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection(server: Serving) -> None:
    symbol = "blockdex.v1.IndexerService"
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
    ]
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, found = stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT)
    names = {service.name for service in listed.list_services_response.service}
    assert names == {symbol, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    files = map(descriptor_pb2.FileDescriptorProto.FromString, found.file_descriptor_response.file_descriptor_proto)
    assert any(file.package == "blockdex.v1" for file in files)


async def test_a_port_in_use_is_refused(server: Serving) -> None:
    async with hosted() as run:
        with pytest.raises(OSError, match=f"cannot listen on {server.grpc_address}"):
            await start_rpc_server(run.channel, server.grpc_address, observer=RequestMetrics())
