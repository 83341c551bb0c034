"""Helpers for training tests: a byte tokenizer, tiny networks with its token ids, rows with codes as audio."""

import json
from pathlib import Path

import numpy as np

from higgs_model.training.batch_sampler import PreparedDataset
from higgs_model.training.collator import PositionCounter
from higgs_model.training.model_source import ModelSource
from higgs_model.training.prepare import AudioRequirements, Preparer, shard_path, split_into_shards
from higgs_model.training.samples import SampleReader
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.trainer import Corpus
from jobs.demo.tokenizer import build_tokenizer

K, SIZE = 3, 12
TOKENIZER = build_tokenizer()
NETWORK = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "audio_encoder_config": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "max_source_positions": 20,
        "num_mel_bins": 8,
    },
    "audio_adapter_type": "dual_ffn",
    "audio_dual_ffn_layers": [0, 1],
    "audio_num_codebooks": K,
    "audio_codebook_size": SIZE,
    "use_delay_pattern": True,
    "skip_audio_tower": True,
    "encode_whisper_embed": False,
    "encode_audio_in_tokens": True,
}


def build_settings(folder, network=None, **others):
    """Build settings of a short training run from scratch, in float32 on the CPU."""
    TOKENIZER.save_pretrained(folder / "tokenizer")
    values = {
        "output": str(folder / "out"),
        "init": {"config": {**NETWORK, **(network or {})}, "tokenizer": str(folder / "tokenizer")},
        "data": {"manifest": str(folder / "train.jsonl")},
        "batch": {"positions": 512, "longest": 256},
        "optimizer": {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.0},
        "device": "cpu",
        "log_every": 1,
        **others,
    }
    return TrainingSettings.model_validate(values)


def random_codes(generator, frames):
    return generator.integers(0, SIZE, (K, frames))


def write_rows(folder, count=6, seed=0, **columns):
    """Write rows of a short text and a few frames, with their codes next to the manifest; return the rows."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        np.save(folder / f"{number}.npy", random_codes(generator, int(generator.integers(2, 9))))
        text = f"{['ab', 'cd', 'ef', 'gh', 'ij', 'kl', 'mn', 'op'][number % 8]} {number}."
        extra = {name: value(number) if callable(value) else value for name, value in columns.items()}
        rows.append({"id": f"r{number}", "text": text, "audio": str(folder / f"{number}.npy"), **extra})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read_local(name):
    with open(name, "rb") as file:
        return file.read()


def no_codec():
    raise AssertionError("these rows need no codec")


def prepare_dataset(settings, rows, folder=None, codec=no_codec, size=4):
    """Prepare rows in shards of `size`, and return the dataset."""
    source = ModelSource.from_settings(settings.init)
    folder = folder or Path(settings.output) / "prepared"
    requirements = AudioRequirements.from_config(source.config)
    preparer = Preparer(SampleReader(source.tokenizer), requirements, codec, read_local)
    for first, shard_rows in split_into_shards(rows, size):
        preparer.write(shard_path(folder, first), shard_rows, first)
    return PreparedDataset(folder, requirements, PositionCounter.from_config(source.config), settings.batch.longest)


def build_trainer(settings, rows):
    """Build a trainer on rows, ready to run."""
    from higgs_model.training.trainer import Trainer

    return Trainer(settings, ModelSource.from_settings(settings.init), Corpus(prepare_dataset(settings, rows)))


def read_losses(settings):
    """Return the logged losses by step."""
    lines = map(json.loads, Path(settings.output, "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
