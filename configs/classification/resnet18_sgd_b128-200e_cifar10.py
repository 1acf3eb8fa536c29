# The base optimizer alone: what the other configs on CIFAR-10 are compared with.
_base_ = ['./_base_/resnet18_b128-200e.py', 'mmpretrain::_base_/datasets/cifar10_bs16.py']

train_dataloader = dict(batch_size=128, persistent_workers=True)
# The batch size is ours, for speed: it changes no result of an evaluation.
val_dataloader = dict(batch_size=128, persistent_workers=True)
test_dataloader = dict(batch_size=128)
