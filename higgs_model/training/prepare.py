"""From rows to shards of prepared samples: recordings become codes and 16 kHz samples, once, before training begins.

Each shard is of a stretch of the manifest, whoever makes it, so that many processes can share the work and a killed
one is gone on with. A row that is no sample is a fault of its shard, in a sentence.
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
from higgs_model.training.store import SAMPLE_RATE_HZ, Heard, PreparedSample, read_header, write_shard

if TYPE_CHECKING:
    from higgs_model.codec.codec import HiggsAudioCodec

ROWS_A_SHARD = 128
_RECORDINGS_IN_MEMORY = 1024
_FULL_SCALE = 32767
_CODES_SUFFIX = ".npy"


@dataclasses.dataclass(frozen=True)
class Needs:
    """The forms in which one network takes recordings.

    Attributes:
        num_codebooks, codebook_size: of codes; a codec's further codebooks are left away.
        in_codes, in_samples: how what it hears goes in. What it says itself is codes in any case.
        audio_in_id, audio_out_id: the placeholders of what it hears and of what it says.
    """

    num_codebooks: int
    codebook_size: int
    in_codes: bool
    in_samples: bool
    audio_in_id: int
    audio_out_id: int

    @property
    def placeholders(self) -> tuple[int, int]:
        """The tokens that stand for a recording each."""
        return self.audio_in_id, self.audio_out_id

    @classmethod
    def of(cls, config: HiggsAudioConfig) -> Needs:
        """Those of a network."""
        return cls(
            config.audio_num_codebooks,
            config.audio_codebook_size,
            bool(config.encode_audio_in_tokens),
            not config.skip_audio_tower,
            config.audio_in_token_idx,
            config.audio_out_token_idx,
        )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """One recording: what it is called, its content, and the forms that are wanted of it."""

    name: str
    content: bytes
    codes: bool
    samples: bool

    @property
    def key(self) -> tuple[str, bool, bool]:
        return hashlib.sha256(self.content).hexdigest(), self.codes, self.samples


class Preparer:
    """Makes shards.

    Args:
        codec: gives the codec when a recording is to be encoded, which codes by path never are.
        read_bytes: the content of a recording by its path or URI.
    """

    def __init__(
        self,
        reader: SampleReader,
        needs: Needs,
        codec: Callable[[], HiggsAudioCodec],
        read_bytes: Callable[[str], bytes],
    ) -> None:
        self._reader, self._needs, self._codec, self._read_bytes = reader, needs, codec, read_bytes
        self._heard: collections.OrderedDict[tuple[str, bool, bool], Heard] = collections.OrderedDict()

    def write(self, path: Path, rows: Sequence[Row | str], first: int) -> None:
        """Write the shard of the rows that begin with row `first` of the manifest, unless it is there, faultless."""
        if not needs_work(path):
            return
        samples, faults = self.prepare(rows, first)
        write_shard(path, samples, faults, self._needs.num_codebooks)

    def prepare(self, rows: Sequence[Row | str], first: int = 0) -> tuple[list[PreparedSample], list[str]]:
        """The samples of the rows, and what is wrong with those that are none; a row may be its own fault."""
        read: list[tuple[Sample, list[_Wanted]]] = []
        faults: list[str] = []
        for number, row in enumerate(rows, first):
            if isinstance(row, str):
                faults.append(f"row {number}: {row}")
                continue
            try:
                sample = self._reader.read(row, number)
                wanted = self._wanted(sample)
                self._hear(wanted)
            except BadInput as error:
                told = str(error)
                faults.append(told if told.startswith("row ") else f"row {number} ({row.get('id')}): {told}")
                continue
            read.append((sample, wanted))
        prepared = [
            PreparedSample(
                sample.id,
                sample.speaker,
                sample.head,
                sample.turn,
                sample.reference,
                tuple(self._heard[one.key] for one in wanted),
            )
            for sample, wanted in read
        ]
        while len(self._heard) > _RECORDINGS_IN_MEMORY:
            self._heard.popitem(last=False)
        return prepared, faults

    def _wanted(self, sample: Sample) -> list[_Wanted]:
        """The sample's recordings, with the forms in which each is wanted."""
        needs = self._needs
        is_in = np.zeros(len(sample.sources), np.bool_)
        is_out = np.zeros(len(sample.sources), np.bool_)
        for stretch in (sample.head, sample.turn, sample.reference):
            if stretch is not None and stretch.clips:
                kinds = [token for token in stretch.ids.tolist() if token in needs.placeholders]
                for clip, kind in zip(stretch.clips, kinds, strict=True):
                    (is_in if kind == needs.audio_in_id else is_out)[clip] = True
        if is_in.any() and not (needs.in_codes or needs.in_samples):
            raise BadInput("it has a recording for the network to hear, but this network only speaks")
        return [
            _Wanted(
                source if isinstance(source, str) else "the voice",
                self._content(source),
                codes=bool(is_out[at] or (is_in[at] and needs.in_codes)),
                samples=bool(is_in[at] and needs.in_samples),
            )
            for at, source in enumerate(sample.sources)
        ]

    def _content(self, source: str | Voice) -> bytes:
        if isinstance(source, Voice):
            return source.audio
        try:
            return self._read_bytes(source)
        except (OSError, ValueError) as error:
            raise BadInput(f"{source!r} cannot be read: {error}") from error

    def _hear(self, wanted: Iterable[_Wanted]) -> None:
        """Make the forms of recordings that are not known yet."""
        for one in wanted:
            if one.key in self._heard:
                self._heard.move_to_end(one.key)
            elif one.name.endswith(_CODES_SUFFIX):
                self._heard[one.key] = self._codes_alone(one)
            else:
                recording = read_recording(io.BytesIO(one.content), repr(one.name))
                codes = self._encoded(recording, one.name) if one.codes else None
                self._heard[one.key] = Heard(codes, _low(recording) if one.samples else None)

    def _codes_alone(self, wanted: _Wanted) -> Heard:
        if wanted.samples:
            raise BadInput(f"{wanted.name!r} holds codes, but the audio tower hears recordings")
        try:
            codes = np.load(io.BytesIO(wanted.content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadInput(f"{wanted.name!r} is no .npy file: {error}") from error
        return Heard(self._checked(codes, wanted.name), None)

    def _encoded(self, recording: Recording, name: str) -> NDArray[np.int16]:
        codes = self._codec().encode(recording.samples, recording.sample_rate_hz)
        return self._checked(codes.cpu().numpy(), name)

    def _checked(self, codes: NDArray[np.integer], name: str) -> NDArray[np.int16]:
        books, size = self._needs.num_codebooks, self._needs.codebook_size
        if codes.ndim != 2 or codes.shape[0] < books or not np.issubdtype(codes.dtype, np.integer) or not codes.size:
            raise BadInput(
                f"{name!r} gives {codes.dtype} of the shape {codes.shape}; wanted integers ({books}, frames)"
            )
        codes = codes[:books]
        if codes.min() < 0 or codes.max() >= size:
            raise BadInput(f"{name!r} has codes from {codes.min()} to {codes.max()}; wanted 0 to {size - 1}")
        return codes.astype(np.int16)


def _low(recording: Recording) -> NDArray[np.int16]:
    """The samples that the audio tower's mels are made of."""
    samples = resample(recording.samples, recording.sample_rate_hz, SAMPLE_RATE_HZ)
    return np.clip(np.round(samples * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE).astype(np.int16)


def shard_path(folder: Path, first: int) -> Path:
    """Where the shard is whose first row is row `first` of the manifest."""
    return folder / f"rows-{first:09d}.safetensors"


def needs_work(path: Path) -> bool:
    """Whether a shard is to be made: it is not there, or some of its rows were faulty, which may have been mended."""
    return not path.is_file() or bool(read_header(path)["faults"])


def stretches(rows: Iterable[Row | str], size: int = ROWS_A_SHARD) -> Iterator[tuple[int, list[Row | str]]]:
    """Rows in stretches of a shard each, with the number of the first."""
    first, held = 0, list[Row | str]()
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield first, held
            first, held = first + len(held), []
    if held:
        yield first, held
