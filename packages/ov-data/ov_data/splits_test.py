import pytest

from ov_data.splits import Split


@pytest.mark.parametrize(
  "text, name, kept",
  [
    (None, None, range(10)),
    ("", None, range(10)),
    ("train", "train", range(10)),
    ("train+restval", "train+restval", range(10)),
    ("train[:]", "train", range(10)),
    ("train[:25%]", "train", range(2)),  # 2.5 rounds to even
    ("train[25%:]", "train", range(2, 10)),
    ("[3:7]", None, range(3, 7)),
    ("val[-3:]", "val", range(7, 10)),
    ("val[:-3]", "val", range(7)),
    ("val[-20%:]", "val", range(8, 10)),
    ("val[-100:]", "val", range(10)),
    ("val[:-100]", "val", range(0)),
    ("val[-15:]", "val", range(10)),
    ("val[:-15]", "val", range(0)),
    ("val[5:100]", "val", range(5, 10)),
    ("val[7:3]", "val", range(0)),
    ("val[10:]", "val", range(0)),
    ("[2:][:50%]", None, range(2, 6)),
    ("[50%:][-2:][1:]", None, range(9, 10)),
  ],
)
def test_forms(text, name, kept):
  split = Split.parse(text)
  assert split.name == name
  assert list(split.range(10)) == list(kept)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 10, 99, 1001])
def test_percentages_cover_every_record_once(total):
  parts = [Split.parse(f"train[{a}%:{a + 10}%]").range(total) for a in range(0, 100, 10)]
  assert [i for part in parts for i in part] == list(range(total))


@pytest.mark.parametrize(
  "text", ["train[1]", "train[1:2", "train]", "train[a:b]", "train[::2]", "[1:2]train", "[1.5:]"]
)
def test_other_forms_are_rejected(text):
  with pytest.raises(ValueError, match=r"split='.*': expected a name, or a slice such as"):
    Split.parse(text)
