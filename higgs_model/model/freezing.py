"""What is trained and what is not: whole parts, or the first rows of an embedding or a head.

Adding audio to a text model trains the new parts, and of the vocabulary only the rows of new tokens. Those rows are
split off into a parameter of their own, so that neither optimiser state nor gradient exists for the others. Checkpoints
hold such a pair joined, or as it is; `layouts` reads both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from higgs_model.errors import BadInput
from higgs_model.model.layers import HiggsAudioDualFFNDecoderLayer


class PartiallyFrozenEmbedding(nn.Module):
    """An embedding whose rows before `freeze_until_idx` are frozen."""

    def __init__(self, original: nn.Embedding | PartiallyFrozenEmbedding, freeze_until_idx: int) -> None:
        super().__init__()
        if isinstance(original, PartiallyFrozenEmbedding):
            original = original.to_unsplit()
        frozen, trainable = _split(original.weight, freeze_until_idx)
        self.freeze_until_idx = freeze_until_idx
        self.embedding_frozen: nn.Embedding = nn.Embedding.from_pretrained(frozen, freeze=True)
        self.embedding_trainable: nn.Embedding = nn.Embedding.from_pretrained(trainable, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(…) int64 → (…, D)."""
        # Both halves look up every id, clamped into their rows: no shape depends on the data.
        last = self.freeze_until_idx - 1
        frozen = self.embedding_frozen(input_ids.clamp(max=last))
        trainable = self.embedding_trainable((input_ids - self.freeze_until_idx).clamp(min=0))
        embedded: Tensor = torch.where((input_ids <= last).unsqueeze(-1), frozen, trainable)
        return embedded

    def to_unsplit(self) -> nn.Embedding:
        """The same as one embedding, all of it trainable."""
        joined = torch.cat([self.embedding_frozen.weight, self.embedding_trainable.weight]).detach()
        unsplit: nn.Embedding = nn.Embedding.from_pretrained(joined, freeze=False)
        return unsplit


class PartiallyFrozenLinear(nn.Module):
    """A linear map without bias whose outputs before `freeze_until_idx` are frozen."""

    def __init__(self, original: nn.Linear | PartiallyFrozenLinear, freeze_until_idx: int) -> None:
        super().__init__()
        if isinstance(original, PartiallyFrozenLinear):
            original = original.to_unsplit()
        if getattr(original, "bias", None) is not None:
            raise BadInput("only a linear map without bias can be partially frozen, this one has a bias")
        frozen, trainable = _split(original.weight, freeze_until_idx)
        self.freeze_until_idx = freeze_until_idx
        self.linear_frozen: nn.Linear = _linear(frozen).requires_grad_(False)
        self.linear_trainable: nn.Linear = _linear(trainable)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        return torch.cat([self.linear_frozen(hidden), self.linear_trainable(hidden)], dim=-1)

    def to_unsplit(self) -> nn.Linear:
        """The same as one linear map, all of it trainable."""
        return _linear(torch.cat([self.linear_frozen.weight, self.linear_trainable.weight]).detach())


def _split(weight: Tensor, until: int) -> tuple[Tensor, Tensor]:
    if not 0 < until < weight.shape[0]:
        raise BadInput(f"freeze_until_idx={until} must leave something on both sides of {weight.shape[0]} rows")
    return weight.detach()[:until].clone(), weight.detach()[until:].clone()


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def freeze(modules: Iterable[nn.Module | None]) -> None:
    """Stop training every parameter of the modules that are there."""
    for module in modules:
        if module is not None:
            module.requires_grad_(False)


def text_parts(layers: nn.ModuleList, norm: nn.Module) -> list[nn.Module]:
    """The backbone as it was before audio came: attentions, text FFNs and text norms."""
    parts: list[nn.Module] = [norm]
    for layer in layers:
        if isinstance(layer, HiggsAudioDualFFNDecoderLayer):
            parts += [layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        else:
            parts.append(layer)
    return parts


def parameter_counts(
    components: Mapping[str, Iterable[nn.Module | None]], rest: str, whole: nn.Module
) -> dict[str, dict[str, int]]:
    """Parameters by component, what is in none of them as `rest`, and `overall`.

    Returns:
        {"trainable": {component: count}, "total": {component: count}}
    """
    named = {
        name: [parameter for module in modules if module is not None for parameter in module.parameters()]
        for name, modules in components.items()
    }
    known = {id(parameter) for parameters in named.values() for parameter in parameters}
    overall = list(whole.parameters())
    named |= {rest: [parameter for parameter in overall if id(parameter) not in known], "overall": overall}
    return {
        "trainable": {name: sum(one.numel() for one in ones if one.requires_grad) for name, ones in named.items()},
        "total": {name: sum(one.numel() for one in ones) for name, ones in named.items()},
    }
