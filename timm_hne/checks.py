"""Checks of numbers that users pass, with messages that name the argument, the value and what is allowed."""
import math
from numbers import Real
from typing import Any


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` if it is an integer from `low` to `high`, or of any size from `low` if `high` is None.

    Raises:
        TypeError: It is not an integer; a bool is none.
        ValueError: It is out of range.
    """
    allowed = f'at least {low}' if high is None else f'from {low} to {high}'
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an integer, {allowed}, got {value!r} of type {type(value).__name__}.')
    if value < low or (high is not None and value > high):
        raise ValueError(f'{name} must be {allowed}, got {value}.')
    return value


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False) -> float:
    """Return `value` if it is a finite number from `low` to `high`.

    Args:
        name: Name of the argument.
        value: Its value.
        low: Smallest number allowed.
        high: Largest number allowed.
        above: Refuse `low` itself.

    Raises:
        TypeError: It is not a number; a bool is none.
        ValueError: It is out of range, infinite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {value!r} of type {type(value).__name__}.')
    if not (low < value if above else low <= value) or not value <= high or not math.isfinite(value):
        lower = f'above {low:.6g}' if above else f'at least {low:.6g}'
        bounds = [lower] * (low > -math.inf) + [f'at most {high:.6g}'] * (high < math.inf)
        raise ValueError(f'{name} must be {" and ".join(bounds) or "finite"}, got {value}.')
    return value
