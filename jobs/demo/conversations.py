"""Combines single-speaker sentences into training conversations: reference recordings first, then turns.

In: simple training rows, whose `audio` is codes or a recording. Out: ChatML rows with one voice, or several voices that
take turns, prompted as scripts are; the loss covers the turns. The same arguments produce the same rows. No audio is
generated.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from higgs_model.errors import BadInput
from higgs_model.script.prompt import AudioPlaceholder, Message, SpeakerVoice, chunk_message, reference_messages

_SPEAKER_COUNTS = (1, 1, 1, 2, 2, 3)
"""The number of speakers is drawn from these."""
_RECORDINGS = 5
"""References and turns of a conversation together."""
_MAX_RECORDING_S = 3.0
"""Five of these with their texts stay below a thousand positions, the longest sequence in a batch."""
_REFERENCE_CANDIDATES = 60
"""Only the first recordings of each voice and language serve as references, since each one must be encoded."""

Row = Mapping[str, Any]


def build_conversations(
    rows: Iterable[Row], count: int, seed: int, reference_path: Callable[[Row], str]
) -> Iterator[dict[str, Any]]:
    """Yield `count` conversations, each in one language.

    Args:
        rows: single-speaker rows to draw from.
        count: number of conversations.
        seed: seed of all draws.
        reference_path: returns the `audio` to use for a row that serves as a reference.

    Raises:
        BadInput: no language has enough voices with enough sentences.
    """
    by_language: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["duration_s"] <= _MAX_RECORDING_S:
            by_language[row["language"]][row["speaker"]].append(row)
    eligible = {
        language: {voice: voice_rows for voice, voice_rows in by_voice.items() if len(voice_rows) >= _RECORDINGS}
        for language, by_voice in sorted(by_language.items())
    }
    eligible = {language: by_voice for language, by_voice in eligible.items() if len(by_voice) >= max(_SPEAKER_COUNTS)}
    if count and not eligible:
        raise BadInput(
            f"conversations need {max(_SPEAKER_COUNTS)} voices with {_RECORDINGS} sentences of at most "
            f"{_MAX_RECORDING_S:g} s each"
        )
    draw = random.Random(seed)
    weights = [sum(map(len, by_voice.values())) for by_voice in eligible.values()]
    for number in range(count):
        by_voice = eligible[draw.choices(list(eligible), weights)[0]]
        voices = draw.sample(sorted(by_voice), draw.choice(_SPEAKER_COUNTS))
        conversation = _build_conversation([by_voice[voice] for voice in voices], draw, reference_path)
        yield {"id": f"conversation-{number:05d}", **conversation}


def _build_conversation(
    speaker_rows: list[list[Row]], draw: random.Random, reference_path: Callable[[Row], str]
) -> dict[str, Any]:
    """Build one conversation; `speaker_rows` has the rows of each speaker."""
    references = [draw.choice(rows[:_REFERENCE_CANDIDATES]) for rows in speaker_rows]
    used = {row["audio"] for row in references}
    voices = [
        SpeakerVoice(f"SPEAKER{index}", reference_path(row), transcript=row["text"])
        for index, row in enumerate(references)
    ]
    messages = reference_messages(None, voices, [voice.tag for voice in voices])
    start_index, previous, is_monologue = len(messages), -1, len(speaker_rows) == 1
    while len(used) < _RECORDINGS:
        speaker = draw.choice([index for index in range(len(speaker_rows)) if index != previous or is_monologue])
        row = draw.choice(speaker_rows[speaker])
        if row["audio"] in used:
            continue
        used.add(row["audio"])
        text = row["text"] if is_monologue else f"[SPEAKER{speaker}] {row['text']}"
        messages += [chunk_message(text), Message("assistant", (AudioPlaceholder(row["audio"]),))]
        previous = speaker
    return {"messages": [_to_chatml(message) for message in messages], "start_index": start_index}


def _to_chatml(message: Message) -> dict[str, Any]:
    content = [
        {"type": "audio", "audio_url": part.name}
        if isinstance(part, AudioPlaceholder)
        else {"type": "text", "text": part}
        for part in message.content
    ]
    return {"role": message.role, "content": content}
