"""Frames a second of `HiggsAudioModel.generate` against transformers' port, on the same random weights.

Prompts are uneven, each with a voice clip, and every answer is frames to the end. Both contenders give the very same
codes, which is checked. The floor is the time to read once a step all the weights that a step of audio needs.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_model import HiggsAudioConfig, HiggsAudioModel
from jobs.benchmark import measure

SIZES: dict[str, dict[str, int]] = {
    # For what does not depend on size, such as whether anything is left behind.
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    # About 50 M parameters: small enough for a laptop, large enough to be bound by the weights.
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "v2": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="dimensions of the network")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--frames", type=int, default=100, help="frames of each answer")
    parser.add_argument("--prompt", type=int, default=120, help="longest prompt, in positions")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if device_missing(arguments.device):
        raise SystemExit("--device cuda: this machine has no CUDA device that torch can use")
    if min(*arguments.batch, arguments.frames, arguments.rounds, arguments.prompt // 8) < 1:
        raise SystemExit("--batch, --frames and --rounds must be positive, --prompt at least 8")
    if arguments.quick:
        arguments.batch, arguments.frames, arguments.rounds = [1, 4], 30, 1
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    ours, port = contenders(SIZES[arguments.size], device, dtype)
    floor_s = step_bytes(ours) / measure.read_bandwidth(device)
    print(f"{arguments.size}: {ours.num_parameters() / 1e6:.0f} M parameters, {dtype}, {measure.machine(device)}")
    print(
        f"prompts up to {arguments.prompt} positions, answers of {arguments.frames} frames, {arguments.rounds} rounds"
    )
    print(f"{'batch':>5} {'port frames/s':>22} {'ours frames/s':>22} {'ratio':>6} {'of the floor':>12}  same codes")
    rows = []
    for batch_size in arguments.batch:
        row = _measure(ours, port, batch_size, arguments, device)
        row["of_floor"] = round(floor_s * row["ours"]["median"] / batch_size, 3)
        rows.append(row)
        print(
            f"{batch_size:>5} {_shown(row['port']):>22} {_shown(row['ours']):>22} {row['ratio']:>6.2f} "
            f"{row['of_floor']:>12.0%}  {row['same_codes']:.1%}"
        )
    return {"size": arguments.size, "dtype": str(dtype), "rows": rows, "machine": measure.machine(device)}


def device_missing(name: str) -> bool:
    """Whether a CUDA device is asked for and there is none."""
    return torch.device(name).type == "cuda" and not torch.cuda.is_available()


def contenders(
    size: dict[str, int], device: torch.device, dtype: torch.dtype
) -> tuple[HiggsAudioModel, HiggsAudioV2ForConditionalGeneration]:
    """The same random network as ours and as the port, whose clips never end by themselves."""
    vocabulary = size["vocab_size"]
    config = HiggsAudioConfig(
        text_config={**size, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        audio_adapter_type="dual_ffn",
        audio_dual_ffn_layers=list(range(size["num_hidden_layers"])),
        audio_num_codebooks=8,
        audio_codebook_size=1024,
        use_delay_pattern=True,
        skip_audio_tower=True,
        encode_audio_in_tokens=True,
        pad_token_id=vocabulary - 1,
        audio_in_token_idx=vocabulary - 2,
        audio_out_token_idx=vocabulary - 3,
        audio_out_bos_token_id=vocabulary - 4,
        audio_eos_token_id=vocabulary - 5,
        eos_token_id=vocabulary - 6,
        audio_delay_token_id=vocabulary - 7,
        use_text_head=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        ours = HiggsAudioModel(config).to(dtype).eval()
    with torch.no_grad():
        # A logit of 0 for the stream tokens is never the largest.
        ours.audio_decoder_proj.audio_lm_head.weight.view(8, 1026, -1)[:, 1024:] = 0
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, layout="transformers")
        port = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return ours, port.to(device).eval()


def step_bytes(model: HiggsAudioModel) -> int:
    """Bytes of the weights that one step of audio reads, whatever the batch: attention, audio FFN, audio head."""
    parts: list[Any] = [model.audio_decoder_proj.audio_lm_head]
    for layer in model.layers:
        parts += [layer.self_attn, layer.audio_mlp]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def _measure(
    ours: HiggsAudioModel,
    port: HiggsAudioV2ForConditionalGeneration,
    batch_size: int,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        name: value.to(device) for name, value in prompts(ours.config, batch_size, arguments.prompt).items()
    }
    theirs = {name: value.to(device) for name, value in port_prompts(ours.config, inputs).items()}
    answers: dict[str, Any] = {}

    def run_port() -> None:
        answers["port"] = port.generate(**theirs, max_new_tokens=arguments.frames, do_sample=False)

    def run_ours() -> None:
        answers["ours"] = ours.generate(**inputs, max_new_tokens=arguments.frames)

    timings = measure.in_turn({"port": run_port, "ours": run_ours}, arguments.rounds, device)
    frames = batch_size * arguments.frames
    expected = answers["port"][:, -arguments.frames :]
    found = torch.stack([clip.T for clip in answers["ours"].audio_sequences])
    return {
        "batch": batch_size,
        "port": timings["port"].rate(frames),
        "ours": timings["ours"].rate(frames),
        "ratio": round(timings["port"].median_s / timings["ours"].median_s, 3),
        "same_codes": (expected == found).all(dim=-1).float().mean().item(),
    }


def prompts(config: HiggsAudioConfig, batch_size: int, longest: int) -> dict[str, Tensor]:
    """Uneven prompts: text, a voice clip of half the prompt, text, and the opening of audio."""
    generator = torch.Generator().manual_seed(batch_size)
    lengths = [longest - 7 * (row % 5) for row in range(batch_size)]
    num_frames = longest // 2
    ids = torch.full((batch_size, longest - num_frames + 1), config.pad_token_id or 0)
    for row, length in enumerate(lengths):
        text = torch.randint(vocabulary_end(config), (length - num_frames + 1,), generator=generator)
        text[len(text) // 2], text[-1] = config.audio_out_token_idx, config.audio_out_bos_token_id
        ids[row, -len(text) :] = text
    return {
        "input_ids": ids,
        "attention_mask": ids.ne(config.pad_token_id or 0).long(),
        "audio_out_ids": torch.randint(
            config.audio_codebook_size,
            (config.audio_num_codebooks, batch_size * num_frames),
            generator=generator,
        ),
        "audio_out_ids_start": torch.arange(batch_size) * num_frames,
    }


def vocabulary_end(config: HiggsAudioConfig) -> int:
    """Ids below this are ordinary text; the special tokens are the last few."""
    end: int = config.text_config.vocab_size - 10
    return end


def port_prompts(config: HiggsAudioConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts as the port wants them: a placeholder a frame, codes as (batch, frames, codebooks)."""
    batch_size = inputs["input_ids"].shape[0]
    num_frames = inputs["audio_out_ids"].shape[1] // batch_size
    counts = torch.where(inputs["input_ids"] == config.audio_out_token_idx, num_frames, 1)
    expanded = [row.repeat_interleave(count) for row, count in zip(inputs["input_ids"], counts, strict=True)]
    ids = torch.stack(expanded)
    codes = inputs["audio_out_ids"].T.unflatten(0, (batch_size, num_frames))
    return {
        "input_ids": ids,
        "attention_mask": ids.ne(config.pad_token_id or 0).long(),
        "audio_input_ids": codes,
        "audio_input_ids_mask": torch.ones(batch_size, num_frames, dtype=torch.bool, device=ids.device),
    }


def _shown(rate: dict[str, float]) -> str:
    return f"{rate['median']:.0f} ({rate['lowest']:.0f}–{rate['highest']:.0f})"
