"""Wrong configs, and what the one line that each of them gives must say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn

from tests.toys import Functional, ToySamples

MODELS.register_module(name='FunctionalToy', module=Functional, force=True)


@MODELS.register_module(force=True)
class SparseToy(BaseModel):
    """A table of which a step uses a few rows."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 3, sparse=sparse), nn.Linear(3, 3)
        self.loss = nn.MSELoss()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        rows = torch.arange(len(inputs), device=targets.device)
        return {'loss': self.loss(self.head(self.table(rows)), targets)}


@DATASETS.register_module(force=True)
class NamelessSamples(ToySamples):
    """Samples without ids."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        for row in self.rows:
            del row['sample_idx']

    def get_data_info(self, index: int) -> dict[str, int]:
        return {}


@dataclass(frozen=True)
class Bad:
    """One wrong config.

    Args:
        what: What is wrong, in words.
        method: ``'SAM'``, ``'ESAM'`` or ``'AUSAM'``.
        lines: What the user wrote, beneath ``_base_ = 'toy.py'``.
        key: What the line must name.
        shows: A part of the right form that the line must show.
        good: What the user writes instead, following the line; ``''``: that takes more than a toy.
    """

    what: str
    method: str
    lines: str
    key: str
    shows: str
    good: str = ''


def wrapper(arguments: str) -> str:
    return f'optim_wrapper = dict({arguments})'


def optimizer(arguments: str) -> str:
    return wrapper(f'optimizer=dict({arguments})')


def loader(arguments: str) -> str:
    return f'train_dataloader = dict({arguments})'


SAMPLER = "batch_sampler=dict(type='AUSAMSampler')"
TWO = ', '.join(f"{n}=dict(type='{{0}}OptimWrapper', optimizer=dict(type='SGD', lr=0.1))" for n in 'ab')
COMBINED = (
    "dataset=dict(_delete_=True, type='ConcatDataset', datasets=["
    "dict(type='IndexedDataset'{0}, dataset=dict(type='ToySamples', count=8)), "
    "dict(type='IndexedDataset'{1}, dataset=dict(type='ToySamples', count=8))])"
)
SGD = "dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9)"
POLICY = 'quantization = dict(policy=dict(input_size=(6, 6), {}))'

ARGUMENTS = (
    Bad('a negative radius', 'SAM', wrapper('rho=-0.1'), 'rho=-0.1', 'rho=0.05', wrapper('rho=0.05')),
    Bad('a radius that is no number', 'SAM', wrapper('rho="0.05"'), "rho='0.05'", 'rho=0.05', wrapper('rho=0.05')),
    Bad('a radius of nan', 'AUSAM', wrapper('rho=float("nan")'), 'rho=nan', 'rho=0.05', wrapper('rho=0.05')),
    Bad(
        'adaptive that is no switch',
        'SAM',
        wrapper('adaptive="yes"'),
        'adaptive=',
        'adaptive=True',
        wrapper('adaptive=True'),
    ),
    Bad('eta below 0', 'SAM', wrapper('eta=-1'), 'eta=-1', 'eta=0.01', wrapper('eta=0.01')),
    Bad('eps of 0', 'SAM', wrapper('eps=0'), 'eps=0', 'eps=1e-12', wrapper('eps=1e-12')),
    Bad(
        'sync_perturbation that is no switch',
        'SAM',
        wrapper('sync_perturbation=1'),
        'sync_perturbation=1',
        'sync_perturbation=True',
        wrapper('sync_perturbation=True'),
    ),
    Bad(
        'replay_rng that is no switch',
        'ESAM',
        wrapper('replay_rng=None'),
        'replay_rng=None',
        'replay_rng=True',
        wrapper('replay_rng=True'),
    ),
    Bad(
        'a dtype that there is not',
        'SAM',
        wrapper('dtype="fp16"'),
        "dtype='fp16'",
        "dtype='float16'",
        wrapper('dtype="float16"'),
    ),
    Bad(
        'a loss scale of inf',
        'SAM',
        wrapper('dtype="float16", loss_scale=float("inf")'),
        'loss_scale=inf',
        'loss_scale=512.0',
        wrapper('dtype="float16", loss_scale=512.0'),
    ),
    Bad(
        'a loss scale with an unknown key',
        'SAM',
        wrapper('dtype="float16", loss_scale=dict(scale=2.0)'),
        'loss_scale=',
        'dict(init_scale=512.0, growth_interval=1000)',
        wrapper('dtype="float16", loss_scale=dict(init_scale=512.0, growth_interval=1000)'),
    ),
    Bad(
        'a loss scale whose start is no number',
        'AUSAM',
        wrapper('dtype="float16", loss_scale=dict(init_scale="x")'),
        "init_scale='x'",
        'init_scale=512.0',
        wrapper('dtype="float16", loss_scale=dict(init_scale=512.0)'),
    ),
    Bad(
        'clip_grad that is a number',
        'SAM',
        wrapper('clip_grad=1.0'),
        'clip_grad=1.0',
        'clip_grad=dict(max_norm=1.0)',
        wrapper('clip_grad=dict(max_norm=1.0)'),
    ),
    Bad(
        'clip_grad with an unknown key',
        'ESAM',
        wrapper('clip_grad=dict(max_nrm=1.0)'),
        "'max_nrm'",
        'clip_grad=dict(max_norm=1.0)',
        wrapper('clip_grad=dict(max_norm=1.0)'),
    ),
    Bad(
        'clip_grad below 0',
        'SAM',
        wrapper('clip_grad=dict(max_norm=-1.0)'),
        "'max_norm': -1.0",
        'clip_grad=dict(max_norm=1.0)',
        wrapper('clip_grad=dict(max_norm=1.0)'),
    ),
    Bad(
        "a norm's limit for clipping values",
        'AUSAM',
        wrapper('clip_grad=dict(type="value", max_norm=1.0)'),
        'clip_grad=',
        "dict(type='value', clip_value=0.1)",
        wrapper('clip_grad=dict(type="value", clip_value=0.1)'),
    ),
    Bad(
        'accumulative_counts of 0',
        'ESAM',
        wrapper('accumulative_counts=0'),
        'accumulative_counts=0',
        'accumulative_counts=4',
        wrapper('accumulative_counts=4'),
    ),
    Bad(
        'accumulative_counts that is no integer',
        'AUSAM',
        wrapper('accumulative_counts=1.5'),
        'accumulative_counts=1.5',
        'accumulative_counts=4',
        wrapper('accumulative_counts=4'),
    ),
    Bad(
        'perturb of an unknown name',
        'SAM',
        wrapper('perturb="none"'),
        "perturb='none'",
        "perturb='weights'",
        wrapper('perturb="weights"'),
    ),
    Bad(
        'perturb with an unknown key',
        'ESAM',
        wrapper('perturb=dict(norms=False)'),
        "['norms']",
        'perturb=dict(norm=False',
        wrapper('perturb=dict(norm=False)'),
    ),
    Bad(
        'perturb that matches nothing',
        'AUSAM',
        wrapper('perturb=dict(include="bakbone")'),
        "include pattern 'bakbone'",
        "perturb='all'",
        wrapper('perturb="all"'),
    ),
    Bad(
        'perturb that leaves nothing',
        'SAM',
        wrapper('perturb=dict(exclude=["."])'),
        'perturb=',
        "perturb='all'",
        wrapper('perturb="all"'),
    ),
    Bad(
        'perturb_quantized on a float model',
        'SAM',
        wrapper('perturb_quantized=True'),
        'perturb_quantized=True',
        "type='QuantizedModel'",
        wrapper('perturb_quantized=False'),
    ),
    Bad('beta of 0', 'ESAM', wrapper('beta=0'), 'beta=0', 'beta=0.6', wrapper('beta=0.6')),
    Bad('gamma above 1', 'ESAM', wrapper('gamma=1.5'), 'gamma=1.5', 'gamma=0.5', wrapper('gamma=0.5')),
    Bad(
        'an unknown selection',
        'ESAM',
        wrapper('selection="hist"'),
        "selection='hist'",
        "'history'",
        wrapper('selection="history"'),
    ),
    Bad(
        'refresh of 0',
        'ESAM',
        wrapper('selection="history", refresh=0'),
        'refresh=0',
        'refresh=10',
        wrapper('selection="history", refresh=10'),
    ),
    Bad(
        'a sampling_ratio of 0',
        'AUSAM',
        wrapper('sampling_ratio=0'),
        'sampling_ratio=0',
        'sampling_ratio=0.6',
        wrapper('sampling_ratio=0.6'),
    ),
    Bad('s_min of 0', 'AUSAM', wrapper('s_min=0'), 's_min=0', 's_min=0.3', wrapper('s_min=0.3')),
    Bad(
        's_min above s_max',
        'AUSAM',
        wrapper('s_min=2'),
        's_min=2',
        's_min=0.3, s_max=1.0',
        wrapper('s_min=0.3, s_max=1.0'),
    ),
    Bad(
        'reweight that is no switch',
        'AUSAM',
        wrapper('reweight="no"'),
        "reweight='no'",
        'reweight=True',
        wrapper('reweight=True'),
    ),
    Bad(
        'a history_momentum of 1',
        'AUSAM',
        wrapper('history_momentum=1'),
        'history_momentum=1',
        'history_momentum=0.9',
        wrapper('history_momentum=0.9'),
    ),
    Bad(
        'an argument with a typing error',
        'SAM',
        wrapper('rhoo=0.1'),
        'optim_wrapper.rhoo',
        "did you mean 'rho'",
        wrapper('rho=0.1'),
    ),
    Bad(
        "AUSAM's argument for SAM",
        'SAM',
        wrapper('sampling_ratio=0.5'),
        'optim_wrapper.sampling_ratio',
        "type='AUSAMOptimWrapper', sampling_ratio=0.5",
        wrapper("type='AUSAMOptimWrapper', sampling_ratio=0.5"),
    ),
    Bad(
        "ESAM's argument for AUSAM",
        'AUSAM',
        wrapper('beta=0.5'),
        'optim_wrapper.beta',
        "type='ESAMOptimWrapper', beta=0.5",
        wrapper("type='ESAMOptimWrapper', beta=0.5"),
    ),
    Bad(
        "AUSAM's argument for ESAM",
        'ESAM',
        wrapper('s_min=0.5'),
        'optim_wrapper.s_min',
        "type='AUSAMOptimWrapper', s_min=0.5",
        wrapper("type='AUSAMOptimWrapper', s_min=0.5"),
    ),
    Bad(
        "an argument of MMEngine's AmpOptimWrapper",
        'SAM',
        wrapper('use_fsdp=True'),
        'optim_wrapper.use_fsdp',
        "dtype='float16'",
        wrapper("dtype='float16', loss_scale='dynamic'"),
    ),
)

OPTIMIZERS = (
    Bad(
        'no optim_wrapper',
        'SAM',
        'optim_wrapper = None',
        'optim_wrapper',
        "type='SAMOptimWrapper', rho=0.05, optimizer=",
    ),
    Bad(
        'an optim_wrapper that is a name',
        'SAM',
        "optim_wrapper = 'SAMOptimWrapper'",
        "optim_wrapper='SAMOptimWrapper'",
        "dict(type='SAMOptimWrapper', rho=0.05, optimizer=",
    ),
    Bad(
        'an optim_wrapper without type and optimizer',
        'SAM',
        wrapper('_delete_=True, rho=0.1'),
        'optim_wrapper',
        "dict(type='SAMOptimWrapper', rho=0.05, optimizer=",
        wrapper("_delete_=True, type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=0.01)"),
    ),
    Bad(
        'a wrapper that there is not',
        'SAM',
        wrapper('type="SamOptimWraper"'),
        'optim_wrapper.type',
        "did you mean 'SAMOptimWrapper'",
        wrapper('type="SAMOptimWrapper"'),
    ),
    Bad(
        'no optimizer',
        'ESAM',
        wrapper('_delete_=True, type="ESAMOptimWrapper"'),
        'optim_wrapper.optimizer',
        'optimizer=dict(type=',
        wrapper("_delete_=True, type='ESAMOptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"),
    ),
    Bad(
        'an optimizer that is a name',
        'AUSAM',
        wrapper('optimizer="SGD"'),
        'optim_wrapper.optimizer',
        "optimizer=dict(type='SGD', lr=0.01, momentum=0.9)",
        wrapper(f'optimizer={SGD}'),
    ),
    Bad(
        'an optimizer that there is not',
        'SAM',
        optimizer('type="Sgd"'),
        'optim_wrapper.optimizer.type',
        "did you mean 'SGD'",
        optimizer('type="SGD"'),
    ),
    Bad(
        'an optimizer with an unknown argument',
        'SAM',
        optimizer('learning_rate=1.0'),
        'learning_rate',
        "optimizer=dict(type='SGD', lr=0.01, momentum=0.9)",
        wrapper(f'optimizer={SGD}'),
    ),
    Bad(
        'a negative learning rate',
        'AUSAM',
        optimizer('lr=-1.0'),
        'Invalid learning rate',
        "optimizer=dict(type='SGD', lr=0.01",
        wrapper(f'optimizer={SGD}'),
    ),
    Bad(
        'a learning rate that is no number',
        'ESAM',
        optimizer('lr="0.1"'),
        "'lr': '0.1'",
        "optimizer=dict(type='SGD', lr=0.01",
        wrapper(f'optimizer={SGD}'),
    ),
    Bad(
        'an optimizer that needs a closure',
        'SAM',
        optimizer('_delete_=True, type="LBFGS"'),
        'optimizer=LBFGS',
        "optimizer=dict(type='SGD', lr=0.01, momentum=0.9)",
        wrapper(f'optimizer={SGD}'),
    ),
    Bad(
        'an unknown key of paramwise_cfg',
        'SAM',
        wrapper('paramwise_cfg=dict(bias_lr_mul=2.0)'),
        "'bias_lr_mul'",
        "did you mean 'bias_lr_mult'",
        wrapper('paramwise_cfg=dict(bias_lr_mult=2.0)'),
    ),
    Bad(
        'a factor of paramwise_cfg that is no number',
        'AUSAM',
        wrapper('paramwise_cfg=dict(bias_lr_mult="2")'),
        "bias_lr_mult='2'",
        'bias_lr_mult=2.0',
        wrapper('paramwise_cfg=dict(bias_lr_mult=2.0)'),
    ),
    Bad(
        'factors of a weight decay that there is not',
        'SAM',
        wrapper('paramwise_cfg=dict(norm_decay_mult=0.0)'),
        'optim_wrapper.paramwise_cfg',
        'weight_decay=1e-4)',
        wrapper('paramwise_cfg=dict(norm_decay_mult=0.0), optimizer=dict(weight_decay=1e-4)'),
    ),
    Bad(
        'custom_keys that are a list',
        'SAM',
        wrapper('paramwise_cfg=dict(custom_keys=["head"])'),
        'custom_keys',
        'custom_keys=dict(backbone=dict(lr_mult=0.1))',
        wrapper('paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=0.1)))'),
    ),
    Bad(
        'a constructor that there is not',
        'SAM',
        wrapper('constructor="Mine"'),
        'optim_wrapper.constructor',
        'custom_imports = dict(imports=',
        wrapper('rho=0.1'),
    ),
    Bad(
        'two wrappers without a constructor',
        'SAM',
        wrapper('_delete_=True, ' + TWO.format('SAM')),
        'optim_wrapper.constructor',
        "dict(constructor='MyConstructor'",
        wrapper("_delete_=True, type='SAMOptimWrapper', optimizer=dict(type='SGD', lr=0.1)"),
    ),
    Bad(
        'a fragment without a type',
        'SAM',
        'sharp_optim_wrapper = dict(rho=0.1)\n' + wrapper('_delete_=True, optimizer=dict(type="SGD", lr=0.1)'),
        'sharp_optim_wrapper',
        "sharp_optim_wrapper = dict(type='SAMOptimWrapper'",
        "sharp_optim_wrapper = dict(type='SAMOptimWrapper')\n"
        + wrapper('_delete_=True, optimizer=dict(type="SGD", lr=0.1)'),
    ),
    Bad(
        'FSDP beside a fragment',
        'SAM',
        'sharp_optim_wrapper = dict(type="SAMOptimWrapper")\n'
        + wrapper('_delete_=True, type="AmpOptimWrapper", use_fsdp=True, optimizer=dict(type="SGD", lr=0.1)'),
        'optim_wrapper.use_fsdp=True',
        'optim_wrapper = dict(use_fsdp=False)',
        'sharp_optim_wrapper = dict(type="SAMOptimWrapper")\n'
        + wrapper('_delete_=True, type="AmpOptimWrapper", use_fsdp=False, optimizer=dict(type="SGD", lr=0.1)'),
    ),
)

SAMPLES = (
    Bad(
        'a loss that no hook sees',
        'ESAM',
        "model = dict(type='FunctionalToy')",
        'no loss module was called',
        "optim_wrapper = dict(type='SAMOptimWrapper'",
        "model = dict(type='FunctionalToy')\n" + wrapper("type='SAMOptimWrapper'"),
    ),
    Bad(
        'a loss that no hook sees',
        'AUSAM',
        "model = dict(type='FunctionalToy')",
        'no loss module was called',
        "optim_wrapper = dict(type='SAMOptimWrapper'",
        "model = dict(type='FunctionalToy')\n" + wrapper("type='SAMOptimWrapper'"),
    ),
    Bad(
        'samples without ids',
        'AUSAM',
        loader("dataset=dict(type='NamelessSamples')"),
        'sample_idx',
        "type='IndexedDataset', dataset=",
        loader("dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='NamelessSamples', count=20))"),
    ),
    Bad(
        'samples without ids, drawn in the loader',
        'AUSAM',
        loader(f"dataset=dict(type='NamelessSamples'), {SAMPLER}"),
        "'sample_idx'",
        "type='IndexedDataset', dataset=",
        loader(
            f"dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='NamelessSamples', count=20)), {SAMPLER}"
        ),
    ),
    Bad(
        'samples without ids for a history',
        'ESAM',
        loader("dataset=dict(type='NamelessSamples')") + '\n' + wrapper('selection="history"'),
        'sample_idx',
        "type='IndexedDataset', dataset=",
        loader("dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='NamelessSamples', count=20))")
        + '\n'
        + wrapper('selection="history"'),
    ),
    Bad(
        'two data sets with the same ids',
        'AUSAM',
        loader(COMBINED.format('', '')),
        "same name 'dataset'",
        "dict(type='IndexedDataset', name='first'",
        loader(COMBINED.format(", name='first'", ", name='second'")),
    ),
    Bad(
        'gradients that are sparse',
        'SAM',
        "model = dict(type='SparseToy')",
        "['table.weight'] are sparse",
        'sparse=False',
        "model = dict(type='SparseToy', sparse=False)",
    ),
    Bad(
        'gradients that are sparse',
        'AUSAM',
        "model = dict(type='SparseToy')",
        "['table.weight'] are sparse",
        "perturb=dict(exclude=['^NAME'])",
        "model = dict(type='SparseToy')\n" + wrapper("perturb=dict(exclude=['^table'])"),
    ),
    Bad(
        'the sampler with another wrapper',
        'SAM',
        loader(SAMPLER),
        'train_dataloader.batch_sampler',
        "dict(type='AUSAMOptimWrapper'",
        loader(SAMPLER) + '\n' + wrapper("type='AUSAMOptimWrapper'"),
    ),
    Bad(
        'the sampler with two wrappers',
        'AUSAM',
        loader(SAMPLER)
        + '\n'
        + wrapper("_delete_=True, constructor='DefaultOptimWrapperConstructor', " + TWO.format('AUSAM')),
        'train_dataloader.batch_sampler',
        "dict(type='AUSAMOptimWrapper'",
        loader(SAMPLER),
    ),
    Bad(
        'the batch sampler as a sampler',
        'AUSAM',
        loader("sampler=dict(_delete_=True, type='AUSAMSampler')"),
        'train_dataloader.sampler',
        SAMPLER,
        loader(SAMPLER),
    ),
    Bad(
        'the sampler with drop_last beside it',
        'AUSAM',
        loader(f'drop_last=True, {SAMPLER}'),
        'train_dataloader.drop_last',
        "drop_last=False, batch_sampler=dict(type='AUSAMSampler', drop_last=True)",
        loader("drop_last=False, batch_sampler=dict(type='AUSAMSampler', drop_last=True)"),
    ),
    Bad(
        'the sampler with batches out of order',
        'AUSAM',
        loader(f'in_order=False, {SAMPLER}'),
        'train_dataloader.in_order=False',
        f'in_order=True, {SAMPLER}',
        loader(f'in_order=True, {SAMPLER}'),
    ),
    Bad(
        "the sampler's drop_last that is no switch",
        'AUSAM',
        loader("batch_sampler=dict(type='AUSAMSampler', drop_last='no')"),
        "drop_last='no'",
        'drop_last=True',
        loader("batch_sampler=dict(type='AUSAMSampler', drop_last=True)"),
    ),
    Bad(
        'the sampler with an unknown argument',
        'AUSAM',
        loader("batch_sampler=dict(type='AUSAMSampler', sampling_ratio=0.5)"),
        'train_dataloader.batch_sampler.sampling_ratio',
        'there are batch_size, drop_last, sampler',
        loader(SAMPLER),
    ),
    Bad(
        'the sampler with a typing error',
        'AUSAM',
        loader("batch_sampler=dict(type='AUSAMSamplr')"),
        'train_dataloader.batch_sampler.type',
        "did you mean 'AUSAMSampler'",
        loader(SAMPLER),
    ),
    Bad(
        'the sampler as a name',
        'AUSAM',
        loader("batch_sampler='AUSAMSampler'"),
        "batch_sampler='AUSAMSampler'",
        SAMPLER,
        loader(SAMPLER),
    ),
    Bad(
        'an IndexedDataset without a data set',
        'AUSAM',
        loader("dataset=dict(_delete_=True, type='IndexedDataset')"),
        'train_dataloader.dataset',
        "dict(type='IndexedDataset', dataset=",
        loader("dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='ToySamples', count=8))"),
    ),
    Bad(
        'an IndexedDataset whose name is no text',
        'AUSAM',
        loader("dataset=dict(_delete_=True, type='IndexedDataset', name=1, dataset=dict(type='ToySamples', count=8))"),
        'name=1',
        "name='coco'",
        loader(
            "dataset=dict(_delete_=True, type='IndexedDataset', name='coco', dataset=dict(type='ToySamples', count=8))"
        ),
    ),
)

RUNS = (
    Bad(
        "a hook's interval of 0",
        'SAM',
        "custom_hooks = [dict(type='SharpnessHook', interval=0)]",
        'interval=0',
        "dict(type='SharpnessHook', interval=50)",
        "custom_hooks = [dict(type='SharpnessHook', interval=50)]",
    ),
    Bad(
        'a hook with an unknown argument',
        'ESAM',
        "custom_hooks = [dict(type='SharpnessHook', intervall=5)]",
        "'intervall'",
        'It takes interval',
        "custom_hooks = [dict(type='SharpnessHook', interval=5)]",
    ),
    Bad(
        'a hook with a typing error',
        'SAM',
        "custom_hooks = [dict(type='SharpnesHook')]",
        'custom_hooks.0.type',
        "did you mean 'SharpnessHook'",
        "custom_hooks = [dict(type='SharpnessHook')]",
    ),
    Bad(
        'a hook that is a name',
        'SAM',
        "custom_hooks = ['SharpnessHook']",
        "custom_hooks.0='SharpnessHook'",
        "dict(type='SharpnessHook')",
        "custom_hooks = [dict(type='SharpnessHook')]",
    ),
    Bad(
        'SharpnessHook without a wrapper of ours',
        'SAM',
        wrapper('_delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1)'),
        'SharpnessHook',
        "optim_wrapper = dict(type='SAMOptimWrapper'",
        wrapper('_delete_=True, type="SAMOptimWrapper", optimizer=dict(type="SGD", lr=0.1)'),
    ),
    Bad(
        "a logger's interval of 0",
        'SAM',
        'default_hooks = dict(logger=dict(interval=0))',
        'default_hooks.logger',
        "dict(type='LoggerHook', interval=50)",
        "default_hooks = dict(logger=dict(type='LoggerHook', interval=50))",
    ),
    Bad(
        "a checkpoint's interval that is no number",
        'SAM',
        "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval='1'))",
        "default_hooks.checkpoint.interval='1'",
        "dict(type='CheckpointHook', interval=50)",
        "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=50))",
    ),
    Bad(
        'a default hook without a type',
        'SAM',
        'default_hooks = dict(checkpoint=dict(interval=1))',
        'default_hooks.checkpoint',
        'dict(type=',
        "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))",
    ),
    Bad(
        'a batch size of 0',
        'AUSAM',
        loader('batch_size=0'),
        'train_dataloader.batch_size=0',
        'train_dataloader = dict(batch_size=32)',
        loader('batch_size=32'),
    ),
    Bad(
        'a negative number of workers',
        'SAM',
        loader('num_workers=-1'),
        'train_dataloader.num_workers=-1',
        'num_workers=4',
        loader('num_workers=0'),
    ),
    Bad('no data loader', 'SAM', 'train_dataloader = None', 'train_dataloader is missing', 'train_dataloader = dict('),
    Bad(
        'no train_cfg',
        'SAM',
        'train_cfg = None',
        'train_cfg is missing',
        'train_cfg = dict(by_epoch=True, max_epochs=10)',
    ),
    Bad(
        'a model with an unknown argument',
        'SAM',
        'model = dict(norms=True)',
        'model.norms',
        "did you mean 'norm'",
        'model = dict(norm=True)',
    ),
    Bad(
        'a model with a typing error',
        'AUSAM',
        "model = dict(type='ToyNett')",
        'model.type',
        "did you mean 'ToyNet'",
        "model = dict(type='ToyNet')",
    ),
    Bad(
        'a seed that is no number',
        'SAM',
        "randomness = dict(seed='x')",
        "randomness.seed='x'",
        'randomness = dict(seed=0)',
        'randomness = dict(seed=0)',
    ),
    Bad(
        'a schedule with an unknown argument',
        'SAM',
        "param_scheduler = dict(type='LinearLR', start=0.1)",
        'param_scheduler.start',
        'start_factor',
        "param_scheduler = dict(type='LinearLR', start_factor=0.1)",
    ),
    Bad(
        'load_from that is no path',
        'SAM',
        'load_from = 5',
        'load_from=5',
        "load_from = 'work_dirs/mine'",
        'load_from = None',
    ),
)

QUANTIZATION = (
    Bad(
        'a bit width of 9',
        'SAM',
        POLICY.format('weight_bit_width=9'),
        'weight_bit_width=9',
        'policy=dict(weight_bit_width=4',
    ),
    Bad('an unknown key of the policy', 'AUSAM', POLICY.format('bits=4'), "['bits']", 'policy=dict(weight_bit_width=4'),
    Bad(
        'unknown scales',
        'SAM',
        POLICY.format("act_scales='learnt'"),
        "act_scales='learnt'",
        "policy=dict(act_scales='learned', …)",
    ),
    Bad(
        'a skip pattern that matches nothing',
        'SAM',
        POLICY.format("skip='hed'"),
        "['hed'] match no layer",
        "policy=dict(skip=['conv'], …)",
    ),
    Bad('a skip pattern that is no pattern', 'SAM', POLICY.format("skip='('"), "skip='('", "skip=['head.final_layer']"),
    Bad(
        'layers that are no list',
        'ESAM',
        POLICY.format("layers=dict(pattern='head')"),
        'layers=',
        "policy=dict(layers=[dict(pattern='^head', weight_bit_width=8)], …)",
    ),
    Bad(
        'a policy that is a number',
        'SAM',
        'quantization = dict(policy=4)',
        'quantization.policy=4',
        'quantization = dict(policy=dict(',
    ),
    Bad(
        'an input size of one number',
        'SAM',
        'quantization = dict(policy=dict(input_size=6))',
        'input_size=6',
        'policy=dict(input_size=(192, 256), …)',
    ),
    Bad(
        'calibration on no batches',
        'AUSAM',
        POLICY.format('') + '\nquantization["calibration"] = dict(num_batches=0)',
        'num_batches=0',
        "dict(type='CalibrationHook', num_batches=16)",
    ),
    Bad(
        'nothing to freeze',
        'SAM',
        "custom_imports = dict(imports=['mm_sharp.quantization'])\ncustom_hooks = [dict(type='FreezeHook')]",
        'batchnorm_stats=None',
        "dict(type='FreezeHook', batchnorm_stats=6, quantizer_scales=8)",
        "custom_imports = dict(imports=['mm_sharp.quantization'])\ncustom_hooks = [dict(type='FreezeHook', batchnorm_stats=0)]",
    ),
)

CASES = (*ARGUMENTS, *OPTIMIZERS, *SAMPLES, *RUNS, *QUANTIZATION)
