"""Convolution as an attack needs it: fast in the gradient by the input, which training hardly looks at."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 3
"""Up to so many input channels the gradient by the input is a matrix product and a few shifted sums."""


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple) -> Tensor:
    """``conv2d``, whose result is channels_last. Two paths of its own, for grey images and for the gradient by them.

    The layout of an image of one channel is ambiguous, and torch takes NCHW, ten times as slow here, and for all layers
    after it. And for the first layer of a frozen network on a CPU the gradient by the input is a product of matrices:
    torch's kernel is built for many input channels and spends up to 13 times as long on one.
    """
    if weight.shape[1] == 1:
        outputs, _, rows, columns = weight.shape
        weight = weight.reshape(outputs, rows, columns, 1).permute(0, 3, 1, 2)  # with the strides of channels_last
    few = weight.shape[1] <= FEW and stride == (1, 1) and padding == (weight.shape[2] // 2, weight.shape[3] // 2)
    # A compiler would fuse the shifted sums into one expression, over which it sits for minutes.
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if few and eager and x.requires_grad and not weight.requires_grad:
        found = _FewChannels.apply(x, weight, bias, padding)
        assert isinstance(found, Tensor)
        return found
    return F.conv2d(x, weight, bias, stride, padding)


class _FewChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, 1, padding)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight,), (above, left) = grads, ctx.saved_tensors, ctx.padding
        images, outputs, height, width = grad.shape
        inputs, (rows, columns) = weight.shape[1], weight.shape[2:]
        taps = weight.permute(1, 2, 3, 0).reshape(-1, outputs)
        spread = (taps @ grad.permute(0, 2, 3, 1).reshape(-1, outputs).T).view(
            inputs, rows, columns, images, height, width
        )
        total = grad.new_zeros(images, inputs, height + 2 * above, width + 2 * left)
        for channel in range(inputs):
            for row in range(rows):
                for column in range(columns):
                    total[:, channel, row : row + height, column : column + width] += spread[channel, row, column]
        return total[:, :, above : above + height, left : left + width], None, None, None
