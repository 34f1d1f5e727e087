"""The kinds of task: how each reads its data, feeds a model, and scores what comes back.

A task turns examples into features (dicts of lists), pads features into a batch, reduces a batch's logits to what its
metrics need, and scores an evaluation set from that. Gold labels are taken from the examples, not from the padded label
tensors, so what truncation cut off counts against the model.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Generic, TypeVar

import torch
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import position_limit
from .data import Columns, Labelled, Passage, Tagged, read_labelled, read_passages, read_tagged

logger = logging.getLogger(__name__)

Example = TypeVar("Example")
Features = dict[str, list[int]]
IGNORED = -100  # the label that transformers' losses skip
PREDICT_BATCH = 32


def accuracy(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """The share of equal pairs."""
    return sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold)


def scores_by_label(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each class that stands in `gold` or `predicted`, and its `examples` in `gold`.

    A precision of nothing predicted, or a recall of no example, is 0.
    """
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    there, said = Counter(gold), Counter(predicted)
    return {
        label: {
            "precision": hits[label] / max(1, said[label]),
            "recall": hits[label] / max(1, there[label]),
            "f1": 2 * hits[label] / (there[label] + said[label]),
            "examples": there[label],
        }
        for label in sorted(there | said)
    }


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """The plain mean of each class's F1, over the classes that stand in `gold` or `predicted`."""
    return mean(scores["f1"] for scores in scores_by_label(gold, predicted).values())


