"""Round trips of both layouts, rejection of invalid checkpoints, and agreement with transformers' port."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from higgs_model import HiggsAudioCodec
from higgs_model.codec.names import internal_name, original_name
from higgs_model.errors import BadCheckpoint, BadConfig, BadInput
from jobs.benchmark.codec_peer import load_transformers_port
from tests.higgs_model.codec import golden


@pytest.fixture
def folder(tmp_path):
    return golden.write_original("rvq_24khz", tmp_path / "original")


@pytest.mark.parametrize("name", golden.NAMES)
def test_original_layout_round_trips(load, tmp_path, name):
    codec = load(name)
    codec.save_pretrained(tmp_path, layout="original")
    reloaded = HiggsAudioCodec.from_pretrained(tmp_path)
    samples = golden.recording(9600)
    # Unfolding and folding weight norm changes the last bit of a weight, which can flip codes of the fine codebooks.
    codes, expected = reloaded.encode(samples, codec.sample_rate), codec.encode(samples, codec.sample_rate)
    assert torch.equal(codes[:4], expected[:4])
    torch.testing.assert_close(reloaded.decode(expected), codec.decode(expected), atol=1e-5, rtol=0)
    stored = torch.load(tmp_path / "model.pth", weights_only=True)
    assert stored.keys() == golden.manifest()[name]["tensors"].keys() - {"semantic_model.masked_spec_embed"}


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
def test_transformers_layout_round_trips(load, tmp_path, name):
    codec = load(name)
    codec.save_pretrained(tmp_path)
    reloaded = HiggsAudioCodec.from_pretrained(tmp_path)
    assert reloaded.config.num_codebooks == codec.config.num_codebooks
    samples = golden.recording(9600)
    assert torch.equal(reloaded.encode(samples, codec.sample_rate), codec.encode(samples, codec.sample_rate))
    assert reloaded.revision is None


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
def test_tensor_names_round_trip(load, name):
    blocks = len(load(name).config.ratios)
    for internal in load(name).state_dict():
        assert internal_name(original_name(internal, blocks), blocks) == internal


@pytest.mark.parametrize("name", ["rfsq_24khz", "wavlm_avg_24khz"])
def test_transformers_layout_rejects_unsupported_features(load, tmp_path, name):
    with pytest.raises(BadConfig, match="original layout instead"):
        load(name).save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
def test_port_agrees_for_whole_numbers_of_frames(load, name):
    codec = load(name)
    port = load_transformers_port(codec)
    with torch.inference_mode():
        for num_frames in (1, 2, 11, 40):
            samples = golden.recording(num_frames * codec.hop_samples)
            # The port's default is its last target bandwidth, which uses all codebooks.
            port_codes = port.encode(torch.from_numpy(samples)[None, None]).audio_codes[0]
            internal = codec.encode(samples, codec.sample_rate)
            assert torch.equal(internal, port_codes)
            wave = port.decode(port_codes[None]).audio_values[0, 0]
            torch.testing.assert_close(codec.decode(internal), wave, atol=1e-4, rtol=0)


def test_port_differs_from_the_reference_only_in_padding(load):
    """If acoustic and semantic frame counts differ, the port pads by half a frame, not by 160 samples per feature."""
    codec = load("rvq_24khz")
    port = load_transformers_port(codec)
    differing = []
    for num_samples in golden.LENGTHS:
        samples = torch.from_numpy(golden.recording(num_samples))
        with torch.inference_mode():
            port_codes = port.encode(samples[None, None]).audio_codes[0].numpy()
        expected = golden.reference()[f"rvq_24khz/codes/{num_samples}"]
        if port_codes.shape != expected.shape or not np.array_equal(port_codes, expected):
            differing.append(num_samples)
    assert differing == [23456]


def test_pickle_with_code_is_rejected(folder):
    class Attack:
        def __reduce__(self):
            return print, ("owned",)

    with (folder / "model.pth").open("wb") as file:
        pickle.dump({"encoder.block.0.bias": Attack()}, file, protocol=2)
    with pytest.raises(BadCheckpoint, match=r"model\.pth: rejected, it is not a pickle of tensors only"):
        HiggsAudioCodec.from_pretrained(folder)


def _remove_weights(folder):
    (folder / "model.pth").unlink()


def _write_text_as_weights(folder):
    (folder / "model.pth").write_text("hello")


def _write_unrelated_tensors(folder):
    torch.save({"a": torch.zeros(1)}, folder / "model.pth")


def _remove_tensor(folder):
    state = torch.load(folder / "model.pth", weights_only=True)
    del state["fc_post2.weight"]
    torch.save(state, folder / "model.pth")


def _add_tensor(folder):
    state = torch.load(folder / "model.pth", weights_only=True)
    torch.save(state | {"fc_post3.weight": torch.zeros(1)}, folder / "model.pth")


def _write_invalid_json(folder):
    (folder / "config.json").write_text("{")


def _remove_config(folder):
    (folder / "config.json").unlink()


def _shrink_codebooks(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"bins": 64}))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_remove_weights, "file not found"),
        (_write_text_as_weights, "rejected"),
        (_write_unrelated_tensors, "not a Higgs Audio codec"),
        (_remove_tensor, r"1 missing \(the first is fc2.weight\), 0 unknown"),
        (_add_tensor, r"0 missing, 1 unknown \(the first is fc_post3.weight\)"),
        (_write_invalid_json, "not valid JSON"),
        (_remove_config, "file not found"),
        (_shrink_codebooks, r"has shape \(128,\); expected \(64,\) by the configuration"),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_invalid_checkpoint_is_rejected_with_its_reason(folder, corrupt, message):
    corrupt(folder)
    with pytest.raises(BadCheckpoint, match=message):
        HiggsAudioCodec.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_bandwith": [1]}, "unknown key 'target_bandwith'; did you mean 'target_bandwidths'"),
        ({"semantic_techer": "mert"}, "semantic_techer is 'mert'"),
        ({"downsample_mode": "max"}, "semantic downsampling is 'max'"),
        ({"n_q": 0}, "num_codebooks is 0"),
        ({"ratios": [2, 2]}, "shorter than one semantic feature"),
    ],
)
def test_invalid_configuration_is_rejected_with_its_reason(folder, change, message):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(BadConfig, match=message):
        HiggsAudioCodec.from_pretrained(folder)


def test_unknown_target_bandwidth_is_rejected(codec):
    with pytest.raises(BadConfig, match=r"3 kbps is not one of this codec's target bandwidths \(0.5, 1, 1.4\)"):
        codec.encode(golden.recording(960), codec.sample_rate, bandwidth_kbps=3)


def test_number_of_sample_rates_must_match_recordings(codec):
    with pytest.raises(BadInput, match="got 1 recordings with 2 sample rates"):
        codec.encode_batch([golden.recording(960)], [24000, 16000])
