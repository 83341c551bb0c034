"""The model called `demo`, which needs neither network nor GPU.

Until a trained one is embedded it is a stand-in: a network and a codec of the published structure, made very small,
with random weights from a fixed seed. It goes every step of the way that a real checkpoint goes, and says nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from higgs_model.codec.codec import HiggsAudioCodec
    from higgs_model.model.model import HiggsAudioModel

NAME = "demo"
FOLDER = Path(__file__).parent / "checkpoint"
"""Where the trained one is, when there is one."""
NOTICE = "the model `demo` is a stand-in with random weights: it makes sound, not speech"


def build() -> tuple[HiggsAudioModel, HiggsAudioCodec, PreTrainedTokenizerFast]:
    """The parts, in float32 on the CPU."""
    from higgs_model.demo.standin import build as build_standin

    return build_standin()
