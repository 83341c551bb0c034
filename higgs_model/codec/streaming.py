"""Codes in as they come, samples out as soon as they are final.

In: frames (K, T) in any portions. Out: samples whose concatenation is what `HiggsAudioCodec.decode` gives for
all the frames at once. A sample is final when no later frame can change it; how far that is behind the last
frame follows from the loaded decoder's convolutions.

Small portions are dear: a stage of the decoder runs over the new positions and a little context of its own, so
that portions of a second cost about a fifth more than the whole, and portions of a few frames several times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from higgs_model.codec.codec import Codes, HiggsAudioCodec
from higgs_model.codec.stages import DecoderStream, lookahead_frames
from higgs_model.errors import BadInput


class StreamingDecoder:
    """The decoder of one clip. Between pushes it holds what later samples still need, and no more.

    Attributes:
        lookahead_frames: how many frames must follow a frame before all its samples are final.
    """

    def __init__(self, codec: HiggsAudioCodec) -> None:
        self.codec = codec
        self.lookahead_frames = lookahead_frames(codec.decoder_stages)
        self._stream = DecoderStream(codec.decoder_stages)
        self._num_codebooks: int | None = None
        self._finished = False

    @property
    def lookahead_s(self) -> float:
        """The same as time: how far the samples are behind the frames."""
        return self.lookahead_frames * self.codec.hop_samples / self.codec.sample_rate

    @torch.inference_mode()
    def push(self, codes_KT: Codes) -> Tensor:
        """Take the next frames, (K, T) with any T, and give the samples (N,) float32 that have become final."""
        if self._finished:
            raise BadInput("streaming decoder: frames came after the end; use a new decoder for a new clip.")
        new_KT = self.codec.checked(codes_KT, "streaming decoder")
        num_codebooks = new_KT.shape[0]
        if num_codebooks != (self._num_codebooks or num_codebooks):
            raise BadInput(
                f"streaming decoder: frames of {num_codebooks} codebooks came after frames of {self._num_codebooks}."
            )
        self._num_codebooks = num_codebooks
        return self._through(new_KT, last=False)

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """Say that no frame follows, and give the last samples (N,)."""
        already, self._finished = self._finished, True
        none_KT = torch.empty(self._num_codebooks or 1, 0, dtype=torch.int64, device=self.codec.device)
        return torch.empty(0, device=self.codec.device) if already else self._through(none_KT, last=True)

    def _through(self, codes_KT: Tensor, *, last: bool) -> Tensor:
        return self._stream.push(self.codec.decoder_latents(codes_KT[None])[0], last=last).float()
