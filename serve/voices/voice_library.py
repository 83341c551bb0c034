"""The endpoint's voice library: a folder or S3 prefix that all its processes read and write.

A voice is `NAME.flac` (or another format), its transcript `NAME.txt`, and its consent note `NAME.json`. Changes become
visible to other processes within a second, and the library is listed again before an unknown name is rejected. Creating
`NAME.json` claims a name atomically; the recording is written last and makes the voice visible. Names of requests never
become paths: files to read or delete come from the listing, and new names consist of letters, digits, `.`, `_`, `-`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Collection

from higgs_model.script.voices import Voices
from serve.http.errors import BadRequest, Conflict, NotFound
from serve.voices.voice_store import VoiceStore

logger = logging.getLogger(__name__)

_MAX_AGE_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,63}")
_RECORDING_SUFFIXES = (".wav", ".flac", ".mp3")


@dataclasses.dataclass(frozen=True)
class ListedVoice:
    """A voice that scripts may name: a recording, a profile (`profile:NAME`), or an alias."""

    id: str
    name: str
    description: str | None = None


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """The library at the time of one listing; files are read on demand."""

    store: VoiceStore
    versions: dict[str, str]

    def names(self) -> list[str]:
        return list(self.versions)

    def read(self, name: str) -> bytes:
        return self.store.read(name)


class VoiceLibrary:
    """One process's view of the library. Thread-safe; all methods block."""

    def __init__(self, store: VoiceStore) -> None:
        self._store, self._lock = store, threading.Lock()
        self._snapshot = _Snapshot(store, {})
        self._voices = Voices(self._snapshot)
        self._listed_s = float("-inf")

    def voices(self, required: Collection[str] = ()) -> Voices:
        """Return the voices, at most a second old.

        Args:
            required: names; if one of them is missing, the library is listed again.
        """
        with self._lock:
            if time.monotonic() - self._listed_s > _MAX_AGE_S or not set(required) <= set(self._voices.names()):
                self._refresh()
            return self._voices

    def list_voices(self) -> list[ListedVoice]:
        """Return all voices that scripts may name."""
        voices = self.voices()
        return [ListedVoice(name, name) for name in voices.names()] + [
            ListedVoice(f"profile:{name}", name, text) for name, text in sorted(voices.profiles().items())
        ]

    def add(self, name: str, recording: bytes, transcript: str | None, consent: str) -> None:
        """Add a voice.

        Args:
            recording: the content of a FLAC file, already validated.

        Raises:
            BadRequest: the name is invalid.
            Conflict: the name is taken.
        """
        check_name(name)
        with self._lock:
            self._refresh()
            consent_note = {"consent": consent, "created_at": int(time.time())}
            if self._files(name) or not self._store.create(f"{name}.json", json.dumps(consent_note).encode()):
                raise Conflict(f"the voice {name!r} already exists; delete it first", param="name")
            if transcript:
                self._store.create(f"{name}.txt", transcript.encode())
            self._store.create(f"{name}.flac", recording)
            self._refresh()

    def remove(self, name: str) -> None:
        """Remove a voice and all its files.

        Raises:
            NotFound: there is no voice of this name.
        """
        with self._lock:
            self._refresh()
            files = self._files(name)
            if not files:
                raise NotFound(f"no voice {name[:200]!r}")
            for file in files:
                self._store.delete(file)
            self._refresh()

    def _files(self, name: str) -> list[str]:
        """Return the files of a voice, recordings first."""
        candidates = [name + suffix for suffix in (*_RECORDING_SUFFIXES, ".txt", ".json")]
        return sorted(
            (file for file in self._snapshot.versions if _lower_suffix(file) in candidates),
            key=lambda file: candidates.index(_lower_suffix(file)),
        )

    def _refresh(self) -> None:
        versions = self._store.list_versions()
        self._listed_s = time.monotonic()
        if versions != self._snapshot.versions:
            # `Voices` caches recordings, which are valid only for the listing under which they were read.
            self._snapshot = _Snapshot(self._store, versions)
            self._voices = Voices(self._snapshot)


def check_name(name: str) -> None:
    """Raise `BadRequest` if a new voice must not have this name."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            "name: a voice name must have 1 to 64 letters, digits, '_', '-' or '.', must not contain '..', and must "
            "start with a letter or digit",
            param="name",
        )


def _lower_suffix(file: str) -> str:
    """Return a file name with its suffix in lower case."""
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"
