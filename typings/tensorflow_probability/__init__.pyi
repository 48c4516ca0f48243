# TFP 0.25 loads its modules on first use, which hides their classes from pyright.
from typing import Any

from . import bijectors as bijectors
from . import distributions as distributions

def __getattr__(name: str) -> Any: ...
