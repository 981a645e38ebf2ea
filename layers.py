"""What the networks of model.py are made of: usual layers, in a version that trains faster on a CPU."""

import numpy as np
import torch
from torch import nn


class ConvBlock(nn.Sequential):
    """Conv2d 3x3 -> BatchNorm2d -> MaxPool2d -> ReLU -> Dropout.

    ReLU after pooling gives the same function as before it, for a fraction of its work. In training on a CPU, all that
    follows the convolution is one step (kernels.py), the same to rounding.
    """

    def __init__(self, channels_in, channels_out, pool, dropout):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.MaxPool2d(pool),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        """(B, channels_in, height, width) -> (B, channels_out, height / pool, width / pool)."""
        convolution, norm, pool, relu, dropout = self
        x = convolution(x)
        if self.training and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and dropout.p < 1:
            return NormPoolReLUDropout.apply(x, norm.weight, norm.bias, norm, pool.kernel_size, dropout.p)
        return dropout(relu(pool(norm(x))))


class NormPoolReLUDropout(torch.autograd.Function):
    """BatchNorm2d (its weight and bias, and itself), max-pooling, ReLU and dropout of x (B, C, height, width).

    With z = (x - mean) / deviation of each channel over the batch, and s = 1 / (1 - dropout), the output is that of the
    affine function s * (weight * z + bias) = scale * x + offset, pooled, cut at 0 and masked. So is the gradient g that
    comes back to it, in few places, and the one for x is (Ioffe and Szegedy 2015, arXiv:1502.03167; n values a channel)
        scale * (g - sum(g) / n - z * sum(g * z) / n)
    """

    @staticmethod
    def forward(ctx, x, weight, bias, norm, pool, dropout):
        import kernels

        x = x.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        n = images * height * width
        ctx.kernels = kernels.kernels(channels, *pool)
        statistics, forward, *_ = ctx.kernels
        shift = norm.running_mean.numpy().copy()  # near the mean, so that the variance keeps its digits
        sums = np.zeros((images, 2, channels), np.float32)
        kernels.over_images(statistics, memory(x), shift, sums)
        first, second = sums.sum(axis=0, dtype=np.float64) / n
        mean, variance = shift + first, np.maximum(second - first**2, 0)
        deviation = np.sqrt(variance + norm.eps)
        note_statistics(norm, mean, variance * n / (n - 1))

        share = min(round(dropout * 65536), 65535) / 65536  # of the outputs that are dropped
        scale = weight.detach().numpy() / deviation / (1 - share)
        offset = bias.detach().numpy() / (1 - share) - mean * scale
        pooled = images, height // pool[0], width // pool[1], channels
        y = torch.empty(pooled, dtype=x.dtype).permute(0, 3, 1, 2)  # channels last
        places = np.empty(pooled, np.uint8)
        least = np.int16(65536 * share - 32768)  # of the random numbers that keep an output
        kernels.over_images(
            forward, memory(x), *floats(scale, offset), random_numbers(pooled), least, memory(y), places
        )
        ctx.save_for_backward(x)
        ctx.rest = places, mean, deviation, scale, share
        return y

    @staticmethod
    def backward(ctx, gradient):
        import kernels

        (x,) = ctx.saved_tensors
        places, mean, deviation, scale, share = ctx.rest
        *_, gradient_sums, backward = ctx.kernels
        images, channels, height, width = x.shape
        n = images * height * width
        gradient = memory(gradient.contiguous(memory_format=torch.channels_last))
        sums = np.zeros((images, 2, channels), np.float32)
        kernels.over_images(gradient_sums, gradient, memory(x), places, *floats(mean), sums)
        total, projection = sums.sum(axis=0, dtype=np.float64)
        projection /= deviation  # sum(g * z)
        slope = -scale * projection / n / deviation
        offset = -scale * total / n - slope * mean
        x_gradient = torch.empty_like(x)
        kernels.over_images(backward, gradient, memory(x), places, *floats(scale, slope, offset), memory(x_gradient))
        of_weight, of_bias = (torch.from_numpy(row) for row in floats(projection / (1 - share), total / (1 - share)))
        return x_gradient, of_weight, of_bias, None, None, None


def note_statistics(norm, mean, variance):
    """Move a BatchNorm2d's running statistics as it does itself."""
    norm.running_mean.lerp_(torch.from_numpy(mean).float(), norm.momentum)
    norm.running_var.lerp_(torch.from_numpy(variance).float(), norm.momentum)
    norm.num_batches_tracked += 1


def random_numbers(shape):
    """Return int16 over its whole range. They follow from torch's own seed, as nn.Dropout's masks do.

    64 random bits give four. `bernoulli_` of nn.Dropout runs on one thread of a CPU and took a quarter of a step.
    """
    seed = torch.empty((), dtype=torch.int64).random_().item()
    count = int(np.prod(shape))
    return np.random.SFC64(seed).random_raw((count + 3) // 4).view(np.int16)[:count].reshape(shape)


def memory(x):
    """Return the numbers of a tensor (B, C, height, width), channels last, as they lie: (B, height, width, C)."""
    x = x.detach().permute(0, 2, 3, 1)
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def floats(*rows):
    return [row.astype(np.float32) for row in rows]
