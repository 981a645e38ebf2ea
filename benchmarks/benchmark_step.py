"""A training step of train.py against a plain loop over the same network: their speed and their losses.

`python -m benchmarks.benchmark --stage train` runs it and prints its rows. The plain loop is what most tutorials have: float32,
NCHW, DataLoader, Adam, nn.Dropout, and no setting of the allocator.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import batches
import numpy as np
import torch
from torch import nn

import config
import utils
from audio_settings import AudioSettings
from benchmarks.timing import TURNS, median_times, row
from epoch import make_optimizer, train_step
from model import AudioCNN

STEPS = 12  # training steps a turn
COMPARED_STEPS = 50  # of the losses of ours and the plain loop
AUDIO = AudioSettings()
CPU = torch.device("cpu")


class PlainCNN(AudioCNN):
    """The same network as a plain loop has it: torch's own layers, ReLU before pooling. The same weights fit."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for name in ("block1", "block2", "block3"):
            convolution, norm, pool, relu, dropout = getattr(self, name)
            setattr(self, name, nn.Sequential(convolution, norm, relu, pool, nn.Dropout(dropout.p)))


def plain_loop(network, features, targets, batch_size, steps):
    """Train as most tutorials do: float32, NCHW, DataLoader, Adam. Return the loss of each step."""
    data = torch.utils.data.TensorDataset(features, targets)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.train()
    losses = []
    for inputs, wanted in torch.utils.data.DataLoader(data, batch_size):
        loss = nn.functional.cross_entropy(network(inputs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    return losses


def plain_turn():
    """Return the seconds of the plain loop's steps, after a few that are not counted. Runs in a process of its own."""
    network, _ = new_networks()
    features, targets = random_examples(config.BATCH_SIZE * STEPS)
    plain_loop(network, features, targets, config.BATCH_SIZE, STEPS // 4)
    start = time.perf_counter()
    plain_loop(network, features, targets, config.BATCH_SIZE, STEPS)
    return time.perf_counter() - start


def our_loop(network, features, targets, batch_size, steps, precision=config.PRECISION):
    """The same steps as train.py does them."""
    optimizer = make_optimizer(network, {"weight_decay": 0.0, "learning_rate": 1e-3})
    network.train()
    losses = []
    for batch in batches.batch_slices(len(features), batch_size)[:steps]:
        loss, _ = train_step(network, optimizer, features[batch], targets[batch], 0.0, precision)
        losses.append(loss)
    return torch.stack(losses).tolist()


def new_networks(**options):
    """Return the plain network and ours, with the same weights."""
    torch.manual_seed(0)
    ours = AudioCNN(10, AUDIO, **options)
    plain = PlainCNN(10, AUDIO, **options)
    plain.load_state_dict(ours.state_dict())
    return plain, ours.to(memory_format=torch.channels_last)


def random_examples(n_clips, n_frames=AUDIO.n_frames, n_rows=AUDIO.n_mels):
    """Return (features (clips, 1, rows, frames), targets): noise, with a level that depends on the class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 10, (n_clips,), generator=generator)
    features = torch.randn(n_clips, 1, n_rows, n_frames, generator=generator) + classes[:, None, None, None] / 10
    return features, torch.eye(10)[classes]


def flops_of_step(inputs, wanted):
    """Return the floating-point operations of a training step, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    _, network = new_networks()
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(network(inputs), wanted).backward()
    return counter.get_total_flops()


def benchmark_step():
    """Return rows: a training step on whole clips against the plain loop and against the machine's matrix rate."""
    size = config.BATCH_SIZE
    features, targets = random_examples(size * STEPS)
    _, ours = new_networks()
    dtype = torch.bfloat16 if utils.computes_in_bfloat16(CPU) else torch.float32
    left, right = torch.randn(2, 2048, 2048).to(dtype)
    # Without the allocator's settings that train.py makes, the plain loop's speed is another in each process: a fresh
    # one a turn.
    spawn = multiprocessing.get_context("spawn")
    turns = []
    for _ in range(TURNS):
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            plain = pool.submit(plain_turn).result()
        loop = functools.partial(our_loop, ours, features, targets, size, STEPS)
        turns.append([plain, *median_times(loop, lambda: left @ right, turns=1)])
    theirs, mine, matrix = map(statistics.median, zip(*turns, strict=True))
    rate = 2 * 2048**3 / matrix  # FLOP/s
    floor = flops_of_step(features[:size], targets[:size]) / size / rate
    theirs, mine = theirs / (size * STEPS), mine / (size * STEPS)
    share = f"{str(dtype).removeprefix('torch.')} matrix rate, {rate / 1e9:.0f} GFLOP/s"
    return [
        row("training step, an example of 173 frames", "plain loop", 1e3 * mine, 1e3 * theirs, "ms", "≥ 5 ×"),
        row("the same", share, 1e3 * mine, 1e3 * floor, "ms", "≥ 0.55"),
    ]


def benchmark_losses():
    """Return rows: how far the losses of our loop are from the plain loop's, with dropout off in both."""
    size = config.BATCH_SIZE
    features, targets = random_examples(size * COMPARED_STEPS)
    rows = []
    plain, _ = new_networks(block_dropout=0.0, head_dropout=0.0)
    theirs = np.array(plain_loop(plain, features, targets, size, COMPARED_STEPS))
    for what, loop in (
        ("plain loop on one thread", on_one_thread(plain_loop)),
        ("ours, float32", lambda *given: our_loop(*given, "float32")),
        (f"ours, {config.PRECISION}", our_loop),
    ):
        plain, ours = new_networks(block_dropout=0.0, head_dropout=0.0)
        network = plain if what.startswith("plain") else ours
        losses = np.array(loop(network, features, targets, size, COMPARED_STEPS))
        what = f"distance of {COMPARED_STEPS} losses, {what}"
        rows.append(row(what, "plain loop, mean loss", np.abs(losses - theirs).mean(), theirs.mean(), "", "", False))
    return rows


def on_one_thread(loop):
    """Return the loop with sums in another order: what rounding alone does to it."""

    def run(*given):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return loop(*given)
        finally:
            torch.set_num_threads(threads)

    return run
