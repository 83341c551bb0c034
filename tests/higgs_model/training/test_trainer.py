"""End-to-end training: the model reproduces its training data, and a killed run resumes with identical results."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from higgs_model import HiggsAudioModel
from higgs_model.delay import from_stream
from higgs_model.engine import Engine, EngineSettings, Request
from higgs_model.errors import BadConfig
from higgs_model.sampling import SamplingParams
from higgs_model.script.prompt import Encoder, chunk_message, reference_messages
from higgs_model.training.batch_sampler import BatchSampler, SequenceSpec
from higgs_model.training.collator import Collator, Example
from higgs_model.training.model_source import ModelSource
from higgs_model.training.trainer import Corpus, Diverged, Trainer
from tests.higgs_model.training import helpers
from tests.higgs_model.training.helpers import SIZE, TOKENIZER

ROOT = Path(__file__).parents[3]
VARIANTS = {
    "dual_ffn": {},
    "fast_forward": {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [1]},
    "audio_attention": {"use_audio_out_self_attention": True},
    "no_delay": {"use_delay_pattern": False},
}
LEARN = {"steps": 150, "learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.0}


def prompt(row):
    """Return the batch job's prompt for a row without a voice."""
    encoder = Encoder(TOKENIZER)
    ids = []
    for number, message in enumerate([*reference_messages(None, [], []), chunk_message(row["text"])]):
        ids += encoder.encode_message(message, first=number == 0)
    return torch.tensor([[*ids, *encoder.encode_header(), encoder.audio_out_bos_id]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_data_is_reproduced(tmp_path, variant):
    """Training from scratch reaches almost zero loss, and greedy codes equal the training data to the last frame."""
    settings = helpers.build_settings(tmp_path, VARIANTS[variant], optimizer=LEARN)
    rows = helpers.write_rows(tmp_path, 4)
    assert helpers.build_trainer(settings, rows).run()
    losses = helpers.read_losses(settings)
    assert losses[1] > 2
    assert losses[150] < 0.02
    model = HiggsAudioModel.from_pretrained(f"{settings.output}/model")
    for row in rows:
        output = model.generate(prompt(row), max_new_tokens=40)
        codes = from_stream(output.audio_sequences[0], SIZE, model.config.use_delay_pattern)
        assert np.array_equal(codes, np.load(row["audio"])), row["id"]
    if variant != "dual_ffn":
        return
    engine = Engine(model, EngineSettings(max_slots=2))
    for row in rows:
        greedy = SamplingParams(do_sample=False)
        engine.add(Request(row["id"], tuple(prompt(row)[0].tolist()), sampling=greedy, max_frames=40))
    frames = {}
    while engine.has_work:
        frames |= {update.request_id: update.frames for update in engine.step()}
    for row in rows:
        assert np.array_equal(frames[row["id"]], np.load(row["audio"])), row["id"]


def test_recordings_are_transcribed(tmp_path):
    """Audio understanding: text answers to recordings through the audio tower, the longer ones in windows."""
    network = {"skip_audio_tower": False, "encode_audio_in_tokens": False}
    settings = helpers.build_settings(tmp_path, network, optimizer=LEARN | {"steps": 200, "learning_rate": 5e-3})
    generator = np.random.default_rng(0)
    rows = []
    for number, answer in enumerate(("low", "high", "long and low", "noise")):
        tone = np.sin(np.arange(4800 * (1 + 2 * (number == 2))) * (0.1, 0.9, 0.1, 0)[number]) * 0.5
        wave = generator.standard_normal(4800) * 0.1 if number == 3 else tone
        soundfile.write(tmp_path / f"{number}.wav", wave, 16_000)
        question = [{"type": "audio", "audio_url": str(tmp_path / f"{number}.wav")}, "What is it?"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    trainer = helpers.build_trainer(settings, rows)
    trainer.run()
    assert helpers.read_losses(settings)[200] < 0.02
    model = HiggsAudioModel.from_pretrained(f"{settings.output}/model")
    samples = trainer.corpus.train
    for index, row in enumerate(rows):
        example = samples.example(SequenceSpec((index,), -1, 0))
        prompt_length = int(example.loss_mask.argmax())
        question = Example(example.ids[:prompt_length], example.loss_mask[:prompt_length], example.recordings)
        batch = Collator(model.config)([[question]])
        answer = model.generate(**batch.inputs(), max_new_tokens=20).sequences[0, batch.input_ids.shape[1] :]
        assert TOKENIZER.decode(answer, skip_special_tokens=True) == row["messages"][1]["content"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch", [{"accumulate": 2}, {"pack": True}])
def test_killed_run_resumes_with_identical_results(tmp_path, batch):
    batch = {"positions": 160, "longest": 160, **batch}
    options = {"batch": batch, "checkpoints": {"every": 3}, "log_every": 2, "loss": {"label_smoothing": 0.1}}
    dropout = {"text_config": {**helpers.NETWORK["text_config"], "attention_dropout": 0.2}}
    optimizer = LEARN | {"steps": 9}
    (tmp_path / "whole").mkdir()
    uninterrupted = helpers.build_settings(tmp_path / "whole", dropout, optimizer=optimizer, **options)
    interrupted = uninterrupted.model_copy(update={"output": str(tmp_path / "broken")})
    rows = helpers.write_rows(tmp_path, 12, speaker=lambda number: f"s{number % 2}")
    helpers.build_trainer(uninterrupted, rows).run()

    def die(step, values):
        if step == 8:
            raise Killed

    trainer = helpers.build_trainer(interrupted, rows)
    trainer._report = die
    with pytest.raises(Killed):
        trainer.run()
    resumed = helpers.build_trainer(interrupted, rows)
    assert resumed.step == 6
    assert resumed.run()
    assert helpers.read_losses(interrupted) == helpers.read_losses(uninterrupted)
    expected, found = (
        load_file(f"{settings.output}/model/model.safetensors") for settings in (uninterrupted, interrupted)
    )
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_sigterm_saves_a_checkpoint(tmp_path):
    settings = helpers.build_settings(tmp_path)
    rows = helpers.write_rows(tmp_path)
    trainer = helpers.build_trainer(settings, rows)
    trainer._report = lambda step, values: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
    assert trainer.run() is False
    assert helpers.build_trainer(settings, rows).step == 4


def test_gradient_does_not_depend_on_batch_boundaries(tmp_path):
    """Sums are divided by the labels of the entire step, so many small passes equal a single large one."""
    rows = helpers.write_rows(tmp_path, 8)
    losses = []
    for number, (positions, accumulate) in enumerate([(4096, 1), (256, 4)]):
        batch = {"positions": positions, "longest": 128, "accumulate": accumulate}
        settings = helpers.build_settings(tmp_path, batch=batch, output=str(tmp_path / str(number)))
        trainer = helpers.build_trainer(settings, rows)
        passes = len(BatchSampler(trainer.corpus.train, settings.data, settings.batch, 0).epoch(0))
        assert passes == accumulate
        trainer.run()
        losses.append(list(helpers.read_losses(settings).values()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"precision": "bfloat16"}])
def test_memory_savings_do_not_change_the_losses(tmp_path, option):
    """Also if some positions attend to nothing: text positions in audio attention, padding of packed samples."""
    rows = helpers.write_rows(tmp_path)
    losses = []
    network = {"use_audio_out_self_attention": True}
    for number, others in enumerate([{}, option]):
        batch = {"positions": 512, "longest": 256, "pack": True}
        settings = helpers.build_settings(tmp_path, network, batch=batch, output=str(tmp_path / str(number)), **others)
        helpers.build_trainer(settings, rows).run()
        losses.append(list(helpers.read_losses(settings).values()))
    exact = "precision" not in option
    assert losses[0] == pytest.approx(losses[1], abs=1e-5 if exact else 0.1)
    assert (losses[0] == losses[1]) <= exact


def test_both_layouts_contain_the_trained_weights(tmp_path):
    settings = helpers.build_settings(
        tmp_path, checkpoints={"layouts": ["original", "transformers"], "dtype": "bfloat16"}
    )
    trainer = helpers.build_trainer(settings, helpers.write_rows(tmp_path))
    trainer.run()
    trained = {name: value.bfloat16() for name, value in trainer.model.state_dict().items()}
    for folder in ("model", "model-transformers"):
        loaded = HiggsAudioModel.from_pretrained(f"{settings.output}/{folder}")
        torch.testing.assert_close(dict(loaded.state_dict()), trained, atol=0, rtol=0)


def test_fine_tuning_changes_only_unfrozen_weights(tmp_path):
    """The same command with a checkpoint in `init`: only new rows and the audio parts are trained."""
    rows = helpers.write_rows(tmp_path)
    first = helpers.build_settings(tmp_path)
    helpers.build_trainer(first, rows).run()
    tuned = helpers.build_settings(
        tmp_path,
        output=str(tmp_path / "tuned"),
        init={"checkpoint": f"{first.output}/model"},
        freeze={"llm": True, "embed": 256, "text_head": 256},
        checkpoints={"every": 2},
    )
    helpers.build_trainer(tuned, rows).run()
    before, after = (load_file(f"{settings.output}/model/model.safetensors") for settings in (first, tuned))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith(("layers", "norm"))} == {
        name for name in before if ".audio_" in name and name.startswith("layers")
    }
    for name in ("embed_tokens.weight", "audio_decoder_proj.text_lm_head.weight"):
        assert torch.equal(before[name][:256], after[name][:256])
        assert name in moved
    helpers.build_trainer(tuned, rows).run()  # running a completed training again is harmless


def test_run_with_different_settings_is_rejected(tmp_path):
    settings = helpers.build_settings(tmp_path)
    rows = helpers.write_rows(tmp_path)
    helpers.build_trainer(settings, rows).run()
    with pytest.raises(
        BadConfig, match=r"has a training run with different settings \(loss, seed\); set another output"
    ):
        helpers.build_trainer(helpers.build_settings(tmp_path, seed=1, loss={"text": 2.0}), rows)


def test_non_finite_loss_stops_the_run(tmp_path):
    settings = helpers.build_settings(tmp_path, optimizer=LEARN | {"learning_rate": 1e30, "clip_norm": None})
    with pytest.raises(Diverged, match="the loss is not finite at step"):
        helpers.build_trainer(settings, helpers.write_rows(tmp_path)).run()


def test_validation_loss_matches_the_models_own(tmp_path):
    settings = helpers.build_settings(tmp_path, data={"manifest": "x", "validation": "y"}, validate_every=6)
    samples = helpers.prepare_dataset(settings, helpers.write_rows(tmp_path))
    trainer = Trainer(settings, ModelSource.from_settings(settings.init), Corpus(samples, samples))
    trainer.run()
    lines = map(json.loads, Path(settings.output, "log.jsonl").read_text().splitlines())
    metrics = next(line for line in lines if "validation_loss" in line)
    batch = Collator(trainer.model.config)(
        [[samples.example(SequenceSpec((row,), -1, 0))] for row in range(len(samples))]
    )
    expected = trainer.model.eval()(**batch.inputs())
    assert metrics["validation_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    assert metrics["validation_codebook_losses"] == pytest.approx(expected.codebook_losses.tolist(), abs=1e-5)


WORKER_SCRIPT = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from higgs_model.training.model_source import ModelSource
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.trainer import Corpus, Trainer
from tests.higgs_model.training import helpers

def work(rank, folder, store, *runs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for run in runs:
        settings = TrainingSettings.model_validate_json(run)
        source = ModelSource.from_settings(settings.init)
        Trainer(settings, source, Corpus(helpers.prepare_dataset(settings, [], Path(folder)))).run()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, sys.argv[1:], nprocs=2)
"""


def test_two_workers_match_one_with_gradient_accumulation(tmp_path):
    """With DDP and with FSDP; and a single worker can resume from a checkpoint of two."""
    batch = {"positions": 160, "longest": 160}
    rows = helpers.write_rows(tmp_path, 12)
    alone = helpers.build_settings(tmp_path, batch=batch | {"accumulate": 2}, output=str(tmp_path / "alone"))
    helpers.build_trainer(alone, rows).run()
    shared = [
        helpers.build_settings(
            tmp_path, batch=batch, parallel=kind, checkpoints={"every": 4}, output=str(tmp_path / kind)
        )
        for kind in ("ddp", "fsdp")
    ]
    script = tmp_path / "work.py"
    script.write_text(WORKER_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, f"{alone.output}/prepared", tmp_path / "store"]
        + [settings.model_dump_json() for settings in shared],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for settings in shared:
        assert helpers.read_losses(settings) == pytest.approx(helpers.read_losses(alone), abs=1e-4)
        shutil.rmtree(f"{settings.output}/checkpoints/step-00000006")
        single = settings.model_copy(update={"parallel": "ddp", "batch": alone.batch})
        trainer = Trainer(single, ModelSource.from_settings(single.init), Corpus(helpers.prepare_dataset(alone, [])))
        assert trainer.step == 4
        trainer.run()
        assert helpers.read_losses(single) == pytest.approx(helpers.read_losses(alone), abs=1e-4)
