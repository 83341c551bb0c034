"""ChatML: what stands in front of the model when it speaks a chunk, as text, as token ids, and as codes.

Messages in, `Prompt`s out. The text and the ids are the reference implementation's, piece by piece: it
encodes each header, each stretch of text and each end of message by itself. User text enters through
`user_text` only, so no special token can ever come from it; `encode` proves that after the fact.

Knows nothing of rows, chunk methods or where codes come from.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from higgs_model import tokens
from higgs_model.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Codes = NDArray[np.int64]
    """(K, T)."""

BEGIN = "<|begin_of_text|>"
END_OF_MESSAGE = "<|eot_id|>"
MORE_FOLLOWS = "<|eom_id|>"
"""Ends a message of the assistant after which it goes on with another."""
SCENE_START = "<|scene_desc_start|>"
SCENE_END = "<|scene_desc_end|>"

INSTRUCTION = "Generate audio following instruction."
SEVERAL_VOICES_INSTRUCTION = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the "
    "following text, using the specified voice.\n"
    "If no speaker tag is present, select a suitable voice on your own."
)
UNVOICED_SPEAKERS = ("feminine", "masculine")
"""What speakers without a voice are called, in turn."""

Role = Literal["system", "user", "assistant"]
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of the text; special tokens in it become their ids."""

    def get_added_vocab(self) -> dict[str, int]:
        """All special tokens and their ids."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """The id of one token."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A place in a message for audio: a voice's name, or `chunk0`, `chunk1`, …"""

    name: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of the conversation; each string of `content` is encoded by itself."""

    role: Role
    content: tuple[str | Clip, ...]
    end: str = END_OF_MESSAGE

    def pieces(self) -> Iterator[str]:
        """The message as the reference encodes it, piece by piece."""
        yield header(self.role)
        for part in self.content:
            yield part if isinstance(part, str) else _placeholder(self.role)
        yield self.end

    @functools.cached_property
    def text(self) -> str:
        """The whole message as ChatML."""
        return "".join(self.pieces())

    @functools.cached_property
    def clips(self) -> tuple[str, ...]:
        """Names of the audio in it, in order."""
        return tuple(part.name for part in self.content if isinstance(part, Clip))


@dataclasses.dataclass(frozen=True)
class SpeakerVoice:
    """A speaker's voice as the prompt shows it: a recording with its transcript, or a description.

    Attributes:
        tag: `SPEAKER0`, …
        name: what the recording is called in `Prompt.audio`.
        description: stands in place of a recording.
        transcript: what the recording says.
    """

    tag: str
    name: str
    description: str | None = None
    transcript: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Everything that the model is given for one chunk.

    Attributes:
        text: the full ChatML text, up to and including the assistant's header.
        token_ids: its ids, one placeholder a clip; with `force_audio`, `<|audio_out_bos|>` after it.
        audio: names of what fills the placeholders, in order.
        codes: the same as codes (K, T), not yet delayed.
        num_positions: places it takes in the model: ids, and clips in delayed form instead of their
            placeholders.
        max_frames: how many frames the answer may have.
        first_context_chunk: the oldest chunk that is still in front of the model; the chunk's own index if
            none is.
    """

    text: str
    token_ids: list[int]
    audio: tuple[str, ...]
    codes: tuple[Codes, ...]
    num_positions: int
    max_frames: int
    first_context_chunk: int


def user_text(text: str) -> str:
    """Text that can be put anywhere in a prompt: `<|` is parted; control characters and half characters go."""
    return _SURROGATES.sub("", without_controls(text)).replace("<|", "< |")


def without_controls(text: str) -> str:
    """The text without control characters that are no blanks."""
    return _CONTROLS.sub("", text)


def reference_messages(
    scene: str | None,
    voices: Sequence[SpeakerVoice],
    speaker_tags: Sequence[str],
    *,
    in_system: bool = False,
) -> list[Message]:
    """The messages before the script's own.

    Args:
        scene: description of the surroundings.
        voices: in the order of the speakers' numbers.
        speaker_tags: the speakers of the script, described where no voice is given at all.
        in_system: recordings go into the system message; forced by any described voice.
    """
    scene = user_text(scene or "").strip() or None
    if not voices:
        return [_system_without_voices(scene, speaker_tags)]
    if in_system or any(voice.description is not None for voice in voices):
        return [_system_with_voices(scene, voices)]
    # A transcript names its speaker where there is more than one voice, or one that is not the first speaker's.
    tagged = [voice.tag for voice in voices] != ["SPEAKER0"]
    messages = [Message("system", (f"{INSTRUCTION}\n\n{_scene_block(scene)}",))] if scene else []
    for voice in voices:
        transcript = user_text(voice.transcript or "").strip()
        said = f"[{voice.tag}] {transcript}" if tagged else transcript
        messages += [Message("user", (said,)), Message("assistant", (Clip(voice.name),))]
    return messages


