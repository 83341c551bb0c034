"""Opens and checks manifests before any model is loaded, and reads their rows.

In: the path or URI of a Parquet file, of a folder of them, or of JSON lines. Out: rows as plain dictionaries, or one
sentence that says why it is not a manifest. A line that is not JSON becomes an invalid row; the others are unaffected.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from higgs_model.errors import BadInput
from jobs.storage.uris import resolve

Kind = Literal["parquet", "jsonl"]

_KINDS: dict[str, Kind] = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_TEXT_COLUMNS = ("text", "turns")
_BATCH_ROWS = 1024
PARSE_ERROR = "\0broken"
"""In a row that could not be parsed, the key of the error message; no column can have this name."""

LINE = "line"
"""The only column of a block of JSON lines."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An opened manifest; `schema` has the columns that results copy."""

    uri: str
    kind: Kind
    filesystem: fs.FileSystem
    paths: tuple[str, ...]
    schema: pa.Schema

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order, with one batch in memory at a time."""
        for path in self.paths:
            with self.filesystem.open_input_file(path) as file:
                if self.kind == "parquet":
                    for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS):
                        yield from batch.to_pylist()
                else:
                    yield from parse_lines(file.read())


def open_manifest(uri: str, columns: tuple[tuple[str, ...], ...] = (("id",), _TEXT_COLUMNS)) -> Manifest:
    """Open a manifest and check it.

    Args:
        columns: groups of columns, of each of which it must have one.

    Raises:
        BadInput: it does not exist, cannot be read, has no rows, or lacks columns.
    """
    filesystem, path = resolve(uri)
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise BadInput(f"the manifest {uri!r} does not exist")
        paths = [path] if info.type == fs.FileType.File else _files(filesystem, path)
        kinds = {_kind(file) for file in paths}
        if not paths or len(kinds) != 1:
            found = "no such file" if not paths else "both kinds"
            raise BadInput(f"the manifest {uri!r} holds {found}; wanted .parquet files, or .jsonl files")
        kind = kinds.pop()
        schema = (_parquet_schema if kind == "parquet" else _json_schema)(uri, filesystem, paths, columns)
    except (OSError, pa.ArrowException) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"the manifest {uri!r} cannot be read: {first}") from error
    return Manifest(uri, kind, filesystem, tuple(paths), schema)


def parse_lines(content: bytes) -> Iterator[Row]:
    """Yield the rows of JSON lines; empty lines are skipped."""
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if line.strip():
            yield _parse_line(line)


def _parse_line(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {PARSE_ERROR: f"the line is not JSON: {error}"}
    if not isinstance(row, dict):
        return {PARSE_ERROR: f"the line is a JSON {type(row).__name__}, not an object"}
    row.pop(PARSE_ERROR, None)
    return row


def get_row(block: pa.Table, index: int) -> Row:
    """Return one row of a block, which is a table of rows or of JSON lines."""
    if block.column_names == [LINE]:
        return next(parse_lines(block[LINE][index].as_py()), {PARSE_ERROR: "the line is empty"})
    row: Row = block.slice(index, 1).to_pylist()[0]
    return row


def estimate_chars(row: Row) -> int:
    """Return the approximate length of a row's text, cheaply and even for invalid rows."""
    text, turns = row.get("text"), row.get("turns")
    length = len(text) if isinstance(text, str) else 0
    if isinstance(turns, list):
        length += sum(len(str(turn.get("text") or "")) for turn in turns if isinstance(turn, dict))
    return length


def _files(filesystem: fs.FileSystem, path: str) -> list[str]:
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    hidden = ("/.", "/_")
    files = [info.path for info in found if info.type == fs.FileType.File]
    visible = [file for file in files if not any(mark in file[len(path) :] for mark in hidden)]
    return sorted(file for file in visible if any(file.lower().endswith(suffix) for suffix in _KINDS))


def _kind(path: str) -> Kind:
    for suffix, kind in _KINDS.items():
        if path.lower().endswith(suffix):
            return kind
    raise BadInput(f"the manifest {path!r} is neither .parquet nor .jsonl")


def _parquet_schema(
    uri: str, filesystem: fs.FileSystem, paths: list[str], columns: tuple[tuple[str, ...], ...]
) -> pa.Schema:
    schemas, count = [], 0
    for path in paths:
        with filesystem.open_input_file(path) as file:
            opened = pq.ParquetFile(file)
            schemas.append(opened.schema_arrow.remove_metadata())
            count += opened.metadata.num_rows
    schema = pa.unify_schemas(schemas, promote_options="permissive")
    _check(uri, set(schema.names), count, columns)
    return schema


def _json_schema(
    uri: str, filesystem: fs.FileSystem, paths: list[str], columns: tuple[tuple[str, ...], ...]
) -> pa.Schema:
    """Infer the types of all columns; one with mixed or nested values is copied as JSON text."""
    kinds: dict[str, set[type]] = {}
    count = 0
    for path in paths:
        with filesystem.open_input_file(path) as file:
            for row in parse_lines(file.read()):
                count += 1
                for name, value in row.items():
                    if name != PARSE_ERROR:
                        kinds.setdefault(name, set()).update([type(value)] if value is not None else [])
    _check(uri, set(kinds), count, columns)
    return pa.schema([(name, _json_type(found)) for name, found in kinds.items()])


def _json_type(found: set[type]) -> pa.DataType:
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
        return pa.int64()
    if found and found <= {int, float}:
        return pa.float64()
    return pa.string()


def _check(uri: str, found: set[str], count: int, columns: tuple[tuple[str, ...], ...]) -> None:
    if count == 0:
        raise BadInput(f"the manifest {uri!r} has no rows")
    if not all(found.intersection(group) for group in columns):
        wanted = ", and ".join(" or ".join(group) for group in columns)
        shown = ", ".join(sorted(found)[:12]) or "none"
        raise BadInput(f"the manifest {uri!r} needs the columns {wanted}; it has {shown}")
