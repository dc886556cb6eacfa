"""Random models of other libraries, created and run by the library, to compare imports with."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ov_convert import client_env
from ov_convert.release import Config, Params
import ov_models

# Runs in the environment of the clients: argv is the folder. specs.json lists the models,
# NAME.inputs.npz has pixels and ids. Writes a folder for each model, and NAME.npz with its outputs.
_SCRIPT = """
import json, pathlib, sys
import numpy as np
import torch

root = pathlib.Path(sys.argv[1])
specs = json.loads((root / "specs.json").read_text())


def create(spec):
  kind, fields = spec["kind"], spec["fields"]
  if spec["library"] == "transformers":
    import transformers as t
    config_class = getattr(t, kind.replace("WithProjection", "").removesuffix("Model") + "Config")
    if "text_config" in fields and "vision_config" in fields:
      fields = dict(fields)
    return getattr(t, kind)._from_config(config_class(**fields), attn_implementation="eager")
  if spec["library"] == "timm":
    import timm
    return timm.create_model(kind, pretrained=False, num_classes=0, **fields)
  import open_clip
  return getattr(open_clip.model, kind)(**fields)


def randomise(model, seed):
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      scale = "norm" in name or "ln_" in name
      p.normal_(0, spec["std"] if p.ndim > 1 else 0.1)
      if p.ndim == 1 and scale and name.endswith("weight"):
        p.add_(1)
    for name, p in model.named_parameters():
      if name.endswith("logit_scale"):
        p.fill_(1.5)
      if name.endswith("trunk.head.bias"):  # 0 in published models
        p.zero_()


class Blocks:
  def __init__(self, tower, depth):
    lists = [m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    lists += [m for m in tower.modules() if isinstance(m, torch.nn.Sequential) and len(m) == depth
              and "Block" in type(m[0]).__name__]
    self.states = []
    blocks = lists[0]
    blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)
    for block in blocks:
      block.register_forward_hook(self.leave)

  def enter(self, module, args, kwargs):
    self.states = [args[0] if args else kwargs["hidden_states"]]

  def leave(self, module, args, output):
    self.states.append(output[0] if isinstance(output, tuple) else output)


def towers(model, library):
  if library == "transformers":
    return getattr(model, "vision_model", model), getattr(model, "text_model", None)
  if library == "timm":
    return model, None
  return model.visual, getattr(model, "text", None) or model.transformer


def run(model, spec, pixels, ids):
  image, text = towers(model, spec["library"])
  out = {}
  hooks = {"image": Blocks(image, spec["depth"])}
  if text is not None:
    hooks["text"] = Blocks(text, spec["text_depth"])
  if spec["library"] == "transformers" and text is not None:
    mask = {"attention_mask": torch.ones_like(ids)} if spec.get("mask") else {}
    got = model(input_ids=ids, pixel_values=pixels, **mask)
    out["image/embedding"], out["text/embedding"] = got.image_embeds, got.text_embeds
    out["logits"] = got.logits_per_image
    out["image/pooled"] = image(pixel_values=pixels).pooler_output
  elif spec["library"] == "transformers":
    got = model(pixel_values=pixels)
    if (pooled := getattr(got, "pooler_output", None)) is not None:
      out["image/pooled"] = pooled
    if not spec["kind"].startswith("CLIP"):  # which normalises the cls token only
      out["image/normed"] = got.last_hidden_state
  elif spec["library"] == "timm":
    normed = model.forward_features(pixels)
    out["image/normed"] = normed
    out["image/pooled"] = model.forward_head(normed, pre_logits=True)
  else:
    out["image/embedding"] = model.encode_image(pixels, normalize=True)
    out["text/embedding"] = model.encode_text(ids, normalize=True)
    logits = model.get_logits(pixels, ids)
    out["logits"] = logits[0] if isinstance(logits, tuple) else logits
  for side, hook in hooks.items():
    for i, state in enumerate(hook.states):
      out[f"{side}/block_{i:02}"] = state
  return out


