"""`ptune.models`, where the field's examples look for ``DistributedMistralForSequenceClassification`` and the like."""

from . import __getattr__ as __getattr__
