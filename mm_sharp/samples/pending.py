"""Loss differences on their way from the device into the history (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.samples.history import Keys, SampleHistory


class PendingUpdates:
    """Brings each step's loss differences to the host without waiting, and writes them when the next step begins.

    Args:
        history: Where they go.
    """

    def __init__(self, history: SampleHistory) -> None:
        self.history = history
        self._under_way: tuple[Keys, HostCopy] | None = None
        self._failed = False

    def add(self, keys: Keys, differences: Tensor | HostCopy) -> None:
        """Take up a step's visits.

        Args:
            keys: K pairs of a data set's name and a sample's id.
            differences: ``l_i(w + e) - l_i(w)``, (K,), or their copy, if it is under way already; those that are not
                finite are no visits.
        """
        self.flush()
        copy = differences if isinstance(differences, HostCopy) else HostCopy(differences)
        self._under_way = (keys, copy)

    def state_dict(self) -> dict[str, Any]:
        """What is under way, in plain types and tensors: writing it early would change the draws that come before."""
        if self._under_way is None:
            return {}
        keys, copy = self._under_way
        return {'keys': [tuple(key) for key in keys], 'differences': torch.tensor(copy.numpy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what is under way by what :meth:`state_dict` gave."""
        self._under_way, self._failed = None, False
        if state:
            self.add([(str(name), int(number)) for name, number in state['keys']], state['differences'].cpu())

    def flush(self) -> None:
        """Write what is under way into the history; waits for the device only if the copy is not there yet."""
        if self._under_way is None:
            return
        keys, copy = self._under_way
        # An update that fails is made again with the next step, once: an error that comes back is in the visits.
        if self._failed:
            self._under_way = None
        self._failed = not self._failed
        self.history.update(keys, copy.numpy())
        self._under_way, self._failed = None, False
