"""Configurations: defaults, both layouts, contradictions."""

import json

import pytest
from transformers import HiggsAudioV2Config

from higgs_model import HiggsAudioConfig, HiggsAudioEncoderConfig
from higgs_model.config import from_transformers_layout, to_original_layout, to_transformers_layout
from higgs_model.errors import BadConfig
from tests import builders


def test_defaults_are_those_of_the_understanding_variant():
    config = HiggsAudioConfig()
    assert (config.audio_num_codebooks, config.audio_codebook_size, config.audio_adapter_type) == (12, 1024, "stack")
    assert (config.audio_stream_bos_id, config.audio_stream_eos_id, config.num_codebook_rows) == (1024, 1025, 1026)
    assert (config.audio_in_token_idx, config.audio_out_token_idx) == (128015, 128016)
    text, encoder = config.text_config, config.audio_encoder_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (3072, 28, 128256)
    assert text.rope_parameters["rope_theta"] == 500000.0
    assert text.rope_parameters["factor"] == 32.0
    assert (encoder.encoder_layers, encoder.d_model, encoder.num_mel_bins) == (32, 1280, 128)
    assert isinstance(encoder, HiggsAudioEncoderConfig)


def test_a_partial_backbone_is_completed_with_llamas_defaults():
    text = builders.config().text_config
    assert text.hidden_act == "silu"
    assert text.tie_word_embeddings is False


def test_the_original_layout_survives_a_round_trip(tmp_path):
    config = builders.config(audio_adapter_type="dual_ffn_fast_forward", audio_dual_ffn_layers=[1, 3])
    values = to_original_layout(config)
    assert values["text_config"]["rope_theta"] == 500000.0
    assert "rope_parameters" not in values["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    again = HiggsAudioConfig.from_pretrained(tmp_path)
    assert again.text_config.rope_parameters == config.text_config.rope_parameters
    assert to_original_layout(again) == {**values, "_name_or_path": str(tmp_path)} or (
        again.audio_dual_ffn_layers == [1, 3] and again.audio_encoder_config.d_model == 16
    )


def test_llama_3_2_rope_settings_under_their_old_names_are_read():
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    text = {"vocab_size": 128256, "rope_theta": 500000.0, "rope_scaling": rope}
    found = HiggsAudioConfig(text_config=text).text_config.rope_parameters
    assert {**rope, "rope_theta": 500000.0} == {**found}


def test_the_transformers_layout_is_read_and_written(tmp_path):
    theirs = HiggsAudioV2Config(codebook_size=1026)
    theirs.save_pretrained(tmp_path)
    ours = HiggsAudioConfig.from_pretrained(tmp_path)
    assert (ours.audio_num_codebooks, ours.audio_codebook_size) == (8, 1024)
    assert (ours.audio_adapter_type, ours.skip_audio_tower) == ("dual_ffn", True)
    assert ours.use_delay_pattern
    assert ours.audio_dual_ffn_layers == list(range(28))
    assert ours.eos_token_id == 128009
    back = to_transformers_layout(ours).to_dict()
    assert back == theirs.to_dict()
    assert from_transformers_layout(back)["audio_out_bos_token_id"] == 128013


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"audio_adapter_type": "triple"}, "audio_adapter_type='triple' is unknown, wanted one of stack, dual_ffn"),
        ({"audio_dual_ffn_layers": None}, "audio_adapter_type='dual_ffn' needs audio_dual_ffn_layers"),
        ({"audio_dual_ffn_layers": [0, 4]}, "names layer 4, but text_config.num_hidden_layers=4"),
        ({"audio_dual_ffn_layers": [-1]}, "names layer -1, but text_config.num_hidden_layers=4"),
        ({"audio_dual_ffn_layers": [1, 1]}, r"audio_dual_ffn_layers=\[1, 1\] names a layer twice"),
        ({"use_rq_transformer": True}, "use_rq_transformer=True with use_delay_pattern=True"),
        ({"audio_decoder_proj_num_layers": 2}, "audio_decoder_proj_num_layers=2 is not supported, wanted 0"),
        (
            {"audio_codebook_size": 512, "audio_stream_bos_id": 1024},
            "audio_stream_bos_id=1024 .*audio_codebook_size=512",
        ),
        ({"audio_stream_bos_id": 25}, "audio_stream_bos_id=25 and audio_stream_eos_id=25 are the same"),
        ({"audio_num_codebooks": 0}, "audio_num_codebooks=0 is not positive"),
        ({"pad_token_id": 160}, "pad_token_id=160 is outside the vocabulary of text_config.vocab_size=160"),
        ({"audio_out_token_idx": 999}, "audio_out_token_idx=999 is outside the vocabulary"),
        ({"audio_in_token_idx": builders.OUT}, "audio_in_token_idx and audio_out_token_idx are both token 152"),
        (
            {"text_config": {"hidden_size": 30, "num_attention_heads": 4}},
            r"hidden size \(30\) .* attention heads \(4\)",
        ),
        (
            {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 5}},
            "num_attention_heads=32 .* num_key_value_heads=5",
        ),
        (
            {"audio_encoder_config": {"d_model": 16, "encoder_attention_heads": 3}},
            "d_model=16 .* encoder_attention_heads=3",
        ),
    ],
)
def test_contradictions_are_refused_with_both_values(overrides, message):
    with pytest.raises(BadConfig, match=message):
        builders.config(**overrides)


def test_a_small_vocabulary_may_lack_tokens_that_it_never_needs():
    config = builders.config(audio_in_token_idx=128015, audio_eos_token_id=128012)
    assert not config.has_token(config.audio_in_token_idx)
    assert config.has_token(config.audio_out_token_idx)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"audio_embed_avg": True}, "needs audio_embed_avg=False, but this network has True"),
        ({"use_delay_pattern": False}, "needs use_delay_pattern=True, but this network has False"),
        ({"skip_audio_tower": False}, "needs skip_audio_tower=True"),
        ({"audio_adapter_type": "stack"}, "needs audio_adapter_type='dual_ffn', but this network has 'stack'"),
        ({"audio_dual_ffn_layers": [0, 1]}, r"needs all 4 layers .* has \[0, 1\]"),
    ],
)
def test_what_the_transformers_layout_cannot_say_is_refused(overrides, message):
    with pytest.raises(BadConfig, match=message):
        to_transformers_layout(builders.config(**overrides))
