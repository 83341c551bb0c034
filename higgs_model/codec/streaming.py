"""Codes in as they come, samples out as soon as they are final.

In: frames (K, T) in any portions. Out: samples whose concatenation is what `HiggsAudioCodec.decode` gives for
all the frames at once. A sample is final when no later frame can change it; how far that is behind the last
frame follows from the loaded decoder's convolutions.

`StreamingDecoder` runs a clip alone, each stage of the decoder carrying what it needs. `WindowedClip` only says
which frames have to go through the decoder together, so that windows of many clips can share a pass; it gives whole
frames, and runs the context of each window again.

Small portions are dear: a stage of the decoder runs over the new positions and a little context of its own, so
that portions of a second cost about a fifth more than the whole, and portions of a few frames several times as much.
"""

from __future__ import annotations

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class ClipWindow:
    """Frames (K, T) to be decoded as if they were a clip, and which samples of the result are right."""

    codes_KT: Tensor
    first_sample: int
    last_sample: int

    def kept(self, samples_N: Tensor) -> Tensor:
        """What belongs to the clip."""
        return samples_N[self.first_sample : self.last_sample]


class WindowedClip:
    """One clip cut into windows with real context as its frames come."""

    def __init__(self, codec: HiggsAudioCodec) -> None:
        self._codec = codec
        self._held_KT: Tensor | None = None
        self._held_from = self._given = 0

    def push(self, new: Codes, *, last: bool) -> ClipWindow:
        """Take the next frames (K, T); the window's samples follow those of the window before, without gap."""
        new_KT = self._codec.checked(new, "windowed clip")
        held_KT = new_KT if self._held_KT is None else torch.cat([self._held_KT, new_KT], dim=1)
        stop = self._held_from + held_KT.shape[1]
        reach, hop = self._codec.reach, self._codec.hop_samples
        keep_stop = stop if last else max(stop - reach.after, self._given)
        # Too little came for a sample to be final: nothing is run.
        codes_KT = held_KT if keep_stop > self._given else held_KT[:, :0]
        made = ClipWindow(codes_KT, (self._given - self._held_from) * hop, (keep_stop - self._held_from) * hop)
        following = max(keep_stop - reach.before, 0)
        self._held_KT = held_KT[:, following - self._held_from :]
        self._held_from, self._given = following, keep_stop
        return made
