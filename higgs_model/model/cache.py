"""The key/value cache of the plain generation path.

One cache holds, for a batch of sequences in lockstep, the keys and values of every attention module, and for every
cached position whether it is real (not padding) and whether it is audio. A position belongs to all layers at once:
`extend` opens it, `update` fills it layer by layer. A layer that leaves it open (a fast-forward layer at an audio
position) finds zeros there, which its mask hides.

Attention modules see only `update`, the one method of transformers' caches that they call. It differs from
`DynamicCache` in that it grows by doubling instead of copying everything at each step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from higgs_model.errors import BadInput

_FIRST_CAPACITY = 256


class KVCache:
    """Keys and values of one batch.

    Args:
        max_length: positions to allocate once and for all. `update` then always returns tensors of that length,
            and one position more than that is refused. Without it the cache grows, and `update` returns what is
            filled.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self.has_padding = False
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._attended: Tensor | None = None
        self._audio: Tensor | None = None
        self._num_attended: Tensor | None = None

    @property
    def attended(self) -> Tensor:
        """(B, length) bool: real positions."""
        return _filled(self._attended, self.length)

    @property
    def audio(self) -> Tensor:
        """(B, length) bool: positions of audio codes."""
        return _filled(self._audio, self.length)

    @property
    def num_attended(self) -> Tensor | int:
        """(B, 1) int64: real positions of each sequence so far; 0 while the cache is empty."""
        return 0 if self._num_attended is None else self._num_attended

    @property
    def visible(self) -> int:
        """Length of the keys that attention sees."""
        return self.length if self.max_length is None else self.max_length

    def extend(self, attended_BS: Tensor, audio_BS: Tensor, has_padding: bool) -> None:
        """Open S positions at the end of every sequence.

        Raises:
            BadInput: the cache is of fixed length and full.
        """
        added = attended_BS.shape[1]
        if self.max_length is not None and self.length + added > self.max_length:
            raise BadInput(
                f"the sequence needs {self.length + added} positions, but the static cache has {self.max_length}"
            )
        start, self.length = self.length, self.length + added
        self._attended = self._with_room(self._attended, attended_BS, dim=1)
        self._audio = self._with_room(self._audio, audio_BS, dim=1)
        self._attended[:, start : self.length] = attended_BS
        self._audio[:, start : self.length] = audio_BS
        self.has_padding |= has_padding
        self._num_attended = self.num_attended + attended_BS.sum(dim=1, keepdim=True)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Fill the positions opened last, for one layer.

        Args:
            keys, values: (B, heads, S, head_dim), of the last S positions.

        Returns:
            keys and values of all positions, (B, heads, visible, head_dim).
        """
        stored = self._layers.get(layer_idx, (None, None))
        start = self.length - keys.shape[2]
        filled = []
        for old, new in zip(stored, (keys, values), strict=True):
            roomy = self._with_room(old, new, dim=2)
            roomy[:, :, start : self.length] = new
            filled.append(roomy)
        self._layers[layer_idx] = (filled[0], filled[1])
        return filled[0][:, :, : self.visible], filled[1][:, :, : self.visible]

    def _with_room(self, stored: Tensor | None, like: Tensor, dim: int) -> Tensor:
        """`stored` with room for `length` positions along `dim`; zeros where nothing was written."""
        if stored is not None and stored.shape[dim] >= self.length:
            return stored
        shape = list(like.shape)
        shape[dim] = self.max_length or max(_FIRST_CAPACITY, 2 * self.length)
        roomy = like.new_zeros(shape)
        if stored is not None:
            roomy.narrow(dim, 0, stored.shape[dim]).copy_(stored)
        return roomy


def _filled(stored: Tensor | None, length: int) -> Tensor:
    if stored is None:
        raise RuntimeError("the cache is empty: extend() comes first")
    return stored[:, :length]
