import concurrent.futures
import time

import pytest

from tools.python import environment


@pytest.fixture
def builds(tmp_path, monkeypatch):
  """Replaces the installation by something quick, and lists the environments that were built."""
  done = []

  def build(venv, locks):
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
  def interrupted(venv, locks):
    venv.mkdir()
    (venv / "half").touch()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(environment, "build", interrupted)
    environment.main([lock])
  environment.main([lock])
  assert len(builds) == 1
  assert not (builds[0] / "half").exists()
