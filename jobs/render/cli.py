"""`python -m jobs.render`: renders the recordings of a finished job in another format, from its stored codes.

    results + codes ─▶ missing rows ─▶ Ray Data with a pool of codecs ─▶ audio files and results

The output folder is like a job's, and `jobs.export` reads it, too. Interrupted runs can be resumed; a row is rendered
again if its script has changed. Exit status: 0 all rows succeeded · 1 the run failed or was stopped · 2 invalid
arguments · 3 finished, but rows failed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from higgs_model.audio.writers import FORMATS, check_sample_rate
from higgs_model.errors import BadInput
from higgs_model.synthesizer.loading import load_codec
from jobs.render.renderer import BatchRenderer, RenderSettings
from jobs.runtime.cli import ArgumentParser, print_status
from jobs.runtime.ray_cluster import THREADS_PER_CPU_WORKER, connect
from jobs.storage.backends import StorageBackend, open_storage
from jobs.storage.result_table import RESULTS, ResultTable, read_results

JOB_FAILED, ROWS_FAILED = 1, 3
SETTINGS_FILE = "render.json"
_ROWS_PER_BATCH = 4
_MIN_SAVE_INTERVAL_S, _SAVES_PER_RUN = 1.0, 500


def render(arguments: Sequence[str]) -> int:
    """Run the rendering that a command line describes; return the exit status."""
    flags = _build_parser().parse_args(arguments)
    source = open_storage(flags.results)
    table = _rows_with_audio(source)
    settings = _resolve_settings(flags, source, table)
    output = open_storage(settings.output)
    if output.uri == source.uri:
        raise BadInput("--output is the job's own folder; choose another one")
    _check_output(output, settings)
    results = ResultTable(output, table.schema, f"render-{uuid.uuid4().hex[:8]}")
    results.take_ownership()
    results.load()
    load_codec(settings.model, settings.codec, torch.device("cpu"))  # Fail early.
    missing = _missing_rows(table, results)
    print_status(
        f"{len(table)} recordings, {len(table) - len(missing)} already done; to {settings.output} as {settings.format}"
    )
    counts = collections.Counter[str]()
    try:
        if len(missing):
            counts = _render_rows(settings, missing, results, flags.workers)
    except KeyboardInterrupt:
        print_status("stopped; run the same command again to resume")
        return JOB_FAILED
    except Exception as error:  # noqa: BLE001  (reported in one line here, and in full in Ray's logs)
        last = (str(error).strip().splitlines() or [""])[-1][:300]
        print_status(f"error: rendering failed: {type(error).__name__}: {last}; run the same command again to resume")
        return JOB_FAILED
    failed = counts["failed"]
    print_status(f"{len(missing) - failed} rendered, {failed} failed; results are in {output.locate('results')}")
    return ROWS_FAILED if failed else 0


def _rows_with_audio(source: StorageBackend) -> pa.Table:
    """Return the results that have audio, in the manifest's order."""
    table = read_results(source)
    if missing := sorted({"id", "status", "chunks", "script_sha256", "manifest_row"} - set(table.column_names)):
        raise BadInput(f"{source.locate('results')} is not a result table: missing columns {', '.join(missing)}")
    table = table.filter(pc.not_equal(table["status"], "failed"))
    if len(table) == 0:
        raise BadInput(f"no result in {source.locate('results')} has audio")
    if not source.list_files("codes"):
        raise BadInput(f"{source.uri} has no codes; run the job with --keep-codes")
    return table.sort_by([("manifest_row", "ascending"), ("id", "ascending")])


def _resolve_settings(flags: Any, source: StorageBackend, table: pa.Table) -> RenderSettings:
    models = sorted({*table["model"].to_pylist()})
    if flags.model is None and len(models) > 1:
        raise BadInput(f"the results are from several models ({', '.join(models[:5])}); pass --model to choose a codec")
    if flags.sample_rate is not None:
        check_sample_rate(flags.format, flags.sample_rate)
    return RenderSettings(
        results=flags.results,
        output=flags.output or f"{flags.results.rstrip('/')}-{flags.format}",
        model=flags.model or models[0],
        codec=flags.codec or (None if flags.model else _job_codec(source)),
        format=flags.format,
        sample_rate=flags.sample_rate,
        loudness_lufs=flags.loudness_lufs,
        true_peak_dbtp=flags.true_peak_dbtp,
    )


