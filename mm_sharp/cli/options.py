"""What the command lines in ``tools/`` share: their options, and errors of one line that say what to do.

These are for a mistake of the user's, a full disk and Ctrl-C; ``--debug`` shows the traceback instead. Everything else
is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.runner import Runner

from mm_sharp.cli.loading import one_line
from mm_sharp.cli.process import end_process_group, end_with_parent, ending
from mm_sharp.config import fragments
from mm_sharp.errors import RECOMMENDED, UsageError, UserError, closest, in_folder, is_number

# Top-level keys that MMEngine's Runner and MMPose's tools read from the config without being arguments of the Runner.
_OTHER_KEYS = {
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'preprocess_cfg', 'runner_type', 'strategy', 'sync_bn'),
}
# Warnings of MMEngine's and MMPose's that no user can do anything about.
_HARMLESS = ('pkg_resources is deprecated', 'The metainfo config file .* does not exist')


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError` instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r'^argument (\S+): (.*: it must)', r'\1 \2', message)
        of_the_call = message.startswith(('the following arguments are required', 'unrecognized arguments'))
        call = f'; write {self._shortest_call()}' if of_the_call else ''
        raise UsageError(f'{message}{call} (all options: {self.prog} --help)')

    def _shortest_call(self) -> str:
        call = [self.prog]
        for action in self._actions:
            if action.required:
                value = action.metavar or action.dest.upper()
                call += [action.option_strings[0]] if action.option_strings else []
                call += [value if isinstance(value, str) else value[0], *(['...'] if action.nargs == '+' else [])]
        return ' '.join([*call, '[OPTIONS]'])


def output_folder(path: str | Path) -> Path:
    """Make a folder for results, before anything is computed; a UsageError if it cannot be made or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = 'written to' if folder.is_dir() else 'made'
        raise UsageError(f"the folder '{folder}' cannot be {what} ({error.strerror}): give another one") from error
    return folder


def check_packages(purpose: str, *packages: str) -> None:
    """Name a package of an extra that a tool needs, before anything is built; a UsageError if it cannot be imported."""
    for package in packages:
        extra = 'openvino' if package == 'openvino' else 'quant'
        try:
            # OpenVINO is imported in processes of its own.
            found = find_spec(package) if package == 'openvino' else import_module(package)
            fault = '' if found else 'it is not installed'
        except Exception as error:  # onnx raises AttributeError where ml_dtypes is too old, for one
            fault = f'{type(error).__name__}: {error}'
        if fault:
            message = f'{purpose} needs {package}, which cannot be imported ({fault}): pip install mm_sharp[{extra}]'
            raise UsageError(message)


class CfgOptions(DictAction):  # type: ignore[misc]
    """MMEngine's ``KEY=VALUE`` action; a wrong form is an error of one line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        for item in values:
            key, equals, _ = item.partition('=')
            if not equals or not all(part and not set(part) & set(' \t\n') for part in key.split('.')):
                parser.error(f'{option_string}: {item!r} is not of the form KEY=VALUE, as optim_wrapper.rho=0.1')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            parser.error(f'{option_string}: {error}')


def run_tool(tool: Callable[[Sequence[str]], None]) -> int:
    """Run a tool's ``main`` on the command line's arguments, and return the exit code.

    It is 2 after a :class:`UsageError` or :class:`UserError`, 130 after Ctrl-C, 1 on a full disk. These are printed to
    stderr as one line: once a node, a :class:`UserError` by each process that has it.
    """
    arguments = sys.argv[1:]
    for harmless in _HARMLESS:
        warnings.filterwarnings('ignore', message=harmless)
    try:
        tool(arguments)
    except (Exception, KeyboardInterrupt) as error:
        end = ending(error)
        if end is None and isinstance(error, (UsageError, UserError)):
            end = f'error: {error}', 2
        if end is None or '--debug' in arguments:
            raise
        message, code = end
        rank = int(os.environ.get('LOCAL_RANK', '0'))
        # What is wrong with a command line or config, and Ctrl-C, all processes say: a sample may be one's alone.
        if rank == 0 or isinstance(error, UserError):
            of_rank = f'[rank {rank}] ' if rank else ''
            sys.stderr.write(f'{of_rank}{Path(sys.argv[0]).name}: {" ".join(message.split())}\n')
        return code
    end_process_group()
    return 0


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The ``type`` of an option: a whole number from ``low`` to ``high``, by default as large as torch takes it."""

    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= (2**31 - 1 if high is None else high):
            allowed = f'at least {low}' if high is None else f'an integer from {low} to {high}'
            raise argparse.ArgumentTypeError(f'{value}: it must be {allowed}')
        return value

    read.__name__ = 'int'  # argparse's own message shows it
    return read


