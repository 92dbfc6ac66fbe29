"""Our builders on small archives in the official formats: prepared, stored and read back."""

import functools
import gzip
import hashlib
import http.server
import io
import pathlib
import struct
import sys
import tarfile
import threading
import zipfile

import numpy as np
import PIL.Image
import pytest

from advjax import data
from advjax.data import catalogue, download, formats

RNG = np.random.RandomState(0)


def idx_images(images):
    return gzip.compress(struct.pack(">4I", 0x803, *images.shape[:3]) + images.tobytes())


def idx_labels(labels):
    return gzip.compress(struct.pack(">2I", 0x801, len(labels)) + bytes(map(int, labels)))


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def encoded(image, encoding, **options):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, encoding, **options)
    return buffer.getvalue()


def pixels(*shape):
    return RNG.randint(0, 256, shape).astype(np.uint8)


@pytest.fixture
def serve(monkeypatch):
    """Makes local files the official files of a set: reachable, and with these checksums."""
    import tensorflow_datasets as tfds

    def serve(name, paths):
        archives = catalogue.spec_of(name).archives
        by_url = {archives[path.name].url: path for path in paths}
        for path in paths:
            digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
            entry = catalogue.Archive(archives[path.name].url, digest)
            monkeypatch.setitem(archives, path.name, entry)
        monkeypatch.setattr(download, "probe", lambda url: None)
        monkeypatch.setattr(
            tfds.download.DownloadManager,
            "download",
            lambda self, urls: {file: by_url[url] for file, url in urls.items()},
        )

    return serve


@pytest.fixture
def load(tmp_path):
    """`data.load` with folders of its own."""

    def load(name, split, **options):
        return data.load(
            name, split, data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache", **options
        )

    return load


@pytest.fixture
def mnist_files(tmp_path):
    images, labels = pixels(17, 28, 28, 1), RNG.randint(0, 10, 17)
    paths = []
    for stem, part in (("train", slice(0, 12)), ("t10k", slice(12, 17))):
        paths += [
            tmp_path / f"{stem}-images-idx3-ubyte.gz",
            tmp_path / f"{stem}-labels-idx1-ubyte.gz",
        ]
        paths[-2].write_bytes(idx_images(images[part]))
        paths[-1].write_bytes(idx_labels(labels[part]))
    return paths, images, labels


def test_mnist_keeps_pixels_and_order(serve, load, mnist_files):
    paths, images, labels = mnist_files
    serve("mnist", paths)
    every = load("mnist", "train+test")
    np.testing.assert_array_equal(every.images, images)
    np.testing.assert_array_equal(every.labels, labels)
    assert "tensorflow" not in sys.modules


def test_what_we_prepare_is_read_by_plain_tfds(serve, load, mnist_files, tmp_path):
    import tensorflow_datasets as tfds

    paths, images, _ = mnist_files
    serve("mnist", paths)
    load("mnist", "test")
    builder = tfds.builder("mnist", data_dir=tmp_path / "tfds", file_format="array_record")
    records = builder.as_data_source(split="train[:25%]")
    np.testing.assert_array_equal([record["image"] for record in records], images[:3])


def test_emnist_is_turned_upright(serve, load, tmp_path):
    upright, labels = pixels(9, 28, 28, 1), RNG.randint(0, 62, 9)
    sideways = np.ascontiguousarray(upright.swapaxes(1, 2))
    members = {}
    for split, part in (("train", slice(0, 6)), ("test", slice(6, 9))):
        stem = f"gzip/emnist-byclass-{split}"
        members[f"{stem}-images-idx3-ubyte.gz"] = idx_images(sideways[part])
        members[f"{stem}-labels-idx1-ubyte.gz"] = idx_labels(labels[part])
    serve("emnist", [write_zip(tmp_path / "gzip.zip", members)])
    every = load("emnist", "all")
    np.testing.assert_array_equal(every.images, upright)
    np.testing.assert_array_equal(every.labels, labels)
    assert every.class_names[36] == "a"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_keeps_pixels_and_order(serve, load, tmp_path, name):
    images = pixels(12, 32, 32, 3)
    labels = RNG.randint(0, data.info(name).num_classes, 12)
    coarse = [bytes([index % 20]) if name == "cifar100" else b"" for index in range(12)]
    records = [
        coarse[index] + bytes([labels[index]]) + images[index].transpose(2, 0, 1).tobytes()
        for index in range(12)
    ]
    if name == "cifar10":
        members = {
            f"cifar-10-batches-bin/data_batch_{index + 1}.bin": b"".join(records[2 * index :][:2])
            for index in range(5)
        }
        members["cifar-10-batches-bin/test_batch.bin"] = b"".join(records[10:])
        path = write_tar(tmp_path / "cifar-10-binary.tar.gz", members)
    else:
        members = {
            "cifar-100-binary/test.bin": b"".join(records[10:]),
            "cifar-100-binary/train.bin": b"".join(records[:10]),
        }
        path = write_tar(tmp_path / "cifar-100-binary.tar.gz", members)
    serve(name, [path])
    every = load(name, "train+test")
    np.testing.assert_array_equal(every.images, images)
    np.testing.assert_array_equal(every.labels, labels)


