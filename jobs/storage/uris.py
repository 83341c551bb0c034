"""Reads files by path or URI: `/a/path`, `file:///a/path`, `s3://bucket/prefix`.

S3 credentials, region and endpoint come from the usual AWS environment variables, including `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import dataclasses
import os

from pyarrow import ArrowInvalid, fs

from higgs_model.errors import BadInput
from higgs_model.script.voices import Voices

_MAX_ATTEMPTS = 10
_SCHEMES = ("s3://", "file://", "gs://")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path on it.

    Raises:
        BadInput: the scheme is not supported.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    if uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        scheme, _, host = endpoint.rpartition("://") if endpoint else ("", "", None)
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options = {"endpoint_override": host, "scheme": scheme or "https", "region": region}
        chosen = {name: value for name, value in options.items() if value}
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS)
        return fs.S3FileSystem(retry_strategy=retries, **chosen), uri.removeprefix("s3://").rstrip("/")
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ArrowInvalid, OSError) as error:
        supported = ", ".join(_SCHEMES)
        raise BadInput(f"{uri!r} cannot be opened: {error}; expected a path, or a URI with {supported}") from error
    return filesystem, path


@dataclasses.dataclass(frozen=True)
class UriVoiceReader:
    """A voice library under a URI; see `higgs_model.script.voices.VoiceReader`."""

    uri: str

    def names(self) -> list[str]:
        """Return the names of all files, without reading any."""
        filesystem, path = resolve(self.uri)
        found = filesystem.get_file_info(fs.FileSelector(path))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        filesystem, path = resolve(self.uri)
        with filesystem.open_input_stream(f"{path}/{name}") as file:
            content: bytes = file.read()
        return content


def read_bytes(uri: str) -> bytes:
    """Return the content of a file.

    Raises:
        BadInput: the scheme is not supported.
        OSError: it cannot be read.
    """
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
    return content


def parent_folder(uri: str) -> str:
    """Return the folder that contains a manifest, or the manifest itself if it is a folder."""
    path = uri.rstrip("/")
    return path.rpartition("/")[0] if os.path.splitext(path)[1] else path


def resolve_relative(folder: str, uri: str) -> str:
    """Resolve a path or URI relative to a folder."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    return f"{folder.rstrip('/')}/{uri}"


def open_voices(uri: str | None, folder: str = ".") -> Voices:
    """Open a voice library, which can also read the one-off reference recordings (`ref_audio`) of rows.

    Args:
        uri: path or URI of the library; None for one-off recordings only.
        folder: folder that relative paths in rows are relative to.

    Raises:
        BadInput: the library does not exist, or cannot be reached.
    """

    def read_reference(name: str) -> bytes:
        return read_bytes(resolve_relative(folder, name))

    if uri is None:
        return Voices(read_bytes=read_reference)
    filesystem, path = resolve(uri)
    try:
        kind = filesystem.get_file_info(path).type
    except OSError as error:
        raise BadInput(f"the voice library {uri!r} cannot be reached: {error}") from error
    if kind != fs.FileType.Directory:
        raise BadInput(f"the voice library {uri!r} is not a folder or prefix")
    return Voices(UriVoiceReader(uri), read_reference)
