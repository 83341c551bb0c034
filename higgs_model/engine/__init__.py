"""The inference engine: continuous batching of requests, each of which turns a prompt into frames of codes.

Suffixes of tensor names give their shapes: S slots, P positions of prompts, B blocks of a slot, H heads, D head width,
K codebooks, T frames, W window of repetition-aware sampling.
"""

from __future__ import annotations

from higgs_model.engine.engine import Engine as Engine
from higgs_model.engine.request import FinishReason as FinishReason
from higgs_model.engine.request import Request as Request
from higgs_model.engine.request import Update as Update
from higgs_model.engine.settings import EngineSettings as EngineSettings
