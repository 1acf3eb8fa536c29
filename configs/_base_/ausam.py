# AUSAM (Deng et al. 2025) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is the SAM paper's. sampling_ratio=0.6 costs 2 * 0.6 = 1.2 of the base optimizer's step; 0.5 would cost as much as
# the base optimizer. s_min is ours: no sample is more than s_max / s_min = 3.3 times as likely as another of its batch.
sharp_optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.6, s_min=0.3, s_max=1.0)
sharp_hook = dict(type='SharpnessHook')
