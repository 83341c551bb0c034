"""The batch job with a synthesizer that needs no model: `python -m tests.jobs.fake_job ARGUMENTS`.

Words in a row's text make it misbehave: `crash` ends the worker, `boom` raises, `memory` is out of memory while the
engine has more than 4 slots.
"""

import os
import sys

import torch

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs import synthesize
from jobs.manifest import open_manifest
from jobs.settings import parse


class Misbehaving(FakeSynthesizer):
    def __init__(self, slots):
        super().__init__(pace=float(os.environ.get("FAKE_PACE", "0")))
        self.slots = slots

    async def speak(self, plan, *, kept=None):
        text = plan.script.tagged_text()
        if "crash" in text:
            os._exit(9)
        if "boom" in text:
            raise RuntimeError("something nobody thought of")
        if "memory" in text and self.slots > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        async for piece in super().speak(plan, kept=kept):
            yield piece


def build(settings, slots):
    return Misbehaving(slots)


if __name__ == "__main__":
    settings = parse(sys.argv[1:])
    sys.exit(synthesize.run(settings, open_manifest(settings.manifest), build))
