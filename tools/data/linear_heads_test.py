import pickle

import numpy as np
import pytest
import safetensors.numpy

from tools.data.linear_heads import read_head, read_heads

WEIGHT = np.array([1.0, -2.0, 0.5], np.float32)


@pytest.mark.parametrize("form", ["safetensors", "npz"])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize("bias", [None, np.float32([0.25]), np.array(0.25)])
def test_files(tmp_path, form, shape, bias):
  arrays = {"weight": WEIGHT.reshape(shape), **({} if bias is None else {"bias": bias})}
  path = str(tmp_path / f"head.{form}")
  if form == "npz":
    np.savez(path, **arrays)
  else:
    safetensors.numpy.save_file(arrays, path)
  head = read_heads([f"aesthetics={path}"])["aesthetics"]
  np.testing.assert_array_equal(head.weight, WEIGHT)
  assert head(np.float32([1, 1, 1])) == -0.5 + (0 if bias is None else 0.25)


class _Harmful:
  def __reduce__(self):
    return (pytest.fail, ("pickle was loaded",))


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"w": WEIGHT}, "has no array 'weight'; expected the arrays weight"),
    ({"weight": WEIGHT, "extra": WEIGHT}, "it also has extra"),
    ({"weight": WEIGHT, "bias": WEIGHT}, r"bias is float32 \(3,\)"),
    ({"weight": np.arange(3)}, "weight is int64"),
    ({"weight": np.ones((2, 3))}, r"weight of shape \(2, 3\)"),
    ({"weight": WEIGHT * np.nan}, "without NaN"),
    ({"weight": np.array([_Harmful()])}, "Object arrays cannot be loaded"),
  ],
)
def test_other_arrays(tmp_path, arrays, message):
  np.savez(tmp_path / "head.npz", **arrays)
  with pytest.raises(ValueError, match=message):
    read_head(str(tmp_path / "head.npz"))


@pytest.mark.parametrize("name", ["head.npz", "head.safetensors", "head.npy"])
def test_damaged_files(tmp_path, name):
  path = tmp_path / name
  with pytest.raises(ValueError, match="is not usable"):
    read_head(str(path))
  for data in (b"", b"no file of arrays", pickle.dumps(_Harmful())):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not usable"):
      read_head(str(path))


@pytest.mark.parametrize("texts", [["aesthetics"], ["=x"], ["a="], [""]])
def test_flags(texts):
  with pytest.raises(ValueError, match="expected NAME=FILE"):
    read_heads(texts)
