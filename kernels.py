"""A faster form of the network's convolution block, for training on CPUs: the same numbers to rounding.

    config.FAST_BLOCKS = False        # trains with the plain modules instead

Norm, max-pooling, ReLU and dropout each read and write the largest tensors of the network, and nearly all their time
is waiting for memory. Here the four are one step in loops that Numba compiles: a batch is read twice forward and twice
backward. Between reading and writing all is float32. model.py asks `fits` and calls `fast_block`; nothing else does.

Arrays are (images, height, width, channels), the order of memory in channels_last; bfloat16 comes as its bits, uint16.
Each number of channels and window has loops of its own, compiled at their first use (some seconds) and kept in
__pycache__.
"""

import concurrent.futures
import contextlib
import functools

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import nn

THREADS = concurrent.futures.ThreadPoolExecutor(256)  # each starts when it is first needed
NOWHERE = 255  # in `winners`: ReLU or dropout gave zero, and no gradient passes


# --- What model.py calls -----------------------------------------------------------------------------------------


def fits(block, x):
    """Return whether `fast_block` computes what a block's own modules compute for x (B, C, height, width).

    After its convolution, the modules must be as their types make them: after any edit, the edit is what trains.
    """
    if [type(module) for module in block] != [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU, nn.Dropout]:
        return False
    convolution, norm, pool, _, dropout = block
    size = pool.kernel_size
    fresh = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum), nn.MaxPool2d(size), nn.ReLU()
    return (
        x.device.type == "cpu"
        and all(map(is_same, list(block)[1:], [*fresh, nn.Dropout(dropout.p)]))
        and x.dtype in (torch.float32, torch.bfloat16)
        and convolution.weight.dtype == norm.weight.dtype == torch.float32
        and norm.momentum is not None
        and isinstance(size, tuple)
        and size[0] * size[1] < NOWHERE
        and not numba.config.DISABLE_JIT  # for debugging: the loops would take hours in Python
        and dropout.p < 1
    )


def is_same(module, fresh):
    """Return whether a module differs from a fresh one in training in its tensors alone: no option, hook or forward."""
    tensors = {"_parameters": None, "_buffers": None}
    return vars(module) | tensors == vars(fresh) | tensors


def fast_block(block, x):
    """Return what the block's modules give for x, (B, C_in, height, width), in training."""
    convolution, norm, pool, _, dropout = block
    x = convolution(x)
    return NormPoolReLUDropout.apply(x, norm.weight, norm.bias, norm, pool.kernel_size, dropout.p)


