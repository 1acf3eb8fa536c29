# W4A4, SAM. rho is its paper's value, for float models.
_base_ = ['./resnet18_w4a4_sgd_b128-20e_cifar10.py', '../_base_/sam.py']

optim_wrapper = dict(rho=0.05, adaptive=False, perturb='auto')
