"""All that is measured of one model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mm_sharp.analysis.sharpness import measures
from mm_sharp.analysis.sharpness.loading import Samples
from mm_sharp.analysis.sharpness.measures import BallSharpness, Eigenvalues, Trace
from mm_sharp.analysis.sharpness.objective import Objective, preserved_eval_mode
from mm_sharp.errors import UsageError
from mm_sharp.ops.parameters import ParameterSelector

_SURROGATE = (
    '* rounding has no derivative: gradient, eigenvalues and trace are those of the straight-through surrogate '
    '(rounding with slope 1 and no curvature); loss, rises, differences and landscape are values of the quantized model'
)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how: the options of ``tools/analyze_sharpness.py``, whose help says what they mean."""

    batch_size: int = 32
    rhos: tuple[float, ...] = (0.01, 0.05, 0.1)
    ascent_steps: int = 5
    eigenvalues: int = 1
    tolerance: float = 1e-3
    trace_draws: int = 30
    landscape: tuple[str, ...] = ('1d',)  # and '2d'
    radius: float = 1.0
    points: int = 21
    seed: int = 0
    perturb: str = 'auto'
    dtype: str = 'float32'

    @property
    def places(self) -> list[float]:
        """Where the landscape is looked at, along each axis."""
        return torch.linspace(-self.radius, self.radius, self.points, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Findings:
    """What was found about one model; the loss is the mean over the samples. What was not asked for is None or empty.

    ``differences`` are, by rho, ``(L(w + rho v) - 2 L(w) + L(w - rho v)) / rho^2`` along the first eigenvector v: what
    the curvature is at that distance, from values of the loss alone.
    """

    loss: float
    loss_name: str
    averaging: str  # what the training loss of a batch is of its samples' losses
    gradient_norm: float
    parameters: int  # numbers in w
    all_parameters: int
    surrogate: bool  # whether derivatives are those of the straight-through surrogate
    eigenvalues: Eigenvalues | None
    trace: Trace | None
    balls: list[BallSharpness]
    differences: dict[float, float]
    line: list[float]
    plane: list[list[float]]
    remarks: list[str]
    seconds: dict[str, float]  # that the parts took


def measure(
    model: nn.Module, samples: Samples, settings: Settings, surrogate: bool = False, name: str = ''
) -> Findings:
    """Measure a model, which is afterwards as it was, bit for bit; the name is for the progress.

    With ``surrogate`` it is quantized, so that its derivatives are not those of its loss. A UsageError: the loss is not
    finite, or has no derivatives; or there are too few parameters.
    """
    if settings.dtype == 'float64':
        model = copy.deepcopy(model).double()
    with preserved_eval_mode(model), tqdm(mininterval=0.5, disable=None, leave=False) as bar:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parameters = ParameterSelector(type(model).__name__, settings.perturb).select(model, trained)
        objective = Objective(model, samples, parameters, settings.batch_size, bar.update)
        seconds: dict[str, float] = {}

        def timed(part: str, compute: Callable[..., Any], *args: Any) -> Any:
            bar.set_description(f'{name}: {part}')
            begin = time.perf_counter()
            found = compute(*args)
            seconds[part] = time.perf_counter() - begin
            return found

        figures = _measure(objective, settings, timed)
        return Findings(
            **figures,
            loss_name=objective.loss_name,
            averaging=objective.averaging,
            parameters=objective.size,
            all_parameters=sum(parameter.numel() for parameter in model.parameters()),
            surrogate=surrogate,
            remarks=_remarks(objective, settings, surrogate, figures['eigenvalues']),
            seconds=seconds,
        )


def _measure(objective: Objective, settings: Settings, timed: Callable[..., Any]) -> dict[str, Any]:
    loss, gradient = timed('gradient', objective.loss_and_gradient)
    if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
        what = 'its gradient is not finite' if math.isfinite(loss) else f'the loss is {loss}'
        raise UsageError(f'{what} at the weights of the checkpoint: there is no sharpness to measure')
    places, draws, count, seed = settings.places, settings.trace_draws, settings.eigenvalues, settings.seed
    directions = [measures.filter_direction(objective.model, objective.parameters, seed, number) for number in (0, 1)]
    if count >= objective.size:
        raise UsageError(f'--eigenvalues {count}: there are only {objective.size} parameters')

    def ball(rho: float) -> BallSharpness:
        return measures.ball_sharpness(objective, loss, gradient, rho, settings.ascent_steps)

    def difference(rho: float) -> float:
        vector = rho * found['eigenvalues'].vectors[0].to(objective.device)
        return float(objective.loss_at(vector) - 2 * loss + objective.loss_at(-vector)) / rho**2

    found: dict[str, Any] = {'loss': loss, 'gradient_norm': float(gradient.norm()), 'eigenvalues': None, 'trace': None}
    found |= {'differences': {}, 'line': [], 'plane': []}
    if count:
        asked = (objective, count, settings.tolerance, seed)
        found['eigenvalues'] = timed('eigenvalues', measures.top_eigenvalues, *asked)
    if draws:
        found['trace'] = timed('trace', measures.hutchinson, objective, draws, seed)
    found['balls'] = timed('sharpness', lambda: [ball(rho) for rho in settings.rhos])
    if count and found['eigenvalues'].values:
        found['differences'] = timed('differences', lambda: {rho: difference(rho) for rho in settings.rhos})
    if '1d' in settings.landscape:
        found['line'] = timed('1-D landscape', measures.line, objective, directions[0], places)
    if '2d' in settings.landscape:
        found['plane'] = timed('2-D landscape', measures.plane, objective, directions, places)
    return found


def _remarks(objective: Objective, settings: Settings, surrogate: bool, found: Eigenvalues | None) -> list[str]:
    remarks, asked = [objective.remark] if objective.remark else [], settings.eigenvalues
    if found is not None and len(found.values) < asked:
        count = f'{len(found.values)} of {asked} within {found.products} products'
        remarks.append(f'the eigenvalues did not converge to the tolerance: {count}')
    if surrogate:
        remarks.append(_SURROGATE)
    elif objective.custom:
        names = ', '.join(objective.custom)
        remarks.append(f"second derivatives are as right as the model's own backward passes make them: {names}")
    return remarks
