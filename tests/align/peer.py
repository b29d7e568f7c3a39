"""The same losses and gradients by transformers, one unpacked sequence at a time, and rows packed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megalite.data.batch import Batch
from megalite.kernels.cross_entropy import IGNORE_INDEX

SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 53,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Example:
    """Token ids, and where the answer begins: from there on, tokens are learned."""

    ids: tuple[int, ...]
    answer: int


def random_examples(count: int, seed: int, longest: int = 24) -> list[Example]:
    """Examples of 3 to `longest` tokens; the second learns a single token."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = int(torch.randint(3, longest + 1, (), generator=generator))
        ids = torch.randint(SHAPE["vocab_size"], (length,), generator=generator)
        answer = length - 1 if number == 1 else int(torch.randint(1, length, (), generator=generator))
        examples.append(Example(tuple(ids.tolist()), answer))
    return examples


def packed(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """A batch with these examples side by side in its rows; padding is a document of its own."""
    shape = (len(rows), length)
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    positions, documents, ends = torch.zeros_like(tokens), torch.zeros_like(tokens), torch.zeros(shape)
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples):
            ids = torch.tensor(example.ids)
            stop = at + len(ids)
            assert stop <= length, "the examples do not fit the row"
            tokens[row, at:stop] = ids
            labels[row, at + example.answer - 1 : stop - 1] = ids[example.answer :]
            positions[row, at:stop] = torch.arange(len(ids))
            documents[row, at:stop] = number
            ends[row, stop - 1] = 1
            at = stop
        positions[row, at:] = torch.arange(length - at)
        documents[row, at:] = len(examples)
    return Batch(tokens, labels, positions, documents, {"ends": ends})


def in_rows(groups: Sequence[Sequence[Example]], length: int, rows: int) -> list[list[Example]]:
    """The groups (single examples, or pairs), one after the other into the first of `rows` rows with room."""
    filled: list[list[Example]] = [[] for _ in range(rows)]
    for group in groups:
        size = sum(len(example.ids) for example in group)
        row = next(row for row in filled if sum(len(example.ids) for example in row) + size <= length)
        row.extend(group)
    return filled


def make_models(folder: Path, seed: int = 3) -> tuple[Path, Path]:
    """Two tiny Llamas as transformers saves them: a reference, and a policy near it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.2))
    model.save_pretrained(folder / "reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "policy")
    return folder / "policy", folder / "reference"


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)


def answer_logprobs(model: Any, example: Example) -> Tensor:
    """Log-probabilities of the answer's tokens."""
    ids = torch.tensor([example.ids])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[example.answer - 1 :, 0]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def sft(policy: Any, examples: Sequence[Example]) -> tuple[float, dict[str, Tensor]]:
    logprobs = torch.cat([answer_logprobs(policy, example) for example in examples])
    loss = -logprobs.mean()
    return loss.item(), gradients(policy, loss)


def dpo(
    policy: Any, reference: Any, pairs: Sequence[Sequence[Example]], beta: float
) -> tuple[float, dict[str, Tensor]]:
    gaps = []
    for chosen, rejected in pairs:
        with torch.no_grad():
            base = answer_logprobs(reference, chosen).sum() - answer_logprobs(reference, rejected).sum()
        gaps.append(answer_logprobs(policy, chosen).sum() - answer_logprobs(policy, rejected).sum() - base)
    loss = -functional.logsigmoid(beta * torch.stack(gaps)).mean()
    return loss.item(), gradients(policy, loss)


def reward(policy: Any, score: Tensor, pairs: Sequence[Sequence[Example]]) -> tuple[float, dict[str, Tensor]]:
    """Bradley-Terry with the score weight [1, H] on the last token's hidden state."""
    score = score.clone().requires_grad_()

    def value(example: Example) -> Tensor:
        return functional.linear(policy.model(torch.tensor([example.ids])).last_hidden_state[0, -1], score)[0]

    gaps = torch.stack([value(chosen) - value(rejected) for chosen, rejected in pairs])
    loss = -functional.logsigmoid(gaps).mean()
    found = gradients(policy, loss)
    found.pop("lm_head.weight", None)
    assert score.grad is not None
    return loss.item(), found | {"score.weight": score.grad}
