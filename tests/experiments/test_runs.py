"""Run folders: whose they are."""

import dataclasses

import pytest

from advjax.core import io
from advjax.experiments import runs, zoo


@dataclasses.dataclass(frozen=True)
class Older:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Newer:
    size: int = 3
    shape: tuple[int, ...] = (1, 2)
    options: dict = dataclasses.field(default_factory=dict)


def test_a_field_younger_than_the_folder_has_its_default(tmp_path):
    def opened(config):
        return runs.Run(tmp_path, config, study="s", key_columns=("name",))

    opened(Older()).append([{"name": "a"}])
    assert opened(Newer()).rows == [{"name": "a"}]
    with pytest.raises(ValueError, match=r"shape was \[1, 2\] and is now \[2\]; use another"):
        opened(Newer(shape=(2,)))
    with pytest.raises(ValueError, match="size was 3 and is now 4; use another"):
        opened(Newer(size=4))


@dataclasses.dataclass(frozen=True)
class Changed:
    """A version whose default is not what programs did before."""

    size: int = 3
    per_batch: bool | None = dataclasses.field(default=None, metadata={"before": False})


def test_a_field_younger_than_the_folder_may_have_meant_something_else(tmp_path):
    def opened(config):
        return runs.Run(tmp_path, config, study="s", key_columns=("name",))

    opened(Older()).append([{"name": "a"}])
    with pytest.raises(ValueError, match="per_batch was False and is now None; use another"):
        opened(Changed())
    assert opened(Changed(per_batch=False)).rows == [{"name": "a"}]


def test_a_folder_without_results_is_nobodys(tmp_path):
    def opened(config):
        return runs.Run(tmp_path, config, study="s", key_columns=("name",))

    opened(Older(4))  # such as a run whose network did not suit the data
    opened(Older(5)).append([{"name": "a"}])
    with pytest.raises(ValueError, match="size was 5 and is now 4; use another"):
        opened(Older(4))


def test_the_manifest_is_of_the_runs_that_computed(tmp_path):
    def run(names):
        opened = runs.Run(tmp_path, Older(), study="s", key_columns=("name",))
        opened.append({"name": name} for name in names)
        opened.finish(0)
        return io.read_json(tmp_path / "manifest.json")

    first = run("a")
    assert run("a") == first and "earlier" not in first
    second = run("ab")
    assert second["earlier"] == [first]
    assert run("ab") == second
    third = run("abc")
    assert [manifest["started"] for manifest in third.pop("earlier")] == [
        first["started"], second["started"]
    ]  # fmt: skip
    assert third["started"] > second["started"]
    (tmp_path / "manifest.json").write_text("{")
    assert run("abcd")["seed"] == 0


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    runs.Run("~/study", Older(), study="s", key_columns=("name",))
    assert (tmp_path / "study" / "config.json").exists()


def test_a_zoo_of_a_newer_version(tmp_path):
    io.write_json(tmp_path / "config.json", {"study": zoo.STUDY, "model": "mlp", "depth": 3})
    with pytest.raises(ValueError, match=r"another version of advjax: .* no setting 'depth'"):
        zoo.read_config(tmp_path)
