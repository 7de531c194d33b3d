"""Bad input is refused by one error that says what to change."""

import pytest

from trl_ext.errors import require, require_one_of


def test_what_holds_passes():
    require(True, "never said")
    require_one_of("level", "token", ["token", "sequence"])


def test_what_does_not_hold_is_a_value_error_with_the_message():
    with pytest.raises(ValueError, match=r"^Set beta above 0\.$"):
        require(False, "Set beta above 0.")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("word", "level='word' is unknown. Choose one of 'token', 'sequence'."),
        (None, "level=None is unknown. Choose one of 'token', 'sequence'."),
        ("Token", "level='Token' is unknown. Choose one of 'token', 'sequence'."),
    ],
)
def test_an_unknown_value_is_named_with_the_choices(value, message):
    with pytest.raises(ValueError) as error:
        require_one_of("level", value, ["token", "sequence"])
    assert str(error.value) == message


def test_none_may_be_allowed_without_being_offered():
    require_one_of("loss", None, [None, "dapo"])
    with pytest.raises(ValueError, match=r"Choose one of 'dapo'\.$"):
        require_one_of("loss", "grpo", [None, "dapo"])


def test_choices_may_be_read_once():
    """A generator, or the keys of a table."""
    require_one_of("loss", "dapo", (name for name in ("grpo", "dapo")))
    with pytest.raises(ValueError, match="Choose one of 'grpo', 'dapo'"):
        require_one_of("loss", "ppo", (name for name in ("grpo", "dapo")))
