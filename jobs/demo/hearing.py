"""How well speech is understood: the words that a recogniser hears, against those that were to be said.

The recogniser is pocketsphinx with its own model of American English and its own vocabulary: it knows nothing of our
sentences. In: samples (N,) float32. Out: words, and counts of errors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from higgs_model.audio.resample import resample
from higgs_model.errors import BadInput

_RATE_HZ = 16_000
_SILENCE_S = 0.4
"""Before and after an utterance: the recogniser adapts to the room first."""
_WORD = re.compile(r"[a-z']+")


@dataclasses.dataclass(frozen=True)
class WordErrors:
    """Words that were replaced, left out or added, of so many."""

    errors: int = 0
    words: int = 0

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(self.errors + other.errors, self.words + other.words)

    @property
    def rate(self) -> float:
        """Errors a word; more than 1 when much was added."""
        return self.errors / max(self.words, 1)


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation."""
    return _WORD.findall(text.lower().replace("’", "'"))


def word_errors(said: Sequence[str], heard: Sequence[str]) -> WordErrors:
    """The fewest changes that make one of the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for at, word in enumerate(said, 1):
        before, row[0] = row.copy(), at
        for place, other in enumerate(heard, 1):
            row[place] = min(before[place] + 1, row[place - 1] + 1, before[place - 1] + (word != other))
    return WordErrors(row[-1], len(said))


class Recogniser:
    """Hears English.

    Raises:
        BadInput: pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise BadInput(f"the recogniser is not installed ({error}); pip install '.[voice]'") from error
        self._decoder = Decoder(samprate=_RATE_HZ, loglevel="FATAL")

    def words(self, samples_N: NDArray[np.float32], sample_rate_hz: int) -> list[str]:
        """What it hears."""
        heard = np.pad(resample(samples_N, sample_rate_hz, _RATE_HZ), round(_SILENCE_S * _RATE_HZ))
        # A new utterance must not be heard with what was learnt about the room of the last one.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw((np.clip(heard, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return words_of(found.hypstr) if found else []
