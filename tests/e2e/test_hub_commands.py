"""Push and pull against a small Hub on localhost, with the real client, in processes of their own."""

import itertools
import json
import shutil
from pathlib import Path

import dssd_loader
import pytest
import torch
from commands import eexit_process
from dssd_files import Touch, dssd_folder
from eagle3_files import Head, random_weights, settings_of, write_checkpoint
from hub_server import READER, WRITER, Fault, HubServer
from hub_terminal import Terminal

import early_exit_cli
from early_exit_cli.files.atomic import file_sha256
from early_exit_cli.heads.exit_heads import load_heads

SHIPPED = Path(early_exit_cli.__file__).parent / "bundles" / "smollm2-135m"
FILES = {"aux_heads.pt", "heads.safetensors", "config.json", "calibration.json", "eexit.json", "README.md"}
NUMBERS = itertools.count()
MANY = 100


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def terminal(hub, tmp_path_factory):
    terminal = Terminal(hub, tmp_path_factory.mktemp("home"))
    yield terminal
    terminal.close()


@pytest.fixture
def repo(hub):
    """A repository name of the test's own. A fault that never came about is a test that tested nothing."""
    yield f"org/heads-{next(NUMBERS)}"
    unused = [fault for fault in hub.faults if 0 < fault.times < MANY / 2]
    hub.faults.clear()
    assert not unused


@pytest.fixture
def push(terminal, repo, linear_bundle):
    def run(*arguments, bundle=linear_bundle, **options):
        return terminal.run("push", "--repo-id", repo, bundle, "--retry-wait", 0.05, *arguments, **options)

    return run


def commits(hub, repo):
    """Commits after the one that every new repository has."""
    return hub.repos[repo].log[1:]


