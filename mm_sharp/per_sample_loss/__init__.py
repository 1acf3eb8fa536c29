"""The loss of every sample in a batch, from the forward pass that trains on the batch (ours).

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
heads.

======================  ===============================================================================
``layout.py``           which arguments of a loss have a row for every sample
``evaluate.py``         batches of one: analytic, by ``torch.func.vmap``, or in a loop
``reduction.py``        sum, mean or neither
``facts.py``            what earlier calls have shown of a loss module
``find.py``             where a model keeps its loss modules; heads whose rows are not samples
``record.py``           what one forward pass gave, and its check against the total
``recorder.py``         the hooks
======================  ===============================================================================
"""

from mm_sharp.per_sample_loss.find import PerSampleLossError
from mm_sharp.per_sample_loss.record import LossRecord, LossTerm
from mm_sharp.per_sample_loss.recorder import PerSampleLoss
from mm_sharp.per_sample_loss.reduction import Reduction

__all__ = ['LossRecord', 'LossTerm', 'PerSampleLoss', 'PerSampleLossError', 'Reduction']
