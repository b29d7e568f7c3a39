"""`kernels.attention = auto`: one measurement for each kind of call, kept over runs, and never fatal."""

import json
import logging
import time

import pytest
import torch

from megalite.kernels import attention_choice as choice
from megalite.kernels import select_kernels
from megalite.kernels.flash_attention import Documents, attention_reference

pytestmark = pytest.mark.fast


class Candidates:
    """Fake implementations with given times, which count how often they are measured and called."""

    def __init__(self, **times):
        self.times, self.measured, self.called = times, [], []
        self.functions = {name: self._function(name) for name in times}

    def _function(self, name):
        def call(q, k, v, **options):
            self.called.append(name)
            return q

        return call

    def measure(self, candidate, tensors, options):
        candidate(*tensors, **options)
        name = self.called.pop()
        self.measured.append(name)
        if self.times[name] is None:
            raise RuntimeError("not this call")
        return self.times[name]

    def attention(self, path, environment="here"):
        return choice.fastest(self.functions, choice.MeasuredTimes(path, environment), self.measure)


def heads(queries=8, keys=8, width=16, dtype=torch.float32, trains=True):
    shapes = [(queries, 1, 4, width), (keys, 1, 2, width), (keys, 1, 2, width)]
    return [torch.randn(shape).to(dtype).requires_grad_(trains) for shape in shapes]


def test_each_kind_of_call_is_measured_once(tmp_path):
    fakes = Candidates(slow=2.0, quick=1.0, refuses=None)
    attention = fakes.attention(tmp_path / "times.json")
    kinds = [
        (heads(), {}),
        (heads(width=32), {}),
        (heads(dtype=torch.bfloat16), {}),
        (heads(keys=9), {}),
        (heads(), {"window": 3}),
        (heads(trains=False), {}),
        (heads(), {"documents": torch.zeros(8, 1)}),
        ([torch.cat([x, x], -1)[..., :16] for x in heads()], {}),  # strided, as parts of a fused projection
    ]
    for number, (tensors, options) in enumerate(kinds):
        if "documents" in options:
            attention(*tensors, documents=Documents(options["documents"]))  # the same kind as a plain tensor
        attention(*tensors, **options)
        attention(*tensors, **options)
        assert len(fakes.measured) == 3 * (number + 1), f"kind {number}"
    assert set(fakes.called) == {"quick"}


def test_generation_does_not_measure_every_length(tmp_path):
    fakes = Candidates(a=1.0)
    attention = fakes.attention(tmp_path / "times.json")
    with torch.no_grad():
        for keys in range(2, 65):
            attention(*heads(1, keys))
    assert len(fakes.measured) == 6  # 2, 4, 8, 16, 32, 64 keys


def test_the_next_run_measures_nothing_and_chooses_the_same(tmp_path, caplog):
    path = tmp_path / "deep" / "times.json"
    Candidates(a=2.0, b=1.0, c=None).attention(path)(*heads())
    later = Candidates(a=0.5, b=1.0, c=0.1)
    with caplog.at_level(logging.INFO, logger="megalite.kernels"):
        later.attention(path)(*heads())
    assert later.measured == [] and later.called == ["b"]
    assert "b for q (8, 1, 4, 16) (measured earlier: a 2.00, b 1.00)" in caplog.text
    for environment, names in (("another device", ("a", "b", "c")), ("here", ("a", "b"))):
        other = Candidates(**dict.fromkeys(names, 1.0))
        other.attention(path, environment)(*heads())
        assert other.measured == list(names), "another environment or other candidates"
    assert len(json.loads(path.read_text())) == 2 and list(path.parent.iterdir()) == [path]


BROKEN = [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"here": 3}', b'{"here": {"KIND": []}}']
BROKEN += [b'{"here": {"KIND": {"a": %s}}}' % value for value in (b"-1.0", b'"x"', b"NaN", b"null")]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_measured_over(tmp_path, content):
    path, tensors = tmp_path / "times.json", heads()
    path.write_bytes(content.replace(b"KIND", str(choice.kind_of(tuple(tensors), {})).replace('"', "'").encode()))
    fakes = Candidates(a=1.0)
    fakes.attention(path)(*tensors)
    assert fakes.measured == ["a"] and fakes.called == ["a"]
    again = Candidates(a=1.0)
    again.attention(path)(*tensors)
    assert again.measured == []


def test_a_place_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    fakes = Candidates(a=1.0)
    attention = fakes.attention(tmp_path / "file" / "times.json")
    for width in (8, 16, 24):
        attention(*heads(width=width))
    assert len([r for r in caplog.records if "not kept" in r.message]) == 1


def test_no_candidate_is_an_error_that_names_the_shapes(tmp_path):
    with pytest.raises(RuntimeError, match=r"\(8, 1, 4, 16\).*refuses"):
        Candidates(refuses=None).attention(tmp_path / "times.json")(*heads())


def test_the_environment_follows_versions_and_kernels(monkeypatch):
    here = choice.environment(torch.device("cpu"))
    assert f"torch {torch.__version__}" in here
    monkeypatch.setattr(torch, "__version__", "9.9")
    changed = choice.environment(torch.device("cpu"))
    assert changed != here and "torch 9.9" in changed
    monkeypatch.setattr(choice.Path, "read_bytes", lambda self: b"another kernel")
    assert choice.environment(torch.device("cpu")).split("kernels")[1] != here.split("kernels")[1]


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice.cache_file() == tmp_path / "megalite" / "attention.json"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(choice.Path, "home", homeless)
    assert choice.cache_file() is None
    fakes = Candidates(a=1.0)
    fakes.attention(None)(*heads())
    assert fakes.called == ["a"]


def test_times_include_the_backward_only_where_it_is_wanted():
    seen = []

    def candidate(*tensors, **options):
        out = attention_reference(*tensors, **options)
        seen.append(out.requires_grad)
        time.sleep(1e-4)
        return out

    tensors = tuple(heads())
    assert choice.seconds(candidate, tensors, {}) > 1e-4 and all(x.grad is None for x in tensors)
    with torch.no_grad():
        choice.seconds(candidate, tensors, {})
    assert seen == [True] * 7 + [False] * 7


def test_a_backend_of_sdpa_refuses_what_it_would_not_do_itself():
    """Soft caps and log-sum-exps go to the explicit form: its time must not stand under a backend's name."""
    for call in choice.sdpa_backends().values():
        for options in ({"softcap": 2.0}, {"return_lse": True}):
            with pytest.raises(RuntimeError, match="fused"):
                call(*heads(), **options)
        with pytest.raises(RuntimeError, match="fused"):
            call(*heads(9, 8))


def test_auto_on_a_cuda_device_chooses_among_ours_and_torchs(monkeypatch, tmp_path):
    """The wiring of `select_kernels`, with a device that is only named."""
    pytest.importorskip("triton")
    seen = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake 9000")
    monkeypatch.setattr(
        choice, "fastest", lambda candidates, kept: seen.update(names=list(candidates), kept=kept) or len
    )
    kernels = select_kernels({}, torch.device("cuda"))
    assert kernels.attention is len and seen["names"] == ["triton", "sdpa-flash", "sdpa-cudnn"]
    assert seen["kept"].path.parent.parent == tmp_path and seen["kept"].environment.startswith("Fake 9000, torch")
    assert "measured" in kernels.choices["attention"]
    assert select_kernels({"attention": "triton"}, torch.device("cuda")).attention is not len
