"""The voices that the demo learns from: who speaks, with which synthesizer, in which languages, and who is held out.

A voice is a way of speaking that its synthesizer repeats exactly. No synthesizer runs here.
"""

from __future__ import annotations

import dataclasses

_ACCENTS = {"en": "en-us", "de": "de", "es": "es"}
_ESPEAK_VARIANTS = ("f2", "f4", "f5", "m1", "m3", "m7", "m8")
_ESPEAK_PITCHES = (35, 50, 65)
_FLITE_SIZES = {"slt": (90, 95, 100, 106, 112), "rms": (90, 95, 100, 110, 120), "awb": (90, 95, 100, 106, 112)}
_FLITE_SHARE = 3
"""Recognisers understand flite's English far better than espeak-ng's, and so do people."""
_HELD_OUT = {"slt-106", "rms-95", "rms-110", "awb-95", "f2-50", "f4-65", "m3-35", "m7-50"}


@dataclasses.dataclass(frozen=True)
class Voice:
    """One way of speaking.

    Attributes:
        command: what speaks, without the text.
        accents: for each language, what the synthesizer calls it; flite's voices have one language only.
        share: how often it is chosen, against the others of a language.
        size_percent: below 100 for a larger head: the recording is played that much slower, pitch and all, having been
            spoken as much faster.
        held_out: never trained on.
    """

    name: str
    command: tuple[str, ...]
    accents: dict[str, str]
    share: int = 1
    size_percent: int = 100

    @property
    def held_out(self) -> bool:
        return self.name in _HELD_OUT

    def arguments(self, language: str) -> list[str]:
        """The command line for a text in `language`, without the text."""
        return [part.format(accent=self.accents[language]) for part in self.command]


def _espeak(name: str, variant: str, pitch: int, words_a_minute: int, accents: dict[str, str], share: int = 1) -> Voice:
    command = ("espeak-ng", "-v", "{accent}" + variant, "-p", str(pitch), "-s", str(words_a_minute), "--stdout")
    return Voice(name, command, accents, share)


def _flite(speaker: str, size_percent: int) -> Voice:
    stretch = f"duration_stretch={size_percent / 100}"
    command = ("flite", "-voice", speaker, "--setf", stretch, "-o", "/dev/stdout", "-t")
    return Voice(f"{speaker}-{size_percent}", command, {"en": "en"}, _FLITE_SHARE, size_percent)


VOICES = (
    *(_flite(speaker, size) for speaker, sizes in _FLITE_SIZES.items() for size in sizes),
    *(
        _espeak(f"{variant}-{pitch}", f"+{variant}", pitch, 160, _ACCENTS)
        for variant in _ESPEAK_VARIANTS
        for pitch in _ESPEAK_PITCHES
    ),
    # With flite's slt these are the voices of the example library, which `make demo` clones.
    _espeak("ada", "", 42, 150, {"en": "en-gb"}, 3),
    _espeak("jonas", "", 35, 145, _ACCENTS, 3),
)
