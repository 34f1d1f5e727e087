"""Where a model loses precision in half types: an audit, its repairs, and a watch over a model that runs."""

from .casts import keep_fp32, to_half
from .damage import Limits
from .online import Watch, watch
from .passes import Audit, audit

__all__ = ["Audit", "Limits", "Watch", "audit", "keep_fp32", "to_half", "watch"]
