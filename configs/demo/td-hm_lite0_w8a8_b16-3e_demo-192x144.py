# W8A8 quantization-aware training with the base optimizer, for ONNX Runtime.
_base_ = ['./_base_/td-hm_lite0_qat.py', '../_base_/quantization/w8a8_onnxruntime.py']