class Task(ABC, Generic[Example]):
    """One kind of task, with the tokenizer and labels of one model.

    Args:
        tokenizer: the base's own, with a padding token.
        max_length: the most tokens of an example that are used, special tokens included.
        labels: the class names, in the order of the head's outputs; empty for generation.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  # that a user may name
    metrics: ClassVar[tuple[str, ...]]  # the first chooses the best checkpoint
    greater_is_better: ClassVar[bool]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.labels = list(labels)
        self._ids = {label: index for index, label in enumerate(self.labels)}

    @staticmethod
    @abstractmethod
    def read(path: Path, columns: Columns) -> list[Example]:
        """Reads the examples of a file. Raises: DataError."""

    @staticmethod
    @abstractmethod
    def labels_of(example: Example) -> Sequence[str]:
        """The labels that stand in an example; none in generation."""

    @staticmethod
    @abstractmethod
    def stratum(example: Example) -> Hashable:
        """What a held-out part should have the same share of."""

    @staticmethod
    @abstractmethod
    def text_of(example: Example) -> str:
        """The example as plain text, to initialise prompts from."""

    @classmethod
    def label_names(cls, examples: Sequence[Example]) -> list[str]:
        """Every label of the examples, in the order of the head's outputs: "O" first, then by name."""
        return sorted({label for example in examples for label in cls.labels_of(example)}, key=lambda x: (x != "O", x))

    @staticmethod
    def is_known(label: str, labels: Sequence[str]) -> bool:
        """Whether what was learnt with `labels` can be scored on `label`."""
        return label in labels

    @abstractmethod
    def encode(self, example: Example) -> Features:
        """The `input_ids` and `labels` of an example (and `first_pieces` in tagging), at most `max_length` long."""

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What `score` needs of a batch's logits [b, …], as a tensor [b, …]: evaluation then keeps no logits."""
        return logits.argmax(-1)

    @abstractmethod
    def score(self, examples: Sequence[Example], features: Sequence[Features], reduced: Any) -> dict[str, float]:
        """The metrics of an evaluation set; `reduced` [len(examples), …] is padded with IGNORED."""

    def score_by_label(
        self, examples: Sequence[Example], features: Sequence[Features], reduced: Any
    ) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number of each label, or type of entity; none in generation."""
        return {}

    @abstractmethod
    def predict(self, model: PreTrainedModel, texts: Sequence[str], **options: Any) -> Iterator[dict[str, Any]]:
        """Yields one JSON-able record per text, in order."""

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """Pads on the right: `input_ids`, `attention_mask`, `labels`, int64 [b, n] (labels of classes are [b])."""
        batch = self._pad([feature["input_ids"] for feature in features])
        if "labels" in features[0]:
            batch["labels"] = self._collate_labels([feature["labels"] for feature in features])
        return batch

    def _collate_labels(self, labels: Sequence[list[int]]) -> Tensor:
        return _pad(labels, IGNORED)

    def _pad(self, ids: Sequence[list[int]], left: bool = False) -> dict[str, Tensor]:
        mask = _pad([[1] * len(row) for row in ids], 0, left)
        return {"input_ids": _pad(ids, self.tokenizer.pad_token_id, left), "attention_mask": mask}

    @torch.inference_mode()
    def _logits(self, model: PreTrainedModel, features: Sequence[Features]) -> Iterator[Tensor]:
        """Yields each feature's logits, [labels] or [n, labels], in order, computed in batches of like length.

        A warning says how many texts may have been cut.
        """
        if full := sum(len(feature["input_ids"]) == self.max_length for feature in features):
            logger.warning(f"{full} of {len(features)} texts reach {self.max_length} tokens and may be cut")
        by_length = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
        logits: list[Tensor] = [torch.empty(0)] * len(features)
        model.eval()
        for start in range(0, len(by_length), PREDICT_BATCH):
            chosen = by_length[start : start + PREDICT_BATCH]
            batch = self.collate([features[index] for index in chosen])
            output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            for index, row in zip(chosen, output.float().cpu(), strict=True):
                logits[index] = row
        yield from logits


class Classification(Task[Labelled]):
    """A class for a text."""

    name = "classification"
    columns = ("text", "label")
    metrics = ("macro_f1", "accuracy")
    greater_is_better = True

    @staticmethod
    def read(path: Path, columns: Columns) -> list[Labelled]:
        return read_labelled(path, columns)

    @staticmethod
    def labels_of(example: Labelled) -> Sequence[str]:
        return [example.label]

    @staticmethod
    def stratum(example: Labelled) -> Hashable:
        return example.label

    @staticmethod
    def text_of(example: Labelled) -> str:
        return example.text

    def encode(self, example: Labelled) -> Features:
        return {**self._encode_text(example.text), "labels": [self._ids[example.label]]}

    def _encode_text(self, text: str) -> Features:
        return {"input_ids": self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]}

    def _collate_labels(self, labels: Sequence[list[int]]) -> Tensor:
        return torch.tensor(labels).squeeze(1)

    def score(self, examples: Sequence[Labelled], features: Sequence[Features], reduced: Any) -> dict[str, float]:
        gold, predicted = self._both(examples, reduced)
        return {"accuracy": accuracy(gold, predicted), "macro_f1": macro_f1(gold, predicted)}

    def score_by_label(
        self, examples: Sequence[Labelled], features: Sequence[Features], reduced: Any
    ) -> dict[str, dict[str, float]]:
        return scores_by_label(*self._both(examples, reduced))

    def _both(self, examples: Sequence[Labelled], reduced: Any) -> tuple[list[str], list[str]]:
        return [example.label for example in examples], [self.labels[index] for index in reduced]

    def predict(
        self, model: PreTrainedModel, texts: Sequence[str], all_scores: bool = False, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """`all_scores`: those of every label too, by label."""
        logits = self._logits(model, [self._encode_text(text) for text in texts])
        for text, row in zip(texts, logits, strict=True):
            scores = {
                label: round(score, 4) for label, score in zip(self.labels, row.softmax(-1).tolist(), strict=True)
            }
            label = self.labels[row.argmax()]
            yield {"text": text, "label": label, "score": scores[label]} | ({"scores": scores} if all_scores else {})


class Tagging(Task[Tagged]):
    """A tag for every word of a sentence, scored by whole entities.

    A word is tagged at its first piece. A word without one (cut off, or nothing but control characters) is "O".
    """

    name = "tagging"
    columns = ()
    metrics = ("entity_f1", "entity_precision", "entity_recall")
    greater_is_better = True

    @staticmethod
    def read(path: Path, columns: Columns) -> list[Tagged]:
        return read_tagged(path)

    @staticmethod
    def labels_of(example: Tagged) -> Sequence[str]:
        return example.tags

    @staticmethod
    def is_known(label: str, labels: Sequence[str]) -> bool:
        # I-x is known where training had B-x alone, of entities of one word
        return label in labels or label[2:] in {tag[2:] for tag in labels if tag != "O"}

    @staticmethod
    def stratum(example: Tagged) -> Hashable:
        return any(tag != "O" for tag in example.tags)

    @staticmethod
    def text_of(example: Tagged) -> str:
        return " ".join(example.words)

    def encode(self, example: Tagged) -> Features:
        features = self._encode_words(example.words)
        labels = [IGNORED] * len(features["input_ids"])
        for tag, position in zip(example.tags, features["first_pieces"], strict=True):
            if position != IGNORED:
                labels[position] = self._ids.get(tag, IGNORED)  # one that training had not counts in scores alone
        return {**features, "labels": labels}

    def _encode_words(self, words: Sequence[str]) -> Features:
        encoded = self.tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=self.max_length)
        first_pieces = [IGNORED] * len(words)
        for position, word in reversed(list(enumerate(encoded.word_ids()))):
            if word is not None:
                first_pieces[word] = position
        return {"input_ids": encoded["input_ids"], "first_pieces": first_pieces}

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[b, 2 + n]: `_summed_loss`, and the ids of the tags."""
        return torch.cat([_summed_loss(logits, labels), logits.argmax(-1)], 1)

    def score(self, examples: Sequence[Tagged], features: Sequence[Features], reduced: Any) -> dict[str, float]:
        gold, predicted = self._both(examples, features, reduced)
        scores = (f1_score, precision_score, recall_score)
        values = [float(score(gold, predicted, zero_division=0)) for score in scores]
        return {"loss": _mean_loss(reduced)} | dict(zip(self.metrics, values, strict=True))

    def score_by_label(
        self, examples: Sequence[Tagged], features: Sequence[Features], reduced: Any
    ) -> dict[str, dict[str, float]]:
        gold, predicted = self._both(examples, features, reduced)
        if not any(map(get_entities, gold + predicted)):
            return {}  # of which there is no report
        found = classification_report(gold, predicted, output_dict=True, zero_division=0)
        names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "examples": "support"}
        kinds = {kind for tags in gold + predicted for kind, _, _ in get_entities(tags)}
        return {kind: {name: found[kind][its].item() for name, its in names.items()} for kind in sorted(kinds)}

    def _both(
        self, examples: Sequence[Tagged], features: Sequence[Features], reduced: Any
    ) -> tuple[list[list[str]], list[list[str]]]:
        ids = reduced[:, 2:].astype(int)
        predicted = [self._tags(feature, row) for feature, row in zip(features, ids, strict=True)]
        return [list(example.tags) for example in examples], predicted

    def predict(self, model: PreTrainedModel, texts: Sequence[str], **options: Any) -> Iterator[dict[str, Any]]:
        sentences = [text.split() for text in texts]
        features = [self._encode_words(words) for words in sentences]
        for words, feature, row in zip(sentences, features, self._logits(model, features), strict=True):
            tags = self._tags(feature, row.argmax(-1))
            entities = [
                {"type": kind, "text": " ".join(words[first : last + 1]), "first_word": first, "last_word": last}
                for kind, first, last in get_entities(tags)
            ]
            yield {"words": words, "tags": tags, "entities": entities}

    def _tags(self, features: Features, predicted: Any) -> list[str]:
        """The tag of each word; `predicted` holds a label id for each piece."""
        return ["O" if first == IGNORED else self.labels[predicted[first]] for first in features["first_pieces"]]


