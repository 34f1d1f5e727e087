"""Pooling over the text, by its mask, and the sequence classification that does it.

Stock decoders find the last token by ``pad_token_id`` (wrong where it is also the end of text, an error where there is
none), and stock encoders take the first column, which is padding in a row that is padded on the left.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .inputs import CACHE, check_mask, named
from .layout import first_column, ones_and_zeros, roll_rows, states_at

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


def pooled_forward(base: type) -> Callable[..., Any]:
    """The forward of a sequence classifier with prompts, under the signature of ``base``'s own."""
    stock = base.forward  # type: ignore[attr-defined]
    names = tuple(inspect.signature(stock).parameters)[1:]

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.prompts_disabled:
            return stock(self, *args, **kwargs)
        arguments = named(names, args, kwargs)
        mask = arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return _classify_last_token(self, arguments) if _pools_last_token(self) else stock(self, **arguments)
        arguments["attention_mask"] = mask = ones_and_zeros(mask)
        if _pools_last_token(self):
            return _classify_last_token(self, arguments)
        return _classify_padded_right(self, stock, arguments, mask)

    return forward


def _pools_last_token(model: Any) -> bool:
    stock = model.base_class.forward
    return stock is GenericForSequenceClassification.forward or (
        hasattr(model, "score") and not hasattr(model, "pooling") and not hasattr(model, "classifier")
    )


def _classify_last_token(model: Any, arguments: dict[str, Any]) -> Any:
    return_dict, labels = arguments.pop("return_dict", None), arguments.pop("labels", None)
    outputs = model.base_model(**arguments, return_dict=True)
    hidden = outputs.last_hidden_state
    if (mask := arguments.get("attention_mask")) is None:
        if (ids := arguments.get("input_ids")) is not None:
            model.warn_if_padding_and_no_attention_mask(ids, None)  # a stock decoder would guess
        pooled = hidden[:, -1]
    else:
        from_the_end = first_column(mask[:, -hidden.shape[1] :].flip(1))
        pooled = states_at(hidden.shape[1] - 1 - from_the_end, hidden)
    logits = model.score(pooled)
    loss = None
    if labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=model.config)
    output = SequenceClassifierOutputWithPast(
        loss=loss,
        logits=logits,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
        **{CACHE: outputs.get(CACHE)},
    )
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _classify_padded_right(model: Any, stock: Callable[..., Any], arguments: dict[str, Any], mask: Tensor) -> Any:
    """The stock forward on rows rolled to start at their first real token; recorded states are rolled back."""
    check_mask(arguments)
    shift = first_column(mask)
    for name in _TEXT:
        if (value := arguments.get(name)) is not None:
            arguments[name] = roll_rows(value.expand(mask.shape[0], *value.shape[1:]), shift, 1)
    return_dict = arguments.pop("return_dict", None)
    output = stock(model, **arguments, return_dict=True)
    if output.hidden_states is not None:
        output["hidden_states"] = tuple(roll_rows(state, -shift, 1) for state in output.hidden_states)
    if output.attentions is not None:
        output["attentions"] = tuple(roll_rows(roll_rows(a, -shift, 2), -shift, 3) for a in output.attentions)
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def pool(body: Any, first: Tensor) -> Tensor:
    """The body's own pooling of each row's first token, [b, d]."""
    if getattr(body, "pooler", None) is None:
        raise NotImplementedError(f"{type(body).__name__}: prompts are not supported, because it pools in its forward")
    if isinstance(body.pooler, nn.Linear):
        activation = body.pooler_activation if hasattr(body, "pooler_activation") else body.activation
        return activation(body.pooler(first))
    return body.pooler(first[:, None])
