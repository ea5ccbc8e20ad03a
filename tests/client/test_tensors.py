"""Every kind of tensor that goes in gives the answer of the reference, in the same kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import blockdex
from blockdex.client.frames import response_of
from blockdex.client.kinds import SELECT_BLOCKS
from blockdex.client.tensors import array_like
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import reference
from support.clients import CODECS, new_sequence
from support.serving import Serving

TOKENS, QUERIES = 3000, 9

# Small whole numbers: every dtype holds them, and their products are exact in every precision.
random = np.random.default_rng(11)
KEYS = random.integers(-8, 9, (TOKENS, 128)).astype(np.float32)
ASKED = random.integers(-8, 9, (QUERIES, 4, 128)).astype(np.float32)

NUMPY_DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
TORCH_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]

Make = Callable[[NDArray[np.float32]], Any]


def as_numpy(dtype: Any) -> Make:
    return lambda array: array.astype(dtype)


def as_torch(dtype: torch.dtype) -> Make:
    return lambda array: torch.from_numpy(array).to(dtype)


def spaced(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every other element of every other row of a larger array, from its end to its start."""
    large = np.zeros((2 * len(array), *array.shape[1:-1], 2 * array.shape[-1]), np.float32)
    large[::2, ..., ::2] = array
    return large[::2, ..., ::2][::-1].copy()[::-1]


MAKES: dict[str, Make] = {
    **{f"numpy {np.dtype(dtype)}": as_numpy(dtype) for dtype in NUMPY_DTYPES},
    **{str(dtype): as_torch(dtype) for dtype in TORCH_DTYPES},
    "numpy big-endian float32": as_numpy(">f4"),
    "numpy big-endian float16": as_numpy(">f2"),
    "numpy with strides": spaced,
    "numpy column-major": np.asfortranarray,
    "numpy read-only": lambda array: np.frombuffer(array.tobytes(), np.float32).reshape(array.shape),
    "torch with strides": lambda array: torch.from_numpy(np.asfortranarray(array)),
    "torch bfloat16 with strides": lambda array: torch.from_numpy(np.asfortranarray(array)).to(torch.bfloat16),
    "torch float8 with strides": lambda array: torch.from_numpy(array).to(torch.float8_e4m3fn).mT.contiguous().mT,
    "torch negated": lambda array: torch._neg_view(torch.from_numpy(-array)),
    "torch bfloat16 negated": lambda array: torch._neg_view(torch.from_numpy(-array).to(torch.bfloat16)),
    "torch parameter": lambda array: torch.nn.Parameter(torch.from_numpy(array)),
}


@pytest.fixture(scope="module")
def expected() -> reference.Reference:
    from blockdex_kernels import IndexSpec

    start = TOKENS - QUERIES
    return reference.select(torch.from_numpy(KEYS), torch.from_numpy(ASKED), start, IndexSpec(num_layers=3))


@pytest.fixture
def client(server: Serving) -> Iterator[blockdex.Client]:
    with blockdex.Client(server.grpc_address) as client:
        yield client


@pytest.fixture
def sequence(client: blockdex.Client) -> Iterator[int]:
    sequence = new_sequence()
    client.open_sequence(sequence)
    yield sequence
    client.close_sequence(sequence)


@pytest.mark.parametrize("name", MAKES)
def test_every_kind_gives_the_answer_of_the_reference_in_its_own_kind(
    client: blockdex.Client, sequence: int, name: str, expected: reference.Reference
) -> None:
    make = MAKES[name]
    client.append_keys(0, sequences=sequence, keys=make(KEYS[:-QUERIES]))
    both: Any = client.append_and_select
    block_ids, scores = both(0, sequences=sequence, keys=make(KEYS[-QUERIES:]), queries=make(ASKED), return_scores=True)
    kind = torch.Tensor if "torch" in name else np.ndarray
    assert type(block_ids) is type(scores) is kind
    assert (str(block_ids.dtype)[-5:], str(scores.dtype)[-7:]) == ("int32", "float32")
    np.testing.assert_array_equal(np.asarray(block_ids), expected.block_ids.numpy())
    np.testing.assert_allclose(np.asarray(scores), expected.scores.numpy(), rtol=2e-7)
    block_ids[...] = 0  # the caller's own, to write into


def test_keys_and_queries_may_be_of_two_kinds(
    client: blockdex.Client, sequence: int, expected: reference.Reference
) -> None:
    client.append_keys(0, sequences=sequence, keys=torch.from_numpy(KEYS[:-QUERIES]).to(torch.bfloat16))
    queries = torch.from_numpy(ASKED).to(torch.float16)
    block_ids = client.append_and_select(0, sequences=sequence, keys=KEYS[-QUERIES:], queries=queries)
    assert isinstance(block_ids, torch.Tensor)
    assert torch.equal(block_ids, expected.block_ids)


def test_order_and_heads_reach_the_server(
    client: blockdex.Client, sequence: int, expected: reference.Reference
) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    in_order, scores = client.select_blocks(0, sequences=sequence, queries=ASKED, order="score", return_scores=True)
    assert (np.diff(scores[:, :, 1:]) <= 0).all()
    np.testing.assert_array_equal(np.sort(in_order), np.sort(expected.block_ids.numpy()))
    two = client.select_blocks(
        0, sequences=sequence, queries=np.ascontiguousarray(ASKED[:, 1:3]), first_head=1, num_heads=2
    )
    np.testing.assert_array_equal(two, expected.block_ids.numpy()[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e5m2])
def test_torch_dtypes_that_the_wire_does_not_have(client: blockdex.Client, sequence: int, dtype: torch.dtype) -> None:
    with pytest.raises(blockdex.InvalidArgumentError) as refused:
        client.append_keys(0, sequences=sequence, keys=torch.zeros(1, 128).to(dtype))
    assert refused.value.message == f"keys: dtype must be one of bf16, fp16, fp32, fp8_e4m3, got {dtype}"


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda array: np.ma.masked_array(array, array > 0), "a masked array, whose mask could not be kept"),
        (lambda array: torch.from_numpy(array).to("meta"), "must be a dense tensor, got one on the meta device"),
        (lambda array: torch.from_numpy(array).to_sparse(), "must be a dense tensor, got one of torch.sparse_coo"),
        (lambda array: torch.from_numpy(array).to_sparse_csr(), "must be a dense tensor, got one of torch.sparse_csr"),
        (lambda array: torch.nested.nested_tensor([torch.from_numpy(array)]), "must be a dense tensor, got one nested"),
    ],
)
def test_tensors_whose_elements_are_not_there_for_all_to_see(
    client: blockdex.Client, sequence: int, make: Make, words: str
) -> None:
    with pytest.raises(blockdex.InvalidArgumentError) as refused:
        client.append_keys(0, sequences=sequence, keys=make(KEYS[:2]))
    assert (refused.value.message, refused.value.reason) == (f"keys: {words}", "INVALID_TENSOR")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "answer",
    [pb.Tensor(), pb.Tensor(dtype=pb.DTYPE_INT32, data=bytes(8)), pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(64))],
)
def test_an_answer_of_another_shape_is_not_believed(codec: ModuleType, answer: pb.Tensor) -> None:
    response = pb.SelectBlocksResponse(block_ids=answer).SerializeToString()
    block_ids, _ = response_of(SELECT_BLOCKS, response, codec)
    with pytest.raises(blockdex.DataLossError, match=r"block_ids: \[1, 4, 4\] takes 64 bytes, the answer has "):
        array_like(ASKED, "block_ids", block_ids, "int32", (1, 4, 4))
