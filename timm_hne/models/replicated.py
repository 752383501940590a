"""Replicated blocks and their ensembles: one plain module per node, for any stage of any network."""
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.models import checkpoint

from ..checks import check_integer
from .block import Block, NodeWeights, State, check_features
from .ensemble import HierarchicalEnsemble

__all__ = ['ReplicatedBlock', 'ReplicatedEnsemble', 'ReplicatedModules']


class ReplicatedModules(NodeWeights, nn.ModuleList):
    """Alike modules, one a node: module k has the weights of node k, under its number.

    Args:
        modules: The nodes, of equal architecture.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__(modules)
        self.nodes = self.used = len(self)

    def split_state(self, state: State) -> list[dict[str, torch.Tensor]]:
        parts: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            node, _, inner = name.partition('.')
            if not node.isdecimal() or not inner:
                raise ValueError(f'the names of the tensors must begin with the number of their node, not so {name!r}.')
            parts.setdefault(int(node), {})[inner] = tensor
        if sorted(parts) != list(range(len(parts))) or any(part.keys() != parts[0].keys() for part in parts.values()):
            raise ValueError(f'the tensors must be the same for nodes 0, 1, 2, ..., got nodes {sorted(parts)}.')
        return [parts[node] for node in range(len(parts))]

    def join_state(self, parts: Sequence[State]) -> dict[str, torch.Tensor]:
        return {f'{node}.{name}': tensor for node, part in enumerate(parts) for name, tensor in part.items()}

    def keep(self, used: int, nodes: int, parents: int) -> nn.Module:
        # The memo keeps the nodes that are left out from being copied.
        result = copy.deepcopy(self, {id(module): nn.Identity() for module in list(self)[used:]})
        for node in reversed(range(used, self.used)):
            del result[node]
        result.nodes, result.used = nodes, used
        return result


class ReplicatedBlock(ReplicatedModules, Block):
    """A block of the tree that has a module of its own for every node.

    Args:
        modules: The nodes. Each maps the features of its parent to its own: a tensor or a tuple of tensors.
        parents: Number of nodes of the block before; 1 for the first block, whose parent is the image.
        out_channels: Channels of the features of one node.
        channel_axis: Axis of the channels of the features, for `merge`.
        main: Which tensor `merge` takes where features are a tuple, None where they are a tensor.

    Features are a list with an entry per node. The input of the first block is a batch of images, `(B, C, H, W)`.
    """

    def __init__(
            self,
            modules: Sequence[nn.Module],
            parents: int,
            out_channels: int,
            channel_axis: int = 1,
            main: int | None = None,
    ):
        super().__init__(modules)
        self.parents = parents
        self.out_channels = out_channels
        self.channel_axis = channel_axis
        self.main = main
        self.grad_checkpointing = False

    def forward(self, x: list[Any] | torch.Tensor, span: tuple[int, int] | None = None) -> list[Any]:
        start, stop = (0, self.nodes) if span is None else span
        family = self.nodes // self.parents
        features = x if isinstance(x, list) else [x]
        outputs = []
        for node in range(start, stop):
            parent = features[node // family - start // family]
            outputs.append(checkpoint(self[node], parent) if self.grad_checkpointing else self[node](parent))
        return outputs

    def keep(self, used: int, nodes: int, parents: int) -> nn.Module:
        result = super().keep(used, nodes, parents)
        result.parents = parents
        return result

    def count(self, x: list[Any]) -> int:
        return len(x)

    def pick(self, x: list[Any], first: int, last: int) -> list[Any]:
        return x[first:last]

    def join(self, parts: Sequence[list[Any]]) -> list[Any]:
        return [features for part in parts for features in part]

    def merge(self, x: list[Any]) -> torch.Tensor:
        return torch.cat([f if self.main is None else f[self.main] for f in x], dim=self.channel_axis)

    def feature_map(self, x: list[Any]) -> torch.Tensor:
        x = self.merge(x)
        # Where tokens belong in the image, the base alone knows.
        return x.movedim(self.channel_axis, 1) if x.dim() == 4 else x

    def split(self, x: torch.Tensor) -> list[Any]:
        if self.main is not None:
            raise ValueError(
                'the head needs all tensors that the last block returns, x is one of them: call the model itself, or '
                'forward_members.')
        check_features(x, self, self.channel_axis)
        return list(x.split(self.out_channels, dim=self.channel_axis))


class ReplicatedEnsemble(HierarchicalEnsemble):
    """A hierarchical ensemble of replicated blocks, with a head of its own for every member.

    Args:
        blocks: Blocks of the tree, from the image to the last features.
        reductions: Image size over feature map size, for each block.
        heads: One module per member. `head(features, pre_logits=False)` returns the logits `(B, num_classes)`, or the
            features before the classifier `(B, F)`; `get_classifier()` and `reset_classifier(num_classes, global_pool)`
            are as in timm's models.
        num_classes: Number of classes that the heads have, 0 for none.
        head_hidden_size: Features of one member before its classifier, F.
        in_chans: Number of image channels.
        num_members: Number of members evaluated unless the call says otherwise; all if None.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
            self,
            blocks: Sequence[ReplicatedBlock],
            reductions: Sequence[int],
            heads: Sequence[nn.Module],
            num_classes: int,
            head_hidden_size: int,
            in_chans: int,
            num_members: int | None = None,
    ):
        super().__init__(blocks, reductions, in_chans, num_members)
        self.heads = ReplicatedModules(heads)
        self.num_classes = num_classes
        self.head_hidden_size = head_hidden_size * len(self.heads)
        self.poolings = 1

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the members' classifiers."""
        classifiers = {id(classifier) for classifier in self.get_classifier()}
        return tuple(name for name, module in self.named_modules() if id(module) in classifiers)

    def head_parts(self) -> dict[str, NodeWeights]:
        return {'heads': self.heads} if len(self.heads) else {}

    def head_members(self, x: list[Any], span: tuple[int, int] | None = None, pre_logits: bool = False) -> torch.Tensor:
        if self.poolings == 0:
            raise ValueError("The features of a member need a pooling, got global_pool=''.")
        start, stop = (0, self.heads.used) if span is None else span
        return torch.stack([self.heads[m](x[m - start], pre_logits) for m in range(start, stop)], dim=1)

    def remove_head(self) -> None:
        self.heads = ReplicatedModules(())
        self.num_classes = self.poolings = 0
        self.head_hidden_size = self.num_features

    def get_classifier(self) -> nn.ModuleList:
        """The classifiers of all members."""
        found = [head.get_classifier() for head in self.heads]  # some networks have two
        return nn.ModuleList(
            classifier for each in found for classifier in (each if isinstance(each, (tuple, list)) else (each,)))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers by new ones, or remove them.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: timm's name of a pooling, '' for none; as it is if None.

        Raises:
            TypeError: `num_classes` is not an integer.
            ValueError: `num_classes` is negative, a classifier is asked for with `global_pool=''`, or the heads were
                removed with the blocks before them.
        """
        check_integer('num_classes', num_classes, 0)
        if global_pool is None and not num_classes and not self.poolings:
            global_pool = ''
        if not len(self.heads) and (num_classes or global_pool != ''):
            raise ValueError(f'The heads were removed with the last blocks, got num_classes={num_classes}.')
        if num_classes and global_pool == '':
            raise ValueError(f"A classifier of {num_classes} classes needs a pooling, got global_pool=''.")
        if len(self.heads):
            pool = None if global_pool == '' else global_pool  # the heads keep theirs, which is passed over
            copy.deepcopy(self.heads[0]).reset_classifier(num_classes, pool)  # fails before anything has changed
            present = set(self.modules())
            for head in self.heads:
                head.reset_classifier(num_classes, pool)
            # A head without parameters does not know where its classifier belongs.
            like = next(self.parameters())
            for module in set(self.heads.modules()) - present:
                module.to(like.device, like.dtype).training = self.training
            # Another pooling may have more features.
            hidden = getattr(self.heads[0], 'head_hidden_size', self.head_hidden_size // self.ensemble_size)
            self.head_hidden_size = hidden * self.ensemble_size
        self.poolings = int(global_pool != '')
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r'^blocks\.0\.', blocks=r'^blocks\.(\d+)')  # the heads come last
