"""Every defect of the source document's memory bank, shown on the sketch as it was written."""

from __future__ import annotations

import copy

import torch
from torch.utils.checkpoint import checkpoint

from ctxbench.cost import big_o, evaluate
from ctxbench.cost.symbols import bindings
from ctxbench.implementations.memory_bank import METHOD
from ctxbench.implementations.memory_bank.params import MemoryBankParams
from ctxbench.method import Dims

TINY = Dims(seq_len=13, batch_size=2, d_model=8, num_heads=2, num_layers=2, d_ff=12)


def sketch(num_slots=6, **dims):
    torch.manual_seed(0)
    params = MemoryBankParams(num_slots=num_slots, segment_len=4)
    return METHOD.make(TINY.replace(**dims), params, "as_written", "cpu", torch.float64)


def tokens(length=13, batch=2, seed=1):
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(module, x):
    """The output of a copy: the sketch rewrites its own weights."""
    with torch.no_grad():
        return copy.deepcopy(module)(x)


def test_the_sketch_attends_over_the_batch_axis():
    module, x = sketch(num_layers=1), tokens()
    other = x.clone()
    other[0, 5] += 1
    moved = (fresh(module, x) - fresh(module, other)).abs().amax(dim=2) > 1e-9
    assert moved.nonzero().tolist() == [[0, 5], [1, 5]]  # no other token, but the other row of the batch


def test_the_sketch_lets_the_last_token_reach_the_first_through_the_next_layer():
    x = tokens(batch=1)
    other = x.clone()
    other[:, -1] += 1
    gaps = [(fresh(m, x) - fresh(m, other))[:, 0].abs().max() for m in (sketch(num_layers=1), sketch(num_layers=2))]
    assert gaps[0] < 1e-12
    assert gaps[1] > 1e-6


def test_the_sketch_gives_another_output_for_the_same_input_even_in_evaluation():
    module, x = sketch().eval(), tokens()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        assert (module(x) - module(x)).abs().max() > 1e-3
    changed = [name for name, parameter in module.named_parameters() if not torch.equal(parameter, weights[name])]
    assert changed == ["bank.values"]  # and the keys stay: content and address drift apart


def test_the_sketch_trains_neither_its_writes_nor_an_attention_it_never_calls():
    module = sketch(num_layers=1)
    module(tokens()).backward(tokens(seed=2))
    silent = {name.rpartition(".")[0] for name, parameter in module.named_parameters() if parameter.grad is None}
    attention = "layers.0.memory_attention"
    assert silent == {"bank.update", "bank.slot_logits", attention, f"{attention}.out_proj"}


def test_the_sketch_differentiates_with_a_bank_that_was_written_after_the_read():
    module, x = sketch(num_layers=1), tokens()
    honest = copy.deepcopy(module)
    honest.bank.write = lambda x, pooled: None
    for one in (module, honest):
        one(x).backward(tokens(seed=2))
    torch.testing.assert_close(module.bank.q.weight.grad, honest.bank.q.weight.grad)
    assert (module.bank.v.weight.grad - honest.bank.v.weight.grad).abs().max() > 1e-3


def test_the_sketch_writes_twice_under_checkpointing():
    banks = []
    for recompute in (False, True):
        module, x = sketch(num_layers=1), tokens().requires_grad_()
        y = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        y.backward(tokens(seed=2))
        banks.append(module.bank.values.detach())
    assert (banks[0] - banks[1]).abs().max() > 1e-3


def test_the_sketch_makes_its_bank_depend_on_the_order_of_the_rows():
    found = []
    for order in ([0, 1, 2], [2, 1, 0]):
        module = sketch(num_slots=1, num_layers=1)
        with torch.no_grad():
            module(tokens(batch=3)[order])
        found.append(module.bank.values.detach())
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_sketch_shares_one_bank_between_layers_and_rows():
    module = sketch()
    assert module.layers[0].bank is module.layers[1].bank
    assert module.bank.values.shape == (6, 8)


def test_the_sketch_looks_linear_because_it_attends_to_rows_not_to_tokens():
    terms = METHOD.cost_of("as_written", "forward", True, "none", METHOD.params()).flops
    values = bindings(Dims(seq_len=1000, batch_size=3, d_model=64), METHOD.params(), 4, 512)
    assert big_o(terms["attention"]) == "O(T)"
    assert evaluate(terms["attention"], values) == 4 * 64 * 1000 * 3**2