def test_push_and_pull_as_a_person_types_them(hub, repo, linear_bundle, tmp_path, tiny_backbone):
    """One commit of exactly the bundle's files, read back byte for byte, and loaded by DSSD's rules."""
    bundle = shutil.copytree(linear_bundle, tmp_path / "heads")
    (bundle / "optimizer.pt").write_bytes(b"never pushed")
    assert (bundle / "checkpoints").is_dir()
    surroundings = {
        **{"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITER},
        **{"HF_HOME": str(tmp_path / "hf"), "EEXIT_HOME": str(tmp_path / "eexit")},
    }

    def eexit(*arguments):
        code, out, err = eexit_process(*arguments, **surroundings)
        assert code == 0, err
        assert WRITER not in out + err
        return out, err

    before = {path: path.read_bytes() for path in bundle.iterdir() if path.is_file()}
    _, err = eexit("push", "--repo-id", repo, bundle)
    assert {path: path.read_bytes() for path in bundle.iterdir() if path.is_file()} == before
    (commit,) = commits(hub, repo)
    assert commit["sha"] in err
    pushed = hub.files(repo)
    assert set(pushed) == FILES
    assert all(pushed[name] == (bundle / name).read_bytes() for name in FILES - {"README.md", "aux_heads.pt"})

    out, _ = eexit("pull", repo, "--output-dir", tmp_path / "copy", "--json")
    source = {"repo_id": repo, "commit": commit["sha"], "heads": file_sha256(bundle / "heads.safetensors")}
    assert json.loads(out) == {**source, "folder": str(tmp_path / "copy")}
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert pulled == {name: data for name, data in pushed.items() if name != "aux_heads.pt"}

    for name, data in pushed.items():
        (tmp_path / name).write_bytes(data)
    backbone = tiny_backbone("llama")
    config, calibration, heads = dssd_loader.load(tmp_path, backbone.final_norm.eps)
    assert set(calibration.at(0.3)) == set(range(config.num_heads))
    exit_layers = [block + 1 for block in config.head_layer_indices]
    ours = load_heads(tmp_path / "copy" / "heads.safetensors", backbone, "linear", exit_layers, 0)
    hidden = torch.randn(5, config.hidden_size)
    with torch.no_grad():
        for index, head in enumerate(heads):
            assert torch.allclose(head(hidden), ours.logits(index, hidden), atol=1e-5)


def test_a_second_push_of_the_same_makes_no_commit_and_a_change_one_of_what_changed(hub, push, repo):
    assert push()[0] == 0
    code, _, err = push()
    assert code == 0
    assert "holds this bundle already" in err
    assert len(commits(hub, repo)) == 1
    assert hub.count(f"POST /api/models/{repo}/commit") == 1
    code, out, _ = push("--license", "apache-2.0", "--json")
    assert code == 0
    assert json.loads(out)["changed"] == ["README.md"]
    assert b"license: apache-2.0" in hub.files(repo)["README.md"]
    assert len(commits(hub, repo)) == 2


def test_heads_of_another_kind_replace_what_was_there(hub, push, repo):
    assert push()[0] == 0
    code, _, err = push(bundle=SHIPPED)
    assert code == 0, err
    assert set(hub.files(repo)) == FILES - {"aux_heads.pt"} | {"eagle.safetensors"}
    assert hub.files(repo)["heads.safetensors"] == (SHIPPED / "heads.safetensors").read_bytes()
    assert len(commits(hub, repo)) == 2


def test_every_request_may_fail_once(hub, push, repo):
    hub.objects.clear()  # what the storage has is not sent again
    hub.faults += [
        Fault("POST", "/api/repos/create", 503),
        Fault("GET", f"/api/models/{repo}", 502),
        Fault("GET", "/tree/", "reset"),
        Fault("POST", "/validate-yaml", 503),
        Fault("POST", "/preupload/", 503),
        Fault("POST", "/objects/batch", 503),
        Fault("PUT", "/lfs/", "reset"),
        Fault("POST", "/commit/", 503),
    ]
    code, _, err = push()
    assert code == 0, err
    assert len(commits(hub, repo)) == 1
    assert set(hub.files(repo)) == FILES


@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_a_commit_whose_reply_never_came_is_made_once(hub, push, repo, kind):
    hub.faults.append(Fault("POST", "/commit/", kind))
    code, _, err = push()
    assert code == 0, err
    (commit,) = commits(hub, repo)
    assert commit["sha"] in err
    assert hub.count(f"POST /api/models/{repo}/commit") == {"reset": 2, "lost": 1}[kind]


def test_the_last_try_counts_when_its_reply_is_lost(hub, push, repo):
    hub.faults.append(Fault("POST", "/commit/", "lost"))
    code, _, err = push("--retries", 0)
    assert code == 0, err
    assert len(commits(hub, repo)) == 1


def test_a_lost_pull_request_is_not_opened_twice(hub, push, repo):
    hub.make_repo(repo)
    hub.faults.append(Fault("POST", "/commit/", "lost"))
    code, _, err = push("--create-pr")
    assert code == 1
    assert "whether the pull request" in err
    assert f"{repo}/discussions" in err
    assert [commit["branch"] for commit in commits(hub, repo)] == ["refs/pr/1"]


@pytest.mark.parametrize(
    ("fault", "options", "words", "hint"),
    [
        (None, {"token": "hf_unknownToken"}, "the Hub does not accept the token (401)", "hf auth login"),
        (None, {"token": READER}, "(403) You don't have the rights", "hf auth login"),
        (Fault("POST", "/api/repos/create", 403), {}, "(403) injected, for Bearer ***", "hf auth login"),
        (Fault("POST", "/commit/", 409), {}, "changed meanwhile (409)", "push again"),
        (Fault("POST", "/commit/", "overtaken"), {}, "somebody else committed", "push again"),
        (Fault("POST", "/commit/", 503, times=MANY), {}, "the Hub is busy (503)", "the same command later"),
        (Fault("POST", "/commit/", "reset", times=MANY), {}, "broke", "the same command again"),
        (Fault("POST", "/commit/", 413), {}, "the Hub answered 413", ""),
        (Fault("GET", "/api/models/", 404), {}, "the Hub has no org/", "hf auth login"),
    ],
)
def test_a_refusal_is_one_line_with_a_hint(hub, push, repo, fault, options, words, hint):
    if fault:
        hub.faults.append(fault)
    code, out, err = push("--retries", 2, **options)
    assert (code, out) == (1, "")
    assert words in err
    assert hint in err
    assert len(err.strip().splitlines()) == (3 if hint else 2), err  # the first warns of the tiny backbone's path
    ours = (
        [commit for commit in commits(hub, repo) if commit["title"] != "somebody else's"] if repo in hub.repos else []
    )
    assert not ours
    if fault and fault.times > MANY / 2:
        assert hub.count(f"POST /api/models/{repo}/commit") == 3


def test_a_private_bundle_never_goes_to_a_public_repository(hub, push, repo):
    assert push("--private")[0] == 0
    assert hub.repos[repo].private
    hub.repos[repo].private = False
    hub.repos[repo].branches["main"] = hub.repos[repo].log[0]["sha"]
    code, _, err = push("--private")
    assert code == 1
    assert "exists and is public" in err
    assert len(commits(hub, repo)) == 1


def test_a_branch_is_made_and_main_stays(hub, push, repo, terminal):
    assert push("--revision", "trial")[0] == 0
    assert hub.files(repo) == {}
    assert set(hub.files(repo, "trial")) == FILES
    code, out, _ = terminal.run("pull", repo, "--revision", "trial", "--json")
    assert code == 0
    assert json.loads(out)["commit"] == hub.repos[repo].branches["trial"]


def test_a_pull_request_leaves_main_as_it_is(hub, push, repo):
    hub.make_repo(repo)
    code, out, _ = push("--create-pr", "--json")
    assert code == 0
    assert json.loads(out)["pull_request"].endswith("/discussions/1")
    assert hub.files(repo) == {}
    assert set(hub.files(repo, "refs/pr/1")) == FILES
    code, _, err = push("--create-pr", "--revision", "trial")
    assert code == 2
    assert "--create-pr" in err


def test_a_dry_run_sends_nothing(hub, push, repo):
    hub.requests.clear()
    code, out, _ = push("--dry-run")
    assert code == 0
    assert "library_name: eexit" in out
    assert all(name in out for name in FILES)
    code, out, _ = push("--dry-run", "--json")
    assert set(json.loads(out)["files"]) == FILES
    assert hub.requests == []


def test_only_safe_files_are_fetched(hub, repo, terminal, linear_bundle, tmp_path):
    files = {name: (linear_bundle / name).read_bytes() for name in FILES - {"README.md"}}
    hub.make_repo(repo, {**files, "modeling.py": b"raise SystemExit", "optimizer.bin": b"x", "sub/eexit.json": b"{}"})
    hub.requests.clear()
    code, out, err = terminal.run("pull", repo)
    assert code == 0, err
    assert {path.name for path in Path(out.strip()).iterdir()} == FILES - {"README.md", "aux_heads.pt"}
    assert hub.count(r"/resolve/.*(modeling|optimizer|aux_heads|sub)") == 0
    downloads = hub.count("GET /.*/resolve/")
    assert terminal.run("pull", repo)[0] == 0
    assert hub.count("GET /.*/resolve/") == downloads
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = terminal.run("pull", repo, "--output-dir", tmp_path)
    assert code == 2
    assert "not empty" in err
    hub.faults.append(Fault("GET", "/api/models/", 503, times=MANY))
    code, cached, err = terminal.run("pull", repo, "--retries", 0)  # the Hub is down, the cache is not
    assert (code, cached) == (0, out)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/nothing-here", "the Hub has no org/nothing-here"),
        ("{repo}@nowhere", "has no revision nowhere"),
    ],
)
def test_what_the_hub_does_not_have_is_said(hub, repo, terminal, name, words):
    hub.make_repo(repo)
    name, _, revision = name.format(repo=repo).partition("@")
    code, out, err = terminal.run("pull", name, *(["--revision", revision] if revision else []))
    assert (code, out) == (1, "")
    assert words in err


