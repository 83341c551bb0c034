"""The network at work on slots: tensors, and no decision.

A slot is a row of fixed buffers. `prefill` runs stretches of prompts, of any kinds of positions; `decode` runs one
frame of every slot, from the last frame to the next one: embedding, layers, head, drawing, delay pattern, all on the
device and without a question from the host. On a CUDA device a decode step is one captured graph a number of rows.

Rows that are not active go through every step and change nothing: their keys are written where nobody reads, and
their state is held by masks.
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
from higgs_model.engine.prompt import Positions
from higgs_model.engine.slots import NO_FRAME, SlotRows
from higgs_model.engine.spans import Span
from higgs_model.engine.transfer import to_device
from higgs_model.engine.weights import Layer, Linear, layers_of, linear
from higgs_model.model.model import HiggsAudioModel
from higgs_model.sampling import TEXT_LANE, DrawPlan, FrameSampler, SamplingParams, draw, uniform


class Attention(Protocol):
    """Keys and values of all slots, and attention to them; see `attention_cpu` and `attention_paged`."""

    def set_blocks(self, slot: int, blocks: Sequence[int], shared: range = range(0)) -> None:
        """Give a slot its blocks; those of the indices `shared` hold their content already."""

    def keep_block(self, slot: int, index: int, block: int) -> None:
        """The slot's block number `index` is full and final: let others share it."""

    def places(self, slots_P: Tensor, positions_P: Tensor, counts_P: Tensor | None = None) -> Tensor:
        """Where keys and values of positions are written."""

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, places_P: Tensor) -> None:
        """Store keys and values of one layer."""

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """One query a slot."""

    def prepare(self, spans: Sequence[Span]) -> Any:
        """What `prefill` needs to know of spans, once for all layers."""

    def prefill(self, layer: int, queries_PHD: Tensor, spans: Any) -> Tensor:
        """Queries of several spans."""


