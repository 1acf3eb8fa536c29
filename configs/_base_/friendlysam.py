# Friendly SAM (Li et al. 2024) for any config; used as sam.py is, with the same names, so that
# changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is SAM's; sigma is the paper's value, lmbda the default of the authors' code. Two passes: a step costs 2.00.
sharp_optim_wrapper = dict(type='FriendlySAMOptimWrapper', rho=0.05, sigma=1.0, lmbda=0.9)
sharp_hook = dict(type='SharpnessHook')
