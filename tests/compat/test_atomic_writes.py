"""Checkpoints are on the disk as a whole or not at all, old ones go last, and nothing is left over."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import checkpoint_hook
from mmengine.runner import FlexibleRunner

from mm_sharp.compat import CheckpointWriteError, atomic_writes
from mm_sharp.compat.atomic_writes import write_atomically
from tests.reliability import Holds
from tests.tiny_runs import PLAIN, SAM, make_runner
from tests.tool_runs import OPTIM_WRAPPERS, Tools, write_toy
from tests.toys import toy_config

SECTION = 'Writing checkpoints'
resource = pytest.importorskip('resource', reason='limits of file sizes')


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tools:
    return Tools(tmp_path, monkeypatch, capfd)


class Events:
    """What happens to files while something runs, in order: ('write', name), ('rename', name), ('remove', name)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        for module, name, kind, position in ((os, 'replace', 'rename', 1), (os, 'remove', 'remove', 0)):
            patch.setattr(module, name, self._noting(getattr(os, name), kind, position))
        patch.setattr(Path, 'unlink', self._noting(Path.unlink, 'remove', 0))
        patch.setattr(atomic_writes.os, 'fsync', self._flushed(os.fsync))

    def _noting(self, function: Callable[..., Any], kind: str, position: int) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if Path(args[position]).exists() or kind == 'rename':
                self.seen.append((kind, Path(args[position]).name))
            return function(*args, **kwargs)

        return wrapper

    def _flushed(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def wrapper(number: int) -> None:
            self.seen.append(('flush', Path(os.readlink(f'/proc/self/fd/{number}')).name))
            fsync(number)

        return wrapper


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='names of open files')
def test_the_old_checkpoint_goes_after_the_new_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
    runner = make_runner(tmp_path, default_hooks=hooks)
    events = Events(monkeypatch)
    runner.train()
    seen = [event for event in events.seen if 'epoch' in event[1] or 'last' in event[1]]
    written = [
        [('flush', f'.{name}.{os.getpid()}.partial'), ('rename', name)]
        for name in ('epoch_1.pth', 'last_checkpoint', 'epoch_2.pth', 'last_checkpoint')
    ]
    assert seen == [*chain(*written), ('remove', 'epoch_1.pth')]
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_2.pth')


def test_best_checkpoints_are_replaced_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 2.0])
    monkeypatch.setattr('tests.tiny_runs.Mean.compute_metrics', lambda self, results: {'mean': next(scores)})
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='mean', rule='greater'))
    loader = make_runner(tmp_path / 'x').test_dataloader
    kwargs = dict(val_dataloader=loader, val_cfg={}, val_evaluator=make_runner(tmp_path / 'y').test_evaluator)
    runner = make_runner(tmp_path / 'run', default_hooks=hooks, **kwargs)
    there: list[set[str]] = []
    put = atomic_writes.write_atomically

    def spy(content: bytes, path: str) -> None:
        put(content, path)
        there.append({file.name for file in (tmp_path / 'run').glob('best*')})

    monkeypatch.setattr(atomic_writes, 'write_atomically', spy)
    runner.train()
    assert {'best_mean_epoch_1.pth', 'best_mean_epoch_2.pth'} in there, 'both, until all is written'
    assert [file.name for file in (tmp_path / 'run').glob('best*')] == ['best_mean_epoch_2.pth']


def test_other_runs_write_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError('not our run')

    before = LocalBackend.put, LocalBackend.remove, LocalBackend.rmtree, dict(vars(checkpoint_hook))
    monkeypatch.setattr(atomic_writes, 'write_atomically', refuse)
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
    make_runner(tmp_path / 'plain', PLAIN, default_hooks=hooks).train()
    assert sorted(file.name for file in (tmp_path / 'plain').glob('*.pth')) == ['epoch_2.pth']
    with pytest.raises(AssertionError, match='not our run'):
        make_runner(tmp_path / 'ours', SAM, default_hooks=hooks).train()
    assert (LocalBackend.put, LocalBackend.remove, LocalBackend.rmtree, dict(vars(checkpoint_hook))) == before


