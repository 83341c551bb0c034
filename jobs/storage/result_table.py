"""The result table: its columns, and the Parquet files that hold it, with exactly one row per script.

    OUT/results/part-<run>-<number>.parquet

One run owns the table. A part is written once, and is complete or absent. Before a row is redone, its part is replaced
atomically by one without it, so that readers never see two rows of a script. The columns are the manifest's, then the
job's, which replace those of the manifest with the same names. All parts that a run writes have the same schema.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from higgs_model.errors import BadInput
from jobs.storage.backends import StorageBackend

RESULTS = "results"
_OWNER = f"{RESULTS}/_owner"
CHUNK = pa.struct(
    [
        ("index", pa.int32()),
        ("text", pa.string()),
        ("speakers", pa.list_(pa.string())),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("frames", pa.int32()),
        ("seed", pa.int64()),
        ("attempts", pa.int32()),
        ("finish_reason", pa.string()),
        ("faults", pa.list_(pa.string())),
    ]
)
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("error", pa.string()),
        ("audio_path", pa.string()),
        ("duration_s", pa.float64()),
        ("sample_rate", pa.int32()),
        ("num_frames", pa.int64()),
        ("chunks", pa.list_(CHUNK)),
        ("warnings", pa.list_(pa.string())),
        ("audio_sha256", pa.string()),
        ("script_sha256", pa.string()),
        ("model", pa.string()),
        ("seed", pa.int64()),
        ("synthesis_s", pa.float64()),
        ("manifest_row", pa.int64()),
    ]
)
"""The job's columns, which are the same for successful and failed rows."""


def result_schema(manifest: pa.Schema) -> pa.Schema:
    """Return the schema of a job's results: the manifest's other columns, then the job's."""
    return pa.schema([*(field for field in manifest if field.name not in COLUMNS.names), *COLUMNS])


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Convert rows to a table. Values of another type become JSON in string columns, and null in others."""
    columns = [_to_array([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _to_array(values: list[Any], arrow_type: pa.DataType) -> pa.Array:
    values = [_replace_invalid_unicode(value) for value in values]
    try:
        return pa.array(values, arrow_type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError):
        if pa.types.is_string(arrow_type):
            values = [value if value is None or isinstance(value, str) else _to_json(value) for value in values]
        return pa.array([value if _fits(value, arrow_type) else None for value in values], arrow_type)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _fits(value: Any, arrow_type: pa.DataType) -> bool:
    try:
        pa.array([value], arrow_type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError):
        return False
    return True


def _replace_invalid_unicode(value: Any) -> Any:
    """Replace invalid Unicode in strings at any depth, because rows that fail due to it are in the results, too."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_replace_invalid_unicode(key): _replace_invalid_unicode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_replace_invalid_unicode(item) for item in value)
    return [_replace_invalid_unicode(item) for item in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class FinishedRow:
    """A row that an earlier run finished: the hash of its script, and the name of the part that contains it."""

    script_sha256: str
    part: str


class ResultTable:
    """The result table of one output folder, as its owner writes it.

    Args:
        run_id: unique per run; part of the names of new parts.

    Attributes:
        finished: rows that earlier runs finished, by id.
    """

    def __init__(self, storage: StorageBackend, schema: pa.Schema, run_id: str) -> None:
        self._storage, self._schema, self._run_id = storage, schema, run_id
        self._num_parts = 0
        self.finished: dict[str, FinishedRow] = {}

    def take_ownership(self) -> None:
        """Make this run the only writer; if an earlier run is still alive, its next write fails."""
        self._storage.write(_OWNER, self._run_id.encode())

    def _check_owner(self) -> None:
        owner = self._storage.read(_OWNER).decode()
        if owner != self._run_id:
            raise RuntimeError(f"run {owner} has taken over {self._storage.locate(RESULTS)}")

    def load(self) -> None:
        """Load the rows that earlier runs finished, and remove their failed rows, which will be retried.

        Raises:
            BadInput: a part cannot be read.
        """
        for name in self._list_parts():
            table = self._read_part(name)
            status, ids = table["status"].to_pylist(), table["id"].to_pylist()
            hashes = table["script_sha256"].to_pylist()
            keep = []
            for index, (row_id, state, digest) in enumerate(zip(ids, status, hashes, strict=True)):
                if state == "failed" or row_id in self.finished:
                    continue
                keep.append(index)
                self.finished[row_id] = FinishedRow(digest, name)
            if len(keep) < len(table):
                self._replace_part(name, table.take(pa.array(keep, pa.int64())))

    def clear(self) -> None:
        """Delete all results of earlier runs."""
        for name in self._list_parts():
            self._storage.delete(name)

    def remove(self, row_ids: Iterable[str]) -> None:
        """Remove rows that will be redone; each affected part is replaced once."""
        removed: dict[str, set[str]] = {}
        for row_id in row_ids:
            if (finished := self.finished.pop(row_id, None)) is not None:
                removed.setdefault(finished.part, set()).add(row_id)
        for part, row_ids_in_part in removed.items():
            table = self._read_part(part)
            keep = [index for index, name in enumerate(table["id"].to_pylist()) if name not in row_ids_in_part]
            self._replace_part(part, table.take(pa.array(keep, pa.int64())))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as a new part; they are durable when this returns.

        Raises:
            RuntimeError: another run has taken over.
        """
        name = f"{RESULTS}/part-{self._run_id}-{self._num_parts:06d}.parquet"
        self._num_parts += 1
        self._check_owner()
        self._storage.write(name, _to_parquet(to_table(rows, self._schema)))
        try:
            self._check_owner()
        except RuntimeError:
            # The new owner may have listed the parts before this one was written.
            self._storage.delete(name)
            raise

    def _list_parts(self) -> list[str]:
        return [name for name in self._storage.list_files(RESULTS) if name.endswith(".parquet")]

    def _read_part(self, name: str) -> pa.Table:
        try:
            table = pq.read_table(io.BytesIO(self._storage.read(name)))
        except pa.ArrowInvalid as error:
            raise BadInput(f"{self._storage.locate(name)} is not a readable result file: {error}") from error
        if missing := {"id", "status", "script_sha256"} - set(table.column_names):
            raise BadInput(
                f"{self._storage.locate(name)} is not a result file: it lacks the column {', '.join(missing)}"
            )
        return table

    def _replace_part(self, name: str, table: pa.Table) -> None:
        if len(table):
            self._storage.write(name, _to_parquet(table))
        else:
            self._storage.delete(name)


def read_results(storage: StorageBackend) -> pa.Table:
    """Return all result rows of an output folder; the schemas of its parts may differ.

    Raises:
        BadInput: there are no results.
    """
    names = [name for name in storage.list_files(RESULTS) if name.endswith(".parquet")]
    if not names:
        raise BadInput(f"no results under {storage.locate(RESULTS)}")
    tables: Iterable[pa.Table] = (pq.read_table(io.BytesIO(storage.read(name))) for name in names)
    return pa.concat_tables(list(tables), promote_options="permissive")


def _to_parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()
