"""AUSAM's draws made in the data loader, so that samples which are not drawn are never read (ours).

By itself :class:`mm_sharp.methods.ausam.AUSAMOptimWrapper` draws K of the N samples of a mini-batch when all N are
loaded,
decoded and augmented. ``AUSAMSampler`` groups the data set's indices into the same mini-batches, draws from each with
the same probabilities and the same history, and has the workers load the K that were drawn.

The wrapper must know how a batch was drawn: it weights samples by their inclusion probabilities and scales a summed
loss by N / K. So draws wait here until it receives their batches. Workers that load ahead make that queue long, and a
checkpoint holds it: the history has changed since those draws were made, so a resumed run could not make them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import BatchSampler, Sampler

from mm_sharp.errors import UserError
from mm_sharp.samples.draw import BatchDraw, BatchDrawer
from mm_sharp.samples.draw_queue import DrawQueue, LoaderDraw
from mm_sharp.samples.history import Keys
from mm_sharp.samples.seeds import Draw, make_generator

_VERSION = 1


class IndexKeys(Protocol):
    """What finds samples' keys without loading them."""

    def keys(self, indices: Sequence[int], /) -> Keys:
        """The key of each data set index: the data set's name and the sample's id."""


class _Source(NamedTuple):
    """What :meth:`AUSAMSampler.attach` is given."""

    drawer: BatchDrawer
    keys: IndexKeys
    seed: int
    rank: int


