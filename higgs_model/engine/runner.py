"""The network at work on slots: tensors, and no decision.

A slot is a row of fixed buffers. `prefill` runs stretches of prompts, of any kinds of positions; `decode` runs one
frame of every slot, from the last frame to the next one: embedding, layers, head, drawing, delay pattern, all on the
device and without a question from the host. On a CUDA device a decode step is one captured graph a number of rows.

Rows that are not active go through every step and change nothing: their keys are written where nobody reads, and
their state is held by masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from higgs_model.delay import NOT_ENDING, DelayState
from higgs_model.engine.prompt import Positions
from higgs_model.engine.spans import Span
from higgs_model.engine.weights import Layer, Linear, layers_of, linear
from higgs_model.model.model import HiggsAudioModel
from higgs_model.sampling import TEXT_LANE, DrawPlan, FrameSampler, RowSampling, SamplingParams, draw, uniform

NO_FRAME = -1
"""In `SlotState.forced`: the frame is drawn."""


class Attention(Protocol):
    """Keys and values of all slots, and attention to them; see `attention_cpu` and `attention_paged`."""

    def set_blocks(self, slot: int, blocks: Sequence[int], num_shared: int) -> None:
        """Give a slot its blocks; the first `num_shared` hold its start already."""

    def keep_block(self, slot: int, index: int, block: int) -> None:
        """The slot's block number `index` is full and final: let others share it."""

    def places(self, slots_P: Tensor, positions_P: Tensor, counts_P: Tensor | None = None) -> Tensor:
        """Where keys and values of positions are written."""

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, places_P: Tensor) -> None:
        """Store keys and values of one layer."""

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """One query a slot."""

    def prefill(self, layer: int, queries_PHD: Tensor, spans: Sequence[Span]) -> Tensor:
        """Queries of several spans."""


