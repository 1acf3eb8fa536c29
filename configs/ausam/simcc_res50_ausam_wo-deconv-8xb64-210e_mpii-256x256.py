_base_ = [
    'mmpose::body_2d_keypoint/simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py',
    '../_base_/ausam.py',
]

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]
