"""Build the runner that a config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from mm_sharp.errors import UsageError

# What the strategies' model wrappers need on the CPU: by default MMEngine puts the model on a GPU.
_ON_CPU: dict[str, dict[str, Any]] = {
    'FSDPStrategy': {'type': 'MMFullyShardedDataParallel', 'device_id': 'cpu'},
    'DDPStrategy': {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False},
}


def build_runner(cfg: Config) -> Any:
    """MMEngine's ``Runner``, or what ``runner_type`` names, with what the config's ``strategy`` needs on the CPU."""
    kind = cfg.get('runner_type', 'Runner')
    found = RUNNERS.get(kind) if isinstance(kind, str) else kind
    if found is None:
        raise UsageError(f"runner_type={kind!r} is not registered: write runner_type='FlexibleRunner', or take it out")
    if not issubclass(found, FlexibleRunner):
        if cfg.get('strategy'):
            raise UsageError("strategy is for MMEngine's FlexibleRunner alone: write runner_type = 'FlexibleRunner'")
        if cfg.get('load_from') and Path(cfg.load_from).is_dir():
            raise UsageError(
                f"'{cfg.load_from}' is a folder of parts, saved under FSDP: load it with the runner_type and strategy "
                "that saved it, or save whole weights, by strategy=dict(state_dict_cfg='full')"
            )
        return Runner.from_cfg(cfg) if found is Runner else RUNNERS.build(cfg)
    strategy = cfg.get('strategy') or {}
    name = strategy.get('type')
    if name in _ON_CPU and get_device() == 'cpu':
        cfg.strategy = {**strategy, 'model_wrapper': {**_ON_CPU[name], **(strategy.get('model_wrapper') or {})}}
    if cfg.get('env_cfg') is None:  # FlexibleRunner takes what Runner has a default for
        cfg.env_cfg = {'dist_cfg': {'backend': 'gloo' if get_device() == 'cpu' else 'nccl'}}
    return RUNNERS.build(cfg)
