"""Converts text to its spoken form: numbers, dates, money and abbreviations as words, and names respelled.

Applied before normalization. Tags in brackets, sound tags and unrecognized patterns are left unchanged.
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
from higgs_model.script.languages import detect_language_from_start
from higgs_model.script.spoken_words import (
    ABBREVIATIONS,
    ABBREVIATIONS_BEFORE_DIGITS,
    CURRENCIES,
    DECIMAL_POINTS,
    FEMININE_CURRENCIES,
    GERMAN_DATE_ENDINGS,
    GERMAN_ORDINAL_ENDINGS,
    MINUS_WORDS,
    ORDINAL_MARKS,
    PERCENT_FORMATS,
    TIME_FORMATS,
    UNSPACED_LANGUAGES,
)

if TYPE_CHECKING:
    from babel import Locale
    from unicode_rbnf import RbnfEngine

_PROTECTED = r"[\[【][^\[\]【】\n]{0,80}[\]】]|</?SE(?:_[se])?>"
_WORD = re.compile(rf"(?P<protected>{_PROTECTED})|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CURRENCY = "[" + "".join(map(re.escape, CURRENCIES)) + "]"
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
            BadInput: the file cannot be read, or has an invalid line.
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
            BadInput: the lexicon has an invalid line.
        """
        respellings: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            word, _, respelling = (part.strip() for part in line.partition("\t"))
            if not respelling or not _WORD.fullmatch(word):
                raise BadInput(
                    f"line {number} of the lexicon {name!r} is {line[:80]!r}; "
                    f"expected one word, a tab, and its respelling"
                )
            respellings[word] = respelling
        return cls(respellings)

    def apply(self, text: str) -> str:
        """Respell the words of a text."""
        return _WORD.sub(self._respell, text)

    def _respell(self, match: re.Match[str]) -> str:
        word = match[0]
        if match["protected"]:
            return word
        return self.respellings.get(word) or self.respellings.get(word.lower()) or word