@pytest.mark.parametrize('wrapper', ['sam', 'plain'])
@pytest.mark.filterwarnings('ignore:.*FlexibleRunner')
def test_flexible_runner(tmp_path: Path, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put = atomic_writes.write_atomically
    monkeypatch.setattr(
        atomic_writes, 'write_atomically', lambda data, path: (written.append(Path(path).name), put(data, path))
    )
    config = toy_config(
        tmp_path,
        optim_wrapper=OPTIM_WRAPPERS[wrapper],
        custom_hooks=[],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)),
    )
    FlexibleRunner(**config).train()
    names = ['epoch_1.pth', 'last_checkpoint', 'epoch_2.pth', 'last_checkpoint']
    assert written == (names if wrapper == 'sam' else [])
    assert sorted(file.name for file in tmp_path.glob('*.pth')) == ['epoch_2.pth']
    if wrapper == 'sam':
        changes = dict(resume=True, train_cfg=dict(by_epoch=True, max_epochs=3), experiment_name='flexible-resumed')
        FlexibleRunner(**{**config, **changes}).train()
        assert torch.load(tmp_path / 'epoch_3.pth', weights_only=True)['meta']['iter'] == 15


def test_what_was_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / 'epoch_9.pth').mkdir()
    (tmp_path / '.cache.partial').mkdir()  # another program's
    left = [tmp_path / '.epoch_1.pth.123.partial', tmp_path / 'epoch_9.pth' / '.rank0.pth.4.partial']
    kept = [tmp_path / name for name in ('epoch_1.pth', 'my.partial', '.hidden', '.data.zip.partial')]
    for file in (*left, *kept):
        file.write_text('x')
    make_runner(tmp_path).train()
    assert [file.exists() for file in (*left, *kept)] == [False, False, True, True, True, True]


@pytest.mark.parametrize('full', [True, False])
def test_of_sharded_weights_all_ranks_have_written_before_the_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    order: list[str] = []

    class Sharded:
        hooks = (atomic_writes.AtomicWritesHook(),)
        strategy = SimpleNamespace(_is_full_state_dict=lambda: full)

        def save_checkpoint(self) -> None:
            LocalBackend().put(b'shard', tmp_path / 'epoch_1.pth' / 'rank0.pth')
            order.append('saved')

    monkeypatch.setattr(atomic_writes, 'barrier', lambda: order.append('all have'))
    atomic_writes._atomic(Sharded.save_checkpoint)(Sharded())
    assert order == ['saved'] + ['all have'] * (not full)
    assert [file.name for file in (tmp_path / 'epoch_1.pth').iterdir()] == ['rank0.pth']


# ---------------------------------------------------------------- one file
def test_a_file_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / 'folder' / 'file'
    for content in (b'one', b'', b'three'):
        write_atomically(content, file)
        assert file.read_bytes() == content
    assert os.listdir(file.parent) == ['file']


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / 'store').mkdir()
    (tmp_path / 'store' / 'file').write_text('old')
    (tmp_path / 'link').symlink_to(tmp_path / 'store' / 'file')
    write_atomically(b'new', tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'store' / 'file').read_bytes() == b'new'


