"""Tampered JSON in folders is rejected with ValueError in bounded time, or gives a valid model.

Every value of every JSON file is replaced by some of `HOSTILE`, chosen with a fixed seed.
"""

import json
import random
import shutil
import time

import pytest

from ov_convert import open_clip, testing, timm_vit, torch_module, transformers_vit
import ov_models

SMALL = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2}
PAIR = ov_models.VisionLanguageConfig.from_names(
  "mu/8", "Ti", None, image_size=16, vocab_size=len(testing.words().vocabulary),
  text_len=testing.LENGTH, embed_dim=12, encoder_options=SMALL, text_options=SMALL,
  preset="openvision_released",
)  # fmt: skip
FORMATS = {
  "open_clip": open_clip,
  "timm": timm_vit,
  "transformers": transformers_vit,
  "safetensors": torch_module,
}
HOSTILE = (
  None, True, -1, 0, 3, 2**31, 10**12, 10**400, 1e300, 0.5, "", "a", "9" * 500, [], [1, 2],
  [[]], ["a", "b", "c"], {}, {"a": 1}, "\x1b[31m",
)  # fmt: skip
SECONDS = 20.0  # of one import, on a machine that is busy; without bounds they take hours


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  release = testing.release(
    PAIR, params=testing.random_params(PAIR, 0), words=testing.words(append_cls=True)
  )
  root = tmp_path_factory.mktemp("valid")
  for name, module in FORMATS.items():
    module.write(root / name, release)
  return root


def places(value, path=()):
  """Paths of all values below `value`, itself included."""
  yield path
  children = value.items() if isinstance(value, dict) else ()
  if isinstance(value, list):
    children = list(enumerate(value))[:2]
  for key, child in list(children)[:40]:
    yield from places(child, (*path, key))


def replaced(content, path, value):
  if not path:
    return value
  copy = dict(content) if isinstance(content, dict) else list(content)
  copy[path[0]] = replaced(content[path[0]], path[1:], value)
  return copy


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_replaced(folders, tmp_path, name):
  folder = tmp_path / name
  shutil.copytree(folders / name, folder)
  read = FORMATS[name].read
  read(folder)
  refused = tried = 0
  rng = random.Random(0)
  files = [file for file in sorted(folder.rglob("*.json")) if file.name != "tokenizer.json"]
  assert files
  for file in files:
    text = file.read_text("utf-8")
    content = json.loads(text)
    for path in places(content):
      for value in rng.sample(HOSTILE, 7):
        file.write_text(json.dumps(replaced(content, path, value)), "utf-8")
        started, tried = time.monotonic(), tried + 1
        try:
          read(folder)
        except (ValueError, FileNotFoundError) as error:
          refused += 1
          assert len(str(error)) < 4000 and "\x1b" not in str(error), (file.name, path, value)
        except Exception as error:
          raise AssertionError(f"{file.name} {path} = {str(value)[:40]}: {error!r}") from error
        assert time.monotonic() - started < SECONDS, (file.name, path, value)
    file.write_text(text, "utf-8")
  read(folder)
  assert tried > 150 and refused > tried / 4


@pytest.mark.parametrize("name", ["open_clip", "transformers"])
@pytest.mark.parametrize("number", [2**31, 10**18, -1, True, 1.5, "7"])
def test_an_id_that_would_take_gigabytes(folders, tmp_path, name, number):
  folder = tmp_path / name
  shutil.copytree(folders / name, folder)
  file = next(folder.rglob("tokenizer.json"))
  content = json.loads(file.read_text())
  content["model"]["vocab"]["red"] = number
  file.write_text(json.dumps(content))
  expected = "assigns 'red' the id .*; expected an integer below 4194304"
  if name == "open_clip":  # which is read without its tokenizer
    assert any("assigns 'red' the id" in note for note in open_clip.read(folder).notes)
  else:
    with pytest.raises(ValueError, match=expected):
      transformers_vit.read(folder)


@pytest.mark.parametrize(
  "name, file, path, said",
  [
    ("transformers", "config.json", ("num_hidden_layers",), "num_hidden_layers=1000000000000 .exp"),
    ("transformers", "config.json", ("hidden_size",), "expected an integer from 1 to 65536"),
    ("transformers", "text/config.json", ("num_hidden_layers",), "num_hidden_layers=10000"),
    ("open_clip", "open_clip_config.json", ("model_cfg", "vision_cfg", "layers"), "up to 1024"),
    ("open_clip", "open_clip_config.json", ("model_cfg", "text_cfg", "layers"), "up to 1024"),
    ("timm", "config.json", ("model_args", "num_heads"), "model_args.num_heads=1000000000000"),
    ("safetensors", "config.json", ("model", "encoder", "depth"), "model.encoder.depth=1000000"),
  ],
)
def test_absurd_sizes_are_named(folders, tmp_path, name, file, path, said):
  folder = tmp_path / name
  shutil.copytree(folders / name, folder)
  content = json.loads((folder / file).read_text())
  (folder / file).write_text(json.dumps(replaced(content, path, 10**12)))
  with pytest.raises(ValueError, match=said):
    FORMATS[name].read(folder)


def test_sizes_that_the_weights_do_not_have_are_named_before_any_loop(folders, tmp_path):
  folder = tmp_path / "transformers"
  shutil.copytree(folders / "transformers", folder)
  content = json.loads((folder / "config.json").read_text())
  for change, said in (
    ({"num_hidden_layers": 1000}, r"states 1000 layers, but the weights hold \d+ tensors"),
    ({"hidden_size": 4096}, "states hidden_size=4096, but no tensor has a dimension of 4096"),
  ):
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=said):
      transformers_vit.read(folder)
