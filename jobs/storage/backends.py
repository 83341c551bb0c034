"""Storage backends for a job's files: a local folder or an S3 prefix, with the same guarantees.

A file is complete or absent: a local file is synced to disk and then renamed into place, and an S3 object appears when
its last part has arrived. S3 calls are retried with exponential backoff; a call that still fails raises an `OSError`
that names the file.
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

_MAX_ATTEMPTS = 10
_MAX_BACKOFF_S = 5.0
_MAX_CONNECTIONS = 64
_client_lock = threading.Lock()


class StorageBackend(Protocol):
    """Files under a root folder or prefix; their names are paths relative to it, separated by `/`."""

    uri: str
    num_writers: int
    """Recommended number of concurrent writers."""

    def locate(self, name: str) -> str:
        """Return the path or URI of a file."""

    def staging_path(self, name: str) -> Path:
        """Return the local path to write a file to before `publish`."""

    def publish(self, path: Path, name: str) -> None:
        """Make a complete local file available under a name."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""

    def read(self, name: str) -> bytes:
        """Return the content of a file; raise FileNotFoundError if it does not exist."""

    def list_files(self, under: str) -> list[str]:
        """Return the sorted names of all files under a folder; none if it does not exist."""

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""

    def remove_partial(self, under: str) -> None:
        """Delete the partial files of killed writers under a folder. No one may be writing there."""


def open_storage(uri: str) -> StorageBackend:
    """Return the storage for a path, a `file://` or an `s3://` URI.

    Raises:
        BadInput: the URI has another scheme, or no bucket.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise BadInput(f"{uri!r} has no bucket; expected s3://BUCKET/PREFIX")
        return S3Storage(bucket, prefix.strip("/"))
    if "://" in uri and not uri.startswith("file://"):
        raise BadInput(f"unsupported URI {uri!r}; expected a folder or s3://BUCKET/PREFIX")
    return LocalStorage(Path(uri.removeprefix("file://")).expanduser().absolute())


class LocalStorage:
    """A local folder, or one on a file system shared by all workers."""

    # Short files mostly take interpreter time, which threads cannot parallelize (GIL).
    num_writers = 2

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def locate(self, name: str) -> str:
        return str(self.root / name)

    def staging_path(self, name: str) -> Path:
        path = self.root / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, path: Path, name: str) -> None:
        """Do nothing: the staging path of a local file is its final path."""

    def write(self, name: str, content: bytes) -> None:
        path = self.staging_path(name)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        os.replace(file.name, path)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def list_files(self, under: str) -> list[str]:
        found = (path for path in (self.root / under).rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def delete(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def remove_partial(self, under: str) -> None:
        for path in (self.root / under).rglob(".*.part"):
            path.unlink(missing_ok=True)


class S3Storage:
    """An S3 prefix; endpoint, region and credentials come from the usual AWS environment variables."""

    num_writers = 32

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Clients cannot be pickled, so each process creates its own.
        return type(self), (self.bucket, self.prefix)

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        retries = {"max_attempts": _MAX_ATTEMPTS, "mode": "standard"}
        config = Config(retries=retries, max_pool_connections=_MAX_CONNECTIONS)
        # Clients are thread-safe, their creation is not.
        with _client_lock:
            return boto3.session.Session().client("s3", config=config)

    @functools.cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="higgs-")

    def locate(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def staging_path(self, name: str) -> Path:
        path = Path(self._scratch.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, path: Path, name: str) -> None:
        """Upload the file, in parts if it is large; the object appears when all parts have arrived."""
        with self._translate_errors(name):
            self._client.upload_file(str(path), self.bucket, self._key(name))
        path.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        with self._translate_errors(name):
            self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=content)

    def read(self, name: str) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(_MAX_ATTEMPTS):
            try:
                with self._translate_errors(name):
                    content: bytes = self._client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
                    return content
            except OSError as error:
                # boto3 retries calls, but not reading a response that breaks off.
                if not isinstance(error.__cause__, HTTPClientError | IncompleteReadError):
                    raise
                time.sleep(min(0.1 * 2**attempt, _MAX_BACKOFF_S))
        raise OSError(f"{self.locate(name)}: the response broke off {_MAX_ATTEMPTS} times")

    def list_files(self, under: str) -> list[str]:
        return list(self._iter_names(under))

    def delete(self, name: str) -> None:
        with self._translate_errors(name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def remove_partial(self, under: str) -> None:
        """Do nothing: S3 never shows partial objects."""

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _iter_names(self, under: str) -> Iterator[str]:
        prefix_chars = len(self._key(""))
        with self._translate_errors(under):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(f"{under.rstrip('/')}/")
            )
            for page in pages:
                yield from (entry["Key"][prefix_chars:] for entry in page.get("Contents", ()))

    @contextlib.contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        """Translate boto3's errors to `OSError`."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            missing = error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey")
            error_class = FileNotFoundError if missing else OSError
            raise error_class(f"{self.locate(name)}: {error}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise OSError(f"{self.locate(name)}: {error}") from error
