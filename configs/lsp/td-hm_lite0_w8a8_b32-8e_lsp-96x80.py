# W8A8 quantization-aware fine-tuning of the heatmap model, with the base optimizer.
_base_ = ['./_base_/td-hm_lite0_qat.py', '../_base_/quantization/w8a8.py']
