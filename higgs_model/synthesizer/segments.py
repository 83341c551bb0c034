"""Where a long script is cut into segments that can be spoken side by side.

In: chunks, how long each is expected to be, and how long a segment should be. Out: ranges of chunks that tile the
script. A cut lies at the end of a paragraph or a turn, never inside one unless that is longer than two segments. It
follows from the chunks alone, so that every run cuts in the same places.
"""

from __future__ import annotations

from collections.abc import Sequence

from higgs_model.script.chunking import Chunk

_ENDS = ("paragraph", "turn", "pause", "end")
_MOST = 2
"""Segments' lengths after which a cut is made at any chunk's end."""


def cut(chunks: Sequence[Chunk], expected_s: Sequence[float], segment_s: float | None) -> list[range]:
    """Ranges of chunk indices, in order."""
    if not chunks:
        return []
    ranges: list[range] = []
    start, length_s = 0, 0.0
    for chunk, seconds in zip(chunks, expected_s, strict=True):
        length_s += seconds
        at_end = chunk.boundary in _ENDS
        if segment_s is not None and (length_s >= segment_s and at_end or length_s >= _MOST * segment_s):
            ranges.append(range(start, chunk.index + 1))
            start, length_s = chunk.index + 1, 0.0
    if start < len(chunks):
        ranges.append(range(start, len(chunks)))
    return ranges
