"""`forward_features` of a timm model, recorded by torch.fx only as deep as cuts lie, and executed. See `cut`."""
import functools
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_notrace_functions
from torch.fx.node import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class UnknownLength(Exception):
    """A value is unpacked whose length the graph does not tell."""


class SizedProxy(torch.fx.Proxy):
    """Stands for a value of known length."""

    def __len__(self) -> int:
        return self.tracer.length(self.node)


class Tracer(torch.fx.Tracer):
    """Records `forward_features`. A module without a tap inside is one node.

    Args:
        taps: Names of modules.
        lengths: Lengths of the nodes that are unpacked, by name.
    """

    def __init__(self, taps: Sequence[str], lengths: dict[str, int]):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self.traced_func_name = 'traced'
        self.taps = taps
        self.lengths = lengths

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(tap.startswith(f'{module_qualified_name}.') for tap in self.taps)

    def proxy(self, node: Node) -> torch.fx.Proxy:
        return SizedProxy(node, self)

    def iter(self, obj: torch.fx.Proxy) -> Iterator:
        return (obj[i] for i in range(self.length(obj.node)))

    def length(self, node: Node) -> int:
        """Return the length of a value that is unpacked, or raise `UnknownLength`."""
        if node.name not in self.lengths:
            raise UnknownLength(node.name)
        return self.lengths[node.name]

    def record(self, model: nn.Module) -> torch.fx.Graph:
        """Return the graph of `model.forward_features(images)`. Other arguments keep their defaults."""
        model_class = type(model)
        # FX looks for functions that it must not enter among the globals of what it traces
        call = FunctionType((lambda self, x: self.forward_features(x)).__code__, model.forward_features.__globals__)
        asked = [
            (name, module) for name, module in model.named_modules()
            if name and self.is_leaf_module(module, name) and hasattr(module, 'get_embed')
        ]
        model.__class__ = type(model_class.__name__, (model_class,), {'traced': call})
        try:
            for name, module in asked:
                # Rotary embeddings are not asked for by a call of their module, and differ in training
                module.get_embed = functools.partial(self._call_method, name, 'get_embed')
            return self.trace(model)
        finally:
            model.__class__ = model_class
            for _, module in asked:
                del module.get_embed

    def _call_method(self, name: str, method: str, *args, **kwargs) -> torch.fx.Proxy:
        module = self.create_proxy('get_attr', name, (), {})
        return self.create_proxy('call_method', method, (module, *args), kwargs)


class ShapesOnly(TorchFunctionMode):
    """Leaves out normalisations on the meta device, where PyTorch does them in Python, slowly: they change no shape."""
    LEFT_OUT = (F.batch_norm, F.layer_norm, F.group_norm)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.LEFT_OUT and args and args[0].is_meta:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class Interpreter(torch.fx.Interpreter):
    """Computes the value of every node, without memory.

    Attributes:
        env: Values of the nodes.
        versions: For each node, how often each value so far had been written to once the node was executed.
    """

    def __init__(self, model: nn.Module, graph: torch.fx.Graph):
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.versions: dict[Node, dict[Node, list[int]]] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == 'output':
            return None
        value = super().run_node(n)
        self.versions[n] = {node: versions(other) for node, other in (*self.env.items(), (n, value))}
        return value

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple, dict]:
        # Some models change lists that they pass on; those of FX cannot be changed.
        def thaw(value):
            return [thaw(item) for item in value] if isinstance(value, list) else value

        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(thaw, args)), {key: thaw(value) for key, value in kwargs.items()}


def versions(value: Any) -> list[int]:
    """Return how often each tensor of a value has been written to."""
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
