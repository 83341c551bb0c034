"""Tables by language of the words that `spoken` needs and no library provides."""

from __future__ import annotations

CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY", "₩": "KRW", "₹": "INR"}
DECIMAL_POINTS = {
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
PERCENT_FORMATS = {
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
ABBREVIATIONS = {
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
UNSPACED_LANGUAGES = {"zh", "ja"}
"""Languages that join words without spaces, and read the year before 年 digit by digit."""
ABBREVIATIONS_BEFORE_DIGITS = {"No.", "Nr."}

FEMININE_CURRENCIES = {"de": {"INR"}, "es": {"GBP", "INR"}, "fr": {"GBP", "INR"}, "pt": {"GBP", "INR"}}
MINUS_WORDS = {
    "en": "minus",
    "de": "minus",
    "es": "menos",
    "fr": "moins",
    "it": "meno",
    "pt": "menos",
    "nl": "min",
    "zh": "负",
    "ja": "マイナス",
    "ko": "마이너스",
}
TIME_FORMATS = {
    "de": ("{} Uhr {}", "{} Uhr"),
    "fr": ("{} heures {}", "{} heures"),
    "zh": ("{}点{}分", "{}点"),
    "ja": ("{}時{}分", "{}時"),
}
"""Formats of a time with minutes, and of a full hour."""
ORDINAL_MARKS = {
    "en": {"st": "", "nd": "", "rd": "", "th": ""},
    "es": {"º": "-masculine", ".º": "-masculine", "ª": "-feminine", ".ª": "-feminine", "er": "-masculine-adjective"},
    "fr": {"er": "-masculine", "re": "-feminine", "ère": "-feminine", "e": "-masculine", "ème": "-masculine"},
    "it": {"º": "-masculine", "ª": "-feminine"},
    "pt": {"º": "-masculine", ".º": "-masculine", "ª": "-feminine", ".ª": "-feminine"},
    "nl": {"e": "", "de": "", "ste": ""},
}
"""Suffixes of ordinals in digits, and the RBNF rule set of each."""
_ENDINGS_AFTER_ARTICLES = (
    dict.fromkeys(("am", "vom", "zum", "im", "beim", "zur", "dem", "den", "des", "jeden", "jedem"), "-n")
    | dict.fromkeys(("in der", "an der", "von der", "mit der", "nach der", "seit der", "vor der", "bei der"), "-n")
    | dict.fromkeys(("der", "die", "das", "eine", "jede", "jeder", "jedes"), "")
)
_ENDINGS_BEFORE_DATES = dict.fromkeys(("ab", "seit", "nach", "vor"), "-m") | {"bis": "-n"}
GERMAN_ORDINAL_ENDINGS = _ENDINGS_AFTER_ARTICLES | {
    word.capitalize(): form for word, form in _ENDINGS_AFTER_ARTICLES.items()
}
"""The ending of an ordinal, as an RBNF rule set, by the word before it."""
GERMAN_DATE_ENDINGS = (
    GERMAN_ORDINAL_ENDINGS
    | _ENDINGS_BEFORE_DATES
    | {word.capitalize(): form for word, form in _ENDINGS_BEFORE_DATES.items()}
)
"""The same for the day of a date; after any other word it is nominative, as in `fünfter März`."""