@pytest.mark.parametrize('point', ['write', 'fsync', 'replace'])
@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt(), MemoryError()]
)
def test_what_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, error: BaseException, holds: Holds
) -> None:
    file = tmp_path / 'file'
    write_atomically(b'old', file)

    def fail(*args: object) -> None:
        raise error

    if point == 'write':

        class Full:
            def __init__(self, stream: Any) -> None:
                self.write, self.close = fail, stream.close

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *args: object) -> None:
                self.close()

        original = Path.open
        monkeypatch.setattr(Path, 'open', lambda self, mode: Full(original(self, mode)))
    else:
        monkeypatch.setattr(os, point, fail)
    with pytest.raises(CheckpointWriteError if isinstance(error, OSError) else type(error)) as caught:
        write_atomically(b'new', file)
    monkeypatch.undo()
    assert file.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['file']
    if isinstance(caught.value, CheckpointWriteError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    holds(SECTION, f'{type(error).__name__} in {point}', 'a file', 'the old one is whole, nothing is left over')


def test_removals_wait_and_spare_what_is_new(tmp_path: Path) -> None:
    backend = LocalBackend()
    for name in ('a', 'b', 'folder/c'):
        backend.put(b'old', tmp_path / name)
    with atomic_writes.atomic_writes():
        backend.remove(tmp_path / 'a')
        backend.remove(tmp_path / 'b')
        backend.rmtree(tmp_path / 'folder')
        backend.remove(tmp_path / 'missing')
        backend.put(b'new', tmp_path / 'a')
        assert (tmp_path / 'b').exists()
        assert (tmp_path / 'folder').exists()
    assert os.listdir(tmp_path) == ['a']
    with pytest.raises(RuntimeError), atomic_writes.atomic_writes():  # noqa: PT012
        backend.remove(tmp_path / 'a')
        raise RuntimeError('while saving')
    assert (tmp_path / 'a').read_bytes() == b'new'
    backend.remove(tmp_path / 'a')
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- a full disk
@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within, a write beyond ``size`` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('wrapper', ['sam', 'esam-history', 'ausam', 'plain'])
def test_a_full_disk(tmp_path: Path, tools: Tools, wrapper: str, holds: Holds) -> None:
    """max_keep_ckpts=1: there is no checkpoint but the previous one."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN, 'as Python has it: a write fails instead'
    config = write_toy(tmp_path / 'config.py', wrapper).name
    tools('train', config, '--work-dir', 'straight')
    tools('train', config, '--work-dir', 'work', '--cfg-options', 'train_cfg.max_epochs=1')
    previous = (tmp_path / 'work' / 'epoch_1.pth').read_bytes()
    with files_of_at_most(len(previous) // 2):
        error = tools('train', config, '--work-dir', 'work', '--resume', code=1)
    assert error.startswith(f"train.py: error: cannot write '{tmp_path / 'work' / 'epoch_2.pth'}': File too large")
    assert f'make room, and go on from {tmp_path / "work" / "epoch_1.pth"} with --resume' in error
    assert (tmp_path / 'work' / 'epoch_1.pth').read_bytes() == previous
    assert sorted(file.name for file in (tmp_path / 'work').glob('*.p*')) == ['config.py', 'epoch_1.pth']
    assert not list((tmp_path / 'work').glob('.*'))
    tools('train', config, '--work-dir', 'work', '--resume')
    left, right = (torch.load(tmp_path / name / 'epoch_2.pth', weights_only=True) for name in ('straight', 'work'))
    assert all(torch.equal(left['state_dict'][key], right['state_dict'][key]) for key in left['state_dict'])
    assert [file.name for file in (tmp_path / 'work').glob('*.pth')] == ['epoch_2.pth']
    holds(SECTION, 'disk full, max_keep_ckpts=1', wrapper, 'one line; the previous checkpoint is whole and resumed')


def test_a_full_disk_before_the_first_checkpoint(tmp_path: Path, tools: Tools) -> None:
    config = write_toy(tmp_path / 'config.py').name
    with files_of_at_most(6000):
        error = tools('train', config, '--work-dir', 'work', code=1)
    assert 'there is no checkpoint yet' in error
    assert not list((tmp_path / 'work').glob('*.pth'))


def test_mmengine_has_what_is_wrapped() -> None:
    """A version of MMEngine that renames one would write unsafely without a word."""
    assert all(hasattr(getattr(kind, name), '__wrapped__') for kind, name in atomic_writes._METHODS)
