"""The samples of a training's manifest, prepared once: recordings to codes, rows to tokens.

    manifest ─▶ stretches of rows ─▶ Ray Data, codecs side by side, or here ─▶ OUT/prepared/…/rows-*.safetensors

A shard that is there is not made again, so that this too can be killed and gone on with. What was prepared is used as
long as manifest, codec, tokenizer and what the network takes are the same; of recordings only the path is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from higgs_model.errors import BadInput
from higgs_model.synthesizer.loading import hash_weights, load_codec, resolve_codec
from higgs_model.training.batch_sampler import PreparedDataset
from higgs_model.training.collator import PositionCounter
from higgs_model.training.model_source import ModelSource
from higgs_model.training.prepare import AudioRequirements, Preparer, needs_preparation, shard_path, split_into_shards
from higgs_model.training.samples import Row, SampleReader
from higgs_model.training.settings import TrainingSettings
from jobs.runtime.cli import print_status
from jobs.runtime.ray_cluster import THREADS_PER_CPU_WORKER, connect
from jobs.storage.manifest import PARSE_ERROR, open_manifest
from jobs.storage.uris import open_voices, parent_folder, read_bytes, resolve_relative

if TYPE_CHECKING:
    from higgs_model.codec.codec import HiggsAudioCodec

_VERSION = 1
"""Of what shards hold."""
_COLUMNS = (("text", "turns", "messages"),)
_SHOWN_FAULTS = 5
_TELL_EVERY_S = 15.0


@dataclasses.dataclass(frozen=True)
class Source:
    """One manifest of a training."""

    uri: str
    settings: TrainingSettings

    def preparer(self, model_source: ModelSource) -> Preparer:
        """Makes its shards."""
        place = parent_folder(self.uri)
        reader = SampleReader(model_source.tokenizer, open_voices(self.settings.data.voices, place))
        codec = functools.cache(self._codec)
        return Preparer(
            reader,
            AudioRequirements.from_config(model_source.config),
            codec,
            lambda name: read_bytes(resolve_relative(place, name)),
        )

    def _codec(self) -> HiggsAudioCodec:
        settings = self.settings
        if settings.codec is None and settings.init.checkpoint is None:
            raise BadInput("codec is not given, so that recordings cannot be encoded; or give codes as .npy files")
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return load_codec(settings.init.checkpoint or "", settings.codec, device)

    def rows(self) -> Iterator[Row | str]:
        """All rows; what is no row is its own fault."""
        for row in open_manifest(self.uri, _COLUMNS).rows():
            yield str(row[PARSE_ERROR]) if PARSE_ERROR in row else row

    def folder(self, model_source: ModelSource) -> Path:
        """Where its shards are, named by all that they follow from."""
        manifest = open_manifest(self.uri, _COLUMNS)
        digest = hashlib.sha256()
        for path in manifest.paths:
            with manifest.filesystem.open_input_stream(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        named = (self.settings.init.checkpoint, self.settings.codec)
        codec = resolve_codec(named[0] or "", named[1]) if any(named) else ""
        vocabulary: Any = model_source.tokenizer
        told = {
            "version": _VERSION,
            "manifest": [self.uri, digest.hexdigest()],
            "voices": self.settings.data.voices,
            "codec": hash_weights(Path(codec)) if Path(codec).is_dir() else codec,
            "tokens": hashlib.sha256(json.dumps(vocabulary.get_vocab(), sort_keys=True).encode()).hexdigest(),
            "needs": dataclasses.asdict(AudioRequirements.from_config(model_source.config)),
        }
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.settings.output) / "prepared" / name


def prepare(settings: TrainingSettings, uri: str, model_source: ModelSource, workers: int | None) -> Path:
    """Prepare a manifest, and see that its faulty rows are not too many; gives the folder of its shards.

    Args:
        workers: processes of Ray Data; None: this one alone.

    Raises:
        BadInput: it is no manifest, or has more faulty rows than the settings allow; the first are told.
    """
    source = Source(uri, settings)
    folder = source.folder(model_source)
    todo = [
        (first, rows)
        for first, rows in split_into_shards(source.rows())
        if needs_preparation(shard_path(folder, first))
    ]
    if todo:
        print_status(f"preparing {sum(len(rows) for _, rows in todo)} rows of {uri}")
        (_with_ray if workers else _here)(source, model_source, folder, todo, workers or 1)
    samples = open_samples(settings, folder, model_source)
    if len(samples.row_errors) > settings.data.bad_rows:
        more = len(samples.row_errors) - _SHOWN_FAULTS
        raise BadInput(
            f"the manifest {uri!r} has {len(samples.row_errors)} faulty rows, "
            f"data.bad_rows is {settings.data.bad_rows}: "
            + "; ".join(samples.row_errors[:_SHOWN_FAULTS])
            + (f"; and {more} more" if more > 0 else "")
        )
    for fault in samples.row_errors:
        print_status(f"left out: {fault}")
    return folder


def open_samples(settings: TrainingSettings, folder: Path, model_source: ModelSource) -> PreparedDataset:
    """What was prepared."""
    return PreparedDataset(
        folder,
        AudioRequirements.from_config(model_source.config),
        PositionCounter.from_config(model_source.config),
        settings.batch.longest,
    )


def _here(
    source: Source, model_source: ModelSource, folder: Path, todo: Sequence[tuple[int, list[Row | str]]], _: int
) -> None:
    preparer = source.preparer(model_source)
    told_s = time.monotonic()
    for number, (first, rows) in enumerate(todo):
        preparer.write(shard_path(folder, first), rows, first)
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            print_status(f"prepared {number + 1} of {len(todo)} shards")


class _PrepareBatch:
    """What Ray Data calls, in processes of its own."""

    def __init__(self, source: Source) -> None:
        torch.set_num_threads(THREADS_PER_CPU_WORKER)
        self._model_source = ModelSource.from_settings(source.settings.init)
        self._preparer = source.preparer(self._model_source)

    def __call__(self, table: pa.Table) -> pa.Table:
        for one in table.to_pylist():
            self._preparer.write(Path(one["path"]), json.loads(one["rows"]), one["first"])
        return table.select(["first"])


def _with_ray(
    source: Source, model_source: ModelSource, folder: Path, todo: Sequence[tuple[int, list[Row | str]]], workers: int
) -> None:
    import ray

    if not ray.is_initialized():
        connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    units = [
        {"first": first, "path": str(shard_path(folder, first)), "rows": json.dumps(rows, default=_plain)}
        for first, rows in todo
    ]
    resources = ray.cluster_resources()
    gpu = min(resources.get("GPU", 0) / workers, 1)
    done = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _PrepareBatch,
        fn_constructor_args=(source,),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0 if resources.get("CPU", 1) <= workers else 1,
        num_gpus=gpu or None,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
    )
    for _ in done.iter_batches(batch_size=None, prefetch_batches=0):
        pass


_plain: Callable[[Any], Any] = str
"""What a table has that JSON lacks, such as a date, is no part of a sample."""
