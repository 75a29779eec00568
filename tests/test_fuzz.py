"""Every file that is read, damaged thousands of times: it loads, or one clear error says why not (`fuzzing.py`).

The backbone is a real tiny one, loaded once; everything else is read anew for each mutant, and what loads is used: a bundle
drafts and is checked for a push, a cache gives batches, a prompt is tokenised.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from commands import output_of
from eagle3_files import Head, random_weights, settings_of, write_checkpoint
from fuzzing import (
    Mutate,
    Outcome,
    fuzz,
    mutated_json,
    mutated_lines,
    mutated_pickle,
    mutated_tensors,
    mutated_yaml,
)
from small_training import trainer

from early_exit_cli.backbone.chat import encode_conversation
from early_exit_cli.bundle import dssd
from early_exit_cli.bundle import load as bundle_load
from early_exit_cli.bundle.push import check_bundle, write_card
from early_exit_cli.cli.shared import data_of_bundle
from early_exit_cli.config import (
    BackboneConfig,
    BundleConfig,
    CacheConfig,
    DataConfig,
    HeadsConfig,
    PushConfig,
    TrainingConfig,
)
from early_exit_cli.data import kept_answers
from early_exit_cli.data.documents import Document
from early_exit_cli.data.rows import read_prompts, read_records
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting import choose, costs
from early_exit_cli.drafting.chances import MTP_PRIOR, MtpChances, mtp_survival, save_mtp_chances
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import EexitError
from early_exit_cli.files.atomic import file_sha256
from early_exit_cli.hidden_states.cache import Cache, damage_record, foreign_files, info, verify
from early_exit_cli.hidden_states.cached import CachedStates
from early_exit_cli.hidden_states.extract import _is_done, _recorded_shards, extract
from early_exit_cli.resolve import resolve
from early_exit_cli.runtime import select
from early_exit_cli.runtime.select import make_blocks
from early_exit_cli.training.students import make_student

FEW, MANY = 200, 2400
"""Mutants of each kind of file: in every run (of those that are used to draft, a third of it), and in the slow one."""
REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")
PROMPT = [72, 101, 108, 108, 111]


@dataclass(frozen=True)
class Target:
    """A kind of file: whole ones, how they are damaged, where they lie, and how they are read."""

    path: Path
    seeds: list[bytes]
    mutate: Mutate
    load: Callable[[], Any]
    drafts: bool = False


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_folder):
    """Everything a bundle can hold, as the commands make it, with a record of its evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    text, heads = folder / "text.jsonl", folder / "heads"
    rows = [{"text": f"line {i} of the text says that {i} times {i} is {i * i}. " * 3} for i in range(60)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = ["--model-name", tiny_folder("llama"), "--quantization", "none"]
    train = ["train", *backbone, "--dataset-name", text, "--max-length", 64, "--holdout", 0.3, "--max-steps", 2]
    commands: list[list] = [
        [*train, "--num-heads", 2, "--rank", 8, "--draft-vocab", 128, "--output-dir", heads],
        [*train, "--head", "eagle", "--draft-vocab", 64, "--output-dir", heads],
        ["calibrate", "--bundle", heads, "--accuracy-levels", "0.1,0.3,0.9"],
        ["evaluate", "--bundle", heads, "--num-samples", 4, "--accuracy-level", 0.3, "--output-path", folder / "evaluation.json"],
    ]  # fmt: skip
    for command in commands:
        output_of(*command)
    return heads


@pytest.fixture(scope="module")
def world(tiny_model, tiny_backbone):
    """The backbone stands still: loading it, and measuring this machine, are not what is tested here."""
    model = tiny_model("llama")
    measured = costs.measure_costs(model, sorted({1, *model.blocks.widths}))
    widths = model.blocks.widths

    def as_measured(blocks):
        blocks.widths, blocks.is_invariant = widths, True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_load, "load_backbone", lambda config, check: model.backbone)
        patch.setattr(bundle_load, "make_blocks", lambda *_: model.blocks)
        patch.setattr(select, "measure_widths", as_measured)
        patch.setattr(costs, "measure_costs", lambda *_: measured)
        yield model


def use_bundle(folder: Path) -> None:
    """All that commands do with a bundle: load it, draft with all it has, find its text, check and describe it."""
    model = bundle_load.load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=str(folder)))
    data_of_bundle(resolve({}), folder)
    draft_with(model)
    write_card(check_bundle(folder), "org/heads", PushConfig())


