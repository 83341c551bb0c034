"""Voices: recordings with transcripts, and descriptions, from a library or a single row; their codes.

A library is a folder, or anything else that lists names and reads bytes (`VoiceReader`), with `NAME.wav|flac|mp3`, its
transcript `NAME.txt`, and `profile.yaml` (`profiles: {NAME: description}`). A recording is identified by its content:
codes are computed once per content and codec.

Does not depend on scripts or prompts, and never imports the codec, which `ReferenceCodes` takes as an argument.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import hashlib
import io
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from higgs_model.errors import BadInput
from higgs_model.script.voice_checks import check_recording

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from higgs_model.script.prompt import Codes

_log = logging.getLogger(__name__)

_SUFFIXES = (".wav", ".flac", ".mp3")
_PROFILES = "profile.yaml"

RECOMMENDED_DURATION = "5 to 20 s"
_MIN_DURATION_S, _MAX_DURATION_S = 0.2, 300.0
_VOICES_IN_MEMORY = 256


class Codec(Protocol):
    """The encoder interface of a codec."""

    @property
    def sample_rate(self) -> int:
        """Sample rate of the codec in Hz."""

    def encode(self, waveform: NDArray[np.float32], sample_rate: int) -> Codes:
        """Encode samples (N,) to codes (K, T)."""


class VoiceReader(Protocol):
    """Storage of a voice library."""

    def names(self) -> Iterable[str]:
        """Return the names of the library's files."""

    def read(self, name: str) -> bytes:
        """Return the content of a file."""


