"""How well a checkpoint predicts: a run directory, a checkpoint inside one, or a Hugging Face directory.

python tools/evaluate.py loss --checkpoint runs/quickstart --data PREFIX --seq-length 256
torchrun --nproc-per-node 4 tools/evaluate.py loss --checkpoint DIR --data PREFIX --seq-length N --parallel.tensor 2

`loss` reads every token of the file once, in its order, in windows of N tokens, and prints one JSON line: `loss` (mean
over the predicted tokens, nats), `perplexity`, `tokens`, `samples` (windows), and, where the text's bytes are known,
`bits_per_byte`, `bytes` and `bytes_from`: `json` (the token file's PREFIX.json) or `tokenizer` (decoded again). Ranks
beyond tensor x pipeline share the windows out.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from megalite.cli import nonempty, program, whole
from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError
from megalite.evaluation.loss import Windows, count_bytes, score
from megalite.generation.loading import Opened, checkpoint_parser, load_model, open_checkpoint, with_one_voice
from megalite.text.tokenizers import tokenizer_hash


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `overrides` holds the `--section.field value`."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("measure", choices=("loss",), help="what to compute")
    add = parser.add_argument
    add("--data", required=True, type=nonempty, metavar="PREFIX", help="token file, without .bin and .idx")
    add("--seq-length", required=True, type=whole(), metavar="N", help="tokens of one window")
    add("--max-samples", type=whole(), metavar="K", help="only the first K windows")
    add(
        "--micro-batch-size",
        type=whole(1, 65536),
        default=4,
        metavar="B",
        help="windows at once on one rank (default 4)",
    )
    add("--tokenizer", default="", metavar="FILE", help="use this tokenizer instead of the checkpoint's own")
    return parser.parse_args(argv)


def check_tokenizer(file: IndexedDataset, opened: Opened) -> None:
    """A token file made by another tokenizer than the model's would give a number without a meaning."""
    made_by = file.description().get("tokenizer") or {}
    own = opened.tokenizer
    # Only a sentencepiece model is one file, the same wherever it is carried.
    if own is None or own.kind != "sentencepiece" or made_by.get("kind") != own.kind:
        return
    if made_by.get("sha256") not in (None, tokenizer_hash(own)):
        raise UserError(
            f"{file.prefix}.json: the tokens were made by another tokenizer than {own.files[0]}; "
            "preprocess the text with the model's tokenizer"
        )


def evaluate(options: argparse.Namespace, opened: Opened) -> dict[str, Any] | None:
    """The result, on the rank that prints it; None on the others."""
    file = IndexedDataset(options.data)
    check_tokenizer(file, opened)
    windows = Windows(file, options.seq_length, opened.model["vocab_size"], options.max_samples)
    with load_model(opened, options.overrides, seq_length=options.seq_length, data_parallel=True) as loaded:
        result = score(
            windows,
            loaded.model,
            micro_batch_size=options.micro_batch_size,
            document_mask=opened.document_mask,
        )
        speaks = loaded.speaks
    if not speaks:
        return None
    line: dict[str, Any] = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "samples": result.samples,
    }
    counted = count_bytes(windows, opened.tokenizer)
    if counted is not None:
        text_bytes, source = counted
        line |= {"bits_per_byte": result.bits_per_byte(text_bytes), "bytes": text_bytes, "bytes_from": source}
    return line


@program
@with_one_voice
def main() -> None:
    options = parse()
    with open_checkpoint(options.checkpoint, options.tokenizer) as opened:
        line = evaluate(options, opened)
    if line is not None:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
