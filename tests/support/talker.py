"""A checkpoint that can be talked to: a small model with random weights that writes single characters."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from tests.fixtures import golden

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?-+*/=()[]{}<>@#$%&^~|_éöü\n"

TEMPLATE = """\
{%- for message in messages %}{{ message.role[0] }}:{{ message.content }}
{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""


def make_talker(folder: Path, template: str = "") -> Path:
    """A Hugging Face directory with a tokenizer of single characters that puts <s> before every text."""
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((golden.folder("llama3_gqa") / file).read_bytes())
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder
