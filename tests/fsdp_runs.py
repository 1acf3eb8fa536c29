"""Runs of MMEngine's FlexibleRunner under its FSDPStrategy, for tests/step/test_fsdp.py."""

from __future__ import annotations

from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import FlexibleRunner

from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.fsdp_cases import LAYERS, Result, whole_weights
from tests.toys import toy_config

# On the CPU torch cannot offload whole weights to the CPU, as MMEngine's 'full' asks for.
WHOLE = dict(
    state_dict_type='FULL_STATE_DICT',
    state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
    # Offloaded to the CPU, where they are already, torch 2.13 mixes up two states of one parameter.
    optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True, offload_to_cpu=False),
)


def run_and_resume(rank: int, processes: int, folder: str, state_dict_cfg: Any, wrapper: dict[str, Any]) -> Result:
    """Two epochs under FlexibleRunner and FSDPStrategy, and the second again, from the first one's checkpoint."""

    def finish(name: str, **changes: Any) -> Any:
        model_wrapper = dict(type='MMFullyShardedDataParallel', device_id='cpu', auto_wrap_policy=LAYERS)
        config = toy_config(
            Path(folder) / name,
            model=dict(type='ToyNet', norm=False),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9), **wrapper),
            strategy=dict(type='FSDPStrategy', model_wrapper=model_wrapper, state_dict_cfg=deepcopy(state_dict_cfg)),
            launcher='pytorch',
            log_level='ERROR',
            **changes,
        )
        config['default_hooks']['checkpoint'] = dict(type='CheckpointHook', interval=1)
        runner = FlexibleRunner(**config)
        with redirect_stdout(None):
            runner.train()
        return runner

    whole = finish('whole')
    file = Path(folder) / 'whole' / 'epoch_1.pth'
    resumed = finish('resumed', resume=True, load_from=str(file))
    part = file / f'rank{rank}.pth' if file.is_dir() else file
    checkpoint = torch.load(part, weights_only=True)
    return {
        'weights': [whole_weights(runner.model) for runner in (whole, resumed)],
        'states': [own_state(runner.optim_wrapper) for runner in (whole, resumed)],
        'steps': [len(runner.message_hub.get_scalar('train/loss').data[0]) for runner in (whole, resumed)],
        'saved': sorted(checkpoint['optimizer']),
        'saved at': checkpoint['meta']['iter'],
        'logged': whole.message_hub.get_scalar('train/sharpness/sharpness').current(),
    }


def own_state(wrapper: TwoPassOptimWrapper) -> str:
    """The history and all else of a wrapper's own, as text."""
    state = wrapper.state_dict()
    return str({**state['mm_sharp'], 'loss_scaler': state.get('loss_scaler')})
