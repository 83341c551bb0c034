"""Prepares the network's weights for the engine: q, k and v fused into one matrix, and gate and up into another.

On a CUDA device the model's own parameters become views of the fused ones, so that memory does not double; fp8 weights
are stored in addition. On a CPU, weights are packed once for oneDNN, whose products with few rows are several times as
fast as with plain weights, and whose result for a row does not depend on the other rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_model.config import HiggsAudioConfig
from higgs_model.engine.fp8 import Fp8Linear
from higgs_model.errors import BadConfig
from higgs_model.model.layers import HiggsAudioDualFFNDecoderLayer
from higgs_model.model.model import HiggsAudioModel

Linear = Callable[[Tensor], Tensor]

_PACKED_FOR_ROWS = 16
"""Number of rows for which oneDNN optimizes the packed layout; others work as well."""
_MIN_ROWS = 8
"""With fewer rows, oneDNN may sum in another order."""


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """The norms and the gated feed-forward network for text or audio positions."""

    attention_norm: Tensor
    norm: Tensor
    gate_up: Linear
    down: Linear

    def __call__(self, normed: Tensor) -> Tensor:
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer; `audio` is `text` if the layer has one path for both."""

    qkv: Linear
    output: Linear
    text: FeedForward
    audio: FeedForward


def check_supported(config: HiggsAudioConfig) -> None:
    """Check that the engine supports a network.

    Raises:
        BadConfig: naming the feature that only `HiggsAudioModel.generate` supports.
    """
    unsupported = {
        "use_audio_out_self_attention": config.use_audio_out_self_attention,
        "audio_adapter_type='dual_ffn_fast_forward' with layers to skip": (
            config.audio_adapter_type == "dual_ffn_fast_forward"
            and len(config.audio_dual_ffn_layers or ()) < config.text_config.num_hidden_layers
        ),
        f"hidden_act={config.text_config.hidden_act!r}": config.text_config.hidden_act != "silu",
        "use_delay_pattern=False": not config.use_delay_pattern,
    }
    for feature, present in unsupported.items():
        if present:
            raise BadConfig(f"the engine does not support {feature}; HiggsAudioModel.generate does")


def prepare_layers(model: HiggsAudioModel, fp8_weights: bool = False) -> list[Layer]:
    """Return the layers of a network that passed `check_supported`.

    Args:
        fp8_weights: quantize what audio decoding multiplies with; weights that only text needs keep their dtype.
    """
    layers = []
    quantized = functools.partial(linear, fp8_weights=fp8_weights)
    for layer in model.layers:
        dual = isinstance(layer, HiggsAudioDualFFNDecoderLayer)
        text = _feed_forward(layer, "", linear if dual else quantized)
        audio = _feed_forward(layer, "audio_", quantized) if dual else text
        layers.append(
            Layer(
                qkv=quantized([layer.get_submodule(f"self_attn.{name}_proj") for name in "qkv"]),
                output=quantized([layer.get_submodule("self_attn.o_proj")]),
                text=text,
                audio=audio,
            )
        )
    return layers


def _feed_forward(layer: nn.Module, kind: str, linear: Callable[[Sequence[nn.Module]], Linear]) -> FeedForward:
    return FeedForward(
        attention_norm=layer.get_parameter(f"{kind}input_layernorm.weight").detach(),
        norm=layer.get_parameter(f"{kind}post_attention_layernorm.weight").detach(),
        gate_up=linear([layer.get_submodule(f"{kind}mlp.{name}_proj") for name in ("gate", "up")]),
        down=linear([layer.get_submodule(f"{kind}mlp.down_proj")]),
    )


def linear(modules: Sequence[nn.Module], fp8_weights: bool = False) -> Linear:
    """Fuse linear modules with the same input into one, (M, D) → (M, sum of their widths)."""
    weights = [module.get_parameter("weight") for module in modules]
    biases = [module.get_parameter("bias") for module in modules if getattr(module, "bias", None) is not None]
    weight = weights[0].detach() if len(weights) == 1 else torch.cat([part.detach() for part in weights])
    bias = torch.cat([part.detach() for part in biases]) if biases else None
    if fp8_weights:
        return Fp8Linear.from_weight(weight, bias)
    if weight.device.type == "cpu":
        return PackedLinear(weight, bias)
    first = 0
    for parameter in weights:
        parameter.data = weight[first : first + len(parameter)]
        first += len(parameter)
    return PlainLinear(weight, bias)


@dataclasses.dataclass(frozen=True)
class PlainLinear:
    """A linear layer with a plain weight."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        return F.linear(hidden_MD, self.weight, self.bias)


class PackedLinear:
    """A linear layer with a weight in oneDNN's packed layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        rows = len(hidden_MD)
        if rows < _MIN_ROWS:
            hidden_MD = F.pad(hidden_MD, (0, 0, 0, _MIN_ROWS - rows))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden_MD, self._packed, self._bias, "none", [], "")
        return product[:rows]
