import random
import sysconfig
from pathlib import Path

import pytest

from megalite.text.tokenizer_training import TrainingOptions, train


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """Some real text that every machine has: modules of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return [file.read_text(encoding="utf-8") for file in files]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Path:
    """A sentencepiece model as `train_tokenizer.py` makes it by default."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for number, text in enumerate(source_texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    train(TrainingOptions([str(folder / "*.txt")], 1200, str(folder / "t")))
    return folder / "t.model"


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Fresh random numbers; the seed is printed where a test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)
