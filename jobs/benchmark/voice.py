"""Speech quality of a small model: intelligibility, voice similarity, stability over minutes, clicks at chunk borders.

Needs the demo's teachers (espeak-ng, flite) and pocketsphinx (`pip install '.[voice]'`). The demo's recipe trains on
none of the sentences and, for voice similarity, none of the voices. Results:
`audio_s_per_s`: generation speed.
`words`: word error rate of the model, of the teacher's speech after the codec, and of the teacher, same sentences.
`likeness`: over all pairs of held-out voices, how often a clone is closer to its own reference than to the other.
`dialogues`: two training voices, two turns each: how often a turn is closer to its speaker's reference than to the
other speaker's, and its word error rate.
`minutes`: one long script: chunks with faults, and the largest step in the waveform at chunk borders.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from higgs_model import Script
from higgs_model.engine.settings import EngineSettings
from higgs_model.errors import BadInput
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from higgs_model.synthesizer.records import SynthesizedChunk
from jobs.benchmark.measure import describe_machine
from jobs.demo.dataset import Utterance, draw_utterances
from jobs.demo.recipe import RECIPE, Recipe
from jobs.demo.recognition import SpeechRecognizer, WordErrors, count_word_errors, split_words
from jobs.demo.sentences import Grammar
from jobs.demo.teacher import SAMPLE_RATE_HZ, check_synthesizers, synthesize
from jobs.demo.voice_similarity import VoicePrint
from jobs.demo.voices import VOICES

_RECIPE = Recipe.read(RECIPE)
_MIN_REFERENCE_WORDS = 7
_NEAR_BORDER_S = 0.005
_INTELLIGIBLE_TEACHER = "flite"

Waveform = NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--model", default="demo", help="checkpoint to evaluate")
    parser.add_argument("--sentences", type=int, default=50, help="sentences for the word error rate")
    parser.add_argument("--trials", type=int, default=40, help="sentences in held-out voices")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the long script")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--top-k", type=int, default=30)
    parser.add_argument("--attempts", type=int, default=3, help="takes per chunk")
    parser.add_argument("--keep", type=Path, help="save the recognized sentences as WAV files in this folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the results, and return them."""
    check_synthesizers()
    if (needed := max(arguments.sentences, arguments.trials)) > _RECIPE.data.held_out:
        raise BadInput(f"{needed} sentences were requested, but only {_RECIPE.data.held_out} per split are held out")
    recognizer = SpeechRecognizer()
    utterances = list(draw_utterances({"en": _RECIPE.data.sentences["en"]}, _RECIPE.data.held_out, _RECIPE.seed))
    known_voices = [utterance for utterance in utterances if utterance.split == "text"][: arguments.sentences]
    new_voices = [utterance for utterance in utterances if utterance.split == "voice"][: arguments.trials]
    unseen = _UnseenSentences({utterance.text for utterance in utterances})
    names = sorted({utterance.voice.name for utterance in (*known_voices, *new_voices)} | {"slt-100"})
    references = _synthesize_references(unseen, names)
    with tempfile.TemporaryDirectory(prefix="higgs-voices-") as library:
        for name, (text, samples) in references.items():
            soundfile.write(Path(library, f"{name}.wav"), samples, SAMPLE_RATE_HZ, subtype="PCM_16")
            Path(library, f"{name}.txt").write_text(text, encoding="utf-8")
        synthesizer = Synthesizer.from_pretrained(
            arguments.model,
            voices=library,
            engine=EngineSettings(max_slots=16),
            settings=SynthesisSettings(attempts=arguments.attempts),
        )
        try:
            result = _measure(arguments, synthesizer, recognizer, known_voices, new_voices, references, unseen)
        finally:
            synthesizer.close()
    return result | {
        "model": arguments.model,
        "temperature": arguments.temperature,
        **describe_machine(torch.device("cpu")),
    }


def _measure(
    arguments: argparse.Namespace,
    synthesizer: Synthesizer,
    recognizer: SpeechRecognizer,
    known_voices: Sequence[Utterance],
    new_voices: Sequence[Utterance],
    references: dict[str, tuple[str, Waveform]],
    unseen: _UnseenSentences,
) -> dict[str, Any]:
    def to_scripts(utterances: Sequence[Utterance]) -> list[Script]:
        return [
            _build_script(arguments, utterance.id, text=utterance.text, voice=utterance.voice.name)
            for utterance in utterances
        ]

    start_s = time.perf_counter()
    speech = [waveform for waveform, _ in asyncio.run(_synthesize_all(synthesizer, to_scripts(known_voices)))]
    speed = sum(map(len, speech)) / SAMPLE_RATE_HZ / (time.perf_counter() - start_s)
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        for utterance, waveform in zip(known_voices, speech, strict=True):
            soundfile.write(arguments.keep / f"{utterance.id}.wav", waveform, SAMPLE_RATE_HZ)
    result: dict[str, Any] = {"audio_s_per_s": round(speed, 2)}
    result["words"] = word_error_rates(recognizer, synthesizer, known_voices, speech)
    print(f"{speed:.1f} audio s/s, 16 concurrent requests, encoding of the references included")
    for group, rates in result["words"].items():
        print(f"word error rate, {group}: " + ", ".join(f"{name} {value}" for name, value in rates.items()))
    clones = [waveform for waveform, _ in asyncio.run(_synthesize_all(synthesizer, to_scripts(new_voices)))]
    prints = {name: VoicePrint.from_samples(waveform, SAMPLE_RATE_HZ) for name, (_, waveform) in references.items()}
    scale = mean_distances(prints.values())
    clone_names = [utterance.voice.name for utterance in new_voices]
    result["likeness"] = voice_similarity(clone_names, clones, {name: prints[name] for name in clone_names}, scale)
    print(f"closer to its own reference than to another held-out voice: {result['likeness']}")
    result["dialogues"] = dialogues(arguments, synthesizer, recognizer, known_voices, prints)
    print(f"dialogues of two speakers: {result['dialogues']}")
    result["minutes"] = long_script(arguments, synthesizer, unseen)
    print(f"long script: {result['minutes']}")
    return result


