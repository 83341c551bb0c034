"""What a job's workers hold, from the job's settings. Torch is imported where a model is loaded, and not before."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from higgs_model import demo
from higgs_model.errors import BadInput
from jobs.synthesize.settings import JobSettings

if TYPE_CHECKING:
    from higgs_model.audio.gate import TranscriptCheck
    from higgs_model.synthesizer import SynthesisSettings, Synthesizer


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one worker may use.

    Attributes:
        slots: requests that its engine runs at the same time.
        threads: of the processor; None: as many as torch finds right.
    """

    slots: int
    threads: int | None = None


def load_synthesizer(settings: JobSettings, capacity: Capacity) -> Synthesizer:
    """Load model and codec, with an engine."""
    import torch

    from higgs_model.engine.settings import EngineSettings
    from higgs_model.synthesizer import Synthesizer

    if capacity.threads is not None:
        torch.set_num_threads(capacity.threads)
    return Synthesizer.from_pretrained(
        settings.model,
        settings.codec,
        engine=EngineSettings(max_slots=capacity.slots),
        settings=synthesis_settings(settings),
    )


def synthesis_settings(settings: JobSettings) -> SynthesisSettings:
    """What a job's settings say of how scripts are spoken.

    Raises:
        BadInput: there is no such check.
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
    """A check of takes by the name `module:callable`; see `higgs_model.audio.gate.TranscriptCheck`.

    Raises:
        BadInput: there is none of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"--check {name!r} cannot be found: {error}; wanted module:callable") from error
    if not callable(found):
        raise BadInput(f"--check {name!r} is not something that can be called")
    return cast("TranscriptCheck", found)


def check_local_model(name: str) -> None:
    """See that a model which must be on this machine is there; what the hub has only loading tells.

    Raises:
        BadInput: it is not.
    """
    path = Path(name).expanduser()
    meant_as_path = path.exists() or name.startswith(("/", "./", "../", "~"))
    if name != demo.NAME and meant_as_path and not (path / "config.json").is_file():
        raise BadInput(f"--model {name!r} is no checkpoint: there is no file {path / 'config.json'}")