def draft_with(model: Engine) -> None:
    levels = [float(key) for key in model.thresholds.levels] if model.thresholds else []
    drafters = [choose.lookup_drafter(model), *(choose.auto_drafter(model, level, 8, "auto") for level in levels[:1])]
    drafters += [choose.exit_drafter(model, level, 8, "auto") for level in levels[-1:]]
    if model.eagle is not None:
        drafters.append(choose.eagle_drafter(model))
    expected = plain_tokens(model)
    for drafter in drafters:
        assert [t for step in decode(model, Request(PROMPT, 4, stop_ids=()), drafter) for t in step.tokens] == expected


def plain_tokens(model: Engine) -> list[int]:
    if not hasattr(plain_tokens, "kept"):
        plain_tokens.kept = [
            t for step in decode(model, Request(PROMPT, 4, stop_ids=()), NoDrafter()) for t in step.tokens
        ]
    return plain_tokens.kept


def in_bundle(name: str, mutate: Mutate) -> Callable[..., Target]:
    def target(tmp_path, bundle, **_) -> Target:
        folder = shutil.copytree(bundle, tmp_path / "heads")
        return Target(folder / name, [(folder / name).read_bytes()], mutate, lambda: use_bundle(folder), drafts=True)

    return target


def configuration(tmp_path, **_) -> Target:
    path = tmp_path / "run.yaml"
    seeds = [path.read_bytes() for path in sorted((REPOSITORY / "configs").glob("*b*.yaml"))]
    seeds.append(
        b"calibration: {accuracy_levels: [0.5, 0.9], margin: 0.1}\nheads: {head_layer_indices: [1, 2]}\nhub: {repo_id: a/b}\n"
    )
    return Target(path, seeds, mutated_yaml, lambda: resolve({}, path).rows())


def evaluation(tmp_path, bundle, **_) -> Target:
    path = tmp_path / "evaluation.json"
    checked = check_bundle(bundle)
    seeds = [(bundle.parent / "evaluation.json").read_bytes()]
    return Target(path, seeds, mutated_json, lambda: write_card(checked, "org/heads", PushConfig(evaluation=path)))


def bench_report(tmp_path, bundle, **_) -> Target:
    path = tmp_path / "report.json"
    checked = check_bundle(bundle)
    method = {
        "tokens_per_second": 9.5,
        "speedup_over_full": 1.5,
        "accept_length": 2.0,
        "identical_prompts": 3,
        "prompts": 3,
    }
    report = {
        "methods": {"full": method, "lookup": {**method, "accept_length": None}},
        "categories": {},
        "environment": {
            "processor": "a processor", "versions": {"eexit": "0.1.0", "torch": "2"}, "max_tokens": 8, "repeats": 1,
            "bundle": {"folder": "heads", "heads": file_sha256(bundle / "heads.safetensors")},
        },
    }  # fmt: skip
    seeds = [json.dumps(report).encode()]
    return Target(path, seeds, mutated_json, lambda: write_card(checked, "org/heads", PushConfig(bench=path)))


def make_cache(folder: Path, backbone) -> Cache:
    texts = [Document([(7 * i + j) % 250 for j in range(9 + i % 30)], "s", i % 7) for i in range(24)]
    settings = {"model_name": backbone.name, "revision": None, "quantization": "none"}
    request = {f"backbone.{name}": value for name, value in settings.items()}
    config = CacheConfig(shard_tokens=128, held_out_rows=3)
    request |= {"cache.store": "bf16", "cache.shard_tokens": 128, "cache.held_out_rows": 3}
    text = DataConfig(dataset_name="x", max_length=32)
    where, training = PartialState(cpu=True), TrainingConfig(batch_size=2)
    return extract(folder, request, backbone, [2, 5], texts, texts[:5], text, config, training, where)


def use_cache(folder: Path) -> None:
    """What commands do with a cache: show and check it, train from it."""
    cache = Cache(folder)
    json.dumps(info(cache))
    damage_record(verify(cache))
    foreign_files(cache)
    assert cache.data.max_length
    cache.is_shorter_than(CacheConfig(), TrainingConfig(), 1)
    source = CachedStates(cache, None, TrainingConfig(batch_size=2), CPU)
    for number in range(source.sequences(0, 1) // 2):
        assert torch.isfinite(source.batch(number, 0, 1).final).all()
    assert all(torch.isfinite(states.final).all() for states in source.held_out())
    for kind in ("adapter", "eagle"):
        make_student(source, HeadsConfig(kind=kind, rank=8, draft_vocab=16))


def in_cache(name: str, mutate: Mutate) -> Callable[..., Target]:
    def target(tmp_path, world, **_) -> Target:
        cache = make_cache(tmp_path / "cache", world.backbone)
        path = cache.folder / name
        return Target(path, [path.read_bytes()], mutate, lambda: use_cache(cache.folder))

    return target


def shard_record(tmp_path, world, **_) -> Target:
    """What a stopped extraction leaves beside a shard."""
    cache = make_cache(tmp_path / "cache", world.backbone)
    plan = cache.shards[0]
    path = (cache.folder / "shards" / plan.file).with_suffix(".json")
    manifest = cache.folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"shards": [], "complete": False}))

    def load():
        known = _recorded_shards(cache.folder)
        if not _is_done(cache.folder, plan, known.get(plan.file)):
            raise Again("computed again")

    return Target(path, [json.dumps(plan.as_json()).encode()], mutated_json, load)


