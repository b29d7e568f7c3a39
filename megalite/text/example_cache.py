"""Raw files of examples, tokenised once into a cache that is keyed by everything that the tokens follow from."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from pathlib import Path

import megalite
from megalite.data.index_cache import build_lock, content_key
from megalite.data.indexed import file_paths, file_sha256
from megalite.errors import UserError
from megalite.files import sync_directory, write_errors_named
from megalite.text.chat import ChatTemplate
from megalite.text.preprocess import FORMAT, PreprocessOptions, preprocess
from megalite.text.tokenizers import load_tokenizer, tokenizer_hash

log = logging.getLogger("megalite")

WAIT_SECONDS = 24 * 3600.0


def tokenised(path: str, form: str, tokenizer: str, chat_template: str, vocab_size: int | None, cache_dir: Path) -> str:
    """The prefix of the examples of a raw file, in `cache_dir`; the first process to ask makes them, others wait.

    Raises `UserError` for the first record that cannot be used, and what `preprocess` raises.
    """
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    template = ChatTemplate.find(loaded, chat_template) if loaded else None
    try:
        content = file_sha256(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .jsonl or .parquet file") from error
    key = content_key(
        kind="tokenised",
        format=[FORMAT, megalite.__version__, form],
        file=content,
        tokenizer=tokenizer_hash(loaded) if loaded else "",
        template=template.sha256 if template else "",
        vocab_size=vocab_size,
    )
    folder = cache_dir / key
    prefix = f"{folder}/examples_text_document"
    if file_paths(prefix)[2].is_file():
        return prefix
    with write_errors_named(folder):
        cache_dir.mkdir(parents=True, exist_ok=True)
    with build_lock(folder.with_suffix(".lock"), WAIT_SECONDS):
        if not file_paths(prefix)[2].is_file():
            log.info("tokenising %s (%.1f MB)", path, os.path.getsize(path) / 1e6)
            _make(path, form, tokenizer, chat_template, vocab_size, folder)
    return prefix


def _make(path: str, form: str, tokenizer: str, chat_template: str, vocab_size: int | None, folder: Path) -> None:
    """Fill `folder`, which appears when it is complete."""
    temporary = folder.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")
    options = PreprocessOptions(
        [path],
        f"{temporary}/examples",
        tokenizer_model=tokenizer if tokenizer not in ("", "byte") else None,
        tokenizer_type="byte" if tokenizer == "byte" else None,
        format=form,
        chat_template=chat_template,
        vocab_size=vocab_size,
        strict=True,
    )
    try:
        preprocess(options, show_progress=False)
        with write_errors_named(folder):
            shutil.rmtree(folder, ignore_errors=True)  # the remains of one that was incomplete
            os.rename(temporary, folder)
            sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
