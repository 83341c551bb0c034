"""The network: layers, audio tower, merging of audio into prompts, losses, freezing, and reference generation."""

from higgs_model.model.cache import KVCache
from higgs_model.model.freezing import PartiallyFrozenEmbedding, PartiallyFrozenLinear
from higgs_model.model.generation import GenerationMode, GenerationOutput
from higgs_model.model.model import HiggsAudioModel
from higgs_model.model.output import HiggsAudioOutput

__all__ = [
    "GenerationMode",
    "GenerationOutput",
    "HiggsAudioModel",
    "HiggsAudioOutput",
    "KVCache",
    "PartiallyFrozenEmbedding",
    "PartiallyFrozenLinear",
]
