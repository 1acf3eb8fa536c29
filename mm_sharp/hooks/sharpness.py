"""Log the sharpness that training sees."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS

from mm_sharp.errors import HOOK, UserError, check_positive_int
from mm_sharp.hooks.console import PREFIX, shorten_console_line
from mm_sharp.hooks.scale_report import ScaleReport
from mm_sharp.ops.model_call import unwrap
from mm_sharp.step.method import Passes
from mm_sharp.step.optim_wrappers import optim_wrappers
from mm_sharp.step.timing import StepRecord
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@HOOKS.register_module()
class SharpnessHook(Hook):  # type: ignore[misc]
    """Log what each step finds anyway, at the logger's interval: no extra pass, and no wait for the device in between.

    The scalars go to MMEngine's message hub as ``sharpness/…``, and so to TensorBoard, the JSON log and whatever other
    backend there is. The console has four of them, and their names without that: ``sharpness``, ``rho_relative``,
    ``linearity`` and ``g_norm``. (Before version 0.2 all went to the console, and no name had ``sharpness/``.)

    ====================  ===========================================================================
    ``L_w``               L(w), the loss of the first pass
    ``L_w_e``             L(w + e), the loss of the second pass
    ``sharpness``         L(w + e) - L(w)
    ``g_norm``            norm of the first gradient, without loss scaling; with ASAM and ``adaptive='tensor'`` of T g,
                          with Friendly SAM of g - sigma * m, which it perturbs along
    ``pass2_share``       fraction of the step's time spent in the second forward and backward pass
    ``rho_relative``      ||e|| / ||w||, over what is perturbed: how far the perturbation goes, whatever ``rho`` means
    ``linearity``         ``sharpness`` over the inner product of e and g, which it would be if the loss were linear:
                          near 0 or far above 1, e goes beyond what the gradient knows
    ``share_backbone`` …  share of the perturbation's squared norm in each top-level part of the model, where it has
                          several; of more than 5, those with most in the first logged step, and ``share_rest``

    ESAM and AUSAM
    ``mean_difference``   mean of l_i(w + e) - l_i(w) over the samples that they were measured of
    ``sampling_entropy``  how even the samples' chances (AUSAM), or loss differences (ESAM), are, from 0 to 1
    ``large_scores``      share of the batch whose score is above the middle between smallest and largest
    ``share_seen``        share of the training set in the history of loss differences
    ====================  ===========================================================================

    Where the only pass is at perturbed weights (momentum SAM), ``L_w`` is L(w + e).

    AUSAM's losses are those of the samples drawn, estimates of the whole batch's. ESAM's ``L_w_e`` is that of the whole
    batch where the step measured it (``selection='exact'``, or a step that refreshes the history), else that of the
    samples selected, which makes ``sharpness`` larger. In the steps between, its metrics are those of the averages that
    the samples are selected by, which have no sign.

    All are of one iteration and of rank 0: MMEngine's log processor does not smooth them. It is the iteration that is
    logged. Where not every step has a second pass (``interval=n``, LookSAM), it is the last one since the entry before
    that had one; if none had, only ``L_w`` is shown, of the iteration that is logged. With several optimizer wrappers
    the names are ``sharpness/WRAPPER.…``; the console's four are shared out.

    After the first step one line says how far the weights are moved, and where. Three warnings, each at most once and
    only in logged steps, say what to write: ``docs/scale.md`` has them.

    Args:
        interval: Iterations between two entries; by default the ``LoggerHook``'s.
    """

    priority = 'NORMAL'  # before LoggerHook, which reads the message hub

    def __init__(self, interval: int | None = None) -> None:
        if interval is not None:
            check_positive_int('SharpnessHook', 'interval', interval, example='50', form=HOOK)
        self.interval = interval
        self._interval = interval or 1
        self._wrappers: dict[str, TwoPassOptimWrapper] = {}
        self._reports: dict[str, ScaleReport] = {}
        self._written: set[str] = set()
        # Wrappers of which not every step has a second pass; and of each the last step since an entry that had one.
        self._sparse: set[str] = set()
        self._pending: dict[str, StepRecord] = {}

    def before_train(self, runner: Any) -> None:
        """Find the wrappers and the logger's interval."""
        found = optim_wrappers(runner.optim_wrapper).items()
        self._wrappers = {name and f'{name}.': w for name, w in found if isinstance(w, TwoPassOptimWrapper)}
        if not self._wrappers:
            raise UserError(
                f'SharpnessHook needs a sharpness-aware optimizer wrapper, but the config uses '
                f"{type(runner.optim_wrapper).__name__}: write optim_wrapper = dict(type='SAMOptimWrapper', ...), or "
                'take SharpnessHook out of custom_hooks'
            )
        model = unwrap(runner.model)
        self._sparse = {prefix for prefix, wrapper in self._wrappers.items() if wrapper.alternates}
        self._reports = {prefix: ScaleReport(wrapper, model) for prefix, wrapper in self._wrappers.items()}
        self._written = shorten_console_line(runner.log_processor, runner.message_hub, list(self._wrappers))
        self._written.clear()
        self._pending.clear()
        if self.interval is None:
            loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
            self._interval = loggers[0].interval if loggers else 10

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Have the step timed and measured if it may be logged."""
        due = self._is_due(runner, batch_idx)
        for prefix, wrapper in self._wrappers.items():
            is_first = not self._reports[prefix].introduced
            is_rare = prefix in self._sparse and wrapper.passes() is Passes.BOTH
            wrapper.record_timing = wrapper.record_sizes = due or is_first or is_rare

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keep the step if it had a second pass, and write to the message hub if it is time to."""
        due = self._is_due(runner, batch_idx)
        for prefix, wrapper in self._wrappers.items():
            step, report = wrapper.last_step, self._reports[prefix]
            if step is None:
                continue
            if not report.introduced:
                report.introduce(step)
            if step.perturbed_loss is None:
                self._sparse.add(prefix)
            else:
                self._pending[prefix] = step
            if due:
                logged = self._pending.pop(prefix, None)
                # A step with a second pass that waits for the logger is not mixed with another one's loss.
                if logged is None and f'{PREFIX}{prefix}L_w_e' not in self._written:
                    logged = step
                ours = {} if logged is None else {**_scalars(logged), **report.log_scalars(logged)}
                for name, value in {**ours, **wrapper.log_scalars()}.items():
                    runner.message_hub.update_scalar(f'{PREFIX}{prefix}{name}', value)
                    self._written.add(f'{PREFIX}{prefix}{name}')

    def _is_due(self, runner: Any, batch_idx: int) -> bool:
        # LoggerHook may log the last iteration of an epoch too: values must be there, and of that iteration.
        last = self.end_of_epoch(runner.train_dataloader, batch_idx)
        return bool(self.every_n_inner_iters(batch_idx, self._interval) or last)


def _scalars(step: StepRecord) -> dict[str, float]:
    loss = float(step.loss)
    scalars = {'L_w': loss}
    if step.perturbed_loss is not None and step.grad_norm is not None:
        perturbed = float(step.perturbed_loss)
        scalars.update(L_w_e=perturbed, sharpness=perturbed - loss, g_norm=float(step.grad_norm))
    if step.metrics is not None:
        scalars.update(step.metrics())
    if step.timer is not None and step.perturbed_loss is not None:
        seconds = step.timer.seconds()
        scalars['pass2_share'] = seconds['pass2'] / sum(seconds.values())
    return scalars
