import pytest

from apps.configs.arguments import parse_arguments

DEFAULTS = {"res": 112, "lr": 8e-6, "img": "L/16", "jitter": True, "local": False}


def test_empty_string_gives_defaults():
  assert parse_arguments(None, DEFAULTS).to_dict() == DEFAULTS
  assert parse_arguments("", DEFAULTS).to_dict() == DEFAULTS


def test_values_have_the_type_of_their_default():
  got = parse_arguments("res=224,lr=1,img=Ti/16,jitter=false,local", DEFAULTS)
  assert got.to_dict() == {"res": 224, "lr": 1.0, "img": "Ti/16", "jitter": False, "local": True}
  assert isinstance(got.lr, float)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("local", True),
    ("local,res=84", True),
    ("local=TRUE", True),
    ("local=False", False),
    ("local=", False),  # an empty shell variable
    ("res=84,local=true,local=false", False),  # the last value is used
  ],
)
def test_booleans(text, expected):
  assert parse_arguments(text, DEFAULTS).local is expected


def test_single_value_sets_first_key():
  assert parse_arguments("224", DEFAULTS).res == 224


def test_only_the_first_equals_sign_splits():
  assert parse_arguments("img=a=b", DEFAULTS).img == "a=b"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("rez=224", "did you mean 'res'"),
    ("res=big", "expected int, such as 112"),
    ("jitter=maybe", "expected true or false"),
    ("jitter=1", "expected true or false"),
    ("img=a,b/16", "unknown config argument 'b/16'; values cannot contain a comma"),
    ("res,img=B/16", "'res' needs a value"),
  ],
)
def test_mistakes_are_named(text, message):
  with pytest.raises(ValueError, match=message):
    parse_arguments(text, DEFAULTS)


def test_old_names_are_accepted_with_warning(caplog):
  got = parse_arguments(
    "resolution=84,old=1", DEFAULTS, aliases={"resolution": "res"}, ignored={"old": "it never did"}
  )
  assert got.res == 84
  assert "'resolution' is now called 'res'" in caplog.text
  assert "it never did" in caplog.text
  got = parse_arguments("img=old", DEFAULTS, values={"img": {"old": "L/14"}})
  assert got.img == "L/14" and "img=old is now called img=L/14" in caplog.text


def test_error_for_keys_of_another_recipe():
  with pytest.raises(ValueError, match="'txt' is not an argument of this recipe: give img"):
    parse_arguments("txt=a", DEFAULTS, refused={"txt": "give img"})
