"""Data-parallel training: this process's rank, and communication with the other workers.

The launcher of the processes initializes torch.distributed; without it there is a single worker.
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
class WorkerGroup:
    """This process's view of the workers of a training run."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls, device: str | None = None) -> WorkerGroup:
        """Return the group that torch.distributed describes; default device: this worker's GPU, else the CPU."""
        is_distributed = dist.is_initialized()
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(dist.get_rank() if is_distributed else 0, dist.get_world_size() if is_distributed else 1, resolved)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes logs and checkpoints."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum values over all workers, in place, and return them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until all workers have reached this point."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, objective: Objective, parallel: str, precision: str) -> nn.Module:
        """Wrap the objective with DDP or FSDP, which average gradients over the workers."""
        if parallel == "fsdp":
            dtype = torch.bfloat16 if precision == "bfloat16" else None
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for layer in objective.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            # Do not cast the inputs: the loss denominators must stay in float32.
            fully_shard(objective, mesh=mesh, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
            return objective
        if self.world_size == 1:
            return objective
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)

    @staticmethod
    def gradient_sync(wrapped: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Return a context in which DDP synchronizes gradients only in the last pass of a step."""
        if is_last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()
