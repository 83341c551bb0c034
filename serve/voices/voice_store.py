"""Storage of a voice library: a folder that all nodes share, or an S3 prefix.

Both list files with a version that changes with the content, and create a file atomically, only if it does not exist.
Failures are `OSError`s without paths in their messages; the log has the details.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from higgs_model.errors import BadConfig

logger = logging.getLogger(__name__)


class VoiceStore(Protocol):
    """A flat collection of files."""

    def list_versions(self) -> dict[str, str]:
        """Return the name of every file with its version."""

    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    def create(self, name: str, content: bytes) -> bool:
        """Create a file; return False, without effect, if it already exists."""

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""


def open_voice_store(uri: str) -> VoiceStore:
    """Return the store for a path, a `file://` or an `s3://` URI.

    Raises:
        BadConfig: the folder does not exist, or the URI is invalid.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise BadConfig(f"voices: no bucket in {uri!r}; expected s3://BUCKET/PREFIX")
        return S3VoiceStore(bucket, prefix.strip("/"))
    folder = Path(uri.removeprefix("file://")).expanduser().absolute()
    if "://" in uri.removeprefix("file://") or not folder.is_dir():
        raise BadConfig(f"voices: no folder {uri!r}; expected an existing folder, or s3://BUCKET/PREFIX")
    return LocalVoiceStore(folder)


class LocalVoiceStore:
    """A folder that all nodes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list_versions(self) -> dict[str, str]:
        with _translate_errors():
            versions = {}
            for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
                # A file may be deleted between listing and stat.
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.startswith("."):
                        status = entry.stat()
                        versions[entry.name] = f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
            return versions

    def read(self, name: str) -> bytes:
        with _translate_errors():
            return (self._folder / name).read_bytes()

    def create(self, name: str, content: bytes) -> bool:
        with _translate_errors():
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".part")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                # Unlike a rename, a hard link never replaces an existing file.
                os.link(temporary, self._folder / name)
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True

    def delete(self, name: str) -> None:
        with _translate_errors():
            (self._folder / name).unlink(missing_ok=True)


class S3VoiceStore:
    """An S3 prefix; endpoint, region and credentials come from the standard AWS environment variables."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client("s3", config=Config(retries={"max_attempts": 5, "mode": "standard"}, read_timeout=20))

    def list_versions(self) -> dict[str, str]:
        with _translate_errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
            )
            listed = [entry for page in pages for entry in page.get("Contents", ())]
        names = ((entry["Key"].removeprefix(self._prefix), entry["ETag"]) for entry in listed)
        return {name: version for name, version in names if name}

    def read(self, name: str) -> bytes:
        with _translate_errors():
            content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        return content

    def create(self, name: str, content: bytes) -> bool:
        from botocore.exceptions import ClientError

        with _translate_errors():
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content, IfNoneMatch="*")
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                    return False
                raise
        return True

    def delete(self, name: str) -> None:
        with _translate_errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Log storage errors, and raise them as `OSError` without details."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        logger.error("voice store error: %s", error)
        raise OSError("the voice store cannot be reached") from error
