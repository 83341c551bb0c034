"""The loss: the network's own, transformers' port's, and the same for packed samples and alone."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_model.errors import BadConfig, BadInput
from higgs_model.training.collator import Collator, Example
from higgs_model.training.objective import Objective
from higgs_model.training.settings import Loss
from higgs_model.training.store import Heard
from tests import builders
from tests.builders import OUT, SIZE, K
from tests.higgs_model.model.test_port import port_inputs

VARIANTS = {
    "dual_ffn": {},
    "fast_forward": {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [1, 2]},
    "audio_attention": {"use_audio_out_self_attention": True},
    "stack": {"audio_adapter_type": "stack"},
}


def example(generator, *, learnt=True):
    """Some text, a clip that is not learnt, text, one that is."""
    text = generator.integers(1, 100, int(generator.integers(3, 9))).tolist()
    ids = [1, *text, builders.OUT_BOS, OUT, builders.AUDIO_EOS, *text[:2], builders.OUT_BOS, OUT, builders.AUDIO_EOS, 7]
    trained = [False] * (len(ids) - 4) + [learnt] * 4
    clips = [generator.integers(0, SIZE, (K, int(frames))).astype(np.int16) for frames in generator.integers(2, 9, 2)]
    return Example(np.array(ids, np.int32), np.array(trained), tuple(Heard(clip, None) for clip in clips))


def losses(objective, batch, counts=None):
    own = torch.tensor([batch.num_labels, *batch.num_code_labels], dtype=torch.float32)
    return objective(batch, own if counts is None else counts)


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    return [example(generator) for _ in range(5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_networks_own_loss(variant, examples):
    model = builders.model(**VARIANTS[variant])
    batch = Collator(model.config)([[one] for one in examples])
    expected = model(**batch.inputs())
    found = losses(Objective(model, Loss()), batch)
    torch.testing.assert_close(found.total, expected.loss)
    torch.testing.assert_close(found.codebooks / torch.tensor(batch.num_code_labels), expected.codebook_losses)
    found.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(**batch.inputs()).loss.backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])


def test_it_is_the_ports_loss(tmp_path, examples):
    """Which sums over codebooks where ours is the mean, and wants codes as (batch, frames, codebooks)."""
    ours = builders.model(seed=4)
    ours.save_pretrained(tmp_path, layout="transformers")
    port = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    one_clip = [Example(one.ids[-6:], one.trained[-6:], one.recordings[1:]) for one in examples]
    batch = Collator(ours.config)([[one] for one in one_clip])
    theirs = port_inputs(batch.inputs())
    labels = batch.label_audio_ids.tensor_split(batch.audio_out_ids_start[1:].tolist(), dim=1)
    most = max(clip.shape[1] for clip in labels)
    padded = [torch.nn.functional.pad(clip, (0, most - clip.shape[1]), value=-100) for clip in labels]
    expected = port(**theirs, audio_labels=torch.stack(padded).transpose(1, 2)).loss
    found = losses(Objective(ours, Loss(text=0.0)), batch).total
    torch.testing.assert_close(found * K, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_are_as_if_alone(variant, attention, examples):
    configured = builders.config(**VARIANTS[variant])
    configured._attn_implementation = attention
    model = builders.randomize(type(builders.model())(configured)).eval()
    collate = Collator(configured)
    counts = torch.ones(1 + K)
    objective = Objective(model, Loss())
    alone = [losses(objective, collate([[one]]), counts) for one in examples]
    packed = losses(objective, collate([examples[:3], examples[3:]]), counts)
    torch.testing.assert_close(packed.text, torch.stack([one.text for one in alone]).sum())
    torch.testing.assert_close(packed.codebooks, torch.stack([one.codebooks for one in alone]).sum(dim=0))


@pytest.mark.parametrize("variant", [*VARIANTS, "tower"])
def test_a_pass_asks_the_device_nothing(variant, examples):
    """Tensors without values, as a GPU's are before one waits for them: whoever looks at one is told."""
    model = builders.model(**VARIANTS.get(variant, {"skip_audio_tower": False})).train()
    batch = Collator(model.config)([examples[:2], examples[2:]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses(Objective(model, Loss()), batch).total.backward()
        with pytest.raises(DynamicOutputShapeException):
            torch.ones(3).nonzero()


def test_flash_attention_cannot_keep_packed_samples_apart(examples):
    model = builders.model()
    batch = Collator(model.config)([examples])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadInput, match="packed samples need sdpa or eager attention"):
        losses(Objective(model, Loss()), batch)


def test_weights_weigh(examples):
    model = builders.model()
    batch = Collator(model.config)([[one] for one in examples])
    plain = losses(Objective(model, Loss()), batch)
    means = plain.codebooks / torch.tensor(batch.num_code_labels)
    weighed = losses(Objective(model, Loss(text=0.5, audio=2.0, codebooks=(3.0, 1.0, 0.0, 0.0))), batch)
    expected = 0.5 * plain.text / batch.num_labels + 2 * (3 * means[0] + means[1]) / 4
    torch.testing.assert_close(weighed.total, expected)
    with pytest.raises(BadConfig, match="loss.codebooks has 2 weights, but the network has 4 codebooks"):
        Objective(model, Loss(codebooks=(1.0, 1.0)))


def test_label_smoothing_is_torchs(examples):
    model = builders.model()
    batch = Collator(model.config)([[one] for one in examples])
    logits = model(**batch.inputs()).audio_logits[:-1].flatten(0, 1)
    scored = batch.label_audio_ids.clone()
    scored[:, batch.audio_out_ids_start] = -100
    labels = scored[:, 1:].T.flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2)
    found = losses(Objective(model, Loss(label_smoothing=0.2)), batch)
    torch.testing.assert_close(found.codebooks.sum(), expected)


def test_a_batch_in_which_nothing_is_learnt_reaches_every_parameter():
    model = builders.model().train()
    batch = Collator(model.config)([[example(np.random.default_rng(1), learnt=False)]])
    found = losses(Objective(model, Loss()), batch)
    found.total.backward()
    assert found.total == 0
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
