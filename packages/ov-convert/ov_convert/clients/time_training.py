"""Trains models of the sizes of ours as one would in PyTorch, and times steps: for tools/bench.

  python time_training.py THREADS

Each line on stdin is JSON, and is answered by a line of JSON on stdout. `{"build": NAME, "model":
{...}}` builds a model under a name, compiles it, runs one step, and tells its number of `params`.
`{"run": NAME, "steps": n}` runs that many steps and tells `cpu`, `clock` in seconds of all of them,
and the last `loss`. The image tower is timm's; everything goes through scaled dot-product
attention, torch.compile and, where there is one, the fused AdamW. Pixels and tokens are random.
"""

from collections.abc import Callable
import json
import sys
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Sizes = dict[str, Any]
Batch = dict[str, Tensor]
Step = Callable[[], Tensor]


def main() -> None:
  """Answers until stdin ends."""
  torch.set_num_threads(int(sys.argv[1]))
  steps: dict[str, Step] = {}
  for line in sys.stdin:
    asked = json.loads(line)
    if "build" in asked:
      steps[asked["build"]], count = make_step(asked["model"])
      answer = {"params": count, "loss": float(steps[asked["build"]]())}
    else:
      answer = timed(steps[asked["run"]], asked["steps"])
    print(json.dumps(answer), flush=True)


def timed(step: Step, steps: int) -> dict[str, float]:
  """CPU seconds of all threads and seconds on the clock; asking for the loss waits for a GPU."""
  clock, cpu = time.perf_counter(), time.process_time()
  for _ in range(steps):
    loss = step()
  value = float(loss)
  return {
    "cpu": time.process_time() - cpu,
    "clock": time.perf_counter() - clock,
    "loss": value,
  }


def make_step(model: Sizes) -> tuple[Step, int]:
  """One update on a batch that stays the same, and the number of parameters."""
  torch.manual_seed(0)
  device = torch.device(model["device"])
  module = (Pair(model) if "text" in model else Captioner(model)).to(device)
  optimizer = torch.optim.AdamW(
    module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.2, fused=True
  )
  batch = {name: array.to(device) for name, array in make_batch(model).items()}
  compiled = torch.compile(module)
  half = torch.autocast(device.type, torch.bfloat16, enabled=model["dtype"] == "bfloat16")

  def step() -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with half:
      loss = compiled(batch)
    loss.backward()
    optimizer.step()
    return loss.detach()

  return step, sum(param.numel() for param in module.parameters())


def make_batch(model: Sizes) -> Batch:
  """uint8 pixels and tokens without padding, int64."""
  count, side = model["batch"], model["image"]["size"]
  tokens = lambda length: torch.randint(1, model["vocab"], (count, length))
  batch = {"image": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)}
  batch["caption"] = tokens(model["caption_len"])
  if "text" in model:
    batch |= {"alt": tokens(model["text"]["length"]), "sentence": tokens(model["text"]["length"])}
  return batch