def test_gtsrb_resizes_whole_images(serve, load, tmp_path):
    # One colour an image, so that any faithful resizing gives it back.
    colours = pixels(8, 3)
    images = [np.tile(colour, (20 + index, 45, 1)) for index, colour in enumerate(colours)]
    labels = [0, 7, 7, 42, 1, 2, 3, 4]
    train = {
        f"GTSRB/Final_Training/Images/{labels[index]:05d}/{index:05d}_00000.ppm": encoded(
            images[index], "PPM"
        )
        for index in range(5)
    }
    train["GTSRB/Final_Training/Images/00000/GT-00000.csv"] = b"Filename;Width\n"
    test = {
        f"GTSRB/Final_Test/Images/{index:05d}.ppm": encoded(images[index], "PPM")
        for index in range(5, 8)
    }
    rows = "".join(f"{index:05d}.ppm;45;20;0;0;9;9;{labels[index]}\n" for index in range(5, 8))
    truth = f"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n{rows}"
    serve(
        "gtsrb",
        [
            write_zip(tmp_path / "GTSRB_Final_Training_Images.zip", train),
            write_zip(tmp_path / "GTSRB_Final_Test_Images.zip", test),
            write_zip(tmp_path / "GTSRB_Final_Test_GT.zip", {"GT-final_test.csv": truth.encode()}),
        ],
    )
    for split, part in (("train", range(5)), ("test", range(5, 8))):
        dataset = load("gtsrb", split)
        assert dataset.images.shape == (len(part), 32, 32, 3)
        assert (dataset.images == dataset.images[:, :1, :1]).all()
        found = {(*image[0, 0], label) for image, label in zip(*pair(dataset), strict=True)}
        assert found == {(*colours[index], labels[index]) for index in part}


@pytest.mark.parametrize(("image_size", "archive_size"), [(24, 160), (161, 320)])
def test_imagenette_is_cut_to_its_middle(serve, load, tmp_path, image_size, archive_size):
    # A grey square between black margins: only the square may remain.
    wide = np.zeros((170, 250, 3), np.uint8)
    wide[:, 40:-40] = 200
    stem = f"imagenette2-{archive_size}"
    picture = encoded(wide, "JPEG", quality=95)
    members = {
        f"{stem}/train/n01440764/n01440764_10.JPEG": picture,
        f"{stem}/train/n03888257/ILSVRC2012_val_00000001.JPEG": picture,
        f"{stem}/val/n03000684/n03000684_2.JPEG": picture,
        f"{stem}/noise.csv": b"path,label\n",
    }
    serve("imagenet10", [write_tar(tmp_path / f"{stem}.tgz", members)])
    train = load("imagenet10", "train", image_size=image_size)
    assert train.images.shape == (2, image_size, image_size, 3)
    assert sorted(train.labels) == [0, 9]
    # JPEG rings at the margin's edge; beyond it the square is even.
    assert abs(train.images[:, :, 8:-8].astype(int) - 200).max() <= 8
    for split in ("validation", "test"):
        held_out = load("imagenet10", split, image_size=image_size)
        assert held_out.class_names[held_out.labels[0]] == "chain saw"


def pair(dataset):
    return dataset.images, dataset.labels


