"""The voices of one script: which they are, and the messages that show them to the model.

`VoiceChoice`s in, `References` out, for whoever makes prompts and whoever asks whether two scripts sound the
same. A recording without a transcript cannot stand as a turn, so then all recordings go into the system message.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from higgs_model.script.prompt import Message, SpeakerVoice, reference_messages

if TYPE_CHECKING:
    from higgs_model.script.voices import Voice, Voices

ONE_OFF_VOICE = "ref_audio"
"""What a one-off recording is called among the audio of a prompt."""


@dataclasses.dataclass(frozen=True)
class VoiceChoice:
    """A speaker's voice as the row names it: a library's name, a profile, a description or a recording."""

    tag: str
    name: str
    profile: str | None = None
    description: str | None = None
    ref_audio: str | None = None
    ref_text: str | None = None

    @classmethod
    def named(cls, tag: str, voice: str) -> VoiceChoice:
        """`profile:NAME`, a description with spaces in it, or a recording's name."""
        if voice.startswith("profile:"):
            return cls(tag, voice, profile=voice.removeprefix("profile:").strip())
        if re.search(r"\s", voice.strip()):
            return cls(tag, voice, description=voice.strip())
        return cls(tag, voice.strip())


@dataclasses.dataclass(frozen=True)
class References:
    """What stands in front of all chunks.

    Attributes:
        messages: in order.
        recordings: what fills their places for audio, by name; empty where no library was asked.
    """

    messages: tuple[Message, ...]
    recordings: dict[str, Voice]

    @classmethod
    def of(
        cls,
        choices: Sequence[VoiceChoice],
        voices: Voices | None,
        *,
        scene: str | None,
        speaker_tags: Sequence[str],
        in_system: bool,
    ) -> References:
        """Find the voices.

        Args:
            voices: where they are; None lets names stand for what they name.

        Raises:
            BadInput: a voice is not there, or cannot be read.
        """
        recordings: dict[str, Voice] = {}
        shown = [_shown(choice, voices, recordings) for choice in choices]
        untold = any(voice.description is None and voice.transcript is None for voice in shown)
        messages = reference_messages(scene, shown, speaker_tags, in_system=in_system or untold)
        return cls(tuple(messages), recordings)


def _shown(choice: VoiceChoice, voices: Voices | None, recordings: dict[str, Voice]) -> SpeakerVoice:
    name = ONE_OFF_VOICE if choice.ref_audio is not None else choice.name
    if choice.description is not None:
        return SpeakerVoice(choice.tag, name, description=choice.description)
    if choice.profile is not None:
        text = f"profile:{choice.profile}" if voices is None else voices.profile(choice.profile)
        return SpeakerVoice(choice.tag, name, description=text)
    if voices is None:
        itself = choice.name if choice.ref_audio is None else choice.ref_text
        return SpeakerVoice(choice.tag, choice.ref_audio or name, transcript=itself)
    if choice.ref_audio is not None:
        recordings[name] = voices.one_off(choice.ref_audio, choice.ref_text)
    else:
        recordings[name] = voices.recording(name)
    return SpeakerVoice(choice.tag, name, transcript=recordings[name].transcript)
