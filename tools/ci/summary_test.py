import json

from tools.ci import summary

CASES = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><skipped/></testcase><testcase name="c"><failure/></testcase>
</testsuite></testsuites>"""


def write_events(folder, *results):
  """One event for each (label, status, test.xml)."""
  lines = [json.dumps({"id": {"progress": {}}})]
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
