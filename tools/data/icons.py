"""Convert open source icons with their names to record shards: real data for a laptop.

  npm pack @iconify/json          (100 MB: 238 sets with names and licences)
  bazel run //tools/data:icons -- --package=iconify-json-2.2.535.tgz --output=/data/icons

Renders the sets with permissive licences as PNG. --output holds train/ and heldout/, which has one
split for each of the sets in --held_out. Held-out icons that copy a training icon are left out.
naming/ holds the held-out icons with one of the most common names, for zero-shot classification
with names.json. licences.md lists the sets, and summary.json the counts and the results of a
nearest-pixel baseline. Repeat the command to resume an interrupted conversion.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

from collections import Counter
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from ov_data import fs, outputs, writer
from tools.data import common_flags, icon_baseline, icon_copies, icon_sets, icon_shards, progress

# A line style, a solid style, pixels, flat colours, and emoji.
HELD_OUT = ("iconoir", "vaadin", "pixelarticons", "flat-color-icons", "noto")
_MAX_ARCHIVE_BYTES = 400 << 20
VERSION = 1  # of the conversion
SUMMARY, NAMES, LICENCES = "summary.json", "names.json", "licences.md"

_PACKAGE = flags.DEFINE_string(
  "package", None, "Folder or .tgz archive of @iconify/json; default: download it with npm."
)
_RELEASE = flags.DEFINE_string("release", "2.2.535", "Version of @iconify/json to download.")
_SIZE = flags.DEFINE_integer("image_size", 32, "Pixels per side.", lower_bound=16, upper_bound=256)
_HELD_OUT = flags.DEFINE_list("held_out", list(HELD_OUT), "Sets that are not used for training.")
_EXCLUDED = flags.DEFINE_list(
  "exclude", sorted(icon_sets.CODE_SETS), "Sets to leave out; by default those named by codes."
)
_SHARDS = flags.DEFINE_integer("train_shards", 64, "Shards of the training data.", lower_bound=1)
_NAMES = flags.DEFINE_integer("names", 200, "Classes of naming/.", lower_bound=2)


def main() -> None:
  if not common_flags.OUTPUT.value:
    raise UserError("give --output=FOLDER; --helpshort lists all flags")
  with common_flags.resumable(), user_errors():
    output = common_flags.local_path(common_flags.OUTPUT.value)
    source = common_flags.local_path(_PACKAGE.value) if _PACKAGE.value else download(output)
    print(json.dumps(convert(source, output), indent=1))


def download(output: Path) -> Path:
  """Download the package with npm, from the registry that npm is configured for.

  Raises:
    ValueError: if npm fails, or the archive is too large.
  """
  name = f"@iconify/json@{_RELEASE.value}"
  archive = output / f"iconify-json-{_RELEASE.value}.tgz"
  if archive.exists():
    return archive
  remedy = "install npm, or give the package with --package"
  with tempfile.TemporaryDirectory() as folder:
    size = _npm(["view", name, "dist.unpackedSize"], folder, remedy).strip()
    if not size.isdecimal() or int(size) > icon_sets.MAX_TOTAL_BYTES:
      raise ValueError(
        f"{name} has an unpacked size of {size[:40]!r} bytes; expected at most "
        f"{icon_sets.MAX_TOTAL_BYTES}"
      )
    print(f"downloading {name}, {int(size) >> 20} MiB when unpacked", file=sys.stderr)
    _npm(["pack", name, "--ignore-scripts"], folder, remedy)
    (packed,) = Path(folder).glob("*.tgz")
    output.mkdir(parents=True, exist_ok=True)
    fs.write_atomic(str(archive), fs.read_regular(str(packed), _MAX_ARCHIVE_BYTES))
  return archive


def _npm(arguments: list[str], folder: str, remedy: str) -> str:
  try:
    done = subprocess.run(
      ["npm", *arguments], cwd=folder, capture_output=True, text=True, timeout=1800, check=False
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise ValueError(f"npm {arguments[0]} failed ({error}); {remedy}") from None
  if done.returncode:
    last = (["no output"] + done.stderr.strip().splitlines())[-1]
    raise ValueError(
      f"npm {arguments[0]} failed with exit code {done.returncode}: {last}; {remedy}"
    )
  return done.stdout


def convert(source: Path, output: Path) -> dict[str, Any]:
  """Convert a package according to the flags; return the summary.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  package = icon_sets.Package(source)
  held_out = tuple(dict.fromkeys(_HELD_OUT.value))
  outputs.check_names(output, (SUMMARY, NAMES, LICENCES))
  with tempfile.TemporaryDirectory() as folder:
    plan = icon_shards.Plan(Path(folder), _SHARDS.value, held_out)
    sets = _plan(package, plan, held_out)
    recipe = {
      "kind": "icons",
      "version": VERSION,
      "package": f"@iconify/json {package.version}",
      "digest": package.digest,
      "image_size": _SIZE.value,
      "excluded": sorted(set(_EXCLUDED.value)),
      "held_out": sorted(held_out),
    }
    shards = icon_shards.Shards(folder, _SIZE.value)
    summaries = {"train": _write(output / "train", {"train": _SHARDS.value}, shards, recipe, plan)}
    recipe |= {
      "train": summaries["train"].fingerprints["train"],
      "copy_correlation": icon_copies.COPY_CORRELATION,
    }
    train = _train_icons(output, recipe)
    if train:
      icon_shards.save_vectors(train, Path(folder))
    shards = dataclasses.replace(shards, train=folder)
    heldout = dict.fromkeys(held_out, 1)
    summaries["heldout"] = _write(output / "heldout", heldout, shards, recipe, plan)
  found = list(icon_shards.records(str(output / "heldout" / "*.tfrecord")))
  names = icon_shards.common_names(found, plan.sets_of_text, _NAMES.value)
  select = icon_shards.NamingShards(str(output / "heldout" / "*.tfrecord"), names)
  recipe |= {"names": names}
  summaries["naming"] = _write(output / "naming", {"naming": 1}, select, recipe, plan)
  _write_json(output / NAMES, {name: [name] for name in names})
  if train:
    _summarize(
      output, package, recipe, summaries, sets, train, icon_copies.small_icons(found), names
    )
  summary: dict[str, Any] = json.loads((output / SUMMARY).read_bytes())
  return summary


