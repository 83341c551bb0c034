"""Preparation of shards: recordings are converted to codes and 16 kHz samples once, before training.

Each shard covers a fixed range of manifest rows, so that processes can share the work, and a killed run resumes with
the missing shards. A shard records an error message for each invalid row.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from higgs_model.audio.files import Recording, read_recording
from higgs_model.audio.resample import resample
from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput
from higgs_model.script.voices import Voice
from higgs_model.training.samples import Row, Sample, SampleReader
from higgs_model.training.store import SAMPLE_RATE_HZ, PreparedAudio, PreparedSample, read_header, write_shard

if TYPE_CHECKING:
    from higgs_model.codec.codec import HiggsAudioCodec

ROWS_PER_SHARD = 128
_RECORDINGS_IN_MEMORY = 1024
_FULL_SCALE = 32767
_CODES_SUFFIX = ".npy"


@dataclasses.dataclass(frozen=True)
class AudioRequirements:
    """Representations of recordings that a network requires.

    Attributes:
        num_codebooks, codebook_size: of the codes; further codebooks of the codec are dropped.
        in_codes, in_samples: whether input recordings are represented as codes and as samples; output clips are always
            codes.
        audio_in_id, audio_out_id: placeholder tokens of input recordings and output clips.
    """

    num_codebooks: int
    codebook_size: int
    in_codes: bool
    in_samples: bool
    audio_in_id: int
    audio_out_id: int

    @property
    def placeholders(self) -> tuple[int, int]:
        """The placeholder tokens of input recordings and output clips."""
        return self.audio_in_id, self.audio_out_id

    @classmethod
    def from_config(cls, config: HiggsAudioConfig) -> AudioRequirements:
        """Return the requirements of a network."""
        return cls(
            config.audio_num_codebooks,
            config.audio_codebook_size,
            bool(config.encode_audio_in_tokens),
            not config.skip_audio_tower,
            config.audio_in_token_idx,
            config.audio_out_token_idx,
        )


@dataclasses.dataclass(frozen=True)
class _AudioRequest:
    """A recording's name and content, and the required representations."""

    name: str
    content: bytes
    codes: bool
    samples: bool

    @property
    def key(self) -> tuple[str, bool, bool]:
        return hashlib.sha256(self.content).hexdigest(), self.codes, self.samples


