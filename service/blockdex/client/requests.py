"""What the data calls take, and how arguments become a request: compiled, or in Python where that is not there."""

from __future__ import annotations

import importlib
import importlib.util
import operator
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from blockdex.client.answers import Info
from blockdex.client.lengths import Sequences
from blockdex.client.tensors import NUMPY_DTYPES, host_array
from blockdex.contract.errors import InvalidArgumentError, Reason, error_of
from blockdex.contract.messages import FloatDtype
from blockdex.v1 import indexer_pb2 as pb

Integers = int | Sequence[int] | NDArray[Any]
"""One integer, or one for each sequence of a request."""

Scores = bool | Literal["raw"]
"""Whether an answer carries scores: multiplied by the spec's scale (True), or `raw`, as they rank."""

Ids = Literal["blocks", "pages"]
"""What an answer calls a block: its position inside its row, or the number of the pool's page that holds it."""

Arguments = tuple[Any, ...]
"""Of a data call: layer, sequences, lengths, starts, revisions, epoch, keys, queries, first_head, num_heads, order,
return_scores, wait_for_keys, rollback, pool_id, ids. With a pool the sequences are its rows."""

NO_QUERIES = (None, 0, 0, "ascending", False, False)
"""Queries, first_head, num_heads, order, return_scores and wait_for_keys of a call that selects nothing."""

NO_POOL = (0, "blocks")
"""Pool_id and ids of a call on sequences."""

Shape = tuple[int, int, int]
"""Of an answer: `[T, num_heads, topk]`, with no heads where there were no queries."""

Selected = tuple[bytearray | None, bytearray | None]
"""Block ids, little-endian int32, and scores, float32, of an answer that has them."""

DTYPES: dict[FloatDtype, pb.Dtype] = {
    "bf16": pb.DTYPE_BF16,
    "fp16": pb.DTYPE_FP16,
    "fp32": pb.DTYPE_FP32,
    "fp8_e4m3": pb.DTYPE_FP8_E4M3,
}
WIRE_DTYPES = {dtype: int(DTYPES[word]) for dtype, word in NUMPY_DTYPES.items()}
"""The wire's number of each of numpy's dtypes."""


class TokenRequest(Protocol):
    """A data call: its arguments, read and checked as far as the wire could not carry them, or the server not see them.

    Attributes:
        shape: of the answer.
        repeatable: whether sending it twice has the effect of sending it once.
        epoch: that it names.
    """

    @property
    def epoch(self) -> int: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def repeatable(self) -> bool: ...

    def place(self, sequences: Sequences, /) -> None:
        """Has a selection without starts ask for the last positions; of a pool's rows nobody counts them.

        Raises:
            FailedPreconditionError: a length is unknown (OUTCOME_UNKNOWN).
            NotFoundError: a sequence was evicted (UNKNOWN_SEQUENCE).
        """
        ...

    def begin(self, sequences: Sequences, /) -> None:
        """Counts an append in the lengths; one without starts goes to their ends, and raises as `place`."""
        ...

    def answer_into(self, block_ids: int, scores: int, /) -> None:
        """Has the answer written to these addresses, in shared memory; 0: it brings them along."""
        ...

    def end(self) -> None:
        """The append that has begun took effect."""
        ...

    def fail(self, changed_nothing: bool, /) -> None:
        """The append that has begun failed; nothing happens where it has ended."""
        ...

    def message(self) -> bytes:
        """The request as protobuf."""
        ...

    def frame(self, number: int, timeout_ms: int, /) -> bytes:
        """The same as a `StreamRequest`."""
        ...


class RequestMaker(Protocol):
    """Makes the requests to one server."""

    def make(self, kind: int, /, *arguments: Any) -> TokenRequest:
        """A request: 0 AppendKeys, 1 SelectBlocks, 2 AppendAndSelect.

        Raises:
            InvalidArgumentError: an integer that the wire cannot carry, lengths left out for several sequences, a word
                or a dtype that there is not, or a tensor of another shape.
            ResourceExhaustedError: the tensors are larger than a message may be.
            TypeError: not integers, or no tensor.
        """
        ...


def codec() -> ModuleType:
    """Where `RequestMaker` and `read_selection` are: the compiled module, or what stands in for it."""
    name = "blockdex._native" if importlib.util.find_spec("blockdex._native") else "blockdex.client.plain_codec"
    return importlib.import_module(name)


ArrayOf = Callable[[str, Any], tuple[NDArray[Any], bool]]
"""Makes an array of a tensor by name; says whether it is one of a device's memory, which a ring alone can carry."""


def copied(name: str, tensor: Any) -> tuple[NDArray[Any], bool]:
    """Where no memory is shared."""
    return host_array(name, tensor), False


def maker_of(info: Info, codec: ModuleType, array_of: ArrayOf = copied) -> RequestMaker:
    """What makes the requests to such a server."""
    maker: RequestMaker = codec.RequestMaker(
        num_heads=info.spec.num_index_heads,
        head_dim=info.spec.head_dim,
        topk=info.spec.topk,
        max_message_bytes=info.limits.max_message_bytes,
        epoch=info.epoch,
        array=np.ndarray,
        dtypes=WIRE_DTYPES,
        array_of=array_of,
        refuse=refuse,
    )
    return maker


def refuse(code: int, reason: str, message: str, numbers: Mapping[str, int] | None) -> NoReturn:
    """Raises what stands for a canonical code, a word of `Reason`, a message and its numbers by name."""
    raise error_of(code, message, Reason(reason), {name: str(value) for name, value in (numbers or {}).items()})


def integer(name: str, value: int, *, bits: int = 64, reason: Reason = Reason.INVALID_SPANS) -> int:
    """One integer that the wire can carry; raises as `integers`."""
    return integers(name, [value], bits=bits, reason=reason)[0]


def integers(name: str, value: Integers, *, bits: int, reason: Reason = Reason.INVALID_SPANS) -> list[int]:
    """One integer or several, as a list that the wire can carry.

    Raises:
        InvalidArgumentError: one of them is below 0 or takes more bits.
        TypeError: not integers.
    """
    plain = value.tolist() if isinstance(value, np.ndarray | np.integer) else value
    try:
        column = [plain] if isinstance(plain, int) else list(map(operator.index, plain))
    except TypeError:
        raise TypeError(f"{name} must be integers, got {value!r}") from None
    if column and not (min(column) >= 0 and max(column) >> bits == 0):
        beyond = next(number for number in column if not 0 <= number < 1 << bits)
        raise InvalidArgumentError(f"{name} must be 0 to {(1 << bits) - 1}, got {beyond}", reason)
    return column
