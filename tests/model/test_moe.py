"""The sparse layer against a plain loop over tokens in float64, and the router's choices one by one."""

import random

import pytest
import torch

from megalite.config import ModelConfig
from megalite.kernels import grouped, select_kernels
from megalite.mesh import Mesh
from megalite.model.build import Build
from megalite.model.moe import MixtureOfExperts
from megalite.model.router import choose_experts
from megalite.parallel.collectives import TensorRegion

pytestmark = pytest.mark.fast

HIDDEN = 14


def sparse_model(**fields):
    return ModelConfig(**{"layers": 1, "hidden_size": HIDDEN, "heads": 2, "expert_ffn_hidden_size": 10, **fields})


def build_layer(model, dtype=torch.float64):
    mesh = Mesh()
    kernels = select_kernels({"default": "reference"}, mesh.device)
    layer = MixtureOfExperts(Build(model, mesh, TensorRegion(mesh.group("tp"), False), kernels, dtype), 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    return layer


def plain(layer, model, x_SBH, weights):
    """The definition: (output, balancing loss of each sequence averaged, z-loss), for weights of the names below."""
    gate_HE = weights["router"].t()
    logits_SBE = (x_SBH.float() @ gate_HE.float()).double()
    scores_SBE = logits_SBE.softmax(-1) if model.router == "softmax" else logits_SBE.sigmoid()
    out_SBH, counts_BE = torch.zeros_like(x_SBH), torch.zeros(x_SBH.shape[1], model.experts, dtype=torch.float64)
    inner, outer = weights["gate_up"].view(model.experts, -1, HIDDEN), weights["down"].view(model.experts, HIDDEN, -1)

    def network(x_H, gate_up, down):
        gate, up = (gate_up @ x_H).chunk(2)
        return down @ (torch.nn.functional.silu(gate) * up)

    for s, b in ((s, b) for s in range(x_SBH.shape[0]) for b in range(x_SBH.shape[1])):
        scores = scores_SBE[s, b]
        key = scores if layer.router.bias is None else scores + layer.router.bias
        chosen = sorted(range(model.experts), key=lambda e: -key[e].item())[: model.experts_per_token]
        total = sum(scores[e] for e in chosen) if model.router_renormalise else 1.0
        for e in chosen:
            counts_BE[b, e] += 1
            weight = model.router_scale * scores[e] / total
            out_SBH[s, b] = out_SBH[s, b] + weight * network(x_SBH[s, b], inner[e], outer[e])
        if layer.shared is not None:
            out_SBH[s, b] = out_SBH[s, b] + network(x_SBH[s, b], weights["shared_in"], weights["shared_out"])
    shares_BE = (scores_SBE / scores_SBE.sum(-1, keepdim=True)).mean(0)
    frequency_BE = counts_BE / counts_BE.sum(-1, keepdim=True)
    return out_SBH, model.experts * (frequency_BE * shares_BE).sum(-1).mean(), logits_SBE.logsumexp(-1).square().mean()


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 5},
        {"experts": 7, "experts_per_token": 3, "router_renormalise": False, "shared_experts": 2},
        {"experts": 6, "experts_per_token": 1, "router": "sigmoid", "router_scale": 2.5, "shared_experts": 1},
        {"experts": 2, "experts_per_token": 2, "router_bias_rate": 0.1},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
