"""Tensor names of the codec: original layout ↔ internal; folding and unfolding of weight norm.

Internal names are those of the transformers layout, with plain weights instead of weight-normalized pairs. In: names or
a state dictionary of one layout. Out: the same in the other. Does not depend on files or modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_UNIT_LEAVES = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}
_FLAT_NAMES = [
    # original pattern, internal replacement
    (r"^fc_prior\.", "fc."),
    (r"^fc_post1\.", "fc1."),
    (r"^fc_post2\.", "fc2."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.quantizers.\1.codebook."),
    (r"^quantizer\.vq\.layers\.", "quantizer.quantizers."),
    # The original wraps most semantic convolutions in another module.
    (r"^((?:encoder|decoder)_semantic\..*?conv\d?)\.conv\.(weight|bias)$", r"\1.\2"),
]
_ENCODER_UNIT = re.compile(r"^encoder\.block\.(\d+)\.block\.([012])\.block\.(\d)\.(.+)$")
_ENCODER_BLOCK = re.compile(r"^encoder\.block\.(\d+)\.block\.([34])\.(.+)$")
_ENCODER_EDGE = re.compile(r"^encoder\.block\.(\d+)\.([a-z_]+)$")
_DECODER_UNIT = re.compile(r"^decoder_2\.model\.(\d+)\.block\.([234])\.block\.(\d)\.(.+)$")
_DECODER_BLOCK = re.compile(r"^decoder_2\.model\.(\d+)\.block\.([01])\.(.+)$")
_DECODER_EDGE = re.compile(r"^decoder_2\.model\.(\d+)\.([a-z_]+)$")


def internal_name(original: str, num_blocks: int) -> str:
    """Return the internal name of a tensor of the original layout; `num_blocks` is the number of strides."""
    edges = {0: "conv1", num_blocks + 1: "snake1", num_blocks + 2: "conv2"}
    if match := _ENCODER_UNIT.match(original):
        block, unit, leaf, rest = match.groups()
        return f"acoustic_encoder.block.{int(block) - 1}.res_unit{int(unit) + 1}.{_UNIT_LEAVES[leaf]}.{rest}"
    if match := _ENCODER_BLOCK.match(original):
        block, index, rest = match.groups()
        return f"acoustic_encoder.block.{int(block) - 1}.{'snake1' if index == '3' else 'conv1'}.{rest}"
    if match := _DECODER_UNIT.match(original):
        block, unit, leaf, rest = match.groups()
        return f"acoustic_decoder.block.{int(block) - 1}.res_unit{int(unit) - 1}.{_UNIT_LEAVES[leaf]}.{rest}"
    if match := _DECODER_BLOCK.match(original):
        block, index, rest = match.groups()
        return f"acoustic_decoder.block.{int(block) - 1}.{'snake1' if index == '0' else 'conv_t1'}.{rest}"
    for half, pattern in (("encoder", _ENCODER_EDGE), ("decoder", _DECODER_EDGE)):
        if (match := pattern.match(original)) and int(match[1]) in edges:
            return f"acoustic_{half}.{edges[int(match[1])]}.{match[2]}"
    for flat, replacement in _FLAT_NAMES:
        original = re.sub(flat, replacement, original)
    return original


def original_name(internal: str, num_blocks: int) -> str:
    """Return a tensor's name in the original layout; the inverse of `internal_name`."""
    edges = {"conv1": 0, "snake1": num_blocks + 1, "conv2": num_blocks + 2}
    leaves = {name: digit for digit, name in _UNIT_LEAVES.items()}
    if match := re.match(r"^acoustic_(en|de)coder\.block\.(\d+)\.res_unit(\d)\.(\w+?)\.(\w+)$", internal):
        half, block, unit, leaf, rest = match.groups()
        prefix = _ORIGINAL_PREFIX[half].format(int(block) + 1)
        return f"{prefix}.block.{int(unit) + (-1 if half == 'en' else 1)}.block.{leaves[leaf]}.{rest}"
    if match := re.match(r"^acoustic_(en|de)coder\.block\.(\d+)\.(snake1|conv1|conv_t1)\.(\w+)$", internal):
        half, block, leaf, rest = match.groups()
        prefix = _ORIGINAL_PREFIX[half].format(int(block) + 1)
        return f"{prefix}.block.{(3 if half == 'en' else 0) + (leaf != 'snake1')}.{rest}"
    if match := re.match(r"^acoustic_(en|de)coder\.(conv1|snake1|conv2)\.(\w+)$", internal):
        half, leaf, rest = match.groups()
        return f"{_ORIGINAL_PREFIX[half].format(edges[leaf])}.{rest}"
    if match := re.match(r"^(encoder|decoder)_semantic\.(.*?)\.(weight|bias)$", internal):
        # Only the 1 × 1 convolutions are not wrapped.
        wrapper = "" if "res_units" in internal and match[2].endswith("conv2") else ".conv"
        return f"{match[1]}_semantic.{match[2]}{wrapper}.{match[3]}"
    for start, replacement in (("fc.", "fc_prior."), ("fc1.", "fc_post1."), ("fc2.", "fc_post2.")):
        if internal.startswith(start):
            return replacement + internal.removeprefix(start)
    internal = internal.replace(".codebook.", "._codebook.")
    return internal.replace("quantizer.quantizers.", "quantizer.vq.layers.")


_ORIGINAL_PREFIX = {"en": "encoder.block.{}", "de": "decoder_2.model.{}"}

_PAIRS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
"""Both namings of a weight-normalized pair: magnitudes, directions."""


def fold_weight_norm(state: Mapping[str, Tensor]) -> State:
    """Replace every weight-normalized pair by its weight: direction × magnitude / ‖direction‖.

    Uses torch's own kernel, because rounding differences here change codes. Incomplete pairs are left in place and
    reported as unknown tensors on loading.
    """
    folded = dict(state)
    for name in state:
        for magnitude_leaf, direction_leaf in _PAIRS:
            stem = name.removesuffix(magnitude_leaf)
            if stem != name and stem + direction_leaf in state:
                magnitude, direction = folded.pop(name), folded.pop(stem + direction_leaf)
                axis = max(range(magnitude.dim()), key=lambda axis: magnitude.shape[axis])
                folded[stem + "weight"] = torch._weight_norm(direction, magnitude, axis)
    return folded


def unfold_weight_norm(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the magnitudes along `axis` and the directions of a plain weight."""
    other_axes = [other for other in range(weight.dim()) if other != axis]
    return torch.linalg.vector_norm(weight, dim=other_axes, keepdim=True), weight.clone()
