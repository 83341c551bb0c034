"""Seconds of audio per second of the codec, compared with transformers' port on the same random weights.

Recordings and clips are of uneven length. Measured: encode and decode clip by clip, batched decode, streaming decode.
Contenders alternate in the same run, and their samples are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import HubertConfig

from higgs_model import HiggsAudioCodec
from higgs_model.codec import HiggsAudioCodecConfig, StreamingDecoder
from jobs.benchmark import measure
from jobs.benchmark.codec_peer import load_transformers_port

SIZES = {
    "published": HiggsAudioCodecConfig(),
    "small": HiggsAudioCodecConfig(
        encoder_channels=8,
        decoder_channels=128,
        acoustic_dim=64,
        codebook_dim=16,
        semantic=HubertConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, conv_dim=(64,) * 7
        ),
    ),
}
PUSH_FRAMES = 25
"""Frames per `StreamingDecoder.push`: one second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--size", choices=sorted(SIZES), default="published", help="dimensions of the network")
    parser.add_argument("--clips", type=int, default=12, help="number of clips, of 1 s to --longest seconds")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds of the longest clip")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile our decoder")
    parser.add_argument("--quick", action="store_true", help="one short round, as a smoke test")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.quick:
        arguments.clips, arguments.longest, arguments.rounds = 3, 3.0, 1
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    codec, port = build_contenders(SIZES[arguments.size], device, dtype)
    if arguments.compile:
        codec.compile_decoder()
    clips = draw_clips(codec, arguments.clips, arguments.longest)
    audio_s = sum(clip.shape[1] for clip in clips) * codec.hop_samples / codec.sample_rate
    print(f"{arguments.size}: {_millions(codec):.1f} M parameters, {dtype}, {measure.describe_machine(device)}")
    print(f"{len(clips)} clips of 1 to {arguments.longest} s, {audio_s:.0f} s in all, {arguments.rounds} rounds")
    print(f"streaming: {PUSH_FRAMES} frames per push, look-ahead {StreamingDecoder(codec).lookahead_frames} frames")
    print(f"{'':>14} {'port audio s/s':>22} {'ours audio s/s':>22} {'ratio':>6}")
    rows: dict[str, dict[str, Any]] = {}
    for name, (run_port, run_ours) in _measurements(codec, port, clips, dtype).items():
        timings = measure.time_interleaved({"port": run_port, "ours": run_ours}, arguments.rounds, device)
        ratio = timings["port"].median_s / timings["ours"].median_s
        rows[name] = {contender: timing.rate(audio_s) for contender, timing in timings.items()} | {
            "ratio": round(ratio, 3)
        }
        print(f"{name:>14} {_format_rate(rows[name]['port']):>22} {_format_rate(rows[name]['ours']):>22} {ratio:>6.2f}")
    difference = _largest_difference(codec, port, clips, dtype)
    print(f"largest absolute difference between samples of port and batched decode: {difference:.1e}")
    return {
        "size": arguments.size,
        "dtype": str(dtype),
        "compiled": arguments.compile,
        "audio_s": audio_s,
        "rows": rows,
        "largest_difference": difference,
        "machine": measure.describe_machine(device),
    }


def build_contenders(
    config: HiggsAudioCodecConfig, device: torch.device, dtype: torch.dtype
) -> tuple[HiggsAudioCodec, Any]:
    """Return one random network as our codec and as the port."""
    torch.manual_seed(0)
    codec = HiggsAudioCodec(config).eval()
    port = load_transformers_port(codec).to(device=device, dtype=dtype)
    return codec.to(device).cast(dtype), port


def draw_clips(codec: HiggsAudioCodec, count: int, longest_s: float) -> list[Tensor]:
    """Return random codes (K, T) of clips of 1 s to `longest_s`, with log-uniform lengths in random order."""
    random = np.random.RandomState(0)
    seconds = longest_s ** random.permutation(np.linspace(0, 1, count))
    frames = [round(length * codec.sample_rate / codec.hop_samples) for length in seconds.tolist()]
    return [torch.from_numpy(random.randint(0, codec.codebook_size, (codec.num_codebooks, n))) for n in frames]


PortAndOurs = tuple[Callable[[], object], Callable[[], object]]


def _measurements(codec: HiggsAudioCodec, port: Any, clips: list[Tensor], dtype: torch.dtype) -> dict[str, PortAndOurs]:
    """Return the functions to time for each row of the table; the port always decodes clip by clip."""
    random = np.random.RandomState(1)
    recordings = [0.1 * random.standard_normal(clip.shape[1] * codec.hop_samples).astype(np.float32) for clip in clips]

    @torch.inference_mode()
    def port_encode() -> None:
        for recording in recordings:
            port.encode(torch.from_numpy(recording)[None, None].to(codec.device, dtype))

    def port_decode() -> None:
        _port_decode(port, clips, codec.device)

    return {
        "encode": (port_encode, lambda: [codec.encode(recording, codec.sample_rate) for recording in recordings]),
        "decode": (port_decode, lambda: [codec.decode(clip) for clip in clips]),
        "batched decode": (port_decode, lambda: codec.decode_batch(clips)),
        "stream decode": (port_decode, lambda: [_decode_streaming(codec, clip) for clip in clips]),
    }


def _decode_streaming(codec: HiggsAudioCodec, clip: Tensor) -> Tensor:
    stream = StreamingDecoder(codec)
    parts = [stream.push(codes_KT) for codes_KT in clip.split(PUSH_FRAMES, dim=1)]
    return torch.cat([*parts, stream.finish()])


@torch.inference_mode()
def _port_decode(port: Any, clips: list[Tensor], device: torch.device) -> list[Tensor]:
    return [port.decode(clip[None].to(device)).audio_values[0, 0] for clip in clips]


def _largest_difference(codec: HiggsAudioCodec, port: Any, clips: list[Tensor], dtype: torch.dtype) -> float:
    pairs = zip(codec.decode_batch(clips), _port_decode(port, clips, codec.device), strict=True)
    return max((ours - theirs.float()).abs().max().item() for ours, theirs in pairs)


def _millions(codec: HiggsAudioCodec) -> float:
    return sum(parameter.numel() for parameter in codec.parameters()) / 1e6


def _format_rate(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f})"
