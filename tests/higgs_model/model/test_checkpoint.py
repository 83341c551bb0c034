"""Checkpoints: loading and saving, validation, and memory use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from higgs_model import HiggsAudioModel
from higgs_model.errors import BadCheckpoint, BadConfig
from tests import builders

GOLDEN = Path(__file__).parents[2] / "golden" / "model"


@pytest.fixture
def saved(tmp_path):
    builders.model(seed=7).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


VARIANTS = {
    "v2": {},
    "tower": {"skip_audio_tower": False, "use_audio_out_embed_projector": True},
    "fast forward": {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [1, 2]},
    "audio attention": {"use_audio_out_self_attention": True, "audio_dual_ffn_layers": [0, 3]},
    "stack": {"audio_adapter_type": "stack"},
    "no text head": {"use_text_head": False},
}


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_saved_model_is_loaded_unchanged(tmp_path, overrides, shards):
    model = builders.model(seed=1, **overrides)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = HiggsAudioModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    prompt = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(prompt, use_cache=True).logits, model(prompt, use_cache=True).logits)


def test_loading_concatenates_partially_frozen_rows():
    expected = HiggsAudioModel.from_pretrained(GOLDEN / "dual_ffn_all")
    joined = HiggsAudioModel.from_pretrained(GOLDEN / "frozen_pairs")
    assert len(list((GOLDEN / "frozen_pairs").glob("*.safetensors"))) == 3
    torch.testing.assert_close(joined.state_dict(), expected.state_dict(), atol=0, rtol=0)


def test_saving_concatenates_partially_frozen_rows(tmp_path):
    model = builders.model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.freeze_llm(freeze_embed_until_idx=50)
    model.freeze_text_head(60)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(HiggsAudioModel.from_pretrained(tmp_path).state_dict(), expected, atol=0, rtol=0)


def test_from_pretrained_converts_dtype_and_leaves_parameters_trainable(saved):
    model = HiggsAudioModel.from_pretrained(saved, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(BadConfig, match="dtype='int7' is not a floating-point dtype"):
        HiggsAudioModel.from_pretrained(saved, dtype="int7")


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpux", "device='tpux' is not a torch device"), ("meta", "device='meta' cannot hold weights")],
)
def test_invalid_device_raises(saved, device, message):
    with pytest.raises(BadConfig, match=message):
        HiggsAudioModel.from_pretrained(saved, device=device)


def test_dtype_defaults_to_that_of_the_stored_weights(saved):
    values = json.loads((saved / "config.json").read_text())
    del values["torch_dtype"]
    (saved / "config.json").write_text(json.dumps(values))
    tensors = load_file(saved / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, saved / "model.safetensors")
    assert HiggsAudioModel.from_pretrained(saved).dtype == torch.bfloat16


def test_eos_token_is_read_from_the_generation_config(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert HiggsAudioModel.from_pretrained(saved).config.eos_token_id == [7, 9]


def test_derived_tensors_of_older_checkpoints_are_ignored(saved):
    def add_derived(tensors):
        tensors["audio_codebook_weights"] = torch.ones(builders.K)
        tensors["rotary_emb.inv_freq"] = torch.ones(4)
        tensors["rotary_emb.original_inv_freq"] = torch.ones(4)

    edit(saved, add_derived)
    torch.testing.assert_close(
        HiggsAudioModel.from_pretrained(saved).state_dict(), builders.model(seed=7).state_dict(), atol=0, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"missing: norm\.weight$"),
        (lambda t: t.update(surprise=torch.ones(1)), r"unexpected: surprise$"),
        (
            lambda t: t.update({"norm.weight": torch.ones(31)}),
            r"wrong shape: norm\.weight is \(31,\), expected \(32,\)$",
        ),
        (
            lambda t: [t.pop("norm.weight"), t.pop("layers.2.mlp.up_proj.weight"), t.update(surprise=torch.ones(1))],
            r"missing: layers\.2\.mlp\.up_proj\.weight, norm\.weight; unexpected: surprise$",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.")],
            r"missing: layers\.0\.\S+, .* and \d+ more$",
        ),
    ],
)
def test_mismatched_tensors_are_listed(saved, change, message):
    edit(saved, change)
    with pytest.raises(BadCheckpoint, match=message):
        HiggsAudioModel.from_pretrained(saved)


def truncate(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
            "model_type 'llama', expected one of higgs_audio",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"lacks the weight files model\.safetensors"),
        (lambda f: truncate(f / "model.safetensors", 0.5), r"model\.safetensors cannot be read as safetensors"),
        (lambda f: truncate(f / "model.safetensors", 0), r"model\.safetensors cannot be read as safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is not an index of safetensors files"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}'),
            r"lacks the weight files one\.safetensors",
        ),
    ],
)
def test_damaged_checkpoint_raises_with_its_cause(saved, damage, message):
    damage(saved)
    with pytest.raises(BadCheckpoint, match=message):
        HiggsAudioModel.from_pretrained(saved)


def test_tensor_in_two_files_raises(tmp_path):
    builders.model().save_pretrained(tmp_path, max_shard_size="30KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(BadCheckpoint, match=r"is in both model-00001-of-\d+\.safetensors and model-00002"):
        HiggsAudioModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "/no/such/folder is not a folder: a checkpoint is a folder with config.json"),
        ("./nowhere", "./nowhere is not a folder"),
        ("not a hub id!", "'not a hub id!' is neither a folder nor a Hub id"),
        ("someone/some-model", "not a local folder, not in the local Hub cache, and the Hub is unreachable"),
    ],
)
def test_missing_checkpoint_raises(name, message):
    with pytest.raises(BadCheckpoint, match=message):
        HiggsAudioModel.from_pretrained(name)


def test_hub_id_is_resolved_from_the_cache_with_its_commit(saved, tmp_path):
    """Tests are offline, so the cache is created in the layout of the Hub client."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--voice"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    saved.rename(repository / "snapshots" / commit)
    (repository / "refs" / "main").write_text(commit)
    script = "from higgs_model import HiggsAudioModel\nprint(HiggsAudioModel.from_pretrained('someone/voice').revision)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == commit


def test_loading_holds_one_copy_of_the_weights(tmp_path):
    """Loading raises the peak memory of a process by at most one copy of the weights."""
    text_config = {
        **builders.config().text_config.to_dict(),
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "head_dim": 64,
    }
    model = builders.model(text_config=text_config)
    megabytes = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert megabytes > 350
    model.save_pretrained(tmp_path)
    del model
    script = (
        "import resource, sys, torch\n"
        "from higgs_model import HiggsAudioModel\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = HiggsAudioModel.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.25 * megabytes
