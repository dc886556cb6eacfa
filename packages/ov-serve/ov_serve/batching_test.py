"""Batches of concurrent requests."""

import asyncio
import threading

import pytest

from ov_serve.batching import Batcher, Busy


class Worker:
  """Doubles numbers; waits for `go` before every batch."""

  def __init__(self, open_gate: bool = True):
    self.batches: list[list[int]] = []
    self.go = threading.Event()
    if open_gate:
      self.go.set()

  def __call__(self, items: list[int]) -> list[int]:
    assert self.go.wait(20)
    self.batches.append(items)
    if any(item < 0 for item in items):
      raise ValueError("negative")
    return [2 * item for item in items]


def test_waiting_requests_form_one_batch_and_keep_their_results():
  async def main():
    worker = Worker(open_gate=False)
    batcher = Batcher(worker, max_batch=4)
    first = asyncio.create_task(batcher(0))
    await asyncio.sleep(0.05)  # the worker is busy with the first request
    others = [asyncio.create_task(batcher(item)) for item in range(1, 8)]
    await asyncio.sleep(0.05)
    worker.go.set()
    assert await asyncio.gather(first, *others) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert worker.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
    await batcher.close()

  asyncio.run(main())


def test_a_failure_reaches_every_request_of_the_batch_and_only_these():
  async def main():
    worker = Worker(open_gate=False)
    batcher = Batcher(worker, max_batch=2)
    tasks = [asyncio.create_task(batcher(item)) for item in (-1, 1, 2)]
    await asyncio.sleep(0.05)
    worker.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, ValueError, int]
    assert await batcher(5) == 10  # the worker still runs
    await batcher.close()

  asyncio.run(main())


def test_too_many_waiting_requests_are_refused():
  async def main():
    worker = Worker(open_gate=False)
    batcher = Batcher(worker, max_batch=1, max_waiting=2)
    running = asyncio.create_task(batcher(0))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(batcher(item)) for item in (1, 2)]
    await asyncio.sleep(0)
    assert batcher.waiting == 2
    with pytest.raises(Busy, match="2 items are waiting; .* maximum of 2"):
      await batcher(3)
    worker.go.set()
    assert await asyncio.gather(running, *waiting) == [0, 2, 4]
    await batcher.close()

  asyncio.run(main())


def test_items_of_clients_that_left_are_not_computed():
  async def main():
    worker = Worker(open_gate=False)
    batcher = Batcher(worker, max_batch=8)
    running = asyncio.create_task(batcher(0))
    await asyncio.sleep(0.05)
    left, stays = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    worker.go.set()
    assert await asyncio.gather(running, stays) == [0, 4]
    assert worker.batches == [[0], [2]]
    await batcher.close()

  asyncio.run(main())


def test_a_wrong_number_of_results_is_an_error():
  async def main():
    batcher = Batcher(lambda items: [], max_batch=8)
    with pytest.raises(RuntimeError, match="0 results for a batch of 1"):
      await batcher(1)
    await batcher.close()

  asyncio.run(main())


def test_close_answers_every_request():
  async def main():
    worker = Worker(open_gate=False)
    batcher = Batcher(worker, max_batch=1)
    running, waiting = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0.05)
    worker.go.set()
    async with asyncio.timeout(20):
      results = await asyncio.gather(running, waiting, return_exceptions=True)
      await closing
    assert results[0] == 2
    assert isinstance(results[1], Busy) and "stopping" in str(results[1])
    with pytest.raises(Busy, match="stopping"):
      await batcher(3)

  asyncio.run(main())


def test_close_answers_requests_whose_batch_has_not_started():
  async def main():
    batcher = Batcher(Worker(), max_batch=1)
    request = asyncio.create_task(batcher(1))
    await asyncio.sleep(0)  # the item is waiting; the task that runs batches has not begun
    async with asyncio.timeout(20):
      await batcher.close()
      [result] = await asyncio.gather(request, return_exceptions=True)
    assert result == 2 or isinstance(result, Busy)

  asyncio.run(main())


def test_several_items_are_accepted_together_or_not_at_all():
  async def main():
    worker = Worker(open_gate=False)
    batcher = Batcher(worker, max_batch=4, max_waiting=3)
    running = asyncio.create_task(batcher(0))
    await asyncio.sleep(0.05)
    with pytest.raises(Busy, match="the 4 items"):
      await batcher.run_all([1, 2, 3, 4])
    assert batcher.waiting == 0
    accepted = asyncio.create_task(batcher.run_all([5, 6]))
    await asyncio.sleep(0)
    worker.go.set()
    assert (await running, await accepted) == (0, [10, 12])
    assert worker.batches == [[0], [5, 6]]
    await batcher.close()

  asyncio.run(main())


def test_a_failed_item_withdraws_the_others_of_its_request():
  async def main():
    worker = Worker()
    batcher = Batcher(worker, max_batch=1)
    with pytest.raises(ValueError, match="negative"):
      await batcher.run_all([-1, 2, 3])
    await batcher.close()
    assert worker.batches[0] == [-1] and len(worker.batches) < 3

  asyncio.run(main())
