"""Run concurrent requests together, in batches, in one worker thread."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Busy(Exception):
  """Too many requests are waiting, or the server is stopping; the client should try again later."""


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
    self._closed = False

  @property
  def waiting(self) -> int:
    """Number of items that wait for a batch."""
    return len(self._waiting)

  async def __call__(self, item: _Item) -> _Result:
    """Return the result of an item; see `run_all`."""
    [result] = await self.run_all([item])
    return result

  async def run_all(self, items: Sequence[_Item]) -> list[_Result]:
    """Return the results of the items of one request, which may run in several batches.

    Raises:
      Busy: if there is no room for all items, in which case none is computed, or the batcher is
        closed before their batches start.
      Exception: the exception of `run`. The other items of the request are withdrawn.
    """
    if self._closed:
      raise _stopping()
    if len(self._waiting) + len(items) > self._max_waiting:
      raise Busy(
        f"{len(self._waiting)} items are waiting; with the {len(items)} items of this request they "
        f"exceed the maximum of {self._max_waiting}"
      )
    loop = asyncio.get_running_loop()
    results: list[asyncio.Future[_Result]] = [loop.create_future() for _ in items]
    self._waiting.extend(zip(items, results, strict=True))
    if self._task is None:
      self._task = asyncio.create_task(self._work())
    try:
      return await asyncio.gather(*results)
    except BaseException:
      for result in results:
        result.cancel()  # `_next` skips it
      raise

  async def close(self) -> None:
    """Complete the running batch, and answer all waiting items with `Busy`."""
    self._closed = True
    _refuse(self._waiting)
    self._waiting.clear()
    if self._task is not None:
      await self._task
    self._pool.shutdown(wait=False)  # idle by now

  async def _work(self) -> None:
    loop = asyncio.get_running_loop()
    batch: list[tuple[_Item, asyncio.Future[_Result]]] = []
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
      # Items are left only if the event loop cancels this task.
      _refuse([*batch, *self._waiting])
      self._waiting.clear()

  def _next(self) -> list[tuple[_Item, asyncio.Future[_Result]]]:
    """Remove and return the items of the next batch, without those of clients that left."""
    batch: list[tuple[_Item, asyncio.Future[_Result]]] = []
    while self._waiting and len(batch) < self._max_batch:
      item, waiter = self._waiting.popleft()
      if not waiter.done():
        batch.append((item, waiter))
    return batch


def _refuse(items: Iterable[tuple[Any, asyncio.Future[Any]]]) -> None:
  for _, waiter in items:
    if not waiter.done():
      waiter.set_exception(_stopping())


def _stopping() -> Busy:
  return Busy("the server is stopping")
