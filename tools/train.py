#!/usr/bin/env python
"""Train a model of MMPose (or of any MMEngine project) from a config.

python tools/train.py configs/demo/simcc_res18-half_sam_demo-128x96.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config
from mmengine.dist import get_rank

from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import careful_loading, check_checkpoint, last_checkpoint
from mm_sharp.cli.process import build_runner, say_how_to_go_on
from mm_sharp.compat import enable_for_all_runs

# Importing the package mends the stack; MMPose is first imported after it, when the runner is built.
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.common_parser('Train a model')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint; without a name, from the last one in the work directory, if there is one',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help="mixed precision: float16, on the CPU bfloat16, unless the config's optim_wrapper has a dtype of its own",
    )
    parser.add_argument('--no-validate', action='store_true', help='train without validation')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the real batch size over the config's auto_scale_lr.base_batch_size",
    )
    parser.add_argument('--interval', type=int, help='draw a picture every so many validation batches')
    return parser.parse_args(arguments)


def configure(args: argparse.Namespace) -> Config:
    """Read the config, apply the options and check the outcome; what does not fit is a UsageError."""
    cfg = cli.load_config(args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        preflight.enable_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UsageError('--auto-scale-lr needs a line in the config: auto_scale_lr = dict(base_batch_size=…)')
        cfg.auto_scale_lr.enable = True
    cli.show_predictions(cfg, args)
    _draw_in_validation(cfg, args)
    preflight.check_training(cfg)
    preflight.check_data(cfg, 'train', *(() if cfg.get('val_cfg') is None else ('val',)))
    _resume(cfg, args.resume)
    cli.output_folder(cfg.work_dir)
    return cfg


def _draw_in_validation(cfg: Config, args: argparse.Namespace) -> None:
    """Send validation pictures to ``--show-dir``: MMPose's hook obeys it in tests only, and draws into the backends."""
    if args.interval is not None and 'visualization' in cfg.get('default_hooks', {}):
        cfg.default_hooks.visualization.interval = args.interval
    if args.show_dir is None:
        return
    for backend in cfg.visualizer.get('vis_backends') or []:
        if backend['type'] == 'LocalVisBackend':
            # The backend's folder is WORK_DIR/<time>/vis_data; joining an absolute path gives that path.
            backend['img_save_dir'] = str(Path('..') / args.show_dir)


def _resume(cfg: Config, resume: str | None) -> None:
    """Set what the run starts from."""
    if resume == 'auto':
        found = last_checkpoint(cfg.work_dir)
        if found is None:
            print(f'--resume: no checkpoint in {cfg.work_dir}, so training starts from the beginning')
        else:
            _go_on_from(cfg, found)
    elif resume is not None:
        check_checkpoint(resume, '--resume')
        _go_on_from(cfg, resume)
    elif cfg.get('load_from'):
        check_checkpoint(cfg.load_from, 'load_from', cfg.get('load_hint') or '')


def _go_on_from(cfg: Config, checkpoint: str) -> None:
    """Resume from a checkpoint; the model that the run began with stays the teacher of hooks that name no other."""
    began_with = None if cfg.get('resume') else cfg.get('load_from')
    for hook in (*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()):
        distils = isinstance(hook, dict) and preflight.type_name(hook.get('type')) == 'DistillationHook'
        if distils and began_with and hook.get('teacher') is None:
            hook['teacher'] = began_with
    cfg.resume, cfg.load_from = True, checkpoint


def main(arguments: Sequence[str]) -> None:
    """Train."""
    args = parse_arguments(arguments)
    enable_for_all_runs()
    cfg = configure(args)
    with (
        say_how_to_go_on(lambda: last_checkpoint(cfg.work_dir)),
        preflight.friendly_build_errors(cfg),
        careful_loading(args.trust_checkpoint),
    ):
        build_runner(cfg).train()
    if get_rank() == 0:
        print(f'Done. Checkpoints and logs: {cfg.work_dir}')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
