"""Sentences of single speakers put together as what scripts are asked with: voices heard first, then turns.

In: a training's simple rows, whose `audio` are codes or recordings. Out: ChatML rows of one voice, or of several that
speak in turn, of which the turns are learnt. The same arguments make the same rows. Nothing is spoken here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from higgs_model.errors import BadInput
from higgs_model.script.prompt import Clip, Message, SpeakerVoice, chunk_message, reference_messages

_SPEAKERS = (1, 1, 1, 2, 2, 3)
"""How many there are, drawn from these."""
_RECORDINGS = 5
"""Of references and turns together."""
_LONGEST_S = 3.0
"""Of each; five of them with their texts stay below a thousand positions, which is what batches let in."""
_REFERENCES = 60
"""Of each voice and language, its first: each has to be encoded."""

Row = Mapping[str, Any]


def conversations(rows: Iterable[Row], count: int, seed: int, heard: Callable[[Row], str]) -> Iterator[dict[str, Any]]:
    """So many conversations, each in one language.

    Args:
        heard: gives what stands in place of a row's `audio` where it is a reference.

    Raises:
        BadInput: no language has enough voices that say enough.
    """
    spoken: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["duration_s"] <= _LONGEST_S:
            spoken[row["language"]][row["speaker"]].append(row)
    able = {
        language: {voice: said for voice, said in by_voice.items() if len(said) >= _RECORDINGS}
        for language, by_voice in sorted(spoken.items())
    }
    able = {language: by_voice for language, by_voice in able.items() if len(by_voice) >= max(_SPEAKERS)}
    if count and not able:
        raise BadInput(
            f"conversations need {max(_SPEAKERS)} voices with {_RECORDINGS} sentences of at most {_LONGEST_S:g} s each"
        )
    draw = random.Random(seed)
    shares = [sum(map(len, by_voice.values())) for by_voice in able.values()]
    for number in range(count):
        by_voice = able[draw.choices(list(able), shares)[0]]
        voices = draw.sample(sorted(by_voice), draw.choice(_SPEAKERS))
        yield {"id": f"conversation-{number:05d}", **_conversation([by_voice[voice] for voice in voices], draw, heard)}


def _conversation(said: list[list[Row]], draw: random.Random, heard: Callable[[Row], str]) -> dict[str, Any]:
    """One between voices, of each of which some sentences are given."""
    shown = [draw.choice(rows[:_REFERENCES]) for rows in said]
    used = {row["audio"] for row in shown}
    voices = [SpeakerVoice(f"SPEAKER{at}", heard(row), transcript=row["text"]) for at, row in enumerate(shown)]
    messages = reference_messages(None, voices, [voice.tag for voice in voices])
    first, before = len(messages), -1
    while len(used) < _RECORDINGS:
        speaker = draw.choice([at for at in range(len(said)) if at != before or len(said) == 1])
        row = draw.choice(said[speaker])
        if row["audio"] in used:
            continue
        used.add(row["audio"])
        text = row["text"] if len(said) == 1 else f"[SPEAKER{speaker}] {row['text']}"
        messages += [chunk_message(text), Message("assistant", (Clip(row["audio"]),))]
        before = speaker
    return {"messages": [_plain(message) for message in messages], "start_index": first}


def _plain(message: Message) -> dict[str, Any]:
    """As a manifest holds it."""
    content = [
        {"type": "audio", "audio_url": part.name} if isinstance(part, Clip) else {"type": "text", "text": part}
        for part in message.content
    ]
    return {"role": message.role, "content": content}
