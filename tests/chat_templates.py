"""Small tokenizers with the chat templates that models have, each with what is particular about it."""

from __future__ import annotations

import copy
import functools

from tokenizers_of_each_kind import tokenizer_of

from pytest_lmeval.models._huggingface import HFTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (  # SmolLM2: a system turn of its own where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # the beginning-of-sequence token in each turn, contents stripped, a blank before answers
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (  # contents trimmed, headers
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # control tokens around questions, no system turn
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # refuses a system turn, and calls the assistant otherwise
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (  # headers that are no tokens of their own
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
THINKING = (  # drops the thoughts of earlier answers, and begins an answer with thoughts
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + '<|end_of_sentence|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
QWEN3 = (  # thinks unless it is told not to, by an option of the template
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PHI3 = (  # tokens that take the blanks after them
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LEAVES_OUT = (  # says nothing of a system turn
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] + ': ' + message['content'] + "
    "eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

TEMPLATES = {  # name -> kind of tokenizer, template, its special tokens, the one that ends a turn
    "chatml": ("gpt2", CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "smollm2": ("gpt2", DEFAULT_SYSTEM, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama2": ("llama2", LLAMA2, ("<s>", "</s>"), "</s>"),
    "llama3": ("llama3", LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": ("metaspace-first", MISTRAL, ("[INST]", "[/INST]"), "</s>"),
    "gemma": ("metaspace-unsplit", GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "zephyr": ("metaspace-first", ZEPHYR, ("</s>",), "</s>"),
    "thinking": ("llama3", THINKING, ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"), "<|end_of_sentence|>"),
    "qwen3": ("gpt2", QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "several": ("gpt2", {"default": CHATML, "tool_use": QWEN3}, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),  # Command R
    "phi3": ("metaspace-first", PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "leaves-out": ("gpt2", LEAVES_OUT, ("</s>",), "</s>"),
}


@functools.cache
def with_template(name: str) -> HFTokenizer:
    """The adapted tokenizer with the chat template of this name."""
    from tokenizers import AddedToken

    kind, template, special, _ = TEMPLATES[name]
    own = copy.deepcopy(tokenizer_of(kind).tokenizer)
    tokens = [AddedToken(token, special=True, normalized=False, rstrip=name == "phi3") for token in special]
    own.add_tokens(tokens, special_tokens=True)
    if name == "thinking":  # no special ones, as in the models
        own.add_tokens(
            [AddedToken("<think>", special=False, normalized=False), AddedToken("</think>", special=False, normalized=False)]
        )
    own.chat_template = template
    return HFTokenizer(own, name)
