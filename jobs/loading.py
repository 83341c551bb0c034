"""The synthesizer of a job's workers, from the job's settings."""

from __future__ import annotations

import logging

from higgs_model.engine.settings import EngineSettings
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from jobs.settings import JobSettings

logger = logging.getLogger(__name__)


def load_synthesizer(settings: JobSettings, slots: int) -> Synthesizer:
    """Load model and codec, with an engine of so many slots."""
    return Synthesizer.from_pretrained(
        settings.model,
        settings.codec,
        engine=EngineSettings(max_slots=slots),
        settings=synthesis_settings(settings),
    )


def synthesis_settings(settings: JobSettings) -> SynthesisSettings:
    """What a job's settings say of how scripts are spoken."""
    minutes = settings.segment_minutes
    return SynthesisSettings(
        seed=settings.seed, attempts=settings.attempts, segment_s=None if minutes is None else 60 * minutes
    )
