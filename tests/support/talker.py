"""A checkpoint that can be talked to: a small model with random weights that writes single characters."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from tests.fixtures import golden

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?-+*/=()[]{}<>@#$%&^~|_éöü\n"

TEMPLATE = """\
{%- for message in messages %}{{ message.role[0] }}:{{ message.content }}
{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""


def make_talker(folder: Path, template: str = "", positions: int = 128) -> Path:
    """A Hugging Face directory with a tokenizer of single characters that puts <s> before every text."""
    folder.mkdir()
    given = golden.folder("llama3_gqa")
    (folder / "model.safetensors").write_bytes((given / "model.safetensors").read_bytes())
    config = json.loads((given / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder
