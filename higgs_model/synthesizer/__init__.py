"""Script in, audio out. Each name is imported when it is first used, so importing the package is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from higgs_model.lazy import lazy_getattr

if TYPE_CHECKING:
    from higgs_model.synthesizer.records import Piece as Piece
    from higgs_model.synthesizer.records import Speech as Speech
    from higgs_model.synthesizer.records import SynthesizedChunk as SynthesizedChunk
    from higgs_model.synthesizer.records import Take as Take
    from higgs_model.synthesizer.settings import Pauses as Pauses
    from higgs_model.synthesizer.settings import SynthesisSettings as SynthesisSettings
    from higgs_model.synthesizer.synthesizer import Synthesizer as Synthesizer

_EXPORTS = {
    "Piece": "higgs_model.synthesizer.records",
    "Speech": "higgs_model.synthesizer.records",
    "SynthesizedChunk": "higgs_model.synthesizer.records",
    "Take": "higgs_model.synthesizer.records",
    "Pauses": "higgs_model.synthesizer.settings",
    "SynthesisSettings": "higgs_model.synthesizer.settings",
    "Synthesizer": "higgs_model.synthesizer.synthesizer",
}

__all__ = sorted(_EXPORTS)


__getattr__ = lazy_getattr(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return __all__