class Preparer:
    """Prepares samples and writes shards.

    Args:
        reader: reads manifest rows.
        requirements: the network's audio requirements.
        codec: returns the codec; only called if a recording must be encoded.
        read_bytes: returns the content of a recording by path or URI.
    """

    def __init__(
        self,
        reader: SampleReader,
        requirements: AudioRequirements,
        codec: Callable[[], HiggsAudioCodec],
        read_bytes: Callable[[str], bytes],
    ) -> None:
        self._reader, self._requirements, self._codec, self._read_bytes = reader, requirements, codec, read_bytes
        self._audio_cache: collections.OrderedDict[tuple[str, bool, bool], PreparedAudio] = collections.OrderedDict()

    def write(self, path: Path, rows: Sequence[Row | str], first: int) -> None:
        """Write the shard of rows starting at manifest row `first`, unless it exists and has no row errors."""
        if not needs_preparation(path):
            return
        samples, errors = self.prepare(rows, first)
        write_shard(path, samples, errors, self._requirements.num_codebooks)

    def prepare(self, rows: Sequence[Row | str], first: int = 0) -> tuple[list[PreparedSample], list[str]]:
        """Return the prepared samples of valid rows, and error messages of invalid ones.

        Args:
            rows: manifest rows; a string is the error message of an unreadable row.
            first: index of the first row in the manifest.
        """
        valid: list[tuple[Sample, list[_AudioRequest]]] = []
        errors: list[str] = []
        for number, row in enumerate(rows, first):
            if isinstance(row, str):
                errors.append(f"row {number}: {row}")
                continue
            try:
                sample = self._reader.read(row, number)
                requests = self._audio_requests(sample)
                self._load_audio(requests)
            except BadInput as error:
                message = str(error)
                errors.append(message if message.startswith("row ") else f"row {number} ({row.get('id')}): {message}")
                continue
            valid.append((sample, requests))
        prepared = [
            PreparedSample(
                sample.id,
                sample.speaker,
                sample.prefix,
                sample.turn,
                sample.reference,
                tuple(self._audio_cache[request.key] for request in requests),
            )
            for sample, requests in valid
        ]
        while len(self._audio_cache) > _RECORDINGS_IN_MEMORY:
            self._audio_cache.popitem(last=False)
        return prepared, errors

    def _audio_requests(self, sample: Sample) -> list[_AudioRequest]:
        """Return the sample's recordings with the representations required of each."""
        requirements = self._requirements
        is_in = np.zeros(len(sample.sources), np.bool_)
        is_out = np.zeros(len(sample.sources), np.bool_)
        for span in (sample.prefix, sample.turn, sample.reference):
            if span is not None and span.clips:
                placeholders = [token for token in span.ids.tolist() if token in requirements.placeholders]
                for clip, placeholder in zip(span.clips, placeholders, strict=True):
                    (is_in if placeholder == requirements.audio_in_id else is_out)[clip] = True
        if is_in.any() and not (requirements.in_codes or requirements.in_samples):
            raise BadInput("it has an input recording, but the network takes no audio input")
        return [
            _AudioRequest(
                source if isinstance(source, str) else "the voice",
                self._content(source),
                codes=bool(is_out[index] or (is_in[index] and requirements.in_codes)),
                samples=bool(is_in[index] and requirements.in_samples),
            )
            for index, source in enumerate(sample.sources)
        ]

    def _content(self, source: str | Voice) -> bytes:
        if isinstance(source, Voice):
            return source.audio
        try:
            return self._read_bytes(source)
        except (OSError, ValueError) as error:
            raise BadInput(f"{source!r} cannot be read: {error}") from error

    def _load_audio(self, requests: Iterable[_AudioRequest]) -> None:
        """Compute the required representations of recordings that are not in the cache."""
        for request in requests:
            if request.key in self._audio_cache:
                self._audio_cache.move_to_end(request.key)
            elif request.name.endswith(_CODES_SUFFIX):
                self._audio_cache[request.key] = self._load_codes(request)
            else:
                recording = read_recording(io.BytesIO(request.content), repr(request.name))
                codes = self._encode(recording, request.name) if request.codes else None
                self._audio_cache[request.key] = PreparedAudio(
                    codes, _resample_to_int16(recording) if request.samples else None
                )

    def _load_codes(self, request: _AudioRequest) -> PreparedAudio:
        if request.samples:
            raise BadInput(f"{request.name!r} has codes, but the audio tower requires a recording")
        try:
            codes = np.load(io.BytesIO(request.content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadInput(f"{request.name!r} is not a valid .npy file: {error}") from error
        return PreparedAudio(self._validate_codes(codes, request.name), None)

    def _encode(self, recording: Recording, name: str) -> NDArray[np.int16]:
        codes = self._codec().encode(recording.samples, recording.sample_rate_hz)
        return self._validate_codes(codes.cpu().numpy(), name)

    def _validate_codes(self, codes: NDArray[np.integer], name: str) -> NDArray[np.int16]:
        books, size = self._requirements.num_codebooks, self._requirements.codebook_size
        if codes.ndim != 2 or codes.shape[0] < books or not np.issubdtype(codes.dtype, np.integer) or not codes.size:
            raise BadInput(f"{name!r} has {codes.dtype} of shape {codes.shape}; expected integers ({books}, frames)")
        codes = codes[:books]
        if codes.min() < 0 or codes.max() >= size:
            raise BadInput(f"{name!r} has codes from {codes.min()} to {codes.max()}; expected 0 to {size - 1}")
        return codes.astype(np.int16)


def _resample_to_int16(recording: Recording) -> NDArray[np.int16]:
    """Return the recording as int16 samples at the audio tower's sample rate."""
    samples = resample(recording.samples, recording.sample_rate_hz, SAMPLE_RATE_HZ)
    return np.clip(np.round(samples * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE).astype(np.int16)


def shard_path(folder: Path, first: int) -> Path:
    """Return the path of the shard that starts at manifest row `first`."""
    return folder / f"rows-{first:09d}.safetensors"


def needs_preparation(path: Path) -> bool:
    """Return whether a shard is missing or has row errors, which may have been fixed since."""
    return not path.is_file() or bool(read_header(path)["faults"])


def split_into_shards(rows: Iterable[Row | str], size: int = ROWS_PER_SHARD) -> Iterator[tuple[int, list[Row | str]]]:
    """Yield the rows of each shard, with the index of the first."""
    first, shard = 0, list[Row | str]()
    for row in rows:
        shard.append(row)
        if len(shard) == size:
            yield first, shard
            first, shard = first + len(shard), []
    if shard:
        yield first, shard