def prompts(tmp_path, world, **_) -> Target:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "tell me", "category": "qa"},
        {"question_id": 7, "turns": ["first", "second"]},
        {"prompt": "é 🙂"},
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
    ]

    def load():
        for row in read_prompts(path):
            world.backbone.encode_prompt(row["prompt"])
            json.dumps(row, ensure_ascii=False).encode()

    return Target(path, ["\n".join(map(json.dumps, rows)).encode()], mutated_lines, load)


def texts(suffix: str) -> Callable[..., Target]:
    rows = [
        {"text": "first", "source": "s"},
        {"text": ["turn", "turn"], "category": "c"},
        {"text": [{"role": "user", "content": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": [{"text": "ho"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        {"system": "be kind", "instruction": "add", "input": "1", "output": 2, "history": [["a", "b"]]},
    ]
    whole = {".jsonl": "\n".join(map(json.dumps, rows)), ".json": json.dumps({"data": rows})}

    def target(tmp_path, world, **_) -> Target:
        path = tmp_path / f"texts{suffix}"
        mutate = mutated_lines if suffix == ".jsonl" else mutated_json

        def load():
            records = read_records(DataConfig(dataset_name=str(path)))
            world.backbone.tokenizer([record["text"] for record in records])
            for record in records:
                encode_conversation(world.backbone.tokenizer, record["sample"].messages)

        return Target(path, [whole[suffix].encode()], mutate, load)

    return target


def answers(tmp_path, world, **_) -> Target:
    """Damaged answers are made again, so that they never stop a run; what is kept must be tokens of prompts that exist."""
    path = tmp_path / "answers.jsonl"
    rows = [{"index": i, "answer": [i, 2, 3]} for i in range(4)]

    def load():
        found = kept_answers.read_answers(path, 4, world.backbone.vocab_size)
        assert all(0 <= index < 4 for index in found)
        assert all(0 <= token < 320 for answer in found.values() for token in answer)
        if len(found) < 4:
            raise Again("made again")

    return Target(path, ["".join(json.dumps(row) + "\n" for row in rows).encode()], mutated_lines, load)


class Again(EexitError):
    """What was damaged is not an error: it is measured or made again."""


def measured(kind: str) -> Callable[..., Target]:
    """What was measured of this machine; a damaged record is measured again."""

    def target(tmp_path, world, monkeypatch, **_) -> Target:
        monkeypatch.setenv("EEXIT_HOME", str(tmp_path))

        def load():
            before = path.read_bytes() if whole else b""
            if kind == "widths":
                blocks = make_blocks(world.backbone)
                assert set(blocks.widths) <= set(blocks.candidate_widths)
                assert 1 <= blocks.pass_width(1) <= 16
            else:
                draft_with(world)
                assert costs.cost_table(world).plain(6, 1) > 0
            if whole and path.read_bytes() != before:
                raise Again("measured again")

        whole: list[bytes] = []
        load()
        if kind == "costs":
            costs.cost_table(world)
        (path,) = (tmp_path / kind).iterdir()
        whole.append(path.read_bytes())
        return Target(path, whole, mutated_json, load, drafts=True)

    return target


def chances(tmp_path, world, monkeypatch, **_) -> Target:
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    path = save_mtp_chances(MtpChances(survival=MTP_PRIOR[:2], checked=[(0.5, 0.25)]), world.backbone)

    def load():
        found = mtp_survival(world.backbone)
        assert all(0.0 <= one.at(entropy) <= 1.0 for one in found for entropy in (0.0, 1.0, 30.0))
        if found is MTP_PRIOR:
            raise Again("the prior counts")

    return Target(path, [path.read_bytes()], mutated_json, load)


def dssd_file(name: str, canary: Path | None = None) -> Callable[..., Target]:
    def target(tmp_path, linear_bundle, **_) -> Target:
        from early_exit_cli.bundle.push import import_dssd

        folder, made = tmp_path / "dssd", tmp_path / "made"
        folder.mkdir()
        for file in ("aux_heads.pt", "config.json", "calibration.json"):
            shutil.copy(linear_bundle / file, folder / file)

        def load():
            shutil.rmtree(made, ignore_errors=True)
            import_dssd(folder, made)
            assert not (tmp_path / "canary").exists(), "the pickle ran"

        def tensors():
            try:
                dssd.load_tensors(folder / name)
                load()
            finally:
                assert not (tmp_path / "canary").exists(), "the pickle ran"

        seeds = [(folder / name).read_bytes()]
        if name != "aux_heads.pt":
            return Target(folder / name, seeds, mutated_json, load)
        state = torch.load(folder / name, weights_only=True)
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        return Target(folder / name, seeds, mutated_pickle(tmp_path / "canary"), tensors)

    return target


def published(name: str, mutate: Callable[..., Any]) -> Callable[..., Target]:
    """A file of an EAGLE-3 checkpoint that somebody published."""

    def target(tmp_path, tiny_backbone, **_) -> Target:
        from early_exit_cli.bundle.files import read_bundle_record
        from early_exit_cli.bundle.published import Target as Backbone
        from early_exit_cli.bundle.published import convert, read_published
        from early_exit_cli.heads.eagle import load_eagle

        checkpoint = write_checkpoint(tmp_path / "head", settings_of(Head()), random_weights(Head(), True))
        made = tmp_path / "made"

        def load():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            convert(read_published(checkpoint, "head"), "head", Backbone("tiny", "llama", 64, 320, 6, "none"), made)
            eagle = read_bundle_record(made).eagle
            load_eagle(made / "eagle.safetensors", tiny_backbone("llama"), eagle.exit_layers, eagle.layout)

        return Target(checkpoint / name, [(checkpoint / name).read_bytes()], mutate, load)

    return target


def marker(tmp_path, tiny_backbone, **_) -> Target:
    """What a checkpoint says of itself."""
    from early_exit_cli.training.checkpoints import resumable

    training = trainer(tiny_backbone("llama"), tmp_path / "run", max_steps=1)
    training.run()
    path = tmp_path / "run" / "checkpoints" / "step-0000001" / "complete.json"
    identity = training._identity()
    return Target(path, [path.read_bytes()], mutated_json, lambda: resumable(tmp_path / "run", identity))


TARGETS: dict[str, Callable[..., Target]] = {
    "configuration": configuration,
    "config.json": in_bundle("config.json", mutated_json),
    "calibration.json": in_bundle("calibration.json", mutated_json),
    "eexit.json": in_bundle("eexit.json", mutated_json),
    "heads.safetensors": in_bundle("heads.safetensors", mutated_tensors),
    "eagle.safetensors": in_bundle("eagle.safetensors", mutated_tensors),
    "evaluation": evaluation,
    "bench report": bench_report,
    "manifest.json": in_cache("manifest.json", mutated_json),
    "shard": in_cache("shards/train-00000.safetensors", mutated_tensors),
    "readout.safetensors": in_cache("readout.safetensors", mutated_tensors),
    "shard record": shard_record,
    "prompts": prompts,
    "texts.jsonl": texts(".jsonl"),
    "texts.json": texts(".json"),
    "answers": answers,
    "widths": measured("widths"),
    "costs": measured("costs"),
    "chances": chances,
    "checkpoint": marker,
    "dssd pickle": dssd_file("aux_heads.pt"),
    "dssd config": dssd_file("config.json"),
    "dssd calibration": dssd_file("calibration.json"),
    "eagle-3 config": published("config.json", mutated_json),
    "eagle-3 weights": published("model.safetensors", mutated_tensors),
}


@pytest.fixture
def target(request, tmp_path, world, bundle, linear_bundle, tiny_backbone, monkeypatch):
    made = TARGETS[request.param](
        tmp_path=tmp_path, world=world, bundle=bundle, linear_bundle=linear_bundle, tiny_backbone=tiny_backbone,
        monkeypatch=monkeypatch,
    )  # fmt: skip
    for seed in made.seeds:  # whole files load
        made.path.write_bytes(seed)
        made.load()
    return made


def check(outcome: Outcome, cases: int) -> None:
    assert not outcome.failures, "\n".join([f"{len(outcome.failures)} of {outcome.cases}", *outcome.failures[:40]])
    assert outcome.cases == cases
    assert outcome.loaded, "every mutant was refused: nothing but the first check is tested"
    assert outcome.refused > cases / 10


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_a_damaged_file_loads_or_says_why_not(target):
    cases = FEW // 3 if target.drafts else FEW
    check(fuzz(target.path, target.seeds, target.mutate, target.load, range(cases)), cases)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_fifty_thousand_damaged_files(target):
    cases = int(os.environ.get("EEXIT_FUZZ", MANY))
    check(fuzz(target.path, target.seeds, target.mutate, target.load, range(FEW, FEW + cases)), cases)
