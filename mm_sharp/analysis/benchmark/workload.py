"""The model, the optimizer wrappers and the batches of a training config (ours).

The model starts from random weights (nothing is downloaded), the same for every method. Learning rates are set to 0:
the arithmetic of a step stays what it is, while no method trains away from the others, or out of the numbers' range on
the few batches that it sees again and again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, set_random_seed
from torch import nn

from mm_sharp.analysis.benchmark.baselines import PEERS, make_peer
from mm_sharp.analysis.benchmark.memory import peak_memory
from mm_sharp.analysis.benchmark.methods import SHARED
from mm_sharp.analysis.benchmark.passes_only import SUFFIX, make_floor
from mm_sharp.analysis.benchmark.phases import Phases, measure_phases
from mm_sharp.analysis.benchmark.steps import Candidate, measure_rounds
from mm_sharp.errors import UsageError

# Name of the base optimizer on the float model that a quantized model was made from.
FLOAT = 'float'
# Options of a data loader that is asked for a few batches, in this process.
_LOADER = {'num_workers': 0, 'persistent_workers': False, 'pin_memory': False, 'drop_last': True}
_DROPPED = ('prefetch_factor', 'num_batch_per_epoch', 'batch_sampler', 'timeout', 'multiprocessing_context')


class Ready(nn.Module):
    """Stands in for a model's data preprocessor: the batches have been through it."""

    def forward(self, data: Any, training: bool = False) -> Any:
        return data


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        model: With its weights, in training mode, without a data preprocessor of its own.
        float_model: The same before it was quantized, with the same weights; None for a model that is not.
        batches: Pre-processed and on the model's device.
        batch_size: Samples in each of them.
        device: Where the model is.
        scope: Default scope of the config.
    """

    model: nn.Module
    float_model: nn.Module | None
    batches: list[Any]
    batch_size: int
    device: torch.device
    scope: str

    def measure(self, settings: Mapping[str, Mapping[str, Any]], rounds: int, warmup: int) -> dict[str, list[float]]:
        """Time ``rounds`` steps of each method, side by side, after ``warmup`` steps of each.

        Args:
            settings: Config of the optimizer wrapper of each method, by name; the one named :data:`FLOAT` trains the
                float model.
            rounds: At least 1.
            warmup: At least 1.

        Returns:
            Seconds of the steps of each method, by name, in their order.

        Raises:
            UsageError: A method does not work with this model, or a loss is not finite.
        """
        with prepared(self.scope):
            candidates = [self._contestant(name, own) for name, own in settings.items()]
            return measure_rounds(candidates, self.batches, rounds, warmup, self.device)

    def measure_phases(self, settings: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, list[Phases]]:
        """Seconds of each phase of ``rounds`` steps of each method, after one that is not measured.

        Args:
            settings: As for :meth:`measure`.
            rounds: At least 1.
        """
        with prepared(self.scope):
            candidates = [self._contestant(name, own) for name, own in settings.items()]
            for candidate in candidates:
                candidate.step(self.batches[0])
            return measure_phases(candidates, self.batches, rounds, 1, self.device)

    def peak_memory(self, name: str, settings: Mapping[str, Any], steps: int) -> int | None:
        """Most bytes held at once in ``steps`` steps of one method, after one; None where there is no telling.

        Args:
            name: The method.
            settings: Config of its optimizer wrapper.
            steps: At least 1.
        """
        with prepared(self.scope):
            make = partial(self._contestant, name, settings)
            return peak_memory(make, self.batches[0], steps, self.device)

    def _contestant(self, name: str, settings: Mapping[str, Any]) -> Candidate:
        """A copy of the model with an optimizer wrapper of its own."""
        model: Any = copy.deepcopy(self.float_model if name == FLOAT else self.model)
        config = copy.deepcopy(dict(settings))
        if name in PEERS or name.endswith(SUFFIX):
            config = {'type': 'OptimWrapper', **{key: config[key] for key in SHARED if key in config}}
        wrapper = build_optim_wrapper(model, config)
        for group in wrapper.optimizer.param_groups:
            group['lr'] = group['lr'] * 0  # a number, or a tensor for capturable optimizers
        if name in PEERS:
            return make_peer(name, model, wrapper.optimizer, settings)
        candidate = Candidate(name, model, wrapper)
        return make_floor(candidate, settings, self.batch_size) if name.endswith(SUFFIX) else candidate


def load_subject(cfg: Config, batch_size: int, most_batches: int = 4) -> Workload:
    """Build the model and load the batches of a training config.

    Args:
        cfg: The whole config, whose data files are there.
        batch_size: Samples a batch.
        most_batches: Batches to load, fewer where the data set is smaller.

    Raises:
        UsageError: The data set has fewer samples than a batch.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    device = torch.device(get_device())
    torch.backends.cudnn.benchmark = bool((cfg.get('env_cfg') or {}).get('cudnn_benchmark', False))
    seed = (cfg.get('randomness') or {}).get('seed') or 0
    with prepared(scope):
        set_random_seed(seed)
        loaded = _load_batches(cfg, batch_size, most_batches, seed)
        model, float_model = _build_models(cfg, device, loaded)
        batches = [model.data_preprocessor(batch, True) for batch in loaded]
    for member in (model, float_model):
        if member is not None:
            member.data_preprocessor = Ready()
    return Workload(model, float_model, batches, batch_size, device, scope)


