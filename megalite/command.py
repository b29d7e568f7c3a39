"""What the programs share on their command lines."""

from __future__ import annotations

import argparse
from typing import NoReturn

from megalite.errors import UserError


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line and exit code 2, as all others."""

    def __init__(self, description: str | None, epilog: str = "") -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=epilog, formatter_class=shape, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
