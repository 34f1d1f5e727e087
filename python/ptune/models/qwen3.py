"""`ptune.models`, where the field's examples look for ``DistributedQwen3ForSequenceClassification`` and the like."""

from . import __getattr__ as __getattr__
