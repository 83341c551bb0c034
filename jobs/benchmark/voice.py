"""How good a small voice is: understood by a recogniser, like its reference, whole over minutes, without clicks.

Needs the synthesizers that taught the demo (espeak-ng, flite) and pocketsphinx (`pip install '.[voice]'`). Sentences
and, for likeness, voices are ones that the demo's recipe does not train with. Parts:
`audio_s_per_s`: how fast the sentences below were spoken.
`words`: word error rate of the model, of the codec's copies of the teacher, and of the teacher, on the same sentences.
`likeness`: over all pairs of held-out voices, how often what a voice's clone says is nearer to its own reference.
`dialogues`: of two known voices, two turns each; how often a turn is nearer to its speaker's reference than to the
other's, and its words, as above.
`minutes`: one long script; chunks with faults, and steps in the waveform where chunks meet.
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
from jobs.benchmark.measure import machine
from jobs.demo.data import Utterance, choose
from jobs.demo.hearing import Recogniser, WordErrors, word_errors, words_of
from jobs.demo.likeness import VoicePrint
from jobs.demo.recipe import RECIPE, Recipe
from jobs.demo.sentences import Grammar
from jobs.demo.teacher import SAMPLE_RATE_HZ, check_synthesizers, speak
from jobs.demo.voices import VOICES

_RECIPE = Recipe.read(RECIPE)
_REFERENCE_WORDS = 7
_NEAR_JOIN_S = 0.005
_CLEAR_TEACHERS = "flite"

Sound = NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    parser.add_argument("--model", default="demo", help="what speaks")
    parser.add_argument("--sentences", type=int, default=50, help="that are recognised")
    parser.add_argument("--trials", type=int, default=40, help="sentences in held-out voices")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the long script")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--top-k", type=int, default=30)
    parser.add_argument("--attempts", type=int, default=3, help="takes of a chunk")
    parser.add_argument("--keep", type=Path, help="folder for what was heard")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    check_synthesizers()
    if (most := max(arguments.sentences, arguments.trials)) > _RECIPE.data.held_out:
        raise BadInput(f"{most} sentences are asked for, and {_RECIPE.data.held_out} of each kind are held out")
    recogniser = Recogniser()
    all_of_it = list(choose({"en": _RECIPE.data.sentences["en"]}, _RECIPE.data.held_out, _RECIPE.seed))
    held_out = [one for one in all_of_it if one.split != "train"]
    unheard = _Unheard({one.text for one in all_of_it})
    known = [one for one in held_out if one.split == "text"][: arguments.sentences]
    new = [one for one in held_out if one.split == "voice"][: arguments.trials]
    references = _references(unheard, sorted({one.voice.name for one in (*known, *new)} | {"slt-100"}))
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
            result = _measure(arguments, synthesizer, recogniser, known, new, references, unheard)
        finally:
            synthesizer.close()
    return result | {"model": arguments.model, "temperature": arguments.temperature, **machine(torch.device("cpu"))}


def _measure(
    arguments: argparse.Namespace,
    synthesizer: Synthesizer,
    recogniser: Recogniser,
    known: Sequence[Utterance],
    new: Sequence[Utterance],
    references: dict[str, tuple[str, Sound]],
    unheard: _Unheard,
) -> dict[str, Any]:
    def scripts(utterances: Sequence[Utterance]) -> list[Script]:
        return [_script(arguments, one.id, text=one.text, voice=one.voice.name) for one in utterances]

    start_s = time.perf_counter()
    made = asyncio.run(_spoken(synthesizer, scripts(known)))
    speed = sum(len(sound) for sound, _ in made) / SAMPLE_RATE_HZ / (time.perf_counter() - start_s)
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        for one, (sound, _) in zip(known, made, strict=True):
            soundfile.write(arguments.keep / f"{one.id}.wav", sound, SAMPLE_RATE_HZ)
    result: dict[str, Any] = {"audio_s_per_s": round(speed, 2)}
    result["words"] = words(recogniser, synthesizer, known, [sound for sound, _ in made])
    print(f"{speed:.1f} seconds of audio a second, 16 at once, references' encoding included")
    for group, rates in result["words"].items():
        print(f"word error rate, {group}: " + ", ".join(f"{name} {value}" for name, value in rates.items()))
    clones = [sound for sound, _ in asyncio.run(_spoken(synthesizer, scripts(new)))]
    prints = {name: VoicePrint.of(sound, SAMPLE_RATE_HZ) for name, (_, sound) in references.items()}
    scale = average_distances(prints.values())
    others = {name: prints[name] for name in {one.voice.name for one in new}}
    result["likeness"] = likeness([one.voice.name for one in new], clones, others, scale)
    print(f"nearer to its reference than to another held-out voice: {result['likeness']}")
    result["dialogues"] = dialogues(arguments, synthesizer, recogniser, known, prints)
    print(f"dialogues of two: {result['dialogues']}")
    result["minutes"] = minutes(arguments, synthesizer, unheard)
    print(f"long script: {result['minutes']}")
    return result


class _Unheard:
    """Sentences of the same words that are in no split; each seed gives others."""

    def __init__(self, heard: Set[str]) -> None:
        self._heard = heard

    def sentences(self, seed: int, least_words: int = 0) -> Iterator[str]:
        made = Grammar.of("en").sentences(seed)
        return (text for text in made if text not in self._heard and len(text.split()) >= least_words)


def _references(unheard: _Unheard, names: Sequence[str]) -> dict[str, tuple[str, Sound]]:
    """For each voice a sentence and its recording."""
    sentences = unheard.sentences(_RECIPE.seed + 1, _REFERENCE_WORDS)
    voices = {voice.name: voice for voice in VOICES}
    return {name: (text, speak(voices[name], "en", text)) for name, text in zip(names, sentences, strict=False)}


def _script(arguments: argparse.Namespace, name: str, **columns: Any) -> Script:
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


async def _spoken(synthesizer: Synthesizer, scripts: Sequence[Script]) -> list[tuple[Sound, list[SynthesizedChunk]]]:
    """All scripts at once: samples and chunks of each."""

    async def one(script: Script) -> tuple[Sound, list[SynthesizedChunk]]:
        plan = await asyncio.to_thread(synthesizer.plan, script)
        pieces = [piece async for piece in synthesizer.stream(plan)]
        samples = np.concatenate([np.empty(0, np.float32), *(piece.samples_N for piece in pieces)])
        return samples, [piece.chunk for piece in pieces if piece.chunk is not None]

    return await asyncio.gather(*(one(script) for script in scripts))


def words(
    recogniser: Recogniser, synthesizer: Synthesizer, utterances: Sequence[Utterance], sounds: Sequence[Sound]
) -> dict[str, dict[str, float]]:
    """Word error rates, of all voices and of those whose teacher is clear."""
    counts: dict[str, dict[str, WordErrors]] = {}
    codec = synthesizer.worker.codec
    for utterance, sound in zip(utterances, sounds, strict=True):
        taught = speak(utterance.voice, utterance.language, utterance.text)
        copy = codec.decode(codec.encode(taught, SAMPLE_RATE_HZ)).numpy()
        said = words_of(utterance.text)
        groups = ["all voices"] + [_CLEAR_TEACHERS] * (utterance.voice.command[0] == _CLEAR_TEACHERS)
        for name, heard in (("model", sound), ("codec", copy), ("teacher", taught)):
            errors = word_errors(said, recogniser.words(heard, SAMPLE_RATE_HZ))
            for group in groups:
                group_counts = counts.setdefault(group, {})
                group_counts[name] = group_counts.get(name, WordErrors()) + errors
    return {group: {name: round(total.rate, 3) for name, total in rates.items()} for group, rates in counts.items()}


def average_distances(prints: Iterable[VoicePrint]) -> NDArray[np.float64]:
    """(2,): semitones and decibels between two of the voices, on average."""
    pairs = itertools.combinations(prints, 2)
    return np.mean([(one.semitones(other), one.spectral_db(other)) for one, other in pairs], axis=0)


def likeness(
    names: Sequence[str], clones: Sequence[Sound], references: dict[str, VoicePrint], scale: NDArray[np.float64]
) -> dict[str, float]:
    """Shares of trials (a clone, another reference) in which the clone is nearer to its own; by pitch, spectrum, both.

    Args:
        scale: what pitch and spectrum are divided by where they are added.
    """
    nearer = []
    for name, clone in zip(names, clones, strict=True):
        # A clone that says nothing is like nobody.
        if len(clone) < SAMPLE_RATE_HZ // 10:
            nearer += [np.zeros(3, bool)] * (len(references) - 1)
            continue
        heard = VoicePrint.of(clone, SAMPLE_RATE_HZ)
        far = {other: np.array([heard.semitones(made), heard.spectral_db(made)]) for other, made in references.items()}
        far = {other: np.array([*distance, (distance / scale).sum()]) for other, distance in far.items()}
        nearer += [far[name] < distance for other, distance in far.items() if other != name]
    shares = np.mean(nearer, axis=0)
    return {"trials": len(nearer)} | {
        name: round(float(share), 3) for name, share in zip(("pitch", "spectrum", "both"), shares, strict=True)
    }


def dialogues(
    arguments: argparse.Namespace,
    synthesizer: Synthesizer,
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    prints: dict[str, VoicePrint],
) -> dict[str, Any]:
    """Each of four sentences, said in turn by the voices of its first two."""
    scripts, turns = list[Script](), list[list[tuple[str, str, str]]]()
    for start in range(0, len(utterances) - 3, 4):
        voices = [one.voice.name for one in utterances[start : start + 2]]
        if voices[0] == voices[1]:
            continue
        said = [(voices[at % 2], voices[1 - at % 2], utterances[start + at].text) for at in range(4)]
        columns = {
            "turns": [{"speaker": speaker, "text": text} for speaker, _, text in said],
            "voices": {name: name for name in voices},
            "chunk_method": "speaker",
            "context_chunks": 2,
        }
        scripts.append(_script(arguments, f"dialogue{start}", **columns))
        turns.append(said)
    if not turns:
        return {"turns": 0}
    scale = average_distances(prints.values())
    trials, errors = list[float](), WordErrors()
    for said, (samples, chunks) in zip(turns, asyncio.run(_spoken(synthesizer, scripts)), strict=True):
        for (speaker, other, text), chunk in zip(said, chunks, strict=True):
            turn = samples[chunk.start_sample : chunk.stop_sample]
            two = {name: prints[name] for name in (speaker, other)}
            trials.append(likeness([speaker], [turn], two, scale)["both"])
            errors += word_errors(words_of(text), recogniser.words(turn, SAMPLE_RATE_HZ))
    return {"turns": len(trials), "both": round(float(np.mean(trials)), 3), "word_error_rate": round(errors.rate, 3)}


def minutes(arguments: argparse.Namespace, synthesizer: Synthesizer, unheard: _Unheard) -> dict[str, Any]:
    """A long script in one voice: paragraphs of new sentences until it is long enough."""
    sentences = unheard.sentences(_RECIPE.seed + 2)
    paragraphs = [" ".join(itertools.islice(sentences, 4)) for _ in range(max(round(arguments.minutes * 6), 1))]
    script = _script(arguments, "long", text="\n\n".join(paragraphs), voice="slt-100")
    script = script.model_copy(update={"chunk_method": "sentence", "chunk_max_words": 8, "context_chunks": 2})
    ((samples, chunks),) = asyncio.run(_spoken(synthesizer, [script]))
    faults = [fault for chunk in chunks for fault in chunk.take.attempt.faults]
    return {
        "seconds": round(len(samples) / SAMPLE_RATE_HZ, 1),
        "chunks": len(chunks),
        "takes": sum(len(chunk.take.attempts) for chunk in chunks),
        "faulty_chunks": sum(not chunk.take.passed_checks for chunk in chunks),
        "faults": {name: faults.count(name) for name in sorted(set(faults))},
        "largest_step_at_joins": round(steps_at_joins(samples, chunks), 3),
    }


def steps_at_joins(samples: Sound, chunks: Sequence[SynthesizedChunk]) -> float:
    """The largest step between two samples near a chunk's ends, in the 99.9th percentile of steps inside of chunks.

    A click is a step that speech does not make: well above 1.
    """
    steps = np.abs(np.diff(samples))
    near = round(_NEAR_JOIN_S * SAMPLE_RATE_HZ)
    joins = [edge for chunk in chunks for edge in (chunk.start_sample, chunk.stop_sample) if 0 < edge < len(steps)]
    inside = np.concatenate([steps[one.start_sample + near : max(one.stop_sample - near, 0)] for one in chunks])
    usual = float(np.percentile(inside, 99.9)) if len(inside) else 0.0
    return max((float(steps[max(edge - near, 0) : edge + near].max()) for edge in joins), default=0.0) / max(
        usual, 1e-9
    )
