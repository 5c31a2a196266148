"""Small tokenizers of each kind that models have, trained on CPython's documentation, and texts that are hard for them."""

from __future__ import annotations

import functools
import os

from pytest_lmeval.data import corpus
from pytest_lmeval.models._huggingface import HFTokenizer
from pytest_lmeval.models._model import Bytes

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ["gpt2", "gpt2-prefix-space", "llama3", "llama2", "metaspace-first", "metaspace-unsplit", "bert", "unigram", "bytes"]


@functools.cache
def sample() -> str:
    """Two hundred thousand characters of documentation."""
    return "".join(document.text for document in corpus("stdlib", "test").documents())[:200_000]


@functools.cache
def tokenizer_of(kind: str):
    """The adapted tokenizer of a kind; "real" is that of LMEVAL_REAL_MODEL."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        return Bytes()
    if kind == "real":
        return HFTokenizer(transformers.AutoTokenizer.from_pretrained(os.environ["LMEVAL_REAL_MODEL"]), kind)
    byte_level = pre_tokenizers.ByteLevel.alphabet()
    model, alphabet, bpe = models.BPE(unk_token="<unk>"), [], trainers.BpeTrainer
    split, normalizer, limits = None, None, {}
    if kind == "gpt2":
        split, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False), byte_level
    elif kind == "gpt2-prefix-space":
        split, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=True), byte_level
    elif kind == "llama3":
        words = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        split = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        alphabet = byte_level
    elif kind == "llama2":  # no division into words: the whole text goes through the merges
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        limits = {"max_token_length": 12}
    elif kind == "metaspace-first":
        split = pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind == "metaspace-unsplit":
        split, limits = pre_tokenizers.Metaspace(prepend_scheme="always", split=False), {"max_token_length": 12}
    elif kind == "bert":
        model, split = models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer()
        normalizer, bpe = normalizers.BertNormalizer(lowercase=True), trainers.WordPieceTrainer
    elif kind == "unigram":
        model, split = models.Unigram(), pre_tokenizers.Metaspace()
    tokenizer = Tokenizer(model)
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    else:
        trainer = bpe(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, **limits)
    lines = sample()[:60_000].splitlines(keepends=True)
    if kind == "llama2":  # words with the space before them are what it learns, though it is not divided by them
        tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Metaspace(), None
        tokenizer.train_from_iterator(lines, trainer)
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if kind != "llama2":
        tokenizer.train_from_iterator(lines, trainer)
    tokenizer.decoder = decoders.ByteLevel() if alphabet else None
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL[3:]
    )
    return HFTokenizer(own, kind)
