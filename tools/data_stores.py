"""python -m tools.data_stores: one data store, written or read in a process of its own.

Used by tools/bench_data.py, in the environment that has all of them. Every store delivers batches
of 8 rows of 2048 tokens as int64 tensors; ours also labels and where documents begin.

    write STORE --corpus DIR --folder DIR
    read STORE --folder DIR [--workers N] [--state FILE]    one line of JSON on stdout
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEQ_LEN, BATCH = 2048, 8
WARM, MEASURED = 600, 800
Reader = tuple[Iterator[Any], Callable[[int], Any]]
"""Batches, and the state after so many of them."""


def _ours(order: str) -> Callable[[Path, int, Any], Reader]:
    def read(folder: Path, workers: int, state: Any) -> Reader:
        from data_pipeline import Corpus, Loader

        loader = Loader(
            Corpus.open(folder),
            seq_len=SEQ_LEN,
            batch_size=BATCH,
            seed=1,
            packing="concat",
            order=order,
            prefetch=workers,
        )
        if state is not None:
            loader.load_state_dict(state)
        return loader, lambda _: loader.state_dict()

    return read


def _stand_in_for_what_streaming_imports() -> None:
    class Absent:
        pass

    for name, known in {
        "torchvision": (),
        "torchvision.datasets": ("VisionDataset",),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("to_tensor",),
        "transformers": (),
        "transformers.models": (),
        "transformers.models.auto": (),
        "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
        "transformers.feature_extraction_utils": ("BatchFeature",),
        "transformers.tokenization_utils_base": ("BatchEncoding",),
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update({"__path__": []} | dict.fromkeys(known, Absent))
        sys.modules[name] = module


def _rows(corpus_folder: Path) -> Iterator[Any]:
    from data_pipeline import Corpus

    corpus = Corpus.open(corpus_folder)
    for start in range(0, corpus.num_tokens - SEQ_LEN - 1, SEQ_LEN):
        yield corpus.read(start, start + SEQ_LEN + 1)


def write_mds(corpus: Path, folder: Path) -> None:
    _stand_in_for_what_streaming_imports()
    from streaming import MDSWriter

    columns = {"tokens": "bytes"}
    with MDSWriter(
        out=str(folder), columns=columns, compression="zstd:3", hashes=["xxh64"]
    ) as writer:
        for row in _rows(corpus):
            writer.write({"tokens": row.astype("<u2").tobytes()})


def _mds(shuffle: str) -> Callable[[Path, int, Any], Reader]:
    def read(folder: Path, workers: int, state: Any) -> Reader:
        import numpy as np
        import torch
        from torch.utils.data import DataLoader

        _stand_in_for_what_streaming_imports()
        from streaming import StreamingDataset

        class Tokens(StreamingDataset):
            def __getitem__(self, at: int) -> torch.Tensor:
                ids = np.frombuffer(super().__getitem__(at)["tokens"], np.uint16)
                return torch.from_numpy(ids.astype(np.int64))

        data = Tokens(
            local=str(folder),
            shuffle=True,
            shuffle_algo=shuffle,
            shuffle_seed=1,
            batch_size=BATCH,
            num_canonical_nodes=1,
        )
        if state is not None:
            data.load_state_dict(state)
        batches: DataLoader[torch.Tensor] = DataLoader(data, batch_size=BATCH, num_workers=workers)
        return iter(batches), lambda count: data.state_dict(count * BATCH, True)

    return read


def _documents(job: tuple[str, int]) -> Iterator[Any]:
    from data_pipeline import Corpus
    from data_pipeline.recombining import documents_of

    folder, shard = job
    for _, tokens, _ in documents_of(Corpus.open(folder), shard):
        yield tokens


def write_litdata(corpus: Path, folder: Path) -> None:
    import litdata

    from data_pipeline import Corpus

    litdata.optimize(
        fn=_documents,
        inputs=[(str(corpus), shard) for shard in range(Corpus.open(corpus).num_shards)],
        output_dir=str(folder),
        chunk_size=(SEQ_LEN + 1) * 2048,
        compression="zstd",
        compression_level="chunk",
        num_workers=1,
        item_loader=litdata.TokensLoader(block_size=SEQ_LEN + 1),
    )


def _litdata(folder: Path, workers: int, state: Any) -> Reader:
    import litdata
    import torch

    class Tokens(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> torch.Tensor:
            return torch.as_tensor(super().__getitem__(at)).to(torch.int64)

    data = Tokens(
        str(folder),
        item_loader=litdata.TokensLoader(block_size=SEQ_LEN + 1),
        shuffle=True,
        seed=1,
        drop_last=True,
    )
    batches = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)
    if state is not None:
        batches.load_state_dict(state)
    return iter(batches), lambda _: batches.state_dict()


def write_megatron(corpus: Path, folder: Path) -> None:
    from data_pipeline.megatron import export_megatron

    export_megatron(corpus, folder / "corpus")


def _megatron(folder: Path, workers: int, state: Any) -> Reader:
    import numpy as np
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split, compile_helpers

    class Ids:
        eod, pad, vocab_size, unique_identifiers = 2, 3, 1 << 15, {"class": "ids"}

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        compile_helpers()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        blend=([str(folder / "corpus")], None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=Ids(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(folder / "corpus"))
    documents = np.arange(len(indexed), dtype=np.int32)
    rows = int(indexed.sequence_lengths.sum()) // SEQ_LEN
    data = GPTDataset(indexed, str(folder / "corpus"), documents, rows, Split.train, config)
    first = state or 0
    order = [list(range(at, at + BATCH)) for at in range(first, len(data) - BATCH, BATCH)]
    batches = torch.utils.data.DataLoader(data, batch_sampler=order, num_workers=workers)
    return iter(batches), lambda count: first + count * BATCH


WRITERS = {"mds": write_mds, "litdata": write_litdata, "megatron": write_megatron}
READERS = {
    "ours": _ours("shuffle"),
    "ours-window": _ours("window"),
    "mds": _mds("py1s"),
    "mds-window": _mds("py1e"),
    "litdata": _litdata,
    "megatron": _megatron,
}


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, as far as they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def resident_mb() -> float:
    """The memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(store: str, folder: Path, workers: int, state: Path | None) -> dict[str, float]:
    """Tokens a second and memory; with the file `state`, milliseconds to the first batch there.

    Without it the state after the batches is left beside the folder.
    """
    import torch

    torch.set_num_threads(1)
    if store.startswith("mds"):
        _stand_in_for_what_streaming_imports()
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
    elif store == "litdata":
        import litdata  # noqa: F401
    elif store == "megatron":
        import megatron.core.datasets.gpt_dataset  # noqa: F401
    else:
        import data_pipeline.loader  # noqa: F401
    before = resident_mb()
    if state is not None:
        forget(folder)
        begin = time.perf_counter()
        batches, _ = READERS[store](folder, workers, json.loads(state.read_text()))
        next(batches)
        return {"first_batch_ms": 1000 * (time.perf_counter() - begin)}
    batches, state_after = READERS[store](folder, workers, None)
    for _ in range(WARM):
        next(batches)
    begin = time.perf_counter()
    for _ in range(MEASURED):
        next(batches)
    seconds = time.perf_counter() - begin
    grown = resident_mb() - before
    note = folder.parent / f"{store}.state.json"
    note.write_text(json.dumps(state_after(WARM + MEASURED)))
    return {"tokens_per_s": MEASURED * BATCH * SEQ_LEN / seconds, "memory_mb": grown}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.data_stores", description=__doc__)
    parser.add_argument("action", choices=("write", "read"))
    parser.add_argument("store", choices=sorted(READERS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--state", type=Path)
    options = parser.parse_args()
    if options.action == "write":
        WRITERS[options.store](options.corpus, options.folder)
    else:
        print(json.dumps(measure(options.store, options.folder, options.workers, options.state)))
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # some of them leave threads and processes that never end
