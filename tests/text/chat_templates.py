"""Small chat templates in the manner of well-known families, each with and without generation blocks, and a tokenizer
that has their marks as special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

MARKS = [
    "<s>", "</s>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]",
    "<turn>", "</turn>",
]  # fmt: skip

LLAMA = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|head|>' + m['role'] + '<|/head|>\n\n' }}
    {%- if m['role'] == 'assistant' %}GEN[{{- m['content'] | trim + '<|eot|>' }}]GEN
    {%- else %}{{- m['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}"""

# a system prompt where there is none, and thoughts that only the last answer keeps
QWEN = """{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}
        {%- set text = m.content.split('</think>')[-1].lstrip('\n') %}GEN[
        {%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {{- text + '<|im_end|>' }}]GEN{{- '\n' }}
    {%- else %}{{- m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}GEN[{{- ' ' + m.content + eos_token }}]GEN
    {%- endif %}
{%- endfor %}"""

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}GEN[\
{{ m.content + '<|im_end|>' }}]GEN{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}\
{{ '<turn>' + role + '\n' }}{% if role == 'model' %}GEN[{{ m.content | trim + '</turn>' }}]GEN\
{% else %}{{ m.content | trim + '</turn>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

FAMILIES = {"llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL, "chatml": CHATML, "gemma": GEMMA}
STOPS = {"llama": "<|eot|>", "qwen": "<|im_end|>", "mistral": "</s>", "chatml": "<|im_end|>", "gemma": "</turn>"}


def marked(source: str) -> str:
    return source.replace("GEN[", "{% generation %}").replace("]GEN", "{% endgeneration %}")


def unmarked(source: str) -> str:
    return source.replace("GEN[", "").replace("]GEN", "")


def write_tokenizer(folder: Path, source: str = "", texts: tuple[str, ...] = ()) -> Path:
    """A byte-level BPE tokenizer with `MARKS`, and a chat template in its settings if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    corpus = texts or ("user assistant system the quick brown fox, hello there! how are you? " * 5,)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": source} if source else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
