"""One base, many tasks: the prompts of the other three examples answer one batch.

Run: ``python examples/mixed_batch.py --model MODEL --prompts prompts``, after the others, on the same decoder.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune import PromptBank
from ptune.corpora import WORD

TEXT = "Return the value for key if key is in the dictionary, else default."


def main(base: str, prompts: str) -> dict[str, str]:
    """Returns what each task says to `TEXT`."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    bank = PromptBank(AutoModelForCausalLM.from_pretrained(base))
    for name in ("topics", "code", "prose"):
        bank.add(name, Path(prompts, name))

    words = WORD.findall(TEXT)
    of_words = AutoTokenizer.from_pretrained(base, add_prefix_space=True)  # as in tagging.py
    rows = [tokenizer(TEXT), of_words(words, is_split_into_words=True), tokenizer(TEXT)]
    batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    output = bank(batch.input_ids, batch.attention_mask, prompt_names=["topics", "code", "prose"])

    topic = output.tasks["topics"].output.logits.argmax(-1).item()
    tags = output.logits[1].argmax(-1)[batch.attention_mask[1].bool()].tolist()
    tag_of = dict(reversed([*zip(rows[1].word_ids(), tags, strict=True)]))  # a word's is that of its first token
    found = [word for i, word in enumerate(words) if tag_of[i]]
    following = output.logits[2][-1].argmax().item()
    start = tokenizer(TEXT[:24], return_tensors="pt")
    text = bank.generate(start.input_ids, start.attention_mask, prompt_names=["prose"], max_new_tokens=24)[0]
    return {
        "topics": bank.head("topics").config.id2label[topic],
        "code": ", ".join(found) or "(none)",
        "prose": f"next token {tokenizer.decode(following)!r}; {tokenizer.decode(text, skip_special_tokens=True)}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", default="prompts")
    arguments = parser.parse_args()
    for name, answer in main(arguments.model, arguments.prompts).items():
        print(f"{name}: {answer}")