@dataclasses.dataclass(frozen=True)
class Readback:
    """What a decode step drew, on its way to the host; to be read before `look_ahead` + 1 further steps."""

    host: Tensor
    ready: torch.cuda.Event | None

    def numpy(self) -> NDArray[np.int64]:
        """(rows, K + 2): the frame, whether it is the clip's last, and whether the network's numbers were none."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.host.numpy()


class Runner:
    """A network, the attention to its slots, and their state.

    Args:
        window: frames that the repetition rule can look back.
        look_ahead: decode steps that are launched before the oldest one's results are read.
        fp8_weights: run the layers' products in 8 bits.
        capture: records decode steps; None: they are run as they are.
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
        self._layers: list[Layer] = layers_of(model, fp8_weights)
        self._norm, self._eps = model.norm.weight.detach(), config.text_config.rms_norm_eps
        self.dtype = self._norm.dtype
        text = config.text_config
        self._heads, self._kv_heads, self._head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        positions = torch.arange(max_positions, device=self.device).unsqueeze(0)
        cos, sin = model.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        self._cos, self._sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        num_codebooks = config.audio_num_codebooks
        self.state = SlotRows(max_slots, num_codebooks, window, config.num_codebook_rows, self.device)
        self._slots = torch.arange(max_slots, device=self.device)
        self._sampler = FrameSampler(config.audio_codebook_size, config.audio_stream_bos_id)
        self._capture, self._replays = capture, dict[tuple[int, DrawPlan], Step]()
        # A step's results leave through one of several doors: the next step is launched before the host has read them.
        self._results = torch.zeros(max_slots, num_codebooks + 2, dtype=torch.int64, device=self.device)
        doors = torch.zeros((look_ahead + 1, *self._results.shape), dtype=torch.int64)
        self._doors = itertools.cycle(doors.pin_memory() if self.device.type == "cuda" else doors)

    # ------------------------------------------------------------------ slots

    def start(
        self, slot: int, *, length: int, step: int, seed: int, sampling: SamplingParams, spoken: NDArray[np.int64]
    ) -> None:
        """Let a slot speak, after a prompt of `length` positions; see `SlotRows.begun`."""
        bos_id = self.config.audio_stream_bos_id
        row = self.state.begun(bos_id=bos_id, length=length, step=step, seed=seed, sampling=sampling, spoken_WK=spoken)
        self.state.rows[slot] = to_device(row, self.device)

    def stop(self, slot: int) -> None:
        """A slot no longer takes part."""
        self.state.active[slot] = 0

    def force(self, slot: int, frame_K: NDArray[np.int64] | None) -> None:
        """Say what a slot's next frame must be; None: it is drawn."""
        self.state.forced[slot] = NO_FRAME if frame_K is None else to_device(frame_K, self.device)

    # ------------------------------------------------------------------ prefill

    @torch.inference_mode()
    def prefill(self, spans: Sequence[Span], positions: Sequence[Positions]) -> Tensor:
        """Run stretches of prompts; the normed hidden state (spans, D) of each one's last position."""
        rows = [(one.ids_P[span.start : span.stop], span) for span, one in zip(spans, positions, strict=True)]
        ids = np.concatenate([row for row, _ in rows])
        frames = np.concatenate(
            [one.frames_PK[span.start : span.stop] for span, one in zip(spans, positions, strict=True)]
        )
        at = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        slots = np.repeat([span.slot for span in spans], [span.length for span in spans])
        ends = np.cumsum([span.length for span in spans]) - 1
        is_audio = ids < 0
        parts = (np.flatnonzero(~is_audio), np.flatnonzero(is_audio), ids[~is_audio], frames[is_audio].ravel())
        sent = [*parts, is_audio, at, slots, ends]
        whole = to_device(np.concatenate(sent).astype(np.int64), self.device)
        text_at, audio_at, tokens, codes, kinds, at_P, slots_P, ends_at = whole.split([len(one) for one in sent])
        is_audio_P1 = kinds.bool().unsqueeze(1)
        hidden = torch.empty(len(ids), self._norm.shape[0], dtype=self.dtype, device=self.device)
        hidden.index_copy_(0, text_at, self._embed_tokens(tokens))
        hidden.index_copy_(0, audio_at, self._embed_frames(codes.view(-1, frames.shape[1])))
        places = self.attention.places(slots_P, at_P)
        prepared = self.attention.prepare(spans)

        def attend(layer: int, queries: Tensor) -> Tensor:
            return self.attention.prefill(layer, queries, prepared)

        def normed(hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
            return F.rms_norm(hidden, hidden.shape[1:], None, self._eps) * torch.where(is_audio_P1, audio, text)

        def feed_forward(hidden: Tensor, layer: Layer) -> Tensor:
            made = torch.empty_like(hidden)
            for rows, part in ((text_at, layer.text), (audio_at, layer.audio)):
                if len(rows):
                    made.index_copy_(0, rows, part(hidden[rows]))
            return made

        hidden = self._through_layers(hidden, at_P, places, attend, normed, feed_forward)
        return self._final_norm(hidden[ends_at])

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
    def decode(self, rows: int, plan: DrawPlan) -> Readback:
        """Draw the next frame of slots 0 … `rows` − 1."""
        self._replay(rows, plan)()
        host = next(self._doors)[:rows]
        host.copy_(self._results[:rows], non_blocking=True)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return Readback(host, ready)

    @torch.inference_mode()
    def warm_up(self, rows: Iterable[int], plans: Sequence[DrawPlan]) -> None:
        """Record the steps of so many rows, so that none has to be when somebody waits for it."""
        # The largest goes first: the others fit into the memory that it took.
        for count, plan in itertools.product(sorted(rows, reverse=True), plans):
            self._replay(count, plan)

    def _replay(self, rows: int, plan: DrawPlan) -> Step:
        step = functools.partial(self._step, rows, plan)
        if self._capture is None:
            return step
        if (rows, plan) not in self._replays:
            # It is run for real before it is recorded: with no slot active, that changes nothing.
            active = self.state.active.clone()
            self.state.active.zero_()
            self._replays[rows, plan] = self._capture(step)
            self.state.active.copy_(active)
        return self._replays[rows, plan]

    def _step(self, rows: int, plan: DrawPlan) -> None:
        state, config = self.state, self.config
        active, at_S = state.active[:rows].bool(), state.length[:rows]
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
        sampling = state.sampling(rows)
        drawn = self._sampler(logits_SKV, state.seed[:rows], state.step[:rows], window, sampling, plan)
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
        torch.cat([frame, ended.unsqueeze(1), invalid.unsqueeze(1)], dim=1, out=self._results[:rows])

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
