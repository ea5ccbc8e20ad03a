"""An engine of another kind: talks to a server with a stub made by stock protoc tooling and nothing of this project.

Run in a process of its own with the folder of the stub on the path: `python foreign_client.py ADDRESS`. It appends and
selects over unary and stream, checks the answers by hand, and prints what it was told.
"""

from __future__ import annotations

import struct
import sys

import grpc
from foreign import indexer_pb2 as pb  # type: ignore[import-not-found]  # made when the tests run
from foreign import indexer_pb2_grpc as pb_grpc

TENANT = (("blockdex-tenant", "foreign"),)


def one_hot(*places: int) -> bytes:
    """bf16 rows of 128 elements, each 1.0 in one place."""
    return b"".join(struct.pack("<128H", *(0x3F80 if place == at else 0 for at in range(128))) for place in places)


def main(address: str) -> None:
    """Talks to the server at an address."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.IndexerServiceStub(channel)
        info = stub.GetInfo(pb.GetInfoRequest(), timeout=20)
        stub.OpenSequences(
            pb.OpenSequencesRequest(sequences=[pb.NewSequence(sequence_id=1)]), metadata=TENANT, timeout=20
        )
        # 18 blocks whose keys point in the direction of their number, so that a query's best block is its own.
        keys = one_hot(*(position // 128 for position in range(18 * 128)))
        spans = pb.Spans(sequence_ids=[1], starts=[0], lengths=[18 * 128], revisions=[1])
        tensor = pb.Tensor(dtype=pb.DTYPE_BF16, data=keys)
        stub.AppendKeys(pb.AppendKeysRequest(layer=0, spans=spans, keys=tensor), metadata=TENANT, timeout=20)
        last = pb.Spans(sequence_ids=[1], starts=[18 * 128 - 1], lengths=[1], revisions=[1])
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=one_hot(16, 3, 15, 9))
        select = pb.SelectBlocksRequest(layer=0, spans=last, queries=queries, order=pb.SELECTION_ORDER_SCORE)
        unary = stub.SelectBlocks(select, metadata=TENANT, timeout=20)
        request = pb.StreamRequest(request_id=9, select_blocks=select)
        (streamed,) = stub.Stream(iter([request]), metadata=TENANT, timeout=20)
        assert (streamed.request_id, streamed.select_blocks) == (9, unary)
        ids = struct.unpack("<64i", unary.block_ids.data)
        # The local block, the query's own, then the lowest of those that all score 0.
        assert ids[:4] == (17, 16, 0, 1), ids
        assert ids[16:20] == (17, 3, 0, 1), ids
        stub.CloseSequences(pb.CloseSequencesRequest(sequence_ids=[1]), metadata=TENANT, timeout=20)
    assert not any(name.split(".")[0] == "blockdex" for name in sys.modules)
    print(f"served {info.spec.num_layers} layers, epoch {info.epoch}")


if __name__ == "__main__":
    main(sys.argv[1])
