"""A step on the device recorded once and replayed, so that the host launches it in one call.

A recorded step reads and writes the addresses that it was recorded with: all that changes from step to step lies in
fixed tensors. `Capture` is the seam: what a CUDA graph does, tests do with a tape of torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], object]
Capture = Callable[[Step], Step]
"""From a step to its replay. The step is run before, for real, as often as it likes."""


class CudaCapture:
    """CUDA graphs that share one pool of memory: they never run at the same time, and leave nothing in it."""

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, step: Step) -> Step:
        """Run a step twice, then record it.

        The first runs build kernels and start libraries up, which must not happen while a graph is recorded.
        """
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            step()
            step()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads, the codec's among them, may allocate and copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay
