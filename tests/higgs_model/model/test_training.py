"""Losses, gradients, freezing, gradient checkpointing."""

import pytest
import torch
from torch.nn import functional

from higgs_model.errors import BadInput
from higgs_model.model import PartiallyFrozenEmbedding, PartiallyFrozenLinear
from tests import builders
from tests.builders import IN, MEL_FRAMES, MELS, OUT, SIZE, VOCAB, K

IGNORE = -100


def labelled_batch(seed=0):
    batch = builders.batch([9, 12], [5, 7], seed=seed, padding="right")
    batch["label_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    batch["label_ids"][:, :3] = IGNORE
    labels = batch["audio_out_ids"].clone()
    labels[1, 3:6] = IGNORE
    labels[3] = IGNORE
    batch["label_audio_ids"] = labels
    return batch


def test_losses_are_cross_entropies_of_the_next_labels():
    model = builders.model()
    batch = labelled_batch()
    output = model(**batch)

    text_losses = []
    for row in range(2):
        for position in range(output.expanded_labels.shape[1] - 1):
            label = output.expanded_labels[row, position + 1]
            if label != IGNORE:
                text_losses.append(functional.cross_entropy(output.logits[row, position], label))
    assert len(text_losses) == 9 + 12 - 6 - 2  # without the first three tokens and the placeholder of each row
    torch.testing.assert_close(output.llm_loss, torch.stack(text_losses).mean())

    by_codebook = []
    for k in range(K):
        losses = [
            functional.cross_entropy(output.audio_logits[frame, k], batch["label_audio_ids"][k, frame + 1])
            for start, end in ((0, 5), (5, 12))
            for frame in range(start, end - 1)
            if batch["label_audio_ids"][k, frame + 1] != IGNORE
        ]
        by_codebook.append(torch.stack(losses).mean() if losses else torch.tensor(0.0))
    torch.testing.assert_close(output.codebook_losses, torch.stack(by_codebook))
    assert output.codebook_losses[3] == 0
    torch.testing.assert_close(output.audio_loss, torch.stack(by_codebook).mean())
    torch.testing.assert_close(output.loss, output.llm_loss + output.audio_loss)


def test_codebook_weights_scale_the_audio_loss():
    model = builders.model()
    model.audio_codebook_weights = torch.tensor([1.0, 0.0, 0.0, 0.0])
    output = model(**labelled_batch())
    torch.testing.assert_close(output.audio_loss, output.codebook_losses[0])


def test_losses_are_none_without_labels():
    batch = labelled_batch()
    del batch["label_ids"], batch["label_audio_ids"]
    output = builders.model()(**batch)
    assert output.loss is output.llm_loss is output.audio_loss is output.codebook_losses is None


@pytest.mark.parametrize("adapter_type", ["dual_ffn", "dual_ffn_fast_forward"])
def test_batch_without_audio_yields_gradients_for_every_parameter(adapter_type):
    """Data-parallel training waits for the gradient of every parameter, whatever the batch of a worker contains."""
    model = builders.model(
        audio_adapter_type=adapter_type,
        audio_dual_ffn_layers=[0, 2],
        skip_audio_tower=False,
        use_audio_out_self_attention=True,
        use_audio_out_embed_projector=True,
    ).train()
    ids = torch.randint(1, 100, (2, 9))
    no_mels = torch.zeros(0, MELS, MEL_FRAMES)
    no_codes = torch.zeros(0, 0, dtype=torch.int64)
    output = model(
        ids,
        audio_features=no_mels,
        audio_feature_attention_mask=no_mels[:, 0],
        label_ids=ids,
        label_audio_ids=no_codes,
    )
    output.loss.backward()
    without_gradient = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without_gradient == []
    assert all(p.grad.eq(0).all() for p in model.audio_tower.parameters() if p.requires_grad)
    assert model.embed_tokens.weight.grad.abs().sum() > 0


def batch_of_all_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.tensor([[1, IN, 2, OUT, 3, 4], [5, 6, OUT, 7, IN, 8]]),
        "audio_features": torch.randn(2, MELS, MEL_FRAMES, generator=generator),
        "audio_feature_attention_mask": (torch.arange(MEL_FRAMES) < torch.tensor([[40], [25]])).long(),
        "audio_in_ids": builders.clip(generator, 7),
        "audio_in_ids_start": torch.tensor([0, 3]),
        "audio_out_ids": builders.clip(generator, 9),
        "audio_out_ids_start": torch.tensor([0, 4]),
        "label_ids": torch.tensor([[1, IGNORE, 2, IGNORE, 3, 4], [5, 6, IGNORE, 7, IGNORE, 8]]),
        "label_audio_ids": builders.clip(generator, 9),
    }


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# transformers 5.2x renames the method; the old name works in all supported releases.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter_type", ["dual_ffn", "dual_ffn_fast_forward", "stack"])
def test_gradient_checkpointing_does_not_change_gradients(adapter_type):
    model = builders.model(
        audio_adapter_type=adapter_type, audio_dual_ffn_layers=[0, 2], skip_audio_tower=False
    ).train()
    inputs = batch_of_all_inputs()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in [*model.layers, *model.audio_tower.layers])
    torch.testing.assert_close(gradients(model, inputs), expected)


