"""Writes text as it is spoken: numbers, dates, money and abbreviations as words, and names respelled.

Applied before normalization. Tags in brackets and sound tags are left alone, as is everything that is not understood.
Number words come from Unicode's rule-based number formats (unicode-rbnf), names of months and currencies from CLDR
(Babel). Linear in the text; text in an unsupported language is returned unchanged.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_model.errors import BadInput
from higgs_model.script.languages import detect_start
from higgs_model.script.spoken_words import (
    ABBREVIATIONS,
    CURRENCIES,
    FEMININE_CURRENCIES,
    GERMAN_ARTICLES,
    GERMAN_BEFORE_DATE,
    MINUS,
    ONLY_BEFORE_DIGIT,
    ORDINAL_MARKS,
    PERCENT,
    POINT,
    TIMES,
    UNSPACED,
)

if TYPE_CHECKING:
    from babel import Locale
    from unicode_rbnf import RbnfEngine

_PROTECTED = r"[\[【][^\[\]【】\n]{0,80}[\]】]|</?SE(?:_[se])?>"
_WORD = re.compile(rf"(?P<keep>{_PROTECTED})|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SIGN = "[" + "".join(map(re.escape, CURRENCIES)) + "]"
_MAX_DIGITS = 15
"""Longer numbers are read digit by digit, like account numbers."""


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Respellings of words that the model mispronounces: `word<TAB>respelling` per line, `#` starts a comment.

    Only whole words match; lower-case entries match any capitalization, others only their own.
    """

    respellings: dict[str, str]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lexicon:
        """Read a lexicon file.

        Raises:
            BadInput: it cannot be read, or has an invalid line.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the lexicon {os.fspath(path)!r} cannot be read: {error}") from error
        return cls.parse(text, os.fspath(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Lexicon:
        """Parse a lexicon; errors refer to it by `name`.

        Raises:
            BadInput: it has an invalid line.
        """
        respellings: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            word, _, respelling = (part.strip() for part in line.partition("\t"))
            if not respelling or not _WORD.fullmatch(word):
                raise BadInput(
                    f"line {number} of the lexicon {name!r} is {line[:80]!r}; "
                    f"wanted one word, a tab, and its respelling"
                )
            respellings[word] = respelling
        return cls(respellings)

    def apply(self, text: str) -> str:
        """Respell the words of a text."""
        return _WORD.sub(self._respell, text)

    def _respell(self, match: re.Match[str]) -> str:
        word = match[0]
        if match["keep"]:
            return word
        return self.respellings.get(word) or self.respellings.get(word.lower()) or word


def spoken_forms(text: str, language: str | None = None) -> str:
    """Expand numbers and abbreviations to words; `language` is a code such as `en` or `pt-BR`."""
    code = (language or detect_start(text)).replace("-", "_")
    verbalizer = _verbalizer(code)
    return text if verbalizer is None else verbalizer.expand(text)


@functools.lru_cache(maxsize=64)
def _verbalizer(code: str) -> _Verbalizer | None:
    import babel
    from unicode_rbnf import RbnfEngine

    try:
        locale = babel.Locale.parse(code)
        engine = RbnfEngine.for_language(locale.language)
    except (babel.UnknownLocaleError, ValueError):
        return None
    return _Verbalizer(locale.language, locale, engine)


class _Verbalizer:
    """Expands text in one language."""

    def __init__(self, language: str, locale: Locale, engine: RbnfEngine) -> None:
        self._language = language
        self._locale = locale
        self._engine = engine
        self._hours = "feminine" if language == "fr" else "masculine"
        symbols = locale.number_symbols.get("latn", locale.number_symbols)
        self._decimal = symbols.get("decimal", ".")
        group = symbols.get("group", ",")
        groups = "".join(map(re.escape, {group, " ", "\u202f"} if group.isspace() else {group}))
        number = rf"\d{{1,3}}(?:[{groups}]\d{{3}})+(?!\d)|\d+"
        amount = rf"(?:{number})(?:{re.escape(self._decimal)}\d+)?"
        self._pattern = re.compile(
            rf"(?P<keep>{_PROTECTED})"
            rf"|(?<!\w)(?P<short>{_short(language)})(?!\w)"
            r"|(?<!\d)(?P<year>\d{4})(?=年)"
            r"|(?<![\w.,-])(?P<date>\d{4}-\d{2}-\d{2})(?![\w-])"
            rf"|{self._dates()}"
            rf"|(?P<sign>{_SIGN})\s?(?P<price>{amount})"
            rf"|(?<![A-Za-z_.,\d])(?P<worth>{amount})\s?(?P<after>{_SIGN})"
            rf"|(?<![A-Za-z_.,\d])(?P<share>{amount})\s?%"
            r"|(?<![\w.,:])(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?![\w:])(?:\sUhr\b)?"
            rf"|(?<![\w.,])(?P<ordinal>\d{{1,6}})(?P<mark>{_either(ORDINAL_MARKS.get(language, ()))})(?!\w)"
            rf"|(?P<minus>(?<!\S)[-−])?(?<![A-Za-z_.,\d])(?P<number>{amount})(?![A-Za-z_\d])"
        )
        self._say: dict[str, Callable[[re.Match[str]], str | None]] = {
            "year": lambda match: self._digits(match["year"]),
            "short": lambda match: ABBREVIATIONS[language][match["short"]],
            "date": lambda match: self._date(match["date"]),
            "price": lambda match: self._money(match["price"], match["sign"]),
            "worth": lambda match: self._money(match["worth"], match["after"]),
            "share": lambda match: self._share(match["share"]),
            "minute": lambda match: self._time(match["hour"], match["minute"]),
            "numeric": lambda match: self._numeric_date(match["numeric"], match["to_date"]),
            "day": lambda match: self._day(match["day"], match["to_day"], match["month"]),
            "next": lambda match: f"{match['to_next']} {self._after(match['to_next'], int(match['next']))}",
            "ordinal": lambda match: self._ordinal(match["ordinal"], ORDINAL_MARKS[language][match["mark"]]),
            "number": lambda match: self._signed(match["minus"], match["number"]),
        }

    def _dates(self) -> str:
        """Return the pattern of the language's dates, numeric and with month names."""
        before = _either(GERMAN_BEFORE_DATE) if self._language == "de" else r"(?!)"
        pattern = self._locale.date_formats["short"].pattern
        self._date_order = "".join(dict.fromkeys(re.findall(r"[dMy]", pattern)))
        parted = re.search(r"[./-]", pattern)
        part = re.escape(parted[0]) if parted and self._date_order in ("dMy", "Mdy") else r"(?!)"
        months = _either(self._locale.months["format"]["wide"].values())
        numeric = rf"(?:(?P<to_date>{before})\s)?(?P<numeric>\d{{1,2}}{part}\d{{1,2}}{part}\d{{4}})(?![\w-])"
        if self._language == "de":
            named = rf"(?:(?P<to_day>{before})\s)?(?P<day>\d{{1,2}})\.(?=\s(?P<month>{months})\b)"
            named += rf"|(?P<to_next>{_either(GERMAN_ARTICLES)})\s(?P<next>\d{{1,4}})\.(?=\s\w)"
        elif self._language == "en":
            named = rf"(?P<month>{months})\s(?P<day>\d{{1,2}})(?![\w:]|[.,]\d)(?P<to_day>(?!))?"
            named += r"|(?P<to_next>(?!))(?P<next>(?!))"
        else:
            named = r"(?P<day>(?!))(?P<to_day>)(?P<month>)(?P<to_next>)(?P<next>)"
        return rf"(?<![\w.,/-])(?:{numeric}|{named})"

    def expand(self, text: str) -> str:
        """Expand everything in one pass."""
        return self._pattern.sub(self._replace, text)

    def _replace(self, match: re.Match[str]) -> str:
        for group, say in self._say.items():
            if match[group] is not None:
                said = say(match)
                return match[0] if said is None else said
        return match[0]

    def _format(self, number: int, purpose: str, rules: str = "") -> str | None:
        """Return a number in words, by the given rule set if the language has it."""
        from unicode_rbnf import FormatPurpose

        try:
            result = self._engine.format_number(number, FormatPurpose[purpose])
        except (ValueError, KeyError, LookupError):
            return None
        said: str = result.text_by_ruleset.get(rules, result.text)
        return said.replace("\u00ad", "")

    def _digits(self, digits: str) -> str | None:
        said = [self._format(int(digit), "CARDINAL") for digit in digits]
        blank = "" if self._language in UNSPACED else " "
        return None if None in said else blank.join(word for word in said if word is not None)

    def _cardinal(self, digits: str, gender: str = "") -> str | None:
        if len(digits) > _MAX_DIGITS or (len(digits) > 1 and digits[0] == "0"):
            return self._digits(digits)
        return self._format(int(digits), "CARDINAL", f"spellout-cardinal-{gender}")

    def _signed(self, minus: str | None, written: str) -> str | None:
        said = self._number(written) if minus is None else self._amount(written)
        if minus is None or said is None:
            return said
        word = MINUS.get(self._language)
        return None if word is None else word + ("" if self._language in UNSPACED else " ") + said

    def _number(self, written: str) -> str | None:
        if re.fullmatch(r"(?:1[1-9]|20)\d\d", written):
            if self._language in UNSPACED:
                return self._cardinal(written)
            return self._format(int(written), "YEAR") or self._cardinal(written)
        return self._amount(written)

    def _amount(self, written: str) -> str | None:
        whole, _, fraction = written.partition(self._decimal)
        said = self._cardinal(re.sub(r"\D", "", whole))
        if not fraction:
            return said
        point, digits = POINT.get(self._language), self._digits(fraction)
        return None if said is None or point is None or digits is None else f"{said} {point} {digits}"

    def _share(self, written: str) -> str | None:
        said, form = self._amount(written), PERCENT.get(self._language)
        return None if said is None or form is None else form.format(said)

    def _money(self, written: str, sign: str) -> str | None:
        from babel.numbers import get_currency_name

        whole, _, fraction = written.partition(self._decimal)
        digits = re.sub(r"\D", "", whole)
        cents = fraction if len(fraction) == 2 and fraction != "00" else ""
        gender = "feminine" if CURRENCIES[sign] in FEMININE_CURRENCIES.get(self._language, ()) else "masculine"
        said = self._cardinal(digits, gender) if cents or fraction in ("", "00") else self._amount(written)
        if said is None:
            return None
        count = int(digits[:_MAX_DIGITS])
        money = f"{said} {get_currency_name(CURRENCIES[sign], count, self._locale)}"
        return f"{money} {self._cardinal(cents.lstrip('0') or '0')}" if cents else money

    def _date(self, written: str, before: str | None = None) -> str | None:
        from babel.dates import format_date

        try:
            date = datetime.date.fromisoformat(written)
        except ValueError:
            return None
        if self._language in ("en", "de"):
            month = format_date(date, "MMMM", self._locale)
            year = self._number(str(date.year))
            if self._language == "en":
                return f"{month} {self._ordinal(str(date.day))}, {year}"
            return f"{self._after(before, date.day)} {month} {year}"
        said = self.expand(format_date(date, "long", self._locale))
        # A day with an ordinal dot has an ending that depends on the sentence.
        return None if re.match(r"\w+\. ", said) else said

    def _numeric_date(self, written: str, before: str | None) -> str | None:
        parts = dict(zip(self._date_order, map(int, re.findall(r"\d+", written)), strict=True))
        said = self._date(f"{parts['y']:04}-{parts['M']:02}-{parts['d']:02}", before)
        return None if said is None else (f"{before} " if before else "") + said

    def _day(self, digits: str, before: str | None, month: str) -> str | None:
        if not 1 <= int(digits) <= 31:
            return None
        if self._language == "en":
            return f"{month} {self._ordinal(digits)}"
        return (f"{before} " if before else "") + (self._after(before, int(digits)) or digits)

    def _after(self, before: str | None, number: int) -> str | None:
        """Return a German ordinal, with the ending that the preceding word requires."""
        ending = "-r" if before is None else GERMAN_BEFORE_DATE[before]
        return self._format(number, "ORDINAL", f"spellout-ordinal{ending}")

    def _time(self, hour: str, minute: str) -> str | None:
        said, past = self._cardinal(str(int(hour)), self._hours), self._cardinal(str(int(minute)))
        whole = minute == "00"
        if self._language == "en":
            if whole:
                return f"{said} o'clock"
            return f"{said} {past}" if int(minute) > 9 else f"{said} oh {past}"
        forms = TIMES.get(self._language)
        return None if forms is None else forms[whole].format(said, past)

    def _ordinal(self, digits: str, form: str = "") -> str | None:
        return self._format(int(digits), "ORDINAL", f"spellout-ordinal{form}")


def _short(language: str) -> str:
    """Return the language's abbreviations, longest first."""
    words = sorted(ABBREVIATIONS.get(language, ()), key=len, reverse=True)
    return "|".join(re.escape(word) + (r"(?=\s*\d)" if word in ONLY_BEFORE_DIGIT else "") for word in words) or r"(?!)"


def _either(words: Iterable[str]) -> str:
    """Return a pattern that matches any of the words, longest first."""
    found = sorted(words, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, found))})" if found else r"(?!)"
