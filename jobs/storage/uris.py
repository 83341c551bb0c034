"""Where a job's files lie: local folders and buckets, by path or URI.

In: `/a/path`, `file:///a/path`, `s3://bucket/prefix`. Out: bytes, or one sentence that names what cannot be reached. S3
credentials, region and endpoint come from the usual AWS variables (`AWS_ENDPOINT_URL`, too).
"""

from __future__ import annotations

import dataclasses
import os

from pyarrow import ArrowInvalid, fs

from higgs_model.errors import BadInput
from higgs_model.script.voices import Voices

_ATTEMPTS = 10
_SCHEMES = ("s3://", "file://", "gs://")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path in it.

    Raises:
        BadInput: no filesystem is known for it.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    if uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        scheme, _, host = endpoint.rpartition("://") if endpoint else ("", "", None)
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options = {"endpoint_override": host, "scheme": scheme or "https", "region": region}
        chosen = {name: value for name, value in options.items() if value}
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
        return fs.S3FileSystem(retry_strategy=retries, **chosen), uri.removeprefix("s3://").rstrip("/")
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ArrowInvalid, OSError) as error:
        known = ", ".join(_SCHEMES)
        raise BadInput(f"{uri!r} cannot be opened: {error}; give a path, or a URI of {known}") from error
    return filesystem, path


@dataclasses.dataclass(frozen=True)
class UriStore:
    """A voice library under a URI; see `higgs_model.script.voices.VoiceStore`."""

    uri: str

    def names(self) -> list[str]:
        """Names of the files there, of which nothing is read."""
        filesystem, path = resolve(self.uri)
        found = filesystem.get_file_info(fs.FileSelector(path))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        """One file's bytes."""
        filesystem, path = resolve(self.uri)
        with filesystem.open_input_stream(f"{path}/{name}") as file:
            content: bytes = file.read()
        return content


def read_bytes(uri: str) -> bytes:
    """The content of one file, by path or URI.

    Raises:
        BadInput: no filesystem is known for it. OSError: it cannot be read.
    """
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
    return content


def folder_of(uri: str) -> str:
    """The folder of a manifest: that which holds it, if it is one file, else itself."""
    whole = uri.rstrip("/")
    return whole.rpartition("/")[0] if os.path.splitext(whole)[1] else whole


def beside(place: str, uri: str) -> str:
    """A path or URI, which is relative to the place if it is relative at all."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    return f"{place.rstrip('/')}/{uri}"


def open_voices(uri: str | None, place: str = ".") -> Voices:
    """A voice library by path or URI, and one-off recordings from wherever rows say.

    Args:
        place: what relative paths of one-off recordings are relative to.

    Raises:
        BadInput: there is no such library.
    """

    def read_one_off(name: str) -> bytes:
        return read_bytes(beside(place, name))

    if uri is None:
        return Voices(read_bytes=read_one_off)
    filesystem, path = resolve(uri)
    try:
        kind = filesystem.get_file_info(path).type
    except OSError as error:
        raise BadInput(f"the voice library {uri!r} cannot be reached: {error}") from error
    if kind != fs.FileType.Directory:
        raise BadInput(f"the voice library {uri!r} is not a folder or prefix")
    return Voices(UriStore(uri), read_one_off)
