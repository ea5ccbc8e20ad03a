"""Settings of `blockdex serve`, read alike from flags, the environment and a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from blockdex.contract.messages import Limits
from blockdex.contract.sizes import parse_size
from blockdex.faults import VARIABLE as FAULTS_VARIABLE
from blockdex.flags import FlagParser, did_you_mean
from blockdex.server.addresses import Address
from blockdex_kernels import IndexSpec

ENV_PREFIX = "BLOCKDEX_"

OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""What OpenTelemetry's own tools read: the default of `otlp_endpoint`, which as an empty one is none all the same."""
_OF_KUBERNETES = re.compile(
    r"_SERVICE_(HOST|PORT)(_\w+)?=|_PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://|_PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)="
)
"""The variables that it sets for a service, which may be named blockdex or blockdex-metrics."""

UNIX = "unix:"
_LONGEST_SOCKET_PATH = 107


class ConfigError(Exception):
    """A setting that cannot be: one line that names it and where it came from."""


def _cache_size(value: object) -> object:
    return value if value == "auto" else parse_size(value)


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, got {value!r}")
    return value


def _address(value: str) -> str:
    return str(Address.parse(value))


def _grpc_address(value: str) -> str:
    if not value.startswith(UNIX):
        return _address(value)
    path = Path(value.removeprefix(UNIX).removeprefix("//")).absolute()
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"a Unix socket's path has at most {_LONGEST_SOCKET_PATH} bytes, got {len(os.fsencode(path))}")
    return f"{UNIX}{path}"


def _endpoint(value: object) -> object:
    if value is None:
        value = os.environ.get(OTLP_VARIABLE, "")
    if not re.fullmatch(r"|https?://[^/\s]+/?", str(value)):
        raise ValueError(f"must be http://host:port or https://host:port, got {value!r}")
    return value


def _weights(value: str) -> str:
    for each in value.split(","):
        name, _, weight = each.rpartition("=")
        try:
            good = bool(name) and 0.001 <= float(weight) <= 1000
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"must be tenants and what they weigh, 0.001 to 1000, as in a=2,b=0.5, got {each!r}")
    return value


Size = Annotated[int, BeforeValidator(parse_size)]
Listen = Annotated[str, AfterValidator(_address)]
ListenOrFile = Annotated[str, AfterValidator(_grpc_address)]


def _setting(default: Any, metavar: str, description: str, **bounds: Any) -> Any:
    return Field(
        default, description=description, validate_default=True, json_schema_extra={"metavar": metavar}, **bounds
    )


