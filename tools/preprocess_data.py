"""Turn files of text, conversations, pairs of answers or prompts into Megatron's token binaries.

Parallel, resumable, with every unusable record accounted for.
"""

import argparse
from typing import Any

from megalite.cli import Parser, nonempty, program
from megalite.observe.formatting import counted
from megalite.text.options import add_input, add_work


def parse() -> argparse.Namespace:
    parser = Parser(
        __doc__,
        "Writes P_text_document.bin, .idx and .json (for each of --json-keys); for other formats also the learn mask,\n"
        "P_learn_document, and further columns, P_columns_document. The same command resumes.",
    )
    add_input(parser)
    add = parser.add_argument
    add("--output-prefix", required=True, type=nonempty, metavar="P", help="path of the output without its ending")
    add(
        "--tokenizer-model",
        type=nonempty,
        metavar="FILE",
        help="a sentencepiece .model, or a Hugging Face tokenizer.json or the folder that holds it",
    )
    add(
        "--tokenizer-type",
        choices=("sentencepiece", "huggingface", "byte"),
        help="what --tokenizer-model is (default: its name tells); byte needs no model",
    )
    add(
        "--format",
        choices=("text", "sft", "preference", "prompt"),
        default="text",
        help="what a record is: a text; a conversation or prompt and completion (sft); prompt, chosen and rejected "
        "(preference); a prompt to be answered while training (text)",
    )
    add(
        "--chat-template",
        default="",
        metavar="FILE",
        help="Jinja template that makes texts of messages, or chatml, the built-in one (default: the tokenizer's own)",
    )
    add(
        "--json-keys",
        nargs="+",
        action="gather",
        default=("text",),
        metavar="KEY",
        help="fields or columns to tokenize; each makes an output of its own (text)",
    )
    add("--append-eod", action="store_true", help="put the end-of-document token after every document")
    add(
        "--allow-special",
        action="store_true",
        help="let special tokens that stand in a text, such as <|endoftext|>, become these tokens (Hugging Face); "
        "otherwise they are encoded as any other text; both are counted",
    )
    add(
        "--keep-empty",
        action="store_true",
        help="keep empty texts as documents without tokens, as Megatron-LM does: document numbers are record numbers",
    )
    add_work(parser, max_bad_ratio=0.05)
    options = parser.parse_args()
    options.json_keys = tuple(options.json_keys)
    return options


def _rate(facts: dict[str, Any]) -> str:
    if "format" not in facts:
        return f"{facts['text_bytes'] / max(facts['tokens'], 1):.3f} bytes per token"
    template = f", template {facts['template']['name']}" if facts["templated"] else ""
    return f"{facts['learned'] / facts['tokens']:.1%} of them learned{template}"


@program
def main() -> None:
    options = parse()
    from megalite.text.preprocess import PreprocessOptions, preprocess

    for summary in preprocess(PreprocessOptions(**vars(options))):
        facts = summary.description
        again = f", {summary.resumed_shards} of {summary.shards} shards from before" if summary.resumed_shards else ""
        print(
            f"{summary.prefix}: {counted(facts['documents'], 'document')}, {counted(facts['tokens'], 'token')}"
            f" ({facts['dtype']}), {_rate(facts)}{again}"
        )
        if facts.get("skipped_empty"):
            print(f"skipped: {counted(facts['skipped_empty'], 'empty text')}")
        if count := facts.get("special_in_text"):
            outcome = "became these tokens" if facts["allow_special"] else "were encoded as text"
            print(f"special tokens: {count} stood in the texts and {outcome}")
        for reason, count in facts["bad_records"].items():
            print(f"not used: {counted(count, 'record')}, {reason}; see {summary.prefix}.bad.jsonl")


if __name__ == "__main__":
    main()
