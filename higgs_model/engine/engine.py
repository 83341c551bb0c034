"""Continuous batching: requests come and go, every step draws a frame for each that speaks.

    add ─▶ waiting ─▶ prompt run in stretches ─▶ (text) ─▶ speech, a frame a step ─▶ updates

`Engine` is plain and synchronous; `loop.EngineLoop` runs one in a thread and has the asyncio face. One engine
belongs to one thread. What a request says depends on its prompt, sampling and seed alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Sequence as Several

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgs_model.engine.attention_cpu import RowAttention
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.blocks import BlockPool, content_keys
from higgs_model.engine.graphs import Capture, CudaCapture
from higgs_model.engine.metrics import EngineMetrics
from higgs_model.engine.prompt import Positions, expand
from higgs_model.engine.request import FinishReason, Request, Update
from higgs_model.engine.runner import Attention, Readback, Runner
from higgs_model.engine.scheduler import Scheduler, highest_slot
from higgs_model.engine.sequence import Phase, Sequence
from higgs_model.engine.settings import EngineSettings
from higgs_model.engine.spans import Span
from higgs_model.engine.watch import verdict
from higgs_model.engine.weights import check_supported
from higgs_model.errors import BadInput
from higgs_model.model.model import HiggsAudioModel
from higgs_model.model.options import eos_ids
from higgs_model.sampling import DrawPlan

_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A decode step whose results the host has not read yet, and whom they belong to."""

    results: Readback
    sequences: list[tuple[Sequence, int]]


