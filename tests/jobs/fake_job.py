"""The batch job with a synthesizer that needs no model: `python -m tests.jobs.fake_job ARGUMENTS`.

Words in a row's text inject faults: `crash` kills the worker, `boom` raises an exception, and `memory` raises an
out-of-memory error while the engine has more than 4 slots. FAKE_PACE is the time per second of audio, in seconds.
"""

import functools
import os
import sys

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs.storage.manifest import open_manifest
from jobs.synthesize import cli as synthesize
from jobs.synthesize.settings import parse_settings


class FaultySynthesizer(FakeSynthesizer):
    def __init__(self, slots, pace):
        super().__init__(pace=pace)
        self.slots = slots

    async def stream(self, plan, *, segment_store=None):
        text = plan.script.tagged_text()
        if "crash" in text:
            os._exit(9)
        if "boom" in text:
            raise RuntimeError("an unexpected error")
        if "memory" in text and self.slots > 4:
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory")
        async for piece in super().stream(plan, segment_store=segment_store):
            yield piece


def build_synthesizer(settings, resources, pace=0.0):
    return FaultySynthesizer(resources.slots, pace)


def crash_while_loading(settings, resources):
    os._exit(9)


def run(arguments, pace=0.0, factory=build_synthesizer):
    settings = parse_settings(arguments)
    if factory is build_synthesizer:
        factory = functools.partial(factory, pace=pace)
    return synthesize.run(settings, open_manifest(settings.manifest), factory)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], float(os.environ.get("FAKE_PACE", "0"))))
