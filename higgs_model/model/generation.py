"""Plain generation: text and audio, one position of every row a step, for a batch of uneven prompts.

Each row is in one of three modes. TEXT draws a token. The token <|audio_out_bos|> leads to AUDIO_INIT, which appends
a frame of BOS without drawing; then AUDIO_IN_PROGRESS draws a frame a step, held to the delay pattern, until the clip
ends with <|audio_eos|> and TEXT is back. A step counts against `max_new_tokens` whatever it appends.

This is the general path that every variant of the network can take, and what the fast engine is tested against. Greedy,
it says what the reference implementation says.
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
from higgs_model.model.options import check_options, eos_ids, whole_numbers
from higgs_model.sampling import TEXT_LANE, DrawPlan, FrameSampler, RowSampling, SamplingParams, draw, uniform

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from higgs_model.model.network import HiggsAudioNetwork


class GenerationMode(enum.Enum):
    """What a row does in the next step."""

    TEXT = 0
    AUDIO_INIT = 1
    AUDIO_IN_PROGRESS = 2


@dataclasses.dataclass
class GenerationOutput:
    """What was generated.

    Attributes:
        sequences: (B, L) int64, the prompts as they were given (padding on the left) and the answers, with one
            <|AUDIO_OUT|> a clip, padded on the right.
        audio_sequences: a tensor (K, frames) a clip, all clips of row 0, then of row 1, …; in delayed form with the BOS
            frame, as the next prompt takes them. `delay.from_stream` gives the codec's codes.
        audio_rows: the row of each of `audio_sequences`.
    """

    sequences: Tensor
    audio_sequences: list[Tensor]
    audio_rows: list[int]


@dataclasses.dataclass
class _Row:
    """What the host knows of one row: its mode, its answer, and in which steps each of its clips was drawn."""

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
    """Continue a batch of prompts, which may be uneven and padded on either side.

    Args:
        input_ids, attention_mask, audio_*: as in `HiggsAudioModel.forward`. A prompt that ends in <|audio_out_bos|> is
            answered with audio, one that ends in <|AUDIO_OUT|> with more of that clip, any other with text first.
        label_ids, label_audio_ids: not used; a collated batch can be passed as it is.
        max_new_tokens: steps, each of which appends a token or a frame to every row.
        do_sample, temperature, top_k, top_p, ras_win_len, ras_win_max_num_repeat: see `SamplingParams`.
        seed: one for all rows, or one a row. What a row draws depends on its own seed and steps alone. None draws
            seeds from torch's generator.
        eos_token_id: text tokens that finish a row; None takes the checkpoint's.
        cache_implementation: "dynamic" grows with the sequence, "static" is allocated for the whole answer at once.
        streamer: for a single row: gets the prompt, then each token (1,) and each frame (K,) as it comes.

    Raises:
        BadInput: the batch or an option cannot be what the caller meant.
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
    check_options(max_new_tokens, cache_implementation, streamer, inputs.input_ids.shape[0])
    run = _Generation(model, _aligned_right(inputs), sampling, seed, eos_ids(model.config, eos_token_id), streamer)
    hidden = run.prefill(max_new_tokens if cache_implementation == "static" else None)
    for step in range(max_new_tokens):
        run.answer(step, hidden)
        if run.finished or step == max_new_tokens - 1:
            break
        hidden = run.feed()
    return run.result()


def _aligned_right(inputs: ModelInputs) -> ModelInputs:
    """The same prompts with all padding on the left, so that the last column is every prompt's end."""
    order = inputs.attention_mask.argsort(dim=1, stable=True)
    return dataclasses.replace(
        inputs,
        input_ids=inputs.input_ids.gather(1, order),
        attention_mask=inputs.attention_mask.gather(1, order),
    )


