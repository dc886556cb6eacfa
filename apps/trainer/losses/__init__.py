"""The table of losses. To add one, write its file and its line in the table.

A loss is a frozen dataclass. `config.loss.more={"NAME": {"weight": 1.0}}` adds it, with the values
of its fields. The three of the published recipes have settings of their own in `config.loss`.
"""

from apps.trainer.losses.caption import Caption
from apps.trainer.losses.contrastive import Clip, Siglip
from apps.trainer.losses.distill import Affinity, Distill
from apps.trainer.losses.loss_term import LossTerm

LOSSES: dict[str, type[LossTerm]] = {
  "clip": Clip,
  "siglip": Siglip,
  "caption": Caption,
  "distill": Distill,
  "affinity": Affinity,
}
