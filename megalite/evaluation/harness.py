"""lm-evaluation-harness with megalite as its model, in any layout: the library, its tasks and their data are needed on
rank 0 alone (extra `eval`).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.cli import nearest
from megalite.errors import UserError
from megalite.evaluation.progress_bar import Progress
from megalite.evaluation.results import Result
from megalite.evaluation.text_model import TextModel
from megalite.generation.sampling import Sampling
from megalite.text.foreign import shorten

TASKS = Path(__file__).with_name("tasks")
"""Task files for local data: `local_mmlu`, `local_gsm8k`, `local_humaneval`."""

_DEFAULT_NEW_TOKENS = 256
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_CACHED_TOGETHER = 4096
_BOOTSTRAPS = 1000
"""For standard errors of metrics that have no formula."""


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; `data` is for the tasks of `TASKS`, the rest as lm-evaluation-harness names it."""

    tasks: Sequence[str]
    include_path: str = ""
    data: str = ""
    shots: int | None = None
    limit: int | None = None
    cache: str = ""
    """Prefix of a file that keeps answered requests, for the next call."""
    chat: bool = False
    """Put requests into the checkpoint's chat template."""
    system: str = ""
    allow_code: bool = False


def evaluate(model: TextModel, options: Options, progress: Progress) -> list[Result]:
    """One result for each task, with the task's first metric as its score and all of them in `more`.

    Raises UserError: the library is missing, a task is unknown, its data cannot be reached, or it runs code.
    """
    manager = _manager(options)
    from lm_eval import simple_evaluate

    with _quiet_library(), _reachable():
        found = simple_evaluate(
            model=adapter(model, progress),
            tasks=list(options.tasks),
            num_fewshot=options.shots,
            limit=options.limit,
            use_cache=options.cache or None,
            bootstrap_iters=_BOOTSTRAPS,
            system_instruction=options.system or None,
            apply_chat_template=options.chat,
            task_manager=manager,
            confirm_run_unsafe_code=options.allow_code,
        )
    assert found is not None
    return [_result(name, found) for name in found["results"] if name in found["configs"]]


def _manager(options: Options) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "lm_eval is missing, which brings the tasks; install it: pip install 'lm_eval>=0.4.9'"
        ) from error
    if options.include_path and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path}: no such folder")
    paths = [str(TASKS), *filter(None, [options.include_path])]
    given = {"data": options.data, "shots": options.shots}
    with _quiet_library():
        manager = TaskManager(include_path=paths, include_defaults=False, metadata=given)
        if all(map(manager.match_tasks, ([name] for name in options.tasks))):
            return manager  # reading the thousands of files of the library takes seconds
        manager = TaskManager(include_path=paths, metadata=given)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            near = nearest(name, manager.all_tasks)
            hint = f"did you mean {near}?" if near else "--include-path DIR adds a folder of task files"
            raise UserError(f"--tasks: {name} is unknown; {hint}")
    return manager


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Errors only: the library tells every setting that it reads."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "httpx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Within, data that cannot be fetched, and code that must be allowed, are the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = shorten(error)
        if "confirm_run_unsafe_code" in text or "HF_ALLOW_CODE_EVAL" in text:
            raise UserError(
                "a task runs programs that the model has written; allow it with --allow-code-execution (local_humaneval"
                " runs them in a sandbox)"
            ) from error
        if "number of fewshot samples" in text or "Sample larger than population" in text:
            raise UserError("--shots: a task has fewer examples than are asked for; give fewer") from error
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError) or names & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError"}:
            raise UserError(
                f"a task's data cannot be fetched ({text}); tasks for local data: local_mmlu, local_gsm8k, "
                "local_humaneval with --data, or your own with --include-path"
            ) from error
        raise


def _result(name: str, found: Mapping[str, Any]) -> Result:
    numbers = {
        key.removesuffix(",none").replace(",", "/"): value
        for key, value in found["results"][name].items()
        if isinstance(value, int | float)
    }
    metrics = {key: value for key, value in numbers.items() if "_stderr" not in key and key != "sample_len"}
    errors = {key.replace("_stderr", ""): value for key, value in numbers.items() if "_stderr" in key}
    first = next(iter(metrics), "")
    samples = found.get("samples", {}).get(name, [])
    records = list(_records(name, samples))
    more = {"metric": first, "metrics": metrics, "stderrs": errors}
    shots = int(found["n-shot"].get(name) or 0)
    described = found["configs"][name].get("metadata") or {}
    if "examples" in described:  # a task of `TASKS`, which puts them into its questions itself
        shots = described["examples"] if described.get("shots") is None else described["shots"]
    questions = len({record["id"] for record in records})
    return Result(name, metrics.get(first, 0.0), errors.get(first), questions, shots, more, records)


