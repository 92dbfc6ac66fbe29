"""Preparing a set that is not on disk yet, or saying within seconds why that cannot be done."""

import pathlib
import threading
import urllib.parse

from advjax.data import catalogue

# How long the host of the official files may take to answer anything at all, in seconds.
PROBE_TIMEOUT = 5.0


def prepare(spec: catalogue.Spec, data_dir: pathlib.Path) -> None:
    """Downloads the official files of a set and prepares them under `data_dir`.

    Args:
      spec: the set.
      data_dir: the tensorflow-datasets folder.

    Raises:
      ConnectionError: the official files cannot be reached.
      ValueError: what was downloaded is not the official file.
    """
    url = next(iter(spec.archives.values())).url
    problem = probe(url)
    if problem:
        raise _unreachable(spec, data_dir, url, problem)

    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager, util

    from advjax.data import builders

    _, _, config = spec.folder.partition("/")
    builder = builders.BUILDERS[spec.name](
        data_dir=data_dir, file_format="array_record", config=config or None
    )
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except (requests.RequestException, util.DownloadError) as error:
        raise _unreachable(spec, data_dir, url, " ".join(str(error).split())) from error
    except download_manager.NonMatchingChecksumError as error:
        raise ValueError(
            f"data.load: a file of {spec.name} came with another content than the official one; "
            "try again, or fetch it in another network."
        ) from error


def probe(url: str) -> str | None:
    """Asks the host of `url` for an answer, any answer.

    tensorflow-datasets itself retries for minutes. Proxies set in the environment are used, and
    the whole attempt is bounded: looking up a name has no timeout of its own.

    Returns:
      None if the host answers, else what went wrong.
    """
    import requests

    problem = [f"no answer within {PROBE_TIMEOUT:g} s"]

    def ask() -> None:
        try:
            requests.head(url, timeout=PROBE_TIMEOUT, allow_redirects=False)
            problem.clear()
        except requests.RequestException as error:
            problem[:] = [type(error).__name__]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT)
    return problem[0] if problem else None


def _unreachable(
    spec: catalogue.Spec, data_dir: pathlib.Path, url: str, problem: str
) -> ConnectionError:
    host = urllib.parse.urlsplit(url).hostname
    return ConnectionError(
        f"data.load: {spec.name} is not prepared in {data_dir} and cannot be downloaded from "
        f"{host} ({problem}); point TFDS_DATA_DIR or --data_dir at a folder that holds it, "
        "or use 'digits', which needs no download."
    )