class SlotState:
    """All that a slot carries from step to step, (S, …) on the device.

    `frame` (S, K) goes into the network next, at position `length` (S,); `step` (S,) counts what was drawn, for the
    random numbers; `forced` (S, K) is what the next frame must be, or `NO_FRAME`.
    """

    def __init__(self, slots: int, num_codebooks: int, window: int, vocabulary: int, device: torch.device) -> None:
        def whole(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.frame, self.forced = whole(slots, num_codebooks), whole(slots, num_codebooks, fill=NO_FRAME)
        self.length, self.step, self.seed = whole(slots), whole(slots), whole(slots)
        self.started, self.remaining = whole(slots), whole(slots, fill=NOT_ENDING)
        self.window = whole(slots, num_codebooks, window, fill=-1)
        self.sampling = RowSampling.of([SamplingParams()] * slots, vocabulary, device)


class Runner:
    """A network, the attention to its slots, and their state.

    Args:
        window: frames that the repetition rule can look back.
    """

    def __init__(
        self, model: HiggsAudioModel, attention: Attention, *, max_slots: int, max_positions: int, window: int
    ) -> None:
        config = model.config
        self.config, self.attention, self.device = config, attention, model.embed_tokens_device
        self._embed_tokens, self._embed_frames = model.embed_tokens, model.embed_frames
        heads = model.audio_decoder_proj
        self._audio_head: Linear = heads.audio_lm_head
        if isinstance(heads.audio_lm_head, nn.Linear):
            self._audio_head = linear([heads.audio_lm_head])
        self._text_logits = heads.text_logits
        self._layers: list[Layer] = layers_of(model)
        self._norm, self._eps = model.norm.weight.detach(), config.text_config.rms_norm_eps
        self.dtype = self._norm.dtype
        text = config.text_config
        self._heads, self._kv_heads, self._head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        positions = torch.arange(max_positions, device=self.device).unsqueeze(0)
        cos, sin = model.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        self._cos, self._sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        vocabulary = config.num_codebook_rows
        self.state = SlotState(max_slots, config.audio_num_codebooks, window, vocabulary, self.device)
        self._slots = torch.arange(max_slots, device=self.device)
        self._sampler = FrameSampler(config.audio_codebook_size, config.audio_stream_bos_id)
        self._graphs: dict[tuple[int, DrawPlan], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    # ------------------------------------------------------------------ slots

    def start(
        self, slot: int, *, length: int, step: int, seed: int, sampling: SamplingParams, spoken: NDArray[np.int64]
    ) -> None:
        """Let a slot speak: its first frame is BOS, after a prompt of `length` positions.

        Args:
            step: of the first frame that is drawn.
            spoken: (W, K) the last frames of the prompt that the repetition rule sees.
        """
        state = self.state
        state.frame[slot] = self.config.audio_stream_bos_id
        state.forced[slot] = NO_FRAME
        state.length[slot], state.step[slot], state.seed[slot] = length, step, seed
        state.started[slot], state.remaining[slot] = 0, NOT_ENDING
        width = state.window.shape[2]
        window = np.full((self.config.audio_num_codebooks, width), -1)
        if recent := min(len(spoken), width, sampling.ras_win_len or 0):
            window[:, width - recent :] = spoken[-recent:].T
        state.window[slot] = torch.from_numpy(window).to(self.device)
        row = RowSampling.of([sampling], self.config.num_codebook_rows, self.device)
        for field in dataclasses.fields(RowSampling):
            getattr(state.sampling, field.name)[slot] = getattr(row, field.name)[0]
        state.active[slot] = True

    def stop(self, slot: int) -> None:
        """A slot no longer takes part."""
        self.state.active[slot] = False

    def force(self, slot: int, frame_K: NDArray[np.int64] | None) -> None:
        """Say what a slot's next frame must be; None: it is drawn."""
        self.state.forced[slot] = NO_FRAME if frame_K is None else torch.from_numpy(frame_K).to(self.device)

    # ------------------------------------------------------------------ prefill

    @torch.inference_mode()
    def prefill(self, spans: Sequence[Span], positions: Sequence[Positions]) -> Tensor:
        """Run stretches of prompts; the normed hidden state (spans, D) of each one's last position."""
        ids = np.concatenate([one.ids_P[span.start : span.stop] for span, one in zip(spans, positions, strict=True)])
        frames = np.concatenate(
            [one.frames_PK[span.start : span.stop] for span, one in zip(spans, positions, strict=True)]
        )
        text_at, audio_at = (torch.from_numpy(np.flatnonzero(kind)).to(self.device) for kind in (ids >= 0, ids < 0))
        is_audio_P1 = torch.from_numpy(ids < 0).to(self.device).unsqueeze(1)
        hidden = torch.empty(len(ids), self._norm.shape[0], dtype=self.dtype, device=self.device)
        tokens = torch.from_numpy(ids).to(self.device)[text_at]
        hidden.index_copy_(0, text_at, self._embed_tokens(tokens))
        hidden.index_copy_(0, audio_at, self._embed_frames(torch.from_numpy(frames).to(self.device)[audio_at]))

        at = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        slots = np.repeat([span.slot for span in spans], [span.length for span in spans])
        at_P = torch.from_numpy(at).to(self.device)
        places = self.attention.places(torch.from_numpy(slots).to(self.device), at_P)

        def attend(layer: int, queries: Tensor) -> Tensor:
            return self.attention.prefill(layer, queries, spans)

        def normed(hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
            return F.rms_norm(hidden, hidden.shape[1:], None, self._eps) * torch.where(is_audio_P1, audio, text)

        def feed_forward(hidden: Tensor, layer: Layer) -> Tensor:
            made = torch.empty_like(hidden)
            for rows, part in ((text_at, layer.text), (audio_at, layer.audio)):
                if len(rows):
                    made.index_copy_(0, rows, part(hidden[rows]))
            return made

        hidden = self._through_layers(hidden, at_P, places, attend, normed, feed_forward)
        ends = np.cumsum([span.length for span in spans]) - 1
        return self._final_norm(hidden[torch.from_numpy(ends).to(self.device)])

    @torch.inference_mode()
    def draw_token(self, hidden_D: Tensor, step: int, seed: int, sampling: SamplingParams) -> int:
        """The next text token, as `HiggsAudioModel.generate` draws it."""
        logits = self._text_logits(hidden_D.unsqueeze(0)).float()
        for placeholder in (self.config.audio_in_token_idx, self.config.audio_out_token_idx):
            if self.config.has_token(placeholder):
                logits[:, placeholder] = float("-inf")
        if not sampling.do_sample:
            return int(logits.argmax())
        numbers = uniform(*(torch.tensor([value], device=self.device) for value in (seed, step, TEXT_LANE)))
        return int(draw(logits, numbers, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p))

    # ------------------------------------------------------------------ decode

    @torch.inference_mode()
    def decode(self, rows: int, plan: DrawPlan) -> Tensor:
        """Draw the next frame of slots 0 … `rows` − 1.

        Returns:
            (rows, K + 2) int64 on the device: the frame, whether it is the clip's last, and whether the network's
            numbers were none. Valid until the next step.
        """
        if self.device.type != "cuda":
            return self._step(rows, plan)
        if (rows, plan) not in self._graphs:
            self._graphs[rows, plan] = self._capture(rows, plan)
        graph, result = self._graphs[rows, plan]
        graph.replay()
        return result

    def _capture(self, rows: int, plan: DrawPlan) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step. It is first run for real, with no slot active: libraries start up, kernels are built."""
        active = self.state.active.clone()
        self.state.active.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(rows, plan)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._step(rows, plan)
        self.state.active.copy_(active)
        return graph, result

    def _step(self, rows: int, plan: DrawPlan) -> Tensor:
        state, config = self.state, self.config
        active, at_S = state.active[:rows], state.length[:rows]
        places = self.attention.places(self._slots[:rows], at_S, active)
        lengths = torch.where(active, at_S + 1, 0)

        def attend(layer: int, queries: Tensor) -> Tensor:
            return self.attention.decode(layer, queries, lengths)

        def normed(hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
            return F.rms_norm(hidden, hidden.shape[1:], audio, self._eps)

        def feed_forward(hidden: Tensor, layer: Layer) -> Tensor:
            return layer.audio(hidden)

        hidden = self._embed_frames(state.frame[:rows])
        hidden = self._through_layers(hidden, at_S, places, attend, normed, feed_forward)
        logits = self._audio_head(self._final_norm(hidden)).float()
        invalid = active & ~logits.isfinite().all(dim=1)
        logits_SKV = logits.unflatten(1, (config.audio_num_codebooks, config.num_codebook_rows))

        window = state.window[:rows]
        rows_sampling = RowSampling(
            **{field.name: getattr(state.sampling, field.name)[:rows] for field in dataclasses.fields(RowSampling)}
        )
        drawn = self._sampler(logits_SKV, state.seed[:rows], state.step[:rows], window, rows_sampling, plan)
        forced = state.forced[:rows]
        drawn = torch.where(forced == NO_FRAME, drawn, forced)
        delay = DelayState(state.started[:rows], state.remaining[:rows])
        frame, ended = delay.step(drawn, active, config.audio_stream_bos_id, config.audio_stream_eos_id)

        active_S1 = active.unsqueeze(1)
        state.started[:rows], state.remaining[:rows] = delay.started, delay.remaining
        if plan.repetition_rule:
            rolled = torch.cat([window[..., 1:], frame.unsqueeze(2)], dim=2)
            window.copy_(torch.where(active_S1.unsqueeze(2), rolled, window))
        state.frame[:rows] = torch.where(active_S1, frame, state.frame[:rows])
        state.length[:rows] += active
        state.step[:rows] += active
        state.active[:rows] = active & ~ended & ~invalid
        return torch.cat([frame, ended.unsqueeze(1), invalid.unsqueeze(1)], dim=1)

    # ------------------------------------------------------------------ the network

    def _through_layers(
        self,
        hidden_PD: Tensor,
        at_P: Tensor,
        places_P: Tensor,
        attend: Callable[[int, Tensor], Tensor],
        normed: Callable[[Tensor, Tensor, Tensor], Tensor],
        feed_forward: Callable[[Tensor, Layer], Tensor],
    ) -> Tensor:
        cos, sin = self._cos[at_P], self._sin[at_P]
        widths = (self._heads + self._kv_heads, self._kv_heads)
        for index, layer in enumerate(self._layers):
            text, audio = layer.text, layer.audio
            mixed = layer.qkv(normed(hidden_PD, text.attention_norm, audio.attention_norm))
            turned, values = mixed.unflatten(1, (-1, self._head_dim)).split(widths, dim=1)
            turned = turned * cos + _half_turned(turned) * sin
            queries, keys = turned.split((self._heads, self._kv_heads), dim=1)
            self.attention.write(index, keys, values, places_P)
            hidden_PD = hidden_PD + layer.output(attend(index, queries).flatten(1))
            hidden_PD = hidden_PD + feed_forward(normed(hidden_PD, text.norm, audio.norm), layer)
        return hidden_PD

    def _final_norm(self, hidden_PD: Tensor) -> Tensor:
        return F.rms_norm(hidden_PD, hidden_PD.shape[1:], self._norm, self._eps)


def _half_turned(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
