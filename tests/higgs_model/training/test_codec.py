"""A codec learns a few seconds of sound, and a restart changes nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from higgs_model.codec.losses import CodecLoss, LossWeights
from higgs_model.errors import BadConfig, BadInput
from higgs_model.training.analysis import Analysis
from higgs_model.training.codec import CodecTrainer, CodecTraining
from higgs_model.training.recordings import Recordings
from tests import builders

SHORT = CodecTraining(
    steps=20,
    taught_steps=10,
    decoder_from=15,
    analysed_s=10,
    crop_frames=8,
    batch_size=2,
    learning_rate=3e-3,
    rise_steps=5,
    coarse=0.3,
    floor=3e-3,
    shortest_window=256,
    weights=LossWeights(waveform=0.0, commitment=0.25, semantic=0.1),
)


def tiny_codec(**changes):
    sizes = {"codebook_size": 16, "encoder_channels": 2, "target_bandwidths_kbps": (0.1, 0.2, 0.3)}
    return builders.codec(**sizes | changes)


def vowels(seconds=2.0):
    """A voice that glides from vowel to vowel: harmonics of a changing pitch under moving formants."""
    time_s = np.arange(int(24_000 * seconds)) / 24_000
    pitch_hz = 140 + 30 * np.sin(2 * np.pi * 0.7 * time_s)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / 24_000
    formant_hz = 700 + 400 * np.sin(2 * np.pi * 1.3 * time_s)
    harmonics = [np.exp(-(((k * pitch_hz - formant_hz) / 300) ** 2)) * np.sin(k * phase) for k in range(1, 20)]
    return (0.2 * np.sum(harmonics, axis=0) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_s))).astype(np.float32)


def trainer(state=None, **changes):
    return CodecTrainer(tiny_codec(), dataclasses.replace(SHORT, **changes), Recordings([vowels()]), state)


def test_seconds_of_speech_are_learnt_in_seconds():
    one = trainer(steps=200, taught_steps=170, decoder_from=None, teach_semantic=True)
    mel, taught = [], []
    while one.step < 190:
        losses, distance = one.run_step()
        mel.append(losses.mel.item())
        taught.append(distance.item())
    assert np.mean(mel[-10:]) < 0.85 * np.mean(mel[:5])
    assert np.mean(taught[160:170]) < 0.7 * np.mean(taught[:5])
    # What it was taught is what its encoder finds by itself, more often than one in sixteen by far.
    sound = vowels()
    found, wanted = one.codec.eval().encode(sound, 24_000), one.taught_codes(torch.from_numpy(sound))
    assert found.shape == wanted.shape
    assert (found[0] == wanted[0]).float().mean() > 0.15


def test_a_codec_learns_without_being_taught_apart():
    one = trainer(steps=120, taught_steps=0, decoder_from=None)
    judge, sound = CodecLoss(24_000, floor=3e-3), torch.from_numpy(vowels())[None]

    def mel():
        one.codec.eval()
        with torch.no_grad():
            loss = judge(one.codec(sound), sound).mel.item()
        one.codec.train()
        return loss

    before, heard = mel(), []
    while one.step < one.settings.steps:
        heard.append(one.run_step()[0].mel.item())
    assert np.mean(heard[-10:]) < 0.8 * np.mean(heard[:5])
    assert mel() < 0.85 * before
    # Of sixteen; a codebook that has collapsed uses one or two.
    assert len(one.codec.encode(vowels(), 24_000).unique()) > 4


def test_a_restart_at_any_stage_changes_nothing(tmp_path):
    whole = trainer()
    wanted = [whole.run_step()[0].total.item() for _ in range(SHORT.steps)]
    found, path = [], tmp_path / "state.pt"
    for stop in (6, 10, 13, 15, SHORT.steps):
        torch.manual_seed(stop)
        part = trainer(path)
        assert part.step == len(found)
        while part.step < stop:
            found.append(part.run_step()[0].total.item())
        part.save(path)
    assert found == wanted
    state, other = whole.codec.state_dict(), part.codec.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_codes_stand_still_when_only_the_decoder_learns():
    one = trainer(decoder_from=12)
    while one.step < 12:
        one.run_step()
    codes, sound = one.codec.encode(vowels(), 24_000), one.codec.decode(one.codec.encode(vowels(), 24_000))
    for _ in range(2):
        one.run_step()
    assert torch.equal(one.codec.encode(vowels(), 24_000), codes)
    assert not torch.equal(one.codec.decode(codes), sound)


def test_log_spectra_follow_the_sound_and_forget_its_phase():
    sound = torch.from_numpy(vowels())[None]
    analysis = Analysis.fitted(24_000, 960, 32, sound)
    spectra = analysis(sound)
    assert spectra.shape == (1, 50, 32)
    assert spectra.square().mean().item() == pytest.approx(1, rel=0.05)
    assert torch.allclose(analysis(-sound), spectra, atol=1e-4)
    # A frame later in the sound is a frame later in the spectra; edges see what is not there any more.
    assert torch.allclose(analysis(sound[:, 960:])[:, 2:-2], spectra[:, 3:-2], atol=1e-4)
    # Most of what differs between frames is in the first few numbers.
    shares = spectra.var((0, 1)) / spectra.var((0, 1)).sum()
    assert shares[:8].sum() > 0.7


def test_fitted_codebooks_are_better_than_drawn_ones():
    latents = torch.randn(600, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 2, 32) + 1

    def errors(quantizer):
        made = [quantizer.eval()(latents[None], k).latents[0] for k in (1, 2, 3)]
        return [(one - latents).square().mean().item() for one in made]

    drawn, fitted = tiny_codec().quantizer.train(), tiny_codec().quantizer
    drawn(latents[None], 3)
    fitted.fit(latents)
    assert errors(fitted) == sorted(errors(fitted), reverse=True)
    assert errors(fitted)[-1] < 0.8 * errors(drawn)[-1]


def test_crops_depend_on_seed_and_number_alone():
    first, second = np.full(900, 0.25, np.float32), np.full(100, 8192, np.int16)
    recordings = Recordings([first, second])
    crops = recordings.crops(50, 500, seed=1, number=7)
    assert torch.equal(crops, recordings.crops(50, 500, seed=1, number=7))
    assert not torch.equal(crops, recordings.crops(50, 500, seed=1, number=8))
    lengths = {int((crop == 0.25).sum()) for crop in crops}
    assert lengths == {100, 500}  # never across two recordings; silence after a short one
    assert all(set(crop.unique().tolist()) <= {0.0, 0.25} for crop in crops)
    with pytest.raises(BadInput, match="no recording"):
        Recordings([])


def test_a_quantizer_that_cannot_be_fitted_is_refused():
    with pytest.raises(BadConfig, match="taught_steps"):
        CodecTrainer(tiny_codec(fsq_levels=(4, 4)), SHORT, Recordings([vowels()]))
