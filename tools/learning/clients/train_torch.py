"""Train an exported model in PyTorch with the recipe of open_clip or timm.

  python train_torch.py SETTINGS.json

SETTINGS.json has the fields of a recipe, and: `model`, the exported folder; `batches`, the folder
of arrays; `order`, the summation order of the rows; `kernels`, "plain" for other kernels of
PyTorch; `dtype`; `stop`, the last step if earlier than the recipe's; `pad_id`; `out`, the file to
write. tools/learning/trained.py describes its arrays; weights of open_clip and timm keep their
names.

Each adapter builds model, loss and parameter groups as the library's own training script does:
`open_clip_train.main` and `train` (3.3.0), or the functions of timm that its train.py calls.
"""

import datetime
import json
import math
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
import torch.distributed as dist
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OpenClip(nn.Module):
  """Two towers of open_clip with ClipLoss or SigLipLoss."""

  inputs = ("image", "text")

  def __init__(self, s: dict[str, Any]) -> None:
    super().__init__()
    import open_clip
    from open_clip.loss import ClipLoss, SigLipLoss

    self.model, _ = open_clip.create_model_from_pretrained(f"local-dir:{s['model']}")
    rank = dist.get_rank() if dist.is_initialized() else 0
    kind = {"clip": ClipLoss, "siglip": SigLipLoss}[s["loss"]]
    self.loss = kind(rank=rank, world_size=s["processes"])

  def forward(self, image: Tensor, text: Tensor) -> Tensor:
    model = self.model
    vectors = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
    bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
    return self.loss(*vectors, model.logit_scale.exp(), **bias)

  @property
  def scale(self) -> Tensor:
    return self.model.logit_scale

  def outputs(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
    image = self.model.encode_image(data["image"], normalize=True)
    return {"image": image, "text": self.model.encode_text(data["text"], normalize=True)}

  def groups(self, decay: float) -> list[dict[str, Any]]:
    return decayed_as_in_open_clip(self.model, decay)

  def weights(self) -> dict[str, Tensor]:
    return dict(self.model.named_parameters())


class Twin(nn.Module):
  """Our exported captioner with the caption part of CoCaLoss."""

  inputs = ("image", "caption")
  scale = None

  def __init__(self, s: dict[str, Any]) -> None:
    super().__init__()
    from open_clip.loss import CoCaLoss

    sys.path.insert(0, s["model"])
    import openvision_torch

    self.module = openvision_torch
    self.model = openvision_torch.OpenVision.from_folder(s["model"])
    for parameter in self.model.parameters():
      parameter.requires_grad_(True)
    self.loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0, pad_id=s["pad_id"])
    self.pad_id = s["pad_id"]

  def logits(self, image: Tensor, ids: Tensor) -> Tensor:
    """Return logits [B, T, V] with teacher forcing; the exported module only generates."""
    model, decoder = self.model, self.model.decoder
    prefix = decoder.image_proj(model.encode_image(image).tokens)
    words = decoder.embed(ids) + decoder.position_embedding[: ids.shape[1]]
    x = torch.cat([prefix, words], 1)
    mask = self.module.attention_mask(x, "causal", prefix.shape[1])
    return decoder.head(decoder.norm(decoder.run(x, mask)[:, prefix.shape[1] :]))

  def forward(self, image: Tensor, caption: Tensor) -> Tensor:
    logits = self.logits(image, caption[:, :-1])
    return self.loss(None, None, logits, caption[:, 1:], None)[1]

  def outputs(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
    logits, labels = self.logits(data["image"], data["caption"][:, :-1]), data["caption"][:, 1:]
    nll = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=self.pad_id)
    return {"nll": nll.sum(1) / (labels != self.pad_id).sum(1)}

  def groups(self, decay: float) -> list[dict[str, Any]]:
    return decayed_as_in_open_clip(self.model, decay)

  def weights(self) -> dict[str, Tensor]:
    """Return the parameters by our paths; inverts `OpenVision.from_folder`."""
    found: dict[str, list[Tensor]] = {}
    kinds = {nn.Linear: "kernel", nn.Conv2d: "kernel", nn.LayerNorm: "scale"}
    for name, value in self.model.named_parameters():
      owner, _, leaf = name.rpartition(".")
      if leaf == "weight":
        module = self.model.get_submodule(owner)
        leaf = kinds.get(type(module), "embedding")
        if leaf == "kernel":
          value = value.T if value.ndim == 2 else value.permute(2, 3, 1, 0)
      parts = [*owner.split("."), leaf]
      path = "/".join(part for part in parts if not part.isdecimal())
      found.setdefault(path, []).append(value)
    stack = lambda path, values: torch.stack(values) if "/blocks/" in path else values[0]
    return {path: stack(path, values) for path, values in found.items()}


