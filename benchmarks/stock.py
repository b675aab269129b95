"""What the peers are given: our networks as one would write them."""

import copy

import torch
from torch import nn

from fdml.models import RobustModel
from fdml.models.norm import ConvNorm


def plain(model: RobustModel) -> nn.Module:
    """The same network and weights from stock modules only, in stock layout and in the same mode."""

    def convert(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if isinstance(child, ConvNorm):
                norm = nn.BatchNorm2d(child.norm.num_features)
                norm.load_state_dict(child.norm.state_dict())
                setattr(module, name, nn.Sequential(child.conv, norm))
            else:
                convert(child)
        return module

    copied = convert(copy.deepcopy(model)).train(model.training)
    return copied.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
