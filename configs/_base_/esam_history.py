# ESAM that selects by each sample's average loss difference instead of measuring it in every step (ours, not the
# paper's); used as sam.py is, with the same names.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho, beta and gamma are the authors' for ResNet-18 on CIFAR; refresh is ours. One step in ten selects as ESAM does and
# renews the averages: (9 * (2 + 0.6 + 3 * 0.5) + (3 + 0.6 + 3 * 0.5)) / 30 = 1.40 of the base optimizer's cost (1.37
# without).
sharp_optim_wrapper = dict(type='ESAMOptimWrapper', rho=0.05, beta=0.6, gamma=0.5, selection='history', refresh=10)
sharp_hook = dict(type='SharpnessHook')
