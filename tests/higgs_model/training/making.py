"""Small things to learn from: a tokenizer of bytes, tiny networks with its ids, rows whose audio is codes."""

import json
from pathlib import Path

import numpy as np

from higgs_model.training.batches import Samples
from higgs_model.training.collator import Sizes
from higgs_model.training.loading import Trainee
from higgs_model.training.prepare import Needs, Preparer, shard_path, stretches
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


def settings(folder, network=None, **others):
    """Settings of a short training in float32 on the CPU, of a network from nothing."""
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


def codes(generator, frames):
    return generator.integers(0, SIZE, (K, frames))


def rows(folder, count=6, seed=0, **columns):
    """Rows of one short word and a few frames each, their codes beside the manifest."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        np.save(folder / f"{number}.npy", codes(generator, int(generator.integers(2, 9))))
        text = f"{['ab', 'cd', 'ef', 'gh', 'ij', 'kl', 'mn', 'op'][number % 8]} {number}."
        given = {name: value(number) if callable(value) else value for name, value in columns.items()}
        made.append({"id": f"r{number}", "text": text, "audio": str(folder / f"{number}.npy"), **given})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


def read_local(name):
    with open(name, "rb") as file:
        return file.read()


def no_codec():
    raise AssertionError("nothing here is to be encoded")


def prepared(settings, given, folder=None, codec=no_codec, size=4):
    """The corpus of some rows, prepared in shards of `size`."""
    trainee = Trainee.of(settings.init)
    folder = folder or Path(settings.output) / "prepared"
    preparer = Preparer(SampleReader(trainee.tokenizer), Needs.of(trainee.config), codec, read_local)
    for first, some in stretches(given, size):
        preparer.write(shard_path(folder, first), some, first)
    return Samples(folder, Needs.of(trainee.config), Sizes.of(trainee.config), settings.batch.longest)


def trained(settings, given):
    """A trainer of rows, ready to run."""
    from higgs_model.training.trainer import Trainer

    return Trainer(settings, Trainee.of(settings.init), Corpus(prepared(settings, given)))


def log(settings):
    """The losses that were logged, by step."""
    lines = map(json.loads, Path(settings.output, "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
