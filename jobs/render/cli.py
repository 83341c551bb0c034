"""`python -m jobs.render`: the recordings of a finished job in another format, from the codes that it has kept.

    results + codes ─▶ rows that are not there yet ─▶ Ray Data, codecs side by side ─▶ audio and results of their own

The output is a folder like a job's, so that `jobs.export` reads it, too. It is gone on with when it was interrupted,
and a row is made again when its script was. Exit status as the job's: 0 all rows are there · 1 it broke · 2 bad
arguments · 3 rows failed.
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

from higgs_model.audio.writers import FORMATS, check_rate
from higgs_model.errors import BadInput
from higgs_model.synthesizer.loading import load_codec
from jobs.render.renderer import RenderBatch, RenderSettings
from jobs.runtime.cli import Arguments, say
from jobs.runtime.ray_cluster import THREADS_A_CPU_WORKER, connect
from jobs.storage.backends import Folder, open_folder
from jobs.storage.result_table import RESULTS, Results, read_results

BROKEN, ROWS_FAILED = 1, 3
SETTINGS_FILE = "render.json"
_ROWS_A_BATCH = 4
_FASTEST_WRITE_S, _WRITES_A_RUN = 1.0, 500


def render(arguments: Sequence[str]) -> int:
    """Run what a command line describes; gives the exit status."""
    flags = _parser().parse_args(arguments)
    source = open_folder(flags.results)
    table = _speakable(source)
    settings = _settings(flags, source, table)
    output = open_folder(settings.output)
    if output.uri == source.uri:
        raise BadInput("--output is the job's own folder; give another, whose results will name the new files")
    _claim(output, settings)
    results = Results(output, table.schema, f"render-{uuid.uuid4().hex[:8]}")
    results.claim()
    results.load()
    load_codec(settings.model, settings.codec, torch.device("cpu"))  # Whatever it cannot open is said now.
    todo = _todo(table, results)
    say(f"{len(table)} recordings, {len(table) - len(todo)} already done; to {settings.output} as {settings.format}")
    counts = collections.Counter[str]()
    try:
        if len(todo):
            counts = _run(settings, todo, results, flags.workers)
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on")
        return BROKEN
    except Exception as error:  # noqa: BLE001  (whatever broke is said in a line, and in Ray's logs at length)
        last = (str(error).strip().splitlines() or [""])[-1][:300]
        say(f"error: it broke: {type(error).__name__}: {last}; run the same command again to go on")
        return BROKEN
    say(f"{len(todo) - counts['failed']} made, {counts['failed']} failed; results are in {output.locate('results')}")
    return ROWS_FAILED if counts["failed"] else 0


def _speakable(source: Folder) -> pa.Table:
    """The results that have audio, in the manifest's order."""
    table = read_results(source)
    if missing := sorted({"id", "status", "chunks", "script_sha256", "manifest_row"} - set(table.column_names)):
        raise BadInput(f"{source.locate('results')} are no job's results: they have no column {', '.join(missing)}")
    table = table.filter(pc.not_equal(table["status"], "failed"))
    if len(table) == 0:
        raise BadInput(f"no result in {source.locate('results')} has audio")
    if not source.names("codes"):
        raise BadInput(f"{source.uri} holds no codes; they are kept by a job with --keep-codes")
    return table.sort_by([("manifest_row", "ascending"), ("id", "ascending")])


def _settings(flags: Any, source: Folder, table: pa.Table) -> RenderSettings:
    models = sorted({*table["model"].to_pylist()})
    if flags.model is None and len(models) > 1:
        raise BadInput(f"the results are of several models ({', '.join(models[:5])}); say which codec with --model")
    if flags.sample_rate is not None:
        check_rate(flags.format, flags.sample_rate)
    return RenderSettings(
        results=flags.results,
        output=flags.output or f"{flags.results.rstrip('/')}-{flags.format}",
        model=flags.model or models[0],
        codec=flags.codec or (None if flags.model else _codec_of_job(source)),
        format=flags.format,
        sample_rate=flags.sample_rate,
        loudness_lufs=flags.loudness_lufs,
        true_peak_dbtp=flags.true_peak_dbtp,
    )


