"""The processes of one training: one alone, or as many as torchrun has started, on one node or on many.

    torchrun --nproc-per-node=4 train.py

A free process takes the next fold, until none is left: nobody has a fixed share. A fold is trained by one process as it
is in a training of one, so the result is the same. torch.distributed carries the few words that they exchange, with
gloo also between GPUs: no tensor leaves a process, and those that are done may wait for hours, for which NCCL's
watchdog would end them. The folds' batches are not shared out (DistributedDataParallel): BatchNorm would see parts of
them, and the result would be another.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from datetime import timedelta

import torch
from torch import distributed

import utils
from utils import UserError

START_TIMEOUT = timedelta(minutes=10)  # for the slowest node to have imported torch and read its data
ANSWER_TIMEOUT = timedelta(seconds=2)  # for an address to be known as one that nobody answers at
LONGEST_RUN = timedelta(days=30)  # that a process without a fold waits for the others
WAITING_PAUSE = 0.2  # s between two looks at whether the others have ended
SHARED_SECONDS = 5  # for a file to be seen on another node: network disks look again after seconds


class Team:
    """What one process knows of the others, as a context. By itself it is alone, and all of this does nothing."""

    def __init__(self, rank=0, size=1, local_rank=0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.is_first = rank == 0  # it writes what is written once: state, report, uploads

    def __enter__(self):
        if self.size > 1:
            with self._reaching():
                self.store = self._meet()
                options = {"store": self.store, "rank": self.rank, "world_size": self.size, "timeout": START_TIMEOUT}
                distributed.init_process_group("gloo", **options)
                self.patient = distributed.new_group(timeout=LONGEST_RUN)
        return self

    def _meet(self):
        """Return a store that this start of the processes alone has.

        torchrun's own outlives a restart (torch 2.14), with the addresses and claims of the processes before. So the
        first process opens a new one, and torchrun's says where: an old address is one that nobody answers at.
        """
        self.meeting_point, *_ = next(distributed.rendezvous("env://", timeout=START_TIMEOUT))
        host = os.environ["MASTER_ADDR"]
        if self.is_first:
            store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=START_TIMEOUT)
            self.meeting_point.set("port", str(store.port))
            return store
        deadline = time.monotonic() + START_TIMEOUT.total_seconds()
        while True:
            port = int(self.meeting_point.get("port"))
            try:
                store = distributed.TCPStore(host, port, wait_for_workers=False, timeout=ANSWER_TIMEOUT)
                store.set_timeout(START_TIMEOUT)
                return store
            except RuntimeError:  # DistNetworkError
                if time.monotonic() > deadline:
                    raise

    def __exit__(self, *_):
        if self.size > 1 and distributed.is_initialized():
            with contextlib.suppress(RuntimeError):  # others may be gone
                distributed.destroy_process_group()

    def __str__(self):
        return f"process {self.rank} on {socket.gethostname()}"

    @contextlib.contextmanager
    def _reaching(self):
        """Turn what torch raises when another process is gone into a UserError."""
        try:
            yield
        except RuntimeError as error:  # DistError and what gloo raises
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"{self} can't reach the others ({reason}): another process or node has ended. The same command goes "
                "on after the last completed epoch, and torchrun --max-restarts=10 does that by itself"
            ) from error

    def gather(self, value):
        """Return every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._reaching():
            distributed.all_gather_object(values, value)
        return values

    def once(self, function):
        """Return what function() returns in the first process, in all. What it raises there ends all, told once."""
        value, fault = None, None
        if self.is_first:
            try:
                value = function()
            except (UserError, OSError) as error:
                fault = error
        value, has_failed = self.gather((value, fault is not None))[0]
        if has_failed:
            raise fault if self.is_first else SystemExit(2)
        return value

    def check_shared(self, folder):
        """Raise a UserError in each process that can't see what the first one writes into the folder."""
        if self.size == 1:
            return
        path = folder / ".shared"
        written = self.once(lambda: (socket.gethostname(), write_token(path)))
        seen, deadline = None, time.monotonic() + SHARED_SECONDS
        while seen != written[1] and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                seen = path.read_text()
            time.sleep(0 if seen == written[1] else 0.5)
        all_see = all(self.gather(seen == written[1]))
        if self.is_first:
            path.unlink()
        if seen != written[1]:
            raise UserError(
                f"{self} does not see what process 0 on {written[0]} writes in {folder}: all nodes need the same "
                "folder, on a disk that they share; --assets_dir names it"
            )
        if not all_see:
            raise SystemExit(2)

    def check_same(self, settings):
        """Raise a UserError if this process's settings are not the first one's: another config.py, or other data."""
        first = self.gather(settings)[0]
        others = [
            f"{name} is {value!r} and not {first[name]!r}" for name, value in settings.items() if first[name] != value
        ]
        all_agree = not any(self.gather(others))
        if others:
            raise UserError(f"{self} has other settings than process 0: {'; '.join(others)}")
        if not all_agree:
            raise SystemExit(2)

    def device(self, name):
        """Return this process's torch.device: with "auto" and "cuda", the processes of a node share its GPUs out."""
        device = utils.pick_device(name)
        if self.size > 1 and device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return device

    def claim(self, numbers):
        """Yield those of the numbers (the same in each process) that fall to this one: the next whenever it is free."""
        if self.size == 1:
            yield from numbers
            return
        while True:
            with self._reaching():
                place = self.store.add("claimed", 1) - 1
            if place >= len(numbers):
                return
            yield numbers[place]

    def tell(self, name, value):
        """Let the others know a value (anything that JSON can hold) under a name."""
        if self.size > 1:
            with self._reaching():
                self.store.set(name, json.dumps(value))

    def told(self, names):
        """Return {name: value} of the names that some process has told."""
        if self.size == 1:
            return {}
        with self._reaching():
            return {name: json.loads(self.store.get(name)) for name in names if self.store.check([name])}

    def wait(self):
        """Yield now and then until every process has come here. Ctrl-C is heard meanwhile."""
        if self.size > 1:
            with self._reaching():
                work = distributed.barrier(group=self.patient, async_op=True)
                while not work.is_completed():
                    yield
                    time.sleep(WAITING_PAUSE)
                work.wait()


ALONE = Team()


def join():
    """Return the Team that torchrun has put this process into; ALONE without torchrun."""
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(number.isdigit() for number in numbers):
        return ALONE
    return Team(*map(int, numbers))


def write_token(path):
    token = secrets.token_hex(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(token)
    return token
