"""Where a model loses precision in half types: an audit, its repairs, and a watch over a model that runs."""

from .damage import Limits
from .passes import Audit, audit
from .repair import keep_fp32

__all__ = ["Audit", "Limits", "audit", "keep_fp32"]
