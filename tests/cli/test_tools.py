"""The command lines: training, resuming, testing, several processes, and errors of one line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import load_checkpoint

from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import careful_loading, last_checkpoint
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError, UserError
from tests.conftest import ROOT
from tests.distributed import free_port
from tests.tiny_data import NARROW_RECIPE, draw_coco
from tests.tool_runs import PLAIN, SAM, Tools, configure, run

WITHOUT_FRAGMENT = ['sam.py', '--cfg-options', 'sharp_optim_wrapper=None']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the drawn people and the configs ``sam.py`` and ``plain.py``."""
    folder = tmp_path_factory.mktemp('tiny')
    data = draw_coco(folder / 'people')
    for name, base in (('sam', SAM), ('plain', PLAIN)):
        (folder / f'{name}.py').write_text(NARROW_RECIPE.format(base=base, data=data, width=8))
    return folder


@pytest.fixture(scope='module')
def trained(tiny: Path) -> Path:
    """The work directory of a training run of one epoch, two steps."""
    with pytest.MonkeyPatch.context() as patch:
        # A process keeps one visualizer of each name.
        Tools(tiny, patch)('train', 'sam.py', '--cfg-options', 'visualizer.name=first')
    return tiny / 'work_dirs' / 'sam'


def logged(work_dir: Path) -> list[dict[str, Any]]:
    """The training steps in the JSON log of the only run in a work directory."""
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [line for line in map(json.loads, log.read_text().splitlines()) if 'loss' in line]