class NormPoolReLUDropout(torch.autograd.Function):
    """BatchNorm2d (its weight and bias, and itself), max-pooling, ReLU and dropout of x (B, C, height, width).

    With z = (x - mean) / std of each channel over the batch, and s = 1 / (1 - dropout), the output is that of the
    affine function s * (weight * z + bias) = scale * x + offset, pooled, cut at 0 and masked. So is the gradient g that
    comes back to it, in few cells, and the one for x is (Ioffe and Szegedy 2015, arXiv:1502.03167; n values a channel)
        scale * (g - sum(g) / n - z * sum(g * z) / n)
    """

    @staticmethod
    def forward(ctx, x, weight, bias, norm, pool, dropout):
        x = x.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        n = images * height * width
        statistics, forward, *ctx.loops = loops(channels, *pool)
        shift = norm.running_mean.numpy().copy()  # near the mean, so that the variance keeps its digits
        sums = np.zeros((images, 2, channels), np.float32)
        over_images(statistics, memory(x), shift, sums)
        first, second = sums.sum(axis=0, dtype=np.float64) / n
        mean, variance = shift + first, np.maximum(second - first**2, 0)
        std = np.sqrt(variance + norm.eps)
        norm.running_mean.lerp_(torch.from_numpy(mean).float(), norm.momentum)
        norm.running_var.lerp_(torch.from_numpy(variance * n / (n - 1)).float(), norm.momentum)
        norm.num_batches_tracked += 1

        share = min(round(dropout * 65536), 65535) / 65536  # of the outputs, dropped
        scale = weight.detach().numpy() / std / (1 - share)
        offset = bias.detach().numpy() / (1 - share) - mean * scale
        pooled = images, height // pool[0], width // pool[1], channels
        y = torch.empty(pooled, dtype=x.dtype).permute(0, 3, 1, 2)  # channels last
        winners = np.empty(pooled, np.uint8)
        minimum = np.int16(65536 * share - 32768)  # of the random numbers that keep an output
        random = random_numbers(pooled)
        over_images(forward, memory(x), *np.float32([scale, offset]), random, minimum, memory(y), winners)
        ctx.save_for_backward(x)
        ctx.rest = winners, mean, std, scale, share
        return y

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        winners, mean, std, scale, share = ctx.rest
        gradient_sums, backward = ctx.loops
        n = x.numel() // x.shape[1]
        gradient = memory(gradient.contiguous(memory_format=torch.channels_last))
        sums = np.zeros((len(x), 2, x.shape[1]), np.float32)
        over_images(gradient_sums, gradient, memory(x), winners, np.float32(mean), sums)
        total, projection = sums.sum(axis=0, dtype=np.float64)
        projection /= std  # sum(g * z)
        slope = -scale * projection / n / std
        offset = -scale * total / n - slope * mean
        x_gradient = torch.empty_like(x)
        over_images(backward, gradient, memory(x), winners, *np.float32([scale, slope, offset]), memory(x_gradient))
        of_weight, of_bias = torch.from_numpy(np.float32([projection / (1 - share), total / (1 - share)]))
        return x_gradient, of_weight, of_bias, None, None, None


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


# --- The loops --------------------------------------------------------------------------------------------------


def compiled(function):
    """Compile a loop, and keep it in a file for the next process where there is a folder to write to.

    Where that file is damaged or the disk is full, the loop is compiled for this process alone.
    """
    compile_it = numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    loop = compile_it(function)
    with contextlib.suppress(RuntimeError):  # neither __pycache__ nor the user's own cache can be written
        loop.enable_caching()

    def call(*arguments):
        nonlocal loop
        try:
            return loop(*arguments)
        except Exception:  # reading or writing the file, before the loop runs, may raise anything
            loop = compile_it(function)
            return loop(*arguments)

    return call


def to_float(number):
    """In a kernel: a float32, or a bfloat16's bits -> float32."""


@overload(to_float)
def _to_float(number):
    if isinstance(number, numba.types.Integer):  # a bfloat16 is the upper half of a float32
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


def from_float(number, like):
    """In a kernel: float32 -> what `like` is: float32, or the nearest bfloat16's bits; of two as near, the even one."""


@overload(from_float)
def _from_float(number, like):
    def to_bfloat16(number, like):
        bits = np.float32(number).view(np.uint32)
        to_even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + to_even) >> np.uint32(16))
        return rounded if number == number else np.uint16(0x7FC0)  # NaN stays NaN

    return to_bfloat16 if isinstance(like, numba.types.Integer) else lambda number, like: number


