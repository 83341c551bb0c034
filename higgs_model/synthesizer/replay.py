"""Reconstructs a recording from the codes of its takes; needs only the codec.

In: the chunks of a recording with their takes, and its length. Out: the pieces that `Synthesizer.stream` yielded,
bit-identical with the same settings on the same CPU. If another machine trims a take slightly differently, pauses keep
their length, later chunks shift accordingly, and the pieces have the new positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence

from higgs_model.audio.timeline import Timeline
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.synthesizer.records import Piece, SynthesizedChunk
from higgs_model.synthesizer.settings import SynthesisSettings
from higgs_model.synthesizer.takes import decode_take


async def replay(
    chunks: Sequence[SynthesizedChunk], num_samples: int, worker: CodecWorker, settings: SynthesisSettings
) -> AsyncGenerator[Piece]:
    """Yield the recording piece by piece.

    Args:
        chunks: all chunks, in order.
        num_samples: length of the recording in samples, including the pause after its last chunk.

    Raises:
        BadInput: a code is outside the codec's codebooks.
    """
    timeline = Timeline(worker.codec.sample_rate, fade_s=settings.fade_s, room_tone_dbfs=settings.room_tone_dbfs)
    starts = [chunk.start_sample for chunk in chunks] + [num_samples]
    if starts[0]:
        yield Piece(timeline.pause(starts[0]))
    for chunk, following in zip(chunks, starts[1:], strict=True):
        start = timeline.position
        yield Piece(timeline.push(await decode_take(chunk.take, worker, settings)))
        rest, stop = timeline.end_take(), timeline.position
        yield Piece(rest, dataclasses.replace(chunk, start_sample=start, stop_sample=stop))
        if following > chunk.stop_sample:
            yield Piece(timeline.pause(following - chunk.stop_sample))
