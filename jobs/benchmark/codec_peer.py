"""transformers' port of the codec, with the weights of ours, as the peer that ours is measured and checked
against.

The port imports torchaudio for one function, a resampler. Where torchaudio is not installed, a module with
that one function (ours, which gives the same samples) stands in for it.
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


def transformers_port(codec: HiggsAudioCodec) -> Any:
    """A `HiggsAudioV2TokenizerModel` that has loaded our checkpoint, in evaluation mode."""
    _need_torchaudio()
    from transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer import (
        HiggsAudioV2TokenizerModel,
    )

    with tempfile.TemporaryDirectory() as folder:
        codec.save_pretrained(folder)
        return HiggsAudioV2TokenizerModel.from_pretrained(folder).eval()


def _need_torchaudio() -> None:
    if importlib.util.find_spec("torchaudio") is not None:
        return
    torchaudio, functional = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.functional")
    torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", loader=None)
    torchaudio.__dict__["functional"] = functional
    functional.__dict__["resample"] = _resample
    sys.modules |= {"torchaudio": torchaudio, "torchaudio.functional": functional}
    # transformers remembers what it once looked for.
    import_utils.is_torchaudio_available.cache_clear()


def _resample(waveform: Tensor, orig_freq: int, new_freq: int) -> Tensor:
    rows = resample_sinc(waveform.reshape(-1, waveform.shape[-1]), orig_freq, new_freq)
    return rows.view(*waveform.shape[:-1], -1)