class ServeSettings(BaseSettings):
    """What `blockdex serve` is told.

    A flag goes before its environment variable, that before the file of `config`, that before the default.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_prefix_target="all",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    config: Path | None = _setting(None, "FILE", "TOML file with any of these settings: cache_bytes = '2GiB'.")
    device: Annotated[str, AfterValidator(_device)] = _setting(
        "auto", "DEVICE", "Where the cache and the kernels are: auto, cpu, cuda or cuda:N."
    )
    grpc_address: ListenOrFile = _setting(
        "127.0.0.1:50051", "HOST:PORT", "Where gRPC listens, or unix:PATH; port 0 takes any free one."
    )
    http_address: Listen = _setting(
        "127.0.0.1:9051", "HOST:PORT", "Where /healthz, /readyz, /metrics and /v1/info listen; port 0 takes a free one."
    )
    socket: Path | None = _setting(
        None, "PATH", "Unix socket for clients on this host, who then use shared memory; without one, gRPC alone."
    )
    socket_group: str | None = _setting(
        None,
        "GROUP",
        "Group whose members may use the Unix sockets too, a name or a number; else only the server's own user.",
    )
    access_file: Path | None = _setting(
        None,
        "FILE",
        "Who may call, as which tenant: hashes of tokens, names of certificates; read anew when it changes.",
    )
    tls_cert: Path | None = _setting(
        None, "FILE", "Certificate that gRPC shows, with those up to its authority (PEM); read anew when it changes."
    )
    tls_key: Path | None = _setting(None, "FILE", "Its private key (PEM).")
    tls_client_ca: Path | None = _setting(
        None, "FILE", "Authorities whose clients may connect to gRPC, each with a certificate (PEM)."
    )
    http_tls_cert: Path | None = _setting(None, "FILE", "Certificate that HTTP shows, as tls_cert.")
    http_tls_key: Path | None = _setting(None, "FILE", "Its private key (PEM).")
    insecure: bool = _setting(False, "[BOOL]", "Lets others reach a server without TLS, or without being known.")
    processes: Literal["auto", "single", "split"] = _setting(
        "auto",
        "HOW",
        "single: one for all; split: a supervisor, an engine core and frontends; auto: split on 4 cores or more.",
    )
    frontends: int = _setting(
        1, "N", "Processes that answer gRPC and share its port; more than 1 makes the server split.", ge=1, le=256
    )
    spin_seconds: Annotated[float, Field(ge=0, le=0.01)] | Literal["auto"] = _setting(
        "auto",
        "SECONDS",
        "Split: how long core and frontends look for work before they sleep; auto: 0.001, with too few cores 0.",
    )
    # `model_config` is pydantic's own name inside the class.
    model_file: Path | None = _setting(
        None, "FILE", "Hugging Face config.json of the model; without one, MiniMax-M3.", alias="model_config"
    )
    num_layers: int | None = _setting(
        None, "N", "Sparse layers, instead of the model's own count (a draft layer is one more).", ge=1
    )
    cache_bytes: Annotated[int | Literal["auto"], BeforeValidator(_cache_size)] = _setting(
        "2GiB", "SIZE", "Bytes of the key cache; auto takes 90 % of a GPU's free memory and is refused on the CPU."
    )
    key_dtype: Literal["bf16", "fp8_e4m3"] = _setting("bf16", "DTYPE", "Element type of the cache: bf16 or fp8_e4m3.")
    fp8_scoring: Literal["native", "upcast"] = _setting(
        "native", "HOW", "How an fp8 cache is scored: native (queries cast too) or upcast (queries stay bf16)."
    )
    prefill_kernel: Literal["portable", "hopper"] = _setting(
        "hopper",
        "WHICH",
        "Kernel of prefills: hopper, where chip and model are what it is made for, or portable everywhere.",
    )
    max_message_bytes: Size = _setting("128MiB", "SIZE", "Tensor bytes of one request.", ge=1, lt=2**31)
    max_spans: int = _setting(4096, "N", "Sequences of one request.", ge=1)
    max_queued_requests: int = _setting(4096, "N", "Requests waiting in the engine, all clients together.", ge=1)
    max_stream_requests: int = _setting(256, "N", "Requests of one stream in flight.", ge=1)
    max_tenant_sequences: int = _setting(
        65536, "N", "Sequences that one tenant may have open, those that it never uses included.", ge=1
    )
    tenant_weights: Annotated[str, AfterValidator(_weights)] | None = _setting(
        None,
        "NAME=WEIGHT,...",
        "What tenants weigh instead of 1: their shares of room and time, while several ask, are as their weights.",
    )
    max_wait_seconds: float = _setting(
        60.0, "SECONDS", "Longest that a request without a deadline waits for keys or its turn.", gt=0, le=86400
    )
    max_queue_seconds: float = _setting(
        1.0,
        "SECONDS",
        "Once a request of a tenant has waited so long for room or its turn, more of the tenant's are refused.",
        gt=0,
        le=86400,
    )
    max_link_regions: int = _setting(256, "N", "Regions that a client on this host shares at once.", ge=1, le=256)
    max_link_region_bytes: Size = _setting("16GiB", "SIZE", "Their bytes, those of one link together.", ge=1)
    max_region_bytes: Size = _setting("64GiB", "SIZE", "Their bytes, those of all clients together.", ge=1)
    min_ping_seconds: float = _setting(
        5.0, "SECONDS", "Least time between the pings of a gRPC client; one that pings oftener is cut.", gt=0, le=86400
    )
    lease_seconds: float = _setting(
        600.0,
        "SECONDS",
        "Time without a call after which a sequence may be evicted when pages run out.",
        gt=0,
        lt=2**32,
    )
    max_lease_seconds: float = _setting(
        86400.0, "SECONDS", "Longest lease that a sequence may be opened with.", gt=0, lt=2**32
    )
    num_speculative_tokens: int = _setting(
        15, "N", "Draft tokens of a decode step: a span of at most 1 + N queries is decode, else prefill.", ge=0
    )
    prefill_slice_seconds: float | None = _setting(
        None,
        "SECONDS",
        "Time of one slice of a prefill, about; decodes get in between. Left out: 1 ms on a GPU, 20 ms on a CPU.",
        gt=0,
        le=60,
    )
    drain_seconds: float = _setting(
        0.0, "SECONDS", "How long after SIGTERM requests are still taken while /readyz says 503.", ge=0, le=3600
    )
    shutdown_grace_seconds: float = _setting(
        30.0, "SECONDS", "How long SIGTERM then waits for requests in flight.", ge=0, le=3600
    )
    slow_request_seconds: float = _setting(
        1.0, "SECONDS", "A request that takes longer is logged, with its time in each stage.", gt=0, le=86400
    )
    otlp_endpoint: Annotated[str | None, BeforeValidator(_endpoint)] = _setting(
        None,
        "URL",
        "Collector that spans of requests are sent to: http://host:4317; else OTEL_EXPORTER_OTLP_ENDPOINT, else none.",
    )
    trace_ratio: float = _setting(
        1.0, "SHARE", "Traced part of the requests whose callers do not say whether to trace them.", ge=0, le=1
    )
    log_format: Literal["human", "json"] = _setting("human", "FORMAT", "Lines on stderr: human or json.")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "LEVEL", "Least level that is logged: debug, info, warning or error; SIGHUP reads it anew."
    )

    @field_validator("max_lease_seconds")
    @classmethod
    def _no_shorter_than_the_default_lease(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("lease_seconds", value):
            raise ValueError(f"must be at least lease_seconds, {info.data['lease_seconds']:g}, got {value:g}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # Else pydantic reads a TOML true as the number 1.
        if isinstance(value, bool) and info.field_name != "insecure":
            raise ValueError(f"must not be a boolean, got {str(value).lower()}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The flags (handed in as arguments), the environment, then the file that either of them names."""
        del dotenv_settings, file_secret_settings
        path = (env_settings() | init_settings()).get("config")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)

    @property
    def limits(self) -> Limits:
        """Bounds that requests must keep."""
        return Limits(
            max_message_bytes=self.max_message_bytes,
            max_spans=self.max_spans,
            max_queued_requests=self.max_queued_requests,
            max_stream_requests=self.max_stream_requests,
            max_wait_ms=max(1, round(self.max_wait_seconds * 1000)),
            max_queue_ms=max(1, round(self.max_queue_seconds * 1000)),
            max_link_regions=self.max_link_regions,
            max_link_region_bytes=self.max_link_region_bytes,
            max_region_bytes=self.max_region_bytes,
        )

    @property
    def weights(self) -> dict[str, float]:
        """What tenants weigh that do not weigh 1."""
        named = (each.rpartition("=") for each in (self.tenant_weights or "").split(",") if each)
        return {name: float(weight) for name, _, weight in named}

    @classmethod
    def restore(cls, dumped: dict[str, Any]) -> ServeSettings:
        """The settings that `model_dump(mode="json")` made an object of; nothing is read anew."""
        paths = {name: Path(dumped[name]) for name in _PATHS if dumped[name] is not None}
        return cls.model_construct(**dumped | paths)

    @property
    def unix_path(self) -> Path | None:
        """The file on which gRPC listens; None where it listens on a port."""
        return Path(self.grpc_address.removeprefix(UNIX)) if self.grpc_address.startswith(UNIX) else None

    def index_spec(self) -> IndexSpec:
        """The indexer to serve: the model's, with the settings that go before it.

        Raises:
            SpecError: the file cannot be read or names an indexer that cannot be.
        """
        if self.model_file is not None:
            return IndexSpec.from_file(self.model_file, num_layers=self.num_layers, key_dtype=self.key_dtype)
        spec = IndexSpec(key_dtype=self.key_dtype)
        return spec if self.num_layers is None else dataclasses.replace(spec, num_layers=self.num_layers)