class Generation(Task[Passage]):
    """Text that follows a prompt, or is learnt whole, scored by the perplexity of its tokens and its end."""

    name = "generation"
    columns = ("text", "prompt", "completion")
    metrics = ("perplexity",)
    greater_is_better = False

    @staticmethod
    def read(path: Path, columns: Columns) -> list[Passage]:
        return read_passages(path, columns)

    @staticmethod
    def labels_of(example: Passage) -> Sequence[str]:
        return []

    @staticmethod
    def stratum(example: Passage) -> Hashable:
        return None

    @staticmethod
    def text_of(example: Passage) -> str:
        return f"{example.prompt} {example.completion}".strip()

    def encode(self, example: Passage) -> Features:
        prompt = self._encode_prompt(example.prompt)
        completion = self._encode_completion(prompt, example)
        completion = [*completion, self.tokenizer.eos_token_id][: self.max_length - len(prompt)]
        return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}

    def _encode_completion(self, prompt: list[int], example: Passage) -> list[int]:
        """The tokens that follow ``prompt``, which stand where both texts are read as one if these begin with it."""
        both, unknown = self._encode(example.prompt + example.completion), self.tokenizer.unk_token_id
        # one unknown token may stand for what is on both sides of the seam
        if both[: len(prompt)] == prompt and not (example.prompt and prompt[-1:] == [unknown]):
            return both[len(prompt) :]
        # A token would reach over the seam. Many tokenizers put a space before a text, but none into it.
        for before in ("\n", ":", "0"):
            alone, follows = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (before, before + example.completion)
            )
            if alone and unknown not in alone and follows[: len(alone)] == alone:
                return follows[len(alone) :]
        return self.tokenizer(example.completion, add_special_tokens=False)["input_ids"]

    @cached_property
    def _closes(self) -> bool:
        """Whether the tokenizer closes every text."""
        ids, alone = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        return ids[-1:] == [self.tokenizer.eos_token_id] and ids[len(ids) - len(alone) :] != alone

    def _encode(self, text: str) -> list[int]:
        """As the beginning of a text that goes on."""
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if self._closes else ids

    def _encode_prompt(self, prompt: str) -> list[int]:
        ids = self._encode(prompt)
        if len(ids) >= self.max_length:
            raise ValueError(f"max_length: {self.max_length} tokens leave no room after the prompt {prompt[:60]!r}")
        return ids

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[b, 2]: `_summed_loss`."""
        return _summed_loss(logits[:, :-1], labels[:, 1:])

    def score(self, examples: Sequence[Passage], features: Sequence[Features], reduced: Any) -> dict[str, float]:
        loss = _mean_loss(reduced)
        return {"loss": loss, "perplexity": torch.tensor(loss).exp().item()}  # of a run that diverged, inf

    @torch.inference_mode()
    def predict(
        self, model: Any, texts: Sequence[str], max_new_tokens: int = 64, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """`options` go to `model.generate`; the default is greedy.

        Where a table of positions leaves less room than `max_new_tokens`, completions end there, and a warning says so.
        """
        model.eval()
        prompts = [self._encode_prompt(text) for text in texts]
        limits = [min(max_new_tokens, _room_after(model, prompt)) for prompt in prompts]
        short = sum(limit < max_new_tokens for limit in limits)
        if short:
            logger.warning(
                f"max_new_tokens: the model's positions leave room for fewer than {max_new_tokens} after {short} of "
                f"{len(texts)} prompts, which are completed up to there"
            )
        # A row's limit must not depend on its neighbours, so a batch holds rows of one limit.
        for limit, group in groupby(range(len(texts)), key=limits.__getitem__):
            indices = list(group)
            for start in range(0, len(indices), PREDICT_BATCH):
                chosen = indices[start : start + PREDICT_BATCH]
                rows = self._complete(model, [prompts[i] for i in chosen], max_new_tokens=limit, **options)
                for i, row in zip(chosen, rows, strict=True):
                    yield {"prompt": texts[i], "completion": self._decode(texts[i], prompts[i], row)}

    def _complete(self, model: Any, prompts: Sequence[list[int]], **options: Any) -> list[list[int]]:
        apart = model.config.is_encoder_decoder  # prompts, which are not written again
        batch = {name: tensor.to(model.device) for name, tensor in self._pad(prompts, left=not apart).items()}
        ends = model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        fixed = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": sorted(ends)}
        ids = model.generate(**batch, **{"do_sample": False, **fixed, **options})
        first = 0 if apart else batch["input_ids"].shape[1]
        return ids[:, first:].tolist()

    def _decode(self, text: str, prompt: list[int], ids: list[int]) -> str:
        """What of ``ids`` follows the prompt ``text``: many tokenizers drop a space that a text begins with."""
        before, both, after = self.tokenizer.batch_decode([prompt, prompt + ids, ids], skip_special_tokens=True)
        if not both.startswith(before):  # half of a character may end the prompt
            return after
        after = both[len(before) :]
        # others drop the one that the prompt ends in
        return after.lstrip() if text[-1:].isspace() and not before[-1:].isspace() else after


class Seq2Seq(Generation):
    """Generation by an encoder-decoder: its encoder reads the prompt, and its decoder writes the completion.

    Each may be `max_length` tokens long.
    """

    name = "seq2seq"

    def _decode(self, text: str, prompt: list[int], ids: list[int]) -> str:
        return self.tokenizer.batch_decode([ids], skip_special_tokens=True)[0]

    @staticmethod
    def read(path: Path, columns: Columns) -> list[Passage]:
        return read_passages(path, columns, pairs=True)

    @staticmethod
    def text_of(example: Passage) -> str:
        return example.prompt

    def encode(self, example: Passage) -> Features:
        completion = self._cut(text_target=example.completion)
        if self.tokenizer.eos_token_id not in completion:  # a language may follow it
            completion = [*completion, self.tokenizer.eos_token_id][: self.max_length]
        return {"input_ids": self._encode_prompt(example.prompt), "labels": completion}

    def _encode_prompt(self, prompt: str) -> list[int]:
        return self._cut(text=prompt)

    def _cut(self, **text: str) -> list[int]:
        return self.tokenizer(**text, truncation=True, max_length=self.max_length)["input_ids"]

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _summed_loss(logits, labels)  # each stands where it is predicted


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Tagging, Generation, Seq2Seq)}
WRITING = ("generation", "seq2seq")  # one task, without labels, on two kinds of base


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """[b, 2] fp32: the summed negative log-likelihood of each row's labels, and their number."""
    loss = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([loss.sum(1), (labels != IGNORED).sum(1)], 1)


def _mean_loss(reduced: Any) -> float:
    """Of all labels, whatever the batches were; `reduced` [examples, 2 or more]: `_summed_loss`."""
    loss, count = reduced[:, :2].sum(0, dtype="float64")
    return float(loss / count)


def _room_after(model: Any, prompt: Sequence[int]) -> float:
    """How many tokens may follow a prompt where the model has a table of positions: the last needs none."""
    _, positions = position_limit(model.base_model)
    if positions is None:
        return math.inf
    # a decoder with an encoder begins with a start token alone
    taken = 1 if model.config.is_encoder_decoder else getattr(model, "prompt_columns", 0) + len(prompt)
    return positions - taken + 1


def _pad(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)])
