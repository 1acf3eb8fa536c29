# SAM. rho is its paper's value.
_base_ = ['./resnet18_sgd_b128-200e_cifar10.py', '../_base_/sam.py']

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [_base_.sharp_hook]
