"""What the networks of model.py are made of: usual layers, in versions that compute the same faster on a CPU."""

import numpy as np
import torch
from torch import nn


class ConvBlock(nn.Sequential):
    """Conv2d 3x3 -> BatchNorm2d -> MaxPool2d -> ReLU -> Dropout.

    ReLU after pooling gives the same function as before it, for a fraction of its work. In training on a CPU, dropout's
    scale is worked into the norm and its mask into ReLU: where an output is zero, no gradient passes, whichever of the
    two it is zero for. That saves 7 % of a training step.
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
        _, _, pool, _, dropout = self
        share = round(dropout.p * 65536) / 65536  # as `keep_mask` draws it
        if x.device.type != "cpu" or not self.training or share == 1:
            return super().forward(x)
        x = pool(self.normalised(x, 1 / (1 - share)))
        return ReLUAndMask.apply(x, keep_mask(x, share) if share else None)

    def normalised(self, x, scale):
        """Return scale times the normalised convolution of x, and note the statistics as BatchNorm2d does."""
        convolution, norm, *_ = self
        norm.num_batches_tracked += 1
        return nn.functional.batch_norm(
            convolution(x),
            norm.running_mean,
            norm.running_var,
            norm.weight * scale,
            norm.bias * scale,
            training=True,
            momentum=norm.momentum,
            eps=norm.eps,
        )


class InputBlock(ConvBlock):
    """A ConvBlock of one input channel; BatchNorm2d is worked into the weights in training on a CPU.

    The convolution is linear, so that mean and variance of its outputs follow from those of the patches it reads.
    Normalising the weights instead of the outputs saves passes over the largest tensor of the network: 6 % of a
    training step.
    """

    def normalised(self, x, scale):
        if x.requires_grad:
            return super().normalised(x, scale)
        convolution, norm, *_ = self
        mean, variance = self.output_statistics(x)  # (channels,)
        gain = norm.weight * scale * (variance + norm.eps).rsqrt()
        weight = convolution.weight * gain[:, None, None, None]
        return nn.functional.conv2d(x, weight, norm.bias * scale + (convolution.bias - mean) * gain, padding=1)

    def output_statistics(self, x):
        """Return (mean, variance) of each channel that the convolution makes of x; note them as BatchNorm2d does."""
        convolution, norm, *_ = self
        with torch.autocast("cpu", enabled=False):
            patch_mean, patch_covariance = (torch.from_numpy(array) for array in patch_statistics(x.numpy()[:, 0]))
            kernels = convolution.weight.flatten(1)  # (channels, 9)
            mean = kernels @ patch_mean + convolution.bias
            variance = ((kernels @ patch_covariance) * kernels).sum(dim=1).clamp(min=0)
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (x.numel() / (x.numel() - 1)), norm.momentum)
            norm.num_batches_tracked += 1
        return mean, variance


def patch_statistics(images):
    """Return mean (9,) and covariance (9, 9) of the 3x3 patches around every cell of images, zero beyond their edges.

    images: (B, height, width). Of patches around every cell of a whole plane, the sum of the products of two places
    depends on the distance of the places alone: 13 products of the flattened images with themselves give all 81. Those
    around the ring of cells just outside an image, which also reach into it, are then taken off. NumPy, because
    torch starts its threads anew for each of so many short sums.
    """
    plane = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    flat, row = plane.ravel(), plane.shape[2]
    places = [row * down + right for down in range(3) for right in range(3)]  # in the flattened plane
    distances = np.abs(np.subtract.outer(places, places))  # (9, 9)
    unique, which = np.unique(distances, return_inverse=True)
    products = np.array([flat[distance:] @ flat[: len(flat) - distance] for distance in unique])  # (13,)
    edges = plane[:, :3], plane[:, -3:], plane[:, 1:-1, :3], plane[:, 1:-1, -3:]
    windows = [np.lib.stride_tricks.sliding_window_view(edge, (3, 3), axis=(1, 2)) for edge in edges]
    ring = np.concatenate([window.reshape(-1, 9) for window in windows])  # (patches, 9)
    sums = images.sum() - ring.sum(axis=0)
    squares = products[which].reshape(9, 9) - ring.T @ ring
    mean = sums / images.size
    return mean, squares / images.size - np.outer(mean, mean)


def keep_mask(x, share):
    """Return integers of x's shape and element size: no bit is set in a random share of them, all bits in the rest.

    `bernoulli_` of nn.Dropout runs on one thread of a CPU and took a quarter of a training step. Here 64 random bits
    give four elements, so that the share is one of 65536. The masks follow from torch's own seed, as nn.Dropout's do.
    """
    seed = torch.empty((), dtype=torch.int64).random_().item()
    bits = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16)[: x.numel()]
    # Signed: the lowest share of the values starts at -32768. Less makes 1 of them, which less 1 has no bit set.
    mask = torch.from_numpy(bits).lt_(round(share * 65536) - 32768).sub_(1).to(INTEGERS[x.element_size()])
    # In x's own order of dimensions, without the gaps or overlaps that a view has.
    return mask.as_strided(x.shape, torch.empty_like(x).stride())


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


class ReLUAndMask(torch.autograd.Function):
    """ReLU of x where the mask of `keep_mask` is set, else 0, written over x. A mask of None is set everywhere."""

    @staticmethod
    def forward(ctx, x, mask):
        x.clamp_(min=0)
        if mask is not None:
            x.view(mask.dtype).bitwise_and_(mask)  # faster than numbers times booleans
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, x, 0), None