class Engine:
    """Many requests at once on one device.

    Args:
        attention: keeps keys and values; None: what is fastest on the model's device.
        capture: records decode steps; None: CUDA graphs on a CUDA device, nothing elsewhere.

    Raises:
        BadConfig: the network has a part that only `HiggsAudioModel.generate` runs, or the device lacks what the
            settings ask for.
    """

    def __init__(
        self,
        model: HiggsAudioModel,
        settings: EngineSettings | None = None,
        *,
        attention: Attention | None = None,
        capture: Capture | None = None,
    ) -> None:
        check_supported(model.config)
        self.config, self.device = model.config, model.embed_tokens_device
        self.settings = (settings or EngineSettings()).completed(model)
        self.pool = BlockPool(self.settings.num_blocks, self.settings.block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_slots=self.settings.max_slots,
            prefill_positions=self.settings.prefill_positions,
            idle_prefill_positions=self.settings.idle_prefill_positions,
        )
        if capture is None and self.device.type == "cuda":
            capture = CudaCapture(self.device)
        self.runner = Runner(
            model,
            attention or attention_for(model, self.settings),
            max_slots=self.settings.max_slots,
            max_positions=self.settings.max_positions,
            window=self.settings.max_ras_win_len,
            look_ahead=self.settings.look_ahead or 0,
            fp8_weights=self.settings.fp8_weights,
            capture=capture,
        )
        self.metrics = EngineMetrics()
        self._eos_ids = eos_ids(self.config, None)
        self._arrivals, self._steps = itertools.count(), 0
        self._sequences: dict[str, Sequence] = {}
        self._launched: deque[_Launched] = deque()
        self._updates: list[Update] = []
        if self.device.type == "cuda":
            self._warm_up()

    def _warm_up(self) -> None:
        """Record all decode steps, and run the largest pass over prompts: if memory is short, it is so now."""
        vocabulary = self.config.num_codebook_rows
        plans = [DrawPlan(min(count, vocabulary), True) for count in self.settings.candidates]
        self.runner.warm_up(self.settings.row_buckets, plans)
        left, spans = self.settings.idle_prefill_positions, []
        for slot in range(self.settings.max_slots):
            if left > 0:
                spans.append(Span(slot, 0, min(left, self.settings.max_positions)))
                left -= spans[-1].length
        # Tables are empty: what is written goes to the trash.
        self.runner.prefill(spans, [Positions.blank(span.stop, self.config.audio_num_codebooks) for span in spans])
        torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BadInput: it can never run; the others are unaffected.
        """
        where = f"request {request.id!r}"
        if request.id in self._sequences:
            raise BadInput(f"{where}: there is one of that id already")
        prompt = expand(self.config, request.input_ids, request.clips, where)
        self._check(request, prompt, where)
        keys = content_keys(prompt.content_PC, self.settings.block_size)
        sequence = Sequence(request, prompt, keys, next(self._arrivals), self.config.audio_num_codebooks)
        sequence.added_s = time.perf_counter()
        self._sequences[request.id] = sequence
        self.scheduler.wait(sequence)
        self.metrics.requests += 1

    def _check(self, request: Request, prompt: Positions, where: str) -> None:
        settings = self.settings
        if not -_LARGEST_SEED <= request.seed <= _LARGEST_SEED:
            raise BadInput(f"{where}: seed={request.seed} does not fit into 64 bits")
        if request.max_frames < 1:
            raise BadInput(f"{where}: max_frames={request.max_frames} is not positive")
        if (request.sampling.ras_win_len or 0) > settings.max_ras_win_len:
            raise BadInput(
                f"{where}: ras_win_len={request.sampling.ras_win_len} is more than the engine's "
                f"{settings.max_ras_win_len} (max_ras_win_len)"
            )
        speaks_at_once = prompt.ids_P[-1] == self.config.audio_out_bos_token_id
        if not speaks_at_once and not self.config.use_text_head:
            raise BadInput(
                f"{where}: this checkpoint can only speak; let the prompt end in {self.config.audio_out_bos_token}"
            )
        longest = len(prompt) + (1 if speaks_at_once else 2) * (request.max_frames + self.config.audio_num_codebooks)
        room = min(settings.max_positions, self.pool.capacity * settings.block_size)
        if longest > room:
            raise BadInput(
                f"{where}: a prompt of {len(prompt)} positions and an answer of up to {longest - len(prompt)} "
                f"do not fit into the engine's {room}; shorten the prompt or lower max_frames={request.max_frames}"
            )

    def cancel(self, request_id: str) -> None:
        """End a request; its last update follows. An id that is not here is ignored: it may have ended just now."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.CANCELLED)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._launched or self._updates)

    # ------------------------------------------------------------------ the step

    def step(self) -> list[Update]:
        """Admit, run stretches of prompts, draw a frame for all who speak, and tell what has become of whom."""
        self._steps += 1
        self._admit()
        self._prefill()
        self._say_text()
        launched = self._speak()
        self._read(keep=(self.settings.look_ahead or 0) if launched else 0)
        self._end_stalled()
        updates, self._updates = self._updates, []
        return updates

    def _admit(self) -> None:
        for sequence, shared in self.scheduler.admit():
            self.runner.attention.set_blocks(sequence.slot, sequence.blocks, shared)
            sequence.moved_at_step = self._steps

    def _prefill(self) -> None:
        for sequence, shared in self.scheduler.adopt():
            self.runner.attention.set_blocks(sequence.slot, sequence.blocks, shared)
        planned = self.scheduler.plan_prefill()
        if not planned:
            return
        hidden = self.runner.prefill([span for _, span in planned], [sequence.prompt for sequence, _ in planned])
        self.metrics.prefill_positions += sum(span.length for _, span in planned)
        self.metrics.prefill_passes += 1
        for (sequence, span), last in zip(planned, hidden, strict=True):
            size = self.settings.block_size
            for index in range(span.start // size, min(span.stop // size, len(sequence.keys))):
                if self.pool.know(sequence.blocks[index], sequence.keys[index]):
                    self.runner.attention.keep_block(sequence.slot, index, sequence.blocks[index])
            sequence.computed = span.stop
            sequence.moved_at_step = self._steps
            if span.stop == len(sequence.prompt):
                self._prompt_done(sequence, last)

    def _prompt_done(self, sequence: Sequence, last_hidden_D: Tensor) -> None:
        """All positions have keys and values: speak, or say the next token of text."""
        if sequence.prompt.ids_P[-1] == self.config.audio_out_bos_token_id:
            sequence.phase = Phase.SPEECH
            request = sequence.request
            self.runner.start(
                sequence.slot,
                length=len(sequence.prompt),
                step=len(sequence.tokens) + 1,
                seed=request.seed,
                sampling=request.sampling,
                spoken=sequence.prompt.spoken_WK,
            )
            return
        sequence.phase = Phase.TEXT
        sequence.hidden_D = last_hidden_D

    def _say_text(self) -> None:
        said: list[Sequence] = []
        for sequence in sorted(self.scheduler.in_phase(Phase.TEXT), key=lambda one: one.order):
            request, step = sequence.request, len(sequence.tokens)
            if sequence.phase is not Phase.TEXT:
                continue
            if step == request.max_frames:
                self._end(sequence, FinishReason.LENGTH)
                continue
            token = self.runner.draw_token(sequence.hidden_D, step, request.seed, request.sampling)
            sequence.say(token)
            sequence.moved_at_step = self._steps
            self.metrics.text_tokens += 1
            if token in self._eos_ids:
                self._end(sequence, FinishReason.STOP)
            elif self._grown(sequence):
                said.append(sequence)
        # Somebody who spoke later may have needed the blocks of somebody who spoke before.
        said = [sequence for sequence in said if sequence.phase is Phase.TEXT]
        if not said:
            return
        spans = [sequence.last_position for sequence in said]
        for sequence, hidden_D in zip(said, self.runner.prefill(spans, [one.prompt for one in said]), strict=True):
            sequence.computed = len(sequence.prompt)
            self._prompt_done(sequence, hidden_D)

    def _speak(self) -> bool:
        """Launch a frame for all who speak, if any do."""
        for sequence in self.scheduler.short_of_blocks(self._speaking()):
            if sequence.phase is Phase.SPEECH:
                self._grown(sequence)
        speaking = self._speaking()
        if not speaking:
            return False
        for sequence in speaking:
            if sequence.replayed:
                self._force(sequence)
        rows = self._rows(highest_slot(speaking) + 1)
        results = self.runner.decode(rows, self._plan(speaking))
        self._launched.append(_Launched(results, [(one, one.turn) for one in speaking]))
        for sequence in speaking:
            sequence.launched += 1
            if sequence.launched == sequence.last_column:
                self.runner.stop(sequence.slot)
        self.metrics.count_step(len(speaking), self.settings.max_slots)
        return True

    def _speaking(self) -> list[Sequence]:
        return [one for one in self.scheduler.in_phase(Phase.SPEECH) if one.launched < one.last_column]

    def _force(self, sequence: Sequence) -> None:
        """Have a sequence that lost its slot say again what it had said, and then go on by itself."""
        if sequence.goes_again:
            self.runner.force(sequence.slot, sequence.known_frame_K)
        elif sequence.launched == sequence.replayed:
            self.runner.force(sequence.slot, None)

    def _plan(self, speaking: Several[Sequence]) -> DrawPlan:
        """What drawing for all of them takes; of few kinds only where each is recorded."""
        vocabulary = self.config.num_codebook_rows
        least = DrawPlan.of([one.request.sampling for one in speaking], vocabulary)
        kinds = (min(count, vocabulary) for count in self.settings.candidates)
        return next((DrawPlan(count, True) for count in kinds if count >= least.candidates), least)

    def _rows(self, wanted: int) -> int:
        return next((size for size in self.settings.row_buckets if size >= wanted), self.settings.max_slots)

    def _grown(self, sequence: Sequence) -> bool:
        """Whether a sequence has the blocks that its next step needs; others, or it, may lose their slots for it."""
        taken, lost = self.scheduler.grow(sequence)
        for slot in lost:
            self.runner.stop(slot)
        if taken:
            self.runner.attention.set_blocks(sequence.slot, sequence.blocks)
        return sequence.phase is not Phase.WAITING

    # ------------------------------------------------------------------ what came out

    def _read(self, keep: int) -> None:
        while len(self._launched) > keep:
            launched = self._launched.popleft()
            results = launched.results.numpy()
            frames, ended, invalid = results[:, :-2], results[:, -2].tolist(), results[:, -1].tolist()
            for sequence, turn in launched.sequences:
                # Since the launch a sequence may have ended, or lost its slot and begun again.
                if sequence.phase is Phase.SPEECH and sequence.turn == turn:
                    slot = sequence.slot
                    self._take(sequence, frames[slot], ended[slot], invalid[slot])

    def _take(self, sequence: Sequence, frame_K: NDArray[np.int64], ended: int, invalid: int) -> None:
        if invalid:
            self._end(sequence, FinishReason.INVALID)
            return
        sequence.append(frame_K)
        sequence.moved_at_step = self._steps
        if sequence.columns <= sequence.replayed:
            return
        self.metrics.frames += 1
        if ended:
            self._end(sequence, FinishReason.STOP)
        elif sequence.columns == sequence.last_column:
            self._end(sequence, FinishReason.LENGTH)
        elif sequence.columns % self.settings.watch.every == 0 and (
            reason := verdict(self.settings.watch, sequence.drawn_TK)
        ):
            self._end(sequence, reason)
        elif sequence.due:
            self._give(sequence, None)

    def _end_stalled(self) -> None:
        """Give back the slots of those who do not get on, whatever keeps them."""
        limit, now = self.settings.watch.stalled_steps, self._steps
        if now % limit:
            return
        for sequence in list(self.scheduler.running.values()):
            if now - sequence.moved_at_step >= limit:
                self._end(sequence, FinishReason.STALLED)

    def _give(self, sequence: Sequence, reason: FinishReason | None) -> None:
        frames = sequence.take_frames(self.config.audio_codebook_size)
        if math.isnan(sequence.first_frame_s) and frames.shape[1]:
            sequence.first_frame_s = time.perf_counter() - sequence.added_s
            self.metrics.first_frame_s.append(sequence.first_frame_s)
        self._updates.append(Update(sequence.request.id, frames, reason))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.slot in self.scheduler.running and sequence.phase is Phase.SPEECH:
            self.runner.stop(sequence.slot)
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self.metrics.finished[reason] += 1
        self._give(sequence, reason)

    def snapshot(self) -> dict[str, float]:
        """Plain numbers for whoever watches the engine, from whatever thread; see `EngineMetrics`."""
        return self.metrics.snapshot() | {
            "queued": self.scheduler.waiting,
            "running": len(self.scheduler.running),
            "slots": self.settings.max_slots,
            "kv_blocks_used": self.pool.used,
            "kv_blocks_shared": self.pool.shared,
            "kv_blocks": self.pool.capacity,
            "preemptions": self.scheduler.counters.preemptions,
            "shared_positions": self.scheduler.counters.shared_positions,
        }


def attention_for(model: HiggsAudioModel, settings: EngineSettings) -> Attention:
    """What keeps keys and values on a model's device, of completed settings."""
    text, device = model.config.text_config, model.embed_tokens_device
    shape = {
        "num_layers": text.num_hidden_layers,
        "num_blocks": settings.num_blocks,
        "block_size": settings.block_size,
        "num_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "num_query_heads": text.num_attention_heads,
        "max_slots": settings.max_slots,
        "max_blocks_per_slot": -(-settings.max_positions // settings.block_size),
        "device": device,
        "dtype": model.dtype,
    }
    return RowAttention(**shape) if device.type == "cpu" else PagedAttention(**shape, fp8_cache=settings.fp8_cache)
