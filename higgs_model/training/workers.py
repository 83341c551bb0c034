"""One training in several processes: who this one is, and what it shares with the others.

Whoever starts the processes sets up torch.distributed; without it there is one worker, and nothing is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from higgs_model.training.objective import Objective


@dataclasses.dataclass(frozen=True)
class Workers:
    """This process among the workers of a training."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def here(cls, device: str | None = None) -> Workers:
        """By the environment; `device` is by default this worker's GPU, else the CPU."""
        joined = dist.is_initialized()
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, chosen)

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all workers."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all workers are here."""
        if self.count > 1:
            dist.barrier()

    def wrap(self, objective: Objective, parallel: str, precision: str) -> nn.Module:
        """The objective, its gradients averaged over the workers."""
        if parallel == "fsdp":
            dtype = torch.bfloat16 if precision == "bfloat16" else None
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            mesh = init_device_mesh(self.device.type, (self.count,))
            for layer in objective.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            # What the losses are divided by is not to be rounded.
            fully_shard(objective, mesh=mesh, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
            return objective
        if self.count == 1:
            return objective
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)

    @staticmethod
    def holding_back(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
        """Gradients are shared in the last pass of a step only."""
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()
