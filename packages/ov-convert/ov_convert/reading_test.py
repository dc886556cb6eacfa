"""Tests of reading untrusted folders: accepted files, one-line errors, no code execution."""

import json
import os
import pathlib
import pickle
import subprocess
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import client_env, reading

WEIGHTS = "model.safetensors"


def write(folder, tensors, name=WEIGHTS):
  safetensors.numpy.save_file(tensors, folder / name)


def refused(match, folder, names=(WEIGHTS,), error=ValueError):
  with pytest.raises(error, match=match) as caught:
    reading.read_tensors(folder, names)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


def test_floats_become_float32_and_the_rest_stays(tmp_path):
  value = np.array([1.5, -2.25, 0.0])  # exact in every type
  types = [np.float64, np.float32, np.float16, jnp.bfloat16]
  tensors = {np.dtype(t).name: value.astype(t) for t in types}
  write(tmp_path, tensors | {"step": np.array(7), "mask": np.array([True, False])})
  flat = reading.read_tensors(tmp_path, ["other.safetensors", WEIGHTS])
  for name in tensors:
    assert flat[name].dtype == np.float32
    np.testing.assert_array_equal(flat[name], value)
  assert flat["step"].dtype == np.int64
  assert flat["step"] == 7
  assert flat["mask"].tolist() == [True, False]


def test_module_prefix_is_taken_off_where_all_have_it(tmp_path):
  one = np.ones(2, np.float32)
  write(tmp_path, {"module.a": one, "module.b.module.c": one})
  assert reading.read_tensors(tmp_path, [WEIGHTS]).keys() == {"a", "b.module.c"}
  write(tmp_path, {"module.a": one, "b": one})
  assert reading.read_tensors(tmp_path, [WEIGHTS]).keys() == {"module.a", "b"}


def split(folder, **weight_map):
  """Two files of a tensor each, and an index; `weight_map` replaces entries of it."""
  for name in "ab":
    write(folder, {name: np.full(3, ord(name), np.float32)}, f"{name}.safetensors")
  content = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"} | weight_map}
  (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def test_split_files(tmp_path):
  split(tmp_path)
  flat = reading.read_tensors(tmp_path, [WEIGHTS])
  assert {name: tensor[0] for name, tensor in flat.items()} == {"a": 97, "b": 98}
  split(tmp_path, c="a.safetensors")
  refused(
    "index.json and a.safetensors disagree about c; they belong to different models", tmp_path
  )
  split(tmp_path, a="b.safetensors")
  refused("index.json and b.safetensors disagree about a", tmp_path)
  split(tmp_path, c="c.safetensors")
  refused(r"c\.safetensors: no such file", tmp_path, error=FileNotFoundError)


@pytest.mark.parametrize(
  "path",
  ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "c:\\a", "a\n", 7, None],
)
def test_an_index_that_leads_out_of_the_folder(tmp_path, path):
  inner = tmp_path / "inner"
  (inner / "sub").mkdir(parents=True)
  write(tmp_path, {"a": np.ones(1, np.float32)}, "a.safetensors")  # what "../" would find
  write(inner / "sub", {"a": np.ones(1, np.float32)}, "a.safetensors")
  split(inner, a=path)
  refused(r"maps 'a' to .*; expected a file name in the same folder", inner)


def test_links(tmp_path):
  inner = tmp_path / "inner"
  inner.mkdir()
  write(tmp_path, {"a": np.ones(1, np.float32)}, "secret.safetensors")
  (inner / WEIGHTS).symlink_to("../secret.safetensors")
  refused("is a link that points outside its folder", inner)
  (inner / "config.json").symlink_to("../secret.safetensors")
  with pytest.raises(ValueError, match=r"config\.json is a link that points outside its folder"):
    reading.read_json(inner / "config.json")
  write(inner, {"a": np.ones(1, np.float32)}, "real.safetensors")
  (inner / WEIGHTS).unlink()
  (inner / WEIGHTS).symlink_to("real.safetensors")
  assert reading.read_tensors(inner, [WEIGHTS]).keys() == {"a"}
  (inner / "pipe.safetensors").mkdir()
  refused("is not a regular file", inner, ["pipe.safetensors"])


