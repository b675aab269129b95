"""`cnn`: the small network for small grey images; about 140,000 parameters at its default width."""

import torch.nn.functional as F
from torch import Tensor, nn

from fdml.models.norm import ConvNorm
from fdml.models.robust import Outputs


class CNN(nn.Module):
    """Three stages of 3x3 convolutions, each stage at half the resolution of the one before.

    The stem has few channels at full resolution, where a CPU is bound by memory; the width is spent where images are
    small. Images of at least 16 pixels are halved three times, smaller ones twice. Taps: stage1 (2w channels), stage2
    (4w), stage3 (8w), features (8w).
    """

    taps = ("stage1", "stage2", "stage3", "features")

    def __init__(self, channels: int, size: int, classes: int, *, width: int = 16) -> None:
        super().__init__()
        first = 2 if size >= 16 else 1
        self.stem = ConvNorm(channels, width)
        self.stage1 = ConvNorm(width, 2 * width, stride=first)
        self.stage2 = nn.ModuleList([ConvNorm(2 * width, 4 * width, stride=2), ConvNorm(4 * width, 4 * width)])
        self.stage3 = ConvNorm(4 * width, 8 * width, stride=2)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Outputs:
        stage1 = F.relu_(self.stage1(F.relu_(self.stem(x))))
        stage2 = stage1
        for layer in self.stage2:
            stage2 = F.relu_(layer(stage2))
        stage3 = F.relu_(self.stage3(stage2))
        features = stage3.mean((2, 3))
        logits = self.head(features)
        return Outputs(logits, {"stage1": stage1, "stage2": stage2, "stage3": stage3, "features": features})
