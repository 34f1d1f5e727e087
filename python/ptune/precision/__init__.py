"""Where a model loses precision in half types: an audit, its repairs, and a watch over a model that runs."""

from .damage import Limits
from .online import Watch, watch
from .passes import Audit, audit
from .repair import keep_fp32

__all__ = ["Audit", "Limits", "Watch", "audit", "keep_fp32", "watch"]
