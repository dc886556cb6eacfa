"""The measurement runs, whole and in part, and counts what it says."""

import re

from ov_eval import retrieval_report
from ov_eval.retrieval import retrieval


def test_embeddings_are_neither_easy_nor_chance():
  found = retrieval(*retrieval_report.embeddings(400, 1000, 64))
  assert 0.1 < found.txt2img.recall(1).value < 0.99


def test_report_of_all_and_of_a_share(capsys):
  retrieval_report.main(["--images=2100", "--texts=9000", "--width=8"])
  retrieval_report.main(["--images=2100", "--texts=9000", "--width=8", "--share=0.4"])
  whole, part = capsys.readouterr().out.splitlines()
  form = (
    r"cpu, 1 process, float32: 2,100 x 9,000 of width 8, {}% of the scores: [\d.]+ s, "
    r"[\d.]+ CPU-seconds, [\d,]+ MiB beside embeddings of 0 MiB; "
    r"all scores at once would be 72 MiB"
  )
  assert re.fullmatch(form.format(100), whole)
  assert re.fullmatch(form.format(44), part)  # the first block is 1024 images by 8192 texts
