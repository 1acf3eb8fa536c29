# SAM in every fifth step, the base optimizer in the others, for any config; used as sam.py is, with the same names, so
# that changing over is one word. With `adaptive=True, rho=0.5, perturb='auto'` it is ASAM in every fifth step.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# The scale of rho is sam.py's. A second pass in one step of 5: a step costs 1 + 1/5 = 1.20 of the base optimizer's on
# average.
sharp_optim_wrapper = dict(type='SAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights', interval=5)
sharp_hook = dict(type='SharpnessHook')
