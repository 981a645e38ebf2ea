"""The loops behind layers.py, compiled by Numba: norm, max-pooling, ReLU and dropout in one go.

Each of these layers by itself reads and writes the largest tensors of the network, and nearly all its time is waiting
for memory. Here a batch is read twice forward and twice backward. Between reading and writing all is float32.

Arrays are (images, height, width, channels), the order of memory in channels_last; bfloat16 comes as its bits, uint16.
Each number of channels and window has loops of its own, compiled at their first use (some seconds) and kept in
__pycache__.
"""

import concurrent.futures
import functools

import numba
import numpy as np
import torch
from numba.extending import overload

NOWHERE = 255  # in `places`: ReLU or dropout gave zero, and no gradient passes


def compiled(function):
    """Compile a loop, and keep it in a file for the next process where there is a folder to write to."""
    compile_it = functools.partial(numba.njit, nogil=True, fastmath={"contract"}, error_model="numpy")
    try:
        return compile_it(cache=True)(function)
    except RuntimeError:  # "no locator available": neither __pycache__ nor the user's own cache can be written
        return compile_it()(function)


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
def kernels(channels, pool_height, pool_width):
    """Return the four loops (statistics, forward, gradient_sums, backward) for one shape of ConvBlock.

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
    def forward(x, scale, offset, random, least, y, places):
        """Fill y with the largest scale * x + offset of each window; with 0 if that is less, or `random` below `least`.

        places: gets where in its window the largest is, row by row, or NOWHERE.
        """
        best, place = np.empty(channels, np.float32), np.empty(channels, np.int32)
        for image in range(y.shape[0]):
            for row in range(y.shape[1]):
                for column in range(y.shape[2]):
                    best[:] = 0
                    place[:] = NOWHERE
                    for down in range(pool_height):
                        for right in range(pool_width):
                            here = np.int32(down * pool_width + right)
                            cell = x[image, row * pool_height + down, column * pool_width + right]
                            for channel in range(channels):
                                value = to_float(cell[channel]) * scale[channel] + offset[channel]
                                is_larger = not value <= best[channel]  # so that NaN is not lost
                                best[channel] = value if is_larger else best[channel]
                                place[channel] = here if is_larger else place[channel]
                    for channel in range(channels):
                        is_kept = random[image, row, column, channel] >= least
                        kept = best[channel] if is_kept else np.float32(0)
                        y[image, row, column, channel] = from_float(kept, y[image, row, column, channel])
                        places[image, row, column, channel] = np.uint8(place[channel] if is_kept else NOWHERE)

    @compiled
    def gradient_sums(gradient, x, places, shift, sums):
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
                                is_here = np.int32(places[image, row, column, channel]) == here
                                value = to_float(gradient[image, row, column, channel]) if is_here else np.float32(0)
                                first[channel] += value
                                second[channel] += value * (to_float(cell[channel]) - shift[channel])
                for channel in range(channels):
                    sums[image, 0, channel] += first[channel]
                    sums[image, 1, channel] += second[channel]

    @compiled
    def backward(gradient, x, places, scale, slope, offset, x_gradient):
        """Fill x_gradient with slope * x + offset, and scale * gradient more where the largest of a window was."""
        for image in range(x.shape[0]):
            for row in range(x.shape[1]):
                for column in range(x.shape[2]):
                    cell, filled = x[image, row, column], x_gradient[image, row, column]
                    up, left = row // pool_height, column // pool_width
                    if up < gradient.shape[1] and left < gradient.shape[2]:
                        here = np.int32(row % pool_height * pool_width + column % pool_width)
                        for channel in range(channels):
                            is_here = np.int32(places[image, up, left, channel]) == here
                            more = to_float(gradient[image, up, left, channel]) * scale[channel]
                            value = to_float(cell[channel]) * slope[channel] + offset[channel]
                            filled[channel] = from_float(value + more if is_here else value, filled[channel])
                    else:  # cells at the edge that fill no window
                        for channel in range(channels):
                            value = to_float(cell[channel]) * slope[channel] + offset[channel]
                            filled[channel] = from_float(value, filled[channel])

    return statistics, forward, gradient_sums, backward


@functools.cache
def threads(count):
    return concurrent.futures.ThreadPoolExecutor(count)


def over_images(kernel, *arguments):
    """Call a kernel on as many threads as torch has, each with a share of the images, the first axis of the arrays."""
    images = len(arguments[0])
    count = min(torch.get_num_threads(), images)
    edges = [images * number // count for number in range(count + 1)]

    def run(number):
        share = slice(edges[number], edges[number + 1])
        kernel(*(array[share] if isinstance(array, np.ndarray) and array.ndim > 1 else array for array in arguments))

    list(threads(count).map(run, range(count)) if count > 1 else map(run, range(count)))
