"""Builds a worker's synthesizer from the job's settings. Torch is imported only where a model is loaded."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from higgs_model import demo
from higgs_model.errors import BadInput
from jobs.synthesize.settings import JobSettings

if TYPE_CHECKING:
    from higgs_model.audio.take_checks import TranscriptCheck
    from higgs_model.synthesizer import SynthesisSettings, Synthesizer


@dataclasses.dataclass(frozen=True)
class WorkerResources:
    """The resources of one worker.

    Attributes:
        slots: maximum number of concurrent requests of its engine.
        threads: number of CPU threads; None for torch's default.
    """

    slots: int
    threads: int | None = None


def load_synthesizer(settings: JobSettings, resources: WorkerResources) -> Synthesizer:
    """Load model and codec, and start an engine."""
    import torch

    from higgs_model.engine.settings import EngineSettings
    from higgs_model.synthesizer import Synthesizer

    if resources.threads is not None:
        torch.set_num_threads(resources.threads)
    return Synthesizer.from_pretrained(
        settings.model,
        settings.codec,
        engine=EngineSettings(max_slots=resources.slots),
        settings=synthesis_settings(settings),
    )


def synthesis_settings(settings: JobSettings) -> SynthesisSettings:
    """Return the synthesizer's settings from a job's settings.

    Raises:
        BadInput: the check does not exist.
    """
    from higgs_model.synthesizer import Pauses, SynthesisSettings

    minutes = settings.segment_minutes
    pauses = {name: getattr(settings, f"pause_{name}_ms") for name in ("sentence", "paragraph", "turn", "heading")}
    return SynthesisSettings(
        seed=settings.seed,
        attempts=settings.attempts,
        check=None if settings.check is None else find_check(settings.check),
        pauses=Pauses(**{name: value for name, value in pauses.items() if value is not None}),
        segment_s=None if minutes is None else 60 * minutes,
    )


def find_check(name: str) -> TranscriptCheck:
    """Import the check of takes named `module:callable`; see `higgs_model.audio.take_checks.TranscriptCheck`.

    Raises:
        BadInput: it cannot be imported, or is not callable.
    """
    module, _, attribute = name.partition(":")
    try:
        check = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"--check {name!r} cannot be imported: {error}; expected module:callable") from error
    if not callable(check):
        raise BadInput(f"--check {name!r} is not callable")
    return cast("TranscriptCheck", check)


def check_local_model(name: str) -> None:
    """Check that a model that is given as a path exists; Hub repositories are checked when they are loaded.

    Raises:
        BadInput: the path is not a checkpoint folder.
    """
    path = Path(name).expanduser()
    is_path = path.exists() or name.startswith(("/", "./", "../", "~"))
    if name != demo.NAME and is_path and not (path / "config.json").is_file():
        raise BadInput(f"--model {name!r} is not a checkpoint: no file {path / 'config.json'}")
