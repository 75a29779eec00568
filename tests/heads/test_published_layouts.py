"""Compiled steps and a GPU's chain of heads that were trained elsewhere, each beside PyTorch's: all that a layout can ask for."""

import functools

import pytest
import torch
import torch.nn.functional as F
from nf4_models import hold_in_nf4, nf4_backbone  # noqa: F401 (a fixture)
from runs import ids_of
from tiny_models import VOCAB

from early_exit_cli.files.schemas import EagleLayout
from early_exit_cli.heads.cuda_eagle import MOST_STEPS, CudaEagle
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.heads.native_eagle import NativeEagle, eagle_runner
from early_exit_cli.runtime.native_code import has_native_code
from early_exit_cli.runtime.reference_kernels import ReferenceKernels

LAYERS, DRAFTED = [1, 2, 3], 96
LAYOUTS = {
    "plain": {},
    "residual": {"norm_before_residual": True, "qk_norm": True},
    "output": {"norm_output": True, "fc_norm": True},
    "joint": {"joint_norm": True, "reads_final": True},
    "narrow": {"hidden": 64, "own_embedding": True},
}


@pytest.fixture(params=LAYOUTS)
def head(request, backbone):
    """A head with random weights in bfloat16, of another shape than the backbone's blocks."""
    view = backbone()
    shape = {
        "hidden": view.hidden_size,
        "query_heads": 3,
        "kv_heads": 1,
        "head_dim": 64,
        "inner": 192,
        "activation": "silu",
    }
    rope = {"rope_type": "default", "rope_theta": 500.0}
    layout = EagleLayout(**(shape | {"rope": rope, "eps": 1e-5} | LAYOUTS[request.param]))
    torch.manual_seed(5)
    made = EagleHead(view, LAYERS, torch.arange(0, VOCAB, VOCAB // DRAFTED)[:DRAFTED], layout)
    for name, weight in made.named_parameters():
        scale = 3.0 if name.startswith("lm_head") else 1.0
        fresh = torch.randn_like(weight) * scale * weight.shape[-1] ** -0.5 if weight.ndim == 2 else None
        weight.data = 1 + 0.3 * torch.randn_like(weight) if fresh is None else fresh
    return made.to(torch.bfloat16).requires_grad_(False)


def states_of(head, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, head.state_size, generator=generator).to(torch.bfloat16) for _ in range(len(LAYERS) + 1)]


def assert_near(found, expected):
    assert (found - expected).float().norm() < 0.08 * expected.float().norm()


@pytest.mark.skipif(not has_native_code(), reason="no compiled code here")
def test_compiled_steps_are_pytorchs(head):
    compiled, plain = eagle_runner(head), EagleRunner(head)
    assert type(compiled) is NativeEagle
    with torch.inference_mode():
        for seed, rows in ((1, 70), (2, 1), (3, 4)):  # each behind what was read before
            tokens, states = ids_of(rows, seed, VOCAB).tolist(), states_of(head, rows, seed)
            both = [runner.read(tokens, states) for runner in (compiled, plain)]
            for ahead in range(1, 5):
                assert_near(*both)
                assert_near(compiled.logits[0], plain.lm_head(head.said(both[1]))[0])
                assert compiled.choose(both[0])[1] == pytest.approx(plain.choose(both[1])[1], abs=0.1)
                both = [runner.step(7 * ahead, both[1], ahead) for runner in (compiled, plain)]


def test_a_chain_on_a_gpu_is_pytorchs_steps(head, monkeypatch):
    """In double precision in the place of a card's kernels, over weights that NF4 holds as they are."""
    whole = "early_exit_cli.heads.eagle_runner.draft_linear"  # in int8 on a CPU, where this is about the chain
    monkeypatch.setattr(whole, lambda weights: functools.partial(F.linear, weight=torch.cat(weights)))
    hold_in_nf4(head)
    chained, single = CudaEagle(head, ReferenceKernels(), lambda step: step), EagleRunner(head)
    with torch.inference_mode():
        for seed, count in ((1, 5), (2, 40)):
            tokens, states = ids_of(count, seed, VOCAB).tolist(), states_of(head, count, seed)
            found, entropies = chained.chain(tokens, states, MOST_STEPS)
            assert len(found) == MOST_STEPS
            hidden = single.read(tokens, states)
            for ahead, token in enumerate(found):
                logits = single.lm_head(head.said(hidden))[0].float()
                column = (head.draft_vocab == token).nonzero().item()
                assert logits[column] > logits.max() - 0.2
                assert entropies[ahead] == pytest.approx(single.choose(hidden)[1], abs=0.05)
                hidden = single.step(token, hidden, ahead + 1)
