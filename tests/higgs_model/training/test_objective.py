"""The training loss equals the model's own loss and that of transformers' port, packed or not."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_model.errors import BadConfig, BadInput
from higgs_model.training.collator import Collator, Example
from higgs_model.training.objective import Objective
from higgs_model.training.settings import LossSettings
from higgs_model.training.store import PreparedAudio
from tests import builders
from tests.builders import OUT, SIZE, K
from tests.higgs_model.model.test_port import port_inputs

VARIANTS = {
    "dual_ffn": {},
    "fast_forward": {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [1, 2]},
    "audio_attention": {"use_audio_out_self_attention": True},
    "stack": {"audio_adapter_type": "stack"},
}


def build_example(generator, *, has_labels=True):
    """Build an example of text, a clip without labels, text, and a clip with labels."""
    text = generator.integers(1, 100, int(generator.integers(3, 9))).tolist()
    ids = [1, *text, builders.OUT_BOS, OUT, builders.AUDIO_EOS, *text[:2], builders.OUT_BOS, OUT, builders.AUDIO_EOS, 7]
    loss_mask = [False] * (len(ids) - 4) + [has_labels] * 4
    clips = [generator.integers(0, SIZE, (K, int(frames))).astype(np.int16) for frames in generator.integers(2, 9, 2)]
    return Example(np.array(ids, np.int32), np.array(loss_mask), tuple(PreparedAudio(clip, None) for clip in clips))


def compute_losses(objective, batch, counts=None):
    own = torch.tensor([batch.num_labels, *batch.num_code_labels], dtype=torch.float32)
    return objective(batch, own if counts is None else counts)


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    return [build_example(generator) for _ in range(5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_matches_the_models_own(variant, examples):
    model = builders.model(**VARIANTS[variant])
    batch = Collator(model.config)([[example] for example in examples])
    expected = model(**batch.inputs())
    losses = compute_losses(Objective(model, LossSettings()), batch)
    torch.testing.assert_close(losses.total, expected.loss)
    torch.testing.assert_close(losses.codebooks / torch.tensor(batch.num_code_labels), expected.codebook_losses)
    losses.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(**batch.inputs()).loss.backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])


def test_loss_matches_the_port(tmp_path, examples):
    """The port sums over codebooks instead of averaging, and takes codes as (batch, frames, codebooks)."""
    ours = builders.model(seed=4)
    ours.save_pretrained(tmp_path, layout="transformers")
    port = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    last_clips = [Example(example.ids[-6:], example.loss_mask[-6:], example.recordings[1:]) for example in examples]
    batch = Collator(ours.config)([[example] for example in last_clips])
    inputs = port_inputs(batch.inputs())
    labels = batch.label_audio_ids.tensor_split(batch.audio_out_ids_start[1:].tolist(), dim=1)
    max_length = max(clip.shape[1] for clip in labels)
    padded = [torch.nn.functional.pad(clip, (0, max_length - clip.shape[1]), value=-100) for clip in labels]
    expected = port(**inputs, audio_labels=torch.stack(padded).transpose(1, 2)).loss
    losses = compute_losses(Objective(ours, LossSettings(text=0.0)), batch).total
    torch.testing.assert_close(losses * K, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_do_not_affect_each_other(variant, attention, examples):
    config = builders.config(**VARIANTS[variant])
    config._attn_implementation = attention
    model = builders.randomize(type(builders.model())(config)).eval()
    collate = Collator(config)
    counts = torch.ones(1 + K)
    objective = Objective(model, LossSettings())
    single = [compute_losses(objective, collate([[example]]), counts) for example in examples]
    packed = compute_losses(objective, collate([examples[:3], examples[3:]]), counts)
    torch.testing.assert_close(packed.text, torch.stack([loss.text for loss in single]).sum())
    torch.testing.assert_close(packed.codebooks, torch.stack([loss.codebooks for loss in single]).sum(dim=0))


@pytest.mark.parametrize("variant", [*VARIANTS, "tower"])
def test_pass_does_not_synchronize_with_the_device(variant, examples):
    """Fake tensors have no values, so any operation that needs the device's values raises."""
    model = builders.model(**VARIANTS.get(variant, {"skip_audio_tower": False})).train()
    batch = Collator(model.config)([examples[:2], examples[2:]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        compute_losses(Objective(model, LossSettings()), batch).total.backward()
        with pytest.raises(DynamicOutputShapeException):
            torch.ones(3).nonzero()


def test_flash_attention_rejects_packed_samples(examples):
    model = builders.model()
    batch = Collator(model.config)([examples])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadInput, match="packed samples need sdpa or eager attention"):
        compute_losses(Objective(model, LossSettings()), batch)


def test_loss_weights_are_applied(examples):
    model = builders.model()
    batch = Collator(model.config)([[example] for example in examples])
    plain = compute_losses(Objective(model, LossSettings()), batch)
    means = plain.codebooks / torch.tensor(batch.num_code_labels)
    weighted = compute_losses(
        Objective(model, LossSettings(text=0.5, audio=2.0, codebooks=(3.0, 1.0, 0.0, 0.0))), batch
    )
    expected = 0.5 * plain.text / batch.num_labels + 2 * (3 * means[0] + means[1]) / 4
    torch.testing.assert_close(weighted.total, expected)
    with pytest.raises(BadConfig, match="loss.codebooks has 2 weights, but the model has 4 codebooks"):
        Objective(model, LossSettings(codebooks=(1.0, 1.0)))


def test_label_smoothing_matches_torch(examples):
    model = builders.model()
    batch = Collator(model.config)([[example] for example in examples])
    logits = model(**batch.inputs()).audio_logits[:-1].flatten(0, 1)
    target_ids = batch.label_audio_ids.clone()
    target_ids[:, batch.audio_out_ids_start] = -100
    labels = target_ids[:, 1:].T.flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2)
    losses = compute_losses(Objective(model, LossSettings(label_smoothing=0.2)), batch)
    torch.testing.assert_close(losses.codebooks.sum(), expected)


def test_batch_without_labels_still_has_gradients_for_every_parameter():
    model = builders.model().train()
    batch = Collator(model.config)([[build_example(np.random.default_rng(1), has_labels=False)]])
    losses = compute_losses(Objective(model, LossSettings()), batch)
    losses.total.backward()
    assert losses.total == 0
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
