import pytest

from apps.trainer.run_config import RunConfig
from apps.trainer.stages import resolve_stages


def config(*stages):
  return RunConfig.parse(
    {"total_steps": 10, "model": {"image_size": 84, "encoder": "L/14"}, "stages": stages}
  )


def test_run_without_stages():
  (stage,) = resolve_stages(config())
  assert (stage.name, stage.first_step, stage.last_step) == ("main", 0, 10)


def test_changes_apply_to_one_stage():
  first, second, third = resolve_stages(
    config(
      {"name": "84px", "total_steps": 5},
      {"name": "224px", "model.image_size": 224},
      {"total_steps": 3},
    )
  )
  assert [s.config.model.image_size for s in (first, second, third)] == [84, 224, 84]
  assert [(s.first_step, s.last_step) for s in (first, second, third)] == [
    (0, 5),
    (5, 15),
    (15, 18),
  ]
  assert third.name == "stage2"


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    (({"model.image_sise": 1},), "image_sise"),
    (({"total_steps": "many"},), "total_steps"),
    (({"name": "a"}, {"name": "a"}), "is used twice"),
  ],
)
def test_invalid_changes(stages, message):
  with pytest.raises(ValueError, match=message):
    resolve_stages(config(*stages))


@pytest.mark.parametrize("stages", [7, "84px", (84, 224)])
def test_invalid_stages(stages):
  with pytest.raises(ValueError, match="expected a list of changes, such as"):
    RunConfig.parse({"stages": stages})