def chunk_message(text: str) -> Message:
    """The user message of a chunk."""
    return Message("user", (user_text(text),))


def take_message(index: int) -> Message:
    """The assistant message that holds what was generated for a chunk."""
    return Message("assistant", (Clip(f"chunk{index}"),))


def render(messages: Sequence[Message]) -> str:
    """The full ChatML text, ending in the assistant's header."""
    return BEGIN + "".join(message.text for message in messages) + header("assistant")


def header(role: Role) -> str:
    """Opens a message."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _placeholder(role: Role) -> str:
    if role == "assistant":
        return tokens.AUDIO_OUT_BOS + tokens.AUDIO_OUT + tokens.AUDIO_EOS
    return tokens.AUDIO_BOS + tokens.AUDIO_IN + tokens.AUDIO_EOS


def _scene_block(inside: str) -> str:
    return f"{SCENE_START}\n{inside}\n{SCENE_END}"


def _system_without_voices(scene: str | None, speaker_tags: Sequence[str]) -> Message:
    if len(speaker_tags) > 1:
        described = "\n".join(
            f"{tag}: {UNVOICED_SPEAKERS[at % len(UNVOICED_SPEAKERS)]}" for at, tag in enumerate(speaker_tags)
        )
        inside = f"{scene}\n\n{described}" if scene else described
        return Message("system", (f"{SEVERAL_VOICES_INSTRUCTION}\n\n{_scene_block(inside)}",))
    return Message("system", (f"{INSTRUCTION}\n\n{_scene_block(scene)}" if scene else INSTRUCTION,))


def _system_with_voices(scene: str | None, voices: Sequence[SpeakerVoice]) -> Message:
    """Text up to each recording is one piece, as in the reference."""
    content: list[str | Clip] = []
    text = f"{INSTRUCTION}\n\n{SCENE_START}\n" + (f"{scene}\n\n" if scene else "")
    for at, voice in enumerate(voices):
        text += ("\n" if at else "") + f"{voice.tag}: "
        if voice.description is None:
            content += [text, Clip(voice.name)]
            text = ""
        else:
            text += user_text(voice.description)
    content.append(f"{text}\n{SCENE_END}")
    return Message("system", tuple(content))


class Encoder:
    """Messages as token ids, with the proof that every special id was put there by us."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_vocab()
        self._special_ids = frozenset(added.values())
        known = sorted((token for token in added if token), key=len, reverse=True)
        self._special_re = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        missing = [token for token in (BEGIN, END_OF_MESSAGE, *_AUDIO_TOKENS) if token not in added]
        if missing:
            raise BadInput(f"the tokenizer has no special token {missing[0]!r}; it is not Higgs Audio's")
        self.audio_out_bos_id: int = added[tokens.AUDIO_OUT_BOS]

    def message(self, message: Message, *, first: bool = False) -> list[int]:
        """Ids of one message; `first` opens the text."""
        return [token_id for piece in self.pieces(message, first=first) for token_id in piece]

    def pieces(self, message: Message, *, first: bool = False) -> list[list[int]]:
        """Ids of one message, those of the header, of each part of the content, and of the end by themselves."""
        return [
            self._piece((BEGIN if first and number == 0 else "") + piece)
            for number, piece in enumerate(message.pieces())
        ]

    def header(self) -> list[int]:
        """Ids of the assistant's header, where the answer begins."""
        return self._piece(header("assistant"))

    def _piece(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        wanted = [token for token in self._special_re.findall(text) if token in _OURS]
        got = sum(token_id in self._special_ids for token_id in ids)
        if got != len(wanted):
            raise BadInput(
                f"the text has {got - len(wanted)} special token(s) of this tokenizer in it, "
                f"near {text[:60]!r}; write them differently"
            )
        return ids


_AUDIO_TOKENS = (
    tokens.AUDIO_BOS,
    tokens.AUDIO_EOS,
    tokens.AUDIO_OUT_BOS,
    tokens.AUDIO_IN,
    tokens.AUDIO_OUT,
)
_SOUND_MARKS = tuple(f"<{slash}SE{kind}>" for slash in ("", "/") for kind in ("", "_s", "_e"))
"""Normalisation makes them of sound tags; a tokenizer may hold them as tokens of their own."""
_OURS = frozenset(
    (
        BEGIN,
        END_OF_MESSAGE,
        MORE_FOLLOWS,
        SCENE_START,
        SCENE_END,
        "<|start_header_id|>",
        "<|end_header_id|>",
        *_AUDIO_TOKENS,
        *_SOUND_MARKS,
    )
)
