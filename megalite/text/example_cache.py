"""Raw files of examples, tokenised once into a cache that is keyed by everything that the tokens follow from."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import megalite
from megalite.data.example_file import Maker
from megalite.data.index_cache import build_lock, content_key, publishing
from megalite.data.indexed import file_paths, file_sha256
from megalite.errors import UserError
from megalite.files import write_errors_named
from megalite.text.preprocess import FORMAT, PreprocessOptions, preprocess

log = logging.getLogger("megalite")

WAIT_SECONDS = 24 * 3600.0


def tokenised(path: str, maker: Maker, chat_template: str, vocab_size: int | None, cache_dir: Path) -> str:
    """The prefix of the examples of a raw file, in `cache_dir`; the first process to ask makes them, others wait.

    `maker` holds the hashes of the tokenizer and of the template that `chat_template` names.
    Raises `UserError` for the first record that cannot be used, and what `preprocess` raises.
    """
    try:
        content = file_sha256(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .jsonl or .parquet file") from error
    key = content_key(
        kind="tokenised",
        format=[FORMAT, megalite.__version__, maker.form],
        file=content,
        tokenizer=maker.tokenizer_sha256,
        template=maker.template_sha256,
        vocab_size=vocab_size,
    )
    folder = cache_dir / key
    if _is_complete(folder):
        return _prefix(folder)
    with write_errors_named(folder):
        cache_dir.mkdir(parents=True, exist_ok=True)
    with build_lock(folder.with_suffix(".lock"), WAIT_SECONDS):
        if not _is_complete(folder):
            log.info("tokenising %s (%.1f MB)", path, os.path.getsize(path) / 1e6)
            _make(path, maker, chat_template, vocab_size, folder)
    return _prefix(folder)


def _prefix(folder: Path) -> str:
    return f"{folder}/examples_text_document"


def _is_complete(folder: Path) -> bool:
    return file_paths(_prefix(folder))[2].is_file()


def _make(path: str, maker: Maker, chat_template: str, vocab_size: int | None, folder: Path) -> None:
    """Fill `folder`, which appears when it is complete."""
    with publishing(folder, _is_complete) as temporary:
        options = PreprocessOptions(
            [path],
            f"{temporary}/examples",
            tokenizer_model=maker.tokenizer if maker.tokenizer not in ("", "byte") else None,
            tokenizer_type="byte" if maker.tokenizer == "byte" else None,
            format=maker.form,
            chat_template=chat_template,
            vocab_size=vocab_size,
            strict=True,
        )
        preprocess(options, show_progress=False)
