"""tools/inspect_checkpoint.py as a program."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from megalite.checkpoint.writer import CheckpointWriter

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_a_sound_and_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_00000012"
    with CheckpointWriter(folder, step=12, model={"layers": 1}, state={"step": 12}) as writer:
        writer.add("a.weight", torch.randn(30, 10))
        writer.add_file("config.toml", b"[run]\n")
    facts = json.loads(inspect(tmp_path, "--json", "--verify").stdout)
    assert facts["checkpoint"] == str(folder)
    assert (facts["step"], facts["parameters"], facts["bytes"]) == (12, 300, {"weight": 1200})

    path = folder / "part_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = inspect(folder, "--verify")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "weight/a.weight/0,0 does not match its checksum" in result.stderr
