"""What the networks of model.py are made of: usual layers, in versions that compute the same faster on a CPU."""

import numpy as np
import torch
from torch import nn


def conv_block(channels_in, channels_out, pool, dropout):
    """Return Conv2d 3x3 -> BatchNorm2d -> MaxPool2d -> ReLU -> Dropout.

    ReLU after pooling gives the same function as before it, for a fraction of its work.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm2d(channels_out),
        nn.MaxPool2d(pool),
        nn.ReLU(),
        Dropout(dropout),
    )


class InputBlock(nn.Sequential):
    """The layers of a conv_block of one input channel; BatchNorm2d is worked into the weights in training on a CPU.

    The convolution is linear, so that mean and variance of its outputs follow from those of the patches it reads.
    Normalising the weights instead of the outputs saves passes over the largest tensor of the network: 6 % of a
    training step.
    """

    def forward(self, x):
        """(B, 1, height, width) -> (B, channels, height / 2, width / 2)."""
        if x.device.type != "cpu" or not self.training or x.requires_grad:
            return super().forward(x)
        convolution, norm, *others = self
        mean, variance = self.output_statistics(x)  # (channels,)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        weight = convolution.weight * scale[:, None, None, None]
        x = nn.functional.conv2d(x, weight, norm.bias + (convolution.bias - mean) * scale, padding=1)
        for layer in others:
            x = layer(x)
        return x

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


class Dropout(nn.Dropout):
    """nn.Dropout, with masks drawn four elements per 64 random bits on a CPU.

    `bernoulli_` there runs on one thread and took a quarter of a training step. The probability is rounded to 16 bits
    (0.1 becomes 6554 / 65536). The masks follow from torch's own seed, as nn.Dropout's do.
    """

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or not 0 < self.p < 1:
            return super().forward(x)
        seed = torch.empty((), dtype=torch.int64).random_().item()
        bits = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16)[: x.numel()]
        threshold = min(round(self.p * 65536), 65535)
        # Signed: the lowest `threshold` values start at -32768. All bits are set where x stays, else none.
        mask = _integers(torch.from_numpy(bits) < threshold - 32768, x).sub_(1)
        # In x's own order of dimensions, without the gaps or overlaps that a view has.
        mask = mask.as_strided(x.shape, torch.empty_like(x).stride())
        return _MaskAndScale.apply(x, mask, 65536 / (65536 - threshold))


def _integers(tensor, like):
    """Return a tensor as integers of as many bits as the elements of `like`: a new one, or a view of the same bits."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.element_size()]
    return tensor.to(integer) if tensor.dtype == torch.bool else tensor.view(integer)


class _MaskAndScale(torch.autograd.Function):
    """x where the mask is set, else 0, times scale. Bits are masked faster than numbers are multiplied by booleans.

    Autograd's own product would also keep x for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, mask, scale):
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (_integers(x, x) & mask).view(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return (_integers(gradient, gradient) & mask).view(gradient.dtype).mul_(ctx.scale), None, None
