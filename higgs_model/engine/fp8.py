"""Eight-bit weights and keys: numbers of the format e4m3 with a scale for each row.

A row here is what shares a scale: an output channel of a weight, one position's input to a product, one position's key
of one head. `torch._scaled_mm` multiplies two such matrices on the device's own fp8 units; elsewhere the same numbers
are multiplied as float32, which differs only by the order of sums.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model.errors import BadConfig

DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max
_LEAST_SCALE = 1e-12
"""Of a row of zeros."""
_CAPABILITY = (8, 9)
"""Of the first chips that have fp8 units: Ada and Hopper."""


def check_supported(device: torch.device, what: str) -> None:
    """Refuse devices without fp8 units.

    Raises:
        BadConfig: naming `what` asked for it.
    """
    if device.type != "cuda":
        raise BadConfig(
            f"engine settings: {what}=True needs a CUDA device of capability 8.9 or newer; this is {device}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        raise BadConfig(
            f"engine settings: {what}=True needs a CUDA device of capability 8.9 or newer; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        )


def quantized(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(…, D) → e4m3 (…, D) and scales (…, 1) float32, whose product is nearest to `numbers`."""
    wide = numbers.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=_LEAST_SCALE)
    # Rounding may lead one step past the largest number, which would not be a number in e4m3.
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(DTYPE), scale


@dataclasses.dataclass(frozen=True)
class Fp8Linear:
    """A product with a weight (N, D) in e4m3, scaled by output channel; inputs are narrowed row by row as they come."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Fp8Linear:
        """Narrow a weight."""
        return cls(*quantized(weight), bias)

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        narrow, scale_M1 = quantized(hidden_MD)
        if narrow.is_cuda:
            product = torch._scaled_mm(
                narrow, self.weight.t(), scale_a=scale_M1, scale_b=self.scale.t(), out_dtype=hidden_MD.dtype
            )
        else:
            product = (narrow.float() @ self.weight.float().t() * scale_M1 * self.scale.t()).to(hidden_MD.dtype)
        return product if self.bias is None else product + self.bias
