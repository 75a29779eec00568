"""The cache of hidden states: what is kept, that it survives faults, and training from it."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_caches import DATA, SMALL, content, documents, make_cache

from early_exit_cli.config import BackboneConfig, CacheConfig, DataConfig, HeadsConfig, TrainingConfig
from early_exit_cli.data.packing import batches, pack
from early_exit_cli.errors import CacheError, NumericsError
from early_exit_cli.files.atomic import file_sha256
from early_exit_cli.hidden_states import extract as extraction
from early_exit_cli.hidden_states.cache import (
    Cache,
    bytes_per_token,
    cache_request,
    check_request,
    damage_record,
    default_folder,
    info,
    measured_positions,
    owned_text,
    verify,
    wanted_sequences,
)
from early_exit_cli.hidden_states.cached import CachedStates
from early_exit_cli.hidden_states.extract import repair
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.training.trainer import Lessons, Trainer, train_together

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, tiny_backbone):
    return make_cache(tmp_path / "cache", tiny_backbone("llama"))


def test_stored_states_are_the_backbones(cache, tiny_backbone):
    backbone = tiny_backbone("llama")
    rows = pack(documents(0), 32, 256)
    source = CachedStates(cache, None, TrainingConfig(batch_size=2), CPU)
    shards = cache.split("train")
    assert sum(shard.rows for shard in shards) == len(rows)
    for number, shard in enumerate(shards):
        for row in range(shard.rows):
            ours = source._rows(shards, [(number, row)], 0)
            theirs = run_states(backbone, rows[shard.first + row], [2, 5])
            for stored, computed in zip([*ours.exits, ours.final], [*theirs.exits, theirs.final], strict=True):
                assert torch.allclose(stored, computed, rtol=2**-7, atol=1e-4)
            assert torch.equal(ours.measured, theirs.measured)
            assert torch.allclose(ours.normalizer, backbone.lm_head(theirs.final).logsumexp(-1), atol=1e-4)
    view = cache.view(CPU)
    assert torch.equal(view.lm_head_weight, backbone.lm_head.weight)
    assert view.fingerprint == backbone.fingerprint


def test_its_files_name_blocks_as_settings_do(cache):
    assert cache.exit_layers == [2, 5]
    written = json.loads((cache.folder / "manifest.json").read_text())
    assert written["layers"] == info(cache)["layers"] == [1, 4]
    names = {name for name in load_file(cache.path(cache.shards[0])) if name.startswith("block")}
    assert names == {"block.1", "block.4"}


def test_measured_positions_survive_the_form_on_disk():
    rows = pack(documents(3), 32, 256)
    batch = next(batches(rows, len(rows)))
    assert torch.equal(measured_positions(extraction._text(rows)), batch.measured[batch.valid])


@pytest.mark.parametrize("store", ["bf16", "fp8"])
def test_a_token_takes_the_bytes_that_are_promised(tmp_path, tiny_backbone, store):
    cache = make_cache(tmp_path, tiny_backbone("llama"), SMALL.model_copy(update={"store": store}))
    assert bytes_per_token(4096, 3, "bf16") == 2 * 4096 * 4 + 8
    expected = bytes_per_token(64, 2, store)
    for shard in cache.shards:
        tensors = load_file(cache.path(shard))
        kept = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith("_starts"))
        assert kept == expected * shard.tokens
    facts = info(cache)
    assert facts["bytes_per_token_expected"] == expected
    if store == "fp8":
        assert 0.8 < facts["agreement_of_stored_states"] <= 1.0


def test_an_epoch_reads_every_sequence_once_in_another_order(cache):
    source = CachedStates(cache, None, TrainingConfig(batch_size=2), CPU)
    first, second = (source._epoch_order(epoch, 0, 1) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == cache.sequences()
    assert first != second
    halves = [source._epoch_order(0, rank, 2) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(first)
    again = CachedStates(cache, None, TrainingConfig(batch_size=2), CPU)
    for number in (7, 3, 20):
        assert torch.equal(source.batch(number, 0, 1).final, again.batch(number, 0, 1).final)


class _Stop(Exception):
    pass


def test_a_stopped_extraction_goes_on_and_ends_byte_for_byte_the_same(tmp_path, tiny_backbone, monkeypatch):
    backbone = tiny_backbone("llama")
    make_cache(tmp_path / "whole", backbone)
    write, written = extraction._write_shard, []

    def stop_at_third(folder, plan, *rest):
        if len(written) == 3:
            raise _Stop
        written.append(plan.file)
        return write(folder, plan, *rest)

    monkeypatch.setattr(extraction, "_write_shard", stop_at_third)
    with pytest.raises(_Stop):
        make_cache(tmp_path / "parts", backbone)
    with pytest.raises(CacheError, match="not complete"):
        CachedStates(Cache(tmp_path / "parts"), None, TrainingConfig(), CPU)
    before = list(written)
    monkeypatch.setattr(extraction, "_write_shard", lambda *a: (written.append(a[1].file), write(*a))[1])
    make_cache(tmp_path / "parts", backbone)
    assert not set(before) & set(written[3:])  # finished shards are not computed again
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_more_steps_continue_a_cache(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    short = make_cache(tmp_path / "grown", backbone, SMALL.model_copy(update={"cache_tokens": 32 * 9}))
    assert short.sequences() == 9
    assert short.is_shorter_than(SMALL, TrainingConfig(), 1)
    kept = {shard.file: shard.sha256 for shard in short.split("train")[:2]}
    grown = make_cache(tmp_path / "grown", backbone)
    assert {s.file: s.sha256 for s in grown.shards if s.file in kept} == kept
    make_cache(tmp_path / "whole", backbone)
    assert content(tmp_path / "grown") == content(tmp_path / "whole")
    assert not grown.is_shorter_than(SMALL, TrainingConfig(), 1)


def test_bounds_are_the_smallest_of_all(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    by_steps = make_cache(tmp_path / "a", backbone, SMALL.model_copy(update={"cache_steps": 3}))
    assert by_steps.sequences() == 3 * 2
    token_bytes = bytes_per_token(64, 2, "bf16")
    bound = SMALL.model_copy(update={"cache_gb": token_bytes * 32 * (5 + 3) / 1e9, "cache_steps": 4})
    assert make_cache(tmp_path / "b", backbone, bound).sequences() == 5


def test_a_cache_made_otherwise_is_refused_with_both_values(cache, tiny_backbone):
    with pytest.raises(CacheError, match=r"cache\.store: 'bf16' there, 'fp8' asked for"):
        make_cache(cache.folder, tiny_backbone("llama"), SMALL.model_copy(update={"store": "fp8"}))
    with pytest.raises(CacheError, match=r"data\.max_length: None there, 64 asked for"):
        check_request(cache, {**cache.manifest.request.as_json(), "data.max_length": 64})


def test_too_small_a_disk_is_refused_before_anything_is_computed(tmp_path, tiny_backbone, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(CacheError, match=r"needs .* GB more, but .* free") as raised:
        make_cache(tmp_path / "cache", tiny_backbone("llama"))
    assert "--cache-gb" in raised.value.hint
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_keeps_what_is_done(tmp_path, tiny_backbone, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        usage = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: usage)  # the estimate would refuse it
            with pytest.raises(CacheError, match="full; finished shards are kept"):
                make_cache(disk / "cache", tiny_backbone("llama"))
        done = sorted(path.name for path in (disk / "cache" / "shards").glob("*.safetensors"))
        assert done
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        make_cache(disk / "cache", tiny_backbone("llama"))
        make_cache(tmp_path / "whole", tiny_backbone("llama"))
        assert content(disk / "cache") == content(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def damage_truncated(path):
    os.truncate(path, path.stat().st_size - 100)


def damage_flipped(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def damage_missing(path):
    path.unlink()


def damage_of_another_cache(path):
    tensors = load_file(path)
    save_file({name: t.roll(1, 0) if name == "final" else t for name, t in tensors.items()}, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_truncated, "bytes, written were"),
        (damage_flipped, "not what was written"),
        (damage_missing, "missing"),
        (damage_of_another_cache, "not what was written"),
    ],
)
def test_damage_is_named_and_only_it_is_computed_again(cache, tiny_backbone, damage, said, monkeypatch):
    before = content(cache.folder)
    assert verify(cache) == []
    shard = cache.shards[2]
    damage(cache.path(shard))
    (found,) = verify(cache)
    assert found.file == f"shards/{shard.file}"
    assert said in found.what
    write, written = extraction._write_shard, []
    monkeypatch.setattr(extraction, "_write_shard", lambda *a: (written.append(a[1].file), write(*a))[1])
    changed = repair(cache, [found], tiny_backbone("llama"), documents(0), documents(1, 8), DATA, SMALL)
    assert changed == []
    assert written == [shard.file]
    assert content(cache.folder) == before


def test_a_shard_of_nan_is_found_even_with_a_right_hash(cache):
    shard = cache.shards[0]
    path = cache.path(shard)
    tensors = load_file(path)
    tensors["final"][3, 5] = float("nan")
    save_file({name: t.clone() for name, t in tensors.items()}, path)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    (cache.folder / "manifest.json").write_text(json.dumps(manifest))
    (found,) = verify(Cache(cache.folder))
    assert "NaN or infinite values in final" in found.what
    source = CachedStates(Cache(cache.folder), None, TrainingConfig(batch_size=2), CPU)
    with pytest.raises(CacheError, match="NaN or infinite values in final"):
        for number in range(40):
            source.batch(number, 0, 1)


def test_another_text_or_backbone_repairs_nothing(cache, tiny_backbone):
    cache.path(cache.shards[0]).unlink()
    damaged = verify(cache)
    with pytest.raises(CacheError, match="not the text it was made from"):
        repair(cache, damaged, tiny_backbone("llama"), documents(5), documents(1, 8), DATA, SMALL)
    with pytest.raises(CacheError, match="another backbone"):
        repair(cache, damaged, tiny_backbone("qwen3"), documents(0), documents(1, 8), DATA, SMALL)


def test_a_damaged_readout_is_mended(cache, tiny_backbone):
    before = content(cache.folder)
    damage_truncated(cache.folder / "readout.safetensors")
    (found,) = verify(cache)
    assert found.file == "readout.safetensors"
    repair(cache, [found], tiny_backbone("llama"), documents(0), documents(1, 8), DATA, SMALL)
    assert content(cache.folder) == before


def test_nan_states_stop_the_extraction_and_are_named(tmp_path, tiny_backbone, monkeypatch):
    backbone = tiny_backbone("llama")

    def broken(backbone, batch, exit_layers):
        states = run_states(backbone, batch, exit_layers)
        states.exits[1][7] = float("nan")
        return states

    monkeypatch.setattr(extraction, "run_states", broken)
    with pytest.raises(NumericsError, match="after block 4 in sequences 0 to 3 of the train text"):
        make_cache(tmp_path / "cache", backbone)


def offline_trainer(cache, folder, lessons=None, rank=32, draft_vocab=64, **changes):
    settings = dict(output_dir=folder, max_steps=12, batch_size=2, lr=3e-3, eval_every=6, save_every=6) | changes
    config = TrainingConfig(**settings)
    lessons = lessons or Lessons(CachedStates(cache, None, config, CPU))
    return Trainer(lessons, HeadsConfig(rank=rank, draft_vocab=draft_vocab), config, DATA, {})


def test_offline_training_learns_and_resumes_bit_for_bit(cache, tmp_path):
    settings = dict(draft_vocab=0, lr=1e-2, max_steps=160, save_every=50, eval_every=80)
    start = offline_trainer(cache, tmp_path / "none", draft_vocab=0, max_steps=0).evaluate()
    result = offline_trainer(cache, tmp_path / "whole", **settings).run()
    assert sum(result.best_agreement) > sum(start) + 0.05
    stopped = offline_trainer(cache, tmp_path / "parts", **settings)

    def stop(report):
        if report.step == 57:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-0000057")  # as if killed: go on from step 50
    resumed = offline_trainer(cache, tmp_path / "parts", **settings, resume=True)
    assert resumed.step == 50
    resumed.run()
    whole, parts = (load_file(tmp_path / name / "last" / "heads.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_variants_trained_together_equal_those_trained_alone(cache, tmp_path):
    config = TrainingConfig(batch_size=2)
    reads = []

    class Counting(CachedStates):
        def batch(self, number, rank, world):
            reads.append(number)
            return super().batch(number, rank, world)

    lessons = Lessons(Counting(cache, None, config, CPU))
    together = [offline_trainer(cache, tmp_path / f"t{rank}", lessons, rank=rank) for rank in (16, 32)]
    train_together(together)
    assert reads == list(range(12))  # once for both
    for rank in (16, 32):
        offline_trainer(cache, tmp_path / f"a{rank}", rank=rank).run()
        ours, alone = (load_file(tmp_path / f"{k}{rank}" / "last" / "heads.safetensors") for k in "ta")
        assert all(torch.equal(ours[name], alone[name]) for name in alone)


def test_heads_ask_only_for_blocks_that_were_kept(cache):
    assert CachedStates(cache, [5], TrainingConfig(), CPU).batch(0, 0, 1).exits[0].shape[1] == 64
    with pytest.raises(CacheError, match=r"after blocks \[1, 4\]; heads ask for \[2\]"):
        CachedStates(cache, [3], TrainingConfig(), CPU)


def test_a_backbone_of_another_request_has_another_folder():
    one = cache_request(BackboneConfig(), HeadsConfig(), DATA, CacheConfig())
    other = cache_request(BackboneConfig(quantization="8bit"), HeadsConfig(), DATA, CacheConfig())
    assert default_folder(one) != default_folder(other)
    assert default_folder(one) == default_folder(cache_request(BackboneConfig(), HeadsConfig(), DATA, CacheConfig()))


def test_what_a_manifest_says_beyond_what_is_read_survives_a_repair(cache, tiny_backbone):
    path = cache.folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"note": "by hand"}
    manifest["request"]["note"] = manifest["shards"][0]["note"] = "mine"
    path.write_text(json.dumps(manifest))
    noted = Cache(cache.folder)
    noted.path(noted.shards[1]).unlink()
    assert repair(noted, verify(noted), tiny_backbone("llama"), documents(0), documents(1, 8), DATA, SMALL) == []
    assert json.loads(path.read_text()) == manifest
    damage_truncated(cache.folder / "readout.safetensors")
    repair(noted, verify(noted), tiny_backbone("llama"), documents(0), documents(1, 8), DATA, SMALL)
    assert json.loads(path.read_text()) == manifest


def request_of(heads=None, **data):
    backbone = BackboneConfig(model_name="somebody/model")
    return cache_request(backbone, HeadsConfig(**(heads or {})), DataConfig(**data), CacheConfig())


def test_a_request_names_its_text_by_what_it_holds(tmp_path):
    """The same rows in another place are the same text; the same file with other rows is another one."""
    for folder in ("a", "b"):
        (tmp_path / folder / "set").mkdir(parents=True)
        (tmp_path / folder / "text.jsonl").write_text("one")
        (tmp_path / folder / "set" / "rows.arrow").write_text("one")
    (tmp_path / "b" / "set" / "cache-1.arrow").write_text("left there by datasets")
    for name in ("text.jsonl", "set"):
        here, there = (request_of(dataset_name=str(tmp_path / folder / name)) for folder in "ab")
        assert here["data.content"] == there["data.content"]
        assert len(here["data.content"]) >= 16
        file = tmp_path / "b" / name
        (file if file.is_file() else file / "rows.arrow").write_text("two")
        changed = request_of(dataset_name=str(tmp_path / "b" / name))
        assert changed["data.content"] != here["data.content"]
    assert request_of(dataset_name=str(tmp_path / "a" / "text.jsonl"))["data.dataset_name"] == "text.jsonl"
    assert "data.content" not in request_of(dataset_name="somebody/set")
    assert request_of(dataset_name="somebody/set")["data.dataset_config_name"] is None


def test_a_request_names_what_a_backbone_on_this_machine_holds(monkeypatch, tmp_path):
    from early_exit_cli.hidden_states import cache

    monkeypatch.setattr(cache, "local_content", lambda backbone: {"somebody/model": "abc"}.get(backbone.model_name))
    assert request_of()["backbone.content"] == "abc"
    monkeypatch.setattr(cache, "local_content", lambda backbone: None)
    assert "backbone.content" not in request_of()
    monkeypatch.setattr(cache, "content_of", lambda files: None)
    with pytest.raises(CacheError, match="changed while they were read"):
        request_of(dataset_name=str(tmp_path))


def test_a_request_tells_heads_and_turns_apart_and_its_folder_does_not_depend_on_their_order(monkeypatch, tmp_path):
    assert request_of({"head_layer_indices": [1, 4]})["heads"] == [1, 4]
    assert request_of({"num_heads": 4})["heads"] == "4 evenly spread"
    assert "data.answer_turns" not in request_of()  # as it was before there was a choice
    assert request_of(answer_turns="every")["data.answer_turns"] == "every"
    request = request_of()
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    folder = default_folder(request)
    assert folder.parent == tmp_path / "states"
    assert default_folder(dict(reversed(request.items()))) == folder


def test_a_cache_says_what_it_holds(cache, tiny_backbone):
    facts = info(cache)
    tokens = sum(shard.tokens for shard in cache.shards)
    assert facts == {
        "folder": str(cache.folder),
        "complete": True,
        "model_name": tiny_backbone("llama").name,
        "quantization": "none",
        "layers": [1, 4],
        "store": "bf16",
        "sequences": len(pack(documents(0), 32, 256)),
        "available_sequences": len(pack(documents(0), 32, 256)),
        "tokens": tokens,
        "shards": len(list((cache.folder / "shards").iterdir())),
        "bytes": sum(path.stat().st_size for path in (cache.folder / "shards").iterdir()),
        "bytes_per_token": cache.total_bytes / tokens,
        "bytes_per_token_expected": 2 * 64 * 3 + 8,
        "bytes_per_token_with_logits": 2 * 64 * 2 + 2 * tiny_backbone("llama").vocab_size + 8,
        "agreement_of_stored_states": facts["agreement_of_stored_states"],
        "request": cache.manifest.request.as_json(),
    }


def test_verifying_names_each_file_and_reports_each_shard(cache):
    (cache.folder / "readout.safetensors").unlink()
    cache.path(cache.shards[1]).unlink()
    seen = []
    found = verify(cache, lambda *report: seen.append(report))
    assert damage_record(found) == [
        {"file": "readout.safetensors", "what": "missing"},
        {"file": f"shards/{cache.shards[1].file}", "what": "missing"},
    ]
    assert [(done, total) for done, total, _ in seen] == [
        (number, len(cache.shards)) for number in range(1, len(cache.shards) + 1)
    ]
    assert all(rate > 0 for *_, rate in seen)
    with pytest.raises(CacheError, match=rf"{cache.shards[1].file} is damaged: missing"):
        cache.require_sizes()


def test_bounds_are_counted_in_sequences():
    steps = TrainingConfig(batch_size=2, gradient_accumulation_steps=3)

    def wanted(available=1000, world=1, **bounds):
        return wanted_sequences(CacheConfig(held_out_rows=3, **bounds), steps, 32, 100, available, world)

    assert wanted() == 1000
    assert wanted(cache_steps=5) == 5 * 2 * 3
    assert wanted(cache_steps=5, world=2) == 5 * 2 * 3 * 2
    assert wanted(cache_tokens=32 * 7 + 31) == 7
    assert wanted(cache_gb=32 * 100 * 10 / 1e9) == 10 - 3
    assert wanted(cache_tokens=32 * 7, cache_steps=1, cache_gb=32 * 100 * 12 / 1e9) == 6
    assert wanted(cache_tokens=3) == wanted(cache_gb=1e-9) == 1
    assert wanted(available=4, cache_steps=9) == 4


def test_a_view_gives_back_the_last_block(cache, tiny_backbone):
    backbone, view = tiny_backbone("llama"), cache.view(CPU)
    assert view.last_block.shape == backbone.last_block.shape
    assert view.last_block.weights.keys() == backbone.last_block.weights.keys()
    for name, weight in backbone.last_block.weights.items():
        assert torch.equal(view.last_block.weights[name], weight)


def test_tokens_on_disk_know_their_documents_and_where_in_an_answer_they_stand():
    rows = pack([document for document in documents(3) if len(document.ids) <= 32], 32, 256)
    ids, owners, places = owned_text(extraction._text(rows))
    assert ids.tolist() == [token for row in rows for token in row.input_ids[row.valid].tolist()]
    assert places.tolist() == [place for row in rows for place in row.places[row.valid].tolist()]
    documents_of_rows = torch.cat([row.documents[row.valid] for row in rows])
    assert torch.equal(owners.diff() == 1, documents_of_rows.diff() != 0)
    assert int(owners[0]) == 0
