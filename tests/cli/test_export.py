"""What `vl2 export` takes of a run."""

import pytest

from vl2_jax.cli import main


@pytest.fixture
def exported(monkeypatch, tmp_path):
    """A run, and what was asked of it."""
    asked = []
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vl2_jax.training.export.export_run", lambda *arguments: asked.append(arguments) or 7)
    return asked


@pytest.mark.parametrize(("flags", "step"), [([], None), (["--step", "12"], 12), (["--step", "best"], "best")])
def test_a_step_is_a_number_or_the_best(exported, capsys, flags, step):
    main(["export", "run", "there", "--dtype", "bfloat16", "--adapters", *flags])
    ((source, destination, _, *options),) = exported
    assert (str(source), str(destination), options) == ("run", "there", ["bfloat16", True, step])
    assert capsys.readouterr().err == "exported step 7 of run to there\n"


def test_a_destination_on_a_bucket_keeps_its_address(exported):
    main(["export", "run", "gs://bucket/there"])
    assert str(exported[0][1]) == "gs://bucket/there"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run there --step last", "--step is 'last'; expected the number of a step, or best"),
        ("run there --step -1", "--step is '-1'"),
        ("nowhere there --step best", "'nowhere' is not the folder of a training run"),
    ],
)
def test_a_step_that_is_none_is_refused(exported, capsys, command, message):
    with pytest.raises(SystemExit) as caught:
        main(["export", *command.split()])
    assert caught.value.code == 1
    assert message in capsys.readouterr().err
    assert exported == []
