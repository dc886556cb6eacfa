"""Tests of folders on the command line: literal names are accepted, invalid ones rejected."""

import pytest

from apps.exporter import places, probe

ODD = ["photos@512", "a[b]", "what?", "all*", "a b", "gs:", "b\udcffc", "ü"]


@pytest.mark.parametrize("name", ODD)
def test_names_are_literal(tmp_path, name):
  path = tmp_path / name
  assert places.new("--out=", str(path)) == path
  path.mkdir()
  assert places.existing("--pictures=", str(path)) == path


@pytest.mark.parametrize("value", ["gs://bucket/x", "s3://b", "hf://org/name", "gs:/b/x"])
@pytest.mark.parametrize("check", [places.new, places.existing])
def test_remote_folders_are_rejected_without_side_effects(tmp_path, monkeypatch, check, value):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=f"--out={value} is remote; expected a local folder"):
    check("--out=", value)
  assert list(tmp_path.iterdir()) == []


def test_existing_files_and_folders(tmp_path):
  file = tmp_path / "file"
  file.touch()
  with pytest.raises(ValueError, match="is a file; choose another folder"):
    places.new("--out=", str(file))
  with pytest.raises(ValueError, match=r"/file is a file|Not a directory"):
    places.new("--out=", str(file / "deep/er"))
  with pytest.raises(ValueError, match="exists and is not empty"):
    places.new("--out=", str(tmp_path))
  with pytest.raises(ValueError, match="file is a file; expected a folder"):
    places.existing("--pictures=", str(file))
  with pytest.raises(ValueError, match="none does not exist; expected a folder"):
    places.existing("--pictures=", str(tmp_path / "none"))
  (tmp_path / "link").symlink_to(tmp_path / "gone")
  with pytest.raises(ValueError, match="is a link; choose a folder that does not exist"):
    places.new("--out=", str(tmp_path / "link"))


@pytest.mark.parametrize("value", ["", "~nobody-has-this-name/x", "x" * 5000])
def test_invalid_paths(value):
  with pytest.raises(ValueError, match="folder"):
    places.new("--out=", value)


def test_an_undecodable_image_is_named(tmp_path):
  (tmp_path / "folder.jpg").mkdir()
  (tmp_path / "x.jpg").write_bytes(b"x")
  with pytest.raises(ValueError, match=r"x\.jpg cannot be decoded: .*remove it from --pictures"):
    probe.pictures(tmp_path)
