from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_FP16: _ClassVar[Dtype]
    DTYPE_FP32: _ClassVar[Dtype]
    DTYPE_FP8_E4M3: _ClassVar[Dtype]
    DTYPE_INT32: _ClassVar[Dtype]

class SelectionOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECTION_ORDER_UNSPECIFIED: _ClassVar[SelectionOrder]
    SELECTION_ORDER_ASCENDING: _ClassVar[SelectionOrder]
    SELECTION_ORDER_SCORE: _ClassVar[SelectionOrder]

class Feature(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_UNSPECIFIED: _ClassVar[Feature]
    FEATURE_HEAD_RANGES: _ClassVar[Feature]
    FEATURE_REVISIONS: _ClassVar[Feature]
    FEATURE_WAIT_FOR_KEYS: _ClassVar[Feature]
    FEATURE_SCORES: _ClassVar[Feature]
DTYPE_UNSPECIFIED: Dtype
DTYPE_BF16: Dtype
DTYPE_FP16: Dtype
DTYPE_FP32: Dtype
DTYPE_FP8_E4M3: Dtype
DTYPE_INT32: Dtype
SELECTION_ORDER_UNSPECIFIED: SelectionOrder
SELECTION_ORDER_ASCENDING: SelectionOrder
SELECTION_ORDER_SCORE: SelectionOrder
FEATURE_UNSPECIFIED: Feature
FEATURE_HEAD_RANGES: Feature
FEATURE_REVISIONS: Feature
FEATURE_WAIT_FOR_KEYS: Feature
FEATURE_SCORES: Feature

class RegionRef(_message.Message):
    __slots__ = ("region_id", "offset", "length")
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    offset: int
    length: int
    def __init__(self, region_id: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "data", "region")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    data: bytes
    region: RegionRef
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., data: _Optional[bytes] = ..., region: _Optional[_Union[RegionRef, _Mapping]] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("sequence_ids", "starts", "lengths", "revisions")
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    revisions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., revisions: _Optional[_Iterable[int]] = ...) -> None: ...

class IndexSpec(_message.Message):
    __slots__ = ("num_layers", "num_index_heads", "head_dim", "block_size", "topk", "init_blocks", "local_blocks", "score", "scale", "key_dtype", "max_sequence_tokens")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_INDEX_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOPK_FIELD_NUMBER: _ClassVar[int]
    INIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    KEY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_index_heads: int
    head_dim: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    score: str
    scale: float
    key_dtype: Dtype
    max_sequence_tokens: int
    def __init__(self, num_layers: _Optional[int] = ..., num_index_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., topk: _Optional[int] = ..., init_blocks: _Optional[int] = ..., local_blocks: _Optional[int] = ..., score: _Optional[str] = ..., scale: _Optional[float] = ..., key_dtype: _Optional[_Union[Dtype, str]] = ..., max_sequence_tokens: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_spans", "max_queued_requests", "max_stream_requests", "max_wait_ms")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SPANS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_spans: int
    max_queued_requests: int
    max_stream_requests: int
    max_wait_ms: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_spans: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., max_stream_requests: _Optional[int] = ..., max_wait_ms: _Optional[int] = ...) -> None: ...

