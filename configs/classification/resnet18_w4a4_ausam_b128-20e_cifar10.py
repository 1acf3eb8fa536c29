# W4A4, AUSAM by its authors' schedule for float models, as the fragment has it.
_base_ = ['./resnet18_w4a4_sgd_b128-20e_cifar10.py', '../_base_/ausam.py']

optim_wrapper = dict(rho=0.05, adaptive=False, perturb='auto')
