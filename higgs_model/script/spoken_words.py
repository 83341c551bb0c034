"""Words that `spoken` needs and no library provides: tables by language."""

from __future__ import annotations

CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY", "₩": "KRW", "₹": "INR"}
POINT = {
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
PERCENT = {
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
UNSPACED = {"zh", "ja"}
"""Languages that join words without blanks, and read the year before 年 digit by digit."""
ONLY_BEFORE_DIGIT = {"No.", "Nr."}

FEMININE_CURRENCIES = {"de": {"INR"}, "es": {"GBP", "INR"}, "fr": {"GBP", "INR"}, "pt": {"GBP", "INR"}}
MINUS = {
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
TIMES = {
    "de": ("{} Uhr {}", "{} Uhr"),
    "fr": ("{} heures {}", "{} heures"),
    "zh": ("{}点{}分", "{}点"),
    "ja": ("{}時{}分", "{}時"),
}
"""With minutes, and without."""
ORDINAL_MARKS = {
    "en": {"st": "", "nd": "", "rd": "", "th": ""},
    "es": {"º": "-masculine", ".º": "-masculine", "ª": "-feminine", ".ª": "-feminine", "er": "-masculine-adjective"},
    "fr": {"er": "-masculine", "re": "-feminine", "ère": "-feminine", "e": "-masculine", "ème": "-masculine"},
    "it": {"º": "-masculine", "ª": "-feminine"},
    "pt": {"º": "-masculine", ".º": "-masculine", "ª": "-feminine", ".ª": "-feminine"},
    "nl": {"e": "", "de": "", "ste": ""},
}
"""What follows the digits, and the form of the ordinal that it stands for."""
_GERMAN_ARTICLES = (
    dict.fromkeys(("am", "vom", "zum", "im", "beim", "zur", "dem", "den", "des", "jeden", "jedem"), "-n")
    | dict.fromkeys(("in der", "an der", "von der", "mit der", "nach der", "seit der", "vor der", "bei der"), "-n")
    | dict.fromkeys(("der", "die", "das", "eine", "jede", "jeder", "jedes"), "")
)
_GERMAN_DATES = dict.fromkeys(("ab", "seit", "nach", "vor"), "-m") | {"bis": "-n"}
GERMAN_ARTICLES = _GERMAN_ARTICLES | {word.capitalize(): form for word, form in _GERMAN_ARTICLES.items()}
"""The word before says which ending an ordinal has."""
GERMAN_BEFORE_DATE = GERMAN_ARTICLES | _GERMAN_DATES | {word.capitalize(): form for word, form in _GERMAN_DATES.items()}
"""The same before a date; with none of them before it, a date is a `fünfter März`."""
