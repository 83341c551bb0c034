"""Splits a long script into segments that can be synthesized in parallel.

In: chunks, their expected durations, and the target duration of a segment. Out: ranges of chunks that tile the script.
Segments end at the end of a paragraph or turn, unless one is longer than two segments. The split depends only on the
chunks, so it is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

from higgs_model.script.chunking import Chunk

_SEGMENT_BOUNDARIES = ("paragraph", "turn", "pause", "end")
_MAX_LENGTH = 2
"""In target durations; a longer segment ends at any chunk."""


def split_into_segments(chunks: Sequence[Chunk], expected_s: Sequence[float], segment_s: float | None) -> list[range]:
    """Return the segments as ranges of chunk indices, in order.

    Args:
        expected_s: expected duration of each chunk.
        segment_s: target duration of a segment; None: a single segment.
    """
    if not chunks:
        return []
    ranges: list[range] = []
    start, length_s = 0, 0.0
    for chunk, seconds in zip(chunks, expected_s, strict=True):
        length_s += seconds
        at_boundary = chunk.boundary in _SEGMENT_BOUNDARIES
        if segment_s is not None and (length_s >= segment_s and at_boundary or length_s >= _MAX_LENGTH * segment_s):
            ranges.append(range(start, chunk.index + 1))
            start, length_s = chunk.index + 1, 0.0
    if start < len(chunks):
        ranges.append(range(start, len(chunks)))
    return ranges
