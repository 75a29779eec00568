"""Bundles of DSSD: read without trusting their pickle, checked name by name, made into ours."""

import json
import pickle

import pytest
import torch
from dssd_files import Touch, dssd_folder
from safetensors.torch import load_file

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.bundle.push import import_dssd
from early_exit_cli.cli.app import app
from early_exit_cli.config import BackboneConfig, BundleConfig
from early_exit_cli.errors import BundleError, ConfigError


@pytest.fixture
def dssd(linear_bundle, tmp_path):
    return dssd_folder(linear_bundle, tmp_path / "dssd")


def test_the_heads_are_the_same_afterwards(dssd, linear_bundle, tmp_path, tiny_folder):
    app(["import", str(dssd), "--output-dir", str(tmp_path / "bundle")], standalone_mode=False)
    ours, theirs = (load_file(folder / "heads.safetensors") for folder in (tmp_path / "bundle", linear_bundle))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("config.json", "calibration.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (dssd / name).read_bytes()
    record = json.loads((tmp_path / "bundle" / "eexit.json").read_text())
    assert record["fingerprint"] == {
        "hidden_size": 64,
        "vocab_size": 320,
        "num_hidden_layers": 6,
        "quantization": "none",
    }
    backbone = BackboneConfig(model_name=str(tiny_folder("llama")), quantization="none", device="cpu")
    model = load_engine(backbone, BundleConfig(bundle=str(tmp_path / "bundle")))
    assert model.heads.kind == "linear"
    assert model.thresholds is not None


def test_what_config_json_declares_is_compared_with_the_backbone(dssd, tmp_path, tiny_folder):
    config = json.loads((dssd / "config.json").read_text())
    (dssd / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    import_dssd(dssd, tmp_path / "bundle")
    backbone = BackboneConfig(model_name=str(tiny_folder("llama")), quantization="none", device="cpu")
    with pytest.raises(BundleError, match="num_hidden_layers: heads 7, backbone 6"):
        load_engine(backbone, BundleConfig(bundle=str(tmp_path / "bundle")))


def with_tensors(change):
    def damage(folder):
        state = torch.load(folder / "aux_heads.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "aux_heads.pt")

    return damage


def with_config(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def with_calibration(change):
    def damage(folder):
        record = json.loads((folder / "calibration.json").read_text())
        change(record)
        (folder / "calibration.json").write_text(json.dumps(record))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_tensors(lambda s: s.pop("1.linear.weight")), "1.linear.weight should be"),
        (with_tensors(lambda s: s.update({"2.norm.weight": torch.ones(64)})), "2.norm.weight is none of them"),
        (with_tensors(lambda s: s.update({"0.norm.weight": torch.ones(63)})), r"0.norm.weight should be \[64\]"),
        (with_tensors(lambda s: s["0.linear.weight"].fill_(float("nan"))), "0.linear.weight holds NaN"),
        (with_tensors(lambda s: s.update({"0.norm.weight": torch.ones(64).int()})), "or no floats"),
        (
            with_tensors(lambda s: s.update({"0.norm.weight": torch.ones(64).to_sparse()})),
            "not a plain dict of tensors",
        ),
        (lambda f: torch.save([1], f / "aux_heads.pt"), "not a plain dict of tensors"),
        (lambda f: (f / "aux_heads.pt").write_bytes(b"PK\x03\x04 cut off"), "damaged|more than tensors"),
        (lambda f: (f / "aux_heads.pt").unlink(), "no file .*aux_heads.pt"),
        (lambda f: (f / "config.json").unlink(), "no file .*config.json"),
        (with_config(vocab_size=321), r"0.linear.weight should be \[321, 64\]"),
        (with_config(num_heads=3), "head_layer_indices"),
        (with_config(quantization="2bit"), "found '2bit'"),
        (with_calibration(lambda r: r["thresholds"]["0.30"].pop("1")), "head 1: no threshold"),
        (with_calibration(lambda r: r.update(extra=1)), "extra missing or unknown"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(dssd, tmp_path, damage, words):
    damage(dssd)
    with pytest.raises(BundleError, match=words):
        import_dssd(dssd, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_holds_code_is_not_run(dssd, tmp_path, save):
    state = torch.load(dssd / "aux_heads.pt", weights_only=True)
    save(dict(state) | {"1.norm.weight": Touch(tmp_path / "touched")}, dssd / "aux_heads.pt")
    with pytest.raises(BundleError, match="it could run code") as caught:
        import_dssd(dssd, tmp_path / "bundle")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "touched").exists()
    torch.load(dssd / "aux_heads.pt", weights_only=False) if save is torch.save else pickle.loads(
        (dssd / "aux_heads.pt").read_bytes()
    )
    assert (tmp_path / "touched").exists()  # it would have run


def test_an_existing_folder_is_left_alone(dssd, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        import_dssd(dssd, kept)
    assert (kept / "thesis.txt").read_text() == "mine"
