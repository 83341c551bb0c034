"""What the text side knows about languages: which one a text is in, whether the model speaks it, how it
counts words.

`detect` gives the two-letter code that the reference's classifier gives, since word chunks depend on it: the
same library, the same model file. `count_words` is linear and never less than the number of blank-separated
words.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator

KNOWN_LANGUAGES = {"en": "English", "zh": "Chinese", "ko": "Korean", "de": "German", "es": "Spanish"}
"""In these the model is known to be understood; in others it may have an accent, or speak gibberish."""

_MIN_LETTERS_TO_JUDGE = 40
"""Below this many letters the classifier guesses, and a warning would be noise."""
_SAMPLE_CHARS = 4000

HAN_KANA = r"\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
"""Written without blanks, about one spoken beat a character."""
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Thai, Lao, Burmese, Khmer: written without blanks, several characters a word."""

_WORD = re.compile(
    rf"[{HAN_KANA}]|[{UNSPACED}]{{1,4}}"
    rf"|(?<!\S)[^\s{HAN_KANA}{UNSPACED}]{{1,24}}"
    rf"|[^\W{HAN_KANA}{UNSPACED}][^\s{HAN_KANA}{UNSPACED}]{{0,23}}"
)
"""One unit of a word budget: a blank-separated word (of a monster without blanks, every 24 characters), or a
character of a script that is written without blanks. Punctuation counts only where it stands alone."""

_classifier_lock = threading.Lock()


def detect(text: str) -> str:
    """The ISO 639-1 code of the language that the whole text is most likely in."""
    # Not safe to load from two threads; imported late because its model takes a second.
    with _classifier_lock:
        import langid

        code: str = langid.classify(text)[0]
    return code


def detect_start(text: str) -> str:
    """The same from the first page of the text, for everything that need not equal the reference."""
    return _detect_start(text[:_SAMPLE_CHARS])


@functools.lru_cache(maxsize=256)
def _detect_start(sample: str) -> str:
    return detect(sample)


def unknown_language_warning(text: str, language: str | None) -> str | None:
    """What to tell the user when the model does not know the language; None when it does or none is seen."""
    if language is None:
        letters = sum(map(str.isalpha, text[:_SAMPLE_CHARS]))
        if letters < _MIN_LETTERS_TO_JUDGE and not re.search(rf"[^\x00-\u024f{HAN_KANA}\uac00-\ud7a3\W]", text):
            return None
        language = detect_start(text)
    code = language.split("-")[0].split("_")[0].lower()
    if code in KNOWN_LANGUAGES:
        return None
    known = ", ".join(KNOWN_LANGUAGES.values())
    return f"the text seems to be in language {code!r}, the model knows {known}; listen to a sample first"


def words(text: str) -> Iterator[re.Match[str]]:
    """The units of a word budget, in order."""
    return _WORD.finditer(text)


def count_words(text: str) -> int:
    """How much of a word budget the text takes."""
    return sum(1 for _ in words(text))
