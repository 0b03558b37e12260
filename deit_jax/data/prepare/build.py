"""Turn images into a TFDS data set of ArrayRecord files, without TensorFlow: `deit prepare`."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deit_jax.data.classes import imagenet_list
from deit_jax.data.prepare import readers
from deit_jax.data.prepare.writer import Job, make_features, write_shard
from deit_jax.data.sources.tfds import require_array_record
from deit_jax.errors import UserError
from deit_jax.storage import read_lines

log = logging.getLogger("deit_jax")

JOURNAL = ".prepare.jsonl"  # the plan, then one line for each finished shard
CHECKSUMS = "SHA256SUMS"


def prepare(
    source: Path,
    destination: Path,
    name: str = "",
    max_side: int = 0,
    workers: int = 0,
    skip_unreadable: bool = False,
    eval_fraction: float = 0.2,
    columns: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """Write, finish or check a data set; return where it is, what is in it and its checksum.

    Any number of `workers` (processes; 0 = one a core) writes the same bytes. `columns` are those
    of a table's images and labels, "" = by their types. Raise UserError.
    """
    require_array_record("deit prepare")
    plan = readers.make_plan(source, eval_fraction, columns)
    plan = dataclasses.replace(plan, name=name or plan.name)
    if plan.name == readers.IMAGENET:
        plan = dataclasses.replace(plan, version="5.1.0")
    _check_name(plan)
    folder = destination / plan.name / plan.version
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = _open_journal(folder, plan, [max_side, skip_unreadable])
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    jobs = _jobs(plan, folder, journal, max_side, skip_unreadable)
    _check_space(folder, [job for job in jobs if not job.sha256])
    results = _run(jobs, folder / JOURNAL, workers or _cores())
    kept = [line["file"] for line in results if "kept" in line]
    lines = {**journal, **{line["file"]: line for line in results if "kept" not in line}}
    return _finish(plan, folder, [lines[job.path.name] for job in jobs], len(kept), jobs[0])


def _cores() -> int:
    from deit_jax.data.loader import usable_cores

    return usable_cores()


def _check_name(plan: readers.Plan) -> None:
    import tensorflow_datasets as tfds

    if not tfds.core.naming.is_valid_dataset_name(plan.name) or plan.name != plan.name.lower():
        raise UserError(f"--name={plan.name}: use small letters, digits and _, a letter first")
    with contextlib.suppress(tfds.core.DatasetNotFoundError):
        # TFDS would open such a folder with the features of its own data set.
        own = tfds.builder_cls(plan.name) and plan.name != readers.IMAGENET
        if own or plan.classes != imagenet_list("labels"):
            raise UserError(f"{plan.name} is another data set of TFDS's own; give --name=NAME")


def _open_journal(folder: Path, plan: readers.Plan, options: list) -> dict[str, dict]:
    """Return the lines of finished shards by file; raise UserError if they are of another plan."""
    facts = {s: [shard.facts() for shard in shards] for s, shards in plan.splits.items()}
    text = json.dumps([plan.classes, facts, options])
    head = {"plan": hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()}
    path = folder / JOURNAL
    lines = read_lines(path)
    if (lines and lines[0] != head) or (not lines and (folder / "dataset_info.json").exists()):
        raise UserError(
            f"{folder} holds a data set of other images or options; delete it, or choose --name"
        )
    # Written anew, so that a line cut short by a crash does not spoil the next one.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines[1:]]))
    os.replace(temporary, path)
    return {line["file"]: line for line in lines[1:]}


def _jobs(plan, folder: Path, journal: dict, max_side: int, skip_unreadable: bool) -> list[Job]:
    encoding = "jpeg" if plan.name == readers.IMAGENET else None
    jobs = []
    for split, shards in plan.splits.items():
        for i, shard in enumerate(shards):
            path = folder / f"{plan.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
            known = journal.get(path.name, {}).get("sha256")
            count = len(plan.classes)
            jobs.append(Job(shard, path, count, encoding, max_side, skip_unreadable, known))
    return jobs


def _check_space(folder: Path, jobs: list[Job]) -> None:
    # With --max-side less is needed, but how much is not known beforehand.
    need = 0 if any(job.max_side for job in jobs) else sum(job.shard.bytes for job in jobs)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{folder}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _run(jobs: list[Job], journal: Path, workers: int) -> list[dict[str, Any]]:
    """Return every job's line, noting each in the journal as soon as it is done."""
    results, images = [], sum(len(job.shard) for job in jobs)
    bar = tqdm(total=images, unit="image", dynamic_ncols=True, leave=False, disable=None)
    try:
        found = contextlib.closing(_results(jobs, min(workers, len(jobs))))
        with bar, journal.open("a", buffering=1) as file, found as lines:
            for job, line in lines:
                if "kept" not in line:
                    file.write(json.dumps(line) + "\n")
                results.append(line)
                bar.update(len(job.shard))
    finally:
        if len(results) < len(jobs):
            log.info("%d of %d shards are finished and kept", len(results), len(jobs))
    return results


