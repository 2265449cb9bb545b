"""Checks of arguments, with messages that say what is allowed."""

from collections.abc import Collection


def check_count(name: str, value: object, least: int = 1, *, other: str = "") -> None:
    """Refuse a value that is not an integer of at least `least`.

    Args:
        name: Name of the argument, for the message.
        value: Value that was passed.
        least: Smallest allowed value.
        other: What else is allowed, as the caller found that it was not passed, for the message.

    Raises:
        ValueError: The value is not such an integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"an integer of at least {least}" + (f" or {other}" if other else "")
        raise ValueError(f"Argument `{name}` has to be {allowed}, but got {value!r}.")


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Refuse a value that is not among the allowed ones.

    Args:
        name: Name of the argument, for the message.
        value: Value that was passed.
        allowed: All values that are allowed.

    Raises:
        ValueError: The value is another one.
    """
    if value not in allowed:
        raise ValueError(f"Argument `{name}` has to be one of {allowed}, but got {value!r}.")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a number outside the closed interval from `low` to `high`, and NaN.

    Args:
        name: Name of the argument, for the message.
        value: Number that was passed.
        low: Smallest allowed number.
        high: Largest allowed number; without it there is no upper limit.

    Raises:
        ValueError: The number lies outside.
    """
    if not (low <= value and (high is None or value <= high)):
        allowed = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ValueError(f"Argument `{name}` has to be {allowed}, but got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not above zero, and NaN.

    Args:
        name: Name of the argument, for the message.
        value: Number that was passed.

    Raises:
        ValueError: The number is zero, negative or NaN.
    """
    if not value > 0:
        raise ValueError(f"Argument `{name}` has to be positive, but got {value}.")


def check_fraction(name: str, value: float) -> None:
    """Refuse a number outside the half-open interval from 0 to 1, and NaN.

    Args:
        name: Name of the argument, for the message.
        value: Number that was passed; 0 is allowed, 1 is not.

    Raises:
        ValueError: The number lies outside.
    """
    if not 0 <= value < 1:
        raise ValueError(f"Argument `{name}` has to be in [0, 1), but got {value}.")
