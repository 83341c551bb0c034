"""Streaming decoding: codes in as they arrive, samples out as soon as they are final.

In: frames (K, T) in portions of any size. Out: samples; concatenated, they equal `HiggsAudioCodec.decode` of all frames
at once. A sample is final when no later frame can change it; the lookahead follows from the decoder's convolutions.

`StreamingDecoder` decodes a single clip, with a buffer in every stage of the decoder. `WindowedClip` does not decode:
it returns the windows to decode, so that windows of many clips can share a batch; it works in whole frames and
recomputes the context of each window.

Short portions are expensive, because every stage recomputes some context: portions of a second cost about a fifth more
than a full clip, portions of a few frames several times as much.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model.codec.codec import Codes, HiggsAudioCodec
from higgs_model.codec.stages import DecoderStream, lookahead_frames
from higgs_model.errors import BadInput


class StreamingDecoder:
    """Decodes one clip. Between pushes it buffers only what later samples depend on.

    Attributes:
        lookahead_frames: number of frames that must follow a frame before all its samples are final.
    """

    def __init__(self, codec: HiggsAudioCodec) -> None:
        self.codec = codec
        self.lookahead_frames = lookahead_frames(codec.decoder_stages)
        self._stream = DecoderStream(codec.decoder_stages)
        self._num_codebooks: int | None = None
        self._finished = False

    @property
    def lookahead_s(self) -> float:
        """The lookahead in seconds: the delay of the samples relative to the frames."""
        return self.lookahead_frames * self.codec.hop_samples / self.codec.sample_rate

    @torch.inference_mode()
    def push(self, codes_KT: Codes) -> Tensor:
        """Append frames (K, T), with any T, and return the samples (N,) float32 that became final.

        Raises:
            BadInput: the codes are invalid, or the decoder is finished.
        """
        if self._finished:
            raise BadInput("streaming decoder: got frames after the end; use a new decoder for a new clip.")
        new_KT = self.codec.validate_codes(codes_KT, "streaming decoder")
        num_codebooks = new_KT.shape[0]
        if num_codebooks != (self._num_codebooks or num_codebooks):
            raise BadInput(
                f"streaming decoder: got frames of {num_codebooks} codebooks after frames of {self._num_codebooks}."
            )
        self._num_codebooks = num_codebooks
        return self._decode(new_KT, last=False)

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """End the clip and return its remaining samples (N,)."""
        was_finished, self._finished = self._finished, True
        no_frames_KT = torch.empty(self._num_codebooks or 1, 0, dtype=torch.int64, device=self.codec.device)
        return torch.empty(0, device=self.codec.device) if was_finished else self._decode(no_frames_KT, last=True)

    def _decode(self, codes_KT: Tensor, *, last: bool) -> Tensor:
        return self._stream.push(self.codec.decoder_latents(codes_KT[None])[0], last=last).float()


@dataclasses.dataclass(frozen=True)
class ClipWindow:
    """Frames (K, T) to decode like a clip, and the range of samples of the result that belong to the stream."""

    codes_KT: Tensor
    first_sample: int
    last_sample: int

    def crop(self, samples_N: Tensor) -> Tensor:
        """Return the samples that belong to the stream, given all samples of the window."""
        return samples_N[self.first_sample : self.last_sample]


class WindowedClip:
    """Splits one clip into windows with real context as its frames arrive."""

    def __init__(self, codec: HiggsAudioCodec) -> None:
        self._codec = codec
        self._buffer_KT: Tensor | None = None
        self._buffer_start = self._emitted = 0

    def push(self, new: Codes, *, last: bool) -> ClipWindow:
        """Append frames (K, T) and return the next window; its samples continue those of the previous one."""
        new_KT = self._codec.validate_codes(new, "windowed clip")
        buffer_KT = new_KT if self._buffer_KT is None else torch.cat([self._buffer_KT, new_KT], dim=1)
        stop = self._buffer_start + buffer_KT.shape[1]
        field, hop = self._codec.receptive_field, self._codec.hop_samples
        keep_stop = stop if last else max(stop - field.after, self._emitted)
        # No sample became final, so there is nothing to decode.
        codes_KT = buffer_KT if keep_stop > self._emitted else buffer_KT[:, :0]
        window = ClipWindow(
            codes_KT, (self._emitted - self._buffer_start) * hop, (keep_stop - self._buffer_start) * hop
        )
        next_start = max(keep_stop - field.before, 0)
        self._buffer_KT = buffer_KT[:, next_start - self._buffer_start :]
        self._buffer_start, self._emitted = next_start, keep_stop
        return window
