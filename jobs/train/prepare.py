"""Prepares the samples of a training manifest once: recordings become codes, rows become tokens.

    manifest ─▶ row ranges ─▶ Ray Data with several codecs, or this process ─▶ OUT/prepared/…/rows-*.safetensors

Existing shards are reused, so preparation can be interrupted and resumed. Prepared data is reused as long as the
manifest, codec, tokenizer and the model's audio inputs are unchanged; recordings are compared by path, not by content.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
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

_SHARD_FORMAT_VERSION = 1
_COLUMNS = (("text", "turns", "messages"),)
_MAX_SHOWN_ERRORS = 5
_STATUS_INTERVAL_S = 15.0


@dataclasses.dataclass(frozen=True)
class ManifestSource:
    """One training or validation manifest."""

    uri: str
    settings: TrainingSettings

    def build_preparer(self, model_source: ModelSource) -> Preparer:
        """Build the `Preparer` that writes its shards; the codec is loaded on first use."""
        base = parent_folder(self.uri)
        reader = SampleReader(model_source.tokenizer, open_voices(self.settings.data.voices, base))
        codec = functools.cache(self._load_codec)
        return Preparer(
            reader,
            AudioRequirements.from_config(model_source.config),
            codec,
            lambda name: read_bytes(resolve_relative(base, name)),
        )

    def _load_codec(self) -> HiggsAudioCodec:
        settings = self.settings
        if settings.codec is None and settings.init.checkpoint is None:
            raise BadInput("recordings cannot be encoded without a codec; set `codec`, or give codes as .npy files")
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return load_codec(settings.init.checkpoint or "", settings.codec, device)

    def rows(self) -> Iterator[Row | str]:
        """Yield the manifest's rows; a row that cannot be parsed is yielded as its error message."""
        for row in open_manifest(self.uri, _COLUMNS).rows():
            yield str(row[PARSE_ERROR]) if PARSE_ERROR in row else row

    def folder(self, model_source: ModelSource) -> Path:
        """Return the folder of its shards, named by a hash of everything that they depend on."""
        manifest = open_manifest(self.uri, _COLUMNS)
        digest = hashlib.sha256()
        for path in manifest.paths:
            with manifest.filesystem.open_input_stream(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        checkpoint, codec_name = self.settings.init.checkpoint, self.settings.codec
        codec = resolve_codec(checkpoint or "", codec_name) if checkpoint or codec_name else ""
        vocabulary: Any = model_source.tokenizer
        dependencies = {
            "version": _SHARD_FORMAT_VERSION,
            "manifest": [self.uri, digest.hexdigest()],
            "voices": self.settings.data.voices,
            "codec": hash_weights(Path(codec)) if Path(codec).is_dir() else codec,
            "tokens": hashlib.sha256(json.dumps(vocabulary.get_vocab(), sort_keys=True).encode()).hexdigest(),
            "needs": dataclasses.asdict(AudioRequirements.from_config(model_source.config)),
        }
        name = hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.settings.output) / "prepared" / name


def prepare(settings: TrainingSettings, uri: str, model_source: ModelSource, workers: int | None) -> Path:
    """Prepare the samples of a manifest.

    Args:
        workers: Ray Data workers; None prepares in this process.

    Returns:
        The folder of the shards.

    Raises:
        BadInput: the manifest cannot be read, or has more invalid rows than `data.bad_rows` allows; the message lists
            the first ones.
    """
    source = ManifestSource(uri, settings)
    folder = source.folder(model_source)
    missing = [
        (first, rows)
        for first, rows in split_into_shards(source.rows())
        if needs_preparation(shard_path(folder, first))
    ]
    if missing:
        print_status(f"preparing {sum(len(rows) for _, rows in missing)} rows of {uri}")
        if workers:
            _prepare_with_ray(source, folder, missing, workers)
        else:
            _prepare_in_process(source, model_source, folder, missing)
    samples = open_samples(settings, folder, model_source)
    if len(samples.row_errors) > settings.data.bad_rows:
        more = len(samples.row_errors) - _MAX_SHOWN_ERRORS
        raise BadInput(
            f"the manifest {uri!r} has {len(samples.row_errors)} invalid rows, "
            f"data.bad_rows allows {settings.data.bad_rows}: "
            + "; ".join(samples.row_errors[:_MAX_SHOWN_ERRORS])
            + (f"; and {more} more" if more > 0 else "")
        )
    for row_error in samples.row_errors:
        print_status(f"skipped: {row_error}")
    return folder


def open_samples(settings: TrainingSettings, folder: Path, model_source: ModelSource) -> PreparedDataset:
    """Open the prepared samples of a folder as a dataset."""
    return PreparedDataset(
        folder,
        AudioRequirements.from_config(model_source.config),
        PositionCounter.from_config(model_source.config),
        settings.batch.longest,
    )


def _prepare_in_process(
    source: ManifestSource, model_source: ModelSource, folder: Path, shards: Sequence[tuple[int, list[Row | str]]]
) -> None:
    preparer = source.build_preparer(model_source)
    status_s = time.monotonic()
    for number, (first, rows) in enumerate(shards):
        preparer.write(shard_path(folder, first), rows, first)
        if time.monotonic() - status_s > _STATUS_INTERVAL_S:
            status_s = time.monotonic()
            print_status(f"prepared {number + 1} of {len(shards)} shards")


class _PrepareBatch:
    """Ray Data actor that writes shards."""

    def __init__(self, source: ManifestSource) -> None:
        torch.set_num_threads(THREADS_PER_CPU_WORKER)
        self._model_source = ModelSource.from_settings(source.settings.init)
        self._preparer = source.build_preparer(self._model_source)

    def __call__(self, table: pa.Table) -> pa.Table:
        for shard in table.to_pylist():
            self._preparer.write(Path(shard["path"]), json.loads(shard["rows"]), shard["first"])
        return table.select(["first"])


def _prepare_with_ray(
    source: ManifestSource, folder: Path, shards: Sequence[tuple[int, list[Row | str]]], workers: int
) -> None:
    import ray

    if not ray.is_initialized():
        connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Values that JSON lacks, such as dates, are in columns that samples do not use.
    items = [
        {"first": first, "path": str(shard_path(folder, first)), "rows": json.dumps(rows, default=str)}
        for first, rows in shards
    ]
    resources = ray.cluster_resources()
    gpu = min(resources.get("GPU", 0) / workers, 1)
    written = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _PrepareBatch,
        fn_constructor_args=(source,),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0 if resources.get("CPU", 1) <= workers else 1,
        num_gpus=gpu or None,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
    )
    for _ in written.iter_batches(batch_size=None, prefetch_batches=0):
        pass
