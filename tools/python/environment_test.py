import concurrent.futures
import os
import subprocess
import sys
import time
import zipfile

import pytest

from tools.python import environment


@pytest.fixture
def builds(tmp_path, monkeypatch):
  """Replace the installation by a fast fake, and list the environments that were built."""
  done = []

  def build(venv, locks, site):
    venv.mkdir()  # fails if an earlier attempt left files
    time.sleep(0.05)
    done.append(venv)

  monkeypatch.setenv("OV_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(environment, "build", build)
  monkeypatch.setattr(environment, "install_one", lambda *_: "")
  return done


@pytest.fixture
def lock(tmp_path):
  path = tmp_path / "requirements.lock"
  path.write_text("numpy==2.4.6\n")
  return path


def test_clones_share_one_environment(builds, lock, capsys):
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(environment.main, [[lock]] * 4))
  assert len(builds) == 1
  assert set(capsys.readouterr().out.split()) == {str(builds[0])}


def test_other_pins_give_another_environment(builds, lock):
  environment.main([lock])
  lock.write_text("numpy==2.4.7\n")
  environment.main([lock])
  assert len(set(builds)) == 2


def test_an_interrupted_build_is_restarted(builds, lock, monkeypatch):
  def interrupted(venv, locks, site):
    venv.mkdir()
    (venv / "half").touch()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(environment, "build", interrupted)
    environment.main([lock])
  environment.main([lock])
  assert len(builds) == 1
  assert not (builds[0] / "half").exists()


def test_the_key_covers_additional_files_and_distributions(builds, lock, tmp_path):
  hook = tmp_path / "hook.py"
  for pip, text in (("", ""), ("torch==1", ""), ("torch==2", ""), ("torch==2", "x = 1")):
    hook.write_text(text)
    environment.main([lock], pip, (str(hook),))
    environment.main([lock], pip, (str(hook),))
  assert len(builds) == len(set(builds)) == 4


def test_site_files_are_copied(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(environment, "run", lambda command: calls.append(command) or True)
  monkeypatch.setattr(environment, "fetch_uv", lambda python: "uv")
  monkeypatch.setattr(environment.shutil, "which", lambda name: None)
  (tmp_path / "hook.pth").write_text("import hook\n")
  environment.build(tmp_path / "venv", ["a.lock"], (str(tmp_path / "hook.pth"),))
  (locked,) = calls
  assert "--require-hashes" in locked and locked[-1] == "a.lock"
  (copied,) = (tmp_path / "venv").glob("lib/python*/site-packages/hook.pth")
  assert copied.read_text() == "import hook\n"


def test_a_missing_distribution_is_reported_and_retried(builds, lock, monkeypatch, capsys):
  reasons = ["torch==2 could not be installed", ""]
  monkeypatch.setattr(environment, "install_one", lambda *_: reasons.pop(0))
  environment.main([lock], "torch==2")
  out, err = capsys.readouterr()
  assert "torch==2 could not be installed" in err
  assert (builds[0] / "unavailable.txt").read_text() == "torch==2 could not be installed"
  environment.main([lock], "torch==2")
  assert capsys.readouterr().out == out
  assert len(builds) == 2 and not (builds[0] / "unavailable.txt").exists()
  environment.main([lock], "torch==2")
  assert len(builds) == 2


def add_wheel(index, name, code, requires=""):
  """Add a wheel of version 1.0 to a file-based package index."""
  info = f"{name}-1.0.dist-info"
  files = {
    f"{name}/__init__.py": code,
    f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}",
    f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
  }
  files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
  wheel = f"{name}-1.0-py3-none-any.whl"
  folder = index / name
  folder.mkdir(parents=True)
  with zipfile.ZipFile(folder / wheel, "w") as archive:
    for file, text in files.items():
      archive.writestr(file, text)
  (folder / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')


@pytest.fixture
def indexes(tmp_path, monkeypatch):
  """Create the index of CPU builds, and the index that pip is configured for."""
  cpu, configured = tmp_path / "cpu", tmp_path / "configured"
  for name in [name for name in os.environ if name.startswith("PIP_")]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_INDEX_URL", configured.as_uri())
  monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
  monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
  return cpu, configured


CPU_BUILD, CUDA_BUILD = "kind = 'CPU'", "import fakecuda; kind = 'CUDA'"
CASES = {
  "the CPU index": ({"faketorch": CPU_BUILD}, {"faketorch": CUDA_BUILD}, "CPU", 1),
  "a mirror with CPU builds": ({}, {"faketorch": CPU_BUILD}, "CPU", 2),
  "PyPI with CUDA": ({}, {"faketorch": CUDA_BUILD, "fakecuda": ""}, "CUDA", 3),
  "a CPU build that fails": (
    {"faketorch": "import missing"},
    {"faketorch": CUDA_BUILD, "fakecuda": ""},
    "CUDA",
    3,
  ),
  "none": ({}, {"faketorch": CUDA_BUILD}, None, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_one_distribution_from_several_indexes(case, indexes, tmp_path, capfd):
  *wheels, kind, attempts = CASES[case]
  for index, of_index in zip(indexes, wheels, strict=True):
    for name, code in of_index.items():
      requires = "Requires-Dist: fakecuda\n" if "fakecuda" in code else ""
      add_wheel(index, name, code, requires)
  venv = tmp_path / "venv"
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
  python = venv / "bin" / "python3"
  reason = environment.install_one(python, "faketorch==1.0", indexes[0].as_uri())
  assert capfd.readouterr().err.count("openvision: pip install") == attempts
  if kind is None:
    assert "faketorch==1.0 could not be installed" in reason
    return
  assert reason == ""
  found = subprocess.check_output([python, "-c", "import faketorch; print(faketorch.kind)"])
  assert found.decode().strip() == kind
