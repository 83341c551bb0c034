"""Between host and device without making either wait."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on a device. Through pinned memory: a copy from other memory waits for all work that the device has."""
    host = torch.from_numpy(array)
    # Torch keeps the pinned memory until the copy is done.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()
