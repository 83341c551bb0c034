"""Audio seconds a second of the codec, against transformers' port one by one with the same random weights.

Uneven recordings and clips, as in life: encode and decode one by one, decode in a batch, and decode as a stream.
Contenders take turns in the same run, and their codes and samples are compared.
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
from jobs.benchmark.codec_peer import transformers_port

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
"""Frames of each portion that the stream gets: one second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    parser.add_argument("--size", choices=sorted(SIZES), default="published", help="dimensions of the network")
    parser.add_argument("--clips", type=int, default=12, help="clips, from 1 s to --longest seconds")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds of the longest clip")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile our decoder")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.quick:
        arguments.clips, arguments.longest, arguments.rounds = 3, 3.0, 1
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    codec, port = contenders(SIZES[arguments.size], device, dtype)
    if arguments.compile:
        codec.compile_decoder()
    clips = uneven_clips(codec, arguments.clips, arguments.longest)
    audio_s = sum(clip.shape[1] for clip in clips) * codec.hop_samples / codec.sample_rate
    print(f"{arguments.size}: {_millions(codec):.1f} M parameters, {dtype}, {measure.machine(device)}")
    print(f"{len(clips)} clips of 1 to {arguments.longest} s, {audio_s:.0f} s in all, {arguments.rounds} rounds")
    print(f"stream: portions of {PUSH_FRAMES} frames, {StreamingDecoder(codec).lookahead_frames} frames of look-ahead")
    print(f"{'':>14} {'port a-s/s':>22} {'ours a-s/s':>22} {'ratio':>6}")
    rows: dict[str, dict[str, Any]] = {}
    for name, (theirs, ours) in _pairs(codec, port, clips, dtype).items():
        timings = measure.in_turn({"port": theirs, "ours": ours}, arguments.rounds, device)
        ratio = timings["port"].median_s / timings["ours"].median_s
        rows[name] = {who: timings[who].rate(audio_s) for who in timings} | {"ratio": round(ratio, 3)}
        print(f"{name:>14} {_shown(rows[name]['port']):>22} {_shown(rows[name]['ours']):>22} {ratio:>6.2f}")
    error = _largest_error(codec, port, clips, dtype)
    print(f"largest difference of a sample between port and batched decode: {error:.1e}")
    return {
        "size": arguments.size,
        "dtype": str(dtype),
        "compiled": arguments.compile,
        "audio_s": audio_s,
        "rows": rows,
        "largest_difference": error,
        "machine": measure.machine(device),
    }


def contenders(config: HiggsAudioCodecConfig, device: torch.device, dtype: torch.dtype) -> tuple[HiggsAudioCodec, Any]:
    """The same random network as ours and as the port."""
    torch.manual_seed(0)
    codec = HiggsAudioCodec(config).eval()
    port = transformers_port(codec).to(device=device, dtype=dtype)
    return codec.to(device).cast(dtype), port


def uneven_clips(codec: HiggsAudioCodec, count: int, longest_s: float) -> list[Tensor]:
    """Random codes of clips from one second to `longest_s`, more short ones than long ones, in mixed order."""
    random = np.random.RandomState(0)
    seconds = longest_s ** random.permutation(np.linspace(0, 1, count))
    frames = [round(length * codec.sample_rate / codec.hop_samples) for length in seconds.tolist()]
    return [torch.from_numpy(random.randint(0, codec.codebook_size, (codec.num_codebooks, n))) for n in frames]


Pair = tuple[Callable[[], object], Callable[[], object]]


def _pairs(codec: HiggsAudioCodec, port: Any, clips: list[Tensor], dtype: torch.dtype) -> dict[str, Pair]:
    """What port and ours do in each row of the table; decoding one by one is the port's answer to all three."""
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
        "stream decode": (port_decode, lambda: [_stream(codec, clip) for clip in clips]),
    }


def _stream(codec: HiggsAudioCodec, clip: Tensor) -> Tensor:
    stream = StreamingDecoder(codec)
    parts = [stream.push(portion) for portion in clip.split(PUSH_FRAMES, dim=1)]
    return torch.cat([*parts, stream.finish()])


@torch.inference_mode()
def _port_decode(port: Any, clips: list[Tensor], device: torch.device) -> list[Tensor]:
    return [port.decode(clip[None].to(device)).audio_values[0, 0] for clip in clips]


def _largest_error(codec: HiggsAudioCodec, port: Any, clips: list[Tensor], dtype: torch.dtype) -> float:
    pairs = zip(codec.decode_batch(clips), _port_decode(port, clips, codec.device), strict=True)
    return max((ours - theirs.float()).abs().max().item() for ours, theirs in pairs)


def _millions(codec: HiggsAudioCodec) -> float:
    return sum(parameter.numel() for parameter in codec.parameters()) / 1e6


def _shown(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f})"
