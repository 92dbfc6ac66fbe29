"""Flags whose values are more than a number."""

import pytest

from advjax.experiments import cli


def test_options_by_owner():
    text = "badnets.size=5,badnets.value=[1, 1,0.5],bpp.dithering=True, blind.balance=mgda"
    assert cli.parse_options("options", text) == {
        "badnets": {"size": 5, "value": [1, 1, 0.5]},
        "bpp": {"dithering": True},
        "blind": {"balance": "mgda"},
    }
    assert cli.parse_options("options", "") == {}
    with pytest.raises(ValueError, match=r"--options: need ATTACK.NAME=VALUE .* got 'size=5'"):
        cli.parse_options("options", "size=5")


def test_fields():
    text = "use_norm=false, stages=[1, (2,2)],width=8,dropout_rate=.5,form=auto"
    assert cli.parse_fields("model_options", text) == {
        "use_norm": False, "stages": [1, (2, 2)], "width": 8, "dropout_rate": 0.5, "form": "auto",
    }  # fmt: skip
    assert cli.parse_fields("model_options", "") == {}
    for wrong in ("use_norm", "=3", "a b=1"):
        with pytest.raises(ValueError, match=f"--model_options: need NAME=VALUE .* got '{wrong}'"):
            cli.parse_fields("model_options", wrong)
