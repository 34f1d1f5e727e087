"""`generate` with prompts: they are run once, in the prefill, and then live in the cache."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, masking_utils

from .inputs import BEFORE_5_24, CACHE, named
from .mixture import current_mixture

MASK = "attention_mask"
_LIKE_TEXT = (MASK, "position_ids", "token_type_ids")  # as wide


class PromptGeneration:
    """What `generate` must know of the m columns that the prompt takes in a cache."""

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.prompts_enabled:
            # of what fails in its thread, it logs an error and returns no tokens
            raise NotImplementedError(
                "continuous batching (generate_batch, or cache_implementation='paged'): not supported with prompts, "
                "because it packs texts into one row; generate for a padded batch instead"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _prefill(
        self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        run = super()._prefill  # type: ignore[misc]
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get(MASK)
        if generation_config.prefill_chunk_size is not None and self.prompt_columns > 0 and cache is not None:
            if (seen := int(cache.get_seq_length()) - self.prompt_columns) >= 0:
                run = partial(_prefill_in_chunks, run, seen)
            elif mask is not None and bool((mask == 0).any()):
                # a first chunk may be padding alone, and the prompt belongs before the first token of a later one
                raise NotImplementedError(
                    "prefill_chunk_size: not supported for padded batches with prompts; leave it out, or generate for "
                    "texts of one length"
                )
        return run(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        kwargs = named((), (), kwargs)
        cache = kwargs.get(CACHE)
        if next_sequence_length is not None and cache is not None:
            # a conversation or a draft goes on: what is new was counted as all text less all columns of the cache
            text = input_ids if inputs_embeds is None else inputs_embeds
            seen = cache.get_seq_length()
            # a static cache counts in a tensor, which not every step shall wait for: nobody drafts with one
            read = is_first_iteration or isinstance(seen, int)
            if read and seen > 0 and next_sequence_length == text.shape[1] - int(seen):
                next_sequence_length += self.prompt_columns
        original, columns = getattr(self.config, "original_max_position_embeddings", None), self.prompt_columns
        if (
            columns > 0
            and original is not None
            and cache is not None
            and 0 < cache.get_seq_length() <= original < input_ids.shape[1] + columns
        ):
            # beyond it rotary embeddings are others: Phi-3 computes all anew there, but counts the text alone
            kwargs[CACHE] = next_sequence_length = None
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def create_masks_for_generate(
        self: Any,
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A static cache's mask, [b, n] rather than 4-D: the body adds the prompt's columns and makes the rest."""
        cache, mixture = kwargs[CACHE], current_mixture(self)
        if not self.prompts_enabled and mixture is None:
            stock = getattr(super(), "create_masks_for_generate", masking_utils.create_masks_for_generate)
            return stock(config, inputs_embeds, attention_mask, is_first_iteration=is_first_iteration, **kwargs)
        padded = attention_mask is not None and is_first_iteration and bool((attention_mask == 0).any())
        if config.model_type == "bloom" and (padded or mixture is not None):
            raise NotImplementedError(
                f"{type(self).__name__}: static caches are not supported for padded batches with prompts, nor in banks,"
                " as it makes its bias of the mask"
            )
        if config.is_encoder_decoder or is_first_iteration or isinstance(cache.get_seq_length(), int):
            return attention_mask
        # as wide at every step, or a compiled decoding step would be compiled again for each
        columns = cache.get_max_length() - self.prompt_columns
        if attention_mask is None:
            return torch.ones(inputs_embeds.shape[0], columns, dtype=torch.long, device=inputs_embeds.device)
        return nn.functional.pad(attention_mask, (0, max(0, columns - attention_mask.shape[1])))

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        keeps_none = BEFORE_5_24 and self.training and self.is_gradient_checkpointing
        if self.prompt_columns > 0 and generation_config.use_cache and keeps_none:
            raise ValueError(
                "generate: gradient checkpointing keeps no cache while the model is in training mode; call "
                "model.eval(), or pass use_cache=False"
            )
        needed, cache = max_cache_length + self.prompt_columns, model_kwargs.get(CACHE)
        if self.prompt_columns > 0 and isinstance(cache, Cache) and cache.is_compileable:
            layers: list[Any] = cache.layers
            room = min((layer.max_cache_len for layer in layers if not layer.is_sliding), default=needed)
            if room < needed:
                raise ValueError(
                    f"{CACHE}: expected a static cache of at least {needed} columns, {self.prompt_columns} of "
                    f"them for the prompt, got {room}"
                )
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, needed
        )
        made = model_kwargs.get(CACHE)
        limit, mask = None if self._hooks is None else self._hooks.position_limit, model_kwargs.get("attention_mask")
        if limit is not None and self.prompt_columns > 0 and isinstance(made, Cache) and made.is_compileable:
            # it counts in a tensor, which no step reads
            positions = needed
            if mask is not None and self._hooks.padding_has_no_positions:
                positions -= int((mask == 0).sum(-1).min())
            if positions > limit:
                raise ValueError(
                    f"input too long: {self.prompt_columns} prompt rows, the text and what may follow it need "
                    f"{positions} positions, but {type(self).__name__} has only {limit}"
                )
        if self.prompt_columns > 0 and generation_config.is_assistant and made is not None and made is not cache:
            # assisted decoding crops all columns but those of the text that it keeps, the prompt's among them
            made.crop = partial(_crop_text, made, self.prompt_columns)


def _crop_text(cache: Any, prompt_columns: int, removed: int) -> None:
    type(cache).crop(cache, min(0, removed + prompt_columns))


def _prefill_in_chunks(
    run: Any, seen: int, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
) -> Any:
    """Go on from a cache that holds a prompt and ``seen`` columns of text, each chunk as a text by itself.

    transformers' own chunks begin where the cache ends, and count its prompt as text.
    """
    whole, (rows, length), mask = copy.copy(generation_config), input_ids.shape, model_kwargs.get(MASK)
    size, whole.prefill_chunk_size = generation_config.prefill_chunk_size, None
    if mask is None:  # it was of ones, as wide as is noted; where there was none, what is new was given alone
        all_text = getattr(generation_config, "_mask_length", None) == length
        mask = torch.ones(rows, length if all_text else seen + length, dtype=torch.long, device=input_ids.device)
    columns = mask.shape[1]
    like_text = {name: model_kwargs[name] for name in _LIKE_TEXT if model_kwargs.get(name) is not None} | {MASK: mask}
    for begin in range(seen, max(seen + 1, columns), size):
        later = max(0, columns - begin - size)
        parts = {name: its[..., : its.shape[-1] - later] for name, its in like_text.items()}
        ids = input_ids[:, : length - later]
        if length < columns:
            ids = ids[:, -min(size, columns - begin) :]
        output = run(ids, whole, model_kwargs | parts, *args, **kwargs)
    return output
