"""A CUDA graph's terms, on a CPU: a step is recorded once and only its recorded operations run again, on the very same
tensors. What the host computed while it was recorded stays as it was; asking the device for a value is refused.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HOST_ASKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}


class HostAsks(Exception):
    """A graph could not record this."""


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
        # A number alone goes along with the launch; a list of them would have to be copied from the host.
        from_host = packet is aten.lift_fresh and args[0].dim() > 0
        if packet in HOST_ASKS or by_mask or from_host:
            raise HostAsks(str(func))
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made


class Tape:
    """Takes the place of `CudaCapture`. `log` has what was done: "run" and "record"."""

    def __init__(self):
        self.log, self.replays = [], 0

    def __call__(self, step):
        step()
        self.log.append("run")
        recorder = _Recorder()
        with recorder, _no_lists():
            step()
        self.log.append("record")

        def replay():
            self.replays += 1
            for func, args, kwargs, made in recorder.calls:
                for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


@contextlib.contextmanager
def _no_lists():
    """These look at memory without an operation."""

    def refuse(*_):
        raise HostAsks("a tensor was turned into Python's numbers")

    with mock.patch.object(torch.Tensor, "tolist", refuse), mock.patch.object(torch.Tensor, "numpy", refuse):
        yield
