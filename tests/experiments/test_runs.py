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


def test_a_zoo_of_a_newer_version(tmp_path):
    io.write_json(tmp_path / "config.json", {"study": zoo.STUDY, "model": "mlp", "depth": 3})
    with pytest.raises(ValueError, match=r"another version of advjax: .* no setting 'depth'"):
        zoo.read_config(tmp_path)
