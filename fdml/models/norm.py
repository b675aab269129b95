"""Convolution and batch normalisation as one unit: folded to infer, synchronised when several processes train."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.models.conv import convolution


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose training statistics are those of the global batch when several processes train, unless
    ``synchronised`` is turned off.

    ``nn.SyncBatchNorm`` does the same on a GPU and refuses a CPU; this one serves both, so that a run of N processes
    can be checked against a run of one. Under ``torchrun`` a single process takes the same path as several: torch's own
    kernel sums channels_last batches with an error of 1e-5, which would hide what is compared.
    """

    synchronised = True

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.synchronised and dist.is_initialized()):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        size = input.numel() // input.shape[1] * dist.get_world_size()
        if type(input) is Tensor:
            normal, mean, var = _Synchronised.apply(input.float(), self.weight, self.bias, self.eps)  # pyright: ignore[reportGeneralTypeIssues]
        else:  # what is no plain tensor, an interval say, goes by operations that it knows
            # Two passes, as the single-process kernel does: the one-pass formula loses the variance of a large mean.
            mean = _all_sum(input.sum((0, 2, 3))) / size
            centred = input - mean[:, None, None]
            var = _all_sum(centred.square().sum((0, 2, 3))) / size
            scale = self.weight * torch.rsqrt(var + self.eps)
            normal = centred * scale[:, None, None] + self.bias[:, None, None]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (size / max(1, size - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return normal

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


class _Synchronised(torch.autograd.Function):
    """Batch normalisation by the statistics of all processes' rows, whose numbers are equal: one exchange forward, one
    backward, and few passes over the activations, which is what a CPU waits for.

    Also returns the mean and the (biased) variance, without gradients of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / rows
        var = (x - mean[:, None, None]).square_().sum((0, 2, 3)) / rows
        parts = x.new_zeros(dist.get_world_size(), 2, len(mean))
        parts[dist.get_rank()] = torch.stack([mean, var])
        dist.all_reduce(parts)
        means, within = parts.unbind(1)
        mean = means.mean(0)
        # The variance of the whole from those of its parts (Chan et al. 1983): no large mean can spoil it.
        var = within.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        x, mean, var, weight = ctx.saved_tensors
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([of_weight, of_bias])
        dist.all_reduce(sums)
        sums /= x.numel() // x.shape[1] * dist.get_world_size()
        # The gradient by x is linear in x and in the incoming one, channel by channel.
        inverse = torch.rsqrt(var + ctx.eps)
        by_grad = weight * inverse
        by_x = -by_grad * inverse * sums[0]
        rest = -by_grad * sums[1] - by_x * mean
        by_grad, by_x, rest = (each[:, None, None] for each in (by_grad, by_x, rest))
        return torch.addcmul(rest, x, by_x).addcmul_(grad, by_grad), of_weight, of_bias, None


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
