"""Write a small Llama with its tokenizer, and a mirror of four known datasets, all made from CPython's documentation.

lm-evaluation-harness and this package then read the same bytes.
"""

import json
import random

import torch

from pytest_lmeval import corpus

VOCABULARY = 2000


def passages(seed, words, count):
    """`count` texts of `words` words."""
    text = " ".join(document.text for document in corpus("stdlib", "test").documents()).split()
    generator = random.Random(seed)
    starts = [generator.randrange(len(text) - words) for _ in range(count)]
    return [" ".join(text[start : start + words]) for start in starts]


def save_model(folder):
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = (document.text for document in corpus("stdlib", "validation").documents())
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|end|>"])
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.05,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def write(folder, hub_id, config, split, rows):
    file = folder / hub_id / config / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_data(folder):
    """Write the mirror. Lengths are those of the real datasets: BoolQ's passages 130 words, MMLU's prompts some 900 tokens."""
    sentences = passages(1, 15, 64)
    rows = [{"sentence": text + " ", "label": index % 2, "idx": index} for index, text in enumerate(sentences)]
    write(folder, "nyu-mll/glue", "sst2", "validation", rows)
    questions = passages(2, 8, 36)
    rows = [
        {"passage": passage, "question": questions[6 * index + number], "label": number % 2, "idx": 6 * index + number}
        for index, passage in enumerate(passages(3, 130, 6))
        for number in range(6)
    ]
    write(folder, "aps/super_glue", "boolq", "validation", rows)
    endings = passages(4, 12, 24 * 4)
    same = {"activity_label": "Reading the manual", "ctx_b": "it"}
    rows = [
        {"ind": index, "ctx_a": text, "ctx": f"{text} it", "endings": endings[4 * index :][:4], "label": str(index % 4), **same}
        for index, text in enumerate(passages(5, 60, 24))
    ]
    write(folder, "Rowan/hellaswag", "default", "validation", rows)
    for split, count in (("dev", 5), ("test", 16)):
        texts, choices = passages(split, 35, count), passages(split + "choices", 6, 4 * count)
        rows = [
            {"question": text, "subject": "abstract_algebra", "choices": choices[4 * index :][:4], "answer": index % 4}
            for index, text in enumerate(texts)
        ]
        write(folder, "cais/mmlu", "abstract_algebra", split, rows)