def _results(jobs: list[Job], workers: int) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    """Iterate over (job, its line) as they finish, also over those in hand when one fails."""
    if workers == 1:
        for job in jobs:
            yield job, write_shard(job)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    waiting = iter(jobs)
    failed: BaseException | None = None
    with _noted_interrupts() as interrupts, ProcessPoolExecutor(workers, context) as pool:
        in_hand: dict[Future, Job] = {}
        while True:
            failed = failed or next(iter(interrupts), None)
            with _no_interrupts():  # inherited by the processes that this starts
                while failed is None and len(in_hand) < workers and (new := next(waiting, None)):
                    in_hand[pool.submit(write_shard, new)] = new
            if not in_hand:
                break
            done, _ = wait(in_hand, return_when=FIRST_COMPLETED)
            for future in done:
                job = in_hand.pop(future)
                if error := future.exception():
                    failed = failed or error
                else:
                    yield job, future.result()
    finished = next(waiting, None) is None  # then there is nothing left to interrupt
    if failed is not None and not (finished and isinstance(failed, KeyboardInterrupt)):
        raise failed


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Leave Ctrl-C, which the terminal sends to every process of the command, to the parent.

    Processes that are started inherit what is blocked; the parent gets its own afterwards.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[KeyboardInterrupt]]:
    """Note Ctrl-C in a list; raised inside of `wait`, it could leave a lock taken for good."""
    noted: list[KeyboardInterrupt] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread is interrupted, and only it may set this
        return

    def note(*_) -> None:
        if not noted:
            log.info("finishing the shards in hand")
        noted.append(KeyboardInterrupt())

    old = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, old)


def _finish(plan, folder: Path, lines: list[dict], kept: int, job: Job) -> dict[str, Any]:
    """Write the checksums and what TFDS asks for, which makes the data set complete."""
    import tensorflow_datasets as tfds

    sums = "".join(f"{line['sha256']}  {line['file']}\n" for line in lines)
    skipped = [name for line in lines for name in line["skipped"]]
    infos, examples, start = [], {}, 0
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=plan.name, filetype_suffix="array_record"
    )
    for split, shards in plan.splits.items():
        own = lines[start : start + len(shards)]
        start += len(shards)
        lengths = [line["examples"] for line in own]
        examples[split] = sum(lengths)
        info = tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=sum(line["bytes"] for line in own),
            filename_template=template.replace(split=split),
        )
        infos.append(info)
    try:
        (folder / CHECKSUMS).write_text(sums)
        if kept < len(lines) or not (folder / "dataset_info.json").exists():
            tfds.folder_dataset.write_metadata(
                data_dir=folder,
                features=make_features(plan.classes, job.encoding),
                split_infos=infos,
                check_data=False,  # would need TensorFlow
                supervised_keys=("image", "label"),
                description=f"Written by deit prepare{' --max-side' if job.max_side else ''}.",
            )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return {
        "name": plan.name,
        "path": str(folder),
        "classes": len(plan.classes),
        "examples": examples,
        "shards": len(lines),
        "shards_kept": kept,
        "bytes": sum((folder / line["file"]).stat().st_size for line in lines),
        "sha256": hashlib.sha256(sums.encode()).hexdigest(),
        "skipped": skipped,
    }
