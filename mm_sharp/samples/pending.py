"""Loss differences on their way from the device into the history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.samples.history import Keys, SampleHistory


class PendingUpdates:
    """Brings each step's loss differences to the host without waiting, and writes them when the next step begins."""

    def __init__(self, history: SampleHistory) -> None:
        self.history = history
        self._in_flight: tuple[Keys, HostCopy] | None = None

    def add(self, keys: Keys, differences: Tensor | HostCopy) -> None:
        """Record a step's visits of K samples, with ``l_i(w + e) - l_i(w)``, (K,); not finite ones are ignored."""
        self.flush()
        self._in_flight = (keys, differences if isinstance(differences, HostCopy) else HostCopy(differences))

    def flush(self) -> None:
        """Write what is in flight into the history; waits for the device only if the copy is not there yet."""
        if self._in_flight is not None:
            keys, copy = self._in_flight
            self.history.update(keys, copy.numpy())
            self._in_flight = None  # only now: a step that fails before loses nothing

    def state_dict(self) -> dict[str, Any]:
        """What is in flight, in plain types and tensors: to write it early would change the draws that come before."""
        if self._in_flight is None:
            return {}
        keys, copy = self._in_flight
        return {'keys': [tuple(key) for key in keys], 'differences': torch.tensor(copy.numpy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what is in flight by what :meth:`state_dict` gave."""
        self._in_flight = None
        if state:
            self.add([(str(name), int(number)) for name, number in state['keys']], state['differences'].cpu())