class _Generation:
    """One run of `generate`: the state of all rows, on the host and on the device."""

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
        self.seeds = self._seeds(seed)
        self.row_sampling = RowSampling.of([sampling], config.num_codebook_rows, self.device)
        self.draw_plan = DrawPlan.of([sampling], config.num_codebook_rows)
        self.rows = [_Row(self._first_mode(token)) for token in inputs.input_ids[:, -1].tolist()]
        self._start_clips()
        self.frames: list[Tensor] = []
        self.next_tokens: list[int] = []

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    def _seeds(self, seed: int | Sequence[int] | None) -> Tensor:
        if seed is None:
            return torch.randint(2**62, (self.batch_size,)).to(self.device)
        seeds = whole_numbers("seed", seed) * (self.batch_size if isinstance(seed, Integral) else 1)
        if len(seeds) != self.batch_size:
            raise BadInput(f"{len(seeds)} seeds were given for a batch of {self.batch_size}")
        return torch.tensor(seeds, dtype=torch.int64, device=self.device)

    def _first_mode(self, last_token: int) -> GenerationMode:
        if last_token == self.config.audio_out_bos_token_id:
            return GenerationMode.AUDIO_INIT
        if last_token == self.config.audio_out_token_idx:
            return GenerationMode.AUDIO_IN_PROGRESS
        if not self.config.use_text_head:
            raise BadInput(
                "this checkpoint has no text head and can only speak: "
                f"let every prompt end in {self.config.audio_out_bos_token}"
            )
        return GenerationMode.TEXT

    def _start_clips(self) -> None:
        """Where each row's clip stands, from the frames in its prompt."""
        num_codebooks = self.config.audio_num_codebooks
        self.delay = DelayState.new(self.batch_size, self.device)
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
            raise BadInput(f"row {row} ends in {self.config.audio_out_token}, but that clip has no frame to continue")
        state = DelayState.resume(
            clip[:, -1].unsqueeze(0), self.config.audio_stream_bos_id, self.config.audio_stream_eos_id
        )
        self.delay.started[row] = state.started[0]
        self.delay.remaining[row] = state.remaining[0]
        self.prompt_clips[row] = clip
        self.rows[row].clips.append(slice(0, 0))

    # ------------------------------------------------------------------ the network

    def prefill(self, room: int | None) -> Tensor:
        """Run the prompts; the hidden state (B, D) of each one's last position. `room` makes the cache static."""
        if self.streamer is not None:
            self.streamer.put(self.inputs.input_ids.cpu())
        merged, embeddings = self.model.merge(self.inputs, left_padding=True, round_to=1)
        self.cache = KVCache(None if room is None else embeddings.shape[1] + room)
        hidden = self.model.backbone(embeddings, merged.attention_mask_BS, merged.audio_mask_BS, self.cache)
        return hidden[:, -1]

    def feed(self) -> Tensor:
        """Run what `answer` appended; the hidden state (B, D) of the new position."""
        live = [row.mode is GenerationMode.AUDIO_IN_PROGRESS for row in self.rows if not row.finished]
        # A finished row goes along with the others: what it computes is thrown away.
        all_audio = live[0] if len(set(live)) == 1 else None
        if all_audio is None:
            speaking = [row.mode is GenerationMode.AUDIO_IN_PROGRESS and not row.finished for row in self.rows]
            is_audio = torch.tensor(speaking, device=self.device).unsqueeze(1)
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

    # ------------------------------------------------------------------ decisions

    def answer(self, step: int, hidden_BD: Tensor) -> None:
        """Append a token or a frame to every row that is not finished."""
        modes = [None if row.finished else row.mode for row in self.rows]
        frame = torch.full(
            (self.batch_size, self.config.audio_num_codebooks),
            self.config.audio_stream_bos_id,
            device=self.device,
        )
        ended, tokens = [False] * self.batch_size, [self.config.pad_token_id or 0] * self.batch_size
        if GenerationMode.AUDIO_IN_PROGRESS in modes:
            frame, ended = self._draw_frames(step, hidden_BD, modes, frame)
        if GenerationMode.TEXT in modes:
            tokens = self._draw_tokens(step, hidden_BD)
        self.frames.append(frame)
        self.next_tokens = [
            self._append(row, step, token, end) for row, token, end in zip(self.rows, tokens, ended, strict=True)
        ]
        if self.streamer is not None:
            self._stream(self.streamer, modes[0], frame[0])

    def _draw_frames(
        self, step: int, hidden_BD: Tensor, modes: list[GenerationMode | None], bos_frame: Tensor
    ) -> tuple[Tensor, list[bool]]:
        speaking = [mode is GenerationMode.AUDIO_IN_PROGRESS for mode in modes]
        active = torch.tensor(speaking, device=self.device)
        bos, eos = self.config.audio_stream_bos_id, self.config.audio_stream_eos_id
        logits = self.model.audio_decoder_proj.audio_logits(hidden_BD)
        steps = torch.full_like(self.seeds, step)
        frame = self.sampler(logits, self.seeds, steps, self.window, self.row_sampling, self.draw_plan)
        if self.config.use_delay_pattern:
            frame, ended = self.delay.step(frame, active, bos, eos)
        else:
            ended = active & (frame == eos).all(dim=1)
        if not all(speaking):
            frame = torch.where(active.unsqueeze(1), frame, bos_frame)
        if self.window.shape[-1]:
            rolled = torch.cat([self.window[..., 1:], frame.unsqueeze(-1)], dim=-1)
            self.window = torch.where(active[:, None, None], rolled, self.window)
        return frame, ended.tolist()

    def _draw_tokens(self, step: int, hidden_BD: Tensor) -> list[int]:
        logits = self.model.audio_decoder_proj.text_logits(hidden_BD).float()
        # A placeholder stands for audio that somebody gives; it cannot be said.
        for placeholder in (self.config.audio_in_token_idx, self.config.audio_out_token_idx):
            if self.config.has_token(placeholder):
                logits[:, placeholder] = float("-inf")
        if not self.sampling.do_sample:
            return logits.argmax(dim=-1).tolist()
        steps = torch.full_like(self.seeds, step)
        numbers = uniform(self.seeds, steps, torch.full_like(self.seeds, TEXT_LANE))
        return draw(
            logits,
            numbers,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
        ).tolist()

    def _append(self, row: _Row, step: int, token: int, clip_ended: bool) -> int:
        """Advance one row's mode; the text token to feed it next, if text is what it goes on with."""
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
        pad = self.config.pad_token_id or 0
        answers = torch.tensor([row.tokens + [pad] * (longest - len(row.tokens)) for row in self.rows])
        frames_KT = torch.stack(self.frames, dim=-1)
        clips = [
            (number, self._clip(number, index == 0, span, frames_KT[number]))
            for number, row in enumerate(self.rows)
            for index, span in enumerate(row.clips)
        ]
        return GenerationOutput(
            sequences=torch.cat([self.inputs.input_ids, answers.to(self.device, torch.int64)], dim=1),
            audio_sequences=[clip for _, clip in clips],
            audio_rows=[number for number, _ in clips],
        )

    def _clip(self, row: int, first: bool, span: slice, frames_KT: Tensor) -> Tensor:
        drawn = frames_KT[:, span]
        if first and row in self.prompt_clips:
            return torch.cat([self.prompt_clips[row], drawn], dim=1)
        return drawn.clone()
