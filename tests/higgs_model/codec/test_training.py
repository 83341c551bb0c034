"""Training of a small codec from scratch; codebooks follow the data, and dead codes are replaced."""

import pytest
import torch

from higgs_model.codec.losses import CodecLoss, mel_filters
from higgs_model.codec.quantizer import EuclideanCodebook
from tests import builders


def small_codec(**changes):
    return builders.codec(**{"codebook_size": 32, "encoder_channels": 4} | changes).train()


def chords(batch_size, seconds=0.4):
    """Decaying chords, a different one per row."""
    generator = torch.Generator().manual_seed(0)
    time_s = torch.arange(int(24000 * seconds)) / 24000
    pitches_hz = 150 + 500 * torch.rand(batch_size, 3, 1, generator=generator)
    return 0.2 * torch.sin(2 * torch.pi * pitches_hz * time_s).sum(1) * torch.exp(-3 * time_s)


@pytest.mark.parametrize("method", ["averages", "gradient", "fsq"])
def test_small_codec_trains_from_scratch(method):
    codec = small_codec(fsq_levels=(8, 5, 5)) if method == "fsq" else small_codec()
    codec.train_codebooks_by_gradient(method == "gradient")
    criterion, samples = CodecLoss(codec.sample_rate), chords(4)
    trainable = [parameter for parameter in codec.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3)
    totals = []
    for _ in range(25):
        losses = criterion(codec(samples), samples)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert sum(totals[-5:]) < 0.75 * sum(totals[:5])
    assert codec.eval().encode(samples[0], codec.sample_rate).shape == (3, 10)


def test_gradients_reach_all_parameters_except_the_semantic_model():
    codec = small_codec()
    samples = chords(2)
    CodecLoss(codec.sample_rate)(codec(samples), samples).total.backward()
    without = [name for name, parameter in codec.named_parameters() if parameter.grad is None]
    assert without
    assert all(name.startswith("semantic_model.") or name.endswith("codebook.embed") for name in without)
    assert not codec.semantic_model.training


def test_first_batch_initializes_codes_and_dead_codes_are_replaced():
    codebook = EuclideanCodebook(4, 2)
    vectors = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]]).repeat(5, 1)
    codebook.initialize(vectors)
    assert codebook.inited.item() == 1
    assert all((code == vectors).all(1).any() for code in codebook.embed)
    with torch.no_grad():
        codebook.embed.copy_(torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [9.0, 9.0]]))
        codebook.embed_avg.copy_(codebook.embed * 2)
    for _ in range(3):
        codebook.ema_update(vectors, codebook.nearest(vectors))
    assert codebook.cluster_size.min() >= 1.9
    assert codebook.embed.abs().max() < 2


def test_evaluation_does_not_update_codebooks():
    codec = small_codec().eval()
    before = {name: tensor.clone() for name, tensor in codec.quantizer.state_dict().items()}
    codec(chords(1))
    assert all(torch.equal(before[name], tensor) for name, tensor in codec.quantizer.state_dict().items())


def test_mel_filters_cover_the_band():
    filters = mel_filters(24000, 2048, 80)
    assert filters.shape == (80, 1025)
    assert (filters >= 0).all()
    assert (filters.sum(1) > 0).all()
