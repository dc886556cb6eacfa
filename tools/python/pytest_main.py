"""Run pytest under `bazel test`, with support for shards, --test_filter and test.xml."""

import contextlib
import os
import pathlib
import sys

import pytest

from tools.python import fork_server, shapes, simulated_devices


class Shard:
  """Plugin that selects every n-th test, n = TEST_TOTAL_SHARDS."""

  def __init__(self) -> None:
    self.index = int(os.environ.get("TEST_SHARD_INDEX", "0"))
    self.total = int(os.environ.get("TEST_TOTAL_SHARDS", "1"))
    if "TEST_SHARD_STATUS_FILE" in os.environ:
      pathlib.Path(os.environ["TEST_SHARD_STATUS_FILE"]).touch()  # supports sharding

  def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
    items[:] = items[self.index :: self.total]


class Unavailable:
  """Plugin that skips all tests if a library of the clients' environment is not installed."""

  def __init__(self, runfiles: pathlib.Path) -> None:
    self.folder = runfiles / "clients"
    file = self.folder / "unavailable.txt"
    self.reason = file.read_text("utf-8").strip() if file.exists() else ""

  def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
    for item in items if self.reason else ():
      item.add_marker(pytest.mark.skip(self.reason))


def main(args: list[str]) -> int:
  env = os.environ
  options = [
    "-p",
    "no:cacheprovider",
    "--import-mode=importlib",
    "--rootdir=.",
    "-c",
    os.devnull,
    "-ra",
  ]
  if "XML_OUTPUT_FILE" in env:
    options.append("--junitxml=" + env["XML_OUTPUT_FILE"])
  if "TEST_TMPDIR" in env:
    options.append("--basetemp=" + os.path.join(env["TEST_TMPDIR"], "pytest"))
  if "TESTBRIDGE_TEST_ONLY" in env:
    options += ["-k", env["TESTBRIDGE_TEST_ONLY"]]
  # A test target cannot unset a variable of --test_env, which takes precedence over its `env`.
  if env.pop("OV_SHARED_COMPILE_CACHE", None) == "no":
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
  if "OV_SIMULATED_DEVICES" in env:
    flags = simulated_devices.xla_flags(int(env.pop("OV_SIMULATED_DEVICES")))
    env["XLA_FLAGS"] = " ".join([env.get("XLA_FLAGS", ""), flags])
  shapes.install()
  shard, unavailable = Shard(), Unavailable(pathlib.Path(env.get("TEST_SRCDIR", "")))
  with contextlib.ExitStack() as stack:
    interpreter = unavailable.folder / "interpreter.txt"
    if interpreter.exists() and not unavailable.reason:
      python = interpreter.read_text("utf-8").strip()
      env["OV_CLIENTS_PYTHON"] = stack.enter_context(fork_server.serving(python))
    code = pytest.main([*options, *args], plugins=[shard, unavailable])
  empty_shard = code == pytest.ExitCode.NO_TESTS_COLLECTED and shard.total > 1
  return 0 if empty_shard else int(code)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
