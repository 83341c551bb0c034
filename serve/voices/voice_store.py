"""Where a voice library lies: a folder that all machines see, or a prefix of an S3 bucket.

Both list files with a version that changes when their content does, create a file only if there is none of that name,
and show it whole or not at all. What fails is an `OSError` whose message names no path; the log has the rest.
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


class LibraryStore(Protocol):
    """Files side by side."""

    def versions(self) -> dict[str, str]:
        """All files by name, with what changes when their content does."""

    def read(self, name: str) -> bytes:
        """One file's bytes."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file; False, and nothing done, if there is one of that name."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""


def open_store(uri: str) -> LibraryStore:
    """The store under a path, a `file://` or an `s3://` URI.

    Raises:
        BadConfig: there is no such place.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise BadConfig(f"voices: {uri!r} names no bucket; wanted s3://BUCKET/PREFIX")
        return BucketStore(bucket, prefix.strip("/"))
    folder = Path(uri.removeprefix("file://")).expanduser().absolute()
    if "://" in uri.removeprefix("file://") or not folder.is_dir():
        raise BadConfig(f"voices: {uri!r} is not a folder; give one, or s3://BUCKET/PREFIX")
    return FolderStore(folder)


class FolderStore:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def versions(self) -> dict[str, str]:
        with _told():
            found = {}
            for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
                # What goes away between the listing and the look is not there.
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.startswith("."):
                        status = entry.stat()
                        found[entry.name] = f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
            return found

    def read(self, name: str) -> bytes:
        with _told():
            return (self._folder / name).read_bytes()

    def create(self, name: str, content: bytes) -> bool:
        with _told():
            handle, draft = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    os.fsync(file.fileno())
                Path(draft).chmod(0o644)
                # A link, unlike a rename, does not replace what is there.
                os.link(draft, self._folder / name)
            except FileExistsError:
                return False
            finally:
                os.unlink(draft)
            return True

    def delete(self, name: str) -> None:
        with _told():
            (self._folder / name).unlink(missing_ok=True)


class BucketStore:
    """A prefix of an S3 bucket; endpoint, region and credentials come from the usual AWS variables."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client("s3", config=Config(retries={"max_attempts": 5, "mode": "standard"}, read_timeout=20))

    def versions(self) -> dict[str, str]:
        with _told():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
            )
            listed = [entry for page in pages for entry in page.get("Contents", ())]
        names = ((entry["Key"].removeprefix(self._prefix), entry["ETag"]) for entry in listed)
        return {name: version for name, version in names if name}

    def read(self, name: str) -> bytes:
        with _told():
            content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        return content

    def create(self, name: str, content: bytes) -> bool:
        from botocore.exceptions import ClientError

        with _told():
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content, IfNoneMatch="*")
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                    return False
                raise
        return True

    def delete(self, name: str) -> None:
        with _told():
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors of the disk and of the cloud's library, without what only the log should know."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        logger.error("the voice store: %s", error)
        raise OSError("the voice store cannot be reached") from error
