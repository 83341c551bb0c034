"""transformers' port of the codec with our weights, as the reference for benchmarks and tests.

The port imports torchaudio for one function, `resample`. If torchaudio is not installed, it is replaced by a stub
module with our `resample_sinc`, which returns the same samples.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import tempfile
import types
from typing import Any

from torch import Tensor
from transformers.utils import import_utils

from higgs_model import HiggsAudioCodec
from higgs_model.audio.resample import resample_sinc


def load_transformers_port(codec: HiggsAudioCodec) -> Any:
    """Return a `HiggsAudioV2TokenizerModel` with the codec's weights, in evaluation mode."""
    _stub_torchaudio_if_missing()
    from transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer import (
        HiggsAudioV2TokenizerModel,
    )

    with tempfile.TemporaryDirectory() as folder:
        codec.save_pretrained(folder)
        return HiggsAudioV2TokenizerModel.from_pretrained(folder).eval()


def _stub_torchaudio_if_missing() -> None:
    if importlib.util.find_spec("torchaudio") is not None:
        return
    torchaudio, functional = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.functional")
    torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", loader=None)
    torchaudio.__dict__["functional"] = functional
    functional.__dict__["resample"] = _resample
    sys.modules |= {"torchaudio": torchaudio, "torchaudio.functional": functional}
    # transformers caches whether torchaudio is available.
    import_utils.is_torchaudio_available.cache_clear()


def _resample(waveform: Tensor, orig_freq: int, new_freq: int) -> Tensor:
    resampled_BN = resample_sinc(waveform.reshape(-1, waveform.shape[-1]), orig_freq, new_freq)
    return resampled_BN.view(*waveform.shape[:-1], -1)
