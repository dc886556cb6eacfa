import io

import numpy as np
from PIL import Image
import pytest

from ov_data import throughput_report


def test_noise_makes_jpegs_of_the_wanted_size():
  data = throughput_report.encode(throughput_report.photo_like_noise(np.random.default_rng(0)))
  assert abs(len(data) - throughput_report.BYTES) < 5_000
  assert Image.open(io.BytesIO(data)).size == throughput_report.SIZE


def test_noise_and_jpegs_of_other_sizes():
  image = throughput_report.photo_like_noise(np.random.default_rng(0), (256, 128))
  data = throughput_report.encode(image, 8_000)
  assert abs(len(data) - 8_000) < 800
  assert Image.open(io.BytesIO(data)).size == (256, 128)


def test_prints_a_row_for_each_size(capsys):
  throughput_report.main(["--distinct", "2", "--records", "8", "--turns", "1"])
  rows = capsys.readouterr().out.splitlines()
  assert rows[0].startswith("8 JPEGs of 512 x 384 pixels")
  for size in throughput_report.IMAGE_SIZES:
    (row,) = (row for row in rows if row.startswith(f"Loader, {size} px"))
    wall, cpu, bare = map(float, row.split()[3:6])
    assert wall > 0 and cpu > 0 and 0 < bare < 10
  compared = [row for row in rows if "mean difference" in row]
  assert [int(row.split()[0]) for row in compared] == [*throughput_report.COMPARED_SIZES]


def test_photos_are_looked_for(tmp_path):
  with pytest.raises(SystemExit, match="no .jpg or .png under"):
    throughput_report.main(["--images", str(tmp_path)])
