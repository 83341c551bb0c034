"""Previews during training: rows of the batch job, each synthesized as a single chunk with `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.delay import from_stream
from higgs_model.model.model import HiggsAudioModel
from higgs_model.script.plan import Plan
from higgs_model.script.prompt import Prompt, Tokenizer
from higgs_model.script.prompt_builder import PromptBuilder
from higgs_model.script.script import Script
from higgs_model.script.voices import ReferenceCodes, Voices
from higgs_model.training.collator import Collator
from higgs_model.training.settings import PreviewSettings


class _NumpyCodec:
    """Codec that returns NumPy codes, as prompts require."""

    def __init__(self, codec: HiggsAudioCodec) -> None:
        self._codec, self.sample_rate = codec, codec.sample_rate

    def encode(self, waveform: Any, sample_rate: int) -> Any:
        return self._codec.encode(waveform, sample_rate).cpu().numpy()


class Previewer:
    """Synthesizes the configured rows into `OUT/previews/step-…/ID.wav`.

    Raises:
        BadInput: a voice is not found, or its prompt leaves no room for output.
    """

    def __init__(
        self, settings: PreviewSettings, tokenizer: Tokenizer, codec: HiggsAudioCodec, voices: Voices, output: Path
    ) -> None:
        self._settings, self._codec, self._folder = settings, codec, output / "previews"
        references = ReferenceCodes(_NumpyCodec(codec))
        self._names: list[str] = []
        self._prompts: list[Prompt] = []
        for number, row in enumerate(settings.rows):
            script = Script.model_validate({"id": f"row{number}", **row, "chunk_method": "none"})
            plan = Plan.from_script(script, voices)
            prompt_builder = PromptBuilder(plan, tokenizer, references, num_codebooks=codec.num_codebooks)
            self._names.append(script.id)
            self._prompts.append(prompt_builder.build(0, []))

    def __call__(self, step: int, model: torch.nn.Module) -> None:
        """Synthesize all rows with the model at a step."""
        if not isinstance(model, HiggsAudioModel):
            raise TypeError(f"got a {type(model).__name__}; expected a HiggsAudioModel")
        folder = self._folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, codes in zip(self._names, self._generate(model), strict=True):
            wave = self._codec.decode(codes).cpu().numpy() if codes.shape[1] else np.zeros(0, np.float32)
            soundfile.write(folder / f"{name}.wav", wave, self._codec.sample_rate)

    def _generate(self, model: HiggsAudioModel) -> Sequence[torch.Tensor]:
        settings, config = self._settings, model.config
        collate = Collator(config)
        max_length = max(len(prompt.token_ids) for prompt in self._prompts)
        ids = torch.full((len(self._prompts), max_length), config.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self._prompts):
            ids[row, -len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, -len(prompt.token_ids) :] = 1
        clips = {config.audio_in_token_idx: list[torch.Tensor](), config.audio_out_token_idx: list[torch.Tensor]()}
        for prompt in self._prompts:
            placeholders = [token for token in prompt.token_ids if token in clips]
            for placeholder, codes in zip(placeholders, prompt.codes, strict=True):
                clips[placeholder].append(collate.stream(codes[: config.audio_num_codebooks].astype(np.int16)))
        input_clips, output_clips = clips.values()
        output = model.generate(
            ids,
            mask,
            **_clip_arguments("audio_in_ids", input_clips),
            **_clip_arguments("audio_out_ids", output_clips),
            max_new_tokens=settings.max_frames + config.audio_num_codebooks + 2,
            do_sample=settings.temperature > 0,
            temperature=settings.temperature or 1.0,
            top_k=settings.top_k,
            seed=settings.seed,
        )
        first = {row: clip for clip, row in reversed(list(zip(output.audio_sequences, output.audio_rows, strict=True)))}
        return [
            from_stream(first[row], config.audio_codebook_size, config.use_delay_pattern).to(self._codec.device)
            for row in range(len(self._prompts))
        ]


def _clip_arguments(name: str, clips: Sequence[torch.Tensor]) -> dict[str, Any]:
    if not clips:
        return {}
    starts = torch.tensor([0, *(clip.shape[1] for clip in clips)]).cumsum(0)[:-1]
    return {name: torch.cat(list(clips), dim=1), f"{name}_start": starts}
