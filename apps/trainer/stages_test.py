from ml_collections import ConfigDict
import pytest

from apps.trainer.stages import resolve_stages


def config(*stages):
  return ConfigDict(
    {"total_steps": 10, "model": {"image_size": 84, "encoder": "L/14"}, "stages": stages}
  )


def test_without_stages_the_run_is_one():
  (stage,) = resolve_stages(config())
  assert (stage.name, stage.first_step, stage.last_step) == ("main", 0, 10)


def test_changes_hold_for_their_stage_only_and_steps_go_on():
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
  ("stages", "said"),
  [
    (({"model.image_sise": 1},), "image_sise"),
    (({"total_steps": "many"},), "total_steps"),
    (({"name": "a"}, {"name": "a"}), "stands twice"),
  ],
)
def test_impossible_changes_are_named(stages, said):
  with pytest.raises(ValueError, match=said):
    resolve_stages(config(*stages))


@pytest.mark.parametrize("stages", [7, "84px", (84, 224)])
def test_what_is_no_list_of_changes_is_refused(stages):
  wrong = ConfigDict(config().to_dict() | {"stages": stages})
  with pytest.raises(ValueError, match="expected a list of changes, such as"):
    resolve_stages(wrong)
