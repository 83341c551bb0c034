"""Continuous batching: requests come and go between steps, and each step samples one frame for every decoding request.

    add ─▶ waiting ─▶ prefill in spans ─▶ (text) ─▶ decode, one frame per step ─▶ updates

`Engine` is synchronous; `loop.EngineLoop` runs one in a thread and offers an asyncio interface. An engine belongs to
one thread. A request's output depends on its prompt, sampling parameters and seed alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgs_model.engine.attention_cpu import ContiguousAttention
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.blocks import BlockPool, hash_blocks
from higgs_model.engine.early_stopping import early_stop_reason
from higgs_model.engine.graphs import Capture, CudaCapture
from higgs_model.engine.metrics import EngineMetrics
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.engine.prompt import ExpandedPrompt, expand_prompt
from higgs_model.engine.request import FinishReason, Request, Update
from higgs_model.engine.runner import Attention, DecodeResults, Runner
from higgs_model.engine.scheduler import Scheduler, highest_slot
from higgs_model.engine.sequence import Phase, Sequence
from higgs_model.engine.settings import EngineSettings
from higgs_model.engine.weights import check_supported
from higgs_model.errors import BadInput
from higgs_model.model.model import HiggsAudioModel
from higgs_model.model.options import resolve_eos_ids
from higgs_model.sampling import SamplingPlan

_MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class _LaunchedStep:
    """A decode step with unread results, and its sequences with their number of preemptions at launch."""

    results: DecodeResults
    sequences: list[tuple[Sequence, int]]


class Engine:
    """Runs many requests concurrently on one device.

    Args:
        attention: the KV cache and attention to it; None: the fastest one for the model's device.
        capture: captures decode steps; None: CUDA graphs on a CUDA device, no capture elsewhere.

    Raises:
        BadConfig: the network has a feature that only `HiggsAudioModel.generate` supports, or the device does not
            support a setting.
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
        self.settings = (settings or EngineSettings()).resolve(model)
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
            attention or build_attention(model, self.settings),
            max_slots=self.settings.max_slots,
            max_positions=self.settings.max_positions,
            window=self.settings.max_ras_win_len,
            look_ahead=self.settings.look_ahead or 0,
            fp8_weights=self.settings.fp8_weights,
            capture=capture,
        )
        self.metrics = EngineMetrics()
        self._eos_ids = resolve_eos_ids(self.config, None)
        self._arrivals, self._steps = itertools.count(), 0
        self._sequences: dict[str, Sequence] = {}
        self._launched: deque[_LaunchedStep] = deque()
        self._updates: list[Update] = []
        if self.device.type == "cuda":
            self._warm_up()

    def _warm_up(self) -> None:
        """Capture all decode steps and run the largest prefill pass, so that a lack of memory shows at startup."""
        vocabulary = self.config.num_codebook_rows
        plans = [SamplingPlan(min(count, vocabulary), True) for count in self.settings.candidates]
        self.runner.warm_up(self.settings.row_buckets, plans)
        remaining, spans = self.settings.idle_prefill_positions, []
        for slot in range(self.settings.max_slots):
            if remaining > 0:
                spans.append(PrefillSpan(slot, 0, min(remaining, self.settings.max_positions)))
                remaining -= spans[-1].length
        # The block tables are empty, so everything is written to the null block.
        self.runner.prefill(spans, [ExpandedPrompt.dummy(span.stop, self.config.audio_num_codebooks) for span in spans])
        torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BadInput: it can never run; other requests are unaffected.
        """
        name = f"request {request.id!r}"
        if request.id in self._sequences:
            raise BadInput(f"{name}: a request with this id is already in the engine")
        prompt = expand_prompt(self.config, request.input_ids, request.clips, name)
        self._check(request, prompt, name)
        hashes = hash_blocks(prompt.content_PC, self.settings.block_size)
        sequence = Sequence(request, prompt, hashes, next(self._arrivals), self.config.audio_num_codebooks)
        sequence.added_s = time.perf_counter()
        self._sequences[request.id] = sequence
        self.scheduler.enqueue(sequence)
        self.metrics.requests += 1

    def _check(self, request: Request, prompt: ExpandedPrompt, name: str) -> None:
        settings = self.settings
        if not -_MAX_SEED <= request.seed <= _MAX_SEED:
            raise BadInput(f"{name}: seed={request.seed} does not fit into 64 bits")
        if request.max_frames < 1:
            raise BadInput(f"{name}: max_frames={request.max_frames} is not positive")
        if (request.sampling.ras_win_len or 0) > settings.max_ras_win_len:
            raise BadInput(
                f"{name}: ras_win_len={request.sampling.ras_win_len} exceeds the engine's "
                f"max_ras_win_len={settings.max_ras_win_len}"
            )
        starts_with_audio = prompt.ids_P[-1] == self.config.audio_out_bos_token_id
        if not starts_with_audio and not self.config.use_text_head:
            raise BadInput(
                f"{name}: this checkpoint has no text head; end the prompt with {self.config.audio_out_bos_token}"
            )
        max_answer = (1 if starts_with_audio else 2) * (request.max_frames + self.config.audio_num_codebooks)
        capacity = min(settings.max_positions, self.pool.capacity * settings.block_size)
        if len(prompt) + max_answer > capacity:
            raise BadInput(
                f"{name}: a prompt of {len(prompt)} positions and an answer of up to {max_answer} exceed the engine's "
                f"{capacity} positions; shorten the prompt or lower max_frames={request.max_frames}"
            )

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its last update follows. Unknown ids are ignored: the request may just have finished."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.CANCELLED)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._launched or self._updates)

    # ------------------------------------------------------------------ one step

    def step(self) -> list[Update]:
        """Admit requests, prefill, launch a decode step, read an earlier one, and return what has changed."""
        self._steps += 1
        self._admit()
        self._prefill()
        self._decode_text()
        launched = self._launch_decode()
        self._process_results(keep=(self.settings.look_ahead or 0) if launched else 0)
        self._finish_stalled()
        updates, self._updates = self._updates, []
        return updates

    def _admit(self) -> None:
        for sequence, shared in self.scheduler.admit():
            self.runner.attention.set_blocks(sequence.slot, sequence.blocks, shared)
            sequence.last_progress_step = self._steps

    def _prefill(self) -> None:
        for sequence, shared in self.scheduler.reuse_computed_blocks():
            self.runner.attention.set_blocks(sequence.slot, sequence.blocks, shared)
        planned = self.scheduler.plan_prefill()
        if not planned:
            return
        hidden = self.runner.prefill([span for _, span in planned], [sequence.prompt for sequence, _ in planned])
        self.metrics.prefill_positions += sum(span.length for _, span in planned)
        self.metrics.prefill_passes += 1
        for (sequence, span), last in zip(planned, hidden, strict=True):
            size = self.settings.block_size
            for index in range(span.start // size, min(span.stop // size, len(sequence.block_hashes))):
                if self.pool.register(sequence.blocks[index], sequence.block_hashes[index]):
                    self.runner.attention.publish_block(sequence.slot, index, sequence.blocks[index])
            sequence.num_computed = span.stop
            sequence.last_progress_step = self._steps
            if span.stop == len(sequence.prompt):
                self._finish_prefill(sequence, last)

    def _finish_prefill(self, sequence: Sequence, last_hidden_D: Tensor) -> None:
        """Start decoding audio, or text if the prompt does not end with <|audio_out_bos|>."""
        if sequence.prompt.ids_P[-1] == self.config.audio_out_bos_token_id:
            sequence.phase = Phase.DECODE
            request = sequence.request
            self.runner.start(
                sequence.slot,
                length=len(sequence.prompt),
                step=len(sequence.tokens) + 1,
                seed=request.seed,
                sampling=request.sampling,
                history_WK=sequence.prompt.history_WK,
            )
            return
        sequence.phase = Phase.TEXT
        sequence.hidden_D = last_hidden_D

    def _decode_text(self) -> None:
        """Sample one text token for every sequence in the text phase, and compute the positions that it adds."""
        extended: list[Sequence] = []
        for sequence in sorted(self.scheduler.in_phase(Phase.TEXT), key=lambda text: text.order):
            request, step = sequence.request, len(sequence.tokens)
            if sequence.phase is not Phase.TEXT:
                continue
            if step == request.max_frames:
                self._finish(sequence, FinishReason.LENGTH)
                continue
            token = self.runner.sample_token(sequence.hidden_D, step, request.seed, request.sampling)
            sequence.append_token(token)
            sequence.last_progress_step = self._steps
            self.metrics.text_tokens += 1
            if token in self._eos_ids:
                self._finish(sequence, FinishReason.STOP)
            elif self._ensure_blocks(sequence):
                extended.append(sequence)
        # A later sequence may have preempted an earlier one for its blocks.
        extended = [sequence for sequence in extended if sequence.phase is Phase.TEXT]
        if not extended:
            return
        spans, prompts = [text.last_position for text in extended], [text.prompt for text in extended]
        for sequence, hidden_D in zip(extended, self.runner.prefill(spans, prompts), strict=True):
            sequence.num_computed = len(sequence.prompt)
            self._finish_prefill(sequence, hidden_D)

    def _launch_decode(self) -> bool:
        """Launch a decode step for all decoding sequences; False if there are none."""
        for sequence in self.scheduler.needing_blocks(self._decoding()):
            if sequence.phase is Phase.DECODE:
                self._ensure_blocks(sequence)
        decoding = self._decoding()
        if not decoding:
            return False
        for sequence in decoding:
            if sequence.num_replayed:
                self._replay_frame(sequence)
        rows = self._bucket_rows(highest_slot(decoding) + 1)
        results = self.runner.decode(rows, self._sampling_plan(decoding))
        self._launched.append(_LaunchedStep(results, [(sequence, sequence.num_preemptions) for sequence in decoding]))
        for sequence in decoding:
            sequence.num_launched += 1
            if sequence.num_launched == sequence.frame_limit:
                self.runner.stop(sequence.slot)
        self.metrics.count_step(len(decoding), self.settings.max_slots)
        return True

    def _decoding(self) -> list[Sequence]:
        decoding = self.scheduler.in_phase(Phase.DECODE)
        return [sequence for sequence in decoding if sequence.num_launched < sequence.frame_limit]

    def _replay_frame(self, sequence: Sequence) -> None:
        """Force the next frame of a preempted sequence to what it was before, until sampling resumes."""
        if sequence.is_replaying:
            self.runner.force(sequence.slot, sequence.replayed_frame_K)
        elif sequence.num_launched == sequence.num_replayed:
            self.runner.force(sequence.slot, None)

    def _sampling_plan(self, decoding: Iterable[Sequence]) -> SamplingPlan:
        """Return a plan that covers all sequences' sampling parameters; where steps are captured, one of a few."""
        vocabulary = self.config.num_codebook_rows
        minimal = SamplingPlan.from_params([sequence.request.sampling for sequence in decoding], vocabulary)
        captured = (min(count, vocabulary) for count in self.settings.candidates)
        return next((SamplingPlan(count, True) for count in captured if count >= minimal.candidates), minimal)

    def _bucket_rows(self, rows: int) -> int:
        return next((size for size in self.settings.row_buckets if size >= rows), self.settings.max_slots)

    def _ensure_blocks(self, sequence: Sequence) -> bool:
        """Allocate the blocks of a sequence's next step, preempting others if necessary; False if it was preempted."""
        allocated, preempted = self.scheduler.allocate_blocks(sequence)
        for slot in preempted:
            self.runner.stop(slot)
        if allocated:
            self.runner.attention.set_blocks(sequence.slot, sequence.blocks)
        return sequence.phase is not Phase.WAITING

    # ------------------------------------------------------------------ results

    def _process_results(self, keep: int) -> None:
        while len(self._launched) > keep:
            launched = self._launched.popleft()
            results = launched.results.numpy()
            frames, ended, invalid = results[:, :-2], results[:, -2].tolist(), results[:, -1].tolist()
            for sequence, num_preemptions in launched.sequences:
                # Since the launch, a sequence may have finished, or been preempted and restarted.
                if sequence.phase is Phase.DECODE and sequence.num_preemptions == num_preemptions:
                    slot = sequence.slot
                    self._process_frame(sequence, frames[slot], ended[slot], invalid[slot])

    def _process_frame(self, sequence: Sequence, frame_K: NDArray[np.int64], ended: int, invalid: int) -> None:
        if invalid:
            self._finish(sequence, FinishReason.INVALID)
            return
        sequence.append_frame(frame_K)
        sequence.last_progress_step = self._steps
        if sequence.num_frames <= sequence.num_replayed:
            return
        self.metrics.frames += 1
        if ended:
            self._finish(sequence, FinishReason.STOP)
        elif sequence.num_frames == sequence.frame_limit:
            self._finish(sequence, FinishReason.LENGTH)
        elif sequence.num_frames % self.settings.early_stopping.check_every == 0 and (
            reason := early_stop_reason(self.settings.early_stopping, sequence.frames_TK)
        ):
            self._finish(sequence, reason)
        elif sequence.has_frames_to_stream:
            self._emit(sequence, None)

    def _finish_stalled(self) -> None:
        """Free the slots of sequences that make no progress, whatever the cause."""
        limit, now = self.settings.early_stopping.stalled_steps, self._steps
        if now % limit:
            return
        for sequence in list(self.scheduler.running.values()):
            if now - sequence.last_progress_step >= limit:
                self._finish(sequence, FinishReason.STALLED)

    def _emit(self, sequence: Sequence, reason: FinishReason | None) -> None:
        frames = sequence.pop_new_frames(self.config.audio_codebook_size)
        if math.isnan(sequence.first_frame_s) and frames.shape[1]:
            sequence.first_frame_s = time.perf_counter() - sequence.added_s
            self.metrics.first_frame_s.append(sequence.first_frame_s)
        self._updates.append(Update(sequence.request.id, frames, reason))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.slot in self.scheduler.running and sequence.phase is Phase.DECODE:
            self.runner.stop(sequence.slot)
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self.metrics.finished[reason] += 1
        self._emit(sequence, reason)

    def snapshot(self) -> dict[str, float]:
        """Return the engine's metrics as plain numbers; safe to call from any thread. See `EngineMetrics`."""
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


def build_attention(model: HiggsAudioModel, settings: EngineSettings) -> Attention:
    """Return the KV cache and attention for a model's device.

    Args:
        settings: resolved ones, see `EngineSettings.resolve`.
    """
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
    if device.type == "cpu":
        return ContiguousAttention(**shape)
    return PagedAttention(**shape, fp8_cache=settings.fp8_cache)
