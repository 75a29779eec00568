import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_training import make_trainer, trainer

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import HeadsConfig, TrainingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.errors import BundleError, CheckpointError, DataError
from early_exit_cli.hidden_states.states import States, count_tokens, log_normalizer
from early_exit_cli.training.checkpoints import MARKER, complete_checkpoints
from early_exit_cli.training.distillation import Teacher, distillation_loss, draft_vocabulary, teach


@pytest.mark.parametrize("kind", ["adapter", "attention", "linear"])
def test_training_goes_on_from_earlier_heads_of_the_same_kind_and_place(tmp_path, tiny_backbone, kind):
    backbone = tiny_backbone("llama")
    heads = HeadsConfig(kind=kind, head_layer_indices=[1, 4], rank=32, draft_vocab=64)
    config = TrainingConfig(output_dir=tmp_path / "first", max_steps=12, batch_size=2, lr=3e-3)
    first = make_trainer(backbone, heads, config).run()
    config = config.model_copy(update={"output_dir": tmp_path / "second"})
    again = heads.model_copy(update={"start_from": tmp_path / "first"})
    assert make_trainer(backbone, again, config).evaluate() == first.last_agreement
    for other, said in (
        ({"head_layer_indices": [1, 3]}, r"it has heads after \[2, 5\] blocks, and these read after \[2, 4\]"),
        ({"rank": 16} if kind != "linear" else {"kind": "adapter"}, rf"has {kind} heads of rank"),
    ):
        with pytest.raises(BundleError, match=said):
            make_trainer(backbone, again.model_copy(update=other), config)


@pytest.mark.parametrize("variation", [0.0, 0.7, 1.0])
def test_the_loss_is_kl_and_total_variation_and_so_is_its_gradient(monkeypatch, variation):
    monkeypatch.setattr("early_exit_cli.training.distillation.ROWS_AT_ONCE", 4)  # of six: the last ones are fewer
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator).requires_grad_()
    p = torch.randn(6, 10, generator=generator).softmax(-1)
    mass = torch.rand(6, generator=generator)
    teacher = Teacher(p, mass, torch.xlogy(p, p).sum(-1), torch.arange(6))
    loss = distillation_loss(logits, teacher, variation)
    q = logits.softmax(-1)
    divergence = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    distance = (q - p).abs().sum(-1) / 2
    expected = (((1 - variation) * divergence + variation * distance) * mass).mean()
    assert torch.allclose(loss, expected, atol=1e-6)
    (ours,) = torch.autograd.grad(3 * loss, logits)
    (theirs,) = torch.autograd.grad(3 * expected, logits)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert abs(float(distillation_loss(p.log(), teacher, variation))) < 1e-6


