"""Both layouts, there and back; what is not a codec is refused; the port agrees where it agrees with the reference."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from higgs_model import HiggsAudioCodec
from higgs_model.codec.names import original_name, our_name
from higgs_model.errors import BadCheckpoint, BadConfig, BadInput
from jobs.benchmark.codec_peer import transformers_port
from tests.higgs_model.codec import golden


@pytest.fixture
def folder(tmp_path):
    return golden.write_original("rvq_24khz", tmp_path / "original")


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_original_layout_comes_back(load, tmp_path, name):
    codec = load(name)
    codec.save_pretrained(tmp_path, layout="original")
    again = HiggsAudioCodec.from_pretrained(tmp_path)
    samples = golden.recording(9600)
    # A weight taken apart and put together again is off by its last bit, and fine grids show that.
    codes, wanted = again.encode(samples, codec.sample_rate), codec.encode(samples, codec.sample_rate)
    assert torch.equal(codes[:4], wanted[:4])
    torch.testing.assert_close(again.decode(wanted), codec.decode(wanted), atol=1e-5, rtol=0)
    stored = torch.load(tmp_path / "model.pth", weights_only=True)
    assert stored.keys() == golden.manifest()[name]["tensors"].keys() - {"semantic_model.masked_spec_embed"}


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
def test_the_transformers_layout_comes_back(load, tmp_path, name):
    codec = load(name)
    codec.save_pretrained(tmp_path)
    again = HiggsAudioCodec.from_pretrained(tmp_path)
    assert again.config.num_codebooks == codec.config.num_codebooks
    samples = golden.recording(9600)
    assert torch.equal(again.encode(samples, codec.sample_rate), codec.encode(samples, codec.sample_rate))
    assert again.revision is None


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
def test_every_name_has_one_original(load, name):
    blocks = len(load(name).config.ratios)
    for ours in load(name).state_dict():
        assert our_name(original_name(ours, blocks), blocks) == ours


@pytest.mark.parametrize("name", ["rfsq_24khz", "wavlm_avg_24khz"])
def test_what_the_transformers_layout_cannot_spell_is_not_saved_in_it(load, tmp_path, name):
    with pytest.raises(BadConfig, match="original layout instead"):
        load(name).save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
def test_the_port_agrees_on_every_whole_number_of_frames(load, name):
    codec = load(name)
    port = transformers_port(codec)
    with torch.inference_mode():
        for num_frames in (1, 2, 11, 40):
            samples = golden.recording(num_frames * codec.hop_samples)
            # Asked for a bandwidth it never heard of it would give fewer codebooks; its last one is all of them.
            theirs = port.encode(torch.from_numpy(samples)[None, None]).audio_codes[0]
            ours = codec.encode(samples, codec.sample_rate)
            assert torch.equal(ours, theirs)
            wave = port.decode(theirs[None]).audio_values[0, 0]
            torch.testing.assert_close(codec.decode(ours), wave, atol=1e-4, rtol=0)


def test_where_the_port_leaves_the_reference(load):
    """Where the two halves count different frames it pads by half a frame, not by 160 samples a feature."""
    codec = load("rvq_24khz")
    port = transformers_port(codec)
    differing = []
    for num_samples in golden.LENGTHS:
        samples = torch.from_numpy(golden.recording(num_samples))
        with torch.inference_mode():
            theirs = port.encode(samples[None, None]).audio_codes[0].numpy()
        wanted = golden.reference()[f"rvq_24khz/codes/{num_samples}"]
        if theirs.shape != wanted.shape or not np.array_equal(theirs, wanted):
            differing.append(num_samples)
    assert differing == [23456]


def test_a_pickle_that_holds_code_is_refused(folder):
    class Attack:
        def __reduce__(self):
            return print, ("owned",)

    with (folder / "model.pth").open("wb") as file:
        pickle.dump({"encoder.block.0.bias": Attack()}, file, protocol=2)
    with pytest.raises(BadCheckpoint, match=r"model\.pth: refused, it is not a file of tensors alone"):
        HiggsAudioCodec.from_pretrained(folder)


def _drop_weights(folder):
    (folder / "model.pth").unlink()


def _text_weights(folder):
    (folder / "model.pth").write_text("hello")


def _other_tensors(folder):
    torch.save({"a": torch.zeros(1)}, folder / "model.pth")


def _one_missing(folder):
    state = torch.load(folder / "model.pth", weights_only=True)
    del state["fc_post2.weight"]
    torch.save(state, folder / "model.pth")


def _one_more(folder):
    state = torch.load(folder / "model.pth", weights_only=True)
    torch.save(state | {"fc_post3.weight": torch.zeros(1)}, folder / "model.pth")


def _bad_json(folder):
    (folder / "config.json").write_text("{")


def _no_config(folder):
    (folder / "config.json").unlink()


def _wrong_books(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"bins": 64}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_weights, "there is no such file"),
        (_text_weights, "refused"),
        (_other_tensors, "not a Higgs Audio codec"),
        (_one_missing, r"1 missing \(the first is fc2.weight\), 0 unknown"),
        (_one_more, r"0 missing, 1 unknown \(the first is fc_post3.weight\)"),
        (_bad_json, "not JSON"),
        (_no_config, "there is no such file"),
        (_wrong_books, r"has the shape \(128,\); the configuration asks for \(64,\)"),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_what_is_not_a_codec_is_refused_in_a_sentence(folder, spoil, message):
    spoil(folder)
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
def test_bad_configurations_are_refused_in_a_sentence(folder, change, message):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(BadConfig, match=message):
        HiggsAudioCodec.from_pretrained(folder)


def test_a_bandwidth_that_is_no_target_is_refused(codec):
    with pytest.raises(BadConfig, match=r"3 kbps is not one of this codec's target bandwidths \(0.5, 1, 1.4\)"):
        codec.encode(golden.recording(960), codec.sample_rate, bandwidth_kbps=3)


def test_recordings_and_rates_must_be_as_many(codec):
    with pytest.raises(BadInput, match="1 recordings came with 2 sample rates"):
        codec.encode_batch([golden.recording(960)], [24000, 16000])