class CacheUsage(_message.Message):
    __slots__ = ("pages_total", "pages_used", "pages_shared", "capacity_tokens", "page_bytes", "sequences", "evictions")
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_SHARED_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    pages_total: int
    pages_used: int
    pages_shared: int
    capacity_tokens: int
    page_bytes: int
    sequences: int
    evictions: int
    def __init__(self, pages_total: _Optional[int] = ..., pages_used: _Optional[int] = ..., pages_shared: _Optional[int] = ..., capacity_tokens: _Optional[int] = ..., page_bytes: _Optional[int] = ..., sequences: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

class KernelChoice(_message.Message):
    __slots__ = ("phase", "kernel", "reason")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    phase: str
    kernel: str
    reason: str
    def __init__(self, phase: _Optional[str] = ..., kernel: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class PhaseTotals(_message.Message):
    __slots__ = ("phase", "requests", "tokens", "device_seconds", "stage_seconds")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    phase: str
    requests: int
    tokens: int
    device_seconds: float
    stage_seconds: _containers.ScalarMap[str, float]
    def __init__(self, phase: _Optional[str] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ..., device_seconds: _Optional[float] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Totals(_message.Message):
    __slots__ = ("requests", "batches", "phases", "dropped", "busy_seconds", "device_busy_seconds", "uptime_seconds")
    class DroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    batches: int
    phases: _containers.RepeatedCompositeFieldContainer[PhaseTotals]
    dropped: _containers.ScalarMap[str, int]
    busy_seconds: float
    device_busy_seconds: float
    uptime_seconds: float
    def __init__(self, requests: _Optional[int] = ..., batches: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[PhaseTotals, _Mapping]]] = ..., dropped: _Optional[_Mapping[str, int]] = ..., busy_seconds: _Optional[float] = ..., device_busy_seconds: _Optional[float] = ..., uptime_seconds: _Optional[float] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("spec", "limits", "cache", "epoch", "device", "kernels", "version", "features", "transports", "totals")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    spec: IndexSpec
    limits: Limits
    cache: CacheUsage
    epoch: int
    device: str
    kernels: _containers.RepeatedCompositeFieldContainer[KernelChoice]
    version: str
    features: _containers.RepeatedScalarFieldContainer[Feature]
    transports: _containers.RepeatedScalarFieldContainer[str]
    totals: Totals
    def __init__(self, spec: _Optional[_Union[IndexSpec, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., cache: _Optional[_Union[CacheUsage, _Mapping]] = ..., epoch: _Optional[int] = ..., device: _Optional[str] = ..., kernels: _Optional[_Iterable[_Union[KernelChoice, _Mapping]]] = ..., version: _Optional[str] = ..., features: _Optional[_Iterable[_Union[Feature, str]]] = ..., transports: _Optional[_Iterable[str]] = ..., totals: _Optional[_Union[Totals, _Mapping]] = ...) -> None: ...

class OpenSequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "lease_seconds", "epoch", "required_features")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    lease_seconds: int
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, sequence_id: _Optional[int] = ..., lease_seconds: _Optional[int] = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class OpenSequenceResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class GetSequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "epoch", "required_features")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class GetSequenceResponse(_message.Message):
    __slots__ = ("lengths", "revisions", "epoch")
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    revisions: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    def __init__(self, lengths: _Optional[_Iterable[int]] = ..., revisions: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ...) -> None: ...

class ForkSequenceRequest(_message.Message):
    __slots__ = ("parent_id", "child_id", "length", "epoch", "required_features")
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHILD_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    parent_id: int
    child_id: int
    length: int
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, parent_id: _Optional[int] = ..., child_id: _Optional[int] = ..., length: _Optional[int] = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class ForkSequenceResponse(_message.Message):
    __slots__ = ("lengths", "epoch")
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    def __init__(self, lengths: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ...) -> None: ...

class TruncateSequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "length", "epoch", "required_features")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    length: int
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, sequence_id: _Optional[int] = ..., length: _Optional[int] = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class TruncateSequenceResponse(_message.Message):
    __slots__ = ("lengths", "epoch")
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    def __init__(self, lengths: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ...) -> None: ...

class CloseSequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "epoch", "required_features")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class CloseSequenceResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class AppendKeysRequest(_message.Message):
    __slots__ = ("layer", "spans", "keys", "epoch", "required_features")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    spans: Spans
    keys: Tensor
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, layer: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class AppendKeysResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class SelectBlocksRequest(_message.Message):
    __slots__ = ("layer", "spans", "queries", "first_head", "num_heads", "order", "return_scores", "wait_for_keys", "epoch", "required_features")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    RETURN_SCORES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_KEYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    spans: Spans
    queries: Tensor
    first_head: int
    num_heads: int
    order: SelectionOrder
    return_scores: bool
    wait_for_keys: bool
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, layer: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., queries: _Optional[_Union[Tensor, _Mapping]] = ..., first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., order: _Optional[_Union[SelectionOrder, str]] = ..., return_scores: bool = ..., wait_for_keys: bool = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class SelectBlocksResponse(_message.Message):
    __slots__ = ("block_ids", "scores", "epoch")
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    block_ids: Tensor
    scores: Tensor
    epoch: int
    def __init__(self, block_ids: _Optional[_Union[Tensor, _Mapping]] = ..., scores: _Optional[_Union[Tensor, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class AppendAndSelectRequest(_message.Message):
    __slots__ = ("layer", "spans", "keys", "queries", "first_head", "num_heads", "order", "return_scores", "epoch", "required_features")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    RETURN_SCORES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    spans: Spans
    keys: Tensor
    queries: Tensor
    first_head: int
    num_heads: int
    order: SelectionOrder
    return_scores: bool
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    def __init__(self, layer: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ..., queries: _Optional[_Union[Tensor, _Mapping]] = ..., first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., order: _Optional[_Union[SelectionOrder, str]] = ..., return_scores: bool = ..., epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ...) -> None: ...

class AppendAndSelectResponse(_message.Message):
    __slots__ = ("block_ids", "scores", "epoch")
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    block_ids: Tensor
    scores: Tensor
    epoch: int
    def __init__(self, block_ids: _Optional[_Union[Tensor, _Mapping]] = ..., scores: _Optional[_Union[Tensor, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("request_id", "timeout_ms", "append_keys", "select_blocks", "append_and_select", "cancel")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    APPEND_KEYS_FIELD_NUMBER: _ClassVar[int]
    SELECT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    APPEND_AND_SELECT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    timeout_ms: int
    append_keys: AppendKeysRequest
    select_blocks: SelectBlocksRequest
    append_and_select: AppendAndSelectRequest
    cancel: CancelRequest
    def __init__(self, request_id: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., append_keys: _Optional[_Union[AppendKeysRequest, _Mapping]] = ..., select_blocks: _Optional[_Union[SelectBlocksRequest, _Mapping]] = ..., append_and_select: _Optional[_Union[AppendAndSelectRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("request_id", "append_keys", "select_blocks", "append_and_select", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    APPEND_KEYS_FIELD_NUMBER: _ClassVar[int]
    SELECT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    APPEND_AND_SELECT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    append_keys: AppendKeysResponse
    select_blocks: SelectBlocksResponse
    append_and_select: AppendAndSelectResponse
    error: _status_pb2.Status
    def __init__(self, request_id: _Optional[int] = ..., append_keys: _Optional[_Union[AppendKeysResponse, _Mapping]] = ..., select_blocks: _Optional[_Union[SelectBlocksResponse, _Mapping]] = ..., append_and_select: _Optional[_Union[AppendAndSelectResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