def _job_codec(source: StorageBackend) -> str | None:
    """Return the codec in the job's settings, if any."""
    try:
        codec = json.loads(source.read("job.json"))["settings"]["codec"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return None if codec is None else str(codec)


def _check_output(output: StorageBackend, settings: RenderSettings) -> None:
    """Check that an output folder is new, or was rendered with the same settings.

    Raises:
        BadInput: it was rendered with other settings, or has the results of another job.
    """
    expected = {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in ("results", "output")
    }
    try:
        existing = json.loads(output.read(SETTINGS_FILE))
    except FileNotFoundError:
        if output.list_files(RESULTS):
            raise BadInput(f"{output.uri} has the results of another job; choose another --output") from None
        output.write(SETTINGS_FILE, json.dumps(expected, indent=2).encode())
        return
    except ValueError:
        existing = {}
    if existing != expected:
        differing = ", ".join(sorted(name for name in expected if existing.get(name) != expected[name]))
        raise BadInput(f"{output.uri} was rendered with other settings ({differing}); choose another --output")
    for subfolder in ("audio", RESULTS):
        output.remove_partial(subfolder)


def _missing_rows(table: pa.Table, results: ResultTable) -> pa.Table:
    """Return the rows without an up-to-date result; remove outdated results."""
    indices, row_ids = [], []
    for index, (row_id, digest) in enumerate(
        zip(table["id"].to_pylist(), table["script_sha256"].to_pylist(), strict=True)
    ):
        done = results.finished.get(row_id)
        if done is None or done.script_sha256 != digest:
            indices.append(index)
            row_ids.append(row_id)
    results.remove(row_ids)
    return table.take(pa.array(indices, pa.int64())).combine_chunks()


def _render_rows(
    settings: RenderSettings, missing: pa.Table, results: ResultTable, workers: int | None
) -> collections.Counter[str]:
    """Render rows and store their results as they arrive; return the number of rows by status."""
    import ray

    owns_ray = not ray.is_initialized()
    if owns_ray:
        connect()
    counts = collections.Counter[str]()
    start_s = saved_s = time.monotonic()
    unsaved: list[dict[str, Any]] = []
    try:
        for rows in _render_batches(settings, missing, workers):
            unsaved += rows
            counts.update(row["status"] for row in rows)
            now_s = time.monotonic()
            if now_s - saved_s > max(_MIN_SAVE_INTERVAL_S, (now_s - start_s) / _SAVES_PER_RUN):
                results.append(unsaved)
                unsaved, saved_s = [], now_s
                print_status(f"{counts.total()}/{len(missing)} recordings, {counts['failed']} failed")
    finally:
        if unsaved:
            results.append(unsaved)
        if owns_ray:
            ray.shutdown()
    return counts


def _render_batches(settings: RenderSettings, missing: pa.Table, workers: int | None) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of result rows as they are rendered."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A single row may be hours long.
    context.execution_no_progress_timeout_s = -1
    cpus = ray.cluster_resources().get("CPU", 1.0)
    num_workers = workers or max(int(cpus // THREADS_PER_CPU_WORKER), 1)
    blocks = [missing.slice(start, _ROWS_PER_BATCH) for start in range(0, len(missing), _ROWS_PER_BATCH)]
    rendered = ray.data.from_arrow(blocks).map_batches(
        BatchRenderer,
        fn_constructor_args=(settings,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0 if cpus <= num_workers else 1,
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(blocks))),
    )
    for table in rendered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield table.to_pylist()


def _number_in_range(number_type: type[int] | type[float], minimum: int, maximum: int) -> Callable[[str], float]:
    """Return an argparse type for a number within bounds."""

    def parse_number(text: str) -> float:
        try:
            value = number_type(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; expected {minimum} to {maximum}")
        return value

    return parse_number


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jobs.render", description="Render a job's recordings in another format.")
    parser.add_argument("--results", required=True, metavar="FOLDER", help="output of a job with --keep-codes")
    parser.add_argument("--format", required=True, choices=FORMATS, help="audio format")
    parser.add_argument("--output", metavar="FOLDER", help="output folder (default: RESULTS-FORMAT)")
    parser.add_argument(
        "--sample-rate",
        type=_number_in_range(int, 8000, 192_000),
        metavar="HZ",
        help="sample rate of the audio files (default: the codec's)",
    )
    loudness, peak = _number_in_range(float, -60, 0), _number_in_range(float, -40, 0)
    parser.add_argument("--loudness-lufs", type=loudness, metavar="LUFS", help="target loudness of each recording")
    parser.add_argument("--true-peak-dbtp", type=peak, metavar="DBTP", help="limit each recording's true peak")
    parser.add_argument("--model", help="model whose codec to use (default: the job's model)")
    parser.add_argument("--codec", help="folder or Hub repository of the codec (default: the job's)")
    parser.add_argument(
        "--workers",
        type=_number_in_range(int, 1, 100_000),
        metavar="N",
        help="worker actors (default: one per two CPU cores)",
    )
    return parser