def test_training_overfits_a_clip():
    model = builders.model().train()
    batch = labelled_batch()
    batch["label_audio_ids"] = batch["audio_out_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(**batch).loss.item()
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 < 2 < first


def test_partial_freezing_trains_only_the_new_rows():
    model = builders.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.freeze_llm(freeze_embed=True, freeze_embed_until_idx=100)
    model.freeze_text_head(100)
    assert isinstance(model.embed_tokens, PartiallyFrozenEmbedding)
    assert isinstance(model.audio_decoder_proj.text_lm_head, PartiallyFrozenLinear)
    batch = labelled_batch()
    batch["input_ids"][:, 1] = 130
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    embedding = model.embed_tokens.to_unsplit().weight
    head = model.audio_decoder_proj.text_lm_head.to_unsplit().weight
    assert torch.equal(embedding[:100], before["embed_tokens.weight"][:100])
    assert torch.equal(head[:100], before["audio_decoder_proj.text_lm_head.weight"][:100])
    assert not torch.equal(embedding[100:], before["embed_tokens.weight"][100:])
    assert not torch.equal(head[100:], before["audio_decoder_proj.text_lm_head.weight"][100:])
    for name, tensor in model.state_dict().items():
        if name in before and name.startswith(("layers.", "norm.")):
            changed = not torch.equal(tensor, before[name])
            assert changed == (".audio_" in name), name


def test_partial_freezing_does_not_change_the_output():
    model = builders.model()
    batch = labelled_batch()
    before = model(**batch)
    model.freeze_llm(freeze_embed_until_idx=70)
    model.freeze_text_head(70)
    model.freeze_llm(freeze_embed_until_idx=90)  # split again at another row
    after = model(**batch)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.loss, before.loss)


@pytest.mark.parametrize("until", [0, VOCAB, 999])
def test_freezing_none_or_all_rows_partially_raises(until):
    with pytest.raises(BadInput, match=f"freeze_until_idx={until} is out of range: expected 1 to 159 for 160 rows"):
        builders.model().freeze_text_head(until)


def test_freezing_complete_components():
    model = builders.model(skip_audio_tower=False)
    model.freeze_llm()
    model.freeze_text_head()
    model.freeze_audio_tower()
    model.freeze_audio_encoder_proj()
    counts = model.parameter_count_per_component()
    assert {name: counts["trainable"][name] for name in ("audio_tower", "llm_embed", "llm_non_embed")} == {
        "audio_tower": 0,
        "llm_embed": 0,
        "llm_non_embed": 0,
    }
    assert counts["trainable"]["audio_embed"] == counts["total"]["audio_embed"] == K * (SIZE + 2) * 32


def test_parameter_counts_of_components_sum_to_overall():
    model = builders.model(
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=[1],
        skip_audio_tower=False,
        use_audio_out_self_attention=True,
        use_audio_out_embed_projector=True,
    )
    for counts in model.parameter_count_per_component().values():
        assert counts.pop("overall") == sum(counts.values())
    total = model.parameter_count_per_component()["total"]
    assert total["llm_embed"] == 2 * VOCAB * 32
    assert total["overall"] == sum(p.numel() for p in model.parameters())


def test_label_after_padding_is_not_scored():
    """One row is padded on the left; predictions at padding positions must not count."""
    model = builders.model()
    ids = torch.randint(1, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    alone = model(ids, label_ids=ids).llm_loss
    batched = model(ids.repeat(2, 1), label_ids=torch.cat([ids, torch.full_like(ids, IGNORE)])).llm_loss
    torch.testing.assert_close(alone, batched)


@pytest.mark.parametrize("given", ["label_ids", "label_audio_ids"])
def test_head_without_labels_still_gets_a_gradient(given):
    model = builders.model().train()
    batch = labelled_batch()
    del batch["label_ids" if given == "label_audio_ids" else "label_audio_ids"]
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_cache_with_gradient_checkpointing_raises():
    model = builders.model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(BadInput, match="use_cache=True is incompatible with gradient checkpointing in training"):
        model(torch.tensor([[1, 2]]), use_cache=True)
