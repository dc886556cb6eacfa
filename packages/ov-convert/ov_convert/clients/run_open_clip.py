"""Run an exported folder in open_clip; see client_io."""

from typing import Any

import client_io
import numpy as np
import open_clip
import torch


def main() -> None:
  folder, probe_folder, output = client_io.arguments()
  probe = client_io.Probe(probe_folder)
  source = f"local-dir:{folder}"
  model, preprocess = open_clip.create_model_from_pretrained(source)
  model.eval()
  facts = client_io.module_facts(model.visual, "image")
  facts["preprocessing"] = str(preprocess)
  pixels = torch.stack([preprocess(image) for image in probe.images()])
  arrays: dict[str, Any] = {"image/pixels": client_io.channels_last(pixels)}
  with torch.no_grad():
    arrays |= image_arrays(model, probe.torch_pixels())
    if probe.ids is not None:
      tower = getattr(model, "text", model)
      parts = {name: getattr(tower, name) for name in ("transformer", "ln_final")}
      facts |= client_io.module_facts(torch.nn.ModuleDict(parts), "text")
      facts["logit scale"] = float(model.logit_scale.exp())
      tokenizer = open_clip.get_tokenizer(source)
      ids = tokenizer(probe.texts).numpy()
      arrays["text/ids"] = own_padding(model, tokenizer, ids, probe.ids)
      arrays |= text_arrays(model, tokenizer, probe.ids)
      scaled = model.logit_scale.exp() * arrays["image/embedding"] @ arrays["text/embedding"].T
      if model.logit_bias is not None:
        facts["logit bias"] = float(model.logit_bias)
        scaled = scaled + model.logit_bias
      arrays["logits"] = scaled
  libraries = ["open_clip_torch", "torch", "torchvision"]
  if probe.ids is not None:
    libraries.append("transformers")  # reads the tokenizer
  client_io.write(output, arrays, facts, libraries)


def image_arrays(model: Any, pixels: torch.Tensor) -> dict[str, Any]:
  visual = model.visual
  with Blocks(visual.transformer) as blocks:
    projected = visual(pixels)
  arrays = blocks.arrays("image")
  last = blocks.outputs[-1]
  pooled, _ = visual._pool(last)
  return arrays | {
    "image/tokens": last[:, 1:],
    "image/pooled": pooled,
    "image/embedding": client_io.unit(projected),
  }


def text_arrays(model: Any, tokenizer: Any, ids: np.ndarray) -> dict[str, Any]:
  """Run the text tower on `ids` int [N, T], padded as in training."""
  tower = getattr(model, "text", model)
  if getattr(tower, "cls_emb", None) is None:
    with Blocks(tower.transformer) as blocks:
      embedding = model.encode_text(torch.from_numpy(ids))
    return blocks.arrays("text") | {"text/embedding": client_io.unit(embedding)}
  # A tower that masks padding uses [eos] as padding and appends a column. The column before it and
  # the padding are masked. They are set to the values of training here, so that blocks can be
  # compared; this must not change the embedding.
  hidden = padding(ids, tokenizer.tokenizer.eos_token_id)
  embedding = model.encode_text(torch.from_numpy(np.where(hidden, tower.pad_id, ids)))
  states = tower.token_embedding(torch.from_numpy(ids)) + tower.positional_embedding[: ids.shape[1]]
  with Blocks(tower.transformer, torch.from_numpy(hidden), states) as blocks:
    again = model.encode_text(torch.from_numpy(np.where(hidden, tower.pad_id, ids)))
  if not torch.allclose(again, embedding, atol=1e-5):
    raise RuntimeError("the text tower attends to padding")
  kept = [*range(ids.shape[1] - 1), ids.shape[1]]
  arrays = {name: state[:, kept] for name, state in blocks.arrays("text").items()}
  return arrays | {"text/embedding": client_io.unit(embedding)}


def padding(ids: np.ndarray, eos_id: int) -> np.ndarray:
  """Return a mask bool [N, T] of the columns between the first [eos] and the last column."""
  ended = np.cumsum(ids == eos_id, axis=1) > 0
  hidden = np.zeros_like(ended)
  hidden[:, 1:-1] = ended[:, :-2]
  return hidden


def own_padding(model: Any, tokenizer: Any, ids: np.ndarray, probe: np.ndarray) -> np.ndarray:
  """Return the ids of the tokenizer, with [eos] used as padding replaced as in `probe`."""
  if getattr(getattr(model, "text", None), "cls_emb", None) is None:
    return ids
  eos_id = tokenizer.tokenizer.eos_token_id
  pads = np.unique(probe[padding(probe, eos_id)])
  return np.where(padding(ids, eos_id), pads[0], ids) if len(pads) == 1 else ids


class Blocks:
  """Records the input of the first block of a transformer and the outputs of all blocks."""

  def __init__(self, transformer: Any, rows: Any = None, states: Any = None) -> None:
    self.outputs: list[torch.Tensor] = []
    self.rows, self.states = rows, states
    self.handles = [transformer.resblocks[0].register_forward_pre_hook(self.enter)]
    self.handles += [block.register_forward_hook(self.leave) for block in transformer.resblocks]

  def enter(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
    x = inputs[0].clone()
    if self.rows is not None:
      x[:, :-1][self.rows] = self.states[self.rows]
    self.outputs.append(x)
    return (x, *inputs[1:])

  def leave(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
    self.outputs.append(output)

  def arrays(self, side: str) -> dict[str, torch.Tensor]:
    return {f"{side}/block_{i:02d}": state for i, state in enumerate(self.outputs)}

  def __enter__(self) -> "Blocks":
    return self

  def __exit__(self, *_: Any) -> None:
    for handle in self.handles:
      handle.remove()


if __name__ == "__main__":
  main()
