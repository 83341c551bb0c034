"""`HiggsAudioCodec`: recordings ↔ codes.

In: recordings of any sample rate, mono or stereo, as arrays. Out: codes (K, T) int64; and from codes samples
(N,) float32 at `sample_rate`. One frame of codes is `hop_samples` samples, exactly.

Invariant: the codes of a recording and the samples of a clip do not depend on what else is in a batch, nor on
how long sequences are cut inside; for the one exception, recordings over two minutes, see `encode`.

Knows nothing of files, text, speakers, or the delay pattern and stream tokens of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_model.audio.loudness import normalize_loudness
from higgs_model.audio.resample import resample
from higgs_model.audio.waveform import Waveform, to_mono
from higgs_model.checkpoint import locate
from higgs_model.codec import checkpoint
from higgs_model.codec.acoustic import run_decoder
from higgs_model.codec.batching import BatchShape, gather, plan
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.network import CodecNetwork
from higgs_model.codec.stages import DecoderStream
from higgs_model.errors import BadInput

Codes = Tensor | npt.NDArray[np.integer]

_WINDOWS = BatchShape(window_frames=128, batch_frames=4096, multiple_frames=32)
"""Few shapes and full devices; some 2 GB of activations at the published width in float32."""
_PORTION_FRAMES = 1024
"""Frames that go into the chain of stages at a time, when there are more."""


class HiggsAudioCodec(CodecNetwork):
    """The codec, ready for use. Constructed, it has random weights; see `from_pretrained`.

    Attributes:
        revision: the hub commit that the checkpoint is a snapshot of; None for a folder of the user's.
    """

    def __init__(self, config: HiggsAudioCodecConfig) -> None:
        super().__init__(config)
        self.revision: str | None = None
        self._compiled_batch_size: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a checkpoint of either layout, ready for inference.

        Args:
            path_or_hub_id: a folder, or a repository on the hub.
            revision: branch, tag or commit on the hub.
            dtype: of the convolutions and the semantic model; the quantizer stays in float32. In bfloat16 the codes
                of `encode` differ from float32's here and there.
        """
        location = locate(path_or_hub_id, revision=revision)
        config, state = checkpoint.read_checkpoint(location)
        codec = cls(config)
        codec.revision = location.revision
        checkpoint.fill(codec, state, path_or_hub_id)
        return codec.to(device=device).cast(dtype).eval()

    def save_pretrained(self, folder: str | Path, layout: checkpoint.Layout = "transformers") -> None:
        """Write a checkpoint in either layout."""
        checkpoint.write_checkpoint(Path(folder), self.config, self.state_dict(), layout)

    @property
    def sample_rate(self) -> int:
        """Hz, of what `decode` gives."""
        return self.config.sample_rate_hz

    @property
    def hop_samples(self) -> int:
        """Samples of one frame."""
        return self.config.hop_samples

    @property
    def num_codebooks(self) -> int:
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Codes of one codebook; valid codes are below it."""
        return self.config.codebook_size

    def compile_decoder(self, batch_size: int = 8) -> None:
        """Compile the decoder with torch.compile, for windows of one length in batches of one size.

        Short clips and small batches are filled up. The first call takes the compiler's time.
        """
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._compiled_decoder = torch.compile(run_decoder, dynamic=False, mode=mode)
        self._compiled_batch_size = batch_size

    def encode(
        self,
        waveform: Waveform,
        sample_rate: int,
        *,
        bandwidth_kbps: float | None = None,
        normalized: bool = False,
    ) -> Tensor:
        """Codes of one recording.

        Recordings over two minutes go through the network in pieces of two minutes, with five seconds of real
        context on each side, blended over one second. Their acoustic half is exact; the semantic model, whose
        attention would span the whole recording, hears the piece instead.

        Args:
            waveform: (N,), or (channels, N) which is mixed down; floats, full scale ±1. Less than a frame is
                filled up with silence.
            sample_rate: Hz, any.
            bandwidth_kbps: one of the configuration's target bandwidths, for fewer codebooks.
            normalized: bring the recording to −23 LUFS first; silence and clips under 0.4 s stay as they are.

        Returns:
            (K, T) int64 on the codec's device.
        """
        return self.encode_batch([waveform], sample_rate, bandwidth_kbps=bandwidth_kbps, normalized=normalized)[0]

    @torch.inference_mode()
    def encode_batch(
        self,
        waveforms: Sequence[Waveform],
        sample_rate: int | Sequence[int],
        *,
        bandwidth_kbps: float | None = None,
        normalized: bool = False,
    ) -> list[Tensor]:
        """Codes of several recordings, each as `encode` gives it. Those of equal length run together.

        Args:
            sample_rate: Hz, of all recordings or of each.
        """
        rates = list(sample_rate) if isinstance(sample_rate, Sequence) else [sample_rate] * len(waveforms)
        if len(rates) != len(waveforms):
            raise BadInput(f"encode_batch: {len(waveforms)} recordings came with {len(rates)} sample rates.")
        num_codebooks = self.config.codebooks_for(bandwidth_kbps)
        by_length: dict[int, list[tuple[int, Tensor]]] = {}
        for index, (waveform, rate) in enumerate(zip(waveforms, rates, strict=True)):
            samples_N = self._prepare(waveform, rate, normalized)
            by_length.setdefault(len(samples_N), []).append((index, samples_N))
        codes: dict[int, Tensor] = {}
        for members in by_length.values():
            samples_BN = torch.stack([samples_N for _, samples_N in members]).to(self.device)
            rows = self.encode_samples(samples_BN, num_codebooks)
            codes |= {index: row for (index, _), row in zip(members, rows, strict=True)}
        return [codes[index] for index in range(len(waveforms))]

    def _prepare(self, waveform: Waveform, sample_rate_hz: int, normalized: bool) -> Tensor:
        """(N,) float32 at the codec's rate, long enough for a frame."""
        samples_N = to_mono(waveform)
        if normalized:
            samples_N = normalize_loudness(samples_N, sample_rate_hz)
        samples_N = resample(samples_N, sample_rate_hz, self.config.sample_rate_hz)
        missing = self.hop_samples - len(samples_N) if len(samples_N) < self.min_samples else 0
        return F.pad(torch.from_numpy(samples_N), (0, max(missing, 0)))

    def decode(self, codes_KT: Codes) -> Tensor:
        """Samples of one clip.

        Args:
            codes_KT: (K, T) integers below `codebook_size`; the first few codebooks alone give a coarser sound.

        Returns:
            (T × hop_samples,) float32 on the codec's device.
        """
        return self.decode_batch([codes_KT])[0]

    @torch.inference_mode()
    def decode_batch(self, clips: Sequence[Codes]) -> list[Tensor]:
        """Samples of several clips of any lengths, each as `decode` gives it.

        The decoder is not causal: what follows a frame shapes it. On a CPU clips therefore go through it one by
        one, which keeps its cores as busy as a batch would. Elsewhere, and when compiled, long clips are cut into
        windows of one length with real context, and windows of all clips run together.
        """
        clips_KT = [self.checked(codes, f"clip {index}") for index, codes in enumerate(clips)]
        if self.device.type == "cpu" and self._compiled_decoder is None:
            return [self._decode_alone(codes_KT) for codes_KT in clips_KT]
        audio = [torch.empty(codes.shape[1] * self.hop_samples, device=self.device) for codes in clips_KT]
        for num_codebooks in {codes.shape[0] for codes in clips_KT}:
            members = [index for index, codes in enumerate(clips_KT) if codes.shape[0] == num_codebooks]
            self._decode_windows([clips_KT[index] for index in members], [audio[index] for index in members])
        return audio

    def _decode_alone(self, codes_KT: Tensor) -> Tensor:
        stream = DecoderStream(self.decoder_stages)
        *portions, last = codes_KT.split(_PORTION_FRAMES, dim=1)
        parts = [stream.push(self.decoder_latents(portion[None])[0], last=False) for portion in portions]
        parts.append(stream.push(self.decoder_latents(last[None])[0], last=True))
        return torch.cat(parts).float()

    def _decode_windows(self, clips_KT: Sequence[Tensor], audio: Sequence[Tensor]) -> None:
        """Fill in the audio of clips that have the same number of codebooks."""
        hop = self.hop_samples
        for batch in plan([codes.shape[1] for codes in clips_KT], self.reach, self._batch_shape()):
            codes_BKT, valid_frames_B = gather(clips_KT, batch, self._compiled_batch_size)
            samples_BN = self.decode_codes(codes_BKT, valid_frames_B)
            for row, (clip, window) in enumerate(batch.rows):
                first, last = (window.keep_start - window.start) * hop, (window.keep_stop - window.start) * hop
                audio[clip][window.keep_start * hop : window.keep_stop * hop] = samples_BN[row, first:last]

    def _batch_shape(self) -> BatchShape:
        if self._compiled_batch_size is None:
            return _WINDOWS
        length = _WINDOWS.window_length(self.reach)
        return BatchShape(_WINDOWS.window_frames, self._compiled_batch_size * length, length)

    def checked(self, codes: Codes, where: str) -> Tensor:
        """The codes (K, T) as int64 on the codec's device, or `BadInput` naming `where` they came from."""
        codes_KT = torch.as_tensor(codes)
        if codes_KT.dim() != 2 or not 1 <= codes_KT.shape[0] <= self.num_codebooks:
            raise BadInput(
                f"{where}: its codes have the shape {tuple(codes_KT.shape)}; "
                f"wanted (codebooks, frames) with 1 to {self.num_codebooks} codebooks."
            )
        if codes_KT.is_floating_point() or codes_KT.is_complex() or codes_KT.dtype == torch.bool:
            raise BadInput(f"{where}: its codes are {codes_KT.dtype}; wanted integers.")
        if codes_KT.numel():
            low, high = (int(bound) for bound in codes_KT.to(torch.int64).aminmax())
            if low < 0 or high >= self.codebook_size:
                raise BadInput(
                    f"{where}: its codes reach from {low} to {high}; wanted 0 to {self.codebook_size - 1}, "
                    f"without stream tokens."
                )
        return codes_KT.to(self.device, torch.int64)
