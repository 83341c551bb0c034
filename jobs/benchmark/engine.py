"""Audio seconds a second of the engine, against transformers' port in static batches with the same random weights.

Uneven requests, as in life: prompts of 30 to 800 positions that begin with one of four voices, answers of 25 to 1,500
frames, all drawn by sampling. The port gets them sorted by length, so that its batches waste as little as static
batches can. Only frames that were asked for count as audio.
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
from jobs.benchmark.model import SIZES, contenders, device_missing, step_bytes, vocabulary_end

SAMPLING = SamplingParams(do_sample=True, top_k=50)
NUM_VOICES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=sorted(SIZES), help="of the network: v2 on a GPU, else small")
    parser.add_argument("--slots", type=int, nargs="+", help="concurrent requests: 1 16 64 128 256 on a GPU, else 16")
    parser.add_argument("--requests", type=int, help="requests in all; three times the slots, at least 12")
    parser.add_argument("--longest", type=int, default=1500, help="frames of the longest answer")
    parser.add_argument("--longest-prompt", type=int, default=800, help="positions of the longest prompt")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--block-size", type=int, default=EngineSettings.block_size, help="positions of a KV block")
    parser.add_argument("--fp8-weights", action="store_true", help="products in 8 bits")
    parser.add_argument("--fp8-cache", action="store_true", help="keys and values in 8 bits")
    parser.add_argument("--without-port", action="store_true", help="do not measure the port beside it")
    parser.add_argument("--without-codec", action="store_true", help="do not measure with the codec beside it")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="instead: N short requests, memory watched")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if device_missing(arguments.device):
        raise SystemExit("--device cuda: this machine has no CUDA device that torch can use")
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    slots = arguments.slots or ([1, 16, 64, 128, 256] if on_cuda else [16])
    if arguments.quick:
        slots, arguments.requests, arguments.rounds = [4], 6, 1
        arguments.longest, arguments.longest_prompt = 60, 120
    if min(*slots, arguments.rounds, arguments.longest, arguments.longest_prompt // 30) < 1 or arguments.soak < 0:
        raise SystemExit(
            "--slots, --rounds, --longest must be positive, --longest-prompt at least 30, --soak not below 0"
        )
    size = arguments.size or ("v2" if on_cuda and not arguments.soak else "tiny" if arguments.soak else "small")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    model, port = contenders(SIZES[size], device, dtype)
    print(f"{size}: {model.num_parameters() / 1e6:.0f} M parameters, {dtype}, {measure.machine(device)}")
    about = {"size": size, "dtype": str(dtype), "machine": measure.machine(device)}
    if arguments.soak:
        settings = _settings(arguments, slots[0])
        return about | soak(Engine(model, settings), model.config, arguments.soak)
    bench = Bench(arguments, model, None if arguments.without_port else port)
    if arguments.without_port:
        del port
    rows = [bench.row(count) for count in slots]
    return about | {"read_gb_per_s": round(bench.bandwidth / 1e9, 1), "rows": rows}


def _settings(arguments: argparse.Namespace, slots: int) -> EngineSettings:
    return EngineSettings(
        max_slots=slots,
        block_size=arguments.block_size,
        fp8_weights=arguments.fp8_weights,
        fp8_cache=arguments.fp8_cache,
        # A random network may well go round in circles, and is meant to go on.
        early_stopping=EarlyStoppingLimits(loop_frames=None),
    )


class Bench:
    """Contenders on one device, measured at several numbers of slots."""

    def __init__(self, arguments: argparse.Namespace, model: HiggsAudioModel, port: Any) -> None:
        self._arguments, self._model, self._port = arguments, model, port
        self._device = model.embed_tokens_device
        on_cuda = self._device.type == "cuda"
        self.bandwidth = measure.read_bandwidth(self._device, 4096 if on_cuda else 256)
        self._codec = None
        if not arguments.without_codec:
            codec = HiggsAudioCodec(CODEC_SIZES["published" if on_cuda else "small"])
            self._codec = codec.to(self._device).cast(model.dtype).eval()

    def row(self, slots: int) -> dict[str, Any]:
        """One row of the table, printed and returned."""
        arguments, config = self._arguments, self._model.config
        count = arguments.requests or max(3 * slots, 12)
        requests = uneven_requests(config, count, arguments.longest, arguments.longest_prompt)
        audio_s = sum(request.max_frames for request in requests) / FRAMES_PER_SECOND
        print(
            f"{slots} at once of {count} requests, answers of 25 to {arguments.longest} frames "
            f"({audio_s:.0f} s in all), {arguments.rounds} rounds"
        )
        engine = Engine(self._model, _settings(arguments, slots))
        passes: list[Pass] = []

        def run_engine() -> None:
            engine.pool.clear_prefix_cache()
            passes.append(run_through(engine, requests))

        rivals: dict[str, Any] = {"engine": run_engine}
        if self._codec is not None:
            worker = CodecWorker(self._codec)

            def run_with_codec() -> None:
                engine.pool.clear_prefix_cache()
                asyncio.run(speak_all(engine, worker, requests))

            rivals["with codec"] = run_with_codec
        if self._port is not None:
            rivals = {"port": lambda: run_port(config, self._port, requests, slots)} | rivals
        timings = measure.in_turn(rivals, arguments.rounds, self._device)
        if self._codec is not None:
            worker.close()
        row: dict[str, Any] = {"slots": slots, "requests": count, "audio_s": audio_s}
        row |= {name: timings[name].rate(audio_s) for name in timings}
        row |= self._judged(engine, requests, timings, passes)
        _report(row, list(timings))
        return row

    def _judged(
        self,
        engine: Engine,
        requests: Sequence[Request],
        timings: Mapping[str, measure.Timing],
        passes: Sequence[Pass],
    ) -> dict[str, Any]:
        slots, counted = engine.settings.max_slots, passes[1:]
        median_s = {name: timing.median_s for name, timing in timings.items()}
        text = self._model.config.text_config
        kv_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads
        kv_bytes *= text.head_dim + 4 if engine.settings.fp8_cache else text.head_dim * self._model.dtype.itemsize
        weight_bytes = step_bytes(self._model) / (self._model.dtype.itemsize if engine.settings.fp8_weights else 1)
        positions = float(np.median([one.positions for one in counted]))
        floor_s = (weight_bytes + positions * kv_bytes) / self.bandwidth
        step_s = float(np.median([one.step_s for one in counted]))
        kernels = [getattr(engine.runner.attention, f"{use}_kernels", None) for use in ("decode", "prefill")]
        return {
            "ratio": round(median_s["port"] / median_s["engine"], 2) if "port" in median_s else None,
            "codec_share": round(median_s["engine"] / median_s["with codec"], 3) if "with codec" in median_s else None,
            "occupancy": round(float(np.median([one.occupancy for one in counted])), 3),
            "step_ms": round(1000 * step_s, 3),
            "step_of_floor": round(floor_s / step_s, 3),
            "first_frame_s": {str(count): first_frames(engine, requests, count) for count in sorted({1, slots})},
            "changed_frames": changed_frames(engine, requests[: min(2 * slots, 32)], passes[-1].frames),
            "attention": [one.name for one in kernels if one is not None],
        }


def _report(row: dict[str, Any], names: list[str]) -> None:
    for name in names:
        print(f"{name:>12} {_shown(row[name]):>24} audio s/s")
    shares = f"occupancy while requests wait {row['occupancy']:.1%}"
    if row["ratio"] is not None:
        shares = f"ratio {row['ratio']}, {shares}"
    if row["codec_share"] is not None:
        shares += f", with the codec beside it {row['codec_share']:.0%} of the engine's rate"
    print(f"   {shares}")
    print(
        f"   a full decode step takes {row['step_ms']:.2f} ms; reading what it needs takes {row['step_of_floor']:.0%}"
    )
    for count, seconds in row["first_frame_s"].items():
        shown = f"median {1000 * seconds['median']:.0f} ms, 95 % within {1000 * seconds['p95']:.0f} ms"
        print(f"   first frame, {count} at once: {shown}")
    print(f"   frames that differ between alone and together: {row['changed_frames']:.4%}")
    if row["attention"]:
        print(f"   attention of steps and of prompts: {', '.join(row['attention'])}")


@dataclasses.dataclass
class Pass:
    """One run of all requests.

    Attributes:
        frames: what each said.
        occupancy: share of slots that spoke in decode steps while requests waited.
        step_s: median seconds of a step in which all slots spoke and no prompt was run.
        positions: of all slots together, in the median step of that kind.
    """

    frames: dict[str, np.ndarray]
    occupancy: float
    step_s: float
    positions: float


def run_through(engine: Engine, requests: Sequence[Request]) -> Pass:
    """Run requests to their ends."""
    for request in requests:
        engine.add(request)
    parts: dict[str, list[np.ndarray]] = {request.id: [] for request in requests}
    speaking = possible = 0
    full_steps: list[tuple[float, int]] = []
    metrics, slots = engine.metrics, engine.settings.max_slots
    while engine.has_work:
        waiting = engine.scheduler.waiting > 0
        before, steps, prompts = metrics.slot_steps, metrics.steps, metrics.prefill_positions
        start = time.perf_counter()
        for update in engine.step():
            parts[update.request_id].append(update.frames)
        taken_s, spoke = time.perf_counter() - start, metrics.slot_steps - before
        if waiting and metrics.steps > steps:
            speaking, possible = speaking + spoke, possible + slots
        if spoke == slots and metrics.prefill_positions == prompts:
            full_steps.append((taken_s, sum(one.length for one in engine.scheduler.running.values())))
    frames = {name: np.concatenate(part, axis=1) for name, part in parts.items()}
    step_s, positions = np.median(full_steps, axis=0).tolist() if full_steps else (float("nan"),) * 2
    return Pass(frames, speaking / max(possible, 1), step_s, positions)


async def speak_all(engine: Engine, worker: CodecWorker, requests: Sequence[Request]) -> None:
    """Run requests to their ends, each clip decoded to samples as its frames come."""
    loop = EngineLoop(engine)

    async def speak(request: Request) -> None:
        clip = worker.open_clip()
        async for update in loop.generate(dataclasses.replace(request, stream_every=25)):
            await clip.push(update.frames)
        await clip.finish()

    try:
        await asyncio.gather(*(speak(request) for request in requests))
    finally:
        loop.close()


def changed_frames(engine: Engine, requests: Sequence[Request], together: dict[str, np.ndarray]) -> float:
    """Share of frames that a request's clip does not have in common with the one that it speaks alone."""
    changed = total = 0
    for request in requests:
        alone = run_through(engine, [request]).frames[request.id]
        changed += int((alone != together[request.id]).any(axis=0).sum())
        total += alone.shape[1]
    return changed / total


