"""Single-file PyTorch implementation of OpenVision models for inference.

model = OpenVision.from_folder("folder")  # with config.json and model.safetensors
image = model.encode_image(pixels)  # float32 [B, 3, S, S], normalised
text = model.encode_text(ids)  # int64 [N, T]
logits = model.logits(image.embedding, text.embedding)  # [B, N]
captions = model.generate(pixels, max_len=64, bos_id=1, eos_id=2, pad_id=0)
"""

from collections import namedtuple
import json
import re
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
import torch
from torch import Tensor, nn
import torch.nn.functional as F

# B batch, T tokens, D width, K image tokens, E shared space, V vocab. Fields of Encoded: [B, D],
# [B, T, D] before any norm, and unit vectors [B, E], or None without a shared space.
Encoded = namedtuple("Encoded", ["pooled", "tokens", "embedding"])
table = lambda *shape: nn.Parameter(torch.empty(shape))

# Values of the options that config.json of earlier versions lacks.
DEFAULTS: dict[str, Any] = dict(
  mlp="plain", norm="layer", norm_eps=1e-6, qkv_bias="all", out_bias=True, mlp_bias=True,
  qk_norm=False, attention_gate=False, layer_scale=None, cls_token=True, registers=0,
  patch_bias=False, patch_norm=False, pre_norm=False, rotary="none", rotary_base=100.0,
  pool=None, pool_heads=None, pool_mlp_dim=None, image_head=True, text_head_bias=False,
)  # fmt: skip


def config(fields: dict[str, Any]) -> SimpleNamespace:
  """Return the fields of an object in config.json, with `DEFAULTS` for missing options."""
  activation = "gelu" if fields.get("kind") == "ViT" else "gelu_tanh"
  missing = DEFAULTS | {"activation": activation} if "kind" in fields else {}
  return SimpleNamespace(**missing | fields)


class QuickGELU(nn.Module):
  def forward(self, x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Any] = dict(
  gelu=nn.GELU, gelu_tanh=lambda: nn.GELU("tanh"), quick_gelu=QuickGELU, silu=nn.SiLU
)


def norm(c: Any, width: int | None = None) -> nn.Module:
  kind: Any = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[c.norm]
  return kind(width or c.width, c.norm_eps)


def sincos(length: int, width: int, rows: int = 1) -> Tensor:
  """Return sin-cos positions [rows * length, width] in float64, on the CPU even under "meta"."""
  index = torch.arange(rows * length, device="cpu", dtype=torch.float64)
  parts = [index] if rows == 1 else [index % length, index // length]
  num = width // (2 * len(parts))
  omega = 10000.0 ** -(torch.arange(num, device="cpu", dtype=torch.float64) / (num - 1))
  return torch.cat([wave(p[:, None] * omega) for p in parts for wave in (torch.sin, torch.cos)], 1)


def rotation(c: Any, grid: tuple[int, int]) -> Tensor:
  """Return float32 cosines and sines [2, T, H] of the rotary angles of all tokens, on the CPU.

  Cls and registers have angle 0. The row of a patch sets the angles of the first half of the
  channels, the column those of the second half; with "pe" it is the other way round. With "mrope"
  it sets those of channels 1, 4, 7, ... of each half, and the column those of 2, 5, 8, ...
  """
  index = torch.arange(grid[0] * grid[1], device="cpu", dtype=torch.float64)
  position = torch.stack([index // grid[1], index % grid[1]], 1)
  num = c.width // c.num_heads // (2 if c.rotary == "mrope" else 4)
  order = torch.arange(num, device="cpu")
  frequency = c.rotary_base ** -(order.double() / num)
  if c.rotary == "dinov3":  # from -1 to 1
    position = 2 * (position + 0.5) / torch.tensor(grid, device="cpu") - 1
    frequency = 2 * torch.pi * frequency
  elif c.rotary == "pe":
    position = position.flip(1) + c.cls_token
  angles = position[:, :, None] * frequency
  if c.rotary == "mrope":
    angles = torch.where(order % 3 == 1, angles[:, 0], angles[:, 1]) * (order % 3 > 0)
  angles = angles.flatten(1)  # [T, H / 2]
  angles = angles.repeat_interleave(2, 1) if c.rotary == "pe" else angles.tile(2)
  angles = F.pad(angles, (0, 0, c.cls_token + c.registers, 0))
  return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotary: Tensor, kind: str) -> Tensor:
  """Rotate [B, N, T, H]: pairs are channels 2i and 2i + 1 ("pe"), or i and i + H / 2."""
  if kind != "pe":
    a, b = x.float().chunk(2, -1)
    turned = torch.cat([-b, a], -1)
  else:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2).float()
  return (x.float() * rotary[0] + turned * rotary[1]).to(x)


def spread(grid: list[int], fraction: float) -> Tensor:
  """Return [K] patch indices spread evenly over the grid: the lowest ranks of a Bayer matrix."""
  keep = max(1, int(grid[0] * grid[1] * fraction + 1e-6))  # 1e-6: binary fractions fall short
  rank = torch.zeros(1, 1, dtype=torch.long)
  while len(rank) < max(grid):
    rank = 4 * rank.tile(2, 2) + torch.tensor([[0, 2], [3, 1]]).kron(torch.ones_like(rank))
  return rank[: grid[0], : grid[1]].flatten().argsort()[:keep].sort().values


def attention_mask(x: Tensor, kind: str, prefix: int = 0, real: Tensor | None = None) -> Any:
  """Return the additive mask for x [B, T, D]: "full", or "causal" after the first `prefix` tokens;
  columns that are not `real` (bool [B, T]) are masked. Not -inf, which makes empty rows NaN."""
  if kind == "full" and real is None:
    return None
  seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
  if kind == "causal":
    seen = seen.tril() | (torch.arange(x.shape[1], device=x.device) < prefix)
  seen = seen if real is None else seen & real[:, None, None]
  return torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)


