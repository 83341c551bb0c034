"""The host's view of one request in the engine.

A sequence waits, has its prompt prefilled (`PREFILL`), may generate text first (`TEXT`), decodes audio (`DECODE`), and
finishes. A preempted sequence waits again and starts over: the frames it had already sampled are then forced, so that
it reaches exactly the same state.
"""

from __future__ import annotations

import enum

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model.engine.blocks import BlockHash
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.engine.prompt import ExpandedPrompt
from higgs_model.engine.request import Codes, Request

_INITIAL_CAPACITY = 256


class Phase(enum.Enum):
    """The state of a sequence."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    TEXT = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A request and its progress.

    Attributes:
        prompt: the expanded prompt; generated text tokens are appended to it.
        block_hashes: of the full blocks of the original prompt.
        promoted: it has waited longest and is scheduled before all others.
        slot, blocks: its resources while it runs.
        num_computed: positions whose keys and values are in the cache.
        num_launched, num_frames: decode steps launched, and frames read back, since it last started to decode.
        num_replayed: frames read back before it was last preempted; they are replayed.
        frame_limit: frames in delayed form at which `max_frames` is reached.
        num_preemptions: how often it was preempted.
        last_progress_step: the engine step in which it last made progress.
        tokens, hidden_D: generated text, and the network's hidden state after it.
    """

    def __init__(
        self,
        request: Request,
        prompt: ExpandedPrompt,
        block_hashes: list[BlockHash],
        arrival: int,
        num_codebooks: int,
    ) -> None:
        self.request, self.prompt, self.block_hashes, self.arrival = request, prompt, block_hashes, arrival
        self.prompt_length = len(prompt)
        self.phase = Phase.WAITING
        self.promoted = False
        self.slot, self.blocks, self.num_computed = -1, list[int](), 0
        self.num_launched, self.num_frames, self.num_replayed = 0, 0, 0
        self.frame_limit = request.max_frames + num_codebooks - 1
        self.tokens: list[int] = []
        self.hidden_D = torch.empty(0)
        self.num_preemptions = 0
        self.added_s, self.first_frame_s = 0.0, float("nan")
        self.last_progress_step = 0
        self._frames_TK = np.empty((_INITIAL_CAPACITY, num_codebooks), np.int64)
        self._delay = num_codebooks - 1
        self._num_emitted = 0

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort key of scheduling; lower goes first."""
        return not self.promoted, self.request.priority, self.arrival

    @property
    def length(self) -> int:
        """Positions that must have room in the cache for the next step."""
        return len(self.prompt) + (self.num_launched + 1 if self.phase is Phase.DECODE else 0)

    @property
    def last_position(self) -> PrefillSpan:
        """The last position of the prompt."""
        return PrefillSpan(self.slot, len(self.prompt) - 1, len(self.prompt))

    def append_token(self, token: int) -> None:
        """Append a generated text token to the prompt."""
        self.tokens.append(token)
        self.prompt = self.prompt.with_token(token)

    @property
    def is_replaying(self) -> bool:
        """Whether the next frame to launch was already sampled before a preemption."""
        return self.num_launched < self.num_replayed

    @property
    def replayed_frame_K(self) -> NDArray[np.int64]:
        """The frame to force while `is_replaying`."""
        return self._frames_TK[self.num_launched]

    def append_frame(self, frame_K: NDArray[np.int64]) -> None:
        """Append a frame, in delayed form, that was read back from the device."""
        if self.num_frames == len(self._frames_TK):
            # Few clips come near their limit, so memory for it is not reserved from the start.
            self._frames_TK = np.concatenate([self._frames_TK, np.empty_like(self._frames_TK)])
        self._frames_TK[self.num_frames] = frame_K
        self.num_frames += 1

    def preempt(self) -> None:
        """Return to waiting. Generated text is already part of the prompt; frames are kept to be replayed."""
        self.phase, self.slot, self.blocks, self.num_computed = Phase.WAITING, -1, [], 0
        self.num_replayed = max(self.num_replayed, self.num_frames)
        self.num_launched = self.num_frames = 0
        self.num_preemptions += 1

    @property
    def frames_TK(self) -> NDArray[np.int64]:
        """All frames in delayed form, including those sampled before a preemption."""
        return self._frames_TK[: max(self.num_frames, self.num_replayed)]

    @property
    def _num_complete(self) -> int:
        """Frames of which every codebook has been sampled."""
        return max(self.num_frames, self.num_replayed) - self._delay

    @property
    def has_frames_to_stream(self) -> bool:
        """Whether enough complete frames are there for the next streaming update."""
        every = self.request.stream_every
        return every is not None and self._num_complete - self._num_emitted >= (every if self._num_emitted else 1)

    def pop_new_frames(self, codebook_size: int) -> Codes:
        """Undo the delay pattern: return the complete frames (K, T) not returned before, without BOS and EOS codes."""
        complete = max(self._num_complete, self._num_emitted)
        # Codebook k of frame t was sampled in step t + k.
        codebooks = np.arange(self._delay + 1)[:, None]
        frames_KT = self._frames_TK[np.arange(self._num_emitted, complete) + codebooks, codebooks]
        self._num_emitted = complete
        return frames_KT[:, (frames_KT < codebook_size).all(axis=0)]
