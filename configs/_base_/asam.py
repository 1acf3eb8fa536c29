# ASAM (Kwon et al. 2021) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho and eta are the paper's values for CIFAR. A weight's perturbation is proportional to its own size, so rho is ten
# times SAM's and more.
sharp_optim_wrapper = dict(type='SAMOptimWrapper', rho=0.5, adaptive=True, eta=0.01)
sharp_hook = dict(type='SharpnessHook')