class Timm(nn.Module):
  """A timm ViT with a linear head, label smoothing, and the parameter groups of timm."""

  inputs = ("image", "label")
  scale = None

  def __init__(self, s: dict[str, Any]) -> None:
    super().__init__()
    import timm
    import timm.loss

    self.model = timm.create_model(f"local-dir:{s['model']}", pretrained=True)
    head = np.load(pathlib.Path(s["model"]) / "head.npz", allow_pickle=False)
    self.model.reset_classifier(head["kernel"].shape[1])
    with torch.no_grad():
      self.model.head.weight.copy_(torch.from_numpy(head["kernel"].T.copy()))
      self.model.head.bias.copy_(torch.from_numpy(head["bias"]))
    # Our patches have no bias. It would be redundant next to learned positions.
    self.model.patch_embed.proj.bias.requires_grad_(False)
    self.loss = timm.loss.LabelSmoothingCrossEntropy(s["label_smoothing"])

  def forward(self, image: Tensor, label: Tensor) -> Tensor:
    return self.loss(self.model(image), label)

  def outputs(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": self.model(data["image"])}

  def groups(self, decay: float) -> list[dict[str, Any]]:
    from timm.optim import param_groups_weight_decay

    skipped = self.model.no_weight_decay()
    return param_groups_weight_decay(self.model, decay, no_weight_decay_list=skipped)

  def weights(self) -> dict[str, Tensor]:
    return dict(self.model.named_parameters())


ADAPTERS: dict[str, Any] = {"open_clip": OpenClip, "twin": Twin, "timm": Timm}


def decayed_as_in_open_clip(model: nn.Module, decay: float) -> list[dict[str, Any]]:
  """Return parameter groups by the rule of `open_clip_train.main`."""

  def excluded(name: str, value: Tensor) -> bool:
    return value.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

  named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
  return [
    {"params": [value for name, value in named if excluded(name, value)], "weight_decay": 0.0},
    {
      "params": [value for name, value in named if not excluded(name, value)],
      "weight_decay": decay,
    },
  ]


def learning_rate(s: dict[str, Any], optimizer: Any) -> Any:
  """Return the function that sets the learning rate of a step, by the library's own schedule.

  `open_clip_train.scheduler.cosine_lr` counts the steps of the warm-up from 1, ours and timm's from
  0. `first_warmup_step` = 0 shifts its warm-up to start at 0; everything after it is the same.
  """
  peak, warmup, steps = s["learning_rate"], s["warmup_steps"], s["steps"]
  if s["library"] == "timm":
    from timm.scheduler import CosineLRScheduler

    schedule = CosineLRScheduler(
      optimizer, steps - warmup, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    return schedule.step_update
  from open_clip_train.scheduler import cosine_lr

  published = cosine_lr(optimizer, peak, warmup, steps)
  if s["first_warmup_step"] == 1:
    return published
  return lambda step: published(step - 1 if step < warmup else step)


def summation(s: dict[str, Any], step: int, rows: np.ndarray) -> np.ndarray:
  """Return the rows of a step in their order; must equal `batches.permuted`."""
  if s["order"] == 0:
    return rows
  return rows[np.random.default_rng([s["order"], step]).permutation(len(rows))]


def read(folder: str, names: tuple[str, ...], prefix: str, dtype: Any) -> dict[str, Tensor]:
  """Return arrays of the batches: normalised images [N, 3, H, W], and int64 ids or labels."""
  arrays = {}
  for name in names:
    array = np.load(pathlib.Path(folder) / f"{prefix}{name}.npy", allow_pickle=False)
    if name == "image":  # torchvision's ToTensor and Normalize, on the whole array
      pixels = torch.from_numpy(array).permute(0, 3, 1, 2).to(dtype).div(255)
      mean, std = (torch.tensor(v, dtype=dtype)[:, None, None] for v in (MEAN, STD))
      arrays[name] = pixels.sub_(mean).div_(std).contiguous()
    else:
      arrays[name] = torch.from_numpy(array.astype(np.int64))
  return arrays


def train(s: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the arrays of trained.py on every process."""
  torch.set_num_threads(1)
  if s["kernels"] == "plain":  # other matmul and attention kernels, so other summation orders
    torch.backends.mkldnn.set_flags(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
  dtype = getattr(torch, s["dtype"])
  adapter = ADAPTERS[s["library"]](s).to(dtype).train()
  distributed = dist.is_initialized()
  rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
  call = nn.parallel.DistributedDataParallel(adapter) if distributed else adapter
  optimizer = torch.optim.AdamW(
    adapter.groups(s["weight_decay"]),
    lr=s["learning_rate"],
    betas=(s["b1"], s["b2"]),
    eps=s["eps"],
  )
  set_rate = learning_rate(s, optimizer)
  data = read(s["batches"], adapter.inputs, "", dtype)
  size = s["batch_size"]
  all_rows = np.load(pathlib.Path(s["batches"]) / "rows.npy", allow_pickle=False)
  parameters = [p for p in adapter.parameters() if p.requires_grad]
  curves: dict[str, list[float]] = {"loss": [], "grad_norm": [], "scale": []}
  for step in range(s["stop"] or s["steps"]):
    rows = summation(s, step, all_rows[step * size : (step + 1) * size])
    rows = rows.reshape(world, -1)[rank]
    set_rate(step)
    optimizer.zero_grad()
    loss = call(*(data[name][rows] for name in adapter.inputs))
    loss.backward()
    # With no limit, this only computes the norm.
    norm = nn.utils.clip_grad_norm_(parameters, s["grad_clip_norm"] or math.inf)
    value = loss.detach().clone()
    if distributed:
      dist.all_reduce(value)
    curves["loss"].append(float(value) / world)
    curves["grad_norm"].append(float(norm))
    if adapter.scale is not None:
      curves["scale"].append(float(adapter.scale.detach().exp()))
    optimizer.step()
    if adapter.scale is not None and s["max_scale"]:
      with torch.no_grad():
        adapter.scale.clamp_(0, math.log(s["max_scale"]))
  adapter.eval()
  with torch.no_grad():
    outputs = adapter.outputs(read(s["batches"], adapter.inputs, "held_out_", dtype))
  arrays = {f"curves:{name}": np.array(values) for name, values in curves.items() if values}
  for group, tensors in (("weights", adapter.weights()), ("outputs", outputs)):
    for name, tensor in tensors.items():
      arrays[f"{group}:{name}"] = tensor.detach().to(torch.float32).numpy()
  return arrays


def save(path: str, arrays: dict[str, Any]) -> None:
  """Write the arrays as .npz."""
  np.savez(path, **arrays)


def worker(rank: int, s: dict[str, Any], store: str) -> None:
  """Train as one process of several."""
  os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
  dist.init_process_group(
    "gloo",
    init_method=f"file://{store}",
    rank=rank,
    world_size=s["processes"],
    timeout=datetime.timedelta(minutes=10),
  )
  arrays = train(s)
  if rank == 0:
    save(s["out"], arrays)
  dist.destroy_process_group()


def main() -> None:
  if len(sys.argv) != 2:
    sys.exit("usage: train_torch.py SETTINGS.json")
  s = json.loads(pathlib.Path(sys.argv[1]).read_text("utf-8"))
  if s["processes"] == 1:
    save(s["out"], train(s))
    return
  with tempfile.TemporaryDirectory() as folder:
    torch.multiprocessing.spawn(worker, (s, f"{folder}/store"), nprocs=s["processes"])


if __name__ == "__main__":
  main()
