"""Higgs Audio v2: the network, its checkpoints, and everything that turns a script into audio.

Shapes are written with one legend throughout: B batch, S sequence, K codebooks, T frames, N samples, D width,
V vocabulary. A frame is one step of all codebooks; 25 frames are one second of audio.

Importing the package loads nothing heavy; each public name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from higgs_model.lazy import from_homes

if TYPE_CHECKING:
    from higgs_model.codec import HiggsAudioCodec as HiggsAudioCodec
    from higgs_model.config import HiggsAudioConfig as HiggsAudioConfig
    from higgs_model.config import HiggsAudioEncoderConfig as HiggsAudioEncoderConfig
    from higgs_model.model import HiggsAudioModel as HiggsAudioModel
    from higgs_model.script.script import Script as Script
    from higgs_model.synthesizer import Synthesizer as Synthesizer

_HOMES = {
    "HiggsAudioConfig": "higgs_model.config",
    "HiggsAudioEncoderConfig": "higgs_model.config",
    "HiggsAudioCodec": "higgs_model.codec",
    "HiggsAudioModel": "higgs_model.model",
    "Script": "higgs_model.script.script",
    "Synthesizer": "higgs_model.synthesizer",
}

__all__ = sorted(_HOMES)


__getattr__ = from_homes(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
