"""Train a sentencepiece BPE tokenizer on text files and report how many bytes of held-out text a token carries."""

import argparse

from megalite.cli import Parser, nonempty, program, whole
from megalite.observe.formatting import counted
from megalite.text.options import add_input


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "Byte fallback, text unchanged, exact round trip of white space.")
    add_input(parser)
    add = parser.add_argument
    add(
        "--vocab-size",
        required=True,
        type=whole(),
        metavar="N",
        help="entries of the vocabulary, special tokens and the 256 bytes included",
    )
    add("--output-prefix", required=True, type=nonempty, metavar="T", help="writes T.model and T.vocab")
    add("--json-key", default="text", metavar="KEY", help="field or column that holds the text (text)")
    add(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make every digit a token of its own",
    )
    add(
        "--special-tokens",
        nargs="*",
        action="gather",
        default=("<|im_start|>", "<|im_end|>"),
        metavar="TOKEN",
        help="tokens that never come from text, beside <unk>, <s>, </s> (end of document) and <pad>",
    )
    add(
        "--max-bytes",
        type=whole(),
        default=200_000_000,
        metavar="BYTES",
        help="train on a sample of about this much of the input; takes about 7 times that in memory",
    )
    add("--seed", type=whole(0, (1 << 63) - 1), default=1234, metavar="S", help="of the sample and the held-out part")
    options = parser.parse_args()
    options.special_tokens = tuple(options.special_tokens)
    return options


@program
def main() -> None:
    options = parse()
    from megalite.text.tokenizer_training import TrainingOptions, train

    report = train(TrainingOptions(**vars(options)))
    print(f"trained on {report.train_bytes / 1e6:.1f} MB of {counted(report.documents, 'document')}")
    for reason, count in sorted(report.bad.items()):
        print(f"not used: {counted(count, 'record')}, {reason}")
    if report.first_bad:
        print(f"first of them: {report.first_bad}")
    where = "held-out text" if report.held_out else "the training text itself (too few documents to hold some out)"
    print(f"{report.bytes_per_token:.3f} bytes per token on {report.measured_bytes / 1e6:.2f} MB of {where}")
    print(f"wrote {options.output_prefix}.model and {options.output_prefix}.vocab ({options.vocab_size} entries)")


if __name__ == "__main__":
    main()
