"""Tiny Llamas in folders, with adapters, as GGUF, quantized: made on the spot, in seconds."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 64, (1, 40)))


def llama(seed=0, **options):
    torch.manual_seed(seed)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **ends, **options})
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # initial weights of such small models hardly depend on the input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    return model.eval()


def saved(folder: Path, **options) -> Path:
    llama(**options).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path | None, **options) -> Path:
    """A LoRA adapter whose weights are not zero, and which says that it was trained on `base`."""
    import peft

    model = llama(**options) if base is None else transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft
        peft.get_peft_model(model, config).save_pretrained(folder)
    file = folder / "adapter_config.json"
    changed = json.loads(file.read_text()) | {"base_model_name_or_path": None if base is None else str(base)}
    file.write_text(json.dumps(changed))
    return folder


def merged(base: Path, adapter_folder: Path):
    """The model with the adapter in its weights, by peft's own functions."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter_folder)
        return model.merge_and_unload().eval()


def logits(module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


def quantized(folder: Path, base: Path, config) -> Path:
    """The model in a folder as bitsandbytes or torchao quantize it, saved by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )
        model.save_pretrained(folder)
    return folder


def compressed(folder: Path, base: Path) -> Path:
    """The model in a folder, rounded to four bits in groups of 32 by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = copy.deepcopy(transformers.AutoModelForCausalLM.from_pretrained(base))
    bits = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=bits)
    config = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    )
    apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            layer.weight_scale.data = layer.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
    ModelCompressor(quantization_config=config).compress_model(model)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    declared = config.model_dump(mode="json") | {"quant_method": "compressed-tensors"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": declared}))
    return folder


def declared_quantized(folder: Path, base: Path, **config) -> Path:
    """A copy of a folder whose configuration says that it is quantized so."""
    shutil.copytree(base, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return folder


def gguf(file: Path, module) -> Path:
    """A GGUF file of a Llama in float32, with no words but a tokenizer of 64 pieces."""
    from gguf import GGUFWriter, TokenType

    config = module.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(chr(0x41 + n) for n in range(config.vocab_size - 3))]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * (len(pieces) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in module.state_dict().items():
        own = name.removesuffix(".weight")
        prefix = ""
        if own.startswith("model.layers."):
            _, _, layer, own = own.split(".", 3)
            prefix = f"blk.{layer}."
        if own.endswith(("q_proj", "k_proj")):  # GGUF stores the two halves of a rotated pair side by side
            tensor = tensor.unflatten(0, (config.num_attention_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{prefix}{names[own]}.weight", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
