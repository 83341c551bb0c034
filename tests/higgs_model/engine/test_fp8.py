"""fp8 weights and KV cache are within the precision of the format, and refused on devices without fp8 units."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.engine import Engine, EngineSettings, fp8
from higgs_model.engine import engine as engine_module
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.errors import BadConfig
from tests.builders import K
from tests.higgs_model.engine import helpers


@given(rows=st.integers(1, 5), width=st.integers(1, 40), seed=st.integers(0, 99), power=st.integers(-20, 30))
def test_quantization_error_is_at_most_half_a_step(rows, width, seed, power):
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    codes, scale = fp8.quantize(values)
    assert scale.shape == (rows, 1)
    row_max = values.abs().amax(dim=1, keepdim=True)
    # e4m3 has three mantissa bits; below 2⁻⁶, subnormal steps of 2⁻⁹.
    allowed = torch.maximum(values.abs() * 2.0**-4, row_max / 448 * 2.0**-10) * 1.001
    assert ((codes.float() * scale - values).abs() <= allowed).all()
    doubled, _ = fp8.quantize(2 * values)
    assert torch.equal(doubled.float(), codes.float())


def test_zero_rows_and_non_finite_rows():
    codes, scale = fp8.quantize(torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]]))
    assert torch.equal(codes[0].float(), torch.zeros(2))
    assert scale.isfinite().tolist() == [[True], [False], [False]]
    # Non-finite values must stay so, because the engine checks for them.
    assert (codes.float() * scale)[1:].isfinite().sum() == 0


@pytest.mark.parametrize("bias", [None, torch.ones(48)])
def test_fp8_product_is_close_to_the_exact_one(bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator) * torch.logspace(-3, 3, 48).unsqueeze(1)
    hidden = torch.randn(5, 256, generator=generator) * torch.tensor([[1e-4], [1.0], [1e4], [3.0], [0.1]])
    expected = torch.nn.functional.linear(hidden, weight, bias)
    actual = fp8.Fp8Linear.from_weight(weight, bias)(hidden)
    # The relative error of each factor is at most 1/16, whatever the scale of its row or channel.
    largest = torch.nn.functional.linear(hidden.abs(), weight.abs())
    error = (actual - expected).abs() / largest
    assert error.max() < (1 + 1 / 16) ** 2 - 1
    assert (error.mean(dim=0) < 0.01).all()
    assert (error.mean(dim=1) < 0.01).all()


def test_fp8_engine_is_close_to_the_exact_one(monkeypatch):
    monkeypatch.setattr(fp8, "check_supported", lambda *_: None)
    monkeypatch.setattr(engine_module, "ContiguousAttention", lambda **shape: PagedAttention(**shape, fp8_cache=True))
    settings = EngineSettings(
        max_slots=2, max_positions=256, block_size=16, early_stopping=EarlyStoppingLimits(loop_frames=None)
    )
    network, request = helpers.make_network(endless=True), helpers.make_request(0)
    quantized = Engine(network, EngineSettings(**{**vars(settings), "fp8_weights": True, "fp8_cache": True}))
    monkeypatch.undo()
    exact = Engine(network, settings)
    hidden = []
    for engine in (exact, quantized):
        engine.add(request)
        (sequence,) = engine._sequences.values()
        engine._admit()
        length = len(sequence.prompt)
        # In two spans, so that the second one reads quantized keys.
        engine.runner.prefill([PrefillSpan(0, 0, 32)], [sequence.prompt])
        hidden.append(engine.runner.prefill([PrefillSpan(0, 32, length)], [sequence.prompt])[0])
    similarity = torch.nn.functional.cosine_similarity(*hidden, dim=0)
    assert 0.97 < similarity < 0.999999
    codes, _ = helpers.run(quantized, [helpers.make_request(1)])
    assert codes["1"].shape[0] == K
    assert np.isin(codes["1"], range(24)).all()


@pytest.mark.parametrize("setting", ["fp8_weights", "fp8_cache"])
def test_fp8_is_refused_on_devices_without_fp8_units(setting):
    with pytest.raises(BadConfig, match=f"{setting}=True needs a CUDA device of capability 8.9 or newer; this is cpu"):
        Engine(helpers.make_network(), EngineSettings(**{setting: True}))


@pytest.mark.parametrize(
    ("capability", "supported"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)]
)
def test_fp8_requires_compute_capability_8_9(monkeypatch, capability, supported):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Chip")
    device = torch.device("cuda")
    if supported:
        fp8.check_supported(device, "fp8_cache")
        return
    with pytest.raises(BadConfig, match=rf"newer; Some Chip has {capability[0]}\.{capability[1]}"):
        fp8.check_supported(device, "fp8_cache")
