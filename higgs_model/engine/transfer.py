"""Copies between host and device that do not synchronize."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device. Pinned memory is used because a copy from pageable memory waits for the device."""
    host = torch.from_numpy(array)
    # Torch keeps the pinned memory until the copy has finished.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()
