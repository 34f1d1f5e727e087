"""Where the prompt rows of a batch stand: immediately before each row's first real token."""

import torch
from torch import Tensor, nn

from ptune_kernels import Placement

from .mixture import Mixture


class Layout:
    """The place of m prompt rows in a batch of padded texts.

    Right padding becomes ``[prompt ; text ; pad]`` and left padding ``[pad ; prompt ; text]``: real columns stay
    contiguous, so that sliding windows and caches, which count columns, are exact. Where rows of the batch have prompts
    of their own lengths, m is the longest, and what a row does not fill of it is masked, on the left.

    Args:
        num_prompts: m, where all rows have the one prompt.
        batch_size: b.
        mask: [b, n], 1 for real tokens, else 0; ``None`` where every token is real.
        device: of the batch.
        mixture: the prompts of the rows, where these differ.
    """

    def __init__(
        self,
        num_prompts: int,
        batch_size: int,
        mask: Tensor | None,
        device: torch.device,
        mixture: Mixture | None = None,
    ) -> None:
        self.num_prompts = num_prompts if mixture is None else mixture.max_length
        self.mixture = mixture
        self.padded = mask is not None
        self.column = (
            torch.zeros(batch_size, dtype=torch.int32, device=device) if mask is None else first_column(mask.to(device))
        )

    def placement(self) -> Placement | None:
        """For the ops, over a pool that is this batch's prompt alone."""
        if self.mixture is not None:
            return Placement(self.mixture.start, self.mixture.length, self.column, self.num_prompts)
        if not self.padded:
            return None
        length = torch.full_like(self.column, self.num_prompts)
        return Placement(torch.zeros_like(self.column), length, self.column, self.num_prompts)

    @property
    def lengths(self) -> int | Tensor:
        """How many prompt rows stand before the text of each row: m, or int64 [b, 1]."""
        return self.num_prompts if self.mixture is None else self.mixture.length[:, None].long()

    def extend_mask(self, mask: Tensor) -> Tensor:
        """[b, n] → [b, m + n], prompt columns attended to."""
        # before a row's first real token the mask is 0, so that text before the prompt need not move
        return self._behind_room(mask).masked_fill(self._into_prompt(mask)[1], 1)

    def extend_positions(self, positions: Tensor, first: int) -> Tensor:
        """[b, n] → [b, m + n]: the prompt at ``first`` …, every text token by its length later."""
        offset, is_prompt = self._into_prompt(positions)
        return torch.where(is_prompt, offset + first, self._behind_room(positions) + self.lengths)

    def extend_types(self, types: Tensor) -> Tensor:
        """[b, n] → [b, m + n]: prompt rows have the type of the token they stand before."""
        own = types.gather(1, self.column[:, None].long())
        return torch.where(self._into_prompt(types)[1], own, self._behind_room(types))

    def extend_rows(self, text: Tensor, prompt: Tensor) -> Tensor:
        """[b, n, …] → [b, m + n, …], where every prompt row is ``prompt`` […]."""
        room = text.new_zeros(text.shape[0], self.num_prompts, *text.shape[2:])
        is_prompt = self._into_prompt(text)[1]
        return torch.where(is_prompt[(..., *[None] * prompt.dim())], prompt, torch.cat([room, text], 1))

    def columns_of_keys(self, length: int) -> Tensor | None:
        """[b, m + n]: the columns above of the keys of ``[prompt ; text]``; ``None`` where these are in that order."""
        if not self.padded or (not torch.compiler.is_compiling() and not bool(self.column.any())):
            return None
        text = torch.arange(length, device=self.column.device)
        column = self.column[:, None].long()
        prompt = torch.arange(self.num_prompts, device=self.column.device) + column
        return torch.cat([prompt, torch.where(text < column, text, text + self.num_prompts)], 1)

    def _behind_room(self, text: Tensor) -> Tensor:
        """[b, n] → [b, m + n]: real tokens stand behind the prompt wherever it stands; padding means nothing."""
        return nn.functional.pad(text, (self.num_prompts, 0))

    def _into_prompt(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[b, m + n], for ``text`` [b, n]: how far each column is into its row's prompt, and whether it is in it."""
        slot = torch.arange(self.num_prompts + text.shape[1], device=self.column.device)
        offset = slot - (self.column[:, None] + self.num_prompts - self.lengths)
        return offset, (offset >= 0) & (offset < self.lengths)


def ones_and_zeros(mask: Tensor) -> Tensor:
    """A mask whose real tokens are 1, in its dtype: where the first of them stands is read off the greatest value."""
    return (mask != 0).to(mask.dtype)


def first_column(mask: Tensor) -> Tensor:
    """[b] int32: where the first real token of each row stands, by `ones_and_zeros`; 0 where there is none."""
    # argmax is the first maximum, found without a host synchronisation
    return mask.to(torch.int32).argmax(-1).to(torch.int32)


def states_at(column: Tensor, states: Tensor) -> Tensor:
    """[b, n, d] → [b, d]: each row's at its ``column`` [b]."""
    return states[torch.arange(states.shape[0], device=states.device), column.to(states.device).long()]


def positions_of(mask: Tensor) -> Tensor:
    """[b, n] int64: how many real tokens precede each real token of the row; padding before them counts 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def roll_rows(tensor: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Each row of a batch rolled to the left along ``dim`` by its own shift [b]; negative shifts roll to the right."""
    size = tensor.shape[dim]
    index = (torch.arange(size, device=tensor.device) + shift[:, None].long()) % size
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = index.shape
    return tensor.gather(dim, index.view(shape).expand_as(tensor))
