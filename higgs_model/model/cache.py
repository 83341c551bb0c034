"""The key/value cache of `HiggsAudioModel.generate` and `forward`.

A cache holds the keys and values of every attention module for a batch of sequences that advance in lockstep, and for
every cached position whether it is padding and whether it is audio. Positions are common to all layers: `extend`
appends them, `update` fills them layer by layer. A layer that skips positions (a fast-forward layer skips audio) finds
zeros there, which its mask hides.

Attention modules call only `update`, the same method as in transformers' caches. Unlike `DynamicCache`, this cache
grows by doubling its capacity instead of copying everything at each step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from higgs_model.errors import BadInput

_INITIAL_CAPACITY = 256


class KVCache:
    """Keys and values of one batch.

    Args:
        max_length: capacity of a static cache: `update` always returns tensors of this length, and `extend` raises
            beyond it. None is a dynamic cache, which grows and returns only the cached positions.

    Attributes:
        length: number of cached positions.
        has_padding: whether any cached position is padding.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self.has_padding = False
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._attention_mask: Tensor | None = None
        self._audio_mask: Tensor | None = None
        self._num_tokens: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor:
        """(B, length) bool: positions that are not padding."""
        return _cached(self._attention_mask, self.length)

    @property
    def audio_mask(self) -> Tensor:
        """(B, length) bool: positions of audio codes."""
        return _cached(self._audio_mask, self.length)

    @property
    def num_tokens(self) -> Tensor | int:
        """(B, 1) int64: positions of each sequence so far, without padding; 0 while the cache is empty."""
        return 0 if self._num_tokens is None else self._num_tokens

    @property
    def num_keys(self) -> int:
        """Length of the keys that `update` returns."""
        return self.length if self.max_length is None else self.max_length

    def extend(self, attention_mask_BS: Tensor, audio_mask_BS: Tensor, has_padding: bool) -> None:
        """Append S positions to every sequence.

        Raises:
            BadInput: the static cache is full.
        """
        num_new = attention_mask_BS.shape[1]
        if self.max_length is not None and self.length + num_new > self.max_length:
            raise BadInput(
                f"the sequence needs {self.length + num_new} positions, but the static cache has {self.max_length}"
            )
        start, self.length = self.length, self.length + num_new
        self._attention_mask = self._ensure_capacity(self._attention_mask, attention_mask_BS, dim=1)
        self._audio_mask = self._ensure_capacity(self._audio_mask, audio_mask_BS, dim=1)
        self._attention_mask[:, start : self.length] = attention_mask_BS
        self._audio_mask[:, start : self.length] = audio_mask_BS
        self.has_padding |= has_padding
        self._num_tokens = self.num_tokens + attention_mask_BS.sum(dim=1, keepdim=True)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the last S positions for one layer.

        Args:
            keys, values: (B, heads, S, head_dim).
            layer_idx: cache index of the attention module.

        Returns:
            keys and values of all positions, (B, heads, num_keys, head_dim).
        """
        stored = self._layers.get(layer_idx, (None, None))
        start = self.length - keys.shape[2]
        updated = []
        for old, new in zip(stored, (keys, values), strict=True):
            buffer = self._ensure_capacity(old, new, dim=2)
            buffer[:, :, start : self.length] = new
            updated.append(buffer)
        self._layers[layer_idx] = (updated[0], updated[1])
        return updated[0][:, :, : self.num_keys], updated[1][:, :, : self.num_keys]

    def _ensure_capacity(self, stored: Tensor | None, like: Tensor, dim: int) -> Tensor:
        """Return `stored`, or a larger copy with room for `length` positions along `dim` and zeros in new ones."""
        if stored is not None and stored.shape[dim] >= self.length:
            return stored
        shape = list(like.shape)
        shape[dim] = self.max_length or max(_INITIAL_CAPACITY, 2 * self.length)
        grown = like.new_zeros(shape)
        if stored is not None:
            grown.narrow(dim, 0, stored.shape[dim]).copy_(stored)
        return grown


def _cached(stored: Tensor | None, length: int) -> Tensor:
    if stored is None:
        raise RuntimeError("the cache is empty: call extend() first")
    return stored[:, :length]
