"""All that is measured of one model (ours)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_sharp.analysis.sharpness.ball import BallSharpness, ball_sharpness
from mm_sharp.analysis.sharpness.hessian import Eigenvalues, Trace, hutchinson, top_eigenvalues
from mm_sharp.analysis.sharpness.landscape import filter_direction, line, plane
from mm_sharp.analysis.sharpness.objective import Objective
from mm_sharp.analysis.sharpness.preserved_eval_mode import preserved_eval_mode
from mm_sharp.analysis.sharpness.samples import Samples
from mm_sharp.errors import UsageError
from mm_sharp.ops.parameters import ParameterSelector

DTYPES = ('float32', 'float64')
Bar = Callable[[str, 'int | None'], AbstractContextManager[Callable[[], object]]]
_SURROGATE = (
    '* rounding has no derivative: gradient, eigenvalues and trace are those of the straight-through surrogate '
    '(rounding with slope 1 and no curvature); loss, rises, differences and landscape are values of the quantized model'
)
_CUSTOM = "second derivatives are as right as the model's own backward passes make them: {}"
_NOT_CONVERGED = 'the eigenvalues did not converge to the tolerance: {found} of {asked} within {products} products'


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Args:
        batch_size: At most so many samples at once.
        rhos: Radii of the balls.
        ascent_steps: Steps of the ascent in each ball; 0 for one step along the gradient alone.
        eigenvalues: How many of the largest; 0 for none.
        tolerance: Of the eigenvalues, relative.
        trace_draws: At least 2; 0 for no trace.
        landscape: Of ``'1d'`` and ``'2d'``.
        radius: Largest distance in the landscape, in units of a direction (of each filter's norm).
        points: Of the landscape along each axis.
        seed: Of the iteration's start, the draws and the directions.
        perturb: Which parameters w stands for: ``'auto'``, ``'all'`` or ``'weights'``, as in the optimizer wrappers.
        dtype: Of the model's arithmetic, ``'float32'`` or ``'float64'``.
    """

    batch_size: int = 32
    rhos: tuple[float, ...] = (0.01, 0.05, 0.1)
    ascent_steps: int = 5
    eigenvalues: int = 1
    tolerance: float = 1e-3
    trace_draws: int = 30
    landscape: tuple[str, ...] = ('1d',)
    radius: float = 1.0
    points: int = 21
    seed: int = 0
    perturb: str = 'auto'
    dtype: str = 'float32'

    @property
    def places(self) -> list[float]:
        """Where the landscape is looked at, along each axis."""
        values: list[float] = torch.linspace(-self.radius, self.radius, self.points, dtype=torch.float64).tolist()
        return values


@dataclass(frozen=True)
class Findings:
    """What was found about one model; the loss is the mean over the samples.

    Args:
        loss: At the weights.
        loss_name: The loss modules.
        averaging: What the training loss of a batch is of its samples' losses.
        gradient_norm: 2-norm of the gradient over all samples.
        parameters: Numbers in w.
        all_parameters: Numbers in the model's parameters.
        surrogate: Whether derivatives are those of the straight-through surrogate.
        eigenvalues: Of the Hessian; None if not asked for.
        trace: Of the Hessian; None if not asked for.
        balls: One for each rho.
        differences: By rho, ``(L(w + rho v) - 2 L(w) + L(w - rho v)) / rho^2`` along the first eigenvector v: what the
            curvature is at that distance, from values of the loss alone. Empty without eigenvalues.
        line: L(w + t d_0); empty if not asked for.
        plane: L(w + s d_0 + t d_1), a row for each t; empty if not asked for.
        remarks: What a reader should know.
        seconds: That it took, by part.
    """

    loss: float
    loss_name: str
    averaging: str
    gradient_norm: float
    parameters: int
    all_parameters: int
    surrogate: bool
    eigenvalues: Eigenvalues | None
    trace: Trace | None
    balls: list[BallSharpness]
    differences: dict[float, float]
    line: list[float]
    plane: list[list[float]]
    remarks: list[str]
    seconds: dict[str, float]


@contextmanager
def no_bar(_what: str, _total: int | None) -> Iterator[Callable[[], object]]:
    """Shows no progress."""
    yield lambda: None


