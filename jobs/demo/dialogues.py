"""Sentences of single speakers put together as conversations, in the form in which scripts with turns are asked for.

In: a training's simple rows, whose `audio` are codes or recordings. Out: ChatML rows in which each speaker is heard
once, and then turns follow that are learnt. The same arguments make the same rows. Nothing is spoken here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from higgs_model.errors import BadInput
from higgs_model.script.prompt import Clip, Message, SpeakerVoice, chunk_message, reference_messages

_SPEAKERS = (2, 2, 3)
"""How many there are, drawn from these."""
_MESSAGES = 5
"""Of references and turns together: more would not fit beside others into one batch."""
_LONGEST_S = 3.0

Row = Mapping[str, Any]


def dialogues(rows: Iterable[Row], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """So many conversations, each in one language, of at least two voices.

    Raises:
        BadInput: no language has two voices that say enough.
    """
    spoken: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["duration_s"] <= _LONGEST_S:
            spoken[row["language"]][row["speaker"]].append(row)
    able = {
        language: {voice: said for voice, said in by_voice.items() if len(said) >= _MESSAGES}
        for language, by_voice in sorted(spoken.items())
    }
    able = {language: by_voice for language, by_voice in able.items() if len(by_voice) >= 2}
    if count and not able:
        raise BadInput(f"dialogues need two voices with {_MESSAGES} sentences of at most {_LONGEST_S:g} s each")
    draw = random.Random(seed)
    shares = [sum(map(len, by_voice.values())) for by_voice in able.values()]
    for number in range(count):
        by_voice = able[draw.choices(list(able), shares)[0]]
        voices = draw.sample(sorted(by_voice), min(draw.choice(_SPEAKERS), len(by_voice)))
        yield {"id": f"dialogue-{number:05d}", **_dialogue(by_voice, voices, draw)}


def _dialogue(by_voice: Mapping[str, list[Row]], voices: list[str], draw: random.Random) -> dict[str, Any]:
    shown = [draw.choice(by_voice[voice]) for voice in voices]
    clips = {row["audio"]: row for row in shown}
    heard = [SpeakerVoice(f"SPEAKER{number}", row["audio"], transcript=row["text"]) for number, row in enumerate(shown)]
    messages = reference_messages(None, heard, [voice.tag for voice in heard])
    first, before = len(messages), -1
    while len(clips) < _MESSAGES:
        speaker = draw.choice([number for number in range(len(voices)) if number != before])
        row = draw.choice(by_voice[voices[speaker]])
        if row["audio"] in clips:
            continue
        clips[row["audio"]] = row
        messages += [chunk_message(f"[SPEAKER{speaker}] {row['text']}"), Message("assistant", (Clip(row["audio"]),))]
        before = speaker
    return {"messages": [_plain(message) for message in messages], "start_index": first}


def _plain(message: Message) -> dict[str, Any]:
    """As a manifest holds it."""
    content = [
        {"type": "audio", "audio_url": part.name} if isinstance(part, Clip) else {"type": "text", "text": part}
        for part in message.content
    ]
    return {"role": message.role, "content": content}
