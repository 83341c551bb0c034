"""Result rows: their columns, and the Parquet files that hold them, one row a script and never two.

    OUT/results/part-<run>-<number>.parquet

`Results` belongs to one process. A part is written once and is whole or absent; a row that is to be made again is first
taken out of its part, which is replaced in one stroke, so that nobody ever reads a script's row twice. Columns are the
manifest's, then the job's own; where a name is both, it is the job's. All parts have the same schema.
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
from jobs.storage.backends import Folder

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
"""What the job says of every row, made or failed."""


def schema_for(manifest: pa.Schema) -> pa.Schema:
    """All columns of a job's results: the manifest's that the job does not use itself, then the job's."""
    return pa.schema([*(field for field in manifest if field.name not in COLUMNS.names), *COLUMNS])


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; what a column of text cannot hold is JSON there, and what any other cannot is null."""
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
    """Text as UTF-8 can hold it, at any depth: rows that fail for their text are results, too."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_clean(key): _clean(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_clean(one) for one in value)
    return [_clean(one) for one in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Done:
    """A row that an earlier run has finished: the hash of its script, and the part that holds it."""

    script_sha256: str
    part: str


class Results:
    """The results of one output folder.

    Attributes:
        done: rows that are made, by id.
    """

    def __init__(self, folder: Folder, schema: pa.Schema, run_id: str) -> None:
        self._folder, self._schema, self._run_id = folder, schema, run_id
        self._number = 0
        self.done: dict[str, Done] = {}

    def claim(self) -> None:
        """Say that this run writes here now: an earlier one that still lives, unknown to anybody, writes no more."""
        self._folder.put(_OWNER, self._run_id.encode())

    def _check_owner(self) -> None:
        owner = self._folder.get(_OWNER).decode()
        if owner != self._run_id:
            raise RuntimeError(f"the run {owner} has taken over {self._folder.locate(RESULTS)}")

    def load(self) -> None:
        """Learn what earlier runs have made; rows of theirs that failed are taken out, for they are tried again.

        Raises:
            BadInput: a part cannot be read.
        """
        for name in self._parts():
            table = self._read(name)
            status, ids = table["status"].to_pylist(), table["id"].to_pylist()
            hashes = table["script_sha256"].to_pylist()
            kept = []
            for index, (identity, state, digest) in enumerate(zip(ids, status, hashes, strict=True)):
                if state == "failed" or identity in self.done:
                    continue
                kept.append(index)
                self.done[identity] = Done(digest, name)
            if len(kept) < len(table):
                self._replace(name, table.take(pa.array(kept, pa.int64())))

    def clear(self) -> None:
        """Forget all that earlier runs have made."""
        for name in self._parts():
            self._folder.delete(name)

    def take_out(self, identities: Iterable[str]) -> None:
        """Remove rows that are to be made again; each part that holds some is replaced once."""
        leaving: dict[str, set[str]] = {}
        for identity in identities:
            if (done := self.done.pop(identity, None)) is not None:
                leaving.setdefault(done.part, set()).add(identity)
        for part, gone in leaving.items():
            table = self._read(part)
            kept = [index for index, one in enumerate(table["id"].to_pylist()) if one not in gone]
            self._replace(part, table.take(pa.array(kept, pa.int64())))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as a part of their own; when this returns they are there for good.

        Raises:
            RuntimeError: another run has begun to write here.
        """
        name = f"{RESULTS}/part-{self._run_id}-{self._number:06d}.parquet"
        self._number += 1
        self._check_owner()
        self._folder.put(name, _bytes(table_of(rows, self._schema)))
        try:
            self._check_owner()
        except RuntimeError:
            # The other run may have looked before this part was there.
            self._folder.delete(name)
            raise

    def _parts(self) -> list[str]:
        return [name for name in self._folder.names(RESULTS) if name.endswith(".parquet")]

    def _read(self, name: str) -> pa.Table:
        try:
            table = pq.read_table(io.BytesIO(self._folder.get(name)))
        except pa.ArrowInvalid as error:
            raise BadInput(f"{self._folder.locate(name)} is no result file that can be read: {error}") from error
        if missing := {"id", "status", "script_sha256"} - set(table.column_names):
            raise BadInput(f"{self._folder.locate(name)} is not a result file: it has no column {', '.join(missing)}")
        return table

    def _replace(self, name: str, table: pa.Table) -> None:
        if len(table):
            self._folder.put(name, _bytes(table))
        else:
            self._folder.delete(name)


def read_results(folder: Folder) -> pa.Table:
    """All rows of an output folder, whatever manifests they came from.

    Raises:
        BadInput: there are none.
    """
    names = [name for name in folder.names(RESULTS) if name.endswith(".parquet")]
    if not names:
        raise BadInput(f"there are no results under {folder.locate(RESULTS)}")
    tables: Iterable[pa.Table] = (pq.read_table(io.BytesIO(folder.get(name))) for name in names)
    return pa.concat_tables(list(tables), promote_options="permissive")


def _bytes(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()
