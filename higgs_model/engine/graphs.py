"""Captures a device step once and replays it, so that the host launches it with one call.

A captured step reads and writes the addresses it was captured with: everything that changes from step to step is in
fixed tensors. `Capture` is the seam for tests, which replay recorded torch operations where the engine uses CUDA
graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], object]
Capture = Callable[[Step], Step]
"""Returns a function that replays a step. It may run the step itself any number of times before."""


class CudaCapture:
    """CUDA graphs in one memory pool: they never run concurrently, and leave no results in it."""

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, step: Step) -> Step:
        """Run a step twice, then capture it.

        The first runs compile kernels and initialize libraries, which must not happen during capture.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads, such as the codec's, may allocate and copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay
