"""What vLLM calls in each of its processes: puts our indexer where vLLM chooses its own."""

from __future__ import annotations

import importlib.metadata
import logging
import re

SUPPORTED = "0.33"
"""The version whose indexer `blockdex_vllm.indexer` was written against."""

_logger = logging.getLogger("vllm.blockdex")


def register() -> None:
    """Makes MiniMax-M3 layers that are built from now on use our kernels; again, and it changes nothing.

    vLLM stays as it is, and one line says why, where its version is not the supported one or its indexer cannot be
    imported.
    """
    version = importlib.metadata.version("vllm")
    if not re.match(rf"{re.escape(SUPPORTED)}(\.|$)", version):
        _logger.error("blockdex-vllm is for vLLM %s, got %s: vLLM keeps its own indexer", SUPPORTED, version)
        return
    try:
        from blockdex_vllm.selection import install  # noqa: PLC0415 - vLLM's own modules, at this version alone
    except ImportError as error:
        _logger.error("blockdex-vllm cannot import vLLM's MiniMax-M3 indexer: %s: vLLM keeps its own", error)
        return
    install()
