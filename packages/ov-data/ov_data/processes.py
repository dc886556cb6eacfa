"""Worker processes that do not import the main module of the caller.

`multiprocessing` either forks, which is unsafe once JAX or another library runs threads, or imports
the caller's main module in every worker, which takes seconds for a training app. These workers are
`python -c` processes with the same sys.path that import only what the function needs. They run in
separate process groups, so Ctrl-C does not reach them, and exit when the caller exits.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any, TypeVar

Report = Callable[[int], None]  # progress callback
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_in_processes(
  function: Callable[[_Item, Report], _Result],
  items: Sequence[_Item],
  workers: int,
  report: Report = lambda n: None,
  inherited: Sequence[int] = (),
) -> Iterator[tuple[_Item, _Result]]:
  """Call `function(item, report)` for every item; yield (item, result) as they finish.

  Args:
    function: callable that is picklable by reference: a module-level function, or an instance of a
      module-level class.
    items: picklable arguments.
    workers: number of processes; 0 runs sequentially in this process.
    report: callback that receives the reports of the workers in a thread of this process.
    inherited: file descriptors that remain open in the workers.

  Raises:
    ChildProcessError: if a worker died. Exceptions of the function are raised with their traceback.
  """
  if workers <= 0 or not items:
    for item in items:
      yield item, function(item, report)
    return
  workers = min(workers, len(items))
  idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
  with contextlib.ExitStack() as stack:
    for _ in range(workers):
      idle.put(stack.enter_context(_Worker(function, report, inherited)))

    def call(item: _Item) -> _Result:
      worker = idle.get()
      try:
        return worker.call(item)
      finally:
        idle.put(worker)

    pool = futures.ThreadPoolExecutor(workers, "ov-process")
    try:
      tasks = {pool.submit(call, item): item for item in items}
      for task in futures.as_completed(tasks):
        yield tasks[task], task.result()
    except BaseException:
      stack.close()  # stops the workers and the calls that wait for them
      raise
    finally:
      pool.shutdown(cancel_futures=True)


class _Worker:
  """A worker process, used by one thread at a time."""

  def __init__(self, function: Callable[..., Any], report: Report, inherited: Sequence[int]):
    self._report = report
    self._process = subprocess.Popen(
      [sys.executable, "-c", "from ov_data import processes; processes.serve()"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      pass_fds=inherited,
      process_group=0,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    self._send(function)

  def __enter__(self) -> "_Worker":
    return self

  def __exit__(self, *_: object) -> None:
    self._process.kill()
    self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):  # unread input of a dead process
        if pipe:
          pipe.close()

  def call(self, item: Any) -> Any:
    with self._alive(item):
      self._send(item)
    while True:
      with self._alive(item):
        kind, value = pickle.load(self._process.stdout)  # type: ignore[arg-type]
      if kind == "error":
        raise value
      if kind == "result":
        return value
      self._report(value)

  @contextlib.contextmanager
  def _alive(self, item: Any) -> Iterator[None]:
    """Raise ChildProcessError for a broken pipe, which means that the process has exited."""
    try:
      yield
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
      code = self._process.wait()
      hint = " (killed; not enough memory for this number of workers?)" if code == -9 else ""
      raise ChildProcessError(
        f"a worker process ended with code {code}{hint} at {item!r}; repeat the command"
        f"{', with fewer workers' if hint else ''}"
      ) from None

  def _send(self, value: Any) -> None:
    assert self._process.stdin
    pickle.dump(value, self._process.stdin)
    self._process.stdin.flush()


def serve() -> None:
  """Run the worker loop: read the function, then items, from stdin until the caller exits."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # send printed output to stderr, not into the results
  threading.current_thread().name = "ov-worker"

  def send(kind: str, value: Any) -> None:
    outbox.write(pickle.dumps((kind, value)))
    outbox.flush()

  with contextlib.suppress(EOFError, BrokenPipeError):
    function = pickle.load(inbox)
    while True:
      item = pickle.load(inbox)
      try:
        answer = ("result", function(item, lambda n: send("report", n)))
      except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        answer = ("error", _picklable(error))
      send(*answer)


def _picklable(error: Exception) -> Exception:
  try:
    pickle.loads(pickle.dumps(error))
    return error
  except Exception:  # exceptions with custom arguments often cannot be unpickled
    return RuntimeError(f"{type(error).__name__}: {error}")
