"""Freezing of complete modules, and of the first rows of an embedding or a head.

Adding audio to a text model trains the new modules, and only those rows of the vocabulary that belong to new tokens.
These rows become a separate parameter, so that the frozen rows need neither gradient nor optimiser state. Checkpoints
store the pair either concatenated or split; `layouts` reads both.
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
        frozen, trainable = _split_rows(original.weight, freeze_until_idx)
        self.freeze_until_idx = freeze_until_idx
        self.embedding_frozen: nn.Embedding = nn.Embedding.from_pretrained(frozen, freeze=True)
        self.embedding_trainable: nn.Embedding = nn.Embedding.from_pretrained(trainable, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(…) int64 → (…, D)."""
        # Both parts look up every id, clamped to their rows, so that no shape depends on the data.
        last = self.freeze_until_idx - 1
        frozen = self.embedding_frozen(input_ids.clamp(max=last))
        trainable = self.embedding_trainable((input_ids - self.freeze_until_idx).clamp(min=0))
        embedded: Tensor = torch.where((input_ids <= last).unsqueeze(-1), frozen, trainable)
        return embedded

    def to_unsplit(self) -> nn.Embedding:
        """Return an equivalent, fully trainable embedding."""
        joined = torch.cat([self.embedding_frozen.weight, self.embedding_trainable.weight]).detach()
        unsplit: nn.Embedding = nn.Embedding.from_pretrained(joined, freeze=False)
        return unsplit


class PartiallyFrozenLinear(nn.Module):
    """A linear layer without bias whose outputs before `freeze_until_idx` are frozen."""

    def __init__(self, original: nn.Linear | PartiallyFrozenLinear, freeze_until_idx: int) -> None:
        super().__init__()
        if isinstance(original, PartiallyFrozenLinear):
            original = original.to_unsplit()
        if getattr(original, "bias", None) is not None:
            raise BadInput("only a linear layer without bias can be partially frozen, but this one has a bias")
        frozen, trainable = _split_rows(original.weight, freeze_until_idx)
        self.freeze_until_idx = freeze_until_idx
        self.linear_frozen: nn.Linear = _linear_from_weight(frozen).requires_grad_(False)
        self.linear_trainable: nn.Linear = _linear_from_weight(trainable)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        return torch.cat([self.linear_frozen(hidden), self.linear_trainable(hidden)], dim=-1)

    def to_unsplit(self) -> nn.Linear:
        """Return an equivalent, fully trainable linear layer."""
        return _linear_from_weight(torch.cat([self.linear_frozen.weight, self.linear_trainable.weight]).detach())


def _split_rows(weight: Tensor, until: int) -> tuple[Tensor, Tensor]:
    if not 0 < until < weight.shape[0]:
        num_rows = weight.shape[0]
        raise BadInput(f"freeze_until_idx={until} is out of range: expected 1 to {num_rows - 1} for {num_rows} rows")
    return weight.detach()[:until].clone(), weight.detach()[until:].clone()


def _linear_from_weight(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def freeze(modules: Iterable[nn.Module | None]) -> None:
    """Freeze all parameters of the modules; None entries are skipped."""
    for module in modules:
        if module is not None:
            module.requires_grad_(False)


def text_backbone_modules(layers: nn.ModuleList, norm: nn.Module) -> list[nn.Module]:
    """Return the modules of the original text backbone: attention, text FFNs and text norms."""
    modules: list[nn.Module] = [norm]
    for layer in layers:
        if isinstance(layer, HiggsAudioDualFFNDecoderLayer):
            modules += [layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        else:
            modules.append(layer)
    return modules


def count_parameters(
    components: Mapping[str, Iterable[nn.Module | None]], rest_name: str, model: nn.Module
) -> dict[str, dict[str, int]]:
    """Count the parameters of each component.

    Args:
        components: the modules of each component.
        rest_name: name of the component of all other parameters.
        model: the model that contains them all; counted as `overall`.

    Returns:
        {"trainable": {component: count}, "total": {component: count}}
    """
    by_component = {
        name: [parameter for module in modules if module is not None for parameter in module.parameters()]
        for name, modules in components.items()
    }
    assigned = {id(parameter) for parameters in by_component.values() for parameter in parameters}
    overall = list(model.parameters())
    rest = [parameter for parameter in overall if id(parameter) not in assigned]
    by_component |= {rest_name: rest, "overall": overall}
    return {
        "trainable": {
            name: sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            for name, parameters in by_component.items()
        },
        "total": {
            name: sum(parameter.numel() for parameter in parameters) for name, parameters in by_component.items()
        },
    }
