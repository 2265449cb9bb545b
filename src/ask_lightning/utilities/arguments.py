"""Checks of arguments, with messages that say what is allowed."""

from collections.abc import Collection


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not an integer of at least `least`.

    Raises:
        ValueError: With the argument's name, what it got and what is allowed.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Argument `{name}` has to be an integer of at least {least}, but got {value!r}.")


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Refuse what is not among the allowed values.

    Raises:
        ValueError: With the argument's name, what it got and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"Argument `{name}` has to be one of {allowed}, but got {value!r}.")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a number outside of [low, high]. Without `high` there is no upper limit.

    Raises:
        ValueError: With the argument's name, what it got and what is allowed.
    """
    if not (low <= value and (high is None or value <= high)):
        allowed = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise ValueError(f"Argument `{name}` has to be {allowed}, but got {value!r}.")
