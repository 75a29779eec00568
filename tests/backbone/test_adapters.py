"""A model that somebody wrapped, hooked or changed gives the changed model's answer, or is refused: never the old one's."""

from unittest import mock

import pytest
import torch
from tiny_models import byte_tokenizer
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from early_exit_cli import EarlyExitModel
from early_exit_cli.backbone.load import adopt_backbone
from early_exit_cli.backbone.quantization import settings_for
from early_exit_cli.errors import BackboneError, ConfigError, UnsupportedBackboneError
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.select import make_blocks

PROMPT = torch.tensor([[72, 105, 9, 200, 17, 9, 200]])


class Wrapper(nn.Module):
    """Around a module: its output, changed."""

    def __init__(self, inner, change=lambda output: output):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **kwargs):
        return self.change(self.inner(*args, **kwargs))


class LowRank(Wrapper):
    """What an adapter is: a product of two small matrices beside a linear map of whatever kind."""

    def __init__(self, inner):
        super().__init__(inner)
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(inner.in_features, 2, generator=generator) / 4)
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, generator=generator) / 4)

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        added = (x.float() @ self.down) @ self.up.T
        return self.inner(x) + added.to(x.dtype)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def library_model(folder, quantization="none"):
    quantized = settings_for(quantization, torch.bfloat16)
    settings = {} if quantized is None else {"quantization_config": quantized, "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **settings)


def greedy(model):
    return model.generate(PROMPT, max_new_tokens=30, do_sample=False)[0].tolist()


def early(model, **settings):
    return EarlyExitModel.from_pretrained(None, model=model, tokenizer=byte_tokenizer(), drafter="lookup", **settings)


def answer(model):
    return model.generate(PROMPT, max_new_tokens=30, do_sample=False)[0].tolist()


def set_module(model, name, change):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, change(model.get_submodule(name)))


def halved(_module, _args, output):
    return tuple(part / 2 for part in output) if isinstance(output, tuple) else output / 2


def scaled(factor):
    return lambda model, name: model.get_submodule(name).register_forward_hook(lambda _m, _a, output: output * factor)


def reversed_output(model, name):
    model.get_submodule(name).register_forward_hook(lambda _module, _args, output: output.flip(-1))


def hooked_before(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: (args[0].flip(-1), *args[1:]))


def wrapped(model, name):
    set_module(model, name, lambda inner: Wrapper(inner, lambda output: output.flip(-1)))


def low_rank(model, name):
    set_module(model, name, LowRank)


def own_forward(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs).flip(-1)


def parametrized(model, name):
    parametrize.register_parametrization(model.get_submodule(name), "weight", Negated())


def another(model, name):
    set_module(model, name, lambda _: nn.ReLU())


def with_bias(model, name):
    def biased(head):
        new = nn.Linear(head.in_features, head.out_features)
        new.weight = head.weight
        new.bias.data = torch.linspace(-30, 30, head.out_features)
        return new

    set_module(model, name, biased)


BLOCK = "model.layers.2"
CHANGES = [
    (reversed_output, f"{BLOCK}.mlp"),
    (hooked_before, f"{BLOCK}.mlp.up_proj"),
    (wrapped, f"{BLOCK}.mlp"),
    (low_rank, f"{BLOCK}.self_attn.q_proj"),
    (own_forward, f"{BLOCK}.self_attn.v_proj"),
    (parametrized, f"{BLOCK}.mlp.down_proj"),
    (another, f"{BLOCK}.mlp.act_fn"),
    (reversed_output, "model.embed_tokens"),
    (parametrized, "model.embed_tokens"),
    (reversed_output, "model.norm"),
    (parametrized, "model.norm"),
    (reversed_output, "lm_head"),
    (low_rank, "lm_head"),
    (parametrized, "lm_head"),
]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_a_changed_model_gives_its_own_answer(tiny_folder, change, name):
    model = library_model(tiny_folder("llama"))
    before = greedy(model)
    change(model, name)
    expected = greedy(model)
    assert expected != before  # else this would show nothing
    found = early(model)
    assert type(found.engine.blocks) is HFBlocks
    assert answer(found) == expected


def test_a_bias_that_the_librarys_lm_head_has_not_is_added(tiny_folder):
    model = library_model(tiny_folder("llama"))
    before = greedy(model)
    with_bias(model, "lm_head")
    expected = greedy(model)
    assert expected != before
    assert answer(early(model)) == expected


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_families_of_the_librarys_runner_give_the_changed_answer_too(tiny_folder, family):
    model = library_model(tiny_folder(family))
    before = greedy(model)
    head = model.get_output_embeddings()
    model.set_output_embeddings(LowRank(head))
    expected = greedy(model)
    assert expected != before
    assert answer(early(model)) == expected


