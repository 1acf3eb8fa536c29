"""The model, the optimizer wrappers and the batches of a training config; and a small model instead of them.

The model starts from random weights (nothing is downloaded), the same for every method. Learning rates are set to 0:
the arithmetic of a step stays what it is, while no method trains away from the others, or out of the numbers' range on
the few batches that it sees again and again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mm_sharp.analysis.benchmark.candidates import BY_HAND, SHARED, Candidate, HandWrittenSAM, PassesOnly
from mm_sharp.analysis.benchmark.steps import Measure, measure_rounds
from mm_sharp.analysis.prepare import build_loader, model_config
from mm_sharp.errors import UsageError
from mm_sharp.samples.keys import SampleKey, without_keys
from mm_sharp.step.wrapper import TwoPassOptimWrapper

FLOAT = 'float'  # the base optimizer on the float model that a quantized model was made from
BATCH_SIZE = 16  # of the small model
T = TypeVar('T')
Settings = Mapping[str, Mapping[str, Any]]


class Ready(nn.Module):
    """Stands in for a model's data preprocessor: the batches have been through it."""

    def forward(self, data: Any, training: bool = False) -> Any:
        return data


@dataclass(frozen=True)
class Workload:
    """A model in training mode, and batches that have been through its data preprocessor."""

    model: Any
    batches: list[Any]
    float_model: Any = None  # the model before it was quantized, with the same weights; None for one that is not

    def measure(
        self, settings: Settings, rounds: int, warmup: int, measure: Measure[T], passes_only: bool = False
    ) -> dict[str, list[T]]:
        """:func:`measure_rounds` of methods, given their wrappers' configs by name; ``passes_only``: of these, too."""
        groups = []
        for name, own in settings.items():
            groups.append([method := self.candidate(name, own)])
            if passes_only and isinstance(method.optim_wrapper, TwoPassOptimWrapper):
                model, wrapper = self._build(name, _base(own))
                groups[-1].append(PassesOnly.beside(method, model, wrapper))
        return measure_rounds(groups, self.batches, rounds, warmup, measure)

    def candidate(self, name: str, settings: Mapping[str, Any]) -> Candidate:
        """A method, or SAM by hand, with a copy of the model."""
        if name == BY_HAND:
            model, wrapper = self._build(name, _base(settings))
            return HandWrittenSAM(name, model, wrapper.optimizer, settings.get('rho', 0.05))
        return Candidate(name, *self._build(name, settings))

    def _build(self, name: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
        model, config = copy.deepcopy(self.float_model if name == FLOAT else self.model), copy.deepcopy(dict(settings))
        if config['type'] == 'OptimWrapper' and config.get('dtype'):
            dtype = getattr(torch, config.pop('dtype'))
            model.forward = torch.autocast(get_device(), dtype=dtype)(model.forward)
        wrapper = build_optim_wrapper(model, config)
        # Ours take an IndexedDataset's keys out themselves.
        keyed = any(isinstance(leaf, SampleKey) for leaf in tree_flatten(self.batches[:1])[0])
        if keyed and not isinstance(wrapper, TwoPassOptimWrapper):
            model.register_forward_pre_hook(without_keys, with_kwargs=True)
        for group in wrapper.optimizer.param_groups:
            group['lr'] = group['lr'] * 0  # a number, or a tensor for capturable optimizers
        return model, wrapper


def _base(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {'type': 'OptimWrapper', **{key: settings[key] for key in (*SHARED, 'dtype') if key in settings}}


def load_workload(cfg: Config, batch_size: int) -> Workload:
    """Build the model and load up to four batches, within :func:`prepared`; a UsageError if there is not even one."""
    torch.backends.cudnn.benchmark = bool((cfg.get('env_cfg') or {}).get('cudnn_benchmark', False))
    set_random_seed((cfg.get('randomness') or {}).get('seed') or 0)
    loader = build_loader(cfg, batch_size=batch_size, drop_last=True)
    loaded = list(islice(loader, 4))
    if not loaded:
        raise UsageError(f'--batch-size {batch_size}: the training data has {len(loader.dataset)} samples only')
    model, float_model = _build_models(cfg, loaded)
    workload = Workload(model, [model.data_preprocessor(batch, True) for batch in loaded], float_model)
    for member in filter(None, (model, float_model)):
        member.data_preprocessor = Ready()
    return workload


def _build_models(cfg: Config, loaded: list[Any]) -> tuple[Any, Any]:
    config = dict(cfg.model)
    if config.get('type') != 'QuantizedModel':
        return _build_model(cfg, config), None
    from mm_sharp.quantization import calibrate
    from mm_sharp.quantization.build import float_config

    float_model = _build_model(cfg, float_config(config))
    model = MODELS.build({'type': 'QuantizedModel', 'model': copy.deepcopy(float_model), 'policy': config['policy']})
    model.to(get_device())  # the quantizers were made on the CPU
    calibrate(model, loaded)
    return model.train(), float_model


def _build_model(cfg: Config, config: Mapping[str, Any]) -> Any:
    model = MODELS.build(model_config(cfg, config))
    for module in model.modules():
        if "'Pretrained'" in repr(getattr(module, 'init_cfg', None)):
            module.init_cfg = None  # nothing is downloaded: the numbers do not matter here
    if hasattr(model, 'init_weights'):
        model.init_weights()
    return revert_sync_batchnorm(model).to(get_device()).train()  # in one process, a Runner does the same


class SmallModel(BaseModel):  # type: ignore[misc]
    """A classifier of pictures (N, 3, 8, 8), with 3,164 weights."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        features = (convolution, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
        self.layers = nn.Sequential(*features, nn.Linear(256, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 10))
        self.loss_module = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, labels: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        """The loss; ``sample_idx`` is for AUSAM."""
        return {'loss': self.loss_module(self.layers(inputs), labels)}


def small_workload() -> Workload:
    """:class:`SmallModel` and 8 batches, on which a step is little else than the host's own time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = SmallModel().to(get_device()).train(), []
        for ids in torch.arange(8 * BATCH_SIZE).split(BATCH_SIZE):  # they stay on the host, as in data samples
            inputs, labels = torch.randn(BATCH_SIZE, 3, 8, 8), torch.randint(10, (BATCH_SIZE,))
            batches.append({'inputs': inputs.to(get_device()), 'labels': labels.to(get_device()), 'sample_idx': ids})
    return Workload(model, batches)