class Mlp(nn.Module):
  """down(act(up(x))); gated: down(act(gate(x)) * up(x))."""

  def __init__(self, c: Any) -> None:
    super().__init__()
    linear = lambda d_in, d_out: nn.Linear(d_in, d_out, c.mlp_bias)
    self.up, self.down = linear(c.width, c.mlp_dim), linear(c.mlp_dim, c.width)
    self.gate = linear(c.width, c.mlp_dim) if c.mlp == "gated" else None
    self.act = ACTIVATIONS[c.activation]()

  def forward(self, x: Tensor) -> Tensor:
    if self.gate is not None:
      return self.down(self.act(self.gate(x)) * self.up(x))
    return self.down(self.act(self.up(x)))


class Attention(nn.Module):
  """Multi-head attention of x [B, T, D] over the cached tokens and `source` [B, S, D]."""

  def __init__(self, c: Any) -> None:
    super().__init__()
    self.num_heads, self.rotary = c.num_heads, c.rotary
    linear = lambda bias: nn.Linear(c.width, c.width, bias)
    bias = c.qkv_bias != "none"
    self.query, self.key, self.value = linear(bias), linear(c.qkv_bias == "all"), linear(bias)
    self.gate, self.out = linear(bias) if c.attention_gate else None, linear(c.out_bias)
    per_head = lambda: norm(c, c.width // c.num_heads) if c.qk_norm else nn.Identity()
    self.query_norm, self.key_norm = per_head(), per_head()

  def forward(
    self, x: Tensor, source: Tensor, mask: Any = None, cache: Any = None, rotary: Any = None
  ) -> Tensor:
    flat = self.query(x), self.key(source), self.value(source)
    q, k, v = (a.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for a in flat)  # [B, N, T, H]
    q, k = self.query_norm(q), self.key_norm(k)
    if rotary is not None:
      q, k = rotate(q, rotary, self.rotary), rotate(k, rotary, self.rotary)
    if cache is not None:
      if cache:
        k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
      cache.update(k=k, v=v)
    values = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return self.out(values if self.gate is None else values * self.gate(x).sigmoid())


class Block(nn.Module):
  """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), with optional layer scales."""

  def __init__(self, c: Any) -> None:
    super().__init__()
    self.norm1, self.norm2 = norm(c), norm(c)
    self.attn, self.mlp = Attention(c), Mlp(c)
    scaled = c.layer_scale is not None
    self.scale1 = table(c.width) if scaled else None
    self.scale2 = table(c.width) if scaled else None

  def forward(self, x: Tensor, mask: Any = None, cache: Any = None, rotary: Any = None) -> Tensor:
    branch = self.attn(normed := self.norm1(x), normed, mask, cache, rotary)
    x = x + (branch if self.scale1 is None else branch * self.scale1)
    branch = self.mlp(self.norm2(x))
    return x + (branch if self.scale2 is None else branch * self.scale2)


class MapPool(nn.Module):  # attention pooling by one learned query, and an MLP
  def __init__(self, c: Any) -> None:
    super().__init__()
    self.probe, self.norm = table(c.width), norm(c)
    self.attn, self.mlp = Attention(c), Mlp(c)

  def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
    mask = None if real is None else attention_mask(x, "full", real=real)[:, :, :1]
    pooled = self.attn(self.probe.expand(x.shape[0], 1, -1), x, mask)
    return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class AttendPool(nn.Module):  # attention pooling by one learned query that is not projected
  def __init__(self, c: Any) -> None:
    super().__init__()
    self.num_heads, self.query = c.num_heads, table(c.width)
    self.key, self.value = (nn.Linear(c.width, c.width, c.qkv_bias == "all") for _ in range(2))
    self.out = nn.Linear(c.width, c.width)

  def forward(self, x: Tensor) -> Tensor:
    flat = self.query.expand(x.shape[0], 1, -1), self.key(x), self.value(x)
    q, k, v = (a.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for a in flat)
    return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


POOLS: dict[str, Any] = {"map": MapPool, "attend": AttendPool}


class Transformer(nn.Module):
  """Base class of towers and decoders: blocks, final norm and optional attention pooling."""

  def __init__(self, c: Any) -> None:
    super().__init__()
    self.config, self.norm = c, norm(c)
    self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
    # Attention pooling has the activation, norm and biases of the blocks, and no other options.
    plain = dict(num_heads=c.pool_heads or c.num_heads, mlp_dim=c.pool_mlp_dim or c.mlp_dim)
    plain |= dict(mlp="plain", qk_norm=False, attention_gate=False)
    pool = SimpleNamespace(**vars(c) | plain)
    self.pool = POOLS[c.pool](pool) if c.pool in POOLS else None

  def run(
    self, x: Tensor, mask: Any = None, caches: Any = None, states: Any = None, rotary: Any = None
  ) -> Tensor:
    """Run the blocks; append the input of the first and the outputs of all to `states`."""
    note = (lambda _: None) if states is None else states.append
    note(x)
    for layer, block in enumerate(self.blocks):
      x = block(x, mask, caches and caches[layer], rotary)
      note(x)
    return x


class ImageTower(Transformer):
  def __init__(self, c: Any) -> None:
    super().__init__(c)
    self.grid = (c.image_size // c.patch_size,) * 2
    self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=c.patch_bias)
    self.cls = table(c.width) if c.cls_token else None
    self.registers = table(c.registers, c.width) if c.registers else None
    self.patch_norm = norm(c) if c.patch_norm else nn.Identity()
    self.pre_norm = norm(c) if c.pre_norm else nn.Identity()
    positions, rotary = self.computed(self.grid)
    self.register_buffer("rotary", rotary, persistent=False)
    if c.position == "learned":
      self.position_embedding = table(c.cls_token + self.grid[0] ** 2, c.width)
    else:
      self.register_buffer("position_embedding", positions, persistent=False)

  def computed(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Return computed positions [cls + T, D], zero for cls, and rotary angles, or None."""
    c, positions = self.config, None
    if c.position == "sincos2d":
      positions = sincos(grid[1], c.width, rows=grid[0]).float()
      positions = F.pad(positions, (0, 0, int(c.cls_token), 0))
    return positions, None if c.rotary == "none" else rotation(c, grid)

  def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the input [B, cls + registers + T, D] of the first block, and the rotary angles."""
    x, positions, rotary = self.patch_embed(pixels), self.position_embedding, self.rotary
    if (grid := (x.shape[2], x.shape[3])) != self.grid:
      if self.config.position == "learned":
        raise ValueError(f"{grid} patches, but learned positions of {self.grid}: resize images.")
      positions, rotary = (a if a is None else a.to(x.device) for a in self.computed(grid))
    x = self.patch_norm(x.flatten(2).transpose(1, 2))
    learned = lambda tokens: tokens.expand(x.shape[0], -1, -1)
    if self.cls is not None:
      x = torch.cat([learned(self.cls[None]), x], 1)
    if positions is not None:
      x = x + positions.to(x)
    if self.registers is not None:  # they have no position
      first = int(self.config.cls_token)
      x = torch.cat([x[:, :first], learned(self.registers), x[:, first:]], 1)
    return self.pre_norm(x), rotary

  def forward(self, pixels: Tensor, states: list | None = None) -> tuple[Tensor, Tensor]:
    """Encode [B, 3, H, W] to pooled [B, D], tokens [B, T, D]; partial patches are dropped."""
    x, rotary = self.embed(pixels)
    x, pool = self.run(x, states=states, rotary=rotary), self.config.pool
    patches = x[:, self.config.cls_token + self.config.registers :]
    if self.pool is not None:
      return self.pool(self.norm(x)), patches
    if pool == "mean":
      return self.norm(patches).mean(1), patches
    if pool == "gap":
      return self.norm(patches.mean(1)), patches
    return self.norm(x[:, {"tok": 0, "last": -1}[pool]]), patches


class TextTower(Transformer):
  def __init__(self, c: Any) -> None:
    super().__init__(c)
    self.embed = nn.Embedding(c.vocab_size, c.width)
    self.position_embedding = table(c.max_len, c.width)

  def forward(self, ids: Tensor, states: list | None = None) -> tuple[Tensor, Tensor]:
    """Encode int64 [B, T] to pooled [B, D] and tokens [B, T, D]."""
    c, length = self.config, ids.shape[1]
    if length > c.max_len or (c.pool == "last" and length < c.max_len):
      raise ValueError(f"texts of {length} tokens; pad or truncate them to {c.max_len}.")
    real = ids != c.pad_id if c.padding == "mask" else None
    x = self.embed(ids) + self.position_embedding[:length]
    x = self.run(x, attention_mask(x, c.mask, real=real), states=states)
    if c.pool in ("last", "first"):
      return self.norm(x[:, -1 if c.pool == "last" else 0]), x
    if c.pool == "argmax":
      return self.norm(x[torch.arange(ids.shape[0], device=ids.device), ids.argmax(1)]), x
    if self.pool is not None:
      return self.pool(self.norm(x), real), x
    weight = torch.ones_like(ids) if real is None else real.to(ids)
    return (self.norm(x) * weight[..., None]).sum(1) / weight.sum(1)[:, None].clamp(min=1), x


class Decoder(Transformer):
  """Writes captions from image tokens: "Decoder" by token, "QueryDecoder" all at once."""

  def __init__(self, c: Any, image_width: int, text_width: int | None) -> None:
    super().__init__(c)
    self.image_proj = nn.Linear(image_width, c.width, bias=False)
    self.head = nn.Linear(c.width, c.vocab_size, bias=False)
    if c.kind == "QueryDecoder":
      self.queries = table(c.num_queries, c.width)
      self.text_proj = nn.Linear(text_width, c.width, bias=False) if text_width else None
      return
    self.embed = nn.Embedding(c.vocab_size, c.width)
    self.mask_embedding = table(c.width) if c.parallel else None  # used in training only
    self.position_embedding = table(c.max_len, c.width) if c.position == "learned" else None

  def all_at_once(self, image_tokens: Tensor, text_tokens: Tensor | None) -> Tensor:
    """Return logits [B, Q, V] for image tokens [B, K, _] and text tokens [B, T, _]."""
    parts = [self.image_proj(image_tokens)]
    parts += [] if self.text_proj is None else [self.text_proj(text_tokens)]
    x = torch.cat([*parts, self.queries.expand(image_tokens.shape[0], -1, -1)], 1)
    prefix = x.shape[1] - len(self.queries)
    return self.head(self.norm(self.run(x, attention_mask(x, "causal", prefix))[:, prefix:]))

  def greedy(self, image_tokens: Tensor, max_len: int, bos: int, eos: int, pad: int) -> Tensor:
    """Decode greedily: int64 [B, max_len], the tokens after bos, then padding."""
    c, caches = self.config, [dict[str, Tensor]() for _ in self.blocks]
    if c.position == "learned" and max_len > c.max_len:
      raise ValueError(f"max_len={max_len}; expected at most {c.max_len} (learned positions).")
    image = self.image_proj(image_tokens)
    self.run(image, attention_mask(image, "full" if c.mask == "prefix" else "causal"), caches)
    ids = torch.full((image.shape[0], max_len), pad, device=image.device)
    token, done = torch.full_like(ids[:, 0], bos), torch.zeros_like(ids[:, 0], dtype=torch.bool)
    positions = self.position_embedding
    if c.position == "sincos":
      positions = (0.02 * 2**0.5 * sincos(max_len, c.width).float()).to(image)
    for t in range(max_len):
      x = self.embed(token) + (0 if positions is None else positions[t])
      x = self.norm(self.run(x[:, None], None, caches)[:, 0])
      token = self.head(x).argmax(-1).masked_fill(done, pad)
      ids[:, t], done = token, done | (token == eos)
      if done.all():
        break
    return ids


class OpenVision(nn.Module):
  """Model of any kind; missing parts of encoder, text and decoder are None."""

  def __init__(self, c: Any) -> None:
    super().__init__()
    self.config, parts = c, {"ViT": {"encoder": c}, "Text": {"text": c}}.get(c.kind, vars(c))
    image, text, decoder = (parts.get(name) for name in ("encoder", "text", "decoder"))
    self.encoder: Any = image and ImageTower(image)
    self.text: Any = text and TextTower(text)
    self.decoder: Any = decoder and Decoder(decoder, image.width, text and text.width)
    if image and text:
      head = nn.Linear(image.width, c.embed_dim, bias=False)
      self.image_head = head if c.image_head else nn.Identity()
      self.text_head = nn.Linear(text.width, c.embed_dim, bias=c.text_head_bias)
      self.log_scale, self.bias = table(), None if c.bias_init is None else table()

  @classmethod
  def from_folder(cls, folder: str, dtype: torch.dtype = torch.float32) -> "OpenVision":
    """Load config.json and model.safetensors; missing or unexpected tensors are an error."""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
      content = json.load(file, object_hook=config)
    if getattr(content, "library", None) != "openvision" or content.format not in (1, 2):
      raise ValueError(f"{folder} is not an OpenVision model of format 1 or 2.")
    with torch.device("meta"):  # do not allocate parameters that are loaded below
      model = cls(content.model)
    top, state = {"ViT": "encoder/", "Text": "text/"}.get(content.model.kind, ""), {}
    for path, tensor in load_file(f"{folder}/model.safetensors").items():
      name = re.sub(r"(?<=/)(kernel|scale|embedding)$", "weight", top + path).replace("/", ".")
      for layer, part in enumerate(tensor) if "blocks" in path else [(0, tensor)]:
        if path.endswith("/kernel"):  # [in, out], or HWIO
          part = part.T if part.ndim == 2 else part.permute(3, 2, 0, 1)
        state[name.replace("blocks.", f"blocks.{layer}.")] = part.to(dtype).contiguous()
    model.load_state_dict(state, assign=True)
    return model.eval()

  def encode_image(self, pixels: Tensor) -> Encoded:
    """Encode normalised float32 [B, 3, H, W]; computed positions support any size."""
    return self.encoded("image_head", *self.encoder(pixels.to(self.encoder.patch_embed.weight)))

  def encode_text(self, ids: Tensor) -> Encoded:  # int64 [B, T]
    return self.encoded("text_head", *self.text(ids))

  def encoded(self, head: str, pooled: Tensor, tokens: Tensor) -> Encoded:
    if not hasattr(self, head):
      return Encoded(pooled, tokens, None)
    raw = getattr(self, head)(pooled).float()
    return Encoded(pooled, tokens, raw / (raw.norm(dim=-1, keepdim=True) + 1e-8))

  def logits(self, images: Tensor, texts: Tensor) -> Tensor:
    """Return scaled (and biased, if so trained) similarities [B, N] of embeddings."""
    return self.log_scale.exp() * images @ texts.T + (0 if self.bias is None else self.bias)

  def hidden_states(self, pixels: Tensor | None = None, ids: Tensor | None = None) -> list[Tensor]:
    """Return L + 1 states [B, 1 + T, D] with cls first, or [B, T, D] of texts."""
    states: list[Tensor] = []
    self.text(ids, states) if pixels is None else self.encoder(pixels, states)
    return states

  @torch.no_grad()
  def generate(self, pixels: Tensor, max_len: int, bos_id: int, eos_id: int, pad_id: int) -> Tensor:
    """Return greedy captions int64 [B, max_len]: the tokens after bos, eos, then padding."""
    if getattr(self.decoder, "embed", None) is None:
      raise TypeError("this model has no autoregressive decoder.")
    return self.decoder.greedy(self.read(pixels), max_len, bos_id, eos_id, pad_id)

  def caption_logits(self, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
    """Return logits [B, Q, V] of a query decoder; with a text tower it also reads a text."""
    if self.text is None:
      return self.decoder.all_at_once(self.read(pixels), None)
    real = -1 if self.text.config.pool == "last" else None  # the decoder does not read [CLS]
    return self.decoder.all_at_once(self.read(pixels), self.text(ids)[1][:, :real])

  def read(self, pixels: Tensor) -> Tensor:
    """Return the image tokens [B, K, D] that the decoder reads."""
    tokens, c = self.encode_image(pixels).tokens, self.config
    if getattr(c, "eval_keep", "all") == "all":
      return tokens
    grid = [side // c.encoder.patch_size for side in pixels.shape[2:]]
    return tokens[:, spread(grid, c.keep_ratio).to(tokens.device)]