_PATHS = [name for name, field in ServeSettings.model_fields.items() if field.annotation == Path | None]


def load_settings(arguments: Sequence[str]) -> ServeSettings:
    """The settings that the flags, the environment and the file give.

    Args:
        arguments: what follows `blockdex serve`; `--help` prints the table of settings and exits with 0.

    Raises:
        ConfigError: an unknown flag or key, a value out of bounds, or a file that cannot be read.
    """
    flags = _parse_flags(arguments)
    environment = EnvSettingsSource(ServeSettings)()
    path = (environment | flags).get("config")
    _check_file(path)
    _check_variables()
    try:
        return ServeSettings(**flags)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], flags, environment, path)) from None


def _parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(prog="blockdex serve", add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="help")
    for name, metavar, *_ in _described():
        may_be_left_out = metavar.startswith("[")
        has_value: dict[str, Any] = {"nargs": "?", "const": "true"} if may_be_left_out else {}
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **has_value)
    return vars(parser.parse_args(arguments))


class _Parser(FlagParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def format_help(self) -> str:
        return settings_table()


def settings_table() -> str:
    """What `blockdex serve --help` prints: flag, environment variable and default of every setting."""
    lines = [
        "usage: blockdex serve [--FLAG VALUE ...]",
        "",
        "Serves block selection over gRPC; health, metrics and info over HTTP.",
        "",
        "A flag goes before its environment variable, that before the file of --config, that before the default. In",
        'the file a setting is named as its flag, with underscores: cache_bytes = "2GiB".',
        "",
        f"  {'flag':<34}{'environment':<36}default",
    ]
    for name, metavar, default, description in _described():
        flag = f"--{name.replace('_', '-')} {metavar}"
        lines += [f"  {flag:<34}{_variable(name):<36}{'-' if default is None else default}", f"      {description}"]
    return "\n".join(lines) + "\n"


def _described() -> Iterator[tuple[str, str, Any, str]]:
    for field_name, field in ServeSettings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict) and field.description is not None
        yield field.alias or field_name, str(extra["metavar"]), field.default, field.description


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _check_file(path: str | None) -> None:
    # pydantic-settings passes over a file that is not there, and lets a parse error through without its name.
    if path is None:
        return
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    if "config" in settings:
        raise ConfigError(f"{path}: config: a file cannot name another one")


def _check_variables() -> None:
    known = [_variable(name) for name, *_ in _described()] + [FAULTS_VARIABLE]
    for name, value in os.environ.items():
        if name.startswith(ENV_PREFIX) and value and name not in known and not _OF_KUBERNETES.search(f"{name}={value}"):
            raise ConfigError(f"{name}: unknown setting in the environment{did_you_mean(name, known, ENV_PREFIX)}")


def _explain(error: ErrorDetails, flags: Mapping[str, str], environment: Mapping[str, str], path: str | None) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown setting {name!r}{did_you_mean(name, [known for known, *_ in _described()])}"
    place = name if path is None else f"{path}: {name}"
    if name in flags:
        place = f"--{name.replace('_', '-')}"
    elif name in environment:
        place = _variable(name)
    reason = error.get("ctx", {}).get("error") or f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
    return f"{place}: {reason}"
