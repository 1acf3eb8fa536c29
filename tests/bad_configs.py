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


def wrapper(what: str, method: str, bad: str, good: str, key: str = '', shows: str = '') -> Bad:
    """Wrong arguments of the optimizer wrapper and right ones: what the line must name and show, unless told."""
    return Bad(what, method, f'optim_wrapper = dict({bad})', key or bad, shows or good, f'optim_wrapper = dict({good})')


def loader(what: str, method: str, bad: str, good: str, key: str = '', shows: str = '') -> Bad:
    """The same for the data loader."""
    wrong, right = f'train_dataloader = dict({bad})', f'train_dataloader = dict({good})'
    return Bad(what, method, wrong, key or bad, shows or good, right)


OF_SGD = "optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9)"

# fmt: off

ARGUMENTS = (
    wrapper('a negative radius', 'SAM', 'rho=-0.1', 'rho=0.05'),
    wrapper('a radius that is not a number', 'SAM', "rho='0.05'", 'rho=0.05'),
    wrapper('a radius of nan', 'AUSAM', "rho=float('nan')", 'rho=0.05', key='rho=nan'),
    wrapper('an unknown adaptive', 'SAM', "adaptive='yes'", 'adaptive=True', key='adaptive='),
    wrapper('eta below 0', 'SAM', 'eta=-1', 'eta=0.01'),
    wrapper('eps of 0', 'SAM', 'eps=0', 'eps=1e-12'),
    wrapper('sync_perturbation that is not True or False', 'SAM', 'sync_perturbation=1', 'sync_perturbation=True'),
    wrapper('replay_rng that is not True or False', 'ESAM', 'replay_rng=None', 'replay_rng=True'),
    wrapper('an unknown dtype', 'SAM', "dtype='fp16'", "dtype='float16'"),
    wrapper('a loss scale of inf', 'SAM', "dtype='float16', loss_scale=float('inf')",
        "dtype='float16', loss_scale=512.0", key='loss_scale=inf', shows='loss_scale=512.0'),
    wrapper('a loss scale with an unknown key', 'SAM', "dtype='float16', loss_scale=dict(scale=2.0)",
        "dtype='float16', loss_scale=dict(init_scale=512.0, growth_interval=1000)", key='loss_scale=',
        shows='dict(init_scale=512.0, growth_interval=1000)'),
    wrapper('a loss scale whose start is not a number', 'AUSAM', "dtype='float16', loss_scale=dict(init_scale='x')",
        "dtype='float16', loss_scale=dict(init_scale=512.0)", key="init_scale='x'", shows='init_scale=512.0'),
    wrapper('clip_grad that is a number', 'SAM', 'clip_grad=1.0', 'clip_grad=dict(max_norm=1.0)'),
    wrapper('clip_grad with an unknown key', 'ESAM', 'clip_grad=dict(max_nrm=1.0)', 'clip_grad=dict(max_norm=1.0)',
        key="'max_nrm'"),
    wrapper('clip_grad below 0', 'SAM', 'clip_grad=dict(max_norm=-1.0)', 'clip_grad=dict(max_norm=1.0)',
        key="'max_norm': -1.0"),
    wrapper("a norm's limit for clipping values", 'AUSAM', "clip_grad=dict(type='value', max_norm=1.0)",
        "clip_grad=dict(type='value', clip_value=0.1)", key='clip_grad=', shows="dict(type='value', clip_value=0.1)"),
    wrapper('accumulative_counts of 0', 'ESAM', 'accumulative_counts=0', 'accumulative_counts=4'),
    wrapper('accumulative_counts that is not an integer', 'AUSAM', 'accumulative_counts=1.5', 'accumulative_counts=4'),
    wrapper('perturb of an unknown name', 'SAM', "perturb='none'", "perturb='weights'"),
    wrapper('perturb with an unknown key', 'ESAM', 'perturb=dict(norms=False)', 'perturb=dict(norm=False)',
        key="['norms']", shows='perturb=dict(norm=False'),
    wrapper('perturb that matches nothing', 'AUSAM', "perturb=dict(include='bakbone')", "perturb='all'",
        key="include pattern 'bakbone'"),
    wrapper('perturb that leaves nothing', 'SAM', "perturb=dict(exclude=['.'])", "perturb='all'", key='perturb='),
    wrapper('perturb_quantized on a float model', 'SAM', 'perturb_quantized=True', 'perturb_quantized=False',
        shows="type='QuantizedModel'"),
    wrapper('beta of 0', 'ESAM', 'beta=0', 'beta=0.6'),
    wrapper('gamma above 1', 'ESAM', 'gamma=1.5', 'gamma=0.5'),
    wrapper('an unknown selection', 'ESAM', "selection='hist'", "selection='history'", shows="'history'"),
    wrapper('refresh of 0', 'ESAM', "selection='history', refresh=0", "selection='history', refresh=10",
        key='refresh=0', shows='refresh=10'),
    wrapper('a sampling_ratio of 0', 'AUSAM', 'sampling_ratio=0', 'sampling_ratio=0.5'),
    wrapper('s_min of 0', 'AUSAM', 's_min=0', 's_min=0.1'),
    wrapper('s_min above s_max', 'AUSAM', 's_min=2', 's_min=2, s_max=2', shows='s_max=2'),
    wrapper('reweight that is not True or False', 'AUSAM', "reweight='no'", 'reweight=True'),
    wrapper('an unknown preference', 'AUSAM', "prefer='hard'", "prefer='large'"),
    wrapper('a clip_quantile in percent', 'AUSAM', 'clip_quantile=90', 'clip_quantile=0.9'),
    wrapper('a history_momentum of 1', 'AUSAM', 'history_momentum=1', 'history_momentum=0.9'),
    wrapper('an argument with a typing error', 'SAM', 'rhoo=0.1', 'rho=0.1', key='rhoo=0.1',
        shows="did you mean 'rho'"),
    wrapper("AUSAM's argument for SAM", 'SAM', 'sampling_ratio=0.5', "type='AUSAMOptimWrapper', sampling_ratio=0.5",
        key='sampling_ratio=0.5 is not allowed'),
    wrapper("ESAM's argument for AUSAM", 'AUSAM', 'beta=0.5', "type='ESAMOptimWrapper', beta=0.5",
        key='beta=0.5 is not allowed'),
    wrapper("AUSAM's argument for ESAM", 'ESAM', 's_min=0.5', "type='AUSAMOptimWrapper', s_min=0.5",
        key='s_min=0.5 is not allowed'),
    wrapper("an argument of MMEngine's AmpOptimWrapper", 'SAM', 'use_fsdp=True',
        "dtype='float16', loss_scale='dynamic'", key='use_fsdp=True', shows='take it out'),
)

