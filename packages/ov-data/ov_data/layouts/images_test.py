"""The layout of images without captions and classes."""

import pytest

from ov_data import layouts
from ov_data.layouts.images import UndefinedLayout
from ov_data.sources import Dataset, Source


@pytest.fixture
def photos(tmp_path):
  (tmp_path / "2026" / "trip").mkdir(parents=True)
  for name in ("b.jpg", "2026/a.PNG", "2026/trip/c.webp", "notes.txt", "d.heic", ".hidden.jpg"):
    (tmp_path / name).write_bytes(name.encode())
  return tmp_path


def test_every_image_is_listed_in_order_of_folder_and_name(photos):
  found = layouts.read(str(photos), "images")
  assert [item.key for item in found.items] == ["b.jpg", "2026/a.PNG", "2026/trip/c.webp"]
  assert [(skip.key, skip.reason) for skip in found.skips] == [("d.heic", "unsupported image type")]
  assert found.notes.counts == {"files that are not images": 1, "hidden files and folders": 1}


def test_the_loader_reads_them_without_captions(photos):
  data = Dataset(Source(str(photos), format="images", caption_keys=()))
  assert len(data) == 3
  record = data.read(1)
  assert (record.image, record.texts["key"]) == (b"2026/a.PNG", [b"2026/a.PNG"])
  assert data.class_names is None


def test_the_layout_is_never_detected(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"a")
  with pytest.raises(UndefinedLayout, match="neither classes nor captions"):
    Dataset(Source(str(tmp_path)))
  (tmp_path / "one").mkdir()
  (tmp_path / "a.jpg").rename(tmp_path / "one" / "a.jpg")
  with pytest.raises(UndefinedLayout, match="neither class nor caption"):
    Dataset(Source(str(tmp_path)))


def test_a_file_is_not_a_folder_of_images(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"a")
  with pytest.raises(ValueError, match="format images is a folder"):
    layouts.read(str(tmp_path / "a.jpg"), "images")
  with pytest.raises(ValueError, match="no images found"):
    (tmp_path / "empty").mkdir()
    layouts.read(str(tmp_path / "empty"), "images")
