"""Tests the config: its checks, its file in the workdir, and the comparison of two runs."""

import json

import pytest

from avb_tf import configuration
from avb_tf.errors import UserError
from avb_tf.settings import methods, run


def changed(name, value, method="avb_ac"):
    """Returns a config with one field, given by its dotted name, set to `value`."""
    config = configuration.default(method)
    config.update_from_flattened_dict({name: value})
    return config


def digest(config):
    return configuration.digest(configuration.resolve(config))


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_a_valid_default(method):
    config = configuration.default(method)
    configuration.validate(config)
    assert config.model.to_dict() == methods.settings(method)


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="'wdith'"):
        configuration.default("vae", wdith=3)


def test_a_loaded_config_equals_the_saved_one(tmp_path):
    config = changed("model.filters", (4, 8, 16))
    configuration.save(config, tmp_path / "runs/new")
    loaded = configuration.load(tmp_path / "runs/new")
    assert loaded.to_dict() == config.to_dict()
    assert loaded.model.filters == (4, 8, 16)
    assert isinstance(loaded.model.filters, tuple)
    assert configuration.read(tmp_path / "runs/new") == configuration.resolve(config)
    assert [path.name for path in (tmp_path / "runs/new").iterdir()] == [configuration.FILE]
    assert digest(loaded) == digest(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "other"),
        ("method", "avb"),
        ("steps", 11_000),
        ("model.filters", (32, 65)),
        ("model.seed", 1),
        ("data.seed", 1),
        ("optimizer.final", 0.03),
        ("keep_checkpoints", 4),
    ],
)
def test_another_run_is_refused_with_its_first_difference(tmp_path, name, value):
    config = configuration.default("avb_ac")
    configuration.save(config, tmp_path)
    before = (tmp_path / configuration.FILE).read_bytes()
    other = changed(name, value)
    assert digest(other) != digest(config)
    with pytest.raises(UserError, match=rf"config\.{name} = .*, found .*choose another --workdir"):
        configuration.save(other, tmp_path)
    assert (tmp_path / configuration.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"), [("eval.split", "train"), ("eval.grid", 50), ("data.path", "moved")]
)
def test_fields_that_a_later_command_may_change(tmp_path, name, value):
    configuration.save(configuration.default("avb_ac"), tmp_path)
    other = changed(name, value)
    assert digest(other) == digest(configuration.default("avb_ac"))
    configuration.save(other, tmp_path)
    assert configuration.load(tmp_path).to_dict() == other.to_dict()


def test_the_digest_does_not_depend_on_order():
    plain = configuration.resolve(configuration.default("vae"))
    backwards = {k: plain[k] for k in reversed(plain)}
    assert configuration.digest(backwards) == configuration.digest(plain)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda plain: plain.pop("optimizer"), "config has no field 'optimizer'"),
        (lambda plain: plain["data"].pop("seed"), "config.data has no field 'seed'"),
        (lambda plain: plain.update(colour="red"), "config has an unknown field 'colour'"),
        (lambda plain: plain.update(model=3), "config.model is 3"),
        (lambda plain: plain.update(steps=2.5), "config.steps is 2.5"),
        (lambda plain: plain.update(steps=True), "config.steps is True"),
        (lambda plain: plain["data"].update(path=None), "config.data.path is None"),
        (lambda plain: plain["model"].update(filters="many"), "config.model.filters is 'many'"),
    ],
)
def test_a_damaged_file_is_named_with_its_first_fault(tmp_path, damage, fault):
    plain = configuration.resolve(configuration.default("vae"))
    damage(plain)
    (tmp_path / configuration.FILE).write_text(json.dumps(plain))
    with pytest.raises(UserError) as caught:
        configuration.load(tmp_path)
    assert str(tmp_path / configuration.FILE) in str(caught.value)
    assert fault in str(caught.value)


def test_an_int_is_accepted_as_a_float(tmp_path):
    plain = configuration.resolve(configuration.default("vae"))
    plain["optimizer"]["clip_norm"] = 5
    (tmp_path / configuration.FILE).write_text(json.dumps(plain))
    assert configuration.load(tmp_path).optimizer.clip_norm == 5.0


def test_a_budget_sets_the_sizes_that_the_config_leaves_open():
    settings = configuration.default("vae").eval
    assert run.sizes(settings) == run.BUDGETS["standard"]
    settings.budget = "paper"
    settings.subset, settings.ais.chains = 7, 3
    sizes = run.sizes(settings)
    own = {"subset": 7, "ais.chains": 3}
    assert sizes == run.BUDGETS["paper"] | own
    authors = {"subset": 320, "ais.temperatures": 2000, "ais.chains": 8, "ais.leapfrog_steps": 30}
    assert all(run.BUDGETS["paper"][name] >= size for name, size in authors.items())
    for name, size in run.BUDGETS["quick"].items():
        assert size <= run.BUDGETS["standard"][name] <= run.BUDGETS["paper"][name]


@pytest.mark.parametrize(
    ("name", "value"),
    [("eval.budget", "huge"), ("eval.subset", -2), ("eval.ais.chains", 0), ("eval.repeats", 0)],
)
def test_sizes_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"config\.{name} is "):
        configuration.validate(changed(name, value))
