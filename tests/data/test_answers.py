"""Many answers together: each the library's own greedy answer to its prompt, whatever stands beside it."""

import pytest
import torch
from tiny_models import FAMILIES

from early_exit_cli.data.answers import answer_together
from early_exit_cli.runtime.fused_blocks import FusedBlocks


def prompts(count=9):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(250, (3 + 5 * index,), generator=generator).tolist() for index in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_what_generate_gives_alone(tiny_backbone, family, monkeypatch):
    backbone = tiny_backbone(family)
    ends = {7, 19, 44, 101, 180, 200, 222, 256}  # common enough to end some rows early, so that rows are dropped
    monkeypatch.setitem(vars(backbone), "eos_token_ids", frozenset(ends))
    ours = answer_together(FusedBlocks(backbone), prompts(), 24)
    assert len({len(answer) for answer in ours}) > 1
    for prompt, answer in zip(prompts(), ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=sorted(ends)
        )
        assert answer == theirs[0, len(prompt) :].tolist()


def test_sampling_is_repeatable_and_follows_the_distribution(tiny_backbone):
    backbone = tiny_backbone("llama")
    blocks = FusedBlocks(backbone)
    prompt = prompts()[2]
    draws = [answer_together(blocks, [prompt] * 500, 1, 0.7, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    with torch.inference_mode():
        p = (backbone.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    likely = int(p.argmax())
    share = sum(answer[0] == likely for draw in draws[1:] for answer in draw) / 1000
    assert abs(share - float(p[likely])) < 4 * float(p[likely] * (1 - p[likely]) / 1000) ** 0.5
