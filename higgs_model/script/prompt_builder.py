"""Builds the prompt of each chunk from its plan and the takes of the chunks before it.

References are always included; generated chunks are dropped oldest first, until the prompt and the longest allowed
answer fit into the model's context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from higgs_model.errors import BadInput
from higgs_model.script.duration import estimate_frames
from higgs_model.script.plan import MODEL_LENGTH, NUM_CODEBOOKS, Plan, stream_length
from higgs_model.script.prompt import Encoder, Prompt, Tokenizer, chunk_message, render, take_message
from higgs_model.script.voices import ReferenceCodes

if TYPE_CHECKING:
    from higgs_model.script.prompt import Codes


class PromptBuilder:
    """Builds the prompts of one plan for a model's tokenizer.

    Args:
        codes: encodes reference recordings.
        num_codebooks: the delay pattern, with BOS and EOS, lengthens a clip by this number plus one.
        force_audio: append `<|audio_out_bos|>`, so that the model cannot answer with text.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: Tokenizer,
        codes: ReferenceCodes | None,
        *,
        max_length: int = MODEL_LENGTH,
        num_codebooks: int = NUM_CODEBOOKS,
        force_audio: bool = True,
    ) -> None:
        self._plan = plan
        self._encoder = Encoder(tokenizer)
        self._max_length = max_length
        self._num_codebooks = num_codebooks
        self._tail = self._encoder.encode_header()
        if force_audio:
            self._tail.append(self._encoder.audio_out_bos_id)
        self._reference_ids: list[int] = []
        for number, message in enumerate(plan.references):
            self._reference_ids += self._encoder.encode_message(message, first=number == 0)
        self._names = [name for message in plan.references for name in message.clips]
        self._references: list[Codes] = []
        for name in self._names:
            if codes is None:
                raise BadInput(f"voice {name!r} is a recording, but there is no codec to encode it")
            self._references.append(codes.get(plan.voices[name]))
        self._chunk_ids: dict[int, list[int]] = {}
        self._take_ids = self._encoder.encode_message(take_message(0))

    def build(self, index: int, takes: Sequence[Codes | None]) -> Prompt:
        """Build the prompt of chunk `index`.

        Args:
            takes: codes (K, T) of the chunks before it; None for chunks that must not be in the context.

        Raises:
            BadInput: the references and the chunk leave no room for an answer.
        """
        plan = self._plan
        fixed = len(self._reference_ids) + sum(self._clip_length(codes) - 1 for codes in self._references)
        fixed += len(self._message_ids(index)) + len(self._tail)
        max_frames = self._limit_answer_frames(index, fixed)
        room = self._max_length - fixed - self._answer_length(max_frames)
        first = plan.find_first_in_context(index, room, lambda i: self._pair_length(i, takes[i]))
        context = [i for i in range(first, index) if takes[i] is not None]

        token_ids = list(self._reference_ids)
        for earlier in context:
            token_ids += self._message_ids(earlier) + self._take_ids
        token_ids += self._message_ids(index) + self._tail
        context_codes = [take for i in context if (take := takes[i]) is not None]
        return Prompt(
            text=render(plan.build_messages(index, context)),
            token_ids=token_ids,
            audio=(*self._names, *(f"chunk{i}" for i in context)),
            codes=(*self._references, *context_codes),
            num_positions=fixed + sum(self._pair_length(i, takes[i]) for i in context),
            max_frames=max_frames,
            first_context_chunk=first,
        )

    def _limit_answer_frames(self, index: int, fixed: int) -> int:
        """Return the chunk's frame limit, reduced to what fits if that is enough for its text."""
        text = self._plan.chunks[index].prompt_text
        limit = self._plan.max_frames[index]
        available = self._max_length - fixed - self._answer_length(0)
        needed = min(limit, estimate_frames(text).expected_frames)
        if available < needed:
            raise BadInput(
                f"chunk {index} needs about {needed} frames, but references and text leave {max(available, 0)} "
                f"of the model's {self._max_length} positions; use chunk_method 'sentence', a smaller "
                f"chunk_max_words, or shorter reference recordings"
            )
        return min(limit, available)

    def _message_ids(self, index: int) -> list[int]:
        if index not in self._chunk_ids:
            message = chunk_message(self._plan.chunks[index].prompt_text)
            self._chunk_ids[index] = self._encoder.encode_message(message)
        return self._chunk_ids[index]

    def _pair_length(self, index: int, take: Codes | None) -> int:
        if take is None:
            return 0
        return len(self._message_ids(index)) + len(self._take_ids) + self._clip_length(take) - 1

    def _clip_length(self, codes: Codes) -> int:
        return stream_length(codes.shape[1], self._num_codebooks)

    def _answer_length(self, frames: int) -> int:
        """Return the positions of an answer, which ends with `<|audio_eos|>` and the end of the turn."""
        return stream_length(frames, self._num_codebooks) + 2
