"""The contract for those who have nothing but `proto/`: stock tooling, old and new protobuf, the style rules."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from blockdex.contract.errors import Reason
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.serving import Serving

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
CONTRACT = PROTO / "blockdex" / "v1" / "indexer.proto"
GENERATED = ROOT / "service" / "blockdex" / "v1"
PROTOBUF_5_29 = Path(sys.executable).parent.parent / "protobuf-5.29"


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=environment or None, cwd=ROOT
    )


def _protoc(*arguments: str | Path) -> None:
    """Runs the protoc that comes with grpcio-tools."""
    includes: list[str] = []
    for package in ("grpc_tools", "google.rpc"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations)))
        includes.append(f"-I{folder / '_proto' if package == 'grpc_tools' else folder.parent.parent}")
    done = _run(sys.executable, "-m", "grpc_tools.protoc", *includes, *arguments)
    assert done.returncode == 0, done.stderr


def test_a_stub_of_stock_tooling_talks_to_the_server(server: Serving, tmp_path: Path) -> None:
    source = tmp_path / "source" / "foreign"
    source.mkdir(parents=True)
    shutil.copy(CONTRACT, source / "indexer.proto")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    _protoc(f"-I{source.parent}", f"--python_out={stubs}", f"--grpc_python_out={stubs}", source / "indexer.proto")
    client = _run(
        sys.executable, ROOT / "tests" / "support" / "foreign_client.py", server.grpc_address, PYTHONPATH=str(stubs)
    )
    assert client.returncode == 0, client.stderr
    epoch = int(server.event("serving")["epoch"])
    assert client.stdout == f"served 3 layers, epoch {epoch}\n"


def test_the_generated_code_is_that_of_the_contract(tmp_path: Path) -> None:
    fresh = tmp_path / "image.binpb"
    _protoc(f"-I{PROTO}", f"--descriptor_set_out={fresh}", CONTRACT)
    (expected,) = descriptor_pb2.FileDescriptorSet.FromString(fresh.read_bytes()).file
    _forget_json_names(expected)
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert committed == expected, "stale: make proto"


def _forget_json_names(message: Message) -> None:
    """Clears what the Python generator leaves out of the descriptor that it writes down."""
    for field, value in message.ListFields():
        if field.name == "json_name":
            message.ClearField("json_name")
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                _forget_json_names(part)


def test_the_generated_stub_has_the_methods_of_the_contract() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    methods = {method.name for method in service.methods}
    for kind in (pb_grpc.IndexerServiceServicer, pb_grpc.IndexerService):
        assert {name for name in vars(kind) if not name.startswith("_")} == methods
    source = (GENERATED / "indexer_pb2_grpc.py").read_text(encoding="utf-8")
    for method in service.methods:
        assert f"/{service.full_name}/{method.name}'" in source
        assert f"request_serializer=blockdex_dot_v1_dot_indexer__pb2.{method.input_type.name}." in source
        assert f"response_deserializer=blockdex_dot_v1_dot_indexer__pb2.{method.output_type.name}." in source


def test_the_generated_types_have_the_fields_of_the_contract() -> None:
    tree = ast.parse((GENERATED / "indexer_pb2.pyi").read_text(encoding="utf-8"))
    typed = {
        node.name: {
            line.target.id
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id.islower()
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        assert typed.pop(name) == {field.name for field in message.fields}
    assert set(typed) == set(pb.DESCRIPTOR.enum_types_by_name)


USE = """
import google.protobuf
from blockdex.v1 import indexer_pb2 as pb, indexer_pb2_grpc
spans = pb.Spans(sequence_ids=[2**64 - 1], starts=[3], lengths=[4], revisions=[5])
request = pb.StreamRequest(request_id=1, append_keys=pb.AppendKeysRequest(layer=2, spans=spans))
assert pb.StreamRequest.FromString(request.SerializeToString()) == request
print(google.protobuf.__version__)
"""


def test_the_generated_code_loads_with_protobuf_5_29() -> None:
    assert PROTOBUF_5_29.is_dir(), f"{PROTOBUF_5_29} is missing: make install"
    used = _run(sys.executable, "-W", "error", "-c", USE, PYTHONPATH=str(PROTOBUF_5_29))
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("5.29.")


def test_the_generated_code_loads_with_the_newest_protobuf() -> None:
    used = _run(sys.executable, "-W", "error", "-c", USE)
    assert used.returncode == 0, used.stderr
    assert used.stdout == f"{version('protobuf')}\n"


def _lint(proto: Path) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, proto / "generate.py", "--lint")


def test_the_contract_keeps_the_style_rules_and_what_was_released() -> None:
    linted = _lint(PROTO)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("fixed64 parent_id = 2;", "fixed64 parentId = 2;", "should be lower_snake_case"),
        ("DTYPE_BF16 = 1;", "BF16 = 1;", 'should be prefixed with "DTYPE_"'),
        ("// Gives up sequences.\n", "", "should have a non-empty comment"),
        ("uint32 layer = 2;", "uint32 layer = 20;", 'Previously present field "2" with name "layer"'),
        ("bool rollback = 11;", "uint32 rollback = 11;", 'changed type from "bool" to "uint32"'),
        ("  DTYPE_INT32 = 5;", "  DTYPE_INT32 = 6;", 'Previously present enum value "5"'),
        ("  rpc GetStats(GetStatsRequest) returns (GetStatsResponse);\n", "", 'Previously present RPC "GetStats"'),
    ],
    ids=["field name", "enum prefix", "comment", "number", "type", "enum value", "rpc"],
)
def test_the_rules_are_felt(tmp_path: Path, good: str, bad: str, complaint: str) -> None:
    copy = tmp_path / "proto"
    shutil.copytree(PROTO, copy)
    contract = copy / CONTRACT.relative_to(PROTO)
    text = contract.read_text(encoding="utf-8")
    assert good in text
    contract.write_text(text.replace(good, bad), encoding="utf-8")
    linted = _lint(copy)
    assert linted.returncode != 0
    assert complaint in linted.stdout + linted.stderr


def test_a_reserved_number_may_be_taken_under_its_name(tmp_path: Path) -> None:
    copy = tmp_path / "proto"
    shutil.copytree(PROTO, copy)
    contract = copy / CONTRACT.relative_to(PROTO)
    text = contract.read_text(encoding="utf-8")
    reserved = '  reserved 3, 4;\n  reserved "block_hashes", "shard";\n'
    taken = '  reserved 4;\n  reserved "shard";\n  // Of its first blocks.\n  repeated bytes block_hashes = 3;\n'
    assert reserved in text
    contract.write_text(text.replace(reserved, taken), encoding="utf-8")
    linted = _lint(copy)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_reasons_of_errors_are_those_of_the_contract() -> None:
    told = [name.removeprefix("ERROR_REASON_") for name in list(pb.ErrorReason.keys())]
    assert sorted(told) == sorted(["UNSPECIFIED", *Reason])