def _train_icons(output: Path, recipe: Mapping[str, Any]) -> icon_copies.SmallIcons | None:
  """Return the training icons for comparisons; None if the summary of this recipe exists."""
  with contextlib.suppress(OSError, ValueError, LookupError):
    stored = json.loads((output / SUMMARY).read_bytes())["recipe"]
    complete = (output / "heldout" / writer.MANIFEST).exists()
    if complete and {name: stored[name] for name in recipe} == dict(recipe):
      return None
  print("comparing the pixels of held-out and training icons", file=sys.stderr)
  return icon_copies.small_icons(
    icon_shards.records(str(output / "train"), keys=("jpg", "txt", "key"))
  )


def _plan(
  package: icon_sets.Package, plan: icon_shards.Plan, held_out: Sequence[str]
) -> list[icon_sets.IconSet]:
  """Add all sets to the plan; return them without icons.

  Raises:
    ValueError: if a held-out set does not exist, or nothing is left for training.
  """
  print("reading the sets", file=sys.stderr)
  sets = []
  for found in package.sets(frozenset(_EXCLUDED.value)):
    plan.add(found)
    sets.append(found._replace(icons=[], skips=[]))
  if missing := set(held_out) - plan.icons.keys():
    raise ValueError(
      f"--held_out={','.join(sorted(missing))} is not among the {len(sets)} sets with a permissive "
      "licence; name other sets"
    )
  if not held_out or not plan.icons.keys() - set(held_out):
    raise ValueError(
      f"--held_out names {len(held_out)} of {len(sets)} sets; expected at least one, and others "
      "for training"
    )
  return sets


def _write(
  output: Path,
  shards: Mapping[str, int],
  make_shard: writer.MakeShard,
  recipe: Mapping[str, Any],
  plan: icon_shards.Plan,
) -> writer.Summary:
  with progress.Counter(f"rendering {output.name}", plan.total(shards)) as counter:
    summary = writer.write_dataset(
      output,
      shards,
      make_shard,
      recipe,
      workers=common_flags.WORKERS.value,
      progress=counter,
      overwrite=common_flags.OVERWRITE.value,
    )
  print(summary, file=sys.stderr)
  return summary


def _summarize(
  output: Path,
  package: icon_sets.Package,
  recipe: Mapping[str, Any],
  summaries: Mapping[str, writer.Summary],
  sets: Sequence[icon_sets.IconSet],
  train: icon_copies.SmallIcons,
  heldout: icon_copies.SmallIcons,
  names: Sequence[str],
) -> None:
  """Write licences.md and summary.json."""
  counts = {"train": Counter(train.sets), "heldout": Counter(heldout.sets)}
  table = icon_shards.license_table(sets, counts)
  fs.write_atomic(str(output / LICENCES), table.encode())
  baseline = {"heldout": icon_baseline.text_to_image(heldout, train)}
  for name in recipe["held_out"]:
    baseline[name] = icon_baseline.text_to_image(heldout.of_set(name), train)
  baseline["naming"] = [icon_baseline.naming(heldout, train, names)]
  summary = {
    "recipe": recipe,
    "examples": {name: found.examples for name, found in summaries.items()},
    "skipped": {name: found.skipped for name, found in summaries.items()},
    "other licences": dict(sorted(package.other_licenses.items())),
    "nearest-pixel baseline": {
      split: [dataclasses.asdict(result) for result in results]
      for split, results in baseline.items()
    },
  }
  _write_json(output / SUMMARY, summary)


def _write_json(path: Path, content: Any) -> None:
  fs.write_atomic(str(path), (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
  run_app(main)
