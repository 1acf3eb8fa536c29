"""The keys of a data set's samples by their index, before any picture is loaded (ours).

What a batch will show of a sample is known beforehand: its annotation, ``get_data_info(index)``, as far as the pipeline
packs it (the ``meta_keys`` of ``PackPoseInputs`` and the like; without such a transform, ``sample_idx``). The rule that
reads the keys of batches, :func:`mm_sharp.samples.keys.key_of`, reads that as well, so both give the same key.

- ``keys``: :class:`DatasetKeys`, and which combined data sets would share keys;
- ``tree``: which data set within others an index leads to;
- ``leaves``: the data sets that have samples of their own, and what is read of these.
"""

from mm_sharp.samples.dataset_keys.keys import DatasetKeys

__all__ = ['DatasetKeys']
