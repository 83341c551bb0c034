"""Intelligibility of speech: word error rate of an independent speech recognizer.

The recognizer is pocketsphinx with its stock American English model and vocabulary; it has not seen our sentences.
In: samples (N,) float32. Out: words, and error counts.
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
_PADDING_S = 0.4
"""Silence before and after an utterance, in which the recognizer adapts to the noise level."""
_WORD = re.compile(r"[a-z']+")


@dataclasses.dataclass(frozen=True)
class WordErrors:
    """Substituted, deleted and inserted words, and the number of reference words."""

    errors: int = 0
    words: int = 0

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(self.errors + other.errors, self.words + other.words)

    @property
    def rate(self) -> float:
        """Word error rate; above 1 if many words were inserted."""
        return self.errors / max(self.words, 1)


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation."""
    return _WORD.findall(text.lower().replace("’", "'"))


def count_word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> WordErrors:
    """Count the word errors of a hypothesis: its Levenshtein distance from the reference."""
    distances = list(range(len(hypothesis) + 1))
    for row, word in enumerate(reference, 1):
        previous, distances[0] = distances.copy(), row
        for column, recognized in enumerate(hypothesis, 1):
            substitution = previous[column - 1] + (word != recognized)
            distances[column] = min(previous[column] + 1, distances[column - 1] + 1, substitution)
    return WordErrors(distances[-1], len(reference))


class SpeechRecognizer:
    """Recognizes English speech with pocketsphinx.

    Raises:
        BadInput: pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise BadInput(f"the speech recognizer is not installed ({error}); pip install '.[voice]'") from error
        self._decoder = Decoder(samprate=_RATE_HZ, loglevel="FATAL")

    def transcribe(self, samples_N: NDArray[np.float32], sample_rate_hz: int) -> list[str]:
        """Return the recognized words of a recording."""
        padded = np.pad(resample(samples_N, sample_rate_hz, _RATE_HZ), round(_PADDING_S * _RATE_HZ))
        # Cepstral means of one utterance must not carry over to the next.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw((np.clip(padded, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return split_words(hypothesis.hypstr) if hypothesis else []
