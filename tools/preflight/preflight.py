"""Estimate memory, collectives, step time and duration of a training run without its hardware.

  bazel run //tools/preflight -- --config=apps/configs/openvision2.py:img=L/14,res=224
      --topology=v4-512 [--find_batch] [--compare=OTHER_CONFIG] [--json=FILE]

Compiles the train step of every stage for TPUs that need not be present (the compiler is installed
by OV_EXTRAS=tpu); --topology=here compiles for this machine. Step times are lower bounds.
"""

import functools
from pathlib import Path
import sys
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from apps.configs import base
from apps.trainer.errors import UserError, run_app, user_errors
from apps.trainer.run_config import RunConfig

if TYPE_CHECKING:
  from tools.preflight.assess import Assessment
  from tools.preflight.topology import Target

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, 'TPU slice such as v4-512, GPUs such as h100-8, or "here".'
)
_SLICES = flags.DEFINE_integer("slices", 1, "How many such slices work together.")
_FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Search the largest batch that fits.")
_COMPARE = flags.DEFINE_multi_string(
  "compare", [], "Another configuration to show; --config.NAME=VALUE apply to it, too."
)
_JSON = flags.DEFINE_string("json", None, "File to write the numbers to.")
_MFU = flags.DEFINE_float("mfu", None, "Measured MFU, for times; default: the roofline bound.")


def main() -> None:
  if _CONFIG.value is None or not _TOPOLOGY.value:
    raise UserError("give --config=apps/configs/NAME.py and --topology=v4-512 or --topology=here")
  if _MFU.value is not None and not 0 < _MFU.value <= 1:
    raise UserError(f"--mfu={_MFU.value}; expected a fraction above 0, at most 1")
  out = Path(_JSON.value).expanduser() if _JSON.value else None
  if out and (out.is_dir() or not out.parent.is_dir()):  # validated before the compiler runs
    raise UserError(f"--json={_JSON.value}; expected a file in a folder that exists")
  from tools.preflight import topology  # cheap, except for the devices of this machine

  with user_errors():
    _CONFIG.value.lock()  # raises if the file could not be loaded
    configs = [base.resolve(_CONFIG.value), *map(_load, _COMPARE.value)]
    if _TOPOLOGY.value != "here":
      topology.prepare_environment()
    target = topology.target(_TOPOLOGY.value, _SLICES.value)
  names = [config_flags.get_config_filename(flags.FLAGS["config"]), *_COMPARE.value]
  found: list[Assessment] = []
  for number, (name, config) in enumerate(zip(names, configs, strict=True), 1):
    title = f"{number}:{Path(name.partition(':')[0]).stem}/" if len(names) > 1 else ""
    with user_errors():
      found += _assess(config, title, target)
  _print(found, target)
  if out is not None:
    from tools.preflight import report

    with user_errors():
      out.write_text(report.to_json(found), encoding="utf-8")


def _print(found: "list[Assessment]", target: "Target") -> None:
  from tools.preflight import report, topology

  if not topology.can_compile(target):
    print(f"nothing was compiled: {topology.why_not(target)}\n")
  print(report.table(found))
  for one in found:
    print(f"\n{report.details(one)}")
  print(f"\n{report.assumptions(found[0], _MFU.value)}")
  if len(_COMPARE.value) == 0 and (line := report.totals(found)):
    print(line)


def _assess(config: RunConfig, title: str, target: "Target") -> "list[Assessment]":
  """Assess each stage; if one does not fit, print settings that would make it fit."""
  # Import heavy modules only after the flags have been validated.
  from apps.trainer.config import check_values
  from apps.trainer.stages import resolve_stages
  from tools.preflight import assess, topology

  check_values(config)
  if _FIND_BATCH.value and (target.hbm is None or not topology.can_compile(target)):
    raise UserError(
      f"--find_batch: the memory of {target.name} is unknown, or nothing can be compiled for it "
      "here; give a TPU as --topology, with OV_EXTRAS=tpu, or --topology=here on its machine"
    )
  found = []
  for stage in resolve_stages(config):
    name = title + stage.name
    one = functools.partial(assess.assess, target=target, title=name, mfu=_MFU.value)
    if topology.can_compile(target):
      _log(f"{name}: compiling for {target.name}")
    if _FIND_BATCH.value:
      best = assess.find_batch(one, stage, target, _log)
      if best is None:
        raise UserError(f"{name}: not even the smallest batch fits {target.name}")
      found.append(best)
      continue
    found.append(one(stage))
    if found[-1].fits is False:
      missing = found[-1].numbers["missing_bytes"]
      print(
        f"{name} does not fit {target.name}: {missing / 1e9:,.2f} GB are missing. Tried instead:"
      )
      for setting, result in assess.remedies(one, stage, target):
        print(f"  {setting}: {_outcome(result)}", flush=True)
      print()
  return found


def _outcome(result: "Assessment") -> str:
  numbers = result.numbers
  if result.fits:
    return f"fits, peak {numbers['peak_bytes_per_device'] / 1e9:,.2f} GB"
  return f"still {numbers['missing_bytes'] / 1e9:,.2f} GB too large"


def _load(name: str) -> RunConfig:
  """Return a configuration to compare, with the same command line changes as the first."""
  from tools.preflight import configs

  try:
    config = configs.load(name)
    config.lock()
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
    return base.resolve(config)
  except (LookupError, TypeError, ValueError) as error:
    raise ValueError(f"--compare={name}: {error}") from error


def _log(text: str) -> None:
  print(f"[preflight] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
  run_app(main)
