"""What a runtime computes in integers, and so where activations are quantized: ``target`` of a policy.

A layer always quantizes its weights and its input; that is ``'generic'``. What a runtime needs besides is a
:class:`Target`. ``docs/deployment.md`` has the rules' sources.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Where a runtime needs activations to be quantized, beyond the inputs of layers.

    Args:
        outputs: What convolutions put out (behind a ReLU, if one follows), and what is computed from it on the way to
            further convolutions: sums, products, activations, pooled and concatenated pictures.
        skips: The other input of a residual sum, beside that which a layer has just computed.
        signed: All activations in int8 around 0, never in uint8.
    """

    outputs: bool = False
    skips: bool = False
    signed: bool = False


TARGETS = {
    'generic': Target(),
    'onnxruntime': Target(outputs=True),
    'openvino': Target(skips=True),
    'tensorrt': Target(skips=True, signed=True),
}
