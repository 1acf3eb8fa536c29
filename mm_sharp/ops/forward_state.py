"""The state of a model over the forward passes of a step.

Every forward pass of a step starts from the state before the first one, and afterwards the state is as the first one
has left it::

    snapshot       before the first forward                S
    rewind         after the first pass                    keeps what it has become, S1, and puts S back
    rewind_again   before any more than a second forward   S
    restore        after the last pass                     S1

So L(w + 0) is L(w) for models with memory too, such as queues, momentum teachers and warm-up counters. Frozen weights
and plain tensors are looked after as :mod:`mm_sharp.ops.rare_changes` says.

A buffer may share memory with a weight. Where :meth:`ForwardState.rewind` and :meth:`ForwardState.restore` are called,
the weights are what they were before the step, and so are the copies; elsewhere what the weights share is left alone.
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
from mm_sharp.ops.rare_changes import RareChanges, Stamp, stamped_changed, stamps

_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_AVERAGED = (BaseAveragedModel, AveragedModel)


class ForwardState:
    """What the forward passes of a step change in a model besides the gradients.

    Args:
        trained: Gives the weights that the step moves.
    """

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
        self._stamps: list[Stamp] = []

    def snapshot(self, tree: ModuleTree, *, sharded: bool = False, broadcast: bool = False) -> None:
        """Keep the state before the first forward.

        Args:
            tree: The user's own model, as it is now.
            sharded: Whether its parameters are pieces, which no forward moves.
            broadcast: Whether a further forward may have DDP write to its buffers.
        """
        self.discard()
        plan = self._planned(tree)
        self._keeps_rare = not sharded and self._rare.next_step()
        self._other_norms = plan.norms if broadcast else self._norms.save(plan.norms)
        self._before.save(plan, self._other_norms, rare=self._keeps_rare)
        self._stamps = [] if self._keeps_rare or sharded else stamps(self._before.rare)
        self._model = tree.model

    def _planned(self, tree: ModuleTree) -> StatePlan:
        trained = frozenset(map(id, self._trained()))
        if self._plan is None or tree is not self._plan.tree or trained != self._plan.trained:
            self._plan = StatePlan(tree, trained)
            if any(isinstance(module, _AVERAGED) for module in self._plan.tree.modules):
                self._rare.seen()  # it moves its weights through `.data`, at intervals
        return self._plan

    def rewind(self) -> None:
        """Keep what the first pass has made of it, and put back what was before."""
        assert self._plan is not None, 'snapshot() comes first'
        # Seen by its stamps, it is too late to put it back for this step's second pass, but not to end as the first.
        self._after.save(self._plan, self._other_norms, rare=self._look_at_rare())
        self._norms.hide()
        self._before.write_back()

    def rewind_again(self) -> None:
        """Put back what was before the first forward, at whatever weights."""
        self._before.write_back(self._trained())

    def restore(self) -> None:
        """Have the state be as the first pass has left it; does nothing before :meth:`rewind`, or a second time."""
        self._norms.show()
        if self._model is not None and not self._after.keeps_rare:
            # What the first pass left alone, the second may have moved: a teacher that was the student's equal.
            self._look_at_rare()
            self._before.write_back_rare()
        self._after.restore()

    def _look_at_rare(self) -> bool:
        """Find out if what is rarely changed has changed since :meth:`snapshot`; returns whether it may have."""
        if self._keeps_rare:
            return self._rare.compare(self._before.rare, self._before.rare_copies())
        if changed := stamped_changed(self._stamps):
            self._rare.seen()
        return changed

    def newly_not_finite(self) -> Tensor | bool:
        """Whether a buffer has now, and had not when it was kept, a number that is not finite.

        Returns:
            A bool on the CPU, elsewhere a scalar of bool: no host synchronisation on an accelerator.
        """
        others = self._before.buffer_pairs
        if not others and self._norms.are_finite():
            return False
        pairs = [*self._norms.pairs, *others]
        floats = [pair for pair in pairs if pair[0].dtype in _FLOATS and pair[0].numel()]
        buffers, copies = [buffer for buffer, _ in floats], [copy for _, copy in floats]
        if not buffers or (buffers[0].device.type == 'cpu' and all_finite(buffers)):
            return False
        return (finite_each(copies) & ~finite_each(buffers)).any()

    def take_back(self) -> None:
        """Have the state be as before the step, which has been made or undone, and forget it."""
        weights = self._trained()
        self._norms.write_back(weights)
        self._before.write_back(weights)
        self.discard()

    def undo(self) -> None:
        """The same after a step that failed, with the weights as they were before it."""
        self._norms.write_back()
        self._before.restore()
        self.discard()

    def discard(self) -> None:
        """Forget everything; memory for what rarely changes stays only where it does."""
        if self._model is None:
            return
        seldom = self._keeps_rare and not self._rare.every_step
        self._norms.drop()
        self._before.drop(release_rare=seldom)
        self._after.drop(release_rare=seldom)
        self._model, self._stamps = None, []
