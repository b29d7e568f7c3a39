"""Put several token files together, in the order given, without loading them.

python tools/merge_data.py --input a_text_document b_text_document --output-prefix all_text_document
"""

import time
from dataclasses import dataclass

import tyro

from megalite.data.indexed import IndexedDataset
from megalite.data.merge import merge, merged_provenance
from megalite.errors import exit_on_user_error


@dataclass(frozen=True)
class Options:
    """Write the documents of several token files, in the order given, as one token file."""

    input: tuple[str, ...]
    """Token files, without .bin and .idx; all of one token dtype and, where it is noted, of one tokenizer."""
    output_prefix: str
    """Token file to write, without .bin and .idx."""


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options)
    started = time.monotonic()
    provenance = merged_provenance([IndexedDataset(prefix) for prefix in options.input])
    result = merge(options.input, options.output_prefix, provenance)
    seconds = time.monotonic() - started
    print(
        f"{options.output_prefix}: {result['documents']:,} documents, {result['tokens']:,} tokens"
        f" from {len(options.input)} files in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
