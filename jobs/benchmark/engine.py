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
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from higgs_model import HiggsAudioCodec, HiggsAudioConfig
from higgs_model.delay import to_stream
from higgs_model.engine import Engine, EngineSettings, Request
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.loop import EngineLoop
from higgs_model.engine.metrics import FRAMES_A_SECOND
from higgs_model.engine.watch import WatchLimits
from higgs_model.sampling import SamplingParams
from jobs.benchmark import measure
from jobs.benchmark.codec import SIZES as CODEC_SIZES
from jobs.benchmark.model import SIZES, contenders, step_bytes, vocabulary_end

SAMPLING = SamplingParams(do_sample=True, top_k=50)
NUM_VOICES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="dimensions of the network")
    parser.add_argument("--slots", type=int, default=16, help="concurrent requests")
    parser.add_argument("--requests", type=int, default=48, help="requests in all")
    parser.add_argument("--longest", type=int, default=1500, help="frames of the longest answer")
    parser.add_argument("--longest-prompt", type=int, default=800, help="positions of the longest prompt")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without-port", action="store_true", help="measure the engine alone")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="instead: N short requests, memory watched")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.quick:
        arguments.slots, arguments.requests, arguments.rounds = 4, 6, 1
        arguments.longest, arguments.longest_prompt = 60, 120
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, port = contenders(SIZES[arguments.size], device, dtype)
    print(f"{arguments.size}: {model.num_parameters() / 1e6:.0f} M parameters, {dtype}, {measure.machine(device)}")
    settings = EngineSettings(max_slots=arguments.slots, watch=WatchLimits(loop_frames=None))
    if arguments.soak:
        return soak(Engine(model, settings), model.config, arguments.soak)
    requests = uneven_requests(model.config, arguments.requests, arguments.longest, arguments.longest_prompt)
    frames = sum(request.max_frames for request in requests)
    audio_s = frames / FRAMES_A_SECOND
    print(
        f"{len(requests)} requests, answers of 25 to {arguments.longest} frames ({audio_s:.0f} s in all), "
        f"{arguments.slots} at once, {arguments.rounds} rounds"
    )
    engine = Engine(model, settings)
    passes: list[Pass] = []

    def run_engine() -> None:
        engine.pool.forget()
        passes.append(run_through(engine, requests))

    rivals = {"engine": run_engine}
    codec = HiggsAudioCodec(CODEC_SIZES["published" if device.type == "cuda" else "demo"]).to(device).cast(dtype).eval()
    worker = CodecWorker(codec)

    def run_with_codec() -> None:
        engine.pool.forget()
        asyncio.run(speak_all(engine, worker, requests))

    rivals["with codec"] = run_with_codec
    if not arguments.without_port:
        rivals = {"port": lambda: run_port(model.config, port, requests, arguments.slots)} | rivals
    timings = measure.in_turn(rivals, arguments.rounds, device)
    table: dict[str, Any] = {name: timings[name].rate(audio_s) for name in timings}
    floor_s = step_bytes(model) / measure.read_bandwidth(device)
    table["ratio"] = None if arguments.without_port else round(timings["port"].median_s / timings["engine"].median_s, 2)
    table["codec_share"] = round(timings["engine"].median_s / timings["with codec"].median_s, 3)
    table["occupancy"] = round(float(np.median([one.occupancy for one in passes[1:]])), 3)
    table["step_of_floor"] = round(floor_s / float(np.median([one.step_s for one in passes[1:]])), 3)
    table["first_frame_s"] = _alone(engine, requests)
    table["changed_frames"] = changed_frames(engine, requests[: 2 * arguments.slots], passes[-1].frames)
    _report(table, list(timings))
    return {
        "size": arguments.size,
        "slots": arguments.slots,
        "audio_s": audio_s,
        "machine": measure.machine(device),
    } | table


