"""Trackers for metrics besides the run's own file: TensorBoard, Weights & Biases.

Both use files, a network and threads of their own, and may raise anything: `Observers` calls them and catches it.
"""

from __future__ import annotations

import netrc
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from megalite.config import Config
from megalite.errors import UserError
from megalite.files import write_atomically

_RETRY_SECONDS = 60.0
"""A failed writer is recreated after this long."""
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tracker(Protocol):
    """Records the numbers of each step; `step` may go back after a rollback."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; `first` is the first step of this start, which hides later steps of earlier starts."""

    def __init__(self, folder: Path, first: int) -> None:
        self._folder, self._purge = folder, first
        self._writer: Any = None
        self._retry_at = 0.0
        self._reported = threading.excepthook
        threading.excepthook = self._thread_failed

    def _thread_failed(self, failure: Any) -> None:
        # The writer's thread passes its error to the next call, which reports it; a traceback would repeat it.
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._reported(failure)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge or step)
                self._purge = 0
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        except Exception:
            self._writer, self._retry_at = None, time.monotonic() + _RETRY_SECONDS
            raise

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            threading.excepthook = self._reported


class WeightsAndBiases:
    """One W&B run per run directory, across restarts: the id is stored in `run.dir`."""

    def __init__(self, config: Config) -> None:
        import wandb  # type: ignore[import-not-found]

        folder = config.run.dir
        run_id = kept_id(Path(folder) / "wandb" / "run_id")
        self._run = wandb.init(
            project="megalite", id=run_id, resume="allow", dir=folder, name=Path(folder).name, config=asdict(config)
        )
        self._furthest = -1

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        # W&B cannot go back: steps repeated after a rollback are skipped until they are new.
        if step > self._furthest:
            self._furthest = step
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def kept_id(path: Path) -> str:
    """The id in the file, or a new one, which is written there."""
    try:
        if _WANDB_ID.fullmatch(known := path.read_text(encoding="utf-8").strip()):
            return known
    except (OSError, ValueError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = secrets.token_hex(8)
    write_atomically(path, fresh + "\n")
    return fresh


def require_credentials(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` if `log.wandb` is on and W&B would prompt for a login."""
    if not config.log.wandb or environment.get("WANDB_MODE", "online") != "online":
        return
    host = urlparse(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or _in_netrc(
        host, environment
    ):
        return
    raise UserError(
        f"log.wandb = true needs an API key for {host}; set WANDB_API_KEY or run `wandb login`, "
        "set WANDB_MODE=offline, or set log.wandb to false"
    )


def _in_netrc(host: str, environment: Mapping[str, str]) -> bool:
    """Whether `wandb login` has stored a key for the host."""
    home = Path(environment.get("HOME") or Path.home())
    named = environment.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return True
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
    return False
