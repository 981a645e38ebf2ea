"""workers.py: results in order, from processes of their own. What signals do to them is in test_preprocess_data.py."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

import workers
from utils import UserError


def slow_at_first(number):
    time.sleep(0.3 if number == 0 else 0)
    return number * number, os.getpid()


def test_results_come_in_the_order_of_the_tasks():
    results = list(workers.map_in_order(slow_at_first, list(range(40)), 2))
    assert [value for value, _ in results] == [number * number for number in range(40)]
    assert len({process for _, process in results}) == 2
    assert os.getpid() not in {process for _, process in results}
    assert multiprocessing.active_children() == []


def test_no_task_and_fewer_tasks_than_workers():
    assert list(workers.map_in_order(slow_at_first, [], 2)) == []
    assert [value for value, _ in workers.map_in_order(slow_at_first, [3], 2)] == [9]


class Noted(list):
    """Tasks that know how many of them were asked for."""

    asked = 0

    def __getitem__(self, number):
        self.asked = max(self.asked, number + 1)
        return super().__getitem__(number)


def test_workers_do_not_run_away_from_the_reader():
    tasks = Noted(range(200))
    results = workers.map_in_order(abs, tasks, 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert 10 <= tasks.asked <= 10 + 2 * workers.TASKS_AHEAD
    results.close()
    assert multiprocessing.active_children() == []


def fail_at_three(number):
    return 1 / (number - 3)


def test_an_error_in_a_worker_ends_the_run(capfd):
    with pytest.raises(UserError, match="failed"):
        list(workers.map_in_order(fail_at_three, list(range(10)), 2))
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert multiprocessing.active_children() == []


def leave(number):
    os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(UserError, match="was killed"):
        list(workers.map_in_order(leave, list(range(10)), 2))
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no signal masks")
def test_ctrl_c_is_held_though_another_thread_hears_it():
    """A thread of BLAS has no mask: an interrupt in a start left a worker that said 'EOFError: Ran out of input'."""
    ending, held = threading.Event(), False
    threading.Thread(target=ending.wait).start()
    try:
        with pytest.raises(KeyboardInterrupt), workers.interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            held = True
    finally:
        ending.set()
    assert held
    with pytest.raises(KeyboardInterrupt):  # and is heard again
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
