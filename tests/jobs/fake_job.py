"""The batch job with a synthesizer that needs no model: `python -m tests.jobs.fake_job ARGUMENTS`.

Words in a row's text make it misbehave: `crash` ends the worker, `boom` raises, `memory` is out of memory while the
engine has more than 4 slots. FAKE_PACE is the seconds that a second of audio takes.
"""

import functools
import os
import sys

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs.storage.manifest import open_manifest
from jobs.synthesize import cli as synthesize
from jobs.synthesize.settings import parse_settings


class Misbehaving(FakeSynthesizer):
    def __init__(self, slots, pace):
        super().__init__(pace=pace)
        self.slots = slots

    async def stream(self, plan, *, kept=None):
        text = plan.script.tagged_text()
        if "crash" in text:
            os._exit(9)
        if "boom" in text:
            raise RuntimeError("an unexpected error")
        if "memory" in text and self.slots > 4:
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory")
        async for piece in super().stream(plan, kept=kept):
            yield piece


def build(settings, capacity, pace=0.0):
    return Misbehaving(capacity.slots, pace)


def crash_while_loading(settings, capacity):
    os._exit(9)


def run(arguments, pace=0.0, factory=build):
    settings = parse_settings(arguments)
    chosen = functools.partial(factory, pace=pace) if factory is build else factory
    return synthesize.run(settings, open_manifest(settings.manifest), chosen)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], float(os.environ.get("FAKE_PACE", "0"))))
