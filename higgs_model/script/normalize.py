"""Normalizes text to the form of the training data, as the reference implementation does.

The tables are facts about the training data, so nothing may be added to them. `normalize` accepts any Unicode and is
linear, and `normalize(text) == finish("\n".join(paragraphs(text)))`: the reference drops blank lines before it looks
for paragraphs, so here paragraphs are found first, for chunking.

Does not depend on speakers, pauses, chunks or special tokens (see `prompt.escape_user_text` for those).
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
"""Sound tags as users write them, and as the model was trained on them."""

_REPLACED = _UNITS | SOUND_TAGS
_REPLACED_RE = re.compile("|".join(map(re.escape, _REPLACED)))
_ENDINGS = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")


def normalize(text: str) -> str:
    """Return the text without blank lines, ending with punctuation or a closing sound tag."""
    return finish("\n".join(paragraphs(text)))


def paragraphs(text: str) -> list[str]:
    """Return normalized, non-empty paragraphs that keep their lines; `finish` is not applied."""
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
    """Append a full stop unless the text already ends with punctuation."""
    return text if text.endswith(_ENDINGS) else text + "."
