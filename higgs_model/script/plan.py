"""Plans a script: its chunks, their voices, and what precedes each chunk in its prompt.

In: a `Script` and its voices. Out: a `Plan`; `PromptBuilder.build` then builds the prompt of chunk n from the takes of
the chunks before it. References are always included; generated chunks are dropped oldest first, until the prompt and
the longest allowed answer fit into the model's context. `dry_run` does the same without a model, with expected lengths
for the takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from higgs_model.errors import BadInput
from higgs_model.script.chunking import Chunk
from higgs_model.script.duration import FRAMES_PER_S, estimate_frames
from higgs_model.script.languages import unsupported_language_warning
from higgs_model.script.prompt import (
    Encoder,
    Message,
    Prompt,
    Tokenizer,
    chunk_message,
    render,
    take_message,
)
from higgs_model.script.script import Script
from higgs_model.script.spoken_forms import Lexicon
from higgs_model.script.voices import ReferenceCodes, Voice, Voices

if TYPE_CHECKING:
    from higgs_model.script.prompt import Codes

MODEL_LENGTH = 8192
"""Context length with which the published model is served."""
NUM_CODEBOOKS = 8

_BYTES_PER_TOKEN = 4
"""Estimate for the dry run, which has no tokenizer: right for English, slightly low for Chinese."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A script ready for synthesis.

    Attributes:
        chunks: in order.
        references: the messages that precede all chunks.
        voices: reference recordings by name.
        context_chunks: how many generated chunks remain in the prompt; None: as many as fit.
        max_frames: maximum frames of each chunk's take.
        warnings: messages for the author of the script.
    """

    script: Script
    chunks: tuple[Chunk, ...]
    references: tuple[Message, ...]
    voices: dict[str, Voice]
    context_chunks: int | None
    max_frames: tuple[int, ...]
    warnings: tuple[str, ...]

    @classmethod
    def from_script(
        cls,
        script: Script,
        voices: Voices,
        lexicon: Lexicon | None = None,
        frames_per_s: float = FRAMES_PER_S,
    ) -> Plan:
        """Split the text and look up the voices.

        Raises:
            BadInput: a voice does not exist or cannot be used.
        """
        references = script.references(voices)
        warnings: list[str] = list(script.warnings())
        for name, voice in references.recordings.items():
            warnings += [f"voice {name!r}: {warning}" for warning in voice.warnings()]
        chunks = script.chunks(lexicon)
        if language_warning := unsupported_language_warning(script.tagged_text(), script.language):
            warnings.append(language_warning)
        limits = [estimate_frames(chunk.prompt_text, frames_per_s).max_frames for chunk in chunks]
        return cls(
            script=script,
            chunks=tuple(chunks),
            references=references.messages,
            voices=references.recordings,
            context_chunks=script.context_chunks,
            max_frames=tuple(script.max_frames or limit for limit in limits),
            warnings=tuple(dict.fromkeys(warnings)),
        )

    def dry_run(self, max_length: int = MODEL_LENGTH) -> list[dict[str, object]]:
        """Return one record per chunk, as `--dry-run` prints it, with expected lengths for takes.

        Raises:
            BadInput: the references alone exceed the context length.
        """
        pairs = [(chunk_message(chunk.prompt_text), take_message(chunk.index)) for chunk in self.chunks]
        takes = [_stream_length(estimate_frames(chunk.prompt_text).expected_frames) for chunk in self.chunks]
        sizes = [_estimate_tokens(user) for user, _ in pairs]
        references = sum(_estimate_tokens(message) for message in self.references)
        for message in self.references:
            references += sum(_stream_length(_estimate_reference_frames(self.voices[name])) for name in message.clips)
        if references > max_length:
            raise BadInput(
                f"voices, speakers and scene take about {references} of the model's {max_length} positions; "
                f"use fewer or shorter ones"
            )
        records: list[dict[str, object]] = []
        for chunk in self.chunks:
            room = max_length - references - sizes[chunk.index] - takes[chunk.index]
            first = self._find_first_in_context(chunk.index, room, lambda i: sizes[i] + takes[i])
            messages = [*self.references]
            for pair in pairs[first : chunk.index]:
                messages += pair
            messages.append(pairs[chunk.index][0])
            records.append(
                {
                    "index": chunk.index,
                    "text": chunk.text,
                    "speakers": [self.script.speaker_name(tag) for tag in chunk.speakers],
                    "prompt": render(messages),
                    "audio": [name for message in messages for name in message.clips],
                }
            )
        return records

    def _build_messages(self, index: int, context: Sequence[int]) -> list[Message]:
        messages = list(self.references)
        for earlier in context:
            messages += [chunk_message(self.chunks[earlier].prompt_text), take_message(earlier)]
        return [*messages, chunk_message(self.chunks[index].prompt_text)]

    def _find_first_in_context(self, index: int, room: int, size: Callable[[int], int]) -> int:
        """Return the oldest chunk that remains in context, going back from `index` while there is room."""
        oldest = 0 if self.context_chunks is None else max(0, index - self.context_chunks)
        first = index
        while first > oldest and size(first - 1) <= room:
            first -= 1
            room -= size(first)
        return first


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
        first = plan._find_first_in_context(index, room, lambda i: self._pair_length(i, takes[i]))
        context = [i for i in range(first, index) if takes[i] is not None]

        token_ids = list(self._reference_ids)
        for earlier in context:
            token_ids += self._message_ids(earlier) + self._take_ids
        token_ids += self._message_ids(index) + self._tail
        context_codes = [take for i in context if (take := takes[i]) is not None]
        return Prompt(
            text=render(plan._build_messages(index, context)),
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
        return _stream_length(codes.shape[1], self._num_codebooks)

    def _answer_length(self, frames: int) -> int:
        """Return the positions of an answer, which ends with `<|audio_eos|>` and the end of the turn."""
        return _stream_length(frames, self._num_codebooks) + 2


def _stream_length(frames: int, num_codebooks: int = NUM_CODEBOOKS) -> int:
    """Return the positions of a clip with the delay pattern: BOS, EOS, and one more per additional codebook."""
    return frames + 2 + num_codebooks - 1


def _estimate_tokens(message: Message) -> int:
    return len(message.text.encode()) // _BYTES_PER_TOKEN


def _estimate_reference_frames(voice: Voice) -> int:
    """Estimate the frames of a recording that has not been encoded, from its duration."""
    return round(voice.duration_s * FRAMES_PER_S)
