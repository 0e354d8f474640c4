"""Checkpoints from a hub, here a server on the loopback interface: what is asked for, kept, resumed and refused."""

import json
import logging
import socket
import time
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

import jaxlm
from jaxlm.checkpoints import hub
from jaxlm.cli.main import main
from jaxlm.opening import on_hub, open_checkpoint
from tests.checkpoints.hub_server import Hub, Repo, running
from tests.cli.conftest import CONFIG, byte_tokenizer

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
JUNK = [  # what many repositories hold too
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "consolidated.00.pth",
    "model.fp16.safetensors",
    "tf_model.h5",
    "model.Q4_K_M.gguf",
    "onnx/model.onnx",
    "original/config.json",
    "README.md",
]


@pytest.fixture(scope="module")
def model() -> jaxlm.Model:
    return jaxlm.init(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def contents(model, tmp_path_factory) -> dict[str, bytes]:
    """A checkpoint's files."""
    directory = tmp_path_factory.mktemp("saved")
    model.save(directory, overwrite=True)
    byte_tokenizer().save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 0}')
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("sharded")
    model.save(directory, overwrite=True, max_shard_bytes=60_000)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """huggingface_hub as on a machine with a network, an empty cache and no token."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read from the environment at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Where nothing listens: HF_ENDPOINT alone says where the hub is.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # before it tries again
    huggingface_hub.close_session()  # it holds the proxies and connections of earlier tests
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch, contents):
    with running() as server:
        server.repos["org/tiny"] = Repo(dict(contents))
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server
        huggingface_hub.close_session()


def fails(kind: type[Exception], source: str = "org/tiny", **options) -> str:
    """The message, one line that names the repository."""
    with pytest.raises(kind) as caught:
        jaxlm.load(source, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and source in str(caught.value)
    return str(caught.value)


def weights(directory: Path) -> list[str]:
    """The safetensors that a directory of the cache shows."""
    return sorted(path.name for path in directory.rglob("*.safetensors"))


# Loading


def test_load(server, model, cache):
    server.repos["org/tiny"].files |= dict.fromkeys(JUNK, b"x")
    loaded = jaxlm.load("org/tiny")
    np.testing.assert_array_equal(np.asarray(loaded(TOKENS)), np.asarray(model(TOKENS)))
    assert loaded.tokenizer.decode(loaded.tokenizer("caf\u00e9")["input_ids"]) == "caf\u00e9"
    assert loaded.generation_config == {"eos_token_id": 0}
    assert loaded.opened.where == "org/tiny"
    assert weights(cache) == ["model.safetensors"]
    assert set(server.asked()) == {"model.safetensors", *SMALL}


def test_nothing_but_the_checkpoint_is_asked_for(server):
    server.repos["org/tiny"].files |= dict.fromkeys(JUNK, b"x")
    hub.snapshot("org/tiny")
    about = {request.file for request in server.requests} - {None}
    assert about == {"model.safetensors", *SMALL}


def test_second_load_offline_makes_no_request(server, model, monkeypatch):
    jaxlm.load("org/tiny")
    server.requests.clear()
    again = jaxlm.load("org/tiny", local_files_only=True)
    np.testing.assert_array_equal(np.asarray(again(TOKENS)), np.asarray(model(TOKENS)))
    assert again.tokenizer.vocab_size > 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    jaxlm.load("org/tiny")
    assert server.requests == []


def test_second_load_asks_only_for_the_commit(server):
    first = hub.snapshot("org/tiny")
    server.requests.clear()
    assert hub.snapshot("org/tiny") == first
    assert [request.path for request in server.requests] == ["/api/models/org/tiny"]


def test_new_commit_is_fetched_and_shares_files(server, contents):
    first = hub.snapshot("org/tiny")
    server.repos["org/tiny"].files["generation_config.json"] = b'{"eos_token_id": 1}'
    server.requests.clear()
    second = hub.snapshot("org/tiny")
    assert second != first and server.asked() == ["generation_config.json"]
    assert jaxlm.load("org/tiny", local_files_only=True).generation_config == {"eos_token_id": 1}


def test_shards_of_the_index_only(server, shards, contents, model):
    extra = {"model-00009-of-00009.safetensors": b"x", "consolidated.safetensors": b"x"}
    server.repos["org/tiny"].files = shards | extra
    loaded = jaxlm.load("org/tiny")
    named = sorted(set(json.loads(shards["model.safetensors.index.json"])["weight_map"].values()))
    assert len(named) > 1 and weights(loaded.opened.directory) == named
    np.testing.assert_array_equal(np.asarray(loaded(TOKENS)), np.asarray(model(TOKENS)))
    jaxlm.load("org/tiny", local_files_only=True)


def test_model_safetensors_wins_over_an_index(server, shards, contents):
    server.repos["org/tiny"].files = shards | contents
    directory = hub.snapshot("org/tiny")
    assert weights(directory) == ["model.safetensors"] and not (directory / "model.safetensors.index.json").exists()
    jaxlm.load("org/tiny")


def test_revision(server, contents, model):
    repo = server.repos["org/tiny"]
    repo.revisions += ("v1", "refs/pr/1")
    for revision in ("v1", repo.commit):
        loaded = jaxlm.load("org/tiny", revision=revision)
        assert loaded.opened.directory.name == repo.commit
        jaxlm.load("org/tiny", revision=revision, local_files_only=True)
    assert "has no revision 'v2'" in fails(FileNotFoundError, revision="v2")
    assert "'v2' is not in the cache" in fails(FileNotFoundError, revision="v2", local_files_only=True)


def test_cache_dir(server, cache, tmp_path):
    directory = hub.snapshot("org/tiny", cache_dir=tmp_path / "other")
    assert (tmp_path / "other") in directory.parents and not cache.exists()
    assert "not in the cache" in fails(FileNotFoundError, local_files_only=True)
    hub.snapshot("org/tiny", cache_dir=str(tmp_path / "other"), local_files_only=True)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fails(OSError, cache_dir=tmp_path / "file" / "cache")


def test_progress(server, contents, shards):
    for files, count in ((contents, len(contents["model.safetensors"])), (shards, None)):
        server.repos["org/tiny"].files = dict(files)
        told: list[tuple[int, int]] = []
        hub.snapshot("org/tiny", progress=lambda done, total, told=told: told.append((done, total)))
        count = count or sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
        assert len(told) > 5 and told == sorted(told) and told[-1] == (count, count)
        assert {total for _, total in told} == {count}


def test_bars_only_on_a_terminal(server, capsys, monkeypatch, tmp_path):
    huggingface_hub.utils.enable_progress_bars()  # transformers, where another test silenced it, switched them off
    hub.snapshot("org/tiny")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    hub.snapshot("org/tiny", cache_dir=tmp_path / "other")
    assert "100%" in capsys.readouterr().err


def test_a_path_wins(server, contents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    for name, data in contents.items():
        (tmp_path / "org" / "tiny" / name).write_bytes(data)
    assert jaxlm.load("org/tiny").opened.directory == Path("org/tiny")
    assert server.requests == []
    options = {"revision": "main", "token": "t", "cache_dir": tmp_path, "local_files_only": True}
    for name, value in options.items():
        assert f"{name}=" in fails(ValueError, **{name: value})
    assert "revision=, local_files_only=" in fails(ValueError, revision="main", local_files_only=True)


@pytest.mark.parametrize("name", ["org/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "o_rg/Name.v1-x_2"])
def test_names_of_repositories(name):
    assert hub.is_repo(name) and on_hub(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "name",
            "a/b/c",
            "./a",
            "/a",
            "a/",
            "../a",
            "~/a",
            "",
            "org/name\n",
            "org/na me",
            "org/-name",
            "a--b/c",
            "a/b.",
        ),
        *("a./b", "org/model.gguf", "org/name.git", "org/" + "x" * 97, "caf\u00e9/name"),
    ],
)
def test_not_names_of_repositories(server, name):
    assert not hub.is_repo(name)
    with pytest.raises(ValueError, match="not the name of a repository"):
        hub.snapshot(name)
    assert server.requests == []


def test_missing_paths_are_not_sought(server, tmp_path):
    for source in ("nowhere", tmp_path / "nowhere", Path("org/tiny"), "./org/tiny", "nowhere.gguf"):
        with pytest.raises(FileNotFoundError, match=r"nowhere|org/tiny"):
            open_checkpoint(source)
    assert server.requests == []


# Refusals


def test_no_such_repository(server):
    message = fails(FileNotFoundError, "org/missing")
    assert "no such directory here" in message and server.url in message and "token=" in message


def test_private(server):
    server.repos["org/tiny"].private = True
    assert "if it is private" in fails(FileNotFoundError)
    assert "if it is private" in fails(FileNotFoundError, token="other")
    hub.snapshot("org/tiny", token="accepted")


@pytest.mark.parametrize("token", [None, "other"])
def test_gated(server, token, monkeypatch):
    server.repos["org/tiny"].gated = True
    message = fails(PermissionError, token=token)
    assert f"accept its licence on {server.url}/org/tiny" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "accepted")
    hub.snapshot("org/tiny")


def test_wrong_token(server):
    assert "refuses access (HTTP 401 Invalid credentials" in fails(PermissionError, token="expired")
    assert "token is empty" in fails(ValueError, token="")
    assert "revision is empty" in fails(ValueError, revision=" ")


def test_only_pickles(server, contents):
    files = {name: data for name, data in contents.items() if not name.endswith(".safetensors")}
    server.repos["org/tiny"].files = files | {"pytorch_model.bin": b"x"}
    message = fails(ValueError)
    assert "pytorch_model.bin" in message and "unpickling can run any code" in message
    assert 'from_pretrained("org/tiny").save_pretrained("tiny-safetensors")' in message
    assert server.asked() == [] == server.asked("HEAD")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.fp16.safetensors"}, "its safetensors are model.fp16.safetensors"),
        ({"adapter_model.safetensors", "pytorch_model.bin"}, "its safetensors are adapter_model.safetensors"),
        ({"tiny.Q4_0.gguf"}, "hf download org/tiny tiny.Q4_0.gguf"),
        ({"tf_model.h5"}, "no safetensors; it holds config.json, tf_model.h5"),
    ],
)
def test_no_weights(server, files, said):
    server.repos["org/tiny"].files = dict.fromkeys({"config.json", *files}, b"{}")
    assert said in fails(FileNotFoundError)


def test_no_config(server, contents):
    del server.repos["org/tiny"].files["config.json"]
    assert "has no config.json; it holds" in fails(FileNotFoundError)
    server.repos["org/tiny"].files["rwkv.pth"] = b"x"
    assert "`hf download org/tiny rwkv.pth` and load it by its path" in fails(FileNotFoundError)


@pytest.mark.parametrize("place", ["pytorch_model.bin", "../model.safetensors", "*"])
def test_index_that_names_other_files(server, shards, place):
    index = {"metadata": {}, "weight_map": {"a": place}}
    server.repos["org/tiny"].files = shards | {"model.safetensors.index.json": json.dumps(index).encode(), place: b"x"}
    with pytest.raises(ValueError, match=r"expected names of \.safetensors files"):
        hub.snapshot("org/tiny")
    assert not {place, *filter(lambda name: name.endswith(".safetensors"), shards)} & set(server.asked())


def test_index_that_names_a_missing_file(server, shards):
    name = max(name for name in shards if name.endswith(".safetensors"))
    server.repos["org/tiny"].files = {key: data for key, data in shards.items() if key != name}
    assert f"names {name}, which the repository does not hold" in fails(FileNotFoundError)


def test_endpoint_that_is_no_url(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(ValueError, match=r"HF_ENDPOINT is 'hub\.example', expected a URL"):
        hub.snapshot("org/tiny")


def test_endpoint_that_is_no_hub(server, monkeypatch):
    monkeypatch.setattr("tests.checkpoints.hub_server.json.dumps", lambda _: "<html>")
    assert "does not answer as a hub" in fails(ConnectionError)


# Without a network


def test_offline_and_not_in_the_cache(server, monkeypatch):
    assert "local_files_only=True forbids the download" in fails(FileNotFoundError, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids the download" in fails(FileNotFoundError)
    assert server.requests == []


def test_no_network(server, monkeypatch, caplog):
    directory = hub.snapshot("org/tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    with caplog.at_level(logging.WARNING, "jaxlm"):
        assert hub.snapshot("org/tiny") == directory
    assert "using the copy in the cache" in caplog.text and url in caplog.text
    message = fails(ConnectionError, "org/other")
    assert f"not in the cache {constants.HF_HUB_CACHE}, and {url} cannot be reached" in message


def test_hub_out_of_order(server):
    server.status = 500
    assert "cannot be reached (HTTP 500" in fails(ConnectionError)


def half(server: Hub, name: str) -> int:
    """The next download of a file ends half way."""
    server.cuts[name] = len(server.repos["org/tiny"].files[name]) // 2
    return server.cuts[name]


def test_dropped_connection_goes_on_where_it_was(server, model):
    cut = half(server, "model.safetensors")
    loaded = jaxlm.load("org/tiny")
    np.testing.assert_array_equal(np.asarray(loaded(TOKENS)), np.asarray(model(TOKENS)))
    gets = [request for request in server.requests if request.file == "model.safetensors" and request.method == "GET"]
    begin = int(gets[1].range.removeprefix("bytes=").rstrip("-"))
    assert len(gets) == 2 and gets[0].range is None and cut - 4096 < begin <= cut


def test_interrupted_download_is_finished_later(server, shards, model, cache):
    server.repos["org/tiny"].files = dict(shards)
    names = sorted(name for name in shards if name.endswith(".safetensors"))
    half(server, names[-1])
    server.down_after_cut = True
    message = fails(ConnectionError)
    assert "the download stopped (HTTP 503" in message and "call again" in message and str(cache) in message
    arrived = weights(cache)
    assert names[-1] not in arrived
    # Nothing half done passes for a checkpoint.
    message = fails(FileNotFoundError, local_files_only=True)
    assert "was interrupted" in message and names[-1] in message
    assert "was interrupted" in fails(ConnectionError)  # the hub is still away
    server.status, server.down_after_cut = None, False
    server.requests.clear()
    loaded = jaxlm.load("org/tiny")
    np.testing.assert_array_equal(np.asarray(loaded(TOKENS)), np.asarray(model(TOKENS)))
    assert server.asked() == [name for name in names if name not in arrived]  # and what had arrived is not asked again


def test_interrupted_before_the_weights(server):
    half(server, "tokenizer.json")
    server.down_after_cut = True
    assert "the download stopped" in fails(ConnectionError)
    fails(FileNotFoundError, local_files_only=True)  # whichever of the small files have arrived
    server.status = None
    jaxlm.load("org/tiny")


# The command line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["info", "org/tiny"], "256 tokens, chat template"),
        (["generate", "org/tiny", "hello", "--max-new-tokens", "3"], ""),
        (["convert", "org/tiny", "OUT"], ""),
        pytest.param(["verify", "org/tiny", "--tokens", "20", "--new-tokens", "4"], "4 of 4", marks=pytest.mark.torch),
    ],
)
def test_command(server, capsys, tmp_path, contents, args, said):
    out = tmp_path / "out"
    assert main([str(out) if arg == "OUT" else arg for arg in args]) == 0
    assert said in capsys.readouterr().out
    if "OUT" in args:
        assert (out / "model.safetensors").read_bytes() == contents["model.safetensors"]
        assert (out / "tokenizer.json").read_bytes() == contents["tokenizer.json"]


def test_command_without_the_repository(server, capsys):
    assert main(["info", "org/missing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: org/missing: no such directory here")
    assert captured.err.count("\n") == 1
