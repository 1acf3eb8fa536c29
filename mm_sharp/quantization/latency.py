"""How fast exported files are in the runtimes that are installed, and how many convolutions these compute in integers.

Files take turns, round after round, so that what else the machine does meets all of them; a ratio is the median of the
rounds' ratios. One thread and one picture. The time is what the processor works for this process: on a busy machine
short calls would have an advantage otherwise, which nothing interrupts. A convolution counts that ONNX Runtime has made
a QLinearConv of, or that OpenVINO runs in u8 or i8; deconvolutions are not counted.
"""

from __future__ import annotations

import time
import timeit
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from .onnx_graph import runner

Timed = Callable[[], object]
Count = tuple[int, int]  # convolutions in integers, and all
_ROUNDS, _CALLS, _PICTURES = 20, 3, 4
# Rounding alone: what one runtime rounds up and the other down adds up in deep networks, at worst to outputs that have
# only the float file's in common, each as far from them: the square root of 2. Wrong convolutions: 3.5 to 500.
_LIMIT = 2.0


@dataclass(frozen=True)
class Latency:
    """One file in one runtime."""

    runtime: str
    name: str
    milliseconds: float  # median of the rounds
    ratio: float  # median of the first file's time / this one's
    integers: int  # convolutions that are computed in integers
    convolutions: int


def compare(files: Mapping[str, Path], rounds: int = _ROUNDS, only: Sequence[str] = ()) -> list[Latency]:
    """Measure files, by name, in the runtimes that are installed, or in the packages of ``only``; ratios are the first
    one's time by theirs.
    """
    found: list[Latency] = []
    for package in only or installed():
        arguments = package, dict(files), rounds
        found += _apart(_measure, *arguments) if package == 'openvino' else _measure(*arguments)
    return found


def installed() -> list[str]:
    """The packages of :data:`RUNTIMES` that are installed."""
    return [package for package in RUNTIMES if find_spec(package)]


def _measure(package: str, files: Mapping[str, Path], rounds: int) -> list[Latency]:
    runtime, prepare, count = RUNTIMES[package]
    picture = _noise(onnx.load(next(iter(files.values()))), 1)
    times = interleaved([prepare(file, picture) for file in files.values()], rounds)
    found = []
    for (name, file), taken in zip(files.items(), times, strict=True):
        ratio = median(first / own for first, own in zip(times[0], taken, strict=True))
        found.append(Latency(runtime, name, 1000 * median(taken), ratio, *count(file)))
    return found


def _noise(model: onnx.ModelProto, count: int) -> NDArray[np.float32]:
    """Pictures of the size of a graph's input."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal([count, *shape[1:]]).astype(np.float32)


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own: OpenVINO has broken what its process did minutes later."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def interleaved(runs: Sequence[Timed], rounds: int) -> list[list[float]]:
    """Seconds a call of each function, in each round; every round has the shortest of three calls of each."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            taken.append(min(timeit.repeat(run, timer=time.process_time, repeat=_CALLS, number=1)))
    return times


def openvino_warning(plain: Path, quantized: Path) -> str:
    """One line if OpenVINO computes something else of a quantized file than ONNX Runtime; '' if not. ``plain`` is the
    file in float."""
    error = _openvino_error(plain, quantized)
    if error <= _LIMIT:
        return ''
    return (
        f"OpenVINO is wrong about {quantized}: its outputs are {error:.3g} times as far from ONNX Runtime's as the "
        "float file's are (rounding: below 1.5). Do not use the file there (docs/deployment.md)"
    )


def _openvino_error(plain: Path, quantized: Path) -> float:
    """How far OpenVINO's outputs of a quantized file are from ONNX Runtime's on noise, as a multiple of how far those
    of the ``plain`` file in float are; root mean squares, of the worst output.

    ONNX Runtime's are right: the check of the export compares them with PyTorch.
    """
    graph = onnx.load(quantized)
    pictures = _noise(graph, _PICTURES)
    ours, before = (list(runner(g, 'qcdq')({'input': pictures}).values()) for g in (graph, onnx.load(plain)))
    theirs = _apart(_run_openvino, quantized, pictures)
    # Outputs that are the same for all pictures differ by the rounding of float sums alone.
    floors = [1e-3 * float(np.abs(output).max()) + 1e-12 for output in ours]
    return max(_rms(a, b) / max(_rms(a, c), f) for a, b, c, f in zip(ours, theirs, before, floors, strict=True))


def _rms(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(one - other, dtype=np.float64))))


def table(latencies: Sequence[Latency]) -> str:
    """For people."""
    lines = [f'{"one thread, one picture":<26}{"ms":>9}{"times float":>13}  convolutions in integers']
    lines += [
        f'{x.runtime + ", " + x.name:<26}{x.milliseconds:>9.2f}{x.ratio:>13.2f}  {x.integers} of {x.convolutions}'
        for x in latencies
    ]
    return '\n'.join(lines)


def onnxruntime_convolutions(file: Path) -> Count:
    """What ONNX Runtime makes of a file's convolutions, after its optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, 'optimized.onnx'))
        onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
        kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    return kinds['QLinearConv'], sum(count for kind, count in kinds.items() if kind.endswith('Conv'))


def openvino_convolutions(file: Path) -> Count:
    """The same of OpenVINO, read off the model that it runs."""
    count: Count = _apart(_count_openvino, file)
    return count


def _count_openvino(file: Path) -> Count:
    infos = [node.get_rt_info() for node in _compiled(file).get_runtime_model().get_ops()]
    kinds = [info['runtimePrecision'].astype(str) for info in infos if info['layerType'].astype(str) == 'Convolution']
    return sum(kind in ('u8', 'i8') for kind in kinds), len(kinds)


def _onnxruntime(file: Path, picture: NDArray[np.float32]) -> Timed:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda: session.run(None, {'input': picture})


def _openvino(file: Path, picture: NDArray[np.float32]) -> Timed:
    request = _compiled(file).create_infer_request()
    return lambda: request.infer({0: picture})


def _run_openvino(file: Path, pictures: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [np.array(output) for output in _compiled(file)([pictures]).values()]


def _compiled(file: Path) -> Any:
    import openvino  # type: ignore[import-untyped]

    # In float32, as the other runtime: some processors would take bfloat16.
    settings = {'INFERENCE_NUM_THREADS': 1, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    return openvino.Core().compile_model(file, 'CPU', settings)


class Runtime(NamedTuple):
    """What runs exported files."""

    name: str
    prepare: Callable[[Path, NDArray[np.float32]], Timed]
    count_integers: Callable[[Path], Count]


# By package, whose name is also that of the target that policies have for it.
RUNTIMES = {
    'onnxruntime': Runtime('ONNX Runtime', _onnxruntime, onnxruntime_convolutions),
    'openvino': Runtime('OpenVINO', _openvino, _count_openvino),
}
