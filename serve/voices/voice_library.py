"""The voices of an endpoint: a folder or a prefix of a bucket that all its processes see, read and written.

A voice is `NAME.flac` (or what somebody laid there), `NAME.txt` with its words, and `NAME.json` with who agreed to its
use. What one process adds or removes the others see within a second; a name that is not known is looked for again
before it is refused. A name is taken by the creation of its `NAME.json`, which only one of two can succeed in, and
becomes visible with its recording, which comes last. Names never become paths: what is read or removed comes from the
listing, and what is added has a name of letters, digits, `.`, `_` and `-`.
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
from serve.voices.voice_store import LibraryStore

logger = logging.getLogger(__name__)

_FRESH_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,63}")
_RECORDINGS = (".wav", ".flac", ".mp3")


@dataclasses.dataclass(frozen=True)
class ListedVoice:
    """What a script may name: a recording, or `profile:NAME`."""

    id: str
    name: str
    description: str | None = None


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """The library as it was listed; files are read when they are asked for."""

    store: LibraryStore
    versions: dict[str, str]

    def names(self) -> list[str]:
        return list(self.versions)

    def read(self, name: str) -> bytes:
        return self.store.read(name)


class VoiceLibrary:
    """One process's view of the library. Safe between threads; all methods block."""

    def __init__(self, store: LibraryStore) -> None:
        self._store, self._lock = store, threading.Lock()
        self._snapshot = _Snapshot(store, {})
        self._voices = Voices(self._snapshot)
        self._listed_s = float("-inf")

    def voices(self, wanted: Collection[str] = ()) -> Voices:
        """The library, not older than a second; listed anew if one of the names is not in it."""
        with self._lock:
            if time.monotonic() - self._listed_s > _FRESH_S or not set(wanted) <= set(self._voices.names()):
                self._list()
            return self._voices

    def listing(self) -> list[ListedVoice]:
        """All that scripts may name."""
        voices = self.voices()
        return [ListedVoice(name, name) for name in voices.names()] + [
            ListedVoice(f"profile:{name}", name, text) for name, text in sorted(voices.profiles().items())
        ]

    def add(self, name: str, recording: bytes, transcript: str | None, consent: str) -> None:
        """Add a checked FLAC recording.

        Raises:
            BadRequest: a name that cannot be. Conflict: it is taken.
        """
        check_name(name)
        with self._lock:
            self._list()
            record = {"consent": consent, "created_at": int(time.time())}
            if self._files(name) or not self._store.create(f"{name}.json", json.dumps(record).encode()):
                raise Conflict(f"there is a voice {name!r} already; delete it first", param="name")
            if transcript:
                self._store.create(f"{name}.txt", transcript.encode())
            self._store.create(f"{name}.flac", recording)
            self._list()

    def remove(self, name: str) -> None:
        """Remove a recorded voice and what belongs to it.

        Raises:
            NotFound: there is none.
        """
        with self._lock:
            self._list()
            files = self._files(name)
            if not files:
                raise NotFound(f"there is no voice {name[:200]!r}")
            for file in files:
                self._store.delete(file)
            self._list()

    def _files(self, name: str) -> list[str]:
        """The files of a voice, its recordings first."""
        wanted = [name + suffix for suffix in (*_RECORDINGS, ".txt", ".json")]
        return sorted(
            (file for file in self._snapshot.versions if _lower_suffix(file) in wanted),
            key=lambda file: wanted.index(_lower_suffix(file)),
        )

    def _list(self) -> None:
        versions = self._store.versions()
        self._listed_s = time.monotonic()
        if versions != self._snapshot.versions:
            # What is known of recordings goes with the listing that it was read under.
            self._snapshot = _Snapshot(self._store, versions)
            self._voices = Voices(self._snapshot)


def check_name(name: str) -> None:
    """Raise `BadRequest` if no voice may be called that."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            "a voice's name has 1 to 64 letters, digits, '_', '-' and '.', no '..', and begins with a letter or digit",
            param="name",
        )


def _lower_suffix(file: str) -> str:
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"
