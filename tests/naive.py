"""The naive reference: every node of every block is a plain network of its own, and members are evaluated one by one.

Written from Tables 2 and 3 of the paper with `torch.nn` only, it shares no code with the package. The names of the
modules are those of the package's models, so that `copy_weights` can find the rows of a node in a branched tensor.
"""
from collections import OrderedDict

import torch
import torch.nn as nn


def conv_norm_act(in_chs: int, out_chs: int, kernel_size: int, stride=1, groups=1, act=None) -> nn.Sequential:
    layers = OrderedDict(
        conv=nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(out_chs),
    )
    if act is not None:
        layers['act'] = act()
    return nn.Sequential(layers)


class Bottleneck(nn.Module):
    """Figure 7."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, project: bool):
        super().__init__()
        mid_chs = out_chs // 4
        self.conv1 = conv_norm_act(in_chs, mid_chs, 1, act=nn.ReLU)
        self.conv2 = conv_norm_act(mid_chs, mid_chs, 3, stride, groups=mid_chs, act=nn.ReLU)
        self.conv3 = conv_norm_act(mid_chs, out_chs, 1)
        self.shortcut = conv_norm_act(in_chs, out_chs, 1, stride) if project else nn.Identity()

    def forward(self, x):
        return torch.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Figure 8."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.conv_pw = conv_norm_act(in_chs, 6 * in_chs, 1, act=nn.ReLU6)
        self.conv_dw = conv_norm_act(6 * in_chs, 6 * in_chs, 3, stride, groups=6 * in_chs, act=nn.ReLU6)
        self.conv_pwl = conv_norm_act(6 * in_chs, out_chs, 1)
        self.add = in_chs == out_chs and stride == 1

    def forward(self, x):
        y = self.conv_pwl(self.conv_dw(self.conv_pw(x)))
        return x + y if self.add else y


def resnet_block(block: int, width: int) -> nn.Sequential:
    """One node of a block of Table 2 (block 4 at stride 1: the table's resolutions count)."""
    if block == 0:
        return nn.Sequential(
            conv_norm_act(3, width, 3, act=nn.ReLU),
            conv_norm_act(width, 4 * width, 1, act=nn.ReLU),
        )
    in_chs, out_chs, stride, repetitions = {
        1: (4, 4, 1, 3), 2: (4, 8, 2, 4), 3: (8, 16, 2, 4), 4: (16, 16, 1, 5),
    }[block]
    return nn.Sequential(
        Bottleneck(in_chs * width, out_chs * width, stride, project=True),
        *(Bottleneck(out_chs * width, out_chs * width, 1, project=False) for _ in range(repetitions - 1)),
    )


def mobilenet_block(block: int) -> nn.Sequential:
    """One node of a block of Table 3."""
    if block == 0:
        return nn.Sequential(
            conv_norm_act(3, 16, 3, 2, act=nn.ReLU6),
            conv_norm_act(16, 16, 1, act=nn.ReLU6),
            InvertedResidual(16, 24, 2),
            InvertedResidual(24, 24, 1),
        )
    if block == 1:
        return nn.Sequential(InvertedResidual(24, 24, 2), *(InvertedResidual(24, 24, 1) for _ in range(2)))
    if block == 2:
        return nn.Sequential(
            InvertedResidual(24, 48, 2),
            *(InvertedResidual(48, 48, 1) for _ in range(3)),
            InvertedResidual(48, 72, 1),
            *(InvertedResidual(72, 72, 1) for _ in range(2)),
        )
    return nn.Sequential(
        InvertedResidual(72, 120, 2),
        *(InvertedResidual(120, 120, 1) for _ in range(2)),
        conv_norm_act(120, 720, 1, act=nn.ReLU6),
    )


class NaiveEnsemble(nn.Module):
    """N networks that share the nodes of a tree (Eq. 1 and 4).

    Args:
        nodes: Number of nodes of each block.
        blocks: For each block the list of its nodes.
        hiddens: The fully connected layer of each member, or nothing.
        classifiers: The classifier of each member.
    """

    def __init__(self, nodes, blocks, hiddens, classifiers):
        super().__init__()
        self.nodes = nodes
        self.blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.hiddens = nn.ModuleList(hiddens)
        self.classifiers = nn.ModuleList(classifiers)

    def forward_members(self, x, num_members):
        """Logits `(B, n, num_classes)`; a node runs once, also for the batch statistics."""
        outputs, logits = {}, []
        for member in range(num_members):
            y, path = x, ()
            for b, block in enumerate(self.blocks):
                node = member * self.nodes[b] // self.nodes[-1]
                path = (b, node)
                if path not in outputs:
                    outputs[path] = block[node](y)
                y = outputs[path]
            y = y.mean((2, 3))
            if self.hiddens:
                y = nn.functional.relu6(self.hiddens[member](y))
            logits.append(self.classifiers[member](y))
        return torch.stack(logits, dim=1)

    def parts(self):
        """Yield the name of each part in the package's models, its modules, one a node."""
        for b, block in enumerate(self.blocks):
            yield f'blocks.{b}', block
        if self.hiddens:
            yield 'hidden', self.hiddens
        yield 'classifier', self.classifiers

    def tensors(self, attribute):
        """Yield every parameter or buffer with its name in the package's models, its node and the number of nodes."""
        for part, modules in self.parts():
            for node, module in enumerate(modules):
                for name, tensor in getattr(module, attribute)():
                    yield f'{part}.{name}', node, len(modules), tensor


def rows(tensor: torch.Tensor, node: int, nodes: int) -> torch.Tensor:
    """The part of a branched tensor that belongs to a node; all of it if it is a scalar."""
    return tensor.unflatten(0, (nodes, -1))[node] if tensor.dim() else tensor


@torch.no_grad()
def copy_weights(model: nn.Module, naive: NaiveEnsemble) -> None:
    """Copy the parameters and buffers of one of the package's models into the naive one."""
    state = model.state_dict()
    left = set(state)
    for attribute in ('named_parameters', 'named_buffers'):
        for name, node, nodes, tensor in naive.tensors(attribute):
            tensor.copy_(rows(state[name], node, nodes))
            left.discard(name)
    assert not left, f'the naive network has no {sorted(left)}'


def naive_resnet(width: int, nodes: tuple[int, ...], num_classes: int) -> NaiveEnsemble:
    blocks = [[resnet_block(b, width) for _ in range(count)] for b, count in enumerate(nodes)]
    return NaiveEnsemble(nodes, blocks, [], [nn.Linear(16 * width, num_classes) for _ in range(nodes[-1])])


def naive_mobilenet(nodes: tuple[int, ...], num_classes: int) -> NaiveEnsemble:
    blocks = [[mobilenet_block(b) for _ in range(count)] for b, count in enumerate(nodes)]
    members = range(nodes[-1])
    hiddens = [nn.Linear(720, 1280) for _ in members]
    return NaiveEnsemble(nodes, blocks, hiddens, [nn.Linear(1280, num_classes) for _ in members])


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """Give batch normalisations, and zeros, values that a mistake would show in; keep the scale of the activations."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.weight.uniform_(0.6, 1.4)
            child.bias.normal_(0, 0.2)
            child.running_mean.normal_(0, 0.2)
            child.running_var.uniform_(0.6, 1.4)
    for name, parameter in module.named_parameters():
        if name.endswith('classifier.bias'):
            parameter.normal_()
    return module
