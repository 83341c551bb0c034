"""Frames to samples in a thread beside the engine, for many clips at once.

    clip = worker.clip();  samples = await clip.push(frames);  …;  samples = await clip.finish()

Frames go in as the engine gives them; samples come out as soon as they are final. What a clip sounds like depends on
its frames alone: they are decoded in portions whose borders depend only on how far into the clip they lie, however the
frames came in, and however busy the worker is. The first portions are short, so that a listener hears something soon;
then they grow, because short portions are dear.

On a CPU clips are decoded one after the other, each with its own chain of stages. Elsewhere the portions of all
clips that wait become windows with real context and go through the decoder together, on a stream of their own, so
that decoding does not wait for the engine's work on the same device.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.codec.streaming import StreamingDecoder, WindowedClip
from higgs_model.engine.request import Codes
from higgs_model.errors import HiggsError

# oneDNN keeps what it has compiled for a convolution of each shape, 1,024 of them by default, and reads this before the
# first one. Clips end in every length: hundreds of megabytes for what comes once. Portions in mid-clip need some 200.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

Samples = NDArray[np.float32]
Decoder = StreamingDecoder | WindowedClip

_FIRST_PORTION_FRAMES = 8
_LONGEST_PORTION_FRAMES = 128
_MOST_AT_ONCE = 128
"""Portions in one pass of the decoder: bounds its memory."""


def next_portion_frames(start: int) -> int:
    """How long the portion is that begins at a frame: 8, 8, 16, 32, 64, and then 128."""
    return min(max(start, _FIRST_PORTION_FRAMES), _LONGEST_PORTION_FRAMES)


class WorkerStopped(RuntimeError):
    """The worker is closed. Nobody's input is to blame."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """A portion to be decoded, and who waits for it."""

    decoder: Decoder
    frames_KT: Codes
    last: bool
    samples: concurrent.futures.Future[Samples]


class CodecWorker:
    """Decodes the clips of one engine, or of several.

    Args:
        codec: belongs to the worker's thread for decoding from now on; encoding elsewhere meanwhile is safe.
        batched: decode windows of several clips together; by default wherever the device is not a CPU.
    """

    def __init__(self, codec: HiggsAudioCodec, *, batched: bool | None = None) -> None:
        self.codec = codec
        self._batched = codec.device.type != "cpu" if batched is None else batched
        self._stream = None
        if codec.device.type == "cuda":
            self._stream = torch.cuda.Stream(codec.device)
            # The weights may still be on their way there.
            self._stream.wait_stream(torch.cuda.current_stream(codec.device))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed, self._door = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="codec", daemon=True)
        self._thread.start()

    def clip(self) -> DecodedClip:
        """A new clip, without frames yet."""
        return DecodedClip(self, WindowedClip(self.codec) if self._batched else StreamingDecoder(self.codec))

    def close(self) -> None:
        """Stop after the portion under way; whoever still waits gets `WorkerStopped`."""
        with self._door:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._refuse(self._jobs.get_nowait())

    def submit(self, decoder: Decoder, frames_KT: Codes, *, last: bool) -> concurrent.futures.Future[Samples]:
        """Queue a portion (K, T) of a clip. A clip's portions are handed in one after the other."""
        job = _Job(decoder, frames_KT, last, concurrent.futures.Future())
        with self._door:
            if not self._closed:
                self._jobs.put(job)
                return job.samples
        self._refuse(job)
        return job.samples

    # ------------------------------------------------------------------ in the worker's thread

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP and MKL would give each thread a number of its own
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream, torch.inference_mode():
            for jobs in self._waiting():
                wanted = [job for job in jobs if job.samples.set_running_or_notify_cancel()]
                if self._batched:
                    self._decode_together(wanted)
                else:
                    for job in wanted:
                        self._decode_alone(job)

    def _waiting(self) -> Iterator[list[_Job]]:
        """All jobs that wait, as soon as there is one, until the worker is closed."""
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            with contextlib.suppress(queue.Empty):
                while self._batched and len(jobs) < _MOST_AT_ONCE:
                    following = self._jobs.get_nowait()
                    if following is None:
                        self._jobs.put(None)
                        break
                    jobs.append(following)
            yield jobs

    def _decode_alone(self, job: _Job) -> None:
        decoder = cast(StreamingDecoder, job.decoder)
        try:
            parts = [decoder.push(job.frames_KT)] + ([decoder.finish()] if job.last else [])
            samples = torch.cat(parts).numpy()
        except Exception as error:  # noqa: BLE001  (the clip is told; the others go on)
            job.samples.set_exception(error)
        else:
            job.samples.set_result(samples)

    def _decode_together(self, jobs: Sequence[_Job]) -> None:
        windows = []
        for job in jobs:
            try:
                windows.append((job, cast(WindowedClip, job.decoder).push(job.frames_KT, last=job.last)))
            except HiggsError as error:
                job.samples.set_exception(error)
        try:
            audio = self.codec.decode_batch([window.codes_KT for _, window in windows])
            samples = [window.kept(one).cpu().numpy() for (_, window), one in zip(windows, audio, strict=True)]
        except Exception as error:  # noqa: BLE001  (all of them are told; later ones go on)
            for job, _ in windows:
                job.samples.set_exception(error)
        else:
            for (job, _), kept in zip(windows, samples, strict=True):
                job.samples.set_result(kept)

    @staticmethod
    def _refuse(job: _Job | None) -> None:
        if job is not None and job.samples.set_running_or_notify_cancel():
            job.samples.set_exception(WorkerStopped("the codec worker is closed"))


class DecodedClip:
    """One clip on its way through a worker; made by `CodecWorker.clip`."""

    def __init__(self, worker: CodecWorker, decoder: Decoder) -> None:
        self._worker, self._decoder = worker, decoder
        self._waiting: list[Codes] = []
        self._num_waiting = self._num_submitted = 0

    async def push(self, frames_KT: Codes) -> Samples:
        """Take frames (K, T), and give the samples (N,) that have become final; none as long as a portion is not full.

        Raises:
            BadInput: codes that are none of the codec's.
            WorkerStopped: the worker is closed.
        """
        self._waiting.append(frames_KT)
        self._num_waiting += frames_KT.shape[1]
        parts = []
        while self._num_waiting >= (portion := next_portion_frames(self._num_submitted)):
            parts.append(await self._submit(portion, last=False))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    async def finish(self) -> Samples:
        """Say that no frame follows, and give the rest of the samples."""
        return await self._submit(self._num_waiting, last=True)

    async def _submit(self, num_frames: int, *, last: bool) -> Samples:
        if not self._waiting:
            return np.empty(0, np.float32)
        waiting_KT = np.concatenate(self._waiting, axis=1)
        self._waiting = [waiting_KT[:, num_frames:]]
        self._num_waiting -= num_frames
        self._num_submitted += num_frames
        return await asyncio.wrap_future(self._worker.submit(self._decoder, waiting_KT[:, :num_frames], last=last))
