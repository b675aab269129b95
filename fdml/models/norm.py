"""Convolution and batch normalisation as one unit: folded to infer, synchronised when several processes train."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdml.models.conv import convolution


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose training statistics are those of the global batch when several processes train.

    ``nn.SyncBatchNorm`` does the same on a GPU and refuses a CPU; this one serves both, so that a run of N processes
    can be checked against a run of one. Under ``torchrun`` a single process takes the same path as several: torch's own
    kernel sums channels_last batches with an error of 1e-5, which would hide what is compared.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        size = input.numel() // input.shape[1] * dist.get_world_size()
        # Two passes, as the single-process kernel does: the one-pass formula loses the variance of a large mean.
        mean = _all_sum(input.sum((0, 2, 3))) / size
        centred = input - mean[:, None, None]
        var = _all_sum(centred.square().sum((0, 2, 3))) / size
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (size / max(1, size - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]

    def affine_of_inference(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) per channel such that inference is ``scale * input + shift``."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale


class ConvNorm(nn.Module):
    """Convolution, then batch normalisation.

    In eval mode the normalisation is folded into the convolution's weights at each call. The folding touches the
    weights alone, a thousandth of the work of the convolution, and spares the inner attack one pass over the
    activations forward and one backward; nothing is cached that a training step could make stale.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = BatchNorm2d(outputs)
        self._padding = (kernel // 2, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.norm(convolution(x, self.conv.weight, None, self.conv.stride, self._padding))
        return convolution(x, *self.folded(), self.conv.stride, self._padding)

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the convolution that the unit is in inference."""
        scale, shift = self.norm.affine_of_inference()
        return self.conv.weight * scale[:, None, None, None], shift


class _AllSum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return _AllSum.forward(ctx, grads[0])


def _all_sum(value: Tensor) -> Tensor:
    total = _AllSum.apply(value)
    assert isinstance(total, Tensor)
    return total
