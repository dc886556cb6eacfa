"""Model card (README.md) of an exported folder: model, training, evaluation and usage.

Values from configs and data are escaped: they cannot break tables or add markup. Local paths and
secrets are removed.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import math
from pathlib import Path
import re
from typing import Any

import jinja2

from apps.exporter import snippets
from apps.exporter.formats.format import ExportFormat
from apps.exporter.formats.table import EXPORTS
from apps.exporter.plain_text import cell, clean
from apps.exporter.source import Source
from apps.trainer import report_text
from ov_convert.name_map import flatten, size
from ov_convert.release import Config, Preprocess, Release
from ov_eval import Result
import ov_models

_PARTS = {"encoder": "image tower", "text": "text tower", "decoder": "caption decoder"}
# Config values shown in the card, by dotted name.
_SHOWN_VALUES = (
  ("model.encoder", "image tower"), ("model.text", "text tower"), ("model.decoder", "decoder"),
  ("model.preset", "preset"), ("model.image_size", "image size"), ("model.dtype", "compute"),
  ("model.keep_ratio", "fraction of patches that the decoder sees"),
  ("loss.clip", "weight of the softmax loss"), ("loss.siglip", "weight of the sigmoid loss"),
  ("loss.caption", "weight of the caption loss"),
  ("model.caption_weight", "weight of the caption loss"),
  ("optimizer.learning_rate", "learning rate"), ("optimizer.schedule.kind", "schedule"),
  ("optimizer.schedule.warmup_steps", "warm-up steps"), ("optimizer.weight_decay", "weight decay"),
  ("optimizer.b1", "beta 1"), ("optimizer.b2", "beta 2"),
  ("optimizer.grad_clip_norm", "gradient clipping norm"),
  ("optimizer.ema_decay", "decay of the averaged weights"),
  ("input.data_dir", "data"), ("input.sources", "sources"), ("input.split", "split"),
  ("input.keep_list", "keep-list"),
  ("input.caption_keys", "captions"), ("input.alt_keys", "short texts"), ("input.fit", "pictures"),
  ("seed", "seed"),
)  # fmt: skip
_PLAIN_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PAPERS = (
  ("OpenVision", "https://arxiv.org/abs/2505.04601"),
  ("OpenVision 2", "https://arxiv.org/abs/2509.01644"),
)


@dataclasses.dataclass(frozen=True)
class CardFacts:
  """Input of a model card.

  Attributes:
    kind: format of //apps:export.
    release: exported model; its parameters are not read.
    license: license identifier such as "apache-2.0"; "" if none was given.
    about: metadata of the run: config (nested), stage, step, examples_seen, versions, fingerprint
      (of the data); or "imported": {"from": name, "notes": lines}.
    tokenizer: fingerprint of the tokenizer; "" without one.
    results: rows as written by `ov_eval.write_results`, each with `split`.
    parity: content of parity.json: rows, versions, date, pictures, texts.
  """

  kind: str
  release: Release
  license: str
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: str = ""
  results: Sequence[Mapping[str, Any]] = ()
  parity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def format(self) -> ExportFormat:
    """The format `kind`."""
    return EXPORTS[self.kind]


def facts_of(kind: str, source: Source, parity: Mapping[str, Any], license_name: str) -> CardFacts:
  """Return the facts of one format of an export; `parity` is the content of its parity.json."""
  texts = source.processor or source.tokenizer
  fingerprint = texts.fingerprint if texts else ""
  return CardFacts(
    kind, source.release, license_name, source.about, fingerprint, source.results, parity
  )


def write_card(folder: Path, facts: CardFacts) -> None:
  """Write README.md into a folder of one format."""
  page = render(facts)
  (folder / "README.md").write_text(page, "utf-8", errors="backslashreplace")


def render(facts: CardFacts) -> str:
  """Return the card as Markdown with a YAML header."""
  release = facts.release
  imported = facts.about.get("imported") or {}
  about, config = facts.about, clean(facts.about.get("config") or {})
  return _template().render(
    header=_header(facts),
    title=_title(release, about),
    library=facts.format.title,
    holds=_holds(facts),
    leaves_out=_leaves_out(facts),
    notes=_notes(facts),
    parts=_parts(release),
    model=_model(facts),
    imported=clean({k: v for k, v in imported.items() if k != "citation"}),
    citation=str(imported.get("citation") or ""),
    training=_training(facts, config),
    config="\n".join(f"{name}: {value}" for name, value in report_text.flat(config)),
    versions=about.get("versions") or {},
    results=[_result(row) for row in facts.results],
    evaluated_step=about.get("step"),
    parity=facts.parity,
    rows=[_parity_row(row) for row in facts.parity.get("rows", ())],
    accuracy=_accuracy(facts.parity.get("accuracy")),
    steps=_preprocessing(release.preprocess),
    own_preprocessing=facts.format.preprocesses,
    words=_words(facts),
    programs=snippets.snippets(facts.kind, release),
    folder=snippets.FOLDER,
    license=facts.license,
    papers=_PAPERS,
  )


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    keep_trailing_newline=True,
  )  # fmt: skip  # Markdown is escaped by `cell`
  environment.filters.update(cell=cell, fenced=_fenced)
  source = Path(__file__).with_name("card_template.md.j2").read_text("utf-8")
  return environment.from_string(source)


def _fenced(text: str) -> str:
  """Return a fenced block of literal text, with a fence longer than any run of backticks in it."""
  longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}text\n{text}\n{fence}"


def _header(facts: CardFacts) -> list[str]:
  """Return the header lines, which the hub reads."""
  texts = facts.release.text is not None and facts.format.texts
  captions = _can_caption(facts)
  if texts and facts.format.joint:
    task = "zero-shot-image-classification"
  else:
    task = "image-to-text" if captions else "image-feature-extraction"
  lines = []
  if _PLAIN_LICENSE.fullmatch(facts.license):
    lines.append(f"license: {facts.license}")
  elif facts.license:
    lines += ["license: other", f"license_name: {json.dumps(facts.license)}"]
  if library := facts.format.library:
    lines.append(f"library_name: {library}")
  tags = ["openvision", "vision", *(["clip"] if texts else []), *(["captioning"] * captions)]
  return [*lines, f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags)]


def _title(release: Release, about: Mapping[str, Any]) -> str:
  encoder = release.encoder
  if name := clean(about.get("imported") or {}).get("name"):
    tuned = ", fine-tuned" if about.get("config") else ""
    return f"{name}{tuned}, {encoder.image_size} px"
  sizes = (encoder.width, encoder.depth, encoder.mlp_dim, encoder.num_heads)
  variants = {values: name for name, values in ov_models.VIT_VARIANTS.items()}
  name = variants.get(sizes, f"ViT of width {encoder.width} and {encoder.depth} layers, patch ")
  joint = "/" if sizes in variants else ""
  return f"OpenVision {name}{joint}{encoder.patch_size}, {encoder.image_size} px"


def _included_parts(facts: CardFacts) -> list[str]:
  """Return the keys of `_PARTS` that this folder contains."""
  config, form = facts.release.config, facts.format
  included = ["encoder"]
  if facts.release.text is not None and form.texts:
    included.append("text")
  any_decoder = getattr(config, "decoder", None) is not None
  if any_decoder if form.decoder == "any" else _can_caption(facts):
    included.append("decoder")
  return included


def _can_caption(facts: CardFacts) -> bool:
  """Return whether this folder can generate captions."""
  return facts.format.decoder != "none" and snippets.can_caption(facts.release)


def _holds(facts: CardFacts) -> str:
  return _join_names(_PARTS[part] for part in _included_parts(facts))


def _leaves_out(facts: CardFacts) -> str:
  config, included = facts.release.config, _included_parts(facts)
  missing = [part for part in ("text", "decoder") if part not in included]
  return _join_names(_PARTS[part] for part in missing if getattr(config, part, None) is not None)


def _notes(facts: CardFacts) -> list[str]:
  """Return sentences on unexpected behavior of a folder."""
  release, form = facts.release, facts.format
  notes = [*form.notes(release, facts.parity), form.sizes(release)]
  if release.dtype != "float32":
    notes.append(f"The files contain {release.dtype}; the programs below compute in float32.")
  return notes


def _join_names(names: Iterable[str]) -> str:
  *before, last = list(names) or [""]
  return f"{', '.join(before)} and {last}" if before else last


def _parts(release: Release) -> list[tuple[str, ...]]:
  """Return the rows of the table of towers."""
  counts = dict(_counts(release.config))
  configs = {"encoder": release.encoder, "text": release.text}
  configs["decoder"] = getattr(release.config, "decoder", None)
  rows = []
  for part, config in configs.items():
    if config is not None:
      numbers = (config.width, config.depth, config.num_heads, config.mlp_dim, counts.pop(part))
      rows.append((_PARTS[part], *(f"{n:,}" for n in numbers), _behaviour(part, config)))
  if counts:
    rest = f"{sum(counts.values()):,}"
    rows.append(("heads, temperature", "", "", "", "", rest, ""))
  return rows


@functools.cache
def _counts(config: Config) -> Mapping[str, int]:
  """Return the number of parameters of each part."""
  counts: dict[str, int] = {}
  for path, leaf in flatten(ov_models.abstract_params(config)).items():
    part = "encoder" if isinstance(config, ov_models.ViTConfig) else path.split("/")[0]
    counts[part] = counts.get(part, 0) + size({path: leaf})
  return counts


def _behaviour(part: str, config: Any) -> str:
  if part == "encoder":
    pool = {
      "gap": "mean of the patches", "mean": "mean of the patches", "tok": "[CLS]",
      "last": "last patch", "map": "attention", "attend": "attention",
    }[config.pool]  # fmt: skip
    positions = [config.position, *([f"rotary {config.rotary}"] * (config.rotary != "none"))]
    shown = " and ".join(name for name in positions if name != "none")
    return f"patch {config.patch_size}, positions {shown}, pooled by {pool}"
  if part == "text":
    seen = "padding attended" if config.padding == "attend" else "padding masked"
    return f"{config.max_len} tokens, mask {config.mask}, pooled {config.pool}, {seen}"
  if isinstance(config, ov_models.QueryDecoderConfig):
    return f"{config.num_queries} learned queries, {config.vocab_size:,} words"
  return (
    f"up to {config.max_len} tokens, mask {config.mask}, positions {config.position}, "
    f"{config.vocab_size:,} words"
  )


def _model(facts: CardFacts) -> list[tuple[str, str]]:
  release, config = facts.release, facts.release.config
  rows = [
    ("parameters of the full model", f"{sum(_counts(config).values()):,}"),
    ("image size", f"{release.encoder.image_size} x {release.encoder.image_size} px"),
    ("dtype of the files", facts.parity.get("weights", release.dtype)),
  ]
  if isinstance(config, ov_models.VisionLanguageConfig) and config.text is not None:
    rows.insert(1, ("width of the shared space", f"{config.embed_dim:,}"))
  return rows


def _training(facts: CardFacts, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
  about = facts.about
  if not config:
    return []
  values = {"step": about.get("step"), "stage": about.get("stage")}
  batch, step = config.get("batch_size"), about.get("step")
  values["batch size"] = batch
  seen = about.get("examples_seen") or next((r.get("examples_seen") for r in facts.results), None)
  if seen is None and batch and step and not config.get("stages"):
    seen = batch * step
  values |= {"samples seen": seen, "fingerprint of the data": about.get("fingerprint")}
  flat = dict(report_text.flat(config))
  for name, label in _SHOWN_VALUES:
    if name in flat:
      value = json.loads(flat[name])
      if value or not name.startswith("loss."):  # omit losses of weight 0
        values[label] = value
  values["weight of the trained parameters (WiSE-FT)"] = about.get("wise_ft")
  values["fingerprint of the tokenizer"] = facts.tokenizer
  return [(name, _joined(v)) for name, v in values.items() if v not in (None, "", [], {})]


def _joined(value: Any) -> Any:
  if isinstance(value, list):
    return ", ".join(v if isinstance(v, str) else json.dumps(v) for v in value)
  return value


def _result(row: Mapping[str, Any]) -> tuple[str, ...]:
  """Return evaluator, split, metric, value, interval, n and further context."""
  context = dict(row.get("context") or {})
  low, high = row.get("interval") or (None, None)
  value = math.nan if row["value"] is None else row["value"]
  result = Result(row["name"], value, row["count"], low, high, row.get("unit") or "")
  split = context.pop("split", row.get("split", ""))
  evaluator = str(context.pop("evaluator", "")).replace("_", " ")
  rest = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in clean(context).items())
  return (
    evaluator, str(clean(split)), report_text.label(result.name), report_text.figure(result),
    report_text.interval(result), f"{result.count:,}", rest,
  )  # fmt: skip


def _parity_row(row: Mapping[str, Any]) -> tuple[str, ...]:
  verdict = "yes" if row["ok"] else row.get("problem") or "no"
  cosine, largest = row.get("cosine"), _number(row.get("max_abs"))
  if row.get("measured", row.get("max_abs")) != row.get(
    "max_abs"
  ):  # pixels are compared by their mean
    largest = f"{largest} (mean {_number(row.get('measured'))})"
  return (
    row["name"], largest, "" if cosine is None else f"{cosine:.7f}",
    _number(row.get("tolerance")), verdict,
  )  # fmt: skip


def _accuracy(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
  """Return the table of the accuracy of converted weights; empty without a conversion."""
  if found is None:
    return []
  rows = []
  for tower, count in found["count"].items():
    lowest, mean = found["min_cosine"][tower], found["mean_cosine"][tower]
    rows.append((f"smallest cosine of {count} {tower} embeddings", f"{lowest:.5f}"))
    rows.append((f"mean cosine of the {tower} embeddings", f"{mean:.5f}"))
  if found["overlap"] is not None:
    rows.append(("overlap of the 10 nearest images", f"{found['overlap']:.1%}"))
  if found["zero_shot_agreement"] is not None:
    label = f"images with the same zero-shot class, out of {found['count']['text']} texts"
    rows.append((label, f"{found['zero_shot_agreement']:.1%}"))
  size, before = found["size"], found["float32_size"]
  rows.append(("size of the graphs", f"{size / before:.0%} of {before / 1e6:.1f} MB"))
  for tower, speed in found["speed"].items():
    rows.append((f"speed of the {tower} tower on the exporting CPU", f"{speed:.2f}x"))
  return rows


def _number(value: float | None) -> str:
  if value is None or not math.isfinite(value):
    return "not finite"
  return f"{value:.2g}"


def _preprocessing(pre: Preprocess) -> list[str]:
  side = f"{pre.image_size}"
  fit = {
    "squash": f"resize the image to {side} x {side} pixels",
    "center": f"resize the shorter side to {side} pixels, crop the center {side} x {side}",
  }[pre.fit]
  mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (pre.mean, pre.std))
  return [
    "decode the first frame; keep the upper 8 bits of 16-bit gray; compose transparent pixels over "
    "white; convert to RGB; rotate by the EXIF orientation",
    f"{fit}; {pre.interpolation}, antialiased, computed in float32, truncated to integers",
    f"divide by 255, subtract the mean ({mean}), divide by the standard deviation ({std})",
  ]


def _words(facts: CardFacts) -> str:
  words, text = facts.release.words, facts.release.text
  if words is None:
    return ""
  begin = "" if words.bos_id is None else "[bos] "
  shape = f"{begin}pieces [eos]" + (" padding [CLS]" if words.append_cls else " padding")
  whose = "Texts" if text is not None else "Captions"
  return (
    f"{whose} are {shape}, truncated or padded to {words.length} tokens; [eos] is {words.eos_id}, "
    f"padding {words.pad_id}"
    + ("" if words.bos_id is None else f", [bos] {words.bos_id}")
    + (f", [CLS] {words.cls_id}" if words.append_cls else "")
  )
