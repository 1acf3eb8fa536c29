_base_ = [
    'mmpose::body_2d_keypoint/topdown_regression/coco/td-reg_res50_rle-8xb64-210e_coco-256x192.py',
    '../_base_/ausam.py',
]

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]
