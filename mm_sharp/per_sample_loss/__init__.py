"""The loss of every sample in a batch, from the forward pass that trains on the batch.

ESAM and AUSAM need l_i for every sample i of any model, with no change to its losses. Forward hooks on the outermost
loss modules evaluate *the same module on every sample as a batch of one*, l_i = loss(x_i), and the l_i of all loss
modules that the forward called are added up::

    per_sample = PerSampleLoss(model)
    with per_sample.record() as record:
        output = model(inputs, data_samples, mode='loss')
    total, _ = model.parse_losses(output)
    record.losses(total)        # float32, (N,): what the model would return for each sample alone

What a batch makes of its l_i is found by comparison: their SUM (``KLDiscretLoss``), their MEAN (most), or NEITHER,
which is refused, because no weight on l_i is then a weight on the sample. ``docs/per_sample_losses.md`` lists the
heads. Read ``recorder`` (the hooks) first, then ``evaluate`` and ``record``.
"""

from mm_sharp.per_sample_loss.find import PerSampleLossError
from mm_sharp.per_sample_loss.record import LossRecord, LossTerm, Reduction
from mm_sharp.per_sample_loss.recorder import PerSampleLoss

__all__ = ['LossRecord', 'LossTerm', 'PerSampleLoss', 'PerSampleLossError', 'Reduction']
