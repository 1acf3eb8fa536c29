"""AUSAM's draws made in the data loader, so that samples which are not drawn are never read (ours).

By itself :class:`mm_sharp.methods.ausam.AUSAMOptimWrapper` draws K of the N samples of a mini-batch when all N are
loaded, decoded and augmented. It must know how a batch was drawn: it weights samples by their inclusion probabilities
and scales a summed loss by N / K. So draws wait in a queue until the wrapper receives their batches. A checkpoint holds
this queue: the history has changed since those draws were made, so a resumed run could not make them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import BatchSampler, Sampler

from mm_sharp.errors import RECOMMENDED, check_bool
from mm_sharp.samples.dataset_keys import DatasetKeys
from mm_sharp.samples.draw import BatchDraw, BatchDrawer, DrawQueue, LoaderDraw
from mm_sharp.samples.history import Keys
from mm_sharp.samples.schedule import AFTER_RAMP, TrainingLength
from mm_sharp.samples.seeds import RngStream, make_generator

_VERSION = 1
_DROP_LAST = "train_dataloader = dict(batch_sampler=dict(type='{owner}', {name}={example}), ...)"


@DATA_SAMPLERS.register_module()
class AUSAMSampler(BatchSampler):
    """Batch sampler that yields, of every N indices, the K = ceil(sampling_ratio * N) that AUSAM draws.

    Mini-batches, their number and their order are those of :class:`torch.utils.data.BatchSampler`; only the samples
    that are not drawn are missing, and no worker loads them. ``sampling_ratio``, the schedule and the scores are the
    wrapper's: the batches of the first epoch are whole where that says so::

        optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights')
        train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'))

    Args:
        sampler: Yields the data set's indices; MMEngine passes the one of ``train_dataloader``.
        batch_size: N; MMEngine passes the one of ``train_dataloader``.
        drop_last: Leave out the last mini-batch of an epoch if it has fewer than N samples.
    """

    sampler: Any  # MMEngine calls its set_epoch

    def __init__(self, sampler: Sampler[int] | Iterable[int], batch_size: int, drop_last: bool = False) -> None:
        check_bool(type(self).__name__, 'drop_last', drop_last, form=_DROP_LAST)
        knows_epoch = isinstance(getattr(sampler, 'epoch', None), int)
        super().__init__(sampler if knows_epoch else EpochCounter(sampler), batch_size, drop_last)
        self._source: tuple[BatchDrawer, DatasetKeys, int, int] | None = None
        self._length: TrainingLength | None = None
        self._queue = DrawQueue()
        self._resumed: dict[tuple[int, int], LoaderDraw] = {}
        self._asked_too_early = False
        self._to_skip = 0

    def attach(
        self, drawer: BatchDrawer, keys: DatasetKeys, seed: int, rank: int, length: TrainingLength | None = None
    ) -> None:
        """Give it what it draws with, before training; the ``seed`` is the run's.

        It needs the training's ``length`` since workers load ahead: a draw is not made in the step that it is for.
        """
        self._source, self._length = (drawer, keys, seed, rank), length

    def follow(self, loop: Any) -> None:
        """Fit MMEngine's iteration-based ``runner.train_loop``; other loops need nothing.

        That loop starts its workers when it is built, before there is a wrapper: it begins its iteration anew. And a
        resumed one skips the batches that were trained already: nobody will take these. To be called once all is
        attached and loaded, and before the loop's first batch.
        """
        if not isinstance(loop, IterBasedTrainLoop):
            return
        self._to_skip = loop.iter
        if self._asked_too_early and self._source is not None:
            again = type(loop.dataloader_iterator)
            loop.dataloader_iterator = None  # its workers end before the new ones start
            loop.dataloader_iterator = again(loop.dataloader)
            self._asked_too_early = False

    def __iter__(self) -> Iterator[list[int]]:
        """Data set indices of the samples drawn from each mini-batch, in the mini-batch's order."""
        if self._source is None:
            # Whoever loads this gets an error, a worker or not. An error right here would stop iteration-based loops
            # when they are built, too early to know.
            self._asked_too_early = True
            yield _Unreadable()
            return
        append, epoch = self._queue.begin(), int(self.sampler.epoch)
        self._resumed = {place: draw for place, draw in self._resumed.items() if place[0] >= epoch}
        for position, indices in enumerate(super().__iter__()):
            drawn = self._draw(epoch, position, indices)
            if self._to_skip > 0:
                self._to_skip -= 1
            else:
                append(drawn)
            yield [indices[row] for row in drawn.draw.chosen]

    def _draw(self, epoch: int, position: int, indices: Sequence[int]) -> LoaderDraw:
        assert self._source is not None
        drawer, dataset_keys, seed, rank = self._source
        keys = dataset_keys.keys(indices)
        resumed = self._resumed.pop((epoch, position), None)
        # Another batch size or data set since the checkpoint: its draws are of no use.
        if resumed is not None and resumed.fits(keys):
            return resumed
        place = AFTER_RAMP if self._length is None else self._length.place(epoch, position)
        draw = drawer.draw(keys, make_generator(seed, RngStream.SAMPLES_IN_LOADER, rank, epoch, position), place)
        return LoaderDraw(epoch, position, draw, [keys[row] for row in draw.chosen])

    def take(self, keys: Keys) -> BatchDraw:
        """How the batch that arrived with these K keys was drawn: :meth:`mm_sharp.samples.draw.DrawQueue.take`."""
        return self._queue.take(keys)

    def state_dict(self) -> dict[str, Any]:
        """The draws whose batches have not arrived, in plain types and tensors."""
        draws = [*self._queue, *self._resumed.values()]
        return {'version': _VERSION, 'draws': [draw.state_dict() for draw in draws]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Use the draws that :meth:`state_dict` gave on this rank where the iteration comes to their places."""
        if state.get('version') != _VERSION:
            raise ValueError(f"The sampler's version is {state.get('version')!r}: this mm_sharp reads {_VERSION}")
        draws = [LoaderDraw.from_state(draw) for draw in state.get('draws', ())]
        self._resumed = {(draw.epoch, draw.position): draw for draw in draws}


class EpochCounter(Sampler[int]):
    """Adds the epoch, which places the draws, to a sampler that has none, such as torch's own."""

    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # a TypeError of its own where there is no length

    def set_epoch(self, epoch: int) -> None:
        """Called by MMEngine before each epoch; passed on to the sampler if it takes it."""
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)


class _Unreadable(list[int]):
    """A batch whose indices nobody can read; it may travel to another process before somebody tries."""

    def __reduce__(self) -> tuple[type[_Unreadable], tuple[()]]:
        return _Unreadable, ()

    def __iter__(self, _: object = None) -> NoReturn:
        raise RuntimeError(
            'AUSAMSampler draws by the history of AUSAMOptimWrapper, which was not attached to it before the first '
            'batch was loaded. No other optimizer wrapper works with this sampler:\n'
            "    custom_imports = dict(imports=['mm_sharp'])\n"
            f"    optim_wrapper = dict(type='AUSAMOptimWrapper', {RECOMMENDED})\n"
            "    train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'), ...)"
        )

    __getitem__ = __iter__
