"""From the host to the device without waiting for either."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_device(data: np.ndarray | list[Any], device: torch.device) -> torch.Tensor:
    """A copy on ``device``, through pinned memory on a GPU: from pageable memory a copy waits for the device."""
    if device.type != "cuda":
        return torch.as_tensor(data).to(device)
    from vllm.utils.torch_utils import async_tensor_h2d

    return async_tensor_h2d(data, device)
