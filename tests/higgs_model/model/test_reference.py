"""Our network compared with the reference implementation, on tiny random checkpoints saved by the reference.

`tests/golden/model/VARIANT` has a checkpoint in the original layout, and cases: inputs and outputs of the reference
(transformers 4.46, torch 2.13, CPU, float32). To keep the files small, int64 is stored as int8, inputs as exact
bfloat16, and only every n-th column of the logits.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from higgs_model import HiggsAudioModel

GOLDEN = Path(__file__).parents[2] / "golden" / "model"
CASES = [
    pytest.param(folder.parent.name, case, id=f"{folder.parent.name}-{case['name']}")
    for folder in sorted(GOLDEN.glob("*/cases.json"))
    for case in json.loads(folder.read_text())["cases"]
]
IDS = ("expanded_input_ids", "expanded_labels", "attention_mask")
MASKS = ("audio_in_mask", "audio_in_discrete_codes_mask", "audio_out_mask")


def load(variant, case, part):
    prefix = f"{case['name']}/{part}/"
    stored = load_file(GOLDEN / variant / "cases.safetensors")
    tensors = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    return {name: value.float() if value.is_floating_point() else value.long() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def model(request, models):
    variant = request.getfixturevalue("variant")
    if variant not in models:
        models[variant] = HiggsAudioModel.from_pretrained(GOLDEN / variant, dtype=torch.float32)
    return models[variant]


@pytest.mark.parametrize(("variant", "case"), [p for p in CASES if p.values[1]["kind"] == "forward"])
def test_forward_matches_the_reference(variant, case, model):
    expected = load(variant, case, "out")
    output = model(**load(variant, case, "in"), use_cache=bool(case["use_cache"]))
    assert {"logits", "expanded_input_ids", "audio_out_mask"} <= expected.keys()
    for name, value in expected.items():
        found = getattr(output, name)
        if name in ("logits", "audio_logits"):
            if name == "logits":
                found = found[..., :: case["logits_column_stride"]]
            torch.testing.assert_close(found, value, atol=1e-4, rtol=0)
        else:
            assert name in IDS + MASKS
            assert torch.equal(found.long(), value), name


@pytest.mark.parametrize(("variant", "case"), [p for p in CASES if p.values[1]["kind"] == "generate"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_matches_the_reference(variant, case, model, cache):
    expected = load(variant, case, "out")
    output = model.generate(
        **load(variant, case, "in"), max_new_tokens=case["max_new_tokens"], cache_implementation=cache
    )
    assert torch.equal(output.sequences, expected["sequences"])
    clips = [expected[f"audio_sequences.{n}"] for n in range(len(expected) - 1)]
    assert len(output.audio_sequences) == len(clips)
    for found, expected_clip in zip(output.audio_sequences, clips, strict=True):
        assert torch.equal(found, expected_clip)


def test_golden_cases_cover_every_variant():
    assert {p.values[0] for p in CASES} == {
        "audio_attention",
        "codes_in",
        "dual_ffn_all",
        "dual_ffn_some",
        "fast_forward",
        "fast_forward_attention",
        "no_delay",
        "projector",
        "stack",
        "tower",
        "tower_and_codes",
    }
