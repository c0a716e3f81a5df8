"""`vl2 serve --engine vllm`: what is executed, and what is refused before."""

import dataclasses
import json
import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from vl2_jax import cli
from vl2_jax.cli.flags import ModelFlags
from vl2_jax.cli.serve import DoorFlags, LimitFlags
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
        (["--cache", "int8"], "knows no --cache"),
        (["--cache", "nonsense"], "knows no --cache"),
        (["--override-generation-config", "nonsense"], "expected a JSON object"),
        (["--override-generation-config", '{"beams": 2}'], "'beams', which is no option"),
        (
            ["--override-generation-config", '{"max_tokens": 9}'],
            "'max_tokens', which --engine vllm takes",
        ),
        (["--override-generation-config", '{"ignore_eos": true}'], "'ignore_eos', which"),
        (["--override-generation-config", '{"min_tokens": 2}'], "'min_tokens', which"),
        (["--drain-seconds", "inf"], "--drain-seconds is inf"),
        (["--drain-seconds", "nan"], "--drain-seconds is nan"),
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


EXAMPLES = {  # of every flag, one that is not its default
    "adapters": ["--adapters", "somewhere"], "merge": ["--merge"], "no_merge": ["--no-merge"],
    "dtype": ["--dtype", "float32"], "weights": ["--weights", "int8"], "cache": ["--cache", "int8"],
    "chunk_size": ["--chunk-size", "64"], "verify": ["--no-verify"], "max_model_len": ["--max-model-len", "512"],
    "max_num_seqs": ["--max-num-seqs", "3"], "max_num_queued_reqs": ["--max-num-queued-reqs", "3"],
    "max_num_queued_tokens": ["--max-num-queued-tokens", "3"], "num_pages": ["--num-pages", "9"],
    "enable_prefix_caching": ["--no-enable-prefix-caching"], "host": ["--host", "::1"], "port": ["--port", "81"],
    "api_key": ["--api-key", "secret"], "api_key_file": ["--api-key-file", "key"],
    "served_model_name": ["--served-model-name", "a"], "allowed_media_domains": ["--allowed-media-domains", "a.org"],
    "limit_mm_per_prompt": ["--limit-mm-per-prompt", '{"image": 2}'], "honor_detail": ["--honor-detail"],
    "override_generation_config": ["--override-generation-config", '{"temperature": 0}'],
    "max_body_bytes": ["--max-body-bytes", "4096"], "drain_seconds": ["--drain-seconds", "5"],
}  # fmt: skip
FIELDS = [field.name for group in (ModelFlags, LimitFlags, DoorFlags) for field in dataclasses.fields(group)]


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "model"])
def test_no_flag_is_swallowed(executed, capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("key").write_text("secret")
    usual = executed("vl2-nano")
    try:
        assert executed("vl2-nano", *EXAMPLES[name]) != usual
    except SystemExit:
        assert f"knows no {EXAMPLES[name][0]}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "key", "is_told"),
    [
        (["--host", "0.0.0.0"], "", True),
        (["--host", "0.0.0.0", "--api-key", "a"], "", False),
        (["--host", "0.0.0.0"], "vLLM's own", False),
        ([], "", False),
    ],
)
def test_a_server_that_everybody_may_ask_is_told_of(executed, capsys, monkeypatch, flags, key, is_told):
    monkeypatch.setenv("VLLM_API_KEY", key)
    executed("vl2-nano", *flags)
    assert ("whoever reaches 0.0.0.0:8000 may ask" in capsys.readouterr().err) == is_told


def test_a_bucket_that_cannot_be_read_is_not_told_as_a_folder(monkeypatch, tmp_path):
    class Unreadable(type(Path())):
        def read_bytes(self):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(launch, "is_remote", lambda path: True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VL2Error, match=rf"^{tmp_path}/config.json cannot be read \(.*Permission denied\)"):
        launch._head_of(Unreadable(tmp_path))


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