def _build_models(cfg: Config, device: torch.device, loaded: list[Any]) -> tuple[Any, Any]:
    """The model of a config and, if it is quantized, calibrated, the float model that it was made from."""
    config = dict(cfg.model)
    if config.get('type') != 'QuantizedModel':
        return _build_model(cfg, config).to(device).train(), None
    # The one module that may import Brevitas; whoever has such a config has it.
    from mm_sharp.quantization import calibrate

    policy, inner = config.pop('policy'), config.pop('model')
    config['type'] = inner
    plain = {**dict(inner), **{k: v for k, v in config.items() if k != 'type'}} if isinstance(inner, dict) else config
    float_model = _build_model(cfg, plain).to(device).train()
    model = MODELS.build({'type': 'QuantizedModel', 'model': copy.deepcopy(float_model), 'policy': policy})
    calibrate(model, loaded)
    return model.train(), float_model


@contextmanager
def prepared(scope: str) -> Iterator[None]:
    """What a Runner does before a model is built or run: the default scope, and progress that models ask for.

    MMEngine's remarks below a warning are left out: without a log file, it prints how each weight is initialised.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with DefaultScope.overwrite_default_scope(scope):
            hub = MessageHub.get_current_instance()
            for counter in ('epoch', 'iter'):
                hub.update_info(counter, 0)
            yield
    finally:
        logging.disable(before)


def _build_model(cfg: Config, config: dict[str, Any]) -> Any:
    config = _without_downloads(config)
    if cfg.get('data_preprocessor'):
        config.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(config)
    if hasattr(model, 'init_weights'):
        model.init_weights()
    # One process: a Runner does the same.
    return revert_sync_batchnorm(model)


def _without_downloads(value: Any) -> Any:
    """A copy of a model's config without weights to load: the numbers do not matter here."""
    if isinstance(value, dict):
        kept = {key: _without_downloads(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if key != 'init_cfg' or not _loads(item)}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_downloads(item) for item in value)
    return value


def _loads(init_cfg: Any) -> bool:
    members = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return any(isinstance(member, dict) and member.get('type') == 'Pretrained' for member in members)


def _load_batches(cfg: Config, batch_size: int, most: int, seed: int) -> list[Any]:
    options = {key: value for key, value in cfg.train_dataloader.items() if key not in _DROPPED}
    loader = Runner.build_dataloader({**options, **_LOADER, 'batch_size': batch_size}, seed=seed)
    samples = len(loader.dataset)
    if samples < batch_size:
        raise UsageError(f'--batch-size {batch_size}: the training data has {samples} samples only')
    # A sampler without end would give the same samples again.
    return list(islice(loader, min(most, samples // batch_size)))