OPTIMIZERS = (
    Bad('no optim_wrapper', 'SAM', 'optim_wrapper = None', 'optim_wrapper',
        "perturb='weights', optimizer="),
    Bad('an optim_wrapper that is a name', 'SAM', "optim_wrapper = 'SAMOptimWrapper'",
        "optim_wrapper='SAMOptimWrapper'", "perturb='weights', optimizer="),
    wrapper('an optim_wrapper without type and optimizer', 'SAM', '_delete_=True, rho=0.1',
        "_delete_=True, type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=0.01)", key='optim_wrapper',
        shows="perturb='weights', optimizer="),
    wrapper('an unknown wrapper', 'SAM', "type='SamOptimWraper'", "type='SAMOptimWrapper'",
        key='optim_wrapper.type', shows="did you mean 'SAMOptimWrapper'"),
    wrapper('no optimizer', 'ESAM', "_delete_=True, type='ESAMOptimWrapper'",
        "_delete_=True, type='ESAMOptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)",
        key='optim_wrapper.optimizer', shows='optimizer=dict(type='),
    wrapper('an optimizer that is a name', 'AUSAM', "optimizer='SGD'",
        OF_SGD, key='optim_wrapper.optimizer',
        shows="optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"),
    wrapper('an unknown optimizer', 'SAM', "optimizer=dict(type='Sgd')", "optimizer=dict(type='SGD')",
        key='optim_wrapper.optimizer.type', shows="did you mean 'SGD'"),
    wrapper('an optimizer with an unknown argument', 'SAM', 'optimizer=dict(learning_rate=1.0)',
        OF_SGD, key='learning_rate',
        shows="optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"),
    wrapper('a negative learning rate', 'AUSAM', 'optimizer=dict(lr=-1.0)',
        OF_SGD, key='Invalid learning rate',
        shows="optimizer=dict(type='SGD', lr=0.01"),
    wrapper('a learning rate that is not a number', 'ESAM', "optimizer=dict(lr='0.1')",
        OF_SGD, key="'lr': '0.1'",
        shows="optimizer=dict(type='SGD', lr=0.01"),
    wrapper('an optimizer that needs a closure', 'SAM', "optimizer=dict(_delete_=True, type='LBFGS')",
        OF_SGD, key='optimizer=LBFGS',
        shows="optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"),
    wrapper('an unknown key of paramwise_cfg', 'SAM', 'paramwise_cfg=dict(bias_lr_mul=2.0)',
        'paramwise_cfg=dict(bias_lr_mult=2.0)', key="'bias_lr_mul'", shows="did you mean 'bias_lr_mult'"),
    wrapper('a factor of paramwise_cfg that is not a number', 'AUSAM', "paramwise_cfg=dict(bias_lr_mult='2')",
        'paramwise_cfg=dict(bias_lr_mult=2.0)', key="bias_lr_mult='2'", shows='bias_lr_mult=2.0'),
    wrapper('a factor of custom_keys with a typing error', 'SAM',
        'paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mul=0.1)))',
        'paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=0.1)))', key='custom_keys.head.lr_mul',
        shows="did you mean 'lr_mult'"),
    wrapper('factors of a missing weight decay', 'SAM', 'paramwise_cfg=dict(norm_decay_mult=0.0)',
        'paramwise_cfg=dict(norm_decay_mult=0.0), optimizer=dict(weight_decay=1e-4)',
        key='optim_wrapper.paramwise_cfg', shows='weight_decay=1e-4)'),
    wrapper('custom_keys that are a list', 'SAM', "paramwise_cfg=dict(custom_keys=['head'])",
        'paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=0.1)))', key='custom_keys',
        shows='custom_keys=dict(backbone=dict(lr_mult=0.1))'),
    wrapper('an unknown constructor', 'SAM', "constructor='Mine'", 'rho=0.1',
        key='optim_wrapper.constructor', shows='custom_imports = dict(imports='),
    wrapper('two wrappers without a constructor', 'SAM',
        "_delete_=True, a=dict(type='SAMOptimWrapper', optimizer=dict(type='SGD', lr=0.1)), "
        "b=dict(type='SAMOptimWrapper', optimizer=dict(type='SGD', lr=0.1))",
        "_delete_=True, type='SAMOptimWrapper', optimizer=dict(type='SGD', lr=0.1)", key='optim_wrapper.constructor',
        shows="dict(constructor='MyConstructor'"),
    Bad('a fragment without a type', 'SAM',
        'sharp_optim_wrapper = dict(rho=0.1)\noptim_wrapper = dict(_delete_=True, optimizer=dict(type="SGD", '
        'lr=0.1))', 'sharp_optim_wrapper', "sharp_optim_wrapper = dict(type='SAMOptimWrapper'",
        "sharp_optim_wrapper = dict(type='SAMOptimWrapper')\noptim_wrapper = dict(_delete_=True, "
        'optimizer=dict(type="SGD", lr=0.1))'),
    Bad('a strategy without its runner', 'SAM', "strategy = dict(type='SingleDeviceStrategy')", 'strategy',
        "runner_type = 'FlexibleRunner'",
        "runner_type = 'FlexibleRunner'\nstrategy = dict(type='SingleDeviceStrategy')"),
    Bad('an unknown runner', 'SAM', "runner_type = 'FlexibelRunner'", 'runner_type',
        "runner_type='FlexibleRunner'", "runner_type = 'FlexibleRunner'"),
)