def test_training_writes_checkpoints_and_logs(trained: Path) -> None:
    assert (trained / 'epoch_1.pth').is_file()
    assert (trained / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    assert len(list(trained.glob('best_coco_AP_*.pth'))) == 1
    steps = logged(trained)
    assert [line['step'] for line in steps] == [1, 2]
    assert all(line['sharpness/L_w_e'] != line['sharpness/L_w'] for line in steps)
    assert Config.fromfile(trained / 'sam.py').optim_wrapper.type == 'SAMOptimWrapper'


@pytest.fixture
def within(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tools:
    """Runs tools in this process, in the folder of ``tiny``."""
    return Tools(tiny, monkeypatch, capsys)


def test_a_run_with_the_base_optimizer_is_tested_and_resumed_without_trust(tiny: Path, within: Tools) -> None:
    """A comparison run started by our tool is served by our tools, though its config uses nothing of ours."""
    checkpoint = tiny / 'work_dirs' / 'plain' / 'epoch_1.pth'
    within('train', 'plain.py', '--no-validate', '--cfg-options', 'visualizer.name=trained')
    within('test', 'plain.py', checkpoint, '--cfg-options', 'visualizer.name=tested')
    longer = '--cfg-options', 'visualizer.name=longer', 'train_cfg.max_epochs=2'
    within('train', 'plain.py', '--no-validate', '--resume', *longer)
    *_, log = sorted((tiny / 'work_dirs' / 'plain').glob('*/*.log'))
    assert 'resumed epoch: 1' in log.read_text()


def test_resuming_goes_on_from_the_last_checkpoint(trained: Path, tiny: Path, within: Tools) -> None:
    work_dir = tiny / 'resumed'
    work_dir.mkdir()
    for name in ('epoch_1.pth', 'last_checkpoint'):  # which names the file in the old folder
        shutil.copy(trained / name, work_dir)
    within(
        'train', 'sam.py', '--resume', '--work-dir', work_dir, '--show-dir', 'people', '--interval', 1,
        '--cfg-options', 'train_cfg.max_epochs=2', 'visualizer.name=resumed',
    )  # fmt: skip
    assert [line['step'] for line in logged(work_dir)] == [3, 4]
    assert (work_dir / 'epoch_2.pth').is_file()
    assert list(work_dir.glob('*/people/val_img_*.png'))


def test_testing_writes_metrics_predictions_and_pictures(trained: Path, tiny: Path, within: Tools) -> None:
    within(
        'test', 'sam.py', trained / 'epoch_1.pth', '--work-dir', 'tested', '--out', 'results/metrics.json',
        '--dump', 'predictions.pkl', '--show-dir', 'pictures', '--cfg-options', 'visualizer.name=pictures',
    )  # fmt: skip
    metrics = json.loads((tiny / 'results' / 'metrics.json').read_text())
    assert {'coco/AP', 'coco/AR', 'PCK'} <= metrics.keys()
    assert 0 <= metrics['PCK'] <= 1
    assert within.printed.splitlines()[-1].split() == ['PCK', f'{metrics["PCK"]:.4f}']
    assert len(pickle.loads((tiny / 'predictions.pkl').read_bytes())) == 4
    pictures = sorted((tiny / 'tested').glob('*/pictures/*.png'))
    assert len(pictures) == 4
    assert f'Pictures: {pictures[0].parent}' in within.printed


@pytest.mark.slow
def test_training_and_testing_by_the_command_line(tiny: Path) -> None:
    run('tools/train.py', 'sam.py', '--work-dir', 'program', cwd=tiny)
    assert [line['step'] for line in logged(tiny / 'program')] == [1, 2]
    done = run('tools/test.py', 'sam.py', 'program/epoch_1.pth', cwd=tiny)
    assert done.stdout.splitlines()[-1].startswith('PCK')


@pytest.mark.slow
def test_two_processes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dist_train.sh and dist_test.sh over gloo; float16, scaled learning rate and no validation on the way."""
    monkeypatch.setenv('PORT', str(free_port()))
    done = run(
        'tools/dist_train.sh', 'sam.py', 2, '--amp', '--auto-scale-lr', '--no-validate', '--work-dir', 'two',
        '--cfg-options', 'optim_wrapper.dtype=float16', cwd=tiny,
    )  # fmt: skip
    assert 'batch size of 16 and the current batch size is 8' in done.stdout
    assert 'Epoch(val)' not in done.stdout
    assert [line['step'] for line in logged(tiny / 'two')] == [1]  # 8 pictures, 4 a process
    assert 'scaler' in str(torch.load(tiny / 'two' / 'epoch_1.pth')['optimizer'].keys())
    run('tools/dist_test.sh', 'sam.py', 'two/epoch_1.pth', 2, '--out', 'two.json', cwd=tiny)
    assert 'PCK' in json.loads((tiny / 'two.json').read_text())


ENDING = f"""
import pathlib, runpy
main = runpy.run_path({str(ROOT / 'tools' / 'train.py')!r}, run_name='tool')['main']
from mm_sharp.cli import options as cli
def threads():
    print(sorted(file.read_text().strip() for file in pathlib.Path('/proc/self/task').glob('*/comm')))
def train(arguments):
    main(arguments)
    threads()
assert cli.run_tool(train) == 0
threads()
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the names of threads in /proc')
@pytest.mark.slow
def test_the_process_group_ends_with_the_tool(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of gloo's that outlives the tool can abort the process while the interpreter shuts down.

    The group lives as long as anything holds it: a runner does, and torch.distributed.nn.functional would, for ever, if
    it were first imported while there is a group (its functions have the default group as an argument's default).
    """
    place = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), RANK='0', LOCAL_RANK='0', WORLD_SIZE='1')
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    (tiny / 'ending.py').write_text(ENDING)
    done = run(str(tiny / 'ending.py'), 'sam.py', '--no-validate', '--launcher', 'pytorch', '--work-dir', 'g', cwd=tiny)
    within, after = done.stdout.splitlines()[-2:]
    assert 'gloo_runloop' in within
    assert 'gloo' not in after


@pytest.mark.parametrize(
    ('backend', 'error', 'ends'),
    [('gloo', None, True), ('nccl', None, False), ('gloo', UsageError, False), ('gloo', RuntimeError, False)],
)
def test_the_group_of_a_tool_that_failed_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, backend: str, error: type[Exception] | None, ends: bool
) -> None:
    """Its threads may wait for other processes; and the error is what the user must see."""
    ended: list[bool] = []
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_backend', lambda: backend)
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: ended.append(True))
    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])

    def tool(arguments: Sequence[str]) -> None:
        if error is not None:
            raise error('what went wrong')

    if error is RuntimeError:
        with pytest.raises(RuntimeError, match='what went wrong'):
            cli.run_tool(tool)
    else:
        assert cli.run_tool(tool) == (0 if error is None else 2)
    assert bool(ended) == ends


@pytest.mark.slow
def test_an_error_is_one_line(tiny: Path) -> None:
    done = run('tools/train.py', 'sam.py', '--cfg-options', 'optim_wrapper.type=SAMOptimWraper', cwd=tiny, code=2)
    assert len(done.stderr.splitlines()) == 1
    assert "did you mean 'SAMOptimWrapper'?" in done.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(arguments: Sequence[str]) -> None:
        raise UsageError('two\nlines')

    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])
    assert cli.run_tool(broken) == 2
    assert capsys.readouterr().err == 'train.py: error: two lines\n'
    monkeypatch.setattr(sys, 'argv', ['tools/train.py', '--debug'])
    with pytest.raises(UsageError):
        cli.run_tool(broken)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'required: config; write '),
        (['nowhere.py'], "no config file 'nowhere.py'"),
        ([SAM], 'make_demo_data'),
        (['sam.py', '--nonsense'], 'unrecognized arguments: --nonsense'),
        (['sam.py', '--cfg-options', 'rho'], "'rho' is not of the form KEY=VALUE"),
        (['sam.py', '--cfg-options', 'model..depth=1'], 'is not of the form KEY=VALUE'),
        (['sam.py', '--cfg-options', 'x=[(1]'], 'Imbalanced brackets'),
        (['sam.py', '--cfg-options', 'optim_wraper.rho=1'], "did you mean 'optim_wrapper'"),
        (['sam.py', '--cfg-options', 'model.backbone.depth.x=1'], 'does not fit the config'),
        (['sam.py', '--cfg-options', 'optim_wrapper.rho=-1'], 'rho=-1 is not allowed'),
        (
            ['sam.py', '--cfg-options', 'optim_wrapper.type=OptimWrapper'],
            'or sharp_optim_wrapper=None to train',
        ),
        (
            [*WITHOUT_FRAGMENT, 'optim_wrapper.type=OptimWrapper'],
            "OptimWrapper: rho=0.05, adaptive=False, perturb='auto' is not allowed: it has no such argument, SAMOptim",
        ),
        (['sam.py', '--cfg-options', 'optim_wrapper.rhoo=1'], 'rhoo'),
        (
            [*WITHOUT_FRAGMENT, 'optim_wrapper.type=OptimWrapper', 'optim_wrapper.sampling_ratio=0.5'],
            "dict(type='AUSAMOptimWrapper', rho=0.05, adaptive=False, perturb='auto', sampling_ratio=0.5, ...)",
        ),
        (['sam.py', '--cfg-options', 'optim_wrapper.type=ESAMOptimWrapper', 'optim_wrapper.beta=0'], 'beta=0 is not'),
        (
            [
                'sam.py',
                '--cfg-options',
                'train_dataloader.batch_sampler.type=AUSAMSampler',
                'optim_wrapper.type=AUSAMOptimWrapper',
            ],
            "drop_last=False, batch_sampler=dict(type='AUSAMSampler', drop_last=True)",
        ),
        (
            ['sam.py', '--cfg-options', 'train_dataloader.sampler.type=AUSAMSampler'],
            'train_dataloader.sampler: AUSAMSampler is a batch sampler',
        ),
        (['sam.py', '--cfg-options', 'train_dataloader.dataset.ann_file=no.json'], 'no.json'),
        (['sam.py', '--cfg-options', 'val_evaluator.0.ann_file=no.json'], 'val_evaluator.ann_file'),
        (['sam.py', '--cfg-options', 'load_from=no.pth'], "load_from: no checkpoint 'no.pth'"),
        (['sam.py', '--resume', 'no.pth'], "--resume: no checkpoint 'no.pth'"),
        (['sam.py', '--resume', 'sam.py'], 'cut off, or no checkpoint'),
        (['sam.py', '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'], 'auto_scale_lr = dict(base_batch_size'),
        (['sam.py', '--launcher', 'pytorch'], 'dist_train.sh'),
        (['sam.py', '--work-dir', 'sam.py'], "the folder 'sam.py' cannot be made"),
        (['twice.py'], 'keep one of these entries of _base_'),
        (['imports.py'], "(in place of a method's fragment: optim_wrapper = dict(type='SAMOptimWrapper', rho=0.02"),
        (['torn.py'], 'SyntaxError'),
        (['foreign.py'], 'Failed to import no_such_module'),
    ],
)
def test_what_is_wrong_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], message: str) -> None:
    monkeypatch.chdir(tiny)
    monkeypatch.delenv('RANK', raising=False)
    (tiny / 'twice.py').write_text(f"_base_ = ['{SAM}', '{PLAIN}']")
    (tiny / 'imports.py').write_text(f"_base_ = ['{ROOT}/configs/lsp/_base_/lsp.py', 'mm_sharp::_base_/sam.py']")
    (tiny / 'torn.py').write_text('model = dict(')
    (tiny / 'foreign.py').write_text("custom_imports = dict(imports=['no_such_module'])")
    with pytest.raises(UsageError) as caught:
        configure('train', *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['sam.py'], 'required: checkpoint'),
        (['sam.py', 'no.pth'], "no checkpoint 'no.pth'"),
        (['sam.py', 'no.pth', '--out', 'metrics.txt'], 'must end in .json'),
        (['sam.py', 'no.pth', '--dump', 'predictions.json'], 'must end in .pkl'),
        (['sam.py', 'no.pth', '--cfg-options', 'test_evaluator=None'], 'nothing to test'),
    ],
)
def test_what_is_wrong_with_a_test_is_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], message: str
) -> None:
    monkeypatch.chdir(tiny)
    with pytest.raises(UsageError) as caught:
        configure('test', *arguments)
    assert message in str(caught.value)


def test_pictures_are_found_where_a_recipe_leaves_their_paths_out() -> None:
    cfg = Config.fromfile(ROOT / 'configs' / 'lsp' / 'simcc_res18-quarter_b32-20e_lsp-64x48.py')
    before = deepcopy(cfg.test_dataloader)
    cli.show_predictions(cfg, argparse.Namespace(show=False, show_dir=None))
    assert cfg.test_dataloader == before
    cli.show_predictions(cfg, argparse.Namespace(show=False, show_dir='pictures'))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[-1].meta_keys == (*before.dataset.pipeline[-1].meta_keys, 'img_path')


def test_where_a_test_writes_is_checked_before_it_starts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    torch.save({'state_dict': {}}, 'any.pth')
    for option, file in (('--work-dir', 'sam.py'), ('--out', 'sam.py/metrics.json'), ('--dump', 'sam.py/all.pkl')):
        with pytest.raises(UsageError, match=r"the folder 'sam\.py' cannot be made"):
            configure('test', 'sam.py', 'any.pth', option, file)


def test_options_reach_the_config(tiny: Path, tmp_path: Path) -> None:
    cfg = configure(
        'train', tiny / 'sam.py', '--work-dir', tmp_path, '--no-validate', '--auto-scale-lr', '--show', '--wait-time',
        2, '--interval', 5, '--cfg-options', 'optim_wrapper.rho=0.2', 'randomness.seed=7',
    )  # fmt: skip
    assert cfg.work_dir == str(tmp_path)
    assert (cfg.val_cfg, cfg.val_dataloader, cfg.val_evaluator) == (None, None, None)
    assert cfg.auto_scale_lr.enable
    assert (cfg.optim_wrapper.rho, cfg.randomness.seed) == (0.2, 7)
    hook = cfg.default_hooks.visualization
    assert (hook.enable, hook.show, hook.wait_time, hook.interval) == (True, True, 2.0, 5)


OF_ITS_OWN = ['--cfg-options', 'optim_wrapper.dtype=']


@pytest.mark.parametrize(
    ('device', 'options', 'dtype', 'said'),
    [
        ('cpu', ['--amp'], 'bfloat16', "--amp: optim_wrapper.dtype='bfloat16', since"),
        ('cpu', ['--amp', OF_ITS_OWN[0], OF_ITS_OWN[1] + 'bfloat16'], 'bfloat16', ''),
        (
            'cpu',
            ['--amp', OF_ITS_OWN[0], OF_ITS_OWN[1] + 'float16'],
            'float16',
            "optim_wrapper.dtype='float16': the CPU",
        ),
        ('cpu', [OF_ITS_OWN[0], OF_ITS_OWN[1] + 'float16'], 'float16', "optim_wrapper.dtype='float16': the CPU"),
        ('cpu', [], None, ''),
        ('cuda', ['--amp'], 'float16', ''),
    ],
)
def test_amp_sets_our_dtype(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
    options: list[str],
    dtype: str | None,
    said: str,
) -> None:
    """The CPU does float16 in software, 15 to 23 times slower than float32."""
    monkeypatch.setattr(preflight, 'get_device', lambda: device)
    if device == 'cuda':  # there may be none to build a wrapper on
        monkeypatch.setattr(preflight, 'check_training', lambda cfg: None)
    assert configure('train', tiny / 'sam.py', *options).optim_wrapper.get('dtype') == dtype
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert out.count('\n') == bool(said)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_amp_with_the_plain_wrapper(tiny: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    cfg = Config.fromfile(tiny / 'plain.py')
    monkeypatch.setattr(preflight, 'get_device', lambda: device)
    if device == 'cpu':
        with pytest.raises(
            UsageError, match=r"needs a GPU: leave out --amp, or .* optim_wrapper=dict\(type='SAMOptimWrapper'"
        ):
            preflight.enable_amp(cfg)
        return
    preflight.enable_amp(cfg)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')


@pytest.mark.parametrize(('device', 'dtype'), [('cpu', 'bfloat16'), ('cuda', 'float16')])
def test_amp_with_several_wrappers(monkeypatch: pytest.MonkeyPatch, device: str, dtype: str) -> None:
    monkeypatch.setattr(preflight, 'get_device', lambda: device)
    sam, bfloat = {'type': 'SAMOptimWrapper'}, {'type': 'SAMOptimWrapper', 'dtype': 'bfloat16'}
    cfg = Config({'optim_wrapper': {'constructor': 'OnesOwn', 'generator': sam, 'critic': bfloat}})
    preflight.enable_amp(cfg)
    assert (cfg.optim_wrapper.generator.dtype, cfg.optim_wrapper.critic.dtype) == (dtype, 'bfloat16')
    other = Config({'optim_wrapper': {'type': 'ApexOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 1}}})
    with pytest.raises(UsageError, match='ApexOptimWrapper'):
        preflight.enable_amp(other)


def test_resume_without_a_checkpoint_starts_from_the_beginning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / 'start.pth'
    torch.save({'state_dict': {}}, start)
    cfg = configure(
        'train', tiny / 'sam.py', '--resume', '--work-dir', tmp_path / 'none', '--cfg-options', f'load_from={start}'
    )
    assert 'starts from the beginning' in capsys.readouterr().out
    assert (cfg.get('resume', False), cfg.load_from) == (False, str(start))


def test_resume_passes_over_a_torn_checkpoint(tmp_path: Path) -> None:
    """A run can be killed while it writes a checkpoint, or between the checkpoint and the file that names it."""
    first, second = tmp_path / 'epoch_1.pth', tmp_path / 'epoch_2.pth'
    torch.save({'weights': torch.zeros(1000)}, first)
    second.write_bytes(first.read_bytes()[:2000])
    os.utime(first, (1, 1))
    for named in (str(second), '', None):
        (tmp_path / 'last_checkpoint').unlink(missing_ok=True)
        if named is not None:
            (tmp_path / 'last_checkpoint').write_text(named)
        assert last_checkpoint(str(tmp_path)) == str(first)
    assert last_checkpoint(str(tmp_path / 'nowhere')) is None


def test_of_checkpoints_written_at_one_tick_of_the_clock_the_later_is_the_newest(tmp_path: Path) -> None:
    for number in (10, 9, 11, 2):
        file = tmp_path / f'epoch_{number}.pth'
        torch.save({}, file)
        os.utime(file, (1, 1))
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_11.pth')
    os.utime(tmp_path / 'epoch_2.pth', (2, 2))
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_2.pth')


def test_a_checkpoint_that_is_more_than_data_needs_trust(tmp_path: Path) -> None:
    file = tmp_path / 'foreign.pth'
    model = torch.nn.Linear(2, 1)
    torch.save({'state_dict': model.state_dict(), 'message_hub': {'loss': HistoryBuffer()}}, file)

    def load() -> Any:
        return load_checkpoint(model, str(file))

    with pytest.raises(UserError, match=r'foreign\.pth.*--trust-checkpoint'):
        careful_loading(False)(load)()
    assert 'message_hub' in careful_loading(True)(load)()


@pytest.mark.parametrize(
    ('error', 'rank', 'line'),
    [
        (UsageError('no such file'), '0', 'train.py: error: no such file\n'),
        (UsageError('no such file'), '1', ''),
        (UserError('sample 7 has no id'), '0', 'train.py: error: sample 7 has no id\n'),
        (UserError('sample 7 has no id'), '1', '[rank 1] train.py: error: sample 7 has no id\n'),
    ],
)
def test_which_process_says_what_is_wrong(
    error: Exception, rank: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config is wrong in all of them, a sample maybe in one."""

    def broken(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setenv('LOCAL_RANK', rank)
    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])
    assert cli.run_tool(broken) == 2
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback() -> None:
    def broken() -> None:
        raise RuntimeError('a bug')

    with pytest.raises(RuntimeError, match='a bug'):
        careful_loading(False)(broken)()


@pytest.mark.parametrize('script', sorted(path.name for path in (ROOT / 'tools').glob('*.sh')))
def test_scripts_say_how_to_call_them(script: str, tmp_path: Path) -> None:
    assert run(f'tools/{script}', cwd=tmp_path, code=2).stderr.startswith('usage: ')


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match=r"the folder '.*file/results' cannot be made \(.*\): give another one"):
        cli.output_folder(tmp_path / 'file' / 'results')
    assert cli.output_folder(tmp_path / 'a' / 'b').is_dir()
    assert not list((tmp_path / 'a' / 'b').iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # root, whom tests may run as, can write everywhere
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(cli, 'TemporaryFile', refuse)
    with pytest.raises(UsageError, match=r"the folder '.*' cannot be written to \(Permission denied\)"):
        cli.output_folder(tmp_path)
