"""Spoken forms are opt-in, a lexicon is read from a file, and neither changes tags."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.script.spoken_forms import Lexicon, to_spoken_form

GERMAN = "fünf Euro fünfzig für eintausendzweihundertvierunddreißig, das heißt zwölf Komma fünf Prozent"
TAGGED = "[SPEAKER0] {} [pause:1.5s] <SE_s>[Music]</SE_s> x2y v1.2.3"


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        (
            "en",
            "Dr. Ames paid $5.50, i.e. 12% more.",
            "Doctor Ames paid five US dollars fifty, that is twelve percent more.",
        ),
        ("en", "On 2024-03-05 at 10:30", "On March fifth, twenty twenty-four at ten thirty"),
        (
            "en",
            "the 3rd of 1,234.5 in 1984",
            "the third of one thousand two hundred thirty-four point five in nineteen eighty-four",
        ),
        ("en", "0042", "zero zero four two"),
        ("en", TAGGED.format("2"), TAGGED.format("two")),
        ("de", "5,50 € für 1.234, d. h. 12,5 %", GERMAN),
        ("es", "Cuesta 21 €, el 1.º y la 2ª", "Cuesta veintiún euros, el primero y la segunda"),
        (
            "en",
            "March 5, 2024, may 5 at 3:05, -5",
            "March fifth, twenty twenty-four, may five at three oh five, minus five",
        ),
        ("en", "3/5/2024 and 13/5/2024", "March fifth, twenty twenty-four and 13/5/2024"),
        ("en-GB", "3/5/2024", "May third, twenty twenty-four"),
        ("de", "Am 5. März 1984 um 10:30 Uhr", "Am fünften März neunzehnhundertvierundachtzig um zehn Uhr dreißig"),
        ("de", "vom 05.03.1984, Bonn, 1. Mai", "vom fünften März neunzehnhundertvierundachtzig, Bonn, erster Mai"),
        ("de", "der 3. Mann in der 2. Reihe hat 3. Dann", "der dritte Mann in der zweiten Reihe hat drei. Dann"),
        ("de", "1 €", "ein Euro"),
        ("fr", "le 1er mai à 21:00, la 1re", "le premier mai à vingt-et-une heures, la première"),
        ("ko", "12%", "십이 퍼센트"),
        ("zh", "2024年有12%", "二〇二四年有百分之十二"),
        ("qq", "5 apples", "5 apples"),
    ],
)
def test_spoken_form_of_each_language(language, text, expected):
    assert to_spoken_form(text, language) == expected


@given(
    text=st.text(alphabet="0123456789.,:%$€-年 aDr\n[]<SE>", max_size=60),
    language=st.sampled_from(["en", "de", "fr", "zh", "ru", "ar", "hi"]),
)
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_spoken_form(text, language):
    assert isinstance(to_spoken_form(text, language), str)


def test_spoken_form_is_opt_in():
    assert Script(id="a", text="I have 2.", language="en").chunks()[0].text == "I have 2."
    assert Script(id="a", text="I have 2.", language="en", spoken_forms=True).chunks()[0].text == "I have two."


def test_lexicon_respells_whole_words_outside_tags(tmp_path):
    path = tmp_path / "lexicon.tsv"
    path.write_text("# names\nSiobhan\tShivawn\ncafé\tcaff-ay\n\nlaugh\tlarf\n", encoding="utf-8")
    lexicon = Lexicon.load(path)
    assert (
        lexicon.apply("Siobhan's? No: Siobhan, CAFÉ, siobhan [laugh] laugh")
        == "Siobhan's? No: Shivawn, caff-ay, siobhan [laugh] larf"
    )
    path.write_text("two words\tx\n")
    with pytest.raises(BadInput, match="line 1"):
        Lexicon.load(path)
    with pytest.raises(BadInput, match="cannot be read"):
        Lexicon.load(tmp_path / "none.tsv")
