"""Format "web": a static page that runs the model in the browser, without any other server."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import io
import json
from pathlib import Path
import shutil
from typing import TYPE_CHECKING, Any

from apps.exporter.formats import format as form
from apps.exporter.formats import onnx

if TYPE_CHECKING:
  import numpy as np

  from apps.exporter.source import Source
  from ov_convert.accuracy import Accuracy
  from ov_convert.release import Release

PAGE = Path(__file__).parent.parent / "web"
RUNTIME = "onnxruntime-web@1.30.0"  # the tested version
RUNTIME_FILES = (
  "ort.wasm.min.mjs",
  "ort-wasm-simd-threaded.mjs",
  "ort-wasm-simd-threaded.wasm",
)
MAX_IMAGES = 5000  # the page loads all of their vectors and compares each with a query
THUMBNAIL = 320  # longer side in pixels
_MODELS = ("WordPiece", "BPE")  # of tokenizer.js
_BATCH = 32
_GOLDEN = ("A Café—naïve résumé, über coöperation! It's 3.5 €", "東京タワー at night\t😀 [bos]", "")


def _check(release: "Release") -> None:
  onnx.check(release)
  if release.words is not None:
    kind = json.loads(release.words.tokenizer_json)["model"]["type"]
    if kind not in _MODELS:
      raise ValueError(
        f"the tokenizer is a {kind} model, but the page runs {' and '.join(_MODELS)} only; use "
        "--format=onnx."
      )


def _notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  return (
    "Run `python3 -m http.server` in this folder, or copy it to any web server for static files, "
    "and open its index.html: the model then runs in the browser.",
    *onnx.FORMAT.notes(release, facts),
  )


def _runtime(value: str | None) -> str:
  """Return the folder of onnxruntime-web; "" to write the page without it."""
  if not value:
    return ""
  folder = Path(value)
  missing = [name for name in RUNTIME_FILES if not (folder / "dist" / name).is_file()]
  advice = f"run `npm pack {RUNTIME}`, unpack it, and set the flag to its folder `package`"
  if missing:
    raise ValueError(f"--web_runtime={value}: no file dist/{missing[0]}; {advice}.")
  try:
    found = json.loads((folder / "package.json").read_text("utf-8"))
    version = f"{found['name']}@{found['version']}"
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f"--web_runtime={value}: package.json is invalid ({error}); {advice}."
    ) from None
  if version != RUNTIME:
    raise ValueError(f"--web_runtime={value} is {version}, expected {RUNTIME}; {advice}.")
  return value


def _images(value: str | None) -> str:
  """Return the folder of the images to search; "" for none."""
  if value:
    from apps.exporter import places, probe

    files = probe.image_files(places.existing("--web_images=", value))
    if not 0 < len(files) <= MAX_IMAGES:
      raise ValueError(
        f"--web_images={value} has {len(files):,} images, expected 1 to {MAX_IMAGES:,}; choose "
        "another folder, or use ov-serve for large collections."
      )
  return value or ""


def _finish(
  folder: Path,
  source: "Source",
  probe: Callable[[], Path],
  *,
  images: str | None = None,
  runtime: str | None = None,
  **graphs: Any,
) -> "Accuracy | None":
  """Convert the weights, and add the page, the images with their vectors, and onnxruntime-web."""
  import ov_serve

  accuracy = onnx.finish(folder, source, probe, **graphs)
  for file in PAGE.iterdir():
    shutil.copyfile(file, folder / file.name)
  shared = Path(ov_serve.__file__).with_name("static")
  for name in ("app.js", "style.css", "icon.svg"):
    shutil.copyfile(shared / name, folder / name)
  if runtime:
    (folder / "ort").mkdir()
    for name in RUNTIME_FILES:
      shutil.copyfile(Path(runtime) / "dist" / name, folder / "ort" / name)
  keys, dim = _write_images(folder / "images", source.release, images) if images else ([], 0)
  processor = source.processor
  golden = processor.encode(_GOLDEN).tolist() if processor else []
  page = {
    "model": _name(source),
    "images": keys,
    "dim": dim,
    "texts": processor is not None and source.release.text is not None,
    "canonical": processor is not None and processor.canonical,
    "sigmoid": getattr(source.release.config, "bias_init", None) is not None,
    "golden": [{"text": t, "ids": row} for t, row in zip(_GOLDEN, golden)],
    "runtime": RUNTIME,
  }
  (folder / "page.json").write_text(json.dumps(page, ensure_ascii=False) + "\n", "utf-8")
  return accuracy


def _name(source: "Source") -> str:
  encoder = source.release.encoder
  return f"ViT of width {encoder.width}, patch {encoder.patch_size}, {encoder.image_size} px"


def _write_images(folder: Path, release: "Release", images: str) -> tuple[list[str], int]:
  """Write thumbnails and vectors float32 [N, E]; return the names of the images, and E."""
  import numpy as np
  from PIL import Image

  from apps.exporter import probe
  from ov_data import decode

  folder.mkdir()
  preprocess = release.preprocess
  keys: list[str] = []
  rows: list[np.ndarray] = []
  vectors: list[np.ndarray] = []
  embed = _embedder(release)
  files = probe.image_files(Path(images))
  for file in files:
    data = file.read_bytes()
    try:
      small = decode.full(data)
      rows.append(
        decode.whole(
          data, preprocess.image_size, preprocess.fit, interpolation=preprocess.interpolation
        )
      )
    except (ValueError, OSError) as error:
      raise ValueError(f"{file} cannot be decoded: {error}; remove it from --web_images") from error
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=85)
    (folder / f"{len(keys)}.jpg").write_bytes(encoded.getvalue())
    keys.append(file.relative_to(images).as_posix().encode("utf-8", "replace").decode())
    if len(rows) == _BATCH or len(keys) == len(files):
      vectors.append(embed(probe.normalise(np.stack(rows), preprocess)))
      rows = []
  joined = np.concatenate(vectors).astype("<f4")
  (folder / "vectors.bin").write_bytes(joined.tobytes())
  return keys, joined.shape[1]


def _embedder(release: "Release") -> "Callable[[np.ndarray], np.ndarray]":
  """Return a function from pixels [B, S, S, 3] to unit vectors [B, E] of our model."""
  import jax
  import numpy as np

  import ov_models

  config = release.config

  @jax.jit
  def embed(params: Any, pixels: Any) -> Any:
    model: Any = ov_models.bind(config, params)
    if isinstance(config, ov_models.ViTConfig):
      return model(pixels).pooled
    return model.encoder(pixels).pooled if release.text is None else model.encode_image(pixels).unit

  def unit(pixels: np.ndarray) -> np.ndarray:
    vectors = np.asarray(embed(release.params, pixels))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

  return unit


FORMAT = dataclasses.replace(
  onnx.FORMAT,
  name="web",
  title="a browser, and onnxruntime",
  check=_check,
  programs=tuple(dataclasses.replace(p, library="web") for p in onnx.FORMAT.programs),
  finish=_finish,
  notes=_notes,
  options=(
    *(
      dataclasses.replace(option, help=option.help.replace("onnx", "web"))
      for option in onnx.FORMAT.options
      if option.name != "opset"
    ),
    form.Option(
      "runtime",
      f"With --format=web: folder of the npm package {RUNTIME}, which the page needs.",
      _runtime,
      str,
      is_path=True,
    ),
    form.Option(
      "images",
      f"With --format=web: folder of at most {MAX_IMAGES:,} images that the page searches.",
      _images,
      str,
      is_path=True,
    ),
  ),
)