def positive(text: str) -> float:
    """The ``type`` of an option: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{value:g}: it must be a finite number above 0')
    return value


def config_parser(description: str, **of_config: Any) -> OneLineParser:
    """A parser with what every tool takes that reads a config; ``of_config`` says more of that argument."""
    parser = OneLineParser(description=description)
    parser.add_argument('config', **{'help': 'config file of a training run', **of_config})
    change = 'change the config: optim_wrapper.rho=0.1, or a list without blanks: key="[a,b]"'
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, default={}, metavar='KEY=VALUE', help=change)
    parser.add_argument('--debug', action='store_true', help='show the traceback of usage errors')
    # What load_config reads besides.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option of tools that load checkpoints."""
    trust = 'load checkpoints that can run code while loading; only for files whose source you trust'
    parser.add_argument('--trust-checkpoint', action='store_true', help=trust)


def common_parser(description: str) -> OneLineParser:
    """A parser with the options that training and testing share."""
    parser = config_parser(description, help='config file')
    add = parser.add_argument
    add('--work-dir', help='folder for logs and results (default: ./work_dirs/<name of the config>)')
    add('--show', action='store_true', help='show predictions in a window')
    add('--show-dir', help='save predictions as pictures; a relative folder is made inside WORK_DIR/<time>/')
    add('--wait-time', type=float, default=1.0, help='seconds that --show leaves a picture open')
    add('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torchrun sets LOCAL_RANK in the environment; older launchers pass one of these.
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    add_trust(parser)
    return parser


def checkpoint_parser(description: str) -> OneLineParser:
    """A parser with the options of tools that look at one checkpoint in this process."""
    parser = config_parser(description, help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for the results (default: ./work_dirs/<name of the config>)')
    add_trust(parser)
    return parser


def require(cfg: Config, file: str, why: str, *keys: str) -> None:
    """Refuse a config that lacks one of some keys; ``why`` says what it needs them for."""
    for key in keys:
        if not cfg.get(key):
            raise UsageError(f"'{file}' has no {key}: {why}")


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    device = torch.cuda.get_device_name() if get_device() == 'cuda' else f'{get_device()} ({platform.machine()})'
    cores = {'cores': os.cpu_count(), 'threads': torch.get_num_threads()}
    return {'device': device, **cores, 'python': platform.python_version(), 'torch': torch.__version__}


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and apply the options of :func:`common_parser`; what does not fit is a UsageError."""
    if not Path(args.config).is_file():
        raise UsageError(f"no config file '{args.config}'{in_folder(args.config)}")
    try:
        # As written: --cfg-options speak of the keys that the user wrote, those of fragments too.
        with fragments.as_written():
            cfg = Config.fromfile(args.config)
    except Exception as error:  # a config is code of the user's: whatever it raises is theirs to put right
        raise UsageError(f"cannot read the config '{args.config}': {_reason(error)}") from error
    check_option_keys(cfg, args.cfg_options, '--cfg-options')
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f'--cfg-options does not fit the config: {_reason(error)}') from error
    if cfg.get('preprocess_cfg'):
        cfg.model.setdefault('data_preprocessor', cfg.preprocess_cfg)
    _check_fragment_options(cfg, args.cfg_options)
    try:
        fragments.apply_fragments(cfg)
    except (ValueError, ImportError) as error:
        raise UsageError(f"'{args.config}': {error}") from error
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    _launch(cfg, args.launcher)
    return cfg


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Switch on MMPose's visualization hook if ``--show`` or ``--show-dir`` asks for it."""
    if not args.show and args.show_dir is None:
        return
    hooks = cfg.get('default_hooks') or {}
    own = hooks.get('visualization') or {'type': 'mmpose.PoseVisualizationHook'}
    wait = {'wait_time': args.wait_time} if args.show else {}
    hook = {**own, 'enable': True, 'show': args.show, 'out_dir': args.show_dir, **wait}
    cfg.default_hooks = {**hooks, 'visualization': hook}
    if cfg.get('visualizer') is None:
        cfg.visualizer = {'type': 'mmpose.PoseLocalVisualizer', 'vis_backends': [{'type': 'LocalVisBackend'}]}
    for loader in ('val_dataloader', 'test_dataloader'):
        _pack_paths(cfg.get(loader))


def _pack_paths(config: Any) -> None:
    """Let a data set's samples keep the path of their picture, which MMPose's hook reads again to draw into it."""
    if isinstance(config, dict):
        keys = config.get('meta_keys')
        if keys is not None and 'img_path' not in keys:
            config['meta_keys'] = (*keys, 'img_path')
        config = config.values()
    elif not isinstance(config, (list, tuple)):
        return
    for part in config:
        _pack_paths(part)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of a chain of exceptions, with a hint where one is known."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    line = one_line(root)
    if 'Duplicate key is not allowed among bases' in line:
        line += "; keep one of these entries of _base_, and write the other's value in the config itself"
        if 'custom_imports' in line:  # which every fragment of a method has
            line += f" (in place of a method's fragment: optim_wrapper = dict(type='SAMOptimWrapper', {RECOMMENDED}))"
    return line


def check_option_keys(cfg: Config, options: Mapping[str, Any], where: str) -> None:
    """Refuse options whose first key nothing reads: MMEngine would take a typing error for a new variable."""
    known = {*cfg.keys(), *signature(Runner.__init__).parameters, *_OTHER_KEYS} - {'self', 'cfg'}
    for option in options:
        key = str(option).split('.')[0]
        if key not in known:
            close = closest(key, known)
            hint = f'did you mean {close!r}?' if close else f'its keys: {", ".join(sorted(cfg.keys()))}'
            raise UsageError(f'{where} {option}=…: the config has no {key!r}; {hint}')


def _check_fragment_options(cfg: Config, options: dict[str, Any]) -> None:
    """Refuse options that have no effect: for a fragment that the config does not use as one, or below a fragment."""
    pending = fragments.pending_fragments(cfg)
    if 'optim_wrapper.type' in options and 'sharp_optim_wrapper' in pending:
        raise UsageError(
            f'--cfg-options optim_wrapper.type={options["optim_wrapper.type"]}: the type is that of the fragment which '
            f'the config inherits; set sharp_optim_wrapper.type, or sharp_optim_wrapper=None to train without it'
        )
    places = dict(zip(fragments.KEYS, ('optim_wrapper', 'custom_hooks', 'model'), strict=True))
    for option in options:
        key, _, rest = option.partition('.')
        if key in places and key not in pending and cfg.get(key):
            cause = f"the config's {places[key]} is not made from {key} when it is read"
            instead = f'set it there, as {places[key]}.{rest or "…"}'
            raise UsageError(f'--cfg-options {option}=…: without effect, since {cause}; {instead}')


def _launch(cfg: Config, launcher: str) -> None:
    """Set the launcher; on the CPU, start the process group here, since MMEngine's start needs a GPU."""
    cfg.launcher = launcher
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        end_with_parent()
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise UsageError(f'--launcher {launcher} needs GPUs; on the CPU use --launcher pytorch (tools/dist_train.sh)')
    if 'RANK' not in os.environ:
        raise UsageError('--launcher pytorch: start it with tools/dist_train.sh or torchrun')
    if not torch.distributed.is_initialized():
        seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
        if seconds is not None and not (is_number(seconds) and seconds > 0):
            what = f'env_cfg.dist_cfg.timeout={seconds!r} is not allowed: it must be a number of seconds above 0'
            raise UsageError(f'{what}, as env_cfg = dict(dist_cfg=dict(timeout=1800))')
        torch.distributed.init_process_group('gloo', timeout=None if seconds is None else timedelta(seconds=seconds))
    defaults = {'type': 'MMDistributedDataParallel', 'broadcast_buffers': False, 'device_ids': None}
    defaults['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
    cfg.model_wrapper_cfg = {**defaults, **(cfg.get('model_wrapper_cfg') or {})}
