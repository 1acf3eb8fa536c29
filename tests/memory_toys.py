"""Models whose forward pass depends on state that it moves itself, in every way in which a model can keep some."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as new_spectral_norm

from tests.toys import Notes, ToyNet


class Memory(ToyNet):
    """Adds something that it remembers to its features, (N, 6, 4, 4), and then remembers these.

    Attributes:
        seen: Of every forward pass, what its state was before: a list, which nobody puts back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = Notes()
        self.remember()
        # ESAM has other weights without gradients in its first pass.
        self.frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def remember(self) -> None:
        """Make what is remembered."""

    def recall(self, features: Tensor) -> Tensor:
        """What is added to the features, (6, 1, 1) or a number; and move the memory."""
        raise NotImplementedError

    def state(self) -> list[Tensor]:
        """All of it, copied."""
        frozen = [parameter for name, parameter in self.named_parameters() if name in self.frozen]
        plain = [torch.as_tensor(value) for value in vars(self).values() if isinstance(value, (Tensor, int, float))]
        dense = [buffer.to_dense() for buffer in self.buffers()]
        return [tensor.detach().clone() for tensor in (*frozen, *plain, *dense)]

    def features(self, inputs: Tensor) -> Tensor:
        self.seen.append(self.state())
        features = super().features(inputs)
        return features + self.recall(features.detach())


class Counter(Memory):
    """A warm-up by a Python number."""

    def remember(self) -> None:
        self.calls = 0

    def recall(self, features: Tensor) -> Tensor:
        self.calls += 1
        return features.new_tensor(self.calls / 10)


class Queue(Memory):
    """The features of earlier batches in a buffer that is written in place, as MoCo's."""

    def remember(self) -> None:
        self.register_buffer('queue', torch.zeros(3, 6))
        self.register_buffer('at', torch.zeros((), dtype=torch.long))

    def recall(self, features: Tensor) -> Tensor:
        mean = self.queue.mean(0)
        self.queue[int(self.at)] = features.mean((0, 2, 3))
        self.at.add_(1).remainder_(3)
        return mean.view(6, 1, 1)


class Centre(Memory):
    """A running centre in a buffer that is replaced, as DINO's in some implementations."""

    def remember(self) -> None:
        self.register_buffer('centre', torch.zeros(6))

    def recall(self, features: Tensor) -> Tensor:
        centre = self.centre
        self.centre = 0.9 * centre + 0.1 * features.mean((0, 2, 3))
        return centre.view(6, 1, 1)


class PlainTensor(Memory):
    """The same as a tensor that is no buffer, and is first there in the first forward."""

    def remember(self) -> None:
        self.centre: Tensor | None = None

    def recall(self, features: Tensor) -> Tensor:
        centre = torch.zeros(6) if self.centre is None else self.centre
        self.centre = 0.9 * centre + 0.1 * features.mean((0, 2, 3))
        return centre.view(6, 1, 1)


class PlainTensorInPlace(Memory):
    """A tensor that is no buffer and is written in place, past autograd's count of changes."""

    def remember(self) -> None:
        self.centre = torch.zeros(6)

    def recall(self, features: Tensor) -> Tensor:
        centre = self.centre.clone()
        self.centre.data.lerp_(features.mean((0, 2, 3)), 0.1)
        return centre.view(6, 1, 1)


class Teacher(Memory):
    """A momentum teacher of MMEngine's, moved in every second forward."""

    def remember(self) -> None:
        self.teacher = ExponentialMovingAverage(self.conv, momentum=0.3, interval=2)

    def recall(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.update_parameters(self.conv)
        return self.teacher.module.weight.mean((1, 2, 3)).view(6, 1, 1)


class HandTeacher(Memory):
    """One written by hand, moved through ``.data``, which autograd does not count."""

    def remember(self) -> None:
        self.teacher = nn.Conv2d(2, 6, 3)
        self.teacher.load_state_dict(self.conv.state_dict())
        self.teacher.requires_grad_(False)

    def recall(self, features: Tensor) -> Tensor:
        self.move()
        return self.teacher.weight.mean((1, 2, 3)).view(6, 1, 1)

    def move(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.conv.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.3)


class NewData(HandTeacher):
    """One whose ``.data`` is replaced, as in MoCo's own code."""

    def move(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.conv.parameters(), strict=True):
            slow.data = slow.data * 0.7 + fast.data * 0.3


class Spectral(Memory):
    """Power iteration's vectors (torch's two spectral norms), as at the start of a training."""

    make: Any = staticmethod(spectral_norm)

    def remember(self) -> None:
        self.mixing = self.make(nn.Linear(6, 6))

    def recall(self, features: Tensor) -> Tensor:
        return self.mixing(features.mean((0, 2, 3))).view(6, 1, 1)


class NewSpectral(Spectral):
    def make(self, module: nn.Module) -> nn.Module:
        module = new_spectral_norm(module, n_power_iterations=1)
        for vector in module.parametrizations.weight[0].buffers():
            nn.init.normal_(vector)
        return module


class Codebook(Memory):
    """A buffer that shares memory with a weight."""

    def remember(self) -> None:
        self.register_buffer('table', self.head.weight.data, persistent=False)

    def state(self) -> list[Tensor]:
        return []  # weights, which are others in the second pass

    def recall(self, features: Tensor) -> Tensor:
        return self.table.mean()


class Flat(Codebook):
    """All weights as views of one buffer."""

    def remember(self) -> None:
        flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
        self.register_buffer('table', flat, persistent=False)
        at = 0
        for module in (self.conv, self.norm, self.head):
            for name, parameter in list(module.named_parameters()):
                view = flat[at : at + parameter.numel()].view_as(parameter)
                setattr(module, name, nn.Parameter(view))
                at += parameter.numel()


MEMORIES: dict[str, type[Memory]] = {
    kind.__name__: kind
    for kind in (
        *(Counter, Queue, Centre, PlainTensor, PlainTensorInPlace, Teacher, HandTeacher, NewData),
        *(Spectral, NewSpectral, Codebook, Flat),
    )
}
