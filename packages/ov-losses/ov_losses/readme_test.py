"""Tests of the README examples; //tests/standalone runs the first one alone, too."""

import pathlib
import re

import ov_losses

README = pathlib.Path(__file__).parents[1] / "README.md"
CAPTIONS_AND_PAIRS, CACHE, OWN_MESH = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_captions_and_pairs(capsys):
  exec(CAPTIONS_AND_PAIRS, {})
  captions, pairs = [list(map(float, s.split())) for s in capsys.readouterr().out.splitlines()]
  assert captions[2] == 4 * 14  # tokens before the padding, less the first
  assert 0 < pairs[0] < 10


def test_gradient_cache(capsys):
  exec(CACHE, {})
  full_batch, *cached = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
  assert cached == sorted(cached, reverse=True)
  assert cached[0] < full_batch / 3 and cached[1] < full_batch / 7  # as stated in the README


def test_shard_map_example(capsys):
  exec(CAPTIONS_AND_PAIRS + OWN_MESH, {})
  first = CAPTIONS_AND_PAIRS.count("print(")
  assert re.fullmatch(r"\(\d+, \d+\)", capsys.readouterr().out.splitlines()[first])


def test_every_public_name_is_in_the_table():
  table = README.read_text().split("## API")[1]
  for name in ov_losses.__all__:
    assert re.search(rf"[`/ ]{name}\(", table), name
