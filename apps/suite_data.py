"""Data sets of a benchmark suite: where they are, and their images, labels, classes and prompts."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from apps.trainer.held_out import Examples, HeldOut
from apps.trainer.run_config import EvalSettings
import ov_data
from ov_data import benchmark_tars, fs, tfds
import ov_eval
from ov_eval import BenchmarkSet

SPLIT = "test"
_CHECKED_RECORDS = 256  # number of evenly spaced records whose labels are checked at the start
_MAX_LIST_BYTES = 1 << 20  # of classnames.txt and the templates
_CLASSES, _TEMPLATES, _TYPE = (
  "classnames.txt",
  "zeroshot_classification_templates.txt",
  "dataset_type.txt",
)


@dataclasses.dataclass(frozen=True)
class _Tfds:
  """A data set in TensorFlow Datasets: its name, split and label."""

  name: str
  split: str = "test"
  label: str = "label"
  own_names: bool = False  # class names of TFDS, although clip-benchmark has a list


# The test splits of VTAB. The labels of its other data sets are computed from several features, or
# (dsprites) their pixels are not in [0, 255]; these require tars.
_TFDS = {
  "vtab/caltech101": _Tfds("caltech101"),
  "vtab/cifar10": _Tfds("cifar10"),
  "cifar10": _Tfds("cifar10"),
  "vtab/cifar100": _Tfds("cifar100"),
  "vtab/diabetic_retinopathy": _Tfds("diabetic_retinopathy_detection/btgraham-300"),
  "vtab/dmlab": _Tfds("dmlab"),
  "vtab/dtd": _Tfds("dtd"),
  "vtab/eurosat": _Tfds("eurosat/rgb", "train[80%:]"),
  "vtab/flowers": _Tfds("oxford_flowers102", own_names=True),
  "vtab/pets": _Tfds("oxford_iiit_pet"),
  "vtab/pcam": _Tfds("patch_camelyon"),
  "vtab/resisc45": _Tfds("resisc45", "train[80%:]"),
  "vtab/smallnorb_label_azimuth": _Tfds("smallnorb", "test[50%:]", "label_azimuth"),
  "vtab/smallnorb_label_elevation": _Tfds("smallnorb", "test[50%:]", "label_elevation"),
  "vtab/svhn": _Tfds("svhn_cropped"),
}


@dataclasses.dataclass(frozen=True)
class OpenSet:
  """An opened data set of a suite.

  Attributes:
    data_set: description of the data set.
    examples: the images of its test split.
    layout: "wds", "tfds" or "list".
    label_key: feature of the labels, for classification.
    classes: class names in order of label, for classification.
    templates: templates with `{c}` for the class name, for classification.
    multilabel: whether an image may have several labels.
  """

  data_set: BenchmarkSet
  examples: Examples
  layout: str
  label_key: str = ""
  classes: tuple[str, ...] = ()
  templates: tuple[str, ...] = ()
  multilabel: bool = False

  @property
  def dataset(self) -> ov_data.Dataset:
    """The records of the images."""
    return self.examples.loader.datasets[0]


def open_suite(held_out: HeldOut) -> tuple[list[OpenSet], list[str]]:
  """Open the data sets of the suite of `config.eval` that are present.

  Returns:
    The data sets, and the names of those that are missing.

  Raises:
    ValueError: the folder or all data sets are missing, a requested name is not in the suite, or a
      data set is invalid.
  """
  config = held_out.config.eval
  wanted = _wanted(config)
  root = os.path.expanduser(config.suite_dir)
  if not root:
    raise ValueError(
      f"config.eval.suite={config.suite} requires config.eval.suite_dir, the folder that contains "
      "its data sets"
    )
  if fs.is_remote(root):
    raise ValueError(
      f"config.eval.suite_dir={config.suite_dir} is remote; copy the data sets to a local folder"
    )
  if not fs.is_dir(root):
    raise ValueError(f"config.eval.suite_dir={config.suite_dir}: no such folder")
  opened: list[OpenSet] = []
  missing: list[str] = []
  for data_set in wanted:
    found = _open(held_out, root, data_set)
    if found is None:
      missing.append(data_set.name)
    else:
      opened.append(found)
  if not opened:
    raise ValueError(
      f"config.eval.suite_dir={config.suite_dir} contains none of the {len(wanted)} data sets of "
      f"{config.suite}; expected folders such as {_folders(wanted[0])[0]} with "
      f"{SPLIT}/{benchmark_tars.COUNT_FILE}"
    )
  return opened, missing


def _wanted(config: EvalSettings) -> Sequence[BenchmarkSet]:
  suite = ov_eval.SUITES[config.suite]
  by_name = {data_set.name: data_set for data_set in suite}
  for name in config.suite_datasets:
    if name not in by_name:
      suites = [suite for suite, sets in ov_eval.SUITES.items() if name in {s.name for s in sets}]
      raise ValueError(
        f"config.eval.suite_datasets: {name!r} is not a data set of {config.suite}, but of "
        f"{' and '.join(suites)}"
      )
  return [by_name[name] for name in config.suite_datasets] or suite


def _folders(data_set: BenchmarkSet) -> list[str]:
  """Return the folders that may contain a data set, in order of preference.

  DataComp writes wds_NAME_test, and the published tars of CLIP_benchmark are in wds_NAME.
  """
  names = [f.format(n) for n in data_set.folders for f in ("wds_{}_test", "wds_{}", "{}")]
  return [*names, data_set.name]


def _open(held_out: HeldOut, root: str, data_set: BenchmarkSet) -> OpenSet | None:
  """Open a data set; return None if it is missing."""
  examples = held_out.config.eval.suite_examples
  if data_set.kind in ("sugar_crepe", "winoground", "winogavil"):
    path = fs.join(root, data_set.folders[0])
    if data_set.kind == "sugar_crepe":
      path = fs.join(path, data_set.name.rpartition("/")[2] + ".json")
    if not fs.exists(path):
      return None
    found = held_out.open_path(
      path, "", examples=examples, format=data_set.kind, texts={}, captions="all",
      caption_keys=("txt",), extra_keys=("instance", "right"),
    )  # fmt: skip
    return OpenSet(data_set, found, "list")
  for name in _folders(data_set):
    folder = fs.join(root, name)
    if fs.exists(fs.join(fs.join(folder, SPLIT), benchmark_tars.COUNT_FILE)):
      return _open_tars(held_out, folder, data_set, examples)
  if data_set.name in _TFDS and (version := _tfds_folder(root, _TFDS[data_set.name].name)):
    return _open_tfds(held_out, version, data_set, examples)
  return None


def _open_tars(held_out: HeldOut, folder: str, data_set: BenchmarkSet, examples: int) -> OpenSet:
  kind = (_read_list(folder, _TYPE) or ("classification",))[0].lower()
  if (kind == "retrieval") != (data_set.kind == "retrieval"):
    raise ValueError(
      f"{folder}/{_TYPE}: {kind}, but {data_set.name} is a {data_set.kind} data set; convert it "
      "again"
    )
  if kind == "retrieval":
    found = held_out.open_path(
      folder, SPLIT, examples=examples, texts={}, captions="all", caption_keys=("txt",)
    )
    return OpenSet(data_set, found, "wds")
  multilabel = kind == "multilabel"
  key = "npy" if multilabel else "label"
  found = held_out.open_path(
    folder, SPLIT, examples=examples, texts={}, caption_keys=(), extra_keys=(key,)
  )
  classes = _read_list(folder, _CLASSES) or ov_eval.benchmark_classes(data_set)
  if classes is None:
    raise ValueError(
      f"{folder}/{_CLASSES} is missing, and clip-benchmark has no class names for {data_set.name}; "
      "download it, or write one name per line"
    )
  templates = _read_list(folder, _TEMPLATES) or ov_eval.benchmark_templates(data_set)
  return _checked(
    OpenSet(data_set, found, "wds", key, classes, templates, multilabel), f"{folder}/{_CLASSES}"
  )


def _open_tfds(held_out: HeldOut, path: str, data_set: BenchmarkSet, examples: int) -> OpenSet:
  spec = _TFDS[data_set.name]
  found = held_out.open_path(
    path, spec.split, examples=examples, image_key="image", texts={}, caption_keys=(),
    extra_keys=(spec.label,),
  )  # fmt: skip
  classes = None if spec.own_names else ov_eval.benchmark_classes(data_set)
  classes = classes or tfds.label_names(path, spec.label)
  templates = ov_eval.benchmark_templates(data_set)
  return _checked(OpenSet(data_set, found, "tfds", spec.label, classes, templates), path)


def _tfds_folder(root: str, name: str) -> str | None:
  """Return the folder of the newest version of a data set of TFDS; None if it is missing."""
  folder = fs.join(root, name)
  versions = [v for v in (fs.listdir(folder) if fs.is_dir(folder) else ()) if v[:1].isdigit()]
  there = [v for v in versions if fs.exists(fs.join(fs.join(folder, v), "dataset_info.json"))]
  newest = lambda version: [int(part) if part.isdigit() else 0 for part in version.split(".")]
  return fs.join(folder, max(there, key=newest)) if there else None


def _read_list(folder: str, name: str) -> tuple[str, ...] | None:
  """Return the lines of a file without outer white space; None if it does not exist."""
  path = fs.join(folder, name)
  if not fs.exists(path):
    return None
  try:
    text = fs.read_regular(path, _MAX_LIST_BYTES).decode("utf-8-sig")
  except UnicodeDecodeError:
    raise ValueError(f"{path} is not UTF-8; save it as UTF-8") from None
  lines = tuple(line.strip() for line in text.splitlines())
  if not lines:
    raise ValueError(f"{path} is empty; download it again")
  return lines


def _checked(opened: OpenSet, names: str) -> OpenSet:
  """Return the data set; raise ValueError if its labels or templates do not fit its class names.

  Args:
    opened: classification data set.
    names: file of the class names, for the message.
  """
  count = len(opened.classes)
  if bad := [template for template in opened.templates if "{c}" not in template]:
    raise ValueError(
      f"{names}: template {bad[0][:80]!r} of {opened.data_set.name} has no {{c}} for the class name"
    )
  if count < 2:
    raise ValueError(f"{names} has {count} class names; expected at least two")
  dataset = opened.dataset
  for record in np.linspace(0, len(dataset) - 1, min(len(dataset), _CHECKED_RECORDS)).astype(int):
    features: dict[str, Any] = dataset.features(int(record), (opened.label_key,))
    label = np.asarray(features.get(opened.label_key, ()))
    file, offset = dataset.locate(int(record))
    where = f"the sample at byte {offset} of {file}"
    if not label.size:
      raise ValueError(f"{where} has no label; every sample of {opened.data_set.name} needs one")
    if opened.multilabel and label.size != count:
      raise ValueError(f"{names} has {count} class names, and {where} has {label.size} labels")
    if not opened.multilabel and not 0 <= label[0] < count:
      raise ValueError(f"{names} has {count} class names, and {where} has the label {label[0]}")
  return opened