@pytest.mark.parametrize("recompute", [False, True])
def test_output_losses_and_all_gradients(fields, recompute):
    model = sparse_model(**fields, aux_loss=0.7, router_z_loss=0.3)
    layer, length, batch = build_layer(model), random.randint(1, 9), random.randint(1, 3)
    x_SBH = torch.randn(length, batch, HIDDEN, dtype=torch.float64, requires_grad=True)
    named = {"router": layer.router.weight, "gate_up": layer.gate_up.weight, "down": layer.down.weight}
    if layer.shared is not None:
        named |= {"shared_in": layer.shared.gate_up.weight, "shared_out": layer.shared.down.weight}
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}
    copy_SBH, upstream_SBH = x_SBH.detach().clone().requires_grad_(), torch.randn_like(x_SBH)

    layer.router.begin(length * batch)
    ours_SBH = layer(x_SBH, recompute=recompute)
    ours_SBH.backward(upstream_SBH)
    theirs_SBH, balance, squares = plain(layer, model, copy_SBH, weights)
    losses = model.aux_loss * balance + model.router_z_loss * squares
    ((theirs_SBH * upstream_SBH).sum() + losses).backward()

    torch.testing.assert_close(ours_SBH, theirs_SBH, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.router.loss, losses.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(x_SBH.grad, copy_SBH.grad, rtol=1e-4, atol=1e-5)
    for name, weight in named.items():
        torch.testing.assert_close(weight.grad, weights[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    assert layer.router.counts_E.sum() == length * batch * model.experts_per_token


def test_the_bias_chooses_and_does_not_weigh():
    model = sparse_model(experts=4, experts_per_token=1, router="sigmoid", router_renormalise=False)
    layer, x_SBH = build_layer(model), torch.randn(3, 2, HIDDEN, dtype=torch.float64)
    layer.router.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))
    choice = layer.router(x_SBH)
    assert (choice.experts_sBK == 2).all()
    expected = (x_SBH.float() @ layer.router.weight.float().t()).sigmoid()[..., 2:3]
    torch.testing.assert_close(choice.weights_sBK, expected)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_experts_come_from_the_best_groups(router):
    """Groups by their best expert (softmax) or best two (sigmoid); the choice differs from the ungrouped one."""
    model = sparse_model(experts=6, experts_per_token=2, router_groups=3, router_groups_per_token=1, router=router)
    scores_TE = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.8, 0.2]])
    assert sorted(choose_experts(scores_TE, model, None)[0].tolist()) == ([0, 1] if router == "softmax" else [2, 3])
    wide = sparse_model(experts=6, experts_per_token=2, router_groups=3, router_groups_per_token=3, router=router)
    assert sorted(choose_experts(scores_TE, wide, None)[0].tolist()) == [0, 4]


def test_an_even_load_has_the_smallest_balancing_loss():
    """1 times the coefficient, where scores and choices are even; E where one expert gets all."""
    model = sparse_model(experts=4, experts_per_token=1, aux_loss=1.0)
    layer = build_layer(model)
    for logits, loss in ((torch.eye(4), None), (torch.eye(4)[:1].expand(4, 4), 4.0)):
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[:, :4].copy_(60 * torch.eye(4))
        x_SBH = torch.zeros(4, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
        x_SBH.data[:, 0, :4] = logits.double()
        layer.router.begin(4)
        layer(x_SBH).sum().backward()
        assert layer.router.loss.item() == pytest.approx(loss or 1.0, rel=1e-5)


def test_grouped_products_are_those_of_each_row():
    sizes = [random.choice([0, 1, 5, 8]) for _ in range(6)]
    ends_G, rows = torch.tensor(sizes).cumsum(0), sum(sizes)
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    weight, x, grad = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 3, 7), (rows, 7), (rows, 3)))
    expected = torch.einsum("noi,ni->no", weight[owner], x)
    torch.testing.assert_close(grouped.grouped_product(x, weight, ends_G), expected)
    expected = torch.einsum("noi,no->ni", weight[owner], grad)
    torch.testing.assert_close(grouped.grouped_input_gradient(grad, weight, ends_G), expected)
    start = torch.randn(6, 3, 7, dtype=torch.float64)
    expected = start.index_add(0, owner, torch.einsum("no,ni->noi", grad, x))
    torch.testing.assert_close(grouped.grouped_weight_gradient_(start.clone(), grad, x, ends_G), expected)


@pytest.mark.parametrize("shape", [(2, 3, 8), (3, 7)])
def test_grouped_products_refuse_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="must be"):
        grouped.grouped_product(torch.randn(4, 7), torch.randn(shape), torch.tensor([1, 2]))
