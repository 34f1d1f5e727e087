"""The ops in one's own model: a plain PyTorch transformer, trained, frozen, and then tuned to other text by deep
prompts.

The model learns the standard library's code character by character; the prompts then teach it the library's prose
(docstrings), which it reads far worse. Run: ``python examples/own_model.py``.
"""

import ast
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptune_kernels import embed_and_prepend, overwrite_

WIDTH, HEADS, LAYERS, LENGTH, PROMPT, BATCH = 64, 4, 2, 48, 16, 32


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        b, n, _ = hidden.shape
        q, k, v = self.qkv(self.norm1(hidden)).view(b, n, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, WIDTH)
        hidden = hidden + self.out(attended)
        return hidden + self.mlp(self.norm2(hidden))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out. Positions are added in the blocks' input, prompt rows first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(PROMPT + LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
        """ids [b, n], prompts [LAYERS, PROMPT, WIDTH] float32 or None → logits [b, n, 256]."""
        if prompts is None:
            hidden = self.embedding(ids) + self.positions[PROMPT : PROMPT + ids.shape[1]]
        else:
            hidden = embed_and_prepend(prompts[0], ids, self.embedding.weight)
            hidden = hidden + self.positions[: hidden.shape[1]]
        for i, block in enumerate(self.blocks):
            if prompts is not None and i > 0:
                # In place: no backward formula needs the rows that the last block's sum left here.
                hidden = overwrite_(hidden, prompts[i])
            hidden = block(hidden)
        return self.head(self.norm(hidden[:, hidden.shape[1] - ids.shape[1] :]))


def corpora() -> tuple[Tensor, Tensor]:
    """Some standard library modules as bytes: their code without docstrings, and their docstrings."""
    code, prose = [], []
    for name in ("argparse", "ast", "base64", "calendar", "csv", "dis", "heapq", "inspect", "random", "textwrap"):
        spec = importlib.util.find_spec(name)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                prose.append(text)
                node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return tuple(torch.tensor(list("\n".join(texts).encode()), dtype=torch.long) for texts in (code, prose))


def batch_of(text: Tensor) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (BATCH,))
    return text[starts[:, None] + torch.arange(LENGTH)]


def loss_of(model: nn.Module, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
    return F.cross_entropy(model(ids, prompts)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def score(model: nn.Module, text: Tensor, prompts: Tensor | None = None) -> float:
    """Nats per byte over a whole text."""
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return sum(loss_of(model, part, prompts).item() * len(part) for part in rows.split(256)) / len(rows)


def train(parameters, loss, steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def main(pretrain_steps: int = 200, tune_steps: int = 150) -> tuple[float, float]:
    """Returns the loss on held-out prose before and after tuning."""
    torch.manual_seed(0)
    code, prose = corpora()
    prose, held_out = prose[: len(prose) * 4 // 5], prose[len(prose) * 4 // 5 :]
    model = LanguageModel()
    train(model.parameters(), lambda: loss_of(model, batch_of(code)), pretrain_steps, 4e-3)
    model.requires_grad_(False)

    # Real text's own states at each layer, where prompts learn best from.
    states = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: states.append(args[0][0, :PROMPT])) for block in model.blocks
    ]
    model(prose[None, :LENGTH])
    for hook in hooks:
        hook.remove()
    states[0] = model.embedding(prose[:PROMPT])
    prompts = nn.Parameter(torch.stack(states))

    before = score(model, held_out)
    train([prompts], lambda: loss_of(model, batch_of(prose), prompts), tune_steps, 1e-1)
    after = score(model, held_out, prompts)
    print(f"held-out prose, nats per byte: {before:.3f} frozen, {after:.3f} with {prompts.numel():,} trained numbers")
    return before, after


if __name__ == "__main__":
    main()