def first_frames(engine: Engine, requests: Sequence[Request], count: int, rounds: int = 5) -> dict[str, float]:
    """Seconds until requests that come at once, of voices that are known, have their first frames: median and 95 %."""
    asked = [
        dataclasses.replace(requests[index % len(requests)], id=f"first-{index}", max_frames=25, stream_every=1)
        for index in range(count)
    ]
    waits_s: list[float] = []
    for turn in range(rounds + 1):
        engine.metrics.first_frame_s.clear()
        for request in asked:
            engine.add(request)
        while engine.has_work:
            engine.step()
        if turn:
            waits_s += engine.metrics.first_frame_s
    return {"median": round(float(np.median(waits_s)), 4), "p95": round(float(np.quantile(waits_s, 0.95)), 4)}


def uneven_requests(config: HiggsAudioConfig, count: int, longest: int, longest_prompt: int) -> list[Request]:
    """Requests in random order, more short ones than long ones."""
    random = np.random.RandomState(0)
    answers = np.geomspace(min(25, longest), longest, count).round().astype(int)
    random.shuffle(answers)
    voice_frames = np.linspace(longest_prompt // 50, longest_prompt // 2, NUM_VOICES).round().astype(int)
    codebooks, size = config.audio_num_codebooks, config.audio_codebook_size
    voices = [random.randint(0, size, (codebooks, frames)) for frames in voice_frames]
    transcripts = [random.randint(0, vocabulary_end(config), max(frames // 5, 1)).tolist() for frames in voice_frames]
    requests = []
    for index, frames in enumerate(answers.tolist()):
        voice = index % NUM_VOICES
        taken = len(transcripts[voice]) + voice_frames[voice] + codebooks + 3
        text = random.randint(0, vocabulary_end(config), random.randint(1, max(longest_prompt - taken, 2))).tolist()
        prompt = [*transcripts[voice], config.audio_out_token_idx, *text, config.audio_out_bos_token_id]
        requests.append(Request(str(index), tuple(prompt), (voices[voice],), SAMPLING, seed=index, max_frames=frames))
    return requests


def run_port(config: HiggsAudioConfig, port: Any, requests: Sequence[Request], batch_size: int) -> None:
    """The port's best: neighbours of similar length in static batches."""
    ordered = sorted(requests, key=lambda request: request.max_frames)
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        port.generate(
            **port_inputs(config, batch, port.device),
            max_new_tokens=batch[-1].max_frames + config.audio_num_codebooks,
            do_sample=True,
            top_k=SAMPLING.top_k,
        )


def port_inputs(config: HiggsAudioConfig, requests: Sequence[Request], device: torch.device) -> dict[str, torch.Tensor]:
    """Requests as the port wants them: a placeholder a frame, padded on the left, codes (batch, frames, codebooks)."""
    bos, eos = config.audio_stream_bos_id or 0, config.audio_stream_eos_id or 0
    streams = [to_stream(torch.from_numpy(request.clips[0]), bos, eos).T for request in requests]
    rows = []
    for request, stream in zip(requests, streams, strict=True):
        ids = torch.tensor(request.input_ids)
        rows.append(ids.repeat_interleave(torch.where(ids == config.audio_out_token_idx, len(stream), 1)))
    longest, most = max(len(row) for row in rows), max(len(stream) for stream in streams)
    ids = torch.full((len(rows), longest), config.pad_token_id or 0)
    codes = torch.zeros(len(rows), most, config.audio_num_codebooks, dtype=torch.int64)
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for index, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        ids[index, longest - len(row) :] = row
        codes[index, : len(stream)], mask[index, : len(stream)] = stream, True
    inputs = {
        "input_ids": ids,
        "attention_mask": ids.ne(config.pad_token_id or 0).long(),
        "audio_input_ids": codes,
        "audio_input_ids_mask": mask,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def soak(engine: Engine, config: HiggsAudioConfig, count: int) -> dict[str, Any]:
    """Many short requests through one engine, some of them cancelled, with what they leave behind."""
    requests = uneven_requests(config, 64, 25, 100)
    marks: list[dict[str, float]] = []
    every, ended = max(count // 10, 1), 0
    added = 0
    while ended < count:
        while added < count and engine.scheduler.waiting < engine.settings.max_slots:
            engine.add(dataclasses.replace(requests[added % 64], id=f"soak-{added}", seed=added, priority=added % 2))
            added += 1
            if added % 50 == 0:
                engine.cancel(f"soak-{added - 5}")
        for update in engine.step():
            ended += update.finish_reason is not None
            if update.finish_reason is not None and ended % every == 0:
                marks.append({"requests": ended, "rss_mb": _rss_mb(), "blocks_held": engine.pool.used})
                print(marks[-1], flush=True)
    growth_mb = marks[-1]["rss_mb"] - marks[min(1, len(marks) - 1)]["rss_mb"]
    print(f"memory of the process grew by {growth_mb:.1f} MB over the last eight tenths")
    return {
        "soak": count,
        "marks": marks,
        "growth_mb": round(growth_mb, 1),
        "blocks_held_at_the_end": engine.pool.used,
        "cancelled": engine.metrics.finished[FinishReason.CANCELLED],
    }


def _rss_mb() -> float:
    """Of this process, now; where the system does not say, at most so far."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(pages * resource.getpagesize() / 2**20, 1)


def _shown(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f})"
