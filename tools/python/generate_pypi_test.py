import importlib.metadata

from tools.python import generate_pypi


def test_targets_and_their_pins(tmp_path):
  jax, numpy = (importlib.metadata.version(name) for name in ("jax", "numpy"))
  lock = tmp_path / "requirements.lock"
  lock.write_text(
    f"jax=={jax} \\\n    --hash=sha256:00\n"
    f"numpy=={numpy} ; python_full_version >= '3.11'\n"
    "for-another-system==1.0 ; sys_platform == 'win32'\n"
  )
  generate_pypi.main(tmp_path, [lock])

  build = (tmp_path / "BUILD.bazel").read_text()
  for name in ("jax", "numpy", "for_another_system"):  # all platforms have these targets
    assert f'py_library(name = "{name}", data = ["locked/{name}.txt"])' in build
  assert f'interpreter_path = "{tmp_path}/venv/bin/python3"' in build
  # jax also needs scipy, which this lock does not pin.
  assert (tmp_path / "locked/jax.txt").read_text() == f"jax=={jax}\nnumpy=={numpy}\n"
  assert (tmp_path / "locked/for_another_system.txt").read_text() == ""


def test_closure_follows_extras():
  installed = {
    generate_pypi.target(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()
  }
  # orbax-checkpoint requires etils[epath]; only that extra requires fsspec.
  assert "fsspec" not in generate_pypi.closure("etils", installed)
  assert "fsspec" in generate_pypi.closure("orbax_checkpoint", installed)
