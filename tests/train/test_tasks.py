"""What a task feeds a model and what it makes of the answer, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ptune import AutoPTuneModelForCausalLM, AutoPTuneModelForSeq2SeqLM
from ptune.data import Labelled, Passage, Tagged
from ptune.tasks import IGNORED, Classification, Generation, Seq2Seq, Tagging, accuracy, macro_f1, scores_by_label

from .tiny import SPECIAL, WORDS, word_tokenizer

PAD, UNK, CLS, SEP = range(4)
WORD = {word: index for index, word in enumerate(SPECIAL + WORDS)}


def test_accuracy_and_macro_f1_by_hand():
    gold = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "d", "d"]
    assert accuracy(gold, predicted) == 3 / 6
    # a: 2 hits of 3 gold, 2 predicted; b: 1 of 2, 2; c and d: none
    assert macro_f1(gold, predicted) == pytest.approx((4 / 5 + 2 / 4 + 0 + 0) / 4)


def test_scores_by_label_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = np.random.default_rng().integers(0, 5, (2, 200)).astype(str)
    gold[gold == "2"], predicted[predicted == "3"] = "1", "0"  # one that is never right, another that is never said
    assert macro_f1(list(gold), list(predicted)) == pytest.approx(metrics.f1_score(gold, predicted, average="macro"))
    expected = metrics.precision_recall_fscore_support(gold, predicted, zero_division=0)
    found = scores_by_label(list(gold), list(predicted))
    assert list(found) == ["0", "1", "2", "3", "4"]
    for got, *its in zip(found.values(), *expected, strict=True):
        assert list(got) == ["precision", "recall", "f1", "examples"]
        assert list(got.values()) == pytest.approx(its)


def test_classification_features_and_score():
    task = Classification(word_tokenizer(), 4, ["x", "y"])
    features = [task.encode(Labelled("good", "y")), task.encode(Labelled("bad bad bad", "x"))]
    batch = task.collate(features)
    assert batch["input_ids"].tolist() == [[CLS, WORD["good"], SEP, PAD], [CLS, WORD["bad"], WORD["bad"], SEP]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert task.reduce(torch.tensor([[0.1, 0.3], [2.0, -1.0]]), batch["labels"]).tolist() == [1, 0]
    examples = [Labelled("good", "y"), Labelled("bad", "x"), Labelled("one", "x")]
    assert task.score(examples, [], np.array([1, 1, 0])) == {
        "accuracy": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(2 / 3),
    }


def reduced(task, features, predicted):
    """What evaluation keeps of a batch whose logits say `predicted` [b, n]."""
    logits = 9.0 * torch.nn.functional.one_hot(torch.tensor(predicted), len(task.labels))
    return task.reduce(logits, task.collate(features)["labels"]).numpy()


def test_tags_stand_at_first_pieces_and_lost_words_count():
    task = Tagging(word_tokenizer(), 5, ["O", "B-per", "I-per", "B-loc"])
    example = Tagged(("Ann", "Bob", "in", "Rome"), ("B-per", "I-per", "O", "B-loc"))
    features = task.encode(example)  # five tokens: [CLS], three words, [SEP]; Rome is cut
    assert features["input_ids"] == [CLS, WORD["Ann"], WORD["Bob"], WORD["in"], SEP]
    assert features["first_pieces"] == [1, 2, 3, IGNORED]
    assert features["labels"] == [IGNORED, 1, 2, 0, IGNORED]
    predicted = reduced(task, [features], [[3, 1, 2, 0, 3]])  # what stands at [CLS] and [SEP] is nobody's tag
    # one entity of one predicted is right, and one of two gold is found
    assert task.score([example], [features], predicted) == {
        "loss": pytest.approx(math.log(1 + 3 * math.exp(-9)), abs=1e-6),
        "entity_precision": 1.0,
        "entity_recall": 0.5,
        "entity_f1": pytest.approx(2 / 3),
    }


def test_a_word_of_many_pieces_is_tagged_at_the_first():
    task = Tagging(word_tokenizer(), 20, ["O", "B-per"])
    features = task.encode(Tagged(("Ann-Bob", "in"), ("B-per", "O")))
    assert features["input_ids"] == [CLS, WORD["Ann"], UNK, WORD["Bob"], WORD["in"], SEP]
    assert features["labels"] == [IGNORED, 1, IGNORED, IGNORED, 0, IGNORED]


def test_tags_that_go_on_with_known_entities():
    labels = ["O", "B-per"]
    assert [Tagging.is_known(tag, labels) for tag in ("O", "B-per", "I-per", "I-loc")] == [True, True, True, False]
    assert not Tagging.is_known("O", ["B-per"])
    task = Tagging(word_tokenizer(), 20, labels)
    example = Tagged(("Ann", "Bob", "Ann"), ("B-per", "I-per", "O"))
    features = task.encode(example)
    assert features["labels"] == [IGNORED, 1, IGNORED, 0, IGNORED]
    scores = task.score([example], [features], reduced(task, [features], [[0, 1, 0, 0, 0]]))
    assert scores["entity_recall"] == 0


def test_entities_are_whole(recwarn):
    task = Tagging(word_tokenizer(), 20, ["O", "B-per", "I-per"])
    example = Tagged(("Ann", "Bob", "in"), ("B-per", "I-per", "O"))
    features = task.encode(example)
    half = reduced(task, [features], [[0, 1, 0, 0, 0]])
    assert task.score([example], [features], half)["entity_f1"] == 0
    missed = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 1}
    assert task.score_by_label([example], [features], half) == {"per": missed}
    whole = reduced(task, [features], [[0, 1, 2, 0, 0]])
    found = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "examples": 1}
    assert task.score_by_label([example], [features], whole) == {"per": found}
    none = Tagged(("in",), ("O",))
    assert task.score_by_label([none], [task.encode(none)], reduced(task, [task.encode(none)], [[0, 0, 0]])) == {}
    assert not recwarn.list


def test_only_the_completion_and_its_end_are_learnt():
    task = Generation(word_tokenizer("[CLS] $A"), 20)
    assert task.encode(Passage("the red", "is good")) == {
        "input_ids": [CLS, WORD["the"], WORD["red"], WORD["is"], WORD["good"], SEP],
        "labels": [IGNORED, IGNORED, IGNORED, WORD["is"], WORD["good"], SEP],
    }
    closing = Generation(word_tokenizer("[CLS] $A [SEP]"), 20)
    assert closing.encode(Passage("the red", "is good")) == task.encode(Passage("the red", "is good"))
    assert Generation(task.tokenizer, 4).encode(Passage("the red", "is good"))["labels"][3:] == [WORD["is"]]
    with pytest.raises(ValueError, match="max_length: 3 tokens leave no room after the prompt 'the red'"):
        Generation(task.tokenizer, 3).encode(Passage("the red", "is good"))


def character_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A token per character, "ab" and "▁a"; "spaced" puts a space before every text, as sentencepiece does."""
    tokens = ["<pad>", "<s>", "</s>", *"▁abc:\n", "ab", "▁a"]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("▁", "a")]))
    scheme = "first" if kind == "spaced" else "never"
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = MetaspaceDecoder(prepend_scheme=scheme, split=False)
    template = {"closing": "$A </s>", "one token": "</s> $A"}.get(kind, "<s> $A")
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    start = "</s>" if kind == "one token" else "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["spaced", "plain", "closing", "one token"])
def test_prompt_and_completion_are_joined_as_they_are(kind):
    task = Generation(character_tokenizer(kind), 99)
    first = {"spaced": [1], "plain": [1], "closing": [], "one token": [2]}[kind]
    for prompt, completion in (
        ("c", "b c"), ("c", " b"), ("c:\n", "c"), ("c", "a"), ("", "a b"), ("", "cb"), ("ca", "b"), ("c ", "a"),
    ):  # fmt: skip
        example = task.encode(Passage(prompt, completion))
        ids, labels = example["input_ids"], example["labels"]
        count = labels.index(next(label for label in labels if label != IGNORED))
        assert ids[:count] == task._encode_prompt(prompt)  # which a completion is asked for with
        assert ids[: len(first)] == first
        assert ids[-1] == task.tokenizer.eos_token_id
        assert labels[count:] == ids[count:]
        assert task._decode("", [], ids) == prompt + completion
        assert task._decode(prompt, ids[:count], ids[count:]) == completion