class Attention(nn.Module):
  """Self-attention with one product for queries, keys and values."""

  def __init__(self, width: int, heads: int) -> None:
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

  def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
    q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    return self.out(F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
  """Pre-norm blocks of the text models; `allowed` bool [T, T] says who sees whom."""

  def __init__(self, sizes: Sizes) -> None:
    super().__init__()
    width, hidden = sizes["width"], sizes["mlp"]
    self.layers = nn.ModuleList(
      nn.ModuleDict({
        "norm1": nn.LayerNorm(width, 1e-6),
        "attn": Attention(width, sizes["heads"]),
        "norm2": nn.LayerNorm(width, 1e-6),
        "mlp": nn.Sequential(
          nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        ),
      })
      for _ in range(sizes["depth"])
    )  # fmt: skip

  def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
    for layer in self.layers:
      x = x + layer["attn"](layer["norm1"](x), allowed)
      x = x + layer["mlp"](layer["norm2"](x))
    return x


class Model(nn.Module):
  """What both models have: the image tower of timm, and a decoder with a head of its own."""

  def __init__(self, model: Sizes, decoder_tokens: int) -> None:
    super().__init__()
    image, decoder = model["image"], model["decoder"]
    self.image = timm.create_model(
      "vit_base_patch16_224", img_size=image["size"], patch_size=image["patch"],
      embed_dim=image["width"], depth=image["depth"], num_heads=image["heads"],
      mlp_ratio=image["mlp"] / image["width"], num_classes=0, global_pool="avg",
    )  # fmt: skip
    self.project = nn.Linear(image["width"], decoder["width"], bias=False)
    self.decoder, self.norm = Blocks(decoder), nn.LayerNorm(decoder["width"], 1e-6)
    self.head = nn.Linear(decoder["width"], model["vocab"], bias=False)
    length = decoder_tokens + model["caption_len"]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:, :decoder_tokens] = True  # what stands before the caption is seen by all
    self.register_buffer("allowed", allowed)
    for name, values in (("mean", MEAN), ("std", STD)):
      self.register_buffer(name, torch.tensor(values)[:, None, None])

  def tokens(self, images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> [B, 1 + N, D], cls first."""
    return self.image.forward_features((images.float() / 255 - self.mean) / self.std)

  def caption_loss(self, before: Tensor, caption: Tensor, targets: Tensor) -> Tensor:
    """[B, K, D] and [B, T, D] against [B, T]."""
    x = self.decoder(torch.cat([before, caption], 1), self.allowed)[:, before.shape[1] :]
    logits = self.head(self.norm(x)).float()
    return 2 * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)


def shifted(ids: Tensor) -> Tensor:
  """Position t is to write token t + 1."""
  return F.pad(ids[:, 1:], (0, 1))


class Captioner(Model):
  """OpenVision 2: the caption so far, and some of the image tokens."""

  def __init__(self, model: Sizes) -> None:
    super().__init__(model, model["kept"])
    self.kept, width = model["kept"], model["decoder"]["width"]
    self.embed = nn.Embedding(model["vocab"], width)
    self.positions = nn.Parameter(0.01 * torch.randn(model["caption_len"], width))

  def forward(self, batch: Batch) -> Tensor:
    tokens = self.tokens(batch["image"])[:, 1:]
    order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)
    index = order[:, : self.kept].sort(1).values
    tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
    text = self.embed(batch["caption"]) + self.positions
    return self.caption_loss(self.project(tokens), text, shifted(batch["caption"]))


class Pair(Model):
  """OpenVision: an image against two texts, and a caption from learned queries."""

  def __init__(self, model: Sizes) -> None:
    text, image = model["text"], model["image"]
    patches = (image["size"] // image["patch"]) ** 2
    super().__init__(model, patches + text["length"] - 1)
    width, decoder = text["width"], model["decoder"]["width"]
    self.embed = nn.Embedding(model["vocab"], width)
    self.positions = nn.Parameter(0.01 * torch.randn(text["length"], width))
    self.text, self.text_norm = Blocks(text), nn.LayerNorm(width, 1e-6)
    self.text_head = nn.Linear(width, model["embed_dim"], bias=False)
    self.image_head = nn.Linear(image["width"], model["embed_dim"], bias=False)
    self.log_scale = nn.Parameter(torch.tensor(2.6593))
    self.project_text = nn.Linear(width, decoder, bias=False)
    self.queries = nn.Parameter(torch.randn(model["caption_len"], decoder))

  def forward(self, batch: Batch) -> Tensor:
    tokens = self.tokens(batch["image"])
    count = len(tokens)
    image = F.normalize(self.image_head(self.image.forward_head(tokens)).float(), dim=1)
    ids = torch.cat([batch["alt"], batch["sentence"]])
    text = self.text(self.embed(ids) + self.positions, None)
    texts = F.normalize(self.text_head(self.text_norm(text[:, -1])).float(), dim=1)
    own, pairs = torch.arange(count, device=image.device), torch.zeros((), device=image.device)
    for one in texts.split(count):
      logits = self.log_scale.exp() * image @ one.T
      pairs = pairs + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 4
    before = torch.cat([self.project(tokens[:, 1:]), self.project_text(text[:count, :-1])], 1)
    queries = self.queries.expand(count, -1, -1).to(before.dtype)
    return pairs + self.caption_loss(before, queries, shifted(batch["caption"]))


if __name__ == "__main__":
  main()
