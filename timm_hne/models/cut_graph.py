"""`forward_features` of a timm model as a graph of its stages, and the graph as a chain of modules. See `cut`."""
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch.fx.node import Node, map_arg
from torch.utils import _pytree as pytree

from .cut_trace import Interpreter, ShapesOnly, Tracer, UnknownLength, versions

# Number of images of the probe, on the meta device. No other size is a multiple of it.
BATCH = 1009


@dataclass(frozen=True)
class Leaf:
    """One tensor or number of a value that crosses a cut.

    Attributes:
        kind: 'images', 'windows' or 'shared' for the three kinds of tensors, 'batch' for a multiple of the number of
            images, 'size' for another number, 'constant'.
        value: Place of the tensor among those that cross the cut, or of the number in the shape of the empty tensor;
            the multiple; the constant.
    """
    kind: str
    value: Any


@dataclass(frozen=True)
class Layout:
    """What crosses a cut.

    Attributes:
        values: The node (None in a head), the structure and the leaves of each value.
        shapes: Shapes of the tensors without their first dimension, the images.
    """
    values: tuple[tuple[Node | None, pytree.TreeSpec, tuple[Leaf, ...]], ...]
    shapes: tuple[tuple[int, ...], ...]

    def detached(self) -> 'Layout':
        """Return the layout without the graph."""
        return replace(self, values=tuple((None, *value[1:]) for value in self.values))

    def restore(self, features: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
        """Return the first value, as the model made it, from the features that crossed the cut."""
        _, structure, leaves = self.values[0]
        leaves = [
            leaf.value if leaf.kind == 'constant' else take(features, leaf.kind, leaf.value, len(self.shapes) == 1)
            for leaf in leaves
        ]
        return pytree.tree_unflatten(leaves, structure)


def pack(tensor: torch.Tensor, kind: str, like: torch.Tensor) -> torch.Tensor:
    """Bring the images of a tensor to its first dimension, where `like` has them."""
    if kind == 'windows':
        return tensor.unflatten(0, (like.shape[0], tensor.shape[0] // like.shape[0]))
    return tensor.unsqueeze(0).expand(like.shape[0], *tensor.shape)


def _as_it_is(node: Node) -> Node:
    """Keep FX, which traces a part again when it is unpickled, from looking into the function that a node calls."""
    node.meta['is_wrapped'] = True
    return node


def take(features: torch.Tensor | tuple[torch.Tensor, ...], kind: str, value: int, single: bool) -> torch.Tensor | int:
    """Return a tensor or a number that crossed a cut, as the model made it."""
    features = (features,) if single else features
    if kind == 'batch':
        return features[0].shape[0] * value
    if kind == 'size':
        return features[-1].shape[2 + value]
    tensor = features[value]
    return tensor.flatten(0, 1) if kind == 'windows' else tensor[0] if kind == 'shared' else tensor


def sizes(like: torch.Tensor, *numbers: int) -> torch.Tensor:
    """Return an empty tensor whose shape states some numbers."""
    return like.new_empty((like.shape[0], 0, *numbers))


def clone(features: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return a copy of features."""
    return features.clone() if isinstance(features, torch.Tensor) else tuple(tensor.clone() for tensor in features)


class CutError(ValueError):
    """A model cannot be cut there. The message is the reason."""


class StageGraph:
    """The graph of `forward_features`, with the value of each node for some images on the meta device.

    Args:
        model: The model, on the meta device.
        taps: Names of modules of the model.
        input_size: Channels, height and width of the images.
        dtype: Data type of the images.

    Raises:
        CutError: The code around the stages does not allow it.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str], input_size: tuple[int, int, int], dtype: torch.dtype):
        self.model = model
        self.taps = taps
        self.images = torch.empty(BATCH, *input_size, dtype=dtype, device='meta')
        self.lengths: dict[str, int] = {}
        evaluation = self._record(training=False)
        self.graph = self._record(training=True)
        self._follow_training(evaluation)
        interpreter = self._evaluate(self.graph)
        self.values, self.versions = interpreter.env, interpreter.versions
        self._order()
        self.nodes = [node for node in self.graph.nodes if node.op != 'output']
        self.output = next(node for node in self.graph.nodes if node.op == 'output')

    def _record(self, training: bool) -> torch.fx.Graph:
        self.model.train(training)
        while True:
            tracer = Tracer(self.taps, self.lengths)
            try:
                return tracer.record(self.model)
            except UnknownLength as error:
                values = self._evaluate(tracer.graph).env
                self.lengths |= {node.name: len(value) for node, value in values.items() if node.name == str(error)}

    def _evaluate(self, graph: torch.fx.Graph) -> Interpreter:
        interpreter = Interpreter(self.model, graph)
        try:
            with torch.no_grad(), ShapesOnly():
                interpreter.run(self.images)
        except Exception as error:
            height, width = self.images.shape[2:]
            raise CutError(
                f'it takes no images of {height}x{width} pixels, create it with another img_size: {error}') from error
        return interpreter

    def _follow_training(self, evaluation: torch.fx.Graph) -> None:
        """Replace flags that are True in training and False in evaluation by the module's `training`."""
        flag: list[Node] = []

        def merge(own: Any, other: Any) -> Any:
            if own is True and other is False:
                if not flag:
                    with self.graph.inserting_before(next(iter(self.graph.nodes))):
                        flag.append(self.graph.get_attr('training'))
                return flag[0]
            if isinstance(own, (tuple, list)) and isinstance(other, (tuple, list)) and len(own) == len(other):
                return type(own)(merge(a, b) for a, b in zip(own, other))
            if str(own) != str(other):
                raise CutError(f'what surrounds its stages takes {other} in evaluation and {own} in training')
            return own

        nodes, others = list(self.graph.nodes), list(evaluation.nodes)
        if [(node.op, str(node.target)) for node in nodes] != [(node.op, str(node.target)) for node in others]:
            raise CutError('what surrounds its stages does something else in training than in evaluation')
        for node, other in zip(nodes, others):
            if node.op != 'placeholder':
                node.args = merge(tuple(node.args), tuple(other.args))
                keys = list(node.kwargs)
                node.kwargs = dict(zip(keys, merge(
                    tuple(node.kwargs.values()), tuple(other.kwargs[key] for key in keys))))

    def _order(self) -> None:
        """Bring parameters to where they are used first, and parts of a tuple to where the tuple is made."""
        nodes = list(self.graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        for node in nodes:
            if node.op == 'get_attr' and node.users:
                min(node.users, key=place.__getitem__).prepend(node)
            elif (
                node.target is operator.getitem and len(node.all_input_nodes) == 1
                and isinstance(self.values[node.args[0]], (tuple, list, dict))
            ):
                node.args[0].append(node)

    def _within(self, node: Node, tap: str) -> bool:
        names = list(node.meta.get('nn_module_stack') or ())
        if node.op == 'call_module':
            names.append(node.target)
        return any(name == tap or name.startswith(f'{tap}.') for name in names)

    def crossing(self, last: int) -> list[Node]:
        """Return the nodes up to number `last` whose values are needed after it."""
        before = set(self.nodes[:last + 1])
        return [
            node for node in self.nodes[:last + 1]
            if any(user not in before for user in node.users) and node.target != 'training'
        ]

    def place(self, tap: str) -> tuple[int, int] | None:
        """Return where to cut behind a module, and how many tensors cross there; None if it is not executed.

        Operations that follow the module without parameters of their own, as a change of the layout, belong to it if
        less crosses behind them.
        """
        inside = [i for i, node in enumerate(self.nodes) if self._within(node, tap)]
        if not inside:
            return None
        best = None
        for i in range(inside[-1], len(self.nodes)):
            if i > inside[-1] and self.nodes[i].op in ('call_module', 'get_attr'):
                break
            count = len(self.layout(i, check=False).shapes)
            if best is None or count < best[1]:
                best = i, count
        return best

    def simplify(self, taps: Sequence[str]) -> list[str]:
        """Leave out taps that are not executed, and cut behind the surroundings of one where less crosses there."""
        simpler: list[str] = []
        position = -1
        for tap in taps:
            names = tap.split('.')
            outer = ['.'.join(names[:i]) for i in range(len(names), 0, -1)]
            outer = [name for name in outer if name == tap or sum(other.startswith(f'{name}.') for other in taps) == 1]
            found = [(place[1], name, place[0]) for name in outer if (place := self.place(name)) is not None]
            if found:
                _, name, last = min(found, key=lambda item: item[0])
                if last > position:
                    simpler.append(name)
                    position = last
        return simpler

    def layout(self, last: int, check: bool = True) -> Layout:
        """Return what crosses the cut behind node number `last`; with `check`, only if all of it can.

        Raises:
            CutError: Something else than tensors, numbers and constants would cross.
        """
        nodes = self.crossing(last)
        if last == len(self.nodes) - 1:
            nodes = [self.output]
        values, tensors, numbers = [], [], []
        for node in nodes:
            found, structure = pytree.tree_flatten(self._value(node))
            leaves = []
            for item in found:
                kind, value = self._kind(item)
                if kind is None:
                    if check:
                        raise CutError(f'{node.name} crosses the cut, of type {type(item).__name__}: {item!s:.60}')
                    kind = 'constant'
                if kind in ('images', 'windows', 'shared'):
                    value = len(tensors)
                    tensors.append(item if kind == 'images' else pack(item, kind, self.images))
                elif kind == 'size':
                    value = len(numbers)
                    numbers.append(item)
                leaves.append(Leaf(kind, value))
            values.append((node, structure, tuple(leaves)))
        if numbers:
            tensors.append(sizes(self.images, *numbers))
        return Layout(tuple(values), tuple(tuple(tensor.shape[1:]) for tensor in tensors))

    def _value(self, node: Node) -> Any:
        if node.op == 'output':
            return map_arg(node.args[0], self.values.__getitem__)
        return self.values[node]

    @staticmethod
    def _kind(item: Any) -> tuple[str | None, Any]:
        """Return the kind of a leaf and what it stands for."""
        if isinstance(item, torch.Tensor):
            if BATCH in item.shape[:1]:
                return 'images', None
            if item.dim() and item.shape[0] and not item.shape[0] % BATCH:
                return 'windows', None
            # Images that do not come first cannot be told apart.
            return (None, None) if any(size and not size % BATCH for size in item.shape) else ('shared', None)
        if item is None or isinstance(item, (bool, str)):
            return 'constant', item
        if isinstance(item, int):
            return ('size', None) if not item or item % BATCH else ('batch', item // BATCH)
        return None, None

    def split(self, model: nn.Module, cuts: Sequence[int]) -> tuple[list[torch.fx.GraphModule], list[Layout]]:
        """Return the blocks that end with the nodes of these numbers, and what each of them returns.

        Args:
            model: The model that the blocks take their modules from.
            cuts: Number of the last node of each block.
        """
        layouts = [self.layout(last) for last in cuts]
        blocks = []
        for b, last in enumerate(cuts):
            nodes = self.nodes[cuts[b - 1] + 1 if b else 0:last + 1]
            before = layouts[b - 1] if b else None
            written = self._written(self.nodes[cuts[b - 1]], before) if b else self.images._version > 0
            graph = self._part(nodes, before, layouts[b], protect=written)
            blocks.append(torch.fx.GraphModule(model, graph, class_name=f'{type(model).__name__}Block'))
        return blocks, layouts

    def _written(self, last: Node, layout: Layout) -> bool:
        """Whether what crosses the cut behind a node is written to after it. Other blocks may need it as it was."""
        executed = self.versions[last]
        for node, _, _ in layout.values:
            while node not in executed:  # a part of a tuple, taken out later
                node = node.args[0]
            if executed[node] != versions(self.values[node]):
                return True
        return False

    def _part(
            self,
            nodes: Sequence[Node],
            before: Layout | None,
            after: Layout,
            protect: bool,
    ) -> torch.fx.Graph:
        graph = torch.fx.Graph()
        features = like = graph.placeholder('x')
        if protect:
            features = like = _as_it_is(graph.call_function(clone, (features,)))
        env: dict[Node, Any] = {}
        if before is not None:
            single = len(before.shapes) == 1
            if not single:
                like = graph.call_function(operator.getitem, (features, 0))
            for node, structure, leaves in before.values:
                env[node] = pytree.tree_unflatten([
                    leaf.value if leaf.kind == 'constant' else
                    graph.call_function(take, (features, leaf.kind, leaf.value, single)) for leaf in leaves
                ], structure)
        for node in nodes:
            if node.op == 'placeholder':
                env[node] = features
                continue
            for flag in node.all_input_nodes:
                if flag.target == 'training' and flag not in env:
                    env[flag] = graph.get_attr('training')
            if node.target != 'training':
                env[node] = graph.node_copy(node, env.__getitem__)
        tensors, numbers = [], []
        for node, _, leaves in after.values:
            value = map_arg(node.args[0], env.__getitem__) if node.op == 'output' else env[node]
            for leaf, item in zip(leaves, self._items(graph, value, node, leaves)):
                if leaf.kind == 'windows':
                    tensors.append(graph.call_function(pack, (item, leaf.kind, like)))
                elif leaf.kind == 'shared':
                    tensors.append(_as_it_is(graph.call_function(pack, (item, leaf.kind, like))))
                elif leaf.kind == 'images':
                    tensors.append(item)
                elif leaf.kind == 'size':
                    numbers.append(item)
        if numbers:
            tensors.append(graph.call_function(sizes, (like, *numbers)))
        graph.output(tensors[0] if len(tensors) == 1 else tuple(tensors))
        graph.lint()
        return graph

    def _items(self, graph: torch.fx.Graph, value: Any, node: Node, leaves: Sequence[Leaf]) -> list[Any]:
        """Return the leaves of a value in the graph, which is a node or a structure of nodes."""
        like = self._value(node)

        def walk(made: Any, shape: Any) -> list[Any]:
            if not isinstance(shape, (tuple, list, dict)):
                return [made]
            keys = shape if isinstance(shape, dict) else range(len(shape))
            made = [
                graph.call_function(operator.getitem, (made, key)) if isinstance(made, Node) else made[key]
                for key in keys
            ]
            return [item for part, key in zip(made, keys) for item in walk(part, shape[key])]

        return walk(value, like)
