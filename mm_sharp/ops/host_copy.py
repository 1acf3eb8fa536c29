"""Small arrays between host and device, without making the host wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of a copy of ``array`` on ``device``; on an accelerator the host does not wait for the copy."""
    tensor = torch.from_numpy(array.copy())
    if device.type == 'cpu':
        return tensor
    if device.type == 'cuda':
        tensor = tensor.pin_memory()  # from pageable memory the copy would be synchronous
    return tensor.to(device, non_blocking=True)


def host_waits(device: torch.device) -> bool:
    """Whether the host has to wait for what is on ``device``."""
    return device.type != 'cpu'


class HostCopy:
    """A copy of a tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        source = tensor.detach()
        if source.device.type == 'cuda':
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            # Of the tensor's device, which need not be the current one.
            self._event = torch.cuda.current_stream(source.device).record_event()
        else:
            self._host = source.cpu().clone()

    @property
    def ready(self) -> bool:
        """Whether :meth:`numpy` would not have to wait."""
        return self._event is None or bool(self._event.query())

    def numpy(self) -> npt.NDArray[Any]:
        """The values; waits for the copy if it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        values: npt.NDArray[Any] = np.asarray(self._host)
        return values
