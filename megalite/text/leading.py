"""What a tokenizer's own settings put before every text. Does not import torch."""

from __future__ import annotations

import json
import reprlib

from megalite.errors import UserError
from megalite.text.foreign import read_small_file, shorten
from megalite.text.tokenizers import Tokenizer

LARGEST_SETTINGS = 64 << 20


def leading_ids(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """What a Hugging Face tokenizer puts before a text: its own processing, or `add_bos_token` of its settings."""
    if tokenizer is None or tokenizer.bos is None or not tokenizer.files:
        return ()
    settings = tokenizer.files[0].with_name("tokenizer_config.json")
    if settings.is_file():
        try:
            content = json.loads(read_small_file(settings, LARGEST_SETTINGS))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{settings}: cannot be read as JSON ({shorten(error)})") from None
        wanted = content.get("add_bos_token") if isinstance(content, dict) else None
        if wanted is not None and type(wanted) is not bool:
            raise UserError(f"{settings}: add_bos_token = {reprlib.repr(wanted)} is neither true nor false")
        if wanted is not None:
            return (tokenizer.bos,) if wanted else ()
    if tokenizer.kind != "huggingface":
        return ()
    from megalite.text.huggingface_tokenizer import HuggingFaceTokenizer  # loads the library, which others do not need

    return (tokenizer.bos,) if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.puts_bos() else ()
