"""Encoder-decoders against an oracle: every row alone, unpadded, through the stock model, its prompt joined by hand."""

from functools import cache

import peft
import pytest
import tokenizers
import torch
import transformers as hf
from torch import nn

import ptune
from ptune.convert import convert, to_peft

from .common import COUNT, MODES, close, moved_by_a_bit, set_prompts, settings_for, texts_for
from .oracle import Prompt, pad

_SIZES = {"vocab_size": 61, "d_model": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = _SIZES | {
    "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_BART = _SIZES | {
    "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32,
    "decoder_start_token_id": 2, "init_std": 0.3,
    "forced_eos_token_id": None, "scale_embedding": True, "dropout": 0.3, "encoder_layerdrop": 0.3,
}  # fmt: skip

CONFIGS = {
    "t5": lambda: hf.T5Config(**_T5, feed_forward_proj="relu"),
    "t5 v1.1": lambda: hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: hf.MT5Config(**_T5),
    "umt5": lambda: hf.UMT5Config(**_T5),
    "bart": lambda: hf.BartConfig(**_BART),
    "mbart": lambda: hf.MBartConfig(**_BART),
    "marian": lambda: hf.MarianConfig(**_BART),
    "pegasus": lambda: hf.PegasusConfig(**_BART),
    "blenderbot": lambda: hf.BlenderbotConfig(**_BART),
    "blenderbot-small": lambda: hf.BlenderbotSmallConfig(**_BART),
    "m2m_100": lambda: hf.M2M100Config(**_BART),
}
RELATIVE = ("t5", "t5 v1.1", "mt5", "umt5")


class Pair:
    """A stock model, saved, and the same with prompts."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.folder = name, folder
        stock = hf.AutoModelForSeq2SeqLM.from_config(CONFIGS[name]())
        with torch.no_grad():
            for parameter in stock.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        stock.save_pretrained(folder)
        self.stock = hf.AutoModelForSeq2SeqLM.from_pretrained(folder)
        self.model = ptune.AutoPTuneModelForSeq2SeqLM.from_pretrained(folder, **settings_for("shallow"))

    def paddings(self) -> tuple[str, ...]:
        return ("none", "right", "left") if self.name in RELATIVE else ("none", "right")


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                made[name] = Pair(name, tmp_path_factory.mktemp("seq2seq"))
        return made[name]

    return make


def alone(stock, prompt, text, **kwargs):
    """The stock model on one text, with the prompt's rows before it, deep ones set by hooks of this function's own."""
    embeds = torch.cat([prompt.shallow, stock.get_input_embeddings()(text)])[None]
    encoder, depth = stock.get_encoder(), 0
    blocks = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)

    def before(block, args, kwargs):
        nonlocal depth
        hidden = args[0] if args else kwargs.pop("hidden_states")
        rows = prompt.deep[depth]
        if depth == 0 or prompt.mode == "add":
            rows = hidden[0, :COUNT] + rows
        depth += 1
        return (torch.cat([rows, hidden[0, COUNT:]])[None], *args[1:]), kwargs

    handles = [] if prompt.deep is None else [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    try:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        encoded = encoder(inputs_embeds=embeds, attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    if kwargs.get("max_new_tokens"):
        return stock.generate(encoder_outputs=encoded, attention_mask=mask, **kwargs)
    return encoded, stock(encoder_outputs=encoded, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_states_and_gradients(pair_of, name, mode):
    pair = pair_of(name)
    model, stock = pair.model.train(), pair.stock.eval()  # the frozen base's dropout is off
    for padding in pair.paddings():
        prompt, texts = set_prompts(model, mode), texts_for(padding)
        ids, mask = pad(texts, padding, 0)
        labels = torch.randint(3, 61, ids.shape)  # a decoder's first token is predicted from no prompt row
        labels[1, 3:] = -100
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()

        def rows_alone(stock, prompt, texts=texts, labels=labels):
            """Encoder states and logits of each row, and the loss, whose gradients `prompt` gets."""
            rows = [alone(stock, prompt, text, labels=labels[i : i + 1]) for i, text in enumerate(texts)]
            tokens = (labels != -100).sum(1)
            loss = sum(out.loss * count for (_, out), count in zip(rows, tokens, strict=True)) / tokens.sum()
            loss.backward()
            return [(encoded.last_hidden_state[0], out.logits[0]) for encoded, out in rows], loss

        @cache
        def nudged(prompt=prompt, rows_alone=rows_alone):
            leaves = [None if t is None else moved_by_a_bit(t).requires_grad_() for t in (prompt.shallow, prompt.deep)]
            moved = Prompt(*leaves, prompt.mode)
            return *rows_alone(moved_by_a_bit(stock), moved), moved

        rows, loss = rows_alone(stock, prompt)
        for row, (states, logits) in enumerate(rows):
            close(output.logits[row], logits, nudged=lambda row=row, nudged=nudged: nudged()[0][row][1])
            column = 0 if mask is None else int(mask[row].argmax())
            got = output.encoder_last_hidden_state[row, column : column + len(states)]
            close(got, states, nudged=lambda row=row, nudged=nudged: nudged()[0][row][0])
        close(output.loss, loss)
        shallow, deep = model.prompt_embeddings.weight, model.intermediate_prompt_embeddings
        close(shallow.grad, prompt.shallow.grad, nudged=lambda nudged=nudged: nudged()[2].shallow.grad)
        if mode != "shallow":
            got = deep.weight.grad.view_as(prompt.deep)
            close(got, prompt.deep.grad, nudged=lambda nudged=nudged: nudged()[2].deep.grad)
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= {
        "prompt_embeddings.weight",
        "intermediate_prompt_embeddings.weight",
    }


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_it_compiles_whole(pair_of, name):
    model = pair_of(name).model.eval()
    set_prompts(model, "overwrite")
    ids, mask = pad(texts_for("right"), "right", 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 61, ids.shape)}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": False, "cache_implementation": "static", "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "no cache", "beams", "static beams"],
)
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize("name", ["t5", "bart", "marian", "m2m_100"])
@torch.no_grad()
def test_generate(pair_of, name, mode, how):
    pair = pair_of(name)
    model, stock = pair.model.eval(), pair.stock.eval()
    how = {"max_new_tokens": 7, "min_new_tokens": 7, **how}
    for padding in pair.paddings():
        prompt, texts = set_prompts(model, mode), texts_for(padding)
        ids, mask = pad(texts, padding, 0)
        got = model.generate(ids, attention_mask=mask, **how)
        expected = torch.cat([alone(stock, prompt, text, **how) for text in texts])
        assert got.tolist() == expected.tolist()


@torch.no_grad()
def test_the_prompt_takes_no_room_in_the_cache_of_the_decoder(pair_of):
    pair, (ids, mask) = pair_of("t5"), pad(texts_for("right"), "right", 0)
    set_prompts(pair.model, "shallow")
    how = {
        "attention_mask": mask,
        "max_new_tokens": 3,
        "cache_implementation": "static",
        "return_dict_in_generate": True,
    }
    caches = [model.eval().generate(ids, **how).past_key_values for model in (pair.model, pair.stock)]
    own, stock = (cache.self_attention_cache.get_max_length() for cache in caches)
    assert own == stock
    own, stock = (cache.cross_attention_cache.get_max_length() for cache in caches)
    assert own == stock + COUNT


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_encoder_outputs_can_be_passed_on(pair_of, name):
    model = pair_of(name).model.eval()
    set_prompts(model, "shallow")
    ids, mask = pad(texts_for("right"), "right", 0)
    start = torch.randint(3, 61, (4, 3))
    whole = model(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
    assert encoded.last_hidden_state.shape[1] == ids.shape[1] + COUNT
    close(model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start).logits, whole.logits, 0)
    close(model(ids, mask, start, return_dict=False)[0], whole.logits, 0)
    of_text = (encoded.last_hidden_state[:, COUNT:],)
    with pytest.raises(ValueError, match="encoder_outputs: expected 13 columns, 4 of them of the prompt"):
        model(encoder_outputs=of_text, attention_mask=mask, decoder_input_ids=start)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_bare_base_inside_disable_prompts(pair_of, name):
    pair = pair_of(name)
    ids, mask = pad(texts_for("right"), "right", 0)
    with torch.no_grad(), pair.model.eval().disable_prompts():
        got = pair.model(input_ids=ids, attention_mask=mask, labels=ids)
        expected = pair.stock.eval()(input_ids=ids, attention_mask=mask, labels=ids)
        assert torch.equal(got.logits, expected.logits)
        assert got.encoder_last_hidden_state.shape == expected.encoder_last_hidden_state.shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_checkpointed_gradients_and_saved_prompts(pair_of, name, mode, tmp_path):
    pair = pair_of(name)
    model = ptune.AutoPTuneModelForSeq2SeqLM.from_pretrained(pair.folder, **settings_for(mode))
    set_prompts(model, mode)
    ids, mask = pad(texts_for("right"), "right", 0)

    def step(model):
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=ids)
        output.loss.backward()
        return output.logits, *(p.grad for p in model.prompt_parameters())

    expected = step(model.train())
    model.save_prompts(tmp_path / "prompts")
    again = ptune.AutoPTuneModelForSeq2SeqLM.from_pretrained(tmp_path / "prompts").train()
    assert type(again).__name__ == f"PTune{type(pair.stock).__name__}"
    for reentrant in (False, True):
        again.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            again.enable_input_require_grads()
        for got, wanted in zip(step(again), expected, strict=True):
            close(got, wanted)


_PEFT = {
    "PROMPT_TUNING": (peft.PromptTuningConfig, {}),
    "P_TUNING": (peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "MULTITASK_PROMPT_TUNING": (peft.MultitaskPromptTuningConfig, {"num_tasks": 3, "num_ranks": 2}),
}


@pytest.mark.parametrize("kind", _PEFT)
@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_reads_and_writes_peft(pair_of, name, kind, tmp_path):
    pair, (config, rest) = pair_of(name), _PEFT[kind]
    base = hf.AutoModelForSeq2SeqLM.from_pretrained(pair.folder)
    config = config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=1, **rest)
    theirs = peft.get_peft_model(base, config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "peft")
    ids, mask = pad(texts_for("right"), "right", 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 61, (4, 3))}
    for number in range(3) if kind == "MULTITASK_PROMPT_TUNING" else (None,):
        convert(tmp_path / "peft", tmp_path / "ours", task_id=number)
        ours = ptune.AutoPTuneModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
        expected = theirs(**inputs, **({} if number is None else {"task_ids": torch.full((4,), number)})).logits
        close(ours(**inputs).logits, expected)
        to_peft(tmp_path / "ours", tmp_path / "again")
        again = peft.PeftModel.from_pretrained(
            hf.AutoModelForSeq2SeqLM.from_pretrained(pair.folder), tmp_path / "again"
        )
        close(again.eval()(**inputs).logits, expected)


def test_prompts_of_peft_in_the_decoder_too_are_refused(pair_of, tmp_path):
    base = hf.AutoModelForSeq2SeqLM.from_pretrained(pair_of("t5").folder)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=r"a prompt of the encoder alone .*, got PROMPT_TUNING with 2"):
        convert(tmp_path / "peft", tmp_path / "ours")


@torch.no_grad()
def test_left_padding_is_refused_where_the_encoder_numbers_columns(pair_of):
    model = pair_of("bart").model
    set_prompts(model, "shallow")
    ids, mask = pad(texts_for("left"), "left", 0)
    with pytest.raises(NotImplementedError, match="attention_mask: left padding is not supported"):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    with pytest.raises(NotImplementedError, match="attention_mask: left padding is not supported"):
        model.get_encoder()(ids, mask)
    with model.disable_prompts():
        model(input_ids=ids, attention_mask=mask, labels=ids)


def test_a_bank_takes_no_encoder_decoder(pair_of):
    with pytest.raises(NotImplementedError, match="got the encoder-decoder T5ForConditionalGeneration"):
        ptune.PromptBank(pair_of("t5").stock)


def test_seq2seq_trainer(tmp_path):
    """A prompt makes a random T5 say one sentence, whatever it reads."""
    torch.manual_seed(0)
    hf.AutoModelForSeq2SeqLM.from_config(hf.T5Config(**_T5)).save_pretrained(tmp_path / "base")
    model = ptune.AutoPTuneModelForSeq2SeqLM.from_pretrained(tmp_path / "base", **settings_for("shallow"))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    data = [{"input_ids": text.tolist(), "labels": [7, 11, 13]} for text in texts_for("right", tuple(range(1, 33)))]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    args = hf.Seq2SeqTrainingArguments(
        output_dir=tmp_path / "runs", max_steps=60, learning_rate=0.3, per_device_train_batch_size=8, report_to="none",
        predict_with_generate=True, generation_max_length=6, logging_steps=10, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = hf.Seq2SeqTrainer(
        model, args, train_dataset=data, eval_dataset=data[:9],
        data_collator=hf.DataCollatorForSeq2Seq(tokenizer, model, padding=True),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.predict(data[:9]).predictions.shape[0] == 9
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
