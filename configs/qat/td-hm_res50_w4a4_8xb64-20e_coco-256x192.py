_base_ = ['./_base_/td-hm_res50_coco.py', '../_base_/quantization/w4a4.py']