@pytest.mark.parametrize("is_known", [False, True])
def test_the_teacher_over_a_draft_vocabulary_is_the_renormalised_backbone(tiny_backbone, is_known):
    backbone = tiny_backbone("llama")
    final = torch.randn(7, 64)
    vocab = torch.tensor([1, 5, 9, 200])
    logits = backbone.lm_head(final)
    whole = torch.softmax(logits, -1)
    normalizer = log_normalizer(logits) if is_known else None
    text = pack([Document(list(range(7)), "s")], 7, 0)[0]
    teacher = teach(backbone, States([], final, torch.ones(7, dtype=torch.bool), text, normalizer), vocab)
    assert torch.allclose(log_normalizer(logits), logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(teacher.mass, whole[:, vocab].sum(-1), atol=1e-5)
    assert torch.allclose(teacher.probabilities, whole[:, vocab] / whole[:, vocab].sum(-1, keepdim=True), atol=1e-5)


def test_the_draft_vocabulary_is_the_most_frequent_tokens_and_the_end():
    counts = count_tokens(pack([Document([5, 5, 5, 9, 9, 2], "s")], 4, 0), 100)
    assert int(counts.sum()) == 6
    assert draft_vocabulary(counts, 3, [77]).tolist() == [5, 9, 77]
    assert draft_vocabulary(counts, 0, []) is None
    assert draft_vocabulary(counts, 100, []) is None


def test_training_raises_agreement_and_leaves_a_bundle(tmp_path, tiny_backbone, tiny_folder):
    from early_exit_cli.config import BackboneConfig, BundleConfig

    backbone = tiny_backbone("llama")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    training = trainer(backbone, tmp_path / "run", draft_vocab=0, held_out=40, lr=1e-2, max_steps=200, eval_every=100)
    start = training.evaluate()
    reports = []
    result = training.run(reports.append)
    assert sum(result.best_agreement) > sum(start) + 0.15
    assert sum(reports[-1].losses) < sum(reports[0].losses)
    assert [report.step for report in reports if report.agreement] == [100, 200]
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    assert not (tmp_path / "run" / "aux_heads.pt").exists()
    model = load_engine(
        BackboneConfig(model_name=str(tiny_folder("llama")), quantization="none", device="cpu"),
        BundleConfig(bundle=str(tmp_path / "run" / "config.json")),
    )
    assert model.heads.exit_layers == [2, 5]
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    marker = json.loads((complete_checkpoints(tmp_path / "run")[-1] / MARKER).read_text())
    assert written["head_layer_indices"] == marker["identity"]["head_layer_indices"] == [1, 4]
    assert model.heads.draft_vocab is None
    assert (tmp_path / "run" / "last" / "heads.safetensors").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, tiny_backbone, accumulation):
    backbone = tiny_backbone("llama")
    trainer(backbone, tmp_path / "whole", gradient_accumulation_steps=accumulation).run()
    stopped = trainer(backbone, tmp_path / "parts", gradient_accumulation_steps=accumulation)

    def stop(report):
        if report.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    newest = complete_checkpoints(tmp_path / "parts")[-1]
    assert newest.name == "step-0000007"
    shutil.rmtree(newest)  # as if killed instead: go on from step 6
    (tmp_path / "parts" / "checkpoints" / "step-0000009").mkdir()  # half-written, no marker
    resumed = trainer(backbone, tmp_path / "parts", gradient_accumulation_steps=accumulation, resume=True)
    assert resumed.step == 6
    resumed.run()
    whole, parts = (load_file(tmp_path / name / "last" / "heads.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    trainer(backbone, tmp_path).run()
    with pytest.raises(CheckpointError, match=r"lr: 0\.003 then, 0\.1 now"):
        trainer(backbone, tmp_path, lr=0.1, resume=True)


def test_only_the_newest_checkpoints_are_kept(tmp_path, tiny_backbone):
    trainer(tiny_backbone("llama"), tmp_path, save_every=2).run()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-0000010", "step-0000012"]
    assert json.loads((tmp_path / "checkpoints" / "step-0000012" / MARKER).read_text())["step"] == 12


def test_a_run_that_begins_anew_leaves_no_checkpoint_of_the_one_before(tmp_path, tiny_backbone):
    trainer(tiny_backbone("llama"), tmp_path, save_every=2).run()
    trainer(tiny_backbone("llama"), tmp_path, max_steps=4, save_every=2).run()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-0000002", "step-0000004"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-0000002", "step-0000004"]


def test_linear_heads_leave_the_file_that_dssd_loads(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    config = TrainingConfig(output_dir=tmp_path, max_steps=0)
    heads = HeadsConfig(head_layer_indices=[1, 4], kind="linear")
    make_trainer(backbone, heads, config).run()

    class DssdHead(torch.nn.Module):  # by the rules of DSSD's loader: a norm with a weight, an untied map
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.Module()
            self.norm.weight = torch.nn.Parameter(torch.ones(64))
            self.linear = torch.nn.Linear(64, 320, bias=False)

    state = torch.load(tmp_path / "aux_heads.pt", weights_only=True)
    torch.nn.ModuleList([DssdHead(), DssdHead()]).load_state_dict(state, strict=True)


def test_too_little_text_is_said_so(tmp_path, tiny_backbone):
    with pytest.raises(DataError, match="too little"):
        make_trainer(tiny_backbone("llama"), HeadsConfig(num_heads=1), TrainingConfig(output_dir=tmp_path), train=[])
