import re

import jax
import jax.numpy as jnp
import pytest

from ov_losses import contrastive_report
from ov_losses.contrastive_truth import example


@pytest.fixture
def mesh():
  return contrastive_report.make_mesh(jax.devices()[:1])


@pytest.fixture(autouse=True)
def _less_to_compile(monkeypatch):
  monkeypatch.setattr(contrastive_report, "KINDS", ("sigmoid",))
  monkeypatch.setattr(contrastive_report, "FORMS", ("naive", "gathered"))
  monkeypatch.setattr(contrastive_report, "DTYPES", ("float32",))
  monkeypatch.setattr(contrastive_report, "LOCAL_BATCHES", (8, 16))


def numbers(line):
  return [float(x.replace(",", "")) for x in re.findall(r"[\d,.]+(?:e[+-]\d+)?", line)]


def test_differences_are_of_the_dtype(mesh):
  exact = contrastive_report.differences("sigmoid", "ring", mesh, example(32, 1, 16))
  coarse = contrastive_report.differences("softmax", "ring", mesh, example(32, 1, 16, jnp.bfloat16))
  assert len(exact) == 5 and max(exact) < 1e-5  # float32 sums, as in contrastive_test
  loss, image, texts, scale = coarse
  assert max(loss, scale) < 1e-5  # float32 whatever the rows are
  # Two roundings of at most 2^-8; far less would mean that nothing was rounded.
  assert all(1e-4 < x < 2.0**-7 for x in (image, texts))


def test_tables(mesh, capsys):
  contrastive_report.print_agreement([mesh], batch=32, width=16)
  naive, gathered = capsys.readouterr().out.splitlines()[-2:]
  assert re.match(r"sigmoid  float32   naive     1 ", naive)
  assert re.match(r"sigmoid  float32   gathered  1 ", gathered)

  # The naive form holds at least one [B,B] array, 256 MiB; gathered, blocks of 16 MiB.
  contrastive_report.print_memory(mesh, 8192, 16)
  lines = capsys.readouterr().out.splitlines()
  assert numbers(lines[-3])[-1] == 256
  naive, gathered = numbers(lines[-1])[-2:]
  assert naive >= 256 and gathered < 128

  contrastive_report.print_compile_time(mesh, 16)
  lines = capsys.readouterr().out.splitlines()
  assert numbers(lines[-3]) == [8, 16]
  assert all(seconds > 0 for line in lines[-2:] for seconds in numbers(line))


@pytest.mark.parametrize(
  "argument, message",
  [
    (["--tables=speed"], "--tables=speed; expected some of agreement,memory,compile"),
    (["--topology=v5e:2x4"], "agreement is run, and a topology can only be compiled for"),
  ],
)
def test_mistakes_are_named(argument, message, capsys):
  with pytest.raises(SystemExit):
    contrastive_report.main(argument)
  assert message in capsys.readouterr().err