@DATA_SAMPLERS.register_module()
class AUSAMSampler(BatchSampler):
    """Batch sampler that yields, of every N indices, the K = ceil(sampling_ratio * N) that AUSAM draws.

    Mini-batches, their number and their order are those of :class:`torch.utils.data.BatchSampler`; only the samples
    that are not drawn are missing. ``sampling_ratio`` and the scores are the wrapper's. A copy, or what was pickled, is
    not attached: its history would be another one.

    Args:
        sampler: Yields the data set's indices; MMEngine passes the one of ``train_dataloader``.
        batch_size: N; MMEngine passes the one of ``train_dataloader``.
        drop_last: Leave out the last mini-batch of an epoch if it has fewer than N samples.

    Raises:
        ValueError: An argument is not of its kind; the message names it and shows the config.

    Example:
        >>> from mm_sharp.samples.ausam_sampler import AUSAMSampler
        >>> from mm_sharp.samples.draw import BatchDrawer
        >>> from mm_sharp.samples.history import SampleHistory
        >>> class Toys:
        ...     def keys(self, indices):
        ...         return [('toys', index) for index in indices]
        >>> sampler = AUSAMSampler(range(10), batch_size=4)
        >>> drawer = BatchDrawer(SampleHistory(), sampling_ratio=0.5, s_min=0.3, s_max=1.0)
        >>> sampler.attach(drawer, Toys(), seed=0, rank=0)
        >>> [len(batch) for batch in sampler]
        [2, 2, 1]

        In a config::

            optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.6,
                                 optimizer=dict(type='Adam', lr=5e-4))
            train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'))
    """

    sampler: Any  # MMEngine calls its set_epoch

    def __init__(self, sampler: Sampler[int] | Iterable[int], batch_size: int, drop_last: bool = False) -> None:
        _check_arguments(sampler, batch_size, drop_last)
        knows_epoch = isinstance(getattr(sampler, 'epoch', None), int)
        super().__init__(sampler if knows_epoch else EpochCounter(sampler), batch_size, drop_last)
        self._detach()

    def _detach(self) -> None:
        self._source: _Source | None = None
        self._queue = DrawQueue()
        self._resumed: dict[tuple[int, int], LoaderDraw] = {}
        self._asked_too_early = False
        self._to_skip = 0

    def __getstate__(self) -> dict[str, Any]:
        return {'sampler': self.sampler, 'batch_size': self.batch_size, 'drop_last': self.drop_last}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._detach()

    # ---------------------------------------------------------------- before training
    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` was called."""
        return self._source is not None

    def attach(self, drawer: BatchDrawer, keys: IndexKeys, seed: int, rank: int) -> None:
        """Give it what it draws with, before training.

        Args:
            drawer: The wrapper's own, with the wrapper's history.
            keys: Finds the keys of the data set's samples.
            seed: The run's seed, >= 0.
            rank: This process's rank.
        """
        self._source = _Source(drawer, keys, seed, rank)

    def follow(self, loop: Any) -> None:
        """Fit MMEngine's iteration-based train loop; other loops need nothing.

        That loop starts its workers when it is built, before there is a wrapper, so that they could not be told what to
        load: it begins its iteration anew. And a resumed one skips the batches that were trained already: nobody will
        take these. To be called once all is attached and loaded, and before the loop's first batch.

        Args:
            loop: ``runner.train_loop``.
        """
        if not isinstance(loop, IterBasedTrainLoop):
            return
        self._to_skip = loop.iter
        if self._asked_too_early and self.attached:
            again = type(loop.dataloader_iterator)
            loop.dataloader_iterator = None  # its workers end before the new ones start
            loop.dataloader_iterator = again(loop.dataloader)
            self._asked_too_early = False

    # ---------------------------------------------------------------- the data loader's side
    def __iter__(self) -> Iterator[list[int]]:
        """Data set indices of the samples drawn from each mini-batch, in the mini-batch's order.

        If it is not :attr:`attached`, there is one batch, whose indices nobody can read: whoever loads it, a worker or
        not, gets a ``RuntimeError``, and so does who asks the data loader for it. An error right here would stop
        iteration-based loops when they are built, too early to know (see :meth:`follow`).
        """
        if self._source is None:
            self._asked_too_early = True
            yield _Unreadable()
            return
        append, epoch = self._queue.begin(), int(self.sampler.epoch)
        self._resumed = {place: draw for place, draw in self._resumed.items() if place[0] >= epoch}
        for position, indices in enumerate(super().__iter__()):
            drawn = self._draw(self._source, epoch, position, indices)
            if self._to_skip > 0:
                self._to_skip -= 1
            else:
                append(drawn)
            yield [indices[row] for row in drawn.draw.chosen]

    def _draw(self, source: _Source, epoch: int, position: int, indices: Sequence[int]) -> LoaderDraw:
        keys = [(str(name), int(number)) for name, number in source.keys.keys(indices)]
        resumed = self._resumed.pop((epoch, position), None)
        # Another batch size or data set since the checkpoint: its draws are of no use.
        if resumed is not None and resumed.fits(keys):
            return resumed
        generator = make_generator(source.seed, Draw.SAMPLES_IN_LOADER, source.rank, epoch, position)
        draw = source.drawer.draw(keys, generator)
        return LoaderDraw(epoch, position, draw, [keys[row] for row in draw.chosen])

    # ---------------------------------------------------------------- the wrapper's side
    def take(self, keys: Keys) -> BatchDraw:
        """How the batch that arrived was drawn; see :meth:`mm_sharp.samples.draw_queue.DrawQueue.take`.

        Args:
            keys: The keys of its K samples.

        Raises:
            RuntimeError: It cannot be one of this sampler's batches.
        """
        return self._queue.take(keys)

    def state_dict(self) -> dict[str, Any]:
        """The draws whose batches have not arrived, in plain types and tensors."""
        draws = [*self._queue, *self._resumed.values()]
        return {'version': _VERSION, 'draws': [draw.state_dict() for draw in draws]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Use the draws of a checkpoint again, where the iteration comes to their places.

        Args:
            state: What :meth:`state_dict` gave on this rank. (Another rank's draws are of other samples, and ignored.)

        Raises:
            ValueError: ``state`` is damaged, or of a newer version. Nothing is changed then.
        """
        if state.get('version') != _VERSION:
            raise ValueError(f"The sampler's version is {state.get('version')!r}: this mm_sharp reads {_VERSION}")
        draws = [LoaderDraw.from_state(draw) for draw in state.get('draws', ())]
        self._resumed = {(draw.epoch, draw.position): draw for draw in draws}


class EpochCounter(Sampler[int]):
    """Adds the epoch, which places the draws, to a sampler that has none, such as torch's own.

    Args:
        sampler: Iterated as it is; its own ``set_epoch``, if it has one, is called as well.
    """

    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # a TypeError of its own where there is no length

    def set_epoch(self, epoch: int) -> None:
        """Called by MMEngine before each epoch."""
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
            'batch was loaded. The two belong together, and no other optimizer wrapper works with this sampler:\n'
            "    custom_imports = dict(imports=['mm_sharp'])\n"
            "    optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.6, optimizer=...)\n"
            "    train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'), ...)"
        )

    __getitem__ = __iter__


def _check_arguments(sampler: object, batch_size: object, drop_last: object) -> None:
    """Raise a ValueError that names the argument unless all are as described in :class:`AUSAMSampler`."""
    iterable = hasattr(sampler, '__iter__') or hasattr(sampler, '__getitem__')
    if not iterable or isinstance(sampler, (str, bytes, Mapping, BatchSampler)):
        example = "dict(sampler=dict(type='DefaultSampler'), batch_sampler=dict(type='AUSAMSampler'), ...)"
        raise _refusal('sampler', sampler, "a sampler that yields the data set's indices", example)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        example = "dict(batch_size=32, batch_sampler=dict(type='AUSAMSampler'), ...)"
        raise _refusal('batch_size', batch_size, 'an integer of at least 1', example)
    if not isinstance(drop_last, bool):
        example = "dict(batch_sampler=dict(type='AUSAMSampler', drop_last=True), ...)"
        raise _refusal('drop_last', drop_last, 'True or False', example)


def _refusal(name: str, value: object, allowed: str, example: str) -> UserError:
    message = f'AUSAMSampler: {name}={value!r} is not allowed: it must be {allowed}'
    return UserError(f'{message}. Write for example: train_dataloader = {example}')
