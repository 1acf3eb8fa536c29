"""The modules of a model, walked through once and again only where the model was rebuilt."""

from __future__ import annotations

from collections.abc import Iterator
from operator import eq, is_
from typing import Any

from torch import nn


class ModuleTree:
    """All modules and parameters of a model, each once, and whether they still are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(submodules(model))
        held = [module._parameters for module in self.modules]
        self.parameters = list({id(p): p for each in held for p in each.values() if p is not None}.values())
        self._children: list[Any] = [module._modules for module in self.modules]
        self._children_then = [dict(children) for children in self._children]
        self._parameters: list[Any] = [each for each in held if each]
        self._parameters_then = [parameter for each in self._parameters for parameter in each.values()]

    def unchanged(self) -> bool:
        """Whether every module has the children and the parameters that it had; fast, for every step asks."""
        now, then = [parameter for each in self._parameters for parameter in each.values()], self._parameters_then
        return all(map(eq, self._children, self._children_then)) and len(now) == len(then) and all(map(is_, now, then))


def submodules(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and all below it, each once: ``module.modules()`` in another order, and faster."""
    found, seen = [module], {id(module)}
    for member in found:  # which grows
        yield member
        below = member._modules
        for child in below.values() if below else ():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)


def is_compiled(module: nn.Module, method: str = 'forward') -> bool:
    """Whether ``torch.compile`` was applied to a module's call, or to another of its methods."""
    by_hand = '_orig_mod' in module._modules or getattr(module, '_compiled_call_impl', None) is not None
    return hasattr(vars(module).get(method), '_torchdynamo_orig_callable') or (by_hand and method == 'forward')