def test_a_whole_block_in_a_wrapper_is_run_as_one(tiny_folder):
    model = library_model(tiny_folder("llama"))
    model.model.layers[0] = Wrapper(model.model.layers[0])
    assert answer(early(model)) == greedy(library_model(tiny_folder("llama")))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (low_rank, f"{BLOCK}.self_attn.q_proj"),
        (hooked_before, f"{BLOCK}.mlp.up_proj"),
        (reversed_output, f"{BLOCK}.mlp"),
        (own_forward, f"{BLOCK}.self_attn.v_proj"),
        (reversed_output, "model.embed_tokens"),
        (reversed_output, "model.norm"),
        (low_rank, "lm_head"),
    ],
)
def test_in_nf4_the_changed_logits_are_read(tiny_folder, change, name):
    """The case that was answered with the base model's tokens: plain weights in 4 bit, something beside them."""
    model = library_model(tiny_folder("llama"), "4bit")
    with torch.no_grad():
        before = model(PROMPT).logits[0]
        change(model, name)
        expected = model(PROMPT).logits[0]
        blocks = make_blocks(adopt_backbone(model, byte_tokenizer()))
        assert type(blocks) is HFBlocks
        cache = blocks.new_cache(64)
        states = blocks.run(blocks.embed(PROMPT[0]), cache, 0, 0, blocks.num_blocks)
        found = blocks.logits(blocks.final_norm(states))
        choices = blocks.finish(states)[1]
    distance = (found - expected).norm() / expected.norm()
    assert distance < 0.05  # bfloat16 rounds
    assert (before - expected).norm() / expected.norm() > 4 * distance
    assert torch.equal(choices, found.argmax(-1))


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_code_that_reads_weights_refuses_a_changed_model_by_name(tiny_folder, quantization):
    model = library_model(tiny_folder("llama"), quantization)
    low_rank(model, f"{BLOCK}.self_attn.q_proj")
    backbone = adopt_backbone(model, byte_tokenizer())
    for runner in ("fused", "native"):
        with pytest.raises(UnsupportedBackboneError) as refused:
            make_blocks(backbone, runner)
        assert f"{BLOCK}.self_attn.q_proj is replaced by a LowRank" in str(refused.value)
        assert "merge_and_unload()" in str(refused.value)
    assert not backbone.last_block.weights  # from which an EAGLE head would start


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model, name: model.get_submodule(name).register_forward_hook(lambda *_: None), "model"),
        (lambda model, name: model.get_submodule(name).register_forward_pre_hook(lambda *_: None), ""),
        (lambda model, name: model.get_submodule(name).register_forward_hook(lambda *_: None), "model.layers"),
        (own_forward, ""),
    ],
)
def test_what_no_runner_calls_is_refused(tiny_folder, change, name):
    model = library_model(tiny_folder("llama"))
    change(model, name)
    with pytest.raises(UnsupportedBackboneError) as refused:
        early(model)
    assert f"{name or 'the model'} has a forward" in refused.value.message
    assert "which no runner here calls" in refused.value.message
    assert "merge_and_unload()" in str(refused.value.hint)


def test_positions_that_are_read_as_weights_are_refused_when_hooked(tiny_folder):
    model = library_model(tiny_folder("gpt2"))
    scaled(2.0)(model, "transformer.wpe")
    with pytest.raises(UnsupportedBackboneError, match=r"transformer\.wpe has a forward hook, which no runner"):
        early(model)


@pytest.mark.parametrize("name", ["lm_head", "model.norm", "model.embed_tokens"])
def test_what_has_no_weight_any_more_is_refused_by_name(tiny_folder, name):
    model = library_model(tiny_folder("llama"))
    wrapped(model, name)
    with pytest.raises(UnsupportedBackboneError, match=f"{name} is replaced by a Wrapper"):
        early(model)


def test_a_method_that_somebody_patched_into_the_librarys_class_is_seen(tiny_folder, monkeypatch):
    model = library_model(tiny_folder("llama"))
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x).flip(-1))
    expected = greedy(model)
    found = early(model)
    assert type(found.engine.blocks) is HFBlocks
    assert answer(found) == expected


def test_a_hook_on_all_modules_is_seen(tiny_folder):
    model = library_model(tiny_folder("llama"))
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedBackboneError, match="as all modules do"):
            early(model)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        lambda model: model(PROMPT, output_hidden_states=True),  # which leaves hooks of the library
        lambda model: setattr(model, "forward", torch.compile(model.forward)),  # never called here
        lambda model: model.model.layers[0].register_forward_hook(lambda *_: None).remove(),
    ],
)
def test_what_changes_nothing_keeps_the_fast_path(tiny_folder, change):
    model = library_model(tiny_folder("llama"))
    expected = greedy(model)
    change(model)
    found = early(model)
    assert type(found.engine.blocks) is FusedBlocks
    assert found.engine.backbone.changes == {}
    assert answer(found) == expected


