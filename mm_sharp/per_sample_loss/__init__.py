"""The loss of every sample in a batch, l_i = loss(x_i), from the forward pass that trains on it, of any model.

Forward hooks on the outermost loss modules evaluate the same module on every sample as a batch of one::

    per_sample = PerSampleLoss(model)
    with per_sample.record() as record:
        total, _ = model.parse_losses(model(inputs, data_samples, mode='loss'))
    record.losses(total)        # float32, (N,): what the model would return for each sample alone

Whether the batch's loss is their sum or mean is found by comparison; one that is neither is refused, because no weight
on l_i is then a weight on the sample. Read ``recorder`` (the hooks) first, then ``evaluate`` and ``record``.
"""

from mm_sharp.per_sample_loss.find import PerSampleLossError
from mm_sharp.per_sample_loss.record import LossRecord, LossTerm, Reduction
from mm_sharp.per_sample_loss.recorder import PerSampleLoss

__all__ = ['LossRecord', 'LossTerm', 'PerSampleLoss', 'PerSampleLossError', 'Reduction']
