"""Normalizes text to the form of the training data, as the reference implementation does.

The tables are facts about the training data, so nothing may be added to them. `normalize` accepts any Unicode, is
linear, and equals `add_final_punctuation("\n".join(split_paragraphs(text)))`. The reference drops blank lines before it
looks for paragraphs; here paragraphs are split first, because chunking needs them.

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

_REPLACEMENTS = _UNITS | SOUND_TAGS
_REPLACEMENT_RE = re.compile("|".join(map(re.escape, _REPLACEMENTS)))
_FINAL_PUNCTUATION = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")


def normalize(text: str) -> str:
    """Return the normalized text, without blank lines, ending with punctuation or a closing sound tag."""
    return add_final_punctuation("\n".join(split_paragraphs(text)))


def split_paragraphs(text: str) -> list[str]:
    """Return normalized, non-empty paragraphs with their line breaks, without added punctuation."""
    text = _REPLACEMENT_RE.sub(lambda match: _REPLACEMENTS[match[0]], text.translate(_CHARACTERS))
    paragraphs: list[str] = []
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        collapsed = " ".join(line.split())
        if collapsed:
            lines.append(collapsed)
        elif lines:
            paragraphs.append("\n".join(lines))
            lines = []
    return paragraphs


def add_final_punctuation(text: str) -> str:
    """Append a full stop unless the text already ends with punctuation."""
    return text if text.endswith(_FINAL_PUNCTUATION) else text + "."
