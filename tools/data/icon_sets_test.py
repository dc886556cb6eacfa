"""Tests of reading @iconify/json from a folder and an archive, including damaged ones."""

import gzip
import tarfile

import pytest

from tools.data import icon_sets, icon_testing


@pytest.fixture
def folder(tmp_path):
  return icon_testing.write_folder(tmp_path / "package", icon_testing.package())


def read(path, **options):
  package = icon_sets.Package(path)
  return package, {one.prefix: one for one in package.sets(**options)}


def test_only_permissive_sets_with_words_are_used(folder):
  package, sets = read(folder)
  assert sets.keys() == {"held", "one", "other", "two"}
  assert package.version == "9.9.9"
  assert package.other_licenses == {"All rights reserved": {"sets": 1, "icons": 1}}
  assert sets["one"][1:6] == ("One", "A | B", "MIT", "https://example.com/mit", "")
  assert "other" not in read(folder, excluded=frozenset(["other"]))[1]


def test_an_archive_equals_the_folder(folder, tmp_path):
  archive = icon_testing.write_archive(tmp_path / "a.tgz", icon_testing.package())
  packages = [read(path) for path in (folder, archive)]
  assert packages[0][0].digest == packages[1][0].digest != ""
  assert packages[0][1] == packages[1][1]


def test_names_aliases_styles_and_boxes(folder):
  _, sets = read(folder)
  icons = {icon.key: icon for icon in sets["one"].icons}
  square = icons["one:square-outline"]
  assert square.texts == ("square", "box") and square.style == "outline"
  assert square.box == (0, 0, 24, 24) and square.license == "MIT"
  reasons = {skip.key: skip.reason for one in sets.values() for skip in one.skips}
  assert reasons == {
    "one:corner-outline": "other size or variant",
    "two:old-icon": "removed from its set",
    "two:24": "name without a word",
  }


def test_a_set_with_colours_is_a_style(tmp_path):
  one = icon_testing.icon_set("one", {"a-bus": icon_testing.path("bar")})
  one["info"]["palette"] = True
  _, sets = read(icon_testing.write_folder(tmp_path / "p", {"one": one}))
  assert [icon.style for icon in sets["one"].icons] == ["color"]


def test_links_and_other_members_of_an_archive_are_ignored(tmp_path):
  link = tarfile.TarInfo("package/json/evil.json")
  link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
  outside = tarfile.TarInfo("../../json/outside.json")
  sets = {"one": icon_testing.package()["one"]}
  _, found = read(icon_testing.write_archive(tmp_path / "a.tgz", sets, link, outside))
  assert found.keys() == {"one"} and not list(tmp_path.glob("*.json"))


def test_damaged_packages_are_one_line_errors(tmp_path, folder, monkeypatch):
  archive = icon_testing.write_archive(tmp_path / "a.tgz", icon_testing.package())
  (tmp_path / "short.tgz").write_bytes(archive.read_bytes()[:-200])
  (tmp_path / "text.tgz").write_bytes(b"hello")
  (tmp_path / "no_tar.tgz").write_bytes(gzip.compress(b"x" * 2000))
  for name in ("short", "text", "no_tar"):
    with pytest.raises(ValueError, match=f"{name}.tgz is not an intact .tgz archive"):
      read(tmp_path / f"{name}.tgz")
  with pytest.raises(ValueError, match="nowhere: expected the folder or .tgz archive"):
    read(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="contains no json/SET.json"):
    read(tmp_path / "empty")
  for content in ('{"prefix": "one"}', "[" * 100_000, '{"prefix": 1, "icons": {}}', "\xff"):
    (folder / "json" / "one.json").write_text(content, "latin-1")
    with pytest.raises(ValueError, match=r"json/one.json is damaged") as error:
      read(folder)
    assert "\n" not in str(error.value)
  monkeypatch.setattr(icon_sets, "MAX_TOTAL_BYTES", 2000)
  with pytest.raises(ValueError, match="holds more than"):
    read(archive)
