"""Script in, audio out."""

from __future__ import annotations

from higgs_model.synthesizer.records import Piece as Piece
from higgs_model.synthesizer.records import Speech as Speech
from higgs_model.synthesizer.records import SpokenChunk as SpokenChunk
from higgs_model.synthesizer.records import Take as Take
from higgs_model.synthesizer.settings import Pauses as Pauses
from higgs_model.synthesizer.settings import SynthesisSettings as SynthesisSettings
from higgs_model.synthesizer.synthesizer import Synthesizer as Synthesizer
