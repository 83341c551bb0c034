"""Opens and checks manifests before any model is loaded, and reads their rows.

In: the path or URI of a Parquet file, a JSON-lines file, or a folder of files of one kind. Out: rows as dictionaries,
or a `BadInput` that explains in one sentence why it is not a manifest. A line that is not JSON becomes an invalid row.
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
"""Key of the error message in a row that could not be parsed; no column can have this name."""

LINE = "line"
"""Name of the only column of a block of JSON lines."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An opened manifest; `schema` has the columns that are copied to the results."""

    uri: str
    kind: Kind
    filesystem: fs.FileSystem
    paths: tuple[str, ...]
    schema: pa.Schema

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order, with one batch of a Parquet file or one JSON-lines file in memory at a time."""
        for path in self.paths:
            with self.filesystem.open_input_file(path) as file:
                if self.kind == "parquet":
                    for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS):
                        yield from batch.to_pylist()
                else:
                    yield from parse_lines(file.read())


def open_manifest(uri: str, columns: tuple[tuple[str, ...], ...] = (("id",), _TEXT_COLUMNS)) -> Manifest:
    """Open a manifest and check its columns.

    Args:
        columns: groups of alternative columns; the manifest must have at least one column of each group.

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
            found = "neither" if not paths else "both"
            raise BadInput(f"the manifest {uri!r} must contain either .parquet or .jsonl files; it has {found}")
        kind = kinds.pop()
        schema = (_parquet_schema if kind == "parquet" else _json_schema)(uri, filesystem, paths, columns)
    except (OSError, pa.ArrowException) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"the manifest {uri!r} cannot be read: {first}") from error
    return Manifest(uri, kind, filesystem, tuple(paths), schema)


def parse_lines(content: bytes) -> Iterator[Row]:
    """Yield the rows of JSON lines; skip empty lines."""
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
    """Return a row of a block, which is a table of rows or of JSON lines."""
    if block.column_names == [LINE]:
        return next(parse_lines(block[LINE][index].as_py()), {PARSE_ERROR: "the line is empty"})
    row: Row = block.slice(index, 1).to_pylist()[0]
    return row


def estimate_chars(row: Row) -> int:
    """Return the approximate length of a row's text; cheap, and works for invalid rows, too."""
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
    raise BadInput(f"the manifest {path!r} has an unknown file extension; expected .parquet, .pq, .jsonl or .ndjson")


def _parquet_schema(
    uri: str, filesystem: fs.FileSystem, paths: list[str], columns: tuple[tuple[str, ...], ...]
) -> pa.Schema:
    schemas, count = [], 0
    for path in paths:
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            schemas.append(parquet.schema_arrow.remove_metadata())
            count += parquet.metadata.num_rows
    schema = pa.unify_schemas(schemas, promote_options="permissive")
    _check_columns(uri, set(schema.names), count, columns)
    return schema


def _json_schema(
    uri: str, filesystem: fs.FileSystem, paths: list[str], columns: tuple[tuple[str, ...], ...]
) -> pa.Schema:
    """Infer the types of all columns; a column with mixed or nested values becomes a string column of JSON."""
    types_by_column: dict[str, set[type]] = {}
    count = 0
    for path in paths:
        with filesystem.open_input_file(path) as file:
            for row in parse_lines(file.read()):
                count += 1
                for name, value in row.items():
                    if name != PARSE_ERROR:
                        types_by_column.setdefault(name, set()).update([type(value)] if value is not None else [])
    _check_columns(uri, set(types_by_column), count, columns)
    return pa.schema([(name, _json_type(types)) for name, types in types_by_column.items()])


def _json_type(types: set[type]) -> pa.DataType:
    if types == {bool}:
        return pa.bool_()
    if types == {int}:
        return pa.int64()
    if types and types <= {int, float}:
        return pa.float64()
    return pa.string()


def _check_columns(uri: str, found: set[str], num_rows: int, columns: tuple[tuple[str, ...], ...]) -> None:
    if num_rows == 0:
        raise BadInput(f"the manifest {uri!r} has no rows")
    if not all(found.intersection(group) for group in columns):
        required = ", and ".join(" or ".join(group) for group in columns)
        shown = ", ".join(sorted(found)[:12]) or "none"
        raise BadInput(f"the manifest {uri!r} needs the columns {required}; it has {shown}")
