"""Our network compared with the port in transformers on the same weights, for both directions of the conversion."""

import pytest
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_model import HiggsAudioModel
from higgs_model.errors import BadConfig
from tests import builders
from tests.builders import OUT, PAD, SIZE, K

LENGTHS, FRAMES = [9, 17, 12], [5, 11, 7]


def port_config():
    return HiggsAudioV2Config(
        vocab_size=builders.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_codebooks=K,
        codebook_size=SIZE + 2,
        audio_token_id=OUT,
        audio_bos_token_id=builders.OUT_BOS,
        audio_delay_token_id=builders.AUDIO_EOS,
        audio_stream_bos_id=SIZE,
        audio_stream_eos_id=SIZE + 1,
        pad_token_id=PAD,
        eos_token_id=builders.EOT,
    )


def port_inputs(batch):
    """Convert a batch for the port: one placeholder per frame, and codes as (batch, frames, codebooks)."""
    clips = batch["audio_out_ids"].tensor_split(batch["audio_out_ids_start"][1:].tolist(), dim=1)
    rows = []
    for ids, mask, codes in zip(batch["input_ids"], batch["attention_mask"], clips, strict=True):
        tokens = ids[mask.bool()]
        counts = torch.where(tokens == OUT, codes.shape[1], 1)
        rows.append(tokens.repeat_interleave(counts))
    longest = max(len(row) for row in rows)
    max_frames = max(codes.shape[1] for codes in clips)
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0), value=PAD) for r in rows]),
        "attention_mask": torch.stack(
            [torch.nn.functional.pad(torch.ones_like(r), (longest - len(r), 0)) for r in rows]
        ),
        "audio_input_ids": torch.stack(
            [torch.nn.functional.pad(c, (0, max_frames - c.shape[1])) for c in clips]
        ).transpose(1, 2),
        "audio_input_ids_mask": torch.stack([torch.arange(max_frames) < c.shape[1] for c in clips]),
    }


@pytest.fixture(scope="module", params=["port to ours", "ours to port"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param == "port to ours":
        port = HiggsAudioV2ForConditionalGeneration(port_config())
        builders.randomize(port, seed=3)
        builders.suppress_stream_tokens(port.audio_lm_head.weight, K, SIZE + 2)
        port.save_pretrained(folder)
        ours = HiggsAudioModel.from_pretrained(folder, dtype=torch.float32)
        assert not ours.config.use_text_head
    else:
        ours = builders.model(seed=4)
        builders.suppress_stream_tokens(ours.audio_decoder_proj.audio_lm_head.weight, K, SIZE + 2)
        ours.save_pretrained(folder, layout="transformers", max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        port = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder)
        torch.testing.assert_close(
            HiggsAudioModel.from_pretrained(folder).state_dict(), ours.state_dict(), atol=0, rtol=0
        )
    return ours, port.eval()


@torch.inference_mode()
def test_logits_match_the_port(pair):
    ours, port = pair
    batch = builders.batch(LENGTHS, FRAMES)
    converted = port_inputs(batch)
    expected = port(**converted).logits.unflatten(-1, (K, SIZE + 2))
    found = ours(**batch, use_cache=True)
    assert torch.equal(found.expanded_input_ids, converted["input_ids"])
    # The port returns logits for all positions, our network only for audio frames.
    torch.testing.assert_close(found.audio_logits, expected[converted["input_ids"] == OUT], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_matches_the_port(pair, cache):
    ours, port = pair
    steps = 130
    batch = builders.batch(LENGTHS, FRAMES, seed=1)
    converted = port_inputs(batch)
    expected = port.generate(**converted, max_new_tokens=steps, do_sample=False)
    found = ours.generate(**batch, max_new_tokens=steps, do_sample=False, cache_implementation=cache)
    assert found.audio_rows == [0, 1, 2]
    for row in range(3):
        expected_clip = expected[row, -steps:].T
        assert len(expected_clip[0].unique()) > 5
        assert torch.equal(found.audio_sequences[row], expected_clip)


def test_padding_side_does_not_change_the_output(pair):
    ours, _ = pair
    left = ours.generate(**builders.batch(LENGTHS, FRAMES), max_new_tokens=30)
    right = ours.generate(**builders.batch(LENGTHS, FRAMES, padding="right"), max_new_tokens=30)
    for left_clip, right_clip in zip(left.audio_sequences, right.audio_sequences, strict=True):
        assert torch.equal(left_clip, right_clip)


def test_network_that_the_port_does_not_support_raises(tmp_path):
    projector = builders.model(use_audio_out_embed_projector=True)
    with pytest.raises(BadConfig, match="use_audio_out_embed_projector=False, but this network has True"):
        projector.save_pretrained(tmp_path, layout="transformers")
