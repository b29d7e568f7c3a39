"""From raw text to tokens: readers, cleaning, deduplication, tokenizers and the writing of token files."""
