"""Script in, audio out. Importing this loads nothing heavy; each name is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from higgs_model.synthesizer.records import Piece as Piece
    from higgs_model.synthesizer.records import Speech as Speech
    from higgs_model.synthesizer.records import SpokenChunk as SpokenChunk
    from higgs_model.synthesizer.records import Take as Take
    from higgs_model.synthesizer.settings import Pauses as Pauses
    from higgs_model.synthesizer.settings import SynthesisSettings as SynthesisSettings
    from higgs_model.synthesizer.synthesizer import Synthesizer as Synthesizer

_HOMES = {
    "Piece": "records",
    "Speech": "records",
    "SpokenChunk": "records",
    "Take": "records",
    "Pauses": "settings",
    "SynthesisSettings": "settings",
    "Synthesizer": "synthesizer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
