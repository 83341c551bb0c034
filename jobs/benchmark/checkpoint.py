"""The checkpoint of a benchmark: a named one, or random weights of a given size."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.benchmark import random_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the checkpoint."""
    parser.add_argument("--model", help="checkpoint; default: random weights of --hidden-size and --layers")
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the random model")
    parser.add_argument("--layers", type=int, default=6, help="layers of the random model")


def resolve_checkpoint(arguments: argparse.Namespace, folder: Path) -> str:
    """Return the name of the requested checkpoint, or of a random one written to `folder`."""
    if arguments.model:
        return str(arguments.model)
    model, codec, tokenizer = random_model.build(arguments.hidden_size, arguments.layers)
    model.save_pretrained(folder)
    codec.save_pretrained(folder / "codec")
    tokenizer.save_pretrained(folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"random model with {num_parameters / 1e6:.0f} M parameters", flush=True)
    return str(folder)
