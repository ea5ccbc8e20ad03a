"""The client alone: what `pip install blockdex` brings is enough, and the engine gets no gRPC with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import blockdex
from support.serving import Serving

REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Refuse())
"""
SERVER_ONLY = {
    "torch",
    "triton",
    "fastapi",
    "uvicorn",
    "pydantic",
    "pydantic_settings",
    "prometheus_client",
    "grpc_health",
    "grpc_reflection",
    "grpc_status",
}

CALLS = """
import asyncio
import numpy as np
import blockdex

async def with_await():
    async with blockdex.AsyncClient({address!r}, tenant="imports") as client:
        await client.append_keys(0, sequences=1, starts=3, keys=np.ones((2, 128), np.float16))

with blockdex.Client({address!r}, tenant="imports") as client:
    client.open_sequence(1)
    client.append_keys(0, sequences=1, keys=np.ones((3, 128), np.float32))
    print(client.select_blocks(0, sequences=1, queries=np.ones((1, 4, 128), np.float32)).shape)
    asyncio.run(with_await())
    print(client.get_sequence(1).lengths)
    client.close_sequence(1)
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_clients_work_without_the_server_s_dependencies(server: Serving) -> None:
    program = REFUSE.format(refused=SERVER_ONLY) + CALLS.format(address=server.grpc_address)
    assert run(program) == "(1, 4, 16)\n(5, 0, 0)\n"


def test_the_clients_work_where_nothing_is_compiled(server: Serving) -> None:
    program = "import sys\nsys.modules['blockdex._native'] = None\n" + CALLS.format(address=server.grpc_address)
    assert run(program) == "(1, 4, 16)\n(5, 0, 0)\n"


def test_torch_is_left_alone_where_it_is_installed(server: Serving) -> None:
    program = CALLS.format(address=server.grpc_address) + "import sys\nassert 'torch' not in sys.modules\n"
    assert run(program) == "(1, 4, 16)\n(5, 0, 0)\n"


def test_the_messages_come_without_grpc() -> None:
    run(
        REFUSE.format(refused={"grpc", "google"})
        + "import blockdex.contract.messages, blockdex.contract.errors, blockdex.contract.limits\n"
    )


@pytest.mark.parametrize("name", blockdex.__all__)
def test_what_is_listed_is_there(name: str) -> None:
    assert getattr(blockdex, name) is not None


def test_what_is_not_listed_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'blockdex' has no attribute 'Cleint'"):
        _ = blockdex.Cleint  # type: ignore[attr-defined]  # a name that is not there is the point


def test_every_exception_is_listed() -> None:
    kinds = {kind.__name__ for kind in blockdex.BlockdexError.__subclasses__()}
    assert kinds <= set(blockdex.__all__)
