"""Runs prefill and decode steps of the network on the device; `scheduler` decides what runs.

A slot is a row of fixed buffers. `prefill` runs spans of prompts with text and audio positions. `decode` computes the
next frame of every slot on the device without synchronizing with the host: embedding, layers, head, sampling, delay
pattern. On a CUDA device, decode steps are CUDA graphs, one per number of rows.

Inactive rows go through every step without effect: their keys go to the null block, and masks preserve their state.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from higgs_model.delay import DelayState
from higgs_model.engine.graphs import Capture, Step
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.engine.prompt import ExpandedPrompt
from higgs_model.engine.slots import NO_FRAME, SlotState
from higgs_model.engine.transfer import to_device
from higgs_model.engine.weights import Layer, Linear, linear, prepare_layers
from higgs_model.model.model import HiggsAudioModel
from higgs_model.sampling import TEXT_SUBSEQUENCE, FrameSampler, SamplingParams, SamplingPlan, sample_tokens, uniform


class Attention(Protocol):
    """The KV cache of all slots and attention to it; see `attention_cpu` and `attention_paged`."""

    def set_blocks(self, slot: int, blocks: Sequence[int], shared: range = range(0)) -> None:
        """Assign blocks to a slot; those with indices in `shared` are already computed."""

    def publish_block(self, slot: int, index: int, block: int) -> None:
        """Make block number `index` of a slot, full and final, available to other slots."""

    def write_indices(self, slots_P: Tensor, positions_P: Tensor, active_P: Tensor | None = None) -> Tensor:
        """Return where the keys and values of positions are written."""

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, indices_P: Tensor) -> None:
        """Store the keys and values of one layer."""

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """Attend with one query per slot."""

    def build_metadata(self, spans: Sequence[PrefillSpan]) -> Any:
        """Return the metadata of spans for `prefill`, once for all layers."""

    def prefill(self, layer: int, queries_PHD: Tensor, metadata: Any) -> Tensor:
        """Attend with the queries of several spans."""


@dataclasses.dataclass(frozen=True)
class DecodeResults:
    """Results of a decode step on their way to the host; valid until `look_ahead` + 1 further steps are launched."""

    host: Tensor
    ready: torch.cuda.Event | None

    def numpy(self) -> NDArray[np.int64]:
        """Wait for the results and return them, (rows, K + 2).

        Columns 0 … K − 1 are the frame, column K is 1 if it ends the clip, column K + 1 is 1 if its logits were not
        finite.
        """
        if self.ready is not None:
            self.ready.synchronize()
        return self.host.numpy()


class Runner:
    """A network with the KV cache and state of its slots.

    Args:
        window: frames of history for repetition-aware sampling.
        look_ahead: decode steps that are launched before the oldest one's results are read.
        fp8_weights: multiply with fp8 weights in the layers.
        capture: captures decode steps; None: run them eagerly.
    """

    def __init__(
        self,
        model: HiggsAudioModel,
        attention: Attention,
        *,
        max_slots: int,
        max_positions: int,
        window: int,
        look_ahead: int = 0,
        fp8_weights: bool = False,
        capture: Capture | None = None,
    ) -> None:
        config = model.config
        self.config, self.attention, self.device = config, attention, model.embed_tokens_device
        self._embed_tokens, self._embed_frames = model.embed_tokens, model.embed_frames
        heads = model.audio_decoder_proj
        self._audio_head: Linear = heads.audio_lm_head
        if isinstance(heads.audio_lm_head, nn.Linear):
            self._audio_head = linear([heads.audio_lm_head])
        self._text_logits = heads.text_logits
        self._layers: list[Layer] = prepare_layers(model, fp8_weights)
        self._norm, self._eps = model.norm.weight.detach(), config.text_config.rms_norm_eps
        self.dtype = self._norm.dtype
        text = config.text_config
        self._heads, self._kv_heads, self._head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        positions = torch.arange(max_positions, device=self.device).unsqueeze(0)
        cos, sin = model.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        self._cos, self._sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        num_codebooks = config.audio_num_codebooks
        self.state = SlotState(max_slots, num_codebooks, window, config.num_codebook_rows, self.device)
        self._slots = torch.arange(max_slots, device=self.device)
        self._sampler = FrameSampler(config.audio_codebook_size, config.audio_stream_bos_id)
        self._capture, self._replays = capture, dict[tuple[int, SamplingPlan], Step]()
        # Results rotate through several host buffers, because the next step is launched before the host reads them.
        self._results = torch.zeros(max_slots, num_codebooks + 2, dtype=torch.int64, device=self.device)
        buffers = torch.zeros((look_ahead + 1, *self._results.shape), dtype=torch.int64)
        self._result_buffers = itertools.cycle(buffers.pin_memory() if self.device.type == "cuda" else buffers)

    # ------------------------------------------------------------------ slots

    def start(
        self, slot: int, *, length: int, step: int, seed: int, sampling: SamplingParams, history_WK: NDArray[np.int64]
    ) -> None:
        """Activate a slot after a prompt of `length` positions; see `SlotState.initial_row`."""
        bos_id = self.config.audio_stream_bos_id
        row = self.state.initial_row(
            bos_id=bos_id, length=length, step=step, seed=seed, sampling=sampling, history_WK=history_WK
        )
        self.state.rows[slot] = to_device(row, self.device)

    def stop(self, slot: int) -> None:
        """Deactivate a slot."""
        self.state.active[slot] = 0

    def force(self, slot: int, frame_K: NDArray[np.int64] | None) -> None:
        """Set a slot's next frame instead of sampling it; None: sample again."""
        self.state.forced[slot] = NO_FRAME if frame_K is None else to_device(frame_K, self.device)

    # ------------------------------------------------------------------ prefill

    @torch.inference_mode()
    def prefill(self, spans: Sequence[PrefillSpan], prompts: Sequence[ExpandedPrompt]) -> Tensor:
        """Run spans of prompts; return the normalized hidden state (spans, D) of each span's last position."""
        pairs = list(zip(spans, prompts, strict=True))
        ids = np.concatenate([prompt.ids_P[span.start : span.stop] for span, prompt in pairs])
        frames = np.concatenate([prompt.frames_PK[span.start : span.stop] for span, prompt in pairs])
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        slots = np.repeat([span.slot for span in spans], [span.length for span in spans])
        ends = np.cumsum([span.length for span in spans]) - 1
        is_audio = ids < 0
        parts = [
            *(np.flatnonzero(~is_audio), np.flatnonzero(is_audio), ids[~is_audio], frames[is_audio].ravel()),
            *(is_audio, positions, slots, ends),
        ]
        # One copy to the device for everything.
        packed = to_device(np.concatenate(parts).astype(np.int64), self.device)
        text_rows, audio_rows, tokens, codes, audio_flags, positions_P, slots_P, end_rows = packed.split(
            [len(part) for part in parts]
        )
        is_audio_P1 = audio_flags.bool().unsqueeze(1)
        hidden = torch.empty(len(ids), self._norm.shape[0], dtype=self.dtype, device=self.device)
        hidden.index_copy_(0, text_rows, self._embed_tokens(tokens))
        hidden.index_copy_(0, audio_rows, self._embed_frames(codes.view(-1, frames.shape[1])))
        indices = self.attention.write_indices(slots_P, positions_P)
        metadata = self.attention.build_metadata(spans)

        def attend(layer: int, queries: Tensor) -> Tensor:
            return self.attention.prefill(layer, queries, metadata)

        def norm(hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
            return F.rms_norm(hidden, hidden.shape[1:], None, self._eps) * torch.where(is_audio_P1, audio, text)

        def feed_forward(hidden: Tensor, layer: Layer) -> Tensor:
            out = torch.empty_like(hidden)
            for rows, part in ((text_rows, layer.text), (audio_rows, layer.audio)):
                if len(rows):
                    out.index_copy_(0, rows, part(hidden[rows]))
            return out

        hidden = self._run_layers(hidden, positions_P, indices, attend, norm, feed_forward)
        return self._final_norm(hidden[end_rows])

    @torch.inference_mode()
    def sample_token(self, hidden_D: Tensor, step: int, seed: int, sampling: SamplingParams) -> int:
        """Sample the next text token exactly as `HiggsAudioModel.generate` does."""
        logits = self._text_logits(hidden_D.unsqueeze(0)).float()
        for placeholder in (self.config.audio_in_token_idx, self.config.audio_out_token_idx):
            if self.config.has_token(placeholder):
                logits[:, placeholder] = float("-inf")
        if not sampling.do_sample:
            return int(logits.argmax())
        uniforms = uniform(*(torch.tensor([value], device=self.device) for value in (seed, step, TEXT_SUBSEQUENCE)))
        token = sample_tokens(
            logits, uniforms, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        return int(token)

    # ------------------------------------------------------------------ decode

    @torch.inference_mode()
    def decode(self, rows: int, plan: SamplingPlan) -> DecodeResults:
        """Launch a step that computes the next frame of slots 0 … `rows` − 1."""
        self._replay(rows, plan)()
        host = next(self._result_buffers)[:rows]
        host.copy_(self._results[:rows], non_blocking=True)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return DecodeResults(host, ready)

    @torch.inference_mode()
    def warm_up(self, rows: Iterable[int], plans: Sequence[SamplingPlan]) -> None:
        """Capture the steps for all given numbers of rows and plans, so that no request has to wait for it."""
        # Largest first, so that the others fit into the memory that it allocated.
        for count, plan in itertools.product(sorted(rows, reverse=True), plans):
            self._replay(count, plan)

    def _replay(self, rows: int, plan: SamplingPlan) -> Step:
        step = functools.partial(self._step, rows, plan)
        if self._capture is None:
            return step
        if (rows, plan) not in self._replays:
            # The step runs for real before it is captured, which has no effect while no slot is active.
            active = self.state.active.clone()
            self.state.active.zero_()
            self._replays[rows, plan] = self._capture(step)
            self.state.active.copy_(active)
        return self._replays[rows, plan]

    def _step(self, rows: int, plan: SamplingPlan) -> None:
        state, config = self.state, self.config
        active, positions_S = state.active[:rows].bool(), state.length[:rows]
        indices = self.attention.write_indices(self._slots[:rows], positions_S, active)
        lengths = torch.where(active, positions_S + 1, 0)

        def attend(layer: int, queries: Tensor) -> Tensor:
            return self.attention.decode(layer, queries, lengths)

        def norm(hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
            return F.rms_norm(hidden, hidden.shape[1:], audio, self._eps)

        def feed_forward(hidden: Tensor, layer: Layer) -> Tensor:
            return layer.audio(hidden)

        hidden = self._embed_frames(state.frame[:rows])
        hidden = self._run_layers(hidden, positions_S, indices, attend, norm, feed_forward)
        logits = self._audio_head(self._final_norm(hidden)).float()
        invalid = active & ~logits.isfinite().all(dim=1)
        logits_SKV = logits.unflatten(1, (config.audio_num_codebooks, config.num_codebook_rows))

        window = state.window[:rows]
        sampling = state.sampling(rows)
        sampled = self._sampler(logits_SKV, state.seed[:rows], state.step[:rows], window, sampling, plan)
        forced = state.forced[:rows]
        sampled = torch.where(forced == NO_FRAME, sampled, forced)
        delay = DelayState(state.num_started[:rows], state.num_remaining[:rows])
        frame, ended = delay.step(sampled, active, config.audio_stream_bos_id, config.audio_stream_eos_id)

        active_S1 = active.unsqueeze(1)
        state.num_started[:rows], state.num_remaining[:rows] = delay.num_started, delay.num_remaining
        if plan.repetition_aware:
            rolled = torch.cat([window[..., 1:], frame.unsqueeze(2)], dim=2)
            window.copy_(torch.where(active_S1.unsqueeze(2), rolled, window))
        state.frame[:rows] = torch.where(active_S1, frame, state.frame[:rows])
        state.length[:rows] += active
        state.step[:rows] += active
        state.active[:rows] = active & ~ended & ~invalid
        torch.cat([frame, ended.unsqueeze(1), invalid.unsqueeze(1)], dim=1, out=self._results[:rows])

    # ------------------------------------------------------------------ the network

    def _run_layers(
        self,
        hidden_PD: Tensor,
        positions_P: Tensor,
        indices_P: Tensor,
        attend: Callable[[int, Tensor], Tensor],
        norm: Callable[[Tensor, Tensor, Tensor], Tensor],
        feed_forward: Callable[[Tensor, Layer], Tensor],
    ) -> Tensor:
        cos, sin = self._cos[positions_P], self._sin[positions_P]
        widths = (self._heads + self._kv_heads, self._kv_heads)
        for index, layer in enumerate(self._layers):
            text, audio = layer.text, layer.audio
            qkv = layer.qkv(norm(hidden_PD, text.attention_norm, audio.attention_norm))
            # Queries and keys together, because both are rotated.
            rotated, values = qkv.unflatten(1, (-1, self._head_dim)).split(widths, dim=1)
            rotated = rotated * cos + _rotate_half(rotated) * sin
            queries, keys = rotated.split((self._heads, self._kv_heads), dim=1)
            self.attention.write(index, keys, values, indices_P)
            hidden_PD = hidden_PD + layer.output(attend(index, queries).flatten(1))
            hidden_PD = hidden_PD + feed_forward(norm(hidden_PD, text.norm, audio.norm), layer)
        return hidden_PD

    def _final_norm(self, hidden_PD: Tensor) -> Tensor:
        return F.rms_norm(hidden_PD, hidden_PD.shape[1:], self._norm, self._eps)


def _rotate_half(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
