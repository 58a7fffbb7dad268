import multiprocessing
import os
import threading
import time

import pytest

from fastwkv.kernels.cpu.threads import parallel

HANG = 600  # seconds, for what takes hundredths of one: only what never happens takes so long, on any machine


def squares(count, threads=4):
    result = [None] * count

    def work(i):
        result[i] = i * i

    parallel(work, count, threads)
    return result


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_piece_is_done_once(count, threads):
    done = []
    parallel(done.append, count, threads)
    assert sorted(done) == list(range(count))


def test_pieces_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=HANG)
    parallel(lambda _: meeting.wait(), 3, 3)


def test_callers_may_be_many():
    wrong = []

    def caller():
        wrong.extend(1 for _ in range(200) if squares(9) != [i * i for i in range(9)])

    callers = [threading.Thread(target=caller) for _ in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong


def test_calls_may_be_nested():
    parallel(lambda _: squares(5), 5, 3)


@pytest.mark.parametrize("threads", [1, 3])
def test_exception_reaches_the_caller(threads):
    def work(i):
        if i == 3:
            raise KeyError(i)

    with pytest.raises(KeyError):
        parallel(work, 8, threads)
    assert squares(8) == [i * i for i in range(8)]


def test_nothing_runs_on_after_an_exception():
    running = []

    def work(i):
        if i == 0:
            raise KeyError(i)
        running.append(i)
        time.sleep(0.05)
        running.remove(i)

    with pytest.raises(KeyError):
        parallel(work, 4, 4)
    assert not running


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_has_a_pool_of_its_own():
    squares(8)  # the parent's threads exist
    child = multiprocessing.get_context("fork").Process(target=squares, args=(8,))
    child.start()
    child.join(HANG)
    child.kill()  # which changes nothing of one that has ended
    child.join()
    assert child.exitcode == 0
