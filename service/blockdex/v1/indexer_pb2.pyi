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

class SelectedIds(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECTED_IDS_UNSPECIFIED: _ClassVar[SelectedIds]
    SELECTED_IDS_BLOCKS: _ClassVar[SelectedIds]
    SELECTED_IDS_PAGES: _ClassVar[SelectedIds]

class ScoreFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_FORMAT_UNSPECIFIED: _ClassVar[ScoreFormat]
    SCORE_FORMAT_SCALED: _ClassVar[ScoreFormat]
    SCORE_FORMAT_RAW: _ClassVar[ScoreFormat]

class Scoring(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORING_UNSPECIFIED: _ClassVar[Scoring]
    SCORING_BLOCK_MAX: _ClassVar[Scoring]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_APPEND: _ClassVar[Phase]
    PHASE_DECODE: _ClassVar[Phase]
    PHASE_PREFILL: _ClassVar[Phase]
    PHASE_SEQUENCE: _ClassVar[Phase]

class Feature(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_UNSPECIFIED: _ClassVar[Feature]
    FEATURE_HEAD_RANGES: _ClassVar[Feature]
    FEATURE_REVISIONS: _ClassVar[Feature]
    FEATURE_WAIT_FOR_KEYS: _ClassVar[Feature]
    FEATURE_SCORES: _ClassVar[Feature]
    FEATURE_ROLLBACK: _ClassVar[Feature]
    FEATURE_RAW_SCORES: _ClassVar[Feature]
    FEATURE_POOLS: _ClassVar[Feature]
    FEATURE_BLOCK_HASHES: _ClassVar[Feature]
    FEATURE_SHARDS: _ClassVar[Feature]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_LAYER: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_HEADS: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_SPANS: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_TENSOR: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_ORDER: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_SCORES: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_LENGTH: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_TENANT: _ClassVar[ErrorReason]
    ERROR_REASON_DUPLICATE_SEQUENCE: _ClassVar[ErrorReason]
    ERROR_REASON_DUPLICATE_REQUEST_ID: _ClassVar[ErrorReason]
    ERROR_REASON_EMPTY_REQUEST: _ClassVar[ErrorReason]
    ERROR_REASON_MALFORMED_MESSAGE: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_FEATURE: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_MODEL: _ClassVar[ErrorReason]
    ERROR_REASON_MESSAGE_TOO_LARGE: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_SEQUENCE: _ClassVar[ErrorReason]
    ERROR_REASON_SEQUENCE_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_APPEND_BEYOND_LENGTH: _ClassVar[ErrorReason]
    ERROR_REASON_APPEND_OVERLAPS: _ClassVar[ErrorReason]
    ERROR_REASON_KEYS_NOT_APPENDED: _ClassVar[ErrorReason]
    ERROR_REASON_EPOCH_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_STALE_REVISION: _ClassVar[ErrorReason]
    ERROR_REASON_FUTURE_REVISION: _ClassVar[ErrorReason]
    ERROR_REASON_OUT_OF_PAGES: _ClassVar[ErrorReason]
    ERROR_REASON_OVERLOADED: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_CANCELLED: _ClassVar[ErrorReason]
    ERROR_REASON_SHUTTING_DOWN: _ClassVar[ErrorReason]
    ERROR_REASON_UNREACHABLE: _ClassVar[ErrorReason]
    ERROR_REASON_OUTCOME_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_REGION_UNSUPPORTED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_REGION: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_POOL: _ClassVar[ErrorReason]
    ERROR_REASON_POOL_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_POOL: _ClassVar[ErrorReason]
    ERROR_REASON_PAGE_NOT_SET: _ClassVar[ErrorReason]
    ERROR_REASON_MISSING_CREDENTIALS: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_CREDENTIALS: _ClassVar[ErrorReason]
    ERROR_REASON_WRONG_TENANT: _ClassVar[ErrorReason]
    ERROR_REASON_MISSING_RIGHT: _ClassVar[ErrorReason]
DTYPE_UNSPECIFIED: Dtype
DTYPE_BF16: Dtype
DTYPE_FP16: Dtype
DTYPE_FP32: Dtype
DTYPE_FP8_E4M3: Dtype
DTYPE_INT32: Dtype
SELECTION_ORDER_UNSPECIFIED: SelectionOrder
SELECTION_ORDER_ASCENDING: SelectionOrder
SELECTION_ORDER_SCORE: SelectionOrder
SELECTED_IDS_UNSPECIFIED: SelectedIds
SELECTED_IDS_BLOCKS: SelectedIds
SELECTED_IDS_PAGES: SelectedIds
SCORE_FORMAT_UNSPECIFIED: ScoreFormat
SCORE_FORMAT_SCALED: ScoreFormat
SCORE_FORMAT_RAW: ScoreFormat
SCORING_UNSPECIFIED: Scoring
SCORING_BLOCK_MAX: Scoring
PHASE_UNSPECIFIED: Phase
PHASE_APPEND: Phase
PHASE_DECODE: Phase
PHASE_PREFILL: Phase
PHASE_SEQUENCE: Phase
FEATURE_UNSPECIFIED: Feature
FEATURE_HEAD_RANGES: Feature
FEATURE_REVISIONS: Feature
FEATURE_WAIT_FOR_KEYS: Feature
FEATURE_SCORES: Feature
FEATURE_ROLLBACK: Feature
FEATURE_RAW_SCORES: Feature
FEATURE_POOLS: Feature
FEATURE_BLOCK_HASHES: Feature
FEATURE_SHARDS: Feature
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_LAYER: ErrorReason
ERROR_REASON_INVALID_HEADS: ErrorReason
ERROR_REASON_INVALID_SPANS: ErrorReason
ERROR_REASON_INVALID_TENSOR: ErrorReason
ERROR_REASON_INVALID_ORDER: ErrorReason
ERROR_REASON_INVALID_SCORES: ErrorReason
ERROR_REASON_INVALID_LENGTH: ErrorReason
ERROR_REASON_INVALID_TENANT: ErrorReason
ERROR_REASON_DUPLICATE_SEQUENCE: ErrorReason
ERROR_REASON_DUPLICATE_REQUEST_ID: ErrorReason
ERROR_REASON_EMPTY_REQUEST: ErrorReason
ERROR_REASON_MALFORMED_MESSAGE: ErrorReason
ERROR_REASON_UNKNOWN_FEATURE: ErrorReason
ERROR_REASON_UNKNOWN_MODEL: ErrorReason
ERROR_REASON_MESSAGE_TOO_LARGE: ErrorReason
ERROR_REASON_UNKNOWN_SEQUENCE: ErrorReason
ERROR_REASON_SEQUENCE_EXISTS: ErrorReason
ERROR_REASON_APPEND_BEYOND_LENGTH: ErrorReason
ERROR_REASON_APPEND_OVERLAPS: ErrorReason
ERROR_REASON_KEYS_NOT_APPENDED: ErrorReason
ERROR_REASON_EPOCH_MISMATCH: ErrorReason
ERROR_REASON_STALE_REVISION: ErrorReason
ERROR_REASON_FUTURE_REVISION: ErrorReason
ERROR_REASON_OUT_OF_PAGES: ErrorReason
ERROR_REASON_OVERLOADED: ErrorReason
ERROR_REASON_DEADLINE_EXCEEDED: ErrorReason
ERROR_REASON_CANCELLED: ErrorReason
ERROR_REASON_SHUTTING_DOWN: ErrorReason
ERROR_REASON_UNREACHABLE: ErrorReason
ERROR_REASON_OUTCOME_UNKNOWN: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_REGION_UNSUPPORTED: ErrorReason
ERROR_REASON_INVALID_REGION: ErrorReason
ERROR_REASON_UNKNOWN_POOL: ErrorReason
ERROR_REASON_POOL_EXISTS: ErrorReason
ERROR_REASON_INVALID_POOL: ErrorReason
ERROR_REASON_PAGE_NOT_SET: ErrorReason
ERROR_REASON_MISSING_CREDENTIALS: ErrorReason
ERROR_REASON_UNKNOWN_CREDENTIALS: ErrorReason
ERROR_REASON_WRONG_TENANT: ErrorReason
ERROR_REASON_MISSING_RIGHT: ErrorReason

class RequestHeader(_message.Message):
    __slots__ = ("epoch", "required_features", "model", "root_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    required_features: _containers.RepeatedScalarFieldContainer[Feature]
    model: str
    root_id: int
    def __init__(self, epoch: _Optional[int] = ..., required_features: _Optional[_Iterable[_Union[Feature, str]]] = ..., model: _Optional[str] = ..., root_id: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    data: bytes
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("sequence_ids", "starts", "lengths", "revisions", "pool_id")
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    revisions: _containers.RepeatedScalarFieldContainer[int]
    pool_id: int
    def __init__(self, sequence_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., revisions: _Optional[_Iterable[int]] = ..., pool_id: _Optional[int] = ...) -> None: ...

class IndexSpec(_message.Message):
    __slots__ = ("num_layers", "num_index_heads", "head_dim", "block_size", "topk", "init_blocks", "local_blocks", "scoring", "scale", "key_dtype", "max_sequence_tokens")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_INDEX_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOPK_FIELD_NUMBER: _ClassVar[int]
    INIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
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
    scoring: Scoring
    scale: float
    key_dtype: Dtype
    max_sequence_tokens: int
    def __init__(self, num_layers: _Optional[int] = ..., num_index_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., topk: _Optional[int] = ..., init_blocks: _Optional[int] = ..., local_blocks: _Optional[int] = ..., scoring: _Optional[_Union[Scoring, str]] = ..., scale: _Optional[float] = ..., key_dtype: _Optional[_Union[Dtype, str]] = ..., max_sequence_tokens: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_spans", "max_queued_requests", "max_stream_requests", "max_wait_ms", "max_queue_ms", "max_link_regions", "max_link_region_bytes", "max_region_bytes")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SPANS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_LINK_REGIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_LINK_REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_spans: int
    max_queued_requests: int
    max_stream_requests: int
    max_wait_ms: int
    max_queue_ms: int
    max_link_regions: int
    max_link_region_bytes: int
    max_region_bytes: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_spans: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., max_stream_requests: _Optional[int] = ..., max_wait_ms: _Optional[int] = ..., max_queue_ms: _Optional[int] = ..., max_link_regions: _Optional[int] = ..., max_link_region_bytes: _Optional[int] = ..., max_region_bytes: _Optional[int] = ...) -> None: ...

class CacheUsage(_message.Message):
    __slots__ = ("pages_total", "pages_used", "pages_shared", "capacity_tokens", "page_bytes", "sequences", "evictions", "pools")
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_SHARED_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pages_total: int
    pages_used: int
    pages_shared: int
    capacity_tokens: int
    page_bytes: int
    sequences: int
    evictions: int
    pools: int
    def __init__(self, pages_total: _Optional[int] = ..., pages_used: _Optional[int] = ..., pages_shared: _Optional[int] = ..., capacity_tokens: _Optional[int] = ..., page_bytes: _Optional[int] = ..., sequences: _Optional[int] = ..., evictions: _Optional[int] = ..., pools: _Optional[int] = ...) -> None: ...

class KernelChoice(_message.Message):
    __slots__ = ("phase", "kernel", "reason")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    kernel: str
    reason: str
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., kernel: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("epoch", "spec", "limits", "cache", "device", "device_name", "kernels", "version", "features", "transports", "region_kinds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    REGION_KINDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    spec: IndexSpec
    limits: Limits
    cache: CacheUsage
    device: str
    device_name: str
    kernels: _containers.RepeatedCompositeFieldContainer[KernelChoice]
    version: str
    features: _containers.RepeatedScalarFieldContainer[Feature]
    transports: _containers.RepeatedScalarFieldContainer[str]
    region_kinds: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., spec: _Optional[_Union[IndexSpec, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., cache: _Optional[_Union[CacheUsage, _Mapping]] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., kernels: _Optional[_Iterable[_Union[KernelChoice, _Mapping]]] = ..., version: _Optional[str] = ..., features: _Optional[_Iterable[_Union[Feature, str]]] = ..., transports: _Optional[_Iterable[str]] = ..., region_kinds: _Optional[_Iterable[str]] = ...) -> None: ...

class StageSeconds(_message.Message):
    __slots__ = ("queue", "plan", "device", "reply")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    queue: float
    plan: float
    device: float
    reply: float
    def __init__(self, queue: _Optional[float] = ..., plan: _Optional[float] = ..., device: _Optional[float] = ..., reply: _Optional[float] = ...) -> None: ...

class PhaseStats(_message.Message):
    __slots__ = ("phase", "requests", "tokens", "device_seconds", "stage_seconds")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    requests: int
    tokens: int
    device_seconds: float
    stage_seconds: StageSeconds
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ..., device_seconds: _Optional[float] = ..., stage_seconds: _Optional[_Union[StageSeconds, _Mapping]] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("epoch", "requests", "batches", "phases", "dropped_cancelled", "dropped_deadline", "busy_seconds", "device_busy_seconds", "uptime_seconds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    requests: int
    batches: int
    phases: _containers.RepeatedCompositeFieldContainer[PhaseStats]
    dropped_cancelled: int
    dropped_deadline: int
    busy_seconds: float
    device_busy_seconds: float
    uptime_seconds: float
    def __init__(self, epoch: _Optional[int] = ..., requests: _Optional[int] = ..., batches: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[PhaseStats, _Mapping]]] = ..., dropped_cancelled: _Optional[int] = ..., dropped_deadline: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., device_busy_seconds: _Optional[float] = ..., uptime_seconds: _Optional[float] = ...) -> None: ...

class NewSequence(_message.Message):
    __slots__ = ("sequence_id", "lease_seconds")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    lease_seconds: int
    def __init__(self, sequence_id: _Optional[int] = ..., lease_seconds: _Optional[int] = ...) -> None: ...

class OpenSequencesRequest(_message.Message):
    __slots__ = ("header", "sequences")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    sequences: _containers.RepeatedCompositeFieldContainer[NewSequence]
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., sequences: _Optional[_Iterable[_Union[NewSequence, _Mapping]]] = ...) -> None: ...

class OpenSequencesResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class GetSequenceRequest(_message.Message):
    __slots__ = ("header", "sequence_id")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    sequence_id: int
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., sequence_id: _Optional[int] = ...) -> None: ...

class GetSequenceResponse(_message.Message):
    __slots__ = ("epoch", "lengths", "revisions")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    revisions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., revisions: _Optional[_Iterable[int]] = ...) -> None: ...

class ForkSequenceRequest(_message.Message):
    __slots__ = ("header", "parent_id", "child_id", "length")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHILD_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    parent_id: int
    child_id: int
    length: int
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., parent_id: _Optional[int] = ..., child_id: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ForkSequenceResponse(_message.Message):
    __slots__ = ("epoch", "lengths")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class TruncateSequenceRequest(_message.Message):
    __slots__ = ("header", "sequence_id", "length")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    sequence_id: int
    length: int
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., sequence_id: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class TruncateSequenceResponse(_message.Message):
    __slots__ = ("epoch", "lengths")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class CloseSequencesRequest(_message.Message):
    __slots__ = ("header", "sequence_ids")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., sequence_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class CloseSequencesResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class CreatePoolRequest(_message.Message):
    __slots__ = ("header", "pool_id", "num_pages", "num_rows", "max_blocks")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    pool_id: int
    num_pages: int
    num_rows: int
    max_blocks: int
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., pool_id: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_rows: _Optional[int] = ..., max_blocks: _Optional[int] = ...) -> None: ...

class CreatePoolResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class SetPageTablesRequest(_message.Message):
    __slots__ = ("header", "pool_id", "rows", "first_blocks", "counts", "page_ids")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    pool_id: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    first_blocks: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., pool_id: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., first_blocks: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., page_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SetPageTablesResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ClosePoolRequest(_message.Message):
    __slots__ = ("header", "pool_id")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    pool_id: int
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., pool_id: _Optional[int] = ...) -> None: ...

class ClosePoolResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class AppendKeysRequest(_message.Message):
    __slots__ = ("header", "layer", "spans", "keys", "rollback")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    layer: int
    spans: Spans
    keys: Tensor
    rollback: bool
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., layer: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ..., rollback: bool = ...) -> None: ...

class AppendKeysResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class SelectBlocksRequest(_message.Message):
    __slots__ = ("header", "layer", "spans", "queries", "first_head", "num_heads", "order", "return_scores", "wait_for_keys", "ids")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    RETURN_SCORES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_KEYS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    layer: int
    spans: Spans
    queries: Tensor
    first_head: int
    num_heads: int
    order: SelectionOrder
    return_scores: ScoreFormat
    wait_for_keys: bool
    ids: SelectedIds
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., layer: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., queries: _Optional[_Union[Tensor, _Mapping]] = ..., first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., order: _Optional[_Union[SelectionOrder, str]] = ..., return_scores: _Optional[_Union[ScoreFormat, str]] = ..., wait_for_keys: bool = ..., ids: _Optional[_Union[SelectedIds, str]] = ...) -> None: ...

class SelectBlocksResponse(_message.Message):
    __slots__ = ("epoch", "block_ids", "scores")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    block_ids: Tensor
    scores: Tensor
    def __init__(self, epoch: _Optional[int] = ..., block_ids: _Optional[_Union[Tensor, _Mapping]] = ..., scores: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class AppendAndSelectRequest(_message.Message):
    __slots__ = ("header", "layer", "spans", "keys", "queries", "first_head", "num_heads", "order", "return_scores", "rollback", "ids")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    RETURN_SCORES_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    layer: int
    spans: Spans
    keys: Tensor
    queries: Tensor
    first_head: int
    num_heads: int
    order: SelectionOrder
    return_scores: ScoreFormat
    rollback: bool
    ids: SelectedIds
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., layer: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ..., queries: _Optional[_Union[Tensor, _Mapping]] = ..., first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., order: _Optional[_Union[SelectionOrder, str]] = ..., return_scores: _Optional[_Union[ScoreFormat, str]] = ..., rollback: bool = ..., ids: _Optional[_Union[SelectedIds, str]] = ...) -> None: ...

