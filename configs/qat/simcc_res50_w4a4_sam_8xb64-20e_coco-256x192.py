_base_ = ['./_base_/simcc_res50_coco.py', '../_base_/quantization/w4a4.py', '../_base_/sam.py']