SAMPLES = (
    Bad('a loss that no hook sees', 'ESAM', "model = dict(type='FunctionalToy')", 'no loss module was called',
        "optim_wrapper = dict(type='SAMOptimWrapper'",
        "model = dict(type='FunctionalToy')\noptim_wrapper = dict(type='SAMOptimWrapper')"),
    Bad('a loss that no hook sees', 'AUSAM', "model = dict(type='FunctionalToy')", 'no loss module was called',
        "optim_wrapper = dict(type='SAMOptimWrapper'",
        "model = dict(type='FunctionalToy')\noptim_wrapper = dict(type='SAMOptimWrapper')"),
    loader('samples without ids', 'AUSAM', "dataset=dict(type='NamelessSamples')",
        "dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='NamelessSamples', count=20))",
        key='sample_idx', shows="type='IndexedDataset', dataset="),
    loader('samples without ids, drawn in the loader', 'AUSAM',
        "dataset=dict(type='NamelessSamples'), batch_sampler=dict(type='AUSAMSampler')",
        "dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='NamelessSamples', count=20)), "
        "batch_sampler=dict(type='AUSAMSampler')", key="'sample_idx'", shows="type='IndexedDataset', dataset="),
    Bad('samples without ids for a history', 'ESAM',
        'train_dataloader = dict(dataset=dict(type=\'NamelessSamples\'))\noptim_wrapper = dict(selection="history")',
        'sample_idx', "type='IndexedDataset', dataset=",
        "train_dataloader = dict(dataset=dict(_delete_=True, type='IndexedDataset', "
        'dataset=dict(type=\'NamelessSamples\', count=20)))\noptim_wrapper = dict(selection="history")'),
    loader('two data sets with the same ids', 'AUSAM',
        "dataset=dict(_delete_=True, type='ConcatDataset', datasets=[dict(type='IndexedDataset', "
        "dataset=dict(type='ToySamples', count=8)), dict(type='IndexedDataset', "
        "dataset=dict(type='ToySamples', count=8))])",
        "dataset=dict(_delete_=True, type='ConcatDataset', datasets=[dict(type='IndexedDataset', name='first', "
        "dataset=dict(type='ToySamples', count=8)), dict(type='IndexedDataset', name='second', "
        "dataset=dict(type='ToySamples', count=8))])", key="same name 'dataset'",
        shows="dict(type='IndexedDataset', name='first'"),
    Bad('gradients that are sparse', 'SAM', "model = dict(type='SparseToy')", "['table.weight'] are sparse",
        'sparse=False', "model = dict(type='SparseToy', sparse=False)"),
    Bad('gradients that are sparse', 'AUSAM', "model = dict(type='SparseToy')", "['table.weight'] are sparse",
        "perturb=dict(exclude=['^NAME'])",
        "model = dict(type='SparseToy')\noptim_wrapper = dict(perturb=dict(exclude=['^table']))"),
    Bad('the sampler with another wrapper', 'SAM', "train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'))",
        'AUSAMSampler draws the batches for one AUSAMOptimWrapper', "dict(type='AUSAMOptimWrapper'",
        "train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'))\noptim_wrapper = "
        "dict(type='AUSAMOptimWrapper')"),
    loader('the batch sampler as a sampler', 'AUSAM', "sampler=dict(_delete_=True, type='AUSAMSampler')",
        "batch_sampler=dict(type='AUSAMSampler')", key='train_dataloader.sampler',
        shows="batch_sampler=dict(type='AUSAMSampler'"),
    loader('the sampler with drop_last beside it', 'AUSAM', "drop_last=True, batch_sampler=dict(type='AUSAMSampler')",
        "drop_last=False, batch_sampler=dict(type='AUSAMSampler', drop_last=True)", key='train_dataloader.drop_last'),
    loader('the sampler with batches out of order', 'AUSAM',
        "in_order=False, batch_sampler=dict(type='AUSAMSampler')",
        "in_order=True, batch_sampler=dict(type='AUSAMSampler')", key='train_dataloader.in_order=False',
        shows='Take it out of train_dataloader'),
    loader("the sampler's drop_last that is not True or False", 'AUSAM',
        "batch_sampler=dict(type='AUSAMSampler', drop_last='no')",
        "batch_sampler=dict(type='AUSAMSampler', drop_last=True)", key="drop_last='no'", shows='drop_last=True'),
    loader('the sampler with an unknown argument', 'AUSAM',
        "batch_sampler=dict(type='AUSAMSampler', sampling_ratio=0.5)", "batch_sampler=dict(type='AUSAMSampler')",
        key='train_dataloader.batch_sampler.sampling_ratio', shows='there are batch_size, drop_last, sampler'),
    loader('the sampler with a typing error', 'AUSAM', "batch_sampler=dict(type='AUSAMSamplr')",
        "batch_sampler=dict(type='AUSAMSampler')", key='train_dataloader.batch_sampler.type',
        shows="did you mean 'AUSAMSampler'"),
    loader('the sampler as a name', 'AUSAM', "batch_sampler='AUSAMSampler'", "batch_sampler=dict(type='AUSAMSampler')"),
    loader('an IndexedDataset without a data set', 'AUSAM', "dataset=dict(_delete_=True, type='IndexedDataset')",
        "dataset=dict(_delete_=True, type='IndexedDataset', dataset=dict(type='ToySamples', count=8))",
        key='train_dataloader.dataset', shows="dict(type='IndexedDataset', dataset="),
    loader('an IndexedDataset whose name is not text', 'AUSAM',
        "dataset=dict(_delete_=True, type='IndexedDataset', name=1, dataset=dict(type='ToySamples', count=8))",
        "dataset=dict(_delete_=True, type='IndexedDataset', name='coco', dataset=dict(type='ToySamples', count=8))",
        key='name=1', shows="name='coco'"),
)

