"""Benchmark suites: their data sets, and the metric that represents each data set.

`clip_benchmark` contains the collections vtab+, retrieval and sugar_crepe of CLIP_benchmark, and
Winoground. `vtab` is its collection of that name (arXiv 1910.04867). `datacomp38` contains the
tasks of DataComp (arXiv 2304.14108) that have a main metric. Data sets and metrics have the names
of these projects.

The package clip-benchmark contains class names and templates. Only its JSON files are read: PyTorch
is not imported, and nothing is downloaded.
"""

from collections.abc import Mapping
import dataclasses
import importlib.util
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ov_eval.lists import read_json

Kind = Literal["classification", "retrieval", "sugar_crepe", "winoground", "winogavil"]


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups of the examples of a data set.

  Attributes:
    column: column of the metadata of an example that contains its group.
    worst: name of the accuracy of the worst group.
    prefix: name of the accuracy of a group, before the group number.
  """

  column: int
  worst: str
  prefix: str


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
  """A data set of a suite.

  Attributes:
    name: name in the suite, such as "vtab/caltech101".
    main: metric that represents the data set in the mean of the suite.
    kind: kind of task; a classification data set may have several labels per image.
    folders: names of its folder, without a prefix such as "wds_".
    groups: groups whose accuracies are metrics.
    top: an example of a group is correct if its class is among the `top` best.
    macro_f1: whether macro recall and F1 are metrics.
  """

  name: str
  main: str = "acc1"
  kind: Kind = "classification"
  folders: tuple[str, ...] = ()
  groups: tuple[Groups, ...] = ()
  top: int = 1
  macro_f1: bool = False

  def __post_init__(self) -> None:
    if not self.folders:
      object.__setattr__(self, "folders", (self.name.replace("/", "-"),))

  @property
  def lists(self) -> tuple[str, ...]:
    """Names under which class names and templates are looked up, in order of preference."""
    group, _, short = self.name.rpartition("/")
    return (f"{short}_vtab", short) if group == "vtab" else (self.name, short)


_VTAB = (
  "vtab/caltech101", "vtab/cifar100", "vtab/clevr_count_all",
  "vtab/clevr_closest_object_distance", "vtab/diabetic_retinopathy", "vtab/dmlab",
  "vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position", "vtab/dtd", "vtab/eurosat",
  "vtab/kitti_closest_vehicle_distance", "vtab/flowers", "vtab/pets", "vtab/pcam",
  "vtab/resisc45", "vtab/smallnorb_label_azimuth", "vtab/smallnorb_label_elevation", "sun397",
  "vtab/svhn",
)  # fmt: skip
_MORE = (
  "imagenet1k", "imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet",
  "fer2013", "voc2007", "cars", "fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211",
  "renderedsst2", "vtab/cifar10",
)  # fmt: skip
_SUGAR_CREPE = (
  "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
)  # fmt: skip
_DATACOMP = (
  "cifar10", "vtab/cifar100", "vtab/clevr_count_all", "vtab/clevr_closest_object_distance",
  "country211", "vtab/dtd", "vtab/eurosat", "food101", "gtsrb", "imagenet1k", "imagenet_sketch",
  "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "vtab/kitti_closest_vehicle_distance",
  "mnist", "objectnet", "voc2007", "vtab/pcam", "renderedsst2", "vtab/resisc45", "cars", "stl10",
  "sun397", "vtab/svhn",
)  # fmt: skip
_DATACOMP_MEAN = ("vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets")

# Columns of the metadata: camelyon17 hospital, slide, y; fmow region, year, y; dollar_street income
# (of Dollar Street), income, region; geode region, country. DataComp's code also counts the region
# "Other" of fmow.
_WITH_METADATA = (
  BenchmarkSet("wilds/iwildcam", "F1-macro_all", macro_f1=True),
  BenchmarkSet("wilds/camelyon17", groups=(Groups(1, "acc_wg", "acc_slide"),)),
  BenchmarkSet(
    "wilds/fmow",
    "acc_worst_region",
    groups=(
      Groups(0, "acc_worst_region", "acc_region"),
      Groups(1, "acc_worst_year", "acc_year"),
    ),
  ),
  BenchmarkSet(
    "fairness/dollar_street",
    "acc_top5_wg",
    folders=("dollar_street",),
    groups=(Groups(0, "acc_top5_wg", "acc_top5_income_ds"),),
    top=5,
  ),
  BenchmarkSet(
    "fairness/geode",
    "acc_wg",
    folders=("geode",),
    groups=(Groups(0, "acc_wg", "acc_region"),),
  ),
)


def _retrieval(name: str, main: str, *folders: str) -> BenchmarkSet:
  return BenchmarkSet(name, main, "retrieval", folders)


SUITES: Mapping[str, tuple[BenchmarkSet, ...]] = MappingProxyType(
  {
    "clip_benchmark": (
      *map(BenchmarkSet, (*_MORE, *_VTAB)),
      BenchmarkSet("voc2007_multilabel", "mean_average_precision"),
      *(
        _retrieval(name, "image_retrieval_recall@5")
        for name in ("mscoco_captions", "flickr8k", "flickr30k")
      ),
      *(
        BenchmarkSet(f"sugar_crepe/{part}", "acc", "sugar_crepe", ("sugar_crepe",))
        for part in _SUGAR_CREPE
      ),
      BenchmarkSet("winoground", "acc", "winoground"),
    ),
    "datacomp38": (
      *map(BenchmarkSet, _DATACOMP),
      *(BenchmarkSet(name, "mean_per_class_recall") for name in _DATACOMP_MEAN),
      _retrieval(
        "retrieval/flickr_1k_test_image_text_retrieval",
        "mean_recall@1",
        "flickr_1k_test_image_text_retrieval",
        "flickr30k",
      ),
      _retrieval(
        "retrieval/mscoco_2014_5k_test_image_text_retrieval",
        "mean_recall@1",
        "mscoco_2014_5k_test_image_text_retrieval",
        "mscoco_captions",
      ),
      BenchmarkSet("misc/winogavil", "jaccard_score_10-12", "winogavil", ("winogavil",)),
      *_WITH_METADATA,
    ),
    "vtab": tuple(map(BenchmarkSet, _VTAB)),
  }
)


def benchmark_classes(data_set: BenchmarkSet) -> tuple[str, ...] | None:
  """Return the class names of a data set in clip-benchmark, or None if it has none.

  Raises:
    ValueError: if clip-benchmark is not installed, or its file is malformed.
  """
  return _first(_read("en_classnames.json"), data_set.lists)


def benchmark_templates(data_set: BenchmarkSet) -> tuple[str, ...]:
  """Return the templates of a data set, with `{c}` for the class name.

  Data sets without own templates use those of ImageNet, as in CLIP_benchmark.

  Raises:
    ValueError: see `benchmark_classes`.
  """
  content = _read("en_zeroshot_classification_templates.json")
  found = _first(content, (*data_set.lists, "imagenet1k"))
  if found is None:
    raise ValueError("clip-benchmark has no templates for imagenet1k; its files have changed.")
  return found


def benchmark_prompts(classes: tuple[str, ...], templates: tuple[str, ...]) -> list[str]:
  """Return C * P prompts: every template filled with every class name, grouped by class."""
  return [template.replace("{c}", name) for name in classes for template in templates]


def _first(content: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...] | None:
  for name in names:
    if name in content:
      return tuple(content[name])
  return None


def _read(name: str) -> Mapping[str, Any]:
  """Return the content of a JSON file of clip-benchmark, without importing the package."""
  try:
    spec = importlib.util.find_spec("clip_benchmark")
  except ValueError:  # a module without a spec is in sys.modules
    spec = None
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "class names and templates of benchmark suites require clip-benchmark, which is not "
      "installed; pip install --no-deps clip-benchmark (PyTorch is not needed)."
    )
  file = Path(next(iter(spec.submodule_search_locations))) / "datasets" / name
  try:
    content = read_json(str(file))
  except OSError as error:
    raise ValueError(
      f"the installed clip-benchmark has no readable {name} ({error}); install 1.6.2 again."
    ) from error
  if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
    raise ValueError(f"{file}: expected an object of lists; install clip-benchmark 1.6.2 again.")
  return content
