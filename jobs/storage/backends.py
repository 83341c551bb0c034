"""Where a job writes: a local folder or a prefix of a bucket, with the same promises.

A file is whole or absent: locally it gets its name when it is finished and on the disk, in a bucket an object appears
when its last part has arrived. Reading, listing and deleting are what a resumed job needs. Calls to a bucket are
tried again with growing pauses when the server stumbles; what still fails is an `OSError` that names the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from higgs_model.errors import BadInput

_ATTEMPTS = 10
_LONGEST_PAUSE_S = 5.0
_CONNECTIONS = 64
_making_clients = threading.Lock()


class Folder(Protocol):
    """A place for files, each by its path relative to it, with `/` between folders."""

    uri: str
    writers: int
    """Files that are best written at the same time."""

    def locate(self, name: str) -> str:
        """The path or URI of a file."""

    def draft(self, name: str) -> Path:
        """A local path at which a file can be written that is then published under this name."""

    def publish(self, path: Path, name: str) -> None:
        """Make a finished draft the file of that name."""

    def put(self, name: str, content: bytes) -> None:
        """Write a small file."""

    def get(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none."""

    def names(self, under: str) -> list[str]:
        """Names of all files under a folder of it, sorted; none if it is not there."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    def sweep(self, under: str) -> None:
        """Remove what killed writers have left unfinished; only while nobody writes there."""


def open_folder(uri: str) -> Folder:
    """The folder under a path, a `file://` or an `s3://` URI.

    Raises:
        BadInput: it is neither.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise BadInput(f"{uri!r} names no bucket; wanted s3://BUCKET/PREFIX")
        return BucketFolder(bucket, prefix.strip("/"))
    if "://" in uri and not uri.startswith("file://"):
        raise BadInput(f"results cannot be written to {uri!r}; give a folder or s3://BUCKET/PREFIX")
    return LocalFolder(Path(uri.removeprefix("file://")).expanduser().absolute())


class LocalFolder:
    """A folder on a disk that all workers see."""

    # Short files cost little but the interpreter, which one thread has at a time.
    writers = 2

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def locate(self, name: str) -> str:
        return str(self.root / name)

    def draft(self, name: str) -> Path:
        path = self.root / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, path: Path, name: str) -> None:
        """Nothing is left to do: drafts are written beside their place and renamed."""

    def put(self, name: str, content: bytes) -> None:
        path = self.draft(name)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        os.replace(file.name, path)

    def get(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def names(self, under: str) -> list[str]:
        found = (path for path in (self.root / under).rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def delete(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def sweep(self, under: str) -> None:
        for path in (self.root / under).rglob(".*.part"):
            path.unlink(missing_ok=True)


class BucketFolder:
    """A prefix of an S3 bucket; endpoint, region and credentials come from the usual AWS variables."""

    writers = 32

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Clients cannot travel to other processes; each makes its own.
        return type(self), (self.bucket, self.prefix)

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        retries = {"max_attempts": _ATTEMPTS, "mode": "standard"}
        config = Config(retries=retries, max_pool_connections=_CONNECTIONS)
        # A client may be used by several threads, but not be made by several.
        with _making_clients:
            return boto3.session.Session().client("s3", config=config)

    @functools.cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="higgs-")

    def locate(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def draft(self, name: str) -> Path:
        path = Path(self._scratch.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, path: Path, name: str) -> None:
        """Upload, in parts if it is large; S3 shows the object when all parts have arrived."""
        with self._told(name):
            self._client.upload_file(str(path), self.bucket, self._key(name))
        path.unlink(missing_ok=True)

    def put(self, name: str, content: bytes) -> None:
        with self._told(name):
            self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=content)

    def get(self, name: str) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(_ATTEMPTS):
            try:
                with self._told(name):
                    content: bytes = self._client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
                    return content
            except OSError as error:
                # The library tries calls again, but not the reading of an answer that breaks off.
                if not isinstance(error.__cause__, HTTPClientError | IncompleteReadError):
                    raise
                time.sleep(min(0.1 * 2**attempt, _LONGEST_PAUSE_S))
        raise OSError(f"{self.locate(name)}: the answer broke off {_ATTEMPTS} times")

    def names(self, under: str) -> list[str]:
        return list(self._listed(under))

    def delete(self, name: str) -> None:
        with self._told(name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def sweep(self, under: str) -> None:
        """Nothing unfinished is ever seen here."""

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _listed(self, under: str) -> Iterator[str]:
        skipped = len(self._key(""))
        with self._told(under):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(f"{under.rstrip('/')}/")
            )
            for page in pages:
                yield from (entry["Key"][skipped:] for entry in page.get("Contents", ()))

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Errors of the cloud's library as errors of files."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            missing = error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey")
            kind = FileNotFoundError if missing else OSError
            raise kind(f"{self.locate(name)}: {error}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise OSError(f"{self.locate(name)}: {error}") from error