def _records(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Requests as the library keeps them, in the form of `Result.records`; a filter makes a record of its own."""
    for sample in samples:
        metrics = {name: sample[name] for name in sample.get("metrics", ()) if name in sample}
        arguments = sample.get("arguments", [])
        responses = sample.get("resps", [])
        record = {
            "task": task,
            "id": str(sample.get("doc_id")),
            "prompt": arguments[0][0] if arguments else "",
            "answer": sample.get("filtered_resps"),
            "gold": sample.get("target"),
            "correct": bool(next(iter(metrics.values()), 0)),
            "filter": sample.get("filter"),
            "metrics": metrics,
        }
        if responses and isinstance(responses[0][0], str):
            record["text"] = responses[0][0]
        else:
            record["logprobs"] = [response[0][0] if response else None for response in responses]
        yield json.loads(json.dumps(record, default=str))


def adapter(model: TextModel, progress: Progress) -> Any:
    """The library's model class over `model`; made here, because the library is imported on rank 0 alone."""
    from lm_eval.api.model import TemplateLM

    class Megalite(TemplateLM):  # type: ignore[misc]
        """Answers of all three kinds of requests by the service."""

        @property
        def eot_token_id(self) -> int:
            return next(iter(model.eos), model.prefix)

        @property
        def prefix_token_id(self) -> int:
            return model.prefix

        @property
        def max_length(self) -> int:
            return model.service.longest

        @property
        def tokenizer_name(self) -> str:
            return model.name.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return model.chat_template().source if chat_template else None

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return model.chat_text(chat_history, add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return model.encode([string], bare=add_special_tokens is False)[0]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return model.service.loglikelihoods([(context, more) for _, context, more in requests])

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            answers: list[tuple[float, bool]] = []
            together = len(pairs) if self.cache_hook.dbdict is None else _CACHED_TOGETHER
            with progress.task("log-likelihoods", len(pairs)) as advance:
                for first in range(0, len(pairs), max(1, together)):
                    part = pairs[first : first + together]
                    found = model.loglikelihoods(part, advance)
                    answers += found
                    self._keep("loglikelihood", part, found)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            with progress.task("rolling log-likelihoods", len(texts)) as advance:
                found = model.rolling(texts, advance)
            self._keep("loglikelihood_rolling", [(text,) for text in texts], found)
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
            texts = [""] * len(requests)
            with progress.task("completions", len(requests)) as advance:
                for members in groups.values():
                    contexts = [requests[number].args[0] for number in members]
                    wanted = requests[members[0]].args[1]
                    found = model.generate(contexts, *generation_settings(wanted), advance=advance)
                    for number, text in zip(members, found):
                        texts[number] = text
                    if not wanted.get("do_sample"):
                        self._keep("generate_until", [requests[number].args for number in members], found)
            return texts

        def _keep(self, kind: str, arguments: Sequence[Any], found: Sequence[Any]) -> None:
            if self.cache_hook.dbdict is not None:
                for one, answer in zip(arguments, found):
                    self.cache_hook.add_partial(kind, one, answer)

    return Megalite()


def generation_settings(wanted: Mapping[str, Any]) -> tuple[int, list[str], Sampling]:
    """(new tokens at most, stop strings, sampling) of a task's generation settings, with the library's defaults."""
    until = wanted.get("until") or []
    lengths = [wanted[name] for name in _LENGTH_NAMES if wanted.get(name) is not None]
    new = int(next(iter(lengths), _DEFAULT_NEW_TOKENS))
    temperature = float(wanted.get("temperature", 0.0) or 0.0)
    if wanted.get("do_sample") is False:
        temperature = 0.0
    elif wanted.get("do_sample") and "temperature" not in wanted:
        temperature = 1.0
    sampling = Sampling(temperature, int(wanted.get("top_k") or 0), float(wanted.get("top_p") or 1.0))
    return new, [until] if isinstance(until, str) else list(until), sampling
