"""Families by library. A new one is a module in this folder and a line in a table."""

from ov_convert.families import aimv2, clip, dino, siglip
from ov_convert.families.family import Family

# In the order in which they are tried for a config of ov_models.
TRANSFORMERS: tuple[Family, ...] = (
  clip.MODEL,
  clip.TOWER,
  siglip.MODEL,
  siglip.TOWER,
  *dino.V2,
  dino.V3,
  aimv2.MODEL,
  aimv2.TOWER,
)
