"""What each rank checks about its own machine. A check returns facts, and problems in words.

Every function takes what it looks at as parameters, so a fault can be put in its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import socket
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline import Corpus, CorruptDataError, DataError
from data_pipeline.streams import is_url
from train.config import ConfigError, RunConfig, dump_config
from train.corpora import Corpora, check_vocabularies, with_total_tokens, with_vocabulary
from train.parallel.ranks import NoDeviceError, own_device

SOURCES = ("hope", "train", "data_pipeline", "launch")
SUFFIXES = (".py", ".cpp", ".cu", ".h")
SHARDS_READ = 16  # of each corpus: the first, the last and some in between
PACKAGES = ("numpy", "triton", "flash-attn", "deepspeed", "megatron-core")  # what may compute
NONE = "none"
SIZE = 192
# Relative to the largest entry of the product; a wrong unit, lane or driver is off by far more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def code_digest(root: Path | None = None) -> str:
    """SHA-256 over the names and the content of this project's sources under `root`."""
    root = root or Path(__file__).parent.parent
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted(p for p in (root / room).rglob("*") if p.suffix in SUFFIXES):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What has to be the same on every node, by name."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "code": code_digest()[:12],
        **{name: package_version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        found["gpu"] = torch.cuda.get_device_name()
    return found


def package_version(name: str) -> str:
    """Of an installed package; NONE where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NONE


def config_digest(config: RunConfig) -> str:
    """SHA-256 of the resolved configuration."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]


def check_data(config: RunConfig) -> tuple[str, list[str]]:
    """(digest of the fingerprints, problems) of every corpus that `data` names.

    They must be made with one tokenizer and fit the configuration. All shards of a folder must be
    there in their full size; some of each are opened and read. Of a corpus at a URL only the
    manifest is: reading would copy whole shards.
    """
    data = config.data
    places = [source.path for source in data.train] + [data.validation]
    places += [source.validation for source in data.train if source.validation is not None]
    opened: list[Corpus] = []
    problems = []
    for place in places:
        try:
            corpus = Corpus.open(**data.where(place))
            opened.append(corpus)
            if not is_url(place):
                _check_shards(corpus)
        except (DataError, CorruptDataError, OSError) as error:
            problems.append(f"data: {' '.join(str(error).split())}")
    if not problems:
        corpora = Corpora(opened[: len(data.train)], opened[len(data.train)])
        try:
            check_vocabularies(opened)
            with_total_tokens(with_vocabulary(config, corpora), corpora)
        except ConfigError as error:
            problems.append(str(error))
    fingerprints = [corpus.fingerprint for corpus in opened]
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:12], problems


def _check_shards(corpus: Corpus) -> None:
    """Raises DataError, CorruptDataError or OSError at the first shard that can't be read."""
    for entry in corpus.manifest["shards"]:
        path = Path(corpus.path) / entry["file"]
        if not path.exists():
            raise DataError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}")
    count = corpus.num_shards
    chosen = {round(i * (count - 1) / (SHARDS_READ - 1)) for i in range(SHARDS_READ)}
    for shard in chosen:
        start = corpus.shard_start(shard)
        corpus.read(start, min(start + 2, corpus.num_tokens))


def write_nonce(folder: Path, nonce: str) -> str | None:
    """Put the first rank's file into the run folder; returns the problem, if there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        nonce_file(folder, nonce).write_text(nonce)
    except OSError as error:
        return f"can't write to run folder {folder}: {error.strerror}"
    return None


def check_folder(folder: Path, nonce: str, rank: int, wait: Callable[[], bool]) -> str | None:
    """Read the first rank's file, write and remove one of our own; returns the problem.

    wait: called while the file has not shown up (network file systems take a while); False ends it.
    """
    shared = nonce_file(folder, nonce)
    try:
        while not (shared.exists() and shared.read_text() == nonce):
            if not wait():
                return f"run folder {folder} is not the one that rank 0 sees: its file is not there"
        own = nonce_file(folder, f"{nonce}-{rank}")
        own.write_text(nonce)
        own.unlink()
    except OSError as error:
        return f"can't write to run folder {folder}: {error.strerror}"
    return None


def nonce_file(folder: Path, nonce: str) -> Path:
    return folder / f".preflight-{nonce}"


def device_of(local_rank: int) -> tuple[torch.device, list[str]]:
    """The GPU of this rank, or the CPU; the problem of a rank that has none of its own, which looks
    at another's."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), []
    devices = torch.cuda.device_count()
    try:
        return torch.device("cuda", own_device(local_rank, devices)), []
    except NoDeviceError as error:
        return torch.device("cuda", local_rank % devices), [f"device: {error}"]


def check_matmul(
    device: torch.device, matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> list[str]:
    """Products of random matrices beside the same in float64 on the CPU; returns the problems.

    float32 anywhere, bfloat16 too on a GPU.
    """
    problems = []
    dtypes = [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else [])
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(2))
        expected = a.double() @ b.double()
        got = matmul(a.to(device), b.to(device)).cpu().double()
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE[dtype]:
            problems.append(
                f"matmul: a product in {str(dtype).removeprefix('torch.')} on {device} is off by "
                f"{error:.1e} of its largest entry; {TOLERANCE[dtype]:.0e} is allowed"
            )
    return problems


def memory() -> tuple[int, int]:
    """Bytes of main memory, and bytes free in /dev/shm."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return total, shared


def interface_addresses() -> dict[str, str]:
    """The IPv4 address of every network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def network(master: str, interfaces: dict[str, str], wanted: str | None) -> tuple[str, list[str]]:
    """(what to show, problems) of how this node reaches the others.

    master: address or name of node 0; wanted: GLOO_SOCKET_IFNAME. Without it gloo listens on the
    address of the host's own name, which other nodes can't reach where that is a loopback one.
    """
    names = {address: name for name, address in interfaces.items()}
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))
            route = probe.getsockname()[0]
    except OSError as error:
        return "?", [f"network: no way to {master}: {error.strerror or error}"]
    shown = f"{route} ({names.get(route, '?')})"
    if wanted:
        missing = [name for name in wanted.split(",") if name not in interfaces]
        if missing:
            there = ", ".join(interfaces)
            return shown, [
                f"network: GLOO_SOCKET_IFNAME names {missing[0]}, which has no IPv4 address here; "
                f"there are {there}"
            ]
        return f"{interfaces[wanted.split(',')[0]]} ({wanted})", []
    if route.startswith("127."):
        return shown, []  # all ranks are on one machine
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "no address"
    if own not in names or own.startswith("127."):
        return shown, [
            f"network: the host's own name has {own}, where other nodes can't reach gloo; set "
            f"GLOO_SOCKET_IFNAME={names.get(route, '?')}"
        ]
    return shown, []
