"""Higgs Audio v2: the network, its checkpoints, and everything that turns a script into audio.

Suffixes of tensor names give their shapes: B batch, S sequence, K codebooks, T frames, N samples, D width, V
vocabulary; `engine` has letters of its own. A frame is one step of all codebooks; one second of audio has 25 frames.

Importing the package is cheap: each public name is imported on first access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from higgs_model.lazy import lazy_getattr

if TYPE_CHECKING:
    from higgs_model.codec import HiggsAudioCodec as HiggsAudioCodec
    from higgs_model.config import HiggsAudioConfig as HiggsAudioConfig
    from higgs_model.config import HiggsAudioEncoderConfig as HiggsAudioEncoderConfig
    from higgs_model.model import HiggsAudioModel as HiggsAudioModel
    from higgs_model.script.script import Script as Script
    from higgs_model.synthesizer import Synthesizer as Synthesizer

_EXPORTS = {
    "HiggsAudioConfig": "higgs_model.config",
    "HiggsAudioEncoderConfig": "higgs_model.config",
    "HiggsAudioCodec": "higgs_model.codec",
    "HiggsAudioModel": "higgs_model.model",
    "Script": "higgs_model.script.script",
    "Synthesizer": "higgs_model.synthesizer",
}

__all__ = sorted(_EXPORTS)


__getattr__ = lazy_getattr(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return __all__