def test_a_change_after_the_first_answer_is_refused_and_taken_off_is_none(tiny_folder):
    model = library_model(tiny_folder("llama"))
    found = early(model)
    first = answer(found)
    hook = model.model.layers[3].register_forward_hook(halved)
    with pytest.raises(ConfigError, match=r"model\.layers\.3 has a forward hook only since") as refused:
        answer(found)
    assert "merge_and_unload()" in str(refused.value.hint)
    hook.remove()
    assert answer(found) == first


def test_measurements_of_a_changed_model_are_its_own(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    for times in range(2):
        model = library_model(tiny_folder("gpt2"))
        if times:
            reversed_output(model, "transformer.h.1.mlp")
        early(model)
    assert len(list((tmp_path / "widths").iterdir())) == 2


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head"], ["embed_tokens", "up_proj"]])
def test_a_lora_of_peft_gives_the_adapted_answer(tiny_folder, quantization, targets):
    peft = pytest.importorskip("peft")
    model = library_model(tiny_folder("llama"), quantization)
    with torch.no_grad():
        before = model(PROMPT).logits[0]
        torch.manual_seed(5)
        lora = peft.LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, lora).get_base_model().eval()
        expected = model(PROMPT).logits[0]
    found = early(model)
    assert type(found.engine.blocks) is HFBlocks
    if quantization == "none":
        assert answer(found) == greedy(model)
    with torch.no_grad():
        blocks = found.engine.blocks
        states = blocks.run(blocks.embed(PROMPT[0]), blocks.new_cache(64), 0, 0, blocks.num_blocks)
        logits = blocks.logits(blocks.final_norm(states))
    distance = (logits - expected).norm() / expected.norm()
    assert distance < (1e-4 if quantization == "none" else 0.05)
    assert (before - expected).norm() / expected.norm() > 4 * distance


def by_transformers(model, lora):
    with mock.patch("transformers.integrations.peft.check_peft_version"):  # it asks for a release to come
        model.add_adapter(lora)


def by_peft(model, lora):
    pytest.importorskip("peft").inject_adapter_in_model(lora, model)


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("add", [by_transformers, by_peft])
def test_an_adapter_in_the_librarys_own_model_gives_the_adapted_answer(tiny_folder, add, quantization):
    peft = pytest.importorskip("peft")
    model = library_model(tiny_folder("llama"), quantization)
    lora = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.no_grad():
        before = model(PROMPT).logits[0]
        torch.manual_seed(5)
        add(model, lora)
        expected = model.eval()(PROMPT).logits[0]
    found = early(model)
    for weights in (expected, before):  # which is the base's own once the adapter is switched off
        with torch.no_grad():
            blocks = found.engine.blocks
            states = blocks.run(blocks.embed(PROMPT[0]), blocks.new_cache(64), 0, 0, blocks.num_blocks)
            logits = blocks.logits(blocks.final_norm(states))
        distance = (logits - weights).norm() / weights.norm()
        assert distance < (1e-4 if quantization == "none" else 0.05)
        assert (before - expected).norm() / expected.norm() > 4 * distance
        if quantization == "none":
            assert answer(found) == greedy(model)
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.enable_adapters(False)


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("add", [by_transformers, by_peft])
def test_an_adapter_that_is_added_later_is_refused(tiny_folder, add, quantization):
    peft = pytest.importorskip("peft")
    model = library_model(tiny_folder("llama"), quantization)
    found = early(model)
    answer(found)
    add(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    with pytest.raises(ConfigError, match=r"mlp\.up_proj is replaced by a") as refused:
        answer(found)
    assert "merge_and_unload()" in str(refused.value.hint)


def test_a_model_of_peft_itself_is_refused(tiny_folder):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(library_model(tiny_folder("llama"), "4bit"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(BackboneError, match=r"PeftModel.* is not a causal language model") as refused:
        early(model)
    assert "merge_and_unload()" in str(refused.value.hint)


def test_modules_that_peft_saves_whole_are_run_as_its_wrapper_does(tiny_folder):
    peft = pytest.importorskip("peft")
    model = library_model(tiny_folder("llama"))
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora).get_base_model().eval()
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.neg_()
    assert answer(early(model)) == greedy(model)
    merged = library_model(tiny_folder("llama"))
    whole = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert type(early(whole.merge_and_unload()).engine.blocks) is FusedBlocks
