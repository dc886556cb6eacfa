"""Tests that the wheel of each package contains its library and nothing else."""

import pathlib
import shutil
import zipfile

from hatchling import build
import pytest

PACKAGES = pathlib.Path("packages").absolute()


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGES.glob("ov-*")))
def test_wheel_has_no_tests(name, tmp_path, monkeypatch):
  folder, module = tmp_path / name, name.replace("-", "_")
  shutil.copytree(PACKAGES / name, folder)
  monkeypatch.chdir(folder)  # where pip calls the build backend
  wheel = tmp_path / build.build_wheel(str(tmp_path))

  patterns = (f"{module}/**/*.py", f"{module}/static/*")  # code, and the files of a web page
  found = [path for pattern in patterns for path in folder.glob(pattern)]
  sources = {path.relative_to(folder).as_posix() for path in found}
  tests = {path for path in sources if path.endswith("_test.py") or "/testing/" in path}
  names = zipfile.ZipFile(wheel).namelist()
  library = {path for path in names if ".dist-info/" not in path}
  assert tests and library == sources - tests
  assert f"{module}/__init__.py" in library
