"""The endpoint's voice library: a folder or S3 prefix that all its processes read and write.

A voice is `NAME.flac` (or another format), its transcript `NAME.txt`, and its consent note `NAME.json`. Changes are
visible to other processes within a second; before an unknown name is refused, the library is listed again. Creating
`NAME.json` claims a name atomically; the recording is written last and makes the voice visible. Names never become
paths: files to read or delete come from the listing, and new names consist of letters, digits, `.`, `_` and `-`.
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
_RECORDINGS = (".wav", ".flac", ".mp3")


@dataclasses.dataclass(frozen=True)
class ListedVoice:
    """A voice that scripts may name: a recording, or `profile:NAME`."""

    id: str
    name: str
    description: str | None = None


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """The library as of one listing; files are read on demand."""

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

    def voices(self, wanted: Collection[str] = ()) -> Voices:
        """Return the library, at most a second old, and listed again if one of the names is missing."""
        with self._lock:
            if time.monotonic() - self._listed_s > _MAX_AGE_S or not set(wanted) <= set(self._voices.names()):
                self._list()
            return self._voices

    def listing(self) -> list[ListedVoice]:
        """Return all voices that scripts may name."""
        voices = self.voices()
        return [ListedVoice(name, name) for name in voices.names()] + [
            ListedVoice(f"profile:{name}", name, text) for name, text in sorted(voices.profiles().items())
        ]

    def add(self, name: str, recording: bytes, transcript: str | None, consent: str) -> None:
        """Add a checked FLAC recording.

        Raises:
            BadRequest: the name is invalid.
            Conflict: the name is taken.
        """
        check_name(name)
        with self._lock:
            self._list()
            record = {"consent": consent, "created_at": int(time.time())}
            if self._files(name) or not self._store.create(f"{name}.json", json.dumps(record).encode()):
                raise Conflict(f"the voice {name!r} already exists; delete it first", param="name")
            if transcript:
                self._store.create(f"{name}.txt", transcript.encode())
            self._store.create(f"{name}.flac", recording)
            self._list()

    def remove(self, name: str) -> None:
        """Remove a voice and all its files.

        Raises:
            NotFound: it does not exist.
        """
        with self._lock:
            self._list()
            files = self._files(name)
            if not files:
                raise NotFound(f"no voice {name[:200]!r}")
            for file in files:
                self._store.delete(file)
            self._list()

    def _files(self, name: str) -> list[str]:
        """Return the files of a voice, recordings first."""
        possible = [name + suffix for suffix in (*_RECORDINGS, ".txt", ".json")]
        return sorted(
            (file for file in self._snapshot.versions if _lower_suffix(file) in possible),
            key=lambda file: possible.index(_lower_suffix(file)),
        )

    def _list(self) -> None:
        versions = self._store.versions()
        self._listed_s = time.monotonic()
        if versions != self._snapshot.versions:
            # Cached recordings belong to the listing under which they were read.
            self._snapshot = _Snapshot(self._store, versions)
            self._voices = Voices(self._snapshot)


def check_name(name: str) -> None:
    """Raise `BadRequest` unless a new voice may have this name."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            "a voice's name has 1 to 64 letters, digits, '_', '-' and '.', no '..', and starts with a letter or digit",
            param="name",
        )


def _lower_suffix(file: str) -> str:
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"