def test_links_of_the_cache_of_the_hub(tmp_path):
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
  blobs.mkdir()
  snapshot.mkdir(parents=True)
  write(blobs, {"a": np.ones(1, np.float32)}, "4567def")
  (snapshot / WEIGHTS).symlink_to("../../blobs/4567def")
  assert reading.read_tensors(snapshot, [WEIGHTS]).keys() == {"a"}


def test_damaged_files(tmp_path):
  write(tmp_path, {"a": np.ones(100, np.float32)})
  file = tmp_path / WEIGHTS
  whole = file.read_bytes()
  header = int.from_bytes(whole[:8], "little")
  for content in (
    whole[:-1],  # truncated
    whole + b"0",
    b"",
    b"\x80\x04.",  # a pickle
    pickle.dumps(list(range(100))),
    (1 << 62).to_bytes(8, "little") + whole[8:],  # a header larger than the file
    whole[:8] + b"[" * header + whole[8 + header :],
    whole.replace(b"[0,400]", b"[0,800]"),
    whole.replace(b"[100]", b"[101]"),
  ):
    assert content != whole
    file.write_bytes(content)
    refused(r"model\.safetensors is damaged", tmp_path)
  file.write_bytes(whole.replace(b'"F32"', b'"F9" '))
  refused(r"model\.safetensors is damaged", tmp_path)


def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
  file = tmp_path / WEIGHTS
  with file.open("wb") as opened:  # sparse: takes no room
    opened.write((40 << 20).to_bytes(8, "little"))
    opened.truncate(50 << 20)
  refused(f"header of {40 << 20} bytes; expected at most", tmp_path)
  with file.open("r+b") as opened:
    opened.truncate(reading.MAX_TENSOR_BYTES + 1)
  refused(f"have {reading.MAX_TENSOR_BYTES + 1} bytes; expected at most", tmp_path)
  file.unlink()
  split(tmp_path)
  monkeypatch.setattr(reading, "MAX_TENSOR_BYTES", 100)  # less than both together
  refused("expected at most 100", tmp_path)


def test_values_that_are_not_finite(tmp_path):
  good = np.ones(4, np.float32)
  for bad in (np.float32("nan"), np.float32("-inf"), np.float16("inf"), np.float64(1e300)):
    write(tmp_path, {"fine": good, "norm.weight": np.array([1, bad], bad.dtype)})
    refused(r"norm\.weight contains NaN or Inf in float32", tmp_path)
  write(tmp_path, {"two\nlines\x1b[2J": np.array([np.inf])})
  refused(r"two\?lines\?\[2J contains NaN", tmp_path)


def test_missing_weights(tmp_path):
  refused("no such folder", tmp_path / "nowhere", error=FileNotFoundError)
  message = refused("no weights in", tmp_path, [WEIGHTS, "model.bin"], FileNotFoundError)
  assert "expected model.safetensors or model.bin; the folder contains nothing" in message
  (tmp_path / "model.npz").touch()
  refused("the folder contains model.npz", tmp_path, error=FileNotFoundError)
  refused(r"ends in '\.npz'; expected \.safetensors, \.bin", tmp_path, ["model.npz"])
  write(tmp_path, {})
  refused("contains no tensors", tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ("\x80\x04.", "is not JSON"),
    ("[1]", r"contains a list, expected an object"),
    ('{"eps": NaN}', "NaN is not a finite number"),
    ('{"eps": -Infinity}', "-Infinity is not a finite number"),
    ('{"eps": 1e999}', "1e999 is not a finite number"),
    ('{"n": ' + "9" * 5000 + "}", "is not JSON"),
    ('{"a":' * 10**5, "is nested too deeply"),
  ],
)
def test_wrong_json(tmp_path, text, message):
  file = tmp_path / "config.json"
  file.write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=message) as caught:
    reading.read_json(file)
  assert len(str(caught.value).splitlines()) == 1


