"""Count the test cases in the build events of `bazel test --build_event_json_file=FILE`.

tools/bazel run //tools/ci:summary -- FILE [FILE ...]

Prints the failed tests, the slowest tests, and "N passed, N failed, N skipped" over all files as
the last line. The exit code is 1 if a case failed, a target failed without a failed case (timeout,
crash), a case of a target with the tag "clients" was skipped, or no case ran.
"""

import collections
import json
import pathlib
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree

SLOWEST = 10


def main(*files: pathlib.Path) -> int:
  """Print the summary.

  Args:
    files: build event files of one or more runs.

  Returns:
    The exit code.
  """
  counts: collections.Counter[str] = collections.Counter()
  seconds: dict[str, float] = collections.defaultdict(float)
  clients: set[str] = set()
  clients_skipped = False
  for event in [json.loads(line) for path in files for line in path.read_text().splitlines()]:
    identity = event.get("id", {})
    if "targetConfigured" in identity and "clients" in event.get("configured", {}).get("tag", ()):
      clients.add(identity["targetConfigured"]["label"])
    if "testResult" not in identity:
      continue
    label, result = identity["testResult"]["label"], event["testResult"]
    seconds[label] += int(result.get("testAttemptDurationMillis", 0)) / 1000
    cases = case_counts(result)
    if result["status"] != "PASSED":
      cases["failed"] = max(cases["failed"], 1)
      print(f"{result['status']}: {label}")
    if label in clients and cases["skipped"]:
      clients_skipped = True
      print(f"SKIPPED: {cases['skipped']} cases of {label}, which needs the clients' environment")
    counts += cases

  for label, duration in sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
    print(f"{duration:7.1f} s  {label}")
  print(f"{sum(seconds.values()):7.1f} s  all {len(seconds)} test targets")
  print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
  return int(counts["failed"] > 0 or clients_skipped or not counts["passed"])


def case_counts(result: dict) -> collections.Counter[str]:
  """Count passed, failed and skipped cases in the test.xml of one shard."""
  counts: collections.Counter[str] = collections.Counter()
  for output in result.get("testActionOutput", []):
    path = pathlib.Path(urllib.parse.unquote(urllib.parse.urlparse(output.get("uri", "")).path))
    if output["name"] == "test.xml" and path.exists():
      for case in ElementTree.parse(path).iter("testcase"):
        outcomes = {child.tag for child in case}
        bad = outcomes & {"failure", "error"}
        counts["failed" if bad else "skipped" if "skipped" in outcomes else "passed"] += 1
  return counts


if __name__ == "__main__":
  sys.exit(main(*map(pathlib.Path, sys.argv[1:])))
