"""Seconds of audio per second of the engine, compared with transformers' port in static batches, same random weights.

Requests are realistically uneven: prompts of 30 to 800 positions that begin with one of four voices, outputs of 25 to
1,500 frames, all sampled. The port gets them sorted by length, which minimizes the waste of static batches. Only
requested frames count as audio.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from higgs_model import HiggsAudioCodec, HiggsAudioConfig, HiggsAudioModel
from higgs_model.delay import to_stream
from higgs_model.engine import Engine, EngineSettings, FinishReason, Request
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.engine.loop import EngineLoop
from higgs_model.engine.metrics import FRAMES_PER_SECOND
from higgs_model.sampling import SamplingParams
from jobs.benchmark import measure
from jobs.benchmark.codec import SIZES as CODEC_SIZES
from jobs.benchmark.model import SIZES, build_contenders, is_cuda_missing, text_vocab_size, weight_bytes_per_step

SAMPLING = SamplingParams(do_sample=True, top_k=50)
NUM_VOICES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument(
        "--size", choices=sorted(SIZES), help="dimensions of the network; default: v2 on a GPU, else small"
    )
    parser.add_argument(
        "--slots", type=int, nargs="+", help="concurrent requests; default: 1 16 64 128 256 on a GPU, else 16"
    )
    parser.add_argument("--requests", type=int, help="number of requests; default: three per slot, at least 12")
    parser.add_argument("--longest", type=int, default=1500, help="frames of the longest output")
    parser.add_argument("--longest-prompt", type=int, default=800, help="positions of the longest prompt")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--block-size", type=int, default=EngineSettings.block_size, help="positions per KV block")
    parser.add_argument("--fp8-weights", action="store_true", help="fp8 weights")
    parser.add_argument("--fp8-cache", action="store_true", help="fp8 KV cache")
    parser.add_argument("--without-port", action="store_true", help="do not measure the port")
    parser.add_argument("--without-codec", action="store_true", help="do not measure the engine with the codec")
    parser.add_argument(
        "--soak", type=int, default=0, metavar="N", help="instead: run N short requests and sample memory"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, as a smoke test")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if is_cuda_missing(arguments.device):
        raise SystemExit("--device cuda: this machine has no CUDA device that torch can use")
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    slots = arguments.slots or ([1, 16, 64, 128, 256] if on_cuda else [16])
    if arguments.quick:
        slots, arguments.requests, arguments.rounds = [4], 6, 1
        arguments.longest, arguments.longest_prompt = 60, 120
    if min(*slots, arguments.rounds, arguments.longest, arguments.longest_prompt // 30) < 1 or arguments.soak < 0:
        raise SystemExit(
            "--slots, --rounds, --longest must be positive, --longest-prompt at least 30, --soak not negative"
        )
    size = arguments.size or ("v2" if on_cuda and not arguments.soak else "tiny" if arguments.soak else "small")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    model, port = build_contenders(SIZES[size], device, dtype)
    print(f"{size}: {model.num_parameters() / 1e6:.0f} M parameters, {dtype}, {measure.describe_machine(device)}")
    conditions = {"size": size, "dtype": str(dtype), "machine": measure.describe_machine(device)}
    if arguments.soak:
        settings = _settings(arguments, slots[0])
        return conditions | soak(Engine(model, settings), model.config, arguments.soak)
    benchmark = EngineBenchmark(arguments, model, None if arguments.without_port else port)
    if arguments.without_port:
        del port
    rows = [benchmark.measure_row(count) for count in slots]
    return conditions | {"read_gb_per_s": round(benchmark.bandwidth / 1e9, 1), "rows": rows}


def _settings(arguments: argparse.Namespace, slots: int) -> EngineSettings:
    return EngineSettings(
        max_slots=slots,
        block_size=arguments.block_size,
        fp8_weights=arguments.fp8_weights,
        fp8_cache=arguments.fp8_cache,
        # A random network may loop, which must not stop a request early.
        early_stopping=EarlyStoppingLimits(loop_frames=None),
    )


class EngineBenchmark:
    """Measures the contenders on one device at several numbers of slots."""

    def __init__(self, arguments: argparse.Namespace, model: HiggsAudioModel, port: Any) -> None:
        self._arguments, self._model, self._port = arguments, model, port
        self._device = model.embed_tokens_device
        on_cuda = self._device.type == "cuda"
        self.bandwidth = measure.measure_read_bandwidth(self._device, 4096 if on_cuda else 256)
        self._codec = None
        if not arguments.without_codec:
            codec = HiggsAudioCodec(CODEC_SIZES["published" if on_cuda else "small"])
            self._codec = codec.to(self._device).cast(model.dtype).eval()

    def measure_row(self, slots: int) -> dict[str, Any]:
        """Measure, print and return one row of the table."""
        arguments, config = self._arguments, self._model.config
        count = arguments.requests or max(3 * slots, 12)
        requests = draw_requests(config, count, arguments.longest, arguments.longest_prompt)
        audio_s = sum(request.max_frames for request in requests) / FRAMES_PER_SECOND
        print(
            f"{count} requests, {slots} concurrent, outputs of 25 to {arguments.longest} frames "
            f"({audio_s:.0f} s in total), {arguments.rounds} rounds"
        )
        engine = Engine(self._model, _settings(arguments, slots))
        passes: list[PassResult] = []

        def run_engine() -> None:
            engine.pool.clear_prefix_cache()
            passes.append(run_to_completion(engine, requests))

        contenders: dict[str, Any] = {"engine": run_engine}
        if self._codec is not None:
            worker = CodecWorker(self._codec)

            def run_with_codec() -> None:
                engine.pool.clear_prefix_cache()
                asyncio.run(run_with_decoding(engine, worker, requests))

            contenders["with codec"] = run_with_codec
        if self._port is not None:
            contenders = {"port": lambda: run_port(config, self._port, requests, slots)} | contenders
        timings = measure.time_interleaved(contenders, arguments.rounds, self._device)
        if self._codec is not None:
            worker.close()
        row: dict[str, Any] = {"slots": slots, "requests": count, "audio_s": audio_s}
        row |= {name: timings[name].rate(audio_s) for name in timings}
        row |= self._compute_metrics(engine, requests, timings, passes)
        _print_row(row, list(timings))
        return row

    def _compute_metrics(
        self,
        engine: Engine,
        requests: Sequence[Request],
        timings: Mapping[str, measure.Timing],
        passes: Sequence[PassResult],
    ) -> dict[str, Any]:
        slots, counted = engine.settings.max_slots, passes[1:]
        median_s = {name: timing.median_s for name, timing in timings.items()}
        text = self._model.config.text_config
        kv_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads
        kv_bytes *= text.head_dim + 4 if engine.settings.fp8_cache else text.head_dim * self._model.dtype.itemsize
        weight_bytes = weight_bytes_per_step(self._model) / (
            self._model.dtype.itemsize if engine.settings.fp8_weights else 1
        )
        positions = float(np.median([result.positions for result in counted]))
        floor_s = (weight_bytes + positions * kv_bytes) / self.bandwidth
        step_s = float(np.median([result.step_s for result in counted]))
        kernels = [getattr(engine.runner.attention, f"{use}_kernels", None) for use in ("decode", "prefill")]
        return {
            "ratio": round(median_s["port"] / median_s["engine"], 2) if "port" in median_s else None,
            "codec_share": round(median_s["engine"] / median_s["with codec"], 3) if "with codec" in median_s else None,
            "occupancy": round(float(np.median([result.occupancy for result in counted])), 3),
            "step_ms": round(1000 * step_s, 3),
            "step_of_floor": round(floor_s / step_s, 3),
            "first_frame_s": {str(count): time_to_first_frame(engine, requests, count) for count in sorted({1, slots})},
            "changed_frames": changed_frame_share(engine, requests[: min(2 * slots, 32)], passes[-1].frames),
            "attention": [kernel.name for kernel in kernels if kernel is not None],
        }


def _print_row(row: dict[str, Any], names: list[str]) -> None:
    for name in names:
        print(f"{name:>12} {_format_rate(row[name]):>24} audio s/s")
    shares = f"occupancy while requests wait {row['occupancy']:.1%}"
    if row["ratio"] is not None:
        shares = f"ratio {row['ratio']}, {shares}"
    if row["codec_share"] is not None:
        shares += f", {row['codec_share']:.0%} of the engine's rate with the codec"
    print(f"   {shares}")
    print(f"   decode step with all slots: {row['step_ms']:.2f} ms, memory floor {row['step_of_floor']:.0%} of it")
    for count, seconds in row["first_frame_s"].items():
        quantiles = f"median {1000 * seconds['median']:.0f} ms, p95 {1000 * seconds['p95']:.0f} ms"
        print(f"   time to first frame, {count} concurrent: {quantiles}")
    print(f"   frames that change when requests run alone: {row['changed_frames']:.4%}")
    if row["attention"]:
        print(f"   attention kernels (decode, prefill): {', '.join(row['attention'])}")


@dataclasses.dataclass
class PassResult:
    """One run of all requests.

    Attributes:
        frames: the frames of each request, by id.
        occupancy: share of slots that decoded, in decode steps while requests waited.
        step_s: median seconds of a decode step with all slots in use and no prefill.
        positions: median number of positions in the KV cache, all slots together, in these steps.
    """

    frames: dict[str, np.ndarray]
    occupancy: float
    step_s: float
    positions: float


def run_to_completion(engine: Engine, requests: Sequence[Request]) -> PassResult:
    """Run requests to completion and return their frames and statistics."""
    for request in requests:
        engine.add(request)
    parts: dict[str, list[np.ndarray]] = {request.id: [] for request in requests}
    busy_slots = possible_slots = 0
    full_steps: list[tuple[float, int]] = []
    metrics, slots = engine.metrics, engine.settings.max_slots
    while engine.has_work:
        waiting = engine.scheduler.waiting > 0
        slot_steps, steps, prefilled = metrics.slot_steps, metrics.steps, metrics.prefill_positions
        start_s = time.perf_counter()
        for update in engine.step():
            parts[update.request_id].append(update.frames)
        step_s, decoded = time.perf_counter() - start_s, metrics.slot_steps - slot_steps
        if waiting and metrics.steps > steps:
            busy_slots, possible_slots = busy_slots + decoded, possible_slots + slots
        if decoded == slots and metrics.prefill_positions == prefilled:
            full_steps.append((step_s, sum(sequence.length for sequence in engine.scheduler.running.values())))
    frames = {name: np.concatenate(part, axis=1) for name, part in parts.items()}
    median_step_s, positions = np.median(full_steps, axis=0).tolist() if full_steps else (float("nan"),) * 2
    return PassResult(frames, busy_slots / max(possible_slots, 1), median_step_s, positions)


async def run_with_decoding(engine: Engine, worker: CodecWorker, requests: Sequence[Request]) -> None:
    """Run requests to completion and decode the frames of each to samples as they are generated."""
    loop = EngineLoop(engine)

    async def generate(request: Request) -> None:
        clip = worker.open_clip()
        async for update in loop.generate(dataclasses.replace(request, stream_every=25)):
            await clip.push(update.frames)
        await clip.finish()

    try:
        await asyncio.gather(*(generate(request) for request in requests))
    finally:
        loop.close()


def changed_frame_share(engine: Engine, requests: Sequence[Request], together: dict[str, np.ndarray]) -> float:
    """Return the share of frames that change when each request runs alone instead of with the others."""
    changed = total = 0
    for request in requests:
        alone = run_to_completion(engine, [request]).frames[request.id]
        changed += int((alone != together[request.id]).any(axis=0).sum())
        total += alone.shape[1]
    return changed / total


def time_to_first_frame(engine: Engine, requests: Sequence[Request], count: int, rounds: int = 5) -> dict[str, float]:
    """Return the seconds from adding `count` requests at once to their first frames, with cached voices."""
    burst = [
        dataclasses.replace(requests[index % len(requests)], id=f"first-{index}", max_frames=25, stream_every=1)
        for index in range(count)
    ]
    times_s: list[float] = []
    for round_number in range(rounds + 1):
        engine.metrics.first_frame_s.clear()
        for request in burst:
            engine.add(request)
        while engine.has_work:
            engine.step()
        # The first round is the warm-up.
        if round_number:
            times_s += engine.metrics.first_frame_s
    return {"median": round(float(np.median(times_s)), 4), "p95": round(float(np.quantile(times_s, 0.95)), 4)}


def draw_requests(config: HiggsAudioConfig, count: int, longest: int, longest_prompt: int) -> list[Request]:
    """Return requests in random order, with log-uniform numbers of frames."""
    random = np.random.RandomState(0)
    frame_counts = np.geomspace(min(25, longest), longest, count).round().astype(int)
    random.shuffle(frame_counts)
    voice_frames = np.linspace(longest_prompt // 50, longest_prompt // 2, NUM_VOICES).round().astype(int)
    codebooks, size = config.audio_num_codebooks, config.audio_codebook_size
    voices = [random.randint(0, size, (codebooks, frames)) for frames in voice_frames]
    transcripts = [random.randint(0, text_vocab_size(config), max(frames // 5, 1)).tolist() for frames in voice_frames]
    requests = []
    for index, frames in enumerate(frame_counts.tolist()):
        voice = index % NUM_VOICES
        voice_positions = len(transcripts[voice]) + voice_frames[voice] + codebooks + 3
        text = random.randint(
            0, text_vocab_size(config), random.randint(1, max(longest_prompt - voice_positions, 2))
        ).tolist()
        prompt = [*transcripts[voice], config.audio_out_token_idx, *text, config.audio_out_bos_token_id]
        requests.append(Request(str(index), tuple(prompt), (voices[voice],), SAMPLING, seed=index, max_frames=frames))
    return requests


def run_port(config: HiggsAudioConfig, port: Any, requests: Sequence[Request], batch_size: int) -> None:
    """Run requests on the port in static batches of similar length, its best case."""
    ordered = sorted(requests, key=lambda request: request.max_frames)
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        port.generate(
            **to_port_inputs(config, batch, port.device),
            max_new_tokens=batch[-1].max_frames + config.audio_num_codebooks,
            do_sample=True,
            top_k=SAMPLING.top_k,
        )


def to_port_inputs(
    config: HiggsAudioConfig, requests: Sequence[Request], device: torch.device
) -> dict[str, torch.Tensor]:
    """Convert requests to the port's format: left-padded, one placeholder per frame, codes (batch, frame, codebook)."""
    bos, eos = config.audio_stream_bos_id or 0, config.audio_stream_eos_id or 0
    streams = [to_stream(torch.from_numpy(request.clips[0]), bos, eos).T for request in requests]
    rows = []
    for request, stream in zip(requests, streams, strict=True):
        ids = torch.tensor(request.input_ids)
        rows.append(ids.repeat_interleave(torch.where(ids == config.audio_out_token_idx, len(stream), 1)))
    longest_prompt, longest_stream = max(len(row) for row in rows), max(len(stream) for stream in streams)
    ids = torch.full((len(rows), longest_prompt), config.pad_token_id or 0)
    codes = torch.zeros(len(rows), longest_stream, config.audio_num_codebooks, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest_stream, dtype=torch.bool)
    for index, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        ids[index, longest_prompt - len(row) :] = row
        codes[index, : len(stream)], mask[index, : len(stream)] = stream, True
    inputs = {
        "input_ids": ids,
        "attention_mask": ids.ne(config.pad_token_id or 0).long(),
        "audio_input_ids": codes,
        "audio_input_ids_mask": mask,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def soak(engine: Engine, config: HiggsAudioConfig, count: int) -> dict[str, Any]:
    """Run many short requests, some of them cancelled, and return memory and KV blocks in use over time."""
    requests = draw_requests(config, 64, 25, 100)
    marks: list[dict[str, float]] = []
    mark_interval = max(count // 10, 1)
    added = ended = 0
    while ended < count:
        while added < count and engine.scheduler.waiting < engine.settings.max_slots:
            engine.add(dataclasses.replace(requests[added % 64], id=f"soak-{added}", seed=added, priority=added % 2))
            added += 1
            if added % 50 == 0:
                engine.cancel(f"soak-{added - 5}")
        for update in engine.step():
            ended += update.finish_reason is not None
            if update.finish_reason is not None and ended % mark_interval == 0:
                marks.append({"requests": ended, "rss_mb": _rss_mb(), "blocks_held": engine.pool.used})
                print(marks[-1], flush=True)
    growth_mb = marks[-1]["rss_mb"] - marks[min(1, len(marks) - 1)]["rss_mb"]
    print(f"process memory grew by {growth_mb:.1f} MB over the last 80 % of the requests")
    return {
        "soak": count,
        "marks": marks,
        "growth_mb": round(growth_mb, 1),
        "blocks_held_at_the_end": engine.pool.used,
        "cancelled": engine.metrics.finished[FinishReason.CANCELLED],
    }


def _rss_mb() -> float:
    """Return this process's resident memory in MiB; without /proc, its peak so far."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(pages * resource.getpagesize() / 2**20, 1)


def _format_rate(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f})"
