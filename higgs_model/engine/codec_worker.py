"""Decodes frames to samples in a thread beside the engine, for many clips concurrently.

    clip = worker.open_clip();  samples = await clip.push(frames);  …;  samples = await clip.finish()

Frames go in as the engine emits them; samples come out as soon as they are final. A clip's samples depend on its frames
alone: they are decoded in portions whose boundaries depend only on the position in the clip, however the frames arrived
and however busy the worker is. The first portions are short for a low latency; later ones are longer, because short
portions are expensive.

On a CPU, clips are decoded one after the other, each with its own streaming decoder. On other devices, the pending
portions of all clips become windows with real context and are decoded as a batch, on a CUDA stream of its own, so that
decoding does not wait for the engine's work on the same device.
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

# oneDNN caches a compiled convolution per shape, 1,024 by default, and reads this variable before the first one. Clips
# end with portions of any length, which would fill hundreds of megabytes for single use; other portions need some 200.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

Samples = NDArray[np.float32]
Decoder = StreamingDecoder | WindowedClip

_MIN_PORTION_FRAMES = 8
_MAX_PORTION_FRAMES = 128
_MAX_BATCH = 128
"""Portions per batch: bounds the decoder's memory."""


def next_portion_frames(start: int) -> int:
    """Return the length of the portion that starts at a frame: 8, 8, 16, 32, 64, and then 128."""
    return min(max(start, _MIN_PORTION_FRAMES), _MAX_PORTION_FRAMES)


class WorkerStopped(RuntimeError):
    """The worker is closed; not caused by a clip."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """A portion to decode, and the future of its samples."""

    decoder: Decoder
    frames_KT: Codes
    last: bool
    samples: concurrent.futures.Future[Samples]


class CodecWorker:
    """Decodes the clips of one or more engines.

    Args:
        codec: from now on only the worker's thread may decode with it; other threads may still encode.
        batched: decode windows of several clips as a batch; None: except on a CPU.
    """

    def __init__(self, codec: HiggsAudioCodec, *, batched: bool | None = None) -> None:
        self.codec = codec
        self._batched = codec.device.type != "cpu" if batched is None else batched
        self._stream = None
        if codec.device.type == "cuda":
            self._stream = torch.cuda.Stream(codec.device)
            # The weights may still be on their way to the device.
            self._stream.wait_stream(torch.cuda.current_stream(codec.device))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="codec", daemon=True)
        self._thread.start()

    def open_clip(self) -> ClipDecoder:
        """Return the decoder of a new clip."""
        return ClipDecoder(self, WindowedClip(self.codec) if self._batched else StreamingDecoder(self.codec))

    def close(self) -> None:
        """Stop after the current portion; pending callers get `WorkerStopped`."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._reject(self._jobs.get_nowait())

    def submit(self, decoder: Decoder, frames_KT: Codes, *, last: bool) -> concurrent.futures.Future[Samples]:
        """Queue a portion (K, T) of a clip. The portions of a clip must be submitted in order."""
        job = _Job(decoder, frames_KT, last, concurrent.futures.Future())
        with self._lock:
            if not self._closed:
                self._jobs.put(job)
                return job.samples
        self._reject(job)
        return job.samples

    # ------------------------------------------------------------------ in the worker's thread

    def _run(self) -> None:
        # The thread counts of OpenMP and MKL are per thread, and a new thread would use their defaults.
        torch.set_num_threads(torch.get_num_threads())
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream, torch.inference_mode():
            for jobs in self._pending():
                active = [job for job in jobs if job.samples.set_running_or_notify_cancel()]
                if self._batched:
                    self._decode_batch(active)
                else:
                    for job in active:
                        self._decode_single(job)

    def _pending(self) -> Iterator[list[_Job]]:
        """Yield all pending jobs as soon as there is one, until the worker is closed."""
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            with contextlib.suppress(queue.Empty):
                while self._batched and len(jobs) < _MAX_BATCH:
                    following = self._jobs.get_nowait()
                    if following is None:
                        self._jobs.put(None)
                        break
                    jobs.append(following)
            yield jobs

    def _decode_single(self, job: _Job) -> None:
        decoder = cast(StreamingDecoder, job.decoder)
        try:
            parts = [decoder.push(job.frames_KT)] + ([decoder.finish()] if job.last else [])
            samples = torch.cat(parts).numpy()
        except Exception as error:  # noqa: BLE001  (the error goes to this clip; the others continue)
            job.samples.set_exception(error)
        else:
            job.samples.set_result(samples)

    def _decode_batch(self, jobs: Sequence[_Job]) -> None:
        windows = []
        for job in jobs:
            try:
                windows.append((job, cast(WindowedClip, job.decoder).push(job.frames_KT, last=job.last)))
            except HiggsError as error:
                job.samples.set_exception(error)
        try:
            audio = self.codec.decode_batch([window.codes_KT for _, window in windows])
            samples = [window.crop(wave).cpu().numpy() for (_, window), wave in zip(windows, audio, strict=True)]
        except Exception as error:  # noqa: BLE001  (the error goes to the whole batch; later jobs continue)
            for job, _ in windows:
                job.samples.set_exception(error)
        else:
            for (job, _), result in zip(windows, samples, strict=True):
                job.samples.set_result(result)

    @staticmethod
    def _reject(job: _Job | None) -> None:
        if job is not None and job.samples.set_running_or_notify_cancel():
            job.samples.set_exception(WorkerStopped("the codec worker is closed"))


class ClipDecoder:
    """Decodes one clip in a worker; created by `CodecWorker.open_clip`."""

    def __init__(self, worker: CodecWorker, decoder: Decoder) -> None:
        self._worker, self._decoder = worker, decoder
        self._buffered: list[Codes] = []
        self._num_buffered = self._num_submitted = 0

    async def push(self, frames_KT: Codes) -> Samples:
        """Append frames (K, T) and return the samples (N,) that became final; none until a portion is full.

        Raises:
            BadInput: codes outside the codec's codebooks.
            WorkerStopped: the worker is closed.
        """
        self._buffered.append(frames_KT)
        self._num_buffered += frames_KT.shape[1]
        parts = []
        while self._num_buffered >= (portion := next_portion_frames(self._num_submitted)):
            parts.append(await self._submit(portion, last=False))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    async def finish(self) -> Samples:
        """End the clip and return its remaining samples."""
        return await self._submit(self._num_buffered, last=True)

    async def _submit(self, num_frames: int, *, last: bool) -> Samples:
        if not self._buffered:
            return np.empty(0, np.float32)
        buffered_KT = np.concatenate(self._buffered, axis=1)
        self._buffered = [buffered_KT[:, num_frames:]]
        self._num_buffered -= num_frames
        self._num_submitted += num_frames
        return await asyncio.wrap_future(self._worker.submit(self._decoder, buffered_KT[:, :num_frames], last=last))
