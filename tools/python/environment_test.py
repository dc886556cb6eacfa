import concurrent.futures
import time

import pytest

from tools.python import environment


@pytest.fixture
def builds(tmp_path, monkeypatch):
  """Replaces the installation by something quick, and lists the environments that were built."""
  done = []

  def build(venv, locks, pip, site):
    venv.mkdir()  # fails where an earlier attempt was left
    time.sleep(0.05)
    done.append(venv)

  monkeypatch.setenv("OV_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(environment, "build", build)
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


def test_other_pins_other_environment(builds, lock):
  environment.main([lock])
  lock.write_text("numpy==2.4.7\n")
  environment.main([lock])
  assert len(set(builds)) == 2


def test_interrupted_build_starts_anew(builds, lock, monkeypatch):
  def interrupted(venv, locks, pip, site):
    venv.mkdir()
    (venv / "half").touch()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(environment, "build", interrupted)
    environment.main([lock])
  environment.main([lock])
  assert len(builds) == 1
  assert not (builds[0] / "half").exists()


def test_what_comes_beside_the_locks_is_part_of_the_key(builds, lock, tmp_path):
  hook = tmp_path / "hook.py"
  for pip, text in (("", ""), ("torch==1", ""), ("torch==2", ""), ("torch==2", "x = 1")):
    hook.write_text(text)
    environment.main([lock], pip, (str(hook),))
    environment.main([lock], pip, (str(hook),))
  assert len(builds) == len(set(builds)) == 4


def test_site_files_and_the_loose_distribution_come_first(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(environment, "run", lambda command: calls.append(command) or True)
  monkeypatch.setattr(environment, "fetch_uv", lambda python: "uv")
  monkeypatch.setattr(environment.shutil, "which", lambda name: None)
  monkeypatch.setattr(environment, "add_pip", lambda python: True)
  (tmp_path / "hook.pth").write_text("import hook\n")
  environment.build(tmp_path / "venv", ["a.lock"], "torch==2", (str(tmp_path / "hook.pth"),))
  loose, locked = calls
  assert loose[-2:] == ["--no-deps", "torch==2"] and "--require-hashes" not in loose
  assert "--require-hashes" in locked and locked[-1] == "a.lock"
  (copied,) = (tmp_path / "venv").glob("lib/python*/site-packages/hook.pth")
  assert copied.read_text() == "import hook\n"