class _UnseenSentences:
    """Generated sentences that are in no split, different for each seed."""

    def __init__(self, seen: Set[str]) -> None:
        self._seen = seen

    def sentences(self, seed: int, min_words: int = 0) -> Iterator[str]:
        texts = Grammar.load("en").sentences(seed)
        return (text for text in texts if text not in self._seen and len(text.split()) >= min_words)


def _synthesize_references(unseen: _UnseenSentences, names: Sequence[str]) -> dict[str, tuple[str, Waveform]]:
    """Return a sentence and its recording for each voice."""
    sentences = unseen.sentences(_RECIPE.seed + 1, _MIN_REFERENCE_WORDS)
    voices = {voice.name: voice for voice in VOICES}
    return {name: (text, synthesize(voices[name], "en", text)) for name, text in zip(names, sentences, strict=False)}


def _build_script(arguments: argparse.Namespace, name: str, **columns: Any) -> Script:
    return Script.model_validate(
        {
            "id": name,
            **columns,
            "language": "en",
            "seed": 1,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
        }
    )


async def _synthesize_all(
    synthesizer: Synthesizer, scripts: Sequence[Script]
) -> list[tuple[Waveform, list[SynthesizedChunk]]]:
    """Synthesize all scripts concurrently; returns the samples and chunks of each."""

    async def synthesize_script(script: Script) -> tuple[Waveform, list[SynthesizedChunk]]:
        plan = await asyncio.to_thread(synthesizer.plan, script)
        pieces = [piece async for piece in synthesizer.stream(plan)]
        samples = np.concatenate([np.empty(0, np.float32), *(piece.samples_N for piece in pieces)])
        return samples, [piece.chunk for piece in pieces if piece.chunk is not None]

    return await asyncio.gather(*map(synthesize_script, scripts))


def word_error_rates(
    recognizer: SpeechRecognizer,
    synthesizer: Synthesizer,
    utterances: Sequence[Utterance],
    speech: Sequence[Waveform],
) -> dict[str, dict[str, float]]:
    """Return word error rates over all voices, and over those of the most intelligible teacher."""
    counts: dict[str, dict[str, WordErrors]] = {}
    codec = synthesizer.worker.codec
    for utterance, waveform in zip(utterances, speech, strict=True):
        original = synthesize(utterance.voice, utterance.language, utterance.text)
        decoded = codec.decode(codec.encode(original, SAMPLE_RATE_HZ)).numpy()
        reference = split_words(utterance.text)
        groups = ["all voices"] + [_INTELLIGIBLE_TEACHER] * (utterance.voice.command[0] == _INTELLIGIBLE_TEACHER)
        for name, recording in (("model", waveform), ("codec", decoded), ("teacher", original)):
            errors = count_word_errors(reference, recognizer.transcribe(recording, SAMPLE_RATE_HZ))
            for group in groups:
                group_counts = counts.setdefault(group, {})
                group_counts[name] = group_counts.get(name, WordErrors()) + errors
    return {group: {name: round(total.rate, 3) for name, total in rates.items()} for group, rates in counts.items()}


def mean_distances(prints: Iterable[VoicePrint]) -> NDArray[np.float64]:
    """Return the mean distance between two of the voices, in semitones and in decibels: (2,)."""
    return np.mean([_distances(first, second) for first, second in itertools.combinations(prints, 2)], axis=0)


def _distances(first: VoicePrint, second: VoicePrint) -> tuple[float, float]:
    return first.pitch_distance_semitones(second), first.spectral_distance_db(second)