def test_a_wrong_file_is_refused(serve, load, mnist_files, tmp_path):
    paths, _, _ = mnist_files
    serve("mnist", paths)
    paths[2].write_bytes(b"an error page of a captive portal")
    with pytest.raises(
        ValueError, match=r"t10k-images.* is not the official .*; delete it"
    ) as info:
        load("mnist", "test")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "tfds/mnist/3.0.1").exists()
    assert not (tmp_path / "cache").exists()


def test_a_checksum_that_tfds_itself_refuses(serve, load, mnist_files, monkeypatch):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager

    def refuse(*args):
        raise download_manager.NonMatchingChecksumError("Artifact ...\n* Expected ...")

    serve("mnist", mnist_files[0])
    monkeypatch.setattr(tfds.download.DownloadManager, "download", refuse)
    with pytest.raises(ValueError, match="a file of mnist came with another content"):
        load("mnist", "test")


def test_the_whole_way_from_a_server(load, mnist_files, monkeypatch):
    """Probe, tensorflow-datasets' own downloader, checksum, preparing: over the loopback."""
    paths, images, _ = mnist_files
    handler = functools.partial(QuietHandler, directory=str(paths[0].parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    archives = catalogue.spec_of("mnist").archives
    for path in paths:
        digest = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setitem(archives, path.name, catalogue.Archive(url, digest))
    try:
        np.testing.assert_array_equal(load("mnist", "all").images, images)
        assert "tensorflow" not in sys.modules
    finally:
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_files_that_do_not_belong_together():
    images, labels = idx_images(pixels(3, 2, 2)), idx_labels([0, 1])
    with pytest.raises(ValueError, match="as many images as labels, got 3 and 2"):
        next(formats.idx_pair(io.BytesIO(images), io.BytesIO(labels)))
    with pytest.raises(ValueError, match="need files of kind 2051 and 2049, got 2049 and 2051"):
        next(formats.idx_pair(io.BytesIO(labels), io.BytesIO(images)))


def test_cifar_with_half_a_record(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", {"test.bin": b"x" * 5000})
    with pytest.raises(ValueError, match=r"records of 3073 bytes in test\.bin, got 5000"):
        next(formats.cifar_binary(path, ["test.bin"], ["label"]))


def test_nothing_is_unpacked(tmp_path):
    """Archives are read in place, so a member that climbs out of its folder writes nothing."""
    folder = tmp_path / "inner"
    folder.mkdir()
    members = {
        "../evil.ppm": b"x",
        "GTSRB/Final_Training/Images/00001/../../../../../evil.ppm": b"x",
        "GTSRB/Final_Training/Images/00001/00000_00001.ppm": b"picture",
    }
    path = write_zip(folder / "train.zip", members)
    assert list(formats.gtsrb_train(path)) == [
        ("00001/00000_00001", {"image": b"picture", "label": 1})
    ]
    tar = write_tar(folder / "a.tgz", {"x/train/n01440764/../../evil.JPEG": b"x"})
    assert not list(formats.imagenette(tar, "train", ["n01440764"]))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tgz", "inner", "train.zip"]


def test_every_downloadable_set_has_a_builder_and_tfds_agrees_on_the_checksums():
    from tensorflow_datasets.core.download import checksums

    from advjax.data import builders

    assert {*builders.BUILDERS, "digits"} == set(data.NAMES)
    known = checksums.get_all_url_infos()
    for name in ("mnist", "cifar10", "cifar100", "emnist"):
        for archive in catalogue.spec_of(name).archives.values():
            assert archive.digest == f"sha256:{known[archive.url].checksum}"


def test_versions_and_features_are_those_of_tfds():
    import tensorflow_datasets as tfds

    from advjax.data import builders

    for name, config in (("mnist", ""), ("cifar10", ""), ("cifar100", ""), ("emnist", "/byclass")):
        theirs = tfds.builder(f"{name}{config}", file_format="array_record").info
        ours = builders.BUILDERS[name](data_dir=pathlib.Path("absent")).info
        assert ours.version == theirs.version
        assert set(ours.features) == set(theirs.features)
        assert ours.features["image"].shape == theirs.features["image"].shape
        assert ours.features["label"].num_classes == theirs.features["label"].num_classes