def to_spoken_form(text: str, language: str | None = None) -> str:
    """Expand numbers and abbreviations to words; `language` is a code such as `en` or `pt-BR`, by default detected."""
    code = (language or detect_language_from_start(text)).replace("-", "_")
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
    """Expands numbers, dates, money and abbreviations of one language in a single pass."""

    def __init__(self, language: str, locale: Locale, engine: RbnfEngine) -> None:
        self._language = language
        self._locale = locale
        self._engine = engine
        self._hour_gender = "feminine" if language == "fr" else "masculine"
        symbols = locale.number_symbols.get("latn", locale.number_symbols)
        self._decimal = symbols.get("decimal", ".")
        group = symbols.get("group", ",")
        groups = "".join(map(re.escape, {group, " ", "\u202f"} if group.isspace() else {group}))
        number = rf"\d{{1,3}}(?:[{groups}]\d{{3}})+(?!\d)|\d+"
        amount = rf"(?:{number})(?:{re.escape(self._decimal)}\d+)?"
        self._pattern = re.compile(
            rf"(?P<protected>{_PROTECTED})"
            rf"|(?<!\w)(?P<abbreviation>{_abbreviation_pattern(language)})(?!\w)"
            r"|(?<!\d)(?P<year>\d{4})(?=年)"
            r"|(?<![\w.,-])(?P<date>\d{4}-\d{2}-\d{2})(?![\w-])"
            rf"|{self._build_date_pattern()}"
            rf"|(?P<currency_before>{_CURRENCY})\s?(?P<amount_after>{amount})"
            rf"|(?<![A-Za-z_.,\d])(?P<amount_before>{amount})\s?(?P<currency_after>{_CURRENCY})"
            rf"|(?<![A-Za-z_.,\d])(?P<percentage>{amount})\s?%"
            r"|(?<![\w.,:])(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?![\w:])(?:\sUhr\b)?"
            rf"|(?<![\w.,])(?P<ordinal>\d{{1,6}})(?P<mark>{_alternation(ORDINAL_MARKS.get(language, ()))})(?!\w)"
            rf"|(?P<minus>(?<!\S)[-−])?(?<![A-Za-z_.,\d])(?P<number>{amount})(?![A-Za-z_\d])"
        )
        self._verbalizers: dict[str, Callable[[re.Match[str]], str | None]] = {
            "year": lambda match: self._spell_digits(match["year"]),
            "abbreviation": lambda match: ABBREVIATIONS[language][match["abbreviation"]],
            "date": lambda match: self._spell_date(match["date"]),
            "amount_after": lambda match: self._spell_money(match["amount_after"], match["currency_before"]),
            "amount_before": lambda match: self._spell_money(match["amount_before"], match["currency_after"]),
            "percentage": lambda match: self._spell_percentage(match["percentage"]),
            "minute": lambda match: self._spell_time(match["hour"], match["minute"]),
            "numeric_date": lambda match: self._spell_numeric_date(match["numeric_date"], match["before_date"]),
            "day": lambda match: self._spell_day(match["day"], match["before_day"], match["month"]),
            "german_ordinal": lambda match: (
                f"{match['article']} {self._spell_german_ordinal(match['article'], int(match['german_ordinal']))}"
            ),
            "ordinal": lambda match: self._spell_ordinal(match["ordinal"], ORDINAL_MARKS[language][match["mark"]]),
            "number": lambda match: self._spell_signed_number(match["minus"], match["number"]),
        }

    def _build_date_pattern(self) -> str:
        """Return the pattern of the language's dates, numeric and with month names."""
        before = _alternation(GERMAN_DATE_ENDINGS) if self._language == "de" else r"(?!)"
        pattern = self._locale.date_formats["short"].pattern
        self._date_order = "".join(dict.fromkeys(re.findall(r"[dMy]", pattern)))
        separator = re.search(r"[./-]", pattern)
        separator_re = re.escape(separator[0]) if separator and self._date_order in ("dMy", "Mdy") else r"(?!)"
        months = _alternation(self._locale.months["format"]["wide"].values())
        numeric = rf"\d{{1,2}}{separator_re}\d{{1,2}}{separator_re}\d{{4}}"
        numeric = rf"(?:(?P<before_date>{before})\s)?(?P<numeric_date>{numeric})(?![\w-])"
        if self._language == "de":
            named = rf"(?:(?P<before_day>{before})\s)?(?P<day>\d{{1,2}})\.(?=\s(?P<month>{months})\b)"
            named += rf"|(?P<article>{_alternation(GERMAN_ORDINAL_ENDINGS)})\s(?P<german_ordinal>\d{{1,4}})\.(?=\s\w)"
        elif self._language == "en":
            named = rf"(?P<month>{months})\s(?P<day>\d{{1,2}})(?![\w:]|[.,]\d)(?P<before_day>(?!))?"
            named += r"|(?P<article>(?!))(?P<german_ordinal>(?!))"
        else:
            named = r"(?P<day>(?!))(?P<before_day>)(?P<month>)(?P<article>)(?P<german_ordinal>)"
        return rf"(?<![\w.,/-])(?:{numeric}|{named})"

    def expand(self, text: str) -> str:
        """Return the text with all recognized patterns expanded."""
        return self._pattern.sub(self._replace, text)

    def _replace(self, match: re.Match[str]) -> str:
        for group, verbalize in self._verbalizers.items():
            if match[group] is not None:
                words = verbalize(match)
                return match[0] if words is None else words
        return match[0]

    def _format_number(self, number: int, purpose: str, rules: str = "") -> str | None:
        """Return a number in words, by the given rule set if the language has it."""
        from unicode_rbnf import FormatPurpose

        try:
            result = self._engine.format_number(number, FormatPurpose[purpose])
        except (ValueError, KeyError, LookupError):
            return None
        words: str = result.text_by_ruleset.get(rules, result.text)
        return words.replace("\u00ad", "")

    def _spell_digits(self, digits: str) -> str | None:
        words = [self._format_number(int(digit), "CARDINAL") for digit in digits]
        separator = "" if self._language in UNSPACED_LANGUAGES else " "
        return None if None in words else separator.join(word for word in words if word is not None)

    def _spell_cardinal(self, digits: str, gender: str = "") -> str | None:
        if len(digits) > _MAX_DIGITS or (len(digits) > 1 and digits[0] == "0"):
            return self._spell_digits(digits)
        return self._format_number(int(digits), "CARDINAL", f"spellout-cardinal-{gender}")

    def _spell_signed_number(self, minus: str | None, written: str) -> str | None:
        words = self._spell_number(written) if minus is None else self._spell_amount(written)
        if minus is None or words is None:
            return words
        word = MINUS_WORDS.get(self._language)
        return None if word is None else word + ("" if self._language in UNSPACED_LANGUAGES else " ") + words

    def _spell_number(self, written: str) -> str | None:
        if re.fullmatch(r"(?:1[1-9]|20)\d\d", written):
            if self._language in UNSPACED_LANGUAGES:
                return self._spell_cardinal(written)
            return self._format_number(int(written), "YEAR") or self._spell_cardinal(written)
        return self._spell_amount(written)

    def _spell_amount(self, written: str) -> str | None:
        integer, _, fraction = written.partition(self._decimal)
        words = self._spell_cardinal(re.sub(r"\D", "", integer))
        if not fraction:
            return words
        point, digits = DECIMAL_POINTS.get(self._language), self._spell_digits(fraction)
        return None if words is None or point is None or digits is None else f"{words} {point} {digits}"

    def _spell_percentage(self, written: str) -> str | None:
        words, template = self._spell_amount(written), PERCENT_FORMATS.get(self._language)
        return None if words is None or template is None else template.format(words)

    def _spell_money(self, written: str, currency: str) -> str | None:
        from babel.numbers import get_currency_name

        integer, _, fraction = written.partition(self._decimal)
        digits = re.sub(r"\D", "", integer)
        cents = fraction if len(fraction) == 2 and fraction != "00" else ""
        gender = "feminine" if CURRENCIES[currency] in FEMININE_CURRENCIES.get(self._language, ()) else "masculine"
        words = self._spell_cardinal(digits, gender) if cents or fraction in ("", "00") else self._spell_amount(written)
        if words is None:
            return None
        count = int(digits[:_MAX_DIGITS])
        money = f"{words} {get_currency_name(CURRENCIES[currency], count, self._locale)}"
        return f"{money} {self._spell_cardinal(cents.lstrip('0') or '0')}" if cents else money

    def _spell_date(self, written: str, before: str | None = None) -> str | None:
        from babel.dates import format_date

        try:
            date = datetime.date.fromisoformat(written)
        except ValueError:
            return None
        if self._language in ("en", "de"):
            month = format_date(date, "MMMM", self._locale)
            year = self._spell_number(str(date.year))
            if self._language == "en":
                return f"{month} {self._spell_ordinal(str(date.day))}, {year}"
            return f"{self._spell_german_ordinal(before, date.day)} {month} {year}"
        words = self.expand(format_date(date, "long", self._locale))
        # The ending of a day with an ordinal dot depends on the sentence.
        return None if re.match(r"\w+\. ", words) else words

    def _spell_numeric_date(self, written: str, before: str | None) -> str | None:
        parts = dict(zip(self._date_order, map(int, re.findall(r"\d+", written)), strict=True))
        words = self._spell_date(f"{parts['y']:04}-{parts['M']:02}-{parts['d']:02}", before)
        return None if words is None else (f"{before} " if before else "") + words

    def _spell_day(self, digits: str, before: str | None, month: str) -> str | None:
        if not 1 <= int(digits) <= 31:
            return None
        if self._language == "en":
            return f"{month} {self._spell_ordinal(digits)}"
        return (f"{before} " if before else "") + (self._spell_german_ordinal(before, int(digits)) or digits)

    def _spell_german_ordinal(self, before: str | None, number: int) -> str | None:
        """Return a German ordinal, with the ending that the preceding word requires."""
        ending = "-r" if before is None else GERMAN_DATE_ENDINGS[before]
        return self._format_number(number, "ORDINAL", f"spellout-ordinal{ending}")

    def _spell_time(self, hour: str, minute: str) -> str | None:
        hour_words = self._spell_cardinal(str(int(hour)), self._hour_gender)
        minute_words = self._spell_cardinal(str(int(minute)))
        on_the_hour = minute == "00"
        if self._language == "en":
            if on_the_hour:
                return f"{hour_words} o'clock"
            return f"{hour_words} {minute_words}" if int(minute) > 9 else f"{hour_words} oh {minute_words}"
        formats = TIME_FORMATS.get(self._language)
        return None if formats is None else formats[on_the_hour].format(hour_words, minute_words)

    def _spell_ordinal(self, digits: str, rules: str = "") -> str | None:
        return self._format_number(int(digits), "ORDINAL", f"spellout-ordinal{rules}")


def _abbreviation_pattern(language: str) -> str:
    """Return the language's abbreviations, longest first."""
    words = sorted(ABBREVIATIONS.get(language, ()), key=len, reverse=True)
    return (
        "|".join(re.escape(word) + (r"(?=\s*\d)" if word in ABBREVIATIONS_BEFORE_DIGITS else "") for word in words)
        or r"(?!)"
    )


def _alternation(words: Iterable[str]) -> str:
    """Return a pattern that matches any of the words, longest first."""
    by_length = sorted(words, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, by_length))})" if by_length else r"(?!)"