def measure(
    model: nn.Module, samples: Samples, settings: Settings, surrogate: bool = False, bar: Bar = no_bar
) -> Findings:
    """Measure a model, which is afterwards as it was, bit for bit.

    Args:
        model: With its weights, on its device.
        samples: What its loss is taken over.
        settings: What is measured.
        surrogate: Whether it is quantized, so that its derivatives are not those of its loss.
        bar: Opens a progress bar, given what it shows and, where that is known, how often it will be called.

    Raises:
        UsageError: The loss is not finite, or has no derivatives; or there are too few parameters.
    """
    if settings.dtype == 'float64':
        model = copy.deepcopy(model).double()
    with preserved_eval_mode(model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parameters = ParameterSelector(type(model).__name__, settings.perturb).select(model, trained)
        objective = Objective(model, samples, parameters, settings.batch_size)
        return _Measurement(objective, settings, bar).findings(surrogate)


class _Measurement:
    """The parts of a measurement, timed."""

    def __init__(self, objective: Objective, settings: Settings, bar: Bar) -> None:
        self._objective, self._settings, self._bar = objective, settings, bar
        self._remarks = [objective.form.remark] if objective.form.remark else []
        self._seconds: dict[str, float] = {}

    def findings(self, surrogate: bool) -> Findings:
        """Measure everything."""
        objective, settings = self._objective, self._settings
        loss, gradient = self._start()
        eigenvalues = self._eigenvalues() if settings.eigenvalues else None
        trace = self._trace() if settings.trace_draws else None
        balls = self._balls(loss, gradient)
        differences = self._differences(loss, eigenvalues)
        along, across = self._landscape()
        if surrogate:
            self._remarks.append(_SURROGATE)
        elif objective.custom:
            self._remarks.append(_CUSTOM.format(', '.join(objective.custom)))
        return Findings(
            loss=loss,
            loss_name=objective.form.name,
            averaging=objective.form.averaging.value,
            gradient_norm=float(gradient.norm()),
            parameters=objective.size,
            all_parameters=sum(parameter.numel() for parameter in objective.model.parameters()),
            surrogate=surrogate,
            eigenvalues=eigenvalues,
            trace=trace,
            balls=balls,
            differences=differences,
            line=along,
            plane=across,
            remarks=self._remarks,
            seconds=self._seconds,
        )

    def _start(self) -> tuple[float, Tensor]:
        with self._part('gradient', 1) as tick:
            loss, gradient = self._objective.loss_and_gradient()
            tick()
        if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
            what = 'its gradient is not finite' if math.isfinite(loss) else f'the loss is {loss}'
            raise UsageError(f'{what} at the weights of the checkpoint: there is no sharpness to measure')
        return loss, gradient

    def _eigenvalues(self) -> Eigenvalues:
        objective, settings = self._objective, self._settings
        if settings.eigenvalues >= objective.size:
            raise UsageError(f'--eigenvalues {settings.eigenvalues}: there are only {objective.size} parameters')
        with self._part('eigenvalues', None) as tick:
            found = top_eigenvalues(
                objective.hessian_times,
                objective.size,
                settings.eigenvalues,
                settings.tolerance,
                settings.seed,
                objective.device,
                tick,
            )
        if len(found.values) < settings.eigenvalues:
            asked, products = settings.eigenvalues, found.products
            self._remarks.append(_NOT_CONVERGED.format(found=len(found.values), asked=asked, products=products))
        return found

    def _trace(self) -> Trace:
        objective, settings = self._objective, self._settings
        with self._part('trace', settings.trace_draws) as tick:
            return hutchinson(
                objective.hessian_times, objective.size, settings.trace_draws, settings.seed, objective.device, tick
            )

    def _balls(self, loss: float, gradient: Tensor) -> list[BallSharpness]:
        settings = self._settings
        steps = settings.ascent_steps
        with self._part('sharpness', len(settings.rhos) * (steps + 1)) as tick:
            return [ball_sharpness(self._objective, loss, gradient, rho, steps, tick) for rho in settings.rhos]

    def _differences(self, loss: float, eigenvalues: Eigenvalues | None) -> dict[float, float]:
        if eigenvalues is None or not eigenvalues.values:
            return {}
        vector = eigenvalues.vectors[0].to(self._objective.device)
        differences = {}
        with self._part('differences', len(self._settings.rhos)) as tick:
            for rho in self._settings.rhos:
                ends = [self._objective.loss_at(side * rho * vector) for side in (1, -1)]
                differences[rho] = (ends[0] - 2 * loss + ends[1]) / rho**2
                tick()
        return differences

    def _landscape(self) -> tuple[list[float], list[list[float]]]:
        objective, settings = self._objective, self._settings
        along: list[float] = []
        across: list[list[float]] = []
        first, second = (
            filter_direction(objective.model, objective.parameters, settings.seed, number) for number in (0, 1)
        )
        if '1d' in settings.landscape:
            with self._part('1-D landscape', settings.points) as tick:
                along = line(objective, first, settings.places, tick)
        if '2d' in settings.landscape:
            with self._part('2-D landscape', settings.points**2) as tick:
                across = plane(objective, (first, second), settings.places, tick)
        return along, across

    @contextmanager
    def _part(self, what: str, total: int | None) -> Iterator[Callable[[], object]]:
        begin = time.perf_counter()
        with self._bar(what, total) as tick:
            yield tick
        self._seconds[what] = time.perf_counter() - begin
