"""`tf.train.Example` serialization without TensorFlow.

    Example  { Features features = 1 }
    Features { map<string, Feature> feature = 1 }
    Feature  { oneof kind { BytesList = 1, FloatList = 2, Int64List = 3 } }
    *List    { repeated bytes | float | int64 value = 1 }

The messages use a separate descriptor pool, so they do not conflict with TensorFlow's.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
import numpy as np

Feature = list[bytes] | np.ndarray  # list of bytes, or float32 or int64 [n]
Writable = bytes | str | int | float | np.ndarray | Sequence[bytes | str | int | float]


class FeatureError(ValueError):
  """An example that lacks a required feature; `reason` is a short phrase for counting."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def _example_class(key_type: int) -> Any:
  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
    name="ov_data/example.proto", package="ov_data", syntax="proto3"
  )
  lists = {
    "BytesList": field.TYPE_BYTES,
    "FloatList": field.TYPE_FLOAT,
    "Int64List": field.TYPE_INT64,
  }
  for name, kind in lists.items():
    value = file.message_type.add(name=name).field
    value.add(name="value", number=1, label=field.LABEL_REPEATED, type=kind)
  feature = file.message_type.add(name="Feature")
  feature.oneof_decl.add(name="kind")
  for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
    feature.field.add(
      name=name,
      number=number,
      label=field.LABEL_OPTIONAL,
      type=field.TYPE_MESSAGE,
      type_name=f".ov_data.{list(lists)[number - 1]}",
      oneof_index=0,
    )
  features = file.message_type.add(name="Features")
  entry = features.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = key_type == field.TYPE_STRING  # map keys cannot be bytes
  entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=key_type)
  entry.field.add(
    name="value",
    number=2,
    label=field.LABEL_OPTIONAL,
    type=field.TYPE_MESSAGE,
    type_name=".ov_data.Feature",
  )
  features.field.add(
    name="feature",
    number=1,
    label=field.LABEL_REPEATED,
    type=field.TYPE_MESSAGE,
    type_name=".ov_data.Features.FeatureEntry",
  )
  example = file.message_type.add(name="Example")
  example.field.add(
    name="features",
    number=1,
    label=field.LABEL_OPTIONAL,
    type=field.TYPE_MESSAGE,
    type_name=".ov_data.Features",
  )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("ov_data.Example"))


_Example = _example_class(descriptor_pb2.FieldDescriptorProto.TYPE_STRING)
# The same wire format as a list of entries whose names need not be UTF-8.
_RawExample = _example_class(descriptor_pb2.FieldDescriptorProto.TYPE_BYTES)


def parse(data: bytes, keys: Collection[str] | None = None) -> dict[str, Feature]:
  """Return the features of a serialized Example, restricted to `keys` if given.

  Names that are not valid UTF-8 are decoded with surrogateescape, like file names.

  Raises:
    ValueError: if the bytes are not a serialized Example.
  """
  try:
    try:
      features = _Example.FromString(data).features.feature
    except message.DecodeError as error:
      if "UTF-8" not in str(error):
        raise
      entries = _RawExample.FromString(data).features.feature
      features = {e.key.decode("utf-8", "surrogateescape"): e.value for e in entries}
  except message.DecodeError as error:
    raise ValueError(f"{len(data)} bytes are not a tf.train.Example: {error}") from None
  return {key: _value(features[key]) for key in features if keys is None or key in keys}


def serialise(features: Mapping[str, Writable]) -> bytes:
  """Serialize features to an Example: bytes, str, int, float, or lists of one of these types.

  The bytes do not depend on the order of the features. Strings are encoded as UTF-8 with
  surrogateescape, so invalid bytes in file names are preserved.

  Raises:
    TypeError: if a value has another type; the message names its key.
    ValueError: if a string contains another lone surrogate, or a key is not valid UTF-8.
  """
  example = _Example()
  for key, value in features.items():
    try:
      feature = example.features.feature[key]
    except UnicodeEncodeError:
      raise ValueError(f"feature name {key!r} is not valid UTF-8; choose another name") from None
    _set(feature, key, value)
  return example.SerializeToString(deterministic=True)


def _value(feature: Any) -> Feature:
  kind = feature.WhichOneof("kind")
  if kind == "float_list":
    return np.asarray(feature.float_list.value, np.float32)
  if kind == "int64_list":
    return np.asarray(feature.int64_list.value, np.int64)
  return list(feature.bytes_list.value)


def _encoded(key: str, text: str) -> bytes:
  try:
    return text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"feature {key!r} has the lone surrogate {text[error.start]!r} at character {error.start}, "
      "which UTF-8 cannot store; replace it"
    ) from None


def _set(feature: Any, key: str, value: Writable) -> None:
  scalar = isinstance(value, bytes | str | int | float | np.generic | Mapping)
  values: Any = [value] if scalar else value
  if len(values) == 0 or all(isinstance(item, bytes | str) for item in values):
    feature.bytes_list.value.extend(
      _encoded(key, item) if isinstance(item, str) else item for item in values
    )
    feature.bytes_list.SetInParent()
    return
  array = np.asarray(values)
  if array.ndim == 1 and array.dtype.kind in "bui":
    feature.int64_list.value.extend(array.astype(np.int64).tolist())
  elif array.ndim == 1 and array.dtype.kind == "f":
    feature.float_list.value.extend(array.astype(np.float32).tolist())
  else:
    raise TypeError(
      f"feature {key!r} is {type(value).__name__} of {array.dtype}; expected bytes, str, int, "
      "float, or a flat list of one of them"
    )
