"""Codec training reduces the loss on a few seconds of audio, and resumes with identical results."""

import dataclasses

import numpy as np
import pytest
import torch

from higgs_model.codec.losses import CodecLoss, LossWeights
from higgs_model.errors import BadConfig, BadInput
from higgs_model.training.codec import CodecTrainer, CodecTraining
from higgs_model.training.log_mel_pca import LogMelPCA
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
    """Synthetic vowels: harmonics of a varying pitch under a moving formant."""
    time_s = np.arange(int(24_000 * seconds)) / 24_000
    pitch_hz = 140 + 30 * np.sin(2 * np.pi * 0.7 * time_s)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / 24_000
    formant_hz = 700 + 400 * np.sin(2 * np.pi * 1.3 * time_s)
    harmonics = [np.exp(-(((k * pitch_hz - formant_hz) / 300) ** 2)) * np.sin(k * phase) for k in range(1, 20)]
    return (0.2 * np.sum(harmonics, axis=0) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_s))).astype(np.float32)


def build_trainer(state=None, **changes):
    return CodecTrainer(tiny_codec(), dataclasses.replace(SHORT, **changes), Recordings([vowels()]), state)


def test_three_stages_reduce_the_losses():
    trainer = build_trainer(steps=200, taught_steps=170, decoder_from=None, teach_semantic=True)
    mel, distances = [], []
    while trainer.step < 190:
        losses, distance = trainer.run_step()
        mel.append(losses.mel.item())
        distances.append(distance.item())
    assert np.mean(mel[-10:]) < 0.85 * np.mean(mel[:5])
    assert np.mean(distances[160:170]) < 0.7 * np.mean(distances[:5])
    # The encoder predicts the target codes far more often than chance, one in sixteen.
    audio = vowels()
    codes, expected = trainer.codec.eval().encode(audio, 24_000), trainer.target_codes(torch.from_numpy(audio))
    assert codes.shape == expected.shape
    assert (codes[0] == expected[0]).float().mean() > 0.15


def test_joint_training_alone_reduces_the_loss():
    trainer = build_trainer(steps=120, taught_steps=0, decoder_from=None)
    criterion, audio = CodecLoss(24_000, floor=3e-3), torch.from_numpy(vowels())[None]

    def mel():
        trainer.codec.eval()
        with torch.no_grad():
            loss = criterion(trainer.codec(audio), audio).mel.item()
        trainer.codec.train()
        return loss

    before, losses_during_training = mel(), []
    while trainer.step < trainer.settings.steps:
        losses_during_training.append(trainer.run_step()[0].mel.item())
    assert np.mean(losses_during_training[-10:]) < 0.8 * np.mean(losses_during_training[:5])
    assert mel() < 0.85 * before
    # Of sixteen; a collapsed codebook uses one or two.
    assert len(trainer.codec.encode(vowels(), 24_000).unique()) > 4


def test_resuming_in_any_stage_gives_identical_results(tmp_path):
    uninterrupted = build_trainer()
    expected = [uninterrupted.run_step()[0].total.item() for _ in range(SHORT.steps)]
    losses, path = [], tmp_path / "state.pt"
    for stop in (6, 10, 13, 15, SHORT.steps):
        torch.manual_seed(stop)
        resumed = build_trainer(path)
        assert resumed.step == len(losses)
        while resumed.step < stop:
            losses.append(resumed.run_step()[0].total.item())
        resumed.save(path)
    assert losses == expected
    state, other = uninterrupted.codec.state_dict(), resumed.codec.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_codes_do_not_change_when_only_the_decoder_is_trained():
    trainer = build_trainer(decoder_from=12)
    while trainer.step < 12:
        trainer.run_step()
    codes, audio = trainer.codec.encode(vowels(), 24_000), trainer.codec.decode(trainer.codec.encode(vowels(), 24_000))
    for _ in range(2):
        trainer.run_step()
    assert torch.equal(trainer.codec.encode(vowels(), 24_000), codes)
    assert not torch.equal(trainer.codec.decode(codes), audio)


def test_log_mel_components_follow_the_audio_and_ignore_phase():
    audio = torch.from_numpy(vowels())[None]
    pca = LogMelPCA.fit(24_000, 960, 32, audio)
    spectra = pca(audio)
    assert spectra.shape == (1, 50, 32)
    assert spectra.square().mean().item() == pytest.approx(1, rel=0.05)
    assert torch.allclose(pca(-audio), spectra, atol=1e-4)
    # Shifting the audio by a frame shifts the spectra by a frame, except at the edges.
    assert torch.allclose(pca(audio[:, 960:])[:, 2:-2], spectra[:, 3:-2], atol=1e-4)
    # The first few components explain most of the variance.
    shares = spectra.var((0, 1)) / spectra.var((0, 1)).sum()
    assert shares[:8].sum() > 0.7


def test_fitted_codebooks_beat_randomly_sampled_ones():
    latents = torch.randn(600, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 2, 32) + 1

    def errors(quantizer):
        quantized = [quantizer.eval()(latents[None], k).latents[0] for k in (1, 2, 3)]
        return [(approximation - latents).square().mean().item() for approximation in quantized]

    sampled, fitted = tiny_codec().quantizer.train(), tiny_codec().quantizer
    sampled(latents[None], 3)
    fitted.fit_to(latents)
    assert errors(fitted) == sorted(errors(fitted), reverse=True)
    assert errors(fitted)[-1] < 0.8 * errors(sampled)[-1]


def test_crops_depend_on_seed_and_number_only():
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


def test_taught_steps_require_a_vector_quantizer():
    with pytest.raises(BadConfig, match="taught_steps"):
        CodecTrainer(tiny_codec(fsq_levels=(4, 4)), SHORT, Recordings([vowels()]))
