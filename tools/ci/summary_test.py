import json

import pytest

from tools.ci import summary

CASES = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><skipped/></testcase><testcase name="c"><failure/></testcase>
</testsuite></testsuites>"""


def write_events(folder, *results, tags=()):
  """Write an event for each (label, status, test.xml), and the tags of each target."""
  folder.mkdir(exist_ok=True)
  lines = [json.dumps({"id": {"progress": {}}})]
  for label, *_ in results:
    configured = {"tag": list(tags)} if tags else {}
    lines.append(
      json.dumps({"id": {"targetConfigured": {"label": label}}, "configured": configured})
    )
  for number, (label, status, xml) in enumerate(results):
    (folder / f"{number}.xml").write_text(xml)
    outputs = [{"name": "test.xml", "uri": (folder / f"{number}.xml").as_uri()}]
    result = {
      "status": status,
      "testAttemptDurationMillis": "1500",
      "testActionOutput": outputs,
    }
    lines.append(json.dumps({"id": {"testResult": {"label": label}}, "testResult": result}))
  (folder / "events.json").write_text("\n".join(lines))
  return folder / "events.json"


def test_counts_cases_over_shards(tmp_path, capsys):
  good = '<testsuite><testcase name="a"/></testsuite>'
  events = write_events(
    tmp_path, ("//a", "FAILED", CASES), ("//b", "PASSED", good), ("//b", "PASSED", good)
  )
  assert summary.main(events) == 1
  out = capsys.readouterr().out
  assert "FAILED: //a" in out
  assert "    3.0 s  //b" in out
  assert out.endswith("3 passed, 1 failed, 1 skipped\n")


def test_time_out_counts_as_a_failure(tmp_path, capsys):
  assert summary.main(write_events(tmp_path, ("//a", "TIMEOUT", "<testsuite/>"))) == 1
  assert capsys.readouterr().out.endswith("0 passed, 1 failed, 0 skipped\n")


def test_nothing_ran(tmp_path, capsys):
  assert summary.main(write_events(tmp_path)) == 1
  assert capsys.readouterr().out.endswith("0 passed, 0 failed, 0 skipped\n")


GOOD = '<testsuite><testcase name="a"/></testsuite>'
SKIPPED = '<testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase></testsuite>'


def test_several_runs_are_counted_together(tmp_path, capsys):
  files = [
    write_events(tmp_path / name, (f"//{name}", "PASSED", GOOD)) for name in ("presubmit", "merge")
  ]
  assert summary.main(*files) == 0
  out = capsys.readouterr().out
  assert "    3.0 s  all 2 test targets" in out
  assert out.endswith("2 passed, 0 failed, 0 skipped\n")


def test_nothing_in_one_of_two_runs(tmp_path):
  part = write_events(tmp_path / "presubmit", ("//a", "PASSED", GOOD))
  assert summary.main(part, write_events(tmp_path / "merge")) == 0


@pytest.mark.parametrize(("tags", "expected"), [(("clients",), 1), (("merge",), 0), ((), 0)])
def test_a_skipped_clients_test_is_a_failure(tags, expected, tmp_path, capsys):
  assert summary.main(write_events(tmp_path, ("//a", "PASSED", SKIPPED), tags=tags)) == expected
  assert ("SKIPPED: 1 cases of //a" in capsys.readouterr().out) == bool(expected)
