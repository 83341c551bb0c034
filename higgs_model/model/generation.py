"""Reference generation of text and audio for a batch of prompts of different lengths, one position per row and step.

Each row is in one of three modes. TEXT samples a token. The token <|audio_out_bos|> switches to AUDIO_INIT, which
appends a BOS frame without sampling. AUDIO_IN_PROGRESS then samples one frame per step, constrained to the delay
pattern, until the clip ends with <|audio_eos|> and the row returns to TEXT. Every step counts towards `max_new_tokens`.

This path supports every variant of the network, and the engine is tested against it. Greedy output equals that of the
reference implementation.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from higgs_model.delay import DelayState
from higgs_model.errors import BadInput
from higgs_model.model.cache import KVCache
from higgs_model.model.inputs import ModelInputs, check_inputs
from higgs_model.model.options import check_generation_options, resolve_eos_ids, to_int_list
from higgs_model.sampling import (
    TEXT_SUBSEQUENCE,
    FrameSampler,
    SamplingParams,
    SamplingPlan,
    SamplingTensors,
    sample_tokens,
    uniform,
)

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from higgs_model.model.network import HiggsAudioNetwork


class GenerationMode(enum.Enum):
    """What a row generates in the next step."""

    TEXT = 0
    AUDIO_INIT = 1
    AUDIO_IN_PROGRESS = 2


@dataclasses.dataclass
class GenerationOutput:
    """Generated text and audio.

    Attributes:
        sequences: (B, L) int64, the prompts (padded on the left) and the generated tokens (padded on the right), with
            one <|AUDIO_OUT|> per clip.
        audio_sequences: one tensor (K, frames) per clip, ordered by row; in delayed form with the BOS frame, as
            prompts take them. `delay.from_stream` returns the codec's codes.
        audio_rows: the row of each of `audio_sequences`.
    """

    sequences: Tensor
    audio_sequences: list[Tensor]
    audio_rows: list[int]


@dataclasses.dataclass
class _Row:
    """State of one row on the host: its mode, generated tokens, and the steps in which each clip was generated."""

    mode: GenerationMode
    tokens: list[int] = dataclasses.field(default_factory=list)
    clips: list[slice] = dataclasses.field(default_factory=list)
    finished: bool = False


@torch.inference_mode()
def generate(
    model: HiggsAudioNetwork,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    audio_features: Tensor | None = None,
    audio_feature_attention_mask: Tensor | None = None,
    audio_in_ids: Tensor | None = None,
    audio_in_ids_start: Tensor | None = None,
    audio_out_ids: Tensor | None = None,
    audio_out_ids_start: Tensor | None = None,
    label_ids: Tensor | None = None,
    label_audio_ids: Tensor | None = None,
    *,
    max_new_tokens: int = 2048,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    ras_win_len: int | None = None,
    ras_win_max_num_repeat: int = 2,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    cache_implementation: str = "dynamic",
    streamer: BaseStreamer | None = None,
) -> GenerationOutput:
    """Continue a batch of prompts, which may differ in length and be padded on either side.

    Args:
        input_ids, attention_mask, audio_*: as in `HiggsAudioModel.forward`. A prompt that ends in <|audio_out_bos|>
            starts a clip, one that ends in <|AUDIO_OUT|> continues that clip, and any other continues with text.
        label_ids, label_audio_ids: ignored, so that a collated batch can be passed unchanged.
        max_new_tokens: number of steps, each of which appends a token or a frame to every row.
        do_sample, temperature, top_k, top_p, ras_win_len, ras_win_max_num_repeat: see `SamplingParams`.
        seed: one for all rows, or one per row. The samples of a row depend only on its own seed and steps. None draws
            the seeds from torch's default generator.
        eos_token_id: text tokens that finish a row; None: those of the checkpoint.
        cache_implementation: "dynamic" grows with the sequence; "static" is allocated once for `max_new_tokens`.
        streamer: for a batch of one row: receives the prompt, then each token (1,) and each frame (K,).

    Raises:
        BadInput: the batch or an option is invalid.
    """
    sampling = SamplingParams(do_sample, temperature, top_k, top_p, ras_win_len, ras_win_max_num_repeat)
    inputs = check_inputs(
        model.config,
        model.embed_tokens_device,
        input_ids=input_ids,
        attention_mask=attention_mask,
        audio_features=audio_features,
        audio_feature_attention_mask=audio_feature_attention_mask,
        audio_in_ids=audio_in_ids,
        audio_in_ids_start=audio_in_ids_start,
        audio_out_ids=audio_out_ids,
        audio_out_ids_start=audio_out_ids_start,
    )
    check_generation_options(max_new_tokens, cache_implementation, streamer, inputs.input_ids.shape[0])
    run = _Generation(
        model, inputs.left_padded(), sampling, seed, resolve_eos_ids(model.config, eos_token_id), streamer
    )
    hidden = run.prefill(max_new_tokens if cache_implementation == "static" else None)
    for step in range(max_new_tokens):
        run.sample(step, hidden)
        if run.finished or step == max_new_tokens - 1:
            break
        hidden = run.decode()
    return run.result()


class _Generation:
    """State of one call of `generate`, on the host and on the device."""

    def __init__(
        self,
        model: HiggsAudioNetwork,
        inputs: ModelInputs,
        sampling: SamplingParams,
        seed: int | Sequence[int] | None,
        eos_ids: frozenset[int],
        streamer: BaseStreamer | None,
    ) -> None:
        config = model.config
        self.model = model
        self.config = config
        self.inputs = inputs
        self.sampling = sampling
        self.sampler = FrameSampler(config.audio_codebook_size, config.audio_stream_bos_id)
        self.eos_ids = eos_ids
        self.streamer = streamer
        self.device = inputs.input_ids.device
        self.batch_size = inputs.input_ids.shape[0]
        self.seeds = self._row_seeds(seed)
        self.sampling_tensors = SamplingTensors.from_params([sampling], config.num_codebook_rows, self.device)
        self.sampling_plan = SamplingPlan.from_params([sampling], config.num_codebook_rows)
        self.rows = [_Row(self._initial_mode(token)) for token in inputs.input_ids[:, -1].tolist()]
        self._init_audio_state()
        self.frames: list[Tensor] = []
        self.next_tokens: list[int] = []

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    def _row_seeds(self, seed: int | Sequence[int] | None) -> Tensor:
        if seed is None:
            return torch.randint(2**62, (self.batch_size,)).to(self.device)
        seeds = to_int_list("seed", seed) * (self.batch_size if isinstance(seed, Integral) else 1)
        if len(seeds) != self.batch_size:
            raise BadInput(f"got {len(seeds)} seeds for a batch of {self.batch_size}")
        return torch.tensor(seeds, dtype=torch.int64, device=self.device)

    def _initial_mode(self, last_token: int) -> GenerationMode:
        if last_token == self.config.audio_out_bos_token_id:
            return GenerationMode.AUDIO_INIT
        if last_token == self.config.audio_out_token_idx:
            return GenerationMode.AUDIO_IN_PROGRESS
        if not self.config.use_text_head:
            raise BadInput(
                "this checkpoint has no text head and generates audio only: "
                f"end every prompt with {self.config.audio_out_bos_token}"
            )
        return GenerationMode.TEXT

    def _init_audio_state(self) -> None:
        """Initialise the delay state and the RAS window of each row from the frames in its prompt."""
        num_codebooks = self.config.audio_num_codebooks
        self.delay = DelayState.initial(self.batch_size, self.device)
        self.window = torch.full(
            (self.batch_size, num_codebooks, self.sampling.ras_win_len or 0), -1, device=self.device
        )
        self.prompt_clips: dict[int, Tensor] = {}
        codes, starts = self.inputs.audio_out_ids, self.inputs.audio_out_ids_start.tolist()
        clip_rows = (self.inputs.input_ids == self.config.audio_out_token_idx).nonzero()[:, 0].tolist()
        ends = [*starts[1:], codes.shape[1]][: len(starts)]
        for row in range(self.batch_size):
            spans = [(a, b) for a, b, r in zip(starts, ends, clip_rows, strict=True) if r == row]
            if not spans:
                continue
            if width := self.window.shape[-1]:
                recent = codes[:, spans[0][0] : spans[-1][1]][:, -width:]
                self.window[row, :, width - recent.shape[1] :] = recent
            if self.rows[row].mode is GenerationMode.AUDIO_IN_PROGRESS:
                self._resume_clip(row, codes[:, spans[-1][0] : spans[-1][1]])

    def _resume_clip(self, row: int, clip: Tensor) -> None:
        if not clip.shape[1]:
            raise BadInput(f"row {row} ends in {self.config.audio_out_token}, but that clip has no frames to continue")
        state = DelayState.resume(
            clip[:, -1].unsqueeze(0), self.config.audio_stream_bos_id, self.config.audio_stream_eos_id
        )
        self.delay.num_started[row] = state.num_started[0]
        self.delay.num_remaining[row] = state.num_remaining[0]
        self.prompt_clips[row] = clip
        self.rows[row].clips.append(slice(0, 0))

    # ------------------------------------------------------------------ forward passes

    def prefill(self, static_steps: int | None) -> Tensor:
        """Run the prompts and return the hidden state (B, D) of the last position of each.

        Args:
            static_steps: steps to allocate a static cache for; None: a dynamic cache.
        """
        if self.streamer is not None:
            self.streamer.put(self.inputs.input_ids.cpu())
        merged, embeddings = self.model.merge(self.inputs, left_padding=True, round_to=1)
        self.cache = KVCache(None if static_steps is None else embeddings.shape[1] + static_steps)
        hidden = self.model.backbone(embeddings, merged.attention_mask_BS, merged.audio_mask_BS, self.cache)
        return hidden[:, -1]

    def decode(self) -> Tensor:
        """Run the positions that `sample` appended and return their hidden states (B, D)."""
        unfinished = [row.mode is GenerationMode.AUDIO_IN_PROGRESS for row in self.rows if not row.finished]
        # Finished rows follow the others; their output is discarded.
        all_audio = unfinished[0] if len(set(unfinished)) == 1 else None
        if all_audio is None:
            in_audio = [row.mode is GenerationMode.AUDIO_IN_PROGRESS and not row.finished for row in self.rows]
            is_audio = torch.tensor(in_audio, device=self.device).unsqueeze(1)
        else:
            is_audio = torch.full((self.batch_size, 1), all_audio, device=self.device)
        if all_audio:
            embeddings = self.model.embed_frames(self.frames[-1]).unsqueeze(1)
        else:
            tokens = torch.tensor(self.next_tokens, device=self.device).unsqueeze(1)
            embeddings = self.model.embed_tokens(tokens)
            if all_audio is None:
                audio = self.model.embed_frames(self.frames[-1]).unsqueeze(1)
                embeddings = torch.where(is_audio.unsqueeze(-1), audio, embeddings)
        hidden = self.model.backbone(
            embeddings,
            torch.ones_like(is_audio),
            is_audio,
            self.cache,
            all_audio=all_audio,
            has_padding=False,
        )
        return hidden[:, -1]

    # ------------------------------------------------------------------ sampling

    def sample(self, step: int, hidden_BD: Tensor) -> None:
        """Append a token or a frame to every unfinished row."""
        modes = [None if row.finished else row.mode for row in self.rows]
        frame = torch.full(
            (self.batch_size, self.config.audio_num_codebooks),
            self.config.audio_stream_bos_id,
            device=self.device,
        )
        ended, tokens = [False] * self.batch_size, [self.config.pad_token_id or 0] * self.batch_size
        if GenerationMode.AUDIO_IN_PROGRESS in modes:
            frame, ended = self._sample_frames(step, hidden_BD, modes, frame)
        if GenerationMode.TEXT in modes:
            tokens = self._sample_text_tokens(step, hidden_BD)
        self.frames.append(frame)
        self.next_tokens = [
            self._append(row, step, token, end) for row, token, end in zip(self.rows, tokens, ended, strict=True)
        ]
        if self.streamer is not None:
            self._stream(self.streamer, modes[0], frame[0])

    def _sample_frames(
        self, step: int, hidden_BD: Tensor, modes: list[GenerationMode | None], bos_frame: Tensor
    ) -> tuple[Tensor, list[bool]]:
        in_audio = [mode is GenerationMode.AUDIO_IN_PROGRESS for mode in modes]
        active = torch.tensor(in_audio, device=self.device)
        bos, eos = self.config.audio_stream_bos_id, self.config.audio_stream_eos_id
        logits = self.model.audio_decoder_proj.audio_logits(hidden_BD)
        steps = torch.full_like(self.seeds, step)
        frame = self.sampler(logits, self.seeds, steps, self.window, self.sampling_tensors, self.sampling_plan)
        if self.config.use_delay_pattern:
            frame, ended = self.delay.step(frame, active, bos, eos)
        else:
            ended = active & (frame == eos).all(dim=1)
        if not all(in_audio):
            frame = torch.where(active.unsqueeze(1), frame, bos_frame)
        if self.window.shape[-1]:
            rolled = torch.cat([self.window[..., 1:], frame.unsqueeze(-1)], dim=-1)
            self.window = torch.where(active[:, None, None], rolled, self.window)
        return frame, ended.tolist()

    def _sample_text_tokens(self, step: int, hidden_BD: Tensor) -> list[int]:
        logits = self.model.audio_decoder_proj.text_logits(hidden_BD).float()
        # Placeholders stand for audio of the prompt and must not be generated.
        for placeholder in (self.config.audio_in_token_idx, self.config.audio_out_token_idx):
            if self.config.has_token(placeholder):
                logits[:, placeholder] = float("-inf")
        if not self.sampling.do_sample:
            return logits.argmax(dim=-1).tolist()
        steps = torch.full_like(self.seeds, step)
        uniforms = uniform(self.seeds, steps, torch.full_like(self.seeds, TEXT_SUBSEQUENCE))
        return sample_tokens(
            logits,
            uniforms,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
        ).tolist()

    def _append(self, row: _Row, step: int, token: int, clip_ended: bool) -> int:
        """Append to one row, update its mode, and return the token of its next position if that is text."""
        config = self.config
        if row.finished:
            return token
        if row.mode is GenerationMode.AUDIO_INIT:
            row.tokens.append(config.audio_out_token_idx)
            row.clips.append(slice(step, step + 1))
            row.mode = GenerationMode.AUDIO_IN_PROGRESS
            return token
        if row.mode is GenerationMode.AUDIO_IN_PROGRESS:
            row.clips[-1] = slice(row.clips[-1].start, step + 1)
            if not clip_ended:
                return token
            row.mode = GenerationMode.TEXT
            if not (config.use_text_head and config.has_token(config.audio_eos_token_id)):
                row.finished = True
                return token
            token = config.audio_eos_token_id
        row.tokens.append(token)
        row.finished = token in self.eos_ids
        if token == config.audio_out_bos_token_id:
            row.mode = GenerationMode.AUDIO_INIT
        return token

    def _stream(self, streamer: BaseStreamer, mode: GenerationMode | None, frame: Tensor) -> None:
        if mode is not GenerationMode.AUDIO_IN_PROGRESS:
            streamer.put(torch.tensor([self.rows[0].tokens[-1]]))
        if mode is not GenerationMode.TEXT:
            streamer.put(frame.cpu())

    # ------------------------------------------------------------------ result

    def result(self) -> GenerationOutput:
        if self.streamer is not None:
            self.streamer.end()
        longest = max(len(row.tokens) for row in self.rows)
        pad_id = self.config.pad_token_id or 0
        new_tokens = torch.tensor([row.tokens + [pad_id] * (longest - len(row.tokens)) for row in self.rows])
        frames_BKT = torch.stack(self.frames, dim=-1)
        clips = [
            (row_index, self._clip(row_index, clip_index == 0, steps, frames_BKT[row_index]))
            for row_index, row in enumerate(self.rows)
            for clip_index, steps in enumerate(row.clips)
        ]
        return GenerationOutput(
            sequences=torch.cat([self.inputs.input_ids, new_tokens.to(self.device, torch.int64)], dim=1),
            audio_sequences=[clip for _, clip in clips],
            audio_rows=[row_index for row_index, _ in clips],
        )

    def _clip(self, row_index: int, is_first: bool, steps: slice, frames_KT: Tensor) -> Tensor:
        generated = frames_KT[:, steps]
        if is_first and row_index in self.prompt_clips:
            return torch.cat([self.prompt_clips[row_index], generated], dim=1)
        return generated.clone()
