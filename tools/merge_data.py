"""Put several token files together, in the order given, without loading them.

python tools/merge_data.py --input a_text_document b_text_document --output-prefix all_text_document
"""

import argparse
import time

from megalite.cli import Parser, nonempty, program
from megalite.data.indexed import IndexedDataset
from megalite.data.merge import merge, merged_provenance
from megalite.observe.formatting import counted


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        action="gather",
        required=True,
        type=nonempty,
        metavar="PREFIX",
        help="token files, without .bin and .idx; all of one token dtype and, where it is noted, of one tokenizer",
    )
    parser.add_argument(
        "--output-prefix", required=True, type=nonempty, metavar="P", help="token file to write, without .bin and .idx"
    )
    return parser.parse_args()


@program
def main() -> None:
    options = parse()
    started = time.monotonic()
    provenance = merged_provenance([IndexedDataset(prefix) for prefix in options.input])
    result = merge(options.input, options.output_prefix, provenance)
    seconds = time.monotonic() - started
    print(
        f"{options.output_prefix}: {counted(result['documents'], 'document')}, {counted(result['tokens'], 'token')}"
        f" from {counted(len(options.input), 'file')} in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
