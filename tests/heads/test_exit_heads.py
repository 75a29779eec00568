import pytest
import torch
from safetensors.torch import load_file, save_file

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.config import HeadsConfig
from early_exit_cli.errors import BundleError, ConfigError
from early_exit_cli.heads.exit_heads import ExitHeads, default_placement, exit_layers_of, load_heads


def test_default_placement_is_the_seeds():
    assert default_placement(3, 32) == [8, 16, 24]
    assert default_placement(3, 30) == [7, 15, 22]
    assert default_placement(1, 12) == [6]


def test_placement_beyond_the_depth_is_refused_with_the_range():
    with pytest.raises(ConfigError, match=r"block 29 is out of range.* 0 to 28"):
        exit_layers_of(HeadsConfig(head_layer_indices=[3, 29]), 30)
    with pytest.raises(ConfigError, match="no place"):
        exit_layers_of(HeadsConfig(num_heads=9), 6)


def make(backbone: Backbone, kind: str, vocab=None) -> ExitHeads:
    torch.manual_seed(0)
    heads = ExitHeads(backbone, kind, [2, 4], 8, vocab)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def test_an_untrained_adapter_is_the_logit_lens(tiny_backbone):
    backbone = tiny_backbone("llama")
    heads = ExitHeads(backbone, "adapter", [2, 4], 8, None)
    hidden = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.allclose(heads.logits(0, hidden), backbone.lm_head(backbone.norm(hidden)), atol=1e-5)


def test_untrained_linear_heads_start_as_the_backbones_lm_head(tiny_backbone):
    backbone = tiny_backbone("llama")
    heads = ExitHeads(backbone, "linear", [2, 4], 8, None)
    heads.start_from(backbone)
    hidden = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.allclose(heads.logits(1, hidden), backbone.lm_head(backbone.norm(hidden)), atol=1e-5)


def test_a_draft_vocabulary_selects_rows_of_the_lm_head(tiny_backbone):
    backbone = tiny_backbone("llama")
    vocab = torch.tensor([3, 50, 200])
    heads = make(backbone, "adapter", vocab)
    whole = make(backbone, "adapter")
    hidden = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.allclose(heads.logits(0, hidden), whole.logits(0, hidden)[:, vocab], atol=1e-5)
    assert heads.token_ids(torch.tensor([2, 0])).tolist() == [200, 3]


@pytest.mark.parametrize(
    ("kind", "vocab"), [("adapter", torch.tensor([3, 50, 200])), ("adapter", None), ("linear", None)]
)
def test_saved_heads_load_as_they_were(tmp_path, tiny_backbone, kind, vocab):
    backbone = tiny_backbone("llama")
    heads = make(backbone, kind, vocab)
    heads.save(tmp_path / "heads.safetensors", torch.float32)
    loaded = load_heads(tmp_path / "heads.safetensors", backbone, kind, [2, 4], 8)
    for name, value in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_linear_heads_have_exactly_the_keys_of_dssds_file(tiny_backbone):
    backbone = tiny_backbone("llama")
    state = make(backbone, "linear").dssd_state_dict(torch.bfloat16)
    assert {name: list(value.shape) for name, value in state.items()} == {
        "0.norm.weight": [64],
        "0.linear.weight": [320, 64],
        "1.norm.weight": [64],
        "1.linear.weight": [320, 64],
    }
    assert all(value.dtype == torch.bfloat16 for value in state.values())


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_garbage(path):
    path.write_bytes(b"\xff" * 100)


def damage_nan(path):
    tensors = load_file(path)
    tensors["1.up.weight"][0, 0] = float("nan")
    save_file(tensors, path)


def damage_shape(path):
    tensors = load_file(path)
    tensors["0.down.weight"] = tensors["0.down.weight"][:, :-1].contiguous()
    save_file(tensors, path)


def damage_missing(path):
    tensors = load_file(path)
    del tensors["0.down.weight"]
    save_file(tensors, path)


def damage_extra(path):
    save_file(load_file(path) | {"2.down.weight": torch.ones(2)}, path)


def damage_vocab(path):
    save_file(load_file(path) | {"draft_vocab": torch.tensor([1, 5000], dtype=torch.int32)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "damaged"),
        (damage_garbage, "damaged"),
        (damage_nan, "1.up.weight holds NaN"),
        (damage_shape, "0.down.weight should be"),
        (damage_missing, "0.down.weight should be"),
        (damage_extra, "tensors where"),
        (damage_vocab, "outside the backbone's 320"),
        (lambda path: path.unlink(), "no file"),
    ],
)
def test_damaged_files_are_named(tmp_path, tiny_backbone, damage, words):
    backbone = tiny_backbone("llama")
    path = tmp_path / "heads.safetensors"
    make(backbone, "adapter").save(path, torch.float32)
    damage(path)
    with pytest.raises(BundleError, match=words):
        load_heads(path, backbone, "adapter", [2, 4], 8)
