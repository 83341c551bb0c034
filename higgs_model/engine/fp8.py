"""fp8 weights and KV cache: e4m3 numbers with one scale per row.

A row is an output channel of a weight, the activations of one position, or the key or value of one position and head.
`torch._scaled_mm` multiplies two such matrices on the device's fp8 units; elsewhere the same numbers are multiplied in
float32, which differs only in the order of summation.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model.errors import BadConfig

DTYPE = torch.float8_e4m3fn
_MAX = torch.finfo(DTYPE).max
_MIN_SCALE = 1e-12
"""The scale of a row of zeros."""
_MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with fp8 units, Ada and Hopper."""


def check_supported(device: torch.device, setting: str) -> None:
    """Check that a device has fp8 units.

    Args:
        setting: the one that asks for fp8, for the message.

    Raises:
        BadConfig: it has none.
    """
    if device.type != "cuda":
        raise BadConfig(
            f"engine settings: {setting}=True needs a CUDA device of capability 8.9 or newer; this is {device}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < _MIN_CAPABILITY:
        raise BadConfig(
            f"engine settings: {setting}=True needs a CUDA device of capability 8.9 or newer; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        )


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (…, D) to e4m3 (…, D) with scales (…, 1) float32; their product approximates the input."""
    values = tensor.float()
    scale = (values.abs().amax(dim=-1, keepdim=True) / _MAX).clamp(min=_MIN_SCALE)
    # Rounding may exceed the largest finite number, which e4m3 would turn into NaN.
    return (values / scale).clamp(-_MAX, _MAX).to(DTYPE), scale


@dataclasses.dataclass(frozen=True)
class Fp8Linear:
    """A linear layer with an e4m3 weight (N, D), scaled per output channel; inputs are quantized per row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Fp8Linear:
        """Quantize a weight."""
        return cls(*quantize(weight), bias)

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        quantized, scale_M1 = quantize(hidden_MD)
        if quantized.is_cuda:
            product = torch._scaled_mm(
                quantized, self.weight.t(), scale_a=scale_M1, scale_b=self.scale.t(), out_dtype=hidden_MD.dtype
            )
        else:
            product = (quantized.float() @ self.weight.float().t() * scale_M1 * self.scale.t()).to(hidden_MD.dtype)
        return product if self.bias is None else product + self.bias
