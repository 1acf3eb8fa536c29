# SAM (Foret et al. 2021) for any config: added to `_base_`, and nothing else.
#
#   _base_ = ['mmpose::body_2d_keypoint/…/some_recipe.py', 'mm_sharp::_base_/sam.py']
#   optim_wrapper = dict(rho=0.1)   # optional: goes before what is here, as the recipe's own settings do
#
# MMEngine refuses two entries of `_base_` with the same key, and every recipe has `optim_wrapper` and `custom_hooks`.
# So the two dicts have names of their own, and take effect when the config has been read
# (mm_sharp/config/fragments.py).
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is the paper's value.
sharp_optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05)
sharp_hook = dict(type='SharpnessHook')