class AppendAndSelectResponse(_message.Message):
    __slots__ = ("epoch", "block_ids", "scores")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    block_ids: Tensor
    scores: Tensor
    def __init__(self, epoch: _Optional[int] = ..., block_ids: _Optional[_Union[Tensor, _Mapping]] = ..., scores: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("request_id", "timeout_ms", "append_keys", "select_blocks", "append_and_select", "cancel", "open_sequences", "get_sequence", "fork_sequence", "truncate_sequence", "close_sequences", "set_page_tables", "create_pool", "close_pool")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    APPEND_KEYS_FIELD_NUMBER: _ClassVar[int]
    SELECT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    APPEND_AND_SELECT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    GET_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FORK_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SET_PAGE_TABLES_FIELD_NUMBER: _ClassVar[int]
    CREATE_POOL_FIELD_NUMBER: _ClassVar[int]
    CLOSE_POOL_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    timeout_ms: int
    append_keys: AppendKeysRequest
    select_blocks: SelectBlocksRequest
    append_and_select: AppendAndSelectRequest
    cancel: CancelRequest
    open_sequences: OpenSequencesRequest
    get_sequence: GetSequenceRequest
    fork_sequence: ForkSequenceRequest
    truncate_sequence: TruncateSequenceRequest
    close_sequences: CloseSequencesRequest
    set_page_tables: SetPageTablesRequest
    create_pool: CreatePoolRequest
    close_pool: ClosePoolRequest
    def __init__(self, request_id: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., append_keys: _Optional[_Union[AppendKeysRequest, _Mapping]] = ..., select_blocks: _Optional[_Union[SelectBlocksRequest, _Mapping]] = ..., append_and_select: _Optional[_Union[AppendAndSelectRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., open_sequences: _Optional[_Union[OpenSequencesRequest, _Mapping]] = ..., get_sequence: _Optional[_Union[GetSequenceRequest, _Mapping]] = ..., fork_sequence: _Optional[_Union[ForkSequenceRequest, _Mapping]] = ..., truncate_sequence: _Optional[_Union[TruncateSequenceRequest, _Mapping]] = ..., close_sequences: _Optional[_Union[CloseSequencesRequest, _Mapping]] = ..., set_page_tables: _Optional[_Union[SetPageTablesRequest, _Mapping]] = ..., create_pool: _Optional[_Union[CreatePoolRequest, _Mapping]] = ..., close_pool: _Optional[_Union[ClosePoolRequest, _Mapping]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequences_evicted", "draining", "new_epoch")
    SEQUENCES_EVICTED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NEW_EPOCH_FIELD_NUMBER: _ClassVar[int]
    sequences_evicted: SequencesEvicted
    draining: Draining
    new_epoch: NewEpoch
    def __init__(self, sequences_evicted: _Optional[_Union[SequencesEvicted, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., new_epoch: _Optional[_Union[NewEpoch, _Mapping]] = ...) -> None: ...

class SequencesEvicted(_message.Message):
    __slots__ = ("sequence_ids",)
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NewEpoch(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("request_id", "error", "append_keys", "select_blocks", "append_and_select", "event", "open_sequences", "get_sequence", "fork_sequence", "truncate_sequence", "close_sequences", "set_page_tables", "create_pool", "close_pool")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    APPEND_KEYS_FIELD_NUMBER: _ClassVar[int]
    SELECT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    APPEND_AND_SELECT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    GET_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FORK_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SET_PAGE_TABLES_FIELD_NUMBER: _ClassVar[int]
    CREATE_POOL_FIELD_NUMBER: _ClassVar[int]
    CLOSE_POOL_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    error: _status_pb2.Status
    append_keys: AppendKeysResponse
    select_blocks: SelectBlocksResponse
    append_and_select: AppendAndSelectResponse
    event: Event
    open_sequences: OpenSequencesResponse
    get_sequence: GetSequenceResponse
    fork_sequence: ForkSequenceResponse
    truncate_sequence: TruncateSequenceResponse
    close_sequences: CloseSequencesResponse
    set_page_tables: SetPageTablesResponse
    create_pool: CreatePoolResponse
    close_pool: ClosePoolResponse
    def __init__(self, request_id: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., append_keys: _Optional[_Union[AppendKeysResponse, _Mapping]] = ..., select_blocks: _Optional[_Union[SelectBlocksResponse, _Mapping]] = ..., append_and_select: _Optional[_Union[AppendAndSelectResponse, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., open_sequences: _Optional[_Union[OpenSequencesResponse, _Mapping]] = ..., get_sequence: _Optional[_Union[GetSequenceResponse, _Mapping]] = ..., fork_sequence: _Optional[_Union[ForkSequenceResponse, _Mapping]] = ..., truncate_sequence: _Optional[_Union[TruncateSequenceResponse, _Mapping]] = ..., close_sequences: _Optional[_Union[CloseSequencesResponse, _Mapping]] = ..., set_page_tables: _Optional[_Union[SetPageTablesResponse, _Mapping]] = ..., create_pool: _Optional[_Union[CreatePoolResponse, _Mapping]] = ..., close_pool: _Optional[_Union[ClosePoolResponse, _Mapping]] = ...) -> None: ...
