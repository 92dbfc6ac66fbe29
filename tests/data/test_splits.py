"""Our reading of the split syntax against tensorflow-datasets' own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax.data import splits

SIZES = {"train": 1438, "test": 359}


def ours(split):
    return splits.resolve(splits.parse(split), SIZES)


def theirs(split):
    import tensorflow_datasets as tfds

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
        for name, size in SIZES.items()
    }
    # `all` is only known to the base class of ReadInstruction.
    absolute = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    return tuple(
        splits.Interval(
            part.splitname, part.from_ or 0, SIZES[part.splitname] if part.to is None else part.to
        )
        for part in absolute
    )


@pytest.mark.parametrize(
    "split",
    [
        "train",
        "test[:80%]",
        "test[80%:]",
        "train[:1000]",
        "train[1_000:]",
        "train[10%:20%]+test",
        "train + test[:10]",
        "test[-100:]",
        "test[-10%:]",
        "train[:-10%]",
        "train[10:20%]",
        "train[33.3%:66.6%]",
        "train[:.5%]",
        "all",
        "all+test[:5]",
    ],
)
def test_known_forms(split):
    assert ours(split) == theirs(split)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SIZES)),
    st.one_of(st.just(""), st.integers(-1500, 1500).map(str), st.integers(-101, 101).map(str)),
    st.one_of(st.just(""), st.integers(-1500, 1500).map(str), st.integers(-101, 101).map(str)),
    st.sampled_from(["", "%"]),
)
def test_any_slice_means_the_same(name, start, stop, unit):
    split = f"{name}[{start}{unit if start else ''}:{stop}{unit if stop else ''}]"
    try:
        expected = theirs(split)
    except ValueError:
        expected = None
    if expected is None or expected[0].start >= expected[0].stop:
        # Empty slices, which tensorflow-datasets lets through, are errors here.
        with pytest.raises(ValueError, match=r"data\.load"):
            ours(split)
    else:
        assert ours(split) == expected


@pytest.mark.parametrize(
    "split",
    ["", "train[", "train[5]", "train[:]", "train[1:2:3]", "train[:1.5]", "train[:2shard]",
     "all[:5]", "train+", "train[a:b]", "train[:--5]", "train[:1__0]"],
)  # fmt: skip
def test_what_is_not_a_split(split):
    with pytest.raises(ValueError, match="cannot read the split"):
        splits.parse(split)


def test_a_bound_beyond_the_split():
    with pytest.raises(ValueError, match="'test' has 359 examples, got the bound 1000"):
        ours("test[:1000]")
    with pytest.raises(ValueError, match="got the bound 200%"):
        ours("test[:200%]")


def test_an_empty_slice():
    with pytest.raises(ValueError, match="nothing lies from example 20 to 10"):
        ours("test[20:10]")
