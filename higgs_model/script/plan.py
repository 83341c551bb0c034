"""Plans a script: its chunks, their voices, and the messages that precede each chunk in its prompt.

Takes a `Script` and its voices and returns a `Plan`, from which `prompt_builder` builds the prompts. `dry_run` shows
the prompts without a model, with expected lengths for the takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from higgs_model.errors import BadInput
from higgs_model.script.chunking import Chunk
from higgs_model.script.duration import FRAMES_PER_S, estimate_frames
from higgs_model.script.languages import unsupported_language_warning
from higgs_model.script.prompt import Message, chunk_message, render, take_message
from higgs_model.script.script import Script
from higgs_model.script.spoken_forms import Lexicon
from higgs_model.script.voices import Voice, Voices

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
        takes = [stream_length(estimate_frames(chunk.prompt_text).expected_frames) for chunk in self.chunks]
        sizes = [_estimate_tokens(user) for user, _ in pairs]
        references = sum(_estimate_tokens(message) for message in self.references)
        for message in self.references:
            references += sum(stream_length(_estimate_reference_frames(self.voices[name])) for name in message.clips)
        if references > max_length:
            raise BadInput(
                f"voices, speakers and scene take about {references} of the model's {max_length} positions; "
                f"use fewer or shorter ones"
            )
        records: list[dict[str, object]] = []
        for chunk in self.chunks:
            room = max_length - references - sizes[chunk.index] - takes[chunk.index]
            first = self.find_first_in_context(chunk.index, room, lambda i: sizes[i] + takes[i])
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

    def build_messages(self, index: int, context: Sequence[int]) -> list[Message]:
        """Return the messages of a chunk's prompt, with the chunks `context` before it as answered turns."""
        messages = list(self.references)
        for earlier in context:
            messages += [chunk_message(self.chunks[earlier].prompt_text), take_message(earlier)]
        return [*messages, chunk_message(self.chunks[index].prompt_text)]

    def find_first_in_context(self, index: int, room: int, size: Callable[[int], int]) -> int:
        """Return the oldest chunk that remains in context, going back from `index` while there is room.

        Args:
            index: the chunk to be generated.
            room: free positions.
            size: returns the positions that a chunk and its take occupy.
        """
        oldest = 0 if self.context_chunks is None else max(0, index - self.context_chunks)
        first = index
        while first > oldest and size(first - 1) <= room:
            first -= 1
            room -= size(first)
        return first


def stream_length(frames: int, num_codebooks: int = NUM_CODEBOOKS) -> int:
    """Return the positions of a clip with the delay pattern: BOS, EOS, and one more per additional codebook."""
    return frames + 2 + num_codebooks - 1


def _estimate_tokens(message: Message) -> int:
    return len(message.text.encode()) // _BYTES_PER_TOKEN


def _estimate_reference_frames(voice: Voice) -> int:
    """Estimate the frames of a recording that has not been encoded, from its duration."""
    return round(voice.duration_s * FRAMES_PER_S)
