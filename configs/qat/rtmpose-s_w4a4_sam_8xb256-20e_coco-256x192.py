_base_ = ['./_base_/rtmpose-s_coco.py', '../_base_/quantization/w4a4.py', '../_base_/sam.py']
