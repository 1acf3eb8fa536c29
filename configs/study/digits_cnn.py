# A small CNN on scikit-learn's digits: 20 steps of 40 pictures an epoch, a few seconds a run on one core.
# The validation is on the split by which settings are chosen, the test on the one that is reported.
custom_imports = dict(imports=['mm_sharp', 'mm_sharp.analysis.study.digits'])
default_scope = 'mmengine'

batch_size = 40
# The base optimizer's best of learning rates 0.02 to 0.2, weight decays 3e-4 to 1e-2, and 20 or 40 epochs, by accuracy
# and likelihood on the select split, mean of 6 seeds (differences to its neighbours are within the seeds' noise).
base_lr = 0.1
weight_decay = 3e-3
max_epochs = 40

model = dict(type='DigitsNet', width=16)

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(type='DigitsDataset', split='train', flipped=0.0),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
)
val_dataloader = dict(
    batch_size=300,
    num_workers=0,
    dataset=dict(type='DigitsDataset', split='select'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
)
test_dataloader = dict(
    batch_size=350,
    num_workers=0,
    dataset=dict(type='DigitsDataset', split='report'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
)
val_evaluator = dict(type='DigitsAccuracy')
test_evaluator = dict(type='DigitsAccuracy')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=base_lr, momentum=0.9, weight_decay=weight_decay),
)
# It falls to 0 at the end of the training, step by step.
param_scheduler = dict(
    type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, eta_min=0, by_epoch=True, convert_to_iter_based=True
)

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20), checkpoint=dict(type='CheckpointHook', interval=max_epochs)
)
auto_scale_lr = dict(base_batch_size=batch_size)
