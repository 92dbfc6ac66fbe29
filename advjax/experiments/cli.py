"""What launchers share: flags, parsing of lists, errors as one sentence with exit code 2."""

import ast
import hashlib
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # what is defined here belongs to the launcher, and to its --help


def define_common_flags(default_workdir: str) -> None:
    """Defines the flags of every launcher.

    Args:
      default_workdir: default of --workdir.
    """
    flags.DEFINE_string("workdir", default_workdir, "Folder for everything that the run writes.")
    flags.DEFINE_string("data_dir", None, "Prepared tfds data; TFDS_DATA_DIR if not given.")
    flags.DEFINE_bool("smoke", False, "A tiny version of everything, in seconds.")
    flags.DEFINE_string(
        "compilation_cache",
        "~/.cache/advjax/xla",
        "Folder for compiled programs, so that the next run need not compile; empty for none.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def define_network_flags(num_examples: int = 512) -> None:
    """Defines the flags for the settings of `networks.NetworkConfig`, and --seed.

    Args:
      num_examples: default of --num_examples.
    """
    flags.DEFINE_string("dataset", "digits", "Data set: see docs/data.md.")
    flags.DEFINE_string("model", "cnn", "Network: a name of advjax.models.NAMES.")
    flags.DEFINE_string("weights", "", "npz file of reference weights, in place of training.")
    flags.DEFINE_integer("num_examples", num_examples, "Test images that are used.")
    flags.DEFINE_integer(
        "seed", 0, "Seed of the network and of the attacks.", lower_bound=0, upper_bound=2**31 - 2
    )
    flags.DEFINE_integer("num_epochs", 30, "Training epochs.")
    flags.DEFINE_integer("batch_size", 64, "Training images a step.")
    flags.DEFINE_float("learning_rate", 1e-3, "Of Adam, with a cosine schedule to 0.")
    flags.DEFINE_bool("augment", False, "Random crops and flips in training, for photographs.")


def network_settings() -> dict[str, Any]:
    """The values of the flags of `define_network_flags`, but --seed, by name."""
    names = (
        "dataset", "model", "weights", "num_examples", "num_epochs", "batch_size",
        "learning_rate", "augment",
    )  # fmt: skip
    return {name: FLAGS[name].value for name in names}


def start_jax() -> None:
    """Joins the other processes and turns on the compilation cache."""
    import jax  # here, so that --help does not wait for it

    from advjax.core import parallel

    # orbax tells every step of every checkpoint; --verbosity=0 brings that back.
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if "all_devices" in FLAGS and FLAGS.all_devices:
        parallel.use_cores()
    if FLAGS.coordinator is not None and "all_devices" not in FLAGS:
        raise ValueError(
            "--coordinator: need a launcher that can split its work (those with --all_devices); "
            "in this one every process would do all of it."
        )
    parallel.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = pathlib.Path(FLAGS.compilation_cache).expanduser() / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def make_mesh() -> Any:
    """The devices to split batches over, with --all_devices or several processes; else None."""
    from advjax.core import parallel

    return parallel.make_mesh() if FLAGS.all_devices or FLAGS.coordinator is not None else None


def _processor() -> str:
    """A name for the kind of processor: a program for another kind may not run on this one."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        kind = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def parse_range(name: str, text: str) -> tuple[float, ...]:
    """Numbers from "first:last:count" or "a,b,c"; a number may be a fraction such as 8/255.

    Args:
      name: the flag, for the error.
      text: its value.

    Raises:
      ValueError: text of another form.

    Example:
      >>> parse_range("epsilons", "0:0.3:4")
      (0.0, 0.1, 0.2, 0.3)
      >>> parse_range("epsilons", "0,8/255")[1] == 8 / 255
      True
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            low, high, number = _number(first), _number(last), int(count)
            if number < 2:
                raise ValueError
            return tuple(round(low + (high - low) * i / (number - 1), 12) for i in range(number))
        return tuple(_number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--{name}: need FIRST:LAST:COUNT with COUNT >= 2, or numbers with commas, "
            f"got {text!r}."
        ) from None


def parse_whole(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers, in the forms of `parse_range`.

    Args:
      name: the flag, for the error.
      text: its value.

    Raises:
      ValueError: text of another form, or a number that is not whole.

    Example:
      >>> parse_whole("densities", "10:30:3")
      (10, 20, 30)
    """
    numbers = parse_range(name, text)
    if not all(number.is_integer() for number in numbers):
        raise ValueError(f"--{name}: need whole numbers, got {text!r}.")
    return tuple(map(int, numbers))


def _number(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under) if under else float(over)


def parse_names(text: str) -> tuple[str, ...]:
    """Names with commas between them, without repetition, in the order given."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse_options(flag: str, text: str) -> dict[str, dict[str, Any]]:
    """Options by owner, from "badnets.size=5,badnets.value=[1,1,0],sig.frequency=3".

    Args:
      flag: its name, for the error.
      text: OWNER.NAME=VALUE with commas between them. A value is a Python literal, or else a text.

    Raises:
      ValueError: text of another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for part in _parts(text):
        found = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", part)
        if found is None:
            raise ValueError(
                f"--{flag}: need ATTACK.NAME=VALUE with commas between them, got {text!r}."
            )
        owner, name, value = found.groups()
        options.setdefault(owner, {})[name] = _value(value.strip())
    return options


def parse_fields(flag: str, text: str) -> dict[str, Any]:
    """Options of one thing, from "use_norm=False,stages=(2,2,2)".

    Args:
      flag: its name, for the error.
      text: NAME=VALUE with commas between them; values as for `parse_options`.

    Raises:
      ValueError: text of another form.
    """
    fields: dict[str, Any] = {}
    for part in _parts(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"--{flag}: need NAME=VALUE with commas between them, got {text!r}.")
        fields[name.strip()] = _value(value.strip())
    return fields


def _parts(text: str) -> list[str]:
    """What stands between the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_seeds(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    Raises:
      ValueError: text of another form.
    """
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError
        return seeds
    except ValueError:
        raise ValueError(f"--seeds: need whole numbers >= 0 with commas, got {text!r}.") from None


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; bad input is one sentence and exit code 2.

    Args:
      main: the launcher; it reads `FLAGS`.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        if any(argument in ("--help", "-help", "-h", "--helpshort") for argument in arguments[1:]):
            print(sys.modules["__main__"].__doc__)
            print(FLAGS.main_module_help())
            sys.exit(0)
        try:
            rest = FLAGS(arguments)
        except flags.Error as error:
            _fail(str(error).splitlines()[0])
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}: options are --NAME=VALUE.")
        return rest

    def guarded(_: Sequence[str]) -> None:
        try:
            main()
        except (ValueError, OSError) as error:
            if os.environ.get("ADVJAX_DEBUG"):
                raise
            _fail(str(error))
        except KeyboardInterrupt:
            print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
