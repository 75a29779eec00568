"""The EAGLE head: training and drafting read the same thing, and its drafts never change a token."""

import pytest
import torch
from drafters import some_head
from small_training import trainer as exit_trainer
from tiny_models import FAMILIES

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.calibration.draft_chances import fit_eagle, fit_lookup, fit_survival
from early_exit_cli.calibration.held_out import STEPS, read_held_out
from early_exit_cli.config import BackboneConfig, BundleConfig, DataConfig, HeadsConfig, TrainingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import apart, pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting import choose
from early_exit_cli.drafting.chances import DraftChances, Survival, draft_chances_of
from early_exit_cli.drafting.choose import auto_drafter, eagle_drafter
from early_exit_cli.drafting.costs import Costs
from early_exit_cli.drafting.drafter import Draft, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.reasons import Step
from early_exit_cli.engine import Engine
from early_exit_cli.errors import BundleError
from early_exit_cli.files.schemas import RecordForm
from early_exit_cli.heads.eagle_runner import EagleRunner, draft_linear
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.hidden_states.live import BackboneStates, run_states
from early_exit_cli.sampling import GREEDY
from early_exit_cli.training.trainer import Lessons, Trainer

PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
CERTAIN = [Survival(intercept=30.0, slope=0.0, mean=1.0)]  # whatever the entropy: every draft is worth its time


def drafter(head, survival=CERTAIN):
    return EagleDrafter(head, survival, lambda rows: 10.0, 0.1, 0.1)


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(0)
    return [Document(torch.randint(256, (size,), generator=generator).tolist(), "s") for size in (7, 30, 12)]


def test_drafting_reads_what_training_read(tiny_backbone, text):
    """Rolled out from any position, token by token, the drafter's logits are those of the training pass."""
    backbone = tiny_backbone("llama")
    head = some_head(backbone)
    batch = pack(text, 64, 0)[0]
    states = run_states(backbone, batch, head.exit_layers)
    ids, begin = text[1].ids, 7
    with torch.inference_mode():
        trained = head(states, 3)
        runner = EagleRunner(head)
        for position in (0, 10, 20):
            runner.rewind()
            part = slice(begin, begin + position + 1)
            hidden = runner.read(ids[1 : position + 2], [state[part] for state in (*states.exits, states.final)])
            for step in range(3):
                place = (trained[step].positions == begin + position + 1 + step).nonzero()[0, 0]
                assert torch.allclose(runner.lm_head(hidden)[0], trained[step].logits[place], atol=1e-4)
                hidden = runner.step(ids[position + 2 + step], hidden, step + 1)


def test_predictions_stay_within_their_document(tiny_backbone, text):
    backbone = tiny_backbone("llama")
    head = some_head(backbone)
    batch = pack(text, 64, 0)[0]
    states = run_states(backbone, batch, head.exit_layers)
    for step, said in enumerate(head(states, 3)):
        starts = (0, 7, 37)
        expected = [
            start + place
            for start, document in zip(starts, text, strict=True)
            for place in range(1 + step, len(document.ids))
        ]
        assert said.positions.tolist() == expected
    measured = head(states, 2, only_measured=True)[1].positions
    assert states.measured[measured].all()
    assert set(measured.tolist()) < set(expected) | set(range(49))


