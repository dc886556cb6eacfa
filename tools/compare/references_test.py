import dataclasses

import pytest

from ov_eval import Result
from tools.compare import references
from tools.compare.evaluations import Evaluation

REFERENCE = references.find("datacomp_small_clip")  # 5.1%, 12.8 million samples


def evaluation(value=0.05, count=50_000, samples=12_800_000, **context):
  context = {"classes": "imagenet", "templates": "openai_80"} | context
  result = Result("zero_shot_top1", value, count, value - 0.002, value + 0.002, "share", context)
  return Evaluation("run", 3125, samples, 0.95, (result,))


@pytest.mark.parametrize(
  ("value", "verdict"),
  [(0.0459, "below"), (0.046, "inside"), (0.051, "inside"), (0.056, "inside"), (0.0561, "above")],
)
def test_band_includes_its_ends(value, verdict):
  reproduced, text = references.judge(evaluation(value), REFERENCE)
  assert reproduced == (verdict == "inside")
  assert text.endswith(f": {verdict} 4.6% – 5.6%, published 5.1%")
  assert text.startswith(f"{value:.1%} ")


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"count": 1000}, "1,000 images instead of 50,000"),
    ({"templates": "photo"}, "templates photo instead of openai_80"),
    ({"templates": "photo", "count": 7}, "7 images instead of 50,000; templates photo"),
    ({"samples": 12_600_000}, "12,600,000 samples seen instead of 12,672,000 to 12,800,000"),
    ({"samples": 12_804_096}, "12,804,096 samples seen"),
    ({"classes": "folders"}, "no zero_shot_top1 of the classes imagenet"),
  ],
)
def test_other_protocols_are_not_comparable(changes, reason):
  reproduced, text = references.judge(evaluation(**changes), REFERENCE)
  assert not reproduced and "not comparable with 4.6% – 5.6%" in text and reason in text


def test_nan_is_outside_of_the_band():
  assert not references.judge(evaluation(float("nan")), REFERENCE)[0]


def test_lists_of_urls_may_lack_pairs():
  run = dataclasses.replace(evaluation(0.15, templates="openai_best"), examples_seen=93_000_000)
  assert references.judge(run, references.find("cc3m_b16")) == (
    True, "15.0% 14.8 – 15.2%: inside 14.1% – 18.0%, published 17.1%"
  )  # fmt: skip


def test_unknown_name():
  with pytest.raises(ValueError, match="did you mean datacomp_small_none.*yfcc15m_s16"):
    references.find("datacomp_small_non")


def test_names_are_distinct():
  names = [reference.name for reference in references.REFERENCES]
  assert len(set(names)) == len(names)
