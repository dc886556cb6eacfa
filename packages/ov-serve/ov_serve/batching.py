"""Run concurrent requests together, in batches, in one worker thread."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Busy(Exception):
  """Too many requests are waiting; the client should try again later."""


class Batcher(Generic[_Item, _Result]):
  """Collect the items of concurrent requests while the worker is busy.

  A request that arrives at an idle worker starts at once. Those that arrive in the meantime form
  the next batch, so the delay adapts to the load without a timer.

  Args:
    run: function of a list of items that returns one result per item. It runs in a thread.
    max_batch: maximum number of items of a batch.
    max_waiting: maximum number of waiting items, above which calls raise `Busy`.
    observe: called with the size of every batch.
  """

  def __init__(
    self,
    run: Callable[[list[_Item]], Sequence[_Result]],
    *,
    max_batch: int = 32,
    max_waiting: int = 512,
    observe: Callable[[int], Any] = lambda size: None,
  ):
    self._run, self._observe = run, observe
    self._max_batch, self._max_waiting = max_batch, max_waiting
    self._waiting: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
    self._task: asyncio.Task[None] | None = None
    self._pool = futures.ThreadPoolExecutor(1, "ov-batch")

  @property
  def waiting(self) -> int:
    """Number of items that wait for a batch."""
    return len(self._waiting)

  async def __call__(self, item: _Item) -> _Result:
    """Return the result of an item.

    Raises:
      Busy: if too many items are waiting.
      Exception: the exception of `run`, for every item of the batch.
    """
    if len(self._waiting) >= self._max_waiting:
      raise Busy(f"{len(self._waiting)} items are waiting, the most that are accepted")
    result: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
    self._waiting.append((item, result))
    if self._task is None:
      self._task = asyncio.create_task(self._work())
    return await result

  async def close(self) -> None:
    """Cancel waiting items and end the worker after its batch."""
    if self._task is not None:
      self._task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await self._task
    self._pool.shutdown()

  async def _work(self) -> None:
    loop = asyncio.get_running_loop()
    try:
      while batch := self._next():
        self._observe(len(batch))
        try:
          results = await loop.run_in_executor(self._pool, self._run, [item for item, _ in batch])
          if len(results) != len(batch):
            raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except Exception as error:
          for _, waiter in batch:
            if not waiter.done():
              waiter.set_exception(error)
        else:
          for (_, waiter), result in zip(batch, results, strict=True):
            if not waiter.done():
              waiter.set_result(result)
    finally:
      self._task = None
      # Only a cancelled worker leaves items.
      for _, waiter in self._waiting:
        waiter.cancel()
      self._waiting.clear()

  def _next(self) -> list[tuple[_Item, asyncio.Future[_Result]]]:
    """Remove and return the items of the next batch, without those of clients that left."""
    batch: list[tuple[_Item, asyncio.Future[_Result]]] = []
    while self._waiting and len(batch) < self._max_batch:
      item, waiter = self._waiting.popleft()
      if not waiter.done():
        batch.append((item, waiter))
    return batch
