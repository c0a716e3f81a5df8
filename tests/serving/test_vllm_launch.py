"""`vl2 serve --engine vllm`: what is executed, and what is refused before."""

import json
import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from vl2_jax import cli
from vl2_jax.errors import VL2Error
from vl2_jax.serving.vllm import launch


@pytest.fixture
def executed(monkeypatch):
    """Runs `vl2 serve ...` and returns (arguments, environment) of what this process would become."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(launch, "check_versions", lambda: None)
    monkeypatch.setenv("NEW_MODEL_DESIGN", "0")
    monkeypatch.delenv("VL2_API_KEY", raising=False)

    def run(*arguments):
        calls.clear()
        cli.main(["serve", *arguments, "--engine", "vllm"])
        ((program, told, environment),) = calls
        assert (program, *told[1:4]) == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
        return list(told[4:]), environment

    return run


def value(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def test_what_must_be_set_is_set(executed):
    arguments, environment = executed("vl2-nano")
    assert environment["NEW_MODEL_DESIGN"] == "1"
    assert arguments[0].endswith("nano")
    assert value(arguments, "--tokenizer-mode") == "vl2"
    assert int(value(arguments, "--block-size")) % 32 == 0
    assert int(value(arguments, "--max-num-batched-tokens")) >= 2048
    assert value(arguments, "--host") == "127.0.0.1"
    assert value(arguments, "--max-model-len") == "1024"
    assert value(arguments, "--dtype") == "bfloat16"
    assert "--disable-chunked-mm-input" in arguments
    told = json.loads(value(arguments, "--additional-config"))
    assert told["sharding"]["sharding_strategy"] == {"enable_dp_attention": True, "attn_dp_size": 1}
    assert told["vl2"] == {"model": arguments[0], "verify": True}


def test_flags_are_handed_on(executed, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    arguments, environment = executed(
        "vl2-nano", "--mesh", "expert=3", "--weights", "int8", "--dtype", "float32", "--max-num-seqs", "32",
        "--no-enable-prefix-caching", "--api-key-file", str(key), "--served-model-name", "a",
        "--served-model-name", "b", "--allowed-media-domains", "Images.example.org",
        "--limit-mm-per-prompt", '{"image": 2}', "--port", "81",
        "--no-verify",
    )  # fmt: skip
    told = json.loads(value(arguments, "--additional-config"))
    assert told["vl2"] == {"model": arguments[0], "weights": "int8", "verify": False}
    assert told["sharding"]["sharding_strategy"]["attn_dp_size"] == 3
    assert value(arguments, "--tensor-parallel-size") == "3"
    assert value(arguments, "--dtype") == "float32"
    assert value(arguments, "--max-num-seqs") == "32"
    assert "--no-enable-prefix-caching" in arguments
    assert arguments[arguments.index("--served-model-name") + 1 :][:2] == ["a", "b"]
    assert value(arguments, "--allowed-media-domains") == "images.example.org"
    assert json.loads(value(arguments, "--limit-mm-per-prompt")) == {"image": 2}
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(arguments)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num-pages", "9"], "knows no --num-pages"),
        (["--honor-detail"], "knows no --honor-detail"),
        (["--mesh", "tensor=2"], "--mesh is 'tensor=2'; with --engine vllm it is expert=N"),
        (["--mesh", "expert=4"], "divide the 6 heads of this model, not 4"),
        (["--api-key", "a", "--api-key", "b"], "takes one key"),
        (["--max-model-len", "4096"], "context holds 1024"),
        (["--port", "70000"], "0 to 65535"),
        (["--allowed-media-domains", "a/b"], "name of a host"),
    ],
)
def test_what_it_cannot_honour_is_refused(executed, capsys, flags, told):
    with pytest.raises(SystemExit):
        executed("vl2-nano", *flags)
    assert told in " ".join(capsys.readouterr().err.split())


def test_other_versions_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    launch.check_versions(launch.VERSIONS.__getitem__)
    with pytest.raises(VL2Error, match=r"for vllm-tpu 0\.32\.0 and not for 0\.33\.0, which is .*pip install"):
        launch.check_versions(lambda name: "0.33.0")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    with pytest.raises(VL2Error, match=r"needs vllm-tpu 0\.32\.0, which is not installed"):
        launch.check_versions(missing)
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    with pytest.raises(VL2Error, match=r"needs Python 3\.12 and this is 3\.11"):
        launch.check_versions(launch.VERSIONS.__getitem__)


def test_versions_are_those_of_the_extra():
    wanted = {f"{name}=={version}" for name, version in launch.VERSIONS.items()}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert wanted <= set(project["optional-dependencies"]["vllm"])
    assert project["entry-points"]["vllm.general_plugins"] == {"vl2": "vl2_jax.serving.vllm.plugin:register"}
