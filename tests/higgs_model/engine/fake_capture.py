"""Enforces the rules of CUDA graphs on a CPU: a step is recorded once, and replaying it runs the recorded operations on
the same tensors. Values that the host computed during capture are frozen, and synchronizing with the host is an error.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HOST_SYNCS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}


class HostSync(Exception):
    """A CUDA graph could not capture this."""


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # A scalar is an argument of the launch; a list would have to be copied from the host.
        copied_from_host = packet is aten.lift_fresh and args[0].dim() > 0
        if packet in HOST_SYNCS or by_mask or copied_from_host:
            raise HostSync(str(func))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class FakeCudaCapture:
    """Replaces `CudaCapture`. `log` lists "run" and "record" in the order in which they happened."""

    def __init__(self):
        self.log, self.replays = [], 0

    def __call__(self, step):
        step()
        self.log.append("run")
        recorder = _Recorder()
        with recorder, _forbid_host_reads():
            step()
        self.log.append("record")

        def replay():
            self.replays += 1
            for func, args, kwargs, recorded in recorder.calls:
                for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


@contextlib.contextmanager
def _forbid_host_reads():
    """Forbid reading tensors in ways that dispatch no operation."""

    def fail(*_):
        raise HostSync("a tensor was converted to Python numbers")

    with mock.patch.object(torch.Tensor, "tolist", fail), mock.patch.object(torch.Tensor, "numpy", fail):
        yield
