"""Run the examples in docstrings of public names with doctest."""

import doctest
import inspect
import sys
import types

import pytest

from ov_convert import name_map
import ov_data
import ov_eval
import ov_losses
import ov_models
import ov_sharding

MODULES = [ov_models, ov_losses, ov_sharding, ov_data, ov_eval, name_map]


def _examples(module: types.ModuleType) -> list[doctest.DocTest]:
  """Return the examples of the names in `__all__`, or of all names if it is missing."""
  found = []
  for name in getattr(module, "__all__", dir(module)):
    public = getattr(module, name)
    text = (inspect.getdoc(public) or "") if callable(public) else ""
    if ">>>" in text and not name.startswith("_"):
      names = dict(vars(sys.modules[public.__module__]))
      title = f"{module.__name__}.{name}"
      found.append(doctest.DocTestParser().get_doctest(text, names, title, None, 0))
  return found


EXAMPLES = [example for module in MODULES for example in _examples(module)]


def test_every_package_has_examples():
  assert {example.name.split(".")[0] for example in EXAMPLES} == {
    module.__name__.split(".")[0] for module in MODULES
  }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: doctest.DocTest):
  printed: list[str] = []
  result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
  assert result.attempted and not result.failed, "".join(printed)
