"""The exit codes have one home; what cannot import it agrees with it."""

import re
from pathlib import Path

import pytest

from megalite.errors import ENDINGS, FINISHED, INTERRUPTED, STOPPED, UNUSABLE

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "known"), [("entry.sh", {FINISHED, STOPPED, UNUSABLE}), ("job.sh", {STOPPED, UNUSABLE})]
)
def test_the_scripts_know_the_same_codes(script, known):
    text = (ROOT / "launch" / script).read_text()
    labels = {int(number) for number in re.findall(r"^\s*(\d+)\)", text, flags=re.MULTILINE)}
    left = {int(number) for number in re.findall(r"\bexit (\d+)\b", text)} - {FINISHED, 1}
    assert labels | left <= set(ENDINGS) and known <= labels | left | {FINISHED}


def test_the_public_codes():
    """Those of the README's table."""
    assert (FINISHED, UNUSABLE, STOPPED, INTERRUPTED) == (0, 2, 75, 130)
    table = (ROOT / "README.md").read_text()
    assert all(f"| {code} |" in table for code in ENDINGS)
