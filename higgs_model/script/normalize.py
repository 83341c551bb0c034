"""Text as the checkpoint was trained on it: any Unicode in, the reference implementation's normalisation out.

The tables are facts of the training data, so nothing is added to them, however tempting. `normalize` is total
and linear, and `normalize(text) == finish("\\n".join(paragraphs(text)))`: the reference drops blank lines
before it looks for paragraphs, so here they are found first and kept apart for whoever cuts by them.

Knows nothing of speakers, pauses, chunks or the model's special tokens (see `prompt.user_text` for those).
"""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "，": ", ",
        "。": ".",
        "：": ":",
        "；": ";",
        "？": "?",
        "！": "!",
        "（": " ",
        "）": " ",
        "(": " ",
        ")": " ",
        "【": "[",
        "】": "]",
        "《": "<",
        "》": ">",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "、": ",",
        "—": "-",
        "…": "...",
        "·": ".",
        "「": '"',
        "」": '"',
        "『": '"',
        "』": '"',
    }
)
_UNITS = {"°F": " degrees Fahrenheit", "°C": " degrees Celsius"}

SOUND_TAGS = {
    "[laugh]": "<SE>[Laughter]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>",
    "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>",
    "[music end]": "<SE_e>[Music]</SE_e>",
    "[music]": "<SE>[Music]</SE>",
    "[sing start]": "<SE_s>[Singing]</SE_s>",
    "[sing end]": "<SE_e>[Singing]</SE_e>",
    "[applause]": "<SE>[Applause]</SE>",
    "[cheering]": "<SE>[Cheering]</SE>",
    "[cough]": "<SE>[Cough]</SE>",
}
"""What a user writes, and what the model knows it as."""

_REPLACED = _UNITS | SOUND_TAGS
_REPLACED_RE = re.compile("|".join(map(re.escape, _REPLACED)))
_ENDINGS = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")


def normalize(text: str) -> str:
    """The whole text on lines without blank ones between, ended by punctuation or a closing sound tag."""
    return finish("\n".join(paragraphs(text)))


def paragraphs(text: str) -> list[str]:
    """Normalised paragraphs, none empty; lines inside a paragraph stay lines. The last is not yet ended."""
    text = _REPLACED_RE.sub(lambda match: _REPLACED[match[0]], text.translate(_CHARACTERS))
    found: list[str] = []
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        squeezed = " ".join(line.split())
        if squeezed:
            lines.append(squeezed)
        elif lines:
            found.append("\n".join(lines))
            lines = []
    return found


def finish(text: str) -> str:
    """Put a full stop where the text ends in nothing that the model takes for an end."""
    return text if text.endswith(_ENDINGS) else text + "."
