"""What a forward pass changes in a model besides the gradients, kept and put back (ours).

A training forward updates BatchNorm's running statistics and counters, SyncBN's, observers of quantizers, and at times
a Python number (Brevitas and some losses count their calls). The second pass must leave none of that behind.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mm_sharp.finite import all_finite
from mm_sharp.perturbation import TensorBackup

_PLAIN_NUMBERS = (bool, int, float)


class ModuleStateBackup:
    """Keeps all buffers of a module, and the plain numbers among its submodules' attributes.

    Buffers are copied and copied back, so that they keep their storage; a buffer that was replaced by another tensor
    gets its old tensor back. Numbers (bool, int, float) are kept for submodules of classes outside torch. Other Python
    state, such as lists, is not looked at.
    """

    def __init__(self) -> None:
        self._backup = TensorBackup()
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._numbers: list[tuple[nn.Module, dict[str, Any]]] = []

    def save(self, module: nn.Module) -> None:
        """Keep the state of ``module`` and all its submodules."""
        members = list(module.modules())
        self._buffers = [
            (member, name, buffer)
            for member in members
            for name, buffer in member._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        self._backup.save([buffer for *_, buffer in self._buffers if _writable(buffer)])
        self._numbers = [
            (member, {k: v for k, v in vars(member).items() if type(v) in _PLAIN_NUMBERS})
            for member in members
            if not _is_torchs(type(member))  # type: ignore[arg-type]  # mypy takes classes to have no hash
        ]

    def restore(self) -> None:
        """Put everything back; does nothing without :meth:`save`."""
        for member, name, buffer in self._buffers:
            member._buffers[name] = buffer
        self._backup.restore()
        for member, numbers in self._numbers:
            current = vars(member)
            for name, number in numbers.items():
                # Not `!=`: nan differs from itself, and True equals 1.
                if current.get(name) is not number:
                    current[name] = number
        self.drop()

    def drop_if_finite(self) -> None:
        """Forget what was kept if the module's buffers are finite now; otherwise put everything back."""
        if all_finite([buffer for *_, buffer in self._buffers if buffer.is_floating_point()]):
            self.drop()
        else:
            self.restore()

    def drop(self) -> None:
        """Forget what was kept."""
        self._backup.drop()
        self._buffers, self._numbers = [], []


@lru_cache(maxsize=1024)  # asked of every module, twice a step
def _is_torchs(kind: type) -> bool:
    """Whether a class and all that it derives from are torch's: FSDP2 makes classes of its own from users'."""
    return all(cls is object or cls.__module__.startswith('torch.') for cls in kind.__mro__)


def _writable(buffer: Tensor) -> bool:
    """Whether in-place operations can change ``buffer``: not where its elements share memory (``expand``)."""
    return not any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
