"""Settings: where they come from, what goes before what, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockdex.contract.sizes import parse_size
from blockdex.server.config import ConfigError, ServeSettings, load_settings, settings_table
from blockdex_kernels import IndexSpec, SpecError


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BLOCKDEX_")]:
        monkeypatch.delenv(name)


def toml(folder: Path, text: str) -> Path:
    path = folder / "blockdex.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_documented_ones() -> None:
    settings = load_settings([])
    assert settings.grpc_address == "127.0.0.1:50051"
    assert settings.http_address == "127.0.0.1:9051"
    assert settings.cache_bytes == 2 * 2**30
    assert settings.index_spec() == IndexSpec()
    limits = settings.limits
    assert (limits.max_message_bytes, limits.max_spans, limits.max_queued_requests) == (128 * 2**20, 4096, 4096)
    assert (limits.max_stream_requests, limits.max_wait_ms) == (256, 60_000)


def test_a_flag_goes_before_the_environment_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toml(tmp_path, "max_spans = 1\nmax_queued_requests = 1\nmax_stream_requests = 1\n")
    monkeypatch.setenv("BLOCKDEX_CONFIG", str(path))
    monkeypatch.setenv("BLOCKDEX_MAX_SPANS", "2")
    monkeypatch.setenv("BLOCKDEX_MAX_QUEUED_REQUESTS", "2")
    settings = load_settings(["--max-spans", "3"])
    assert (settings.max_spans, settings.max_queued_requests, settings.max_stream_requests) == (3, 2, 1)


def test_the_file_of_a_flag_goes_before_the_file_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text("max_spans = 7\n", encoding="utf-8")
    monkeypatch.setenv("BLOCKDEX_CONFIG", str(toml(tmp_path, "max_spans = 1\n")))
    assert load_settings(["--config", str(other)]).max_spans == 7


def test_opentelemetry_s_own_variable_is_the_default_of_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not load_settings([]).otlp_endpoint
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://there:4317")
    assert load_settings([]).otlp_endpoint == "http://there:4317"
    assert load_settings(["--otlp-endpoint", "http://here:4317"]).otlp_endpoint == "http://here:4317"
    assert load_settings(["--config", str(toml(tmp_path, 'otlp_endpoint = ""\n'))]).otlp_endpoint == ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "there:4317")
    with pytest.raises(ConfigError, match=r"^otlp_endpoint: must be http://host:port or .*, got 'there:4317'$"):
        load_settings([])


# What Kubernetes sets for services named blockdex and blockdex-metrics.
OF_KUBERNETES = {
    "BLOCKDEX_SERVICE_HOST": "10.0.0.1",
    "BLOCKDEX_SERVICE_PORT": "50051",
    "BLOCKDEX_SERVICE_PORT_GRPC": "50051",
    "BLOCKDEX_PORT": "tcp://10.0.0.1:50051",
    "BLOCKDEX_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    "BLOCKDEX_PORT_50051_TCP_PROTO": "tcp",
    "BLOCKDEX_PORT_50051_TCP_PORT": "50051",
    "BLOCKDEX_PORT_50051_TCP_ADDR": "10.0.0.1",
    "BLOCKDEX_METRICS_PORT": "tcp://10.0.0.2:9051",
}

SAMPLES = {
    "device": "cuda:1",
    "grpc_address": "[::1]:0",
    "http_address": "0.0.0.0:80",
    "socket": "/run/blockdex/ring",
    "socket_group": "engines",
    "access_file": "access.toml",
    "tls_cert": "tls.crt",
    "tls_key": "tls.key",
    "tls_client_ca": "ca.crt",
    "http_tls_cert": "tls.crt",
    "http_tls_key": "tls.key",
    "insecure": "true",
    "processes": "split",
    "frontends": "4",
    "spin_seconds": "0",
    "model_config": "config.json",
    "num_layers": "5",
    "cache_bytes": "auto",
    "key_dtype": "fp8_e4m3",
    "fp8_scoring": "upcast",
    "prefill_kernel": "portable",
    "max_message_bytes": "1MiB",
    "max_spans": "9",
    "max_queued_requests": "9",
    "max_stream_requests": "9",
    "max_tenant_sequences": "9",
    "tenant_weights": "engine=a=2,b=0.5",
    "max_wait_seconds": "0.5",
    "max_queue_seconds": "0.5",
    "max_link_regions": "9",
    "max_link_region_bytes": "1MiB",
    "max_region_bytes": "2MiB",
    "min_ping_seconds": "0.5",
    "lease_seconds": "9",
    "max_lease_seconds": "900",
    "num_speculative_tokens": "0",
    "prefill_slice_seconds": "0.5",
    "drain_seconds": "5",
    "shutdown_grace_seconds": "0",
    "slow_request_seconds": "0.25",
    "otlp_endpoint": "https://collector:4317",
    "trace_ratio": "0.5",
    "log_format": "json",
    "log_level": "debug",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_setting_is_read_from_all_three_places(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = SAMPLES[name]
    by_flag = load_settings([f"--{name.replace('_', '-')}", value])
    assert by_flag != load_settings([])
    assert load_settings(["--config", str(toml(tmp_path, f'{name} = "{value}"\n'))]) == by_flag.model_copy(
        update={"config": tmp_path / "blockdex.toml"}
    )
    monkeypatch.setenv(f"BLOCKDEX_{name.upper()}", value)
    assert load_settings([]) == by_flag


def test_weights_are_by_tenant() -> None:
    assert load_settings(["--tenant-weights", "engine=a=2,b=0.5"]).weights == {"engine=a": 2.0, "b": 0.5}
    assert load_settings([]).weights == {}


@pytest.mark.parametrize("value", ["a", "a=", "=2", "a=0", "a=-1", "a=nan", "a=inf", "a=2,,b=1"])
def test_weights_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--tenant-weights: must be tenants and what they weigh"):
        load_settings([f"--tenant-weights={value}"])


def test_the_samples_cover_every_setting() -> None:
    names = {field.alias or name for name, field in ServeSettings.model_fields.items()}
    assert names == set(SAMPLES) | {"config"}


@pytest.mark.parametrize("name", [None, *SAMPLES])
def test_settings_are_handed_on_to_other_processes(name: str | None) -> None:
    settings = load_settings([] if name is None else [f"--{name.replace('_', '-')}", SAMPLES[name]])
    assert ServeSettings.restore(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


def test_help_lists_every_setting_with_its_variable_and_default() -> None:
    table = settings_table()
    for name, field in ServeSettings.model_fields.items():
        word = field.alias or name
        (line,) = [line for line in table.splitlines() if f"--{word.replace('_', '-')} " in f"{line} "]
        if word != "config":
            assert f"BLOCKDEX_{word.upper()} " in line
            assert line.endswith(f" {field.default if field.default is not None else '-'}")
    assert max(map(len, table.splitlines())) <= 120


def test_an_empty_variable_and_those_of_others_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDEX_NUM_LAYERS", "")
    monkeypatch.setenv("BLOCKDEX_NUM_LAYER", "")
    for name, value in OF_KUBERNETES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODEL_CONFIG", "/nowhere")
    settings = load_settings([])
    assert settings.num_layers is None
    assert settings.model_file is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("BLOCKDEX_CASH_BYTES", ", did you mean BLOCKDEX_CACHE_BYTES?"),
        ("BLOCKDEX_MAX_SPAN", ", did you mean BLOCKDEX_MAX_SPANS?"),
        ("BLOCKDEX_X", ""),
    ],
)
def test_a_misspelt_variable_is_refused(name: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "9051")
    with pytest.raises(ConfigError) as refused:
        load_settings([])
    assert str(refused.value) == f"{name}: unknown setting in the environment{known}"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2GiB", 2**31), ("1.5 KiB", 1536), ("3kB", 3000), ("4 MB", 4_000_000), ("1TiB", 2**40), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cash-bytes", "3"], "unrecognized arguments: --cash-bytes 3, did you mean --cache-bytes?"),
        (["--max-span", "3"], "unrecognized arguments: --max-span 3, did you mean --max-spans?"),
        (["stray"], "unrecognized arguments: stray"),
        (["--max-lease-seconds", "599"], "--max-lease-seconds: must be at least lease_seconds, 600, got 599"),
        (["--max-spans"], "argument --max-spans: expected one argument"),
        (["--cache-bytes", "3XB"], "--cache-bytes: must be bytes, or a number with kB, MB"),
        (["--cache-bytes", "-1"], "--cache-bytes: must be bytes, or a number with kB, MB"),
        (["--num-layers", "0"], "--num-layers: input should be greater than or equal to 1, got '0'"),
        (["--num-layers", "x"], "--num-layers: input should be a valid integer"),
        (["--device", "gpu"], "--device: must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--grpc-address", "50051"], "--grpc-address: must be HOST:PORT, got '50051'"),
        (["--grpc-address", "::1:5"], "--grpc-address: must be HOST:PORT, got '::1:5'"),
        (["--http-address", "a:65536"], "--http-address: port must be 0 to 65535, got '65536'"),
        (["--key-dtype", "fp8"], "--key-dtype: input should be 'bf16' or 'fp8_e4m3', got 'fp8'"),
        (["--max-wait-seconds", "nan"], "--max-wait-seconds: "),
        (["--lease-seconds", "inf"], "--lease-seconds: "),
        (["--config", "/nowhere.toml"], "/nowhere.toml: No such file or directory"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(flags)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cash_bytes = 3\n", "unknown setting 'cash_bytes', did you mean cache_bytes?"),
        ("[serve]\nmax_spans = 3\n", "unknown setting 'serve'"),
        ("max_spans = true\n", "max_spans: must not be a boolean, got true"),
        ("device = 5\n", "device: input should be a valid string, got 5"),
        ("cache_bytes = [1]\n", "cache_bytes: must be bytes"),
        ("max_spans 3\n", "not TOML: "),
        ('config = "other.toml"\n', "config: a file cannot name another one"),
    ],
)
def test_a_bad_line_of_the_file_is_named_with_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load_settings(["--config", str(path)])
    assert str(refused.value).startswith(f"{path}: {message}")
    assert "\n" not in str(refused.value)


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDEX_MAX_SPANS", "0")
    with pytest.raises(ConfigError, match=r"^BLOCKDEX_MAX_SPANS: input should be .* got '0'$"):
        load_settings([])
    assert load_settings(["--max-spans", "1"]).max_spans == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ('{"hidden_size": 8}', "no sparse_attention_config and no index_\\* field"),
        ('{"index_topk_blocks": 4, "layer_types": 5}', "layer_types must be a list, got 5"),
        (
            '{"sparse_attention_config": {"sparse_attention_freq": [[]]}}',
            "sparse_attention_freq must be a list of zeros",
        ),
    ],
)
def test_a_model_config_of_something_else_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=f"^{path}: {message}"):
        load_settings(["--model-config", str(path)]).index_spec()


def test_the_layers_of_the_model_give_way_to_the_operators(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"sparse_attention_config": {"sparse_attention_freq": [0, 1, 1]}}', encoding="utf-8")
    flags = ["--model-config", str(path), "--key-dtype", "fp8_e4m3"]
    assert load_settings(flags).index_spec() == IndexSpec(num_layers=2, key_dtype="fp8_e4m3")
    assert load_settings([*flags, "--num-layers", "3"]).index_spec().num_layers == 3
    assert load_settings(["--num-layers", "3"]).index_spec() == IndexSpec(num_layers=3)