def test_a_hub_id_is_a_bundle_wherever_one_is_named(hub, push, repo, terminal, linear_bundle, tmp_path):
    assert push()[0] == 0
    commit = hub.repos[repo].branches["main"]
    infer = ["infer", "--mode", "adaptive", "--prompt", "hello", "--max-tokens", 8, "--accuracy-level", 0.3, "--json"]
    code, out, err = terminal.run(*infer, "--bundle", repo)
    assert code == 0, err
    assert f"{repo} at {commit}" in err
    local = json.loads(terminal.run(*infer, "--bundle", linear_bundle)[1])
    assert json.loads(out)["adaptive_early_exit"]["token_ids"] == local["adaptive_early_exit"]["token_ids"]

    assert push("--license", "mit")[0] == 0  # main moves on; the revision that was named does not
    record = tmp_path / "evaluation.json"
    named = f"{repo}@{commit}"
    code, _, err = terminal.run("evaluate", "--bundle", named, "--num-samples", 4, "--output-path", record)
    assert code == 0, err
    source = {"repo_id": repo, "commit": commit, "heads": file_sha256(linear_bundle / "heads.safetensors")}
    assert json.loads(record.read_text())["bundle"] == source
    code, _, err = terminal.run("calibrate", "--bundle", named)
    assert code == 2
    assert f"eexit pull {repo}" in err
    code, _, err = push("--evaluation", record, "--dry-run")
    assert code == 0, err


