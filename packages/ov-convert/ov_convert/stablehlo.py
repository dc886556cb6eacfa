"""StableHLO format: serialized functions that jax runs on CPUs, GPUs and TPUs without our code.

Parameters are an argument, with the names of model.safetensors, so the size of a function does not
depend on the model. The batch size is dynamic. Computation is in float32 for every file dtype:

  with open("folder/image.stablehlo", "rb") as file:
    image = jax.export.deserialize(bytearray(file.read())).call
  params = safetensors.flax.load_file("folder/model.safetensors")
  image(params, pixels)["pooled"]
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
import pathlib
from typing import Any

import jax
from jax import export
import jax.numpy as jnp

from ov_convert import torch_module
from ov_convert.name_map import flatten, unflatten
from ov_convert.release import Config, Release, portable
from ov_convert.writing import write_json
import ov_models

PLATFORMS = ("cpu", "cuda", "tpu")
EXPORT_FILE = "export.json"


def check(release: Release) -> None:
  """Raise ValueError listing all mismatches of tokenizer, preprocessing and model."""
  torch_module.check(release, module=False)


def write(folder: str | os.PathLike[str], release: Release) -> None:
  """Write image, text and caption .stablehlo, export.json, and the files of our format.

  `image` maps normalised pixels float32 [b, S, S, 3] to pooled [b, D], tokens [b, T, D] and, for
  two towers, embedding [b, E]. `text` maps ids int32 [b, T] to pooled and embedding. `caption` maps
  pixels to greedy captions, ids int32 [b, T]; it is written for an autoregressive decoder with a
  tokenizer.

  Raises:
    ValueError: see `check`.
  """
  check(release)
  path = pathlib.Path(folder)
  torch_module.write(path, release, module=False)
  config = portable(release.config)
  params = {
    name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(release.dtype))
    for name, leaf in flatten(ov_models.abstract_params(config)).items()
  }
  about: dict[str, Any] = {"jax": jax.__version__, "platforms": PLATFORMS, "functions": {}}
  for name, (function, given) in functions(config, release).items():
    # GPUs and TPUs otherwise round matmul inputs to 10 or 7 bits.
    with jax.default_matmul_precision("highest"), _no_source_locations():
      exported = export.export(jax.jit(function), platforms=PLATFORMS)(params, given)
    (path / f"{name}.stablehlo").write_bytes(exported.serialize())
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    about["calling_convention"] = exported.calling_convention_version
    about["functions"][name] = {
      "input": _array_spec(given),
      "outputs": {field: _array_spec(aval) for field, aval in outputs.items()},
    }
  about |= torch_module.similarity(release)
  write_json(path / EXPORT_FILE, about)


@contextlib.contextmanager
def _no_source_locations() -> Iterator[None]:
  """Disable source locations, which would write local paths into the files."""
  name = "jax_traceback_in_locations_limit"
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, before)


Flat = Mapping[str, jax.Array]
Function = Callable[[Flat, jax.Array], dict[str, jax.Array]]


def functions(config: Config, release: Release) -> dict[str, tuple[Function, Any]]:
  """Return the exported functions by name, each with its abstract input."""
  (batch,) = export.symbolic_shape("b")
  joint = isinstance(config, ov_models.VisionLanguageConfig) and config.text is not None
  alone = not isinstance(config, ov_models.VisionLanguageConfig)
  image: Any = getattr(config, "encoder", config)
  text: Any = getattr(config, "text", None)
  if isinstance(config, ov_models.TextConfig):
    image, text = None, config
  found: dict[str, tuple[Function, Any]] = {}
  if image is not None:
    size = image.image_size
    pixels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)

    def encode_image(params: Flat, pixels: jax.Array) -> dict[str, jax.Array]:
      model = _bind(config, params)
      if joint:
        out = model.encode_image(pixels)
        return {"pooled": out.pooled, "tokens": out.tokens, "embedding": out.unit}
      out = (model if alone else model.encoder)(pixels)
      return {"pooled": out.pooled, "tokens": out.tokens}

    found["image"] = (encode_image, pixels)
  if text is not None:

    def encode_text(params: Flat, ids: jax.Array) -> dict[str, jax.Array]:
      model = _bind(config, params)
      if not joint:
        return {"pooled": model(ids).pooled}
      out = model.encode_text(ids)
      return {"pooled": out.pooled, "embedding": out.unit}

    found["text"] = (encode_text, jax.ShapeDtypeStruct((batch, text.max_len), jnp.int32))
  decoder, words = getattr(config, "decoder", None), release.words
  bos_id = None if words is None else words.bos_id
  if isinstance(decoder, ov_models.DecoderConfig) and words is not None and bos_id is not None:
    eos_id, pad_id = words.eos_id, words.pad_id

    def caption(params: Flat, pixels: jax.Array) -> dict[str, jax.Array]:
      out = ov_models.generate(
        _bind(config, params), pixels,
        max_len=decoder.max_len, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id,
      )  # fmt: skip
      return {"ids": out.ids}

    found["caption"] = (caption, pixels)
  return found


def _bind(config: Config, params: Flat) -> Any:
  return ov_models.bind(
    config, unflatten({name: leaf.astype(jnp.float32) for name, leaf in params.items()})
  )


def _array_spec(aval: Any) -> dict[str, Any]:
  """Return shape and dtype as JSON; "b" is the dynamic batch size."""
  shape = [side if isinstance(side, int) else str(side) for side in aval.shape]
  return {"shape": shape, "dtype": str(aval.dtype)}