def test_completions_by_tokenizers_that_drop_what_is_between_words():
    task = Generation(word_tokenizer("[CLS] $A"), 99)
    for prompt in ("red", "red ", "red\n"):
        ids, count = task.encode(Passage(prompt, "one two"))["input_ids"], 2
        assert ids == [CLS, WORD["red"], WORD["one"], WORD["two"], SEP]
        assert task._decode(prompt, ids[:count], ids[count:]) == "one two".rjust(7 + (prompt == "red"))
    # a line end is dropped, and another character shows how a word goes on
    dropping = character_tokenizer("spaced")
    dropping.backend_tokenizer.normalizer = Replace("\n", "")
    ids = Generation(dropping, 99).encode(Passage("ca", "b"))["input_ids"]
    assert dropping.decode(ids, skip_special_tokens=True) == "cab"
    # of one word that it does not know, the completion is its own
    for prompt, completion, tokens in (("ugh", "ahs", [UNK]), ("red ugh", "ahs one", [UNK, WORD["one"]])):
        example = task.encode(Passage(prompt, completion))
        assert [label for label in example["labels"] if label != IGNORED] == [*tokens, SEP]
    # what it does not know is its end, which it does not put after texts
    dropping.unk_token = dropping.eos_token
    dropping.backend_tokenizer.model = WordLevel({"<s>": 1, "</s>": 2, "red": 3}, unk_token="</s>")
    assert not Generation(dropping, 99)._closes


