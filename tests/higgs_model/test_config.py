"""Configurations: defaults, both layouts, validation."""

import json

import pytest
from transformers import HiggsAudioV2Config

from higgs_model import HiggsAudioConfig, HiggsAudioEncoderConfig
from higgs_model.config import from_transformers_layout, to_original_layout, to_transformers_layout
from higgs_model.errors import BadConfig
from tests import builders


def test_config_defaults_match_the_understanding_variant():
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


def test_partial_text_config_is_completed_with_llama_defaults():
    text = builders.config().text_config
    assert text.hidden_act == "silu"
    assert text.tie_word_embeddings is False


def test_original_layout_survives_a_round_trip(tmp_path):
    config = builders.config(audio_adapter_type="dual_ffn_fast_forward", audio_dual_ffn_layers=[1, 3])
    values = to_original_layout(config)
    assert values["text_config"]["rope_theta"] == 500000.0
    assert "rope_parameters" not in values["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    reloaded = HiggsAudioConfig.from_pretrained(tmp_path)
    assert reloaded.text_config.rope_parameters == config.text_config.rope_parameters
    assert to_original_layout(reloaded) == values


def test_config_reads_rope_settings_under_their_old_names():
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


def test_transformers_layout_survives_a_round_trip(tmp_path):
    original = HiggsAudioV2Config(codebook_size=1026)
    original.save_pretrained(tmp_path)
    config = HiggsAudioConfig.from_pretrained(tmp_path)
    assert (config.audio_num_codebooks, config.audio_codebook_size) == (8, 1024)
    assert (config.audio_adapter_type, config.skip_audio_tower) == ("dual_ffn", True)
    assert config.use_delay_pattern
    assert config.audio_dual_ffn_layers == list(range(28))
    assert config.eos_token_id == 128009
    restored = to_transformers_layout(config).to_dict()
    assert (restored.pop("audio_in_token_idx"), restored.pop("audio_eos_token_id")) == (128015, 128012)
    assert restored == original.to_dict()
    assert from_transformers_layout(restored)["audio_out_bos_token_id"] == 128013


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"audio_adapter_type": "triple"}, "audio_adapter_type='triple' is unknown, expected one of stack, dual_ffn"),
        ({"audio_dual_ffn_layers": None}, "audio_adapter_type='dual_ffn' needs audio_dual_ffn_layers"),
        ({"audio_dual_ffn_layers": [0, 4]}, "contains layer 4, but text_config.num_hidden_layers=4"),
        ({"audio_dual_ffn_layers": [-1]}, "contains layer -1, but text_config.num_hidden_layers=4"),
        ({"audio_dual_ffn_layers": [1, 1]}, r"audio_dual_ffn_layers=\[1, 1\] contains a layer twice"),
        ({"use_rq_transformer": True}, "use_rq_transformer=True with use_delay_pattern=True"),
        ({"audio_decoder_proj_num_layers": 2}, "audio_decoder_proj_num_layers=2 is not supported, expected 0"),
        (
            {"audio_codebook_size": 512, "audio_stream_bos_id": 1024},
            "audio_stream_bos_id=1024 .*audio_codebook_size=512",
        ),
        ({"audio_stream_bos_id": 25}, "audio_stream_bos_id=25 and audio_stream_eos_id=25 are the same"),
        ({"audio_num_codebooks": "8"}, "audio_num_codebooks='8' is not an integer"),
        ({"use_delay_pattern": "yes"}, "use_delay_pattern='yes' is not true or false"),
        ({"audio_dual_ffn_layers": "all"}, "audio_dual_ffn_layers='all' is not a list of integers"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type='mistral' is not supported"),
        ({"text_config": "llama"}, "text_config is a str, expected a mapping"),
        ({"audio_encoder_config": {"d_model": "x"}}, "d_model='x' is not an integer"),
        ({"audio_num_codebooks": 0}, "audio_num_codebooks=0 is not positive"),
        ({"pad_token_id": 160}, "pad_token_id=160 is outside the vocabulary of text_config.vocab_size=160"),
        ({"audio_out_token_idx": 999}, "audio_out_token_idx=999 is outside the vocabulary"),
        ({"audio_out_bos_token_id": builders.PAD}, "audio_out_bos_token_id and pad_token_id are both token 150"),
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
def test_contradictory_config_raises_with_both_values(overrides, message):
    with pytest.raises(BadConfig, match=message):
        builders.config(**overrides)


def test_published_config_fits_both_layouts():
    """It declares fast-forward, but skips no layer because all have a dual FFN, and it has 0 for False."""
    config = builders.config(
        audio_adapter_type="dual_ffn_fast_forward", audio_dual_ffn_layers=[0, 1, 2, 3], use_audio_out_self_attention=0
    )
    assert config.use_audio_out_self_attention is False
    assert to_transformers_layout(config).num_hidden_layers == 4


def test_small_vocabulary_may_lack_unused_tokens():
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
def test_config_that_the_transformers_layout_cannot_express_raises(overrides, message):
    with pytest.raises(BadConfig, match=message):
        to_transformers_layout(builders.config(**overrides))
