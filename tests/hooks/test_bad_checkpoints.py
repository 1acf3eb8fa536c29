"""Checkpoints that do not fit, are damaged or hostile: one clear error, nothing executed, nothing loaded by half."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability import Holds
from tests.tool_runs import Tools, write_toy

METHODS = ('sam', 'esam-history', 'ausam')
SECTION = 'Checkpoints'


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tools:
    return Tools(tmp_path, monkeypatch, capfd)


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By wrapper: a checkpoint of one epoch, written by tools/train.py."""
    files = {}
    patch = pytest.MonkeyPatch()
    for name in (*METHODS, 'plain'):
        folder = tmp_path_factory.mktemp(name)
        config = write_toy(folder / 'config.py', name, train_cfg=dict(by_epoch=True, max_epochs=1))
        Tools(folder, patch)('train', config, '--work-dir', folder)
        files[name] = folder / 'epoch_1.pth'
    patch.undo()
    return files


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f'touch {self.trace}',)


def changed(file: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with something changed in it."""
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, to)
    return to


def cut(file: Path, to: Path, share: float) -> Path:
    """The first part of a file."""
    content = file.read_bytes()
    to.write_bytes(content[: int(share * len(content))])
    return to


# ---------------------------------------------------------------- damaged
@pytest.mark.parametrize('share', [0.0, 0.999])
@pytest.mark.parametrize('way', ['--resume', 'load_from', 'test'])
def test_a_truncated_checkpoint(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], share: float, way: str, holds: Holds
) -> None:
    file = cut(trained['sam'], tmp_path / 'cut.pth', share)
    error = run_way(tools, write_toy(tmp_path / 'config.py'), way, file)
    assert 'cut off' in error
    holds(SECTION, 'cut off', f'tools, {way}', 'one line says so')


@pytest.mark.parametrize('way', ['--resume', 'load_from', 'test'])
def test_a_truncated_checkpoint_in_torchs_old_format(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], way: str, holds: Holds
) -> None:
    whole = tmp_path / 'old.pth'
    torch.save(torch.load(trained['sam'], weights_only=True), whole, _use_new_zipfile_serialization=False)
    config = write_toy(tmp_path / 'config.py')
    for share in (0.01, 0.7):
        error = run_way(tools, config, way, cut(whole, tmp_path / 'cut.pth', share))
        assert "cannot read the checkpoint 'cut.pth'" in error
    holds(SECTION, "cut off, in torch's old format", f'tools, {way}', 'one line says so', count=2)


def run_way(tools: Tools, config: Path, way: str, file: Path | str, *options: str) -> str:
    """Have a tool refuse a checkpoint."""
    if isinstance(file, Path):
        file = file.name
    if way == 'test':
        return tools('test', config.name, file, '--work-dir', 'work', *options, code=2)
    if way == 'load_from':
        return tools('train', config.name, '--work-dir', 'work', *options, '--cfg-options', f'load_from={file}', code=2)
    return tools('train', config.name, '--work-dir', 'work', *options, '--resume', file, code=2)


@pytest.mark.parametrize('content', [[1, 2], torch.zeros(3)])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, tools: Tools, content: Any) -> None:
    torch.save(content, tmp_path / 'other.pth')
    error = run_way(tools, write_toy(tmp_path / 'config.py'), 'load_from', tmp_path / 'other.pth')
    assert f'it holds a {type(content).__name__}, not weights' in error


# ---------------------------------------------------------------- of another model
def _without_head(checkpoint: dict[str, Any]) -> None:
    del checkpoint['state_dict']['head.weight'], checkpoint['state_dict']['norm.running_mean']


def _with_more(checkpoint: dict[str, Any]) -> None:
    checkpoint['state_dict']['neck.weight'] = torch.zeros(1)


def _of_another_size(checkpoint: dict[str, Any]) -> None:
    checkpoint['state_dict']['head.weight'] = torch.zeros(5, 96)


def _renamed(checkpoint: dict[str, Any]) -> None:
    checkpoint['state_dict'] = {f'backbone.{key}': value for key, value in checkpoint['state_dict'].items()}


MODELS: dict[str, tuple[Callable[[dict[str, Any]], None], str, tuple[str, ...]]] = {
    'weights missing': (_without_head, '2 of its weights are missing (', ('--resume', 'test')),
    'weights too many': (_with_more, '1 are not in the model (neck.weight)', ('--resume',)),
    'weights of another shape': (_of_another_size, '1 do not fit (size mismatch for head.weight', ('--resume', 'test')),
    'all weights missing': (_renamed, 'none of the 6 weights of the model', ('load_from',)),
}


@pytest.mark.parametrize('fault', MODELS)
@pytest.mark.parametrize('wrapper', ['sam', 'plain'])
def test_a_checkpoint_of_another_model(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], fault: str, wrapper: str, holds: Holds
) -> None:
    change, message, refused = MODELS[fault]
    file = changed(trained[wrapper], tmp_path / 'other.pth', change)
    config = write_toy(tmp_path / 'config.py', wrapper)
    for way in refused:
        error = run_way(tools, config, way, file)
        assert message in error
        assert "'other.pth'" in error
        holds(SECTION, f'of another model: {fault}', f'tools, {way}, {wrapper}', 'one line names keys')
    allowed = {'--resume', 'load_from', 'test'} - {*refused}
    if 'load_from' in allowed:
        tools('train', config.name, '--work-dir', 'work', '--cfg-options', 'load_from=other.pth')
    if fault == 'weights too many':
        tools('test', config.name, 'other.pth', '--work-dir', 'work')


def _only_bias(checkpoint: dict[str, Any]) -> None:
    state = checkpoint['state_dict']
    checkpoint['state_dict'] = {'head.bias': state['head.bias'], 'head.weight': torch.zeros(5, 96)}


@pytest.mark.parametrize('wrapper', ['sam', 'plain'])
def test_load_from_of_a_part_is_a_warning(tmp_path: Path, tools: Tools, trained: dict[str, Path], wrapper: str) -> None:
    config = write_toy(tmp_path / 'config.py', wrapper)
    changed(trained[wrapper], tmp_path / 'part.pth', _only_bias)
    tools('train', config.name, '--work-dir', 'work', '--cfg-options', 'load_from=part.pth')
    [line] = [line for line in log_of(tmp_path / 'work').splitlines() if 'load_from: ' in line]
    assert 'WARNING' in line
    assert 'load_from: 1 of 6 weights were loaded; without a fitting value in the file: conv.weight, conv.bias' in line
    changed(trained[wrapper], tmp_path / 'whole.pth', lambda checkpoint: None)
    tools('train', config.name, '--work-dir', 'whole', '--cfg-options', 'load_from=whole.pth')
    assert 'weights were loaded' not in log_of(tmp_path / 'whole')


def log_of(folder: Path) -> str:
    """The log of the only run in a work directory."""
    [file] = folder.glob('*/*.log')
    return file.read_text()


@pytest.mark.parametrize('wrapper', ['sam', 'plain'])
def test_resuming_another_model_with_another_optimizer_names_the_model(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], wrapper: str
) -> None:
    file = changed(trained[wrapper], tmp_path / 'other.pth', _renamed)
    config = write_toy(tmp_path / 'config.py', wrapper)
    same = run_way(tools, config, '--resume', file)
    config.write_text(config.read_text() + "\noptim_wrapper['optimizer'] = dict(type='Adam', lr=1e-3)\n")
    error = run_way(tools, config, '--resume', file)
    assert "cannot resume 'other.pth': the checkpoint is of another model: it holds backbone.conv.weight" in error
    assert 'load_from' not in same + error


@pytest.mark.parametrize(
    ('length', 'message'),
    [
        (dict(by_epoch=True, max_epochs=1), 'all 1 epochs are made already: raise train_cfg.max_epochs to go on'),
        (dict(by_epoch=False, max_iters=5), 'all 5 iterations are made already: raise train_cfg.max_iters to go on'),
    ],
)
def test_resuming_a_finished_run_says_that_it_is(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], length: dict[str, Any], message: str
) -> None:
    shutil.copy(trained['sam'], tmp_path / 'end.pth')
    config = write_toy(tmp_path / 'config.py', 'sam', train_cfg=length)
    tools('train', config.name, '--work-dir', 'work', '--resume', 'end.pth')
    assert message in log_of(tmp_path / 'work')
    more = write_toy(tmp_path / 'more.py', 'sam')
    tools('train', more.name, '--work-dir', 'more', '--resume', 'end.pth')
    assert 'are made already' not in log_of(tmp_path / 'more')


# ---------------------------------------------------------------- of another run
@pytest.mark.parametrize(
    ('saved', 'resumed'),
    [('sam', 'ausam'), ('ausam', 'esam-history'), ('esam-history', 'sam')],
)
def test_a_checkpoint_of_another_wrapper(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], saved: str, resumed: str, holds: Holds
) -> None:
    shutil.copy(trained[saved], tmp_path / 'other.pth')
    config = write_toy(tmp_path / 'config.py', resumed)
    error = run_way(tools, config, '--resume', tmp_path / 'other.pth')
    assert "cannot resume 'other.pth': the checkpoint was written by" in error
    assert 'load_from=…' in error
    tools('train', config.name, '--work-dir', 'work', '--cfg-options', 'load_from=other.pth')
    holds(SECTION, f'of {saved}', resumed, 'refused by --resume, its weights taken by load_from')


@pytest.mark.parametrize('wrapper', METHODS)
def test_a_plain_checkpoint_is_resumed_and_ours_by_a_plain_wrapper(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], wrapper: str
) -> None:
    config = write_toy(tmp_path / 'config.py', wrapper)
    shutil.copy(trained['plain'], tmp_path / 'plain.pth')
    shutil.copy(trained[wrapper], tmp_path / 'ours.pth')
    tools('train', config.name, '--work-dir', 'a', '--resume', 'plain.pth')
    assert torch.load(tmp_path / 'a' / 'epoch_2.pth', weights_only=True)['meta']['iter'] == 10
    tools('train', write_toy(tmp_path / 'plain.py', 'plain').name, '--work-dir', 'b', '--resume', 'ours.pth')
    assert torch.load(tmp_path / 'b' / 'epoch_2.pth', weights_only=True)['meta']['iter'] == 10


@pytest.mark.parametrize('wrapper', [*METHODS, 'plain'])
def test_a_checkpoint_of_another_base_optimizer(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], wrapper: str, holds: Holds
) -> None:
    shutil.copy(trained[wrapper], tmp_path / 'sgd.pth')
    config = write_toy(tmp_path / 'config.py', wrapper)
    config.write_text(config.read_text() + "\noptim_wrapper['optimizer'] = dict(type='Adam', lr=1e-3)\n")
    error = run_way(tools, config, '--resume', tmp_path / 'sgd.pth')
    assert "cannot resume 'sgd.pth': the checkpoint's optimizer state is of" in error
    assert 'and the config has Adam' in error
    holds(SECTION, "of another base optimizer (SGD's state for Adam)", wrapper, 'refused by --resume')


def _no_optimizer(checkpoint: dict[str, Any]) -> None:
    del checkpoint['optimizer']


def _no_epoch(checkpoint: dict[str, Any]) -> None:
    checkpoint['meta']['epoch'] = 'one'


def _newer_state(checkpoint: dict[str, Any]) -> None:
    checkpoint['optimizer']['mm_sharp']['version'] = 7


def _newer_history(checkpoint: dict[str, Any]) -> None:
    checkpoint['optimizer']['mm_sharp']['history']['version'] = 7


def _damaged_history(checkpoint: dict[str, Any]) -> None:
    checkpoint['optimizer']['mm_sharp']['history']['data_sets'] = 3


def _damaged_random_state(checkpoint: dict[str, Any]) -> None:
    checkpoint['optimizer']['mm_sharp']['random_state'] = {}


def _newer_log(checkpoint: dict[str, Any]) -> None:
    checkpoint['message_hub']['log_scalars']['x'] = {'__mm_sharp__': 'newer'}


@pytest.mark.parametrize(
    ('wrapper', 'change', 'message'),
    [
        ('sam', _no_optimizer, 'it has no optimizer. Write load_from=…'),
        ('plain', _no_epoch, 'it has no meta.epoch'),
        *((name, _newer_state, 'has version 7, and this mm_sharp reads up to 1: install') for name in METHODS),
        *((name, _newer_history, "version is 7: this mm_sharp reads 1") for name in METHODS[1:]),
        ('ausam', _damaged_history, 'data_sets must be a dict'),
        ('sam', _damaged_random_state, "KeyError: 'numpy'"),
        ('sam', _newer_log, "stands for 'newer', which this version of mm_sharp does not know"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_resumed(
    tmp_path: Path,
    tools: Tools,
    trained: dict[str, Path],
    wrapper: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
    holds: Holds,
) -> None:
    file = changed(trained[wrapper], tmp_path / 'other.pth', change)
    error = run_way(tools, write_toy(tmp_path / 'config.py', wrapper), '--resume', file)
    assert message in error
    assert "cannot resume 'other.pth'" in error
    holds(SECTION, change.__name__.strip('_').replace('_', ' '), wrapper, 'refused by --resume in one line')


# ---------------------------------------------------------------- hostile
@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves the test's folder by HTTP, as the place from which a config's weights come."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch-home'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    thread.join()


def hostile(file: Path, trace: Path, form: str, checkpoint: dict[str, Any]) -> None:
    """A checkpoint that runs code when it is unpickled, in each of the forms that torch.load takes."""
    content = {**checkpoint, 'message_hub': Evil(trace)}
    if form == 'bare pickle':
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == 'zip')


@pytest.mark.parametrize(
    ('place', 'way', 'form'),
    [
        *(('file', way, form) for way in ('--resume', 'load_from', 'test') for form in ('zip', 'old format')),
        *(('url', 'load_from', form) for form in ('zip', 'old format', 'bare pickle')),
        *(('file', 'test', 'bare pickle'), ('url', '--resume', 'zip'), ('url', 'test', 'old format')),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_hostile_checkpoint_runs_nothing(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], address: str, form: str, way: str, place: str, holds: Holds
) -> None:
    trace = tmp_path / 'trace'
    hostile(tmp_path / 'evil.pth', trace, form, torch.load(trained['sam'], weights_only=True))
    where = tmp_path / 'evil.pth' if place == 'file' else f'{address}/evil.pth'
    if place == 'url':  # torch says where it puts what it has loaded, and draws a bar
        tools_error = _last_line(tools, write_toy(tmp_path / 'config.py'), way, str(where))
    else:
        tools_error = run_way(tools, write_toy(tmp_path / 'config.py'), way, where)
    assert 'evil.pth' in tools_error
    assert '--trust-checkpoint' in tools_error
    assert not trace.exists()
    holds(SECTION, f'hostile, by {place}, as {form}', f'tools, {way}', 'nothing executed, one line says so')


def _last_line(tools: Tools, config: Path, way: str, where: str) -> str:
    arguments: dict[str, tuple[str, list[str]]] = {
        '--resume': ('train', ['--resume', where]),
        'load_from': ('train', ['--cfg-options', f'load_from={where}']),
        'test': ('test', [where]),
    }
    name, options = arguments[way]
    return tools(name, config.name, '--work-dir', 'work', *options, code=2, lines=None).splitlines()[-1]


def test_the_hostile_checkpoint_is_one(tmp_path: Path, tools: Tools, trained: dict[str, Path], address: str) -> None:
    """With the user's word, it does what it does: the other tests would pass with a harmless file, too."""
    trace = tmp_path / 'trace'
    config = write_toy(tmp_path / 'config.py')
    hostile(tmp_path / 'evil.pth', trace, 'zip', torch.load(trained['sam'], weights_only=True))
    for where in ('evil.pth', f'{address}/evil.pth'):
        tools('test', config.name, where, '--work-dir', 'work', '--trust-checkpoint')
        assert trace.exists()
        trace.unlink()


def test_a_config_inside_a_checkpoint_is_not_run(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], holds: Holds
) -> None:
    """MMEngine's Runner.resume runs ``meta['config']``, which is text, so that weights_only=True lets it pass."""
    trace = tmp_path / 'trace'

    def with_config(checkpoint: dict[str, Any]) -> None:
        checkpoint['meta']['config'] = f'import pathlib\npathlib.Path({str(trace)!r}).touch()\na = 1\n'

    changed(trained['sam'], tmp_path / 'evil.pth', with_config)
    tools('train', write_toy(tmp_path / 'config.py').name, '--work-dir', 'work', '--resume', 'evil.pth')
    assert not trace.exists()
    assert (tmp_path / 'work' / 'epoch_2.pth').is_file()
    holds(SECTION, 'hostile, by a config in it', 'tools, --resume', 'nothing executed')


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='torch has these switches from 2.6 on')
def test_torchs_switches_are_respected(
    tmp_path: Path, tools: Tools, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_toy(tmp_path / 'config.py')
    shutil.copy(trained['sam'], tmp_path / 'fine.pth')
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    error = run_way(tools, config, 'test', tmp_path / 'fine.pth', '--trust-checkpoint')
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD is set, which forbids it' in error
    tools('test', config.name, 'fine.pth', '--work-dir', 'work')
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.warns(UserWarning, match='TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        tools('test', config.name, 'fine.pth', '--work-dir', 'work')
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
