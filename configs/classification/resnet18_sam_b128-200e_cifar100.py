# SAM. rho is its paper's value.
_base_ = ['./resnet18_sgd_b128-200e_cifar100.py', '../_base_/sam.py']

optim_wrapper = dict(_base_.sharp_optim_wrapper, rho=0.05, adaptive=False, perturb='auto')
custom_hooks = [_base_.sharp_hook]