@dataclasses.dataclass(frozen=True)
class LocalVoiceReader:
    """A library in a local folder."""

    folder: Path

    def names(self) -> list[str]:
        """Return the names of the folder's files."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.folder / name).read_bytes()


@dataclasses.dataclass(frozen=True)
class Voice:
    """A reference recording: its audio file as bytes, and its transcript, if any."""

    audio: bytes
    transcript: str | None = None

    @functools.cached_property
    def audio_sha256(self) -> str:
        """SHA-256 of the audio file, without its transcript."""
        return hashlib.sha256(self.audio).hexdigest()

    def read(self) -> tuple[NDArray[np.float32], int]:
        """Return the samples (N,) and their sample rate.

        Raises:
            BadInput: the file is not audio, or too short or too long for a reference.
        """
        samples, sample_rate, _ = _read_audio(self.audio)
        return samples, sample_rate

    @property
    def duration_s(self) -> float:
        """Duration of the recording in seconds."""
        return self._inspection[0]

    def warnings(self) -> tuple[str, ...]:
        """Return advice on how to get a better clone; empty for a recording without problems."""
        return self._inspection[1]

    @functools.cached_property
    def _inspection(self) -> tuple[float, tuple[str, ...]]:
        samples, sample_rate, channels = _read_audio(self.audio)
        warnings = check_recording(samples, sample_rate, self.transcript)
        if channels > 1:
            warnings = [
                *warnings,
                f"it has {channels} channels, which were mixed; use a mono recording of one speaker",
            ]
        return len(samples) / sample_rate, tuple(warnings)


class Voices:
    """The voices that a script may name.

    Args:
        store: the library, if any.
        read_bytes: reads a row's own reference recording by path or URI; may raise `BadInput` or `OSError`.
    """

    def __init__(self, store: VoiceReader | None = None, read_bytes: Callable[[str], bytes] | None = None) -> None:
        self._store = store
        self._read_bytes = read_bytes or _read_local
        # A cached voice is not read and checked again. The cache is bounded, because libraries can exceed memory.
        self._recording = functools.lru_cache(maxsize=_VOICES_IN_MEMORY)(self._load)
        self._cached_reference = functools.lru_cache(maxsize=_VOICES_IN_MEMORY)(self._decode_reference)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Voices:
        """Open a library in a local folder.

        Raises:
            BadInput: it is not a folder.
        """
        path = Path(folder)
        if not path.is_dir():
            raise BadInput(f"the voice library {str(folder)!r} is not a folder")
        return cls(LocalVoiceReader(path))

    def names(self) -> list[str]:
        """Return the names of all recordings."""
        return sorted(self._files)

    def profiles(self) -> dict[str, str]:
        """Return all profiles."""
        return dict(self._profiles)

    def recording(self, name: str) -> Voice:
        """Return a recording of the library.

        Raises:
            BadInput: it does not exist or cannot be read.
        """
        return self._recording(name)

    def load_reference(self, source: str, transcript: str | None) -> Voice:
        """Return a row's own reference recording.

        Raises:
            BadInput: it cannot be read.
        """
        return self._cached_reference(source, (transcript or "").strip() or None)

    def profile(self, name: str) -> str:
        """Return the description of a profile.

        Raises:
            BadInput: it does not exist.
        """
        if name not in self._profiles:
            raise BadInput(
                _unknown_name_message(
                    "profile", name, self._profiles, f"profiles are defined in the library's {_PROFILES}"
                )
            )
        return self._profiles[name]

    def _load(self, name: str) -> Voice:
        if name not in self._files:
            raise BadInput(_unknown_name_message("voice", name, self._files, "descriptions contain spaces"))
        audio = self._read(self._files[name])
        text = self._read_text(f"{name}.txt").strip() if f"{name}.txt" in self._all_files else ""
        return Voice(audio, text or None)

    def _decode_reference(self, source: str, transcript: str | None) -> Voice:
        try:
            return Voice(self._read_bytes(source), transcript)
        except (OSError, ValueError) as error:
            raise BadInput(f"ref_audio {source!r} cannot be read: {error}") from error

    @functools.cached_property
    def _all_files(self) -> frozenset[str]:
        if self._store is None:
            return frozenset()
        try:
            return frozenset(self._store.names())
        except OSError as error:
            raise BadInput(f"the voice library cannot be listed: {error}") from error

    @functools.cached_property
    def _files(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for suffix in reversed(_SUFFIXES):
            found |= {name[: -len(suffix)]: name for name in self._all_files if name.lower().endswith(suffix)}
        return found

    @functools.cached_property
    def _profiles(self) -> dict[str, str]:
        if _PROFILES not in self._all_files:
            return {}
        import yaml

        try:
            loaded = yaml.safe_load(self._read_text(_PROFILES))
        except yaml.YAMLError as error:
            raise BadInput(f"the library's {_PROFILES} is not YAML: {error}") from error
        profiles = loaded.get("profiles") if isinstance(loaded, dict) else None
        if not isinstance(profiles, dict) or not all(isinstance(text, str) for text in profiles.values()):
            raise BadInput(f"the library's {_PROFILES} must contain `profiles:` with a description per name")
        return {str(name): text for name, text in profiles.items()}

    def _read(self, name: str) -> bytes:
        if self._store is None:
            raise BadInput(f"{name!r} cannot be read, because there is no voice library")
        try:
            return self._store.read(name)
        except OSError as error:
            raise BadInput(f"{name!r} of the voice library cannot be read: {error}") from error

    def _read_text(self, name: str) -> str:
        try:
            return self._read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(f"{name!r} of the voice library is not UTF-8 text: {error}") from error


class ReferenceCodes:
    """Encodes reference recordings, with a cache that all scripts of a worker share. Thread-safe.

    Args:
        codec: encodes recordings.
        codec_id: identifies the codec's weights; part of the cache key.
        folder: persistent cache; None: codes are cached in memory only.
        max_in_memory: maximum number of recordings in memory.
    """

    def __init__(
        self,
        codec: Codec,
        codec_id: str = "",
        folder: str | os.PathLike[str] | None = None,
        max_in_memory: int = 1024,
    ) -> None:
        self._codec = codec
        self._codec_id = codec_id
        self._folder = None if folder is None else Path(folder)
        self._max_in_memory = max_in_memory
        self._memory: collections.OrderedDict[str, Codes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, voice: Voice) -> Codes:
        """Return the codes (K, T) of a recording, read-only."""
        key = hashlib.sha256(f"{self._codec_id}\0{self._codec.sample_rate}\0{voice.audio_sha256}".encode()).hexdigest()
        with self._lock:
            codes = self._memory.get(key)
            if codes is None:
                codes = self._load(key)
            if codes is None:
                codes = self._encode(voice)
                self._store(key, codes)
            codes.setflags(write=False)
            self._memory[key] = codes
            self._memory.move_to_end(key)
            if len(self._memory) > self._max_in_memory:
                self._memory.popitem(last=False)
        return codes

    def _encode(self, voice: Voice) -> Codes:
        import numpy as np

        samples, sample_rate = voice.read()
        codes = np.array(self._codec.encode(samples, sample_rate), dtype=np.int64)
        if codes.ndim != 2 or codes.shape[1] == 0:
            raise BadInput(f"the reference recording is too short: its codes have the shape {codes.shape}")
        return codes

    def _load(self, key: str) -> Codes | None:
        import numpy as np

        if self._folder is None:
            return None
        try:
            # The NPZ format has checksums.
            with (
                (self._folder / f"{key}.npz").open("rb") as file,
                np.load(file, allow_pickle=False) as archive,
            ):
                codes: Codes = archive["codes"].astype(np.int64)
        except Exception:  # noqa: BLE001  (a missing or corrupt cache entry is recomputed)
            return None
        return codes if codes.ndim == 2 and codes.shape[1] > 0 else None

    def _store(self, key: str, codes: Codes) -> None:
        """Write codes to the cache atomically; failures are only logged."""
        import numpy as np

        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
                path = Path(temporary) / f"{key}.npz"
                np.savez(path, codes=codes.astype(np.int32))
                path.replace(self._folder / path.name)
        except OSError as error:
            _log.warning("codes of a voice cannot be cached in %s: %s", self._folder, error)


def _read_audio(source: bytes) -> tuple[NDArray[np.float32], int, int]:
    """Return mono samples (N,), their sample rate, and the number of channels in the file."""
    from higgs_model.audio.files import read_header, read_recording

    # The header is checked first, so that hours of audio are refused without decoding.
    header = read_header(io.BytesIO(source), "the reference recording")
    if not _MIN_DURATION_S <= header.duration_s <= _MAX_DURATION_S:
        raise BadInput(
            f"a reference recording of {header.duration_s:.2f} s cannot be used; expected {RECOMMENDED_DURATION}"
        )
    recording = read_recording(io.BytesIO(source), "the reference recording")
    return recording.samples, recording.sample_rate_hz, header.num_channels


def _read_local(source: str) -> bytes:
    return Path(source.removeprefix("file://")).read_bytes()


def _unknown_name_message(kind: str, name: str, known: Iterable[str], hint: str) -> str:
    matches = difflib.get_close_matches(name[:200], list(known), n=3)
    suggestion = f"; did you mean {' or '.join(matches)}?" if matches else ""
    return f"the voice library has no {kind} {name[:200]!r}{suggestion} ({hint})"
