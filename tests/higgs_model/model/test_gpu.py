"""The network on a CUDA device compared with the CPU. Skipped without a device."""

import pytest
import torch

from higgs_model import HiggsAudioModel
from tests import builders
from tests.builders import SIZE, K

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VARIANTS = [{}, {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [0, 2]}]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_logits_and_greedy_codes_match_the_cpu(tmp_path, overrides):
    host = builders.model(seed=6, **overrides)
    builders.suppress_stream_tokens(host.audio_decoder_proj.audio_lm_head.weight, K, SIZE + 2)
    host.save_pretrained(tmp_path)
    device = HiggsAudioModel.from_pretrained(tmp_path, device="cuda")
    assert {p.device.type for p in device.parameters()} == {"cuda"}
    batch = builders.batch([9, 17, 12], [5, 11, 7])
    mask = host(**batch).attention_mask
    torch.testing.assert_close(device(**batch).logits.cpu()[mask], host(**batch).logits[mask], atol=1e-3, rtol=0)
    on_device, on_host = device.generate(**batch, max_new_tokens=40), host.generate(**batch, max_new_tokens=40)
    for found, expected in zip(on_device.audio_sequences, on_host.audio_sequences, strict=True):
        assert torch.equal(found.cpu(), expected)


def test_bfloat16_logits_are_close_to_float32(tmp_path):
    builders.model(seed=6).save_pretrained(tmp_path)
    float32 = HiggsAudioModel.from_pretrained(tmp_path, device="cuda")
    bfloat16 = HiggsAudioModel.from_pretrained(tmp_path, device="cuda", dtype="bfloat16")
    batch = builders.batch([9, 17, 12], [5, 11, 7])
    mask = float32(**batch).attention_mask
    expected, found = float32(**batch).logits[mask], bfloat16(**batch).logits[mask].float()
    assert torch.isfinite(found).all()
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.99
