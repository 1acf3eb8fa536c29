"""The random state of this process, captured and restored as a whole.

With it the second pass draws the same dropout masks as the first: the difference of the losses is the perturbation's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """State of the global generators; capturing it costs no device synchronisation."""

    cpu: Tensor  # torch's CPU generator, (n,) uint8
    devices: dict[str, Tensor]  # of each device's generator, by the device's name
    numpy: tuple[Any, ...] | None  # ``numpy.random.get_state()``; None if it is left alone
    python: tuple[Any, ...] | None  # ``random.getstate()``; None with ``numpy``

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = (), *, all_libraries: bool = True) -> RandomState:
        """The state now, of torch on the CPU and on ``devices``, and with ``all_libraries`` of NumPy and Python."""
        states = {str(device): _module(device).get_rng_state(device) for device in devices if device.type != 'cpu'}
        if not all_libraries:  # these take longer than all the rest
            return cls(torch.get_rng_state(), states, None, None)
        return cls(torch.get_rng_state(), states, tuple(np.random.get_state()), random.getstate())

    def restore(self) -> None:
        """Put every generator back to this state."""
        torch.set_rng_state(self.cpu)
        for name, state in self.devices.items():
            device = torch.device(name)
            _module(device).set_rng_state(state, device)
        if self.numpy is not None and self.python is not None:
            np.random.set_state(self.numpy)
            random.setstate(self.python)

    def same_beyond_torch(self, other: RandomState) -> bool:
        """Whether NumPy's and Python's generators are in the same state in both."""
        if self.numpy is None or other.numpy is None:
            return True
        (_, keys, *rest), (_, other_keys, *other_rest) = self.numpy, other.numpy
        return self.python == other.python and rest == other_rest and bool((keys == other_keys).all())

    def state_dict(self) -> dict[str, Any]:
        """The state in tensors and plain types, which load under ``weights_only=True``."""
        if self.numpy is None or self.python is None:
            raise ValueError('the state of NumPy and Python was not captured')
        name, keys, *rest = self.numpy
        version, internal, gauss = self.python
        return {
            'cpu': self.cpu,
            'devices': dict(self.devices),
            'numpy': [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            'python': [version, list(internal), gauss],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomState:
        """The inverse of :meth:`state_dict`, without devices that this machine lacks."""
        name, keys, *rest = state['numpy']
        version, internal, gauss = state['python']
        devices = {n: s.cpu() for n, s in state['devices'].items() if _available(torch.device(n))}
        numpy_state = (name, keys.cpu().numpy().astype(np.uint32), *rest)
        return cls(state['cpu'].cpu(), devices, numpy_state, (version, tuple(internal), gauss))


def _module(device: torch.device) -> Any:
    """torch's module for a device type: ``torch.cuda`` and the like."""
    return getattr(torch, device.type)


def _available(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    return module is not None and module.is_available() and (device.index or 0) < module.device_count()
