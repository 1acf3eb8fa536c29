# AUSAM. Its values are those of the fragment, not of a paper's experiment on CIFAR.
_base_ = ['./resnet18_sgd_b128-200e_cifar100.py', '../_base_/ausam.py']

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [_base_.sharp_hook]
