"""A sweep over the models that MMPretrain, MMDetection and MMPose ship: ``make sweep``.

At rho = 0 a step of SAM has to be the base optimizer's, bit for bit, whatever the model does in its forward. Every
distinct model of the three packages that can be built here is made shallow and tried; see ``docs/model_sweep.md``.
"""

import mm_sharp  # noqa: F401  # before MMDetection: it mends what MMCV's missing operators break
