"""Sentences of our own making: templates filled with words from lists, in one language at a time.

In: a language and a seed. Out: sentences, no two alike, the same for the same seed; the words are those of
`texts/LANGUAGE.yaml` and no others. Knows nothing of voices or sound.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import yaml

_TEXTS = Path(__file__).parent / "texts"
LANGUAGES = tuple(sorted(path.stem for path in _TEXTS.glob("*.yaml")))
_PLACE = re.compile(r"\{(\w+)\}([a-z]*)")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Templates with places such as `{animal}s`; the words for each place; words whose endings are their own."""

    templates: tuple[str, ...]
    lists: dict[str, tuple[str, ...]]
    endings: dict[str, dict[str, str]]

    @classmethod
    def of(cls, language: str) -> Self:
        """The grammar of one of `LANGUAGES`."""
        raw = yaml.safe_load((_TEXTS / f"{language}.yaml").read_text(encoding="utf-8"))
        lists = {name: tuple(words) for name, words in raw["lists"].items()}
        return cls(tuple(raw["templates"]), lists, raw["endings"])

    def sentences(self, seed: int) -> Iterator[str]:
        """Sentences without end, the same for the same seed, each new for as long as there are new ones."""
        choose, said = random.Random(seed), set[str]()
        repeated = 0
        while repeated < 1000:
            sentence = self._fill(choose)
            repeated = repeated + 1 if sentence in said else 0
            if not repeated:
                said.add(sentence)
                yield sentence

    def _fill(self, choose: random.Random) -> str:
        left = {name: choose.sample(words, len(words)) for name, words in self.lists.items()}

        def word(place: re.Match[str]) -> str:
            name, ending = place.groups()
            stem = left[name].pop()
            return self.endings.get(stem, {}).get(ending, stem + ending)

        text = _PLACE.sub(word, choose.choice(self.templates))
        return text[0].upper() + text[1:]
