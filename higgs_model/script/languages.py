"""Languages and writing systems: detection, which languages the model supports, and how words are counted.

`detect_language` returns the code that the reference's classifier returns, because word chunks depend on it: same
library, same model file. `count_words` is linear, and never less than the number of space-separated words.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator

SUPPORTED_LANGUAGES = {"en": "English", "zh": "Chinese", "ko": "Korean", "de": "German", "es": "Spanish"}
"""In other languages the model may have an accent, or be unintelligible."""

_MIN_LETTERS_TO_DETECT = 40
"""With fewer letters the classifier is too unreliable for a warning."""
_SAMPLE_CHARS = 4000

HAN_KANA = r"\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
"""Written without spaces, about one mora or syllable per character."""
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Thai, Lao, Burmese, Khmer: written without spaces, several characters per word."""

_WORD = re.compile(
    rf"[{HAN_KANA}]|[{UNSPACED}]{{1,4}}"
    rf"|(?<!\S)[^\s{HAN_KANA}{UNSPACED}]{{1,24}}"
    rf"|[^\W{HAN_KANA}{UNSPACED}][^\s{HAN_KANA}{UNSPACED}]{{0,23}}"
)
"""A word of a word budget: a space-separated word (or each 24 characters of a very long one), or a character of a
script without spaces. Punctuation counts only if it is separated by spaces."""

_classifier_lock = threading.Lock()


def detect_language(text: str) -> str:
    """Return the ISO 639-1 code of the most likely language of a text."""
    # Loading is not thread-safe; imported late because its model takes a second to load.
    with _classifier_lock:
        import langid

        code: str = langid.classify(text)[0]
    return code


def detect_language_from_start(text: str) -> str:
    """Detect the language from the start of a text; for uses that need not match the reference."""
    return _detect_language_from_start(text[:_SAMPLE_CHARS])


@functools.lru_cache(maxsize=256)
def _detect_language_from_start(sample: str) -> str:
    return detect_language(sample)


def unsupported_language_warning(text: str, language: str | None) -> str | None:
    """Return a warning if the model does not support a text's language, else None."""
    if language is None:
        letters = sum(map(str.isalpha, text[:_SAMPLE_CHARS]))
        if letters < _MIN_LETTERS_TO_DETECT and not re.search(rf"[^\x00-\u024f{HAN_KANA}\uac00-\ud7a3\W]", text):
            return None
        language = detect_language_from_start(text)
    code = language.split("-")[0].split("_")[0].lower()
    if code in SUPPORTED_LANGUAGES:
        return None
    supported = ", ".join(SUPPORTED_LANGUAGES.values())
    return f"the text seems to be in {code!r}, but the model supports {supported}; check a sample first"


def iter_words(text: str) -> Iterator[re.Match[str]]:
    """Yield the words of a text, in order."""
    return _WORD.finditer(text)


def count_words(text: str) -> int:
    """Return the number of words of a text."""
    return sum(1 for _ in iter_words(text))
