import numpy as np
import pytest

from ov_data import example

FEATURES = {"jpg": b"\xff\xd8", "txt": ["a dog", "é"], "label": 3, "box": [0.25, -1.0], "none": []}


def test_round_trip():
  features = example.parse(example.serialise(FEATURES))
  assert features["jpg"] == [b"\xff\xd8"]
  assert features["txt"] == [b"a dog", "é".encode()]
  np.testing.assert_array_equal(features["label"], [3])
  assert features["label"].dtype == np.int64
  np.testing.assert_array_equal(features["box"], np.float32([0.25, -1.0]))
  assert features["none"] == []


def test_bytes_do_not_depend_on_order():
  reordered = dict(reversed(FEATURES.items()))
  assert example.serialise(FEATURES) == example.serialise(reordered)


def test_keys_select():
  data = example.serialise(FEATURES)
  assert set(example.parse(data, ("jpg", "absent"))) == {"jpg"}


def test_negative_and_large_ints():
  values = [-1, 2**62, 0]
  np.testing.assert_array_equal(example.parse(example.serialise({"x": values}))["x"], values)


def test_same_wire_format_as_tensorflow():
  tf = pytest.importorskip("tensorflow")
  theirs = tf.train.Example.FromString(example.serialise(FEATURES))
  assert theirs.features.feature["txt"].bytes_list.value[1] == "é".encode()
  assert theirs.features.feature["label"].int64_list.value == [3]
  assert list(theirs.features.feature["box"].float_list.value) == [0.25, -1.0]
  ours = example.parse(theirs.SerializeToString())
  assert ours["txt"] == [b"a dog", "é".encode()]


def test_errors_name_the_key():
  with pytest.raises(TypeError, match="'meta' is dict"):
    example.serialise({"meta": {"a": 1}})
  with pytest.raises(ValueError, match="4 bytes are not a tf.train.Example"):
    example.parse(b"\xff\xff\xff\xff")


def test_strings_that_are_not_utf8():
  assert example.parse(example.serialise({"key": "caf\udce9.jpg"})) == {"key": [b"caf\xe9.jpg"]}
  with pytest.raises(ValueError, match=r"feature 'txt' has the lone surrogate .* at character 2"):
    example.serialise({"txt": ["ab", "ab\ud83d"]})
  with pytest.raises(ValueError, match="feature name .* is not valid UTF-8"):
    example.serialise({"caf\udce9": "x"})


def test_names_that_are_not_utf8():
  data = example.serialise({"name": "b", "txt": ["a", "c"], "n": 7, "none": []})
  data = data.replace(b"name", b"n\xe9me")
  found = example.parse(data)
  assert found.pop("n").tolist() == [7]
  assert found == {"n\udce9me": [b"b"], "txt": [b"a", b"c"], "none": []}
  assert example.parse(data, ("txt",)) == {"txt": [b"a", b"c"]}
