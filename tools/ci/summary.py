"""Counts test cases in what `bazel test --build_event_json_file=FILE` wrote.

tools/bazel run //tools/ci:summary -- FILE

Prints the failed tests, the slowest, and as its last line "N passed, N failed, N skipped". The exit
status is 1 where a case failed, a target failed without one (time-out, crash), or none ran.
"""

import collections
import json
import pathlib
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree

SLOWEST = 10


def main(events: pathlib.Path) -> int:
  counts: collections.Counter[str] = collections.Counter()
  seconds: collections.Counter[str] = collections.Counter()
  for line in events.read_text().splitlines():
    event = json.loads(line)
    if "testResult" not in event.get("id", {}):
      continue
    label, result = event["id"]["testResult"]["label"], event["testResult"]
    seconds[label] += int(result.get("testAttemptDurationMillis", 0)) / 1000
    cases = case_counts(result)
    if result["status"] != "PASSED":
      cases["failed"] = max(cases["failed"], 1)
      print(f"{result['status']}: {label}")
    counts += cases

  for label, duration in seconds.most_common(SLOWEST):
    print(f"{duration:7.1f} s  {label}")
  print(f"{sum(seconds.values()):7.1f} s  all {len(seconds)} test targets")
  print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
  return int(counts["failed"] > 0 or not counts["passed"])


def case_counts(result: dict) -> collections.Counter[str]:
  """Passed, failed and skipped cases of one run of one shard, from its test.xml."""
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
  sys.exit(main(pathlib.Path(sys.argv[1])))
