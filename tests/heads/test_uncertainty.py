import math

import pytest
import torch

from early_exit_cli.errors import ConfigError
from early_exit_cli.heads.uncertainty import NEVER, Thresholds, entropy, may_exit, uncertainty


def test_entropy_is_in_nats_and_float32():
    uniform = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert entropy(uniform).dtype == torch.float32
    assert torch.allclose(entropy(uniform), torch.full((2,), math.log(8)))


def test_entropy_equals_the_distributions_own():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.allclose(entropy(logits), torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)


def test_a_certain_head_has_no_entropy():
    logits = torch.full((1, 10), -1e4)
    logits[0, 3] = 1e4
    assert float(entropy(logits)) == 0.0


def test_confidence_is_minus_the_highest_probability_in_float32():
    logits = torch.tensor([[1.0, 2.0, 0.5]]).log().to(torch.bfloat16)
    assert uncertainty(logits, "confidence").dtype == torch.float32
    assert float(uncertainty(logits, "confidence")) == pytest.approx(-2 / 3.5, abs=2e-3)
    assert float(uncertainty(torch.zeros(1, 8), "confidence")) == pytest.approx(-1 / 8)
    assert torch.equal(uncertainty(logits, "entropy"), entropy(logits))


def test_exit_needs_an_entropy_strictly_below_the_threshold():
    assert may_exit(0.5, 0.6)
    assert not may_exit(0.5, 0.5)
    assert not may_exit(0.0, NEVER)
    assert not may_exit(float("nan"), 10.0)


def test_thresholds_are_looked_up_by_rounded_level():
    thresholds = Thresholds({"0.80": [1.0, 2.0]})
    assert thresholds.at(0.8) == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"0\.85 was not calibrated; calibrated: 0\.80"):
        thresholds.at(0.85)