@pytest.mark.parametrize("rows", [0, 4])
def test_completions_end_where_positions_do(tiny_gpt2, caplog, rows):
    positions = 24
    prompts = {"tuning_mode": "ptune", "pre_seq_len": rows} if rows else {}
    model = AutoPTuneModelForCausalLM.from_pretrained(tiny_gpt2, **prompts)
    task = Generation(word_tokenizer("[CLS] $A"), positions - rows)
    caplog.clear()
    texts = ["red", "the good red one", "two", "three", " ".join(["bad"] * (positions - rows - 2))]
    words_only = {"suppress_tokens": [PAD, UNK, CLS, SEP]}
    answers = list(task.predict(model, texts, 12, **words_only))
    assert [answer["prompt"] for answer in answers] == texts
    # the last token is never read, so one more fits than there is room
    assert [len(answer["completion"].split()) for answer in answers] == [12, 12, 12, 12, 2]
    assert caplog.messages == [
        "max_new_tokens: the model's positions leave room for fewer than 12 after 1 of 5 prompts, "
        "which are completed up to there"
    ]
    for text, answer in zip(texts, answers, strict=True):
        assert next(task.predict(model, [text], 12, **words_only)) == answer


def test_a_completion_ends_at_the_tokenizers_end(tiny_llama):
    model, task = AutoPTuneModelForCausalLM.from_pretrained(tiny_llama), Generation(word_tokenizer("[CLS] $A"), 24)
    word = next(task.predict(model, ["red"], 1))["completion"]
    assert len(word.split()) == 1
    task.tokenizer.eos_token = word.strip()
    model.generation_config.eos_token_id = SEP
    assert next(task.predict(model, ["red"], 8))["completion"] == word


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_completion():
    task = Seq2Seq(word_tokenizer("$A [SEP]"), 4)
    pairs = [Passage("the red", "is good"), Passage("one two three red", "a"), Passage("bad", "two bad one red")]
    batch = task.collate([task.encode(pair) for pair in pairs])
    assert batch["input_ids"].tolist() == [
        [WORD["the"], WORD["red"], SEP, PAD],
        [WORD["one"], WORD["two"], WORD["three"], SEP],
        [WORD["bad"], SEP, PAD, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [WORD["is"], WORD["good"], SEP, IGNORED],
        [WORD["a"], SEP, IGNORED, IGNORED],
        [WORD["two"], WORD["bad"], WORD["one"], SEP],
    ]
    open_ended = Seq2Seq(word_tokenizer("[CLS] $A"), 3)  # its tokenizer closes no text
    assert open_ended.encode(Passage("red", "is")) == {
        "input_ids": [CLS, WORD["red"]],
        "labels": [CLS, WORD["is"], SEP],
    }
    assert open_ended.encode(Passage("red", "is good"))["labels"] == [CLS, WORD["is"], WORD["good"]]
    assert task.text_of(pairs[0]) == "the red"  # prompts start from what the encoder reads


def test_a_decoder_writes_up_to_its_last_position(tiny_bart, caplog):
    """However long the prompt, which takes the encoder's positions."""
    model = AutoPTuneModelForSeq2SeqLM.from_pretrained(tiny_bart, tuning_mode="ptune", pre_seq_len=4)
    task, texts = Seq2Seq(word_tokenizer(), 20), ["red", " ".join(["bad"] * 18)]
    caplog.clear()
    answers = list(task.predict(model, texts, 30, suppress_tokens=[PAD, UNK, CLS, SEP]))
    assert [len(answer["completion"].split()) for answer in answers] == [24, 24]
    assert "leave room for fewer than 30 after 2 of 2 prompts" in caplog.text


def test_perplexity_of_a_run_that_diverged():
    assert Generation.score(None, [], [], np.array([[1500.0, 2.0], [750.0, 1.0]])) == {
        "loss": 750.0,
        "perplexity": math.inf,
    }


def test_perplexity_weighs_every_token_alike():
    task = Generation(word_tokenizer("[CLS] $A"), 20)
    passages = [Passage("", "good"), Passage("the", "one two three")]
    batch = task.collate([task.encode(passage) for passage in passages])
    assert batch["labels"].tolist() == [
        [IGNORED, WORD["good"], SEP, IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, WORD["one"], WORD["two"], WORD["three"], SEP],
    ]
    logits = torch.randn(2, 6, len(WORD), generator=torch.Generator().manual_seed(1))
    first, second = [WORD["good"], SEP], [WORD["one"], WORD["two"], WORD["three"], SEP]
    log_probabilities = logits.double().log_softmax(-1)
    nll = [-log_probabilities[0, column, token] for column, token in enumerate(first)]
    nll += [-log_probabilities[1, column, token] for column, token in enumerate(second, 1)]
    reduced = task.reduce(logits, batch["labels"]).numpy()
    assert reduced[:, 1].tolist() == [2, 4]
    assert task.score(passages, [], reduced)["perplexity"] == pytest.approx(math.exp(sum(nll) / 6), rel=1e-6)
