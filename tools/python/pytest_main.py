"""Runs pytest on the given files the way `bazel test` wants it: shards, --test_filter, test.xml."""

import os
import pathlib
import sys

import pytest


class Shard:
  """Keeps every n-th test, n = TEST_TOTAL_SHARDS."""

  def __init__(self):
    self.index = int(os.environ.get("TEST_SHARD_INDEX", "0"))
    self.total = int(os.environ.get("TEST_TOTAL_SHARDS", "1"))
    if "TEST_SHARD_STATUS_FILE" in os.environ:
      pathlib.Path(os.environ["TEST_SHARD_STATUS_FILE"]).touch()  # says: this runner can shard

  def pytest_collection_modifyitems(self, items):
    items[:] = items[self.index :: self.total]


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
  shard = Shard()
  code = pytest.main([*options, *args], plugins=[shard])
  empty_shard = code == pytest.ExitCode.NO_TESTS_COLLECTED and shard.total > 1
  return 0 if empty_shard else int(code)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