def _codec_of_job(source: Folder) -> str | None:
    """The codec that the job was told to use, if it was told."""
    try:
        codec = json.loads(source.get("job.json"))["settings"]["codec"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return None if codec is None else str(codec)


def _claim(output: Folder, settings: RenderSettings) -> None:
    """One folder holds recordings of one kind."""
    wanted = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("results", "output")}
    try:
        found = json.loads(output.get(SETTINGS_FILE))
    except FileNotFoundError:
        if output.names(RESULTS):
            raise BadInput(f"{output.uri} holds the results of something else; give another --output") from None
        output.put(SETTINGS_FILE, json.dumps(wanted, indent=2).encode())
        return
    except ValueError:
        found = {}
    if found != wanted:
        differ = ", ".join(sorted(name for name in wanted if found.get(name) != wanted[name]))
        raise BadInput(f"{output.uri} was made with other settings ({differ}); give another --output")
    for place in ("audio", RESULTS):
        output.sweep(place)


def _todo(table: pa.Table, results: Results) -> pa.Table:
    """Rows that are not there, or of another script than now; these are taken out."""
    wanted, outdated = [], []
    for index, (identity, digest) in enumerate(
        zip(table["id"].to_pylist(), table["script_sha256"].to_pylist(), strict=True)
    ):
        done = results.done.get(identity)
        if done is None or done.script_sha256 != digest:
            wanted.append(index)
            outdated.append(identity)
    results.take_out(outdated)
    return table.take(pa.array(wanted, pa.int64())).combine_chunks()


def _run(settings: RenderSettings, todo: pa.Table, results: Results, workers: int | None) -> collections.Counter[str]:
    """Make the rows; their results are written as they come. Gives how many there were of each status."""
    import ray

    own = not ray.is_initialized()
    if own:
        connect()
    counts = collections.Counter[str]()
    start_s = shown_s = time.monotonic()
    waiting: list[dict[str, Any]] = []
    try:
        for rows in _rendered(settings, todo, workers):
            waiting += rows
            counts.update(row["status"] for row in rows)
            now_s = time.monotonic()
            if now_s - shown_s > max(_FASTEST_WRITE_S, (now_s - start_s) / _WRITES_A_RUN):
                results.append(waiting)
                waiting, shown_s = [], now_s
                say(f"{counts.total()}/{len(todo)} recordings, {counts['failed']} failed")
    finally:
        if waiting:
            results.append(waiting)
        if own:
            ray.shutdown()
    return counts


def _rendered(settings: RenderSettings, todo: pa.Table, workers: int | None) -> Iterator[list[dict[str, Any]]]:
    """Result rows, a few together, as they are made."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # An hours-long recording is one row.
    context.execution_no_progress_timeout_s = -1
    cpus = ray.cluster_resources().get("CPU", 1.0)
    count = workers or max(int(cpus // THREADS_A_CPU_WORKER), 1)
    blocks = [todo.slice(at, _ROWS_A_BATCH) for at in range(0, len(todo), _ROWS_A_BATCH)]
    made = ray.data.from_arrow(blocks).map_batches(
        RenderBatch,
        fn_constructor_args=(settings,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0 if cpus <= count else 1,
        compute=ray.data.ActorPoolStrategy(size=min(count, len(blocks))),
    )
    for table in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield table.to_pylist()


def _between(kind: type[int] | type[float], least: int, most: int) -> Callable[[str], float]:
    """A number within bounds."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not possible; wanted {least} to {most}")
        return value

    return number


def _parser() -> Arguments:
    parser = Arguments(prog="python -m jobs.render", description="Make a job's recordings again in another format.")
    parser.add_argument("--results", required=True, metavar="FOLDER", help="output of a job with --keep-codes")
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the audio files")
    parser.add_argument("--output", metavar="FOLDER", help="where they go; by default the results' folder with -FORMAT")
    parser.add_argument(
        "--sample-rate",
        type=_between(int, 8000, 192_000),
        metavar="HZ",
        help="of the audio files; by default the codec's",
    )
    loudness, peak = _between(float, -60, 0), _between(float, -40, 0)
    parser.add_argument("--loudness-lufs", type=loudness, metavar="LUFS", help="bring each recording to this loudness")
    parser.add_argument("--true-peak-dbtp", type=peak, metavar="DBTP", help="keep each true peak below this")
    parser.add_argument("--model", help="whose codec made the codes; by default the job's")
    parser.add_argument("--codec", help="folder or repository of the codec; by default the job's")
    parser.add_argument(
        "--workers", type=_between(int, 1, 100_000), metavar="N", help="processes; by default one per two CPU cores"
    )
    return parser
