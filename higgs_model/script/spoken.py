"""Text that is read as its writer would say it: numbers, dates, money and abbreviations as words, names
respelled.

Text in, text out, before normalisation; tags in brackets and sound tags are left alone, and so is whatever is
not understood. Number words come from Unicode's rule-based formats (unicode-rbnf), names of months and
currencies from the CLDR (Babel). Linear in the text; a language that the libraries do not have comes out
unchanged.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_model.errors import BadInput
from higgs_model.script.languages import detect_start

if TYPE_CHECKING:
    from babel import Locale
    from unicode_rbnf import RbnfEngine

_PROTECTED = r"\[[^\[\]\n]{0,80}\]|</?SE(?:_[se])?>"
_WORD = re.compile(rf"(?P<keep>{_PROTECTED})|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY", "₩": "KRW", "₹": "INR"}
_SIGN = "[" + "".join(map(re.escape, _CURRENCIES)) + "]"
_MAX_DIGITS = 15
"""Longer numbers are read digit by digit, as one reads out a number of an account."""

_POINT = {
    "en": "point",
    "de": "Komma",
    "es": "coma",
    "fr": "virgule",
    "it": "virgola",
    "pt": "vírgula",
    "nl": "komma",
    "zh": "点",
    "ja": "点",
    "ko": "점",
}
_PERCENT = {
    "en": "{} percent",
    "de": "{} Prozent",
    "es": "{} por ciento",
    "fr": "{} pour cent",
    "it": "{} per cento",
    "pt": "{} por cento",
    "nl": "{} procent",
    "zh": "百分之{}",
    "ja": "{}パーセント",
    "ko": "{} 퍼센트",
}
_ABBREVIATIONS = {
    "en": {
        "Dr.": "Doctor",
        "Mr.": "Mister",
        "Mrs.": "Missus",
        "Ms.": "Miss",
        "Prof.": "Professor",
        "vs.": "versus",
        "etc.": "et cetera",
        "e.g.": "for example",
        "i.e.": "that is",
        "approx.": "approximately",
        "No.": "Number",
    },
    "de": {
        "Dr.": "Doktor",
        "Prof.": "Professor",
        "z.B.": "zum Beispiel",
        "z. B.": "zum Beispiel",
        "d.h.": "das heißt",
        "d. h.": "das heißt",
        "usw.": "und so weiter",
        "bzw.": "beziehungsweise",
        "ca.": "circa",
        "Nr.": "Nummer",
    },
    "es": {
        "Sr.": "Señor",
        "Sra.": "Señora",
        "Dr.": "Doctor",
        "Dra.": "Doctora",
        "etc.": "etcétera",
        "p. ej.": "por ejemplo",
    },
    "fr": {
        "Mme": "Madame",
        "Mlle": "Mademoiselle",
        "Dr": "Docteur",
        "etc.": "et cetera",
        "p. ex.": "par exemple",
    },
}
_UNSPACED = {"zh", "ja"}
"""Languages that join words without blanks, and read the year before 年 digit by digit."""
_ONLY_BEFORE_DIGIT = {"No.", "Nr."}


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Respellings of words for the model's ear: `word<TAB>respelling` a line, `#` starts a comment.

    A word is found whole; one with a capital in it only as it is written, any other in every case.
    """

    respellings: dict[str, str]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lexicon:
        """Read a lexicon file.

        Raises:
            BadInput: it cannot be read, or has a line that is no entry.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the lexicon {os.fspath(path)!r} cannot be read: {error}") from error
        return cls.parse(text, os.fspath(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Lexicon:
        """Read a lexicon's text; errors call it by its name.

        Raises:
            BadInput: it has a line that is no entry.
        """
        respellings: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            word, _, respelling = (part.strip() for part in line.partition("\t"))
            if not respelling or not _WORD.fullmatch(word):
                raise BadInput(
                    f"line {number} of the lexicon {name!r} is {line[:80]!r}; "
                    f"wanted are one word, a tab, and how to say it"
                )
            respellings[word] = respelling
        return cls(respellings)

    def apply(self, text: str) -> str:
        """The text with its words respelled."""
        return _WORD.sub(self._respell, text)

    def _respell(self, match: re.Match[str]) -> str:
        word = match[0]
        if match["keep"]:
            return word
        return self.respellings.get(word) or self.respellings.get(word.lower()) or word


def spoken_forms(text: str, language: str | None = None) -> str:
    """The text with what is written short said in full; `language` is a code such as `en` or `pt-BR`."""
    code = (language or detect_start(text)).replace("-", "_")
    speaker = _speaker(code)
    return text if speaker is None else speaker.say(text)


@functools.lru_cache(maxsize=64)
def _speaker(code: str) -> _Speaker | None:
    import babel
    from unicode_rbnf import RbnfEngine

    try:
        locale = babel.Locale.parse(code)
        engine = RbnfEngine.for_language(locale.language)
    except (babel.UnknownLocaleError, ValueError):
        return None
    return _Speaker(locale.language, locale, engine)


class _Speaker:
    """How one language says what is written short."""

    def __init__(self, language: str, locale: Locale, engine: RbnfEngine) -> None:
        self._language = language
        self._locale = locale
        self._engine = engine
        symbols = locale.number_symbols.get("latn", locale.number_symbols)
        self._decimal = symbols.get("decimal", ".")
        group = symbols.get("group", ",")
        groups = "".join(map(re.escape, {group, " ", "\u202f"} if group.isspace() else {group}))
        number = rf"\d{{1,3}}(?:[{groups}]\d{{3}})+(?!\d)|\d+"
        amount = rf"(?:{number})(?:{re.escape(self._decimal)}\d+)?"
        abbreviations = sorted(_ABBREVIATIONS.get(language, {}), key=len, reverse=True)
        short = "|".join(
            re.escape(word) + (r"(?=\s*\d)" if word in _ONLY_BEFORE_DIGIT else "") for word in abbreviations
        )
        self._pattern = re.compile(
            rf"(?P<keep>{_PROTECTED})"
            rf"|(?<!\w)(?P<short>{short or r'(?!)'})(?!\w)"
            r"|(?<!\d)(?P<year>\d{4})(?=年)"
            r"|(?<![\w.,-])(?P<date>\d{4}-\d{2}-\d{2})(?![\w-])"
            rf"|(?P<sign>{_SIGN})\s?(?P<price>{amount})"
            rf"|(?<![A-Za-z_.,\d])(?P<worth>{amount})\s?(?P<after>{_SIGN})"
            rf"|(?<![A-Za-z_.,\d])(?P<share>{amount})\s?%"
            r"|(?<![\w.,:])(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?![\w:])"
            r"|(?<![\w.,])(?P<ordinal>\d{1,6})(?:st|nd|rd|th)\b"
            rf"|(?<![A-Za-z_.,\d])(?P<number>{amount})(?![A-Za-z_\d])"
        )
        self._say: dict[str, Callable[[re.Match[str]], str | None]] = {
            "year": lambda match: self._digits(match["year"]),
            "short": lambda match: _ABBREVIATIONS[language][match["short"]],
            "date": lambda match: self._date(match["date"]),
            "price": lambda match: self._money(match["price"], match["sign"]),
            "worth": lambda match: self._money(match["worth"], match["after"]),
            "share": lambda match: self._share(match["share"]),
            "minute": lambda match: self._time(match["hour"], match["minute"]),
            "ordinal": lambda match: self._ordinal(match["ordinal"]),
            "number": lambda match: self._number(match["number"]),
        }

    def say(self, text: str) -> str:
        """All replacements in one pass."""
        return self._pattern.sub(self._replace, text)

    def _replace(self, match: re.Match[str]) -> str:
        for group, say in self._say.items():
            if match[group] is not None:
                said = say(match)
                return match[0] if said is None else said
        return match[0]

    def _format(self, number: int, purpose: str) -> str | None:
        from unicode_rbnf import FormatPurpose

        try:
            said: str = self._engine.format_number(number, FormatPurpose[purpose]).text
        except (ValueError, KeyError, LookupError):
            return None
        return said.replace("\u00ad", "")

    def _digits(self, digits: str) -> str | None:
        said = [self._format(int(digit), "CARDINAL") for digit in digits]
        blank = "" if self._language in _UNSPACED else " "
        return None if None in said else blank.join(word for word in said if word is not None)

    def _cardinal(self, digits: str) -> str | None:
        if len(digits) > _MAX_DIGITS or (len(digits) > 1 and digits[0] == "0"):
            return self._digits(digits)
        return self._format(int(digits), "CARDINAL")

    def _number(self, written: str) -> str | None:
        if re.fullmatch(r"(?:1[1-9]|20)\d\d", written):
            if self._language in _UNSPACED:
                return self._cardinal(written)
            return self._format(int(written), "YEAR") or self._cardinal(written)
        return self._amount(written)

    def _amount(self, written: str) -> str | None:
        whole, _, fraction = written.partition(self._decimal)
        said = self._cardinal(re.sub(r"\D", "", whole))
        if not fraction:
            return said
        point, digits = _POINT.get(self._language), self._digits(fraction)
        return None if said is None or point is None or digits is None else f"{said} {point} {digits}"

    def _share(self, written: str) -> str | None:
        said, form = self._amount(written), _PERCENT.get(self._language)
        return None if said is None or form is None else form.format(said)

    def _money(self, written: str, sign: str) -> str | None:
        from babel.numbers import get_currency_name

        whole, _, fraction = written.partition(self._decimal)
        digits = re.sub(r"\D", "", whole)
        cents = fraction if len(fraction) == 2 and fraction != "00" else ""
        said = self._cardinal(digits) if cents or fraction in ("", "00") else self._amount(written)
        if said is None:
            return None
        count = int(digits[:_MAX_DIGITS])
        money = f"{said} {get_currency_name(_CURRENCIES[sign], count, self._locale)}"
        return f"{money} {self._cardinal(cents.lstrip('0') or '0')}" if cents else money

    def _date(self, written: str) -> str | None:
        from babel.dates import format_date

        try:
            date = datetime.date.fromisoformat(written)
        except ValueError:
            return None
        if self._language == "en":
            month = format_date(date, "MMMM", self._locale)
            return f"{month} {self._ordinal(str(date.day))}, {self._number(str(date.year))}"
        said = self.say(format_date(date, "long", self._locale))
        # Where the day has an ordinal's dot, its word has an ending that depends on the sentence.
        return None if re.match(r"\w+\. ", said) else said

    def _time(self, hour: str, minute: str) -> str | None:
        """English only: other languages put words between hours and minutes that no library of ours knows."""
        said, past = self._cardinal(str(int(hour))), self._cardinal(str(int(minute)))
        if self._language != "en":
            return None
        if minute == "00":
            return f"{said} o'clock"
        return f"{said} {past}" if int(minute) > 9 else f"{said} oh {past}"

    def _ordinal(self, digits: str) -> str | None:
        return self._format(int(digits), "ORDINAL") if self._language == "en" else None
