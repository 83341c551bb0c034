"""The result table: its columns, and the Parquet files that hold it, with exactly one row per script.

    OUT/results/part-<run>-<number>.parquet

One process owns a `ResultTable`. A part is written once and is complete or absent. Before a row is done again, it is
removed from its part, which is replaced atomically, so that no reader ever sees two rows of a script. Columns are the
manifest's, then the job's own; for names in both, the job's. All parts have the same schema.
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
"""The job's columns, for successful and failed rows alike."""


def schema_for(manifest: pa.Schema) -> pa.Schema:
    """Return the schema of a job's results: the manifest's other columns, then the job's."""
    return pa.schema([*(field for field in manifest if field.name not in COLUMNS.names), *COLUMNS])


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Convert rows to a table. Values that do not fit become JSON in string columns and null in others."""
    columns = [_column([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    values = [_clean(value) for value in values]
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError):
        if pa.types.is_string(kind):
            values = [value if value is None or isinstance(value, str) else _json(value) for value in values]
        return pa.array([value if _fits(value, kind) else None for value in values], kind)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError):
        return False
    return True


def _clean(value: Any) -> Any:
    """Replace text that is not valid Unicode, at any depth: rows that fail because of it are results, too."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_clean(item) for item in value)
    return [_clean(item) for item in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class FinishedRow:
    """A row that an earlier run finished: the hash of its script, and the part that contains it."""

    script_sha256: str
    part: str


class ResultTable:
    """The result table of one output folder.

    Attributes:
        finished: rows that earlier runs finished, by id.
    """

    def __init__(self, folder: StorageBackend, schema: pa.Schema, run_id: str) -> None:
        self._folder, self._schema, self._run_id = folder, schema, run_id
        self._number = 0
        self.finished: dict[str, FinishedRow] = {}

    def take_ownership(self) -> None:
        """Make this run the only writer: an earlier run that is still alive will fail to write."""
        self._folder.write(_OWNER, self._run_id.encode())

    def _check_owner(self) -> None:
        owner = self._folder.read(_OWNER).decode()
        if owner != self._run_id:
            raise RuntimeError(f"run {owner} has taken over {self._folder.locate(RESULTS)}")

    def load(self) -> None:
        """Read what earlier runs finished, and remove their failed rows, which will be retried.

        Raises:
            BadInput: a part cannot be read.
        """
        for name in self._parts():
            table = self._read(name)
            status, ids = table["status"].to_pylist(), table["id"].to_pylist()
            hashes = table["script_sha256"].to_pylist()
            kept = []
            for index, (identity, state, digest) in enumerate(zip(ids, status, hashes, strict=True)):
                if state == "failed" or identity in self.finished:
                    continue
                kept.append(index)
                self.finished[identity] = FinishedRow(digest, name)
            if len(kept) < len(table):
                self._replace(name, table.take(pa.array(kept, pa.int64())))

    def clear(self) -> None:
        """Delete the results of earlier runs."""
        for name in self._parts():
            self._folder.delete(name)

    def remove(self, identities: Iterable[str]) -> None:
        """Remove rows that will be done again; each part that contains some is replaced once."""
        removed: dict[str, set[str]] = {}
        for identity in identities:
            if (finished := self.finished.pop(identity, None)) is not None:
                removed.setdefault(finished.part, set()).add(identity)
        for part, identities_in_part in removed.items():
            table = self._read(part)
            kept = [index for index, name in enumerate(table["id"].to_pylist()) if name not in identities_in_part]
            self._replace(part, table.take(pa.array(kept, pa.int64())))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as a new part; they are durable when this returns.

        Raises:
            RuntimeError: another run has taken over.
        """
        name = f"{RESULTS}/part-{self._run_id}-{self._number:06d}.parquet"
        self._number += 1
        self._check_owner()
        self._folder.write(name, _bytes(to_table(rows, self._schema)))
        try:
            self._check_owner()
        except RuntimeError:
            # The other run may have read the parts before this one existed.
            self._folder.delete(name)
            raise

    def _parts(self) -> list[str]:
        return [name for name in self._folder.list_files(RESULTS) if name.endswith(".parquet")]

    def _read(self, name: str) -> pa.Table:
        try:
            table = pq.read_table(io.BytesIO(self._folder.read(name)))
        except pa.ArrowInvalid as error:
            raise BadInput(f"{self._folder.locate(name)} is not a readable result file: {error}") from error
        if missing := {"id", "status", "script_sha256"} - set(table.column_names):
            raise BadInput(
                f"{self._folder.locate(name)} is not a result file: it lacks the column {', '.join(missing)}"
            )
        return table

    def _replace(self, name: str, table: pa.Table) -> None:
        if len(table):
            self._folder.write(name, _bytes(table))
        else:
            self._folder.delete(name)


def read_results(folder: StorageBackend) -> pa.Table:
    """Return all rows of an output folder, whatever manifests they came from.

    Raises:
        BadInput: there are none.
    """
    names = [name for name in folder.list_files(RESULTS) if name.endswith(".parquet")]
    if not names:
        raise BadInput(f"no results under {folder.locate(RESULTS)}")
    tables: Iterable[pa.Table] = (pq.read_table(io.BytesIO(folder.read(name))) for name in names)
    return pa.concat_tables(list(tables), promote_options="permissive")


def _bytes(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()
