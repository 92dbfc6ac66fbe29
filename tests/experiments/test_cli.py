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
