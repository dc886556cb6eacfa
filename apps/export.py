"""Export a trained model to other libraries, verify it in each library, and import their models.

  bazel run //apps:export -- --workdir=/tmp/ov-clip --format=open_clip,timm,transformers,onnx,\
stablehlo,safetensors --out=/tmp/ov-export
  ... --from=open_clip:/data/some-model --to_workdir=/tmp/imported

Every folder is loaded in its library before it is published. If the outputs differ, the table shows
the first differing block, no folder is kept, and the exit code is 1. The same applies to smaller
weights (--onnx_weights) whose embeddings are too far from those of the float32 weights.
"""

from collections.abc import Callable
import io
import json
from pathlib import Path
import sys
from typing import Any

from absl import flags

from apps.exporter import places
from apps.exporter.formats.table import EXPORTS
from apps.trainer.errors import UserError, run_app, user_errors

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, or of an import.")
_FORMAT = flags.DEFINE_list("format", ["safetensors"], f"Some of {', '.join(EXPORTS)}.")
_OUT = flags.DEFINE_string("out", None, "Output folder; each format gets a sub-folder.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
_PART = flags.DEFINE_enum("part", "params", ["params", "ema"], "Parameters or their average.")
_WISE_FT = flags.DEFINE_float(
  "wise_ft",
  None,
  "Export alpha * trained + (1 - alpha) * initial weights of a fine-tuned run, alpha in [0, 1].",
  lower_bound=0,
  upper_bound=1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16", "float16"], "Dtype of the exported weights."
)
_IMAGE_SIZE = flags.DEFINE_integer(
  "image_size", None, "Image size in pixels, to export at another resolution or to import a model."
)
_PICTURES = flags.DEFINE_string(
  "pictures", None, "Folder of images for the comparison; synthetic by default."
)
_DEFINE: dict[type, Callable[..., flags.FlagHolder[Any]]] = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}
_OPTIONS = {
  (form.name, option): _DEFINE[option.kind](f"{form.name}_{option.name}", None, option.help)
  for form in EXPORTS.values()
  for option in form.options
}
_LICENSE = flags.DEFINE_string(
  "license",
  None,
  "Licence field of the model cards; that of the imported model, or apache-2.0, by default.",
)
_PUSH = flags.DEFINE_string("push_to_hub", None, "Repository to upload to: org/name.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "With --push_to_hub: only list the uploads.")
_FROM = flags.DEFINE_string("from", None, "FORMAT:PATH of a model to import.")
_TO_WORKDIR = flags.DEFINE_string("to_workdir", None, "Output folder of an import.")
_NUM_HEADS = flags.DEFINE_integer(
  "num_heads", None, "Number of attention heads of an import, if the checkpoint lacks it."
)
flags.DEFINE_alias("to-workdir", "to_workdir")


def main() -> None:
  if isinstance(sys.stdout, io.TextIOWrapper):  # paths may contain bytes that are not UTF-8
    sys.stdout.reconfigure(errors="surrogateescape")
  if _FROM.value or _TO_WORKDIR.value:
    _import()
    return
  if not _OUT.value or not (_WORKDIR.value or _PUSH.value):
    raise UserError(
      "give --workdir=RUN --format=... --out=FOLDER to export, --push_to_hub=org/name --out=FOLDER "
      "to upload an export, or --from=FORMAT:PATH --to_workdir=FOLDER to import"
    )
  if _DRY_RUN.value and not _PUSH.value:
    raise UserError("--dry_run requires --push_to_hub=org/name")
  formats = _formats()
  for (form, option), flag in _OPTIONS.items():
    if flag.value is None:
      continue
    given = f"--{flag.name}={flag.value}"
    if not (_WORKDIR.value and form in formats):
      raise UserError(f"{given} is for exports with --format={form}; add it, or leave it out")
    if option.requires and flags.FLAGS[f"{form}_{option.requires}"].value is None:
      raise UserError(
        f"{given} has no effect without --{form}_{option.requires}; add it, or leave it out"
      )
  with user_errors():
    out = (places.new if _WORKDIR.value else places.existing)("--out=", _OUT.value)
  if _WORKDIR.value:
    _export(_WORKDIR.value, formats, out)
  else:
    formats = _exported(out)
  if _PUSH.value:
    from apps.exporter import hub

    with user_errors():
      folders = {name: out / name for name in formats}
      hub.push(folders, _PUSH.value, dry_run=_DRY_RUN.value)


def _formats() -> list[str]:
  formats = list(dict.fromkeys(_FORMAT.value))
  unknown = [name for name in formats if name not in EXPORTS]
  if unknown or not formats:
    raise UserError(
      f"--format={','.join(formats)}: unknown format {', '.join(unknown) or '(none)'}; "
      f"choose from {', '.join(EXPORTS)}"
    )
  return formats


def _exported(out: Path) -> list[str]:
  """Return the formats of an existing export."""
  try:
    content = json.loads((out / "export.json").read_text("utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
      f"--out={out} is not an export to upload: {error}; set --workdir to export first"
    ) from error
  formats = content.get("formats") if isinstance(content, dict) else None
  known = isinstance(formats, list) and all(name in EXPORTS for name in formats)
  if not formats or not known:
    raise UserError(
      f"--out={out} is not an export to upload: formats in export.json is {formats!r}; expected "
      f"some of {', '.join(EXPORTS)}; set --workdir to export first"
    )
  return formats


def _export(workdir: str, formats: list[str], out: Path) -> None:
  """Export the run; end the program with exit code 1 if a library disagrees."""
  from apps.exporter import exporting, hub
  from apps.exporter.source import load_source
  from apps.trainer.progress import Terminal

  with user_errors():
    if _PUSH.value:
      hub.check(formats, _PUSH.value, dry_run=_DRY_RUN.value)
    pictures = places.existing("--pictures=", _PICTURES.value) if _PICTURES.value else None
    options = {
      name: {o.name: o.resolve(_OPTIONS[name, o].value) for o in EXPORTS[name].options}
      for name in formats
    }
    source = load_source(
      workdir,
      step=_STEP.value,
      part=_PART.value,
      image_size=_IMAGE_SIZE.value,
      dtype=_DTYPE.value,
      wise_ft=_WISE_FT.value,
    )
    agreed = exporting.export(
      source, formats, out, pictures, source.license(_LICENSE.value), Terminal(), options
    )
  if not agreed:
    sys.exit(1)


def _import() -> None:
  if not (_FROM.value and _TO_WORKDIR.value):
    raise UserError("an import needs both: --from=FORMAT:PATH --to_workdir=FOLDER")
  from apps.exporter import importer

  with user_errors():
    lines = importer.import_model(
      _FROM.value,
      places.new("--to_workdir=", _TO_WORKDIR.value),
      image_size=_IMAGE_SIZE.value,
      num_heads=_NUM_HEADS.value,
    )
  print("\n".join(lines))


if __name__ == "__main__":
  run_app(main)