def _report(table: dict[str, Any], names: list[str]) -> None:
    for name in names:
        print(f"{name:>10} {_shown(table[name]):>24} audio s/s")
    print(f"   ratio {table['ratio']}, occupancy while requests wait {table['occupancy']:.1%}")
    print(f"   with the codec beside it, {table['codec_share']:.0%} of the engine's rate")
    print(f"   a decode step reads its weights in {table['step_of_floor']:.0%} of the time that it takes")
    print(f"   first frame of a request alone {1000 * table['first_frame_s']:.0f} ms")
    print(f"   frames that differ between alone and together: {table['changed_frames']:.4%}")


@dataclasses.dataclass
class Pass:
    """One run of all requests: their frames, slots in use while requests waited, and seconds of a full step."""

    frames: dict[str, np.ndarray]
    occupancy: float
    step_s: float


def run_through(engine: Engine, requests: Sequence[Request]) -> Pass:
    """Run requests to their ends."""
    for request in requests:
        engine.add(request)
    parts: dict[str, list[np.ndarray]] = {request.id: [] for request in requests}
    speaking = possible = 0
    full_steps: list[float] = []
    while engine.has_work:
        waiting = engine.scheduler.waiting > 0
        before, prompts, start = engine.metrics.slot_steps, engine.metrics.prefill_positions, time.perf_counter()
        for update in engine.step():
            parts[update.request_id].append(update.frames)
        spoke = engine.metrics.slot_steps - before
        if waiting:
            speaking, possible = speaking + spoke, possible + engine.settings.max_slots
        if spoke == engine.settings.max_slots and engine.metrics.prefill_positions == prompts:
            full_steps.append(time.perf_counter() - start)
    frames = {name: np.concatenate(part, axis=1) for name, part in parts.items()}
    return Pass(frames, speaking / max(possible, 1), float(np.median(full_steps)) if full_steps else float("nan"))


async def speak_all(engine: Engine, worker: CodecWorker, requests: Sequence[Request]) -> None:
    """Run requests to their ends, each clip decoded to samples as its frames come."""
    loop = EngineLoop(engine)

    async def speak(request: Request) -> None:
        clip = worker.clip()
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


def _alone(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds until a request with a shared voice has its first frame, when nobody else is there."""
    request = dataclasses.replace(requests[0], max_frames=25, stream_every=1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        engine.add(request)
        while not any(update.frames.shape[1] for update in engine.step()):
            pass
        seconds.append(time.perf_counter() - start)
        while engine.has_work:
            engine.step()
    return float(np.median(seconds))


def uneven_requests(config: HiggsAudioConfig, count: int, longest: int, longest_prompt: int) -> list[Request]:
    """Requests in random order, more short ones than long ones."""
    random = np.random.RandomState(0)
    answers = np.geomspace(min(25, longest), longest, count).round().astype(int)
    random.shuffle(answers)
    voice_frames = np.linspace(longest_prompt // 8, longest_prompt // 2, NUM_VOICES).round().astype(int)
    codebooks, size = config.audio_num_codebooks, config.audio_codebook_size
    voices = [random.randint(0, size, (codebooks, frames)) for frames in voice_frames]
    transcripts = [random.randint(0, vocabulary_end(config), max(frames // 5, 1)).tolist() for frames in voice_frames]
    requests = []
    for index, frames in enumerate(answers.tolist()):
        voice = index % NUM_VOICES
        taken = len(transcripts[voice]) + voice_frames[voice] + codebooks + 3
        text = random.randint(0, vocabulary_end(config), random.randint(10, max(longest_prompt - taken, 11))).tolist()
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
    """Many short requests through one engine, with what they leave behind."""
    requests = uneven_requests(config, 64, 12, 60)
    marks: list[dict[str, int]] = []
    for index in range(count):
        engine.add(dataclasses.replace(requests[index % 64], id=f"soak-{index}", seed=index))
        while engine.scheduler.waiting > engine.settings.max_slots:
            engine.step()
        if (index + 1) % max(count // 10, 1) == 0:
            gc.collect()
            marks.append({"requests": index + 1, "peak_rss_mb": _peak_rss_mb(), "blocks_used": engine.pool.used})
            print(marks[-1])
    while engine.has_work:
        engine.step()
    return {"soak": count, "marks": marks, "blocks_used_at_the_end": engine.pool.used}


def _peak_rss_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _shown(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f})"
