"""What the tests' environment stands in for, in every process of it: torchvision's compiled operators.

The torchvision that vLLM pins is built for another torch, and its operators cannot be loaded. vLLM's MiniMax-M3 module
imports it for images; nothing here calls an operator, but importing it describes two that must then be declared.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