def save(model, spec):
  folder = root / spec["name"]
  if spec["library"] == "transformers":
    model.save_pretrained(folder)
    return
  from safetensors.torch import save_file
  folder.mkdir()
  state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
  if spec["library"] == "timm":
    save_file(state, folder / "model.safetensors")
    content = {"architecture": spec["kind"], "num_classes": 0, "model_args": spec["fields"],
               "pretrained_cfg": {k: v for k, v in model.pretrained_cfg.items()
                                  if k in ("input_size", "mean", "std", "interpolation")}}
    (folder / "config.json").write_text(json.dumps(content))
  else:
    save_file(state, folder / "open_clip_model.safetensors")
    content = {"model_cfg": spec["fields"], "preprocess_cfg": spec.get("preprocess", {})}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


for spec in specs:
  model = create(spec).eval()
  randomise(model, spec["seed"])
  save(model, spec)
  inputs = np.load(root / f"{spec['name']}.inputs.npz")
  pixels = torch.from_numpy(inputs["pixels"].transpose(0, 3, 1, 2).copy())
  ids = torch.from_numpy(inputs["ids"]) if "ids" in inputs else None
  with torch.no_grad():
    out = run(model, spec, pixels, ids)
  parameters = sum(p.numel() for p in model.parameters())
  np.savez(root / f"{spec['name']}.npz", parameters=np.array(parameters),
           **{k: v.numpy() for k, v in out.items()})
  del model, out
"""


def make(
  root: pathlib.Path, specs: Sequence[Mapping[str, Any]], inputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, np.ndarray]]:
  """Create, save and run random models.

  Args:
    root: folder; each model is saved in a sub-folder of its name.
    specs: models: name, library ("transformers", "timm" or "open_clip"), kind (class or name),
      fields (of its configuration), depth, text_depth, seed, std of matrices.
    inputs: pixels [B, S, S, 3] and, with a text tower, ids [B, T], by the name of the model.

  Returns:
    Outputs of the library by the name of the model, and the number of parameters.
  """
  full = [{"seed": 0, "std": 0.1, **spec} for spec in specs]
  (root / "specs.json").write_text(json.dumps(full), "utf-8")
  for name, arrays in inputs.items():
    np.savez(root / f"{name}.inputs.npz", allow_pickle=False, **arrays)
  # As in client_env: Bazel sets PYTHON* for our interpreter, not for that of the clients.
  kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  command = [str(client_env.find_python()), "-c", _SCRIPT, str(root)]
  env = kept | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return {spec["name"]: dict(np.load(root / f"{spec['name']}.npz")) for spec in full}


def outputs(config: Config, params: Params, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Return the outputs of our model by the names of `make`."""
  pixels, ids = jnp.asarray(arrays["pixels"]), arrays.get("ids")

  def compute(params: Params) -> dict[str, jax.Array]:
    model: Any = ov_models.bind(config, params)
    alone = isinstance(config, ov_models.ViTConfig)
    encoder = model if alone else model.encoder
    out = _blocks("image", encoder.hidden_states(pixels))
    out["image/normed"] = encoder.norm(encoder.hidden_states(pixels)[-1])
    out["image/pooled"] = encoder(pixels).pooled
    if alone or ids is None:
      return out
    image, text = model.encode_image(pixels), model.encode_text(jnp.asarray(ids))
    out |= _blocks("text", model.text.hidden_states(jnp.asarray(ids)))
    out |= {"image/embedding": image.unit, "text/embedding": text.unit}
    logits = jnp.exp(params["log_scale"]) * image.unit @ text.unit.T
    return out | {"logits": logits + params.get("bias", 0.0)}

  with jax.default_matmul_precision("highest"):
    return {k: np.asarray(v) for k, v in jax.jit(compute)(params).items()}


def largest_differences(
  ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Return the largest difference of each array of theirs, relative to its largest entry or 1."""
  return {
    name: float(np.abs(ours[name] - array).max() / max(1.0, np.abs(array).max()))
    for name, array in theirs.items()
    if name != "parameters"
  }


def _blocks(tower: str, states: jax.Array) -> dict[str, jax.Array]:
  return {f"{tower}/block_{i:02}": state for i, state in enumerate(states)}
