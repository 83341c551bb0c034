"""A request on its way through the engine: what the host knows of it.

A sequence waits, has its prompt run (`PROMPT`), may say text first (`TEXT`), speaks (`SPEECH`), and ends. One that lost
its slot waits again, and goes the same way once more from the start: what it had drawn is then forced, so that it
ends up exactly where it was.
"""

from __future__ import annotations

import enum

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model.engine.blocks import Key
from higgs_model.engine.prompt import Positions
from higgs_model.engine.request import Codes, Request
from higgs_model.engine.spans import Span

_FIRST_ROOM = 256


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    PROMPT = enum.auto()
    TEXT = enum.auto()
    SPEECH = enum.auto()
    ENDED = enum.auto()


class Sequence:
    """One request.

    Attributes:
        prompt: its positions; those of text that was said are appended.
        keys: of the full blocks of the prompt as it came.
        comes_first: it has waited longest, and goes before all others from now on.
        slot, blocks: what it holds while it runs.
        computed: positions that keys and values are there for.
        launched, columns: frames that were asked for and that were read, since it began to speak this time.
        replayed: frames that were read before it lost its slot.
        last_column: frames in delayed form after which the request's limit is reached.
        turn: how often it has lost its slot.
        moved_at_step: the engine's step at which it last got on.
        tokens, hidden_D: text that was said, and the network's state after it.
    """

    def __init__(self, request: Request, prompt: Positions, keys: list[Key], arrival: int, num_codebooks: int) -> None:
        self.request, self.prompt, self.keys, self.arrival = request, prompt, keys, arrival
        self.prompt_length = len(prompt)
        self.phase = Phase.WAITING
        self.comes_first = False
        self.slot, self.blocks, self.computed = -1, list[int](), 0
        self.launched, self.columns, self.replayed = 0, 0, 0
        self.last_column = request.max_frames + num_codebooks - 1
        self.tokens: list[int] = []
        self.hidden_D = torch.empty(0)
        self.turn = 0
        self.added_s, self.first_frame_s = 0.0, float("nan")
        self.moved_at_step = 0
        self._drawn = np.empty((_FIRST_ROOM, num_codebooks), np.int64)
        self._delay = num_codebooks - 1
        self._emitted = 0

    @property
    def order(self) -> tuple[bool, int, int]:
        """Who goes first."""
        return not self.comes_first, self.request.priority, self.arrival

    @property
    def length(self) -> int:
        """Positions that the next step needs, its own included."""
        return len(self.prompt) + (self.launched + 1 if self.phase is Phase.SPEECH else 0)

    @property
    def last_position(self) -> Span:
        """The prompt's last position alone."""
        return Span(self.slot, len(self.prompt) - 1, len(self.prompt))

    def say(self, token: int) -> None:
        """Append a token of text to the prompt."""
        self.tokens.append(token)
        self.prompt = self.prompt.with_token(token)

    @property
    def goes_again(self) -> bool:
        """Whether the frame to be launched next is known from before a lost slot."""
        return self.launched < self.replayed

    @property
    def known_frame_K(self) -> NDArray[np.int64]:
        """That frame."""
        return self._drawn[self.launched]

    def append(self, frame_K: NDArray[np.int64]) -> None:
        """Take a frame, in delayed form, as it was read from the device."""
        if self.columns == len(self._drawn):
            # Few clips come near their limit: room for it from the start would be for nothing.
            self._drawn = np.concatenate([self._drawn, np.empty_like(self._drawn)])
        self._drawn[self.columns] = frame_K
        self.columns += 1

    def lose_slot(self) -> None:
        """Back to waiting; what was said is kept. Text is part of the prompt by now; frames will be forced."""
        self.phase, self.slot, self.blocks, self.computed = Phase.WAITING, -1, [], 0
        self.replayed = max(self.replayed, self.columns)
        self.launched = self.columns = 0
        self.turn += 1

    @property
    def drawn_TK(self) -> NDArray[np.int64]:
        """All frames in delayed form, those of before a lost slot included."""
        return self._drawn[: max(self.columns, self.replayed)]

    @property
    def _complete(self) -> int:
        """Frames of which every codebook is there."""
        return max(self.columns, self.replayed) - self._delay

    @property
    def due(self) -> bool:
        """Whether enough frames are final to be given out."""
        every = self.request.stream_every
        return every is not None and self._complete - self._emitted >= (every if self._emitted else 1)

    def take_frames(self, codebook_size: int) -> Codes:
        """(K, T) the frames that are complete, sound alone, and were not yet given out."""
        complete = max(self._complete, self._emitted)
        codebooks = np.arange(self._delay + 1)[:, None]
        frames_KT = self._drawn[np.arange(self._emitted, complete) + codebooks, codebooks]
        self._emitted = complete
        return frames_KT[:, (frames_KT < codebook_size).all(axis=0)]