def voice_similarity(
    names: Sequence[str], clones: Sequence[Waveform], references: dict[str, VoicePrint], scale: NDArray[np.float64]
) -> dict[str, float]:
    """Return the share of trials (a clone, another reference) in which the clone is closer to its own reference.

    Args:
        names: the voice of each clone.
        clones: samples (N,) of each clone.
        references: voice prints of the references.
        scale: divisors (2,) of pitch and spectral distance before they are added.

    Returns:
        The number of trials, and the shares by pitch, by spectrum, and by their sum.
    """
    is_closer = []
    for name, clone in zip(names, clones, strict=True):
        # An empty clone fails all of its trials.
        if len(clone) < SAMPLE_RATE_HZ // 10:
            is_closer += [np.zeros(3, bool)] * (len(references) - 1)
            continue
        clone_print = VoicePrint.from_samples(clone, SAMPLE_RATE_HZ)
        pairs = {other: np.array(_distances(clone_print, reference)) for other, reference in references.items()}
        distances = {other: np.array([*pair, (pair / scale).sum()]) for other, pair in pairs.items()}
        is_closer += [distances[name] < distance for other, distance in distances.items() if other != name]
    shares = np.mean(is_closer, axis=0)
    return {"trials": len(is_closer)} | {
        name: round(float(share), 3) for name, share in zip(("pitch", "spectrum", "both"), shares, strict=True)
    }


def dialogues(
    arguments: argparse.Namespace,
    synthesizer: Synthesizer,
    recognizer: SpeechRecognizer,
    utterances: Sequence[Utterance],
    prints: dict[str, VoicePrint],
) -> dict[str, Any]:
    """Measure dialogues of four sentences each, in which the voices of the first two sentences alternate."""
    scripts, turns = list[Script](), list[list[tuple[str, str, str]]]()
    for start in range(0, len(utterances) - 3, 4):
        voices = [utterance.voice.name for utterance in utterances[start : start + 2]]
        if voices[0] == voices[1]:
            continue
        dialogue = [(voices[turn % 2], voices[1 - turn % 2], utterances[start + turn].text) for turn in range(4)]
        columns = {
            "turns": [{"speaker": speaker, "text": text} for speaker, _, text in dialogue],
            "voices": {name: name for name in voices},
            "chunk_method": "speaker",
            "context_chunks": 2,
        }
        scripts.append(_build_script(arguments, f"dialogue{start}", **columns))
        turns.append(dialogue)
    if not turns:
        return {"turns": 0}
    scale = mean_distances(prints.values())
    trials, errors = list[float](), WordErrors()
    for dialogue, (samples, chunks) in zip(turns, asyncio.run(_synthesize_all(synthesizer, scripts)), strict=True):
        for (speaker, other, text), chunk in zip(dialogue, chunks, strict=True):
            turn = samples[chunk.start_sample : chunk.stop_sample]
            references = {name: prints[name] for name in (speaker, other)}
            trials.append(voice_similarity([speaker], [turn], references, scale)["both"])
            errors += count_word_errors(split_words(text), recognizer.transcribe(turn, SAMPLE_RATE_HZ))
    return {"turns": len(trials), "both": round(float(np.mean(trials)), 3), "word_error_rate": round(errors.rate, 3)}


def long_script(arguments: argparse.Namespace, synthesizer: Synthesizer, unseen: _UnseenSentences) -> dict[str, Any]:
    """Measure a script of `--minutes` in one voice."""
    sentences = unseen.sentences(_RECIPE.seed + 2)
    paragraphs = [" ".join(itertools.islice(sentences, 4)) for _ in range(max(round(arguments.minutes * 6), 1))]
    script = _build_script(arguments, "long", text="\n\n".join(paragraphs), voice="slt-100")
    script = script.model_copy(update={"chunk_method": "sentence", "chunk_max_words": 8, "context_chunks": 2})
    ((samples, chunks),) = asyncio.run(_synthesize_all(synthesizer, [script]))
    faults = [fault for chunk in chunks for fault in chunk.take.attempt.faults]
    return {
        "seconds": round(len(samples) / SAMPLE_RATE_HZ, 1),
        "chunks": len(chunks),
        "takes": sum(len(chunk.take.attempts) for chunk in chunks),
        "faulty_chunks": sum(not chunk.take.passed_checks for chunk in chunks),
        "faults": {name: faults.count(name) for name in sorted(set(faults))},
        "largest_step_at_joins": round(largest_step_at_borders(samples, chunks), 3),
    }


def largest_step_at_borders(samples: Waveform, chunks: Sequence[SynthesizedChunk]) -> float:
    """Return the largest step between neighbouring samples near chunk borders, relative to steps inside chunks.

    The unit is the 99.9th percentile of the steps inside chunks, so a click is well above 1.
    """
    steps = np.abs(np.diff(samples))
    near = round(_NEAR_BORDER_S * SAMPLE_RATE_HZ)
    borders = [edge for chunk in chunks for edge in (chunk.start_sample, chunk.stop_sample) if 0 < edge < len(steps)]
    inside = np.concatenate([steps[chunk.start_sample + near : max(chunk.stop_sample - near, 0)] for chunk in chunks])
    usual = float(np.percentile(inside, 99.9)) if len(inside) else 0.0
    largest = max((float(steps[max(edge - near, 0) : edge + near].max()) for edge in borders), default=0.0)
    return largest / max(usual, 1e-9)