def test_heads_of_dssd_are_converted_on_the_way(hub, repo, terminal, linear_bundle, tmp_path):
    folder = dssd_folder(linear_bundle, tmp_path / "dssd")
    hub.make_repo(repo, {path.name: path.read_bytes() for path in folder.iterdir()})
    code, out, err = terminal.run("pull", repo, "--output-dir", tmp_path / "bundle", "--json")
    assert code == 0, err
    assert json.loads(out)["commit"] == hub.repos[repo].branches["main"]
    backbone = ["--prompt", "hello", "--max-tokens", 8, "--accuracy-level", 0.3, "--json"]
    results = [
        json.loads(terminal.run("infer", "--mode", "adaptive", "--bundle", name, *backbone)[1])["adaptive_early_exit"]
        for name in (repo, tmp_path / "bundle", linear_bundle)
    ]
    assert results[0]["token_ids"] == results[1]["token_ids"] == results[2]["token_ids"]


def test_a_pickle_with_code_is_refused_on_the_way(hub, repo, terminal, linear_bundle, tmp_path):
    folder = dssd_folder(linear_bundle, tmp_path / "dssd")
    torch.save({"0.norm.weight": Touch(tmp_path / "touched")}, folder / "aux_heads.pt")
    hub.make_repo(repo, {path.name: path.read_bytes() for path in folder.iterdir()})
    code, out, err = terminal.run("pull", repo)
    assert (code, out) == (1, "")
    assert "it could run code" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_no_way_to_the_hub_is_said_at_once(terminal, changed, words):
    code, out, err = eexit_process("pull", "org/heads", "--retry-wait", "1000", **(terminal.environment | changed))
    assert (code, out) == (1, "")
    assert words in err
    assert "org/heads is not in its cache" in err


def test_a_published_head_says_how_it_becomes_a_bundle_and_becomes_one(hub, terminal, repo, tmp_path, tiny_folder):
    checkpoint = write_checkpoint(tmp_path / "head", settings_of(Head()), random_weights(Head(), False), pickled=True)
    hub.make_repo(repo, {path.name: path.read_bytes() for path in checkpoint.iterdir()})
    for command in (("pull", repo), ("infer", "--bundle", repo, "--prompt", "Hello")):
        code, _, err = terminal.run(*command)
        assert code == 1
        assert "no bundle, but an EAGLE-3 head in SafeAILab's layout" in err
        assert f"eexit import {repo} --output-dir FOLDER" in err
    bundle = tmp_path / "bundle"
    backbone = ("--model-name", tiny_folder("llama"), "--quantization", "none")
    code, _, err = terminal.run("import", repo, "--output-dir", bundle, *backbone)
    assert code == 0, err
    commit = hub.repos[repo].branches["main"]
    assert json.loads((bundle / "eexit.json").read_text())["imported"]["from"] == f"{repo} at {commit}"
    code, _, err = terminal.run("infer", "--bundle", bundle, "--prompt", "Hello", "--max-tokens", 4)
    assert code == 0, err
    medusa = {"medusa_num_heads": 3, "base_model_name_or_path": "org/model"}
    hub.make_repo(f"{repo}-medusa", {"config.json": json.dumps(medusa).encode()})
    for command in (("pull", f"{repo}-medusa"), ("import", f"{repo}-medusa", "--output-dir", tmp_path / "none")):
        code, _, err = terminal.run(*command)
        assert code == 1
        assert "a set of Medusa heads" in err