RUNS = (
    Bad("a hook's interval of 0", 'SAM', "custom_hooks = [dict(type='SharpnessHook', interval=0)]", 'interval=0',
        "dict(type='SharpnessHook', interval=50)", "custom_hooks = [dict(type='SharpnessHook', interval=50)]"),
    Bad('a hook with an unknown argument', 'ESAM', "custom_hooks = [dict(type='SharpnessHook', intervall=5)]",
        "'intervall'", 'SharpnessHook takes interval', "custom_hooks = [dict(type='SharpnessHook', interval=5)]"),
    Bad('a hook with a typing error', 'SAM', "custom_hooks = [dict(type='SharpnesHook')]", 'custom_hooks.0.type',
        "did you mean 'SharpnessHook'", "custom_hooks = [dict(type='SharpnessHook')]"),
    Bad('a hook that is a name', 'SAM', "custom_hooks = ['SharpnessHook']", "custom_hooks.0='SharpnessHook'",
        "dict(type='SharpnessHook')", "custom_hooks = [dict(type='SharpnessHook')]"),
    wrapper('SharpnessHook without a wrapper of ours', 'SAM',
        "_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)",
        "_delete_=True, type='SAMOptimWrapper', optimizer=dict(type='SGD', lr=0.1)", key='SharpnessHook',
        shows="optim_wrapper = dict(type='SAMOptimWrapper'"),
    Bad('a hook that cannot tell which is better', 'SAM',
        "custom_hooks = [dict(type='EarlyStoppingHook', monitor='mine')]", 'rule must be specified. Write',
        "dict(type='EarlyStoppingHook', monitor=…, …)",
        "custom_hooks = [dict(type='EarlyStoppingHook', monitor='mine', rule='greater', strict=False)]"),
    Bad("None in the place of a hook that is not MMEngine's", 'SAM', 'default_hooks = dict(timer=None, sharpness=None)',
        'default_hooks.sharpness=None', 'default_hooks = dict(_delete_=True, …)',
        'default_hooks = dict(_delete_=True, timer=None)'),
    Bad("a logger's interval of 0", 'SAM', 'default_hooks = dict(logger=dict(interval=0))', 'default_hooks.logger',
        "dict(type='LoggerHook', interval=50)", "default_hooks = dict(logger=dict(type='LoggerHook', interval=50))"),
    Bad("a checkpoint's interval that is not a number", 'SAM',
        "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval='1'))",
        "default_hooks.checkpoint.interval='1'", "dict(type='CheckpointHook', interval=50)",
        "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=50))"),
    Bad('a default hook without a type', 'SAM', 'default_hooks = dict(checkpoint=dict(interval=1))',
        'default_hooks.checkpoint', 'dict(type=',
        "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))"),
    loader('a batch size of 0', 'AUSAM', 'batch_size=0', 'batch_size=32', key='train_dataloader.batch_size=0',
        shows='train_dataloader = dict(batch_size=32)'),
    loader('a negative number of workers', 'SAM', 'num_workers=-1', 'num_workers=0',
        key='train_dataloader.num_workers=-1', shows='num_workers=4'),
    Bad('no data loader', 'SAM', 'train_dataloader = None', 'train_dataloader is missing', 'train_dataloader = dict('),
    Bad('no train_cfg', 'SAM', 'train_cfg = None', 'train_cfg is missing',
        'train_cfg = dict(by_epoch=True, max_epochs=10)'),
    Bad('a model with an unknown argument', 'SAM', 'model = dict(norms=True)', 'model.norms', "did you mean 'norm'",
        'model = dict(norm=True)'),
    Bad('a model with a typing error', 'AUSAM', "model = dict(type='ToyNett')", 'model.type', "did you mean 'ToyNet'",
        "model = dict(type='ToyNet')"),
    Bad('a seed that is not a number', 'SAM', "randomness = dict(seed='x')", "randomness.seed='x'",
        'randomness = dict(seed=0)', 'randomness = dict(seed=0)'),
    Bad('a schedule with an unknown argument', 'SAM', "param_scheduler = dict(type='LinearLR', start=0.1)",
        'param_scheduler.start', 'start_factor', "param_scheduler = dict(type='LinearLR', start_factor=0.1)"),
    Bad('load_from that is not a path', 'SAM', 'load_from = 5', 'load_from=5', "load_from = 'work_dirs/mine/",
        'load_from = None'),
)

