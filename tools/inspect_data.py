"""Look into token files: statistics, decoded documents, a full check, or the order in which training reads them.

python tools/inspect_data.py corpus_text_document --tokenizer-model T.model --documents 3 --verify
python tools/inspect_data.py a b --order --seq-length 1024 --samples 1000 --seed 1234 --weights 0.7 0.3
"""

import argparse
import json

from megalite.cli import Parser, nonempty, program, whole
from megalite.data.indexed import IndexedDataset
from megalite.data.inspection import PERCENTILES, histogram_lines, order, statistics
from megalite.data.verify import verify
from megalite.errors import UserError
from megalite.observe.formatting import counted
from megalite.text.tokenizers import Tokenizer, load_tokenizer

SHOWN_TOKENS = 400


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prefix", nargs="+", type=nonempty, metavar="PREFIX", help="token files, without .bin and .idx")
    add(
        "--tokenizer-model",
        default="",
        metavar="FILE",
        help="decode with this sentencepiece .model or tokenizer.json (or byte); without it ids are shown",
    )
    add("--documents", type=whole(0), default=0, metavar="K", help="show the beginning of this many documents")
    add("--first-document", type=whole(0), default=0, metavar="N", help="number of the first one shown")
    add("--verify", action="store_true", help="read everything: offsets, ids within the vocabulary, checksums")
    add(
        "--vocab-size",
        type=whole(),
        metavar="N",
        help="for --verify (default: the tokenizer's, or the one noted beside the file)",
    )
    add("--json", action="store_true", help="print the statistics as one JSON line for each prefix")
    add = parser.add_argument_group("the order of training").add_argument
    add(
        "--order",
        action="store_true",
        help="print one JSON line: sha256 of document, sample and shuffle index (and blend), and the first sample",
    )
    add("--seq-length", type=int, metavar="N", help="tokens of a sample")
    add("--samples", type=int, metavar="K", help="number of samples")
    add("--seed", type=int, default=1234, metavar="S", help="of the shuffles (1234)")
    add(
        "--weights",
        nargs="+",
        type=float,
        default=(),
        metavar="W",
        help="of each prefix (default: files are mixed in proportion to their sizes)",
    )
    return parser.parse_args()


def show_statistics(dataset: IndexedDataset, as_json: bool) -> None:
    numbers = statistics(dataset)
    named = dict(zip([f"p{percentile}" for percentile in PERCENTILES], numbers.percentiles, strict=False))
    if as_json:
        counts = {name: getattr(numbers, name) for name in ("documents", "empty_documents", "sequences", "tokens")}
        facts = {"dtype": str(dataset.dtype), "fingerprint": dataset.fingerprint(), "lengths": named}
        print(json.dumps({"prefix": dataset.prefix, **counts, **facts, "histogram": list(numbers.histogram)}))
        return
    print(dataset.prefix)
    print(f"  documents    {numbers.documents:,} ({numbers.empty_documents:,} empty), {numbers.sequences:,} sequences")
    size = dataset.tokens.nbytes / 1e6
    print(f"  tokens       {numbers.tokens:,} of {dataset.dtype}, {size:,.1f} MB")
    if named:
        mean = numbers.tokens / numbers.sequences
        points = "  ".join(f"{name} {value:,}" for name, value in named.items())
        print(f"  length       mean {mean:,.1f}  {points}")
    print(f"  fingerprint  {dataset.fingerprint()}")
    description = dataset.description()
    if tokenizer := description.get("tokenizer"):
        files = ", ".join(tokenizer.get("files", [])) or tokenizer.get("kind", "unknown")
        size, sha256 = tokenizer.get("vocab_size", 0), tokenizer.get("sha256", "unknown")
        print(f"  tokenizer    {files}, {size:,} entries, sha256 {sha256[:16]}")
    for source in description.get("merged_from", []):
        print(f"  merged from  {source.get('name', 'unknown')}, {source.get('tokens', 0):,} tokens")
    for line in histogram_lines(numbers.histogram):
        print(line)


def show_documents(dataset: IndexedDataset, tokenizer: Tokenizer | None, first: int, count: int) -> None:
    for number in range(first, min(first + count, dataset.documents)):
        ids = dataset.document(number)
        shown = ids[:SHOWN_TOKENS]
        text = tokenizer.decode(shown) if tokenizer else " ".join(map(str, shown.tolist()))
        more = f" … {ids.size - SHOWN_TOKENS:,} more tokens" if ids.size > SHOWN_TOKENS else ""
        print(f"--- document {number}, {counted(ids.size, 'token')}\n{text}{more}")


def check(dataset: IndexedDataset, vocab_size: int | None) -> None:
    if vocab_size is None:
        vocab_size = dataset.description().get("tokenizer", {}).get("vocab_size")
    problems = verify(dataset, vocab_size)
    for problem in problems[1:]:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{problems[0]} ({counted(len(problems), 'problem')} in all)")
    within = f"ids below {vocab_size}" if vocab_size is not None else "ids not negative (vocabulary unknown)"
    noted = "checksums agree" if "bin_sha256" in dataset.description() else "no checksums beside the file"
    print(f"verified: offsets and documents in order, {within}, {noted}")


@program
def main() -> None:
    options = parse()
    if options.order:
        if options.seq_length is None or options.samples is None:
            raise UserError("--order needs --seq-length and --samples")
        sizes = {"seq_length": options.seq_length, "samples": options.samples, "seed": options.seed}
        print(json.dumps(order(tuple(options.prefix), weights=tuple(options.weights), **sizes)))
        return
    tokenizer = load_tokenizer(options.tokenizer_model) if options.tokenizer_model else None
    vocab_size = options.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    for prefix in options.prefix:
        dataset = IndexedDataset(prefix)
        show_statistics(dataset, options.json)
        if not 0 <= options.first_document <= dataset.documents:
            raise UserError(
                f"--first-document {options.first_document}: {prefix} has {counted(dataset.documents, 'document')}"
            )
        show_documents(dataset, tokenizer, options.first_document, options.documents)
        if options.verify:
            check(dataset, vocab_size)


if __name__ == "__main__":
    main()
