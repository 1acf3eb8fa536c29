# 2,000 pictures of Fashion-MNIST, after MMPretrain's recipe for MNIST: all but the model.
# Rows 50,000 to 52,000 of the training file are what settings are chosen by; the test file is reported.
_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['mm_sharp', 'mm_sharp.analysis.study.fashion_mnist'])
data_hint = 'the files of Fashion-MNIST, unpacked, in data/fashion-mnist; Debian has them as dataset-fashion-mnist'

batch_size = 64
max_epochs = 30

pipeline = [dict(type='Resize', scale=32), dict(type='PackInputs')]
source = dict(
    type='FlippedFashionMNIST',
    data_root='data/fashion-mnist',
    download=False,
    pipeline=pipeline,
)
places = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    **places,
    batch_size=batch_size,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**source, count=2000, flipped=0.0),
)
held_out = dict(**places, batch_size=500, sampler=dict(type='DefaultSampler', shuffle=False))
val_dataloader = dict(**held_out, dataset=dict(**source, start=50000, count=2000))
test_dataloader = dict(**held_out, dataset=dict(**source, split='test', test_mode=True))
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = dict(
    type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, eta_min=0, by_epoch=True, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_epochs))
auto_scale_lr = dict(base_batch_size=batch_size)
