"""Generated sentences: templates filled with words from lists, one language at a time.

In: a language and a seed. Out: distinct sentences, the same for the same seed, whose words all come from
`texts/LANGUAGE.yaml`.
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
_PLACEHOLDER = re.compile(r"\{(\w+)\}([a-z]*)")
_MAX_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A sentence grammar.

    Attributes:
        templates: sentences with placeholders such as `{animal}s`.
        lists: the words for each placeholder.
        endings: irregular forms, by word and ending.
    """

    templates: tuple[str, ...]
    lists: dict[str, tuple[str, ...]]
    endings: dict[str, dict[str, str]]

    @classmethod
    def load(cls, language: str) -> Self:
        """Load the grammar of one of `LANGUAGES`."""
        raw = yaml.safe_load((_TEXTS / f"{language}.yaml").read_text(encoding="utf-8"))
        lists = {name: tuple(words) for name, words in raw["lists"].items()}
        return cls(tuple(raw["templates"]), lists, raw["endings"])

    def sentences(self, seed: int) -> Iterator[str]:
        """Yield distinct sentences until no new ones are found, the same for the same seed."""
        draw, seen = random.Random(seed), set[str]()
        repeats = 0
        while repeats < _MAX_REPEATS:
            sentence = self._fill_template(draw)
            repeats = repeats + 1 if sentence in seen else 0
            if not repeats:
                seen.add(sentence)
                yield sentence

    def _fill_template(self, draw: random.Random) -> str:
        remaining = {name: draw.sample(words, len(words)) for name, words in self.lists.items()}

        def next_word(placeholder: re.Match[str]) -> str:
            name, ending = placeholder.groups()
            stem = remaining[name].pop()
            return self.endings.get(stem, {}).get(ending, stem + ending)

        text = _PLACEHOLDER.sub(next_word, draw.choice(self.templates))
        return text[0].upper() + text[1:]
