"""The loop as a whole: what it learns it can say, and a killed training goes on as if nothing had been."""

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
from higgs_model.training.batches import Batches, Drawn
from higgs_model.training.collator import Collator, Example
from higgs_model.training.loading import Trainee
from higgs_model.training.trainer import Corpus, Diverged, Trainer
from tests.higgs_model.training import making
from tests.higgs_model.training.making import SIZE, TOKENIZER

ROOT = Path(__file__).parents[3]
VARIANTS = {
    "dual_ffn": {},
    "fast_forward": {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [1]},
    "audio_attention": {"use_audio_out_self_attention": True},
    "no_delay": {"use_delay_pattern": False},
}
LEARN = {"steps": 150, "learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.0}


def prompt(row):
    """What the batch job would put in front of the model for a row without a voice."""
    encoder = Encoder(TOKENIZER)
    ids = []
    for number, message in enumerate([*reference_messages(None, [], []), chunk_message(row["text"])]):
        ids += encoder.message(message, first=number == 0)
    return torch.tensor([[*ids, *encoder.header(), encoder.audio_out_bos_id]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_handful_is_learnt_and_spoken_back(tmp_path, variant):
    """From nothing to near-zero loss; greedy codes are those of the training, to the last frame."""
    settings = making.settings(tmp_path, VARIANTS[variant], optimizer=LEARN)
    rows = making.rows(tmp_path, 4)
    assert making.trained(settings, rows).run()
    losses = making.log(settings)
    assert losses[1] > 2
    assert losses[150] < 0.02
    model = HiggsAudioModel.from_pretrained(f"{settings.output}/model")
    for row in rows:
        answer = model.generate(prompt(row), max_new_tokens=40)
        said = from_stream(answer.audio_sequences[0], SIZE, model.config.use_delay_pattern)
        assert np.array_equal(said, np.load(row["audio"])), row["id"]
    if variant != "dual_ffn":
        return
    engine = Engine(model, EngineSettings(max_slots=2))
    for row in rows:
        greedy = SamplingParams(do_sample=False)
        engine.add(Request(row["id"], tuple(prompt(row)[0].tolist()), sampling=greedy, max_frames=40))
    spoken = {}
    while engine.has_work:
        spoken |= {update.request_id: update.frames for update in engine.step()}
    for row in rows:
        assert np.array_equal(spoken[row["id"]], np.load(row["audio"])), row["id"]


def test_what_it_hears_is_learnt_and_written_down(tmp_path):
    """The understanding variant: recordings through the audio tower, longer ones in pieces, text comes out."""
    network = {"skip_audio_tower": False, "encode_audio_in_tokens": False}
    settings = making.settings(tmp_path, network, optimizer=LEARN | {"steps": 200, "learning_rate": 5e-3})
    generator = np.random.default_rng(0)
    rows = []
    for number, answer in enumerate(("low", "high", "long and low", "noise")):
        tone = np.sin(np.arange(4800 * (1 + 2 * (number == 2))) * (0.1, 0.9, 0.1, 0)[number]) * 0.5
        wave = generator.standard_normal(4800) * 0.1 if number == 3 else tone
        soundfile.write(tmp_path / f"{number}.wav", wave, 16_000)
        heard = [{"type": "audio", "audio_url": str(tmp_path / f"{number}.wav")}, "What is it?"]
        messages = [{"role": "user", "content": heard}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    trainer = making.trained(settings, rows)
    trainer.run()
    assert making.log(settings)[200] < 0.02
    model = HiggsAudioModel.from_pretrained(f"{settings.output}/model")
    samples = trainer.corpus.train
    for row, given in enumerate(rows):
        example = samples.example(Drawn((row,), -1, 0))
        told = int(example.trained.argmax())
        asked = Example(example.ids[:told], example.trained[:told], example.recordings)
        batch = Collator(model.config)([[asked]])
        answer = model.generate(**batch.inputs(), max_new_tokens=20).sequences[0, batch.input_ids.shape[1] :]
        assert TOKENIZER.decode(answer, skip_special_tokens=True) == given["messages"][1]["content"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch", [{"accumulate": 2}, {"pack": True}])
def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path, batch):
    batch = {"positions": 160, "longest": 160, **batch}
    given = {"batch": batch, "checkpoints": {"every": 3}, "log_every": 2, "loss": {"label_smoothing": 0.1}}
    dropout = {"text_config": {**making.NETWORK["text_config"], "attention_dropout": 0.2}}
    optimizer = LEARN | {"steps": 9}
    (tmp_path / "whole").mkdir()
    whole = making.settings(tmp_path / "whole", dropout, optimizer=optimizer, **given)
    broken = whole.model_copy(update={"output": str(tmp_path / "broken")})
    rows = making.rows(tmp_path, 12, speaker=lambda number: f"s{number % 2}")
    making.trained(whole, rows).run()

    def die(step, values):
        if step == 8:
            raise Killed

    trainer = making.trained(broken, rows)
    trainer._report = die
    with pytest.raises(Killed):
        trainer.run()
    again = making.trained(broken, rows)
    assert again.step == 6
    assert again.run()
    assert making.log(broken) == making.log(whole)
    one, other = (load_file(f"{settings.output}/model/model.safetensors") for settings in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_told_to_stop_it_keeps_its_state(tmp_path):
    settings = making.settings(tmp_path)
    rows = making.rows(tmp_path)
    trainer = making.trained(settings, rows)
    trainer._report = lambda step, values: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
    assert trainer.run() is False
    assert making.trained(settings, rows).step == 4


def test_a_gradient_does_not_depend_on_how_batches_are_cut(tmp_path):
    """Sums are divided by what is learnt in the whole step: many small passes are one large one."""
    rows = making.rows(tmp_path, 8)
    losses = []
    for number, (positions, accumulate) in enumerate([(4096, 1), (256, 4)]):
        batch = {"positions": positions, "longest": 128, "accumulate": accumulate}
        settings = making.settings(tmp_path, batch=batch, output=str(tmp_path / str(number)))
        trainer = making.trained(settings, rows)
        passes = len(Batches(trainer.corpus.train, settings.data, settings.batch, 0).epoch(0))
        assert passes == accumulate
        trainer.run()
        losses.append(list(making.log(settings).values()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("given", [{"gradient_checkpointing": True}, {"precision": "bfloat16"}])
def test_less_memory_gives_the_same_training(tmp_path, given):
    """Also where some positions see nothing at all: text among audio attention, padding beside packed samples."""
    rows = making.rows(tmp_path)
    losses = []
    network = {"use_audio_out_self_attention": True}
    for number, others in enumerate([{}, given]):
        batch = {"positions": 512, "longest": 256, "pack": True}
        settings = making.settings(tmp_path, network, batch=batch, output=str(tmp_path / str(number)), **others)
        making.trained(settings, rows).run()
        losses.append(list(making.log(settings).values()))
    exact = "precision" not in given
    assert losses[0] == pytest.approx(losses[1], abs=1e-5 if exact else 0.1)
    assert (losses[0] == losses[1]) <= exact


def test_both_layouts_hold_what_was_trained(tmp_path):
    settings = making.settings(tmp_path, checkpoints={"layouts": ["original", "transformers"], "dtype": "bfloat16"})
    trainer = making.trained(settings, making.rows(tmp_path))
    trainer.run()
    trained = {name: value.bfloat16() for name, value in trainer.model.state_dict().items()}
    for folder in ("model", "model-transformers"):
        loaded = HiggsAudioModel.from_pretrained(f"{settings.output}/{folder}")
        torch.testing.assert_close(dict(loaded.state_dict()), trained, atol=0, rtol=0)


def test_fine_tuning_moves_what_is_not_frozen(tmp_path):
    """The same command with another init: only new rows and audio parts are trained."""
    rows = making.rows(tmp_path)
    first = making.settings(tmp_path)
    making.trained(first, rows).run()
    tuned = making.settings(
        tmp_path,
        output=str(tmp_path / "tuned"),
        init={"checkpoint": f"{first.output}/model"},
        freeze={"llm": True, "embed": 256, "text_head": 256},
        checkpoints={"every": 2},
    )
    making.trained(tuned, rows).run()
    before, after = (load_file(f"{settings.output}/model/model.safetensors") for settings in (first, tuned))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith(("layers", "norm"))} == {
        name for name in before if ".audio_" in name and name.startswith("layers")
    }
    for name in ("embed_tokens.weight", "audio_decoder_proj.text_lm_head.weight"):
        assert torch.equal(before[name][:256], after[name][:256])
        assert name in moved
    making.trained(tuned, rows).run()  # done already: nothing is to be gone on with, nothing breaks


def test_another_training_is_not_gone_on_with(tmp_path):
    settings = making.settings(tmp_path)
    rows = making.rows(tmp_path)
    making.trained(settings, rows).run()
    with pytest.raises(BadConfig, match=r"holds a training with other settings \(loss, seed\); give another output"):
        making.trained(making.settings(tmp_path, seed=1, loss={"text": 2.0}), rows)


def test_a_loss_that_is_no_number_ends_it(tmp_path):
    settings = making.settings(tmp_path, optimizer=LEARN | {"learning_rate": 1e30, "clip_norm": None})
    with pytest.raises(Diverged, match="the loss is no number at step"):
        making.trained(settings, making.rows(tmp_path)).run()


def test_validation_is_the_loss_of_the_same_network(tmp_path):
    settings = making.settings(tmp_path, data={"manifest": "x", "validation": "y"}, validate_every=6)
    samples = making.prepared(settings, making.rows(tmp_path))
    trainer = Trainer(settings, Trainee.of(settings.init), Corpus(samples, samples))
    trainer.run()
    lines = map(json.loads, Path(settings.output, "log.jsonl").read_text().splitlines())
    told = next(line for line in lines if "validation_loss" in line)
    batch = Collator(trainer.model.config)([[samples.example(Drawn((row,), -1, 0))] for row in range(len(samples))])
    expected = trainer.model.eval()(**batch.inputs())
    assert told["validation_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    assert told["validation_codebook_losses"] == pytest.approx(expected.codebook_losses.tolist(), abs=1e-5)


WORKERS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from higgs_model.training.loading import Trainee
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.trainer import Corpus, Trainer
from tests.higgs_model.training import making

def work(rank, folder, store, *trainings):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for told in trainings:
        settings = TrainingSettings.model_validate_json(told)
        Trainer(settings, Trainee.of(settings.init), Corpus(making.prepared(settings, [], Path(folder)))).run()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, sys.argv[1:], nprocs=2)
"""


def test_two_workers_are_one_with_twice_the_passes(tmp_path):
    """Whether the network is copied to each or spread over both; and one worker can go on from what two have left."""
    batch = {"positions": 160, "longest": 160}
    rows = making.rows(tmp_path, 12)
    alone = making.settings(tmp_path, batch=batch | {"accumulate": 2}, output=str(tmp_path / "alone"))
    making.trained(alone, rows).run()
    shared = [
        making.settings(tmp_path, batch=batch, parallel=kind, checkpoints={"every": 4}, output=str(tmp_path / kind))
        for kind in ("ddp", "fsdp")
    ]
    script = tmp_path / "work.py"
    script.write_text(WORKERS)
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
        assert making.log(settings) == pytest.approx(making.log(alone), abs=1e-4)
        shutil.rmtree(f"{settings.output}/checkpoints/step-00000006")
        single = settings.model_copy(update={"parallel": "ddp", "batch": alone.batch})
        trainer = Trainer(single, Trainee.of(single.init), Corpus(making.prepared(alone, [])))
        assert trainer.step == 4
        trainer.run()
        assert making.log(single) == pytest.approx(making.log(alone), abs=1e-4)
