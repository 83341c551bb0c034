"""The voices of one script, and the messages that introduce them to the model.

In: `VoiceChoice`s. Out: `References`, for prompts and for content hashes. A recording without a transcript cannot be a
turn, so then all recordings go into the system message.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from higgs_model.script.prompt import Message, SpeakerVoice, reference_messages

if TYPE_CHECKING:
    from higgs_model.script.voices import Voice, Voices

REFERENCE_NAME = "ref_audio"
"""Name of a row's own reference recording in `Prompt.audio`."""


@dataclasses.dataclass(frozen=True)
class VoiceChoice:
    """A speaker's voice in a row: a name in the library, a profile, a description, or a recording."""

    tag: str
    name: str
    profile: str | None = None
    description: str | None = None
    ref_audio: str | None = None
    ref_text: str | None = None

    @classmethod
    def parse(cls, tag: str, voice: str) -> VoiceChoice:
        """Parse `profile:NAME`, a description (anything with spaces), or a recording's name."""
        if voice.startswith("profile:"):
            return cls(tag, voice, profile=voice.removeprefix("profile:").strip())
        if re.search(r"\s", voice.strip()):
            return cls(tag, voice, description=voice.strip())
        return cls(tag, voice.strip())


@dataclasses.dataclass(frozen=True)
class References:
    """The messages that precede all chunks.

    Attributes:
        messages: in order.
        recordings: the recordings in them, by name; empty without a library.
    """

    messages: tuple[Message, ...]
    recordings: dict[str, Voice]

    @classmethod
    def from_choices(
        cls,
        choices: Sequence[VoiceChoice],
        voices: Voices | None,
        *,
        scene: str | None,
        speaker_tags: Sequence[str],
        in_system: bool,
    ) -> References:
        """Look up the voices and build the messages.

        Args:
            voices: the voice library; None: names are used in place of content.

        Raises:
            BadInput: a voice does not exist or cannot be read.
        """
        recordings: dict[str, Voice] = {}
        resolved = [_resolve(choice, voices, recordings) for choice in choices]
        has_untranscribed = any(voice.description is None and voice.transcript is None for voice in resolved)
        messages = reference_messages(scene, resolved, speaker_tags, in_system=in_system or has_untranscribed)
        return cls(tuple(messages), recordings)


def _resolve(choice: VoiceChoice, voices: Voices | None, recordings: dict[str, Voice]) -> SpeakerVoice:
    name = REFERENCE_NAME if choice.ref_audio is not None else choice.name
    if choice.description is not None:
        return SpeakerVoice(choice.tag, name, description=choice.description)
    if choice.profile is not None:
        text = f"profile:{choice.profile}" if voices is None else voices.profile(choice.profile)
        return SpeakerVoice(choice.tag, name, description=text)
    if voices is None:
        placeholder = choice.name if choice.ref_audio is None else choice.ref_text
        return SpeakerVoice(choice.tag, choice.ref_audio or name, transcript=placeholder)
    if choice.ref_audio is not None:
        recordings[name] = voices.load_reference(choice.ref_audio, choice.ref_text)
    else:
        recordings[name] = voices.recording(name)
    return SpeakerVoice(choice.tag, name, transcript=recordings[name].transcript)
