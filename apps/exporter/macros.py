"""Jinja macros shared by the programs of model cards.

`read_picture` reimplements `ov_data.decode.whole` in NumPy and Pillow; read_picture_test compares
the two on every kind of image that training accepts.
"""

SHARED = """\
{% macro read_picture() %}
# Returns the EXIF orientation, 1 to 8; damaged blocks and XMP are ignored.
def orientation(exif):
  tiff = exif.removeprefix(b"Exif\\0\\0")
  if tiff[:4] not in (b"II*\\0", b"MM\\0*"):
    return 1
  number = lambda start, size: int.from_bytes(
    tiff[start : start + size], "little" if tiff[:2] == b"II" else "big"
  )
  first = number(4, 4)
  for start in range(first + 2, min(first + 2 + 12 * number(first, 2), len(tiff) - 11), 12):
    if number(start, 2) == 0x0112:
      return number(start + 8, {1: 1, 3: 2, 4: 4}.get(number(start + 2, 2), 0))
  return 1


# Reads an image as evaluation does: upright, RGB, over white, side x side pixels.
def read_picture(path, side={{ size }}):
  picture = Image.open(path)  # first frame of an animation
  picture.load()
  turned = orientation(picture.info.get("exif", b""))
  if picture.mode.startswith("I"):  # upper 8 bits of 16-bit gray
    upper = np.asarray(picture).astype(np.int32) >> 8
    picture = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
  if picture.has_transparency_data:  # compose over white
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
  pixels = np.asarray(picture.convert("RGB"), np.float32)
  pixels = pixels.swapaxes(0, 1) if turned in (5, 6, 7, 8) else pixels
  pixels = pixels[:, ::-1] if turned in (2, 3, 6, 7) else pixels
  pixels = pixels[::-1] if turned in (3, 4, 7, 8) else pixels
  height, width = pixels.shape[:2]
{% if pre.fit == "squash" %}
  box = (0, 0, width, height)
{% else %}
  ratio = np.float32(side) / np.float32(min(width, height))
  across = width / int(np.round(np.float32(width) * ratio))
  down = height / int(np.round(np.float32(height) * ratio))
  left, top = (round(width / across) - side) // 2, (round(height / down) - side) // 2
  box = (left * across, top * down, (left + side) * across, (top + side) * down)
{% endif %}
  channels = [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(3)]
  way = Image.Resampling.{{ pre.interpolation | upper }}
  channels = [c.resize((side, side), way, box) for c in channels]
{% if pre.interpolation == "bicubic" %}
  channels = [np.asarray(c).clip(0, 255) for c in channels]
{% endif %}
  return Image.fromarray(np.stack([np.asarray(c) for c in channels], -1).astype(np.uint8))
{% endmacro %}
{% macro normalised() %}
mean, std = np.float32({{ pre.mean | numbers }}), np.float32({{ pre.std | numbers }})
pixels = (np.asarray(read_picture("{{ photo }}"), np.float32)[None] / 255 - mean) / std
{% endmacro %}
{% macro tokenizer() %}
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.encode_special_tokens = True  # "[eos]" in a text is ordinary text
{% endmacro %}
{% macro token_ids(dtype) %}
texts = {{ prompts }}
ids = np.full((len(texts), {{ words.length }}), {{ words.pad_id }}, {{ dtype }})
for row, text in zip(ids, texts):
  pieces = tokenizer.encode(text, add_special_tokens=False).ids[:{{ room }}]
{% if words.bos_id is none %}
  row[: len(pieces) + 1] = [*pieces, {{ words.eos_id }}]
{% else %}
  row[: len(pieces) + 2] = [{{ words.bos_id }}, *pieces, {{ words.eos_id }}]
{% endif %}
{% if words.append_cls %}
ids[:, -1] = {{ words.cls_id }}  # [CLS], after the padding
{% endif %}
{% endmacro %}
{% macro print_captions() %}
for row in captions:
  end = row.index({{ words.eos_id }}) if {{ words.eos_id }} in row else len(row)
  print(tokenizer.decode(row[:end]))
{% endmacro %}
{% macro numpy_probabilities(bias) %}
{% if sigmoid %}
print(1 / (1 + np.exp(-similarity - {{ bias }})))
{% else %}
weights = np.exp(similarity - similarity.max())
print(weights / weights.sum())
{% endif %}
{% endmacro %}
"""
