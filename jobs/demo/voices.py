"""The voices that the demo learns from: their synthesizers and languages, and which of them are held out.

A voice is a configuration with which its synthesizer is deterministic. This module only describes voices.
"""

from __future__ import annotations

import dataclasses

_ACCENTS = {"en": "en-us", "de": "de", "es": "es"}
_ESPEAK_VARIANTS = ("f2", "f4", "f5", "m1", "m3", "m7", "m8")
_ESPEAK_PITCHES = (35, 50, 65)
_FLITE_SIZES = {"slt": (90, 95, 100, 106, 112), "rms": (90, 95, 100, 110, 120), "awb": (90, 95, 100, 106, 112)}
_FLITE_WEIGHT = 3
"""Recognizers, like people, understand flite's English far better than espeak-ng's."""
_HELD_OUT = {"slt-106", "rms-95", "rms-110", "awb-95", "f2-50", "f4-65", "m3-35", "m7-50"}


@dataclasses.dataclass(frozen=True)
class Voice:
    """A voice of a synthesizer.

    Attributes:
        command: the synthesizer's command line, without the text.
        accents: the synthesizer's name for each language; flite's voices have one language only.
        weight: how often the voice is drawn, relative to the others of a language.
        size_percent: vocal tract size; below 100 the recording is played slower, which lowers pitch and formants, after
            having been synthesized faster to keep its duration.
    """

    name: str
    command: tuple[str, ...]
    accents: dict[str, str]
    weight: int = 1
    size_percent: int = 100

    @property
    def held_out(self) -> bool:
        """Whether the voice is excluded from training."""
        return self.name in _HELD_OUT

    def command_line(self, language: str) -> list[str]:
        """Return the command line for a text in `language`, without the text."""
        return [part.format(accent=self.accents[language]) for part in self.command]


def _espeak(
    name: str, variant: str, pitch: int, words_a_minute: int, accents: dict[str, str], weight: int = 1
) -> Voice:
    command = ("espeak-ng", "-v", "{accent}" + variant, "-p", str(pitch), "-s", str(words_a_minute), "--stdout")
    return Voice(name, command, accents, weight)


def _flite(speaker: str, size_percent: int) -> Voice:
    stretch = f"duration_stretch={size_percent / 100}"
    command = ("flite", "-voice", speaker, "--setf", stretch, "-o", "/dev/stdout", "-t")
    return Voice(f"{speaker}-{size_percent}", command, {"en": "en"}, _FLITE_WEIGHT, size_percent)


VOICES = (
    *(_flite(speaker, size) for speaker, sizes in _FLITE_SIZES.items() for size in sizes),
    *(
        _espeak(f"{variant}-{pitch}", f"+{variant}", pitch, 160, _ACCENTS)
        for variant in _ESPEAK_VARIANTS
        for pitch in _ESPEAK_PITCHES
    ),
    # These two and flite's slt are the voices of the example library, which `make demo` clones.
    _espeak("ada", "", 42, 150, {"en": "en-gb"}, 3),
    _espeak("jonas", "", 35, 145, _ACCENTS, 3),
)
