"""What speaks in a benchmark: a checkpoint by name, or random weights of a size that others can be compared with."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.benchmark import random_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint."""
    parser.add_argument("--model", help="what speaks; by default random weights of --hidden-size and --layers")
    parser.add_argument("--hidden-size", type=int, default=512, help="of the random model")
    parser.add_argument("--layers", type=int, default=6, help="of the random model")


def named_or_random(arguments: argparse.Namespace, folder: Path) -> str:
    """The name of the checkpoint that was asked for; a random one is written to `folder`."""
    if arguments.model:
        return str(arguments.model)
    model, codec, tokenizer = random_model.build(arguments.hidden_size, arguments.layers)
    model.save_pretrained(folder)
    codec.save_pretrained(folder / "codec")
    tokenizer.save_pretrained(folder)
    print(f"a random model of {sum(one.numel() for one in model.parameters()) / 1e6:.0f} M parameters", flush=True)
    return str(folder)
