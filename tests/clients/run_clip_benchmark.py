"""Run CLIP_benchmark on drawn data sets, in the clients' environment.

    run_clip_benchmark.py evaluate MODEL DATA OUTPUT
    run_clip_benchmark.py functions ARRAYS OUTPUT

MODEL is an exported folder of open_clip, DATA a folder written by `drawn_benchmarks`, and OUTPUT a
folder that receives the JSON file of each data set. Images and texts go through the library's own
transform and tokenizer. ARRAYS is an .npz file with arguments of the library's metrics; the second
form writes their values and the library's collections of data sets as JSON.
"""

import builtins
import json
from pathlib import Path
import sys
import types

import numpy as np
from PIL import Image
import torch

# The captioning task requires pycocoevalcap (100 MB), which no other task uses.
sys.modules["clip_benchmark.metrics.captioning"] = types.ModuleType("captioning")
from clip_benchmark import cli  # noqa: E402
from clip_benchmark.datasets.builder import (  # noqa: E402
  dataset_collection,
  image_captions_collate_fn,
)
from clip_benchmark.metrics import (  # noqa: E402
  image_caption_selection,
  zeroshot_classification,
  zeroshot_retrieval,
)
from clip_benchmark.models import load_clip  # noqa: E402

# CLIP_benchmark converts arrays of one element with float(), which NumPy 2.4 rejects.
zeroshot_classification.float = lambda value: builtins.float(np.squeeze(value))


class _Winoground(torch.utils.data.Dataset):
  """Winoground from files; the library reads it with a package that this environment lacks."""

  def __init__(self, folder, transform):
    self._folder, self._transform = folder, transform
    lines = (folder / "examples.jsonl").read_text().splitlines()
    self._rows = [json.loads(line) for line in lines]

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    row = self._rows[index]
    files = [self._folder / "images" / f"{row[key]}.png" for key in ("image_0", "image_1")]
    images = [self._transform(Image.open(file)) for file in files]
    return torch.stack(images), [row["caption_0"], row["caption_1"]]


def _winoground(model, folder, output):
  loaded, transform, tokenizer = load_clip("open_clip", model, "unused", None, "cpu")
  loaded.eval()
  loader = torch.utils.data.DataLoader(
    _Winoground(folder, transform), batch_size=8, collate_fn=image_captions_collate_fn
  )
  metrics = image_caption_selection.evaluate(loaded, loader, tokenizer, "cpu", amp=False)
  output.write_text(json.dumps({"dataset": "winoground", "metrics": metrics}))


def functions(arrays: Path, output: Path) -> None:
  """Write the values of the library's metrics, and its collections."""
  with np.load(arrays) as file:
    given = {name: torch.from_numpy(file[name]) for name in file.files}
  scores, labels = given["scores"], given["labels"]
  pairs = given["similarity"], given["positive"]
  found = {
    "average_precision": zeroshot_classification.average_precision_per_class(
      scores, given["targets"]
    ).tolist(),
    "accuracy": zeroshot_classification.accuracy(scores, labels, (1, 5)),
    "image_recall": [(zeroshot_retrieval.recall_at_k(*pairs, k) > 0).tolist() for k in (1, 5, 10)],
    "text_recall": [
      (zeroshot_retrieval.recall_at_k(*(pair.T for pair in pairs), k) > 0).tolist()
      for k in (1, 5, 10)
    ],
    "collections": dataset_collection,
  }
  output.write_text(json.dumps(found))


def evaluate(model: str, data: Path, output: Path) -> None:
  """Write the results of every data set."""
  for entry in json.loads((data / "list.json").read_text()):
    name, folder, task = entry["name"], data / entry["folder"], entry["task"]
    file = output / (name.replace("/", "-") + ".json")
    if name == "winoground":
      _winoground(model, folder, file)
      continue
    prefix = "" if name.startswith("sugar_crepe") else "wds/"
    sys.argv = [
      "clip_benchmark", "eval", "--model", model, "--pretrained", "unused",
      "--dataset", prefix + name, "--dataset_root", str(folder), "--task", task,
      "--recall_k", "1", "5", "10", "--num_workers", "0", "--batch_size", "16", "--no_amp",
      "--output", str(file), "--quiet",
    ]  # fmt: skip
    cli.main()


if __name__ == "__main__":
  if sys.argv[1] == "functions":
    functions(Path(sys.argv[2]), Path(sys.argv[3]))
  else:
    evaluate(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