QUANTIZATION = (
    Bad('a bit width of 9', 'SAM', 'sharp_quantization = dict(policy=dict(input_size=(6, 6), weight_bit_width=9))',
        'weight_bit_width=9', 'policy=dict(weight_bit_width=8'),
    Bad('an unknown key of the policy', 'AUSAM', 'sharp_quantization = dict(policy=dict(input_size=(6, 6), bits=4))',
        "['bits']", 'policy=dict(weight_bit_width=4'),
    Bad('unknown scales', 'SAM', "sharp_quantization = dict(policy=dict(input_size=(6, 6), act_scales='learnt'))",
        "act_scales='learnt'", "policy=dict(act_scales='learned', …)"),
    Bad('a skip pattern that matches nothing', 'SAM',
        "sharp_quantization = dict(policy=dict(input_size=(6, 6), skip='hed'))", "['hed'] match no layer",
        "policy=dict(skip=['conv'], …)"),
    Bad('a skip pattern that is not a regular expression', 'SAM',
        "sharp_quantization = dict(policy=dict(input_size=(6, 6), skip='('))",
        "skip='('", "skip=['head.final_layer']"),
    Bad('layers that are not a list', 'ESAM',
        "sharp_quantization = dict(policy=dict(input_size=(6, 6), layers=dict(pattern='head')))", 'layers=',
        "policy=dict(layers=[dict(pattern='^head', weight_bit_width=8)], …)"),
    Bad('a policy that is a number', 'SAM', 'sharp_quantization = dict(policy=4)', "sharp_quantization={'policy': 4}",
        'sharp_quantization = dict(policy=dict('),
    Bad('an input size of one number', 'SAM', 'sharp_quantization = dict(policy=dict(input_size=6))', 'input_size=6',
        'policy=dict(input_size=(192, 256), …)'),
    Bad('calibration on no batches', 'AUSAM',
        'sharp_quantization = dict(policy=dict(input_size=(6, 6)), calibration=dict(num_batches=0))',
        'num_batches=0', "dict(type='CalibrationHook', num_batches=16)"),
    Bad('nothing to freeze', 'SAM',
        "custom_imports = dict(imports=['mm_sharp.quantization'])\ncustom_hooks = [dict(type='FreezeHook')]",
        'batchnorm_stats=None', "dict(type='FreezeHook', batchnorm_stats=6, quantizer_scales=8)",
        "custom_imports = dict(imports=['mm_sharp.quantization'])\ncustom_hooks = [dict(type='FreezeHook', "
        'batchnorm_stats=0)]'),
)
# fmt: on

CASES = (*ARGUMENTS, *OPTIMIZERS, *SAMPLES, *RUNS, *QUANTIZATION)