@functools.cache
def loops(channels, pool_height, pool_width):
    """Return the four loops (statistics, forward, gradient_sums, backward) for one shape of block.

    The inner loops run over the channels, which lie side by side; their number is a constant, so that they become a few
    vector instructions.
    """

    @compiled
    def statistics(x, shift, sums):
        """Add to sums (images, 2, channels) the sum of x - shift and that of its square. shift: (channels,)."""
        first, second = np.empty(channels, np.float32), np.empty(channels, np.float32)
        for image in range(x.shape[0]):
            for row in range(x.shape[1]):
                first[:] = 0
                second[:] = 0
                for column in range(x.shape[2]):
                    for channel in range(channels):
                        value = to_float(x[image, row, column, channel]) - shift[channel]
                        first[channel] += value
                        second[channel] += value * value
                for channel in range(channels):
                    sums[image, 0, channel] += first[channel]
                    sums[image, 1, channel] += second[channel]

    @compiled
    def forward(x, scale, offset, random, minimum, y, winners):
        """Fill y with the largest scale * x + offset of each window; with 0 if that is less, or if `random` < minimum.

        winners: gets the index of the largest in its window, row by row, or NOWHERE.
        """
        best, winner = np.empty(channels, np.float32), np.empty(channels, np.int32)
        for image in range(y.shape[0]):
            for row in range(y.shape[1]):
                for column in range(y.shape[2]):
                    best[:] = 0
                    winner[:] = NOWHERE
                    for down in range(pool_height):
                        for right in range(pool_width):
                            here = np.int32(down * pool_width + right)
                            cell = x[image, row * pool_height + down, column * pool_width + right]
                            for channel in range(channels):
                                value = to_float(cell[channel]) * scale[channel] + offset[channel]
                                is_larger = not value <= best[channel]  # so that NaN is not lost
                                best[channel] = value if is_larger else best[channel]
                                winner[channel] = here if is_larger else winner[channel]
                    for channel in range(channels):
                        is_kept = random[image, row, column, channel] >= minimum
                        kept = best[channel] if is_kept else np.float32(0)
                        y[image, row, column, channel] = from_float(kept, y[image, row, column, channel])
                        winners[image, row, column, channel] = np.uint8(winner[channel] if is_kept else NOWHERE)

    @compiled
    def gradient_sums(gradient, x, winners, shift, sums):
        """Add to sums (images, 2, channels) the sum of the gradient and that of gradient * (x - shift)."""
        first, second = np.empty(channels, np.float32), np.empty(channels, np.float32)
        for image in range(gradient.shape[0]):
            for row in range(gradient.shape[1]):
                first[:] = 0
                second[:] = 0
                for column in range(gradient.shape[2]):
                    for down in range(pool_height):
                        for right in range(pool_width):
                            here = np.int32(down * pool_width + right)
                            cell = x[image, row * pool_height + down, column * pool_width + right]
                            for channel in range(channels):
                                is_here = np.int32(winners[image, row, column, channel]) == here
                                value = to_float(gradient[image, row, column, channel]) if is_here else np.float32(0)
                                first[channel] += value
                                second[channel] += value * (to_float(cell[channel]) - shift[channel])
                for channel in range(channels):
                    sums[image, 0, channel] += first[channel]
                    sums[image, 1, channel] += second[channel]

    @compiled
    def backward(gradient, x, winners, scale, slope, offset, x_gradient):
        """Fill x_gradient with slope * x + offset, and scale * gradient more where the largest of a window was."""
        for image in range(x.shape[0]):
            for row in range(x.shape[1]):
                for column in range(x.shape[2]):
                    cell, filled = x[image, row, column], x_gradient[image, row, column]
                    up, left = row // pool_height, column // pool_width
                    if up < gradient.shape[1] and left < gradient.shape[2]:
                        here = np.int32(row % pool_height * pool_width + column % pool_width)
                        for channel in range(channels):
                            is_here = np.int32(winners[image, up, left, channel]) == here
                            more = to_float(gradient[image, up, left, channel]) * scale[channel]
                            value = to_float(cell[channel]) * slope[channel] + offset[channel]
                            filled[channel] = from_float(value + more if is_here else value, filled[channel])
                    else:  # cells at the edge that fill no window
                        for channel in range(channels):
                            value = to_float(cell[channel]) * slope[channel] + offset[channel]
                            filled[channel] = from_float(value, filled[channel])

    return statistics, forward, gradient_sums, backward


def over_images(kernel, *arguments):
    """Call a kernel on as many threads as torch has, each with a share of the images, the first axis of the arrays."""
    count = min(torch.get_num_threads(), len(arguments[0]))
    shares = [np.array_split(array, count) if np.ndim(array) > 1 else [array] * count for array in arguments]
    list(THREADS.map(kernel, *shares) if count > 1 else map(kernel, *shares))  # a forked process has no threads
