"""Residual networks for 32-pixel images: `resnet18` (He et al. 2016) and `wrn-D-W` (Zagoruyko and Komodakis 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.models.norm import BatchNorm2d, ConvNorm
from fdml.models.robust import Outputs


class BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm, added to the input, then relu (He et al. 2016a, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, stride=stride)
        self.conv2 = ConvNorm(outputs, outputs)
        self.shortcut = ConvNorm(inputs, outputs, kernel=1, stride=stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        straight = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.conv2(F.relu_(self.conv1(x))) + straight)


class PreActBlock(nn.Module):
    """norm-relu-conv-norm-relu-conv, added to the input (He et al. 2016b); the shortcut sees the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(inputs)
        self.conv1 = ConvNorm(inputs, outputs, stride=stride)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu_(self.norm(x))
        straight = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu_(self.conv1(active))) + straight


class ResNet(nn.Module):
    """Stages of residual blocks over a 3x3 stem without pooling; the first stage keeps the resolution.

    ``widths`` and ``depth`` give each stage's channels and the number of blocks in each stage. Taps: stage1, …,
    features.
    """

    def __init__(
        self, channels: int, classes: int, *, stem: int, widths: tuple[int, ...], depth: int, preact: bool
    ) -> None:
        super().__init__()
        block = PreActBlock if preact else BasicBlock
        self.stem = nn.Conv2d(channels, stem, 3, padding=1, bias=False) if preact else ConvNorm(channels, stem)
        self.stages = nn.ModuleList()
        inputs = stem
        for index, width in enumerate(widths):
            blocks = [block(inputs if i == 0 else width, width, 2 if i == 0 and index else 1) for i in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = width
        self.last_norm = BatchNorm2d(inputs) if preact else None
        self.head = nn.Linear(inputs, classes)
        self.taps: tuple[str, ...] = (*(f"stage{i + 1}" for i in range(len(widths))), "features")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Outputs:
        x = self.stem(x)
        if self.last_norm is None:
            x = F.relu_(x)
        taps: dict[str, Tensor] = {}
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if self.last_norm is not None and index == len(self.stages) - 1:
                x = F.relu_(self.last_norm(x))
            # A pre-activation block starts by writing into a fresh tensor, so a tap is never overwritten by the next
            # stage.
            taps[f"stage{index + 1}"] = x
        taps["features"] = x.mean((2, 3))
        return Outputs(self.head(taps["features"]), taps)


def resnet18(channels: int, classes: int, *, preact: bool = False, width: int = 64) -> ResNet:
    """ResNet-18 with the CIFAR stem: 11.2 million parameters at width 64."""
    widths = (width, 2 * width, 4 * width, 8 * width)
    return ResNet(channels, classes, stem=width, widths=widths, depth=2, preact=preact)


def wide_resnet(channels: int, classes: int, *, depth: int, factor: int) -> ResNet:
    """WRN-depth-factor: three stages of (depth - 4) / 6 pre-activation blocks each."""
    widths = (16 * factor, 32 * factor, 64 * factor)
    net = ResNet(channels, classes, stem=16, widths=widths, depth=(depth - 4) // 6, preact=True)
    assert isinstance(net.head, nn.Linear)
    torch.nn.init.zeros_(net.head.bias)
    return net
