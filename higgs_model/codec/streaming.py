"""Codes in as they come, samples out as soon as they are final.

In: frames (K, T) in any portions. Out: samples whose concatenation is what `HiggsAudioCodec.decode` gives for
all the frames at once. A sample is final when no later frame can change it, that is `lookahead_frames` frames
later; the number follows from the loaded decoder's convolutions.

Each push runs the decoder over the new frames and their context, so portions much smaller than the context
(`context_frames` + `lookahead_frames`) cost more than they give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from higgs_model.codec.codec import Codes, HiggsAudioCodec
from higgs_model.errors import BadInput


class StreamingDecoder:
    """The decoder of one clip. Between pushes it holds the frames that later samples still need."""

    def __init__(self, codec: HiggsAudioCodec) -> None:
        self.codec = codec
        self._frames_KT: Tensor | None = None
        self._first_held = 0
        self._emitted_frames = 0
        self._finished = False

    @property
    def lookahead_frames(self) -> int:
        """Frames that must follow a frame before its samples are final."""
        return self.codec.reach.after

    @property
    def lookahead_s(self) -> float:
        """The same as time: how far the samples are behind the frames."""
        return self.lookahead_frames * self.codec.hop_samples / self.codec.sample_rate

    @property
    def context_frames(self) -> int:
        """Frames before a frame that take part in its samples."""
        return self.codec.reach.before

    def push(self, codes_KT: Codes) -> Tensor:
        """Take the next frames, (K, T) with any T, and give the samples (N,) that have become final."""
        if self._finished:
            raise BadInput("streaming decoder: frames came after the end; use a new decoder for a new clip.")
        new = self.codec.checked(codes_KT, "streaming decoder")
        if self._frames_KT is None:
            self._frames_KT = new
        elif len(new) != len(self._frames_KT):
            raise BadInput(
                f"streaming decoder: frames of {len(new)} codebooks came after frames of {len(self._frames_KT)}."
            )
        else:
            self._frames_KT = torch.cat([self._frames_KT, new], dim=1)
        return self._emit_until(self._num_frames - self.lookahead_frames)

    def finish(self) -> Tensor:
        """Say that no frame follows, and give the last samples (N,)."""
        self._finished = True
        return self._emit_until(self._num_frames)

    @property
    def _num_frames(self) -> int:
        held = 0 if self._frames_KT is None else self._frames_KT.shape[1]
        return self._first_held + held

    @torch.inference_mode()
    def _emit_until(self, stop_frames: int) -> Tensor:
        if self._frames_KT is None or stop_frames <= self._emitted_frames:
            return torch.empty(0, device=self.codec.device)
        hop = self.codec.hop_samples
        samples_N = self.codec.decode(self._frames_KT)
        final = samples_N[(self._emitted_frames - self._first_held) * hop : (stop_frames - self._first_held) * hop]
        self._emitted_frames = stop_frames
        keep_from = max(stop_frames - self.context_frames, self._first_held)
        self._frames_KT = self._frames_KT[:, keep_from - self._first_held :]
        self._first_held = keep_from
        return final
