# AUSAM by its authors' schedule, as the fragment has it. They train with rho=0.1 and batches of 256.
_base_ = ['./resnet18_sgd_b128-200e_cifar100.py', '../_base_/ausam.py']

optim_wrapper = dict(_base_.sharp_optim_wrapper, rho=0.05, adaptive=False, perturb='auto')
custom_hooks = [_base_.sharp_hook]
