"""Frames per second of `HiggsAudioModel.generate`, compared with transformers' port on the same random weights.

Prompts are of uneven length, each with a voice clip; generation never ends early. The codes of both are compared. The
floor of a step is the time to read the weights of an audio step once.
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
    # For measurements that do not depend on size, such as memory leaks.
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    # About 50 M parameters: small enough for a laptop, large enough to be bound by reading the weights.
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
    """Add this benchmark's options."""
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="dimensions of the network")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--frames", type=int, default=100, help="frames generated per prompt")
    parser.add_argument("--prompt", type=int, default=120, help="longest prompt, in positions")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--quick", action="store_true", help="one short round, as a smoke test")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if is_cuda_missing(arguments.device):
        raise SystemExit("--device cuda: this machine has no CUDA device that torch can use")
    if min(*arguments.batch, arguments.frames, arguments.rounds, arguments.prompt // 8) < 1:
        raise SystemExit("--batch, --frames and --rounds must be positive, --prompt at least 8")
    if arguments.quick:
        arguments.batch, arguments.frames, arguments.rounds = [1, 4], 30, 1
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    ours, port = build_contenders(SIZES[arguments.size], device, dtype)
    floor_s = weight_bytes_per_step(ours) / measure.measure_read_bandwidth(device)
    print(
        f"{arguments.size}: {ours.num_parameters() / 1e6:.0f} M parameters, {dtype}, {measure.describe_machine(device)}"
    )
    print(
        f"prompts up to {arguments.prompt} positions, {arguments.frames} frames per prompt, {arguments.rounds} rounds"
    )
    print(f"{'batch':>5} {'port frames/s':>22} {'ours frames/s':>22} {'ratio':>6} {'of floor':>8}  same codes")
    rows = []
    for batch_size in arguments.batch:
        row = _measure(ours, port, batch_size, arguments, device)
        row["of_floor"] = round(floor_s * row["ours"]["median"] / batch_size, 3)
        rows.append(row)
        print(
            f"{batch_size:>5} {_format_rate(row['port']):>22} {_format_rate(row['ours']):>22} {row['ratio']:>6.2f} "
            f"{row['of_floor']:>8.0%}  {row['same_codes']:.1%}"
        )
    return {"size": arguments.size, "dtype": str(dtype), "rows": rows, "machine": measure.describe_machine(device)}


def is_cuda_missing(device: str) -> bool:
    """Return whether `device` is a CUDA device and none is available."""
    return torch.device(device).type == "cuda" and not torch.cuda.is_available()


def build_contenders(
    size: dict[str, int], device: torch.device, dtype: torch.dtype
) -> tuple[HiggsAudioModel, HiggsAudioV2ForConditionalGeneration]:
    """Return one random network as our model and as the port; it never generates the end of a clip."""
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
        # With zero weights the stream tokens' logits are 0, which is never the maximum.
        ours.audio_decoder_proj.audio_lm_head.weight.view(8, 1026, -1)[:, 1024:] = 0
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, layout="transformers")
        port = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return ours, port.to(device).eval()


def weight_bytes_per_step(model: HiggsAudioModel) -> int:
    """Return the bytes of weights that an audio step reads at any batch size: attention, audio FFN, audio head."""
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
        name: value.to(device) for name, value in draw_prompts(ours.config, batch_size, arguments.prompt).items()
    }
    port_inputs = {name: value.to(device) for name, value in to_port_inputs(ours.config, inputs).items()}
    outputs: dict[str, Any] = {}

    def run_port() -> None:
        outputs["port"] = port.generate(**port_inputs, max_new_tokens=arguments.frames, do_sample=False)

    def run_ours() -> None:
        outputs["ours"] = ours.generate(**inputs, max_new_tokens=arguments.frames)

    timings = measure.time_interleaved({"port": run_port, "ours": run_ours}, arguments.rounds, device)
    frames = batch_size * arguments.frames
    port_codes = outputs["port"][:, -arguments.frames :]
    our_codes = torch.stack([clip.T for clip in outputs["ours"].audio_sequences])
    return {
        "batch": batch_size,
        "port": timings["port"].rate(frames),
        "ours": timings["ours"].rate(frames),
        "ratio": round(timings["port"].median_s / timings["ours"].median_s, 3),
        "same_codes": (port_codes == our_codes).all(dim=-1).float().mean().item(),
    }


def draw_prompts(config: HiggsAudioConfig, batch_size: int, longest: int) -> dict[str, Tensor]:
    """Return left-padded prompts of uneven length: text, a voice clip of half the prompt, text, audio BOS."""
    generator = torch.Generator().manual_seed(batch_size)
    lengths = [longest - 7 * (row % 5) for row in range(batch_size)]
    num_frames = longest // 2
    ids = torch.full((batch_size, longest - num_frames + 1), config.pad_token_id or 0)
    for row, length in enumerate(lengths):
        text = torch.randint(text_vocab_size(config), (length - num_frames + 1,), generator=generator)
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


def text_vocab_size(config: HiggsAudioConfig) -> int:
    """Return the number of ordinary text tokens; their ids come before the special tokens' ids."""
    size: int = config.text_config.vocab_size - 10
    return size


def to_port_inputs(config: HiggsAudioConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert prompts to the port's format: one placeholder per frame, codes (batch, frames, codebooks)."""
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


def _format_rate(rate: dict[str, float]) -> str:
    return f"{rate['median']:.0f} ({rate['lowest']:.0f}–{rate['highest']:.0f})"
