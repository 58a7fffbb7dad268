"""Values as result files have them: JSON as everybody reads it. Imports nothing that takes time."""

import math
from collections.abc import Callable
from typing import Any


def plain(value: Any, infinite: Callable[[float], Any] = lambda _: None, digits: int = 5) -> Any:
    """Return a value with numbers of few digits; ``infinite`` says what NaN and infinities are, which JSON has not."""
    if isinstance(value, dict):
        return {key: plain(one, infinite, digits) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one, infinite, digits) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else infinite(value)
    return value
