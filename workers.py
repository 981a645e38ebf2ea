"""Worker processes for stage 2: a function over many tasks on all cores, with the results in order.

Each worker has a pipe of its own. A worker that is killed closes it, at whatever moment, and the run ends with an
error; the one pipe of concurrent.futures.ProcessPoolExecutor would keep the run waiting for the rest of a result.
"""

import collections
import contextlib
import multiprocessing
import signal
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import utils
from utils import UserError

TASKS_AT_ONCE = 2  # of a worker: one in work, one at hand
TASKS_AHEAD = 4  # per worker, of the result that is next: few enough that memory does not grow with the data


def map_in_order(function, tasks, workers):
    """Yield function(task) for each task, in order, from `workers` processes of their own.

    function and its results are pickled; tasks: a list. UserError if a worker is killed. Closing the generator ends
    the workers.
    """
    team = {}  # connection: (process, numbers of the tasks that it has)
    sent, results = 0, {}
    try:
        for _ in range(min(workers, len(tasks))):
            connection, process = start_worker(function)
            team[connection] = process, collections.deque()
        for number in range(len(tasks)):
            while True:
                for connection, (process, has) in team.items():
                    while len(has) < TASKS_AT_ONCE and sent < min(len(tasks), number + TASKS_AHEAD * workers):
                        with death_told(process, workers):
                            connection.send(tasks[sent])
                        has.append(sent)
                        sent += 1
                if number in results:
                    break
                for connection in wait([connection for connection, (_, has) in team.items() if has]):
                    process, has = team[connection]
                    with death_told(process, workers):
                        results[has.popleft()] = connection.recv()
            yield results.pop(number)
    finally:
        for connection, (process, _) in team.items():
            connection.close()
            process.terminate()
        for process, _ in team.values():
            process.join()


def start_worker(function):
    """Return (our end of its pipe, the process) of a new worker."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, function), daemon=True)
    with interrupts_held():
        process.start()
    theirs.close()  # so that the pipe ends with the worker
    return ours, process


def work(connection, function):
    """Answer tasks until the process that sends them is gone, even if it was killed and can't say so."""
    utils.keep_freed_memory()  # fresh pages for each clip took a third of its time
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(function(connection.recv()))


@contextlib.contextmanager
def interrupts_held():
    """Keep a Ctrl-C until the block ends. It goes to every process of a terminal: those born here never see one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and lets interrupts through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is born here inherits it
    kept = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: kept.append(arguments))  # a thread of BLAS has no mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if kept and callable(handler):
            handler(*kept[0])


@contextlib.contextmanager
def death_told(process, workers):
    """Turn the end of a worker's pipe into a UserError."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        process.join()
        if process.exitcode > 0:
            raise UserError("a worker process has failed; its error stands above") from error
        raise UserError(f"a worker process was killed (out of memory?): try fewer than --workers {workers}") from error