def test_json(tmp_path):
  file = tmp_path / "config.json"
  file.write_text('{"mean": [0.5, 1e-6], "name": "é", "deep": {"a": {"b": null}}}', "utf-8")
  assert reading.read_json(file)["mean"] == [0.5, 1e-6]
  with file.open("wb") as opened:
    opened.truncate(reading.MAX_JSON_BYTES + 1)
  with pytest.raises(ValueError, match=f"has {reading.MAX_JSON_BYTES + 1} bytes; expected at most"):
    reading.read_json(file)
  with pytest.raises(FileNotFoundError, match=r"other\.json: no such file; .*contains conf"):
    reading.read_json(tmp_path / "other.json")


# Files that PyTorch writes, all made in one run of it.
_SAVE = """
import sys, torch
folder = sys.argv[1]
weight = torch.arange(6.).reshape(2, 3)
tied = {"module.a": weight.to(torch.bfloat16), "module.b": weight.t(), "module.c": weight}
tied["module.steps"] = torch.tensor(3)
torch.save({"epoch": 3, "state_dict": tied, "optimizer": [1]}, f"{folder}/nested.bin")
torch.save({"a": weight}, f"{folder}/old.pth", _use_new_zipfile_serialization=False)
torch.save({"a": weight, "epoch": 3}, f"{folder}/mixed.bin")
torch.save({"a": torch.tensor([1., float("nan")])}, f"{folder}/nan.pt")
torch.save({"a": torch.zeros(1).expand(1 << 40)}, f"{folder}/expanded.bin")
torch.jit.trace(torch.nn.ReLU(), weight).save(f"{folder}/program.pt")
torch.save({str(i): torch.zeros(100) for i in range(3)}, f"{folder}/whole.bin")
"""


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("torch")
  subprocess.run([client_env.find_python(), "-c", _SAVE, str(folder)], check=True)
  return folder


def test_state_dicts(torch_files):
  flat = reading.read_tensors(torch_files, ["nested.bin"])
  weight = np.arange(6, dtype=np.float32).reshape(2, 3)
  assert flat.keys() == {"a", "b", "c", "steps"}
  for name, expected in {"a": weight, "b": weight.T, "c": weight}.items():
    assert flat[name].dtype == np.float32
    np.testing.assert_array_equal(flat[name], expected)
  assert flat["steps"].dtype == np.int64
  np.testing.assert_array_equal(reading.read_tensors(torch_files, ["old.pth"])["a"], weight)


def test_invalid_state_dicts(torch_files):
  refused(
    r"mixed\.bin contains a int under 'epoch', expected tensors only", torch_files, ["mixed.bin"]
  )
  refused(r"program\.pt is a TorchScript program, not a state", torch_files, ["program.pt"])
  refused(r"nan\.pt: a contains NaN or Inf", torch_files, ["nan.pt"])
  refused("but stores fewer bytes", torch_files, ["expanded.bin"])


def test_damaged_state_dicts(torch_files, tmp_path):
  whole = (torch_files / "whole.bin").read_bytes()
  (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
  refused(r"cut\.bin .*(damaged|not a plain state dict)", tmp_path, ["cut.bin"])
  with (
    zipfile.ZipFile(torch_files / "whole.bin") as source,
    zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as packed,
  ):
    for name in source.namelist():
      packed.writestr(name, source.read(name))
  refused(r"bomb\.bin is a compressed archive", tmp_path, ["bomb.bin"])


class Payload:
  """A pickle of it runs a command when it is loaded."""

  def __init__(self, trace: pathlib.Path) -> None:
    self.trace = trace

  def __reduce__(self):
    return os.system, (f"touch {self.trace}",)


def test_code_in_pickles_is_not_run(tmp_path):
  trace = tmp_path / "executed"
  payload = pickle.dumps({"a": Payload(trace)}, protocol=2)
  (tmp_path / "old.bin").write_bytes(payload)
  with zipfile.ZipFile(tmp_path / "new.bin", "w") as archive:
    archive.writestr("archive/data.pkl", payload)
    archive.writestr("archive/byteorder", "little")
    archive.writestr("archive/version", "3\n")
  for name in ("old.bin", "new.bin"):
    message = refused("no code was run", tmp_path, [name])
    assert message.endswith(
      f"{name} calls posix.system; no code was run. Request a safetensors file from its author."
    )
    assert not trace.exists()
  pickle.loads(payload)  # the payload works
  assert trace.exists()
