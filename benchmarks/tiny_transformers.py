"""Build a tiny random model of every causal-LM type of the installed transformers.

Rules on the names of fields make the numbers of a default configuration small. A hybrid keeps a layer of each kind, a window
stays a window (of 8), a router still has to choose.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

transformers.utils.logging.set_verbosity_error()

SCALE = 0.2
"""Standard deviation of the weights. With the usual 0.02 the logits would hardly depend on earlier tokens."""

# The largest value of a field, by its name (the first row that matches); a smaller value, in lists and dicts too, is kept.
AT_MOST: list[tuple[float, str]] = [
    # windows, blocks, and lengths at which something changes
    (8, "*sliding_window *sliding_window_size *window_size *window_len local_attention attention_chunk_size"),
    (8, "*block_size index_topk floor_scale log_scaling_n_floor heavily_compressed_attention"),
    (16, "*chunk_size *chunk_length rel_extent"),
    (64, "original_max_position_embeddings"),  # from here on, scaled rotations are scaled
    (512, "*max_position_embeddings n_positions n_ctx *max_length max_seq_len max_*_positions context_length"),
    # layers, heads, experts
    (2, "num_hidden_layers n_layer n_layers num_layers num_blocks *coder_layers depth"),
    (2, "*key_value_heads *kv_heads kv_n_heads *n_groups n_group num_expert_group num_kv_shared_layers"),
    (16, "index*_n_heads"),  # few heads score many keys 0, and one of these is then chosen by chance
    (4, "*attention_heads* *_heads n_head num_*_heads o_groups"),
    (4, "*_experts zero_expert_num"),
    (2, "*experts_per_tok* moe_topk moe_top_k moe_k top_k_experts"),
    (1, "*shared_experts first_k_dense_replace num_dense_layers topk_group num_codebooks"),
    # widths
    (8, "*rank"),
    (16, "*head_dim kv_channels d_head dim_head query_pre_attn_scalar attention_head_size rotary_dim *state_size *d_state"),
    (64, "*hidden_size* d_model n_embd *emb_dim *embed_dim embedding_dim dim_model* *embedding_size *embed_proj_dim lru_width"),
    (64, "*intermediate_size* *ffn_dim n_inner dff dim_ff d_inner feed_forward_size block_multiple_of *mlp_dim adapter_*"),
    (64, "*vocab_size* encoder_hash_byte_group_vocab"),
    (128, "mamba_d_ssm"),
    (16, "image_size *patch_size *_channels *_channel"),
    # token ids, and no randomness
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id"),
    (2, "*eos_token_id"),
    (0.0, "*drop* *jitter*"),
    (0.02, "init_std"),  # `randomize` takes it for noise
]

# Encoders become decoders, and decoders need no encoder.
FLAGS = {"is_decoder": True, "causal": True, "add_cross_attention": False}

# For default configurations that lack parts of the architecture, cannot be built, or make no sense when small.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2 lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},  # its cache asks the first layer for its length
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8},
    "laguna mellum": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "flint": {"mlp_only_layers": [0]},
    "dots1": {
        "layer_types": ["sliding_attention", "full_attention"],
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {"head_dim": 32, "qk_rope_head_dim": 8, "sliding_window": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_topk_blocks": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 64,
        "eos_token_id": 2,
    },
    "mamba2": {"num_heads": 8},
    "xlstm": {"hidden_size": 128},  # below, two of its parts round the width of a key differently
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32], "num_buckets": 8, "hash_seed": 0},
    "hunyuan_v1_dense hunyuan_v1_moe ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    # positions and logits of the same size as the others
    "blenderbot ctrl": {"max_position_embeddings": 512},
    "whisper": {"max_target_positions": 512},
    "cohere cohere2 cohere2_moe": {"logit_scale": 1.0},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
}

NO_MODEL_OF_ITS_OWN = "drafts for another model, whose keys and values it reads instead of tokens"
CANNOT = {
    "gemma3n": "its vision tower is a model of the package timm, where none is tiny; gemma3n_text is the same without it",
    "gemma4_assistant": NO_MODEL_OF_ITS_OWN,
    "gemma4_unified_assistant": NO_MODEL_OF_ITS_OWN,
}

OF_EVERY_CONFIG = {field.name for field in dataclasses.fields(PreTrainedConfig)}


class CannotBuild(Exception):
    """No tiny model of this type can be built here; the message says why in one line."""


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny model of this type with random weights: float32, on the CPU, in eval mode, the same for the same seed."""
    if model_type in CANNOT:
        raise CannotBuild(CANNOT[model_type])
    try:
        defaults = CONFIG_MAPPING[model_type]()
        config = type(defaults)(**tiny(defaults))
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        # a text model of a multimodal family may need its own part of the configuration
        config = next((part for part in vars(config).values() if type(part) is model_class.config_class), config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = model_class(config)
            randomize(model)
        model.set_experts_implementation("eager")  # the others refuse float64
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return model.train(False)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw weights at a scale at which memory matters; weights set on purpose (decays, mixing, norms) change little."""
    for parameter in model.parameters():
        if parameter.requires_grad:  # not sinusoidal positions
            noise = torch.randn_like(parameter)
            on_purpose = parameter.abs().mean() > SCALE
            parameter.copy_(parameter + 0.1 * noise if on_purpose else SCALE * noise)


def tiny(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments of a tiny configuration of this class."""
    fields = {
        field.name: value
        for field in dataclasses.fields(config)
        for value in [vars(config).get(config.attribute_map.get(field.name, field.name))]
        # without a number whose default is none: it is derived from others
        if field.name not in OF_EVERY_CONFIG and not (is_number(value) and not is_number(field.default))
    }
    layers = getattr(config, "num_hidden_layers", 0)
    of_each_layer = {
        name: value
        for name, value in fields.items()  # not a list of layers, whose values all differ
        if isinstance(value, list | tuple) and len(value) == layers and len(set(map(str, value))) < layers
    }
    kept = layers_to_keep(list(of_each_layer.values()))
    if fields.get("num_kv_shared_layers"):
        kept *= 2  # the last layers use the keys and values of earlier ones of the same kind

    new: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            new[name] = tiny(value) | {"model_type": value.model_type}
        elif name in of_each_layer:
            new[name] = small(name, [value[layer] for layer in kept])
        else:
            new[name] = small(name, value)
    if (count := config.attribute_map.get("num_hidden_layers", "num_hidden_layers")) in fields:
        new[count] = len(kept)
    if (heads := fields.get("num_key_value_heads")) is not None and heads == fields.get("num_attention_heads"):
        new["num_key_value_heads"] = new["num_attention_heads"]
    if special := config.to_dict().get("per_layer_config"):  # a layer keeps its ratio to the others
        special = {int(layer): values for layer, values in special.items()}
        new["per_layer_config"] = {
            index: {name: int(new[name] * value / fields[name]) for name, value in special[layer].items()}
            for index, layer in enumerate(kept)
            if layer in special
        }
    new = {name: value for name, value in new.items() if name not in fields or value != fields[name]}
    for types, values in OVERRIDES.items():
        if {config.model_type, type(config).__name__} & set(types.split()):
            new |= values
    return new


def layers_to_keep(of_each_layer: list[Any]) -> list[int]:
    """Indices of the layers to keep: the first of each kind, at least two."""
    kept, seen = [], set()
    for layer, kinds in enumerate(zip(*of_each_layer, strict=True)):
        if unseen := {*enumerate(map(str, kinds))} - seen:
            kept.append(layer)
            seen |= unseen
    return kept if len(kept) > 1 else [0, 1]


def small(name: str, value: Any) -> Any:
    """The value of a field, limited by `AT_MOST` or set by `FLAGS`."""
    if isinstance(value, dict):
        return {key: small(key, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [small(name, part) for part in value]
    if is_number(value):
        most = (most for most, names in AT_MOST if any(fnmatchcase(name, pattern) for pattern in names.split()))
        return min(value, next(most, value))
    return FLAGS.get(name, value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
