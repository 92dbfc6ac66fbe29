"""The facts about every data set: shape, classes, where it lies, what the official files are.

The checksums are those of tensorflow-datasets' own tables (SHA-256); GTSRB is not in them and has
the MD5 sums that torchvision and others publish. Each was found in at least two places.
"""

import dataclasses
import string

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
_GTSRB = (
    *(f"speed limit {limit} km/h" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80 km/h",
    *(f"speed limit {limit} km/h" for limit in (100, 120)),
    "no passing",
    "no passing for vehicles over 3.5 t",
    "right of way at the next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no vehicles over 3.5 t",
    "no entry",
    "general caution",
    "dangerous curve to the left",
    "dangerous curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice or snow",
    "wild animals crossing",
    "end of all speed and passing limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout mandatory",
    "end of no passing",
    "end of no passing for vehicles over 3.5 t",
)
# ImageNet's folder names, in the order of the labels.
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
# The smaller archive has a short side of 160 pixels; larger images are cut from the other.
_SMALL_IMAGENETTE = 160
_DEFAULT_IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official file: where it is and what its content hashes to (`algorithm:hex`)."""

    url: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read.

    Args:
      name: the name users write.
      folder: its folder below the tensorflow-datasets directory, without the version.
      image_shape: height, width and channels.
      class_names: one name a class.
      splits: the base splits of the complete set.
      archives: the official files, by a short name.
      aliases: other names that a base split may be asked for by.
      is_transposed: whether the stored images lie on their side.
      is_resized: whether the stored images have any size and are cut and resized when read.
    """

    name: str
    folder: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")
    archives: dict[str, Archive] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    is_transposed: bool = False
    is_resized: bool = False


def _archives(base_url: str, digests: dict[str, str]) -> dict[str, Archive]:
    return {file: Archive(base_url + file, digest) for file, digest in digests.items()}


_DIGITS = tuple(string.digits)
_SPECS = (
    Spec("digits", "", (8, 8, 1), _DIGITS),
    Spec(
        "mnist",
        "mnist",
        (28, 28, 1),
        _DIGITS,
        archives=_archives(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            {
                "train-images-idx3-ubyte.gz": "sha256:"
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "train-labels-idx1-ubyte.gz": "sha256:"
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "t10k-images-idx3-ubyte.gz": "sha256:"
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "t10k-labels-idx1-ubyte.gz": "sha256:"
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            },
        ),
    ),
    Spec(
        "cifar10",
        "cifar10",
        (32, 32, 3),
        tuple(_CIFAR10.split()),
        archives=_archives(
            "https://www.cs.toronto.edu/~kriz/",
            {
                "cifar-10-binary.tar.gz": "sha256:"
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            },
        ),
    ),
    Spec(
        "cifar100",
        "cifar100",
        (32, 32, 3),
        tuple(_CIFAR100.split()),
        archives=_archives(
            "https://www.cs.toronto.edu/~kriz/",
            {
                "cifar-100-binary.tar.gz": "sha256:"
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            },
        ),
    ),
    Spec(
        "emnist",
        "emnist/byclass",
        (28, 28, 1),
        tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase),
        archives=_archives(
            "https://biometrics.nist.gov/cs_links/EMNIST/",
            {
                "gzip.zip": "sha256:"
                "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
            },
        ),
        is_transposed=True,
    ),
    Spec(
        "gtsrb",
        "gtsrb",
        (32, 32, 3),
        _GTSRB,
        archives=_archives(
            "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/",
            {
                "GTSRB_Final_Training_Images.zip": "md5:f33fd80ac59bff73c82d25ab499e03a3",
                "GTSRB_Final_Test_Images.zip": "md5:c7e4e6327067d32654124b0fe9e82185",
                "GTSRB_Final_Test_GT.zip": "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5",
            },
        ),
    ),
    Spec(
        "imagenet10",
        "imagenette/320px-v2",
        (_DEFAULT_IMAGE_SIZE, _DEFAULT_IMAGE_SIZE, 3),
        tuple(IMAGENETTE_CLASSES.values()),
        splits=("train", "validation"),
        archives=_archives(
            "https://s3.amazonaws.com/fast-ai-imageclas/",
            {
                "imagenette2-160.tgz": "sha256:"
                "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
                "imagenette2-320.tgz": "sha256:"
                "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c",
            },
        ),
        aliases={"test": "validation"},
        is_resized=True,
    ),
)
_BY_NAME = {spec.name: spec for spec in _SPECS}

NAMES = tuple(_BY_NAME)


def spec_of(name: str, image_size: int | None = None) -> Spec:
    """Looks a data set up.

    Args:
      name: one of `NAMES`.
      image_size: the side of the square images, for `imagenet10` only (default 224).

    Raises:
      ValueError: an unknown name, or a size for a set whose images have one.
    """
    if name not in _BY_NAME:
        raise ValueError(f"data.load: unknown data set {name!r}; known: {', '.join(NAMES)}.")
    spec = _BY_NAME[name]
    if image_size is None:
        return spec
    if name != "imagenet10":
        raise ValueError(
            f"data.load: image_size is an option of imagenet10 only, "
            f"got image_size={image_size} for {name}."
        )
    if image_size < 1:
        raise ValueError(f"data.load: need image_size >= 1, got image_size={image_size}.")
    config = "160px-v2" if image_size <= _SMALL_IMAGENETTE else "320px-v2"
    return dataclasses.replace(
        spec, folder=f"imagenette/{config}", image_shape=(image_size, image_size, 3)
    )