def test_texts_apart_are_rolled_out_as_packed_ones_are(tiny_model):
    """Calibration reads texts of like length together and rolls out where answers are; the long way is every position of
    packed rows, a text that is cut among them. The chances are the same."""
    model = tiny_model("llama")
    model.eagle = head = some_head(model.backbone)
    generator = torch.Generator().manual_seed(3)
    sizes = ((90, 40), (30, 12), (25, 3), (9, 8), (50, 30), (14, 0))
    texts = [Document(torch.randint(256, (size,), generator=generator).tolist(), "s", start) for size, start in sizes]
    rows = pack(texts, 64, 0)
    expected = [[] for _ in range(STEPS)]
    for row in rows:
        states = run_states(model.backbone, row, head.exit_layers)
        choices = model.backbone.lm_head(states.final).argmax(-1)
        for said, found in zip(head(states, STEPS), expected, strict=True):
            counts = states.measured[said.positions]
            agreed = head.token_ids(said.logits.argmax(-1)) == choices[said.positions]
            found.append((entropy(said.logits)[counts], agreed[counts]))
    expected = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in expected]
    found = read_held_out(model, apart(rows, 120)).rolled
    for (entropies, agreed), (others, agreements) in zip(found, expected, strict=True):
        assert torch.allclose(
            entropies.sort().values, others.sort().values, atol=1e-2
        )  # random weights amplify rounding
        assert agreed.sum() == agreements.sum()
    assert sum(agreed.sum() for _, agreed in found) > 0
    (chances, checked), (others, known) = fit_eagle(found, found), fit_eagle(expected, expected)
    for one, other in zip(chances, others, strict=True):
        assert [one.mean, one.at(2.5), one.at(3.5)] == pytest.approx(
            [other.mean, other.at(2.5), other.at(3.5)], abs=1e-3
        )
        assert one.entropies == pytest.approx(other.entropies, abs=1e-2)
    assert torch.allclose(torch.tensor(checked), torch.tensor(known), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runner", ["fused", "hf"])
def test_its_drafts_never_change_a_token_or_a_bit(tiny_model, family, runner):
    model = tiny_model(family, runner)
    head = some_head(model.backbone)
    plain = generate(model, Request(PROMPT, 40), NoDrafter(), mode="full", keep_states=True)
    run = generate(model, Request(PROMPT, 40), drafter(head), mode="eagle", width=5, keep_states=True)
    assert run.token_ids == plain.token_ids
    assert torch.equal(run.states, plain.states)
    assert run.stats.tokens_drafted >= 3 * (len(plain.token_ids) - 2)


class Oracle(EagleDrafter):
    """Says the truth but for every fifth position, whatever the head says; reads and rolls like any other."""

    def begin(self, prompt_ids, chooser=GREEDY):
        super().begin(prompt_ids)
        self.runner.choose = self.say

    def draft(self, model, cache, pending, limit, stop_ids):
        self.place = cache.length + 1
        return super().draft(model, cache, pending, limit, stop_ids)

    def say(self, hidden, *_):
        self.place += 1
        right = self.truth[self.place - 1]
        return (right + 1 if self.place % 5 == 0 else right), 0.1


def test_accepted_and_partly_rejected_drafts_leave_only_verified_states_behind(tiny_model):
    model = tiny_model("llama")
    plain = [token for step in decode(model, Request(PROMPT, 60, stop_ids=()), NoDrafter()) for token in step.tokens]
    oracle = Oracle(some_head(model.backbone), CERTAIN, lambda rows: 10.0, 0.1, 0.1)
    oracle.truth = [*PROMPT, *plain]
    done, partly = len(PROMPT), 0
    for step in decode(model, Request(PROMPT, 40, stop_ids=()), oracle, width=8):
        assert step.tokens == oracle.truth[done : done + len(step.tokens)]
        done += len(step.tokens)
        partly += 0 < step.accepted < step.drafted
        assert oracle.runner.cache.length + sum(len(tokens) for tokens, _ in oracle.waiting) == done - 1
    assert done == len(PROMPT) + 40
    assert partly >= 6


def test_it_borrows_from_the_backbone_and_never_trains_it(tiny_backbone):
    backbone = tiny_backbone("llama")
    ours = {parameter.data_ptr() for parameter in some_head(backbone).parameters()}
    assert not ours & {parameter.data_ptr() for parameter in backbone.model.parameters()}
    assert len(ours) == 14  # fc_norm 2, fc, norms of the block 3, attention 4, MLP 3, norm


def test_a_draft_ends_where_it_stops_paying(tiny_model):
    model = tiny_model("llama")
    head = some_head(model.backbone)
    hopeless = drafter(head, [Survival(intercept=-30.0, slope=0.0, mean=0.0)])
    rounds = list(decode(model, Request(PROMPT, 12, stop_ids=()), hopeless, width=8))
    assert all(step.drafted == 0 for step in rounds)
    dear = EagleDrafter(head, CERTAIN, lambda rows: 10.0 * rows, 0.1, 0.1)  # a pass costs what its rows cost
    assert all(step.drafted == 0 for step in decode(model, Request(PROMPT, 12, stop_ids=()), dear, width=8))
    certain = list(decode(model, Request(PROMPT, 12, stop_ids=()), drafter(head), width=8))
    assert max(step.drafted for step in certain) == 7


def test_what_a_text_shows_moves_the_chances(tiny_model):
    model = tiny_model("llama")
    good = drafter(some_head(model.backbone), [Survival(intercept=0.0, slope=0.0, mean=0.5)])
    good.begin(PROMPT)
    assert good._chance(0) == pytest.approx(0.5)
    draft = Draft([1, 2, 3, 4], [Step(n, 1.0, 0.5) for n in (1, 2, 3, 4)])
    for _ in range(20):
        good.accept(draft, [1, 2, 3, 4, 5], 4)
    assert good._chance(0) > 0.8
    for _ in range(400):
        good.accept(draft, [9], 0)
    assert good._chance(0) < 0.4


def test_reading_is_worth_it_where_some_tokens_are_sure(tiny_model):
    """A mean chance that would not pay for a draft hides tokens that do: the promise looks at the entropies to be met."""
    head = some_head(tiny_model("llama").backbone)
    blind = Survival(intercept=4.0, slope=-2.0, mean=0.3)
    knowing = blind.model_copy(update={"entropies": (0.1, *[6.0] * 4)})  # one in five tokens is right 98 times in 100
    rates = []
    for survival in (blind, knowing):
        made = EagleDrafter(head, [survival], lambda rows: 2.0 + rows, 0.1, 0.05)
        made.begin(PROMPT)
        made.process([1], [])
        rates.append(made.expected_rate(7))
    plain = 1 / 3.0
    assert rates[0] < 1.03 * plain < rates[1]


def test_a_promise_counts_the_entropies_that_the_text_has_shown(tiny_model):
    """Where the head turns out to know nothing, it is not read any more, and tried again later; another text begins anew."""
    survival = Survival(intercept=4.0, slope=-2.0, mean=0.5, entropies=(0.1, 6.0))
    made = EagleDrafter(some_head(tiny_model("llama").backbone), [survival], lambda rows: 2.0 + 0.3 * rows, 0.2, 0.1)
    promised, reads = [], []
    for uncertainty in (0.1, 6.0):
        made.begin(PROMPT)
        promised.append(made.expected_rate(1))
        made.runner.read = lambda *_, reads=reads: reads.append(len(promised))
        made.runner.step = lambda *_: None
        made.runner.choose = lambda *_, found=uncertainty: (5, found)
        for _ in range(60):
            made.process([1], [])
            draft = made.draft(None, None, 0, 1, ())
            made.accept(draft, [*draft.tokens, 9], len(draft.tokens))
        made.process([1], [])
        promised.append(made.expected_rate(1))
    assert promised[1] > 1.3 * promised[3]
    assert reads.count(1) == 60
    assert 10 < reads.count(3) < 50
    made.begin(PROMPT)
    made.process([1], [])
    assert promised[3] < made.expected_rate(1) < promised[1]


def test_a_first_token_that_was_not_drafted_still_teaches(tiny_model):
    model = tiny_model("llama")
    even = Survival(intercept=0.0, slope=0.0, mean=0.5)
    unsure = EagleDrafter(some_head(model.backbone), [even], lambda rows: 10.0, 0.1, 0.1)
    for right, wanted in ((True, 1.0), (False, 0.0)):
        unsure.begin(PROMPT)
        unsure.guess = (7, 0.4)
        unsure.accept(Draft(), [7 if right else 8], 0)
        assert (unsure.hits, unsure.expected) == (wanted, 0.4)


def test_int8_products_are_close_to_the_weights():
    torch.manual_seed(0)
    weights = [torch.randn(64, 128).bfloat16(), torch.randn(32, 128).bfloat16()]
    x = torch.randn(5, 128).bfloat16()
    exact = x.float() @ torch.cat(weights).float().T
    error = (draft_linear(weights)(x).float() - exact).norm() / exact.norm()
    assert 0 < error < 0.02


def test_survival_is_the_logistic_that_made_the_sample():
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(40_000, generator=generator) * 5
    agreed = torch.rand(40_000, generator=generator) < torch.sigmoid(2.0 - 1.5 * entropies)
    fitted = fit_survival(entropies, agreed)
    assert fitted.intercept == pytest.approx(2.0, abs=0.1)
    assert fitted.slope == pytest.approx(-1.5, abs=0.06)
    assert fitted.mean == pytest.approx(float(agreed.double().mean()))
    assert fitted.at(0.0) == pytest.approx(1 / (1 + 2.718281828**-fitted.intercept))
    assert len(fitted.entropies) == 16
    assert list(fitted.entropies) == sorted(fitted.entropies)
    assert sum(map(fitted.at, fitted.entropies)) / 16 == pytest.approx(fitted.mean, abs=0.01)


def test_lookup_chances_count_answers_only():
    repeated = Document([1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 3], "s", answer_start=4)
    chances = fit_lookup([repeated] * 50)
    assert chances[0] > 0.9  # after the first token of a repeat, the next is right
    never = Document([1, 2, 3, 1, 4, 1, 5, 1, 6, 1, 7], "s", answer_start=3)
    assert fit_lookup([never] * 50)[0] < 0.05


def train(backbone, folder, steps=200, start_from=None, **changes):
    generator = torch.Generator().manual_seed(1)
    texts = [Document((torch.randint(8, (30,), generator=generator) * 30).tolist(), "s") for _ in range(16)]
    heads = HeadsConfig(kind="eagle", head_layer_indices=[1, 3], draft_vocab=0, roll_out=2, start_from=start_from)
    config = TrainingConfig(output_dir=folder, max_steps=steps, batch_size=4, lr=3e-3, eval_every=steps, **changes)
    data = DataConfig(dataset_name="x", max_length=32)
    source = BackboneStates(backbone, [2, 4], texts, texts[:4], data, config)
    return Trainer(Lessons(source), heads, config, data, {}), texts


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_training_learns_and_leaves_a_head_that_drafts(tmp_path, tiny_backbone, tiny_folder, family):
    """From the last block, and from chance where its blocks are not Llama's."""
    backbone = tiny_backbone(family)
    trainer, texts = train(backbone, tmp_path, steps=120)
    start = trainer.evaluate()
    result = trainer.run()
    assert result.parts == ["draft position 1", "draft position 2"]
    assert result.last_agreement[0] > start[0] + 0.2
    assert result.last_agreement[1] > start[1] + 0.1
    settings = BackboneConfig(model_name=str(tiny_folder(family)), quantization="none", device="cpu")
    model = load_engine(settings, BundleConfig(bundle=str(tmp_path)))
    assert model.heads is None
    with pytest.raises(BundleError, match="not calibrated"):
        eagle_drafter(model)
    batches = pack(texts, 32, 0)
    rolled = read_held_out(model, apart(batches, 128)).rolled
    survival, checked = fit_eagle(rolled, rolled)
    assert checked[0] == pytest.approx((survival[0].mean, survival[0].mean), abs=1e-3)
    assert survival[0].mean == pytest.approx(result.last_agreement[0], abs=0.2)
    assert survival[0].slope < 0
    chances = DraftChances(lookup=[0.5] * 6, eagle=survival, checked=checked)
    model.record = model.record.model_copy(update={"drafting": chances.model_dump()})
    prompt = texts[0].ids[:12]
    plain = generate(model, Request(prompt, 20), NoDrafter(), mode="full").token_ids
    for made in (eagle_drafter(model), auto_drafter(model, 0.9, 8, "auto")):
        assert generate(model, Request(prompt, 20), made, mode="x", width=8).token_ids == plain


def test_training_goes_on_from_an_earlier_head(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    first = train(backbone, tmp_path / "first", steps=10)[0].run()
    assert train(backbone, tmp_path / "second", start_from=tmp_path / "first")[0].evaluate() == first.last_agreement


def test_it_joins_a_bundle_of_the_same_backbone_only(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    exit_trainer(backbone, tmp_path, max_steps=1).run()
    train(backbone, tmp_path, steps=1)[0].run()
    exit_trainer(backbone, tmp_path, max_steps=1).run()  # training exit heads again leaves it
    from early_exit_cli.files.atomic import read_json

    record = read_json(tmp_path / "eexit.json")
    assert record["heads"]["kind"] == "adapter"
    assert record["eagle"]["exit_layers"] == [2, 4]
    with pytest.raises(BundleError, match="another backbone"):
        train(tiny_backbone("qwen2"), tmp_path, steps=1)[0].run()


@pytest.mark.parametrize(
    "damaged",
    [
        {"lookup": [0.5] * 6},
        {"lookup": [0.5], "eagle": [], "checked": []},
        {"lookup": [0.5] * 6, "eagle": [{"a": 1}], "checked": []},
    ],
)
def test_a_damaged_policy_is_refused(damaged):
    with pytest.raises(BundleError, match="drafting record is damaged"):
        draft_chances_of(RecordForm(fingerprint={}, drafting=damaged))


def test_a_bundle_without_one_says_how_to_get_one(tiny_model):
    model: Engine = tiny_model("llama")
    with pytest.raises(BundleError, match="no EAGLE head"):
        eagle_drafter(model)


def test_an_exported_checkpoint_holds_the_head_and_what_it_borrows(tmp_path, tiny_backbone):
    from safetensors.torch import load_file

    from early_exit_cli.files.atomic import read_json
    from early_exit_cli.heads.export_speculators import export_eagle

    backbone = tiny_backbone("llama")
    vocab = torch.tensor([3, 7, 8, 200])
    head = some_head(backbone, vocab)
    export_eagle(head, backbone, tmp_path / "out", 3)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert (tensors["d2t"] + torch.arange(4)).tolist() == vocab.tolist()
    assert tensors["t2d"].nonzero()[:, 0].tolist() == vocab.tolist()
    assert torch.equal(tensors["lm_head.weight"], backbone.lm_head_weight[vocab])
    assert torch.equal(tensors["fc_norm.2.weight"], backbone.final_norm.weight)
    for name, value in head.state_dict().items():
        assert name == "draft_vocab" or torch.equal(tensors[name], value), name
    config = read_json(tmp_path / "out" / "config.json")
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert config["draft_vocab_size"] == 4


def test_the_shipped_head_drafts_in_bfloat16_without_changing_a_bit(smollm2, monkeypatch):
    from early_exit_cli.config import SHIPPED_BUNDLE

    model = load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=SHIPPED_BUNDLE))
    prompt = smollm2.encode_prompt("Explain step by step how to solve 2x + 6 = 14.")
    by_width = {width: 0.1 + 0.004 * width for width in {1, *model.blocks.widths}}
    known = Costs(per_block=by_width, finish=by_width, head=0.1, eagle_read=0.2, eagle_step=0.2)
    monkeypatch.setattr(choose, "cost_table", lambda engine: known)
    plain = generate(model, Request(prompt, 48), NoDrafter(), mode="full", keep_states=True)
    run = generate(model, Request(prompt, 48), choose.eagle_drafter(model), mode="eagle", width=16, keep_states=True)
    assert run.token_ids == plain.token_ids
    assert torch.equal(run.states, plain.states)
    assert run.stats.tokens_accepted > 10
