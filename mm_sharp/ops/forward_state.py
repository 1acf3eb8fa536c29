"""The state of a model over the forward passes of a step.

Every forward pass starts from the state before the first one, and the step ends with the state that the first one has
left. So L(w + 0) is L(w) for models with queues, momentum teachers and warm-up counters too::

    snapshot       before the first forward                S
    rewind         after the first pass                    copies what it has become, S1, and puts S back
    rewind_again   before any more than a second forward   S
    restore        after the last pass                     S1

A buffer may share memory with a weight. At :meth:`ForwardState.rewind` and :meth:`ForwardState.restore` the weights
are what they were before the step, and so are the copies; elsewhere memory of the weights is not written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmengine.model import BaseAveragedModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mm_sharp.ops.finite import all_finite, finite_each
from mm_sharp.ops.module_state import ModuleStateBackup, StatePlan
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.ops.norm_statistics import NormStatistics
from mm_sharp.ops.rare_changes import RareChanges

_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_AVERAGED = (BaseAveragedModel, AveragedModel)


class ForwardState:
    """What the forward passes of a step change in a model; ``trained`` gives the weights that the step moves."""

    def __init__(self, trained: Callable[[], Sequence[Tensor]]) -> None:
        self._trained = trained
        self._plan: StatePlan | None = None
        self._model: nn.Module | None = None
        self._norms = NormStatistics()
        self._other_norms: list[nn.Module] = []
        self._before = ModuleStateBackup()
        self._after = ModuleStateBackup()
        self._rare = RareChanges()
        self._keeps_rare = False

    def snapshot(self, tree: ModuleTree, *, sharded: bool = False, broadcast: bool = False) -> None:
        """Copy the state of the user's own model before the first forward.

        ``sharded``: its parameters are pieces, which no forward moves. ``broadcast``: DDP may write to its buffers in a
        further forward.
        """
        self.discard()
        self._model = tree.model  # first: what is broken off in the middle of this has something to be discarded
        trained = frozenset(map(id, self._trained()))
        if self._plan is None or tree is not self._plan.tree or trained != self._plan.trained:
            self._plan = StatePlan(tree, trained, sharded=sharded)
            if any(isinstance(module, _AVERAGED) for module in tree.modules):
                self._rare.seen()  # it moves its weights through `.data`, at intervals
        plan = self._plan
        self._keeps_rare = not sharded and self._rare.next_step()
        self._other_norms = plan.norms if broadcast else self._norms.save(plan.norms)
        self._before.save(plan, self._other_norms, rare=self._keeps_rare)
        rare = [] if sharded else self._before.rare
        self._rare.watch(rare, [copy for _, copy in self._before.rare_backup.pairs] if self._keeps_rare else None)

    def rewind(self) -> None:
        """Copy what the first pass has made of it, and put back what was before."""
        assert self._plan is not None, 'snapshot() comes first'
        # Without copies it is too late to put it back for this step's second pass, but not to end as the first.
        self._after.save(self._plan, self._other_norms, rare=self._rare.changed())
        self._norms.hide()
        self._before.write_back()

    def rewind_again(self) -> None:
        """Put back what was before the first forward, at whatever weights."""
        self._before.write_back(self._trained())

    def restore(self) -> None:
        """Put back what the first pass has left; does nothing before :meth:`rewind`, or a second time."""
        self._norms.show()
        if self._model is not None and not self._after.rare_backup.saved:
            # What the first pass left alone, the second may have moved: a teacher that was the student's equal.
            self._rare.changed()
            self._before.rare_backup.write_back()
        self._after.restore()

    def newly_not_finite(self) -> Tensor | bool:
        """Whether a buffer has become not finite since :meth:`snapshot`; an accelerator is not waited for."""
        pairs = [*self._norms.backup.pairs, *self._before.backup.pairs]
        floats = [pair for pair in pairs if pair[0].dtype in _FLOATS and pair[0].numel()]
        buffers = [buffer for buffer, _ in floats]
        if not buffers or (buffers[0].device.type == 'cpu' and all_finite(buffers)):
            return False
        return (finite_each([copy for _, copy in floats]) & ~finite_each(buffers)).any()

    @property
    def statistics(self) -> list[Tensor]:
        """All buffers that may become not finite, as the first pass has left them."""
        others = self._before.backup.pairs
        return [*self._norms.floats, *(buffer for buffer, _ in others if buffer.dtype in _FLOATS and buffer.numel())]

    def undo(self, *, apart_from_weights: bool = False) -> None:
        """Put back what was before the step: of one that failed, or, without the weights, of one that was made."""
        weights = self._trained() if apart_from_weights else ()
        self._norms.write_back(weights)
        self._before.write_back(weights)
        self.discard()

    def discard(self) -> None:
        """Forget everything; memory for what rarely changes stays only where it does."""
        if self._model is None:
            return
        seldom = self._keeps_rare and not self._rare.every_step
        self._norms.discard()
        self._before.discard(release_rare=seldom)
        self._after.discard(release_rare=seldom)
        self._rare.watch((), None)
        self._model = None
