"""The line that adds an extra, for every way in which this package can have been installed."""

import json
import shlex
from importlib import metadata

import pytest

from vl2_jax import installation
from vl2_jax.installation import install_line

WHEEL = "vl2_jax-0.1.0-py3-none-any.whl"
REQUIRES = (
    "numpy>=2",
    'grain>=0.2; extra == "train"',
    "tensorboardX>=2; extra == 'train'",
    'vl2-jax[tpu]; extra == "plan"',
    'matplotlib>=3.9; extra == "plan"',
    'jax[tpu]>=0.10; python_version > "3" and extra == "tpu"',
)


class Installed:
    requires = REQUIRES

    def __init__(self, **direct_url):
        self._direct_url = json.dumps(direct_url) if direct_url else None

    def read_text(self, name):
        assert name == "direct_url.json"
        return self._direct_url


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretends an installation, in a place that is no checkout."""
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "site-packages" / "vl2_jax" / "installation.py"))
    return lambda **url: monkeypatch.setattr(metadata, "distribution", lambda _: Installed(**url))


def test_an_editable_checkout_is_installed_again_where_it_is(installed, tmp_path):
    installed(url=tmp_path.as_uri(), dir_info={"editable": True})
    assert install_line("train", "gcs") == f"pip install -e '{tmp_path}[train,gcs]'"


def test_a_directory_stays_as_it_was_installed(installed, tmp_path):
    installed(url=tmp_path.as_uri(), dir_info={})
    assert install_line("train") == f"pip install '{tmp_path}[train]'"


def test_a_wheel_keeps_its_path_with_blanks_and_apostrophes(installed, tmp_path):
    wheel = tmp_path / "it's my folder" / WHEEL
    wheel.parent.mkdir()
    wheel.touch()
    installed(url=wheel.as_uri(), archive_info={})
    assert shlex.split(install_line("train")) == ["pip", "install", f"{wheel}[train]"]


def test_a_wheel_that_is_gone_is_not_named(installed, tmp_path):
    installed(url=(tmp_path / WHEEL).as_uri(), archive_info={})
    assert install_line("train") == "pip install 'grain>=0.2' 'tensorboardX>=2'"


def test_a_wheel_elsewhere_is_named_by_its_address(installed):
    installed(url=f"https://example.org/{WHEEL}", archive_info={"hash": "sha256=0"})
    assert install_line("tpu") == f"pip install 'vl2-jax[tpu] @ https://example.org/{WHEEL}'"


@pytest.mark.parametrize(
    "url", ["https://example.org/mine.git", "ssh://git@example.org/mine.git", "file:///srv/mine.git"]
)
def test_a_repository_is_named_with_its_commit(installed, url):
    installed(url=url, vcs_info={"vcs": "git", "requested_revision": "main", "commit_id": "0123abc"})
    assert install_line("tpu") == f"pip install 'vl2-jax[tpu] @ git+{url}@0123abc'"


def test_a_folder_of_a_repository_is_kept(installed):
    url = "https://example.org/mine.git"
    installed(url=url, vcs_info={"vcs": "git", "commit_id": "0123abc"}, subdirectory="jax")
    assert install_line("tpu") == f"pip install 'vl2-jax[tpu] @ git+{url}@0123abc#subdirectory=jax'"


def test_where_nothing_tells_the_packages_are_named_themselves(installed):
    installed()
    assert install_line("plan") == "pip install 'jax[tpu]>=0.10' 'matplotlib>=3.9'"


def test_code_that_is_neither_installed_nor_a_checkout_says_that_a_checkout_is_needed(installed, monkeypatch):
    def missing(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_line("train") == "pip install -e 'CHECKOUT_OF_THIS_PROJECT[train]'"
