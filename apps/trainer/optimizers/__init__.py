"""The table of optimizers. To add one, write its file and its line in the table.

`config.optimizer.name` chooses from it; `config.optimizer.options` sets fields of the dataclass.
"""

from apps.trainer.optimizers.adafactor import Adafactor
from apps.trainer.optimizers.adamw import AdamW
from apps.trainer.optimizers.lion import Lion
from apps.trainer.optimizers.muon import Muon
from apps.trainer.optimizers.update_rule import UpdateRule

OPTIMIZERS: dict[str, type[UpdateRule]] = {
  "adamw": AdamW,
  "adafactor": Adafactor,
  "muon": Muon,
  "lion": Lion,
}
