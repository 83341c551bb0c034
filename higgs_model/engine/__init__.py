"""The inference engine: continuous batching of requests, each of which turns a prompt into frames of codes."""

from __future__ import annotations

from higgs_model.engine.engine import Engine as Engine
from higgs_model.engine.request import FinishReason as FinishReason
from higgs_model.engine.request import Request as Request
from higgs_model.engine.request import Update as Update
from higgs_model.engine.settings import EngineSettings as EngineSettings
