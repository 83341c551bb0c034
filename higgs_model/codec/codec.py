"""`HiggsAudioCodec`: recordings ↔ codes.

In: recordings of any sample rate, mono or stereo, as arrays. Out: codes (K, T) int64; and from codes samples (N,)
float32 at `sample_rate`. A frame of codes is exactly `hop_samples` samples.

Invariant: the codes of a recording and the samples of a clip depend neither on the rest of the batch nor on how long
sequences are split internally; for the only exception, recordings over two minutes, see `encode`.

Does not depend on files, text, speakers, or the language model's delay pattern and stream tokens.
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
from higgs_model.checkpoint import resolve_checkpoint
from higgs_model.codec import checkpoint
from higgs_model.codec.acoustic import run_decoder
from higgs_model.codec.batching import BatchShape, collate, plan_batches
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.network import CodecNetwork
from higgs_model.codec.stages import DecoderStream
from higgs_model.errors import BadInput

Codes = Tensor | npt.NDArray[np.integer]

_WINDOWS = BatchShape(window_frames=128, batch_frames=4096, multiple_frames=32)
"""Few distinct shapes and high utilization; about 2 GB of activations at the published width in float32."""
_PORTION_FRAMES = 1024
"""Maximum number of frames per push to the stages, which bounds memory."""


class HiggsAudioCodec(CodecNetwork):
    """Codec with encoding and decoding of clips and batches; randomly initialized unless loaded by `from_pretrained`.

    Attributes:
        revision: commit of the hub snapshot; None for a local folder.
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
        """Load a checkpoint in either layout for inference.

        Args:
            path_or_hub_id: a local folder or a hub repository.
            revision: branch, tag or commit on the hub.
            device: device of the weights.
            dtype: dtype of the convolutions and the semantic model; the quantizer stays in float32. In bfloat16 some
                codes of `encode` differ from those in float32.

        Raises:
            BadCheckpoint, BadConfig: the checkpoint is not a valid codec.
        """
        location = resolve_checkpoint(path_or_hub_id, revision=revision)
        config, state = checkpoint.read_checkpoint(location)
        codec = cls(config)
        codec.revision = location.revision
        checkpoint.load_state(codec, state, path_or_hub_id)
        return codec.to(device=device).cast(dtype).eval()

    def save_pretrained(self, folder: str | Path, layout: checkpoint.Layout = "transformers") -> None:
        """Write a checkpoint in either layout."""
        checkpoint.write_checkpoint(Path(folder), self.config, self.state_dict(), layout)

    @property
    def sample_rate(self) -> int:
        """Sample rate of `decode`'s output in Hz."""
        return self.config.sample_rate_hz

    @property
    def hop_samples(self) -> int:
        """Samples per frame."""
        return self.config.hop_samples

    @property
    def num_codebooks(self) -> int:
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Number of codes per codebook; valid codes are below it."""
        return self.config.codebook_size

    def compile_decoder(self, batch_size: int = 8) -> None:
        """Compile the decoder with torch.compile for a single window length and batch size.

        Short clips and small batches are padded. The first call includes the compilation.
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
        """Encode one recording.

        Recordings over two minutes are encoded in windows of two minutes with five seconds of real context on each
        side, crossfaded over one second. Their acoustic latents are exact; the semantic model's attention, which would
        span the full recording, is limited to the window.

        Args:
            waveform: (N,), or (channels, N), which is mixed down; floating point, full scale ±1. Recordings shorter
                than a frame are padded with silence.
            sample_rate: any sample rate, in Hz.
            bandwidth_kbps: one of the configuration's target bandwidths, for fewer codebooks; None: all.
            normalized: normalize the recording to −23 LUFS first; silence and clips under 0.4 s are left unchanged.

        Returns:
            (K, T) int64 on the codec's device.

        Raises:
            BadInput: the waveform or its sample rate is invalid.
            BadConfig: `bandwidth_kbps` is not a target bandwidth.
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
        """Encode several recordings, with the same results as `encode`; those of equal length share a batch.

        Args:
            waveforms: see `encode`.
            sample_rate: in Hz, for all recordings or one per recording.
        """
        rates = list(sample_rate) if isinstance(sample_rate, Sequence) else [sample_rate] * len(waveforms)
        if len(rates) != len(waveforms):
            raise BadInput(f"encode_batch: got {len(waveforms)} recordings with {len(rates)} sample rates.")
        num_codebooks = self.config.num_codebooks_for(bandwidth_kbps)
        by_length: dict[int, list[tuple[int, Tensor]]] = {}
        for index, (waveform, rate) in enumerate(zip(waveforms, rates, strict=True)):
            samples_N = self._prepare(waveform, rate, normalized)
            by_length.setdefault(len(samples_N), []).append((index, samples_N))
        codes: dict[int, Tensor] = {}
        for group in by_length.values():
            samples_BN = torch.stack([samples_N for _, samples_N in group]).to(self.device)
            rows = self.encode_samples(samples_BN, num_codebooks)
            codes |= {index: row for (index, _), row in zip(group, rows, strict=True)}
        return [codes[index] for index in range(len(waveforms))]

    def _prepare(self, waveform: Waveform, sample_rate_hz: int, normalized: bool) -> Tensor:
        """Return the recording as (N,) float32 at the codec's sample rate, padded to at least one frame."""
        samples_N = to_mono(waveform)
        if normalized:
            samples_N = normalize_loudness(samples_N, sample_rate_hz)
        samples_N = resample(samples_N, sample_rate_hz, self.config.sample_rate_hz)
        padding = self.hop_samples - len(samples_N) if len(samples_N) < self.min_samples else 0
        return F.pad(torch.from_numpy(samples_N), (0, max(padding, 0)))

    def decode(self, codes_KT: Codes) -> Tensor:
        """Decode one clip.

        Args:
            codes_KT: (K, T) integers below `codebook_size`; the first few codebooks suffice, at lower quality.

        Returns:
            (T × hop_samples,) float32 on the codec's device.

        Raises:
            BadInput: shape, dtype or range of the codes is invalid.
        """
        return self.decode_batch([codes_KT])[0]

    @torch.inference_mode()
    def decode_batch(self, clips: Sequence[Codes]) -> list[Tensor]:
        """Decode several clips of any lengths, with the same results as `decode`.

        The decoder is not causal, so naive padding would change the results. On a CPU clips are decoded one by one,
        which uses the cores as well as a batch would. On other devices, and when compiled, long clips are split into
        windows of equal length with real context, and windows of all clips are batched.
        """
        clips_KT = [self.validate_codes(codes, f"clip {index}") for index, codes in enumerate(clips)]
        if self.device.type == "cpu" and self._compiled_decoder is None:
            return [self._decode_clip(codes_KT) for codes_KT in clips_KT]
        audio = [torch.empty(codes.shape[1] * self.hop_samples, device=self.device) for codes in clips_KT]
        for num_codebooks in {codes.shape[0] for codes in clips_KT}:
            group = [index for index, codes in enumerate(clips_KT) if codes.shape[0] == num_codebooks]
            self._decode_windows([clips_KT[index] for index in group], [audio[index] for index in group])
        return audio

    def _decode_clip(self, codes_KT: Tensor) -> Tensor:
        stream = DecoderStream(self.decoder_stages)
        *portions, last = codes_KT.split(_PORTION_FRAMES, dim=1)
        parts = [stream.push(self.decoder_latents(portion[None])[0], last=False) for portion in portions]
        parts.append(stream.push(self.decoder_latents(last[None])[0], last=True))
        return torch.cat(parts).float()

    def _decode_windows(self, clips_KT: Sequence[Tensor], audio: Sequence[Tensor]) -> None:
        """Decode clips with the same number of codebooks into `audio`."""
        hop = self.hop_samples
        for batch in plan_batches([codes.shape[1] for codes in clips_KT], self.receptive_field, self._batch_shape()):
            codes_BKT, valid_frames_B = collate(clips_KT, batch, self._compiled_batch_size)
            samples_BN = self.decode_codes(codes_BKT, valid_frames_B)
            for row, (clip, window) in enumerate(batch.rows):
                first, last = (window.keep_start - window.start) * hop, (window.keep_stop - window.start) * hop
                audio[clip][window.keep_start * hop : window.keep_stop * hop] = samples_BN[row, first:last]

    def _batch_shape(self) -> BatchShape:
        if self._compiled_batch_size is None:
            return _WINDOWS
        length = _WINDOWS.window_length(self.receptive_field)
        return BatchShape(_WINDOWS.window_frames, self._compiled_batch_size * length, length)

    def validate_codes(self, codes: Codes, where: str) -> Tensor:
        """Return the codes (K, T) as int64 on the codec's device.

        Raises:
            BadInput: shape, dtype or range of the codes is invalid; the message starts with `where`.
        """
        codes_KT = torch.as_tensor(codes)
        if codes_KT.dim() != 2 or not 1 <= codes_KT.shape[0] <= self.num_codebooks:
            raise BadInput(
                f"{where}: codes have shape {tuple(codes_KT.shape)}; "
                f"expected (codebooks, frames) with 1 to {self.num_codebooks} codebooks."
            )
        if codes_KT.is_floating_point() or codes_KT.is_complex() or codes_KT.dtype == torch.bool:
            raise BadInput(f"{where}: codes are {codes_KT.dtype}; expected integers.")
        if codes_KT.numel():
            low, high = (int(bound) for bound in codes_KT.to(torch.int64).aminmax())
            if low < 0 or high >= self.codebook_size:
                raise BadInput(
                    f"{where}: codes range from {low} to {high}; expected 0 to {self.codebook_size - 1}, "
                    f"without stream tokens."
                )
        return codes_KT.to(self.device, torch.int64)
